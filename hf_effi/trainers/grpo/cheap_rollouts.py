"""`rollout_savings`: which of them a run may use, and where they stand around TRL's generation of a turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.utils import logging

from ...errors import RefusedError
from ...patching import (
    Finding,
    Results,
    agreed,
    compare,
    draws_random_numbers,
    rows_see_each_other,
    set_mode,
    tiny_tokens_or_none,
)
from ...patching.questions import short_reach
from .accounting import StepAccounting
from .config import ROLLOUT_SAVINGS, parse_rollout_savings
from .decoding import SparseDecoding, refused_setting
from .generation import Around, Turn
from .host import Host
from .settings import GRPOSettings

logger = logging.get_logger(__name__)

#: Prompts of the probe by length, and at which token each of its rows ends: rows 0 and 2 have one prompt, as 1 and 4.
_PROMPTS = ((0, 6), (1, 3), (0, 6), (2, 5), (1, 3))
_ENDS = (3, 0, 2, 3, 1)


class CheapRollouts:
    """
    An [`Around`](generation.py) of TRL's turn, within which the model generates by [`SparseDecoding`].

    In training and in evaluation. The turn itself (padding, unwrapping, gathering of weights) stays TRL's.

    Args:
        host ([`Host`]): The trainer.
        savings (`tuple[str, ...]`): Of `ROLLOUT_SAVINGS`.
        accounting ([`StepAccounting`]): Is told what a generation of the training saved.
    """

    def __init__(self, host: Host, savings: tuple[str, ...], accounting: StepAccounting) -> None:
        self.savings = savings
        self._host, self._accounting = host, accounting
        self._decoding = SparseDecoding("prefill" in savings, "compact" in savings)

    def __call__(self, turn: Turn, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        try:
            with self._decoding.within(self._host.accelerator.unwrap_model(self._host.model)):
                return turn(prompt_ids, *args, **kwargs)
        finally:
            if self._host.model.training:
                self._accounting.counts.update(self._decoding.counts)
            self._decoding.counts.clear()


def cheap_rollouts(host: Host, settings: GRPOSettings, accounting: StepAccounting) -> list[Around]:
    """
    Return what stands around the generation of a turn: one object, or none where `rollout_savings` is off.

    Args:
        host ([`Host`]): The trainer, with its model loaded; every rank asks.
        settings ([`GRPOSettings`]): `rollout_savings` names some, leaves the choice, or is off.

    Raises:
        RefusedError: a saving that is named would change what is generated, with the reason; any choice but `"off"`
            where TRL generates otherwise than by `generate`.
    """
    wanted = parse_rollout_savings(settings.rollout_savings)
    if wanted == ():
        return []
    if host.rollout_func is not None:
        raise RefusedError(
            f"rollout_savings={settings.rollout_savings!r} acts in the model's `generate`, in whose place the "
            "trainer's rollout_func generates. Drop one of the two."
        )
    names = ROLLOUT_SAVINGS if wanted is None else wanted
    reason = _refused(host, names)
    if reason is None:
        return [CheapRollouts(host, names, accounting)]
    if wanted is not None:
        raise RefusedError(f"rollout_savings={settings.rollout_savings!r}: {reason}")
    if host.accelerator.is_main_process:
        logger.warning(f"rollout_savings='auto' saves nothing: {reason}")
    return []


def _refused(host: Host, names: tuple[str, ...]) -> str | None:
    """Return why this run cannot use the savings, in a sentence with the fix, or `None`."""
    if host._is_vlm:
        return (
            "rows of a model of images and text carry pixels, which cannot be taken apart. Use rollout_savings='off'."
        )
    if reason := refused_setting(host.generation_config):
        return reason
    model: Any = host.accelerator.unwrap_model(host.model)
    if reason := refused_setting(getattr(model, "generation_config", None)):
        return f"of the model's own generation_config: {reason}"
    fix = "Use rollout_savings='off'."
    if not (found := agreed(draws_random_numbers(model))).equal:
        text = "the model draws random numbers in training, which rows would share or draw otherwise"
        return f"{text}: {found}. Set disable_dropout=True where it is dropout. {fix}"
    if not (found := agreed(rows_see_each_other(model))).equal:
        return f"the result of a row depends on the other rows: {found}. {fix}"
    if not (found := agreed(same_tokens(model, names, host.generation_config.use_cache))).equal:
        return f"tokens that are generated like that differ from those of `generate`: {found}. {fix}"
    return None


def same_tokens(model: nn.Module, names: tuple[str, ...], use_cache: bool | None = True) -> Finding:
    """
    Compare `generate` with [`SparseDecoding`] on a few tokens: equal and unequal prompts, rows of unequal length.

    Both are led to the same tokens, and what is compared are the logits of each of them.

    Args:
        model (`nn.Module`): The unwrapped policy.
        names (`tuple[str, ...]`): Of `ROLLOUT_SAVINGS`.
        use_cache (`bool`, *optional*, defaults to `True`): As the run has it.
    """
    tokens = tiny_tokens_or_none(model, 3 + len(_PROMPTS), 8)
    if isinstance(tokens, Finding):
        return tokens
    width = max(length for _, length in _PROMPTS)
    ids = tokens[:1, :1].expand(len(_PROMPTS), width).clone()
    mask = torch.zeros_like(ids)
    for row, (prompt, length) in enumerate(_PROMPTS):
        ids[row, width - length :], mask[row, width - length :] = tokens[prompt, :length], 1
    end = int(tokens[0, 7])
    other = int(tokens[tokens != end][0]) if (tokens != end).any() else end
    led_to = tokens[3:].masked_fill(tokens[3:] == end, other)  # a small vocabulary comes back to it

    def generated(model: Any, decoding: SparseDecoding | None) -> Results:
        set_mode(model, True)
        model.generation_config = GenerationConfig(pad_token_id=int(ids[0, 0]), eos_token_id=end)
        led = _Led(led_to, end)
        config = GenerationConfig(
            do_sample=False, max_new_tokens=max(_ENDS) + 1, pad_token_id=int(ids[0, 0]), eos_token_id=end,
            use_cache=use_cache is not False, disable_compile=True,
        )  # fmt: skip
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "generation_config": config}
        with short_reach(model, 4):
            if decoding is None:
                model.generate(**arguments, logits_processor=LogitsProcessorList([led]))
            else:
                with decoding.within(model):
                    model.generate(**arguments, logits_processor=LogitsProcessorList([led]))
        return led.seen

    return compare(
        model,
        lambda m: generated(m, None),
        lambda m: generated(m, SparseDecoding("prefill" in names, "compact" in names, copy_cost=0.0)),
        with_graph=False,
    )


class _Led(LogitsProcessor):
    """Leads each row to given tokens and its end, and keeps the logits of the rows that are not finished."""

    def __init__(self, tokens: Tensor, end: int) -> None:
        self._tokens, self._end = tokens, end
        self.seen: dict[str, Tensor] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = len(self.seen)
        live = [row for row, ends in enumerate(_ENDS) if step <= ends]
        self.seen[f"the logits of token {step}"] = scores[live].clone()
        forced = torch.full_like(scores, -torch.inf)
        for row, ends in enumerate(_ENDS):
            forced[row, self._end if step >= ends else int(self._tokens[row, step])] = 0.0
        return forced
