"""The rollout pipeline of `EffiGRPOTrainer`, around TRL's generation.

prompt selection -> generation -> rewards -> group statistics -> group filter with bounded refill -> row pruning ->
advantages -> redistribution over ranks -> log-probs of the kept rows -> (TRL's own) loss

Every choice is made from gathered rewards and advantages, so all ranks make the same one; the number of rounds, of
rows per rank and of collectives is the same on every rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from ...errors import RefusedError
from ...functional import metrics
from ...functional.rollouts import (
    REASONS,
    AdvantagePruner,
    GenerationLayout,
    PassRateBand,
    ShuffledPrompts,
    equal_reward_groups,
    even_repeats,
    kept_share,
    next_refill_size,
    row_advantages,
    rows_with_gradient,
)
from ...protocols import GroupFilter, PromptSelector, RolloutGroups, RolloutPruner
from .accounting import StepAccounting
from .correction import OLD, LateCorrection
from .deferred import DeferredLogProbs
from .exchange import share_out
from .host import Host
from .rows import ROW_KEYS, GatheredRows, Generation, Ratios, Rows, as_groups, join_rounds
from .settings import GRPOSettings
from .step_prompts import StepPrompts, check_selector, takes_keyword

#: Losses that divide by tokens; the others divide by rows.
TOKEN_LOSSES = ("dapo", "cispo", "vespo", "bnpo")
#: The batch entry that a loss is multiplied by, a tensor without dimensions. TRL passes it through.
LOSS_SCALE = "effi_loss_scale"
#: TRL's name of the log-probs of the reference; what else is put off is the policy's.
REFERENCE = "ref_per_token_logps"

#: TRL's `_generate_and_score_completions`
Generate = Callable[[list[dict[str, Any]]], dict[str, Any]]


class Skipping(Protocol):
    """The part of the log-prob forward that a pipeline knows of."""

    exact_savings: tuple[str, ...]

    def skipping(self, batch: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        """Forward no row of `batch` without a gradient."""


class RolloutPipeline:
    """
    Turns one generation of TRL into the rows to train on: select, generate, filter, prune, deal.

    Args:
        host ([`Host`]): The trainer that generates.
        settings ([`GRPOSettings`], *optional*): Without them no method is on.
        accounting ([`StepAccounting`]): Counts the rows.
        forward ([`Skipping`]): Computes log-probs, through the host.
        prompt_selector, group_filter, rollout_pruner (*optional*): As in [`EffiGRPOTrainer`].

    Attributes:
        generations_done (`int`): Generations since the run began.
        prompts ([`PromptSelector`], *optional*): Where further prompts come from: the selector, or the stream of
            refills once there was one.
        rewards (`torch.Tensor`, *optional*): Gathered rewards of the last round, `(rows, num_functions)`. The trainer
            sets them.
        lengths (`list[int]`, *optional*): Tokens of this rank's completions in the last round. The trainer sets them.

    Raises:
        RefusedError: a method that cannot act with this trainer.
        ValueError: `difficulty_reward` does not name the reward that the filter reads.
    """

    #: gathered, of the last round
    _advantages: Tensor

    def __init__(
        self,
        host: Host,
        settings: GRPOSettings | None,
        accounting: StepAccounting,
        forward: Skipping,
        *,
        prompt_selector: PromptSelector | None = None,
        group_filter: GroupFilter | None = None,
        rollout_pruner: RolloutPruner | None = None,
    ) -> None:
        self._host, self._accounting, self._forward = host, accounting, forward
        self._settings = GRPOSettings.of(None) if settings is None else settings
        self.group_filter, self.rollout_pruner, self.prompt_selector = group_filter, rollout_pruner, prompt_selector
        self.prompts: PromptSelector | None = prompt_selector
        self.generations_done = 0
        self.rewards: Tensor | None = None
        self.lengths: list[int] | None = None
        self._deferred: DeferredLogProbs | None = None
        self._correction = LateCorrection(host)
        #: which prompts a step has, where prompts are chosen by number
        self._step_prompts: StepPrompts | None = None
        #: the reward function that says right or wrong
        self.difficulty_column: int | None = None
        self._add_methods_of(self._settings)
        if prompt_selector is not None:
            check_selector(prompt_selector)
        if self.selects:
            self._check_selection_inputs()

    def _add_methods_of(self, settings: GRPOSettings) -> None:
        if self.group_filter is None and settings.difficulty_range is not None:
            self.group_filter = PassRateBand(*settings.difficulty_range)
        if settings.prune_rate:
            self.rollout_pruner = AdvantagePruner(
                settings.prune_rate,
                settings.prune_metric,
                settings.prune_scope,
                settings.prune_balance_signs,
                seed=self._host.args.seed if settings.prune_metric == "random" else 0,
            )

    @property
    def selects(self) -> bool:
        """Whether any method that chooses prompts, groups or rows is on."""
        return any(x is not None for x in (self.prompt_selector, self.group_filter, self.rollout_pruner))

    def _check_selection_inputs(self) -> None:
        on = "prompt selection, difficulty filtering and completion pruning"
        for name, value in (
            ("tools", self._host.tools),
            ("environment_factory", self._host.environment_factories),
            ("rollout_func", self._host.rollout_func),
        ):
            if value:
                raise RefusedError(f"{on} do not work with `{name}` yet. Turn them off, or drop `{name}`.")
        refills = self.group_filter is not None and self._settings.difficulty_max_rounds > 1
        if refills or self.prompt_selector is not None:
            if not hasattr(self._host.train_dataset, "__len__"):
                raise RefusedError(
                    "refilling and prompt selection pick rows by number, which a streaming dataset cannot serve. Use "
                    "a map-style dataset, or difficulty_max_rounds=1."
                )
            self._step_prompts = StepPrompts(self._host.train_dataset)
        names, wanted = self._host.reward_func_names, self._settings.difficulty_reward
        if wanted is not None and wanted not in names:
            raise ValueError(f"difficulty_reward={wanted!r} is not a reward function here. Known: {', '.join(names)}.")
        if wanted is None and len(names) > 1 and self.group_filter is not None:
            raise ValueError(
                f"with several reward functions ({', '.join(names)}) the filter must know which one says right or "
                f"wrong: set difficulty_reward, e.g. difficulty_reward={names[0]!r}."
            )
        # A selector alone gets the weighted reward where nobody says which function decides.
        self.difficulty_column = names.index(wanted) if wanted is not None else 0 if len(names) == 1 else None

    # --- what it reads of the trainer, as it is now -----------------------------------------------------------------

    @property
    def _layout(self) -> GenerationLayout:
        return GenerationLayout.of(self._host.args)

    @property
    def _log(self) -> dict[str, list[float]]:
        return self._host._metrics["train"]

    def _join(self, parts: Sequence[Rows]) -> Rows:
        return Rows.joined(parts, self._host._tokenizer.pad_token_id, Ratios.of(self._host).padding)

    # --- the pipeline -----------------------------------------------------------------------------------------------

    def generate(self, stock: Generate, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Return the rows to train on, as TRL's dict.

        Args:
            stock (`Callable`): The next `_generate_and_score_completions`, called once for each round.
            inputs (`list[dict]`): What the loader gave this rank.
        """
        self.generations_done += 1
        if not self.selects:
            self._log[metrics.GEN_ROUNDS].append(1.0)
            return self._finished(self._round(stock, inputs))
        target = self._whole_generation(inputs)
        generation = self._rounds(stock, inputs, target)
        everything = join_rounds(generation.rounds)
        groups = self._as_groups(everything)
        chosen = self._choose_groups(groups, target)
        rows = self._choose_rows(groups, chosen)
        mine = self._dealt(generation, everything, rows)
        if self.rollout_pruner is not None and self._settings.prune_normalizer == "original":
            size, token_loss = self._host.num_generations, self._host.loss_type in TOKEN_LOSSES
            original = [group * size + i for group in chosen for i in range(size)]
            share = kept_share(rows, original, everything.loss_tokens, token_loss)
            mine.batch[LOSS_SCALE] = torch.tensor(share, device=self._host.accelerator.device)
        self._log_selection(everything, rows)
        return self._finished(mine)

    def _whole_generation(self, inputs: list[Any]) -> int:
        """Return the prompts of a generation, having checked that the loader gave this rank its share of them."""
        layout = self._layout
        if len(inputs) != layout.loader_rows:
            raise ValueError(
                f"the loader gave {len(inputs)} rows where a generation of {layout.generated_rows} on "
                f"{layout.world_size} "
                f"processes has {layout.loader_rows} for each. Difficulty filtering, completion pruning and prompt "
                "selection need whole generations: leave accelerator_config.split_batches off, use one process for "
                "each device, and leave get_train_dataloader as it is."
            )
        return layout.prompts

    def _round(self, stock: Generate, inputs: list[dict[str, Any]]) -> Rows:
        """One call of TRL's generation, with its log-prob forwards put off where dropped rows would pay for them."""
        deferred = self._deferred = DeferredLogProbs() if self._defers() else None
        late = deferred is not None and self._correction.on
        self.lengths = None
        try:
            with self._correction.put_off() if late else contextlib.nullcontext():
                batch = stock(inputs)
        finally:
            self._deferred = None
        names = deferred.entries_of(batch) if deferred is not None else ()
        rows = Rows(batch, tuple(dict.fromkeys((*names, OLD))) if late else names)
        self._settle_advantages(batch)
        self._accounting.counts[metrics.ROWS_GENERATED] += len(rows)
        return rows

    def _rounds(self, stock: Generate, inputs: list[dict[str, Any]], target: int) -> Generation:
        generation = Generation()
        rounds = self._settings.difficulty_max_rounds if self.group_filter is not None else 1
        if self._step_prompts is not None:
            self._step_prompts.begin(self._host.state.global_step)
            if self.prompt_selector is None:
                self._step_prompts.note(inputs)
        numbers = self._select(target) if self.prompt_selector is not None else None
        for number in range(rounds):
            local = inputs if numbers is None else self._rows_of_this_rank(numbers)
            mine = self._round(stock, local)
            check_movable(mine.batch)
            generation.add(mine, self._gathered(mine))
            if numbers is not None:
                self.make_prompts().observe(numbers, self._as_groups(generation.rounds[-1]))
            if self.group_filter is None:
                break
            groups = self._as_groups(join_rounds(generation.rounds))
            kept = int(self.group_filter.decide(groups).keep.sum())
            if kept >= target or number == rounds - 1:
                break
            size = next_refill_size(target - kept, kept, len(groups.rewards), cap=target)
            numbers = self._select(self._layout.even_groups(size))
        self._log[metrics.GEN_ROUNDS].append(float(len(generation.rounds)))
        return generation

    def _gathered(self, mine: Rows) -> GatheredRows:
        """What all ranks must know of the round that was just made."""
        tokens, accelerator = mine.loss_tokens, self._host.accelerator
        # The mask of a truncated completion may have been cleared; its length is that of what was generated.
        lengths = tokens if self.lengths is None else tokens.new_tensor(self.lengths)
        gathered = (
            self._filter_rewards(),
            self._summed_rewards(),
            self._rewards_of_round,
            self._advantages,
            accelerator.gather(lengths),
            accelerator.gather(tokens),
        )
        return GatheredRows(*(value.cpu() for value in gathered))

    def _as_groups(self, rows: GatheredRows) -> RolloutGroups:
        host, one_function = self._host, self.difficulty_column is not None
        return as_groups(rows, host.num_generations, host.state.global_step, host.reward_func_names, one_function)

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
            self._log[metrics.GROUPS_FILLED].append(float(len(extra)))
        elif not chosen:
            # Never die and never train on nothing: one least bad group keeps the step alive.
            chosen = self.group_filter.fill_order(groups)[:1]
            counts[decision.reasons[chosen[0]]] -= 1
        self._log[metrics.UNDERFILLED].append(float(missing > 0))
        for reason in dict.fromkeys((*REASONS[1:], "surplus", *counts)):
            dropped = counts.get(reason, 0) * self._host.num_generations
            self._log[metrics.DROPPED + reason].append(float(dropped))
        return chosen

    def _choose_rows(self, groups: RolloutGroups, chosen: list[int]) -> list[int]:
        """Return the global row numbers to train on: whole groups, less what is pruned, dealt evenly."""
        size, world = self._host.num_generations, self._host.accelerator.num_processes
        rows = [group * size + i for group in chosen for i in range(size)]
        advantages, live = groups.advantages.reshape(-1), groups.live.reshape(-1)
        chunks = self._layout.micro_batches
        if self.rollout_pruner is not None:
            # The pool of a rank is a contiguous slice; rows that do not divide are competed for by all.
            pools = world if len(rows) % world == 0 else 1
            known = {"live": live[rows]} if takes_keyword(self.rollout_pruner.keep, "live") else {}
            keep = self.rollout_pruner.keep(advantages[rows], size, pools, self.generations_done, **known)
            if keep.shape != (len(rows),) or not keep.any():
                raise ValueError(
                    f"{type(self.rollout_pruner).__name__}.keep must return a mask over the {len(rows)} rows with at "
                    f"least one of them kept, got shape {tuple(keep.shape)} with {int(keep.sum())} kept."
                )
            self._log[metrics.DROPPED + "pruned"].append(float(len(rows) - int(keep.sum())))
            self._log_pruning(advantages[rows], keep, size)
            rows = [row for row, kept in zip(rows, keep.tolist(), strict=True) if kept]
        usable, repeats = len(rows) // chunks * chunks, 1
        if usable == 0:  # fewer rows than micro-batches, each of which needs one
            usable, repeats = even_repeats(len(rows), chunks, self._host.args.per_device_train_batch_size)
        if usable < len(rows):

            def worth(i: int) -> tuple[float, bool, int]:
                return (-abs(float(advantages[rows[i]])), not live[rows[i]], i)

            by_worth = sorted(range(len(rows)), key=worth)[:usable]
            self._log[metrics.DROPPED + "uneven"].append(float(len(rows) - usable))
            rows = [rows[i] for i in sorted(by_worth)]
        return rows * repeats

    def _dealt(self, generation: Generation, everything: GatheredRows, rows: list[int]) -> Rows:
        """Return this rank's share of the chosen rows."""
        accelerator = self._host.accelerator
        owners = [generation.owner(row, accelerator.num_processes) for row in rows]
        costs = everything.loss_tokens[rows].tolist()
        shared, moved = share_out(self._join(generation.mine), owners, costs, accelerator, self._join)
        self._accounting.counts[metrics.ROWS_MOVED] += moved
        mine = shared.trimmed()
        mine.batch["num_items_in_batch"] = accelerator.gather(mine.loss_tokens.sum()).sum()
        return mine

    # --- log-probs of the kept rows only ----------------------------------------------------------------------------

    def _defers(self) -> bool:
        # Who chooses rows has to know which ratios are 0.
        return not self._correction.decides if self.selects else "skip" in self._forward.exact_savings

    def put_off(self, attention_mask: Tensor, columns: int) -> Tensor | None:
        """
        Return what stands for the log-probs of a forward that can wait, or `None` for one that cannot.

        Args:
            attention_mask (`torch.Tensor`): Of the forward, shape `(rows, any)`.
            columns (`int`): Completion tokens of a row.
        """
        return None if self._deferred is None else self._deferred.put_off(attention_mask, columns)

    def put_no_more_off(self) -> None:
        """From the rewards on: TRL has asked for its log-probs before, so that who asks now computes with them."""
        self._deferred = None

    def _finished(self, rows: Rows) -> dict[str, Any]:
        """Compute the log-probs that were put off, for the rows that stayed."""
        forwarded = rows_with_gradient(rows.batch, Ratios.of(self._host).multiply)
        for name in rows.put_off:
            rows.batch[name] = self._log_probs_of(rows.batch, reference=name == REFERENCE)
        if OLD in rows.put_off and self._correction.on:
            skips = "skip" in self._forward.exact_savings
            self._correction.make(rows.batch, forwarded if skips else torch.ones_like(forwarded), self._log)
        active = rows_with_gradient(rows.batch, Ratios.of(self._host).multiply)
        self._accounting.counts[metrics.ROWS_TRAINED] += int(active.sum())
        return rows.batch

    def _log_probs_of(self, batch: dict[str, Any], reference: bool) -> Tensor:
        host = self._host
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        policy: Any = host.model  # wrapped or not, as TRL hands it over itself
        checkpointing = disable_gradient_checkpointing(policy, host.args.gradient_checkpointing_kwargs)
        skipping = self._forward.skipping(batch)
        with skipping, torch.no_grad(), checkpointing, self._scoring_model(reference) as model:
            # Through the trainer, where it is timed, trimmed and skipped, on every rank alike.
            logps, _, _ = self._host._get_per_token_logps_and_entropies(
                model,
                ids,
                mask,
                batch["completion_ids"].size(1),
                batch_size=host.args.per_device_train_batch_size,
            )
        return logps

    @contextlib.contextmanager
    def _scoring_model(self, reference: bool) -> Iterator[Any]:
        """The policy, or the reference that TRL would use: a second model, the base model, or the "ref" adapter."""
        if not reference or self._host.ref_model is not None:
            yield self._host.ref_model if reference else self._host.model
            return
        unwrapped = self._host.accelerator.unwrap_model(self._host.model)
        with use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None):
            yield self._host.model

    # --- rewards ----------------------------------------------------------------------------------------------------

    @property
    def _rewards_of_round(self) -> Tensor:
        return cast(Tensor, self.rewards)  # TRL calculates them in every generation, before anybody asks here

    def _filter_rewards(self) -> Tensor:
        """The gathered reward that decides, shape `(rows,)`: of one function as it is, or TRL's weighted sum."""
        if self.difficulty_column is None:
            return self._summed_rewards()
        return self._rewards_of_round[:, self.difficulty_column]

    def _summed_rewards(self) -> Tensor:
        """TRL's `reward` of every row: the weighted sum of what applies, NaN where no function does."""
        rewards = self._rewards_of_round
        summed = (rewards * self._host.reward_weights.to(rewards.device).unsqueeze(0)).nansum(dim=1)
        summed[torch.isnan(rewards).all(dim=1)] = torch.nan
        return summed

    def _settle_advantages(self, batch: dict[str, Any]) -> None:
        """Make advantages that are zero but for rounding exactly zero: the mean of equal fp32 rewards can be off."""
        equal = equal_reward_groups(self._summed_rewards().view(-1, self._host.num_generations))
        advantages = batch["advantages"]
        # Advantages per token are those of a subclass, which need not come from these rewards.
        centred = self._host.multi_objective_aggregation == "sum_then_normalize" and advantages.ndim == 1
        if centred and (self.selects or "skip" in self._forward.exact_savings):
            zero = equal.repeat_interleave(self._host.num_generations)
            mine = self._layout.rows_of(self._host.accelerator.process_index, len(zero))
            batch["advantages"] = advantages.masked_fill(zero[mine.start : mine.stop], 0.0)
        known = row_advantages(batch, Ratios.of(self._host).multiply)
        self._advantages = self._host.accelerator.gather(known)
        dead = ~(self._advantages.view(-1, self._host.num_generations) != 0).any(dim=1)
        dead = dead | equal if centred else dead
        self._log[metrics.FRAC_ZERO_VAR_GROUPS].append(float(dead.float().mean()))

    # --- prompts ----------------------------------------------------------------------------------------------------

    def make_prompts(self) -> PromptSelector:
        """Return where further prompts come from; the stream of refills is made when it is first needed."""
        if self.prompts is None:
            self.prompts = ShuffledPrompts(len(self._host.train_dataset), seed=self._host.args.seed + 1)
        return self.prompts

    def _select(self, count: int) -> list[int]:
        """Draw rows of the dataset whose prompts the step does not have yet."""
        step_prompts = cast(StepPrompts, self._step_prompts)  # whoever selects or refills has made them
        return step_prompts.draw(self.make_prompts(), count, gather_object)

    def _rows_of_this_rank(self, numbers: list[int]) -> list[dict[str, Any]]:
        repeated = [number for number in numbers for _ in range(self._host.num_generations)]
        mine = self._layout.rows_of(self._host.accelerator.process_index, len(repeated))
        return [dict(self._host.train_dataset[repeated[position]]) for position in mine]

    # --- metrics ----------------------------------------------------------------------------------------------------

    def _log_selection(self, everything: GatheredRows, rows: list[int]) -> None:
        log, kept = self._log, sorted(set(rows))
        rewards = [(metrics.REWARD_GENERATED, metrics.REWARD_KEPT, everything.weighted_rewards)]
        if self.group_filter is not None:
            rewards.append((metrics.FILTER_REWARD_GENERATED, metrics.FILTER_REWARD_KEPT, everything.rewards))
        for of_generated, of_kept, values in rewards:
            log[of_generated].append(float(torch.nanmean(values)))
            log[of_kept].append(float(torch.nanmean(values[kept])))

    def _log_pruning(self, advantages: Tensor, keep: Tensor, group_size: int) -> None:
        log, kept = self._log, advantages[keep]
        log[metrics.PRUNE_ABS_ADVANTAGE_KEPT].append(float(kept.abs().mean()))
        log[metrics.PRUNE_POSITIVE_FRACTION].append(float((kept > 0).float().mean()))
        sign = torch.where(keep, torch.sign(advantages), 0.0).view(-1, group_size)
        one_sign = ((sign > 0).any(1) != (sign < 0).any(1)).float()
        log[metrics.PRUNE_GROUPS_WITH_ONE_SIGN].append(float(one_sign.mean()))


def check_movable(batch: dict[str, Any]) -> None:
    """
    Say that a batch holds what cannot be picked by rows.

    Raises:
        RefusedError: image and multimodal inputs, by name.
    """
    if extra := sorted(set(batch) - ROW_KEYS):
        raise RefusedError(
            f"difficulty filtering and completion pruning cannot pick rows of {', '.join(extra)} yet (image and "
            "multimodal inputs). Turn them off for this model."
        )
