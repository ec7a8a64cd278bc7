"""What token budgets do to a GRPO step: memory, time and gradient; and how long ranks wait with rows dealt by cost.

`python -m bench.grpo_token_budget` writes `bench/results/grpo_token_budget.json`. The rollouts are those of
`bench.grpo_exact`: log-normal lengths (sigma 0.6), short prompts, no group with equal rewards, 32 rows of about 2,300
tokens in a micro-batch. The arms differ in `loss_token_budget` alone and take turns in one process of one thread. The
peak is of the bytes of one update above what was alive before it, gradients of the weights included. Waiting is
counted, not timed: the cost of a rank is the number of its tokens, over 50 updates of 64 rows for each rank.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

import torch

from bench._counters import LiveBytes
from bench._schema import command_line, headline, write_result
from bench.grpo_exact import GROUP, build
from hf_effi.demo.command import quiet_libraries
from hf_effi.functional.rollouts import deal_rows, slowest_over_mean

#: no budget, and about a half, a quarter and an eighth of a micro-batch
BUDGETS = (None, 1152, 576, 288)
ROWS, STEPS = 32, 7
RANKS = (2, 8)
UPDATES, ROWS_OF_A_RANK = 50, 64


def trainer_with(budget: int | None, seed: int, **over: Any) -> Any:
    """Return a trainer on the same weights and rollouts for every budget."""
    over = {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 1, "loss_token_budget": budget, **over}
    return build("auto", seed, "short", 0.0, **over)


def seconds_of_steps(budget: int | None, seed: int) -> list[float]:
    """Return the CPU seconds of each training step but the first, without its generation."""
    trainer = trainer_with(budget, seed, max_steps=STEPS)
    step, prepare = trainer.training_step, trainer._prepare_inputs
    seconds: list[float] = []
    inside = [0.0]

    def timed_prepare(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        out = prepare(*args, **kwargs)
        inside[0] = time.process_time() - start
        return out

    def timed_step(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        out = step(*args, **kwargs)
        seconds.append(time.process_time() - start - inside[0])
        return out

    trainer._prepare_inputs, trainer.training_step = timed_prepare, timed_step
    trainer.train()
    return seconds[1:]  # the first one asks the model about its attention


def update_of(budget: int | None, seed: int) -> tuple[torch.Tensor, int]:
    """Return one SGD update at learning rate 1, which is the gradient, and the most bytes that were alive in it."""
    over = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    trainer = trainer_with(budget, seed, max_steps=1, **over)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with LiveBytes() as live:
        trainer.train()
    after = [p.detach() for p in trainer.model.parameters()]
    moved = torch.cat([(b - a).flatten().double() for a, b in zip(after, before, strict=True)])
    return moved, live.peak


def measure_budgets(seed: int) -> list[dict[str, Any]]:
    """Return one row for each budget."""
    whole, rows = None, []
    for budget in BUDGETS:
        update, peak = update_of(budget, seed)
        whole = update if whole is None else whole
        error = float((update - whole).norm() / whole.norm())
        seconds = statistics.median(seconds_of_steps(budget, seed))
        rows.append(
            {
                "loss_token_budget": budget,
                "seed": seed,
                "peak_live_mib": round(peak / 2**20, 2),
                "train_step_cpu_seconds": round(seconds, 4),
                "relative_gradient_difference": float(f"{error:.2e}"),
            }
        )
    return rows


def measure_dealing(ranks: int, seed: int) -> dict[str, Any]:
    """Return how long ranks wait with rows as they are generated, dealt alone, and dealt by whole groups."""
    rng = random.Random(seed)
    ratios: dict[str, list[float]] = {
        "as_generated": [],
        "dealt_rows": [],
        "as_generated_shared": [],
        "dealt_groups": [],
    }
    size = ROWS_OF_A_RANK
    for _ in range(UPDATES):
        total = ranks * size
        prompts = [rng.randint(50, 64) for _ in range(total // GROUP)]
        completions = [min(256, max(2, round(rng.lognormvariate(3.87, 0.6)))) for _ in range(total)]
        group = [row // GROUP for row in range(total)]
        whole = [float(prompts[group[row]] + completions[row]) for row in range(total)]
        alone = [float(1 + completions[row]) for row in range(total)]
        once = [float(prompts[group[row]]) for row in range(total)]
        stay = [list(range(r * size, (r + 1) * size)) for r in range(ranks)]

        def rows_apart(hands: list[list[int]], costs: list[float] = whole) -> float:
            return slowest_over_mean([[sum(costs[row] for row in hand)] for hand in hands])[0]

        def prompts_once(
            hands: list[list[int]],
            costs: list[float] = alone,
            of_prompts: list[int] = prompts,
            group: list[int] = group,
        ) -> float:
            sums = [
                [sum(costs[row] for row in hand) + sum(of_prompts[g] for g in {group[row] for row in hand})]
                for hand in hands
            ]
            return slowest_over_mean(sums)[0]

        ratios["as_generated"].append(rows_apart(stay))
        ratios["dealt_rows"].append(rows_apart(deal_rows(whole, ranks)))
        ratios["as_generated_shared"].append(prompts_once(stay))
        ratios["dealt_groups"].append(prompts_once(deal_rows(alone, ranks, group, once)))
    return {"ranks": ranks, "seed": seed, **{name: round(statistics.mean(v), 4) for name, v in ratios.items()}}


def headlines(rows: list[dict[str, Any]], waits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the figures that have a goal, with a quarter of a micro-batch as the budget."""

    def median(key: str, budget: int | None) -> float:
        return statistics.median(row[key] for row in rows if row["loss_token_budget"] == budget)

    quarter = BUDGETS[2]
    worst = max(row["relative_gradient_difference"] for row in rows)
    found = [
        headline(f"{key}_ratio_at_a_quarter", round(median(key, quarter) / median(key, None), 3), goal)
        for key, goal in (("peak_live_mib", "<= 0.5"), ("train_step_cpu_seconds", "<= 1.15"))
    ]
    found.append(headline("max_relative_gradient_difference", worst, "<= 1e-5"))
    for ranks in RANKS:
        of = [wait for wait in waits if wait["ranks"] == ranks]
        for name, goal in (
            ("as_generated", None),
            ("dealt_rows", "<= 1.02"),
            ("as_generated_shared", None),
            ("dealt_groups", "<= 1.05"),
        ):
            value = round(statistics.median(wait[name] for wait in of), 4)
            found.append(headline(f"slowest_over_mean_{ranks}_ranks_{name}", value, goal))
    return found


@quiet_libraries()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for seed in range(args.seeds) for row in measure_budgets(seed)]
    waits = [measure_dealing(ranks, seed) for ranks in RANKS for seed in range(args.seeds)]
    write_result(
        "grpo_token_budget",
        command=command_line("bench.grpo_token_budget"),
        seeds=list(range(args.seeds)),
        headline=headlines(rows, waits),
        rows=rows + waits,
    )
    for row in rows + waits:
        print(row)


if __name__ == "__main__":
    main()
