"""Longer contexts: the RoPE base, ProLong's two stages, and LongGen's and LM-Infinite's attention patterns."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from ..errors import RefusedError
from ..functional.rope import extended_rope_base
from ..functional.segment_attention import AttentionPattern


def extend_rope(config: PreTrainedConfig, max_length: int, *, theta: float | None = None) -> PreTrainedConfig:
    """
    Return a copy of a model config for sequences of `max_length`: a larger RoPE base and `max_position_embeddings`.

    Without `theta` the base follows [`~hf_effi.functional.rope.extended_rope_base`]. In models whose layer types have
    bases of their own, only full attention is changed; sliding windows see no longer distances than before.

    Args:
        config (`PreTrainedConfig`): Of the model that is continued.
        max_length (`int`): The longest sequence, above `config.max_position_embeddings`.
        theta (`float`, *optional*): The base to set, for papers that give one: 8e6 for ProLong's 64k stage.

    Raises:
        ValueError: no rotary positions, positions that are scaled already (`llama3`, `yarn`, ...), a length that is
            not longer, or a base that is not larger.

    Example:
    ```python
    config = extend_rope(AutoConfig.from_pretrained(path), 65_536, theta=8e6)
    model = AutoModelForCausalLM.from_pretrained(path, config=config)
    ```
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    old_length = text.max_position_embeddings
    if max_length <= old_length:
        raise ValueError(f"max_length={max_length} must be above the {old_length} positions that the model has.")
    parameters = _full_attention_rope(text)
    if theta is None:
        theta = extended_rope_base(parameters["rope_theta"], max_length / old_length, _rotary_dim(text, parameters))
    if not theta > parameters["rope_theta"]:
        raise ValueError(f"theta={theta!r} must be above the model's base {parameters['rope_theta']!r}.")
    parameters["rope_theta"] = float(theta)
    text.max_position_embeddings = max_length
    return config


