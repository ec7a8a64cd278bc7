"""`interpolate`: between a model and what fine-tuning made of it, with a table of what is kept and what is gained."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .._files import save_json
from ..errors import MismatchError, RefusedError
from ..functional.merging import combine_tensors, pareto_flags
from .average import lora_pair
from .merge_files import DESCRIPTION, WeightFolder, check_alike, check_target, write_weights

Source = str | Path | Mapping[str, Tensor]
#: what PEFT writes before the name of a tensor of the base model, and inside of it
_PREFIX, _INSIDE = "base_model.model.", "base_layer."


@dataclass(frozen=True)
class InterpolationRow:
    """
    One point between the base and the tuned model.

    Args:
        alpha (`float`): Share of the tuned model.
        scores (`dict[str, float]`): What each evaluation returned.
        pareto (`bool`): Whether no other row is at least as good in every score and better in one.
    """

    alpha: float
    scores: dict[str, float]
    pareto: bool


@dataclass(frozen=True)
class Interpolation:
    """
    The rows of an interpolation, by ascending `alpha`.

    Args:
        rows (`list[InterpolationRow]`): One row per `alpha`.
    """

    rows: list[InterpolationRow]

    def table(self, markdown: bool = False) -> str:
        """Return the rows as a table of text, or of Markdown; a star marks the rows of the Pareto front."""
        names = list(self.rows[0].scores)
        lines = [["alpha", *names, "Pareto"]]
        lines += [
            [f"{row.alpha:g}", *(f"{row.scores[name]:.4f}" for name in names), "*" if row.pareto else ""]
            for row in self.rows
        ]
        if markdown:
            lines.insert(1, ["---"] * len(lines[0]))
            return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


class _Between(Mapping[str, Tensor]):
    """The tensors at one `alpha`, each computed when it is asked for."""

    def __init__(self, base: Mapping[str, Tensor] | None, tuned: Mapping[str, Tensor], alpha: float) -> None:
        self.base, self.tuned, self.alpha = base, tuned, alpha
        self._adapter = isinstance(tuned, WeightFolder) and tuned.adapter is not None

    def __getitem__(self, name: str) -> Tensor:
        if self._adapter and (pair := lora_pair(name)) is not None:
            return self.tuned[name] if name == pair[0] else _times(self.tuned[name], self.alpha)
        if self._adapter and name.endswith("lora_B.bias"):
            return _times(self.tuned[name], self.alpha)
        base = (self.base or {})[_name_in_base(name) if self._adapter else name]
        return combine_tensors([base, self.tuned[name]], [1 - self.alpha, self.alpha])

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.tuned)

    def __len__(self) -> int:
        return len(self.tuned)


@torch.no_grad()
def _times(tensor: Tensor, alpha: float) -> Tensor:
    return (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * alpha).to(tensor.dtype)


def _name_in_base(name: str) -> str:
    return name.removeprefix(_PREFIX).replace(_INSIDE, "")


def _sources(base: Source | None, tuned: Source) -> tuple[Mapping[str, Tensor] | None, Mapping[str, Tensor]]:
    """Return both ends, having checked from their headers that they fit."""
    new = WeightFolder(tuned) if isinstance(tuned, (str, Path)) else tuned
    adapter = new.adapter if isinstance(new, WeightFolder) else None
    if base is None and adapter is None:
        raise ValueError("base=None is for an adapter, whose base is where it is scaled to 0. Name the base model.")
    old = WeightFolder(base) if isinstance(base, (str, Path)) else base
    if adapter is None:
        assert_same(old, new)
        return old, new
    if adapter.get("peft_type") != "LORA" or adapter.get("use_dora"):
        what = "use_dora=True" if adapter.get("use_dora") else f"peft_type={adapter.get('peft_type')!r}"
        raise RefusedError(
            f"An adapter with {what} is not linear in its factors, so scaling them is no interpolation. Merge it into "
            "its base (merge_and_unload), save that, and interpolate the two whole models."
        )
    full = [name for name in new if lora_pair(name) is None and not name.endswith("lora_B.bias")]
    if missing := [name for name in full if _name_in_base(name) not in (old or {})]:
        raise RefusedError(
            f"The adapter holds whole weights ({', '.join(missing[:3])}) that base={str(base)!r} does not have. Name "
            "the folder of the base model that has them; modules that were newly made have nothing to go back to."
        )
    for name in full:
        one, other = _shape(old or {}, _name_in_base(name)), _shape(new, name)
        if one != other:
            raise MismatchError(f"{name} has shape {list(one)} in the base and {list(other)} in the adapter.")
    return old, new


def assert_same(old: Mapping[str, Tensor] | None, new: Mapping[str, Tensor]) -> None:
    """Refuse two models of other tensors."""
    if isinstance(old, WeightFolder) and isinstance(new, WeightFolder):
        check_alike([old, new])
        return
    old = old or {}
    odd = sorted(set(old) ^ set(new)) or [name for name in new if _shape(old, name) != _shape(new, name)]
    if odd:
        raise MismatchError(f"The base and the tuned model differ in {odd[:3]}. Interpolate one model with itself.")


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return state.shape(name) if isinstance(state, WeightFolder) else tuple(state[name].shape)


def _check_alpha(alpha: float) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"alpha={alpha!r} must be a finite number: 0 is the base, 1 the tuned model.")
    return float(alpha)


def interpolate(
    base: Source | None,
    tuned: Source,
    alphas: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    *,
    eval_fns: Mapping[str, Callable[[dict[str, Tensor]], float]],
    greater_is_better: Collection[str] = (),
) -> Interpolation:
    """
    Score the models between a base and its fine-tuned form, and flag those that no other one beats.

    Formula: `theta(alpha) = (1 - alpha) theta_base + alpha theta_tuned` (WiSE-FT, 2109.01903; with `alpha = 1/2`
    JaColBERTv2.5, 2407.20750). 0 and 1 are the two models to the bit. Of a LoRA adapter, `B` is multiplied by `alpha`,
    which is the same: `W_0 + alpha s B A`.

    Args:
        base (`str`, `Path` or `Mapping`, *optional*): Folder or state of the model before. `None` for a LoRA adapter
            that holds no whole weights.
        tuned (`str`, `Path` or `Mapping`): Folder or state of the model after, or the folder of a LoRA adapter.
        alphas (`Sequence[float]`, *optional*): 0, 0.1, ..., 1 without it.
        eval_fns (`Mapping[str, Callable]`): Name to a function of the weights by name, such as a loss on old and one
            on new data. Of an adapter it gets the adapter's tensors (`peft.set_peft_model_state_dict`).
        greater_is_better (`Collection[str]`, *optional*): Those of `eval_fns` of which more is better.

    Returns:
        [`Interpolation`]

    Raises:
        ValueError: no alpha, one that is not finite, no evaluation, or a name in `greater_is_better` that has none.
        MismatchError: two models of other tensors.
        RefusedError: an adapter that is not linear in its factors (DoRA, others than LoRA).

    Example:
    ```python
    found = interpolate("base", "tuned", [0, 0.5, 1], eval_fns={"old": loss_on(old), "new": loss_on(new)})
    print(found.table())
    write_interpolation("base", "tuned", "between", alpha=0.5)
    ```
    """
    points = sorted({_check_alpha(alpha) for alpha in alphas})
    if not points or not eval_fns:
        raise ValueError(f"alphas={list(alphas)!r} and eval_fns={list(eval_fns)!r} must each hold at least one.")
    if odd := sorted(set(greater_is_better) - set(eval_fns)):
        raise ValueError(f"greater_is_better={odd!r} names no evaluation; there are {list(eval_fns)!r}.")
    old, new = _sources(base, tuned)
    scores = []
    for alpha in points:
        state = dict(_Between(old, new, alpha))
        scores.append({name: float(function(state)) for name, function in eval_fns.items()})
    signs = {name: -1.0 if name in greater_is_better else 1.0 for name in eval_fns}
    flags = pareto_flags([[signs[name] * row[name] for name in signs] for row in scores])
    return Interpolation(
        [InterpolationRow(alpha, row, flag) for alpha, row, flag in zip(points, scores, flags, strict=True)]
    )


def write_interpolation(
    base: str | Path | None, tuned: str | Path, output_dir: str | Path, alpha: float = 0.5
) -> None:
    """
    Write the model between a base and its fine-tuned form as a folder that `from_pretrained` loads.

    Configuration and tokenizer are those of the tuned model. Of a LoRA adapter an adapter is written, with `B`
    multiplied by `alpha`. One weight file at a time is in memory.

    Args:
        base, tuned: Folders, as in [`interpolate`].
        output_dir (`str` or `Path`): Must not exist.
        alpha (`float`, *optional*, defaults to 0.5): Share of the tuned model.

    Raises:
        ValueError, MismatchError, RefusedError: as [`interpolate`]; or a taken `output_dir`.

    Example:
    ```python
    write_interpolation("base", "tuned", "between", alpha=0.7)
    ```
    """
    alpha, target = _check_alpha(alpha), check_target(output_dir)
    old, new = _sources(base, tuned)
    made = {"kind": "interpolation", "alpha": alpha, "of": [str(base), str(tuned)]}
    write_weights(
        target,
        new if isinstance(new, WeightFolder) else WeightFolder(tuned),
        _Between(old, new, alpha).__getitem__,
        finish=lambda folder: save_json(folder / DESCRIPTION, made, indent=1),
    )
