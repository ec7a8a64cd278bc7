"""Temperature and beta that move through `trainer.train()`, and the next-token term on prompts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.callbacks import GenerationCapCallback, GRPOScheduleCallback, still3
from hf_effi.callbacks._grpo import Moved, sampling_settings
from hf_effi.errors import RefusedError
from hf_effi.schedules import constant, cosine, linear
from hf_effi.selection import HybridGate
from tests.helpers import (
    assert_bitwise_equal,
    grpo_args,
    lm_dataset,
    run_grpo,
    save_tiny,
    tiny_llama,
    tiny_qwen3,
    tiny_tokenizer,
)

TRAINERS = [GRPOTrainer, EffiGRPOTrainer]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model by its path, from which the reference is loaded too."""
    return save_tiny(tiny_qwen3(end_tokens=10), tiny_tokenizer(), tmp_path_factory.mktemp("model"))


def train(folder: Path, cls: type = GRPOTrainer, **over: Any) -> Any:
    names = ("reward_funcs", "callbacks", "model", "train", "hybrid_gate")
    kwargs = {name: over.pop(name) for name in names if name in over}
    resume = over.pop("resume_from_checkpoint", None)
    config = GRPOConfig if issubclass(cls, GRPOTrainer) and not issubclass(cls, EffiGRPOTrainer) else EffiGRPOConfig
    return run_grpo(cls, grpo_args(folder, config, **over), resume_from_checkpoint=resume, **kwargs)


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def watching(cls: type) -> type:
    """A trainer that compares the log-probs of its forwards with those of plain logits at its temperature."""

    class Watching(cls):  # type: ignore[misc]
        def _get_per_token_logps_and_entropies(self, model: Any, ids: Any, mask: Any, keep: int, *a: Any, **k: Any):
            found = super()._get_per_token_logps_and_entropies(model, ids, mask, keep, *a, **k)
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -keep - 1 : -1]
                wanted = (logits / self.temperature).log_softmax(-1).gather(2, ids[:, -keep:, None])[..., 0]
            real = mask[:, -keep:].bool() & (found[0] != 0)
            assert torch.allclose(found[0][real], wanted[real], atol=1e-5)
            self.seen = [*getattr(self, "seen", []), ("logp", self.state.global_step, self.temperature)]
            return found

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            assert self.generation_config.temperature == self.temperature == self.generation_kwargs["temperature"]
            self.seen = [*getattr(self, "seen", []), ("gen", self.state.global_step, self.temperature)]
            return super()._generate_single_turn(*args, **kwargs)

    return Watching


@pytest.mark.parametrize("cls", TRAINERS)
def test_a_schedule_that_stays_is_stock_to_the_bit(tmp_path: Path, checkpoint: Any, cls: type) -> None:
    over = {"model": str(checkpoint), "beta": 0.04, "temperature": 0.9}
    stock = train(tmp_path, **over)
    mine = {} if cls is GRPOTrainer else {"exact_savings": "off"}
    moved = train(tmp_path, cls, callbacks=[GRPOScheduleCallback(constant(), constant())], **over, **mine)
    assert_bitwise_equal(stock.model, moved.model)
    assert logged(moved, "effi/temperature") == [0.9] * 3 and logged(moved, "effi/beta") == [0.04] * 3


@pytest.mark.parametrize("cls", TRAINERS)
def test_the_temperature_is_that_of_sampling_and_of_the_log_probs(tmp_path: Path, checkpoint: Any, cls: type) -> None:
    """Two updates on each generation: the value moves with every second update, and old log-probs have the same."""
    trainer = train(
        tmp_path,
        watching(cls),
        model=str(checkpoint),
        beta=0.04,
        temperature=1.2,
        max_steps=4,
        steps_per_generation=2,
        callbacks=[GRPOScheduleCallback(temperature=linear(floor=0.5))],
    )
    first, second = 1.2, 1.2 * linear(4, floor=0.5)(2)
    assert logged(trainer, "effi/temperature") == pytest.approx([first, first, second, second])
    assert {(step, value) for what, step, value in trainer.seen if what == "gen"} == {(0, first), (2, second)}
    by_step = {(step, value) for what, step, value in trainer.seen if what == "logp"}
    assert by_step == {(0, first), (1, first), (2, second), (3, second)}
    assert trainer.temperature == trainer.generation_config.temperature == 1.2  # as it was configured


