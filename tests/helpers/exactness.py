"""Stop-and-resume against the uninterrupted run: the rows of a covering design, and how one of them is run."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

import hf_effi
from hf_effi import samplers
from hf_effi.callbacks.reptile import ReptileCallback
from hf_effi.checkpoint import SafeCheckpointer
from hf_effi.functional.rollouts import SpeculativeReuse
from hf_effi.functional.schedules import wsd
from hf_effi.trainers.mixins.sampler import SamplerMixin

from .callback_cases import CASES, Case, differences
from .data import binary_hash_reward, lm_dataset
from .models import tiny_qwen3
from .tokenizer import tiny_tokenizer

ROWS, UPDATES, LOGGING = 12, 6, 2
#: Of an epoch of 3 updates, or of 2 with 3 accumulation steps: both are in the second.
STOPS = {"inside of an epoch, logged": 4, "inside of an epoch, not logged": 5}


class SampledTrainer(SamplerMixin, Trainer):
    pass


class SampledDPO(SamplerMixin, DPOTrainer):
    pass


def _scores() -> torch.Tensor:
    return torch.arange(ROWS).float().mul(7).remainder(ROWS)


def _by_row(model: Any, rows: list[int]) -> list[float]:
    """Something that the weights decide, and cheap: what the rows' embeddings sum to."""
    weight = model.get_input_embeddings().weight.detach()
    return [float(weight[row].sum()) for row in rows]


def _answers(model: Any, rows: list[int]) -> list[float]:
    return [float(value > 0) for value in _by_row(model, rows)]


def _tokens() -> list[list[int]]:
    return [[5 + row % 3, 9 + row % 5] for row in range(ROWS)]


#: sampler -> how it is made
SAMPLERS: dict[str, Callable[[], Any]] = {
    "AbilitySampler": lambda: samplers.AbilitySampler(_scores() - 6, _answers, min_rows=8, num_samples=ROWS),
    "CompetenceSampler": lambda: samplers.CompetenceSampler(_scores(), 2 * ROWS, start=0.5),
    "CyclicalSampler": lambda: samplers.CyclicalSampler(_scores(), 2, start=0.5, end=1.0),
    "InterleavedSampler": lambda: samplers.InterleavedSampler([(1, 2)] * 6 + [(0, 2)] * 6, ["a", "b"] * 6),
    "MixtureSampler": lambda: samplers.MixtureSampler(
        ["a", "b"] * 6, [(0.0, {"a": 0.3, "b": 0.7})], block=4, num_samples=2 * ROWS
    ),
    "MultistageSampler": lambda: samplers.MultistageSampler(
        _tokens(), _by_row, window=ROWS, num_samples=ROWS, threshold_rows=6, switch_rows=12
    ),
    "QualityAscendingSampler": lambda: samplers.QualityAscendingSampler(_scores(), buckets=4),
    "ReplaySampler": lambda: samplers.ReplaySampler([True, False] * 6, 0.3, block=4, num_samples=2 * ROWS),
    "SelfPacedSampler": lambda: samplers.SelfPacedSampler(ROWS, _by_row, share=0.5, share_step=0.3),
    "ShuffledSampler": lambda: samplers.ShuffledSampler(ROWS, seed=5),
    "TokenBudgetBatchSampler": lambda: samplers.TokenBudgetBatchSampler([4 + row % 3 for row in range(ROWS)], 24),
}
#: bases, and the wrapper that every sampler gets in GRPO
NOT_MADE_BY_USERS = {"EffiSampler", "MeasuringSampler", "GroupSampler"}

