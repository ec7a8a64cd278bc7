"""What an object must offer to be plugged into a trainer. Structural types: nothing needs to inherit from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from .functional.rollouts import GroupDecision

__all__ = [
    "AdvantageTransform",
    "GroupFilter",
    "PromptSelector",
    "RolloutAllocator",
    "RolloutGroups",
    "RolloutPruner",
    "SelectionContext",
    "TokenStats",
]


@dataclass(frozen=True)
class TokenStats:
    """
    What one forward of the policy without a gradient knows of every completion token, equal on every rank.

    Args:
        logps (`torch.Tensor`): Log-prob of the token, shape `(num_groups, group_size, tokens)`; 0 outside the loss.
        sum_sq_probs (`torch.Tensor`): `sum_v pi_v^2` over the vocabulary at the token's position, same shape; 0
            outside the loss.
        mask (`torch.Tensor`): Tokens in the loss, boolean, same shape.
        ratios (`torch.Tensor`, *optional*): What TRL multiplies the loss of a token by to correct for what vLLM
            sampled under other log-probs, same shape; `None` where it does not, and by default.
    """

    logps: Tensor
    sum_sq_probs: Tensor
    mask: Tensor
    ratios: Tensor | None = None

    def take(self, groups: Tensor) -> TokenStats:
        """Return the statistics of some groups."""
        ratios = None if self.ratios is None else self.ratios[groups]
        return TokenStats(self.logps[groups], self.sum_sq_probs[groups], self.mask[groups], ratios)


@dataclass(frozen=True)
class RolloutGroups:
    """
    Read-only view of the groups of one generation, equal on every rank.

    Args:
        rewards (`torch.Tensor`): The reward that decides, shape `(num_groups, group_size)`: what the function named by
            `difficulty_reward` returned (the only function's by default; the weighted reward where there are several
            and none is named). Not multiplied by `reward_weights`; NaN = unscorable.
        advantages (`torch.Tensor`): TRL's advantages from the full groups, shape `(num_groups, group_size)`; 0 where
            no token of the row is in the loss, because nothing can be learned from it.
        lengths (`torch.Tensor`): Completion tokens, shape `(num_groups, group_size)`, whether in the loss or not.
        step (`int`): Optimizer steps done.
        loss_tokens (`torch.Tensor`, *optional*): Completion tokens that are in the loss, shape
            `(num_groups, group_size)`: 0 for a truncated completion under `mask_truncated_completions`. Defaults to
            `lengths`.
        weighted_rewards (`torch.Tensor`, *optional*): TRL's `reward`, the sum over the functions times
            `reward_weights`, shape `(num_groups, group_size)`; NaN = unscorable. Defaults to `rewards`.
        rewards_per_func (`torch.Tensor`, *optional*): What each function returned, shape
            `(num_groups, group_size, num_functions)`; NaN = not applicable. Defaults to `rewards` alone.
        reward_names (`tuple[str, ...]`, *optional*): Names of the functions.
        pass_rates (`torch.Tensor`, *optional*): Share of right completions, float64, shape `(num_groups,)`, where
            `rewards` are those of one function and all of them 0 or 1; NaN elsewhere, and by default.
        rows (`tuple[int, ...]`, *optional*): Row number in the training dataset of the prompt of each group; -1 where
            it is not known, and by default.
        present (`torch.Tensor`, *optional*): Completions that there are, boolean, shape `(num_groups, group_size)`.
            Where groups have different sizes, the smaller ones are padded at their end: a place that is not there has
            a reward of NaN, an advantage of 0 and no tokens. Defaults to all.
        side (`Mapping[str, torch.Tensor]`, *optional*): Values of the side columns
            ([`~hf_effi.selection.side_column`]) by name, shape `(num_groups, group_size)`; NaN = none.
        generation (`int`, *optional*, defaults to 0): Generations so far, for seeded choices.
        progress (`float`, *optional*, defaults to 0): Share of the optimizer steps of the run that are done, in
            [0, 1].
        num_pools (`int`, *optional*, defaults to 1): Ranks, each of which holds a contiguous slice of the rows; 1
            where the rows do not divide.
        token_stats ([`TokenStats`], *optional*): There where an advantage transform asks for it.
        lookup (`Callable`, *optional*): Returns the values of a dataset column for row numbers.
    """

    rewards: Tensor
    advantages: Tensor
    lengths: Tensor
    step: int
    loss_tokens: Tensor | None = None
    weighted_rewards: Tensor | None = None
    rewards_per_func: Tensor | None = None
    reward_names: tuple[str, ...] = ()
    pass_rates: Tensor | None = None
    rows: tuple[int, ...] = ()
    present: Tensor | None = None
    side: Mapping[str, Tensor] = field(default_factory=dict)
    generation: int = 0
    progress: float = 0.0
    num_pools: int = 1
    token_stats: TokenStats | None = None
    lookup: Callable[[str, Sequence[int]], list[Any]] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.rows:
            object.__setattr__(self, "rows", (-1,) * len(self.rewards))
        defaults = {
            "loss_tokens": self.lengths,
            "weighted_rewards": self.rewards,
            "rewards_per_func": self.rewards.unsqueeze(-1),
            "pass_rates": torch.full((len(self.rewards),), math.nan, dtype=torch.float64),
            "present": torch.ones_like(self.rewards, dtype=torch.bool),
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @property
    def live(self) -> Tensor:
        """Rows with a token in the loss, boolean, shape `(num_groups, group_size)`."""
        return cast(Tensor, self.loss_tokens) > 0  # filled in when the view was made

    @property
    def has_gradient(self) -> Tensor:
        """Rows with a token in the loss and a non-zero advantage, boolean, shape `(num_groups, group_size)`."""
        return self.live & (self.advantages != 0)

    @property
    def sizes(self) -> Tensor:
        """Completions of each group, shape `(num_groups,)`."""
        return cast(Tensor, self.present).sum(1)

    def column(self, name: str) -> list[Any]:
        """
        Return the value of a column of the training dataset for the prompt of each group.

        Raises:
            ValueError: the dataset has no such column, or row numbers are not known (a streaming dataset).
        """
        if self.lookup is None or any(row < 0 for row in self.rows):
            raise ValueError(
                f"column {name!r} cannot be read: the row numbers of these prompts are not known, as with a streaming "
                "dataset. Use a map-style dataset, e.g. datasets.Dataset.from_list(list(stream))."
            )
        return self.lookup(name, self.rows)

    def take(self, groups: Sequence[int]) -> RolloutGroups:
        """Return some of the groups, in this order."""
        index = torch.as_tensor(list(groups), dtype=torch.int64)
        names = ("rewards", "advantages", "lengths", "loss_tokens", "weighted_rewards", "rewards_per_func")
        values: dict[str, Any] = {name: getattr(self, name)[index] for name in (*names, "pass_rates", "present")}
        values["rows"] = tuple(self.rows[i] for i in groups)
        values["side"] = {name: column[index] for name, column in self.side.items()}
        values["token_stats"] = None if self.token_stats is None else self.token_stats.take(index)
        return replace(self, **values)

    def __iter__(self) -> Iterator[NoReturn]:
        raise TypeError(
            "RolloutGroups is not a list of pass rates. `observe(rows, groups)` gets the groups of those rows: read "
            "groups.pass_rates (NaN where the reward is not 0 or 1), groups.weighted_rewards or groups.advantages."
        )


class SelectionContext(Protocol):
    """
    What a selector or an allocator is given of the trainer, once, by its `attach(context)`, if it has one.

    Nothing in it is stored in a checkpoint; it is given again on resume, before `load_state_dict`.
    """

    #: rows of the training dataset
    size: int
    #: completions of a group, as configured
    group_size: int
    #: of the run
    seed: int

    def column(self, name: str) -> list[Any]:
        """Return a whole column of the training dataset; a `ValueError` names those that there are."""
        ...

    def read_prompts(
        self, rows: Sequence[int], read: Callable[[Tensor, Tensor], Tensor], layer: str = "last"
    ) -> Tensor:
        """
        Forward the prompts of some rows through the policy without a gradient, and return what `read` makes of them.

        The rows are dealt over the ranks and the results gathered, so that every rank must call it with the same
        rows.

        Args:
            rows (`Sequence[int]`): Row numbers of the dataset, at least one.
            read (`Callable`): Given the hidden states of one prompt without padding, float32, shape `(tokens, width)`,
                and its token ids, shape `(tokens,)`; returns a tensor of shape `(k,)`, `k` the same for every prompt.
            layer (`str`, *optional*, defaults to `"last"`): Which hidden states: `"last"` is what the LM head reads,
                `"mlp"` what the MLP of the last layer reads. `"next"` is the logits of the token after the prompt,
                shape `(1, vocabulary)`.

        Returns:
            `torch.Tensor`: float32, on the CPU, shape `(len(rows), k)`.
        """
        ...

    def prompt_ids(self, rows: Sequence[int]) -> list[list[int]]:
        """Return the token ids of the prompts of some rows, as generation has them. Every rank must call it."""
        ...

    def spread(self, rows: Sequence[int], compute: Callable[[list[int]], Tensor]) -> Tensor:
        """
        Deal rows over the ranks, let each compute its own, and return the results of all in the order of `rows`.

        Args:
            rows (`Sequence[int]`): At least one; the same on every rank.
            compute (`Callable`): Given row numbers, at least one and equally many on every rank; returns a tensor of
                shape `(rows, k)`.

        Returns:
            `torch.Tensor`: float32, on the CPU, equal on every rank, shape `(len(rows), k)`.
        """
        ...


@runtime_checkable
class PromptSelector(Protocol):
    """
    Chooses dataset rows. Must be a pure function of its state, which all ranks replicate.

    No prompt is trained on twice in a step: rows whose prompt the step already has are passed over, and `select` is
    asked again for what is missing. A `select` that would give the same rows again can take the row numbers of the
    step as a keyword, `select(count, exclude=frozenset({...}))`. Where the selector has nothing else to give, prompts
    repeat.

    Two more methods are called where there are any: `attach(context)` with a [`SelectionContext`] once before
    training, and `metrics()` after each `observe`, whose numbers are logged as `effi/select/<name>`.
    """

    def select(self, count: int) -> list[int]:
        """Return `count` row numbers of the training dataset."""
        ...

    def observe(self, rows: list[int], groups: RolloutGroups) -> None:
        """
        Take what was generated for these rows, before any filter and pruner: `rows[i]` is the prompt of group `i`.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors, numbers, strings, and lists and dicts of these. Saved with `torch.save`."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` stopped. It was read with `weights_only=True`, its tensors are on the CPU."""
        ...


