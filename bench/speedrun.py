"""The speed run: who reaches a fixed target on two fixed workloads in the least CPU time.

    python -m bench.speedrun                                # the entries of this repository, about 10 minutes
    python -m bench.speedrun --entry my_entry.py            # yours beside the reference, nothing is written
    python -m bench.speedrun --tune my_entry.py             # its TUNED settings on a seed of their own
    python -m bench.speedrun --smoke                        # seconds: does every part run; nothing is written

An entry is a Python file with two functions, `language_model(workload)` and `grpo(workload)`, which return a Trainer
that has not been trained; see `bench/speedrun_entries/reference.py`. The model, its first weights, the rows to train
on and the target belong to the workload. All else is the entry's: optimizer, schedule, batch, order and choice of the
rows, kernels, number of updates. The clock is the CPU time of the process from the call of the entry to the first
evaluation that meets the target; evaluations do not count. They come after every `evaluate_every` updates, so that
a run is never told better than it is. Each entry runs all workloads with all seeds, the entries in turn.

Rules, formulas and scores: `docs/speedrun.md` and `hf_effi/functional/referee.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

for _name, _value in (("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false"), ("HF_HUB_OFFLINE", "1")):
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402  (the threads are set before torch is loaded)
from datasets import Dataset  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Qwen3ForCausalLM, Trainer, TrainerCallback  # noqa: E402

from bench._schema import ROOT, command_line, headline, write_result  # noqa: E402
from bench.schedules import corpus  # noqa: E402
from hf_effi.demo.measure import evaluate_policy  # noqa: E402
from hf_effi.demo.policy import PolicySettings, prepare_policy  # noqa: E402
from hf_effi.demo.task import (  # noqa: E402
    MAX_COMPLETION_TOKENS,
    build_tokenizer,
    exact_answer_reward,
    held_out_problems,
    training_problems,
)
from hf_effi.functional.referee import median_cost, performance_profile, time_to_target  # noqa: E402

ENTRIES = Path(__file__).with_name("speedrun_entries")
REFERENCE = "reference"
#: of the language model alone; the runs of a table have the seeds of [`Size`]
TUNING_SEED = 100
POLICY = ROOT / "bench" / "cache" / "speedrun"


@dataclass(frozen=True)
class Workload:
    """
    What an entry gets.

    Args:
        name (`str`): `"language_model"` or `"grpo"`.
        seed (`int`): Of the first weights (`language_model`), and of the rows (`grpo`).
        target (`float`): Held-out loss in nats, to be met from above; held-out accuracy of samples, from below.
        direction (`str`): `"lower"` or `"higher"`.
        evaluate_every (`int`): Updates between two evaluations.
        max_updates (`int`): The run ends there without having arrived.
        load_model (`Callable`): Returns a fresh model with the first weights.
        rows (`datasets.Dataset`): To train on: `input_ids` and `labels`, or `prompt` and `answer`.
        measure (`Callable`): `measure(model)` returns the held-out value. The script calls it.
        tokenizer (`PreTrainedTokenizerFast`, *optional*): Of the `grpo` workload.
        reward (`Callable`, *optional*): Reward function of the `grpo` workload.
        max_completion (`int`): Most tokens of a completion.
        output_dir (`str`): For what a trainer writes; removed afterwards.
    """

    name: str
    seed: int
    target: float
    direction: str
    evaluate_every: int
    max_updates: int
    load_model: Callable[[], Any]
    rows: Any
    measure: Callable[[Any], float]
    tokenizer: Any = None
    reward: Any = None
    max_completion: int = MAX_COMPLETION_TOKENS
    output_dir: str = "out"

    @property
    def shared(self) -> dict[str, Any]:
        """Arguments that no entry may change: where the run is, and that the script alone evaluates."""
        return {
            "output_dir": self.output_dir,
            "seed": self.seed,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "eval_strategy": "no",
            "disable_tqdm": True,
        }


@dataclass(frozen=True)
class Size:
    """How large the workloads are."""

    length: int = 64
    rows: int = 20_000
    held_out: int = 256
    width: int = 96
    depth: int = 3
    loss: float = 1.85
    updates: int = 1500
    evaluate_every: int = 20
    prompts: int = 6000
    per_length: int = 64
    accuracy: float = 0.62
    policy: PolicySettings = PolicySettings()
    grpo_updates: int = 96
    grpo_evaluate_every: int = 2
    seeds: tuple[int, ...] = (0, 1, 2)


WHOLE = Size()
SMOKE = Size(
    length=16, rows=64, held_out=4, width=32, depth=1, loss=4.85, updates=20, evaluate_every=5, prompts=40,
    per_length=2, accuracy=0.0, grpo_updates=2, grpo_evaluate_every=1, seeds=(0,),
    policy=replace(PolicySettings(), hidden_size=32, num_layers=1, intermediate_size=48, sft_max_terms=3, sft_steps=5),
)  # fmt: skip


def language_model(size: Size, seed: int, output_dir: str) -> Workload:
    """Return the pre-training workload: a decoder from scratch on the source text of Python's standard library."""
    train, valid, _ = corpus()
    generator = torch.Generator().manual_seed(12345)

    def crops(data: torch.Tensor, count: int) -> torch.Tensor:
        starts = torch.randint(0, len(data) - size.length, (count,), generator=generator)
        return torch.stack([data[start : start + size.length] for start in starts.tolist()])

    held_out, rows = crops(valid, size.held_out), crops(train, size.rows).tolist()

    def load() -> LlamaForCausalLM:
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128, hidden_size=size.width, intermediate_size=3 * size.width,
                num_hidden_layers=size.depth, num_attention_heads=size.width // 16,
                num_key_value_heads=size.width // 16, max_position_embeddings=size.length, use_cache=False,
            )
        )  # fmt: skip

    @torch.no_grad()
    def measure(model: Any) -> float:
        return model(input_ids=held_out, labels=held_out).loss.item()

    return Workload(
        "language_model", seed, size.loss, "lower", size.evaluate_every, size.updates, load,
        Dataset.from_dict({"input_ids": rows, "labels": rows}), measure, output_dir=output_dir,
    )  # fmt: skip


