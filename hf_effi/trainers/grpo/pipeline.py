"""The rollout pipeline of `EffiGRPOTrainer`, wrapped around TRL's generation through `super()`.

prompt selection -> generation -> rewards -> group statistics -> group filter with bounded refill -> row pruning ->
advantages -> redistribution over ranks -> log-probs of the kept rows -> (TRL's own) loss

Every choice is made from gathered rewards and advantages, so all ranks make the same one; the number of rounds, of
rows per rank and of collectives is the same on every rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from ...functional import metrics
from ...functional.rollouts import (
    REASONS,
    AdvantagePruner,
    PassRateBand,
    ShuffledPrompts,
    concat_rows,
    deal_rows,
    equal_reward_groups,
    even_repeats,
    kept_share,
    loss_mask,
    next_refill_size,
    row_advantages,
    rows_with_gradient,
    take_rows,
    trim_rows,
)
from ...protocols import GroupFilter, PromptSelector, RolloutGroups, RolloutPruner
from .rows import ROW_KEYS, GatheredRows, Generation, as_groups, join_rounds
from .step_prompts import StepPrompts, check_selector, takes_keyword

#: Losses that divide by tokens; the others divide by rows.
TOKEN_LOSSES = ("dapo", "cispo", "vespo", "bnpo")
#: The batch entry that a loss is multiplied by, a tensor without dimensions. TRL passes it through.
LOSS_SCALE = "effi_loss_scale"


class RolloutMixin:
    """Overrides generation and rewards of `GRPOTrainer` through `super()`; see the module docstring."""

    group_filter: GroupFilter | None = None
    rollout_pruner: RolloutPruner | None = None
    prompt_selector: PromptSelector | None = None
    #: where further prompts come from, and which ones a step has
    _refill_prompts: PromptSelector | None = None
    _step_prompts: StepPrompts | None = None
    _generations_done = 0
    #: of the last generation: gathered rewards and advantages, this rank's lengths, batches whose log-probs wait
    _last_rewards: Tensor | None = None
    _last_advantages: Tensor | None = None
    _last_lengths: list[int] | None = None
    _deferred: list[dict[str, Any]] | None = None
    #: the reward function that says right or wrong
    _difficulty_column: int | None = None

    def _init_rollouts(
        self,
        prompt_selector: PromptSelector | None,
        group_filter: GroupFilter | None,
        rollout_pruner: RolloutPruner | None,
    ) -> None:
        settings = self._settings
        band = settings.difficulty_range
        self.group_filter = group_filter or (PassRateBand(*band) if band is not None else None)
        self.rollout_pruner = rollout_pruner
        if settings.prune_rate:
            self.rollout_pruner = AdvantagePruner(
                settings.prune_rate,
                settings.prune_metric,
                settings.prune_scope,
                settings.prune_balance_signs,
                seed=self.args.seed if settings.prune_metric == "random" else 0,
            )
        if prompt_selector is not None:
            check_selector(prompt_selector)
        self.prompt_selector = prompt_selector
        self._refill_prompts = prompt_selector
        if self._selects:
            self._check_selection_inputs()

    @property
    def _selects(self) -> bool:
        """Whether any method that chooses prompts, groups or rows is on."""
        return any(x is not None for x in (self.prompt_selector, self.group_filter, self.rollout_pruner))

    def _check_selection_inputs(self) -> None:
        on = "prompt selection, difficulty filtering and completion pruning"
        for name, value in (
            ("tools", self.tools),
            ("environment_factory", self.environment_factories),
            ("rollout_func", self.rollout_func),
        ):
            if value:
                raise ValueError(f"{on} do not work with `{name}` yet. Turn them off, or drop `{name}`.")
        refills = self.group_filter is not None and self._settings.difficulty_max_rounds > 1
        if refills or self.prompt_selector is not None:
            if not hasattr(self.train_dataset, "__len__"):
                raise ValueError(
                    "refilling and prompt selection pick rows by number, which a streaming dataset cannot serve. Use a "
                    "map-style dataset, or difficulty_max_rounds=1."
                )
            self._step_prompts = StepPrompts(self.train_dataset)
        names, wanted = self.reward_func_names, self._settings.difficulty_reward
        if wanted is not None and wanted not in names:
            raise ValueError(f"difficulty_reward={wanted!r} is not a reward function here. Known: {', '.join(names)}.")
        if wanted is None and len(names) > 1 and self.group_filter is not None:
            raise ValueError(
                f"with several reward functions ({', '.join(names)}) the filter must know which one says right or "
                f"wrong: set difficulty_reward, e.g. difficulty_reward={names[0]!r}."
            )
        # A selector alone gets the weighted reward where nobody says which function decides.
        self._difficulty_column = names.index(wanted) if wanted is not None else 0 if len(names) == 1 else None

    # --- the pipeline -----------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self._generations_done += 1
        if not self._selects:
            self._metrics["train"][metrics.GEN_ROUNDS].append(1.0)
            return self._finish_batch(self._generate_round(inputs))
        target = self._whole_generation(inputs)
        generation = self._generate_rounds(inputs, target)
        everything = join_rounds(generation.rounds)
        groups = self._as_groups(everything)
        chosen = self._choose_groups(groups, target)
        rows = self._choose_rows(groups, chosen)
        batch = self._redistribute(generation, everything, rows)
        if self.rollout_pruner is not None and self._settings.prune_normalizer == "original":
            original = [group * self.num_generations + i for group in chosen for i in range(self.num_generations)]
            share = kept_share(rows, original, everything.loss_tokens, self.loss_type in TOKEN_LOSSES)
            batch[LOSS_SCALE] = torch.tensor(share, device=self.accelerator.device)
        self._log_selection(everything, rows)
        return self._finish_batch(batch)

    def _generate_round(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """One call of TRL's generation, with its log-prob forwards put off where dropped rows would pay for them."""
        self._deferred = [] if self._defers_logps() else None
        self._last_lengths = None
        records: list[dict[str, Any]] = []
        try:
            batch = super()._generate_and_score_completions(inputs)
            records = self._deferred or []
        finally:
            self._deferred = None
        batch["_deferred"] = [record["key"] for record in records]
        self._settle_advantages(batch)
        self._accounting.counts[metrics.ROWS_GENERATED] += batch["advantages"].size(0)
        return batch

    def _generate(self, prompts: list[Any]) -> Any:
        generated = super()._generate(prompts)
        self._last_lengths = [len(ids) for ids in generated[1]]
        return generated

    def _gather_rows(self, batch: dict[str, Any]) -> GatheredRows:
        """What all ranks must know of the round that was just made."""
        tokens = loss_mask(batch).sum(1)
        # The mask of a truncated completion may have been cleared; its length is that of what was generated.
        lengths = tokens if self._last_lengths is None else tokens.new_tensor(self._last_lengths)
        gathered = (
            self._filter_rewards(),
            self._summed_rewards(),
            self._last_rewards,
            self._last_advantages,
            self.accelerator.gather(lengths),
            self.accelerator.gather(tokens),
        )
        return GatheredRows(*(value.cpu() for value in gathered))

    def _as_groups(self, rows: GatheredRows) -> RolloutGroups:
        one_function = self._difficulty_column is not None
        return as_groups(rows, self.num_generations, self.state.global_step, self.reward_func_names, one_function)

    def _generate_rounds(self, inputs: list[dict[str, Any]], target: int) -> Generation:
        generation = Generation()
        rounds = self._settings.difficulty_max_rounds if self.group_filter is not None else 1
        if self._step_prompts is not None:
            self._step_prompts.begin(self.state.global_step)
            if self.prompt_selector is None:
                self._step_prompts.note(inputs)
        rows = self._select_rows(target) if self.prompt_selector is not None else None
        for number in range(rounds):
            local = inputs if number == 0 and rows is None else self._rows_of_this_rank(rows)
            batch = self._generate_round(local)
            self._check_movable(batch)
            generation.add(batch, self._gather_rows(batch))
            if rows is not None:
                self._refill_prompts.observe(rows, self._as_groups(generation.rounds[-1]))
            if self.group_filter is None:
                break
            groups = self._as_groups(join_rounds(generation.rounds))
            kept = int(self.group_filter.decide(groups).keep.sum())
            if kept >= target or number == rounds - 1:
                break
            size = next_refill_size(target - kept, kept, len(groups.rewards), cap=target)
            rows = self._select_rows(self._layout.even_groups(size))
        self._metrics["train"][metrics.GEN_ROUNDS].append(float(len(generation.batches)))
        return generation

    def _choose_groups(self, groups: RolloutGroups, target: int) -> list[int]:
        """Return the groups to train on, in generation order, and count the others by reason."""
        total = len(groups.rewards)
        if self.group_filter is None:
            return list(range(total))
        decision = self.group_filter.decide(groups)
        qualified = decision.keep.nonzero().flatten().tolist()
        chosen = qualified[:target]
        counts = decision.counts()
        counts["surplus"] = len(qualified) - len(chosen)
        missing = target - len(chosen)
        if missing > 0 and self._settings.difficulty_underfill == "fill":
            taken = set(chosen)
            extra = [g for g in self.group_filter.fill_order(groups) if g not in taken][:missing]
            for group in extra:
                counts[decision.reasons[group]] -= 1
            chosen = sorted(chosen + extra)
            self._metrics["train"][metrics.GROUPS_FILLED].append(float(len(extra)))
        elif not chosen:
            # Never die and never train on nothing: one least bad group keeps the step alive.
            chosen = self.group_filter.fill_order(groups)[:1]
            counts[decision.reasons[chosen[0]]] -= 1
        self._metrics["train"][metrics.UNDERFILLED].append(float(missing > 0))
        for reason in dict.fromkeys((*REASONS[1:], "surplus", *counts)):
            dropped = counts.get(reason, 0) * self.num_generations
            self._metrics["train"][metrics.DROPPED + reason].append(float(dropped))
        return chosen

    def _choose_rows(self, groups: RolloutGroups, chosen: list[int]) -> list[int]:
        """Return the global row numbers to train on: whole groups, less what is pruned, dealt evenly."""
        size, world = self.num_generations, self.accelerator.num_processes
        rows = [group * size + i for group in chosen for i in range(size)]
        advantages, live = groups.advantages.reshape(-1), groups.live.reshape(-1)
        chunks = self._layout.micro_batches
        if self.rollout_pruner is not None:
            # The pool of a rank is a contiguous slice; rows that do not divide are competed for by all.
            pools = world if len(rows) % world == 0 else 1
            known = {"live": live[rows]} if takes_keyword(self.rollout_pruner.keep, "live") else {}
            keep = self.rollout_pruner.keep(advantages[rows], size, pools, self._generations_done, **known)
            if keep.shape != (len(rows),) or not keep.any():
                raise ValueError(
                    f"{type(self.rollout_pruner).__name__}.keep must return a mask over the {len(rows)} rows with at "
                    f"least one of them kept, got shape {tuple(keep.shape)} with {int(keep.sum())} kept."
                )
            self._metrics["train"][metrics.DROPPED + "pruned"].append(float(len(rows) - int(keep.sum())))
            self._log_pruning(advantages[rows], keep, size)
            rows = [row for row, kept in zip(rows, keep.tolist(), strict=True) if kept]
        usable, repeats = len(rows) // chunks * chunks, 1
        if usable == 0:  # fewer rows than micro-batches, each of which needs one
            usable, repeats = even_repeats(len(rows), chunks, self.args.per_device_train_batch_size)
        if usable < len(rows):

            def worth(i: int) -> tuple[float, bool, int]:
                return (-abs(float(advantages[rows[i]])), not live[rows[i]], i)

            by_worth = sorted(range(len(rows)), key=worth)[:usable]
            self._metrics["train"][metrics.DROPPED + "uneven"].append(float(len(rows) - usable))
            rows = [rows[i] for i in sorted(by_worth)]
        return rows * repeats

    def _redistribute(self, generation: Generation, everything: GatheredRows, rows: list[int]) -> dict[str, Any]:
        """Give every rank the same number of the chosen rows, moving them only where the counts differ."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        pad = self._tokenizer.pad_token_id
        deferred = generation.batches[0].pop("_deferred")
        for batch in generation.batches[1:]:
            batch.pop("_deferred")
        local = concat_rows(generation.batches, pad, self._ratio_padding)
        owners = [generation.owner(row, world) for row in rows]
        share = len(rows) // world
        counts = [sum(owner == r for owner, _ in owners) for r in range(world)]
        if all(count == share for count in counts):
            batch = take_rows(local, [index for owner, index in owners if owner == rank])
        else:
            mine = trim_rows(take_rows(local, [index for owner, index in owners if owner == rank]))
            batch = self._exchange(mine, owners, everything.loss_tokens[rows].tolist(), pad)
        batch = trim_rows(batch)
        batch["num_items_in_batch"] = self.accelerator.gather(loss_mask(batch).sum()).sum()
        batch["_deferred"] = deferred
        return batch

    def _exchange(
        self, mine: dict[str, Any], owners: list[tuple[int, int]], costs: list[float], pad: int
    ) -> dict[str, Any]:
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        payload = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in mine.items()}
        pools = gather_object([payload])
        # Rows of a rank are sent in the order they were chosen, so position k of rank r is its k-th chosen row.
        position, seen = [], [0] * world
        for owner, _ in owners:
            position.append((owner, seen[owner]))
            seen[owner] += 1
        hand = deal_rows(costs, world)[rank]
        parts = [take_rows(pools[owner], [index]) for owner, index in (position[i] for i in hand)]
        joined = concat_rows(parts, pad, self._ratio_padding)
        device = self.accelerator.device
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in joined.items()}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """
        With `prune_normalizer="original"`, the loss of the kept rows times `kept / original`.

        The loss, not the advantages: so the KL term is averaged over the original rows as well.
        """
        loss = super()._compute_loss(model, inputs)
        scale = inputs.get(LOSS_SCALE)
        return loss if scale is None else loss * scale

    # --- log-probs of the kept rows only ----------------------------------------------------------------------------

    def _defers_logps(self) -> bool:
        if self.use_vllm and self.vllm_importance_sampling_correction:
            return False  # the ratio is formed inside super() from the log-probs themselves
        return self._selects or "skip" in self.exact_savings

    def _get_per_token_logps_and_entropies(self, model: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if (
            self._deferred is None
            or torch.is_grad_enabled()
            or any(kwargs.get(k) is not None for k in ("pixel_values",))
        ):
            return super()._get_per_token_logps_and_entropies(model, input_ids, *args, **kwargs)
        attention_mask, columns = args[0], args[1]
        is_old = not self._deferred and self._layout.policy_moves
        self._deferred.append({"key": "old_per_token_logps" if is_old else "ref_per_token_logps"})
        return attention_mask.new_zeros(input_ids.size(0), columns, dtype=torch.float32), None, None

    def _finish_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Compute the log-probs that were put off, for the rows that stayed."""
        for key in batch.pop("_deferred"):
            batch[key] = self._logps_of(batch, reference=key == "ref_per_token_logps")
        self._accounting.counts[metrics.ROWS_TRAINED] += int(rows_with_gradient(batch, self._ratio_multiplies).sum())
        return batch

    def _logps_of(self, batch: dict[str, Any], reference: bool) -> Tensor:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        if "skip" in self.exact_savings:
            self._active_rows = rows_with_gradient(batch, self._ratio_multiplies)
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        try:
            with torch.no_grad(), checkpointing, self._scoring_model(reference) as model:
                logps, _, _ = self._get_per_token_logps_and_entropies(
                    model, ids, mask, batch["completion_ids"].size(1), batch_size=self.args.per_device_train_batch_size
                )
        finally:
            self._active_rows = None
        return logps

    @contextlib.contextmanager
    def _scoring_model(self, reference: bool) -> Iterator[Any]:
        """The policy, or the reference that TRL would use: a second model, the base model, or the "ref" adapter."""
        if not reference or self.ref_model is not None:
            yield self.ref_model if reference else self.model
            return
        unwrapped = self.accelerator.unwrap_model(self.model)
        with use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None):
            yield self.model

    # --- rewards ----------------------------------------------------------------------------------------------------

    def _filter_rewards(self) -> Tensor:
        """The gathered reward that decides, shape `(rows,)`: of one function as it is, or TRL's weighted sum."""
        if self._difficulty_column is None:
            return self._summed_rewards()
        return self._last_rewards[:, self._difficulty_column]

    def _summed_rewards(self) -> Tensor:
        """TRL's `reward` of every row: the weighted sum of what applies, NaN where no function does."""
        per_func = self._last_rewards
        summed = (per_func * self.reward_weights.to(per_func.device).unsqueeze(0)).nansum(dim=1)
        summed[torch.isnan(per_func).all(dim=1)] = torch.nan
        return summed

    def _settle_advantages(self, batch: dict[str, Any]) -> None:
        """Make advantages that are zero but for rounding exactly zero: the mean of equal fp32 rewards can be off."""
        equal = equal_reward_groups(self._summed_rewards().view(-1, self.num_generations))
        advantages = batch["advantages"]
        # Advantages per token are those of a subclass, which need not come from these rewards.
        centred = self.multi_objective_aggregation == "sum_then_normalize" and advantages.ndim == 1
        if centred and (self._selects or "skip" in self.exact_savings):
            zero = equal.repeat_interleave(self.num_generations)
            mine = self._layout.rows_of(self.accelerator.process_index, len(zero))
            batch["advantages"] = advantages.masked_fill(zero[mine.start : mine.stop], 0.0)
        known = row_advantages(batch, self._ratio_multiplies)
        self._last_advantages = self.accelerator.gather(known)
        dead = ~(self._last_advantages.view(-1, self.num_generations) != 0).any(dim=1)
        dead = dead | equal if centred else dead
        self._metrics["train"][metrics.FRAC_ZERO_VAR_GROUPS].append(float(dead.float().mean()))

    # --- prompts ----------------------------------------------------------------------------------------------------

    def _select_rows(self, count: int) -> list[int]:
        """Draw rows whose prompts the step does not have yet; `0` only makes the stream, for its state to be loaded."""
        if self._refill_prompts is None:
            self._refill_prompts = ShuffledPrompts(len(self.train_dataset), seed=self.args.seed + 1)
        return self._step_prompts.draw(self._refill_prompts, count, gather_object) if count else []

    def _rows_of_this_rank(self, rows: list[int]) -> list[dict[str, Any]]:
        repeated = [row for row in rows for _ in range(self.num_generations)]
        mine = self._layout.rows_of(self.accelerator.process_index, len(repeated))
        return [dict(self.train_dataset[repeated[position]]) for position in mine]

    @staticmethod
    def _check_movable(batch: dict[str, Any]) -> None:
        extra = sorted(set(batch) - ROW_KEYS - {"_deferred"})
        if extra:
            raise ValueError(
                f"difficulty filtering and completion pruning cannot pick rows of {', '.join(extra)} yet (image and "
                "multimodal inputs). Turn them off for this model."
            )

    # --- metrics ----------------------------------------------------------------------------------------------------

    def _log_selection(self, everything: GatheredRows, rows: list[int]) -> None:
        log, kept = self._metrics["train"], sorted(set(rows))
        rewards = [(metrics.REWARD_GENERATED, metrics.REWARD_KEPT, everything.weighted_rewards)]
        if self.group_filter is not None:
            rewards.append((metrics.FILTER_REWARD_GENERATED, metrics.FILTER_REWARD_KEPT, everything.rewards))
        for of_generated, of_kept, values in rewards:
            log[of_generated].append(float(torch.nanmean(values)))
            log[of_kept].append(float(torch.nanmean(values[kept])))

    def _log_pruning(self, advantages: Tensor, keep: Tensor, group_size: int) -> None:
        log, kept = self._metrics["train"], advantages[keep]
        log[metrics.PRUNE_ABS_ADVANTAGE_KEPT].append(float(kept.abs().mean()))
        log[metrics.PRUNE_POSITIVE_FRACTION].append(float((kept > 0).float().mean()))
        sign = torch.where(keep, torch.sign(advantages), 0.0).view(-1, group_size)
        one_sign = ((sign > 0).any(1) != (sign < 0).any(1)).float()
        log[metrics.PRUNE_GROUPS_WITH_ONE_SIGN].append(float(one_sign.mean()))
