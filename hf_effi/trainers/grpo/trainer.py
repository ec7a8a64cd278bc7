"""`EffiGRPOTrainer`: TRL's `GRPOTrainer`, which trains on what carries a gradient and forwards nothing else."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from ...errors import RewardError
from ...protocols import GroupFilter, PromptSelector, RolloutPruner
from .._common import EffiMixin
from ..mixins._signatures import with_signatures_of
from .accounting import StepAccounting
from .config import EffiGRPOConfig, refuse_unused
from .forward import LogProbForward
from .pipeline import LOSS_SCALE, RolloutPipeline
from .prompt_room import PromptRoom
from .resume import ResumableGRPOTrainer
from .rewards import RewardCheck, check_sums
from .savings import choose_savings, packed_forward
from .settings import GRPOSettings
from .start_checks import check_dataset, guard_vllm_server, route_checkpointing_options


@with_signatures_of(GRPOTrainer)
class EffiGRPOTrainer(EffiMixin, ResumableGRPOTrainer):
    """
    Drop-in for [`~trl.GRPOTrainer`]: every argument, attribute, metric and callback of it works here.

    With `exact_savings="off"` and no filter or pruning, the weights are bit-identical to `GRPOTrainer`'s. By default
    the exact savings are on, which change what is forwarded and not the gradient. Online difficulty filtering
    (`difficulty_range`) and CPPO completion pruning (`prune_rate`) are off until asked for.

    Args:
        model, reward_funcs, args, train_dataset, ...:
            As in [`~trl.GRPOTrainer`]. `args` may be an [`EffiGRPOConfig`] or a plain [`~trl.GRPOConfig`], which then
            has the defaults of the former's own fields. A reward of `None` or NaN means that the function does not
            apply to
            the completion: the others decide on it, and where none applies its advantage is 0 and the group's mean
            leaves it out, as in TRL. A function that returns NaN for all completions of a generation is warned of,
            once.
        prompt_selector ([`~hf_effi.protocols.PromptSelector`], *optional*):
            Chooses the prompts of every generation in place of the data loader's order.
        group_filter ([`~hf_effi.protocols.GroupFilter`], *optional*):
            Chooses the groups to train on; `difficulty_range` makes the built-in one.
        rollout_pruner ([`~hf_effi.protocols.RolloutPruner`], *optional*):
            Chooses the completions to train on; `prune_rate` makes the built-in one.
        train_sampler ([`~hf_effi.samplers.EffiSampler`], *optional*):
            Orders the prompts of each epoch, in GRPO's layout, with exact resume.

    Raises:
        ValueError: an option that cannot act here (with the reason and the fix), before any training.

    Example:
    ```python
    from datasets import Dataset
    from hf_effi import EffiGRPOConfig, EffiGRPOTrainer

    trainer = EffiGRPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=lambda completions, **kwargs: [float("42" in text) for text in completions],
        args=EffiGRPOConfig("out", difficulty_range=(0, 1), prune_rate=0.5),
        train_dataset=Dataset.from_dict({"prompt": ["What is six times seven?"] * 64}),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "grpo", "hf_effi"]
    _settings: GRPOSettings | None = None
    _prompt_room: PromptRoom | None = None

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        *positional: Any,
        prompt_selector: PromptSelector | None = None,
        group_filter: GroupFilter | None = None,
        rollout_pruner: RolloutPruner | None = None,
        **kwargs: Any,
    ):
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
            args = EffiGRPOConfig(f"{name.rstrip('/').split('/')[-1]}-GRPO")
        check_dataset(train_dataset, environment=kwargs.get("environment_factory"))
        self._settings = GRPOSettings.of(args)
        self._settings.check_objects(prompt_selector, group_filter, rollout_pruner, kwargs.get("train_sampler"))
        super().__init__(model, reward_funcs, args, train_dataset, *positional, **kwargs)
        self._prompt_room = PromptRoom.of(self.accelerator.unwrap_model(self.model))
        savings, left_out = choose_savings(self, self._settings)
        if self._settings.forward_buckets and "trim" not in savings:
            # The config knows which savings were asked for; `auto` may have left `trim` out for this model or loss.
            reason = f"acts only with 'trim': {left_out.get('trim', 'it is off.')} Drop it"
            refuse_unused(self._settings, ("forward_buckets",), reason)
        packed = packed_forward(self, savings)
        self._forward = LogProbForward(self, savings, self._settings.forward_buckets, self._count_forward, packed)
        self._rollouts = RolloutPipeline(
            self,
            self._settings,
            self._accounting,
            self._forward,
            prompt_selector=prompt_selector,
            group_filter=group_filter,
            rollout_pruner=rollout_pruner,
        )
        route_checkpointing_options(self)
        if self.args.use_vllm:
            guard_vllm_server(self, self.vllm_generation)

    # --- the seams, in the order in which data flows -----------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            with self._accounting.clock.phase("train"), self._forward.holding_attention():
                loss = super().training_step(*args, **kwargs)
        except RewardError as error:
            if folder := self._save_last_update():
                error.add_note(
                    f"The {self.state.global_step} finished steps were saved to {folder}; fix the reward function and "
                    "resume from there."
                )
            raise
        if self.accelerator.sync_gradients:
            self._accounting.flush(self._metrics["train"], self.accelerator)
        return loss

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._buffered_inputs is before:
            return inputs
        self._buffered_inputs = self._forward.sorted_chunks(self._buffered_inputs)
        return self._buffered_inputs[self._layout.micro_batch(self._step)]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        stock = super()._generate_and_score_completions
        return self._rollouts.generate(stock, inputs) if self.model.training else stock(inputs)

    def _generate(self, prompts: list[Any]) -> Any:
        with self._timed("gen"):
            generated = super()._generate(prompts)
        self._rollouts.lengths = [len(ids) for ids in generated[1]]
        return generated

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        # Once per generation on every rank. `_generate_single_turn` runs as often as a rank's rollouts call tools.
        tokenized = super()._tokenize_prompts(prompts)
        if self._prompt_room is not None:
            log = self._metrics["train" if self.model.training else "eval"]
            lengths = [len(ids) for ids in tokenized[0]]
            self._prompt_room.check(lengths, self.max_completion_length, self.accelerator, log)
        return tokenized

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        stock = super()._calculate_rewards
        self._rollouts.put_no_more_off()
        with self._timed("reward"):
            rewards = RewardCheck(self).calculate(stock, inputs, prompts, completions, completion_ids_list)
        if self._in_training:
            check_sums(rewards, self.reward_weights, self.num_generations, self.reward_func_names)
            self._rollouts.rewards = rewards
        return rewards

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        stock = super()._get_per_token_logps_and_entropies
        if torch.is_grad_enabled():
            return self._forward(stock, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        with self._timed("logp"):
            if kwargs.get("pixel_values") is None:
                later = self._rollouts.put_off(attention_mask, logits_to_keep)
                if later is not None:
                    return later, None, None
            return self._forward(stock, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        with self._forward.skipping(inputs) if self.model.training else contextlib.nullcontext():
            loss = super()._compute_loss(model, inputs)
        # With `prune_normalizer="original"`: the loss and not the advantages, so that the KL term is averaged alike.
        scale = inputs.get(LOSS_SCALE)
        return loss if scale is None else loss * scale

    # --- what they share ---------------------------------------------------------------------------------------------

    # Made when it is first asked for: other code builds trainers without `__init__` and calls single methods.
    @functools.cached_property
    def _accounting(self) -> StepAccounting:
        return StepAccounting(getattr(getattr(self, "accelerator", None), "device", None))

    @functools.cached_property
    def _rollouts(self) -> RolloutPipeline:
        return RolloutPipeline(self, None, self._accounting, self._forward)

    @functools.cached_property
    def _forward(self) -> LogProbForward:
        return LogProbForward(self)

    def _count_forward(self, real: int, forwarded: int, saved: int) -> None:
        # The other ranks of a sequence-parallel group count their own rows.
        if self.model.training and self._works_on_own_batch:
            self._accounting.count_forward(real, forwarded, saved)

    @property
    def exact_savings(self) -> tuple[str, ...]:
        """Names of the exact savings that are on."""
        return self._forward.exact_savings

    @property
    def prompt_selector(self) -> PromptSelector | None:
        """What chooses the prompts of every generation; `None` is the data loader."""
        return self._rollouts.prompt_selector

    @property
    def group_filter(self) -> GroupFilter | None:
        """What chooses the groups to train on; `None` takes all."""
        return self._rollouts.group_filter

    @property
    def rollout_pruner(self) -> RolloutPruner | None:
        """What chooses the completions to train on; `None` takes all."""
        return self._rollouts.rollout_pruner

    @property
    def _in_training(self) -> bool:
        model = getattr(self, "model", None)
        return model is not None and model.training

    def _timed(self, phase: str) -> contextlib.AbstractContextManager[None]:
        """Time a phase of a training step; evaluation has none."""
        return self._accounting.clock.phase(phase) if self._in_training else contextlib.nullcontext()
