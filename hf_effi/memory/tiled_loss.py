"""Next-token loss over tiles of tokens: the logits of one tile exist at a time, their gradient is taken in the
forward.

TRL's trainers and Liger have such a loss; a plain `transformers.Trainer` has none. [`tile_loss`] gives it one.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from .._compat import chunked_linear_cross_entropy
from ..errors import RefusedError
from ..functional.sequence import logit_rows
from ..patching import Results, call, compare, gradients, remembered, sharded_by_zero3, tiny_tokens
from ..patching._inputs import _CannotLook
from ..patching.handle import PatchHandle, check_free

IGNORED = -100
Step = Callable[[Any], Any]


class _TiledSum(torch.autograd.Function):
    """
    `sum_tiles loss(tile)` with the gradients of `hidden` and of the parameters accumulated while the tile is there.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, loss: Callable[..., Tensor], rows: int, *parameters: Tensor
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # In half precision a sum of many tiles would lose what each adds.
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        grad_hidden, total = torch.zeros_like(hidden), torch.zeros((), dtype=wide, device=hidden.device)
        for tile, target, place in zip(*(t.split(rows) for t in (hidden, labels, grad_hidden)), strict=True):
            tile = tile.detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.enable_grad():
                value = loss(tile, target)
            wanted = [tile, *parameters] if tile.requires_grad else list(parameters)
            grads = list(torch.autograd.grad(value, wanted, allow_unused=True))
            if tile.requires_grad:
                place.copy_(grads.pop(0))
            for total_grad, grad in zip(sums, grads, strict=True):
                if grad is not None:
                    total_grad.add_(grad)
            total += value.detach()
        ctx.save_for_backward(grad_hidden, *(s.to(p.dtype) for s, p in zip(sums, parameters, strict=True)))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, *sums = (saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
        return grad_hidden, None, None, None, *sums


def tiled_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    head: nn.Module,
    *,
    num_items_in_batch: Tensor | int | None = None,
    transform: Step | None = None,
    num_shards: int | None = None,
) -> Tensor:
    """
    `sum_i CE(transform(head(hidden_i)), labels_i) / n` over the tokens with a label, a tile of tokens at a time.

    Three matrix products a tile, as without tiles; tokens labelled -100 take part in none. A plain linear head in fp32
    or fp64 goes through `torch.nn.functional.linear_cross_entropy` where torch has it (2.13). In half precision that
    one returns the loss in half precision too, and it knows no softcap and no LoRA: these take tiles of our own, in
    which the loss and the sums over tiles are fp32.

    Args:
        hidden (`torch.Tensor`): `(..., hidden_size)`, the input of the head.
        labels (`torch.Tensor`): `(...)`, the token that each position predicts (shifted already), or -100.
        head (`torch.nn.Module`): Gives logits `(..., vocab_size)`; frozen, tied, with bias or with LoRA.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): `n`: labelled tokens of all micro-batches and ranks
            that are accumulated. Default: those of this call, so that without any the loss is NaN, as torch's mean is.
        transform (`Callable`, *optional*): Acts on the logits of a tile, for example a softcap.
        num_shards (`int`, *optional*): Tiles, at least 1. Default: as many as keep a tile's fp32 logits below 1 GiB.

    Returns:
        `torch.Tensor`: A scalar. It has its gradients inside; a second derivative is not possible.

    Raises:
        ValueError: shapes that do not belong together, or a bad `num_shards`.
        RefusedError: a head that is sharded at this moment.

    Example:
    ```python
    >>> head = torch.nn.Linear(2, 3, bias=False)
    >>> _ = torch.nn.init.zeros_(head.weight)
    >>> tiled_cross_entropy(torch.ones(4, 2), torch.tensor([0, 1, 2, -100]), head).item()  # log(3)
    1.0986123085021973
    ```
    """
    _check_shards(num_shards)
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)}: one label a position is needed."
        )
    if any(isinstance(p, DTensor) for p in head.parameters()) or sharded_by_zero3(head.parameters()):
        raise RefusedError(
            "The head's weights are sharded outside of its forward (ZeRO-3, or FSDP around the head alone). Use "
            "ZeRO-2, DDP, or FSDP2 around decoder layers; or leave tile_loss out."
        )
    chosen = labels != IGNORED
    hidden, labels = hidden[chosen], labels[chosen]
    rows = logit_rows(labels.numel(), _vocab_size(head), num_shards)
    plain = type(head) is nn.Linear and transform is None and hidden.dtype in (torch.float32, torch.float64)
    if (
        plain
        and labels.numel()
        and not torch.is_autocast_enabled(hidden.device.type)
        and chunked_linear_cross_entropy()
    ):
        total = chunked_linear_cross_entropy()(hidden, head.weight, labels, head.bias, rows)
    else:
        total = _own_tiles(hidden, labels, head, transform, rows)
    return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


