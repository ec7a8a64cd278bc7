"""`average_runs`: the mean of models that were fine-tuned from one model with other seeds."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..errors import MismatchError, RefusedError
from ..functional.merging import cosine, products
from .average import lora_pair, write_average
from .folders import checkpoints_in, find_resumable
from .merge_files import WeightFolder, check_alike, check_target

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunAverage:
    """
    What was averaged, and how close the runs were.

    Args:
        folders (`list[str]`): The folder of each run that was read.
        lowest_cosine (`float`, *optional*): The lowest cosine between two runs in one matrix; `None` where only LoRA
            pairs were averaged, which need none.
        lowest_tensor (`str`, *optional*): Its name.
        task_cosine (`float`, *optional*): The lowest cosine between what two runs learnt (`theta_run - theta_base`,
            all tensors together); `None` without `base`.
        exact_delta (`bool`): Whether products of LoRA factors were averaged.
    """

    folders: list[str]
    lowest_cosine: float | None
    lowest_tensor: str | None
    task_cosine: float | None
    exact_delta: bool


def average_runs(
    run_dirs: Sequence[str | Path],
    output_dir: str | Path,
    *,
    base: str | Path | None = None,
    min_cosine: float = 0.5,
) -> RunAverage:
    """
    Average models that were fine-tuned from the same model in independent runs (run averaging, 2305.16834).

    Formula: `theta = 1/n sum_i theta_i`. It helps where no validation data of the target is at hand, and needs runs
    that lie in one basin: the same base, and heads that began with the same values. Whether they did is measured: the
    cosine between two runs in each matrix is near 1 where both began alike and near 0 where not.

    LoRA factors of two runs cannot be averaged, as each run chose its own; their products are, exactly, in an adapter
    whose rank is the sum of the ranks (see [`concatenate_lora`]). A module of `modules_to_save` is compared like any
    other matrix.

    Args:
        run_dirs (`Sequence[str | Path]`): At least two. Each a folder of a model or an adapter, or the `output_dir` of
            a run, of which the newest whole checkpoint is taken.
        output_dir (`str` or `Path`): Must not exist. Configuration and tokenizer are those of the last run.
        base (`str` or `Path`, *optional*): Folder of the model that all were trained from, head included: what the
            runs learnt is compared too. Not for adapters, whose configuration names their base.
        min_cosine (`float`, *optional*, defaults to 0.5): Matrices below it are refused, by name. In `[-1, 1]`; -1
            lets everything pass.

    Returns:
        [`RunAverage`]

    Raises:
        ValueError: fewer than two runs, a range, a taken `output_dir`, or `base` with adapters.
        MismatchError: other tensors, another `base_model_name_or_path`, or matrices that did not begin alike.
        RefusedError: adapters whose products cannot be averaged exactly (DoRA), or no weights.

    Example:
    ```python
    made = average_runs(["seed-0", "seed-1", "seed-2"], "averaged", base="base")
    print(made.lowest_tensor, made.lowest_cosine, made.task_cosine)
    ```
    """
    if isinstance(run_dirs, (str, Path)) or len(run_dirs) < 2:
        raise ValueError(f"run_dirs={run_dirs!r} must hold at least two folders.")
    if not -1 <= min_cosine <= 1:
        raise ValueError(f"min_cosine={min_cosine!r} must be in [-1, 1]; -1 lets everything pass.")
    target = check_target(output_dir)
    folders = [_of_a_run(Path(path)) for path in run_dirs]
    adapter = folders[-1].adapter
    if base is not None and adapter is not None:
        raise ValueError(
            f"base={str(base)!r} only acts with whole models; adapters name their base. Leave it at None."
        )
    check_alike(folders)
    lora = adapter is not None and adapter.get("peft_type") == "LORA"
    lowest, name = _lowest_cosine(folders, skip_pairs=lora)
    if lowest is not None and lowest < min_cosine:
        raise MismatchError(
            f"{name} has a cosine of {lowest:.2f} between two runs, below min_cosine={min_cosine}: they did not begin "
            "with the same values, and their mean is worth nothing. Start each run from one saved model, head "
            "included (or with one seed for the head), or let it pass with min_cosine=-1."
        )
    task = None if base is None else _task_cosine(folders, WeightFolder(base))
    if task is not None and task <= 0:
        logger.warning("What two runs learnt has a cosine of %.2f: their mean may keep little of either.", task)
    found = RunAverage([str(folder.path) for folder in folders], lowest, name, task, lora)
    made = {"kind": "runs", **asdict(found)}
    write_average(target, folders, [1 / len(folders)] * len(folders), made, exact_delta=lora)
    return found


def _of_a_run(path: Path) -> WeightFolder:
    """Return the weights in a folder, or those of the newest whole checkpoint below it."""
    try:
        return WeightFolder(path)
    except RefusedError:
        if not checkpoints_in(path):
            raise
    found = find_resumable(path)
    if found.path is None:
        raise RefusedError(f"{path} holds {found}.")
    for report in found.skipped:
        logger.warning("Left out: %s is not whole: %s.", report.path, report.problem)
    return WeightFolder(found.path)


def _lowest_cosine(folders: list[WeightFolder], *, skip_pairs: bool) -> tuple[float | None, str | None]:
    lowest, where = None, None
    for name in folders[-1]:
        if len(folders[-1].shape(name)) < 2 or (skip_pairs and lora_pair(name) is not None):
            continue
        tensors = [folder[name] for folder in folders]
        if not tensors[0].is_floating_point():
            continue
        for one, other in itertools.combinations(tensors, 2):
            value = cosine(one, other)
            if value is not None and (lowest is None or value < lowest):
                lowest, where = value, name
    return lowest, where


def _task_cosine(folders: list[WeightFolder], base: WeightFolder) -> float:
    check_alike([base, folders[-1]])
    count = len(folders)
    dots = torch.zeros(count, count, dtype=torch.float64)
    for name in base:
        start = base[name]
        if start.is_floating_point():
            dots += torch.tensor(products([folder[name] for folder in folders], start), dtype=torch.float64)
    pairs = itertools.combinations(range(count), 2)
    lengths = dots.diagonal().sqrt().tolist()
    if min(lengths) == 0:
        raise MismatchError(f"One of the runs equals {base.path} to the bit: it has learnt nothing.")
    return min(dots[i, j].item() / (lengths[i] * lengths[j]) for i, j in pairs if not math.isnan(dots[i, j].item()))
