"""`PatchHandle`: change attributes of module instances and put everything back exactly. No class is touched."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

from torch import nn

#: entry of a patched module's `__dict__` that says who patched it; gone with the patch
CLAIM = "_hf_effi_patch"


class Claim:
    """
    One attribute of one module instance, replaced by a patch. It lies in the module too, where the next patch finds it.

    A copy of a patched model is patched as well. Pickled it would come back without the patch but with its claim.

    Args:
        path (`str`): Dotted path of the attribute.
        module (`nn.Module`): The instance.
        attribute (`str`): The entry of its `__dict__`.
        value: What is put there.
        key (`str`): The patch, as the user knows it.
    """

    def __init__(self, path: str, module: nn.Module, attribute: str, value: Any, key: str) -> None:
        self.path, self.module, self.attribute, self.value, self.key = path, module, attribute, value, key
        module.__dict__[CLAIM] = self  # first, so that a pickle meets it first
        # Not setattr: a module given as a value must not become a submodule.
        module.__dict__[attribute] = value

    @property
    def in_place(self) -> bool:
        return self.module.__dict__.get(CLAIM) is self

    def restore(self) -> str | None:
        """Remove the entry, unless that was done before; return what is in the way, if anything."""
        if not self.in_place:
            return None
        if self.module.__dict__.get(self.attribute) is not self.value:
            return f"{self.path} was replaced again after this patch"
        del self.module.__dict__[self.attribute], self.module.__dict__[CLAIM]
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Claim:
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce__(self) -> NoReturn:
        raise ValueError(
            f"{self.path} is patched by {self.key!r}, and a patched model cannot be pickled. Revert the patch first, or "
            "save the weights: save_pretrained() and state_dict() are the same with and without it."
        )


def check_free(path: str, module: nn.Module) -> None:
    """
    Raise where a patch has this module already.

    Raises:
        ValueError: with the path and the earlier patch.
    """
    claim = module.__dict__.get(CLAIM)
    if claim is not None:
        raise ValueError(
            f"{path} of {type(module).__name__} was replaced before, by {claim.key!r}. Revert that patch first "
            "(`unpatch(model)` where its handle is lost)."
        )


class PatchHandle:
    """
    What a patch of a model returns: what was replaced, and the way back.

    A patch acts at once; used as a context manager the handle reverts at the end of the block, also after an exception.

    Args:
        key (`str`): Name of the patch, for the error that a second patch of a module gives.

    Attributes:
        replaced (`tuple[str, ...]`): Dotted paths of the replaced attributes, such as `model.layers.0.mlp.forward`.

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

    def replace(self, name: str, module: nn.Module, attribute: str, value: Any) -> None:
        """
        Set `module.<attribute>` on the instance, beside the class's own.

        Raises:
            ValueError: another patch has the module, or the instance such an attribute, as from an accelerate hook. What
                this handle replaced before is put back.
        """
        path = f"{name}.{attribute}" if name else attribute
        try:
            check_free(path, module)
            if attribute in module.__dict__:
                raise ValueError(
                    f"{path} of {type(module).__name__} was replaced before, by an accelerate hook or other code. Undo "
                    "that first, or patch the model before it is given to a Trainer."
                )
        except ValueError:
            self.revert()
            raise
        self._claims.append(Claim(path, module, attribute, value, self.key))

    def revert(self) -> None:
        """
        Put the model back as it was; a second call does nothing.

        Raises:
            RuntimeError: somebody replaced one of the attributes after this patch did.
        """
        while self._claims:
            if problem := self._claims[-1].restore():
                raise RuntimeError(f"{problem}. Revert the later patch first.")
            self._claims.pop()

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.revert()

    def __repr__(self) -> str:
        return f"PatchHandle({', '.join(self.replaced) or 'reverted'})"
