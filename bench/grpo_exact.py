"""What the exact savings are worth: training-phase time and forwarded tokens against stock `GRPOTrainer`.

    python -m bench.grpo_exact [--seeds 3] [--repeats 1]

Rollouts are served with log-normal lengths (sigma 0.6) by a `rollout_func`, so generation costs nothing and all arms
see the same rows, with short prompts, prompts as long as completions, and four times as long, where none or 40 % of
the groups have equal rewards. The arms alternate in one process, on one thread; the figure is the ratio of median CPU
seconds of the training phase (everything of a step but generation and rewards). The gradient error compares one SGD
step with stock for each of TRL's eight losses.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from bench._counters import LiveBytes
from bench._progress import with_line
from bench._schema import headline, write_result
from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.demo.command import quiet_libraries
from hf_effi.demo.task import build_tokenizer

GROUP, ROWS = 8, 64
STEPS = 4
#: tokens of a prompt, from and to; a completion has 57 in the mean
PROMPTS = {"short": (8, 24), "as long as completions": (50, 64), "four times as long": (200, 256)}
#: share of the groups whose rewards are equal
DEAD = (0.0, 0.4)
#: how many times stock's train phase the whole ladder has to be faster, by prompts and share of dead groups
GOALS = {
    ("as long as completions", 0.0): 3.5,
    ("four times as long", 0.0): 4.5,
    ("as long as completions", 0.4): 6.0,
    ("four times as long", 0.4): 7.5,
}
LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
ARMS: dict[str, str | None] = {
    "stock": None,
    "trim": "trim",
    "trim + sort": "trim,sort",
    "trim + sort + skip": "trim,sort,skip",
    "pack + sort + skip": "sort,skip,pack",
    "all (auto)": "auto",
}


class ServedRollouts:
    """A `rollout_func` that serves completions of ragged length, a pure function of seed and call number."""

    def __init__(self, seed: int, vocabulary: int, longest: int, prompts: tuple[int, int], typical: int = 48):
        self.seed, self.vocabulary, self.longest, self.prompts, self.calls = seed, vocabulary, longest, prompts, 0
        self.typical = typical
        self.real_tokens: list[int] = []
        #: the same with a prompt once for each group
        self.shared_tokens: list[int] = []

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        rng = random.Random(self.seed * 1009 + self.calls)
        self.calls += 1
        rows: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
        for index in range(len(prompts)):
            if index % GROUP == 0:
                prompt = [rng.randrange(2, self.vocabulary) for _ in range(rng.randint(*self.prompts))]
            length = min(self.longest, max(2, round(rng.lognormvariate(math.log(self.typical), 0.6))))
            completion = [rng.randrange(2, self.vocabulary) for _ in range(length)]
            rows["prompt_ids"].append(prompt)
            rows["completion_ids"].append(completion)
            rows["logprobs"].append([0.0] * length)
        completions = sum(map(len, rows["completion_ids"]))
        self.real_tokens.append(sum(map(len, rows["prompt_ids"])) + completions)
        self.shared_tokens.append(sum(map(len, rows["prompt_ids"][::GROUP])) + completions)
        return rows


def reward_of(dead: float) -> Callable[..., list[float]]:
    """Return a reward of 0 or 1 by content, equal in this share of the groups and never in the others."""

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        values = [float(sum(ids) % 2) for ids in completion_ids]
        for start in range(0, len(values), GROUP):
            if random.Random(sum(completion_ids[start])).random() < dead:
                values[start : start + GROUP] = [1.0] * GROUP
            elif len(set(values[start : start + GROUP])) == 1:
                values[start] = 1.0 - values[start]
        return values

    return reward


def build(savings: str | None, seed: int, prompts: str = "short", dead: float = 0.4, **over: Any) -> GRPOTrainer:
    """Return a trainer on the same weights and rollouts; `savings=None` is TRL's own class."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    size = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(
        vocab_size=len(tokenizer), intermediate_size=384, head_dim=32, max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **size,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "seed": seed,
        "per_device_train_batch_size": ROWS, "num_generations": GROUP, "gradient_accumulation_steps": 2,
        "max_completion_length": 256, "max_steps": STEPS, "learning_rate": 1e-5,
    }  # fmt: skip
    settings |= over
    cls, args_cls = (GRPOTrainer, GRPOConfig) if savings is None else (EffiGRPOTrainer, EffiGRPOConfig)
    if savings is not None:
        settings["exact_savings"] = savings
    trainer = cls(
        model=Qwen3ForCausalLM(config),
        reward_funcs=reward_of(dead),
        args=args_cls(**settings),
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(512)]}),
        processing_class=tokenizer,
        rollout_func=ServedRollouts(seed, len(tokenizer), settings["max_completion_length"], PROMPTS[prompts]),
    )
    return with_line(trainer, f"{savings or 'stock'}, seed {seed}")


