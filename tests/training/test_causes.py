"""`CausesCallback` through `trainer.train()`: it changes nothing, reads what is there, and its rules speak."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer
from trl import GRPOTrainer, SFTConfig, SFTTrainer

from bench import _cause_runs as runs
from hf_effi.callbacks import AutoLRSCallback, CauseMoment, CausesCallback, TrainDoctor
from hf_effi.checkpoint.snapshot import take_rng
from hf_effi.errors import RefusedError
from hf_effi.functional import metrics
from hf_effi.functional.causes import root_of_squares
from tests.helpers import (
    grpo_args,
    lm_dataset,
    push_args,
    run_grpo,
    sft_dataset,
    tiny_qwen3,
    tiny_tokenizer,
    weights_of,
)
from tests.helpers.sampling import StopAt

PREFIX = "effi/causes/"


def plain(folder: Path, *callbacks: Any, resume: str | None = None, model: Any = None, **over: Any) -> Trainer:
    settings = {"max_steps": 6, "save_strategy": "no", "max_grad_norm": 0.5, "logging_steps": 2, **over}
    model = tiny_qwen3(num_hidden_layers=2) if model is None else model
    trainer = Trainer(model, push_args(folder, **settings), train_dataset=lm_dataset(32), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def readings(trainer: Any) -> list[dict[str, float]]:
    found = [{k: v for k, v in entry.items() if k.startswith(PREFIX)} for entry in trainer.state.log_history]
    return [entry for entry in found if entry]


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Watch(CausesCallback):
    """Notes how many hooks each update had."""

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_init_end(args, state, control, **kwargs)
        self.hooked: list[int] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before = hooks(kwargs["model"])
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        self.hooked.append(before - hooks(kwargs["model"]))


def test_it_observes_only_and_reads_what_is_there(tmp_path: Path) -> None:
    stock = plain(tmp_path / "stock")
    rng = take_rng()["torch"]
    callback = Watch(3)
    ours = plain(tmp_path / "ours", callback)
    assert torch.equal(take_rng()["torch"], rng)
    left, right = weights_of(stock.model), weights_of(ours.model)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert callback.hooked == [3, 0, 0, 3, 0, 0] and hooks(ours.model) == 0
    assert "clip_grad_norm_" not in vars(ours.accelerator)
    first, second = readings(ours)
    assert (first[metrics.CAUSE_UPDATE], second[metrics.CAUSE_UPDATE]) == (1, 4)
    # The gradients before clipping: all of them together are what the Trainer logs, which clips to 0.5.
    logged = [entry["grad_norm"] for entry in ours.state.log_history if entry.get("step") == 4]
    whole = root_of_squares([one.frobenius for one in callback.gradients_read])
    assert whole == pytest.approx(logged[0], rel=1e-4) and whole > 1
    parts = (metrics.CAUSE_LAYER_GRADIENT, metrics.CAUSE_OUTER_GRADIENT)
    assert root_of_squares([v for name, v in second.items() if name.startswith(parts)]) == pytest.approx(whole)
    assert first[f"{metrics.CAUSE_LAYER_SPECTRAL}0"] < first[f"{metrics.CAUSE_LAYER_GRADIENT}0"]
    assert f"{metrics.CAUSE_PART_GRADIENT}self_attn.q_proj" in first and metrics.CAUSE_GRADIENT_UNEVENNESS in first
    assert first[f"{metrics.CAUSE_WEIGHT_NORM}0"] == 1 and second[f"{metrics.CAUSE_WEIGHT_NORM}0"] != 1
    assert second[metrics.CAUSE_EFFECTIVE_LR] == pytest.approx(1, abs=0.1)
    assert -3 < first[f"{metrics.CAUSE_KURTOSIS}1"] < 10 and first[f"{metrics.CAUSE_OUTLIER_RATIO}1"] > 1
    assert first[f"{metrics.CAUSE_MASSIVE_TOKENS}1"] == 0 and not any("straggler" in name for name in first)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    one, many = CausesCallback(9), CausesCallback(9)
    plain(tmp_path / "one", one, max_steps=1, per_device_train_batch_size=8, logging_steps=1)
    over = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "activation_checkpointing": True}
    plain(tmp_path / "many", many, max_steps=1, logging_steps=1, **over)
    assert many.latest == pytest.approx(one.latest, rel=1e-3, abs=1e-4)


def test_stopped_and_resumed_it_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Stopped between a reading and the log entry that will carry it."""
    saved = {"save_strategy": "steps", "save_steps": 100, "max_steps": 8, "logging_steps": 3}
    whole = plain(tmp_path / "whole", CausesCallback(3), **saved)
    plain(tmp_path / "parts", CausesCallback(3), StopAt(5), **saved)
    resumed = plain(
        tmp_path / "parts", CausesCallback(3), resume=str(tmp_path / "parts" / "checkpoint-5"), **saved
    )  # fmt: skip
    assert readings(resumed)[-2:] == readings(whole)[-2:] and readings(whole)[-1][metrics.CAUSE_UPDATE] == 7
    left, right = weights_of(whole.model), weights_of(resumed.model)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("rule", list(runs.BROKEN))
def test_a_run_that_is_broken_on_purpose_is_told(rule: str) -> None:
    assert runs.broken_rules(rule, 0) == [rule]


def test_healthy_runs_are_left_alone() -> None:
    """Fifty of them are in `bench/results/causes.json`."""
    for name, make, over in runs.healthy_runs(10):
        assert runs.rules_found(make(), runs.text_rows(over["seed"]), **{**over, "max_steps": 5}) == [], name


# --- parts -----------------------------------------------------------------------------------------------------------


