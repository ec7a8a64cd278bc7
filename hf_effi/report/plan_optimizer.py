"""`hf-effi plan optimizer`: settings that were tuned for a model of this size, and how much data it wants."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from typing import Any

from ..functional.advice import TOKENS_PER_PARAMETER_2019, size_one_epoch, weight_decay_grid
from ..functional.optimizer_table import OPTIMIZERS, SEQUENCE_TOKENS, SOURCE, OptimizerAdvice, recommend_optimizer

_SUFFIXES = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hf-effi plan optimizer` to `parser`."""
    parser.add_argument("--params", type=_amount, required=True, help="weights without embeddings, e.g. 300M")
    parser.add_argument("--tokens", type=_amount, required=True, help="tokens of the whole run, e.g. 6B")
    parser.add_argument("--unique-tokens", type=_amount, help="different tokens among them, where data repeat")
    parser.add_argument("--optimizer", help=f"one of {', '.join(OPTIMIZERS)} (default: the best in the nearest row)")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")


def _amount(text: str) -> int:
    """Read a whole number, also with a suffix: `300M`, `6B`, `1.5T`."""
    scale = _SUFFIXES.get(text[-1:], 1.0)
    with contextlib.suppress(ValueError, OverflowError):
        value = round(float(text[:-1] if scale > 1 else text) * scale)
        if value >= 1:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 1, such as 300M or 6B (k, M, B, T)")


def _lines(advice: OptimizerAdvice, grid: tuple[float, ...], passes: float | None) -> list[str]:
    row, whole = advice.row, size_one_epoch(parameters=advice.parameters)
    old = size_one_epoch(parameters=advice.parameters, tokens_per_parameter=TOKENS_PER_PARAMETER_2019)
    settings = {
        "learning rate": f"{row.learning_rate:g}",
        "betas, eps": f"{row.betas[0]:g}, {row.betas[1]:g}, {row.eps:g}",
        "weight decay": f"{row.weight_decay:g}",
        "schedule": f"{row.warmup_steps} updates of warm-up, then {advice.lr_schedule['lr_scheduler_type']} to 0",
        "batch": f"{row.batch_sequences} sequences of {SEQUENCE_TOKENS} tokens, so {advice.steps:,} updates",
        "clipping": f"{row.max_grad_norm:g}",
        **{name.replace("_", " "): f"{value:g}" for name, value in row.extra.items()},
    }
    lines = [advice.sentence, *(f"  {name:<22} {value}" for name, value in settings.items())]
    lines.append(f"source: {SOURCE}.")
    lines.append(f"One pass over the data: {whole}; {old.tokens:,} by One Epoch Is All You Need.")
    if grid:
        values = ", ".join(f"{value:g}" for value in grid)
        lines.append(
            f"The run goes {passes:.3g} times over its data: compare weight decays {values} on held-out rows in place "
            "of the one above (Pre-training under infinite compute)."
        )
    return lines


def run(args: argparse.Namespace) -> int:
    """Print the advice; return the exit status: 2 for a bad value."""
    try:
        advice = recommend_optimizer(args.params, args.tokens, args.optimizer)
        passes = None if args.unique_tokens is None else args.tokens / args.unique_tokens
        grid = () if args.unique_tokens is None else weight_decay_grid(args.tokens, args.unique_tokens)
    except ValueError as error:
        print(f"hf-effi plan optimizer: {error}", file=sys.stderr)
        return 2
    if not args.json:
        print("\n".join(_lines(advice, grid, passes)))
        return 0
    data: dict[str, Any] = {
        **dataclasses.asdict(advice.row),
        "inside": advice.inside,
        "sentence": advice.sentence,
        "training_arguments": advice.training_arguments(),
        "one_epoch_tokens": size_one_epoch(parameters=args.params).tokens,
        "weight_decay_grid": list(grid),
        "source": SOURCE,
    }
    print(json.dumps(data, indent=2))
    return 0
