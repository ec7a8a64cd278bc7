"""What the trainers refuse before training, which mode they choose, and that off is stock."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import ParallelismConfig
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer

from hf_effi import EffiGRPOTrainer, EffiTrainer, EffiTrainingArguments
from hf_effi.errors import RefusedError
from hf_effi.parallel import SequenceGroup
from hf_effi.trainers.mixins import SequenceParallelMixin
from hf_effi.trainers.mixins.sequence_parallel import _mode_of
from tests.helpers import compare_runs, lm_dataset, tiny_llama


def arguments(tmp_path: Any, cls: type = EffiTrainingArguments, **over: Any) -> Any:
    settings = {"use_cpu": True, "max_steps": 2, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    return cls(str(tmp_path), **{**settings, "logging_steps": 1, **over})


def built(tmp_path: Any, cls: type = EffiTrainer, data: Any = None, trainer: Any = None, **over: Any) -> Any:
    args = arguments(tmp_path, sequence_parallel_size=2, **over)
    return cls(tiny_llama(attn_implementation="sdpa"), args, train_dataset=data or lm_dataset(8), **(trainer or {}))


class ThinTrainer(SequenceParallelMixin, Trainer):
    pass


def test_off_is_stock_to_the_bit(tmp_path):
    runs = []
    for cls, args in (
        (Trainer, arguments(tmp_path, TrainingArguments)),
        (EffiTrainer, arguments(tmp_path)),
        (ThinTrainer, arguments(tmp_path, TrainingArguments)),
    ):
        trainer = cls(tiny_llama(), args, train_dataset=lm_dataset(8))
        trainer.train()
        runs.append(trainer)
    compare_runs(runs[0], runs[1])
    compare_runs(runs[0], runs[2])


@pytest.mark.parametrize("size", [0, -1, 2.0, "2", True])
def test_sizes_that_are_no_number_of_ranks(tmp_path, size):
    with pytest.raises(ValueError, match="must be a whole number of ranks"):
        args = arguments(tmp_path, TrainingArguments)
        ThinTrainer(tiny_llama(), args, train_dataset=lm_dataset(8), sequence_parallel_size=size)


def test_two_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="4 in the constructor and 2 in args"):
        built(tmp_path, trainer={"sequence_parallel_size": 4})


def test_one_process_says_how_to_start(tmp_path):
    with pytest.raises(ValueError, match="this is a single one. Start with `torchrun"):
        built(tmp_path)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy='batch_rebalance'"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
    ],
)
def test_settings_that_would_not_be_exact(tmp_path, over, message):
    with pytest.raises(RefusedError, match=f"sequence_parallel_size=2 does not work with {message}"):
        built(tmp_path, **over)


def test_streams_and_loss_functions_are_named(tmp_path):
    stream = Dataset.from_dict({"input_ids": [[1, 2]]}).to_iterable_dataset()
    with pytest.raises(RefusedError, match="'dispatch_batches': False"):
        built(tmp_path, data=stream)
    with pytest.raises(RefusedError, match="compute_loss_func"):
        built(tmp_path, trainer={"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.loss})


def test_a_model_without_loss_counts_is_refused(tmp_path):
    model = tiny_llama(attn_implementation="sdpa")
    model.accepts_loss_kwargs = False
    with pytest.raises(RefusedError, match="takes no num_items_in_batch"):
        EffiTrainer(model, arguments(tmp_path, sequence_parallel_size=2), train_dataset=lm_dataset(8))


@pytest.mark.parametrize(
    ("stock", "mode"),
    [
        (Trainer, "token"),
        (SFTTrainer, "token"),
        (DPOTrainer, "replicated"),
        (KTOTrainer, "replicated"),
        (RewardTrainer, "replicated"),
        (GRPOTrainer, "rounds"),
        (RLOOTrainer, "rounds"),
    ],
)
def test_each_trainer_has_its_mode(stock, mode):
    assert _mode_of(type("Thin", (SequenceParallelMixin, stock), {})) == mode


def test_a_loss_of_ones_own_must_say_its_mode(tmp_path):
    class Own(EffiTrainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, inputs, **kwargs)

    assert _mode_of(EffiGRPOTrainer) == "rounds"
    with pytest.raises(RefusedError, match="Own has a compute_loss of its own.*'token'.*'replicated'"):
        built(tmp_path, Own)
    Own.sequence_parallel_mode = "token"
    with pytest.raises(ValueError, match="single one"):  # one step further
        built(tmp_path, Own)
    Own.sequence_parallel_mode = "tokens"
    with pytest.raises(ValueError, match="sequence_parallel_mode='tokens' must be"):
        built(tmp_path, Own)


@pytest.mark.parametrize(
    ("mode", "step"),
    [
        ("token", "a step takes 32 rows: 16 per group; steps are those of 2 rank(s)"),
        ("rounds", "each rank keeps its own batch (16 rows per step); steps are those of plain data parallelism"),
    ],
)
def test_the_start_says_what_it_means(tmp_path, mode, step):
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = EffiTrainer(tiny_llama(attn_implementation="sdpa"), args, train_dataset=lm_dataset(8))
    trainer._sequence_group, trainer.sequence_parallel_mode = SequenceGroup(4, 1, 0, 2, None), mode
    said = trainer._description()
    assert "2 group(s) of 4 ranks, [0, 1, 2, 3], [4, 5, 6, 7]. Each rank holds 1/4 of every sequence" in said
    assert f"mode '{mode}': {step}. Attention: sdpa" in said


def test_deepspeed_with_its_own_sequence_parallelism_warns_at_start(tmp_path, monkeypatch):
    """At the level of accelerate's objects, without deepspeed: Effi trainers name the factor in grad_norm."""

    class Launched(EffiTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            monkeypatch.setitem(
                self.accelerator.state._shared_state, "parallelism_config", ParallelismConfig(sp_size=4)
            )
            monkeypatch.setattr(type(self.accelerator.state), "deepspeed_plugin", SimpleNamespace(zero_stage=2))

    with pytest.warns(UserWarning, match="ZeRO-2 with sp_size=4 multiplies every gradient by 4"):
        Launched(tiny_llama(), arguments(tmp_path), train_dataset=lm_dataset(8))
