"""This package: Muon; EffiGRPOTrainer with a filter, pruning and its exact savings."""

from __future__ import annotations

from typing import Any

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer, EffiTrainer, EffiTrainingArguments

LEARNING_RATE, UPDATES = 1.6e-2, 240
TUNED = {"LEARNING_RATE": (4e-3, 8e-3, 1.6e-2), "UPDATES": (160, 240, 300)}


def language_model(workload: Any) -> EffiTrainer:
    args = EffiTrainingArguments(
        **workload.shared,
        max_steps=UPDATES,
        per_device_train_batch_size=16,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        warmup_steps=UPDATES // 10,
        weight_decay=0.1,
        optim="muon",
        optim_args={"betas": (0.9, 0.95)},
        logging_steps=100,
    )
    return EffiTrainer(workload.load_model(), args, train_dataset=workload.rows)


def grpo(workload: Any) -> EffiGRPOTrainer:
    args = EffiGRPOConfig(
        **workload.shared,
        max_steps=workload.max_updates,
        per_device_train_batch_size=256,
        num_generations=8,
        num_iterations=2,
        max_completion_length=workload.max_completion,
        learning_rate=8e-5,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        adam_beta2=0.95,
        beta=0.0,
        loss_type="dapo",
        activation_checkpointing=False,
        logging_steps=100,
        exact_savings="auto",
        difficulty_range=(0.0, 1.0),
        difficulty_max_rounds=1,
        difficulty_underfill="shrink",
        prune_rate=0.75,
        prune_scope="rank",
        prune_allocation=False,
        prune_metric="smallest",
    )
    return EffiGRPOTrainer(
        workload.load_model(),
        reward_funcs=workload.reward,
        args=args,
        train_dataset=workload.rows,
        processing_class=workload.tokenizer,
    )
