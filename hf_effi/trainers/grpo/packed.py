"""Rows end to end in one flat row: no padding, and a prompt that rows share once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from ...attention.switch import switched_attention
from ...functional.forward_costs import LAYOUTS, ForwardCosts, RowLengths
from ...functional.shared_prefix import SharedPrefixLayout, plan_shared_prefix

logger = logging.get_logger(__name__)

#: what one call of attention costs beside its arithmetic on a CPU, forward and backward, in floating-point operations
_CALL_OPERATIONS = 1.5e7


@dataclass(frozen=True)
class FlatRows:
    """
    The rows of a micro-batch, read once from the device.

    Args:
        prompts, completions (`list[list[int]]`): Token ids of each row without padding.
    """

    prompts: list[list[int]]
    completions: list[list[int]]

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor, prompt_columns: int) -> FlatRows:
        """Return the real tokens on either side of a column."""
        ids, mask = input_ids.tolist(), attention_mask.tolist()
        real = [[token for token, is_real in zip(*row, strict=True) if is_real] for row in zip(ids, mask, strict=True)]
        prompts = attention_mask[:, :prompt_columns].sum(1).tolist()
        return cls(
            [row[:begin] for row, begin in zip(real, prompts, strict=True)],
            [row[begin:] for row, begin in zip(real, prompts, strict=True)],
        )

    def lengths(self) -> list[RowLengths]:
        """Return what a planner needs of each row."""
        return [
            RowLengths(tuple(prompt), len(prompt), len(completion))
            for prompt, completion in zip(self.prompts, self.completions, strict=True)
        ]


class PackedForward:
    """
    Choose the layout of a forward by its cost, and run the flat ones.

    Args:
        layouts (`tuple[str, ...]`): What may be chosen, of `LAYOUTS`.
        costs ([`ForwardCosts`]): Of the model and the device.
        reach (`int`, *optional*): The model's shortest window: rows longer than it cannot share a prompt.
        autocast (`Callable`): The trainer's context for a forward.
        say (`bool`, *optional*, defaults to `False`): Whether this process logs the first choice.
    """

    def __init__(
        self,
        layouts: tuple[str, ...],
        costs: ForwardCosts,
        reach: int | None,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
        say: bool = False,
    ) -> None:
        self.layouts, self._costs, self._reach, self._autocast, self._say = layouts, costs, reach, autocast, say
        self._held: contextlib.ExitStack | None = None

    # --- which layout -----------------------------------------------------------------------------------------------

    def cost(self, layout: str, rows: Sequence[RowLengths], buckets: int) -> float:
        """
        Return what rows cost in a layout, see [`ForwardCosts`].

        Args:
            layout (`str`): Of `LAYOUTS`.
            rows (`Sequence[RowLengths]`): The rows of one forward.
            buckets (`int`): In how many buckets `trim` would split them.
        """
        may = layout != "share" or self.may_share(rows)
        return self._costs.of(layout if may else "pack", rows, buckets)

    def choose(self, rows: Sequence[RowLengths], buckets: int) -> str:
        """Return the cheapest layout for some rows; of equal ones the first of `LAYOUTS`."""
        prices = {layout: self.cost(layout, rows, buckets) for layout in LAYOUTS if layout in self.layouts}
        chosen = min(prices, key=lambda layout: prices[layout])
        if self._say:
            self._say = False
            told = ", ".join(f"{layout} {price:,.0f}" for layout, price in prices.items())
            logger.info(f"The first micro-batch is forwarded by {chosen!r}. Cost in tokens: {told}.")
        return chosen

    def may_share(self, rows: Sequence[RowLengths]) -> bool:
        """Whether no row of a forward is longer than the model's shortest window."""
        return self._reach is None or max((row.tokens for row in rows), default=0) <= self._reach

    # --- the forward ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def holding_attention(self) -> Iterator[None]:
        """
        Let the first flat forward in this block switch the attention of its model, until the block ends.

        A backward with gradient checkpointing runs layers again, after the forward has returned.
        """
        with contextlib.ExitStack() as self._held:
            try:
                yield
            finally:
                self._held = None

    def __call__(
        self, model: nn.Module, rows: FlatRows, width: int, *, share: bool, compute_entropy: bool
    ) -> tuple[Tensor, Tensor | None, int]:
        """
        Return log-probs and entropies `(rows, width)`, 0 past the end of a completion, and the tokens forwarded.

        Args:
            model (`nn.Module`): With TRL's fused head.
            rows ([`FlatRows`]): At least one.
            width (`int`): Columns of the completions.
            share (`bool`): Whether each prompt comes once.
            compute_entropy (`bool`): As TRL's forward is asked.
        """
        layout = plan_shared_prefix(
            rows.prompts, [len(c) for c in rows.completions], share=share and self.may_share(rows.lengths())
        )
        device = next(model.parameters()).device
        with contextlib.ExitStack() as now:
            stack = now if self._held is None or not torch.is_grad_enabled() else self._held
            stack.enter_context(switched_attention(model))
            with self._autocast():
                log_probs, entropies = flat_scores(model, layout, rows, device)
        logps = layout.to_completions(log_probs, width)
        if not compute_entropy or entropies is None:
            return logps, None, layout.num_tokens
        return logps, layout.to_completions(entropies, width), layout.num_tokens


def flat_scores(
    model: nn.Module, layout: SharedPrefixLayout, rows: FlatRows, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """
    Return log-prob and entropy at each place of the flat row, both `(tokens,)`; entry `t` scores token `t + 1`.

    Args:
        model (`nn.Module`): With TRL's fused head, and an attention that reads the layout.
        layout ([`SharedPrefixLayout`]): Of `rows`.
        rows ([`FlatRows`]): The tokens.
        device (`torch.device`): Of the model's inputs.
    """
    sequences = [prompt + completion for prompt, completion in zip(rows.prompts, rows.completions, strict=True)]
    inputs = layout.model_inputs(sequences)
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    outputs = model(**inputs, fused_lm_head=True)
    entropies = outputs.entropy
    return F.pad(outputs.log_probs[0], (0, 1)), None if entropies is None else F.pad(entropies[0], (0, 1))


def costs_of(model: nn.Module, device: torch.device) -> ForwardCosts:
    """
    Return the costs of a model's forward: from the weights of its layers, its width, and the kind of device.

    Args:
        model (`nn.Module`): The unwrapped policy.
        device (`torch.device`): On CUDA one kernel takes all segments; elsewhere each is a call.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = max(1, int(getattr(text, "num_hidden_layers", 1)))
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings |= {id(p) for p in head.parameters()} if head is not None else set()
    weights = sum(_size(p) for p in model.parameters() if id(p) not in embeddings) / layers
    weights = max(1.0, weights)
    width = int(getattr(text, "hidden_size", 0) or 0)
    per_call = 0.0 if device.type == "cuda" else _CALL_OPERATIONS / (6 * weights)
    return ForwardCosts(per_pair=2 * width / weights, per_call=per_call)


def _size(parameter: nn.Parameter) -> int:
    """Elements of a weight; of one packed into 4 bits, those that it stands for."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
