"""`patch`: replaces the computation of modules on one model, checks it, and puts everything back exactly."""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.utils import logging

from ..errors import RefusedError
from ..functional.options import refuse_idle
from ..patching import set_mode, sharded_by_zero3
from ..patching.handle import CLAIM, Claim, PatchHandle
from ._layers import LayerGroup, Unit, layer_unit
from ._sources import candidates, liger_layers
from ._targets import Key, Target, find_targets
from ._verify import Arguments, _KernelMismatchError, compare, hidden_states, loss_arguments, placed, rotary_arguments

logger = logging.get_logger(__name__)

OnMismatch = Literal["error", "eager"]
InputMaker = Callable[[nn.Module, torch.Generator], tuple[Any, ...]]


@dataclass(frozen=True)
class PatchedModule:
    """
    One line of the report.

    Args:
        name (`str`): Qualified name of the module.
        module_class (`str`): Its class.
        key (`str`): The key of `patch` that matched it.
        layer (`str`): The layer that computes it, or `"eager"` where the self-check failed and `on_mismatch="eager"`.
        note (`str`): Largest deviation seen by the self-check, `"not checked"`, or why it stayed eager.
    """

    name: str
    module_class: str
    key: str
    layer: str
    note: str


class KernelPatchHandle(PatchHandle):
    """
    What [`patch`] returns: the patches of one call. `print(handle)` shows them as a table.

    Args:
        rows (`list[PatchedModule]`): One for each module, in the order of the model.
    """

    def __init__(self, rows: Sequence[PatchedModule] = ()) -> None:
        super().__init__("patch")
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[PatchedModule]:
        return iter(self.rows)

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], int] = {}
        for row in self.rows:
            name, note = re.sub(r"\d+", "*", row.name) or "(model)", textwrap.shorten(row.note, 100)
            line = (name, row.module_class, row.key, row.layer, note)
            groups[line] = groups.get(line, 0) + 1
        lines = [("modules", "count", "class", "key", "layer", "self-check")]
        lines += [(name, str(count), *rest) for (name, *rest), count in groups.items()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        eager = sum(row.layer == "eager" for row in self.rows)
        patched = len(self.rows) - eager
        head = f"{patched} modules {'patched' if self.active or not patched else 'reverted'}"
        head += f", {eager} left eager" if eager else ""
        return "\n".join([head, *(line.rstrip() for line in shown)])


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"patch() needs an nn.Module, not {type(model).__name__}.")
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise RefusedError(
                f"{name or 'the model'} is compiled. Patch first, then compile: the compiled graph would be traced "
                "again at an unforeseen moment."
            )
        if module.__dict__.get("_use_kernels", False):
            raise RefusedError(
                f"{name or 'the model'} was loaded with use_kernels=True: transformers then rebinds the forward of "
                "its layers whenever train() or eval() is called, which would drop these patches. Load it without."
            )


def _free_targets(model: nn.Module, key: Key) -> list[Target]:
    targets = find_targets(model, key)
    for target in targets:
        if claim := target.module.__dict__.get(CLAIM):
            raise RefusedError(
                f"{target.name or 'the model'} is claimed by {_shown(key)!r} and already by {claim.key!r}. Revert the "
                "other patch first (`unpatch(model)` where its handle is lost), or narrow one of the two keys."
            )
    return targets


def _shown(key: Key) -> str:
    return key if isinstance(key, str) else key.pattern


def _units(key: Key, value: Any, targets: Sequence[Target]) -> list[list[Unit]]:
    """Return, for each unit of modules, its alternatives in the order in which they are tried."""
    by_modules: dict[tuple[nn.Module, ...], list[Unit]] = {}
    for candidate in candidates(key, value):
        units = (
            candidate.units(targets)
            if isinstance(candidate, LayerGroup)
            else [layer_unit(candidate, target) for target in targets]
        )
        for unit in units:
            by_modules.setdefault(tuple(target.module for target in unit.targets), []).append(unit)
    return list(by_modules.values())