def _full_attention_rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the dict in `config` that holds the RoPE base of full-attention layers."""
    name = type(config).__name__
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise RefusedError(f"{name} has no rope_parameters: the model has no rotary positions to extend.")
    parameters = parameters.get("full_attention", parameters)
    if "rope_theta" not in parameters:
        raise RefusedError(
            f"{name}: none of {sorted(parameters)} in rope_parameters is `full_attention` or `rope_theta`."
        )
    if parameters.get("rope_type", "default") != "default":
        raise RefusedError(
            f"{name} scales its positions by rope_type={parameters['rope_type']!r} already. A new base is for "
            "rope_type='default'; set the base and the type in config.rope_parameters yourself."
        )
    return parameters


def _rotary_dim(config: PreTrainedConfig, parameters: dict[str, Any]) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


@dataclass(frozen=True)
class LongContextStage:
    """
    One stage of continued training on long documents.

    Args:
        max_length (`int`): Tokens of a sequence.
        rope_theta (`float`): RoPE base, for [`extend_rope`].
        steps (`int`): Updates.
        tokens_per_step (`int`): Tokens of an update, over all devices.
        learning_rate (`float`): Peak learning rate.
    """

    max_length: int
    rope_theta: float
    steps: int
    tokens_per_step: int
    learning_rate: float

    def training_arguments(self, devices: int, sequence_parallel_size: int = 1) -> dict[str, Any]:
        """
        Return the arguments for `TrainingArguments` or `SFTConfig`, with one sequence per micro-batch.

        Args:
            devices (`int`): Devices of the run.
            sequence_parallel_size (`int`, *optional*, defaults to `1`): Devices that share a sequence.

        Raises:
            ValueError: `tokens_per_step` is no multiple of what all devices take at once.
        """
        at_once = self.max_length * devices // sequence_parallel_size
        if devices % sequence_parallel_size or not at_once or self.tokens_per_step % at_once:
            raise ValueError(
                f"{devices} devices in groups of {sequence_parallel_size} take {at_once} tokens at once, of which "
                f"{self.tokens_per_step} is no multiple. Use a power of two of devices, at most "
                f"{self.tokens_per_step // self.max_length} groups."
            )
        return {
            "max_steps": self.steps,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": self.tokens_per_step // at_once,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "warmup_steps": 0.1,  # below 1: a fraction of the steps
            "weight_decay": 0.1,
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "max_grad_norm": 1.0,
            "activation_checkpointing": True,
        }


def prolong_stages() -> tuple[LongContextStage, LongContextStage]:
    """
    Return ProLong's two stages from Llama-3-8B: 20B tokens at 64k, then 20B tokens at 512k.

    Settings of the released training scripts; data mix and packing of documents are up to you. arXiv:2410.02660.

    Example:
    ```python
    >>> [(stage.max_length, stage.rope_theta, stage.steps * stage.tokens_per_step / 1e9) for stage in prolong_stages()]
    [(65536, 8000000.0, 20.97152), (524288, 128000000.0, 20.97152)]
    >>> prolong_stages()[0].training_arguments(devices=32)["gradient_accumulation_steps"]
    2

    ```
    """
    return (
        LongContextStage(1 << 16, 8e6, steps=5000, tokens_per_step=1 << 22, learning_rate=1e-5),
        LongContextStage(1 << 19, 1.28e8, steps=2500, tokens_per_step=1 << 23, learning_rate=5e-6),
    )


def longgen_patterns(
    num_layers: int,
    *,
    window: int,
    sink: int = 0,
    stride: int = 0,
    stride_block: int = 1,
    full_fraction: float = 1 / 3,
) -> list[AttentionPattern | None]:
    """
    Return LongGen's hybrid: full attention in the middle layers, sparse attention at the top and the bottom.

    The paper's two variants are sinks with a window, and strided blocks. arXiv:2410.01485.

    Args:
        num_layers (`int`): Layers of the model.
        window (`int`): Latest keys that a sparse layer sees.
        sink (`int`, *optional*, defaults to `0`): First keys that it sees.
        stride, stride_block (`int`, *optional*): Blocks of earlier keys that it sees, see [`AttentionPattern`].
        full_fraction (`float`, *optional*, defaults to 1/3): Share of the layers with full attention.

    Returns:
        `list`: For [`~hf_effi.attention.varlen.set_attention_patterns`].

    Raises:
        ValueError: a fraction outside `[0, 1]`, or a bad pattern.

    Example:
    ```python
    >>> ["full" if pattern is None else "sparse" for pattern in longgen_patterns(6, window=1024, sink=4)]
    ['sparse', 'sparse', 'full', 'full', 'sparse', 'sparse']

    ```
    """
    if not 0 <= full_fraction <= 1:
        raise ValueError(f"full_fraction={full_fraction!r} must lie in [0, 1].")
    sparse = AttentionPattern(window=window, sink=sink, stride=stride, stride_block=stride_block)
    full = round(num_layers * full_fraction)
    first = (num_layers - full) // 2
    return [None if first <= layer < first + full else sparse for layer in range(num_layers)]


def lambda_patterns(num_layers: int, *, window: int, sink: int = 10) -> list[AttentionPattern]:
    """
    Return LM-Infinite's mask for all layers: the first `sink` keys and the latest `window`. arXiv:2308.16137.

    The mask only. The paper also limits the distance at which the first keys are seen, which needs no training; with
    the mask alone, train with it.

    Args:
        num_layers (`int`): Layers of the model.
        window (`int`): Latest keys; the paper takes the length that the model was trained on.
        sink (`int`, *optional*, defaults to `10`): First keys; the value in the released code's example.

    Example:
    ```python
    >>> lambda_patterns(2, window=4096)[1]
    AttentionPattern(window=4096, sink=10, stride=0, stride_block=1)

    ```
    """
    return [AttentionPattern(window=window, sink=sink)] * num_layers