class Part:
    """Draws random numbers, makes gradients, changes the mode; none of it may stay."""

    def __init__(self, name: str = "effi/causes/part", value: Any = 2.5) -> None:
        self.name, self.value, self.moments = name, value, []

    def due(self, step: int) -> bool:
        return step % 2 == 0

    def measure(self, moment: CauseMoment) -> dict[str, float]:
        assert all(p.grad is None for p in moment.model.parameters())
        moment.model.eval()
        torch.rand(3)
        batch = torch.tensor([[5, 6, 7]])
        moment.model(input_ids=batch, labels=batch).loss.backward()
        self.moments.append((moment.step, moment.trainer is not None, moment.optimizer is not None))
        return {self.name: self.value, "effi/causes/not_finite": float("nan")}


def test_a_part_measures_when_it_is_due_and_leaves_nothing_behind(tmp_path: Path) -> None:
    def dropping() -> Any:  # so that a random number more or less would be seen
        return tiny_qwen3(num_hidden_layers=1, attention_dropout=0.3)

    stock, part = plain(tmp_path / "stock", model=dropping(), logging_steps=1), Part()
    ours = plain(tmp_path / "ours", CausesCallback(4, parts=[part]), model=dropping(), logging_steps=1)
    assert part.moments == [(0, True, True), (2, True, True), (4, True, True)]
    steps = [entry["step"] for entry in ours.state.log_history if entry.get("effi/causes/part") == 2.5]
    assert steps == [1, 3, 5] and "effi/causes/not_finite" not in str(ours.state.log_history)
    left, right = weights_of(stock.model), weights_of(ours.model)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("part", "words"),
    [(Part("loss"), "Begin it with 'effi/'"), (Part(value="high"), "Return a number"), (Part(value=True), "a number")],
)
def test_a_part_that_fails_ends_the_reading_and_not_the_run(
    tmp_path: Path, caplog: Any, part: Part, words: str
) -> None:
    trainer = plain(tmp_path, CausesCallback(2, parts=[part]), max_steps=4)
    assert trainer.state.global_step == 4 and readings(trainer) == []
    assert caplog.text.count("CausesCallback reads nothing more, and the run goes on") == 1 and words in caplog.text
    assert hooks(trainer.model) == 0


# --- other runs ------------------------------------------------------------------------------------------------------


def test_updates_that_are_only_tried_are_passed_by(tmp_path: Path) -> None:
    callback = Watch(2)
    search = AutoLRSCallback(1e-4, 1e-2, 4, 2, 4, validation=False)
    trainer = plain(tmp_path, search, callback, max_steps=20, logging_steps=1, lr_scheduler_type="constant")
    tried = {entry["step"] for entry in trainer.state.log_history if entry.get(metrics.PROBE)}
    read = [entry["effi/causes/update"] for entry in trainer.state.log_history if "effi/causes/update" in entry]
    assert tried and read and not tried & set(read)


def test_layers_that_need_no_gradient_and_optimizers_that_leave_none(tmp_path: Path, caplog: Any) -> None:
    model = tiny_qwen3(num_hidden_layers=2)
    model.model.layers[0].requires_grad_(False)
    callback = CausesCallback(2)
    plain(tmp_path / "frozen", callback, model=model, max_steps=2)
    assert f"{metrics.CAUSE_LAYER_GRADIENT}1" in callback.latest
    assert (
        f"{metrics.CAUSE_LAYER_GRADIENT}0" not in callback.latest and f"{metrics.CAUSE_KURTOSIS}0" in callback.latest
    )

    class Taken(Trainer):
        def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
            norm = super()._get_grad_norm(model, grad_norm)
            self.model.zero_grad()  # as an optimizer that has already used them
            return norm

    args = push_args(tmp_path / "taken", max_steps=2, save_strategy="no")
    Taken(tiny_qwen3(num_hidden_layers=1), args, train_dataset=lm_dataset(8), callbacks=[CausesCallback(2)]).train()
    assert "no weight has a gradient before the optimizer's step" in caplog.text


def test_a_compiled_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="pass outliers=False"):
        plain(tmp_path, CausesCallback(), torch_compile=True)


def test_a_checkpoint_of_somebody_else_is_no_reason_to_stop(tmp_path: Path, caplog: Any) -> None:
    import json

    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    plain(tmp_path, CausesCallback(2), StopAt(2), **saved)
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["hf_effi.causes"] = {"reference": "?"}
    path.write_text(json.dumps(state))
    resumed = plain(tmp_path, CausesCallback(2), resume=str(path.parent), **saved)
    assert "nothing of CausesCallback that can be read" in caplog.text and readings(resumed)


def test_sft_and_grpo(tmp_path: Path) -> None:
    callback, doctor = CausesCallback(2), TrainDoctor(say=lambda sentence: None)
    args = push_args(tmp_path / "sft", SFTConfig, max_steps=3, save_strategy="no", max_length=32)
    SFTTrainer(
        tiny_qwen3(num_hidden_layers=1), args, train_dataset=sft_dataset(8), processing_class=tiny_tokenizer(),
        callbacks=[callback, doctor],
    ).train()  # fmt: skip
    assert f"{metrics.CAUSE_KURTOSIS}0" in callback.latest and f"{metrics.CAUSE_LAYER_GRADIENT}0" in callback.latest
    callback = CausesCallback(2)
    run_grpo(GRPOTrainer, grpo_args(tmp_path / "grpo", max_steps=2), callbacks=[callback])
    assert f"{metrics.CAUSE_KURTOSIS}0" in callback.latest and f"{metrics.CAUSE_LAYER_GRADIENT}0" in callback.latest
