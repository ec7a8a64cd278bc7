"""AutoLRS under DDP: losses averaged over ranks, one LR for all, and an exact resume inside a search."""

from __future__ import annotations

import os

import pytest
import torch

from hf_effi.callbacks import auto_lrs
from hf_effi.callbacks.auto_lrs import AutoLRSCallback
from tests.helpers import run_distributed, tiny_llama


def train_rank(out: str, stop: int | None = None, resume: str | None = None, signal: str = "train") -> dict:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank = int(os.environ.get("RANK", "0"))
    applied, own = [], []

    class Spy(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            applied.append(float(kwargs["optimizer"].param_groups[0]["lr"]))

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == stop:
                control.should_save = control.should_training_stop = True

    class Noted(AutoLRSCallback):
        def _measure(self, args, model):
            own.append(sum(self._micro) / len(self._micro))
            super()._measure(args, model)

    propose = auto_lrs.propose_lr
    # A rank that computed for itself would get another LR: only the first rank's proposal may count.
    auto_lrs.propose_lr = lambda *args: propose(*args) * (1 + rank)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 64, (32, 8), generator=generator)
    callback = Noted(
        1e-4,
        1e-1,
        stage_steps=6,
        probes=3,
        max_stage_steps=6,
        # Another loss on each rank: the ranks must still judge alike.
        evaluate=(lambda model: 1.0 + rank + sum(float(p.abs().sum()) for p in model.parameters()))
        if signal == "validation"
        else None,
        validation=signal == "validation",
    )
    args = TrainingArguments(
        out,
        max_steps=26,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_strategy="no",
        save_strategy="steps",
        save_steps=1000,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_backend="gloo" if "RANK" in os.environ else None,
    )
    rows = [{"input_ids": t, "labels": t} for t in tokens]
    trainer = Trainer(tiny_llama(), args, train_dataset=rows, callbacks=[callback, Spy()])
    trainer.train(resume_from_checkpoint=resume)
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return {"applied": applied, "own": own, "progress": callback.progress, "weights": weights.tolist()}


def test_two_ranks_judge_alike_and_resume_inside_a_search(tmp_path):
    # The first search goes by the training loss, the second one, which is cut, by the validation loss.
    cut, signal = 15, "validation"
    one, two = run_distributed(train_rank, 2, str(tmp_path / "whole"), signal=signal)
    assert one["applied"] == two["applied"] and one["weights"] == two["weights"]
    assert one["progress"] == two["progress"]
    assert one["own"] != two["own"], "the ranks see other data, so their own losses differ"
    assert [h["signal"] for h in one["progress"]["history"]] == ["train", "validation"]

    first, _ = run_distributed(train_rank, 2, str(tmp_path / "cut"), stop=cut, signal=signal)
    checkpoint = tmp_path / "cut" / f"checkpoint-{cut}"
    assert {p.name for p in checkpoint.glob("hf_effi_auto_lrs_*")} == {f"hf_effi_auto_lrs_{r}.pt" for r in (0, 1)}
    rest = run_distributed(train_rank, 2, str(tmp_path / "cut"), resume=str(checkpoint), signal=signal)
    for after in rest:
        assert first["applied"] + after["applied"] == one["applied"]
        assert after["weights"] == one["weights"] and after["progress"] == one["progress"]


def test_losses_are_averaged_over_ranks(tmp_path):
    first, second = run_distributed(train_rank, 2, str(tmp_path), stop=1)
    mean = (first["own"][0] + second["own"][0]) / 2
    assert first["progress"]["losses"] == second["progress"]["losses"] == [pytest.approx(mean, rel=1e-12)]
