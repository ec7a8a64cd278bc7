"""Each decoder layer keeps its activations in its own way: `keep`, `selective`, `checkpoint` or `offload`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import RefusedError
from ..functional.layer_plan import MODES
from ..functional.options import refuse_idle
from ..patching import OtherStates
from ..patching.handle import MODE_CLAIM, Claim, PatchHandle
from .offload import ActivationOffloader

#: attention operators whose output is cheap to keep and dear to recompute; a name a torch build lacks is skipped
_ATTENTION_OPS = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "torch_attn::_varlen_attn",
)


def is_attention_op(op: Any) -> bool:
    """Return whether a dispatched operator is fused attention: SDPA, torch's varlen op, or a flash-attn kernel."""
    name = op.name() if hasattr(op, "name") and callable(op.name) else str(op)
    # flash-attn registers its kernels under namespaces with a hash in them.
    return name.partition(".")[0] in _ATTENTION_OPS or "flash_attn" in name


def selective_contexts(save_ops: Iterable[Any] = ()) -> Callable[[], tuple[Any, Any]]:
    """
    Return a `context_fn` for `torch.utils.checkpoint` that saves attention and recomputes everything else.

    Args:
        save_ops (`Iterable[OpOverload]`, *optional*, defaults to `()`): Further operators to save, such as
            `torch.ops.mylib.op.default`. Without an overload (`torch.ops.mylib.op`) all its overloads are meant.
    """
    saved = set()
    for op in save_ops:
        if isinstance(op, torch._ops.OpOverload):
            saved.add(op)
        elif isinstance(op, torch._ops.OpOverloadPacket):
            saved |= {getattr(op, overload) for overload in op.overloads()}
        else:
            raise ValueError(f"save_ops holds {op!r}: operators look like torch.ops.aten.mm.default.")

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op in saved or is_attention_op(op)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


