"""What chooses prompts, groups, completions and advantages: the objects that a trainer was given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ...errors import BrokenFileError, MismatchError, RefusedError
from ...functional.rollouts import AdvantagePruner, GenerationLayout, PassRateBand
from ...protocols import AdvantageTransform, GroupFilter, PromptSelector, RolloutAllocator, RolloutPruner
from ...selection import HybridGate, Screening
from .config import refuse_unused
from .host import Host
from .settings import GRPOSettings
from .step_prompts import check_methods, check_no_class, check_selector, parameters_of

#: Options that act only where groups are filtered.
_OF_FILTERING = ("difficulty_reward", "difficulty_max_rounds", "difficulty_underfill")


@dataclass(frozen=True)
class SelectionObjects:
    """
    The arguments of [`EffiGRPOTrainer`] of the same names; `group_filters` are joined to one.

    Example:
    ```python
    >>> SelectionObjects().any, SelectionObjects(screening=Screening(4)).any
    (False, True)
    ```
    """

    prompt_selector: PromptSelector | None = None
    group_filter: GroupFilter | None = None
    rollout_pruner: RolloutPruner | None = None
    advantage_transform: AdvantageTransform | None = None
    rollout_allocator: RolloutAllocator | None = None
    screening: Screening | None = None
    hybrid_gate: HybridGate | None = None

    @classmethod
    def of(cls, group_filters: Sequence[GroupFilter] | None = None, **given: Any) -> SelectionObjects:
        """
        Return the objects, each of which was looked at.

        Raises:
            TypeError: an object lacks a method, or has one of an earlier form.
            ValueError: both `group_filter` and `group_filters`, or an empty list.
        """
        objects = cls(**given)
        if objects.prompt_selector is not None:
            check_selector(objects.prompt_selector)
        stateful = ("allocate", "observe", "state_dict", "load_state_dict")
        check_methods("rollout_allocator", objects.rollout_allocator, "RolloutAllocator", stateful)
        check_methods("rollout_pruner", objects.rollout_pruner, "RolloutPruner", ("keep",))
        _check_pruner(objects.rollout_pruner)
        transform = objects.advantage_transform
        check_no_class("advantage_transform", transform)
        if transform is not None and not callable(transform):
            raise TypeError(f"advantage_transform must be callable, got {transform!r}. See hf_effi.protocols.")
        if objects.screening is not None and not isinstance(objects.screening, Screening):
            raise TypeError(f"screening must be a hf_effi.selection.Screening, got {objects.screening!r}.")
        gate = objects.hybrid_gate
        if gate is not None and not isinstance(gate, HybridGate):
            raise TypeError(f"hybrid_gate must be a hf_effi.selection.HybridGate, got {gate!r}.")
        if gate is not None and not gate.on:
            objects = replace(objects, hybrid_gate=None)
        if group_filters is None:
            check_methods("group_filter", objects.group_filter, "GroupFilter", ("decide", "fill_order"))
            return objects
        if objects.group_filter is not None:
            raise ValueError("pass either `group_filter=` or `group_filters=`, not both.")
        if not isinstance(group_filters, (list, tuple)) or not group_filters:
            raise ValueError(f"group_filters must be a list with at least one filter, got {group_filters!r}.")
        for one in group_filters:
            check_methods("group_filters", one, "GroupFilter", ("decide", "fill_order"))
        from ...selection.filters import FilterChain

        return replace(objects, group_filter=FilterChain(group_filters))

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return any(getattr(self, field.name) is not None for field in fields(self))

    def _stateful(self) -> dict[str, Any]:
        # The state of the prompt selector has a file of its own.
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "prompt_selector"}
        return {name: one for name, one in found.items() if hasattr(one, "state_dict")}

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all but the prompt selector, with the names of their classes; empty without any."""
        return {
            name: {"class": type(one).__name__, "state": one.state_dict()} for name, one in self._stateful().items()
        }

    def load_state_dict(self, stored: dict[str, Any], checkpoint: Any) -> None:
        """
        Go on where a checkpoint stopped.

        Raises:
            BrokenFileError: what is stored is no table of states.
            MismatchError: the checkpoint was trained with other objects.
        """
        mine = {name: type(one).__name__ for name, one in self._stateful().items()}
        try:
            theirs = {str(name): str(entry["class"]) for name, entry in stored.items()}
        except (AttributeError, KeyError, TypeError):
            raise BrokenFileError(
                f"{checkpoint}: the file of what chooses rollouts does not hold their states. Resume from another "
                "checkpoint."
            ) from None
        if mine != theirs:
            raise MismatchError(
                f"{checkpoint} was trained with {_told(theirs)}, this run has {_told(mine)}. Build them as in the run "
                "that is resumed, or start a new run from the weights."
            )
        for name, one in self._stateful().items():
            one.load_state_dict(stored[name].get("state"))

    def completed(self, settings: GRPOSettings, args: Any) -> SelectionObjects:
        """Return these and what the settings ask for."""
        objects = self
        if self.group_filter is None and settings.difficulty_range is not None:
            objects = replace(objects, group_filter=PassRateBand(*settings.difficulty_range))
        if settings.prune_rate:
            pruner = AdvantagePruner(
                settings.prune_rate,
                settings.prune_metric,
                settings.prune_scope,
                settings.prune_balance_signs,
                seed=args.seed if settings.prune_metric == "random" else 0,
            )
            objects = replace(objects, rollout_pruner=pruner)
        return objects

    def check(self, settings: GRPOSettings, train_sampler: Any = None) -> None:
        """
        Check settings and objects against each other, before a model is loaded.

        Raises:
            ValueError: two ways to give the same method, two methods that do not go together, or an option whose
                method is off.
        """
        if self.group_filter is not None and settings.difficulty_range is not None:
            raise ValueError("pass either `group_filter=` or `difficulty_range`, not both.")
        if self.rollout_pruner is not None and settings.prune_rate:
            raise ValueError("pass either `rollout_pruner=` or `prune_rate`, not both.")
        if self.prompt_selector is not None and train_sampler is not None:
            raise ValueError(
                "`prompt_selector=` chooses the prompts of every generation, so that `train_sampler=` would order "
                "rows that nobody reads. Drop one of the two."
            )
        filters = self.group_filter is not None or settings.difficulty_range is not None
        prunes = self.rollout_pruner is not None or bool(settings.prune_rate)
        if self.screening is not None:
            for name, value in (
                ("a group filter", filters),
                ("`rollout_allocator=`", self.rollout_allocator is not None),
                ("`train_sampler=`", train_sampler is not None),
            ):
                if value:
                    raise ValueError(
                        f"`screening=` and {name} do not go together: the screening decides which prompts are "
                        "generated for, and with how many completions. Drop one of the two."
                    )
        if self.rollout_allocator is not None and prunes and _is_cppo(self.rollout_pruner, settings):
            raise ValueError(
                "`rollout_allocator=` gives groups of several sizes, and CPPO prunes a share of groups of one size. "
                "Drop one of the two, or use a pruner that keeps a number of each group, e.g. "
                "hf_effi.selection.MaxVariancePruner."
            )
        screens = self.screening is not None
        for name, value in (("a group filter", filters), ("pruning", prunes), ("`screening=`", screens)):
            if self.hybrid_gate is not None and value:
                raise ValueError(
                    f"`hybrid_gate=` and {name} do not go together: both decide what becomes of groups without a "
                    "right completion. Drop one of the two."
                )
        if not filters and self.screening is None:
            # `difficulty_reward` also says which function's pass rates a selector is told.
            told = any(x is not None for x in (self.prompt_selector, self.rollout_allocator, self.hybrid_gate))
            read = ("difficulty_reward",) if told else ()
            refuse_unused(
                settings,
                tuple(name for name in _OF_FILTERING if name not in read),
                "acts only where groups are filtered, which they are not. Set difficulty_range, e.g. (0, 1), or pass "
                "group_filter=",
            )
        if not prunes:
            refuse_unused(
                settings,
                ("prune_normalizer",),
                "acts only where completions are pruned, which they are not. Set prune_rate, e.g. 0.5, or pass "
                "rollout_pruner=",
            )

    def check_host(self, host: Host, settings: GRPOSettings) -> None:
        """
        Check what these need of the trainer, before any training.

        Raises:
            RefusedError: rows cannot be picked by number, or not be shared by the processes.
        """
        layout = GenerationLayout.of(host.args)
        refills = self.group_filter is not None and settings.difficulty_max_rounds > 1
        by_number = (self.prompt_selector, self.rollout_allocator, self.screening)
        streams = not hasattr(host.train_dataset, "__len__") and not hasattr(self.prompt_selector, "open_stream")
        if streams and (refills or any(x is not None for x in by_number)):
            raise RefusedError(
                "refilling, prompt selection, screening and allocation pick rows by number, which a streaming "
                "dataset cannot serve. Use a map-style dataset, difficulty_max_rounds=1, or a selector in "
                "hf_effi.selection.BufferedPrompts, which reads rows ahead."
            )
        fits = getattr(self.rollout_pruner, "check_group_size", None)
        if callable(fits) and self.rollout_allocator is None:
            fits(layout.num_generations)
        if self.rollout_allocator is not None and not hasattr(host.train_dataset, "__len__"):
            raise RefusedError(
                f"rollout_allocator={type(self.rollout_allocator).__name__} divides completions by what was seen of "
                "each row before, and a row that was generated for leaves the buffer of a stream. Use a map-style "
                "dataset, or drop rollout_allocator."
            )
        if self.screening is None:
            return
        stages = {
            "first": self.screening.prompts(layout.prompts) * self.screening.initial,
            "second": layout.prompts * self.screening.continuation(layout.num_generations),
        }
        for stage, rows in stages.items():
            if rows % layout.world_size:
                raise RefusedError(
                    f"the {stage} stage of screening generates {rows} completions, which {layout.world_size} "
                    "processes cannot share evenly. Choose other numbers for Screening(initial=, candidates=)."
                )


