"""How evenly the work of an update is spread over processes, and how much of it is padding: counts, not step times.

`python -m bench.token_budget` writes `bench/results/token_budget.json`. Lengths are log-normal, 8 processes of 4
accumulation steps. All arms serve each row once in about the same number of updates: the budget of ours is the
smallest that needs no more. Beside it: random order, transformers' `group_by_length`, and its `batch_rebalance`, each
with 8 rows per micro-batch on average. The cost of a row is that of a 7B model, `6 N l + 12 L H D l^2`, the same for
all arms; and, in a second set of rows, the one that `batch_rebalance` assumes, `l + l^2 / 1000`. Times are CPU seconds
of one thread: of making the sampler for a million rows, of finding the place in the middle of an epoch of them, and of
forward and backward of a small model on rows of an eighth of the length, process after process, where an update takes
as long as its slowest process.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from bench._schema import command_line, headline, write_result
from hf_effi.functional.data import batch_costs, flop_coefficients
from hf_effi.samplers import TokenBudgetBatchSampler, cost_of_model

RANKS, ACCUMULATION, ROWS_A_BATCH, ROWS = 8, 4, 8, 20_480
COSTS = {
    "7B": flop_coefficients(7_000_000_000, 32, 32, 128),
    "rebalance": (1.0, BatchRebalanceSampler.QUADRATIC_COST_COEF),
}
Cost = tuple[float, float]
Updates = list[list[list[list[int]]]]  # update, rank, micro-batch, row


def draw_lengths(seed: int, rows: int = ROWS, shrink: int = 1) -> list[int]:
    """
    Return lengths like those of instruction data: median 245 tokens, 5 % above 1270, at most 4096; over `shrink`.
    """
    draw = random.Random(seed)
    return [min(max(round(draw.lognormvariate(5.5, 1.0) / shrink), 1), 4096 // shrink) for _ in range(rows)]


def of_fixed_size(order: list[int]) -> Updates:
    """Cut an order into micro-batches as accelerate deals them to processes."""
    batches = [order[i : i + ROWS_A_BATCH] for i in range(0, len(order), ROWS_A_BATCH)]
    size = RANKS * ACCUMULATION
    return [[batches[i + rank : i + size : RANKS] for rank in range(RANKS)] for i in range(0, len(batches), size)]


def of_ranks(parts: list[list[list[int]]]) -> Updates:
    """Cut the micro-batches of each process into updates."""
    return [[part[i : i + ACCUMULATION] for part in parts] for i in range(0, len(parts[0]), ACCUMULATION)]


def budget_for(lengths: list[int], updates: int, padding_free: bool, cost: Cost, seed: int) -> TokenBudgetBatchSampler:
    """Return the sampler of the smallest budget that needs at most so many updates."""
    low, high = max(lengths), ROWS_A_BATCH * max(lengths)

    def at(max_tokens: int) -> TokenBudgetBatchSampler:
        sampler = TokenBudgetBatchSampler(lengths, max_tokens, cost=cost, padding_free=padding_free, seed=seed)
        sampler.deal(RANKS, ACCUMULATION)
        return sampler

    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle).batches_per_rank <= updates * ACCUMULATION else (middle + 1, high)
    return at(low)


def serve(arm: str, lengths: list[int], cost: Cost, seed: int) -> Updates:
    """Return the epoch that this arm serves."""
    generator = torch.Generator().manual_seed(seed)
    if arm == "random":
        return of_fixed_size(torch.randperm(len(lengths), generator=generator).tolist())
    if arm == "group_by_length":
        batch = ROWS_A_BATCH * ACCUMULATION  # what Trainer passes
        return of_fixed_size(list(LengthGroupedSampler(batch, lengths=lengths, generator=generator)))
    if arm == "batch_rebalance":
        size = ROWS_A_BATCH * ACCUMULATION * RANKS
        settings = {"effective_batch_size": size, "dp_size": RANKS, "grad_accum": ACCUMULATION, "seed": seed}
        return of_ranks([list(BatchRebalanceSampler(lengths, rank=rank, **settings)) for rank in range(RANKS)])
    most = len(lengths) // (ROWS_A_BATCH * ACCUMULATION * RANKS)
    sampler = budget_for(lengths, most, arm == "ours_padding_free", cost, seed)
    return of_ranks([list(sampler.batches(rank)) for rank in range(RANKS)])


def measure(arm: str, cost_name: str, seed: int) -> dict[str, Any]:
    """Return the counts of one epoch."""
    lengths, cost = draw_lengths(seed), COSTS[cost_name]
    updates = serve(arm, lengths, cost, seed)
    padded = arm != "ours_padding_free"
    batches = [[lengths[row] for row in batch] for update in updates for rank in update for batch in rank]
    costs = batch_costs(batches, cost, padded).view(len(updates), RANKS, ACCUMULATION)
    of_rank = costs.sum(dim=2)
    width = [len(batch) * max(batch) if padded else sum(batch) for batch in batches]
    return {
        "arm": arm,
        "cost": cost_name,
        "seed": seed,
        "updates": len(updates),
        "rows": sum(map(len, batches)),
        # waiting at the end of each update (DDP), and at each micro-batch (FSDP), over the mean work
        "imbalance_update": float(of_rank.amax(dim=1).sum() / of_rank.mean(dim=1).sum()),
        "imbalance_micro_batch": float(costs.amax(dim=1).sum() / costs.mean(dim=1).sum()),
        "padded_tokens_per_real_token": sum(width) / sum(map(sum, batches)),
        "largest_micro_batch_tokens": max(width),
        # cost of the slowest process over the cost of all real tokens, evenly spread and without padding
        "critical_path_ratio": float(of_rank.amax(dim=1).sum() * RANKS / batch_costs(batches, cost, False).sum()),
    }


def measure_million(seed: int) -> dict[str, Any]:
    """
    Return CPU seconds of making the sampler for a million rows, and of passing over half an epoch of one process.
    """
    lengths = draw_lengths(seed, 1_000_000)
    began = time.process_time()
    sampler = TokenBudgetBatchSampler(lengths, 4096, cost=COSTS["7B"], seed=seed)
    sampler.deal(RANKS, ACCUMULATION)
    made = time.process_time()
    sampler.set_epoch(1)
    batches = sampler.batches(0)
    for _ in range(sampler.batches_per_rank // 2):
        next(batches)
    return {
        "arm": "million_rows",
        "seed": seed,
        "plan_cpu_seconds": made - began,
        "resume_cpu_seconds": time.process_time() - made,
    }


def small_model() -> LlamaForCausalLM:
    """Return a model whose matrix products dominate."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=1024, **sizes))


