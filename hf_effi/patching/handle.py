"""
`PatchHandle`: change attributes of module instances, and put everything back exactly. No class is touched.

Every patch of this package is made of claims: a module says in its own `__dict__` who changed it, so that the next
patch, a pickle and [`unpatch`] find it, also where the handle is lost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, Self

from torch import nn

from ..errors import RefusedError

#: entries of a patched module's `__dict__` that say who patched it, gone with the patch. A module takes one patch of
#: what it computes, and one of what it keeps for its backward.
CLAIM, MODE_CLAIM = "_hf_effi_patch", "_hf_effi_layer_mode"
_SLOTS = (CLAIM, MODE_CLAIM)


class Claim:
    """
    One attribute of one module instance, replaced by a patch. It lies in the module too, where the next patch finds
    it.

    A copy of a patched model is patched as well. Pickled it would come back without the patch but with its claim.

    Args:
        path (`str`): Dotted path of the attribute.
        module (`nn.Module`): The instance.
        attribute (`str`): The entry of its `__dict__`.
        value: What is put there.
        key (`str`): The patch, as the user knows it.
        original (`Callable`, *optional*): What computed this before. By default what the attribute gives.
        switch_off (`Callable`, *optional*): Makes `value` compute the original where it cannot be taken away any more.
        undo (`Callable`, *optional*): Undoes what the patch changed beside the attribute.
    """

    slot = CLAIM

    def __init__(
        self,
        path: str,
        module: nn.Module,
        attribute: str,
        value: Any,
        key: str,
        *,
        original: Any = None,
        switch_off: Callable[[], None] | None = None,
        undo: Callable[[], None] | None = None,
    ) -> None:
        entries = module.__dict__
        self.path, self.module, self.attribute, self.value, self.key = path, module, attribute, value, key
        self.original = getattr(module, attribute, None) if original is None else original
        self.switch_off, self.undo = switch_off, undo
        self.existed, self.before = attribute in entries, entries.get(attribute)
        entries[self.slot] = self  # first, so that a pickle meets it first
        # Not setattr: a module given as a value must not become a submodule.
        entries[attribute] = value

    @property
    def in_place(self) -> bool:
        return self.module.__dict__.get(self.slot) is self

    def restore(self) -> str | None:
        """
        Put back what was there, unless that was done before; return what is in the way, if anything.

        What is in the way leaves the claim, for another try.
        """
        if not self.in_place:
            return None
        if self.undo is not None:
            self.undo()  # first: where it fails, as without room on the device, the claim stays too
            self.undo = None
        if problem := self._take_away():
            return problem
        del self.module.__dict__[self.slot]
        return None

    def _take_away(self) -> str | None:
        entries = self.module.__dict__
        if entries.get(self.attribute) is self.value:
            if self.existed:
                entries[self.attribute] = self.before
            else:
                del entries[self.attribute]
            return None
        # An accelerate hook was added or removed since: it moves the function between these two entries.
        moved = ("forward", "_old_forward")
        for attribute in moved:
            if self.attribute in moved and entries.get(attribute) is self.value:
                entries[attribute] = self.original
                return None
        if self.switch_off is not None:
            self.switch_off()
            return None
        return f"{self.path} was replaced by something else after this patch"

    def __deepcopy__(self, memo: dict[int, Any]) -> Claim:
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce__(self) -> NoReturn:
        raise RefusedError(
            f"{self.path} is patched by {self.key!r}, and a patched model cannot be pickled. Revert the patch first, "
            "or save the weights: save_pretrained() and state_dict() are the same with and without it."
        )


def check_free(path: str, module: nn.Module, slot: str = CLAIM) -> None:
    """
    Raise where a patch has this module already.

    Raises:
        RefusedError: with the path and the earlier patch.
    """
    claim = module.__dict__.get(slot)
    if claim is not None:
        raise RefusedError(
            f"{path or 'the model'} of {type(module).__name__} was replaced before, by {claim.key!r}. Revert that "
            "patch first (`unpatch(model)` where its handle is lost)."
        )


def restore_all(claims: Iterable[Claim]) -> None:
    """
    Take claims away, the last one first: all that can be, before anything is raised.

    Raises:
        RefusedError: something else replaced what was patched since, or several could not be undone. All others are
            restored. The error of a single `undo` is raised as it is.
    """
    problems, failure = [], None
    for claim in reversed(list(claims)):
        try:
            problem = claim.restore()
        except Exception as error:  # of an `undo`: the others still come off
            problem, failure = f"{claim.path}: {error}", error
        if problem:
            problems.append(problem)
    if failure is not None and len(problems) == 1:
        raise failure  # as it is: whoever frees memory and tries again looks for its kind
    if problems:
        raise RefusedError(
            "could not restore: "
            + "; ".join(problems)
            + ". Undo what was done later before this patch, and revert again."
        ) from failure


class PatchHandle:
    """
    What every patch of a model returns: what was replaced, and the way back.

    A patch acts at once; used as a context manager the handle reverts at the end of the block, also after an
    exception. A module takes one patch of a kind at a time, so that several handles on one model can be reverted in
    any order.

    Args:
        key (`str`): Name of the patch, for the error that a second patch of a module gives.

    Attributes:
        replaced (`tuple[str, ...]`): Dotted paths of the replaced attributes, such as `model.layers.0.mlp.forward`.
        active (`bool`): Whether anything of the patch is in place.

    Example:
    ```python
    with tile_mlp(model) as handle:
        print(handle.replaced)
        trainer.train()
    ```
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._claims: list[Claim] = []

    @property
    def replaced(self) -> tuple[str, ...]:
        return tuple(claim.path for claim in self._claims)

    @property
    def active(self) -> bool:
        return any(claim.in_place for claim in self._claims)

    def replace(self, name: str, module: nn.Module, attribute: str, value: Any) -> None:
        """
        Set `module.<attribute>` on the instance, beside the class's own.

        Raises:
            RefusedError: another patch has the module, or the instance such an attribute, as from an accelerate hook.
                What this handle replaced before is put back.
        """
        path = f"{name}.{attribute}" if name else attribute
        try:
            check_free(path, module)
            if attribute in module.__dict__:
                raise RefusedError(
                    f"{path} of {type(module).__name__} was replaced before, by an accelerate hook or other code. "
                    "Undo that first, or patch the model before it is given to a Trainer."
                )
        except RefusedError:
            self.revert()
            raise
        self.hold(Claim(path, module, attribute, value, self.key))

    def hold(self, claim: Claim) -> None:
        """Take a claim that is in place into the handle."""
        self._claims.append(claim)

    def revert(self) -> None:
        """
        Put the model back as it was; a second call does nothing.

        Raises:
            RefusedError: see [`restore_all`]. What could not be restored stays in the handle, for another try.
        """
        try:
            restore_all(self._claims)
        finally:
            self._claims = [claim for claim in self._claims if claim.in_place]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.revert()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.replaced) or 'reverted'})"


def claims_of(model: nn.Module) -> list[Claim]:
    """Return every claim on the modules of a model, whoever made it."""
    return [module.__dict__[slot] for module in model.modules() for slot in _SLOTS if slot in module.__dict__]


def unpatch(model: nn.Module) -> None:
    """
    Revert everything that this package changed on a model, for example after an interrupted run whose handles are
    lost: kernel patches, `tile_mlp`, `tile_loss`, `stream_layers`, `drop_layer_tokens` and the modes of layers.
    Without patches: nothing.

    Raises:
        RefusedError: something else replaced what was patched since. All other modules are restored.

    Example:
    ```python
    unpatch(trainer.model)
    ```
    """
    restore_all(claims_of(model))
