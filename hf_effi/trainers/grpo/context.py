"""
What selectors and allocators are given of the trainer: columns of the dataset, and what the policy makes of prompts.

Nothing here changes the run: no random state, no metric, no mode of a module.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging
from trl.models.utils import add_hooks, remove_hooks

from ...errors import RefusedError
from ...functional import metrics
from .hidden_states import PROBE_TOKENS, captured_input, last_mlp, lm_head
from .host import Host

logger = logging.get_logger(__name__)
LAYERS = ("last", "mlp", "next")
#: tokens of a forward, with padding: prompts only, no gradient and no logits, so that memory is small
TOKENS_PER_FORWARD = 16_384
#: numbers of one selector that are logged; what is logged must not grow with the dataset
MOST_METRICS = 64


class PromptReader:
    """
    The [`~hf_effi.protocols.SelectionContext`] of a trainer.

    Args:
        host ([`Host`]): The trainer.
        rows (*optional*): Rows by number; the training dataset by default.
        tokens_per_forward (`int`, *optional*): Most tokens of a forward, with padding; a prompt that is longer goes
            alone.
    """

    def __init__(self, host: Host, rows: Any = None, tokens_per_forward: int = TOKENS_PER_FORWARD) -> None:
        self._host, self._tokens_per_forward = host, tokens_per_forward
        self._rows: Any = host.train_dataset if rows is None else rows
        self._mlp: tuple[nn.Module, nn.Module] | None = None

    @property
    def size(self) -> int:
        return len(self._rows)

    @property
    def group_size(self) -> int:
        return int(self._host.args.num_generations)

    @property
    def seed(self) -> int:
        return int(self._host.args.seed)

    def column(self, name: str) -> list[Any]:
        """
        Return a whole column of the training dataset.

        Raises:
            ValueError: there is no such column, or the dataset is a stream.
        """
        dataset = self._rows
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                f"column {name!r} cannot be read of a streaming dataset. Use a map-style dataset, e.g. "
                "datasets.Dataset.from_list(list(stream))."
            )
        columns = list(getattr(dataset, "column_names", None) or dataset[0])
        if name not in columns:
            raise ValueError(f"the training dataset has no column {name!r}. It has: {', '.join(columns)}.")
        return list(dataset[name]) if hasattr(dataset, "column_names") else [row[name] for row in dataset]

    def prompt_ids(self, rows: Sequence[int]) -> list[list[int]]:
        """
        Return the token ids of the prompts of some rows, as generation has them. Every rank must call it.

        Raises:
            RefusedError: prompts with images, or such as an environment or a rollout function makes.
            ValueError: no rows, or a row that the dataset does not have.
        """
        found = [dict(self._rows[row]) for row in self._checked_rows(rows)]
        with self._unlogged():
            self._check_text_only(found)
            ids, images, fields = self._host._tokenize_prompts([row["prompt"] for row in found])
        if images is not None or set(fields) - {"token_type_ids"}:
            raise _not_text(", ".join(fields) or "images")
        return [list(row) for row in ids]

    def spread(self, rows: Sequence[int], compute: Callable[[list[int]], Tensor]) -> Tensor:
        """
        Deal rows over the ranks, let each compute its own, and return the results of all in the order of `rows`.

        Args:
            rows (`Sequence[int]`): At least one; the same on every rank.
            compute (`Callable`): Given row numbers, at least one and equally many on every rank; returns a tensor of
                shape `(rows, k)`.

        Returns:
            `torch.Tensor`: float32, on the CPU, equal on every rank, shape `(len(rows), k)`.
        """
        return self._dealt(self._checked_rows(rows), compute)

    def read_prompts(
        self, rows: Sequence[int], read: Callable[[Tensor, Tensor], Tensor], layer: str = "last"
    ) -> Tensor:
        """
        Forward the prompts of some rows through the policy without a gradient, and return what `read` makes of them.

        See [`~hf_effi.protocols.SelectionContext`]. Engines (FSDP, DeepSpeed) wrap the model when training begins:
        call it from `select` or `observe`.

        Raises:
            RefusedError: prompts with images, or a model in which the layer is not found.
            ValueError: an unknown layer, no rows, an empty prompt, or results of `read` that differ in shape.
        """
        if layer not in LAYERS:
            raise ValueError(f"layer={layer!r} is not known. Use one of {', '.join(map(repr, LAYERS))}.")
        ids = self.prompt_ids(rows)
        if empty := [row for row, tokens in zip(rows, ids, strict=True) if not tokens]:
            raise ValueError(f"the prompt of row {empty[0]} has no tokens, so that the model has nothing to read.")
        # Ranks get neighbours of the order by length: as many forwards on each, and of like cost.
        order = sorted(range(len(ids)), key=lambda place: (-len(ids[place]), place))
        longest = [len(ids[place]) for place in order[:: self._host.accelerator.num_processes]]

        def compute(mine: list[int]) -> Tensor:
            found: list[Tensor] = []
            with self._reading():
                module = self._module(layer)
                for start, end in _within_budget(longest, self._tokens_per_forward):
                    found += self._read([ids[place] for place in mine[start:end]], read, module)
            if len({row.shape for row in found}) > 1 or found[0].ndim != 1:
                shapes = sorted({tuple(row.shape) for row in found})
                raise ValueError(f"`read` must return shape (k,), with the same k for each prompt, got {shapes}.")
            return torch.stack(found)

        found = self._dealt(order, compute)
        back = torch.empty(len(order), dtype=torch.int64)
        back[order] = torch.arange(len(order))
        return found[back]

    def _check_text_only(self, rows: list[dict[str, Any]]) -> None:
        """Whether the column is what the model will be given: TRL adds images, environments rewrite it."""
        for name, value in (
            ("environment_factory", self._host.environment_factories),
            ("rollout_func", self._host.rollout_func),
        ):
            if value:
                raise _not_text(f"what {name} makes of them")
        for name in ("images", "image"):
            if any(row.get(name) for row in rows):
                raise _not_text(f"the column {name!r}")

    # --- rows over ranks ---------------------------------------------------------------------------------------------

    def _checked_rows(self, rows: Sequence[int]) -> list[int]:
        rows = [operator.index(row) for row in rows]
        if not rows:
            raise ValueError("no rows were given to read: give at least one row number of the training dataset.")
        if wrong := [row for row in rows if not 0 <= row < self.size]:
            raise ValueError(f"row {wrong[0]} is none of the training dataset, which has rows 0 to {self.size - 1}.")
        return rows

    def _dealt(self, items: list[int], compute: Callable[[list[int]], Tensor]) -> Tensor:
        accelerator = self._host.accelerator
        world, rank = accelerator.num_processes, accelerator.process_index
        share = -(-len(items) // world)
        # Ranks that would have one less compute the last one once more.
        padded = items + items[-1:] * (share * world - len(items))
        found = compute(padded[rank::world])
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != share:
            told = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{share} rows of numbers were expected for as many rows of the dataset, got {told}.")
        found = found.detach().to(accelerator.device, torch.float32).contiguous()
        gathered = accelerator.gather(found).cpu().view(world, share, -1)
        return gathered.transpose(0, 1).reshape(world * share, -1)[: len(items)].contiguous()

    # --- the forward -------------------------------------------------------------------------------------------------

    def _module(self, layer: str) -> nn.Module | None:
        """Return the module whose input is read; `None` for what comes out of the model."""
        model = self._host.accelerator.unwrap_model(self._host.model)
        if layer == "next":
            return None
        if layer == "last":
            return lm_head(model)
        if self._mlp is None or self._mlp[0] is not model:
            probe = torch.arange(PROBE_TOKENS, device=self._host.accelerator.device).unsqueeze(0)
            self._mlp = model, last_mlp(model, self._forward, probe)
        return self._mlp[1]

    def _forward(self, token_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the logits of the token that comes after each row, shape `(rows, 1, vocabulary)`."""
        mask = torch.ones_like(token_ids) if mask is None else mask
        model: Any = self._host.model
        head = lm_head(self._host.accelerator.unwrap_model(model))
        with captured_input(head, cut=mask.sum(1) - 1):  # and no others
            logits: Tensor = model(input_ids=token_ids, attention_mask=mask, use_cache=False).logits
        return logits

    def _read(
        self, ids: list[list[int]], read: Callable[[Tensor, Tensor], Tensor], module: nn.Module | None
    ) -> list[Tensor]:
        width, device = max(map(len, ids)), self._host.accelerator.device
        padding = self._host._tokenizer.pad_token_id
        # On the right, where no token of a causal model sees it and positions are those of the prompt alone.
        tokens = torch.tensor([row + [padding] * (width - len(row)) for row in ids], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=device)
        capture: contextlib.AbstractContextManager[list[Tensor]] = (
            captured_input(module) if module is not None else contextlib.nullcontext([])
        )
        with capture as states:
            logits = self._forward(tokens, mask)
        found = states if module is not None else [logits]
        expected = tokens.numel() if module is not None else len(tokens)
        if len(found) != 1 or found[0].numel() != expected * found[0].shape[-1]:
            what = "the LM head" if module is None else type(module).__name__
            raise RefusedError(
                f"what {what} reads in a forward of {type(self._host.model).__name__} has shapes "
                f"{[tuple(one.shape) for one in found]} for tokens of shape {tuple(tokens.shape)}. Choose prompts by "
                "what was seen of them, e.g. with MoPPS."
            )
        hidden = found[0].reshape(len(tokens), -1, found[0].shape[-1])
        # What is made of the states is as exact as they are: a product of two vectors would be rounded to bf16.
        with torch.autocast(device.type, enabled=False):
            return [
                torch.as_tensor(read(states_of_row[: len(row)].float(), tokens_of_row[: len(row)]))
                for states_of_row, tokens_of_row, row in zip(hidden, tokens, ids, strict=True)
            ]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Forward as evaluation does, and leave modes and random states as they were."""
        model, device = self._host.model, self._host.accelerator.device
        modes = [(module, module.training) for module in model.modules()]
        seeded = [torch.device(device).index or 0] if device.type in ("cuda", "xpu") else []
        kind = device.type if seeded else "cuda"
        with (
            torch.random.fork_rng(devices=seeded, device_type=kind),
            torch.no_grad(),
            self._host.accelerator.autocast(),
        ):
            model.eval()
            try:
                yield
            finally:
                for module, training in modes:
                    module.training = training
                self._forget_trace()

    def _forget_trace(self) -> None:
        """
        Let ZeRO-3 learn anew in which order modules are called: those of training are others, as its LM head is fused,
        and it would release weights by the order of this forward.
        """
        plugin = getattr(self._host.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage == 3:
            remove_hooks(self._host.model_wrapped)
            add_hooks(self._host.model_wrapped)  # which invalidates the trace

    @contextlib.contextmanager
    def _unlogged(self) -> Iterator[None]:
        """Take back what is appended to TRL's metrics: tokenizing counts what does not fit."""
        lengths = {
            mode: {name: len(values) for name, values in log.items()} for mode, log in self._host._metrics.items()
        }
        try:
            yield
        finally:
            for mode, log in self._host._metrics.items():
                for name in list(log):
                    if (length := lengths.get(mode, {}).get(name)) is None:
                        del log[name]
                    else:
                        del log[name][length:]