def measure_seconds(seed: int) -> list[dict[str, Any]]:
    """Return, for each padded arm, the CPU seconds of four updates if all processes ran side by side."""
    torch.set_num_threads(1)
    model, lengths = small_model(), draw_lengths(seed, 4 * RANKS * ACCUMULATION * ROWS_A_BATCH, shrink=8)
    cost = cost_of_model(model)
    served = {arm: serve(arm, lengths, cost, seed) for arm in ARMS if arm != "ours_padding_free"}
    seconds: dict[str, list[float]] = {arm: [] for arm in served}

    def run(batch: list[int]) -> None:
        width = max(lengths[row] for row in batch)
        ids = torch.ones(len(batch), width, dtype=torch.long)
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    run(list(range(ROWS_A_BATCH)))
    for update in range(max(map(len, served.values()))):  # the arms take turns
        for arm, updates in served.items():
            of_rank = []
            for batches in updates[update] if update < len(updates) else ():
                began = time.process_time()
                for batch in batches:
                    run(batch)
                of_rank.append(time.process_time() - began)
            seconds[arm].append(max(of_rank, default=0.0))
    return [
        {
            "arm": arm,
            "cost": "measured",
            "seed": seed,
            "updates": len(served[arm]),
            "critical_path_cpu_seconds": sum(took),
        }
        for arm, took in seconds.items()
    ]


ARMS = ("random", "group_by_length", "batch_rebalance", "ours", "ours_padding_free")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    rows = [measure(arm, cost, seed) for cost in COSTS for seed in args.seeds for arm in ARMS]

    million = [measure_million(seed) for seed in args.seeds]
    timed = [row for seed in args.seeds for row in measure_seconds(seed)]

    def median(arm: str, key: str) -> float:
        return statistics.median(row[key] for row in rows if (row["arm"], row["cost"]) == (arm, "7B"))

    goals = {("ours", "imbalance_update"): "<= 1.05", ("ours", "padded_tokens_per_real_token"): "<= 1.05"}
    keys = ("imbalance_update", "imbalance_micro_batch", "padded_tokens_per_real_token", "critical_path_ratio")
    figures = [headline(f"{key}_{arm}", median(arm, key), goals.get((arm, key))) for key in keys for arm in ARMS]
    for key, goal in (("plan_cpu_seconds", None), ("resume_cpu_seconds", "< 1")):
        figures.append(headline(f"{key}_1m_rows", statistics.median(row[key] for row in million), goal))
    took = {(row["arm"], row["seed"]): row["critical_path_cpu_seconds"] for row in timed}
    for arm in ("group_by_length", "batch_rebalance", "ours"):
        ratios = [took[arm, seed] / took["random", seed] for seed in args.seeds]
        figures.append(headline(f"critical_path_cpu_seconds_over_random_{arm}", statistics.median(ratios)))
    rows += million + timed
    path = write_result(
        "token_budget", command=command_line("bench.token_budget"), seeds=args.seeds, headline=figures, rows=rows
    )
    for row in rows:
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    print(path)


if __name__ == "__main__":
    main()
