"""What the studies of the feed-forward network share: one small decoder, one training loop, one way to tune."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.schedules import LENGTH, Data, make_optimizer
from hf_effi.functional import schedules as S

HIDDEN, INTERMEDIATE, LAYERS, UPDATES = 64, 256, 2, 600
LEARNING_RATES, SEEDS, TUNING_SEED = (4e-3, 8e-3), (0, 1, 2), 100

#: (model, update) -> None, before the forward pass or between clipping and the optimizer
Hook = Callable[[nn.Module, int], None]


def build(seed: int, intermediate: int = INTERMEDIATE, layers: int = LAYERS) -> LlamaForCausalLM:
    """
    Return a fresh decoder; those of one seed share their embeddings and attention weights, whatever the FFN is.

    FFN weights are `N(0, 1 / in_features)`: better here than the 0.02 of the config.
    """
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=HIDDEN,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and ".mlp." not in name:
            nn.init.normal_(parameter, std=config.initializer_range)
    for _, _, linear in ffn_linears(model):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    return model


def ffn_linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return `(parent, name, linear)` of the three projections of each layer's FFN."""
    return [
        (layer.mlp, name, getattr(layer.mlp, name))
        for layer in model.model.layers
        for name in ("gate_proj", "up_proj", "down_proj")
    ]


def train(
    data: Data,
    model: nn.Module,
    learning_rate: float,
    seed: int,
    *,
    before: Hook | None = None,
    between: Hook | None = None,
    until: int = UPDATES,
) -> float:
    """Train for `until` of the `UPDATES` updates of a cosine schedule; return the held-out loss."""
    optimizer = make_optimizer(model, learning_rate)
    schedule = S.to_lambda_lr(S.cosine(UPDATES, warmup_fraction=0.15), optimizer, on_mismatch="new")
    for update in range(until):
        if before is not None:
            before(model, update)
        tokens = data.batch(seed, update)
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if between is not None:
            between(model, update)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return data.loss(model)


def tuned(arm: str, run: Callable[[float, int], dict[str, Any]], seeds: Sequence[int] = SEEDS) -> list[dict[str, Any]]:
    """Return one row per seed at the learning rate that is best on a seed that is not counted."""
    tuning = {lr: run(lr, TUNING_SEED)["loss"] for lr in LEARNING_RATES}
    best = min(tuning, key=tuning.__getitem__)
    rows = [{"arm": arm, "learning_rate": best, "seed": s, **run(best, s), "tuning": tuning} for s in seeds]
    print(f"{arm}: {[row['loss'] for row in rows]} at {best:g}, tuning {tuning}", flush=True)
    return rows


def losses(rows: Sequence[dict[str, Any]], arm: str) -> list[float]:
    return [row["loss"] for row in rows if row.get("arm") == arm]


def mean_difference(first: Sequence[float], second: Sequence[float]) -> float:
    return statistics.fmean(first) - statistics.fmean(second)
