"""
Weights and metrics of short seeded runs over all trainers and methods, to the bit: what a move of files must not
change.

Temporary: this file and `move_keeps_weights.json` are deleted once the move is done.

A hash of floats holds for one processor and one set of packages, so the JSON also has that of two stock runs. Where
those give other bits the tests skip: write the hashes of the commit before the move there, with
`python -m tests.training.test_move_keeps_weights --write` (or `--write grpo_stream sft` for some cases).
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import importlib
import importlib.metadata
import json
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_effi
from tests import helpers

#: Heavy and private imports stand inside the cases, so that one that fails is one case that fails.
Parts = Iterator[tuple[str, Any]]
CASES: dict[str, Callable[[Path], Parts]] = {}
HASHES = Path(__file__).with_name("move_keeps_weights.json")
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "dataloader_pin_memory": False,
    "ddp_find_unused_parameters": False,
    "seed": 7,
}
ROWS = 32
LENGTHS = [3 + (7 * i) % 14 for i in range(ROWS)]


def case(function: Callable[[Path], Parts]) -> Callable[[Path], Parts]:
    """Enter a case: a generator of `(name, trainer that has trained or dict of tensors)`."""
    CASES[function.__name__] = function
    return function


# --- runs ------------------------------------------------------------------------------------------------------------


def lm(
    folder: Path,
    *callbacks: Any,
    stock: bool = False,
    mixins: tuple[type, ...] = (),
    resume: str | None = None,
    objects: dict[str, Any] | None = None,
    **over: Any,
) -> Any:
    """Train a language model of one layer on rows of 8 tokens; `objects` are arguments of the trainer."""
    from transformers import Trainer, TrainingArguments

    base, config = (Trainer, TrainingArguments) if stock else (hf_effi.EffiTrainer, hf_effi.EffiTrainingArguments)
    own = {} if stock else {"run_record": False}
    objects = {"train_dataset": helpers.lm_dataset(ROWS, length=8), **(objects or {})}
    if "model" not in objects:
        objects["model"] = helpers.tiny_qwen3(num_hidden_layers=1)
    trainer = type("Mixed", (*mixins, base), {})(
        args=config(**{**SETTINGS, "output_dir": str(folder), **own, **over}), callbacks=list(callbacks), **objects
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def again(folder: Path, train: Callable[..., Any], step: int, **over: Any) -> Parts:
    """A run that saves at every update, and the one that goes on from a checkpoint of it."""
    saving = {"save_strategy": "steps", "save_steps": 1, **over}
    yield "whole", train(folder, **saving)
    yield f"resumed at {step}", train(folder, resume=str(folder / f"checkpoint-{step}"), **saving)


def sft(folder: Path, *callbacks: Any, objects: dict[str, Any] | None = None, train: bool = True, **over: Any) -> Any:
    objects = {"model": helpers.tiny_llama(), "train_dataset": helpers.sft_dataset(ROWS), **(objects or {})}
    trainer = hf_effi.EffiSFTTrainer(
        args=hf_effi.EffiSFTConfig(
            **{
                **SETTINGS,
                "output_dir": str(folder),
                "max_length": 48,
                "gradient_checkpointing": False,
                "run_record": False,
                **over,
            }
        ),
        processing_class=helpers.tiny_tokenizer(fresh=True),
        callbacks=list(callbacks),
        **objects,
    )
    if train:
        trainer.train()
    return trainer


def sparse_reward(completions: list[str], prompts: list[str], **kwargs: Any) -> list[float]:
    """A third of the prompts get equal rewards, so that their groups have no gradient."""
    mixed = helpers.binary_hash_reward(completions)
    return [0.1 if int(p.split(":")[0]) % 3 == 1 else reward for p, reward in zip(prompts, mixed, strict=True)]


def grpo(
    folder: Path, *callbacks: Any, cls: type | None = None, resume: str | None = None, objects: Any = None, **over: Any
) -> Any:
    """Four updates of 8 rows, in groups of 4."""
    shape = {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 4, "run_record": False}
    return helpers.run_grpo(
        cls or hf_effi.EffiGRPOTrainer,
        helpers.grpo_args(folder, hf_effi.EffiGRPOConfig, **{**shape, **over}),
        processing_class=helpers.tiny_tokenizer(fresh=True),
        resume_from_checkpoint=resume,
        callbacks=list(callbacks),
        **{"reward_funcs": sparse_reward, **(objects or {})},
    )


def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {name: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows]) for name,
        fill in fills.items()}  # fmt: skip


def ragged() -> Any:
    from datasets import Dataset

    tokens = helpers.lm_dataset(ROWS, length=max(LENGTHS))["input_ids"]
    cut = [tokens[i][:length] for i, length in enumerate(LENGTHS)]
    return Dataset.from_dict({"input_ids": cut, "labels": cut, "attention_mask": [[1] * len(row) for row in cut]})


def scores(count: int = ROWS) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(1))


def adapted(model: Any = None, **config: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model or helpers.tiny_qwen3(), LoraConfig(**{"r": 4, "target_modules": "all-linear", **config})
    )


# --- learning rates --------------------------------------------------------------------------------------------------


@case
def lr_callback(folder: Path) -> Parts:
    """Each schedule on a stock Trainer."""
    schedules = {
        "wsd": hf_effi.schedules.wsd(warmup_steps=2, decay_steps=2, shape="1-sqrt", floor=0.1),
        "wsd_s": hf_effi.schedules.wsd_s(budgets=(0.5, 1.0)),
        "wsdc": hf_effi.schedules.wsdc(),
        "power": hf_effi.schedules.power(tokens_per_step=2**33, sequence_length=2**23, reference_lr=1e-2),
        "cosine": hf_effi.schedules.cosine(warmup_fraction=0.2, floor=0.1),
        "cosine_power": hf_effi.schedules.cosine_power(base=10, floor=0.01),
        "damped_cosine": hf_effi.schedules.damped_cosine(cycles=2, gamma=0.5, floor=0.1),
        "linear": hf_effi.schedules.linear(warmup_steps=1),
        "inverse_sqrt": hf_effi.schedules.inverse_sqrt(warmup_steps=2),
        "rex": hf_effi.schedules.rex(),
        "uba": hf_effi.schedules.uba(phi=0.25, floor=0.05),
        "infinite": hf_effi.schedules.infinite(warmup_fraction=0.2),
        "rewarm_redecay": hf_effi.schedules.rewarm_redecay(data_fractions=(0.5, 0.5), peaks=(1.0, 0.6)),
        "one_cycle": hf_effi.schedules.one_cycle(),
        "triangular": hf_effi.schedules.triangular(half_cycle_steps=2),
        "slow_start_fast_decay": hf_effi.schedules.slow_start_fast_decay(),
        "refined": hf_effi.schedules.refined_by_gradient_norm([1 + 3 / (i + 1) for i in range(20)]),
        "scale": hf_effi.schedules.scale(schedule=hf_effi.schedules.cosine(floor=0.2), factor=0.5),
        "join": hf_effi.schedules.join(
            schedules=(hf_effi.schedules.constant(), hf_effi.schedules.cosine(floor=0.1)), boundaries=(3,)
        ),
    }
    for name, schedule in schedules.items():
        yield name, lm(folder / name, hf_effi.LRScheduleCallback(schedule), stock=True)


@case
def lr_config(folder: Path) -> Parts:
    """All methods off, and `lr_schedule=` of the Effi trainers."""
    yield "off", lm(folder / "off", run_record=True)
    kinds = {
        "wsd": {"warmup_steps": 2, "decay_steps": 2},
        "power": {"tokens_per_step": 2**33, "sequence_length": 2**23, "reference_lr": 1e-2},
        "cosine": {"floor": 0.1},
        "infinite": {"warmup_fraction": 0.2},
    }
    for name, kwargs in kinds.items():
        yield name, lm(folder / name, lr_schedule=name, lr_schedule_kwargs=kwargs)
    config = {"lr_schedule": "wsd", "lr_schedule_kwargs": kinds["wsd"]}
    yield "sft", sft(folder / "sft", **config)
    yield "grpo", grpo(folder / "grpo", **config)


@case
def lr_adaptive(folder: Path) -> Parts:
    schedule = hf_effi.LRScheduleCallback(hf_effi.schedules.wsd(warmup_steps=2))
    yield "hypergradient", lm(folder / "a", schedule, hf_effi.callbacks.HypergradientCallback(kappa=0.2))
    yield "snr", lm(folder / "b", hf_effi.callbacks.GradientSNRCallback(), gradient_accumulation_steps=3)
    over = {"eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_type": "constant"}
    rows = {"eval_dataset": helpers.lm_dataset(4, length=8, seed=1)}
    cut = hf_effi.callbacks.AccuracyGradientCallback("eval_loss", window=1, quiet=1)
    yield "accuracy", lm(folder / "c", cut, objects=rows, **over)
    search = hf_effi.callbacks.AutoLRSCallback(1e-3, 1e-1, 4, 2, 4, validation=False)
    yield "auto", lm(folder / "d", search, stock=True, lr_scheduler_type="constant", max_steps=12)
    model = helpers.tiny_qwen3()
    optimizer = torch.optim.AdamW(hf_effi.schedules.layerwise_param_groups(model, 1e-2, decay=0.5, weight_decay=0.1))
    yield "layerwise", lm(folder / "e", objects={"model": model, "optimizers": (optimizer, None)})


# --- data ------------------------------------------------------------------------------------------------------------


@case
def samplers(folder: Path) -> Parts:
    from hf_effi import samplers as room

    values = scores()
    plans = {
        "shuffled": lambda: room.ShuffledSampler(ROWS, seed=5),
        "quality": lambda: room.QualityAscendingSampler(values, buckets=4),
        "interleaved": lambda: room.InterleavedSampler([i % 3 for i in range(ROWS)], [i % 2 for i in range(ROWS)]),
        "competence": lambda: room.CompetenceSampler(values, 48, start=0.2),
        "mixture": lambda: room.MixtureSampler("ab" * 16, [(0.0, {"a": 3, "b": 1}), (0.5, {"b": 1})], block=4),
        "replay": lambda: room.ReplaySampler([i < 8 for i in range(ROWS)], rate=0.25, block=4),
        "cyclical": lambda: room.CyclicalSampler(values + 0.1, total_epochs=2),
    }
    for name, build in plans.items():
        yield name, lm(folder / name, objects={"train_sampler": build()}, max_steps=-1, num_train_epochs=1)
    callback = hf_effi.SamplerCallback(plans["quality"]())
    yield "callback", lm(folder / "callback", callback, stock=True, max_steps=-1, num_train_epochs=1)

    def train(into: Path, **over: Any) -> Any:
        return lm(into, objects={"train_sampler": room.ShuffledSampler(ROWS, seed=2)}, **over)

    for name, trainer in again(folder / "again", train, 10, max_steps=-1, num_train_epochs=2):
        yield name, trainer


@case
def samplers_learned(folder: Path) -> Parts:
    from transformers import default_data_collator

    from hf_effi.data import RowCorrect, RowLoss
    from hf_effi.samplers import AbilitySampler, MultistageSampler, SelfPacedSampler

    rows = helpers.lm_dataset(ROWS, length=8)
    loss, correct = RowLoss(rows, default_data_collator), RowCorrect(rows, default_data_collator)
    stages = {"window": 16, "num_samples": 8, "threshold_rows": 16, "switch_rows": 8, "switch_loss": 2.0}
    made = {
        "self_paced": SelfPacedSampler(ROWS, loss, share=0.5, share_step=0.25),
        "ability": AbilitySampler(scores() * 4 - 2, correct, min_rows=6),
        "multistage": MultistageSampler(rows["input_ids"][:], loss, **stages),
    }
    for name, sampler in made.items():
        yield name, lm(folder / name, objects={"train_sampler": sampler}, max_steps=-1, num_train_epochs=4)


@case
def recipes(folder: Path) -> Parts:
    over = {"max_steps": -1, "num_train_epochs": 1}
    for name, preset in {
        "cdma": hf_effi.recipes.cdma(scores()),
        "cma": hf_effi.recipes.cma(scores(), buckets=4),
    }.items():
        yield name, lm(folder / name, *preset["callbacks"], stock=True, **over)
        yield f"{name} averaged", saved(folder / name / "averaged")
    sources = ["web"] * 16 + ["medical"] * 16
    preset = hf_effi.recipes.stability_gap(scores(), sources, "medical", block=4, keep=0.25, new_share=0.75)
    sampler = {"train_sampler": preset["train_sampler"]}
    yield "stability_gap", lm(folder / "gap", *preset["callbacks"], objects=sampler, **over)


@case
def batch_transforms(folder: Path) -> Parts:
    """UL2 denoising, the masking ratio, and metadata conditioning (MeCo), each with an evaluation."""
    from datasets import Dataset
    from transformers import BertConfig, BertForMaskedLM, default_data_collator

    over = {"eval_strategy": "steps", "eval_steps": 3, "gradient_accumulation_steps": 2}
    mixins = (hf_effi.trainers.mixins.BatchTransformMixin,)

    def train(name: str, rows: Any, **objects: Any) -> Any:
        objects = {"train_dataset": rows, "eval_dataset": rows.select(range(4)), **objects}
        keep = name not in ("prepend", "append")
        return lm(folder / name, mixins=mixins, objects=objects, remove_unused_columns=keep, **over)

    wide = helpers.tiny_qwen3(num_hidden_layers=1, vocab_size=256)
    modes = {"mode_ids": {"R": 220, "X": 221, "S": 222}, "separator_id": 223, "eos_token_id": 1}
    transform = hf_effi.data.UL2Denoising(list(range(200, 220)), 0, 32, **modes)
    rows = helpers.lm_dataset(ROWS, length=transform.row_length).remove_columns("labels")
    yield "ul2", train("ul2", rows, model=wide, batch_transform=transform, data_collator=default_data_collator)

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertForMaskedLM(BertConfig(vocab_size=helpers.VOCAB_SIZE, max_position_embeddings=64, **size))
    falling = hf_effi.data.MaskingRatioCurriculum(0, range(4), helpers.VOCAB_SIZE, start=0.6, end=0.2)
    yield "masking", train("masking", helpers.lm_dataset(ROWS, length=48), model=bert, batch_transform=falling)

    rows = Dataset.from_list([{**row, "metadata_ids": [3, 3]} for row in helpers.lm_dataset(ROWS, length=8)])
    for where in ("prepend", "append"):
        collator = hf_effi.data.MetadataCollator(0)
        meco = hf_effi.data.MetadataConditioning(collator, where=where, cooldown_fraction=0.34)
        yield where, train(where, rows, data_collator=collator, batch_transform=meco)


@case
def lengths(folder: Path) -> Parts:
    """Sequences that grow, multigrid with its learning rate, and batches under a token budget."""
    mixins, rows = (
        (hf_effi.trainers.mixins.SequenceLengthMixin,),
        {"train_dataset": helpers.lm_dataset(ROWS, length=16)},
    )

    def growing(step: int, total: int) -> int:
        return 4 if step < total // 3 else 8 if step < 2 * total // 3 else 16

    yield "growing", lm(folder / "a", mixins=mixins, objects={**rows, "sequence_length": growing})
    shapes = hf_effi.data.Multigrid(16, long_cycle=(2, 1), short_cycle=(4, 2, 1), final_share=0.25)
    factor = hf_effi.callbacks.MultigridLRCallback(shapes, 0.5)
    yield (
        "multigrid",
        lm(folder / "b", factor, mixins=mixins, objects={**rows, "sequence_length": shapes}, max_steps=8),
    )
    budget = hf_effi.samplers.TokenBudgetBatchSampler(LENGTHS, 48, cost=(1.0, 0.05), seed=2)
    objects = {"train_dataset": ragged(), "data_collator": pad, "train_sampler": budget}
    yield "budget", lm(folder / "c", objects=objects, gradient_accumulation_steps=2)


# --- weights ---------------------------------------------------------------------------------------------------------


@case
def averages(folder: Path) -> Parts:
    """The average of the last weights, that of checkpoints, and Reptile steps with a resume between two."""
    from hf_effi.callbacks.reptile import ReptileCallback

    for kind, swap in {"ema": False, "uniform": False, "linear": True}.items():
        average = hf_effi.WeightAveragingCallback(3, every_steps=2, kind=kind, swap_in=swap)
        yield kind, lm(folder / kind, average, stock=True)
        yield f"{kind} averaged", saved(folder / kind / "averaged")

    def train(into: Path, **over: Any) -> Any:
        return lm(into, ReptileCallback(2, 0.3, last_partial=True), stock=True, max_steps=5, **over)

    for name, trainer in again(folder / "reptile", train, 3):
        yield f"reptile {name}", trainer
    hf_effi.checkpoint.average_checkpoints(folder / "reptile", folder / "merged", last=3)
    yield "checkpoints averaged", saved(folder / "merged")


@case
def adalora(folder: Path) -> Parts:
    from peft import AdaLoraConfig, get_peft_model

    def train(into: Path, **over: Any) -> Any:
        plan = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 2, "deltaT": 2, "total_step": 8, "lora_alpha": 4}
        config = AdaLoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **plan)
        model = get_peft_model(helpers.tiny_qwen3(num_hidden_layers=1), config)
        return lm(into, hf_effi.callbacks.AdaLoRACallback(), objects={"model": model}, max_steps=8, **over)

    yield from again(folder, train, 5)


# --- memory and kernels ----------------------------------------------------------------------------------------------


@case
def random_ltd(folder: Path) -> Parts:
    dropping = hf_effi.callbacks.RandomLTDCallback(2, 8, ramp_fraction=0.5, multiple=2)
    by_layer_tokens = hf_effi.LRScheduleCallback(
        hf_effi.schedules.token_indexed(schedule=hf_effi.schedules.linear(6)), counter=dropping.progress
    )
    model = helpers.tiny_qwen3(num_hidden_layers=4)
    callbacks = (dropping, by_layer_tokens)
    yield "layer tokens", lm(folder, *callbacks, objects={"model": model}, gradient_accumulation_steps=2)


@case
def layer_modes(folder: Path) -> Parts:
    made = {
        "offload": hf_effi.ActivationOffloadCallback(keep_last=1),
        "selective": hf_effi.SelectiveCheckpointCallback(),
        "budget": hf_effi.MemoryBudgetCallback(1),
    }
    for name, callback in made.items():
        model = helpers.tiny_qwen3(num_hidden_layers=3, use_cache=False)
        yield name, lm(folder / name, callback, stock=True, objects={"model": model}, gradient_checkpointing=True)


@case
def chunk_flow(folder: Path) -> Parts:
    objects = {"train_dataset": ragged(), "data_collator": pad}
    for flow in ((8,), (5, 2)):
        objects |= {"model": helpers.tiny_qwen3(), "chunk_flow": hf_effi.memory.ChunkFlow(*flow)}
        mixins = (hf_effi.trainers.mixins.ChunkFlowMixin,)
        yield str(flow), lm(folder, mixins=mixins, objects=objects, gradient_accumulation_steps=2, max_steps=4)


@case
def memory_patches(folder: Path) -> Parts:
    """Layers in chunks, the loss in tiles, the MLP in tiles: alone and together."""
    chunks = functools.partial(hf_effi.memory.stream_layers, num_chunks=3)
    loss = functools.partial(hf_effi.memory.tile_loss, num_shards=3)
    mlp = functools.partial(hf_effi.kernels.tile_mlp, num_shards=3)
    made = {"stream_layers": [chunks], "tile_loss": [loss], "tile_mlp": [mlp], "two": [chunks, loss]}
    for name, patches in made.items():
        model = {"model": helpers.tiny_qwen3()}
        callback = hf_effi.PatchCallback(*patches)
        yield name, lm(folder / name, callback, objects=model, gradient_accumulation_steps=2, max_steps=4)


@case
def kernels(folder: Path) -> Parts:
    made = {"fused": hf_effi.kernels.FusedLoRALinear(), "int8": hf_effi.kernels.LowBitLoRALinear("int8")}
    for name, layer in made.items():
        callback = hf_effi.KernelPatchCallback({"LoRALinear": layer})
        yield name, lm(folder / name, callback, stock=True, objects={"model": adapted()})
    yield "field", lm(folder / "field", objects={"model": adapted()}, kernel_patch={"LoRALinear": "hf_effi"})
    patched = {"kernel_patch": {"LoRALinear": "hf_effi", "LMHead": "hf_effi"}}
    policy = adapted(helpers.tiny_qwen3(end_tokens=10))
    yield "grpo", grpo(folder / "grpo", objects={"model": policy}, **patched)


@case
def supervised(folder: Path) -> Parts:
    """SFT: all off, the fused head, packed rows with the package's attention, LoRA with streamed layers."""
    rows = {"eval_dataset": helpers.sft_dataset(4, seed=1)}
    yield "off", sft(folder / "off", objects=rows, run_record=True, eval_strategy="steps", eval_steps=3)
    yield "lm head", sft(folder / "head", kernel_patch={"LMHead": "hf_effi"})
    trainer = sft(folder / "forward", train=False)
    with hf_effi.patch(trainer.model, {"LMHead": hf_effi.kernels.FusedLMHead(grad_in_forward=True)}):
        trainer.train()
    yield "lm head, gradient in the forward", trainer
    model = helpers.tiny_qwen3()
    model.set_attn_implementation(hf_effi.attention.register_varlen_attention())
    hf_effi.attention.set_attention_patterns(model, [hf_effi.attention.AttentionPattern(window=4, sink=1), None])
    yield "packed, sparse", sft(folder / "packed", objects={"model": model}, packing=True)
    streamed = hf_effi.PatchCallback(functools.partial(hf_effi.memory.stream_layers, num_chunks=3))
    yield "lora, streamed", sft(folder / "lora", streamed, objects={"model": adapted()}, packing=True)


