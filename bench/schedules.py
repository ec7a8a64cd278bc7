"""Schedules on a small language model trained from scratch on the source text of Python's standard library.

    python -m bench.schedules            # resumes: finished runs are kept in bench/results/schedules.json
    python -m bench.schedules --report   # only compute the headline from the finished runs
    python -m bench.schedules --overhead # only measure the callback inside Trainer.train(), and add its row

Every schedule gets its own peak LR, tuned on a seed of its own at each budget; runs of the same seed share the
initial weights and the data order, so differences between schedules are paired.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_effi._compat import installed_versions
from hf_effi.functional import schedules as S

RESULT = Path(__file__).with_name("results") / "schedules.json"
BUDGETS = (240, 720)
SEEDS = (0, 1, 2)
TUNING_SEED = 100
PEAKS = (5e-4, 1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3, 8e-3, 1.6e-2)
BATCH, LENGTH = 16, 32
EVAL_EVERY = 30
WARMUP = 0.05

SCHEDULES: dict[str, Any] = {
    "wsd 1-sqrt 20%": lambda n: S.wsd(n, warmup_fraction=WARMUP, decay_fraction=0.2),
    "wsd linear 40%": lambda n: S.wsd(n, warmup_fraction=WARMUP, decay_fraction=0.4, shape="linear"),
    "linear to 0": lambda n: S.linear(n, warmup_fraction=WARMUP),
    "cosine to 0": lambda n: S.cosine(n, warmup_fraction=WARMUP),
    "rex": lambda n: S.rex(n, warmup_fraction=WARMUP),
    "uba phi=0.5": lambda n: S.uba(n, warmup_fraction=WARMUP, phi=0.5),
    "infinite": lambda n: S.infinite(n, warmup_fraction=WARMUP, cooldown_fraction=0.4, constant_ratio=0.5),
    "constant": lambda n: S.constant(n, warmup_fraction=WARMUP),
}


def corpus() -> tuple[torch.Tensor, torch.Tensor, str]:
    """Return training bytes, validation bytes and a hash of both."""
    root = Path(sysconfig.get_paths()["stdlib"])
    text = b"\n".join(path.read_bytes() for path in sorted(root.glob("*.py")))
    data = torch.frombuffer(bytearray(b for b in text if b < 128), dtype=torch.uint8).long()
    cut = int(len(data) * 0.95)
    return data[:cut], data[cut:], hashlib.sha256(text).hexdigest()[:16]


def build(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_optimizer(model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


class Data:
    """Crops of the corpus at positions that depend on the seed and the step alone."""

    def __init__(self) -> None:
        self.train, self.valid, self.digest = corpus()
        generator = torch.Generator().manual_seed(12345)
        self.held_out = self._crops(self.valid, 384, generator)

    @staticmethod
    def _crops(data: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
        starts = torch.randint(0, len(data) - LENGTH, (count,), generator=generator)
        return torch.stack([data[s : s + LENGTH] for s in starts.tolist()])

    def batch(self, seed: int, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return self._crops(self.train, BATCH, generator)

    @torch.no_grad()
    def loss(self, model: torch.nn.Module) -> float:
        return model(self.held_out, labels=self.held_out).loss.item()


def train(
    data: Data, schedule: S.Schedule, peak: float, seed: int, start: dict | None = None, until: int | None = None
) -> dict[str, Any]:
    """Train to the end of the schedule (or `until`); return losses, and the state for a branch."""
    model = build(seed)
    optimizer = make_optimizer(model, peak)
    scheduler = S.to_lambda_lr(schedule, optimizer, on_mismatch="new")
    if start is not None:
        model.load_state_dict(start["model"])
        optimizer.load_state_dict(copy.deepcopy(start["optimizer"]))
        scheduler.load_state_dict(start["scheduler"])
    end = until or schedule.last_step or schedule.total_steps
    curve: list[list[float]] = []
    clock = time.process_time()
    for step in range(scheduler.last_epoch, end):
        tokens = data.batch(seed, step)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if (step + 1) % EVAL_EVERY == 0 or step + 1 == end:
            curve.append([step + 1, round(data.loss(model), 5)])
    state = {
        "model": {k: v.clone() for k, v in model.state_dict().items()},
        # A copy: loading a state dict keeps its tensors, and a branch would then change the trunk's.
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "scheduler": scheduler.state_dict(),
    }
    seconds = round(time.process_time() - clock, 2)
    return {"loss": curve[-1][1], "curve": curve, "cpu_seconds": seconds, "state": state}


class Results:
    """The committed JSON; a row is written as soon as its run is finished."""

    def __init__(self, digest: str) -> None:
        self.payload: dict[str, Any] = {"bench": "schedules", "rows": [], "headline": []}
        if RESULT.exists():
            self.payload = json.loads(RESULT.read_text())
        self.digest = digest

    def find(self, **key: Any) -> dict[str, Any] | None:
        for row in self.payload["rows"]:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        return None

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        self.payload["rows"].append(row)
        self.save()
        return row

    def save(self) -> None:
        head = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(head, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
        self.payload.update(
            commit=commit,
            date=datetime.date.today().isoformat(),
            machine={"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
            versions=installed_versions(),
            command="python -m bench.schedules",
            seeds=list(SEEDS),
        )
        RESULT.parent.mkdir(exist_ok=True)
        temporary = RESULT.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.payload, indent=1) + "\n")
        temporary.replace(RESULT)


def run_one(results: Results, data: Data, stage: str, name: str, budget: int, peak: float, seed: int) -> dict:
    key = {"stage": stage, "schedule": name, "budget": budget, "peak_lr": peak, "seed": seed}
    row = results.find(**key)
    if row is None:
        outcome = train(data, SCHEDULES[name](budget), peak, seed)
        outcome.pop("state")
        row = results.add({**key, **outcome})
        print(stage, name, budget, peak, seed, row["loss"], f"{row['cpu_seconds']}s", flush=True)
    return row


def tuned_peak(results: Results, data: Data, name: str, budget: int) -> float:
    """
    Best of `PEAKS` at the short budget; at the long one half, once and twice that, and on while the best is an edge.
    """

    def loss(peak: float) -> float:
        return run_one(results, data, "tune", name, budget, peak, TUNING_SEED)["loss"]

    if budget == BUDGETS[0]:
        return min(PEAKS, key=loss)
    best = tuned_peak(results, data, name, BUDGETS[0])
    candidates = [best / 2, best, best * 2]
    while True:
        winner = min(candidates, key=loss)
        if winner == candidates[-1]:
            candidates.append(winner * 2)
        elif winner == candidates[0]:
            candidates.insert(0, winner / 2)
        else:
            return winner


def compare(results: Results, data: Data) -> None:
    for budget in BUDGETS:
        peaks = {name: tuned_peak(results, data, name, budget) for name in SCHEDULES}
        for seed in SEEDS:
            for name, peak in peaks.items():
                run_one(results, data, "final", name, budget, peak, seed)


def branches(results: Results, data: Data, ends: tuple[int, ...] = (240, 480, 720)) -> None:
    """One WSD trunk with three cooldowns against three cosine runs from scratch, at each one's tuned peak LR."""
    for seed in SEEDS:
        # 5 % of the longest run, as its own schedule would have.
        warmup = round(WARMUP * ends[-1])
        if all(results.find(stage="branch", seed=seed, end=end, warmup_steps=warmup) for end in ends):
            continue
        peak = tuned_peak(results, data, "wsd 1-sqrt 20%", BUDGETS[1])
        trunk = S.wsd(warmup_steps=warmup, open_ended=True)
        state, at, steps = None, 0, 0
        for end in ends:
            fork = end - end // 5
            outcome = train(data, trunk, peak, seed, start=state, until=fork)
            state, steps, at = outcome["state"], steps + fork - at, fork
            branch = train(data, trunk.start_decay(at=fork, decay_steps=end - fork), peak, seed, start=state)
            branch.pop("state")
            steps += end - fork
            scratch_peak = tuned_peak(results, data, "cosine to 0", BUDGETS[1] if end > BUDGETS[0] else BUDGETS[0])
            key = {"stage": "final", "schedule": "cosine to 0", "budget": end, "seed": seed, "peak_lr": scratch_peak}
            scratch = results.find(**key) or train(data, SCHEDULES["cosine to 0"](end), scratch_peak, seed)
            row = {"stage": "branch", "seed": seed, "end": end, "peak_lr": peak, "loss": branch["loss"]}
            row["warmup_steps"] = warmup
            row.update(cosine_loss=scratch["loss"], cosine_peak_lr=scratch_peak, steps_so_far=steps)
            results.add(row)
            print("branch", seed, end, branch["loss"], scratch["loss"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only recompute the headline")
    parser.add_argument("--measure", action="store_true", help="print seconds per step and stop")
    parser.add_argument("--overhead", action="store_true", help="only measure the callback inside Trainer.train()")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = Data()
    if options.measure:
        outcome = train(data, S.constant(60), 4e-3, 0)
        count = sum(p.numel() for p in build(0).parameters())
        print(count, "parameters;", outcome["cpu_seconds"] / 60, "s a step;", outcome["curve"])
        return
    results = Results(data.digest)
    if options.overhead:
        from bench.schedules_overhead import measure

        measure(results)
        return
    if not options.report:
        compare(results, data)
        branches(results, data)
    from bench.schedules_report import summarise

    summarise(results)


if __name__ == "__main__":
    main()
