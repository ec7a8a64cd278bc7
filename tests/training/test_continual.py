"""Replay from streams and the stability gap, through `train()`."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from hf_effi.callbacks import MIGUCallback, StabilityGapCallback
from hf_effi.checkpoint import SafeCheckpointer
from hf_effi.data import ReplayStream
from hf_effi.functional import metrics
from tests.helpers import (
    binary_hash_reward,
    compare_runs,
    lm_dataset,
    prompt_dataset,
    sft_dataset,
    tiny_qwen3,
    tiny_tokenizer,
    weights_of,
)
from tests.helpers.sampling import sampler_trainer, stop_and_resume

ROWS = lm_dataset(24, length=8).add_column("row", list(range(24)))
OLD, NEW = ROWS.select(range(8)), ROWS.select(range(8, 24))


def stream(**over):
    return ReplayStream(NEW.to_iterable_dataset(), OLD.to_iterable_dataset(), 0.25, **over)


def test_without_old_rows_it_is_the_new_stream_to_the_bit(tmp_path):
    plain = sampler_trainer(tmp_path, Trainer, train_dataset=NEW.to_iterable_dataset(), max_steps=4)
    ours = sampler_trainer(tmp_path, Trainer, train_dataset=ReplayStream(NEW, OLD, 0.0), max_steps=4)
    for trainer in (plain, ours):
        trainer.train()
    compare_runs(plain, ours)


@pytest.mark.parametrize("step", [3, 7])  # inside the first pass and inside the second
def test_replay_from_a_stream_resumes(tmp_path, step):
    """A stock Trainer finds its place in the first pass; which pass it is in, it knows with a checkpointer."""

    def make(folder, callbacks):
        trainer = sampler_trainer(folder, Trainer, train_dataset=stream(block=4), callbacks=callbacks, max_steps=9)
        if step > 6:
            SafeCheckpointer().attach(trainer)
        return trainer

    whole, broken, (one, two) = stop_and_resume(tmp_path, make, step=step)
    compare_runs(whole, broken)
    assert one == two and [sum(row < 8 for row in batch) for batch in one[:5]] == [1] * 5


def test_sft_and_grpo_read_the_stream(tmp_path):
    common = {
        "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 2, "per_device_train_batch_size": 4,
        "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip

    def mixed(rows):
        return ReplayStream(rows.select(range(12)), rows.select(range(12, 16)), 0.25, block=4).as_dataset()

    given = {"processing_class": tiny_tokenizer(), "callbacks": [migu := MIGUCallback(0.5)]}
    args = SFTConfig(str(tmp_path), **common, max_length=16)
    SFTTrainer(tiny_qwen3(num_hidden_layers=1), args=args, train_dataset=mixed(sft_dataset(16)), **given).train()
    args = GRPOConfig(str(tmp_path), **common, num_generations=2, max_completion_length=4)
    trainer = GRPOTrainer(
        tiny_qwen3(num_hidden_layers=1), binary_hash_reward, args, train_dataset=mixed(prompt_dataset(16)), **given
    )
    trainer.train()
    assert trainer.state.global_step == 2 and "MIGU masks 7 layers" in migu.report


def watched(folder, *callbacks, **over):
    new = NEW.select(range(4))
    unlearned = [{**row, "labels": [1] * 8} for row in new]  # a token that no new row has: it can only fall behind
    sets = {"old": Dataset.from_list(unlearned), "new": new}
    settings = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}
    trainer = sampler_trainer(
        folder, Trainer, train_dataset=NEW, eval_dataset=sets, callbacks=callbacks, **{**settings, **over}
    )
    return trainer


def test_the_dip_is_in_the_logs_and_nothing_else_changes(tmp_path):
    said = []
    gap = StabilityGapCallback(say=said.append)
    trainer, stock = watched(tmp_path, gap), watched(tmp_path)
    trainer.train()
    stock.train()
    for (name, one), other in zip(weights_of(trainer.model).items(), weights_of(stock.model).values(), strict=True):
        assert torch.equal(one, other), name
    losses = {e["step"]: e["eval_old_loss"] for e in stock.state.log_history if "eval_old_loss" in e}
    logged = [e for e in trainer.state.log_history if f"{metrics.STABILITY_GAP}old/depth" in e]
    assert [e["step"] for e in logged] == [0, 2, 4, 6] == list(losses)
    worst = max(loss - losses[0] for loss in losses.values())
    assert logged[-1]["effi/stability_gap/old/depth"] == pytest.approx(worst) and worst > 0
    assert gap.gaps["old"].recovered is None and gap.gaps["old"].duration == 6 - gap.gaps["old"].began
    assert logged[-1]["effi/stability_gap/old/duration_updates"] == gap.gaps["old"].duration
    assert len(said) == 1 and "eval_old_loss fell behind its start" in said[0] and "mix old rows" in said[0]
    assert [finding.rule for finding in gap.findings] == ["stability_gap"] and gap.gaps["new"].depth == 0


def test_the_series_goes_on_after_a_resume(tmp_path):
    gaps = []

    def make(folder, callbacks):
        gaps.append(StabilityGapCallback(say=lambda sentence: None))
        return watched(folder, *callbacks, gaps[-1])

    stop_and_resume(tmp_path, make, step=3)
    assert gaps[0].gaps == gaps[2].gaps and len(gaps[0].gaps) == 2


def test_what_is_not_known_is_said_and_ends_no_run(tmp_path):
    said = []
    watched(tmp_path, StabilityGapCallback(new="eval_other_loss", say=said.append), eval_on_start=False).train()
    assert "the first eval_old_loss is of update 2" in said[0] and "eval_other_loss was never logged" in said[1]

    class Broken(StabilityGapCallback):
        def _note(self, entry, step):
            raise RuntimeError("no")

    said.clear()
    watched(tmp_path, Broken(say=said.append)).train()
    assert said == []
    for given, message in (((None, None), "must be two metrics"), (("a", "a"), "must be two metrics")):
        with pytest.raises(ValueError, match=message):
            StabilityGapCallback(*given)
    with pytest.raises(ValueError, match="tolerance=-1"):
        StabilityGapCallback(tolerance=-1)