def grpo(size: Size, seed: int, output_dir: str) -> Workload:
    """Return the reinforcement-learning workload: chains of sums, from the demo's fine-tuned policy."""
    held_out = held_out_problems(size.per_length)
    folder = POLICY / hashlib.sha256(repr(size.policy).encode()).hexdigest()[:12]
    checkpoint, _ = prepare_policy(size.policy, held_out, folder, show_progress=False)
    tokenizer = build_tokenizer()
    problems = itertools.islice(training_problems(10_000 + seed, held_out), size.prompts)
    rows = Dataset.from_list([{"prompt": problem.prompt, "answer": problem.answer} for problem in problems])
    return Workload(
        "grpo", seed, size.accuracy, "higher", size.grpo_evaluate_every, size.grpo_updates,
        lambda: Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), rows,
        lambda model: evaluate_policy(model, tokenizer, held_out, 2, seed=0).sampled,
        tokenizer, exact_answer_reward, output_dir=output_dir,
    )  # fmt: skip


WORKLOADS: dict[str, Callable[[Size, int, str], Workload]] = {"language_model": language_model, "grpo": grpo}


# --- the run ---------------------------------------------------------------------------------------------------------


class _Judge(TrainerCallback):
    """Evaluates outside of the clock, and ends the run at the target."""

    def __init__(self, workload: Workload, clock: Callable[[], float]) -> None:
        self.workload, self.clock = workload, clock
        self.begun, self.outside = clock(), 0.0
        self.curve: list[tuple[float, float]] = []
        self.updates: list[int] = []

    @contextlib.contextmanager
    def not_counted(self) -> Any:
        before = self.clock()
        try:
            yield
        finally:
            self.outside += self.clock() - before

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        workload = self.workload
        if state.global_step % workload.evaluate_every and state.global_step < state.max_steps:
            return
        cost = self.clock() - self.begun - self.outside
        with self.not_counted():
            was_training, rng = model.training, torch.get_rng_state()
            model.eval()
            value = workload.measure(model)
            model.train(was_training)
            torch.set_rng_state(rng)
        self.curve.append((cost, value))
        self.updates.append(state.global_step)
        arrived = time_to_target(self.curve, workload.target, workload.direction) is not None  # type: ignore[arg-type]
        if arrived or state.global_step >= workload.max_updates:
            control.should_training_stop = True