_ACCURACY = {"window": 1, "quiet": 1, "threshold": 10.0, "greater_is_better": False}
#: callback -> how it is made where another model is trained than in `callback_cases`
CALLBACKS: dict[str, Callable[[], TrainerCallback]] = {
    "AccuracyGradientCallback": lambda: hf_effi.callbacks.AccuracyGradientCallback("eval_loss", **_ACCURACY),
    "CausesCallback": lambda: hf_effi.callbacks.CausesCallback(every_steps=2, stragglers=False),
    "EMACallback": lambda: hf_effi.callbacks.EMACallback(0.5, every_steps=2, start_step=1),
    "GradientNormsCallback": lambda: hf_effi.callbacks.GradientNormsCallback(),
    "ForecastCallback": lambda: hf_effi.callbacks.ForecastCallback("eval_loss"),
    "GradientSNRCallback": lambda: hf_effi.callbacks.GradientSNRCallback(),
    "HypergradientCallback": lambda: hf_effi.callbacks.HypergradientCallback(kappa=0.2),
    "LRScheduleCallback": lambda: hf_effi.LRScheduleCallback(wsd(warmup_steps=2, decay_steps=3, floor=0.3)),
    "MIGUCallback": lambda: hf_effi.callbacks.MIGUCallback(0.5, "hard", start_update=2),
    "StabilityGapCallback": lambda: hf_effi.callbacks.StabilityGapCallback("eval_loss", None, say=lambda one: None),
    "RandomLTDCallback": lambda: hf_effi.callbacks.RandomLTDCallback(4, 8, multiple=2),
    "ReptileCallback": lambda: ReptileCallback(3, 0.5, last_partial=True),
    "RewindCallback": lambda: hf_effi.callbacks.RewindCallback("spike", every_steps=2),
    "SamplerCallback": lambda: hf_effi.SamplerCallback(samplers.ShuffledSampler(ROWS, seed=5)),
    "TrainDoctor": lambda: hf_effi.TrainDoctor(say=lambda sentence: None),
    "GRPODoctor": lambda: hf_effi.GRPODoctor(say=lambda sentence: None),
    "WeightAveragingCallback": lambda: hf_effi.WeightAveragingCallback(3, every_steps=2, kind="uniform"),
}
#: Stateful ones that are run on the model of `callback_cases` alone, and why.
ON_ITS_OWN_MODEL = {
    "AdaLoRACallback": "the model has AdaLoRA layers",
    "AutoLRSCallback": "a search takes 20 updates",
    "FastForwardCallback": "its walks ask for the loss of a batch, which GRPO has not",
    "HubCallback": "uploads are stood in for",
    "InjectionCallback": "the dataset is an injected one, which GRPO refuses",
    "MultigridLRCallback": "the trainer cuts sequences",
    "OSFProjectionCallback": "the model has OSF layers",
}
#: what one run has: callbacks that go together, or one sampler
PLUGS: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "observers": (
        "TrainDoctor",
        "GradientNormsCallback",
        "WeightAveragingCallback",
        "LRScheduleCallback",
        "RewindCallback",
        "ForecastCallback",
        "CausesCallback",
    ),
    "factors": ("GradientSNRCallback", "AccuracyGradientCallback", "EMACallback", "StabilityGapCallback"),
    "weights": ("HypergradientCallback", "ReptileCallback", "MIGUCallback"),
    "doctor of GRPO": ("GRPODoctor",),
    "reused rollouts": ("SpeculativeReuse",),
    "random-LTD": ("RandomLTDCallback",),
    "order": ("SamplerCallback",),
    **{name: (name,) for name in SAMPLERS},
}
#: samplers that GRPO's own layout is tried with: one of each kind, since the layout wraps them all alike
IN_GROUPS = {"CompetenceSampler", "SelfPacedSampler", "ShuffledSampler"}


def stateful_callbacks() -> set[str]:
    """Return the callbacks of `callback_cases` that carry something from one update to the next."""
    nothing = Case.__dataclass_fields__["look"].default
    return {name for name, case in CASES.items() if case.trains or case.look is not nothing}


def stateful_samplers() -> set[str]:
    found = {name for name in samplers.__all__ if _is_sampler(getattr(samplers, name))}
    return found - NOT_MADE_BY_USERS


def _is_sampler(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, samplers.EffiSampler)


@dataclass(frozen=True)
class Row:
    """One run of the matrix."""

    trainer: str
    tuning: str
    data: str
    ranks: int
    stop: str
    plug: str

    def allowed(self) -> bool:
        names = PLUGS[self.plug]
        orders = bool(set(names) & {*SAMPLERS, "SamplerCallback"})
        if orders and self.data == "stream":
            return False  # a stream has no row numbers: refused by name
        if {"GRPODoctor", "SpeculativeReuse"} & set(names):
            return self.trainer == "GRPO"
        if "RandomLTDCallback" in names:
            return self.trainer == "Trainer"  # refused for padded batches
        if set(names) & set(SAMPLERS):
            if self.ranks == 2 and names[0] not in IN_GROUPS:
                return False  # each order on two ranks: tests/distributed/test_sampler_ranks.py
            # The mixin is the same in all of them; GRPO wraps the sampler.
            return self.trainer == "Trainer" or (self.trainer == "GRPO" and names[0] in IN_GROUPS)
        return True


FACTORS: dict[str, tuple[Any, ...]] = {
    "trainer": ("Trainer", "SFT", "DPO", "GRPO"),
    "tuning": ("full", "LoRA"),
    "data": ("map", "stream"),
    "ranks": (1, 2),
    "stop": tuple(STOPS),
    "plug": tuple(PLUGS),
}


def _pairs(row: Row) -> Iterator[tuple[tuple[str, Any], ...]]:
    yield from itertools.combinations(((name, getattr(row, name)) for name in FACTORS), 2)


def covering_design(seed: int = 0) -> list[Row]:
    """
    Return rows such that each pair of values that some allowed row has is in one of them: greedy, with a seed.

    A trainer meets each plug at one number of ranks at least; with two ranks it costs more than the other pairs, so
    rows of one rank are taken where both cover as many pairs.
    """
    every = [row for values in itertools.product(*FACTORS.values()) if (row := Row(*values)).allowed()]
    random.Random(seed).shuffle(every)
    left = {pair for row in every for pair in _pairs(row)}
    chosen: list[Row] = []
    while left:
        best = max(every, key=lambda row: (sum(pair in left for pair in _pairs(row)), -row.ranks))
        chosen.append(best)
        left.difference_update(_pairs(best))
    return chosen


