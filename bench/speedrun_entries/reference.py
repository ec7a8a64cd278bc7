"""The reference: stock Trainer with a tuned AdamW, and TRL's GRPOTrainer with the demo's settings."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

LEARNING_RATE, UPDATES = 2e-3, 400
TUNED = {"LEARNING_RATE": (2e-3, 4e-3, 8e-3), "UPDATES": (300, 400, 500)}


def language_model(workload: Any) -> Trainer:
    args = TrainingArguments(
        **workload.shared,
        max_steps=UPDATES,
        per_device_train_batch_size=16,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        warmup_steps=UPDATES // 10,
        adam_beta2=0.95,
        weight_decay=0.1,
        logging_steps=100,
    )
    return Trainer(workload.load_model(), args, train_dataset=workload.rows)


def grpo(workload: Any) -> GRPOTrainer:
    args = GRPOConfig(
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
    )
    return GRPOTrainer(
        workload.load_model(),
        reward_funcs=workload.reward,
        args=args,
        train_dataset=workload.rows,
        processing_class=workload.tokenizer,
    )
