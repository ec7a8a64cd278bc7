"""The advantages of a generation: TRL's, those of groups of several sizes, and what a transform makes of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ...functional import metrics
from ...functional.rollouts import GenerationLayout, equal_reward_groups, ragged_advantages, row_advantages
from ...protocols import AdvantageTransform, RolloutGroups, TokenStats
from .host import Host
from .rows import Generation, Ratios, Reading, Rows
from .token_stats import loss_ratios

#: local log-probs, sums of squared probabilities and mask of some rows, each of shape `(rows, tokens)`
StatsOf = Callable[[Rows], tuple[Tensor, Tensor, Tensor]]


#: TRL's share of the rows whose group has equal rewards
ZERO_STD = "frac_reward_zero_std"


class Advantages:
    """
    Settles what the advantages of a generation are, the same on every rank.

    Args:
        host ([`Host`]): The trainer that generates.
        transform ([`~hf_effi.protocols.AdvantageTransform`], *optional*): Makes advantages out of gathered groups.
        stats_of (`Callable`, *optional*): The statistics of the tokens of this rank's rows.
    """

    def __init__(
        self, host: Host, transform: AdvantageTransform | None = None, stats_of: StatsOf | None = None
    ) -> None:
        self._host, self._transform, self._stats_of = host, transform, stats_of

    # --- TRL's -----------------------------------------------------------------------------------------------------

    def of_round(self, batch: dict[str, Any], rewards: Tensor, exact: bool, own_groups: bool) -> Tensor:
        """
        Return the gathered advantages of the rows of a round, shape `(rows,)`; 0 where no token is in the loss.

        Those that are zero but for rounding become exactly zero: the mean of equal fp32 rewards can be off.

        Args:
            batch (`dict`): TRL's, of this rank.
            rewards (`torch.Tensor`): TRL's weighted `reward`, gathered, shape `(rows,)`.
            exact (`bool`): Whether somebody reads which advantages are zero.
            own_groups (`bool`): Whether the round has groups that TRL does not know of; its advantages say nothing.
        """
        size, host = self._host.num_generations, self._host
        advantages, log = batch["advantages"], host._metrics["train"]
        # Advantages per token are those of a subclass, which need not come from these rewards.
        centred = host.multi_objective_aggregation == "sum_then_normalize" and advantages.ndim == 1
        if own_groups:
            if log[ZERO_STD]:
                log[ZERO_STD].pop()  # of groups of one completion, all of which are equal: see `settle`
            return host.accelerator.gather(row_advantages(batch, Ratios.of(host).multiply)) * 0
        equal = equal_reward_groups(rewards.view(-1, size))
        if centred and exact:
            zero = equal.repeat_interleave(size)
            mine = GenerationLayout.of(host.args).rows_of(host.accelerator.process_index, len(zero))
            batch["advantages"] = advantages.masked_fill(zero[mine.start : mine.stop], 0.0)
        gathered = host.accelerator.gather(row_advantages(batch, Ratios.of(host).multiply))
        dead = ~(gathered.view(-1, size) != 0).any(dim=1)
        log[metrics.FRAC_ZERO_VAR_GROUPS].append(float((dead | equal if centred else dead).float().mean()))
        return gathered

    # --- own -------------------------------------------------------------------------------------------------------

    @property
    def transforms(self) -> bool:
        """Whether advantages are others than TRL's."""
        return self._transform is not None

    def add_stats(self, generation: Generation) -> None:
        """Add the statistics of the tokens of the last round, where the transform asks for them."""
        if not getattr(self._transform, "needs_token_stats", False):
            return
        rows = generation.mine[-1]
        local = cast(StatsOf, self._stats_of)(rows)
        accelerator = self._host.accelerator
        logps, squares, mask = local
        # Padding makes integers of booleans, and only on the ranks that are padded.
        parts = (logps, squares, mask.to(torch.uint8), *loss_ratios(self._host, rows, local))
        gathered = (accelerator.gather(accelerator.pad_across_processes(part, dim=1)).cpu() for part in parts)
        logps, squares, mask, *ratios = gathered
        generation.stats.append(TokenStats(logps, squares, mask.bool(), *ratios))

    def settle(self, generation: Generation, ids: Sequence[int], reading: Reading, own_groups: bool) -> None:
        """
        Write the advantages of some groups into the rows of all ranks, where they are not TRL's.

        Args:
            ids (`Sequence[int]`): Groups that are whole.
            own_groups (`bool`): Whether TRL knows nothing of these groups.
        """
        if not own_groups and self._transform is None:
            return
        groups = generation.view(ids, reading)
        if own_groups:
            groups = self._measured(groups)
            zero = ~(groups.advantages != 0).any(dim=1)
            log = self._host._metrics["train"]
            log[metrics.FRAC_ZERO_VAR_GROUPS].append(float(zero.float().mean()))
            log[ZERO_STD].append(_share_of_equal(groups))
        self._write(generation, ids, self._transformed(groups))

    def settle_subset(self, generation: Generation, ids: Sequence[int], groups: RolloutGroups, keep: Tensor) -> None:
        """
        Measure the advantages of the rows that a pruner kept from those rows alone.

        Args:
            groups ([`~hf_effi.protocols.RolloutGroups`]): What the pruner saw.
            keep (`torch.Tensor`): Its mask.
        """
        absent = ~keep
        shown = replace(
            groups,
            present=keep,
            rewards=groups.rewards.masked_fill(absent, torch.nan),
            weighted_rewards=cast(Tensor, groups.weighted_rewards).masked_fill(absent, torch.nan),
            rewards_per_func=cast(Tensor, groups.rewards_per_func).masked_fill(absent.unsqueeze(-1), torch.nan),
            lengths=groups.lengths.masked_fill(absent, 0),
            loss_tokens=cast(Tensor, groups.loss_tokens).masked_fill(absent, 0),
        )
        self._write(generation, ids, self._transformed(self._measured(shown)))

    def _measured(self, groups: RolloutGroups) -> RolloutGroups:
        host, per_func = self._host, cast(Tensor, groups.rewards_per_func)
        values = ragged_advantages(
            per_func,
            host.reward_weights.cpu(),
            cast(Tensor, groups.present),
            host.multi_objective_aggregation,
            host.scale_rewards,
        )
        if host.multi_objective_aggregation == "sum_then_normalize":
            equal = equal_reward_groups(cast(Tensor, groups.weighted_rewards))
            values = values.masked_fill(equal.unsqueeze(1), 0.0)
        return replace(groups, advantages=values.masked_fill(~groups.live, 0.0))

    def _transformed(self, groups: RolloutGroups) -> Tensor:
        if self._transform is None:
            return groups.advantages
        values, shape = self._transform(groups), tuple(groups.rewards.shape)
        name = getattr(self._transform, "__name__", type(self._transform).__name__)
        allowed = [shape] if groups.token_stats is None else [shape, tuple(groups.token_stats.mask.shape)]
        if not isinstance(values, Tensor) or tuple(values.shape) not in allowed:
            told = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"advantage_transform={name} must return a tensor of shape {' or '.join(map(str, allowed))}, got "
                f"{told}. Tokens have advantages of their own only with an attribute needs_token_stats = True."
            )
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"advantage_transform={name} returned a value that is not finite. Unscorable completions have a "
                "reward of NaN, and places of smaller groups too (see `present`): return 0 for them."
            )
        return values

    def _write(self, generation: Generation, ids: Sequence[int], values: Tensor) -> None:
        """Write advantages into the rows of this rank, and what all ranks must know of them."""
        host, ratios = self._host, Ratios.of(self._host)
        accelerator, places = host.accelerator, generation.places(ids)
        here = places >= 0
        flat = torch.zeros(generation.rows_before(len(generation.rounds)), *values.shape[2:], dtype=torch.float32)
        flat[places[here]] = values[here].float().cpu()
        touched = set(places[here].tolist())
        first = 0
        for number, (mine, everybodys) in enumerate(zip(generation.mine, generation.rounds, strict=True)):
            rows = range(first, first + len(everybodys.rewards))
            first = rows.stop
            if not touched & set(rows):
                continue
            start = rows.start + accelerator.process_index * len(mine)
            own = flat[start : start + len(mine)]
            if own.ndim > 1:
                columns = mine.batch["completion_ids"].size(1)
                own = torch.nn.functional.pad(own, (0, max(0, columns - own.size(1))))[:, :columns]
            mine.batch["advantages"] = own.to(accelerator.device)
            known = accelerator.gather(row_advantages(mine.batch, ratios.multiply)).cpu()
            generation.rounds[number] = replace(everybodys, advantages=known)
        self._show(torch.cat([part.advantages for part in generation.rounds]))

    def _show(self, advantages: Tensor) -> None:
        """Let TRL's table of completions show the advantages that are trained on."""
        table: deque[float] = self._host._logs["advantages"]
        shown = advantages.tolist()[-len(table) :] if table else []
        for offset, value in enumerate(reversed(shown), start=1):
            table[-offset] = value


def _share_of_equal(groups: RolloutGroups) -> float:
    """Return the share of the completions whose group has equal rewards; unscorable groups have none."""
    rewards = cast(Tensor, groups.weighted_rewards)
    equal = equal_reward_groups(rewards) & ~torch.isnan(rewards).all(1)
    return float((equal * groups.sizes).sum() / groups.sizes.sum().clamp(min=1))
