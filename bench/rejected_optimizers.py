"""CLASSP, normalise-and-project, SoRA and outlier-safe pre-training beside a tuned AdamW or plain LoRA.

    python -m bench.rejected_optimizers [--quick]

A decoder of two layers (hidden 64, queries and keys normalised) on the bytes of Python's standard library. It is
trained on them from scratch (outlier-safe pre-training), or trained once and adapted to the language reference in
`pydoc_data/topics.py` (the others), as a user would adapt a model that is given. Each arm tries as many learning
rates as AdamW on a seed that is not counted; CLASSP tries two thresholds with each and SoRA two penalties, in
their favour. The questions, set before the first run, are each asked of the worst of three seeds:

- CLASSP: is less forgotten of the first text than with AdamW at the learning rate that learns the second as well, by
  at least 0.01? (AdamW's curve of both losses over its learning rates is read by straight lines.)
- normalise-and-project: is the loss at least 0.01 below AdamW's, with queries and keys projected, or all matrices of
  the layers?
- SoRA: is the loss below that of plain LoRA of the same ranks from the start, and below those of plain LoRA and of
  AdaLoRA (with the shipped callback) at a budget that is uniform and no smaller?
- outlier-safe pre-training: are there outliers at all, is the loss no higher than AdamW's, and is less of it lost by
  rounding weights and activations to four bits? Kurtosis is centred, of each token over its features.

`--quick` runs every part on tiny sizes, learns nothing and writes nothing.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from bench._rejected_study import (
    TUNING_SEED,
    Size,
    Study,
    adamw,
    build,
    by_seed,
    fit,
    interpolate,
    mean,
    tuned,
    worst_gap,
)
from bench._schema import RESULTS, command_line, headline, write_result
from bench.prototypes.classp import Classp
from bench.prototypes.normalize_project import Projection, is_matrix_of_a_layer, is_query_or_key
from bench.prototypes.outlier_safe import (
    MuonAll,
    add_embedding_projections,
    excess_kurtosis,
    round_layers,
    use_ss_norm,
)
from bench.prototypes.sora import adapt, fold, proximal_step
from bench.schedules import BATCH
from hf_effi.callbacks.adalora import AdaLoRACallback

ADAPT_RATES = (1e-3, 3e-3, 1e-2)
#: of AdamW alone, to see what a smaller one forgets
CURVE_RATES = (1e-4, 3e-4, 1e-3)
CLASSP_RATES, CLASSP_THRESHOLDS = (1e-2, 3e-2, 1e-1), (0.0, 1e-6)
LORA_RATES, SORA_RATES, ADALORA_RATES = (3e-3, 1e-2, 3e-2), (5e-3, 1e-2, 3e-2), (1e-2, 3e-2, 1e-1)
#: how far a closed gate has travelled over the run, in standard deviations of its start
SORA_RANK, SORA_SHRINKS, MOST_SHARE = 8, (1.2, 2.4), 0.5
SCRATCH_RATES = (4e-3, 8e-3, 1.6e-2)
SCALING = 8.0


def grid(size: Size, *values: Sequence[float]) -> list[tuple[float, ...]]:
    """Return all combinations, of the first `size.values` of each."""
    return list(itertools.product(*(v[: size.values] for v in values)))


# --- CLASSP and normalise-and-project, on a model that is given -----------------------------------------------------


def run_adamw(study: Study, seed: int, lr: float) -> dict[str, Any]:
    model = study.pretrained(seed)
    fit(model, study.target, adamw(model, lr), study.size.adapt, seed)
    return study.losses(model)


def run_classp(study: Study, seed: int, lr: float, threshold: float) -> dict[str, Any]:
    model = study.pretrained(seed)
    optimizer = Classp(model.parameters(), lr=lr, threshold=threshold)
    fit(model, study.target, optimizer, study.size.adapt, seed)
    return {**study.losses(model), "moved_share": round(optimizer.moved_share(), 4)}


def run_projected(study: Study, chosen: Callable[[str], bool], seed: int, lr: float) -> dict[str, Any]:
    model = study.pretrained(seed)
    projection = Projection(model, chosen)
    optimizer = adamw(model, lr, weight_decay=0.0)
    fit(model, study.target, optimizer, study.size.adapt, seed, after=lambda _: projection.project())
    return study.losses(model)


def part_continued(study: Study) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    size, seeds = study.size, study.size.seeds
    rows = tuned("AdamW", functools.partial(run_adamw, study), grid(size, ADAPT_RATES), seeds)
    curve = [
        {"arm": f"AdamW, lr {lr:g}", "seed": seed, **run_adamw(study, seed, lr)}
        for lr in CURVE_RATES[: size.values]
        for seed in seeds
    ]
    rows += tuned("CLASSP", functools.partial(run_classp, study), grid(size, CLASSP_RATES, CLASSP_THRESHOLDS), seeds)
    stock = run_classp(study, TUNING_SEED, 0.2, 0.5)
    for name, chosen in (("queries and keys", is_query_or_key), ("all matrices", is_matrix_of_a_layer)):
        run = functools.partial(run_projected, study, chosen)
        rows += tuned(f"projection, {name}", run, grid(size, ADAPT_RATES), seeds)
    gaps = []
    for row in (row for row in rows if row["arm"] == "CLASSP"):
        seen = [*curve, *by_arm(rows, "AdamW")]
        points = [(c["loss"], c["old_loss"]) for c in seen if c["seed"] == row["seed"]]
        gaps.append(row["old_loss"] - interpolate([*points, study.before], row["loss"]))
    figures = [
        headline("classp_old_loss_minus_adamw_at_equal_new_loss", round(max(gaps), 4), "<= -0.01"),
        headline("classp_new_loss_minus_adamw", worst_gap(rows, "CLASSP", "AdamW"), "<= 0"),
        headline("classp_moved_share_by_default", stock["moved_share"]),
        headline(
            "nap_query_key_loss_minus_adamw", worst_gap(rows, "projection, queries and keys", "AdamW"), "<= -0.01"
        ),
        headline(
            "nap_all_matrices_loss_minus_adamw", worst_gap(rows, "projection, all matrices", "AdamW"), "<= -0.01"
        ),
    ]
    return rows + curve, figures


# --- SoRA ------------------------------------------------------------------------------------------------------------


def lora_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=lr, weight_decay=0.0, fused=True)


def run_lora(study: Study, ranks: dict[str, int] | int, seed: int, lr: float) -> dict[str, Any]:
    model = study.pretrained(seed)
    rank_of = (lambda name: ranks) if isinstance(ranks, int) else ranks.__getitem__
    adapters = adapt(model, rank_of, SCALING)
    fit(model, study.target, lora_optimizer(model, lr), study.size.lora, seed)
    return {**study.losses(model), "budget": sum(adapter.rank for adapter in adapters.values())}


def run_sora(study: Study, seed: int, lr: float, shrink: float) -> dict[str, Any]:
    """`shrink` is how far the proximal steps of the whole run move a gate: `penalty sum(learning rates)`."""
    model = study.pretrained(seed)
    adapters = adapt(model, lambda name: SORA_RANK, SCALING / SORA_RANK, gated=True)
    # The learning rates of the warm-up and the cosine add up to 0.5 of the peak for each update.
    penalty = shrink / (0.5 * lr * study.size.lora)
    step = functools.partial(proximal_step, adapters, penalty=penalty)
    fit(model, study.target, lora_optimizer(model, lr), study.size.lora, seed, after=lambda rate: step(rate))
    gated = study.target.loss(model)
    plain = fold(model, adapters)
    ranks = {name: adapter.rank for name, adapter in plain.items()}
    budget = sum(ranks.values())
    return {
        **study.losses(model),
        "budget": budget,
        "ranks": ranks,
        "fold_error": abs(gated - study.target.loss(model)),
        "allowed": budget <= MOST_SHARE * SORA_RANK * len(ranks),
    }


def run_adalora(study: Study, target: int, seed: int, lr: float) -> dict[str, Any]:
    """AdaLoRA from one and a half times the rank down to `target`, with the shipped callback, by the stock Trainer."""
    updates = study.size.lora
    config = AdaLoraConfig(
        init_r=max(round(1.5 * target), target + 1),
        target_r=target,
        tinit=updates // 10,
        tfinal=math.ceil(0.3 * updates),
        deltaT=1 if updates < 50 else 5,
        total_step=updates,
        lora_alpha=16,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(study.pretrained(seed), config)
    rows = [
        {"input_ids": row, "labels": row} for step in range(updates) for row in study.target.batch(seed, step).unbind()
    ]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            max_steps=updates,
            per_device_train_batch_size=BATCH,
            train_sampling_strategy="sequential",
            learning_rate=lr,
            lr_scheduler_type="cosine",
            warmup_steps=updates // 10,
            seed=seed,
        )
        Trainer(model, args, train_dataset=rows, callbacks=[AdaLoRACallback()]).train()
    model.eval()
    budget = sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n)
    return {**study.losses(model.base_model.model), "budget": budget}


def part_sora(study: Study) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    size, seeds = study.size, study.size.seeds
    rows = tuned("SoRA", functools.partial(run_sora, study), grid(size, SORA_RATES, SORA_SHRINKS), seeds)
    budgets = by_seed(rows, "SoRA", "budget")
    uniform = max(math.ceil(max(budgets) / len(rows[0]["ranks"])), 1)
    rows += tuned("LoRA", functools.partial(run_lora, study, uniform), grid(size, LORA_RATES), seeds)
    rate = next(row["setting"][0] for row in rows if row["arm"] == "LoRA")
    for row in by_arm(rows, "SoRA"):
        found = run_lora(study, row["ranks"], row["seed"], rate)
        rows.append({"arm": "LoRA of SoRA's ranks", "seed": row["seed"], "setting": [rate], **found})
    rows += tuned("AdaLoRA", functools.partial(run_adalora, study, uniform), grid(size, ADALORA_RATES), seeds)
    return rows, [
        headline("sora_loss_minus_lora_of_its_ranks", worst_gap(rows, "SoRA", "LoRA of SoRA's ranks"), "< 0"),
        headline("sora_loss_minus_uniform_lora", worst_gap(rows, "SoRA", "LoRA"), "< 0"),
        headline("sora_loss_minus_adalora", worst_gap(rows, "SoRA", "AdaLoRA"), "< 0"),
        headline("sora_final_rank_budget", mean(budgets)),
        headline("lora_final_rank_budget", mean(by_seed(rows, "LoRA", "budget"))),
        headline("adalora_final_rank_budget", mean(by_seed(rows, "AdaLoRA", "budget"))),
        headline("sora_fold_loss_error", max(by_seed(rows, "SoRA", "fold_error")), "<= 1e-6"),
    ]


def by_arm(rows: Sequence[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["arm"] == arm]


# --- outlier-safe pre-training ---------------------------------------------------------------------------------------


@torch.no_grad()
def outliers(study: Study, model: nn.Module) -> dict[str, float]:
    """Return kurtosis and largest over median activation between the layers, and the loss that rounding costs."""
    hidden = model(study.source.held_out, output_hidden_states=True).hidden_states
    low = copy.deepcopy(model)
    round_layers(low)
    return {
        "kurtosis": round(mean([excess_kurtosis(h).mean().item() for h in hidden]), 3),
        "largest_over_median": round(max((h.abs().max() / h.abs().median()).item() for h in hidden), 2),
        "four_bit_gap": round(study.source.loss(low) - study.source.loss(model), 5),
    }


def run_scratch(study: Study, muon: bool, ss_norm: bool, projections: bool, seed: int, lr: float) -> dict[str, Any]:
    model = build(seed, tied=False)
    if ss_norm:
        use_ss_norm(model)
    if projections:
        add_embedding_projections(model)
    optimizer = MuonAll(model.parameters(), lr) if muon else adamw(model, lr)
    fit(model, study.source, optimizer, study.size.scratch, seed)
    return {"loss": round(study.source.loss(model), 5), **outliers(study, model)}


SCRATCH = {
    "AdamW from scratch": (False, False, False),
    "Muon on all": (True, False, False),
    "Muon, SSNorm, EmbProj": (True, True, True),
}


def part_outliers(study: Study) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    size, rows = study.size, []
    for arm, switches in SCRATCH.items():
        rows += tuned(arm, functools.partial(run_scratch, study, *switches), grid(size, SCRATCH_RATES), size.seeds)
    stock, muon, whole = SCRATCH
    return rows, [
        headline("adamw_kurtosis", mean(by_seed(rows, stock, "kurtosis")), ">= 10"),
        headline("outlier_safe_kurtosis", mean(by_seed(rows, whole, "kurtosis"))),
        headline("adamw_four_bit_gap", mean(by_seed(rows, stock, "four_bit_gap"))),
        headline("outlier_safe_four_bit_gap_minus_adamw", worst_gap(rows, whole, stock, "four_bit_gap"), "< 0"),
        headline("outlier_safe_loss_minus_adamw", worst_gap(rows, whole, stock), "<= 0"),
        headline("outlier_safe_loss_minus_muon_on_all", worst_gap(rows, whole, muon), "<= 0"),
    ]


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> tuple[list[dict[str, Any]], list[Any]]:
    """Run every part; return rows and headline figures, and write them unless it is quick."""
    parser = argparse.ArgumentParser(prog="python -m bench.rejected_optimizers")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    quick = parser.parse_args(arguments).quick
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    study = Study(Size().quick() if quick else Size())
    rows: list[dict[str, Any]] = [
        {"arm": "before adapting", "loss": round(study.before[0], 5), "old_loss": round(study.before[1], 5)}
    ]
    figures: list[Any] = []
    for part in (part_continued, part_sora, part_outliers):
        found, more = part(study)
        rows += found
        figures += more
    for figure in figures:
        print(figure, flush=True)
    if not quick:
        write_result(
            "rejected_optimizers",
            command=command_line("bench.rejected_optimizers"),
            seeds=study.size.seeds,
            headline=figures,
            rows=rows,
            folder=folder,
        )
    return rows, figures


if __name__ == "__main__":
    main()
