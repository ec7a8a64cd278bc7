"""Does MIGU forget less? Three tasks in turn, beside plain training, a small LR and a random mask.

`python -m bench.continual` writes `bench/results/continual.json`. A model of characters (two layers, width 64) is
first trained on English prose, then on three other sources in turn, without old rows: Python code, tables of character
sets, C++ headers. All of it is text that Python and torch ship. Each arm trains all weights, or one LoRA that goes on
through the tasks; masks begin with the second task, as in the paper. The learning rate of each arm is chosen out of
three values by the mean loss over the tasks at the end, on a seed of its own; the small learning rate has a tenth of
them.

Of each run: the mean held-out loss of the three tasks at the end (nats a character), the accuracy of the next
character, and how much the losses of the first two tasks have risen since each was learned (forgetting).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from bench._curriculum_study import heldout_loss, pieces, small_llama
from bench._progress import with_line
from bench._schema import RESULTS, command_line, headline, write_result
from hf_effi.callbacks import MIGUCallback

SEEDS, TUNING_SEED = (0, 1, 2), 100
LENGTH, BATCH, HELD = 64, 12, 64
TASKS = ("code", "tables", "headers")
#: arm -> what its callback gets
ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "small LR": None,
    "MIGU gradient": {"mode": "gradient"},
    "MIGU hard": {"mode": "hard"},
    "random mask": {"mode": "gradient", "choice": "random"},
}
RATES = {"full": (1e-3, 3e-3, 1e-2), "lora": (3e-3, 1e-2, 3e-2)}


def sources() -> dict[str, Tensor]:
    """Return the text of each source as pieces, `"prose"` and the tasks."""
    library = Path(sysconfig.get_paths()["stdlib"])
    headers = sorted((Path(torch.__file__).parent / "include" / "ATen").glob("*.h"))
    return {
        "prose": pieces([library / "pydoc_data" / "topics.py"], LENGTH),
        "code": pieces(sorted((library / "asyncio").glob("*.py")), LENGTH),
        "tables": pieces(sorted((library / "encodings").glob("cp*.py")), LENGTH),
        "headers": pieces(headers[::4], LENGTH),
    }


def split(rows: Tensor, seed: int, updates: int) -> tuple[Tensor, Tensor]:
    """Return the rows that a seed trains on and those that are held out, which no seed trains on."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(12345))
    held, rest = rows[order[:HELD]], rows[order[HELD:]]
    drawn = torch.randint(len(rest), (updates * BATCH,), generator=torch.Generator().manual_seed(seed))
    return rest[drawn], held


def train(model: Any, rows: Tensor, rate: float, seed: int, label: str, migu: dict[str, Any] | None) -> float:
    """Train on these rows once, and return the CPU seconds of an update."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            weight_decay=0.01,
            lr_scheduler_type="linear",
            warmup_steps=5,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=seed,
        )
        callbacks = [] if migu is None else [MIGUCallback(0.7, **migu)]
        data = [{"input_ids": piece, "labels": piece} for piece in rows]
        trainer = with_line(Trainer(model, settings, train_dataset=data, callbacks=callbacks), label)
        began = time.process_time()
        trainer.train()
        return (time.process_time() - began) / trainer.state.global_step


@torch.no_grad()
def measure(model: Any, held: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Return loss and accuracy of the next character on each source."""
    found = {}
    for name, rows in held.items():
        loss = heldout_loss(model, rows)
        right = model(input_ids=rows).logits[:, :-1].argmax(-1).eq(rows[:, 1:]).double().mean()
        found[name] = (loss, float(right))
    return found


