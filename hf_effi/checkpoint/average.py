"""`average_checkpoints`: the average of checkpoints that a finished run left on disk."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .._files import save_json
from .._record_check import load_trainer_state
from .._untrusted import is_number, shorten
from ..errors import BrokenFileError, DecayToZeroWarning, RefusedError
from ..functional.averaging import averaging_weights, trend_weights, weighted_average
from ..functional.merging import combine_tensors, concatenate_lora, metric_weights
from ..functional.options import refuse_idle
from .folders import checkpoints_in
from .manifest import verify_checkpoint
from .merge_files import DESCRIPTION, WeightFolder, check_alike, check_target, write_weights
from .merge_metrics import final_lr_ratio, metric_at, smoothed_losses
from .probes import written_in_probe
from .structure import step_of

logger = logging.getLogger(__name__)

_BY_PLACE = ("ema", "uniform", "linear", "trend")
#: below this share of its peak, the LR at the end leaves nothing to average
_DECAYED = 0.1
#: what averaging of the checkpoints of one run has been measured with
_PENALTY = 4.0
#: initialisations of LoRA that leave the weights of the base alone
_OWN_INIT = ("gaussian", "orthogonal")


@dataclass(frozen=True)
class AveragePlan:
    """
    Which checkpoints an average is of, and with which weights; found without loading a weight.

    Args:
        folders (`list[Path]`): The checkpoints, oldest first.
        steps (`list[int]`): Their updates.
        weights (`list[float]`): One number per checkpoint; they sum to 1.
        values (`list[float]`, *optional*): The metric of each, where the weights come from one.
        skipped (`list[str]`): Checkpoints that were left out, each with the reason.
        lr_ratio (`float`, *optional*): Learning rate at the newest as a share of the largest, from the log; `None`
            where the log does not tell.
    """

    folders: list[Path]
    steps: list[int]
    weights: list[float]
    values: list[float] | None
    skipped: list[str]
    lr_ratio: float | None

    @property
    def advice(self) -> str | None:
        """A sentence where the log says that averaging is not worth it; `None` otherwise."""
        if self.lr_ratio is None or self.lr_ratio >= _DECAYED:
            return None
        return (
            f"The LR ends at {self.lr_ratio:.2g} of its peak: after such a decay the average of the last checkpoints "
            "is worth nothing, or slightly less than the last one. Train with a constant LR, or keep the last one."
        )


def plan_average(
    run_dir: str | Path,
    last: int | None = 6,
    *,
    kind: str = "ema",
    alpha: float = 0.2,
    penalty: float | None = None,
    greater_is_better: bool | None = None,
) -> AveragePlan:
    """
    Return what [`average_checkpoints`] with the same arguments would average. Nothing is loaded or written.

    Args:
        run_dir, last, kind, alpha, penalty, greater_is_better: As in [`average_checkpoints`].

    Raises:
        ValueError: as in [`average_checkpoints`].

    Example:
    ```python
    plan = plan_average("out", last=5, kind="loss", penalty=4.0)
    print(dict(zip(plan.steps, plan.weights)), plan.skipped, plan.advice)
    ```
    """
    by_metric = _check(last, kind, alpha, penalty, greater_is_better)
    folders, skipped = _whole(Path(run_dir), last)
    if not folders:
        left_out = f" Left out: {'; '.join(skipped)}." if skipped else ""
        raise ValueError(
            f"There is no whole checkpoint-N in {str(run_dir)!r}: name the output_dir of a run that saved some."
            + left_out
        )
    steps = [step_of(folder) for folder in folders]
    log = load_trainer_state(folders[-1])["log_history"]
    values = None
    if by_metric:
        saved = [step_of(path) for path in checkpoints_in(run_dir)]
        values, greater = _values(log, steps, saved, kind, greater_is_better)
        weights = metric_weights(values, _PENALTY if penalty is None else penalty, greater_is_better=greater)
    elif kind == "trend":
        weights = trend_weights(len(steps))
    else:
        weights = averaging_weights(len(steps), kind, alpha)  # type: ignore[arg-type]  # checked above
    return AveragePlan(folders, steps, weights, values, skipped, final_lr_ratio(log, steps[-1]))


def _check(last: int | None, kind: str, alpha: float, penalty: float | None, greater: bool | None) -> bool:
    """Check every argument, and return whether the weights come from a metric."""
    by_metric = kind not in _BY_PLACE
    if last is not None and (not isinstance(last, int) or isinstance(last, bool) or last < 1):
        raise ValueError(f"last={last!r} must be an integer of at least 1, or None for all.")
    averaging_weights(1, "ema", alpha)
    refuse_idle("alpha", alpha, 0.2, acts=kind == "ema", needs="with kind='ema'")
    needs = "with kind='loss', 'step' or the name of a logged metric"
    refuse_idle("penalty", penalty, None, acts=by_metric, needs=needs)
    refuse_idle(
        "greater_is_better",
        greater,
        None,
        acts=by_metric and kind not in ("loss", "step"),
        needs="with kind= the name of a logged metric",
    )
    if by_metric:
        metric_weights([1.0], _PENALTY if penalty is None else penalty)
        if kind not in ("loss", "step") and greater is None and not str(kind).endswith("loss"):
            raise ValueError(
                f"kind={kind!r} is none of {', '.join(map(repr, _BY_PLACE))}, 'loss' and 'step'. As the name of a "
                "logged metric it needs greater_is_better=True or False; a name that ends in 'loss' does without."
            )
    return by_metric


def _values(
    log: Sequence[dict[str, Any]], steps: list[int], saved: list[int], kind: str, greater: bool | None
) -> tuple[list[float], bool]:
    if kind == "step":
        return [float(step) for step in steps], True
    if kind == "loss":
        return smoothed_losses(log, steps, saved), False
    return metric_at(log, steps, kind), bool(greater)


def _whole(run_dir: Path, last: int | None) -> tuple[list[Path], list[str]]:
    """Return the last whole checkpoints that hold weights of the training, and what was left out."""
    found: list[Path] = []
    skipped: list[str] = []
    for path in reversed(checkpoints_in(run_dir)):
        if len(found) == last:
            break
        report = verify_checkpoint(path)
        if not report.whole:
            skipped.append(f"{path.name} is not whole: {report.problem}")
        elif written_in_probe(path):
            skipped.append(f"{path.name} holds weights of a probe, which were undone")
        else:
            found.append(path)
    return found[::-1], skipped[::-1]


def average_checkpoints(
    run_dir: str | Path,
    output_dir: str | Path,
    last: int | None = 6,
    *,
    kind: str = "ema",
    alpha: float = 0.2,
    penalty: float | None = None,
    greater_is_better: bool | None = None,
    exact_delta: bool = False,
) -> list[int]:
    """
    Average the last checkpoints in a folder, one weight file at a time, and write a model that `from_pretrained`
    loads.

    For runs without [`WeightAveragingCallback`], and for FSDP and DeepSpeed where they save whole weights.
    Configuration and tokenizer are those of the newest checkpoint, adapters included; `average.json` says what was
    averaged. Sums are in fp32 or wider; of integer tensors the newest counts. A checkpoint that is not whole, or that
    was written inside of a probe ([`AutoLRSCallback`]), is left out, and a warning says so. Where the log says that
    the LR was decayed, a [`DecayToZeroWarning`] says that the average is worth nothing.

    Args:
        run_dir (`str` or `Path`): Folder with `checkpoint-N` folders, each with `*.safetensors` files.
        output_dir (`str` or `Path`): Must not exist.
        last (`int`, *optional*, defaults to 6): How many; fewer where the run has fewer (`save_total_limit`). `None`:
            all of them.
        kind (`str`, *optional*, defaults to `"ema"`): `"ema"`, `"uniform"` or `"linear"`, see [`averaging_weights`];
            `"trend"`, see [`trend_weights`]; `"loss"`, the mean of the training losses logged since the checkpoint
            before; `"step"`; or the name of a metric that was logged at each checkpoint, such as `"eval_loss"`. The
            last three are weighed by [`metric_weights`] (2504.18580).
        alpha (`float`, *optional*, defaults to 0.2): Of `"ema"`, see [`averaging_weights`].
        penalty (`float`, *optional*): Of the weights by a metric, at least 0; 4 without it. 0 is the uniform mean.
        greater_is_better (`bool`, *optional*): Of a logged metric; known without it where its name ends in `loss`.
        exact_delta (`bool`, *optional*, defaults to `False`): Of LoRA adapters, average the products `B A` exactly, in
            factors whose rank is the sum of the ranks. Without it the factors are averaged, which keeps the rank and
            is close for checkpoints of one run.

    Returns:
        `list[int]`: The updates that were averaged, ascending.

    Raises:
        ValueError: no whole checkpoint, a taken `output_dir`, a metric that was not logged, or an argument out of
            range.
        MismatchError: checkpoints of other tensors or other adapters; the message names what differs.
        RefusedError: no weights in safetensors, quantized ones, or `exact_delta` of what is no plain LoRA.

    Example:
    ```python
    average_checkpoints("out", "out-averaged", last=6, kind="uniform")
    average_checkpoints("out", "out-by-loss", last=10, kind="eval_loss", penalty=16.0)
    model = AutoModelForCausalLM.from_pretrained("out-averaged")
    ```
    """
    target = check_target(output_dir)
    plan = plan_average(
        run_dir, last, kind=kind, alpha=alpha, penalty=penalty, greater_is_better=greater_is_better
    )  # fmt: skip
    for reason in plan.skipped:
        logger.warning("Left out of the average: %s.", reason)
    if plan.advice is not None:
        warnings.warn(plan.advice, DecayToZeroWarning, stacklevel=2)
    carry_out(plan, target, kind, alpha, penalty, exact_delta)
    return plan.steps


def carry_out(
    plan: AveragePlan, target: Path, kind: str, alpha: float, penalty: float | None, exact_delta: bool
) -> None:
    """Write what a plan says; the other arguments are those that the plan was made with."""
    folders = [WeightFolder(folder) for folder in plan.folders]
    check_alike(folders)
    made = {
        "kind": kind,
        "alpha": alpha if kind == "ema" else None,
        "penalty": (_PENALTY if penalty is None else penalty) if plan.values is not None else None,
        "values": plan.values,
        "steps": plan.steps,
        "weights": plan.weights,
        "exact_delta": exact_delta,
        "skipped": plan.skipped,
    }
    write_average(target, folders, plan.weights, made, exact_delta=exact_delta)


def averaged_tensor(folders: Sequence[WeightFolder], weights: Sequence[float], name: str) -> Tensor:
    """Return one tensor of an average, in the type of the last folder; as the callback computes it, to the bit."""
    newest = folders[-1][name]
    if not newest.is_floating_point() or min(weights) < 0:
        return combine_tensors([*(folder[name] for folder in folders[:-1]), newest], weights)
    return weighted_average(({name: folder[name]} for folder in folders), weights)[name].to(newest.dtype)


def write_average(
    target: Path,
    folders: Sequence[WeightFolder],
    weights: Sequence[float],
    description: dict[str, Any],
    *,
    exact_delta: bool = False,
) -> None:
    """
    Write the weighted mean of folders that are alike, in the files of the last one, with a description.

    Args:
        exact_delta (`bool`): As in [`average_checkpoints`].

    Raises:
        RefusedError: `exact_delta` of what is no plain LoRA.
    """
    if not exact_delta:
        write_weights(
            target,
            folders[-1],
            lambda name: averaged_tensor(folders, weights, name),
            finish=lambda made: save_json(made / DESCRIPTION, description, indent=1),
        )
        return
    _check_exact(folders[-1])
    used = [(folder, weight) for folder, weight in zip(folders, weights, strict=True) if weight != 0]
    parts, shares = [folder for folder, _ in used], [weight for _, weight in used]

    def tensor(name: str) -> Tensor:
        pair = lora_pair(name)
        if pair is None:
            return averaged_tensor(folders, weights, name)
        down, up = concatenate_lora([p[pair[0]] for p in parts], [p[pair[1]] for p in parts], shares)
        return down if name == pair[0] else up

    def finish(made: Path) -> None:
        save_json(made / "adapter_config.json", _widened(dict(folders[-1].adapter or {}), len(parts)), indent=2)
        save_json(made / DESCRIPTION, description, indent=1)

    write_weights(target, folders[-1], tensor, finish=finish)


def lora_pair(name: str) -> tuple[str, str] | None:
    """Return the names of `A` and `B` of the pair that a tensor of an adapter belongs to; `None` for another one."""
    for down, up in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
        if name.endswith((down, up)):
            stem = name.removesuffix(down).removesuffix(up)
            return stem + down, stem + up
    return None


def _check_exact(folder: WeightFolder) -> None:
    config = folder.adapter
    if config is None:
        raise RefusedError(
            f"exact_delta=True is for LoRA adapters, and {folder.path} holds a whole model. Leave it out."
        )
    patterns = [config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    numbers = [config.get("r"), config.get("lora_alpha")]
    numbers += [value for pattern in patterns if isinstance(pattern, dict) for value in pattern.values()]
    if not all(isinstance(pattern, dict) for pattern in patterns) or not all(map(is_number, numbers)):
        raise BrokenFileError(
            f"adapter_config.json in {folder.path} is damaged: r and lora_alpha must be numbers, rank_pattern and "
            f"alpha_pattern mappings to numbers; they are {shorten([*numbers[:2], *patterns])}."
        )
    init = config.get("init_lora_weights", True)
    for reason, applies in (
        (f"peft_type={config.get('peft_type')!r}", config.get("peft_type") != "LORA"),
        ("use_dora=True, which divides by a norm of the sum", bool(config.get("use_dora"))),
        ("target_parameters, whose factors hold many experts", bool(config.get("target_parameters"))),
        (f"init_lora_weights={init!r}, which changes the base", isinstance(init, str) and init not in _OWN_INIT),
    ):
        if applies:
            raise RefusedError(
                f"exact_delta=True averages products of plain LoRA factors; {folder.path} has {reason}. Leave it out "
                "to average the tensors of the adapter themselves."
            )


def _widened(config: dict[str, Any], times: int) -> dict[str, Any]:
    """Return the configuration of an adapter whose ranks are `times` as large and whose scaling is the same."""
    share = math.sqrt(times) if config.get("use_rslora") else times
    config["r"] = config["r"] * times
    config["lora_alpha"] = config["lora_alpha"] * share
    config["rank_pattern"] = {name: rank * times for name, rank in (config.get("rank_pattern") or {}).items()}
    config["alpha_pattern"] = {name: value * share for name, value in (config.get("alpha_pattern") or {}).items()}
    return config
