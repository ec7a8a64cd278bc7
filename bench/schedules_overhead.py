"""What `LRScheduleCallback` costs inside `Trainer.train()`, dispatch included: paired runs with and without it."""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from bench import schedules as bench
from hf_effi.callbacks.lr_schedule import LRScheduleCallback
from hf_effi.functional import schedules as S

NAME = "callback_overhead_fraction_trainer"
STAGE = "overhead_trainer"
GOAL = 0.005


class _Clock(TrainerCallback):
    """CPU seconds from the begin of one update to the begin of the next; in both arms."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.process_time())


def ten_million() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=320,
        intermediate_size=896,
        num_hidden_layers=7,
        num_attention_heads=5,
        num_key_value_heads=5,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def _updates(model: LlamaForCausalLM, rows: list[dict[str, Any]], ours: bool, updates: int) -> list[float]:
    clock = _Clock()
    schedule = [LRScheduleCallback(S.wsd(warmup_steps=2, decay_fraction=0.2))] if ours else []
    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(
            out,
            max_steps=updates + 3,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            logging_strategy="no",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        Trainer(model, args, train_dataset=rows, callbacks=[clock, *schedule]).train()
    # The first updates fill caches.
    return [b - a for a, b in zip(clock.times[2:], clock.times[3:], strict=False)]


def trainer_overhead(pairs: int = 6, updates: int = 8) -> dict[str, Any]:
    """Return the row: ratio of the median update with the callback to the one without, runs alternating."""
    model = ten_million()
    rows = [{"input_ids": t, "labels": t} for t in torch.randint(0, 2048, (8 * (updates + 3), 64))]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    ratios = []
    for pair in range(pairs):
        found = {}
        for ours in (False, True) if pair % 2 == 0 else (True, False):
            found[ours] = _updates(model, rows, ours, updates)
            seconds[ours] += found[ours]
        ratios.append(statistics.median(found[True]) / statistics.median(found[False]))
    stock, ours = statistics.median(seconds[False]), statistics.median(seconds[True])
    return {
        "stage": STAGE,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_update": 512,
        "updates_each": len(seconds[True]),
        "pairs": pairs,
        "update_seconds": round(stock, 5),
        "fraction": round(ours / stock - 1, 5),
        "fraction_standard_error": round(statistics.stdev(ratios) / pairs**0.5, 5),
        "method": "CPU time of an update in Trainer.train(), runs alternated, ratio of medians minus 1; "
        "the error is that of the ratio of one pair, over the root of the pairs",
    }


def measure(results: bench.Results) -> None:
    """Replace this row and its headline, keep everything else, save and print."""
    row = trainer_overhead()
    payload = results.payload
    payload["rows"] = [r for r in payload["rows"] if r["stage"] != STAGE] + [row]
    headline = {"name": NAME, "value": row["fraction"], "goal": GOAL, "met": row["fraction"] < GOAL}
    payload["headline"] = [h for h in payload["headline"] if h["name"] != NAME] + [headline]
    results.save()
    print(row, headline, sep="\n")
