"""
What going back costs: from a copy in host memory, beside the same state through a file; and whether it saves a run.

    python -m bench.rewind           # about 3 minutes on two cores
    python -m bench.rewind --smoke   # seconds: small models, one seed

Sizes: decoders of about 1 and 20 million parameters with the state of AdamW. For each size and seed a Trainer makes a
few updates, then `measure_rewind` takes a copy, goes back to it, writes the state to a file and reads it back, in
turns. Saves are forced to the disk; what is read back is in the memory of the system, and no process is started again,
so the disk is flattered. The last rows train with batches whose loss is NaN: with the callback the run goes on, and
its held-out loss is compared with that of the run whose data has no such batch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from bench._schema import RESULTS, command_line, headline, write_result
from hf_effi.callbacks import RewindCallback
from hf_effi.checkpoint import measure_rewind

SEEDS = (0, 1, 2)
#: millions of parameters -> width, layers
SIZES = {"1M": (128, 4), "20M": (512, 6)}
SMOKE_SIZES = {"smoke": (32, 1)}
VOCABULARY, LENGTH = 1024, 64


def build(width: int, layers: int, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=width // 4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def rows_of(count: int, seed: int) -> Dataset:
    """Rows of a repeated pattern, which a model learns in a few updates; `row` says which one it is."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, VOCABULARY, (count, 1), generator=generator)
    tokens = ((starts + 7 * torch.arange(LENGTH)) % VOCABULARY).tolist()
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens, "row": list(range(count))})


class BadRows(Trainer):
    """The loss of some rows is NaN."""

    bad: frozenset[int] = frozenset()

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        rows = inputs.pop("row")
        loss = super().compute_loss(model, inputs, **kwargs)
        broken = model.training and set(rows.tolist()) & self.bad
        return loss * float("nan") if broken else loss


def train(
    folder: str, size: tuple[int, int], seed: int, data: Dataset, bad: frozenset[int] = frozenset(), rewind: Any = None
) -> BadRows:
    args = TrainingArguments(
        folder,
        max_steps=len(data) // 4,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        learning_rate=1e-3,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=seed,
    )
    trainer = BadRows(build(*size, seed), args, train_dataset=data, callbacks=[rewind] if rewind else [])
    trainer.bad = bad
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def cost_row(name: str, size: tuple[int, int], seed: int, repeats: int) -> dict[str, Any]:
    """Return the seconds of one size and seed."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        trainer = train(folder, size, seed, rows_of(8, seed))
        update = (time.perf_counter() - began) / trainer.state.global_step
        cost = measure_rewind(trainer, repeats)
    return {
        "part": "cost",
        "size": name,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "seed": seed,
        "mib": round(cost.nbytes / 2**20, 2),
        "take_seconds": cost.take_seconds,
        "restore_seconds": cost.restore_seconds,
        "disk_save_seconds": cost.disk_save_seconds,
        "disk_load_seconds": cost.disk_load_seconds,
        "update_seconds": update,
        # One rewind in a thousand updates, copies every 50 and checkpoints every 500.
        "saved_seconds_per_update": cost.saved_seconds(update, 50, 500, 1000),
    }


def rescue_row(size: tuple[int, int], seed: int, updates: int) -> dict[str, Any]:
    """Return held-out losses of runs with two bad batches: stock, with the callback, and of data without them."""
    data, held_out = rows_of(4 * updates, seed), rows_of(32, seed + 1000)
    bad = [4 * (updates // 3) + 1, 4 * (2 * updates // 3) + 2]
    unseen = {row for one in bad for row in range(one // 4 * 4, one // 4 * 4 + 4)}
    clean = data.select([row for row in range(len(data)) if row not in unseen])
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        for arm, rows, rewind in (
            ("stock", data, None),
            ("rewind", data, RewindCallback("nan", every_steps=1)),
            ("never saw them", clean, None),
        ):
            trainer = train(f"{folder}/{arm[:5]}", size, seed, rows, frozenset(bad), rewind)
            losses[arm] = float(trainer.evaluate(held_out)["eval_loss"])
    return {"part": "rescue", "seed": seed, "updates": updates, "bad_batches": len(bad), "held_out_losses": losses}


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headline: medians over seeds."""
    found = []
    for size in dict.fromkeys(row["size"] for row in rows if row["part"] == "cost"):
        chosen = [row for row in rows if row.get("size") == size]
        ratios = [row["disk_load_seconds"] / row["restore_seconds"] for row in chosen]
        takes = [row["take_seconds"] / row["disk_save_seconds"] for row in chosen]
        found.append(headline(f"disk_over_memory_restore_{size}", round(statistics.median(ratios), 2), ">= 1"))
        found.append(headline(f"memory_over_disk_save_{size}", round(statistics.median(takes), 3), "<= 0.5"))
        share = [row["take_seconds"] / row["update_seconds"] for row in chosen]
        found.append(headline(f"take_over_update_seconds_{size}", round(statistics.median(share), 3)))
    rescues = [row["held_out_losses"] for row in rows if row["part"] == "rescue"]
    gap = max(abs(row["rewind"] - row["never saw them"]) for row in rescues)
    found.append(headline("rescued_minus_never_saw_loss", gap, "<= 0"))
    found.append(headline("stock_runs_that_end_in_nan", float(sum(row["stock"] != row["stock"] for row in rescues))))
    return found


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small models, one seed; writes nothing into results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sizes, seeds, repeats, updates = (SMOKE_SIZES, (0,), 1, 6) if args.smoke else (SIZES, SEEDS, 7, 60)
    rows = [cost_row(name, size, seed, repeats) for seed in seeds for name, size in sizes.items()]
    rows += [rescue_row(next(iter(sizes.values())), seed, updates) for seed in seeds]
    found = figures(rows)
    for row in rows:
        if losses := row.get("held_out_losses"):  # JSON has no NaN, which is what stock ends with
            row["held_out_losses"] = {arm: None if loss != loss else loss for arm, loss in losses.items()}
        print(row, flush=True)
    if args.smoke:
        folder = Path(tempfile.mkdtemp(prefix="hf_effi_rewind_smoke_")) if folder == RESULTS else folder
    command = command_line("bench.rewind")
    path = write_result("rewind", command=command, seeds=seeds, headline=found, rows=rows, folder=folder)
    print(path)
    return path


if __name__ == "__main__":
    main()
