"""Sums of three digits, answered at once or worked out digit by digit, and a tiny model that has seen both."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_effi.recipes import GradientProbe, probe_gradients

SYMBOLS = "0123456789+=;,c#"
PAD = SYMBOLS.index("#")
WIDTH = 48


@dataclasses.dataclass(frozen=True)
class Study:
    """How long the tiny model trains on both kinds of rows, and on how many rows gradients are read."""

    updates: int = 400
    batch: int = 32
    layers: int = 6
    hidden: int = 64
    rows: int = 24
    learning_rate: float = 3e-3


def worked(first: int, second: int) -> str:
    """
    Return the sum digit by digit from the right, with carries, and the answer.

    Example:
    ```python
    >>> worked(137, 285)
    '7+5=12;3+8+1=12;1+2+1=4,422'
    ```
    """
    steps, carry = [], 0
    digits = [(first // 10**place % 10, second // 10**place % 10) for place in range(3)]
    for one, other in digits:
        total = one + other + carry
        steps.append(f"{one}+{other}{'+1' if carry else ''}={total}")
        carry = total // 10
    return ";".join(steps) + f",{first + second}"


def row(first: int, second: int, with_working: bool) -> dict[str, list[int]]:
    """Return a row: tokens, and labels of the answer alone."""
    prompt = f"{first}+{second}{'c' if with_working else ''}="
    answer = worked(first, second) if with_working else str(first + second)
    tokens = [SYMBOLS.index(symbol) for symbol in prompt + answer + "#"]
    return {"input_ids": tokens, "labels": [-100] * len(prompt) + tokens[len(prompt) :]}


def problems(seed: int, count: int) -> list[tuple[int, int]]:
    draw = random.Random(seed)
    return [(draw.randrange(100, 1000), draw.randrange(100, 1000)) for _ in range(count)]


def train(study: Study, seed: int) -> Any:
    """Train a Llama from scratch on as many rows of either kind, and return it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SYMBOLS), hidden_size=study.hidden, intermediate_size=2 * study.hidden,
        num_hidden_layers=study.layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=WIDTH, use_cache=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=study.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    for update in range(study.updates):
        share = min(1.0, 10 * (update + 1) / study.updates) * (1 - update / study.updates)
        optimizer.param_groups[0]["lr"] = study.learning_rate * share
        pairs = problems(seed * 1_000_003 + update, study.batch)
        rows = [row(*pair, with_working=number % 2 == 0) for number, pair in enumerate(pairs)]
        tokens = torch.full((study.batch, WIDTH), PAD)
        labels = torch.full((study.batch, WIDTH), -100)
        for number, one in enumerate(rows):
            tokens[number, : len(one["input_ids"])] = torch.tensor(one["input_ids"])
            labels[number, : len(one["labels"])] = torch.tensor(one["labels"])
        model(input_ids=tokens, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def loss_of(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Return the mean loss of single rows in evaluation mode."""
    model.eval()
    found = [float(model(**{k: torch.tensor([v]) for k, v in one.items()}).loss) for one in rows]
    return sum(found) / len(found)


def measured(study: Study, seed: int) -> list[dict[str, Any]]:
    """Return one row for each kind of answer and part of the model: nuclear norms of gradients on held-out sums."""
    model = train(study, seed)
    pairs = problems(10_000_019 + seed, study.rows)
    found = []
    for kind, with_working in (("answer only", False), ("worked", True)):
        rows = [row(*pair, with_working=with_working) for pair in pairs]
        probe: GradientProbe = probe_gradients(model, rows)
        loss = loss_of(model, rows)
        for part in probe.parts:
            curve = probe.curve(part)
            found.append(
                {
                    "part": "arithmetic", "seed": seed, "answers": kind, "loss": round(loss, 5), "module": part,
                    "nuclear_mean": round(sum(curve) / len(curve), 6), "mad": round(probe.unevenness(part), 6),
                    "relative_mad": round(probe.relative_unevenness(part), 5),
                    "nuclear": [round(value, 5) for value in curve],
                }
            )  # fmt: skip
    return found