def test_a_generation_in_the_middle_of_an_update(tmp_path: Path, checkpoint: Any) -> None:
    """Three micro-batches a generation, two an update: generations begin in updates 0, 1 and 3."""
    trainer = train(
        tmp_path,
        watching(GRPOTrainer),
        model=str(checkpoint),
        max_steps=4,
        steps_per_generation=3,
        gradient_accumulation_steps=2,
        callbacks=[GRPOScheduleCallback(temperature=linear(floor=0.5))],
    )
    course = linear(4, floor=0.5)
    found = [(step, value) for what, step, value in trainer.seen if what == "gen"]
    assert found == [(0, course(0)), (1, course(1)), (3, course(3))]


@pytest.mark.parametrize("cls", TRAINERS)
def test_beta_reaches_zero_and_costs_nothing_there(tmp_path: Path, checkpoint: Any, cls: type) -> None:
    trainer = train(
        tmp_path,
        watching(cls),
        model=str(checkpoint),
        beta=0.5,
        max_steps=4,
        callbacks=[GRPOScheduleCallback(beta=linear(2))],
    )
    assert logged(trainer, "effi/beta") == [0.5, 0.25, 0.0, 0.0]
    assert len(logged(trainer, "kl")) == 2
    assert [step for what, step, _ in trainer.seen if what == "logp"] == [
        0,
        0,
        1,
        1,
        2,
        3,
    ]  # with and without reference
    assert trainer.beta == 0.5


def test_a_run_that_stops_inside_of_a_generation_goes_on_with_its_values(tmp_path: Path, checkpoint: Any) -> None:
    def run(resume: Any = None) -> Any:
        return train(
            tmp_path,
            EffiGRPOTrainer,
            model=str(checkpoint),
            beta=0.5,
            temperature=1.2,
            max_steps=4,
            steps_per_generation=2,
            save_strategy="steps",
            save_steps=1,
            callbacks=[GRPOScheduleCallback(linear(floor=0.5), cosine())],
            resume_from_checkpoint=resume,
        )

    whole = run()
    resumed = run(str(tmp_path / "checkpoint-3"))
    assert_bitwise_equal(whole.model, resumed.model)
    for name in ("effi/beta", "effi/temperature"):
        assert logged(resumed, name) == logged(whole, name)


def test_still3_trains(tmp_path: Path, checkpoint: Any) -> None:
    config, more = still3(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, num_generations=2, learning_rate=1e-3, beta=0.1
    )
    trainer = train(tmp_path, model=str(checkpoint), **config, callbacks=more["callbacks"])
    assert logged(trainer, "effi/beta") == pytest.approx([0.1 * cosine(3)(step) for step in range(3)])


def test_under_vllm_its_own_settings_are_moved() -> None:
    """TRL reads both at each generation, beside a server and in the process."""
    generation = SimpleNamespace(temperature=1.0, max_completion_length=8)
    trainer = SimpleNamespace(use_vllm=True, vllm_generation=generation)
    moved = Moved()
    for setting in (("temperature", "temperature", 0.5), ("max_new_tokens", "max_completion_length", 3)):
        for owner, name in sampling_settings(trainer, *setting[:2]):
            moved.write(owner, name, setting[2])
    assert vars(generation) == {"temperature": 0.5, "max_completion_length": 3}
    moved.restore()
    assert vars(generation) == {"temperature": 1.0, "max_completion_length": 8}


