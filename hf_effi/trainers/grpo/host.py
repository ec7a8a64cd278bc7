"""What the objects of this room need of the trainer that they work for: nothing that TRL's own does not have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel


class Host(Protocol):
    """
    The members of [`~trl.GRPOTrainer`] that an object may read or, where a comment says so, write.

    A contract test compares them with those of a stock trainer, and with what the objects use.
    """

    accelerator: Any
    args: Any
    model: nn.Module
    ref_model: PreTrainedModel | None
    state: Any
    train_dataset: Any
    _tokenizer: Any
    tools: list[Callable[..., Any]]
    environment_factories: Any
    rollout_func: Any
    #: written for the time of one call
    reward_funcs: list[Any]
    reward_func_names: list[str]
    reward_weights: Tensor
    num_generations: int
    multi_objective_aggregation: str
    loss_type: str
    beta: float
    top_entropy_quantile: float
    aux_loss_enabled: bool
    _entropy_bonus_enabled: bool
    max_completion_length: int | None
    pad_to_multiple_of: int | None
    use_vllm: bool
    vllm_importance_sampling_correction: bool
    vllm_importance_sampling_mode: str
    vllm_importance_sampling_clip_min: float | None
    vllm_importance_sampling_clip_max: float | None

    @property
    def _metrics(self) -> Mapping[str, dict[str, list[float]]]: ...

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...
