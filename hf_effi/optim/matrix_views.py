"""How a parameter is read as matrices: each expert by itself, fused projections in their parts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..attention.projections import PARTS, MeasuredProjections, measure_projections
from ..errors import RefusedError
from .roles import ParameterRole

Split = Mapping[str, Sequence[int] | None]


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """
    A parameter as matrices.

    Args:
        out_dim (`int`, *optional*): Its dimension of outputs; `None` where that is not known.
        sizes (`tuple[int, ...]`): Outputs of each part, in order; repeated until all outputs are dealt, so that
            `(8, 8, 8)` on 96 outputs is the layout of four heads with q, k and v each. Empty: one part.
        source (`str`): How it is known, for the report.

    Example:
    ```python
    >>> import torch
    >>> view = MatrixView(0, (2, 1), "by hand")  # two outputs of the first part, one of the second, repeated
    >>> [part.flatten().tolist() for part, _ in view.parts(torch.arange(6).view(6, 1))]
    [[0, 1, 3, 4], [2, 5]]

    ```
    """

    out_dim: int | None
    sizes: tuple[int, ...] = ()
    source: str = ""

    def parts(self, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """
        Yield each matrix `(outputs, inputs)` and the block of `tensor` that it has to be written back to; where the
        part lies in one piece, both are the same memory.
        """
        oriented = tensor.transpose(-1, -2) if self.out_dim == tensor.ndim - 1 else tensor
        for matrix in oriented if oriented.ndim == 3 else (oriented,):
            if not self.sizes:
                yield matrix, matrix
                continue
            rounds = matrix.unflatten(0, (-1, sum(self.sizes)))
            start = 0
            for size in self.sizes:
                block = rounds[:, start : start + size]
                start += size
                yield block.reshape(-1, matrix.shape[1]), block

    def __str__(self) -> str:
        if not self.sizes:
            return "whole" + (f" ({self.source})" if self.source else "")
        return f"in parts of {', '.join(map(str, self.sizes))} outputs ({self.source})"


def matrix_views(model: nn.Module, roles: Sequence[ParameterRole], split: Split | None) -> dict[str, MatrixView]:
    """
    Return the view of each parameter that a rule of matrices updates.

    A projection of queries, keys and values in one weight, and the two factors of a gated MLP in one weight, are found
    by [`measure_projections`]; what it cannot tell has to be said in `split`.

    Args:
        model (`nn.Module`): The model.
        roles (`Sequence[ParameterRole]`): Of the parameters.
        split (`Mapping[str, Sequence[int] | None]`, *optional*): Regular expression in a name -> sizes as in
            [`MatrixView`], or `None` for one whole matrix.

    Raises:
        ValueError: a pattern or sizes that fit no parameter.
        RefusedError: a parameter whose layout cannot be told.
    """
    patterns = _checked(split, roles)
    shown = _Shown(model, measure_projections(model, by_head=False))
    views = {}
    for role in roles:
        own = next((pattern for pattern in patterns if re.search(pattern, role.name)), None)
        views[role.name] = shown.view(role) if own is None else shown.given(role, own, patterns[own])
    return views


def _checked(split: Any, roles: Sequence[ParameterRole]) -> dict[str, tuple[int, ...]]:
    if split is None:
        return {}
    if not isinstance(split, Mapping):
        raise ValueError(f"split={split!r} must map a pattern to sizes, e.g. {{'query_key_value': [64, 64, 64]}}.")
    found = {}
    for pattern, sizes in split.items():
        listed = () if sizes is None else tuple(sizes) if isinstance(sizes, Sequence) else (0,)
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in listed):
            raise ValueError(f"split[{pattern!r}]={sizes!r} must be a list of integers of at least 1, or None.")
        try:
            met = any(re.search(pattern, role.name) for role in roles)
        except (re.error, TypeError) as error:
            raise ValueError(f"split has the pattern {pattern!r}, which does not compile: {error}.") from error
        if not met:
            names = roles[0].name if roles else "none"
            raise ValueError(f"split: no matrix has {pattern!r} in its name, e.g. {names!r} is one.")
        found[pattern] = listed
    return found


class _Shown:
    """What was measured of a model, asked by parameter."""

    def __init__(self, model: nn.Module, found: MeasuredProjections) -> None:
        self.found = found
        self.labels: dict[str, dict[int, str]] = {}
        for attention in found.attentions:
            for part in PARTS:
                for heads in attention.channels[part]:
                    for name, rows in heads.items():
                        self.labels.setdefault(name, {}).update(dict.fromkeys(rows.tolist(), part))
        #: modules of one kind in one kind of parent are laid out alike: an expert that no token went to is as others
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.halves = {self._kind(name): how for name, how in found.halves.items()}
        self.experts = {self._kind(name): how for name, how in found.experts.items()}
        self.fused_sizes = _fused_sizes(model)

    def _kind(self, name: str) -> tuple:
        parent, _, leaf = name.rpartition(".")
        module = self.modules.get(name)
        weight = module.weight if module is not None else getattr(self.modules[parent], leaf)
        return type(self.modules[parent]), leaf, tuple(weight.shape)

    def given(self, role: ParameterRole, pattern: str, sizes: tuple[int, ...]) -> MatrixView:
        view = self._whole(role)
        dim = (0 if role.parameter.ndim == 2 else None) if view.out_dim is None else view.out_dim
        if sizes and dim is None:
            dim = next((d for d in (1, 2) if role.parameter.shape[d] % sum(sizes) == 0), None)
        if sizes and (dim is None or role.parameter.shape[dim] % sum(sizes)):
            raise ValueError(
                f"split[{pattern!r}]={list(sizes)} sums to {sum(sizes)}, which does not divide the outputs of "
                f"{role.name}, {tuple(role.parameter.shape)}."
            )
        return MatrixView(dim, sizes, "given")

    def view(self, role: ParameterRole) -> MatrixView:
        whole = self._whole(role)
        path = role.name.rpartition(".")[0]
        if role.parameter.ndim == 3:
            if self._kind(role.name) not in self.experts:
                return whole
            _, how = self.experts[self._kind(role.name)]
            return dataclasses.replace(whole, sizes=self._factors(role, whole, how), source="measured")
        if len(set(self.labels.get(path, {}).values())) > 1:
            return dataclasses.replace(whole, sizes=self._attention_sizes(role, whole), source="measured")
        if self._kind(path) in self.halves:
            how = self.halves[self._kind(path)]
            return dataclasses.replace(whole, sizes=self._factors(role, whole, how), source="measured")
        if not self.found.attentions and role.role == "hidden" and set(role.parameter.shape) & self.fused_sizes:
            why = self.found.failed or "its attention does not go through transformers' AttentionInterface"
            raise _unknown(role, f"by its size it may be a fused projection, and nothing could be measured: {why}")
        return whole

    def _whole(self, role: ParameterRole) -> MatrixView:
        path = role.name.rpartition(".")[0]
        if role.parameter.ndim == 3:
            parent = f"{path}."
            dims = {dim for name, (dim, _) in self.found.experts.items() if name.startswith(parent)}
            kinds = {dim for kind, (dim, _) in self.experts.items() if kind[0] is type(role.module)}
            known = dims or kinds
            return MatrixView(known.pop() if len(known) == 1 else None)
        if path in self.found.out_dims:
            return MatrixView(self.found.out_dims[path])
        return MatrixView(0 if isinstance(role.module, (nn.Linear, nn.Embedding)) else None)

    def _factors(self, role: ParameterRole, view: MatrixView, how: str) -> tuple[int, ...]:
        if how == "unknown" or view.out_dim is None:
            raise _unknown(role, "it holds both factors of a gated MLP, in a layout that was not recognised")
        half = role.parameter.shape[view.out_dim] // 2
        return (half, half) if how == "halves" else (1, 1)

    def _attention_sizes(self, role: ParameterRole, view: MatrixView) -> tuple[int, ...]:
        labels = self.labels[role.name.rpartition(".")[0]]
        outputs = role.parameter.shape[view.out_dim or 0]
        runs: list[list[Any]] = []
        for channel in range(outputs):
            label = labels.get(channel, "")
            if runs and runs[-1][0] == label:
                runs[-1][1] += 1
            else:
                runs.append([label, 1])
        for period in range(1, len(runs) + 1):
            if len(runs) % period == 0 and runs == runs[:period] * (len(runs) // period):
                return tuple(size for _, size in runs[:period])
        raise _unknown(role, "its outputs go to queries, keys and values in no period")  # pragma: no cover


def _unknown(role: ParameterRole, why: str) -> RefusedError:
    return RefusedError(
        f"{role.name} {tuple(role.parameter.shape)} cannot be split into matrices: {why}. Say it by split={{pattern: "
        "sizes of the parts, repeated until the outputs end}, or None for one whole matrix: e.g. "
        f"split={{{role.name.rpartition('.')[0].rpartition('.')[2]!r}: None}}."
    )


def _fused_sizes(model: nn.Module) -> set[int]:
    """Return the outputs that a fused projection of this model would have, by its config."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
    if not isinstance(hidden, int) or not isinstance(heads, int) or not heads:
        return set()
    size = getattr(config, "head_dim", None) or hidden // heads
    shared = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    sizes = {3 * hidden, (heads + 2 * shared) * size, (heads + 2) * size}
    if isinstance(inner := getattr(config, "intermediate_size", None), int):
        sizes.add(2 * inner)
    return sizes
