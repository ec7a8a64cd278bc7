"""
What the ranks of one engine run: short trainings, each of which ends in numbers or in a refusal. Several share a
launch.
"""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import AdaLoraConfig, LoraConfig, OSFConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import hf_effi
from hf_effi import samplers
from hf_effi.callbacks.reptile import ReptileCallback
from hf_effi.functional.local_updates import LocalUpdates
from hf_effi.functional.rollouts import AdaptiveNoise
from hf_effi.selection import HIVE, PCL, GainRL
from tests.helpers import (
    binary_hash_reward,
    lm_dataset,
    prompt_dataset,
    save_tiny,
    sft_dataset,
    tiny_qwen3,
    tiny_tokenizer,
)
from tests.helpers.cpu_engines import engine_arguments, run_on_cpu
from tests.helpers.prompts import answers

ROWS = 32
LENGTH = 12


@dataclass
class Outcome:
    """
    What a run left on one rank.

    Args:
        weights (`dict`): The whole weights at the end, on the first rank; empty elsewhere and after a refusal.
        log (`list`): The entries of `log_history`.
        updates (`int`): Updates that were made.
        refused (`str`): The error as `"Type: message"`; empty where the run came to its end.
        where (`str`): The traceback of the error.
        more (`dict`): What a case wants to show beside.
    """

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    updates: int = 0
    refused: str = ""
    where: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    def series(self, name: str) -> list[float]:
        return [float(entry[name]) for entry in self.log if name in entry]


class _Count(TrainerCallback):
    """Counts the updates that were made, also by a run that ends in an error."""

    updates = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        type(self).updates += 1


@dataclass(frozen=True)
class Place:
    """
    Where a case runs.

    Args:
        engine (`str`): See [`~tests.helpers.cpu_engines.ENGINES`].
        folder (`Path`): For checkpoints; the same on all ranks.
        launched (`bool`): Whether a launcher has chosen the engine, by its environment, so that the arguments say
            nothing.
    """

    engine: str
    folder: Path
    launched: bool = False

    def arguments(self, cls: type = TrainingArguments, **over: Any) -> Any:
        settings: dict[str, Any] = {
            "output_dir": str(self.folder),
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            # At 1e-8 Adam makes a whole step of the rounding of a gradient that is nearly zero.
            "adam_epsilon": 1e-4,
            "max_steps": 2,
            "seed": 7,
            "per_device_train_batch_size": 2,
            "gradient_checkpointing": False,
            "ddp_find_unused_parameters": False,
        }
        chosen = {"use_cpu": self.engine == "ddp"} if self.launched else engine_arguments(self.engine)
        return cls(**{**settings, **chosen, **over})


def finish(trainer: Any, resume: str | None = None) -> Outcome:
    """Train, and return the whole weights on the first rank."""
    trainer.remove_callback(_Count)
    trainer.add_callback(_Count)
    trainer.train(resume_from_checkpoint=resume)
    wrapped = trainer.deepspeed if trainer.is_deepspeed_enabled else trainer.model_wrapped
    state = trainer.accelerator.get_state_dict(wrapped)
    state = {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in (state or {}).items()
    }
    weights = {}
    if trainer.accelerator.process_index == 0:
        weights = {name.removeprefix("module."): value.detach().cpu().clone() for name, value in state.items()}
    log = [dict(entry) for entry in trainer.state.log_history]
    more = {
        "kind": trainer.accelerator.distributed_type.value,
        "sharded": any(is_shard(parameter) for parameter in trainer.model.parameters()),
        "savings": getattr(trainer, "exact_savings", None),
    }
    return Outcome(weights, log, trainer.state.global_step, more=more)


def is_shard(parameter: torch.nn.Parameter) -> bool:
    """Whether this process has a part of a parameter only."""
    return isinstance(parameter, DTensor) or (hasattr(parameter, "ds_id") and not parameter.numel())


# --- the trainers ----------------------------------------------------------------------------------------------------