def _own_tiles(hidden: Tensor, labels: Tensor, head: nn.Module, transform: Step | None, rows: int) -> Tensor:
    device, forward = hidden.device.type, type(head).forward

    def loss(tile: Tensor, target: Tensor) -> Tensor:
        # Autocast's cache may hold a copy of the weights that was made without a graph.
        with torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
        ):
            logits = forward(head, tile)
            logits = logits if transform is None else transform(logits)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return F.cross_entropy(logits, target, reduction="sum")

    if not torch.is_grad_enabled():
        zero = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        return sum((loss(*tile) for tile in zip(hidden.split(rows), labels.split(rows), strict=True)), zero)
    return _TiledSum.apply(hidden, labels, loss, rows, *(p for p in head.parameters() if p.requires_grad))


def _vocab_size(head: nn.Module) -> int:
    return getattr(head, "out_features", None) or next(head.parameters()).shape[0]


def _check_shards(num_shards: Any) -> None:
    if num_shards is not None and (not isinstance(num_shards, int) or isinstance(num_shards, bool) or num_shards < 1):
        raise ValueError(f"num_shards={num_shards!r} must be an integer of at least 1, or None for tiles of 1 GiB.")


# --- on a model ------------------------------------------------------------------------------------------------------


class _LogitsAsked(AttributeError):
    """Logits that are never made were asked for something; an AttributeError, so that `hasattr` gets its answer."""