@case
def shared_prefix(folder: Path) -> Parts:
    from datasets import Dataset

    from tests.helpers.prompts import answers

    rows = Dataset.from_list(answers(20))
    for stock in (True, False):
        model = helpers.tiny_qwen3()
        model.set_attn_implementation(hf_effi.attention.register_varlen_attention())
        objects = {"model": model, "train_dataset": rows, "data_collator": hf_effi.data.SharedPrefixCollator(model)}
        over = {"remove_unused_columns": False, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        yield "stock" if stock else "ours", lm(folder / str(stock), stock=stock, objects=objects, **over)


# --- GRPO ------------------------------------------------------------------------------------------------------------

REUSE = {"gradient_accumulation_steps": 2, "num_iterations": 2}
SPLIT = {"gradient_accumulation_steps": 2, "steps_per_generation": 4}


@case
def grpo_exact(folder: Path) -> Parts:
    """All off, each exact saving and all of them, also where a generation is used for several updates."""
    for savings in ("off", "trim", "sort", "skip", "auto"):
        buckets = {"forward_buckets": 3} if savings in ("trim", "auto") else {}
        yield savings, grpo(folder / savings, exact_savings=savings, **SPLIT, **buckets)
    yield "reuse", grpo(folder / "reuse", run_record=True, **REUSE)
    rewards = {"reward_funcs": [helpers.binary_hash_reward, helpers.length_reward]}
    rewards |= {"eval_dataset": helpers.prompt_dataset(4, seed=1)}
    over = {"reward_weights": [1.0, 0.5], "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    yield "two rewards", grpo(folder / "two", objects=rewards, **over)


@case
def grpo_losses(folder: Path) -> Parts:
    for loss in ("grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"):
        yield loss, grpo(folder / loss, loss_type=loss, max_steps=2, **REUSE)
    levels = {"importance_sampling_level": "sequence", "mask_truncated_completions": True, "scale_rewards": "batch"}
    yield "sequence", grpo(folder / "sequence", max_steps=2, **levels, **REUSE)
    yield "entropy", grpo(folder / "entropy", max_steps=2, top_entropy_quantile=0.5)


@case
def grpo_beta(folder: Path) -> Parts:
    """A KL term: against a second model that follows the policy, and against the model without its adapter."""
    tokenizer = helpers.tiny_tokenizer(fresh=True)
    model = {"model": helpers.save_tiny(helpers.tiny_qwen3(end_tokens=10), tokenizer, folder / "model")}
    following = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    yield "model", grpo(folder / "a", objects=model, beta=0.1, **following)
    yield "pruned", grpo(folder / "b", objects=model, beta=0.1, prune_rate=0.5, **following)
    policy = {"model": adapted(helpers.tiny_qwen3(end_tokens=10))}
    yield "adapter", grpo(folder / "c", objects=policy, beta=0.1, difficulty_range=(0, 1))


@case
def grpo_filter(folder: Path) -> Parts:
    """Filtering with refills, which may stay short; objects for groups and prompts; the vLLM correction."""
    from hf_effi.functional.rollouts import PassRateBand, ShuffledPrompts
    from tests.training.test_grpo_ratios import Records

    over = {"difficulty_range": (0, 1), "gradient_accumulation_steps": 2}
    yield "refill", grpo(folder / "refill", **over)
    yield "shrink", grpo(folder / "shrink", difficulty_underfill="shrink", difficulty_max_rounds=1, **over)
    band = {"difficulty_range": (0.4, 0.6), "difficulty_max_rounds": 2}
    yield "band", grpo(folder / "band", prune_rate=0.5, **{**over, **band})
    objects = {"group_filter": PassRateBand(0.2, 0.8), "prompt_selector": ShuffledPrompts(16, seed=3)}
    yield "objects", grpo(folder / "objects", objects=objects, num_iterations=2)
    ratios = {"vllm_importance_sampling_mode": "token_truncate", "max_steps": 2}
    yield "ratios", grpo(folder / "ratios", cls=Records, **over, **ratios)


@case
def grpo_prune(folder: Path) -> Parts:
    """Each pool of completions, with and without more prompts to fill the rows; what is dropped; the normalizer."""
    from hf_effi.functional.rollouts import AdvantagePruner

    for scope in ("group", "global"):
        for more in (True, False):
            over = {"prune_rate": 0.5, "prune_scope": scope, "prune_allocation": more}
            yield f"{scope}, {more}", grpo(folder / f"{scope}{more}", gradient_accumulation_steps=2, **over)
    rest = {"prune_rate": 0.75, "prune_allocation": False, "num_iterations": 2}
    yield "original", grpo(folder / "original", prune_normalizer="original", **rest)
    yield "signs", grpo(folder / "signs", prune_rate=0.5, prune_balance_signs=True)
    yield "random", grpo(folder / "random", prune_rate=0.5, prune_metric="random", num_iterations=2)
    yield "object", grpo(folder / "object", objects={"rollout_pruner": AdvantagePruner(0.5, metric="largest")})


@case
def grpo_stream(folder: Path) -> Parts:
    """A stream of prompts in each layout, and a sampler over a dataset."""
    from hf_effi.samplers import QualityAscendingSampler

    for name, over in {"reuse": REUSE, "split": SPLIT, "both": {**SPLIT, "num_iterations": 2}}.items():
        rows = {"train_dataset": helpers.prompt_dataset(24).to_iterable_dataset()}
        yield name, grpo(folder / name, objects=rows, prune_rate=0.5, prune_scope="global", **over)
    order = {"train_sampler": QualityAscendingSampler([float((7 * row) % 16) for row in range(16)])}
    yield "sampler", grpo(folder / "sampler", objects=order, max_steps=-1, num_train_epochs=1)


@case
def grpo_resume(folder: Path) -> Parts:
    """From a checkpoint inside a block of updates on one generation, on a dataset and on a stream."""
    for kind in ("rows", "stream"):
        rows = helpers.prompt_dataset(12)
        rows = rows if kind == "rows" else rows.to_iterable_dataset()
        over = {"objects": {"train_dataset": rows}, "max_steps": 6, "num_iterations": 2, "steps_per_generation": 2}
        methods = {"difficulty_range": (0, 1)} if kind == "rows" else {"prune_rate": 0.5}
        for name, trainer in again(folder / kind, grpo, 3, **over, **methods):
            yield f"{kind}, {name}", trainer


# --- hashes ----------------------------------------------------------------------------------------------------------


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return helpers.weights_in(folder)


def hash_of_weights(found: Any) -> str:
    """sha256 over name, type, shape and bytes of each tensor, by name."""
    weights = found if isinstance(found, dict) else helpers.weights_of(found.model)
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hashes_of_metrics(history: list[dict[str, Any]]) -> dict[str, str]:
    """
    For each metric that measures neither time nor memory: the hash of its values, to the last bit, and their steps.
    """
    from tests.helpers.compare import VOLATILE_KEYS, VOLATILE_PARTS

    series: dict[str, list[Any]] = {}
    for entry in history:
        for key, value in entry.items():
            if key not in VOLATILE_KEYS and not any(part in key for part in (*VOLATILE_PARTS, "effi/time_")):
                series.setdefault(key, []).append((entry["step"], value))
    return {key: hashlib.sha256(repr(values).encode()).hexdigest()[:12] for key, values in sorted(series.items())}


def reseed() -> None:
    random.seed(0)
    importlib.import_module("numpy").random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)


def hashes_of(name: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Run one case; each of its runs starts from the same random state."""
    found = {}
    gc.freeze()  # each `train()` collects garbage: without this it looks through all that is imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reseed()
        for part, made in CASES[name](folder):
            found[f"{name}: {part}"] = {
                "weights": hash_of_weights(made),
                "metrics": {} if isinstance(made, dict) else hashes_of_metrics(made.state.log_history),
            }
            reseed()
    gc.unfreeze()
    return found


@functools.cache
def surroundings() -> dict[str, str]:
    """What the bits depend on beside this package: the versions, and a stock run of either kind on this processor."""
    from trl import GRPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        reseed()
        plain = lm(Path(folder), stock=True)
        reseed()
        policy = helpers.run_grpo(GRPOTrainer, helpers.grpo_args(folder))
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
    return {
        **{package: importlib.metadata.version(package) for package in packages},
        "stock Trainer": hash_of_weights(plain),
        "stock GRPOTrainer": hash_of_weights(policy),
    }


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    told = []
    for run in sorted({*found, *expected}):
        if run not in found or run not in expected:
            told.append(f"{run}: {'not stored' if run not in expected else 'not run'}")
            continue
        one, other = found[run], expected[run]
        keys = {*one["metrics"], *other["metrics"]}
        changed = sorted(key for key in keys if one["metrics"].get(key) != other["metrics"].get(key))
        changed = ["weights"] * (one["weights"] != other["weights"]) + changed
        if changed:
            told.append(f"{run}: {', '.join(changed)}")
    return told


def stored() -> dict[str, Any]:
    return json.loads(HASHES.read_text(encoding="utf-8"))


def of_case(name: str, runs: dict[str, Any]) -> dict[str, Any]:
    return {run: hashes for run, hashes in runs.items() if run.startswith(f"{name}: ")}


@pytest.mark.parametrize("name", CASES)
def test_the_move_keeps_weights_and_metrics(tmp_path: Path, name: str) -> None:
    here, there = surroundings(), stored()["surroundings"]
    if here != there:
        pytest.skip(f"the hashes were written elsewhere: {sorted(key for key in here if here[key] != there.get(key))}")
    changed = differences(hashes_of(name, tmp_path), of_case(name, stored()["runs"]))
    assert not changed, "not what it was before the move:\n" + "\n".join(changed)


def test_nothing_is_stored_that_is_not_run() -> None:
    assert {run.partition(": ")[0] for run in stored()["runs"]} == set(CASES)


def write(names: list[str]) -> None:
    """Write the hashes of these cases into the JSON, one line per run, and leave the others as they are."""
    runs = {} if set(names) == set(CASES) else stored()["runs"]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found = hashes_of(name, Path(folder))
        runs = {run: hashes for run, hashes in runs.items() if run not in of_case(name, runs)} | found
        print(f"{name}: {len(found)} runs", flush=True)
    lines = ",\n".join(f"  {json.dumps(run)}: {json.dumps(runs[run])}" for run in sorted(runs))
    text = f'{{\n "surroundings": {json.dumps(surroundings())},\n "runs": {{\n{lines}\n }}\n}}\n'
    HASHES.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    importlib.import_module("tests.conftest")  # offline, one thread
    parser = argparse.ArgumentParser(description="Write the hashes of this commit.")
    parser.add_argument(
        "--write", nargs="*", choices=list(CASES), metavar="CASE", required=True, help="all by default"
    )
    write(parser.parse_args().write or list(CASES))
