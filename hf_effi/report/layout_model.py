"""What a model says about its layouts: ranks that a row or a matrix can be split over, traces, sizes to mend."""

from __future__ import annotations

import re
from typing import Any

from ..errors import RefusedError
from ..functional.layout_plan import ACTIVATIONS, STAGES, Layout, split_parameters, split_trace
from ..functional.memory import ForwardTrace, Parameter, extrapolated_trace
from ..parallel import check_model, valid_sizes
from .model_shapes import maskless_attention, setting, unwrapped

#: Micro-batches that are traced; others lie on the parabola through them, which for most models is a line.
TRACED_ROWS = (1, 2, 4)
#: what hidden size, vocabulary and MLP should be multiples of
MULTIPLE = 64
_SPLIT = ("colwise", "rowwise")


class LayoutModel:
    """
    A traced model, asked for layouts.

    Args:
        traced ([`~hf_effi.report.trace_memory.TracedModel`]): The model.
        seq_len (`int`): Tokens of a row.
        padded (`bool`): As in `plan_memory`.
    """

    def __init__(self, traced: Any, seq_len: int, padded: bool) -> None:
        self.traced, self.seq_len, self.padded = traced, seq_len, padded
        self.text = traced.config.get_text_config()
        self.heads = setting(self.text, "num_attention_heads") or 0
        self.kv_heads = setting(self.text, "num_key_value_heads") or self.heads
        self._traces: dict[tuple[int, int], ForwardTrace] = {}
        self._parameters: dict[int, list[Parameter]] = {}
        self._split = self._split_weights()

    def trace(self, layout: Layout) -> ForwardTrace:
        """Return what a micro-batch of a layout saves on one rank."""
        tokens = self.seq_len // layout.sequence_parallel_size
        rows = layout.micro_batch
        if rows in TRACED_ROWS:
            found = self._traced(rows, tokens)
        else:
            found = extrapolated_trace([self._traced(one, tokens) for one in TRACED_ROWS], TRACED_ROWS, rows)
        return split_trace(found, layout.tensor_parallel_size)

    def _traced(self, rows: int, tokens: int) -> ForwardTrace:
        if (rows, tokens) not in self._traces:
            self._traces[rows, tokens] = self.traced.trace(rows, tokens, self.padded)
        return self._traces[rows, tokens]

    def parameters(self, layout: Layout) -> list[Parameter]:
        """Return the parameters of one rank, before states are shared."""
        size = layout.tensor_parallel_size
        if size not in self._parameters:
            every = self.traced.parameters  # after a trace, which tells what a gradient reaches
            self._parameters[size] = every if size == 1 else split_parameters(every, self._split, size)
        return self._parameters[size]

    def exchange_width(self, layout: Layout) -> int:
        """Return the values that a layer's forward exchanges for each token: queries, keys, values and the output."""
        copies = max(1, layout.sequence_parallel_size // max(self.kv_heads, 1))
        return (2 * self.heads + 2 * self.kv_heads * copies) * self.traced._head_dim()

    def activations(self) -> tuple[str, ...]:
        """Return the ways to keep activations that the model allows."""
        one = self._traced(1, self.seq_len)
        return ACTIVATIONS if one.layer_inputs else ("keep",)

    def sequence_sizes(self, devices: int) -> tuple[tuple[int, ...], str | None]:
        """Return the sizes of sequence parallelism that run, and why there is none but 1."""
        sizes = [size for size in range(1, devices + 1) if devices % size == 0 and self.seq_len % size == 0]
        allowed = valid_sizes(self.heads, self.kv_heads, devices) if self.heads else [1]
        found = [1]
        with maskless_attention():
            for size in sizes[1:]:
                if size not in allowed:
                    continue
                try:
                    check_model(self.traced.model, size)
                except RefusedError as error:
                    return (1,), str(error)
                found.append(size)
        return tuple(found), None if len(found) > 1 or devices == 1 else (
            f"no size splits {self.heads} query and {self.kv_heads} key/value heads and rows of {self.seq_len} tokens "
            f"over {devices} devices"
        )

    def tensor_sizes(self, devices: int) -> tuple[tuple[int, ...], str | None]:
        """Return the sizes of tensor parallelism that run, and why there is none but 1."""
        if devices == 1:
            return (1,), None
        if not any(self._split):
            return (1,), f"{type(self.traced.model).__name__} has no plan for tensor parallelism"
        sides = [one.shape[0] for one, split in zip(self.traced.parameters, self._split, strict=True) if split]
        if any(size % devices for size in (*sides, self.heads, self.kv_heads)):
            return (1,), f"heads or matrices do not split over {devices} devices"
        return (1, devices), None

    def _split_weights(self) -> list[bool]:
        model = unwrapped(self.traced.model)
        plan = getattr(model, "tp_plan", None) or {} if getattr(model, "supports_tp_plan", False) else {}
        if model is not self.traced.model:
            plan = {}  # PEFT's wrapper: no test of this package runs it under tensor parallelism
        patterns = [
            re.compile(re.escape(name).replace(r"\*", r"\d+") + r"(\.weight)?$")
            for name, style in plan.items()
            if isinstance(style, str) and any(word in style for word in _SPLIT) and "embed" not in name
        ]
        names = [name for name, _ in self.traced.model.named_parameters()]
        return [any(pattern.search(name) for pattern in patterns) for name in names]

    def warnings(self) -> list[str]:
        """Name the sizes that kernels of GPUs do not like."""
        found = []
        for name in ("vocab_size", "hidden_size", "intermediate_size"):
            value = setting(self.text, name)
            if isinstance(value, int) and value % MULTIPLE:
                found.append(
                    f"{name}={value} is no multiple of {MULTIPLE}, which matrix kernels are made for; the next one is "
                    f"{-(-value // MULTIPLE) * MULTIPLE}"
                )
        return found


def engines_of(optimizer: str) -> tuple[tuple[str, ...], str | None]:
    """
    Return the engines that an optimizer is right under, and why there are not more.

    Args:
        optimizer (`str`): A name of `optim=`.

    Example:
    ```python
    >>> engines_of("muon")[0], engines_of("adamw_torch")[1]
    (('ddp', 'fsdp2', 'hybrid'), None)

    ```
    """
    from ..optim.names import find_factory, is_own

    every, shards = tuple(STAGES), ("ddp", "fsdp2", "hybrid")
    if is_own(optimizer):
        factory = find_factory(optimizer)
        if factory.elementwise:
            return tuple(name for name in every if name != "tp"), f"{optimizer}: not shown under tensor parallelism"
        if factory.sharded:
            return shards, f"{optimizer} needs matrices, and ZeRO gives an optimizer flat pieces"
        return ("ddp",), f"{optimizer} needs whole tensors, and ZeRO and FSDP2 shard them"
    if optimizer in ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"):
        return every, None
    return ("ddp",), f"{optimizer} on shards is run by no test of this package"
