"""Read the memory of a training step off a model's own code: forward passes on tensors that have no data."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .._compat import CACHE_ARGUMENTS
from ..errors import RefusedError
from ..functional.memory import ForwardTrace, Parameter, StepFlops, extrapolated_trace, through_three_points
from ..functional.saved_bytes import SavedBytes
from ..functional.shape_run import ShapeRun, _TooManyOperations, storage_of, weights_of
from ..optim.roles import parameter_roles
from .layer_trace import TraceProbe
from .model_shapes import (
    base_model,
    build_on_meta,
    four_bit_linears,
    maskless_attention,
    plain_token,
    quantization_of,
    setting,
    unwrapped,
    wanted_attention,
    with_lora,
)
from .reachable import backward, bytes_of_cache, leaves_of_graph

#: Operators of one forward pass after which it is given up: some 20 seconds. Loops over tokens get there.
MAX_OPERATIONS = 300_000
#: What tells how bytes grow where a long row takes too long: the first three have to foretell the last. Whole chunks
#: of linear attention, and more than one.
SHORT_ROWS = (128, 192, 256, 320)
#: what else a model may ask for in a step on text alone
_EXTRA_INPUTS = ("token_type_ids", "mm_token_type_ids")


@dataclass
class _Step:
    """
    What one forward pass saved: all of it, up to the LM head, and copies of trainable weights among the latter.

    `passed` are masks and the like that went to checkpointed layers and that nothing saved.
    """

    total: int = 0
    backbone: int | None = None
    copies: int = 0
    passed: int = 0
    logits_width: int = 0
    reached: set[int] = field(default_factory=set)
    calls: list[dict[str, float]] = field(default_factory=list)


class TracedModel:
    """
    A model without data, whose forward passes tell what autograd saves.

    Args:
        model (`PreTrainedConfig` or `torch.nn.Module`): A config, or a model, of which a copy without data is made;
            `dtype`, `attention` and LoRA are then those of the model.
        dtype (`str`, *optional*, defaults to `"float32"`): Dtype of the weights.
        autocast (`bool`, *optional*, defaults to `False`): Whether the forward pass runs under bf16 autocast, as with
            `bf16=True` in the training arguments.
        attention (`str`, *optional*): `sdpa`, `eager`, or the name of another, which is traced as fused attention
            without masks. By default what transformers takes.
        lora_rank (`int`, *optional*): Train LoRA matrices of this rank only.
        lora_targets (`list[str]` or `str`, *optional*, defaults to `"all-linear"`): As in PEFT.
        four_bit (`bool`, *optional*, defaults to `False`): Keep the linear weights in 4 bits, but the LM head's.

    Attributes:
        recomputing (`set[str]`): Functions whose backward pass runs parts of the model again, unseen by a forward
            pass.
        quantization (`str` or `None`): The method by which the weights of a config are stored, which is not counted.
        stand_in (`str` or `None`): The attention that fused attention without masks stands for.

    Raises:
        ValueError: an unknown dtype; 4-bit weights without LoRA.
        RefusedError: a model that cannot be built or traced.
    """

    def __init__(
        self,
        model: PreTrainedConfig | torch.nn.Module,
        *,
        dtype: str = "float32",
        autocast: bool = False,
        attention: str | None = None,
        lora_rank: int | None = None,
        lora_targets: list[str] | str = "all-linear",
        four_bit: bool = False,
    ) -> None:
        if four_bit and lora_rank is None:
            raise ValueError("4-bit weights cannot be trained: give a LoRA rank as well.")
        self.run, self.autocast, self.stand_in = ShapeRun(), autocast, None
        packed: list[torch.nn.Parameter] = []
        if isinstance(model, torch.nn.Module):
            self.model = self.run.copied(model)
        else:
            attention, self.stand_in = wanted_attention(model, attention)
            with maskless_attention():
                built: Any = build_on_meta(model, dtype, attention)
            linears = four_bit_linears(built) if four_bit else []
            if lora_rank is not None:
                built = with_lora(built, lora_rank, lora_targets)
            self.model = self.run.emptied(built)
            packed = [linear.weight for linear in linears]
        self.model.train()
        self.config = self.model.config
        self.quantization = quantization_of(self.config) if isinstance(model, PreTrainedConfig) else None
        self._packed = {id(weight) for weight in packed}
        self._embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, torch.nn.Embedding)}
        trainable = any(p.requires_grad for p in self.model.parameters())
        self._roles = {id(one.parameter): one.role for one in parameter_roles(self.model)} if trainable else {}
        self._reached: set[int] | None = None
        self.recomputing: set[str] = set()
        self.extra: dict[str, Any] = {}

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters. After a trace only those that a gradient reaches in it count as trainable."""

        def trained(weight: torch.Tensor) -> bool:
            return weight.requires_grad and (self._reached is None or id(weight) in self._reached)

        return [
            Parameter(
                tuple(p.shape),
                p.element_size(),
                trained(p),
                id(p) in self._packed,
                id(p) in self._embeddings,
                self._roles.get(id(p), ""),
            )
            for p in self.model.parameters()
        ]

    # ---- what a step saves ----

    def trace(self, batch: int, seq_len: int, padded: bool = False) -> ForwardTrace:
        """
        Return what a forward pass of `batch` rows of `seq_len` tokens saves.

        Args:
            batch (`int`): Rows of the micro-batch.
            seq_len (`int`): Tokens of a row on one rank; of the encoder and of the decoder, where there are two.
            padded (`bool`, *optional*, defaults to `False`): Whether rows are padded, so that attention needs masks.

        Raises:
            ValueError: the model cannot be run without data.
        """
        try:
            return self._trace(batch, seq_len, padded)
        except _TooManyOperations:
            return self._continued(lambda row: self._trace(batch, row, padded), extrapolated_trace, seq_len)

    def _continued(self, measure: Callable[[int], Any], through: Callable[..., Any], tokens: int) -> Any:
        """
        Return what `measure` gives for short rows, continued to longer ones; refuse where it does not grow evenly.
        """
        self.run.invented.add("length")
        name, (*first, last) = type(self.model).__name__, SHORT_ROWS
        try:
            found = [measure(row) for row in SHORT_ROWS]
        except _TooManyOperations as error:
            raise RefusedError(
                f"{name} loops over tokens: rows of {last} tokens take more than {MAX_OPERATIONS} operators already, "
                f"so that {tokens} tokens cannot be planned."
            ) from error
        for value, expected in zip(_numbers(found[-1]), _numbers(through(found[:-1], first, last)), strict=True):
            if abs(value - expected) > 0.01 * abs(value):
                raise RefusedError(
                    f"{name} loops over tokens, so that {tokens} tokens are too long to be traced, and {last} tokens "
                    f"take {value:,} bytes where rows of {', '.join(map(str, first))} tokens foretell {expected:,}: "
                    "longer rows cannot be planned."
                )
        return through(found[1:], SHORT_ROWS[1:], tokens)

    def trace_batch(self, batch: Mapping[str, Any]) -> ForwardTrace:
        """Return what a forward pass of this batch saves; its tensors are used for what they are."""
        return self._measured(dict(batch), batch["input_ids"].shape)

    def _trace(self, batch: int, seq_len: int, padded: bool) -> ForwardTrace:
        ids = torch.full((batch, seq_len), plain_token(self.config))
        inputs = {"input_ids": ids, "labels": ids}
        if (
            getattr(self.config, "is_encoder_decoder", False)
            and setting(self.config, "decoder_start_token_id") is None
        ):
            inputs["decoder_input_ids"] = ids.clone()  # else made from the labels
        if padded:
            inputs["attention_mask"] = torch.ones_like(ids)
            inputs["attention_mask"][:, -1] = 0
        return self._measured(inputs, ids.shape)

    def _measured(self, inputs: dict[str, Any], shape: Any) -> ForwardTrace:
        if _accepts(unwrapped(self.model), "use_cache"):
            inputs = {"use_cache": False, **inputs}
        with self._traceable():
            self._layers(checkpointing=False)
            keep = self._step(inputs)
            self._reached = keep.reached
            layers = self._layers(checkpointing=True)
            kept_less = self._step(inputs, probe=True) if layers else keep
        return self._as_trace(keep, kept_less, shape)

    def _as_trace(self, keep: _Step, kept_less: _Step, shape: Any) -> ForwardTrace:
        calls, backbone = kept_less.calls, keep.total if keep.backbone is None else keep.backbone
        inputs = tuple(call["input_bytes"] for call in calls)
        least = kept_less.total if kept_less.backbone is None else kept_less.backbone
        outside = least - kept_less.copies - sum(inputs) if calls else 0
        text = self.config.get_text_config()
        return ForwardTrace(
            tokens=shape[0] * shape[1],
            layer_inputs=inputs,
            layer_kept=tuple(call["kept_bytes"] for call in calls),
            layer_attention=tuple(call["attention_bytes"] for call in calls),
            layer_mlp=tuple(call["mlp_bytes"] for call in calls),
            outside=outside,
            logits=keep.total - backbone,
            logits_width=keep.logits_width,
            hidden_size=int(calls[0]["width"]) if calls else setting(text, "hidden_size") or 0,
            weight_copies=keep.copies,
            attention_width=self._attention_width(),
            itemsize=2 if self.autocast else self.parameters[0].itemsize,
            kept=backbone - keep.copies - outside,
            passed=kept_less.passed if calls else 0,
        )

    def _step(self, inputs: dict[str, Any], probe: bool = False) -> _Step:
        """Run one forward pass; with `probe` each checkpointed layer is measured every time that it runs."""
        for extra in ({}, *({name: torch.zeros_like(inputs["input_ids"])} for name in _EXTRA_INPUTS)):
            self.extra = {**self.extra, **extra}
            try:
                return self._run_step({**self.extra, **inputs}, probe)
            except (TypeError, ValueError) as error:
                if not any(name in str(error) for name in _EXTRA_INPUTS) or extra.keys() >= {_EXTRA_INPUTS[-1]}:
                    raise
        raise RefusedError("the model asks for more than token ids and labels.")

    def _run_step(self, inputs: dict[str, Any], probe: bool) -> _Step:
        step, first = _Step(), len(self.run.casts)
        layers = TraceProbe(self.model, self.run, self._counts_as_copy) if probe else contextlib.nullcontext()
        with self.run, self._precision(), layers, self.run.limited(MAX_OPERATIONS):
            with SavedBytes(exclude=self.model.parameters()) as saved, self._at_head(step, saved, first):
                out = self.model(**inputs)
            step.total = saved.total
            step.logits_width = out.logits.shape[-1] if getattr(out, "logits", None) is not None else 0
            if step.backbone is None:
                step.copies = self._copies(saved, first)
            if probe:
                step.calls = layers.calls
                step.passed = sum(t.untyped_storage().nbytes() for t in layers.passed.values() if not saved.holds(t))
            else:
                step.reached = self._reached_from(out)
        del out, self.run.casts[first:]
        return step

    def _reached_from(self, out: Any) -> set[int]:
        """
        Return the ids of the weights that get a gradient, by the graph, or by a backward pass where that says too
        little.
        """
        reached, functions = leaves_of_graph(out)
        used = {id(w) for key, w in weights_of(self.model) if w.requires_grad and key in self.run.used}
        if functions and not used <= reached:
            backward(out)
            found = {id(w) for w in self.model.parameters() if w.grad is not None}
            for weight in self.model.parameters():
                weight.grad = None
            if not found <= reached:
                self.recomputing = functions
            reached |= found
        return reached

    @contextlib.contextmanager
    def _at_head(self, step: _Step, saved: SavedBytes, first: int) -> Iterator[None]:
        """
        Note what is saved when the model below the LM head is done, or when the LM head begins, as not all call the
        former.
        """

        def note(*args: Any) -> None:
            step.backbone, step.copies = saved.now, self._copies(saved, first)

        def note_once(*args: Any) -> None:
            if step.backbone is None:
                note()

        base, head = base_model(self.model), unwrapped(self.model).get_output_embeddings()
        handles = [base.register_forward_hook(note)] if base is not unwrapped(self.model) else []
        if isinstance(head, torch.nn.Module):
            handles.append(head.register_forward_pre_hook(note_once))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _copies(self, saved: SavedBytes, first: int) -> int:
        casts = self.run.casts[first:]
        return sum(t.untyped_storage().nbytes() for w, t in casts if self._counts_as_copy(w) and saved.holds(t))

    def _counts_as_copy(self, weight: torch.Tensor) -> bool:
        """Autocast keeps the copies of trainable weights for the whole pass; those of 4-bit weights do not exist."""
        return id(weight) in self._packed or (self.autocast and weight.requires_grad)

    # ---- generation ----

    def cache_bytes(self, sequences: int, tokens: int) -> int | None:
        """
        Return the bytes of the cache after `tokens` tokens of each of `sequences` rows, or `None` where there is none.

        Read off the cache that the model fills in a forward pass: sliding windows, latent attention, recurrent states,
        shared layers and cross attention are what they are.

        Raises:
            ValueError: the model cannot be run without data.
        """
        modes = [module.training for module in self.model.modules()]
        self.model.eval()
        self._layers(checkpointing=False)
        try:
            with self._traceable():
                try:
                    return self._cache_bytes(sequences, tokens)
                except _TooManyOperations:

                    def through(found: Any, rows: Any, at: int) -> int:
                        return through_three_points(rows, found, at)

                    return self._continued(lambda row: self._cache_bytes(sequences, row) or 0, through, tokens) or None
        finally:
            for module, mode in zip(self.model.modules(), modes, strict=True):
                module.training = mode

    def _cache_bytes(self, sequences: int, tokens: int) -> int | None:
        ids = torch.full((sequences, tokens), plain_token(self.config))
        inputs = {"input_ids": ids, "use_cache": True}
        if getattr(self.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids.clone()
        with torch.no_grad(), self.run, self._precision(), self.run.limited(MAX_OPERATIONS):
            out = self.model(**self.extra, **inputs)
        return bytes_of_cache(*(out[name] for name in CACHE_ARGUMENTS if name in out)) or None

    # ---- what the plan cannot see ----

    def not_run(self) -> dict[str, int]:
        """
        Return the largest parts of the model whose weights no pass has used, with their parameters; `*` is any layer.
        """
        return self._parts(lambda key, weight: key not in self.run.used)

    def not_reached(self) -> dict[str, int]:
        """Return the largest parts of the model that ran and that no gradient reached, though they are trainable."""
        reached = self._reached or set()
        return self._parts(
            lambda key, weight: key in self.run.used and weight.requires_grad and id(weight) not in reached
        )

    def _parts(self, belongs: Callable[[Any, torch.nn.Parameter], bool]) -> dict[str, int]:
        """
        Return the largest modules of which all weights belong, or else single weights, with their number of values.
        """
        found: dict[str, int] = {}

        def add(name: str, weights: list[Any]) -> None:
            covered = any(name.startswith(f"{other}.") for other in found)
            if weights and not covered and all(belongs(*weight) for weight in weights):
                found[name] = sum(parameter.numel() for _, parameter in weights)

        for name, module in self.model.named_modules():
            add(name, list(weights_of(module)))
        for name, weight in self.model.named_parameters():
            add(name, [(storage_of(weight), weight)])
        grouped: dict[str, int] = {}
        for name, parameters in found.items():
            alike = re.sub(r"\.\d+(?=\.|$)", ".*", name)
            grouped[alike] = grouped.get(alike, 0) + parameters
        return grouped

    def buffer_bytes(self) -> int:
        """Return the bytes of the model's buffers, such as tables of frequencies or of masks."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.model.buffers())

    # ---- the time column ----

    def flops(self, batch: int, seq_len: int) -> StepFlops:
        """Return the forward FLOPs of a micro-batch: 2 per weight and token, and causal attention."""
        tokens, text = batch * seq_len, self.config.get_text_config()
        layers = self._layers(checkpointing=False)
        linear = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() > 1)
        heads = setting(text, "num_attention_heads") or 0
        attention = 2 * batch * seq_len**2 * heads * self._head_dim() * len(layers)
        head = unwrapped(self.model).get_output_embeddings()
        width = head.weight.numel() if hasattr(head, "weight") else 0
        return StepFlops(max(2.0 * tokens * linear, 1.0), float(attention), 2.0 * tokens * width)

    def _head_dim(self) -> int:
        text = self.config.get_text_config()
        heads = setting(text, "num_attention_heads") or 1
        return setting(text, "head_dim") or (setting(text, "hidden_size") or 0) // heads

    def _attention_width(self) -> int:
        text = self.config.get_text_config()
        heads = setting(text, "num_attention_heads") or 0
        return (heads + 2 * (setting(text, "num_key_value_heads") or heads)) * self._head_dim()

    # ---- helpers ----

    def _layers(self, checkpointing: bool) -> list[torch.nn.Module]:
        """
        Switch checkpointing and return the layers that it treats one by one; none where the model does not support it.
        """
        layers = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not checkpointing:
            for layer in layers:
                layer.gradient_checkpointing = False
            return layers
        if not layers or not getattr(unwrapped(self.model), "supports_gradient_checkpointing", False):
            return []
        self.model.activation_checkpointing_enable()
        return layers

    def _precision(self) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.autocast else contextlib.nullcontext()

    @contextlib.contextmanager
    def _traceable(self) -> Iterator[None]:
        """Name the model where its code cannot run without data."""
        try:
            with maskless_attention(), torch.random.fork_rng(devices=[]):
                yield
        except _TooManyOperations:
            raise
        except Exception as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RefusedError(f"{type(self.model).__name__} cannot be traced without data: {line}") from error


def _numbers(measured: ForwardTrace | int) -> tuple[int, ...]:
    """Return the figures that have to grow evenly."""
    if isinstance(measured, int):
        return (measured,)
    return (measured.kept or 0) + measured.outside, sum(measured.layer_kept), measured.logits


def _accepts(model: torch.nn.Module, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
