"""`SparseDecoding`: transformers' `generate` as it is, with a forward that leaves out rows whose result is known."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, StaticCache, StoppingCriteriaList

from ...errors import RefusedError
from ...functional import metrics
from ...functional.rollouts.decoding import COPY_COST, compaction_pays, equal_rows

#: What a forward may be given beside tensors and a cache: it is the same for all rows.
_SAME_FOR_ALL = (bool, int, float, str, type(None))


class SparseDecoding:
    """
    Forward each distinct prompt once, and finished rows no longer, inside of transformers' own `generate`.

    The loop of `generate` is not replaced: it keeps all rows, and with them each logits processor, stopping criterion
    and random number. Only the model's forward is wrapped. It is run on the rows that count, the cache is selected to
    match (`Cache.reorder_cache`), and the logits are put back in their places. A finished row gets logits of zero:
    `generate` writes the padding token in any case. The number of forwards stays stock's.

    Args:
        prefill (`bool`): Forward rows with equal prompts once.
        compact (`bool`): Let finished rows leave the batch where [`compaction_pays`].
        copy_cost (`float`, *optional*): As in [`compaction_pays`].

    Attributes:
        counts (`Counter`): Metric name -> number so far: prompt tokens that were not forwarded, rows that were
            forwarded for a token, and those that stock would have forwarded as well.
    """

    def __init__(self, prefill: bool, compact: bool, copy_cost: float = COPY_COST) -> None:
        self.prefill, self.compact, self.copy_cost = prefill, compact, copy_cost
        self.counts: Counter[str] = Counter()
        self._begin(ends=None)

    @contextlib.contextmanager
    def within(self, model: Any) -> Iterator[None]:
        """
        Generate like that while the block runs; afterwards the model is as it was.

        Args:
            model (`nn.Module`): What `generate` is called on; adapters and wrappers are looked through.

        Raises:
            RefusedError: from `generate`, for a setting or a model that it cannot be done for.
        """
        inner = generating_model(model)
        stock_forward, stock_criteria = inner.forward, inner._get_stopping_criteria

        @functools.wraps(stock_forward)
        def forward(*args: Any, **inputs: Any) -> Any:
            return self._forward(stock_forward, args, inputs)

        @functools.wraps(stock_criteria)
        def criteria(*args: Any, **kwargs: Any) -> StoppingCriteriaList:
            found = stock_criteria(*args, **kwargs)
            config = kwargs.get("generation_config", args[0] if args else None)
            if reason := refused_setting(config):
                raise RefusedError(f"rollout_savings: {reason}")
            # Only where one of them knows the end token does `generate` pad the rows that are finished.
            self._begin(ends=any(hasattr(criterion, "eos_token_id") for criterion in found))
            return _Watched(found, self._note)

        try:
            with _replaced(inner, forward=forward, _get_stopping_criteria=criteria):
                yield
        finally:
            self._begin(ends=None)

    # --- the state of one generation ---------------------------------------------------------------------------------

    def _begin(self, ends: bool | None) -> None:
        #: whether finished rows get the padding token; `None` where no generation has begun
        self._ends = ends
        #: rows that are finished; `None` before the first token
        self._done: Tensor | None = None
        #: rows in the order of the cache, and the place of each row there; `None` before the first forward
        self._rows: Tensor | None = None
        self._places: Tensor | None = None
        self._shared, self._wasted = False, 0

    def _note(self, done: Tensor) -> None:
        done = done.detach().bool()
        self._done = done if self._done is None else self._done | done

    def _forward(self, stock: Callable[..., Any], args: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
        if self._ends is None:
            return stock(*args, **inputs)
        named = next((inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)
        if args or named is None:
            raise RefusedError(
                "rollout_savings: `generate` calls this model with positional arguments, or without `input_ids`, so "
                "that its rows cannot be told apart. Set rollout_savings='off'."
            )
        if self._done is None:
            return self._read_prompts(stock, inputs, named)
        return self._next_token(stock, inputs, len(named))

    def _read_prompts(self, stock: Callable[..., Any], inputs: dict[str, Any], tokens: Tensor) -> Any:
        """The prompt, or with `prefill_chunk_size` the next part of it: rows that were equal so far, and still are."""
        batch = len(tokens)
        if self.prefill:
            columns = [] if self._places is None else [self._places]
            for name, value in inputs.items():
                if isinstance(value, Tensor) and (rows := _row_dimension(name, value, batch)) is not None:
                    columns.append(value.movedim(rows, 0))
            first, of = (found.to(tokens.device) for found in equal_rows(columns))
        else:
            first = of = torch.arange(batch, device=tokens.device)
        if self._places is not None and self._rows is not None and len(first) > len(self._rows):
            _select(inputs, self._places[first])  # equal so far, and different now
        self.counts[metrics.PREFILL_TOKENS_SAVED] += (batch - len(first)) * tokens.shape[1]
        self._rows, self._places, self._shared = first, of, len(first) < batch
        if not self._shared:
            return stock(**inputs)
        outputs = stock(**_rows_of(inputs, first, batch))
        outputs.logits = outputs.logits[:, -1:].index_select(0, of)
        return outputs

    def _next_token(self, stock: Callable[..., Any], inputs: dict[str, Any], batch: int) -> Any:
        rows, places, done = self._rows, self._places, self._done
        if rows is None or places is None or done is None:
            raise RefusedError("rollout_savings: `generate` asks for a token before it has read a prompt.")
        if chosen := self._chosen(rows, done, batch):
            rows = torch.tensor(chosen, device=rows.device)
            _select(inputs, places[rows])
            self._places = torch.full_like(places, -1).index_copy(0, rows, torch.arange(len(rows), device=rows.device))
            self._rows, self._shared = rows, False
        self.counts[metrics.DECODE_ROWS] += len(rows)
        self.counts[metrics.DECODE_ROWS_SAVED] += batch - len(rows)
        if len(rows) == batch:
            return stock(**inputs)
        outputs = stock(**_rows_of(inputs, rows, batch))
        logits = outputs.logits[:, -1:]
        outputs.logits = logits.new_zeros(batch, *logits.shape[1:]).index_copy(0, rows, logits)
        return outputs

    def _chosen(self, rows: Tensor, done: Tensor, batch: int) -> list[int]:
        """Return the rows that the batch is to consist of from now on, or `[]` where it stays as it is."""
        leave = bool(self.compact and self._ends)
        live = (~done).nonzero().flatten().tolist() if leave else []
        if self._shared:  # rows that shared a prompt part in any case
            return live if 0 < len(live) else list(range(batch))
        if not leave or len(live) == len(rows):
            return []
        self._wasted += len(rows) - len(live)
        if not compaction_pays(len(live), len(rows), self._wasted, self.copy_cost):
            return []
        self._wasted = 0
        return live


class _Watched(StoppingCriteriaList):
    """The criteria of a generation, which tell of each token which rows are finished."""

    def __init__(self, criteria: StoppingCriteriaList, note: Callable[[Tensor], None]) -> None:
        super().__init__(criteria)
        self._note = note

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        done = super().__call__(*args, **kwargs)
        self._note(done)
        return done


def refused_setting(config: GenerationConfig | None) -> str | None:
    """Return which setting of a generation config rules this way of decoding out, with the fix, or `None`."""
    if config is None:
        return None
    mode = config.get_generation_mode()
    if mode.value not in ("greedy_search", "sample"):
        return (
            f"{mode.value} does not decode row by row. Drop it from generation_kwargs, or set rollout_savings='off'."
        )
    if config.cache_implementation not in (None, "dynamic"):
        return (
            f"cache_implementation={config.cache_implementation!r} has a fixed number of rows or moves them elsewhere"
            ". Use 'dynamic' or None, or set rollout_savings='off'."
        )
    if config.guidance_scale not in (None, 1, 1.0):
        return (
            f"guidance_scale={config.guidance_scale} runs the model a second time, inside of a logits processor. "
            "Drop it, or set rollout_savings='off'."
        )
    if config.is_assistant:
        return "is_assistant=True drafts for another model. Drop it, or set rollout_savings='off'."
    if config.return_dict_in_generate:
        return "return_dict_in_generate=True returns the cache, whose rows have left. Drop it; TRL cannot read it."
    return None


def generating_model(model: Any) -> Any:
    """Return the module whose forward `model.generate` calls: inside of adapters and of `torch.compile`."""
    owner = getattr(model.generate, "__self__", model)
    return owner.get_base_model() if hasattr(owner, "get_base_model") else owner


@contextlib.contextmanager
def _replaced(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """Let the instance have other attributes while the block runs; its `__dict__` is afterwards as it was."""
    entries = module.__dict__
    before = {name: entries[name] for name in attributes if name in entries}
    entries.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            if name in before:
                entries[name] = before[name]
            else:
                del entries[name]


def _row_dimension(name: str, value: Tensor, batch: int) -> int | None:
    """Return the dimension of the rows, `None` where the tensor is the same for all."""
    if value.dim() and value.shape[0] == batch and not (name == "position_ids" and value.dim() == 3):
        return 0
    if name == "position_ids" and value.dim() == 3:  # (kinds of positions, rows, tokens)
        return 1 if value.shape[1] == batch else None
    if value.dim() == 0 or value.shape[0] == 1:
        return None
    raise RefusedError(
        f"rollout_savings: the forward of this model is given {name} of shape {tuple(value.shape)}, which has no "
        f"part for each of the {batch} rows. Set rollout_savings='off'."
    )


def _rows_of(inputs: dict[str, Any], rows: Tensor, batch: int) -> dict[str, Any]:
    """Return the inputs of these rows alone."""
    taken = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            dimension = _row_dimension(name, value, batch)
            value = value if dimension is None else value.index_select(dimension, rows.to(value.device))
        elif not isinstance(value, (Cache, *_SAME_FOR_ALL)):
            raise RefusedError(
                f"rollout_savings: the forward of this model is given {name}, a {type(value).__name__}, from which "
                "rows cannot be taken. Set rollout_savings='off'."
            )
        taken[name] = value
    return taken


def _select(inputs: dict[str, Any], places: Tensor) -> None:
    """Let the cache have the rows that are at these places of it; without a cache all is computed anew anyway."""
    for name, value in inputs.items():
        if isinstance(value, StaticCache):
            raise RefusedError(f"rollout_savings: {name} is a static cache, whose rows stay. Use a dynamic one.")
        if isinstance(value, Cache):
            value.reorder_cache(cast(torch.LongTensor, places))
