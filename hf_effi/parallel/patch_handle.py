"""`PatchHandle`: change attributes of module instances and put everything back exactly. No class is touched."""

from __future__ import annotations

from typing import Any

from torch import nn


class PatchHandle:
    """
    What a patch of a model returns: what was replaced, and the way back.

    A patch acts at once; used as a context manager the handle reverts at the end of the block, also after an exception.

    Attributes:
        replaced (`tuple[str, ...]`): Dotted paths of the replaced attributes, such as `model.layers.0.mlp.forward`.

    Example:
    ```python
    with tile_mlp(model) as handle:
        print(handle.replaced)
        trainer.train()
    ```
    """

    def __init__(self) -> None:
        self._entries: list[tuple[str, nn.Module, str, Any]] = []

    @property
    def replaced(self) -> tuple[str, ...]:
        return tuple(path for path, *_ in self._entries)

    def replace(self, name: str, module: nn.Module, attribute: str, value: Any) -> None:
        """
        Set `module.<attribute>` on the instance, beside the class's own.

        Raises:
            ValueError: the instance has such an attribute already, from another patch or an accelerate hook.
        """
        path = f"{name}.{attribute}" if name else attribute
        if attribute in module.__dict__:
            self.revert()
            raise ValueError(
                f"{path} of {type(module).__name__} was replaced before, by another patch or an accelerate hook. Revert "
                "that one first, or patch the model before it is given to a Trainer."
            )
        module.__dict__[attribute] = value
        self._entries.append((path, module, attribute, value))

    def revert(self) -> None:
        """
        Put the model back as it was; a second call does nothing.

        Raises:
            RuntimeError: somebody replaced one of the attributes after this patch did.
        """
        while self._entries:
            path, module, attribute, value = self._entries[-1]
            if module.__dict__.get(attribute) is not value:
                raise RuntimeError(f"{path} was replaced again after this patch. Revert the later patch first.")
            del module.__dict__[attribute]
            self._entries.pop()

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.revert()

    def __repr__(self) -> str:
        return f"PatchHandle({', '.join(self.replaced) or 'reverted'})"