def _within_budget(lengths: Sequence[int], budget: int) -> Iterator[tuple[int, int]]:
    """Yield the ends of runs of rows, longest first, whose padded tokens fit the budget; at least one row in each."""
    start = 0
    while start < len(lengths):
        end = min(len(lengths), start + max(1, budget // lengths[start]))
        yield start, end
        start = end


def _not_text(what: str) -> RefusedError:
    return RefusedError(
        f"selectors that read prompts with the model work with the text of the column 'prompt' alone, and here come "
        f"{what} with it. Choose by what was seen of the prompts, e.g. with MoPPS."
    )


def attach(thing: Any, host: Host, rows: Any = None) -> None:
    """Give a selector or an allocator the context, where it asks for one."""
    if callable(getattr(thing, "attach", None)):
        thing.attach(PromptReader(host, rows))


def log_metrics(thing: Any, log: dict[str, list[float]]) -> None:
    """
    Log the `metrics()` of a selector or an allocator, where it has some, without numbers that are not finite.

    What goes wrong there is a warning, once: it only observes.
    """
    if not callable(getattr(thing, "metrics", None)):
        return
    who = f"{type(thing).__name__}.metrics()"
    try:
        numbers = {str(name): float(number) for name, number in thing.metrics().items()}
    except Exception as error:
        logger.warning_once(f"{who} failed ({type(error).__name__}: {error}); its numbers are not logged.")
        return
    if len(numbers) > MOST_METRICS:
        logger.warning_once(
            f"{who} returned {len(numbers)} numbers, and the first {MOST_METRICS} are logged. Return a fixed set of "
            "names, not one for each row."
        )
    for name, number in list(numbers.items())[:MOST_METRICS]:
        if math.isfinite(number):
            log[metrics.SELECT + name].append(number)