def train_phase(savings: str | None, seed: int, prompts: str, dead: float) -> dict[str, Any]:
    """
    Run four steps, and return what the training phases of the last three took.

    CPU seconds of each step but the first, in which the model is asked about its attention, once in a run; tokens
    forwarded in all of them, and those that there are, with a prompt of a group counted once.
    """
    trainer = build(savings, seed, prompts, dead)
    seconds: list[float] = []
    forwarded = [0]
    step, prepare = trainer.training_step, trainer._prepare_inputs
    inside = [0.0]

    def timed_prepare(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        out = prepare(*args, **kwargs)
        inside[0] += time.process_time() - start
        return out

    def timed_step(*args: Any, **kwargs: Any) -> Any:
        inside[0], start = 0.0, time.process_time()
        out = step(*args, **kwargs)
        seconds.append(time.process_time() - start - inside[0])
        return out

    trainer._prepare_inputs, trainer.training_step = timed_prepare, timed_step
    embedding = trainer.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, out: forwarded.__setitem__(0, forwarded[0] + args[0].numel()))
    trainer.train()
    real, shared = (
        sum(tokens[:STEPS]) for tokens in (trainer.rollout_func.real_tokens, trainer.rollout_func.shared_tokens)
    )
    per_step = [a + b for a, b in zip(seconds[::2], seconds[1::2], strict=True)]
    return {"seconds": per_step[1:], "forwarded": forwarded[0], "real": real, "shared": shared}


def exact_zero_stock() -> type[GRPOTrainer]:
    """Stock, with the rounding noise of equal-reward groups taken out (see the card, 'Deviations')."""

    class ExactZeros(GRPOTrainer):
        def _calculate_rewards(self, *args: Any) -> torch.Tensor:
            self.seen = super()._calculate_rewards(*args)
            return self.seen

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            out = super()._generate_and_score_completions(inputs)
            groups = self.seen.sum(1).view(-1, GROUP)
            equal = (groups == groups[:, :1]).all(1).repeat_interleave(GROUP)
            return {**out, "advantages": out["advantages"].masked_fill(equal, 0.0)}

    return ExactZeros


def gradient_error(loss_type: str, seed: int) -> float:
    """Relative error of one SGD step at learning rate 1 (the update is the gradient)."""
    over = {
        "loss_type": loss_type, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 1,
        "lr_scheduler_type": "constant", "per_device_train_batch_size": 32, "max_completion_length": 96,
    }  # fmt: skip
    updates = []
    for savings in (None, "sort,skip,share"):
        if savings and loss_type == "bnpo":
            savings = "skip,share"  # rows may not change places
        trainer = build(savings, seed, "as long as completions", **over)
        if savings is None:
            trainer.__class__ = exact_zero_stock()
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
        after = trainer.model.parameters()
        updates.append(torch.cat([(b - a).detach().flatten().double() for a, b in zip(after, before, strict=True)]))
    return float((updates[0] - updates[1]).norm() / updates[0].norm())


