"""The rollout pipeline of `EffiGRPOTrainer`, wrapped around TRL's generation through `super()`.

prompt selection -> generation -> rewards -> group statistics -> group filter with bounded refill -> row pruning ->
advantages -> redistribution over ranks -> log-probs of the kept rows -> (TRL's own) loss

Every choice is made from gathered rewards and advantages, so all ranks make the same one; the number of rounds, of
rows per rank and of collectives is the same on every rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from ..functional.rollouts import (
    AdvantagePruner,
    PassRateBand,
    ShuffledPrompts,
    concat_rows,
    deal_rows,
    equal_reward_groups,
    group_pass_rates,
    next_refill_size,
    take_rows,
    trim_rows,
)
from ..protocols import GroupFilter, PromptSelector, RolloutGroups, RolloutPruner
from .grpo_config import own_setting

#: The batch entries that can move between ranks. Image tensors are indexed by patch, not by row, and cannot.
ROW_KEYS = frozenset(
    "prompt_ids prompt_mask completion_ids completion_mask advantages num_items_in_batch old_per_token_logps "
    "ref_per_token_logps sampling_per_token_logps importance_sampling_ratio tool_mask".split()
)


@dataclass
class Generation:
    """All rounds of one generation. Row `i` of the lists below is row `i` of the gathered rounds, in round order."""

    batches: list[dict[str, Any]] = field(default_factory=list)
    rows_per_rank: list[int] = field(default_factory=list)
    advantages: list[Tensor] = field(default_factory=list)
    rewards: list[Tensor] = field(default_factory=list)
    lengths: list[Tensor] = field(default_factory=list)

    def add(self, batch: dict[str, Any], advantages: Tensor, rewards: Tensor, lengths: Tensor) -> None:
        self.batches.append(batch)
        self.rows_per_rank.append(batch["advantages"].size(0))
        self.advantages.append(advantages)
        self.rewards.append(rewards)
        self.lengths.append(lengths)

    def groups(self, group_size: int, step: int) -> RolloutGroups:
        parts = (torch.cat(values).view(-1, group_size) for values in (self.rewards, self.advantages, self.lengths))
        return RolloutGroups(*parts, step=step)

    def owner(self, row: int, world: int) -> tuple[int, int]:
        """Return `(rank, index in that rank's joined rounds)` of a global row."""
        local_offset = 0
        for size in self.rows_per_rank:
            if row < size * world:
                return row // size, local_offset + row % size
            row -= size * world
            local_offset += size
        raise IndexError(f"row {row} is past the last round.")


class RolloutMixin:
    """Overrides generation and rewards of `GRPOTrainer` through `super()`; see the module docstring."""

    def _init_rollouts(
        self,
        prompt_selector: PromptSelector | None,
        group_filter: GroupFilter | None,
        rollout_pruner: RolloutPruner | None,
    ) -> None:
        args = self.args
        band, rate = own_setting(args, "difficulty_range"), own_setting(args, "prune_rate")
        self.group_filter = group_filter or (PassRateBand(*band) if band is not None else None)
        self.rollout_pruner = rollout_pruner
        if rate:
            self.rollout_pruner = AdvantagePruner(
                rate,
                args.prune_metric,
                args.prune_scope,
                args.prune_balance_signs,
                seed=args.seed if args.prune_metric == "random" else 0,
            )
        self.prompt_selector = prompt_selector
        self._refill_prompts: PromptSelector | None = prompt_selector
        self._generations_done = 0
        self._last_rewards: Tensor | None = None
        self._deferred: list[dict[str, Any]] | None = None
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
        refills = self.group_filter is not None and own_setting(self.args, "difficulty_max_rounds") > 1
        if (refills or self.prompt_selector is not None) and not hasattr(self.train_dataset, "__len__"):
            raise ValueError(
                "refilling and prompt selection pick rows by number, which a streaming dataset cannot serve. Use a "
                "map-style dataset, or difficulty_max_rounds=1."
            )
        names, wanted = self.reward_func_names, own_setting(self.args, "difficulty_reward")
        if self.group_filter is None:
            return
        if wanted is not None and wanted not in names:
            raise ValueError(f"difficulty_reward={wanted!r} is not a reward function here. Known: {', '.join(names)}.")
        if wanted is None and len(names) > 1:
            raise ValueError(
                f"with several reward functions ({', '.join(names)}) the filter must know which one says right or "
                f"wrong: set difficulty_reward, e.g. difficulty_reward={names[0]!r}."
            )
        self._difficulty_column = names.index(wanted) if wanted is not None else 0

    # --- the pipeline -----------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self._generations_done += 1
        if not self._selects:
            self._metrics["train"]["effi/gen_rounds"].append(1.0)
            return self._finish_batch(self._generate_round(inputs))
        target = self._whole_generation(inputs)
        generation = self._generate_rounds(inputs, target)
        groups = generation.groups(self.num_generations, self.state.global_step)
        kept = self._choose_groups(groups, target)
        rows = self._choose_rows(groups, kept)
        batch = self._redistribute(generation, rows)
        self._log_selection(generation, rows)
        return self._finish_batch(batch)

    def _generate_round(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """One call of TRL's generation, with its log-prob forwards put off where dropped rows would pay for them."""
        self._deferred = [] if self._defers_logps() else None
        records: list[dict[str, Any]] = []
        try:
            batch = super()._generate_and_score_completions(inputs)
            records = self._deferred or []
        finally:
            self._deferred = None
        batch["_deferred"] = [record["key"] for record in records]
        self._zero_equal_groups(batch)
        self._count_rows("rows_generated", batch["advantages"].size(0))
        return batch

    def _generate_rounds(self, inputs: list[dict[str, Any]], target: int) -> Generation:
        generation = Generation()
        rounds = own_setting(self.args, "difficulty_max_rounds") if self.group_filter is not None else 1
        rows = self._select_rows(target) if self.prompt_selector is not None else None
        kept = 0
        for number in range(rounds):
            local = inputs if number == 0 and rows is None else self._rows_of_this_rank(rows)
            batch = self._generate_round(local)
            self._check_movable(batch)
            generation.add(
                batch,
                self.accelerator.gather(batch["advantages"]).cpu(),
                self._filter_rewards().cpu(),
                self.accelerator.gather(batch["completion_mask"].sum(1)).cpu(),
            )
            if rows is not None:
                rates = group_pass_rates(generation.rewards[-1].view(-1, self.num_generations)).tolist()
                self._refill_prompts.observe(rows, rates)
            if self.group_filter is None:
                break
            groups = generation.groups(self.num_generations, self.state.global_step)
            kept = int(self.group_filter.decide(groups).keep.sum())
            if kept >= target or number == rounds - 1:
                break
            size = next_refill_size(target - kept, kept, len(groups.rewards), cap=target)
            rows = self._select_rows(self._layout.even_groups(size))
        self._metrics["train"]["effi/gen_rounds"].append(float(len(generation.batches)))
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
        if missing > 0 and own_setting(self.args, "difficulty_underfill") == "fill":
            taken = set(chosen)
            extra = [g for g in self.group_filter.fill_order(groups) if g not in taken][:missing]
            for group in extra:
                counts[decision.reasons[group]] -= 1
            chosen = sorted(chosen + extra)
            self._metrics["train"]["effi/groups_filled"].append(float(len(extra)))
        elif not chosen:
            # Never die and never train on nothing: one least bad group keeps the step alive.
            chosen = self.group_filter.fill_order(groups)[:1]
            counts[decision.reasons[chosen[0]]] -= 1
        self._metrics["train"]["effi/underfilled"].append(float(missing > 0))
        for reason in dict.fromkeys(("too_hard", "too_easy", "zero_variance", "unscorable", "surplus", *counts)):
            dropped = counts.get(reason, 0) * self.num_generations
            self._metrics["train"][f"effi/dropped/{reason}"].append(float(dropped))
        return chosen

    def _choose_rows(self, groups: RolloutGroups, chosen: list[int]) -> list[int]:
        """Return the global row numbers to train on: whole groups, less what is pruned, dealt evenly."""
        size, world = self.num_generations, self.accelerator.num_processes
        rows = [group * size + i for group in chosen for i in range(size)]
        advantages = groups.advantages.reshape(-1)
        chunks = self._layout.micro_batches
        if self.rollout_pruner is not None:
            # The pool of a rank is a contiguous slice; rows that do not divide are competed for by all.
            pools = world if len(rows) % world == 0 else 1
            keep = self.rollout_pruner.keep(advantages[rows], size, pools, self._generations_done)
            self._metrics["train"]["effi/dropped/pruned"].append(float(len(rows) - int(keep.sum())))
            self._log_pruning(advantages[rows], keep, size)
            rows = [row for row, kept in zip(rows, keep.tolist(), strict=True) if kept]
        usable = len(rows) // chunks * chunks
        if usable == 0:
            # Fewer rows than micro-batches: every micro-batch needs one, and repeating leaves a mean as it is.
            rows = (rows * chunks)[:chunks]
        elif usable < len(rows):
            by_weight = sorted(range(len(rows)), key=lambda i: (-abs(float(advantages[rows[i]])), i))[:usable]
            self._metrics["train"]["effi/dropped/uneven"].append(float(len(rows) - usable))
            rows = [rows[i] for i in sorted(by_weight)]
        return rows

    def _redistribute(self, generation: Generation, rows: list[int]) -> dict[str, Any]:
        """Give every rank the same number of the chosen rows, moving them only where the counts differ."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        pad = self._tokenizer.pad_token_id
        deferred = generation.batches[0].pop("_deferred")
        for batch in generation.batches[1:]:
            batch.pop("_deferred")
        local = concat_rows(generation.batches, pad)
        owners = [generation.owner(row, world) for row in rows]
        share = len(rows) // world
        counts = [sum(owner == r for owner, _ in owners) for r in range(world)]
        if all(count == share for count in counts):
            batch = take_rows(local, [index for owner, index in owners if owner == rank])
        else:
            mine = trim_rows(take_rows(local, [index for owner, index in owners if owner == rank]))
            batch = self._exchange(mine, owners, torch.cat(generation.lengths)[rows].tolist(), pad)
        total_before = sum(int(value.sum()) for value in generation.lengths)
        batch = trim_rows(batch)
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        batch["num_items_in_batch"] = self.accelerator.gather(mask.sum()).sum()
        if own_setting(self.args, "prune_normalizer") == "original" and self.rollout_pruner is not None:
            batch["advantages"] = batch["advantages"] * self._kept_share(generation, rows, batch, total_before)
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
        joined = concat_rows(parts, pad)
        device = self.accelerator.device
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in joined.items()}

    def _kept_share(self, generation: Generation, rows: list[int], batch: dict[str, Any], total_tokens: int) -> float:
        """`kept / generated`, in the unit the loss divides by: tokens for token-level losses, rows for the others."""
        if self.loss_type in ("dapo", "cispo", "vespo", "bnpo"):
            return float(batch["num_items_in_batch"]) / max(1, total_tokens)
        return len(rows) / sum(size * self.accelerator.num_processes for size in generation.rows_per_rank)

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
        self._count_rows("rows_trained", int((batch["advantages"] != 0).sum()))
        return batch

    def _logps_of(self, batch: dict[str, Any], reference: bool) -> Tensor:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        if "skip" in self.exact_savings:
            self._active_rows = batch["advantages"] != 0
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
        """The gathered reward that the filter looks at, shape `(rows,)`."""
        if self.group_filter is None:
            return self._summed_rewards()
        return self._last_rewards[:, self._difficulty_column]

    def _summed_rewards(self) -> Tensor:
        per_func = self._last_rewards
        summed = (per_func * self.reward_weights.to(per_func.device).unsqueeze(0)).nansum(dim=1)
        summed[torch.isnan(per_func).all(dim=1)] = torch.nan
        return summed

    def _zero_equal_groups(self, batch: dict[str, Any]) -> None:
        """Make advantages that are zero but for rounding exactly zero: the mean of equal fp32 rewards can be off."""
        rewards = self._summed_rewards().view(-1, self.num_generations)
        equal = equal_reward_groups(rewards).repeat_interleave(self.num_generations)
        self._metrics["train"]["effi/frac_zero_var_groups"].append(float(equal.float().mean()))
        used = self._selects or "skip" in self.exact_savings
        if self.multi_objective_aggregation != "sum_then_normalize" or not used:
            return
        mine = self._layout.rows_of(self.accelerator.process_index, len(equal))
        batch["advantages"] = batch["advantages"].masked_fill(equal[mine.start : mine.stop], 0.0)

    # --- prompts ----------------------------------------------------------------------------------------------------

    def _select_rows(self, count: int) -> list[int]:
        if self._refill_prompts is None:
            self._refill_prompts = ShuffledPrompts(len(self.train_dataset), seed=self.args.seed + 1)
        return self._refill_prompts.select(count)

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

    def _log_selection(self, generation: Generation, rows: list[int]) -> None:
        metrics = self._metrics["train"]
        rewards = torch.cat(generation.rewards)
        metrics["effi/reward_generated"].append(float(torch.nanmean(rewards)))
        metrics["effi/reward_kept"].append(float(torch.nanmean(rewards[rows])))

    def _log_pruning(self, advantages: Tensor, keep: Tensor, group_size: int) -> None:
        metrics, kept = self._metrics["train"], advantages[keep]
        metrics["effi/prune/abs_advantage_kept"].append(float(kept.abs().mean()))
        metrics["effi/prune/positive_fraction"].append(float((kept > 0).float().mean()))
        sign = torch.where(keep, torch.sign(advantages), 0.0).view(-1, group_size)
        one_sign = ((sign > 0).any(1) != (sign < 0).any(1)).float()
        metrics["effi/prune/groups_with_one_sign"].append(float(one_sign.mean()))
