"""`FusedLMHead`: [`hf_effi.kernels.lm_head.lm_head_log_probs`] in the place of the head that TRL's trainers add."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from ..patching import sharded_by_zero3
from ._layers import Unit, with_globals
from ._targets import TRL_HEAD_FUNCTION, Target
from ._verify import _LayerRefusedError
from .lm_head import LMHeadCounters, LMHeadOutput, check_filter, lm_head_log_probs


class FusedLMHead:
    """
    A value of [`~hf_effi.patch`] for the key `"LMHead"`: scores labels for the fused head of TRL's trainers.

    SFT, DPO, KTO, GRPO and RLOO trainers add that head to their model when they are built: patch `trainer.model` after
    that, before `train()`. Positions without a label are not projected, on any device. The weight's gradient is summed
    in fp32 a tile at a time. TRL's own function runs inside a compiled graph.

    Args:
        column_eps, filter_weight, grad_in_forward: As in [`~hf_effi.kernels.lm_head.lm_head_log_probs`].
            `grad_in_forward=True` is for `SFTTrainer` with `loss_type="nll"`.

    Attributes:
        counters (`LMHeadCounters`): Rows and columns that the backwards so far left out.

    Raises:
        ValueError: a setting is out of range.
        RefusedError: when applied or when called: the weight is sharded by ZeRO-3.

    Example:
    ```python
    trainer = SFTTrainer(model, args, train_dataset=rows)
    head = FusedLMHead(grad_in_forward=True)
    with patch(trainer.model, {"LMHead": head}):
        trainer.train()
    ```
    """

    def __init__(self, *, column_eps: float = 0.0, filter_weight: bool = False, grad_in_forward: bool = False) -> None:
        check_filter(column_eps, filter_weight)
        self.counters = LMHeadCounters()
        self._options = {
            "column_eps": column_eps,
            "filter_weight": filter_weight,
            "grad_in_forward": grad_in_forward,
            "counters": self.counters,
        }

    def units(self, targets: Sequence[Target]) -> list[Unit]:
        """Return one unit for each model with TRL's head."""
        return [self._unit(target) for target in targets]

    def _unit(self, target: Target) -> Unit:
        stock = target.original.__func__
        theirs = stock.__globals__[TRL_HEAD_FUNCTION]
        # `_use_triton` decides there whether positions without a label are dropped first.
        changed = {TRL_HEAD_FUNCTION: _Function(self._score, theirs), "_use_triton": lambda device: True}
        running = {"forward": with_globals(stock, **changed)}

        @functools.wraps(stock)
        def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return running["forward"](model, *args, **kwargs)

        head = target.module.get_output_embeddings()
        _check_whole(head.weight)
        return Unit(
            (target,),
            (types.MethodType(forward, target.module),),
            original=functools.partial(_probe, theirs.apply, head),
            replacement=functools.partial(
                _probe, functools.partial(self._score, **_EXACT, counters=LMHeadCounters()), head
            ),
            modules=(head,),
            label="FusedLMHead",
            input_of=head,
            switch_off=lambda: running.update(forward=stock),
        )

    def _score(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
        **options: Any,
    ) -> LMHeadOutput:
        """Take the arguments of TRL's function, of which `chunk_size` is its own tile, and options of ours."""
        _check_whole(weight)
        return lm_head_log_probs(
            hidden,
            weight,
            targets,
            bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            outputs=tuple(name for name in outputs if name != "log_probs"),
            **{**self._options, **options},
        )


#: The self-check is of the arithmetic; the column filter has a bound of its own.
_EXACT = {"column_eps": 0.0, "filter_weight": False}


class _Function:
    """Stands for an autograd Function: `apply` is all that is called of it."""

    def __init__(self, apply: Callable[..., Any], original: Any) -> None:
        self._apply, self._original = apply, original

    def apply(self, *args: Any) -> Any:
        return self._original.apply(*args) if torch.compiler.is_compiling() else self._apply(*args)


def _check_whole(weight: Tensor) -> None:
    # In such a run TRL's own head gathers the weight, already in the self-check before the engine has the model.
    if sharded_by_zero3([weight]) or is_deepspeed_zero3_enabled():
        raise _LayerRefusedError(
            "FusedLMHead reads the head's weight outside of the head's own call, where ZeRO-3 has a shard of it. Use "
            "ZeRO-2, FSDP2 or DDP, or remove 'LMHead'."
        )


def _probe(apply: Callable[..., Any], head: nn.Module, hidden: Tensor) -> tuple[Tensor, ...]:
    """Score some labels, with every kind of scaling, for the self-check; also under one upstream gradient for all."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    targets = torch.arange(rows.shape[0], device=rows.device) % head.weight.shape[0]
    arguments = (rows, head.weight, head.bias, targets, 0.7, head.weight.shape[0], 5.0, 0.5)
    log_probs, entropy, *_ = apply(*arguments, ("log_probs", "entropy"))
    return log_probs, entropy, apply(*arguments, ("log_probs",))[0].sum()
