"""AttentionInfluence: rows that get worse without the retrieval heads are rows that use their context."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RefusedError
from ..functional.data import check_count, copy_probe, copy_scores, relative_increase, top_heads
from .scores import Batch, ModelScore

Head = tuple[int, int]

#: what transformers calls the last projection of an attention module
_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense")


def _attention_layers(model: nn.Module) -> dict[int, tuple[nn.Module, nn.Module]]:
    """Return `{layer: (attention module, its output projection)}`."""
    found = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        projection = next((getattr(module, name) for name in _OUTPUT_PROJECTIONS if hasattr(module, name)), None)
        # By the name of the class too: state-space mixers have a layer_idx and an out_proj, but no heads.
        if isinstance(layer, int) and projection is not None and "Attention" in type(module).__name__:
            found[layer] = module, projection
    if not found:
        raise RefusedError(
            f"{type(model).__name__} has no attention module with a layer_idx and one of {list(_OUTPUT_PROJECTIONS)}. "
            "Use a causal language model of transformers."
        )
    return found


def _num_heads(model: Any) -> int:
    return model.config.get_text_config().num_attention_heads


@contextmanager
def masked_heads(model: Any, heads: Iterable[Head]) -> Iterator[set[int]]:
    """
    Inside the context, these heads add nothing: their slice of the input of the output projection is zero.

    Works for every attention implementation, for grouped queries (a head is a query head) and under PEFT, where the
    adapter of the projection sees the zeros too. No weight is touched; on leaving, also by an exception, the hooks are
    gone.

    Args:
        model: Causal language model of transformers, bare or wrapped.
        heads (`Iterable[tuple[int, int]]`): `(layer, head)`, counted from 0.

    Yields:
        `set[int]`: The layers in which heads were masked so far.

    Raises:
        ValueError: a layer or a head that the model does not have.

    Example:
    ```python
    with masked_heads(model, [(3, 0)]):
        loss_without = model(**batch).loss
    ```
    """
    layers, num_heads = _attention_layers(model), _num_heads(model)
    chosen: dict[int, list[int]] = defaultdict(list)
    for layer, head in heads:
        if layer not in layers or not 0 <= head < num_heads:
            raise ValueError(
                f"head ({layer}, {head}) does not exist: layers with attention are {sorted(layers)}, heads are in "
                f"[0, {num_heads})."
            )
        chosen[layer].append(head)
    reached: set[int] = set()

    def hook_of(layer: int, masked: list[int]) -> Any:
        def zero(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            reached.add(layer)
            split = inputs[0].unflatten(-1, (num_heads, -1)).clone()
            split[..., masked, :] = 0
            return (split.flatten(-2), *inputs[1:])

        return zero

    handles = [layers[layer][1].register_forward_pre_hook(hook_of(layer, masked)) for layer, masked in chosen.items()]
    try:
        yield reached
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    """Have the attention modules compute their weights, which fused implementations never hold."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = inner.config._attn_implementation
    inner.set_attn_implementation("eager")
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


def copy_head_scores(
    model: Any,
    *,
    num_rows: int = 16,
    length: int = 32,
    token_ids: Sequence[int] | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[Head, float]:
    """
    Return how often each head attends most to the token to be copied, on rows of random tokens that are repeated.

    The model is run with eager attention and in eval mode, and put back.

    Args:
        model: Causal language model of transformers, bare or PEFT.
        num_rows, length (`int`, *optional*, default to 16 and 32): Rows of the probe and tokens of one half.
        token_ids (`Sequence[int]`, *optional*): Tokens to draw from; all of the vocabulary if `None`.
        batch_size (`int`, *optional*, defaults to 8): Rows forwarded at once; memory grows with its product with
            `heads * (2 * length)^2`.
        seed (`int`, *optional*, defaults to 0): Seed of the probe.

    Returns:
        `dict[tuple[int, int], float]`: Score in `[0, 1]` of each `(layer, head)`.

    Raises:
        ValueError: a probe out of range.
        RefusedError: a model whose attention modules do not return their weights.
    """
    check_count("batch_size", batch_size)
    layers = _attention_layers(model)
    vocabulary = range(model.config.get_text_config().vocab_size) if token_ids is None else token_ids
    probe = copy_probe(num_rows, length, vocabulary, seed)
    sums: dict[int, Tensor] = {}

    def hook_of(layer: int) -> Any:
        def read(module: nn.Module, _: Any, output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if not isinstance(weights, Tensor):
                raise RefusedError(
                    f"{type(module).__name__} returned no attention weights under eager attention. Choose the heads "
                    "yourself: AttentionInfluence(model, heads=[(layer, head), ...])."
                )
            sums[layer] = sums.get(layer, 0.0) + copy_scores(weights.float()) * weights.shape[0]

        return read

    training = model.training
    handles = [module.register_forward_hook(hook_of(layer)) for layer, (module, _) in layers.items()]
    try:
        model.eval()
        with _eager_attention(model), torch.no_grad():
            for part in probe.to(next(model.parameters()).device).split(batch_size):
                model(input_ids=part)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {(layer, head): float(s) / num_rows for layer in sorted(sums) for head, s in enumerate(sums[layer])}


def retrieval_heads(model: Any, share: float = 0.05, **probe: Any) -> list[Head]:
    """
    Return the heads that copy best: [`top_heads`] of [`copy_head_scores`].

    Args:
        model: Causal language model of transformers.
        share (`float`, *optional*, defaults to 0.05): Share of all heads, in `(0, 1]`; at least one head.
        probe: Arguments of [`copy_head_scores`].
    """
    return top_heads(copy_head_scores(model, **probe), share)


class AttentionInfluence(ModelScore):
    """
    Relative increase of a row's loss when the retrieval heads are masked: `(L_masked - L) / L` (AttentionInfluence).

    High: the row is predicted from what stands earlier in it. A scorer for [`add_score`]: reads `input_ids` and, where
    there are, `labels` and `attention_mask`. Its fingerprint covers the model and the heads. A row without a labelled
    token scores NaN.

    Args:
        model: Causal language model of transformers, bare or PEFT.
        heads (`Sequence[tuple[int, int]]`): `(layer, head)` to mask, such as `retrieval_heads(model)`.

    Raises:
        ValueError: no head, or one that the model does not have.
        RefusedError: when called, a head that a fused projection computes without calling its module.

    Example:
    ```python
    data = add_score(data, "influence", AttentionInfluence(model, retrieval_heads(model)))
    ```
    """

    def __init__(self, model: Any, heads: Sequence[Head]) -> None:
        super().__init__(model, "loss")
        self.heads = sorted({(int(layer), int(head)) for layer, head in heads})
        if not self.heads:
            raise ValueError("heads is empty, so that masking changes nothing. Pass retrieval_heads(model).")
        with masked_heads(model, self.heads):
            pass  # a head that does not exist raises here, not in the first batch

    def fingerprint(self) -> str:
        return f"AttentionInfluence {self.heads} {super().fingerprint()}"

    def __call__(self, batch: Batch) -> Tensor:
        base = super().__call__(batch)
        with masked_heads(self.model, self.heads) as reached:
            masked = super().__call__(batch)
        missed = {layer for layer, _ in self.heads} - reached
        if missed:
            raise RefusedError(
                f"The output projections of layers {sorted(missed)} were not called as modules, so their heads were "
                "not masked. Score with the unpatched model."
            )
        return relative_increase(base, masked)