class _DeferredLogits:
    """
    What the head returns in training: its input, and what the model did to the logits before it asked for the loss.

    Models scale or softcap their logits in many ways. Recording the operations keeps each exact without a list of
    them.
    """

    def __init__(self, hidden: Tensor, steps: tuple[Step, ...] = ()) -> None:
        self.hidden, self.steps = hidden, steps

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def then(self, step: Step) -> _DeferredLogits:
        return _DeferredLogits(self.hidden, (*self.steps, step))

    def transform(self, logits: Any) -> Any:
        for step in self.steps:
            logits = step(logits)
        return logits

    def float(self) -> _DeferredLogits:
        return self.then(lambda logits: logits.float())

    def contiguous(self) -> _DeferredLogits:
        return self

    def tanh(self) -> _DeferredLogits:
        return self.then(torch.tanh)

    def __mul__(self, factor: Any) -> _DeferredLogits:
        return self.then(lambda logits: logits * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> _DeferredLogits:
        return self.then(lambda logits: logits / divisor)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> _DeferredLogits:
        if function is torch.tanh and not kwargs:
            return args[0].then(torch.tanh)
        cls._refuse(function.__name__)

    def __getitem__(self, key: Any) -> NoReturn:
        self._refuse("[...]")

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse(name)

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        asker = _model_that_asks()
        fix = (
            f"{asker} makes a loss of its own from them in its forward: leave tile_loss out for it."
            if asker
            else "It needs the labels in the forward: leave out label_smoothing_factor and compute_loss_func, or "
            "revert tile_loss."
        )
        raise _LogitsAsked(
            f"tile_loss is on, so that a training forward has no logits, and {what!r} was asked of them. {fix}",
            name=what,
        )


def _model_that_asks() -> str | None:
    """Return the class of the model whose own forward is running, or `None`: for a message only."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "forward" and isinstance(module := frame.f_locals.get("self"), nn.Module):
            return type(module).__name__
        frame = frame.f_back
    return None


def tile_loss(model: nn.Module, num_shards: int | None = None, *, verify: bool = True) -> PatchHandle:
    """
    Compute a causal language model's training loss by [`tiled_cross_entropy`], without ever making its logits.

    In training, `model(input_ids, labels=...)` returns the same loss as before, with `num_items_in_batch` and
    `shift_labels` as the Trainer passes them; what the model does to its logits (softcap, scale) happens in each tile.
    `outputs.logits` cannot be used then. In evaluation nothing is changed.

    TRL's trainers need none of this: SFT, DPO, KTO, GRPO and RLOO have a fused head by default.

    Args:
        model (`torch.nn.Module`): A causal language model of transformers, plain or wrapped by PEFT.
        num_shards (`int`, *optional*): As in [`tiled_cross_entropy`].
        verify (`bool`, *optional*, defaults to `True`): Whether to compare loss and gradients on a few tokens, with
            and without; `False` for a model whose weights are sharded already, on your own account.

    Returns:
        [`PatchHandle`]: `handle.revert()`, or the end of a `with` block, undoes it.

    Raises:
        ValueError: a bad `num_shards`.
        RefusedError: no causal language model, TRL's fused head, another loss than transformers' for causal models, or
            a forward that uses its logits or computes its loss in a way of its own.

    Example:
    ```python
    Trainer(model, args, train_dataset=rows, callbacks=[PatchCallback(tile_mlp, tile_loss)]).train()
    ```
    """
    _check_shards(num_shards)
    name, causal, head = _find_head(model)
    prefix = f"{name}." if name else ""
    check_free(f"{prefix}_loss_function", causal)
    original = causal.loss_function
    if original is not ForCausalLMLoss:  # a loss of the user may have the same name
        raise RefusedError(
            f"tile_loss replaces transformers' ForCausalLMLoss; {type(causal).__name__} has {original!r}."
        )
    if "fused_lm_head" in getattr(getattr(causal.__dict__.get("forward"), "__code__", None), "co_varnames", ()):
        raise RefusedError("TRL has fused this model's head already, which does the same. Leave tile_loss out.")
    head_name = prefix + next(path for path, module in causal.named_modules() if module is head)

    def patched() -> PatchHandle:
        handle = PatchHandle("tile_loss")
        handle.replace(head_name, head, "forward", MethodType(_defer, head))
        loss = functools.partial(_causal_loss, original=original, head=head, num_shards=num_shards)
        handle.replace(name, causal, "_loss_function", loss)
        return handle

    patched().revert()  # where another patch has the head, that is said first
    if verify:
        _check_equal(model, causal, patched)
    return patched()


def _check_equal(model: nn.Module, causal: nn.Module, patched: Callable[[], PatchHandle]) -> None:
    """Compare loss and gradients on a few tokens, one row of them padded, with and without the patch."""
    kind = type(causal).__name__

    def step(model: nn.Module, tiled: bool) -> Results:
        tokens = tiny_tokens(model, 2, 8)
        mask = torch.ones_like(tokens)
        mask[1, 6:] = 0
        labels = tokens.masked_fill(mask == 0, IGNORED)
        with patched() if tiled else contextlib.nullcontext():
            try:
                loss = call(model, tokens, mask, labels=labels).loss
            except _LogitsAsked as error:
                raise _CannotLook(f"its forward uses the logits in a way of its own ({error.name!r})") from error
        if loss is None:
            raise _CannotLook("it returns no loss for labels")
        return {"the loss": loss, **gradients(model, loss)}

    plain, ours = (functools.partial(step, tiled=value) for value in (False, True))
    found = remembered(model, "tile_loss", lambda: compare(model, plain, ours))
    if not found.equal:
        fix = "" if found.looked else ", patch before the weights are sharded, or pass verify=False"
        raise RefusedError(
            f"tile_loss would not give the loss that {kind} gives without it: {found}. Leave it out{fix}."
        )


def _find_head(model: nn.Module) -> tuple[str, Any, nn.Module]:
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and (head := module.get_output_embeddings()) is not None:
            return name, module, head
    raise RefusedError(
        f"{type(model).__name__} is no causal language model: none of its modules has output embeddings."
    )


def _defer(head: nn.Module, hidden: Tensor) -> Any:
    if head.training and torch.is_grad_enabled():
        return _DeferredLogits(hidden)
    return type(head).forward(head, hidden)


def _causal_loss(
    logits: Any,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: Tensor | None = None,
    *,
    original: Callable[..., Tensor],
    head: nn.Module,
    num_shards: int | None,
    **kwargs: Any,
) -> Tensor:
    """`ForCausalLMLoss` on deferred logits; on real ones, the original."""
    if not isinstance(logits, _DeferredLogits):
        return original(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if ignore_index != IGNORED:
        raise RefusedError(f"ignore_index={ignore_index}: tile_loss knows {IGNORED} only.")
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(logits.hidden.device)
    return tiled_cross_entropy(
        logits.hidden,
        shift_labels.to(logits.hidden.device),
        head,
        num_items_in_batch=num_items_in_batch,
        transform=logits.transform if logits.steps else None,
        num_shards=num_shards,
    )