def checked_sizes(allocator: RolloutAllocator, numbers: Sequence[int], budget: int) -> list[int]:
    """
    Return how many completions each prompt gets.

    Args:
        numbers (`Sequence[int]`): Rows of the dataset.
        budget (`int`): Completions of all of them.

    Raises:
        ValueError: what the allocator returned does not add up.
    """
    sizes = [int(size) for size in allocator.allocate(numbers, budget)]
    if len(sizes) != len(numbers) or sum(sizes) != budget or min(sizes) < 2:
        raise ValueError(
            f"{type(allocator).__name__}.allocate must return one number >= 2 for each of {len(numbers)} rows, "
            f"{budget} in all, got {len(sizes)} numbers from {min(sizes, default=0)} that add up to {sum(sizes)}."
        )
    return sizes


def fitting_groups(order: Sequence[int], sizes: Sequence[int], most: int, room: int) -> list[int]:
    """
    Return the first `most` groups of an order whose completions fit into `room` rows, without those that do not.

    Example:
    ```python
    >>> fitting_groups([2, 0, 1, 3], sizes=[6, 2, 4, 2], most=3, room=8)
    [2, 1, 3]
    ```
    """
    taken: list[int] = []
    for group in order:
        if len(taken) < most and sizes[group] <= room:
            taken.append(group)
            room -= sizes[group]
    return taken


def _told(objects: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in objects.items()) or "none of these"


def _is_cppo(pruner: RolloutPruner | None, settings: GRPOSettings) -> bool:
    return bool(settings.prune_rate) or isinstance(pruner, AdvantagePruner)


def _check_pruner(pruner: Any) -> None:
    if pruner is None:
        return
    names = [parameter.name for parameter in parameters_of(pruner.keep)]
    if "advantages" in names:
        raise TypeError(
            f"{type(pruner).__name__}.keep(advantages, group_size, ...) is the old form. It is now keep(groups) with "
            "a hf_effi.protocols.RolloutGroups and returns a mask of shape (num_groups, group_size): read "
            "groups.advantages and groups.live."
        )
    if (stats := getattr(pruner, "adv_stats", "full")) not in ("full", "subset"):
        raise ValueError(f"{type(pruner).__name__}.adv_stats must be 'full' or 'subset', got {stats!r}.")