@runtime_checkable
class RolloutAllocator(Protocol):
    """
    Divides the completions of a generation over its prompts. A pure function of its state, which all ranks replicate.

    `attach(context)` and `metrics()` are called as for a [`PromptSelector`].
    """

    def allocate(self, rows: Sequence[int], budget: int) -> list[int]:
        """Return the completions of each row, whole numbers >= 2 whose sum is `budget`."""
        ...

    def observe(self, rows: list[int], groups: RolloutGroups) -> None:
        """Take what was generated, before any filter; groups have the sizes that were allocated."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as that of a [`PromptSelector`]."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` stopped."""
        ...


@runtime_checkable
class GroupFilter(Protocol):
    """Decides which groups are trained on, from gathered rewards."""

    def decide(self, groups: RolloutGroups) -> GroupDecision:
        """Return the mask and a reason per group. `groups.has_gradient` says which rows can teach something."""
        ...

    def fill_order(self, groups: RolloutGroups) -> list[int]:
        """Return all group indices, the least bad first, for when the batch cannot be filled."""
        ...


@runtime_checkable
class RolloutPruner(Protocol):
    """
    Decides which rows of the surviving groups are trained on.

    An attribute `adv_stats` says from which rows advantages are measured: `"full"` groups, which is also what a pruner
    without it gets, or the kept `"subset"` of each group.

    A method `token_share(progress)` asks for a token level: of the tokens of a micro-batch, over all ranks, the share
    that it returns for the progress of the run, in (0, 1], has a policy term: those with the largest
    `|advantage| * entropy`. See [`~hf_effi.selection.D3S`].
    """

    def keep(self, groups: RolloutGroups) -> Tensor:
        """
        Return a boolean mask of shape `(num_groups, group_size)`, the same on every rank, with at least one row.

        Args:
            groups ([`RolloutGroups`]): Those that the filters left, in the order of generation.
        """
        ...


@runtime_checkable
class AdvantageTransform(Protocol):
    """
    Makes advantages out of gathered groups, after TRL's own and before filters and pruner.

    An attribute `needs_token_stats = True` asks for `groups.token_stats`, which costs one more forward of every row.
    """

    def __call__(self, groups: RolloutGroups) -> Tensor:
        """
        Return the advantages: shape `(num_groups, group_size)`, or `(num_groups, group_size, tokens)` as
        `groups.token_stats` has them. `groups.advantages` are TRL's; to return them changes nothing. Each group must
        be treated alone, or all groups that are given alike: it is called once for each round of generation.
        """
        ...
