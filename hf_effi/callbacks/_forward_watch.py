"""`ForwardWatch`: what a model is given while it trains, seen from a hook in front of it."""

from __future__ import annotations

import logging
from typing import Any

import torch

from ..functional.accounting import count_tokens
from ..functional.probes import is_probed
from .observer import describe

logger = logging.getLogger(__name__)
#: what the losses of torch and transformers leave out
_IGNORED = -100


class ForwardWatch:
    """
    Count tokens and labels in front of a model while it trains, and look for packed batches.

    Counts stay on the device until somebody takes them.

    Args:
        model (`torch.nn.Module`): Gets one pre-forward hook, until [`close`].
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._layouts: dict[frozenset[str], tuple[dict[str, Any], Any]] = {}
        self._forwarded, self._real = 0, 0
        self._labels, self._learned = 0, 0
        self._looks_for_packed = True
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

    def take_label_ratio(self) -> float | None:
        """Return the share of labels that are not -100 since the last call; `None` when none were passed."""
        labels, learned = self._labels, int(self._learned)
        self._labels, self._learned = 0, 0
        return learned / labels if labels else None

    def take_packed(self) -> dict[str, Any] | None:
        """
        Return the arguments of a packed batch seen so far, `True` in place of a tensor, and look for no more of them.

        `None` while there was none.
        """
        for layout, packed in self._layouts.values():
            if bool(packed):
                self._looks_for_packed = False
                self._layouts.clear()
                return layout
        return None

    def close(self) -> None:
        self._handle.remove()

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self._look(module, args, kwargs)
        except Exception as error:  # whatever a model may be given: who watches must not end the run
            self.close()
            logger.warning(f"The inputs of {type(module).__name__} are no longer watched: {describe(error)}")

    def _look(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        # Generation, evaluation and a range test do not train; images and embeddings are no tokens.
        if (
            is_probed(module)
            or not torch.is_grad_enabled()
            or not isinstance(tokens, torch.Tensor)
            or tokens.is_floating_point()
        ):
            return
        mask, positions, labels = (kwargs.get(name) for name in ("attention_mask", "position_ids", "labels"))
        forwarded, real = count_tokens(tokens, mask if isinstance(mask, torch.Tensor) else None)
        self._forwarded, self._real = self._forwarded + forwarded, self._real + real
        if isinstance(labels, torch.Tensor) and not labels.is_floating_point():
            self._labels += labels.numel()
            self._learned = self._learned + labels.ne(_IGNORED).sum()
        if self._looks_for_packed and _fits(positions, tokens) and tokens.dim() == 2:
            packed = _starts_again(positions, mask if _fits(mask, tokens) else None)
            layout = {name: isinstance(value, torch.Tensor) or value for name, value in kwargs.items()}
            key = frozenset(name for name, value in layout.items() if value is True)
            first, seen = self._layouts.get(key, (layout, False))
            self._layouts[key] = first, packed | seen


def _starts_again(positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return whether a position is 0 behind another token that counts; positions of padding do not."""
    again = positions[:, 1:] == 0
    if mask is not None:
        again = again & mask[:, 1:].ne(0) & mask[:, :-1].ne(0)
    return again.any()


def _fits(value: Any, tokens: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == tokens.shape