class _Checker:
    """Runs the self-check once for each kind of module."""

    def __init__(self, model: nn.Module, inputs: Mapping[Key, InputMaker]) -> None:
        self.inputs = inputs
        self.dtype = getattr(model, "dtype", None) or next(
            (p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32
        )
        self.seen: dict[Any, str | _KernelMismatchError] = {}

    def check(self, key: Key, unit: Unit) -> str:
        """Return the note for the report, or raise."""
        kind = self._kind(unit)
        if kind not in self.seen:
            where = f"{unit.label} on {unit.targets[0].name or 'the model'}"
            try:
                self.seen[kind] = self._compare(key, unit)
            except _KernelMismatchError as error:
                self.seen[kind] = _KernelMismatchError(f"{where}: {error}")
            except RefusedError as error:
                raise RefusedError(f"{where}: {error}") from error
        found = self.seen[kind]
        if isinstance(found, _KernelMismatchError):
            raise found
        return found

    @staticmethod
    def _kind(unit: Unit) -> Any:
        first = unit.targets[0].module
        source = [repr(target.module) for target in unit.targets] if unit.modules else type(first)
        weights = [(p.shape, p.dtype, p.device, p.requires_grad) for m in unit.modules for p in m.parameters()]
        return unit.label, str(source), str(weights)

    @torch.inference_mode(False)  # where there would be no gradients to compare
    def _compare(self, key: Key, unit: Unit) -> str:
        for parameter in (p for module in unit.modules for p in module.parameters()):
            # DTensor: FSDP2. Empty: a shard of FSDP. Meta: offloaded by accelerate.
            sharded = hasattr(parameter, "device_mesh") or sharded_by_zero3([parameter])
            if sharded or parameter.device.type == "meta" or not parameter.numel():
                raise RefusedError(
                    "its weights are sharded or offloaded, or in 8 bits by another patch, so the self-check cannot "
                    "run. Patch before the model is wrapped, put 8-bit bases last, or pass verify=False."
                )
        deviations = []
        # A model is loaded in evaluation mode, without dropout; without modules there is no mode.
        for training in (False, True) if unit.modules else (True,):
            with _mode(unit.modules, training):
                deviations += compare(
                    unit.modules,
                    unit.original,
                    unit.replacement,
                    self._arguments(key, unit),
                    backward=unit.has_backward,
                    budget=unit.error_budget,
                )
        worst = max(deviations, key=lambda d: d.error / d.allowed, default=None)
        failed = [d for d in deviations if not d.ok]
        if failed:
            d = failed[0]
            raise _KernelMismatchError(
                f"{d.what} is off by {d.error:.2e} of its {d.measure}, the original by {d.own_error:.2e}, and "
                f"{d.allowed:.2e} is allowed."
            )
        return "no results" if worst is None else f"{worst.what} {worst.error:.1e} of {worst.allowed:.1e}"

    def _arguments(self, key: Key, unit: Unit) -> Arguments:
        target = unit.targets[0]
        with torch.device("cpu"):  # where the generator is, whatever the default device
            arguments, differentiable = self._drawn(key, unit, target)
        device = next((p.device for p in target.module.parameters()), torch.device("cpu"))
        return placed(arguments, self.dtype, device, differentiable)

    def _drawn(self, key: Key, unit: Unit, target: Target) -> tuple[Arguments, int]:
        """Return random arguments, and how many of them get a gradient."""
        generator = torch.Generator().manual_seed(0)
        if key in self.inputs:
            own = tuple(self.inputs[key](target.module, generator))
            return (own, {}), len(own)
        if target.kind == "rotary":
            return rotary_arguments(target.module, generator), 2
        if target.kind == "loss":
            return loss_arguments(target.module.config.get_text_config().vocab_size, generator), 1
        return hidden_states(target.name, unit.input_of or target.module, generator), 1


@contextlib.contextmanager
def _mode(modules: Sequence[nn.Module], training: bool) -> Iterator[None]:
    """Put modules into training or evaluation mode, and back."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            set_mode(module, training)
        yield
    finally:
        for part, was in before:
            part.training = was


def _try_alternatives(
    key: Key, alternatives: Sequence[Unit], checker: _Checker | None, on_mismatch: OnMismatch
) -> tuple[Unit | None, str]:
    """Return the first alternative that passes with its note, or `None` with the reason."""
    if checker is None:
        return alternatives[0], "not checked"
    failures = []
    for unit in alternatives:
        try:
            return unit, checker.check(key, unit)
        except _KernelMismatchError as error:
            failures.append(str(error))
    reason = " ".join(failures)
    if on_mismatch == "error":
        raise _KernelMismatchError(
            f"{reason} Remove {_shown(key)!r}, or pass on_mismatch='eager' to leave such modules as they are."
        )
    return None, reason


def patch(
    model: nn.Module,
    layers: Mapping[Key, Any] | str,
    *,
    on_mismatch: OnMismatch = "error",
    verify: bool = True,
    inputs: Mapping[Key, InputMaker] | None = None,
) -> KernelPatchHandle:
    """
    Replace the computation of modules of one model; check each replacement; return a handle that undoes it exactly.

    The replacement is written into the `__dict__` of the instance. Neither classes nor modules of transformers are
    touched: other models of the process stay as they are. Patch before `torch.compile`, and before the model is
    wrapped for FSDP or DeepSpeed.

    Args:
        model (`nn.Module`): Any model, also one with PEFT adapters, accelerate hooks or gradient checkpointing.
        layers (`Mapping` or `str`): Key -> layer. `"liger"` stands for every layer that Liger has for this model.
            Keys: a kernel's name (`"RMSNorm"`, `"SwiGLUMLP"`, `"GeGLUMLP"`, `"rotary_pos_emb"`, `"ForCausalLMLoss"`,
            `"LoRALinear"`, `"LMHead"`), a module's name, a glob on names (`"*.mlp"`) or a compiled regex. Values: a
            stateless `nn.Module` class (Hugging Face's contract: `forward`, `has_backward`, `can_torch_compile`), one
            of Liger's classes, `"liger"`, `"organisation/repository:Layer"` or a `kernels` repository object,
            `FusedLoRALinear()`, `LowBitLoRALinear("fp8")`, `FusedLMHead()`; or a list of these, of which the first
            that passes is taken.
        on_mismatch (`str`, *optional*, defaults to `"error"`): What a failed self-check does. `"eager"` leaves the
            module as it is and logs one line per kind of module.
        verify (`bool`, *optional*, defaults to `True`): Whether to compare forward and backward on random input, once
            for each kind of module.
        inputs (`Mapping`, *optional*): Key -> function `(module, generator)` that returns the positional arguments for
            the self-check, for modules that take anything else than activations `(batch, length, width)`.

    Returns:
        [`KernelPatchHandle`]: Also a context manager.

    Raises:
        RefusedError: nothing matches a key, two keys claim one module, the model cannot be patched in its state, or a
            replacement does not compute what it replaces. The model is as it was.
        ValueError: `layers` or `inputs` name no layer, no source or no key, or an option would be ignored.

    Example:
    ```python
    with patch(model, {"RMSNorm": "liger", "*.mlp": MySwiGLU}) as handle:
        print(handle)
        trainer.train()
    ```
    """
    if on_mismatch not in ("error", "eager"):
        raise ValueError(f"on_mismatch={on_mismatch!r} must be 'error' or 'eager'.")
    refuse_idle("on_mismatch", on_mismatch, "error", verify, "on what the self-check finds: with verify=True")
    refuse_idle("inputs", inputs, None, verify, "in the self-check: with verify=True")
    _check_model(model)
    layers = _as_mapping(model, layers)
    if unknown := [key for key in inputs or {} if key not in layers]:
        raise ValueError(f"inputs has keys that `layers` has not: {unknown}.")
    checker = _Checker(model, inputs or {}) if verify else None
    handle = KernelPatchHandle()
    try:
        for key, value in layers.items():
            for alternatives in _units(key, value, _free_targets(model, key)):
                unit, note = _try_alternatives(key, alternatives, checker, on_mismatch)
                handle.rows += _rows(key, alternatives[0].targets, unit, note)
                if unit is not None:
                    for target, replacement in zip(unit.targets, unit.replacements, strict=True):
                        handle.hold(_claim(key, unit, target, replacement))
    except BaseException:
        handle.revert()
        raise
    for note in dict.fromkeys(row.note for row in handle.rows if row.layer == "eager"):
        logger.warning("left eager: %s", note)
    return handle


def _claim(key: Key, unit: Unit, target: Target, replacement: Callable[..., Any]) -> Claim:
    undo = None if unit.install is None else unit.install(target)
    path = f"{target.name}.{target.attribute}" if target.name else target.attribute
    return Claim(
        path,
        target.module,
        target.attribute,
        replacement,
        _shown(key),
        original=target.original,
        switch_off=unit.switch_off,
        undo=undo,
    )


def _as_mapping(model: nn.Module, layers: Any) -> Mapping[Key, Any]:
    if layers == "liger":
        return liger_layers(model)
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(f"layers={layers!r} must be a mapping with at least one key, or 'liger'.")
    return layers


def _rows(key: Key, targets: Sequence[Target], unit: Unit | None, note: str) -> list[PatchedModule]:
    layer = "eager" if unit is None else unit.label
    return [PatchedModule(t.name, type(t.module).__name__, _shown(key), layer, note) for t in targets]