def lm(
    place: Place,
    *callbacks: TrainerCallback,
    cls: type = Trainer,
    config: type = TrainingArguments,
    model: Any = None,
    resume: str | None = None,
    made: dict[str, Any] | None = None,
    **over: Any,
) -> Outcome:
    """A `Trainer` or a subclass; `made` are further arguments of it, `over` those of its config."""
    made = {"train_dataset": lm_dataset(ROWS, length=LENGTH), **(made or {})}
    args = place.arguments(config, **over)  # before the model, as a script does: ZeRO-3 has to know of it
    model = tiny_qwen3(num_hidden_layers=3) if model is None else model() if callable(model) else model
    return finish(cls(model, args, callbacks=list(callbacks), **made), resume)


def sft(place: Place, *callbacks: TrainerCallback, resume: str | None = None, **over: Any) -> Outcome:
    cls, config = over.pop("cls", SFTTrainer), over.pop("config", SFTConfig)
    made = {"processing_class": tiny_tokenizer(), **over.pop("made", {})}
    attention = over.pop("attention", None)
    args = place.arguments(config, **{"max_length": 32, **over})
    model = tiny_qwen3()
    if attention is not None:
        model.set_attn_implementation(attention)
    trainer = cls(model, args, train_dataset=sft_dataset(ROWS), callbacks=list(callbacks), **made)
    return finish(trainer, resume)


def grpo(place: Place, resume: str | None = None, **over: Any) -> Outcome:
    cls = over.pop("cls", hf_effi.EffiGRPOTrainer)
    config, made = over.pop("config", hf_effi.EffiGRPOConfig), over.pop("made", {})
    model = over.pop("model", None)
    settings = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 8, **over}
    args = place.arguments(config, **settings)
    trainer = cls(
        tiny_qwen3(end_tokens=10) if model is None else model,
        binary_hash_reward,
        args,
        made.pop("train_dataset", prompt_dataset(ROWS)),
        processing_class=tiny_tokenizer(),
        **made,
    )
    return finish(trainer, resume)


def named_grpo(place: Place) -> Outcome:
    """A model by its name: under ZeRO-3 transformers shards it as it loads, before any trainer sees it."""
    name = str(place.folder / "model")
    settings = {"model_init_kwargs": {"dtype": "float32"}, "num_iterations": 2}
    place.arguments()  # sets up the processes
    if torch.distributed.get_rank() == 0:
        save_tiny(tiny_qwen3(end_tokens=10), tiny_tokenizer(), name)
    torch.distributed.barrier()
    return grpo(place, model=name, **settings)


def resumed(train: Callable[..., Outcome], place: Place, at: int, **over: Any) -> Outcome:
    """Train with a checkpoint at update `at`, then again from it; `more["again"]` is what the second run left."""
    saving = {"save_strategy": "steps", "save_steps": at, "save_total_limit": 3, **over}
    whole = train(place, **saving)
    whole.more["saved"] = sorted(path.name for path in (place.folder / f"checkpoint-{at}").iterdir())
    whole.more["again"] = train(place, resume=str(place.folder / f"checkpoint-{at}"), **saving)
    return whole


# --- the cases -------------------------------------------------------------------------------------------------------

WSD = {"lr_schedule": "wsd", "lr_schedule_kwargs": {"warmup_steps": 2, "decay_steps": 2}}


def shuffled() -> samplers.ShuffledSampler:
    return samplers.ShuffledSampler(ROWS, seed=3)


def stock_trainer(place: Place, **over: Any) -> Outcome:
    callbacks = [
        hf_effi.LRScheduleCallback(hf_effi.schedules.wsd(warmup_steps=2, decay_steps=2)),
        hf_effi.SamplerCallback(shuffled()),
        hf_effi.RunRecordCallback(),
        hf_effi.TrainDoctor(say=lambda sentence: None),
    ]
    return lm(place, *callbacks, max_steps=6, **over)


def effi_trainer(place: Place, **over: Any) -> Outcome:
    made = {"train_sampler": shuffled(), "train_dataset": lm_dataset(ROWS, length=LENGTH)}
    chosen = {"cls": hf_effi.EffiTrainer, "config": hf_effi.EffiTrainingArguments}
    return lm(place, made=made, max_steps=6, **chosen, **WSD, **over)


