"""Tiny runs in good health and runs that are broken on purpose, for `CausesCallback` and the rules that read it."""

from __future__ import annotations

import functools
import itertools
import logging
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from hf_effi.callbacks import CausesCallback, TrainDoctor, TrainLimits
from hf_effi.functional.doctor_causes import CAUSE_RULES

VOCABULARY, LENGTH = 96, 24
Rows = list[dict[str, torch.Tensor]]


def text_rows(seed: int, count: int = 64, length: int = LENGTH) -> Rows:
    """Return rows that can be learned: each token is a step of 1, 2 or 3 behind the one before."""
    draw = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 4, (count, length), generator=draw)
    tokens = steps.cumsum(1) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in tokens]


def build(seed: int, family: str = "qwen3", layers: int = 4, hidden: int = 32, **over: Any) -> Any:
    """Return a random model with a vocabulary of 96."""
    torch.manual_seed(seed)
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=hidden,
            n_layer=layers,
            n_head=4,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
            **over,
        )
        return GPT2LMHeadModel(config)
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4,
        "max_position_embeddings": 64, "use_cache": False,
    }  # fmt: skip
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shape, **over))
    return LlamaForCausalLM(LlamaConfig(**shape, **over))


def train(model: Any, rows: Rows, *callbacks: Any, trainer: type[Trainer] = Trainer, **over: Any) -> Trainer:
    """Train a few updates on the CPU, and say nothing."""
    settings = {
        "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "dataloader_pin_memory": False, "max_steps": 8, "logging_steps": 1, "learning_rate": 1e-3,
        "per_device_train_batch_size": 8, "seed": 3, **over,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(model, TrainingArguments(folder, **settings), train_dataset=rows, callbacks=list(callbacks))
        made.remove_callback(PrinterCallback)
        made.train()
    return made


def rules_found(model: Any, rows: Rows, every_steps: int = 2, **over: Any) -> list[str]:
    """Return which rules about causes speak in a run, in order."""
    doctor = TrainDoctor(TrainLimits(), say=lambda sentence: None)
    train(model, rows, CausesCallback(every_steps), doctor, **over)
    causes = {rule.__name__ for rule in CAUSE_RULES}
    return [finding.rule for finding in doctor.findings if finding.rule in causes]


# --- broken on purpose ---------------------------------------------------------------------------------------------


@torch.no_grad()
def rescale_a_layer(model: Any) -> None:
    """A layer with pairs of matrices of which one was multiplied by 200 and the next divided: the same function."""
    layer = model.model.layers[1]
    for before, after in ((layer.self_attn.v_proj, layer.self_attn.o_proj), (layer.mlp.up_proj, layer.mlp.down_proj)):
        before.weight.mul_(200)
        after.weight.div_(200)


def cut_a_layer_off(model: Any) -> None:
    """What a layer adds is detached: it computes, and never learns."""

    def detach(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        added = (output[0] if isinstance(output, tuple) else output) - hidden
        kept = hidden + added.detach()
        return (kept, *output[1:]) if isinstance(output, tuple) else kept

    model.model.layers[2].register_forward_hook(detach, with_kwargs=True)


def cut_all_but_the_last_off(model: Any) -> None:
    """The input of the last layer is detached."""

    def detach(module: Any, args: Any, kwargs: Any) -> Any:
        return (tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)), {
            name: value.detach() if name == "hidden_states" else value for name, value in kwargs.items()
        }

    model.model.layers[-1].register_forward_pre_hook(detach, with_kwargs=True)


@torch.no_grad()
def give_it_an_outlier(model: Any, size: float = 300.0) -> None:
    """One feature of every embedding is large, as trained models have it at some tokens."""
    model.get_input_embeddings().weight[:, 3] = size


#: rule -> (what breaks the model, or nothing; training arguments that break the run)
BROKEN: dict[str, tuple[Callable[[Any], None] | None, dict[str, Any]]] = {
    "layer_gradient_high": (rescale_a_layer, {}),
    "layer_dead": (cut_a_layer_off, {}),
    "last_layer_dominates": (cut_all_but_the_last_off, {}),
    "quantization_will_hurt": (give_it_an_outlier, {}),
    "effective_lr_collapse": (None, {"learning_rate": 0.1, "lr_scheduler_type": "constant"}),
}


def broken_rules(rule: str, seed: int) -> list[str]:
    """Return which rules speak in the run that is broken for one of them."""
    spoil, over = BROKEN[rule]
    model = build(seed)
    if spoil is not None:
        spoil(model)
    return rules_found(model, text_rows(seed), **over)


# --- in good health ------------------------------------------------------------------------------------------------


def _healthy_model(seed: int, family: str, layers: int, hidden: int, with_lora: bool) -> Any:
    model = build(seed, family, layers, hidden)
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")) if with_lora else model


def healthy_runs(count: int) -> Iterator[tuple[str, Callable[[], Any], dict[str, Any]]]:
    """Yield name, model and training arguments of runs that nothing is wrong with."""
    kinds = itertools.product(
        ("qwen3", "llama", "gpt2"), (3, 5), (32, 64), ("adamw_torch", "sgd", "lora", "accumulated", "decayed")
    )
    rates = {"adamw_torch": 1e-3, "sgd": 0.1, "lora": 3e-3, "accumulated": 3e-4, "decayed": 3e-3}
    # Steps of 7 through 60 settings, so that a few of them already hold every kind.
    every = list(kinds)
    for number in range(count):
        family, layers, hidden, kind = every[number * 7 % len(every)]
        seed = number

        make = functools.partial(_healthy_model, seed, family, layers, hidden, kind == "lora")
        over: dict[str, Any] = {"learning_rate": rates[kind], "seed": seed}
        over |= {"optim": "sgd"} if kind == "sgd" else {}
        over |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4} if kind == "accumulated" else {}
        over |= {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "max_steps": 10} if kind == "decayed" else {}
        yield f"{family} {layers}x{hidden} {kind} seed {seed}", make, over


def quiet() -> None:
    """No warnings of the callbacks in the middle of a table."""
    logging.getLogger("hf_effi").setLevel(logging.ERROR)