class Study:
    """The sequences of one call; what several arms have in common is trained once."""

    def __init__(self, base_updates: int, updates: int) -> None:
        self.base_updates, self.updates, self.text = base_updates, updates, sources()
        self._bases: dict[int, Any] = {}
        self._firsts: dict[tuple[str, float, int], tuple[Any, float]] = {}

    def base(self, seed: int) -> Any:
        if seed not in self._bases:
            torch.manual_seed(seed)
            model = small_llama(LENGTH)
            rows, _ = split(self.text["prose"], seed, self.base_updates)
            train(model, rows, 3e-3, seed, f"prose, seed {seed}", None)
            self._bases[seed] = model
        return copy.deepcopy(self._bases[seed])

    def task(self, model: Any, task: str, rate: float, seed: int, label: str, migu: dict[str, Any] | None) -> float:
        rows, _ = split(self.text[task], seed, self.updates)
        return train(model, rows, rate, seed, f"{label}, {task}", migu)

    def first(self, tuning: str, rate: float, seed: int) -> Any:
        """Return the model after the first task, which is the same in every arm."""
        key = (tuning, rate, seed)
        if key not in self._firsts:
            model = self.base(seed)
            if tuning == "lora":
                torch.manual_seed(seed)
                config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0)
                model = get_peft_model(model, config)
            seconds = self.task(model, TASKS[0], rate, seed, f"{tuning}, LR {rate:g}, seed {seed}", None)
            self._firsts[key] = model, seconds
        model, seconds = self._firsts[key]
        return copy.deepcopy(model), seconds

    def sequence(self, arm: str, tuning: str, rate: float, seed: int) -> dict[str, Any]:
        """Train the tasks in turn and return the row."""
        held = {name: split(rows, 0, 1)[1] for name, rows in self.text.items()}
        model, seconds = self.first(tuning, rate, seed)
        learned = {TASKS[0]: measure(model, held)[TASKS[0]][0]}
        times = []
        for task in TASKS[1:]:
            label = f"{arm}, {tuning}, LR {rate:g}, seed {seed}"
            times.append(self.task(model, task, rate, seed, label, ARMS[arm]))
            end = measure(model, held)
            learned[task] = end[task][0]
        return {
            "arm": arm,
            "tuning": tuning,
            "learning_rate": rate,
            "seed": seed,
            "average_final_loss": round(statistics.fmean(end[task][0] for task in TASKS), 5),
            "average_final_accuracy": round(statistics.fmean(end[task][1] for task in TASKS), 5),
            "forgetting": round(statistics.fmean(end[task][0] - learned[task] for task in TASKS[:-1]), 5),
            "last_task_loss": round(end[TASKS[-1]][0], 5),
            "prose_loss": round(end["prose"][0], 5),
            "cpu_seconds_per_update": round(statistics.fmean(times), 5),
        }


def rates_of(arm: str, tuning: str) -> list[float]:
    """Return the learning rates that an arm may choose from: as many for each."""
    return [rate / 10 if arm == "small LR" else rate for rate in RATES[tuning]]


def run(study: Study, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Tune each arm on a seed of its own, then run it on the others."""
    rows = []
    for tuning, arm in itertools.product(RATES, ARMS):
        tried = [study.sequence(arm, tuning, rate, TUNING_SEED) for rate in rates_of(arm, tuning)]
        best = min(tried, key=lambda row: row["average_final_loss"])["learning_rate"]
        rows += [{"part": "tuning", **row} for row in tried]
        rows += [{"part": "run", **study.sequence(arm, tuning, best, seed)} for seed in seeds]
        print(rows[-1], flush=True)
    return rows


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headlines, means over seeds: of the mask of gradients, which is the paper's."""
    found = []
    runs = [row for row in rows if row["part"] == "run"]
    for tuning in RATES:
        by_arm = {arm: [row for row in runs if row["arm"] == arm and row["tuning"] == tuning] for arm in ARMS}

        def mean(arm: str, what: str, by_arm: dict[str, list[dict[str, Any]]] = by_arm) -> float:
            return statistics.fmean(row[what] for row in by_arm[arm])

        for other in ("plain", "small LR", "random mask"):
            gap = mean("MIGU gradient", "average_final_loss") - mean(other, "average_final_loss")
            name = other.lower().replace(" ", "_")
            found.append(headline(f"{tuning}_migu_minus_{name}_average_loss", round(gap, 4), "< 0"))
        ratio = mean("MIGU gradient", "forgetting") / mean("plain", "forgetting")
        found.append(headline(f"{tuning}_migu_over_plain_forgetting", round(ratio, 3), "< 1"))
        cost = statistics.median(
            one["cpu_seconds_per_update"] / other["cpu_seconds_per_update"]
            for one, other in zip(by_arm["MIGU gradient"], by_arm["plain"], strict=True)
        )
        found.append(headline(f"{tuning}_migu_over_plain_cpu_seconds", round(cost, 3), "<= 1.1"))
    return found


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few updates, one seed; writes nothing into results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds = SEEDS[:1] if args.quick else SEEDS
    study = Study(2, 2) if args.quick else Study(200, 40)
    rows = run(study, seeds)
    for row in rows:
        print(row, flush=True)
    if args.quick:
        folder = Path(tempfile.mkdtemp(prefix="hf_effi_continual_quick_")) if folder == RESULTS else folder
    command = command_line("bench.continual")
    path = write_result("continual", command=command, seeds=seeds, headline=figures(rows), rows=rows, folder=folder)
    print(path)
    return path


if __name__ == "__main__":
    main()