def effi_sft(place: Place, **over: Any) -> Outcome:
    chosen = {"cls": hf_effi.EffiSFTTrainer, "config": hf_effi.EffiSFTConfig}
    return sft(place, made={"train_sampler": shuffled()}, max_steps=6, **chosen, **WSD, **over)


#: filter, prune and schedule; two updates a generation, so that update 3 is in the middle of one
RL = {"difficulty_range": [0, 1], "prune_rate": 0.5, "steps_per_generation": 2, "max_steps": 5, **WSD}


def effi_grpo(place: Place, **over: Any) -> Outcome:
    doctor = hf_effi.GRPODoctor(say=lambda sentence: None)
    return grpo(place, made={"train_sampler": shuffled(), "callbacks": [doctor]}, **RL, **over)


def with_resume(train: Callable[..., Outcome]) -> Callable[[Place], Outcome]:
    return lambda place: resumed(train, place, at=3)


def adapted(**config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(tiny_qwen3(), LoraConfig(**{"r": 4, "target_modules": "all-linear", **config}))


def adapted_for_adalora() -> Any:
    config = {"target_modules": ["q_proj"], "init_r": 3, "target_r": 1, "tinit": 1, "tfinal": 1, "deltaT": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(tiny_qwen3(), AdaLoraConfig(total_step=6, **config))


def by_loss(model: Any, rows: Sequence[int]) -> list[float]:
    return [float(row % 5) for row in rows]


class Chunked(hf_effi.trainers.mixins.ChunkFlowMixin, Trainer):
    pass


class Grown(hf_effi.trainers.mixins.SequenceLengthMixin, Trainer):
    pass


class Local(hf_effi.trainers.mixins.LocalUpdatesMixin, Trainer):
    pass


class Measured(hf_effi.trainers.mixins.SamplerMixin, Trainer):
    pass


class Transformed(hf_effi.trainers.mixins.BatchTransformMixin, Trainer):
    pass


class _RangeTest(TrainerCallback):
    """A range test in the middle of a run, which has to leave no trace."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tokens = torch.tensor(lm_dataset(10, length=LENGTH)["input_ids"])
        batches = [{"input_ids": row[None], "labels": row[None]} for row in tokens]
        hf_effi.schedules.lr_range_test(kwargs["model"], kwargs["optimizer"], batches, repeats=1)
        kwargs["optimizer"].zero_grad()


class _Tested(Trainer):
    """A range test of the Trainer's own updates before it trains, which has to leave no trace."""

    tested = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if not self.tested:
            self.tested = True
            hf_effi.schedules.lr_range_test(self, steps=10, repeats=1)
        return super().train(*args, **kwargs)


def denoising() -> hf_effi.data.UL2Denoising:
    return hf_effi.data.UL2Denoising(range(200, 220), 0, 32, eos_token_id=1)


def replayed_stream() -> Any:
    """A stream with a quarter of old rows; both parts are streams."""
    rows = lm_dataset(ROWS, length=LENGTH)
    new, old = rows.select(range(8, ROWS)).to_iterable_dataset(), rows.select(range(8)).to_iterable_dataset()
    return hf_effi.data.ReplayStream(new, old, 0.25, block=4)


def adapted_by_osf() -> Any:
    config = OSFConfig(target_modules=["q_proj", "up_proj"], effective_rank=0.5)
    return get_peft_model(tiny_qwen3(num_hidden_layers=1), config)


def shared_prefix(place: Place) -> Outcome:
    args = place.arguments(remove_unused_columns=False)
    model = tiny_qwen3()
    model.set_attn_implementation(hf_effi.attention.register_varlen_attention())
    collate = hf_effi.data.SharedPrefixCollator(model)
    return finish(Trainer(model, args, train_dataset=Dataset.from_list(answers(ROWS)), data_collator=collate))


def patched(*patches: Callable[..., Any]) -> Callable[[Place], Outcome]:
    return lambda place: lm(place, hf_effi.PatchCallback(*patches))


CASES: dict[str, Callable[[Place], Outcome]] = {
    "Trainer": with_resume(stock_trainer),
    "EffiTrainer": with_resume(effi_trainer),
    "EffiSFTTrainer": with_resume(effi_sft),
    "EffiGRPOTrainer": with_resume(effi_grpo),
    "exact_savings": lambda place: grpo(place, num_iterations=2, max_steps=2),
    "grpo_token_budget": lambda place: grpo(
        place, num_iterations=2, max_steps=2, loss_token_budget=24, score_token_budget=48
    ),
    "rollout_savings": lambda place: grpo(
        place, num_iterations=2, max_steps=2, exact_savings="off", rollout_savings="prefill,compact"
    ),
    "named_grpo": named_grpo,
    "pcl": lambda place: grpo(place, max_steps=3, made={"prompt_selector": PCL(seed=1)}),
    "hive": lambda place: grpo(place, max_steps=3, made={"prompt_selector": HIVE(PCL(seed=1))}),
    "gain_rl": lambda place: grpo(place, max_steps=3, made={"prompt_selector": GainRL(subset=6, seed=1)}),
    "rollout_noise": lambda place: grpo(place, made={"rollout_noise": AdaptiveNoise(0.3, 0.1)}, max_steps=2),
    "stock_grpo": lambda place: grpo(place, num_iterations=2, max_steps=2, cls=GRPOTrainer, config=GRPOConfig),
    "weight_averaging": lambda place: lm(place, hf_effi.WeightAveragingCallback(2, every_steps=1, kind="uniform")),
    "replay_stream": lambda place: lm(place, max_steps=3, made={"train_dataset": replayed_stream()}),
    "migu": lambda place: lm(place, hf_effi.callbacks.MIGUCallback(0.7, "hard"), gradient_accumulation_steps=2),
    "osf_projection": lambda place: lm(place, hf_effi.callbacks.OSFProjectionCallback(), model=adapted_by_osf),
    "reptile": lambda place: lm(place, ReptileCallback(every_steps=2, beta=0.5)),
    "local_updates": lambda place: lm(
        place, cls=Local, made={"local_updates": LocalUpdates(2)}, average_tokens_across_devices=False, max_steps=3
    ),
    "adalora": lambda place: lm(
        place, hf_effi.callbacks.AdaLoRACallback(set_total_step=True), model=adapted_for_adalora, max_steps=6
    ),
    "auto_lrs": lambda place: lm(
        place,
        hf_effi.callbacks.AutoLRSCallback(1e-4, 1e-2, 4, 2, 4, validation=False),
        lr_scheduler_type="constant",
        max_steps=12,
    ),
    "gradient_snr": lambda place: lm(place, hf_effi.callbacks.GradientSNRCallback(), gradient_accumulation_steps=3),
    "hypergradient": lambda place: lm(place, hf_effi.callbacks.HypergradientCallback(kappa=0.2)),
    "accuracy_gradient": lambda place: lm(
        place,
        hf_effi.callbacks.AccuracyGradientCallback("eval_loss"),
        eval_strategy="steps",
        eval_steps=1,
        made={"eval_dataset": lm_dataset(4, length=LENGTH)},
    ),
    "random_ltd": lambda place: lm(place, hf_effi.callbacks.RandomLTDCallback(4, LENGTH, multiple=2)),
    "nadamw": lambda place: by_config(place, optim="nadamw"),
    "soap": lambda place: by_config(place, optim="soap"),
    "apollo": lambda place: by_config(place, optim="apollo", optim_args={"rank": 4, "update_gap": 1}),
    "frugal": lambda place: by_config(place, optim="frugal"),
    "optim_groups": lambda place: by_config(place, optim_groups={"layer_decay": 0.5, "lr_factors": {"norm": 2.0}}),
    "tiled_mlp": patched(hf_effi.kernels.tile_mlp),
    "tiled_loss": patched(hf_effi.memory.tile_loss),
    "stream_layer": patched(hf_effi.memory.stream_layers),
    "chunk_flow": lambda place: lm(place, cls=Chunked, made={"chunk_flow": hf_effi.memory.ChunkFlow(4)}),
    "activation_offload": lambda place: lm(place, hf_effi.ActivationOffloadCallback(), gradient_checkpointing=True),
    "selective_checkpointing": lambda place: lm(
        place, hf_effi.SelectiveCheckpointCallback(), gradient_checkpointing=True
    ),
    "memory_budget": lambda place: lm(place, hf_effi.MemoryBudgetCallback(1.0), gradient_checkpointing=True),
    "kernel_patch": lambda place: lm(place, hf_effi.KernelPatchCallback({"RMSNorm": EagerNorm})),
    "fused_lora": lambda place: lm(
        place, hf_effi.KernelPatchCallback({"LoRALinear": hf_effi.kernels.FusedLoRALinear()}), model=adapted
    ),
    "low_bit_lora": lambda place: lm(
        place, hf_effi.KernelPatchCallback({"LoRALinear": hf_effi.kernels.LowBitLoRALinear("int8")}), model=adapted
    ),
    "lm_head": lambda place: sft(
        place, cls=hf_effi.EffiSFTTrainer, config=hf_effi.EffiSFTConfig, kernel_patch={"LMHead": "hf_effi"}
    ),
    "sequence_parallel": lambda place: lm(
        place, cls=hf_effi.EffiTrainer, config=hf_effi.EffiTrainingArguments, sequence_parallel_size=2
    ),
    "lr_range_test": lambda place: lm(place, _RangeTest()),
    "lr_range_test_trainer": lambda place: lm(place, cls=_Tested, max_steps=10),
    "gradient_norms": lambda place: lm(place, hf_effi.callbacks.GradientNormsCallback(), max_grad_norm=0.1),
    "token_budget": lambda place: lm(
        place, cls=Measured, made={"train_sampler": samplers.TokenBudgetBatchSampler([LENGTH] * ROWS, 4 * LENGTH)}
    ),
    "ul2_denoising": lambda place: lm(
        place, cls=Transformed, model=lambda: tiny_qwen3(vocab_size=256), made={"batch_transform": denoising()}
    ),
    "shared_prefix": shared_prefix,
    "varlen_attention": lambda place: sft(
        place, attention=hf_effi.attention.register_varlen_attention(), packing=True
    ),
    "sequence_length_growth": lambda place: lm(place, cls=Grown, made={"sequence_length": _growing}),
    "self_paced": lambda place: lm(
        place,
        cls=Measured,
        made={"train_sampler": samplers.SelfPacedSampler(ROWS, by_loss, share=0.5, share_step=0.5)},
    ),
}


def by_config(place: Place, **over: Any) -> Outcome:
    return lm(place, cls=hf_effi.EffiTrainer, config=hf_effi.EffiTrainingArguments, weight_decay=0.1, **over)


def _growing(step: int, steps: int) -> int:
    return 6 + 2 * step


class EagerNorm(torch.nn.Module):
    """A norm of its own in the form of the Hub's layers, which rounds as the model's does."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


def run_cases(engine: str, names: Sequence[str], folder: str, launched: bool = False) -> dict[str, Outcome]:
    """
    Run cases one after the other; what one raises is its outcome.

    Args:
        engine (`str`): See [`~tests.helpers.cpu_engines.ENGINES`].
        names (`Sequence[str]`): Of [`CASES`].
        folder (`str`): An empty folder for the checkpoints, the same on each rank.
        launched (`bool`, *optional*, defaults to `False`): Whether the environment has chosen the engine.
    """
    run_on_cpu(engine)
    outcomes = {}
    for name in names:
        _Count.updates, start = 0, time.monotonic()
        try:
            outcomes[name] = CASES[name](Place(engine, Path(folder) / name, launched))
        except Exception as error:
            outcomes[name] = Outcome(
                updates=_Count.updates,
                refused=f"{type(error).__name__}: {error}",
                where="".join(traceback.format_exception(error)[-12:]),
            )
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return outcomes
