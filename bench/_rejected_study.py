"""What the bench of rejected optimizers shares: a small decoder, two texts, one loop, one way to tune."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.adalora import ReferenceData
from bench.schedules import LENGTH, Data
from hf_effi.functional import schedules as S

TUNING_SEED = 100
#: (model) -> optimizers whose groups carry their own peak LR
Rule = Callable[[nn.Module], list[torch.optim.Optimizer]]


@dataclass(frozen=True)
class Size:
    """Updates and seeds; [`Size.quick`] is for tests."""

    pretrain: int = 400
    adapt: int = 100
    lora: int = 120
    scratch: int = 250
    seeds: tuple[int, ...] = (0, 1, 2)
    values: int = 3

    def quick(self) -> Size:
        return Size(pretrain=2, adapt=2, lora=20, scratch=2, seeds=(0,), values=1)


def build(seed: int, *, tied: bool = True) -> Qwen3ForCausalLM:
    """A decoder of two layers that normalises queries and keys."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=tied,
            use_cache=False,
        )
    )


def adamw(model: nn.Module, lr: float, weight_decay: float = 0.1) -> torch.optim.Optimizer:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)


def fit(
    model: nn.Module,
    data: Data,
    optimizer: torch.optim.Optimizer,
    updates: int,
    seed: int,
    *,
    after: Callable[[float], None] | None = None,
) -> None:
    """
    Train with a warm-up over a tenth and a cosine to 0.

    Args:
        after (`Callable`): Called with the learning rate after each step of the optimizer.
    """
    schedule = S.to_lambda_lr(S.cosine(updates, warmup_fraction=0.1), optimizer, on_mismatch="new")
    model.train()
    for update in range(updates):
        tokens = data.batch(seed, update)
        model(tokens, labels=tokens).loss.backward()
        nn.utils.clip_grad_norm_([w for w in model.parameters() if w.requires_grad], 1.0)
        optimizer.step()
        if after is not None:
            after(optimizer.param_groups[0]["lr"])
        schedule.step()
        optimizer.zero_grad()
    model.eval()


class Study:
    """The two texts, and one model that was trained on the first."""

    def __init__(self, size: Size) -> None:
        self.size, self.source, self.target = size, Data(), ReferenceData()
        model = build(0)
        fit(model, self.source, adamw(model, 4e-3), size.pretrain, 0)
        self.weights = copy.deepcopy(model.state_dict())
        self.before = (self.target.loss(model), self.source.loss(model))

    def pretrained(self, seed: int) -> Qwen3ForCausalLM:
        """The trained model; `seed` is for what is added to it."""
        model = build(0)
        model.load_state_dict(self.weights)
        torch.manual_seed(seed)
        return model

    def losses(self, model: nn.Module) -> dict[str, float]:
        """Held-out losses of the second and of the first text."""
        return {"loss": round(self.target.loss(model), 5), "old_loss": round(self.source.loss(model), 5)}


def tuned(
    arm: str, run: Callable[..., dict[str, Any]], settings: Sequence[tuple[float, ...]], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Return one row per seed at the settings that are best on a seed that is not counted."""
    tuning = {setting: run(TUNING_SEED, *setting) for setting in settings}
    allowed = [s for s, found in tuning.items() if found.get("allowed", True)] or list(tuning)
    best = min(allowed, key=lambda setting: tuning[setting]["loss"])
    table = {", ".join(f"{v:g}" for v in setting): found["loss"] for setting, found in tuning.items()}
    rows = [{"arm": arm, "seed": s, "setting": list(best), **run(s, *best), "tuning": table} for s in seeds]
    print(f"{arm}: {[row['loss'] for row in rows]} at {best}, tuning {table}", flush=True)
    return rows


def by_seed(rows: Sequence[dict[str, Any]], arm: str, key: str = "loss") -> list[float]:
    return [row[key] for row in rows if row["arm"] == arm]


def worst_gap(rows: Sequence[dict[str, Any]], arm: str, other: str, key: str = "loss") -> float:
    """Return the largest difference `arm - other` over the seeds."""
    pairs = zip(by_seed(rows, arm, key), by_seed(rows, other, key), strict=True)
    return round(max(one - two for one, two in pairs), 4)


def mean(values: Sequence[float]) -> float:
    return round(statistics.fmean(values), 4)


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Return `y` at `x` on straight lines between the points; the end's value beyond either end."""
    ordered = sorted(points)
    if x <= ordered[0][0]:
        return ordered[0][1]
    for (x0, y0), (x1, y1) in zip(ordered, ordered[1:], strict=False):
        if x <= x1:
            return y1 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return ordered[-1][1]
