"""random-LTD beside the stock Trainer at an equal number of updates: layer-tokens, held-out loss and CPU time.

    python -m bench.random_ltd

A decoder of 8 layers is trained on the bytes of Python's standard library, each arm on the same rows with the same
learning rate, which is not tuned. CPU seconds are of `train()`, the arms of a seed one after the other in alternating
order.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from bench._progress import with_line
from bench._schema import command_line, headline, write_result
from bench.schedules import corpus
from hf_effi.callbacks import RandomLTDCallback

LAYERS, LENGTH, BATCH, UPDATES, LEARNING_RATE, SEEDS = 8, 128, 8, 150, 4e-3, (0, 1, 2)
MIN_TOKENS, MULTIPLE = LENGTH // 4, 16


def crops(text: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Return `count` random pieces of `LENGTH` bytes."""
    starts = torch.randint(len(text) - LENGTH, (count, 1), generator=torch.Generator().manual_seed(seed))
    return text[starts + torch.arange(LENGTH)]


def run(train: torch.Tensor, held_out: torch.Tensor, seed: int, dropping: bool) -> dict[str, Any]:
    """Train one arm; return its held-out loss, CPU seconds and share of the layer-tokens."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, hidden_size=48, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4
        )
    )
    rows = [{"input_ids": row, "labels": row} for row in crops(train, UPDATES * BATCH, seed)]
    callback = RandomLTDCallback(MIN_TOKENS, LENGTH, multiple=MULTIPLE)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            max_steps=UPDATES,
            per_device_train_batch_size=BATCH,
            train_sampling_strategy="sequential",
            learning_rate=LEARNING_RATE,
            warmup_steps=5,
            seed=seed,
        )
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[callback] if dropping else [])
        with_line(trainer, f"{'random-LTD' if dropping else 'all tokens'}, seed {seed}")
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
    model.eval()
    share = callback.dropping.layer_tokens / callback.dropping.full_layer_tokens if dropping else 1.0
    with torch.no_grad():
        loss = model(held_out, labels=held_out).loss.item()
    return {
        "arm": "random-LTD" if dropping else "stock",
        "seed": seed,
        "loss": round(loss, 4),
        "cpu_seconds": round(seconds, 2),
        "layer_token_fraction": round(share, 4),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    train, valid, _ = corpus()
    held_out, rows = crops(valid, 128, 12345), []
    for seed in SEEDS:
        for dropping in (False, True) if seed % 2 == 0 else (True, False):
            rows.append(run(train, held_out, seed, dropping))
            print(rows[-1], flush=True)
    stock, ours = ([row for row in rows if row["arm"] == arm] for arm in ("stock", "random-LTD"))

    def median(arm: list[dict[str, Any]], name: str) -> float:
        return statistics.median(row[name] for row in arm)

    gap = statistics.fmean(row["loss"] for row in ours) - statistics.fmean(row["loss"] for row in stock)
    write_result(
        "random_ltd",
        command=command_line("bench.random_ltd"),
        seeds=SEEDS,
        headline=[
            headline("layer_token_fraction", median(ours, "layer_token_fraction")),
            headline("cpu_seconds_ratio", round(median(ours, "cpu_seconds") / median(stock, "cpu_seconds"), 3), "< 1"),
            headline("heldout_loss_minus_stock", round(gap, 4)),
        ],
        rows=rows,
    )


if __name__ == "__main__":
    main()
