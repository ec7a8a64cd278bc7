"""Local updates through `train()` on one process: off is stock, the outer step, when it meets, resume, refusals."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback
from trl import GRPOTrainer

from hf_effi import EffiSFTConfig, EffiSFTTrainer
from hf_effi.callbacks import EMACallback, ReptileCallback
from hf_effi.checkpoint import SafeCheckpointer
from hf_effi.errors import RefusedError
from hf_effi.functional.local_updates import LocalUpdates
from hf_effi.trainers.mixins import LocalUpdatesMixin, _local_run
from tests.helpers import (
    compare_runs,
    length_reward,
    lm_dataset,
    prompt_dataset,
    push_args,
    sft_dataset,
    tiny_qwen3,
    tiny_tokenizer,
    weights_of,
)
from tests.helpers.grpo import grpo_args
from tests.helpers.sampling import StopAt

SIZES = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}
MEAN = {"outer_lr": 1.0, "outer_momentum": 0.0}


class LocalTrainer(LocalUpdatesMixin, Trainer):
    pass


def trainer_of(folder: Path, local: LocalUpdates | None, callbacks: Any = (), cls: type = LocalTrainer, **over: Any):
    settings = {"save_strategy": "no", "max_steps": 6, "lr_scheduler_type": "constant", "seed": 3}
    extra = {"local_updates": local} if issubclass(cls, LocalUpdatesMixin) else {}
    return cls(
        over.pop("model", None) or tiny_qwen3(**SIZES),
        push_args(folder, **{**settings, **over}),
        train_dataset=lm_dataset(32, length=8),
        eval_dataset=lm_dataset(4, length=8, seed=1),
        callbacks=list(callbacks),
        **extra,
    )


def trained(*args: Any, **kwargs: Any) -> Any:
    trainer = trainer_of(*args, **kwargs)
    trainer.train()
    return trainer


def without_ours(trainer: Any) -> Any:
    for entry in trainer.state.log_history:
        for key in [key for key in entry if key.startswith("effi/")]:
            entry.pop(key)
    return trainer


@pytest.mark.parametrize("local", [None, LocalUpdates(1, **MEAN), LocalUpdates(4, **MEAN)])
def test_off_or_the_mean_of_one_process_is_stock_to_the_bit(tmp_path: Path, local: LocalUpdates | None) -> None:
    compare_runs(trained(tmp_path, None, cls=Trainer), without_ours(trained(tmp_path, local)))


def test_one_interval_is_the_formula_and_a_short_one_ends_the_run(tmp_path: Path) -> None:
    start, stock = weights_of(tiny_qwen3(**SIZES)), weights_of(trained(tmp_path, None, max_steps=3).model)
    for every in (3, 50):  # on time, and because the run ends
        ours = trained(tmp_path, LocalUpdates(every, 0.5, 0.8), max_steps=3)
        for name, found in weights_of(ours.model).items():
            delta = start[name] - stock[name]
            torch.testing.assert_close(found, start[name] - 0.5 * (delta + 0.8 * delta), rtol=0, atol=5e-7)
        assert ours.state.log_history[-2]["effi/local_updates/synchronisations"] == 1
        assert ours.state.log_history[-2]["effi/local_updates/sent_bytes"] == 0, "there is nobody to send to"


@pytest.mark.parametrize("mode", [None, "lora", "sync", "thread"])
def test_resume_is_the_uninterrupted_run(tmp_path: Path, mode: Any) -> None:
    def make(folder: str, *callbacks: Any) -> Any:
        saves: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
        if mode == "lora":
            torch.manual_seed(0)
            saves["model"] = get_peft_model(tiny_qwen3(**SIZES), LoraConfig(r=2, target_modules=["q_proj"]))
        trainer = trainer_of(tmp_path / folder, LocalUpdates(2), callbacks, **saves)
        if mode in ("sync", "thread"):
            SafeCheckpointer(mode).attach(trainer)
        return trainer

    whole = make("whole")
    whole.train()
    make("cut", StopAt(4)).train()
    again = make("cut")
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    runs = [whole, again]
    for run in runs:
        run.state.log_history = [entry for entry in run.state.log_history if "train_runtime" not in entry]
    compare_runs(*runs)


class Notes(TrainerCallback):
    """Asks for an evaluation and a save after update 3, and notes where they are done."""

    def __init__(self) -> None:
        self.done: list[tuple[str, int]] = []
        self.refused = ""
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            control.should_evaluate = control.should_save = True
            for call in (self.trainer.evaluate, self.trainer.save_model):
                with pytest.raises(RefusedError) as error:
                    call()
                self.refused += str(error.value)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.done.append(("evaluate", state.global_step))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.done.append(("save", state.global_step))


def test_what_is_asked_for_in_between_waits(tmp_path: Path) -> None:
    notes = Notes()
    trainer = trainer_of(tmp_path, LocalUpdates(5), [notes], max_steps=7)
    notes.trainer = trainer
    trainer.train()
    assert notes.done == [("evaluate", 5), ("save", 5)] and (tmp_path / "checkpoint-5").is_dir()
    assert "evaluate was called after update 3" in notes.refused and "save_model was called" in notes.refused
    assert trainer.evaluate()["eval_loss"] > 0, "after training nothing is refused"


def test_a_run_that_is_stopped_ends_on_joined_weights(tmp_path: Path) -> None:
    stopped = trained(tmp_path, LocalUpdates(4, 0.5, 0.0), [StopAt(3)])
    stock = weights_of(trained(tmp_path / "stock", None, max_steps=3).model)
    start = weights_of(tiny_qwen3(**SIZES))
    for name, found in weights_of(stopped.model).items():
        torch.testing.assert_close(found, (start[name] + stock[name]) / 2, rtol=0, atol=5e-7)
    assert (tmp_path / "checkpoint-3").is_dir()


def test_planned_steps_that_do_not_fit_are_named(tmp_path: Path) -> None:
    for name, over in (
        ("save_steps", {"save_strategy": "steps", "save_steps": 5}),
        ("eval_steps", {"eval_strategy": "steps", "eval_steps": 5}),
    ):
        with pytest.raises(ValueError, match=f"{name}=5 is no multiple of every=4.* Set {name}=8"):
            trainer_of(tmp_path, LocalUpdates(4), **over).train()


def test_what_cannot_be_kept_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="local_updates=4 must be a LocalUpdates"):
        trainer_of(tmp_path, 4)  # type: ignore[arg-type]
    for callback in (EMACallback(), ReptileCallback(2, 0.5)):
        with pytest.raises(RefusedError, match=f"does not work with {type(callback).__name__}"):
            trainer_of(tmp_path, LocalUpdates(4), [callback])
    trainer = trainer_of(tmp_path, LocalUpdates(4))
    trainer.add_callback(EMACallback())
    with pytest.raises(RefusedError, match="EMACallback: it would average weights of one process"):
        trainer.train()
    for attribute, value, what in (
        ("scaler", object(), "fp16 with a GradScaler"),
        ("ddp_handler", SimpleNamespace(comm_hook="bf16"), "a compression hook"),
        ("parallelism_config", SimpleNamespace(non_data_parallel_size=2, tp_enabled=False), "tensor, context"),
    ):
        trainer = trainer_of(tmp_path, LocalUpdates(4))
        trainer.accelerator = SimpleNamespace(
            **{"scaler": None, "ddp_handler": None, "parallelism_config": None} | {attribute: value}
        )
        with pytest.raises(RefusedError, match=f"does not work with {what}"):
            _local_run.refuse_settings(trainer, LocalUpdates(4))
    with pytest.raises(RefusedError, match="auto_find_batch_size"):
        trainer_of(tmp_path, LocalUpdates(4), auto_find_batch_size=True)
    for engine in ("FSDP", "DeepSpeed"):
        monkeypatch.setattr(_local_run, "sharding_engine", lambda args, engine=engine: engine)
        with pytest.raises(RefusedError, match=f"does not work with {engine}: no process has the whole model"):
            trainer_of(tmp_path, LocalUpdates(4))


def test_weights_that_are_thawed_later_and_second_copies_are_refused(tmp_path: Path) -> None:
    class Thaw(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            model.lm_head.weight.requires_grad_(state.global_step > 0)

    trainer = trainer_of(tmp_path, LocalUpdates(3), [Thaw()])
    trainer.model.lm_head.weight.requires_grad_(False)
    with pytest.raises(RefusedError, match="lm_head.weight is trained now"):
        trainer.train()
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    optimizer.train = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(RefusedError, match="second copy of the weights"):
        _local_run.LocalRun(LocalUpdates(3), trainer.model, optimizer, 0, 1)
    with pytest.raises(RefusedError, match="needs DDP"):
        _local_run.LocalRun(LocalUpdates(3), trainer.model, None, 0, 2)


def test_sft_works_and_grpo_is_refused(tmp_path: Path) -> None:
    class LocalSFT(LocalUpdatesMixin, EffiSFTTrainer):
        pass

    def run(cls: type, **extra: Any) -> Any:
        args = push_args(tmp_path, EffiSFTConfig, max_length=16, max_steps=3, save_strategy="no")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            trainer = cls(
                tiny_qwen3(**SIZES), args, train_dataset=sft_dataset(), processing_class=tiny_tokenizer(), **extra
            )
        trainer.train()
        return weights_of(trainer.model)

    start, stock, ours = weights_of(tiny_qwen3(**SIZES)), run(EffiSFTTrainer), run(
        LocalSFT, local_updates=LocalUpdates(3, 0.5, 0.0)
    )  # fmt: skip
    for name in start:
        torch.testing.assert_close(ours[name], (start[name] + stock[name]) / 2, rtol=0, atol=5e-7)

    class LocalGRPO(LocalUpdatesMixin, GRPOTrainer):
        pass

    with pytest.raises(RefusedError, match="GRPO and other trainers that generate: they gather rewards"):
        LocalGRPO(
            tiny_qwen3(**SIZES),
            length_reward,
            args=grpo_args(tmp_path),
            train_dataset=prompt_dataset(),
            processing_class=tiny_tokenizer(),
            local_updates=LocalUpdates(2),
        )