def peak_live_bytes(savings: str | None, prompts: str) -> int:
    """Return the most bytes that were alive in one update of 32 rows without dead groups."""
    trainer = build(savings, 0, prompts, 0.0, per_device_train_batch_size=16, max_steps=1)
    with LiveBytes() as live:
        trainer.train()
    return live.peak


def measure(seeds: int, repeats: int) -> list[dict[str, Any]]:
    """Return one row for each kind of prompts, share of dead groups and arm."""
    rows = []
    for prompts, dead in itertools.product(PROMPTS, DEAD):
        runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for seed in range(seeds):
            for _ in range(repeats):
                for arm, savings in ARMS.items():
                    runs[arm].append(train_phase(savings, seed, prompts, dead))
        seconds = {arm: statistics.median(s for run in runs[arm] for s in run["seconds"]) for arm in ARMS}
        forwarded = {arm: sum(run["forwarded"] for run in runs[arm]) for arm in ARMS}
        shared = sum(run["shared"] for run in runs["stock"])
        for arm, savings in ARMS.items():
            speedup, allowed = seconds["stock"] / seconds[arm], forwarded["stock"] / forwarded[arm]
            rows.append(
                {
                    "prompts": prompts,
                    "dead_groups": dead,
                    "arm": arm,
                    "train_phase_cpu_seconds": round(seconds[arm], 4),
                    "speedup": round(speedup, 2),
                    "speedup_over_token_ratio": round(speedup / allowed, 3),
                    "tokens_forwarded_per_token_prompts_once": round(forwarded[arm] / shared, 3),
                    "peak_live_mib": round(peak_live_bytes(savings, prompts) / 2**20, 1) if dead == 0.0 else None,
                }
            )
    return rows


def headlines(rows: list[dict[str, Any]], errors: dict[str, float]) -> list[dict[str, Any]]:
    """Return the figures that have a goal."""
    of = {(row["prompts"], row["dead_groups"], row["arm"]): row for row in rows}
    everything = [row for row in rows if row["arm"] == "all (auto)"]
    forwarded = max(r["tokens_forwarded_per_token_prompts_once"] for r in everything if r["dead_groups"] == 0.0)
    worst = min(row["speedup_over_token_ratio"] for row in everything)
    against_pack = min(
        of[row["prompts"], row["dead_groups"], "pack + sort + skip"]["train_phase_cpu_seconds"]
        / row["train_phase_cpu_seconds"]
        for row in everything
    )
    found = []
    for (prompts, dead), goal in GOALS.items():
        speedup = of[prompts, dead, "all (auto)"]["speedup"]
        name = f"train_phase_speedup_{prompts.replace(' ', '_')}_{int(100 * dead)}_percent_dead"
        found.append(headline(name, speedup, f">= {goal:g}", speedup >= goal))
    return [
        headline("train_phase_speedup", (short := of["short", 0.4, "all (auto)"]["speedup"]), ">= 2", short >= 2),
        headline("max_relative_gradient_error", max(errors.values()), "<= 1e-5", max(errors.values()) <= 1e-5),
        headline("tokens_forwarded_per_real_token", forwarded, "<= 1.10", forwarded <= 1.10),
        headline("least_speedup_over_token_ratio", worst, ">= 0.9", worst >= 0.9),
        headline("least_speedup_over_packed_rows", round(against_pack, 2), ">= 0.95", against_pack >= 0.95),
        *found,
    ]


@quiet_libraries()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1, help="alternations of all arms, for each seed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(args.seeds, args.repeats)
    errors = {loss: max(gradient_error(loss, seed) for seed in range(args.seeds)) for loss in LOSSES}
    write_result(
        "grpo_exact",
        command=f"python -m bench.grpo_exact --seeds {args.seeds} --repeats {args.repeats}",
        seeds=list(range(args.seeds)),
        headline=headlines(rows, errors),
        rows=rows
        + [{"loss_type": loss, "max_relative_gradient_error": float(f"{e:.2e}")} for loss, e in errors.items()],
    )


if __name__ == "__main__":
    main()
