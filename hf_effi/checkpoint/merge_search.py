"""`search_coefficients`: the best linear combination of saved checkpoints, held against a second set."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ..functional.coefficient_search import CoefficientSearch, search_weights
from ..functional.merging import combine
from .average import plan_average, write_average
from .merge_files import WeightFolder, check_alike, check_target

logger = logging.getLogger(__name__)

#: gets the weights of a combination by name and returns its loss
Evaluate = Callable[[dict[str, Tensor]], float]


def search_coefficients(
    checkpoints: str | Path | Sequence[Mapping[str, Tensor]],
    eval_fn: Evaluate,
    *,
    confirm_fn: Evaluate | None,
    last: int = 8,
    budget: int = 64,
    seed: int = 0,
    output_dir: str | Path | None = None,
) -> CoefficientSearch:
    """
    Search the coefficients with which to combine the checkpoints of a run (LCSC, 2404.02241), and write the result.

    Formula: `theta = sum_i a_i theta_i`, `sum_i a_i = 1`, negative `a_i` allowed; see [`search_weights`] for how they
    are found. The result is never worse on the search set than the best of last, uniform, EMA, linear and trend, and
    is used only where it beats that one on a second set too. Each candidate costs one sum over the checkpoints, which
    are read from the disk one tensor at a time, and one evaluation.

    Args:
        checkpoints (`str`, `Path` or `Sequence`): `output_dir` of a run, whose last whole checkpoints are taken; or
            states, oldest first, such as [`WeightFolder`] or the tensors of `state_dict()`.
        eval_fn (`Callable[[dict[str, torch.Tensor]], float]`): Loss on the search set of the weights it is given; less
            is better.
        confirm_fn (`Callable`, *optional*): The same on a second set, which shares no row with the first. It has to be
            named: `None` uses the best of the search set unconfirmed, with a warning.
        last (`int`, *optional*, defaults to 8): How many of the run's checkpoints.
        budget (`int`, *optional*, defaults to 64): Calls of `eval_fn`, above 6. With `k` checkpoints, from
            `k (k + 1) / 2` of them on a quadratic model joins in.
        seed (`int`, *optional*, defaults to 0): Equal seeds give equal results.
        output_dir (`str` or `Path`, *optional*): Where the chosen combination is written; must not exist. Needs the
            `output_dir` of a run.

    Returns:
        [`CoefficientSearch`]; `str()` of it says in a sentence what is used and why.

    Raises:
        ValueError: fewer than two checkpoints, a budget that is too small, or a taken `output_dir`.
        MismatchError: checkpoints of other tensors.

    Example:
    ```python
    def loss_on(rows):
        def evaluate(state):
            model.load_state_dict(state, strict=False)  # of an adapter: peft.set_peft_model_state_dict(model, state)
            return trainer.evaluate(rows)["eval_loss"]
        return evaluate

    found = search_coefficients("out", loss_on(search_rows), confirm_fn=loss_on(other_rows), output_dir="out-searched")
    print(found)
    ```
    """
    of_a_run = isinstance(checkpoints, (str, Path))
    if output_dir is not None and not of_a_run:
        raise ValueError(
            "output_dir only acts where checkpoints is the output_dir of a run. Save combine(states, found.weights)."
        )
    target = None if output_dir is None else check_target(output_dir)
    states: Sequence[Mapping[str, Tensor]]
    steps: list[int] | None = None
    folders: list[WeightFolder] = []
    if isinstance(checkpoints, (str, Path)):
        plan = plan_average(checkpoints, last, kind="uniform")
        for reason in plan.skipped:
            logger.warning("Left out of the search: %s.", reason)
        states = folders = [WeightFolder(folder) for folder in plan.folders]
        check_alike(folders)
        steps = plan.steps
    else:
        if last != 8:
            raise ValueError(
                f"last={last!r} only acts with the output_dir of a run. Leave it at 8; pass fewer states."
            )
        states = list(checkpoints)
    found = search_weights(
        len(states),
        lambda weights: eval_fn(combine(states, weights)),
        confirm=None if confirm_fn is None else lambda weights: confirm_fn(combine(states, weights)),
        budget=budget,
        seed=seed,
    )
    if found.confirmed is None and found.name == "searched":
        logger.warning("No confirm_fn: the coefficients fit the search set, and may fit nothing else.")
    logger.info("%s", found)
    if target is not None:
        made: dict[str, Any] = {"kind": "searched", "steps": steps, "seed": seed, "budget": budget}
        made |= {name: value for name, value in asdict(found).items() if name != "history"}
        made["plain"] = {name: value if math.isfinite(value) else None for name, value in found.plain.items()}
        write_average(target, folders, found.weights, made)
    return found
