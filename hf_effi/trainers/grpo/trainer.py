"""`EffiGRPOTrainer`: TRL's `GRPOTrainer`, which trains on what carries a gradient and forwards nothing else."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from ...errors import RewardError
from ...functional.rollouts import AdaptiveNoise
from ...protocols import AdvantageTransform, GroupFilter, PromptSelector, RolloutAllocator, RolloutPruner
from ...recipes.reflection import refuse_in_training
from ...selection import HybridGate, Screening
from .._common import EffiMixin
from ..mixins._signatures import with_signatures_of
from .accounting import StepAccounting
from .cheap_rollouts import cheap_rollouts
from .dealing import RowDealer
from .forward import LogProbForward
from .generation import TurnChain
from .in_use import MethodsInUse
from .pipeline import RolloutPipeline
from .prompt_room import PromptRoom
from .prompt_tokens import NTP_REASONS, PromptTokens, check_ntp
from .resume import ResumableGRPOTrainer
from .reuse import SpeculativeReuse, add_reuse, check_reuse
from .rewards import RewardCheck, SideColumns, check_sums
from .savings import choose_savings, packed_forward, still_exact
from .selection_objects import SelectionObjects
from .settings import GRPOSettings
from .start_checks import check_dataset, default_config, guard_vllm_server, route_checkpointing_options
from .token_budget import LossBudget, check_budgets
from .token_selection import REASONS as TOKEN_REASONS
from .token_selection import TokenSelection, check_token_selection
from .weight_noise import WeightNoise, add_noise, check_noise


@with_signatures_of(GRPOTrainer)
class EffiGRPOTrainer(EffiMixin, MethodsInUse, ResumableGRPOTrainer):
    """
    Drop-in for [`~trl.GRPOTrainer`]: every argument, attribute, metric and callback of it works here.

    With `exact_savings="off"` and no filter or pruning, the weights are bit-identical to `GRPOTrainer`'s. By default
    exact savings are on, which keep the gradient; `difficulty_range`, `prune_rate` and `rollout_reuse` are off.

    Args:
        model, reward_funcs, args, train_dataset, ...:
            As in [`~trl.GRPOTrainer`]. `args` may be an [`EffiGRPOConfig`] or a plain [`~trl.GRPOConfig`], which then
            has the defaults of the former's own fields. A reward of `None` or NaN means that the function does not
            apply to the completion: the others decide on it; where none does, its advantage is 0 and the mean of its
            group leaves it out, as in TRL. One warning names a function that returns NaN for a whole generation.
        prompt_selector ([`~hf_effi.protocols.PromptSelector`], *optional*):
            Chooses the prompts of every generation in place of the data loader's order.
        group_filter, group_filters ([`~hf_effi.protocols.GroupFilter`], or a `list` of several, *optional*):
            Chooses the groups to train on, which must pass each; `difficulty_range` makes the built-in one.
        rollout_pruner ([`~hf_effi.protocols.RolloutPruner`], *optional*):
            Chooses the completions to train on; `prune_rate` makes the built-in one.
        advantage_transform ([`~hf_effi.protocols.AdvantageTransform`], *optional*):
            Makes advantages out of gathered groups; `None` leaves TRL's.
        rollout_allocator ([`~hf_effi.protocols.RolloutAllocator`], *optional*):
            Divides the completions of a generation over its prompts.
        screening ([`~hf_effi.selection.Screening`], *optional*):
            Generates a few completions of many prompts first, and the rest of those that can teach something.
        hybrid_gate ([`~hf_effi.selection.HybridGate`], *optional*):
            Learns prompts of which no completion is right from a demonstration.
        rollout_noise ([`~hf_effi.functional.rollouts.AdaptiveNoise`], *optional*):
            Noise on the scales of the norms while completions are generated for training, and then only.
        rollout_reuse ([`~hf_effi.functional.rollouts.SpeculativeReuse`], *optional*):
            Generates only what the policy no longer agrees with of the completions of the last pass.
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
    rollout_noise: AdaptiveNoise | None = None
    _noise: WeightNoise | None = None
    _tokens: TokenSelection | None = None
    _side_columns: SideColumns | None = None
    ntp_coef: float = 0.0
    _prompt_tokens: PromptTokens | None = None

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
        group_filters: Sequence[GroupFilter] | None = None,
        advantage_transform: AdvantageTransform | None = None,
        rollout_allocator: RolloutAllocator | None = None,
        screening: Screening | None = None,
        hybrid_gate: HybridGate | None = None,
        rollout_noise: AdaptiveNoise | None = None,
        rollout_reuse: SpeculativeReuse | None = None,
        **kwargs: Any,
    ):
        args = default_config(model) if args is None else args
        check_dataset(train_dataset, environment=kwargs.get("environment_factory"))
        refuse_in_training(model, args.generation_kwargs)
        self._settings = GRPOSettings.of(args)
        objects = SelectionObjects.of(
            group_filters,
            prompt_selector=prompt_selector,
            group_filter=group_filter,
            rollout_pruner=rollout_pruner,
            advantage_transform=advantage_transform,
            rollout_allocator=rollout_allocator,
            screening=screening,
            hybrid_gate=hybrid_gate,
        )
        objects.check(self._settings, kwargs.get("train_sampler"))
        check_token_selection(rollout_pruner, args, self._settings)
        check_noise(rollout_noise, args, kwargs.get("rollout_func"))
        given = {**kwargs, "prompt_selector": prompt_selector, "rollout_noise": rollout_noise}
        check_reuse(rollout_reuse, args, train_dataset, given)
        self.ntp_coef = check_ntp(self._settings.ntp_coef, args, hybrid_gate)
        super().__init__(model, reward_funcs, args, train_dataset, *positional, **kwargs)
        self._side_columns = SideColumns.taken_from(self, advantage_transform)
        self._prompt_room = PromptRoom.of(self.accelerator.unwrap_model(self.model))
        self._tokens = TokenSelection.of(self, rollout_pruner, self._settings)
        self._prompt_tokens = PromptTokens.of(self, self.ntp_coef)
        reasons = (TOKEN_REASONS if self._tokens is not None else {}) | (NTP_REASONS if self._prompt_tokens else {})
        savings = choose_savings(self, self._settings, reasons)
        buckets, (loss_budget, score_budget) = self._settings.forward_buckets, self._settings.token_budgets
        check_budgets(self, EffiGRPOTrainer, savings, loss_budget, score_budget)
        packed = packed_forward(self, savings)
        self._forward = LogProbForward(self, savings, buckets, self._count_forward, packed, score_budget)
        self._loss_budget = LossBudget(self, self._forward, loss_budget)
        self._rollouts = RolloutPipeline(self, self._settings, self._accounting, self._forward, objects)
        # From the outermost on: what is verified and generated, is so under the noise.
        self._noise = add_noise(self, rollout_noise, self._rollouts, self._turns.around)
        add_reuse(self, rollout_reuse, self._turns.around)
        self._turns.around += cheap_rollouts(self, self._settings, self._accounting)
        route_checkpointing_options(self)
        if self.args.use_vllm:
            guard_vllm_server(self, self.vllm_generation)

    # --- the seams, in the order in which data flows -----------------------------------------------------------------

    def add_callback(self, callback: Any) -> None:
        super().add_callback(callback)
        if "_forward" in vars(self) and self._settings is not None:  # the trainer is built, and its savings chosen
            self._forward.exact_savings = still_exact(self, self._settings, self._forward.exact_savings)

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
        self._accounting.end_micro_step()
        if self.accelerator.sync_gradients:
            self._accounting.flush(self._metrics["train"], self.accelerator)
        return loss

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training:
            return inputs
        if self._buffered_inputs is not before:
            dealer = RowDealer(self, self._forward, self._accounting)
            self._buffered_inputs = self._forward.sorted_chunks(dealer.dealt(self._buffered_inputs))
        return self._loss_budget.begin(self._buffered_inputs, self._layout.micro_batch(self._step))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        stock = self._with_rows_written(super()._generate_and_score_completions)
        batch = self._rollouts.generate(stock, inputs) if self.model.training else stock(inputs)
        return batch if self._noise is None else self._noise.corrected(batch)

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

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        return self._turns(super()._generate_single_turn, prompt_ids, *args, **kwargs)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        stock = super()._calculate_rewards
        self._rollouts.put_no_more_off()
        with self._timed("reward"):
            check = RewardCheck(self, self._side_columns)
            rewards = check.calculate(stock, inputs, prompts, completions, completion_ids_list)
        if self._in_training:
            check_sums(rewards, self.reward_weights, self.num_generations, self.reward_func_names)
            self._rollouts.rewards, self._rollouts.side = rewards, check.side
        return rewards

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        stock = super()._get_per_token_logps_and_entropies
        if torch.is_grad_enabled():
            stock = stock if self._prompt_tokens is None else self._prompt_tokens.around(stock)
            scores = self._forward(stock, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
            return self._rollouts.hybrid.seen(scores)
        with self._timed("logp"):
            if kwargs.get("pixel_values") is None:
                later = self._rollouts.put_off(attention_mask, logits_to_keep)
                if later is not None:
                    return later, None, None
            return self._forward(stock, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

    def get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        if self._tokens is None:
            return super().get_high_entropy_mask(entropies, mask, threshold)
        return self._tokens.weights(entropies, mask)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        stock = super()._compute_loss
        stock = stock if self._prompt_tokens is None else self._prompt_tokens.added_to(stock)
        with contextlib.nullcontext() if self._tokens is None else self._tokens.choosing(inputs):
            return self._rollouts.hybrid.loss(self._loss_budget, stock, model, inputs)

    # --- what they share ---------------------------------------------------------------------------------------------

    # Made when it is first asked for: other code builds trainers without `__init__` and calls single methods.
    @functools.cached_property
    def _accounting(self) -> StepAccounting:
        return StepAccounting(getattr(getattr(self, "accelerator", None), "device", None))

    @functools.cached_property
    def row_writers(self) -> list[Callable[[Any], list[dict[str, Any]]]]:
        """What rewrites rows of the dataset, one after the other, before completions are generated for them."""
        return []

    def _with_rows_written(self, stock: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
        if not self.row_writers:
            return stock
        return lambda rows: stock(functools.reduce(lambda written, write: write(written), self.row_writers, rows))

    @functools.cached_property
    def _turns(self) -> TurnChain:
        return TurnChain()

    @functools.cached_property
    def _rollouts(self) -> RolloutPipeline:
        return RolloutPipeline(self, None, self._accounting, self._forward)

    @functools.cached_property
    def _forward(self) -> LogProbForward:
        return LogProbForward(self)

    @functools.cached_property
    def _loss_budget(self) -> LossBudget:
        return LossBudget(self, self._forward)

    def _count_forward(self, real: int, forwarded: int, saved: int) -> None:
        # The other ranks of a sequence-parallel group count their own rows.
        if self.model.training and self._works_on_own_batch:
            self._accounting.count_forward(real, forwarded, saved)

    @property
    def _in_training(self) -> bool:
        return bool(getattr(getattr(self, "model", None), "training", False))

    def _timed(self, phase: str) -> contextlib.AbstractContextManager[None]:
        """Time a phase of a training step; evaluation has none."""
        return self._accounting.clock.phase(phase) if self._in_training else contextlib.nullcontext()
