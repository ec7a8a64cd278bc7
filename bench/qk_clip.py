"""Attention logits and loss under a learning rate that is far too high, with and without QK-Clip.

`python -m bench.qk_clip` writes `bench/results/qk_clip.json`. A Llama of two layers learns the next character of the
Python files of the standard library, with AdamW at a constant learning rate; the runs of one seed differ in the clip
alone. For each: the largest attention logit at set updates, whether the loss stayed finite, and the loss on held-out
text. The overhead is of CPU seconds of one thread, runs alternated in blocks of updates on one model: the median of
block with over block without, for a clip in every update and in every tenth.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from bench._schema import command_line, headline, write_result
from hf_effi.callbacks import QKClipCallback

LENGTH, BATCH, THRESHOLD = 64, 8, 30.0
ARMS = ("without", "clip")


def text() -> torch.Tensor:
    """Return characters of files that every machine with Python has, as bytes below 128."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = ("argparse.py", "ast.py", "collections/__init__.py", "dataclasses.py", "inspect.py", "typing.py")
    joined = b"".join((folder / name).read_bytes() for name in files)
    return torch.tensor([byte for byte in joined if byte < 128])


def rows_of(characters: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Cut text into rows."""
    return [
        {"input_ids": row, "labels": row} for row in characters[: len(characters) // LENGTH * LENGTH].view(-1, LENGTH)
    ]


def make_model(seed: int) -> LlamaForCausalLM:
    """Return a model with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


class Trace(TrainerCallback):
    """Keeps what the clip measured."""

    def __init__(self, clip: QKClipCallback) -> None:
        self.clip, self.largest = clip, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.largest.append(max(max(heads) for heads in self.clip.largest.values()))


def train(seed: int, arm: str, lr: float, steps: int, data: list, held: list) -> dict[str, Any]:
    """Train one arm, and return its logits and losses."""
    clip = QKClipCallback(THRESHOLD if arm == "clip" else math.inf)
    trace = Trace(clip)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            learning_rate=lr,
            lr_scheduler_type="constant",
            per_device_train_batch_size=BATCH,
            seed=seed,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=steps,
        )
        trainer = Trainer(make_model(seed), args, train_dataset=data, callbacks=[clip, trace])
        trainer.train()
    model = trainer.model.eval()
    with torch.no_grad():
        batch = torch.stack([row["input_ids"] for row in held])
        loss = float(model(input_ids=batch, labels=batch).loss)
    return {
        "seed": seed,
        "arm": arm,
        "learning_rate": lr,
        "updates": steps,
        "max_logit_trace": [trace.largest[i] for i in range(steps // 10 - 1, steps, max(steps // 10, 1))],
        "max_logit": max(trace.largest),
        "max_logit_of_the_last_tenth": max(trace.largest[-max(steps // 10, 1) :]),
        "heldout_loss": loss if math.isfinite(loss) else None,
        "finite": math.isfinite(loss),
    }


def overhead(seed: int, every_steps: int, blocks: int, updates: int, data: list) -> list[float]:
    """Return CPU seconds with over without, for pairs of blocks that follow each other."""
    model = make_model(seed)
    ratios = []
    for _ in range(blocks):
        took = {}
        for arm in ARMS:
            clips = [QKClipCallback(THRESHOLD, every_steps=every_steps)] if arm == "clip" else []
            with tempfile.TemporaryDirectory() as folder:
                args = TrainingArguments(
                    folder,
                    max_steps=updates,
                    learning_rate=1e-4,
                    per_device_train_batch_size=BATCH,
                    use_cpu=True,
                    report_to="none",
                    save_strategy="no",
                    disable_tqdm=True,
                    logging_strategy="no",
                )
                clock = Clock()
                Trainer(model, args, train_dataset=data, callbacks=[*clips, clock]).train()
            took[arm] = clock.seconds
        ratios.append(took["clip"] / took["without"])
    return ratios


class Clock(TrainerCallback):
    """CPU seconds from the first update on: what a callback asks of the model before is paid once a run."""

    def __init__(self) -> None:
        self.began = self.seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = self.began or time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.process_time() - self.began


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="few updates, one seed, nothing written: a smoke test")
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.steps, args.blocks, args.rates = args.seeds[:1], 10, 1, args.rates[:1]
    torch.set_num_threads(1)
    characters = text()
    held, data = rows_of(characters[: 64 * LENGTH]), rows_of(characters[64 * LENGTH :])
    rows: list[dict[str, Any]] = []
    for lr in args.rates:
        for seed in args.seeds:
            for arm in ARMS:
                rows.append(train(seed, arm, lr, args.steps, data, held))
                print({k: v for k, v in rows[-1].items() if k != "max_logit_trace"}, flush=True)
    figures = []
    for lr in args.rates:
        pairs = {arm: [row for row in rows if row["arm"] == arm and row["learning_rate"] == lr] for arm in ARMS}
        for arm, found in pairs.items():
            figures.append(headline(f"max_logit_{arm}_lr_{lr:g}", statistics.median(r["max_logit"] for r in found)))
            losses = [row["heldout_loss"] for row in found if row["finite"]]
            figures.append(headline(f"heldout_loss_{arm}_lr_{lr:g}", statistics.median(losses) if losses else None))
        gains = [
            one["heldout_loss"] - other["heldout_loss"]
            for one, other in zip(pairs["without"], pairs["clip"], strict=True)
            if one["finite"] and other["finite"]
        ]
        figures.append(headline(f"heldout_loss_gain_lr_{lr:g}", statistics.median(gains) if gains else None, "> 0"))
    for every in (1, 10):
        found = overhead(args.seeds[0], every, args.blocks, 10 if args.quick else 40, data)
        rows.append({"seed": args.seeds[0], "arm": "overhead", "every_steps": every, "cpu_ratios": found})
        goal = "<= 1.02" if every == 10 else None
        figures.append(headline(f"cpu_time_ratio_every_{every}", statistics.median(found), goal))
    print(figures)
    if not args.quick:
        print(
            write_result(
                "qk_clip", command=command_line("bench.qk_clip"), seeds=args.seeds, headline=figures, rows=rows
            )
        )


if __name__ == "__main__":
    main()
