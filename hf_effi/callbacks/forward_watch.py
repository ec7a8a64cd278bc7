"""`ForwardWatch`: what a model is given while it trains, seen from a hook in front of it."""

from __future__ import annotations

from typing import Any

import torch

from ..functional.probes import is_probed


class ForwardWatch:
    """
    Count tokens in front of a model while it trains, and keep the layout of the first packed batch.

    Args:
        model (`torch.nn.Module`): Gets one pre-forward hook, until [`close`].
    """

    def __init__(self, model: torch.nn.Module) -> None:
        #: arguments of the first batch, if it was packed: `True` in place of a tensor
        self.packed: dict[str, Any] | None = None
        self._first = True
        self._forwarded, self._real = 0, 0
        self._handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def take(self) -> tuple[int, int]:
        """Return the tokens forwarded since the last call, and how many of them were no padding."""
        taken = self._forwarded, int(self._real)
        self._forwarded, self._real = 0, 0
        return taken

    def take_pad_ratio(self) -> float | None:
        """Return the share of padding since the last call; `None` when nothing was forwarded."""
        forwarded, real = self.take()
        return 1 - real / forwarded if forwarded else None

    def close(self) -> None:
        self._handle.remove()

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        # Generation, evaluation and a range test do not train; images and embeddings are no tokens.
        if (
            is_probed(module)
            or not torch.is_grad_enabled()
            or not isinstance(tokens, torch.Tensor)
            or tokens.is_floating_point()
        ):
            return
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        self._forwarded += tokens.numel()
        # Stays on the device: a number is only fetched when the Trainer logs.
        self._real = self._real + (mask.detach().ne(0).sum() if _fits(mask, tokens) else tokens.numel())
        if self._first and _fits(positions, tokens) and positions.eq(0).sum(dim=-1).max() > 1:
            self.packed = {name: isinstance(value, torch.Tensor) or value for name, value in kwargs.items()}
        self._first = False


def _fits(value: Any, tokens: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == tokens.shape
