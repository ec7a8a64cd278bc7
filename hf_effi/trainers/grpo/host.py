"""What the objects of this room need of the trainer that they work for: nothing that TRL's own does not have."""

from __future__ import annotations

from collections.abc import Mapping
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
    callback_handler: Any
    control: Any
    model: nn.Module
    model_wrapped: Any
    ref_model: PreTrainedModel | None
    state: Any
    train_dataset: Any
    _tokenizer: Any
    chat_template: str | None
    chat_template_kwargs: Any
    #: written for the time of one call
    generation_config: Any
    eos_token_ids: list[int]
    tools: Any
    environment_factories: Any
    rollout_func: Any
    #: written, so that TRL sends vLLM the weights once more; there under vLLM only
    _last_loaded_step: int
    _is_vlm: bool
    #: written for the time of one call
    reward_funcs: list[Any]
    #: taken out of, once, where they are side columns, and written for the time of one call
    reward_func_names: list[str]
    reward_processing_classes: list[Any]
    reward_weights: Tensor
    #: written for the time of one call
    num_generations: int
    num_generations_eval: Any
    current_gradient_accumulation_steps: int
    scale_rewards: str
    multi_objective_aggregation: str
    loss_type: str
    beta: float
    #: written for the time of one call
    top_entropy_quantile: float
    aux_loss_enabled: bool
    _entropy_bonus_enabled: bool
    max_completion_length: int | None
    temperature: float
    pad_to_multiple_of: int | None
    use_vllm: bool
    vllm_importance_sampling_correction: bool
    vllm_importance_sampling_mode: str
    vllm_importance_sampling_clip_min: float | None
    vllm_importance_sampling_clip_max: float | None

    @property
    def _logs(self) -> Any: ...

    @property
    def _metrics(self) -> Mapping[str, dict[str, list[float]]]: ...

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]: ...

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...
