"""
Checkpoints that change their layout: what is left of the run, and how long it takes.

    python -m bench.checkpoint_conversion

For three seeds a small model trains in fp64 on one process; its checkpoint in the middle becomes one of FSDP2 and one
of a single process again, from which a second run goes on. The figure is the largest difference of a weight at the end
from the first run, which was never interrupted. Then the seconds that each direction takes for a state of 650 MB,
weights and Adam in fp32. `--smoke` takes small models; `--folder` says where the result goes.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from bench._schema import RESULTS, command_line, headline, write_result
from hf_effi.checkpoint import SafeCheckpointer, convert_checkpoint, verify_checkpoint

SEEDS = (1, 2, 3)
UPDATES, MIDDLE = 8, 4
SMALL = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LARGE = {"vocab_size": 8192, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6}


def trained(folder: Path, sizes: dict[str, int], seed: int, dtype: torch.dtype, **over: Any) -> Trainer:
    """Train, or go on, with a save in the middle."""
    torch.manual_seed(seed)
    heads = sizes["hidden_size"] // 16
    config = LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=32)
    settings = {"max_steps": UPDATES, "save_steps": MIDDLE, "weight_decay": 0.1, **over}
    resume = settings.pop("resume", None)
    args = TrainingArguments(
        str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, logging_strategy="no",
        per_device_train_batch_size=2, seed=seed, **settings,
    )  # fmt: skip
    rows = [{"input_ids": torch.arange(16) + i, "labels": torch.arange(16) + i} for i in range(64)]
    trainer = Trainer(LlamaForCausalLM(config).to(dtype), args, train_dataset=rows)
    SafeCheckpointer().attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def there_and_back(source: Path, base: Path) -> dict[str, Any]:
    """Convert a checkpoint twice; return the seconds of both and the last folder."""
    seconds, folder = {}, source
    for to in ("fsdp2", "single"):
        began = time.perf_counter()
        folder = convert_checkpoint(folder, base / to / source.name, to=to)  # type: ignore[arg-type]
        seconds[to] = time.perf_counter() - began
    return {"seconds": seconds, "folder": folder}


def exact_rows(base: Path, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = []
    for seed in seeds:
        whole = trained(base / "whole", SMALL, seed, torch.float64)
        made = there_and_back(base / "whole" / f"checkpoint-{MIDDLE}", base)["folder"]
        again = trained(base / "again", SMALL, seed, torch.float64, resume=str(made))
        ends = [dict(trainer.model.named_parameters()) for trainer in (whole, again)]
        gap = max(float((ends[0][name] - ends[1][name]).detach().abs().max()) for name in ends[0])
        rows.append({"part": "exact", "seed": seed, "largest_difference": gap})
        print(rows[-1], flush=True)
        for path in base.iterdir():
            shutil.rmtree(path)
    return rows


def cost_rows(base: Path, sizes: dict[str, int], seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    trained(base / "cost", sizes, seeds[0], torch.float32, max_steps=1, save_steps=1)
    source = base / "cost" / "checkpoint-1"
    size = verify_checkpoint(source, "size").size
    rows = []
    for seed in seeds:
        found = there_and_back(source, base)["seconds"]
        for to, seconds in found.items():
            rows.append({"part": "cost", "round": seed, "to": to, "seconds": seconds, "megabytes": size / 2**20})
            shutil.rmtree(base / to)
        print(rows[-2:], flush=True)
    return rows


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    gaps = [row["largest_difference"] for row in rows if row["part"] == "exact"]
    found = [headline("largest_difference_after_conversion", max(gaps), "<= 1e-9")]
    for to in ("fsdp2", "single"):
        speeds = [row["seconds"] * 1024 / row["megabytes"] for row in rows if row.get("to") == to]
        found.append(headline(f"seconds_per_gib_to_{to}", round(statistics.median(speeds), 3)))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one seed and a small state: whether it runs")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the result file goes")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds = SEEDS[:1] if args.smoke else SEEDS
    with tempfile.TemporaryDirectory() as folder:
        rows = exact_rows(Path(folder), seeds)
        rows += cost_rows(Path(folder), SMALL if args.smoke else LARGE, seeds)
    for figure in figures(rows):
        print(figure)
    command = command_line("bench.checkpoint_conversion")
    found = figures(rows)
    print(
        write_result(
            "checkpoint_conversion", command=command, seeds=seeds, headline=found, rows=rows, folder=args.folder
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
