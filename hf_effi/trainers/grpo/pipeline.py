"""The rollout pipeline of `EffiGRPOTrainer`, around TRL's generation.

prompt selection -> generation -> rewards -> group statistics -> advantages -> group filter with bounded refill -> row
pruning -> redistribution over ranks -> log-probs of the kept rows -> (TRL's own) loss

Every choice is made from gathered rewards and advantages, so all ranks make the same one; the number of rounds, of
rows per rank and of collectives is the same on every rank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ...errors import RefusedError
from ...functional import metrics
from ...functional.rollouts import GenerationLayout, even_repeats, kept_share, next_refill_size
from ...protocols import PromptSelector, RolloutGroups
from .accounting import StepAccounting
from .advantages import Advantages
from .context import attach, log_metrics
from .exchange import share_out
from .host import Host
from .hybrid import Hybrid
from .late_logps import Generate, LateLogProbs, Skipping
from .rows import LOSS_SCALE, ROW_KEYS, GatheredRows, Generation, Ratios, Reading, Rows, join_rounds
from .selection_log import log_dropped_groups, log_pruning, log_rewards
from .selection_objects import SelectionObjects, checked_sizes, fitting_groups
from .serving import PromptServing, without_numbers
from .settings import GRPOSettings
from .token_stats import token_stats_of
from .vision import VISION_KEYS, by_rows_of_all, merged

#: Losses that divide by tokens; the others divide by rows.
TOKEN_LOSSES = ("dapo", "cispo", "vespo", "bnpo")


class RolloutPipeline:
    """
    Turns one generation of TRL into the rows to train on: select, generate, filter, prune, deal.

    Args:
        host ([`Host`]): The trainer that generates.
        settings ([`GRPOSettings`], *optional*): Without them no method is on.
        accounting ([`StepAccounting`]): Counts the rows.
        forward ([`Skipping`]): Computes log-probs, through the host.
        objects ([`SelectionObjects`], *optional*): What chooses.

    Attributes:
        generations_done (`int`): Generations since the run began.
        objects ([`SelectionObjects`]): What chooses, with what the settings ask for.
        rewards (`torch.Tensor`, *optional*): Gathered rewards of the last round, `(rows, num_functions)`. The trainer
            sets them.
        side (`dict[str, torch.Tensor]`): Gathered side columns of the last round, `(rows,)`. The trainer sets them.
        lengths (`list[int]`, *optional*): Tokens of this rank's completions in the last round. The trainer sets them.

    Raises:
        RefusedError: a method that cannot act with this trainer.
        ValueError: `difficulty_reward` does not name the reward that the filter reads.
    """

    def __init__(
        self,
        host: Host,
        settings: GRPOSettings | None,
        accounting: StepAccounting,
        forward: Skipping,
        objects: SelectionObjects | None = None,
    ) -> None:
        self._host, self._accounting = host, accounting
        self._settings = GRPOSettings.of(None) if settings is None else settings
        self.objects = (objects or SelectionObjects()).completed(self._settings, host.args)
        self.generations_done = 0
        self.rewards: Tensor | None = None
        self.side: dict[str, Tensor] = {}
        self.lengths: list[int] | None = None
        self._late = LateLogProbs(host, forward)
        self._exact_skip = "skip" in getattr(forward, "exact_savings", ())
        #: demonstrations in the place of completions
        self.hybrid = Hybrid(host, self.objects.hybrid_gate, accounting)
        stats_of = functools.partial(token_stats_of, host, forward)
        self._advantages = Advantages(host, self.objects.advantage_transform, stats_of)
        #: where the prompts of a step come from, and which it has
        self._serving = PromptServing(host, self.objects.prompt_selector)
        #: the reward function that says right or wrong
        self.difficulty_column: int | None = None
        self._somebody_listens = False
        if self.selects:
            self._check_selection_inputs()
        for one in (self.objects.prompt_selector, self.objects.rollout_allocator):
            if one is not None:
                attach(one, host, self._serving.rows)

    @property
    def selects(self) -> bool:
        """Whether any method that chooses prompts, groups, rows or advantages is on."""
        return self.objects.any

    @property
    def prompts(self) -> PromptSelector | None:
        """Where further prompts come from: the selector, or the stream of refills once there was one."""
        return self._serving.prompts

    def make_prompts(self) -> PromptSelector:
        """Return where further prompts come from; the stream of refills is made when it is first needed."""
        return self._serving.make_prompts()

    def objects_state(self) -> dict[str, Any]:
        """See [`SelectionObjects.state_dict`]."""
        return self.objects.state_dict()

    def load_objects_state(self, stored: dict[str, Any], checkpoint: Any) -> None:
        """See [`SelectionObjects.load_state_dict`]."""
        self.objects.load_state_dict(stored, checkpoint)

    def _check_selection_inputs(self) -> None:
        objects = self.objects
        objects.check_host(self._host, self._settings)
        if hasattr(self._serving.rows, "__len__"):
            self._serving.begin_run()
        names, wanted = self._host.reward_func_names, self._settings.difficulty_reward
        if wanted is not None and wanted not in names:
            raise ValueError(f"difficulty_reward={wanted!r} is not a reward function here. Known: {', '.join(names)}.")
        gate = objects.hybrid_gate
        decides = objects.group_filter is not None or objects.screening is not None
        decides = decides or (gate is not None and gate.success_at is None)
        if wanted is None and len(names) > 1 and decides:
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

    @property
    def _listeners(self) -> list[Any]:
        """Callbacks that want every group that is generated."""
        return [one for one in self._host.callback_handler.callbacks if hasattr(one, "on_rollouts")]

    def begin_training(self) -> None:
        """Ask all ranks whether one of them has a callback that listens: what it is told, all have to gather."""
        self._somebody_listens = any(gather_object([bool(self._listeners)]))

    @property
    def numbers_rows(self) -> bool:
        """Whether somebody wants to know which row of the dataset a prompt is; the same on every rank."""
        return self.selects or self._somebody_listens

    @property
    def _reading(self) -> Reading:
        state = self._host.state
        return Reading(
            step=state.global_step,
            generation=self.generations_done,
            progress=min(1.0, state.global_step / max(1, state.max_steps)),
            reward_names=tuple(self._host.reward_func_names),
            one_function=self.difficulty_column is not None,
            lookup=self._serving.values,
        )

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
        inputs, numbers = without_numbers(inputs)
        if not self.numbers_rows:
            self._log[metrics.GEN_ROUNDS].append(1.0)
            return self._finished(self._round(stock, inputs))
        target = self._whole_generation(inputs)
        generation, candidates = self._rounds(stock, inputs, numbers, target)
        self._tell(generation)
        if not self.selects:
            return self._finished(generation.mine[0])
        groups = generation.view(candidates, self._reading)
        if self.hybrid.swap(generation, candidates, groups):
            groups = generation.view(candidates, self._reading)
        chosen = self._choose_groups(groups, target)
        rows, pool = self._choose_rows(generation, groups, candidates, chosen)
        mine = self._dealt(generation, rows)
        everything = join_rounds(generation.rounds)
        if self.objects.rollout_pruner is not None and self._settings.prune_normalizer == "original":
            token_loss = self._host.loss_type in TOKEN_LOSSES
            share = kept_share(rows, pool, everything.loss_tokens, token_loss)
            mine.batch[LOSS_SCALE] = torch.tensor(share, device=self._host.accelerator.device)
        log_rewards(self._log, everything, rows, self.objects.group_filter is not None)
        return self._finished(mine)

    def _finished(self, rows: Rows) -> dict[str, Any]:
        """Compute the log-probs that were put off, for the rows that stayed."""
        self._accounting.counts[metrics.ROWS_TRAINED] += self._late.computed(rows)
        return rows.batch

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

    # --- rounds -----------------------------------------------------------------------------------------------------

    def _rounds(
        self, stock: Generate, inputs: list[dict[str, Any]], numbers: list[int], target: int
    ) -> tuple[Generation, list[int]]:
        """Return what was generated, and the groups that can be trained on."""
        objects, generation = self.objects, Generation()
        rounds = self._settings.difficulty_max_rounds if objects.group_filter is not None else 1
        chooses = objects.prompt_selector is not None or objects.screening is not None
        self._serving.begin_step(() if chooses else inputs)
        if objects.screening is not None:
            return generation, self._screened(stock, generation, target)
        served = self._serving.draw(target) if chooses else self._serving.of_loader(numbers)
        for number in range(rounds):
            from_loader = inputs if number == 0 and not chooses else None
            ids = self._open(stock, generation, served, from_loader)
            self._observe(generation, ids)
            if objects.group_filter is None:
                break
            groups = generation.view(range(len(generation.members)), self._reading)
            kept = int(objects.group_filter.decide(groups).keep.sum())
            if kept >= target or number == rounds - 1:
                break
            size = next_refill_size(target - kept, kept, len(groups.rewards), cap=target)
            served = self._serving.draw(self._layout.even_groups(size))
        self._log[metrics.GEN_ROUNDS].append(float(len(generation.rounds)))
        return generation, list(range(len(generation.members)))

    def _open(
        self, stock: Generate, generation: Generation, numbers: list[int], inputs: list[dict[str, Any]] | None
    ) -> list[int]:
        """Generate whole groups for rows of the dataset, which are `inputs` where the loader has served them."""
        ids, sizes = generation.open(numbers), [self._host.num_generations] * len(numbers)
        allocator = self.objects.rollout_allocator
        if allocator is not None:
            sizes = checked_sizes(allocator, numbers, sum(sizes))
        owners = [group for group, size in zip(ids, sizes, strict=True) for _ in range(size)]
        self._add_round(stock, generation, owners, inputs if allocator is None else None, allocator is not None)
        self._advantages.settle(generation, ids, self._reading, own_groups=allocator is not None)
        return ids

    def _screened(self, stock: Generate, generation: Generation, target: int) -> list[int]:
        """Generate a few completions of many prompts, and the others of those that are worth it."""
        screening = cast(Any, self.objects.screening)
        ids = generation.open(self._serving.draw(screening.prompts(target)))
        self._add_round(stock, generation, [g for g in ids for _ in range(screening.initial)], None, True)
        groups = generation.view(ids, self._reading)
        chosen = screening.choose(groups, target)
        more = screening.continuation(self._host.num_generations)
        self._add_round(stock, generation, [g for g in chosen for _ in range(more)], None, True)
        self._advantages.settle(generation, chosen, self._reading, own_groups=True)
        self._log[metrics.GEN_ROUNDS].append(2.0)
        self._log[metrics.SCREENED_QUALIFIED].append(screening.qualified(groups) / len(ids))
        self._log[metrics.DROPPED + "screened"].append(float((len(ids) - len(chosen)) * screening.initial))
        self._observe(generation, ids)
        return chosen

    def _add_round(
        self,
        stock: Generate,
        generation: Generation,
        owners: list[int],
        inputs: list[dict[str, Any]] | None,
        own_groups: bool,
    ) -> None:
        """
        Generate one completion for each of `owners`, which are groups.

        Args:
            inputs (`list[dict]`, *optional*): The rows of this rank, where the loader has served them.
            own_groups (`bool`): Whether groups are others than TRL's, so that it must take each row alone.
        """
        if inputs is None:
            inputs = self._serving.rows_of_this_rank([generation.numbers[group] for group in owners])
        host, group_size = self._host, self._host.num_generations
        if own_groups:
            host.num_generations = 1
        try:
            mine = self._round(stock, inputs, own_groups)
        finally:
            host.num_generations = group_size
        if self.selects:
            check_movable(mine.batch)
            if host._is_vlm:
                mine = replace(mine, batch=by_rows_of_all(mine.batch))
        side = {name: column.cpu() for name, column in self.side.items()}
        generation.add(mine, self._gathered(mine), owners, side)
        self._advantages.add_stats(generation)

    def _round(self, stock: Generate, inputs: list[dict[str, Any]], own_groups: bool = False) -> Rows:
        """One call of TRL's generation, with its log-prob forwards put off where dropped rows would pay for them."""
        self.lengths, self.side = None, {}
        rows = self._late.generated(stock, inputs, self.selects)
        exact = self.selects or self._exact_skip
        self._row_advantages = self._advantages.of_round(rows.batch, self._summed_rewards(), exact, own_groups)
        self._accounting.counts[metrics.ROWS_GENERATED] += len(rows)
        return rows

    def _gathered(self, mine: Rows) -> GatheredRows:
        """What all ranks must know of the round that was just made."""
        tokens, accelerator = mine.loss_tokens, self._host.accelerator
        # The mask of a truncated completion may have been cleared; its length is that of what was generated.
        lengths = tokens if self.lengths is None else tokens.new_tensor(self.lengths)
        gathered = (
            self._filter_rewards(),
            self._summed_rewards(),
            self._rewards_of_round,
            self._row_advantages,
            accelerator.gather(lengths),
            accelerator.gather(tokens),
        )
        return GatheredRows(*(value.cpu() for value in gathered))

    def _observe(self, generation: Generation, ids: Sequence[int]) -> None:
        """Let selector and allocator see what was generated for their prompts, before any filter."""
        groups = generation.view(ids, self._reading)
        rows = list(groups.rows)
        for one in (self.objects.prompt_selector, self.objects.rollout_allocator):
            if one is not None:
                one.observe(rows, groups)
                log_metrics(one, self._log)

    def _tell(self, generation: Generation) -> None:
        """Let callbacks see every group that was generated."""
        if not self._listeners:
            return
        host = self._host
        groups = generation.view(range(len(generation.members)), self._reading)
        for one in self._listeners:
            one.on_rollouts(host.args, host.state, host.control, rows=list(groups.rows), groups=groups)

    # --- choices ----------------------------------------------------------------------------------------------------

    def _choose_groups(self, groups: RolloutGroups, target: int) -> list[int]:
        """Return the groups to train on, in generation order, and count the others by reason."""
        total = len(groups.rewards)
        if self.objects.group_filter is None:
            return list(range(total))
        decision = self.objects.group_filter.decide(groups)
        qualified = decision.keep.nonzero().flatten().tolist()
        sizes = groups.sizes.tolist()
        # Groups of several sizes: those that are kept may be the large ones.
        room = sum(sizes) if self.objects.rollout_allocator is None else max(self._layout.trained_rows, *sizes)
        chosen = fitting_groups(qualified, sizes, target, room)
        missing = 0 if len(chosen) < len(qualified) else target - len(chosen)
        if missing > 0 and self._settings.difficulty_underfill == "fill":
            taken = set(chosen)
            others = [g for g in self.objects.group_filter.fill_order(groups) if g not in taken]
            extra = fitting_groups(others, sizes, missing, room - sum(sizes[g] for g in chosen))
            chosen = sorted(chosen + extra)
            self._log[metrics.GROUPS_FILLED].append(float(len(extra)))
        elif not chosen:
            # Never die and never train on nothing: one least bad group keeps the step alive.
            chosen = self.objects.group_filter.fill_order(groups)[:1]
        self._log[metrics.UNDERFILLED].append(float(missing > 0))
        log_dropped_groups(self._log, decision.reasons, sizes, chosen)
        return chosen

    def _choose_rows(
        self, generation: Generation, groups: RolloutGroups, ids: list[int], chosen: list[int]
    ) -> tuple[list[int], list[int]]:
        """
        Return the global row numbers to train on, whole groups less what is pruned and dealt evenly, and those that
        there were before pruning.
        """
        world, chunks = self._host.accelerator.num_processes, self._layout.micro_batches
        pool, kept_ids = groups.take(chosen), [ids[group] for group in chosen]
        places = generation.places(ids)[chosen]
        here = cast(Tensor, pool.present)
        original = places[here].tolist()
        keep = here
        if self.objects.rollout_pruner is not None:
            # The pool of a rank is a contiguous slice; rows that do not divide are competed for by all.
            pool = replace(pool, num_pools=world if len(original) % world == 0 else 1)
            keep = self._checked_mask(self.objects.rollout_pruner.keep(pool), pool)
            self._log[metrics.DROPPED + "pruned"].append(float(len(original) - int(keep.sum())))
            log_pruning(self._log, pool.advantages, keep)
            if getattr(self.objects.rollout_pruner, "adv_stats", "full") == "subset":
                self._advantages.settle_subset(generation, kept_ids, pool, keep)
        rows = places[keep].tolist()
        usable, repeats = len(rows) // chunks * chunks, 1
        if usable == 0:  # fewer rows than micro-batches, each of which needs one
            usable, repeats = even_repeats(len(rows), chunks, self._host.args.per_device_train_batch_size)
        if usable < len(rows):
            everything = join_rounds(generation.rounds)
            advantages, live = everything.advantages, everything.loss_tokens > 0

            def worth(i: int) -> tuple[float, bool, int]:
                return (-abs(float(advantages[rows[i]])), not live[rows[i]], i)

            by_worth = sorted(range(len(rows)), key=worth)[:usable]
            self._log[metrics.DROPPED + "uneven"].append(float(len(rows) - usable))
            rows = [rows[i] for i in sorted(by_worth)]
        return rows * repeats, original

    def _checked_mask(self, keep: Tensor, groups: RolloutGroups) -> Tensor:
        name, shape = type(self.objects.rollout_pruner).__name__, tuple(groups.rewards.shape)
        present = cast(Tensor, groups.present)
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != shape or not keep.any():
            told = f"shape {tuple(keep.shape)} of {keep.dtype}" if isinstance(keep, Tensor) else type(keep).__name__
            raise ValueError(
                f"{name}.keep must return a boolean mask of shape {shape} with at least one place kept, got {told}"
                + (f" with {int(keep.sum())} kept." if isinstance(keep, Tensor) else ".")
            )
        if bool((keep.cpu() & ~present).any()):
            raise ValueError(f"{name}.keep kept a place of a group that is smaller than the largest: see `present`.")
        return keep.cpu()

    def _dealt(self, generation: Generation, rows: list[int]) -> Rows:
        """Return this rank's share of the chosen rows."""
        accelerator = self._host.accelerator
        owners = [generation.owner(row, accelerator.num_processes) for row in rows]
        costs = join_rounds(generation.rounds).loss_tokens[rows].tolist()
        shared, moved = share_out(self._join(generation.mine), owners, costs, accelerator, self._join)
        self._accounting.counts[metrics.ROWS_MOVED] += moved
        mine = shared.trimmed()
        mine.batch["num_items_in_batch"] = accelerator.gather(mine.loss_tokens.sum()).sum()
        return replace(mine, batch=merged(mine.batch))

    # --- log-probs of the kept rows only ----------------------------------------------------------------------------

    def put_off(self, attention_mask: Tensor, columns: int) -> Tensor | None:
        """See [`LateLogProbs`]."""
        return self._late.put_off(attention_mask, columns)

    def put_no_more_off(self) -> None:
        """See [`LateLogProbs`]."""
        self._late.put_no_more_off()

    def log_probs_of(self, batch: dict[str, Any], reference: bool) -> Tensor:
        """See [`LateLogProbs`]."""
        return self._late.log_probs_of(batch, reference)

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


def check_movable(batch: dict[str, Any]) -> None:
    """
    Say that a batch holds what cannot be picked by rows.

    Raises:
        RefusedError: entries that TRL does not have, by name.
    """
    if extra := sorted(set(batch) - ROW_KEYS - VISION_KEYS):
        raise RefusedError(
            f"prompt selection, filtering and pruning pick rows, and of {', '.join(extra)} it is not known which part "
            "belongs to which row. Turn them off for this model."
        )