class _SaveAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = True


def build(row: Row, folder: Path, callbacks: list[TrainerCallback], attach: bool = True) -> Any:
    """Return the trainer of a row; `attach=False` leaves a stock one without a checkpointer."""
    names = PLUGS[row.plug]
    settings: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "max_steps": UPDATES, "save_strategy": "steps", "save_steps": 100, "logging_steps": LOGGING,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2 // row.ranks, "gradient_accumulation_steps": 2, "seed": 3,
        "dataloader_pin_memory": False, "ddp_find_unused_parameters": False, "max_grad_norm": 1.0,
    }  # fmt: skip
    if "AccuracyGradientCallback" in names:
        settings |= {"eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 3}
    made = [*callbacks, *(CALLBACKS[name]() for name in names if name in CALLBACKS)]
    given: dict[str, Any] = {"callbacks": made}
    if sampler := [SAMPLERS[name]() for name in names if name in SAMPLERS]:
        given["train_sampler"] = sampler[0]
        # A decay to zero is warned of where the best rows come last.
        settings |= {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": UPDATES}
    torch.manual_seed(1)
    dropout = 0.0 if "SpeculativeReuse" in names else 0.1  # which it refuses
    adapter = LoraConfig(r=2, target_modules="all-linear", lora_dropout=dropout) if row.tuning == "LoRA" else None
    layers = 3 if "RandomLTDCallback" in names else 1  # it leaves the first and the last alone
    model = tiny_qwen3(num_hidden_layers=layers, **({"end_tokens": 10} if row.trainer == "GRPO" else {}))
    rows = _rows_of(row.trainer)
    if "SpeculativeReuse" in names:
        given["rollout_reuse"], rows = SpeculativeReuse(), rows.select(range(4))  # a second pass within the run
    if "AccuracyGradientCallback" in names:
        given["eval_dataset"] = rows.select(range(2))
    if row.data == "stream":
        rows = rows.to_iterable_dataset()
    if row.trainer == "Trainer":
        from peft import get_peft_model

        model = model if adapter is None else get_peft_model(model, adapter)
        trainer: Any = SampledTrainer(model, TrainingArguments(**settings), train_dataset=rows, **given)
        if attach:
            SafeCheckpointer().attach(trainer)
        return trainer
    given |= {"train_dataset": rows, "processing_class": tiny_tokenizer(), "peft_config": adapter}
    if row.trainer == "SFT":
        return hf_effi.EffiSFTTrainer(model, args=hf_effi.EffiSFTConfig(**settings, max_length=16), **given)
    if row.trainer == "DPO":
        reference = copy.deepcopy(model) if adapter is None else None
        trainer = SampledDPO(model, reference, args=DPOConfig(**settings, max_length=16), **given)
        SafeCheckpointer().attach(trainer)
        return trainer
    config = hf_effi.EffiGRPOConfig(
        **settings, num_generations=2, num_iterations=2, max_completion_length=4, gradient_checkpointing=False
    )
    return hf_effi.EffiGRPOTrainer(model, binary_hash_reward, config, **given)


def _rows_of(trainer: str) -> Dataset:
    if trainer == "Trainer":
        return lm_dataset(ROWS, length=8)
    texts = [f"{i % 10}+{i // 10}=" for i in range(ROWS)]
    if trainer == "SFT":
        return Dataset.from_dict({"text": [f"{text}{i % 10 + i // 10}" for i, text in enumerate(texts)]})
    if trainer == "DPO":
        return Dataset.from_dict({"prompt": texts, "chosen": ["2"] * ROWS, "rejected": ["34"] * ROWS})
    return Dataset.from_dict({"prompt": texts})


def faults_of(row: Row, folder: str | Path, attach: bool = True) -> list[str]:
    """
    Train a row without a break, then from the checkpoint of its stop, and return where the two differ.

    Compared to the bit: weights, states of optimizer and scheduler, and what was logged of the loss, the norm of the
    gradient and the LR.
    """
    folder = Path(folder)
    whole = _quiet(build(row, folder, [_SaveAt(STOPS[row.stop])], attach))
    whole.train()
    resumed = _quiet(build(row, folder, [], attach))
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{STOPS[row.stop]}"))
    return differences(_left(whole), _left(resumed), f"{row}")


def _quiet(trainer: Any) -> Any:
    trainer.remove_callback(PrinterCallback)
    return trainer


def _left(trainer: Any) -> dict[str, Any]:
    logs = [
        {key: entry[key] for key in ("step", "loss", "grad_norm", "learning_rate", "eval_loss") if key in entry}
        for entry in trainer.state.log_history
    ]
    return {
        "weights": dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters()),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": {k: v for k, v in trainer.lr_scheduler.state_dict().items() if not callable(v)},
        "logs": [entry for entry in logs if len(entry) > 1],
        "step": trainer.state.global_step,
    }