def load_entry(path: Path) -> Any:
    """
    Return the module of an entry.

    Raises:
        ValueError: there is no such file, or it lacks one of the functions.
    """
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in ENTRIES.glob("*.py") if file.stem != "__init__"))
        raise ValueError(f"No entry {str(path)!r}. Give a Python file, or one of the entries here: {known}.")
    spec = importlib.util.spec_from_file_location(f"speedrun_entry_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file: its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if lacking := [name for name in WORKLOADS if not callable(getattr(module, name, None))]:
        raise ValueError(
            f"{path.name} has no function {' and no function '.join(lacking)}. An entry defines "
            f"{' and '.join(WORKLOADS)}, each of which takes the workload and returns a Trainer."
        )
    return module


def check_entry(trainer: Any, workload: Workload, weights: dict[str, torch.Tensor]) -> None:
    """
    Refuse a trainer that does not start where all start.

    Raises:
        ValueError: other weights or other shapes than the workload's model, an evaluation of its own, or rows that
            are not among the workload's.
    """
    if not isinstance(trainer, Trainer):
        raise ValueError(f"The entry's {workload.name} returned {type(trainer).__name__}; it must return a Trainer.")
    own = trainer.model.state_dict()
    if own.keys() != weights.keys() or any(not torch.equal(own[name], weights[name]) for name in weights):
        raise ValueError(
            f"The entry's {workload.name} starts from other weights than workload.load_model() gives. All entries "
            "start from the same ones; train in .train() only."
        )
    extra = set(_rows_of(trainer.train_dataset)) - set(_rows_of(workload.rows))
    if extra:
        raise ValueError(
            f"The entry's {workload.name} trains on {len(extra)} rows that are not of workload.rows, for example "
            f"{next(iter(extra))[:80]}. Choose among them, and order or repeat them as you like."
        )


def _rows_of(rows: Any) -> list[str]:
    column = "prompt" if "prompt" in rows.column_names else "input_ids"
    return [json.dumps(value) for value in rows[column]]


def run_entry(module: Any, workload: Workload, clock: Callable[[], float] = time.process_time) -> dict[str, Any]:
    """Train one entry on one workload with one seed; return its curve, and what it cost to the target."""
    weights = {name: value.clone() for name, value in workload.load_model().state_dict().items()}
    torch.manual_seed(workload.seed)
    judge = _Judge(workload, clock)
    wall = time.perf_counter()
    trainer = getattr(module, workload.name)(workload)
    with judge.not_counted():
        check_entry(trainer, workload, weights)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(judge)
    trainer.train()
    cost = time_to_target(judge.curve, workload.target, workload.direction)  # type: ignore[arg-type]
    arrived = None if cost is None else judge.updates[[place for place, _ in judge.curve].index(cost)]
    return {
        "workload": workload.name,
        "seed": workload.seed,
        "target": workload.target,
        "cpu_seconds_to_target": None if cost is None else round(cost, 3),
        "updates_to_target": arrived,
        "wall_seconds": round(time.perf_counter() - wall, 2),
        "curve": [[round(place, 3), round(value, 4)] for place, value in judge.curve],
    }


def run_all(entries: dict[str, Path], size: Size, names: Sequence[str]) -> list[dict[str, Any]]:
    """Run all entries in turn, seed by seed."""
    modules = {name: load_entry(path) for name, path in entries.items()}
    if size is not SMOKE:
        run_all(entries, SMOKE, names)  # what is imported and compiled at first use belongs to nobody's clock
    rows = []
    for workload_name in names:
        for seed in size.seeds:
            for name, module in modules.items():
                with tempfile.TemporaryDirectory() as folder:
                    row = run_entry(module, WORKLOADS[workload_name](size, seed, folder))
                rows.append({"entry": name, **row})
                print({key: value for key, value in rows[-1].items() if key != "curve"}, file=sys.stderr, flush=True)
    return rows


def tune(path: Path, size: Size) -> list[dict[str, Any]]:
    """
    Run every combination of an entry's `TUNED` on the language model, with a seed that no run uses later.

    `TUNED` maps names of the entry's module to the values to try. All entries of a table have as many combinations.
    """
    module, rows = load_entry(path), []
    for values in itertools.product(*module.TUNED.values()):
        chosen = dict(zip(module.TUNED, values, strict=True))
        vars(module).update(chosen)
        with tempfile.TemporaryDirectory() as folder:
            row = run_entry(module, language_model(size, TUNING_SEED, folder))
        rows.append({**chosen, **row, "last": row["curve"][-1]})
        print({key: value for key, value in rows[-1].items() if key != "curve"}, flush=True)
    return rows


def judge(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headline: each entry's median cost over the reference's on each workload, and its score."""
    entries, workloads = (list(dict.fromkeys(row[key] for row in rows)) for key in ("entry", "workload"))
    costs = {
        entry: [
            median_cost(
                [row["cpu_seconds_to_target"] for row in rows if (row["entry"], row["workload"]) == (entry, workload)]
            )
            for workload in workloads
        ]
        for entry in entries
    }
    profile = performance_profile(costs)
    found = []
    for entry in entries:
        for workload, cost, base in zip(workloads, costs[entry], costs[REFERENCE], strict=True):
            if entry != REFERENCE:
                ratio = None if cost is None or base is None else round(cost / base, 4)
                found.append(headline(f"{entry}_{workload}_cpu_seconds_to_target_over_reference", ratio, "<= 1"))
        found.append(headline(f"{entry}_score", round(profile.scores[entry], 4)))
    return found


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entry", type=Path, action="append", help="your file; it runs beside the reference")
    parser.add_argument("--workload", choices=list(WORKLOADS), action="append", help="default: both")
    parser.add_argument("--smoke", action="store_true", help="every part in seconds; nothing is written")
    parser.add_argument("--tune", type=Path, metavar="ENTRY", help="try the values of its TUNED; nothing is written")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    size = SMOKE if options.smoke else WHOLE
    if options.tune:
        return tune(options.tune, size)
    entries = {path.stem: path for path in (options.entry or sorted(ENTRIES.glob("*.py"))) if path.stem != "__init__"}
    entries = {REFERENCE: ENTRIES / f"{REFERENCE}.py", **entries}
    rows = run_all(entries, size, options.workload or list(WORKLOADS))
    found = judge(rows)
    for figure in found:
        print(figure)
    if not (options.smoke or options.entry or options.workload):
        write_result("speedrun", command=command_line("bench.speedrun"), seeds=size.seeds, headline=found, rows=rows)
    return rows


if __name__ == "__main__":
    main()