def test_what_cannot_move_is_refused_by_name(tmp_path: Path) -> None:
    def start(callback: Any, cls: type = GRPOTrainer, **over: Any) -> None:
        train(tmp_path, cls, callbacks=[callback], max_steps=1, **over)

    with pytest.raises(RefusedError, match="needs a reference model"):
        start(GRPOScheduleCallback(beta=cosine()))
    with pytest.raises(RefusedError, match="generation_kwargs sets 'temperature'"):
        start(GRPOScheduleCallback(constant()), generation_kwargs={"temperature": 0.5})
    with pytest.raises(RefusedError, match="does not work with ntp_coef"):
        start(GRPOScheduleCallback(constant()), EffiGRPOTrainer, ntp_coef=0.1)
    plain = TrainingArguments(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1)
    for callback in (GRPOScheduleCallback(constant()), GenerationCapCallback(2)):
        trainer = Trainer(tiny_llama(), plain, train_dataset=lm_dataset(4), callbacks=[callback])
        with pytest.raises(RefusedError, match=f"{type(callback).__name__} moves settings of a GRPOTrainer"):
            trainer.train()


# --- the next-token term ---------------------------------------------------------------------------------------------


class Keeps(EffiGRPOTrainer):
    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        self.inputs = inputs
        return super()._compute_loss(model, inputs)


def gradient(trainer: Any, loss: torch.Tensor) -> torch.Tensor:
    wanted = [p for p in trainer.model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted)])


def prompt_loss(model: Any, inputs: Any) -> torch.Tensor:
    """Cross-entropy of the prompts alone, from a forward of their own."""
    ids, mask = inputs["prompt_ids"], inputs["prompt_mask"]
    logps = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].log_softmax(-1)
    counted = mask[:, 1:] * mask[:, :-1]
    return -(logps.gather(2, ids[:, 1:, None])[..., 0] * counted).sum() / counted.sum()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_its_gradient_is_that_of_the_two_terms(tmp_path: Path, accumulation: int) -> None:
    over = {"max_steps": 1, "learning_rate": 0.0, "gradient_accumulation_steps": accumulation}
    trainer = train(tmp_path, Keeps, ntp_coef=0.3, model=tiny_qwen3(end_tokens=10).double(), **over)
    assert trainer.exact_savings == ()
    trainer.model.train()
    whole = gradient(trainer, trainer._compute_loss(trainer.model, trainer.inputs))
    term = gradient(trainer, prompt_loss(trainer.model, trainer.inputs))
    trainer._prompt_tokens = None
    policy = gradient(trainer, trainer._compute_loss(trainer.model, trainer.inputs))
    expected = policy + 0.3 * term / accumulation
    assert float((whole - expected).norm() / expected.norm()) < 1e-6
    assert float(policy.norm()) > 0 and float(term.norm()) > 0


def test_it_learns_prompts_and_is_logged(tmp_path: Path) -> None:
    stock = train(tmp_path, GRPOTrainer)
    off = train(tmp_path, EffiGRPOTrainer, exact_savings="off", ntp_coef=0.0)
    assert_bitwise_equal(stock.model, off.model)
    on = train(tmp_path, Keeps, ntp_coef=1.0, learning_rate=1e-2, max_steps=6)
    losses = logged(on, "effi/prompt_token_loss")
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.3
    assert not logged(off, "effi/prompt_token_loss")
    on.evaluate(on.train_dataset.select(range(4)))  # the term is of training


def test_what_leaves_prompts_out_is_refused(tmp_path: Path) -> None:
    def start(**over: Any) -> None:
        train(tmp_path, EffiGRPOTrainer, train=False, **{"ntp_coef": 0.1, **over})

    with pytest.raises(RefusedError, match=r"'trim' is not exact here: ntp_coef learns the tokens of all prompts"):
        start(exact_savings="trim")
    with pytest.raises(RefusedError, match=r"temperature=0\.7.*Set it to 1\.0"):
        start(temperature=0.7)
    with pytest.raises(RefusedError, match="does not work with loss_token_budget=64"):
        start(loss_token_budget=64)
    with pytest.raises(RefusedError, match="does not work with hybrid_gate"):
        start(hybrid_gate=HybridGate("answer"))
    for wrong in (-0.1, float("nan"), "0.1"):
        with pytest.raises(ValueError, match="ntp_coef"):
            start(ntp_coef=wrong)
