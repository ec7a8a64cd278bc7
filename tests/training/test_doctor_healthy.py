"""Healthy runs of many kinds: the doctors find nothing in any of them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, CyclicLR, OneCycleLR, ReduceLROnPlateau, StepLR
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOTrainer, SFTConfig, SFTTrainer

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer, LRScheduleCallback
from hf_effi.callbacks.doctor import GRPODoctor, TrainDoctor
from hf_effi.schedules import wsd
from tests.helpers import (
    binary_hash_reward,
    grpo_args,
    length_reward,
    lm_dataset,
    run_grpo,
    sft_dataset,
    tiny_qwen3,
    tiny_tokenizer,
)
from tests.training._doctor_runs import QUIET, two_groups

SETTINGS = {
    "learning_rate": 1e-3,
    "max_steps": 12,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
    "max_grad_norm": 100.0,
}


def plain(folder, doctor, *, model=None, rows=None, optimizers=None, callbacks=(), resume=None, **over):
    model = model or tiny_qwen3(num_hidden_layers=1)
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **{**QUIET, **SETTINGS, **over}),
        train_dataset=lm_dataset(32, length=8) if rows is None else rows,
        eval_dataset=lm_dataset(8, length=8, seed=1),
        optimizers=(None, None) if optimizers is None else optimizers(model),
        callbacks=[*callbacks, doctor],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def adamw_with(make):
    """An optimizer and a scheduler of torch on it."""

    def build(model):
        optimizer = AdamW(model.parameters(), lr=1e-3)
        return optimizer, make(optimizer)

    return build


def masked_prompts(row, index):
    """The first half of each row is a prompt; now and then a whole row is."""
    labels = list(row["labels"])
    masked = len(labels) if index % 3 == 0 else len(labels) // 2
    return {"labels": [-100] * masked + labels[masked:]}


def lora(folder, doctor):
    from peft import get_peft_model

    model = get_peft_model(tiny_qwen3(num_hidden_layers=1), LoraConfig(r=2, target_modules=["q_proj"]))
    plain(folder, doctor, model=model)


def frozen_group(folder, doctor):
    model = tiny_qwen3(num_hidden_layers=1)
    for weight in list(model.parameters())[3:]:
        weight.requires_grad_(False)
    plain(folder, doctor, model=model, optimizers=lambda model: (two_groups(model, 1e-3, 0.0), None))


def resumed(folder, doctor, **over):
    save = {"save_strategy": "steps", "save_steps": 6, **over}
    plain(folder, TrainDoctor(say=list), **save)
    plain(folder, doctor, resume=str(folder / "checkpoint-6"), **save)


def evaluation_only(folder, doctor):
    args = TrainingArguments(str(folder), **QUIET)
    Trainer(tiny_qwen3(), args, eval_dataset=lm_dataset(8, length=8), callbacks=[doctor]).evaluate()


def flattened(folder, doctor):
    args = TrainingArguments(str(folder), **{**QUIET, **SETTINGS}, use_cache=False)
    model, rows = tiny_qwen3(num_hidden_layers=1), lm_dataset(32, length=8)
    Trainer(model, args, train_dataset=rows, data_collator=DataCollatorWithFlattening(), callbacks=[doctor]).train()


def plateau(model):
    optimizer = AdamW(model.parameters(), lr=1e-3)
    return optimizer, ReduceLROnPlateau(optimizer, patience=1)


def sft(folder, doctor, rows=None, peft=None, **over):
    settings = {**QUIET, **SETTINGS, "gradient_checkpointing": False, "max_length": 64, "output_dir": str(folder)}
    SFTTrainer(
        model=tiny_qwen3(num_hidden_layers=1),
        args=SFTConfig(**{**settings, **over}),
        train_dataset=sft_dataset(32) if rows is None else rows,
        processing_class=tiny_tokenizer(),
        peft_config=peft,
        callbacks=[doctor],
    ).train()


def prompts_and_completions():
    return sft_dataset(32).map(
        lambda row: {"prompt": row["text"][:4], "completion": row["text"][4:]}, remove_columns=["text"]
    )


def dpo(folder, doctor):
    rows = sft_dataset(32).map(
        lambda row: {"prompt": row["text"][:4], "chosen": row["text"][4:], "rejected": row["text"][4:][::-1] + "1"},
        remove_columns=["text"],
    )
    settings = {**QUIET, **SETTINGS, "max_steps": 6, "gradient_checkpointing": False, "output_dir": str(folder)}
    DPOTrainer(
        model=tiny_qwen3(num_hidden_layers=1),
        ref_model=tiny_qwen3(num_hidden_layers=1),
        args=DPOConfig(**settings),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        callbacks=[doctor],
    ).train()


def grpo(folder, doctor, trainer=GRPOTrainer, config=None, rewards=binary_hash_reward, resume=None, peft=None, **over):
    kind = {} if config is None else {"cls": config}
    args = grpo_args(folder, **kind, **{"max_steps": 6, "max_grad_norm": 100.0, **over})
    kwargs = {"reward_funcs": rewards, "peft_config": peft, "callbacks": [doctor]}
    run_grpo(trainer, args, resume_from_checkpoint=resume, **kwargs)


def sometimes(completions, **kwargs):
    """A second reward function that applies to few completions."""
    return [1.0 if len(text) % 5 == 0 else None for text in completions]


def grpo_resumed(folder, doctor):
    save = {"save_strategy": "steps", "save_steps": 3}
    grpo(folder, GRPODoctor(say=list), **save)
    grpo(folder, doctor, resume=str(folder / "checkpoint-3"), **save)


def small_rewards(completions, **kwargs):
    return [value / 50 for value in length_reward(completions)]


SCHEDULES = {
    "linear": {"warmup_steps": 3},
    "cosine": {},
    "constant": {},
    "constant_with_warmup": {"warmup_steps": 4},
    "inverse_sqrt": {"warmup_steps": 2},
    "polynomial": {"lr_scheduler_kwargs": {"lr_end": 1e-4, "power": 2.0}},
    "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr_rate": 0.2}},
    "cosine_with_restarts": {"lr_scheduler_kwargs": {"num_cycles": 3}},
    "warmup_stable_decay": {"warmup_steps": 2, "lr_scheduler_kwargs": {"num_decay_steps": 4}},
}

HEALTHY = {
    **{
        f"trainer, {name}": lambda folder, doctor, name=name, over=over: plain(
            folder, doctor, lr_scheduler_type=name, gradient_accumulation_steps=2, **over
        )
        for name, over in SCHEDULES.items()
    },
    "trainer, 40 updates logged every 2": lambda f, d: plain(
        f, d, rows=lm_dataset(64, length=8), max_steps=40, logging_steps=2
    ),
    "trainer, batches of one row": lambda f, d: plain(f, d, per_device_train_batch_size=1),
    "trainer, bf16 autocast": lambda f, d: plain(f, d, bf16=True),
    "trainer, bf16 weights": lambda f, d: plain(f, d, model=tiny_qwen3(num_hidden_layers=1).to(torch.bfloat16)),
    "trainer, no clipping": lambda f, d: plain(f, d, max_grad_norm=0.0),
    "trainer, adafactor": lambda f, d: plain(f, d, optim="adafactor"),
    "trainer, sgd": lambda f, d: plain(f, d, optim="sgd", learning_rate=0.1),
    "trainer, checkpointing": lambda f, d: plain(f, d, activation_checkpointing=True),
    "trainer, epochs with evaluation": lambda f, d: plain(
        f, d, max_steps=-1, num_train_epochs=2, eval_strategy="epoch"
    ),
    "trainer, evaluation only": evaluation_only,
    "trainer, resumed": resumed,
    "trainer, resumed at a constant LR": lambda f, d: resumed(f, d, lr_scheduler_type="constant"),
    "trainer, lora": lora,
    "trainer, a frozen group at LR 0": frozen_group,
    "trainer, masked prompts": lambda f, d: plain(
        f, d, rows=lm_dataset(32, length=8).map(masked_prompts, with_indices=True), per_device_train_batch_size=2
    ),
    "trainer, a staircase": lambda f, d: plain(f, d, optimizers=adamw_with(lambda o: StepLR(o, 3))),
    "trainer, warm restarts": lambda f, d: plain(
        f, d, optimizers=adamw_with(lambda o: CosineAnnealingWarmRestarts(o, 5)), gradient_accumulation_steps=2
    ),
    "trainer, a triangular wave": lambda f, d: plain(
        f,
        d,
        gradient_accumulation_steps=2,
        optimizers=lambda m: (o := SGD(m.parameters(), 0.01, 0.9), CyclicLR(o, 0.001, 0.01, step_size_up=4)),
    ),
    "trainer, one cycle": lambda f, d: plain(
        f, d, optimizers=adamw_with(lambda o: OneCycleLR(o, 1e-3, total_steps=13)), gradient_accumulation_steps=2
    ),
    "trainer, plateau": lambda f, d: plain(
        f, d, optimizers=plateau, eval_strategy="steps", eval_steps=3, metric_for_best_model="loss"
    ),
    "trainer, wsd by callback": lambda f, d: plain(f, d, callbacks=[LRScheduleCallback(wsd(decay_fraction=0.25))]),
    "trainer, flattened documents": flattened,
    "sft": sft,
    "sft, packing": lambda f, d: sft(f, d, packing=True, per_device_train_batch_size=1, max_steps=4),
    "sft, completions only": lambda f, d: sft(f, d, rows=prompts_and_completions()),
    "sft, lora": lambda f, d: sft(f, d, peft=LoraConfig(r=2, target_modules=["q_proj"])),
    "dpo": dpo,
    "grpo": grpo,
    "grpo, small rewards": lambda f, d: grpo(f, d, rewards=small_rewards),
    "grpo, lora and beta": lambda f, d: grpo(f, d, peft=LoraConfig(r=2, target_modules=["q_proj"]), beta=0.04),
    "grpo, two iterations": lambda f, d: grpo(f, d, num_iterations=2),
    "grpo, two rewards, one of them rare": lambda f, d: grpo(f, d, rewards=[length_reward, sometimes]),
    "grpo, resumed": grpo_resumed,
    "grpo, exact savings and pruning": lambda f, d: grpo(f, d, EffiGRPOTrainer, EffiGRPOConfig, prune_rate=0.5),
    "grpo, difficulty filter": lambda f, d: grpo(f, d, EffiGRPOTrainer, EffiGRPOConfig, difficulty_range=(0.1, 0.9)),
}


@pytest.mark.parametrize("name", sorted(HEALTHY))
def test_a_healthy_run_has_no_finding(tmp_path, caplog, name):
    doctor = (GRPODoctor if name.startswith("grpo") else TrainDoctor)(say=lambda sentence: None)
    HEALTHY[name](tmp_path, doctor)
    assert [str(finding) for finding in doctor.findings] == []
    assert not any("stopped watching" in message for message in caplog.messages)


def test_the_table_has_runs_of_all_trainers():
    kinds = [name.split(",")[0] for name in HEALTHY]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"trainer": 31, "sft": 4, "dpo": 1, "grpo": 8}
