"""Every optimizer of `hf_effi.optim` with options that a tiny model can be trained by; tests walk this table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from hf_effi import EffiTrainer, EffiTrainingArguments
from hf_effi.optim import use_optimizer
from hf_effi.optim.names import find_factory

from .data import lm_dataset
from .models import tiny_llama

#: name -> options that put its periods (projections, draws, refreshes) inside a run of five updates
OPTIONS: dict[str, dict[str, Any]] = {
    "mars_m": {"gamma": 0.1},
    "muon": {"momentum": 0.9},
    "apollo": {"rank": 4, "update_gap": 2},
    "apollo_mini": {"update_gap": 2},
    "frugal": {"update_gap": 2},
    "nadamw": {},
    "soap": {"precondition_frequency": 2},
    "prodigy": {"d0": 1e-3},
    "lars": {"trust_coefficient": 0.1},
    "lamb": {},
}
#: what a config must say for them
FIELDS: dict[str, dict[str, Any]] = {"prodigy": {"learning_rate": 1.0}}
#: Their weight decay is no shrinking of the weights by `lr decay` alone: it is inside of a ratio or of an estimate.
DECAY_INSIDE = {"lamb", "lars", "prodigy", "soap"}
DOORS = ("use_optimizer", "config", "optimizer_cls_and_kwargs")
LR, DECAY = 1e-2, 0.1


def settings(out: str | Path, **over: Any) -> dict[str, Any]:
    """Return fields of a config for five updates on the CPU."""
    return {
        "output_dir": str(out),
        "max_steps": 5,
        "learning_rate": LR,
        "weight_decay": DECAY,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        **over,
    }


def trainer_by(door: str, optim: str, out: str | Path, model: Any = None, **over: Any) -> Trainer:
    """Return a trainer that got one optimizer of the table by one of [`DOORS`]."""
    model, data, fields = model or tiny_llama(), lm_dataset(), settings(out, **{**FIELDS.get(optim, {}), **over})
    options = OPTIONS[optim]
    if door == "config":
        args = EffiTrainingArguments(**fields, optim=optim, optim_args=options or None)
        return EffiTrainer(model, args, train_dataset=data)
    if door == "optimizer_cls_and_kwargs":
        kwargs = {"lr": fields["learning_rate"], "weight_decay": fields["weight_decay"], **options}
        args = TrainingArguments(**fields)
        return Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=(find_factory(optim), kwargs))
    trainer = Trainer(model, TrainingArguments(**fields), train_dataset=data)
    use_optimizer(trainer, optim, **options)
    return trainer
