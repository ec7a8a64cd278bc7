"""A small training run with an LR schedule; imported by the tests and run by two processes."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_effi.callbacks.lr_schedule import LRScheduleCallback
from hf_effi.functional.schedules import wsd


class Recorder(TrainerCallback):
    """Notes the LR of every group at the moment the optimizer steps, and what gets logged."""

    def __init__(self):
        self.applied, self.logged = [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.applied.append([float(group["lr"]) for group in kwargs["optimizer"].param_groups])

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "learning_rate" in logs:
            self.logged.append(logs["learning_rate"])


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def rows(n=48):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 32, (n, 8), generator=generator)
    return [{"input_ids": t, "labels": t} for t in tokens]


def make_trainer(out, callbacks, model=None, optimizers=(None, None), trainer_class=Trainer, **changes):
    settings = {
        "output_dir": str(out),
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    more = {k: changes.pop(k) for k in ("eval_dataset", "compute_metrics") if k in changes}
    args = changes.pop("args", None) or TrainingArguments(**{**settings, **changes})
    return trainer_class(
        model=model or tiny_model(),
        args=args,
        train_dataset=rows(),
        callbacks=callbacks,
        optimizers=optimizers,
        **more,
    )


def train(out, schedule, resume=None, extra=(), **changes):
    """Return (applied LRs, logged LRs, trainer)."""
    recorder = Recorder()
    options = {k: changes.pop(k) for k in ("on_mismatch", "allow_lr_jump", "counter") if k in changes}
    trainer = make_trainer(out, [LRScheduleCallback(schedule, **options), recorder, *extra], **changes)
    trainer.train(resume_from_checkpoint=resume)
    return recorder.applied, recorder.logged, trainer


def traced_run(out, stop_at=None):
    """
    One rank of a run with the callback: its applied and logged LRs, and the world size.

    Args:
        stop_at: Stop at this update and leave a checkpoint for another world size to go on from.
    """
    stop = [StopAt(stop_at)] if stop_at is not None else []
    applied, logged, trainer = train(
        out,
        wsd(warmup_steps=3, decay_steps=4),
        extra=stop,
        ddp_backend="gloo",
        gradient_accumulation_steps=2,
        save_strategy="steps" if stop else "no",
    )
    return {"applied": applied, "logged": logged, "world": trainer.args.world_size}