def decoder_layers(model: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    """
    Return the layers that gradient checkpointing treats one by one, in order.

    Raises:
        RefusedError: the model has none, or checkpointing is off in one of them.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise RefusedError(
            f"{type(model).__name__} has no GradientCheckpointingLayer (transformers' base of decoder layers), so its "
            "layers cannot be checkpointed one by one. Use a model of transformers."
        )
    off = sum(not layer.gradient_checkpointing for layer in layers)
    if off:
        raise RefusedError(
            f"gradient checkpointing is off in {off} of the {len(layers)} layers of {type(model).__name__}. Set "
            "activation_checkpointing=True in the training arguments, without every_n_layers; without a Trainer, call "
            "model.activation_checkpointing_enable() first."
        )
    return layers


class _LayerMode(Claim):
    """Stands in for a layer's `_gradient_checkpointing_func`, as long as its checkpointing is on."""

    slot = MODE_CLAIM

    def __init__(self, path: str, mode: str, run: Callable[..., Any], layer: GradientCheckpointingLayer) -> None:
        if other := layer.__dict__.get(MODE_CLAIM):
            raise RefusedError(
                f"the layer already has the mode {other.mode!r} from other code. Use one callback for the modes of "
                "all layers; after a run that failed, call `hf_effi.unpatch(model)`."
            )
        self.mode, self.run = mode, run
        _check_upstream(layer.__dict__.get("_gradient_checkpointing_func"), mode)
        super().__init__(path, layer, "_gradient_checkpointing_func", self, f"layer mode {mode!r}")
        # TRL switches checkpointing off and on again around each generation, which puts its own function back.
        self.hook = layer.register_forward_pre_hook(self._claim_again)

    def _claim_again(self, layer: GradientCheckpointingLayer, args: tuple[Any, ...]) -> None:
        found = layer.__dict__.get("_gradient_checkpointing_func")
        if found is not self and layer.gradient_checkpointing:
            _check_upstream(found, self.mode)
            self.existed, self.before = True, found
            layer._gradient_checkpointing_func = self

    def _take_away(self) -> None:
        self.hook.remove()
        if self.module.__dict__.get(self.attribute) is self:
            super()._take_away()

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.run(partial(_drawing_the_same, self.before), function, *args)


class _SameDraws:
    """
    A layer's forward that draws the same numbers of Python's and numpy's generators when it is computed again.

    torch.utils.checkpoint does so for torch's generators alone: a layer that is left out by `random.random()` would be
    there in the forward and not in the backward.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.ran, self.before = function, False, None

    def __call__(self, *args: Any) -> Any:
        now = OtherStates() if not self.ran or self.before is not None else None
        if not self.ran:
            self.ran, out = True, self.function(*args)
            self.before = None if now == OtherStates() else now
            return out
        if self.before is None:
            return self._again(*args)
        self.before.restore()
        try:
            return self._again(*args)
        finally:
            now.restore()

    def _again(self, *args: Any) -> Any:
        try:
            return self.function(*args)
        except RuntimeError as error:
            if "not found in storage" not in str(error):
                raise
            raise RefusedError(
                "mode 'selective': a layer runs other operations when it is computed again than the first time, as "
                "one whose "
                "first forward of a length grows a table of positions (dynamic RoPE). Use the mode 'checkpoint'."
            ) from error


def _drawing_the_same(upstream: Callable[..., Any], function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return upstream(function if torch.compiler.is_compiling() else _SameDraws(function), *args, **options)


def _check_upstream(found: Any, mode: str) -> None:
    """Refuse a checkpoint function that a mode could not be built on."""
    if mode in ("keep", "checkpoint"):
        return
    if getattr(found, "func", None) is not checkpoint:
        raise RefusedError(
            f"mode {mode!r} builds on torch.utils.checkpoint, but the layer checkpoints with {found!r}. Take "
            "`offload` out of the checkpointing kwargs, and do not combine it with another package's checkpointing."
        )
    if found.keywords.get("use_reentrant") is not False:
        raise RefusedError(
            f"mode {mode!r} needs non-reentrant checkpointing, got use_reentrant="
            f"{found.keywords.get('use_reentrant')!r}. Set gradient_checkpointing_kwargs={{'use_reentrant': False}}."
        )
    if mode == "selective" and "context_fn" in found.keywords:
        raise RefusedError(
            "mode 'selective' sets context_fn, but the checkpointing kwargs have one already (TRL's 'selective': True "
            "does that). Take it out, or leave the layers to it."
        )


def _keep(upstream: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _checkpoint(upstream: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    return upstream(function, *args)


class LayerModes:
    """
    Give each decoder layer its own way to keep activations for the backward pass. Gradients do not change.

    A layer that is computed again draws the numbers of its first time, from torch's, Python's and numpy's own
    generators.

    | mode | kept on the device | recomputed |
    |---|---|---|
    | `keep` | everything that autograd saves | nothing |
    | `selective` | the layer's input and the attention outputs | everything but attention |
    | `checkpoint` | the layer's input | the layer |
    | `offload` | nothing: the input waits on the host | the layer |

    It acts through `layer._gradient_checkpointing_func`, which transformers reads from each layer, while gradient
    checkpointing is on; [`undo`] leaves the model's `__dict__` as it was.

    Args:
        model (`PreTrainedModel`): A model with gradient checkpointing on (non-reentrant, the default).
        modes (`str` or `Sequence[str]`): One mode for all layers, or one per layer.
        save_ops (`Iterable`, *optional*): Operators that `selective` saves besides attention.
        offloader ([`ActivationOffloader`], *optional*): What `offload` uses; by default one with pinned host memory.

    Raises:
        ValueError: a mode is unknown, or there is not one per layer.
        RefusedError: checkpointing is off or reentrant.

    Example:
    ```python
    model.activation_checkpointing_enable()
    with LayerModes(model, ["offload"] * 30 + ["keep"] * 2):
        model(**batch).loss.backward()
    ```
    """

    def __init__(
        self,
        model: torch.nn.Module,
        modes: str | Sequence[str],
        save_ops: Iterable[Any] = (),
        offloader: ActivationOffloader | None = None,
    ) -> None:
        self.layers = decoder_layers(model)
        self.modes = (modes,) * len(self.layers) if isinstance(modes, str) else tuple(modes)
        unknown = sorted(set(map(str, self.modes)) - set(MODES))
        if unknown:
            raise ValueError(f"unknown modes {unknown}. Known: {', '.join(MODES)}.")
        if len(self.modes) != len(self.layers):
            raise ValueError(f"{len(self.modes)} modes for {len(self.layers)} layers: give one per layer.")
        save_ops = tuple(save_ops)
        refuse_idle("save_ops", save_ops, (), "selective" in self.modes, "in layers of mode 'selective'")
        refuse_idle("offloader", offloader, None, "offload" in self.modes, "in layers of mode 'offload'")
        self.offloader = (offloader or ActivationOffloader()) if "offload" in self.modes else None
        self._context_fn = selective_contexts(save_ops)
        self._handle = PatchHandle("LayerModes")

    def apply(self) -> LayerModes:
        """Put the modes on; return `self`."""
        try:
            for index, (layer, mode) in enumerate(zip(self.layers, self.modes, strict=True)):
                self._handle.hold(_LayerMode(f"layer {index}", mode, self._runner(index), layer))
        except RefusedError:
            self.undo()
            raise
        return self

    def undo(self) -> None:
        """Take the modes off again."""
        self._handle.revert()

    def __enter__(self) -> LayerModes:
        return self.apply()

    def __exit__(self, *exception: Any) -> None:
        self.undo()

    def _runner(self, index: int) -> Callable[..., Any]:
        """Return what runs layer `index`: called with upstream's checkpoint function, the forward and its inputs."""
        runners = {
            "keep": _keep,
            "checkpoint": _checkpoint,
            "selective": self._selective,
            "offload": self._offload,
        }
        return runners[self.modes[index]]

    def _selective(self, upstream: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
        return upstream(function, *args, context_fn=self._context_fn)

    def _offload(self, upstream: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
        with self.offloader.saving():
            return upstream(function, *args)
