"""Short runs for the doctors."""

from torch.optim import AdamW
from transformers import (
    Trainer,
    TrainingArguments,
)

from hf_effi.callbacks.doctor import TrainDoctor
from tests.helpers import (
    lm_dataset,
    tiny_qwen3,
)

QUIET = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "seed": 7, "logging_steps": 1}


def train(folder, *callbacks, rows=None, model=None, optimizers=(None, None), resume=None, **over):
    settings = {
        "learning_rate": 1e-3,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "max_grad_norm": 100.0,
    }
    trainer = Trainer(
        model or tiny_qwen3(num_hidden_layers=1),
        TrainingArguments(str(folder), **{**QUIET, **settings, **over}),
        train_dataset=lm_dataset(32, length=8) if rows is None else rows,
        optimizers=optimizers,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def rules(doctor):
    return [finding.rule for finding in doctor.findings]


def silent(cls=TrainDoctor, **limits):
    return cls(cls.limits_class(**limits), say=lambda sentence: None)


def two_groups(model, *lrs):
    weights = list(model.parameters())
    return AdamW([{"params": weights[:3], "lr": lrs[0]}, {"params": weights[3:], "lr": lrs[1]}])
