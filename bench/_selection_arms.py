"""The arms of `bench.grpo_selection`, as data. An arm whose class cannot be imported is listed as missing."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: places in arguments of objects that are filled in when a run is built: rows of the dataset, seed of the run, and the
#: share of the generated completions that the arm of `rate_of` trained on
SIZE, SEED, RATE = "<size>", "<seed>", "<rate>"

BASELINE, EXACT, UNIFORM = "trl", "exact", "uniform_prompts"


@dataclass(frozen=True)
class Made:
    """
    An object that is built for each run.

    Args:
        path (`str`): Name of a class of `hf_effi.selection`, or `module:Class`.
        arguments (`Mapping`): Of its constructor; a value may be a place such as `SIZE`, or another `Made`.
    """

    path: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> tuple[str, str]:
        """Module and class."""
        module, _, name = self.path.rpartition(":")
        return module or "hf_effi.selection", name

    def load(self) -> Any:
        """Return the class."""
        module, name = self.where
        return getattr(importlib.import_module(module), name)

    def build(self, places: Mapping[str, Any]) -> Any:
        """Return the object."""
        return self.load()(**{name: _filled(value, places) for name, value in self.arguments.items()})


def _filled(value: Any, places: Mapping[str, Any]) -> Any:
    if isinstance(value, Made):
        return value.build(places)
    return places[value] if isinstance(value, str) and value in places else value


@dataclass(frozen=True)
class Arm:
    """
    One way to train.

    Args:
        key, title (`str`): Short name, and what tables call it.
        options (`Mapping` or `None`): Own fields of `EffiGRPOConfig`; `None` is TRL's `GRPOTrainer`.
        objects (`Mapping`): Argument of `EffiGRPOTrainer` -> [`Made`], or a list of them.
        control (`str`, *optional*): The arm that leaves the same choice to chance.
        rate_of (`str`, *optional*): For a control: the arm whose share of trained completions `RATE` is.
        combination (`bool`): Several methods together: the headline takes the best of these.
        side (`str`, *optional*): Name of a side column with the share of the worked answer that a completion begins
            with.
    """

    key: str
    title: str
    options: Mapping[str, Any] | None = field(default_factory=dict)
    objects: Mapping[str, Made | Sequence[Made]] = field(default_factory=dict)
    control: str | None = None
    rate_of: str | None = None
    combination: bool = False
    side: str | None = None

    @property
    def made(self) -> list[Made]:
        """All objects, those inside of others too."""
        todo = [one for value in self.objects.values() for one in ([value] if isinstance(value, Made) else value)]
        for one in todo:
            todo += [value for value in one.arguments.values() if isinstance(value, Made)]
        return todo

    def missing(self) -> list[str]:
        """Return the classes that cannot be imported."""
        names = []
        for one in self.made:
            try:
                one.load()
            except (ImportError, AttributeError):
                names.append(".".join(one.where))
        return names

    def plain(self) -> dict[str, Any]:
        """Return what a run depends on, as JSON."""

        def of(value: Any) -> Any:
            if isinstance(value, Made):
                return {value.path: {name: of(one) for name, one in value.arguments.items()}}
            return [of(one) for one in value] if isinstance(value, (list, tuple)) else value

        options = None if self.options is None else {name: of(value) for name, value in self.options.items()}
        objects = {name: of(value) for name, value in self.objects.items()}
        return {"options": options, "objects": objects, **({} if self.side is None else {"side": self.side})}


#: exact switches off: what is left is the method, beside TRL
OFF = {"exact_savings": "off", "rollout_savings": "off"}
ON = {"exact_savings": "auto", "rollout_savings": "auto"}
#: drop what the filter drops, and do not generate more for it
SHRINK = {"difficulty_max_rounds": 1, "difficulty_underfill": "shrink"}
#: the zero-variance filter, `ZeroVariance()` as an option
DEAD_GROUPS = {**SHRINK, "difficulty_range": (0.0, 1.0)}
_CONTROLS = "bench._selection_controls"


def _cppo(rate: float) -> list[Arm]:
    name = str(rate).replace("0.", "")
    return [
        Arm(
            f"cppo_{name}", f"CPPO {rate}, with allocation", {**OFF, "prune_rate": rate}, control=f"random_rows_{name}"
        ),
        Arm(
            f"random_rows_{name}",
            f"random completions, {rate} pruned, with allocation",
            {**OFF, "prune_rate": rate, "prune_metric": "random"},
        ),
    ]


def _selector(key: str, title: str, name: str, **arguments: Any) -> Arm:
    return Arm(key, title, OFF, {"prompt_selector": Made(name, {**arguments, "seed": SEED})}, control=UNIFORM)


def _advantages(key: str, title: str, name: str, **arguments: Any) -> Arm:
    return Arm(key, title, OFF, {"advantage_transform": Made(name, arguments)})


ARMS: tuple[Arm, ...] = (
    Arm(BASELINE, "TRL GRPOTrainer", None),
    Arm(EXACT, "exact switches (exact_savings, rollout_savings)", ON),
    # --- groups
    Arm(
        "zero_variance",
        "zero-variance filter, no refill",
        {**OFF, **DEAD_GROUPS},
        control="random_groups",
    ),
    Arm(
        "random_groups",
        "random groups at the zero-variance filter's rate",
        {**OFF, **SHRINK},
        {"group_filter": Made(f"{_CONTROLS}:RandomGroups", {"rate": RATE, "seed": SEED})},
        rate_of="zero_variance",
    ),
    Arm("band", "balanced band 0.2 to 0.8, refilled", {**OFF, "difficulty_range": (0.2, 0.8)}, control="random_band"),
    Arm(
        "random_band",
        "random groups at the band's rate, refilled",
        OFF,
        {"group_filter": Made(f"{_CONTROLS}:RandomGroups", {"rate": RATE, "seed": SEED})},
        rate_of="band",
    ),
    Arm(
        "lspo",
        "LSPO length band, no refill",
        {**OFF, **SHRINK},
        {"group_filter": Made("LengthBand")},
        control="random_lspo",
    ),
    Arm(
        "random_lspo",
        "random groups at LSPO's rate",
        {**OFF, **SHRINK},
        {"group_filter": Made(f"{_CONTROLS}:RandomGroups", {"rate": RATE, "seed": SEED})},
        rate_of="lspo",
    ),
    # --- completions
    *_cppo(0.5),
    *_cppo(0.75),
    *_cppo(0.875),
    Arm(
        "pods",
        "PODS, 4 of 8 completions",
        OFF,
        {"rollout_pruner": Made("MaxVariancePruner", {"keep": 4})},
        control="random_pods",
    ),
    Arm(
        "random_pods",
        "random 4 of 8 completions, statistics of the kept",
        OFF,
        {"rollout_pruner": Made("RandomPruner", {"keep": 4, "adv_stats": "subset", "seed": SEED})},
    ),
    Arm("d3s", "D3S", OFF, {"rollout_pruner": Made("D3S")}, control="random_d3s"),
    Arm(
        "random_d3s",
        "random completions at D3S's schedule",
        OFF,
        {"rollout_pruner": Made("RandomPruner", {"keep_fraction": (0.25, 0.5), "seed": SEED})},
    ),
    # --- prompts
    Arm(UNIFORM, "prompts at random", OFF, {"prompt_selector": Made("ShuffledPrompts", {"size": SIZE, "seed": SEED})}),
    _selector("mopps", "MoPPS", "MoPPS", size=SIZE),
    _selector("greso", "GRESO", "GRESO", size=SIZE),
    _selector("pcl", "PCL, a head on the policy", "PCL", size=SIZE),
    _selector("dump", "DUMP over three sources", "DUMP", source="kind"),
    _selector("adarft", "AdaRFT by size", "AdaRFT", difficulty="difficulty"),
    _selector("offline", "easy to hard by size", "OfflineCurriculum", pass_rate="difficulty", descending=False),
    _selector("gain_rl", "GAIN-RL", "GainRL", size=SIZE),
    Arm(
        "hive",
        "HIVE over MoPPS",
        OFF,
        {"prompt_selector": Made("HIVE", {"selector": Made("MoPPS", {"size": SIZE, "seed": SEED})})},
        control=UNIFORM,
    ),
    Arm(
        "speed",
        "SPEED screening, 4 of 8 first",
        OFF,
        {"screening": Made("Screening", {"initial": 4, "candidates": 2.0})},
        control="random_speed",
    ),
    Arm(
        "random_speed",
        "screening, random prompts go on",
        OFF,
        {"screening": Made(f"{_CONTROLS}:RandomScreening", {"initial": 4, "candidates": 2.0})},
    ),
    # --- numbers of completions
    Arm("vip", "VIP allocation", OFF, {"rollout_allocator": Made("VIP")}, control="shuffled_vip"),
    Arm(
        "shuffled_vip",
        "VIP's numbers, given to random prompts",
        OFF,
        {"rollout_allocator": Made(f"{_CONTROLS}:ShuffledAllocation", {"inner": Made("VIP"), "seed": SEED})},
    ),
    Arm("knapsack", "Knapsack allocation", OFF, {"rollout_allocator": Made("Knapsack")}, control="shuffled_knapsack"),
    Arm(
        "shuffled_knapsack",
        "Knapsack's numbers, given to random prompts",
        OFF,
        {"rollout_allocator": Made(f"{_CONTROLS}:ShuffledAllocation", {"inner": Made("Knapsack"), "seed": SEED})},
    ),
    # --- advantages: nothing is chosen, so that there is no control
    _advantages("opo", "OPO baseline", "OPO"),
    _advantages("otb", "OTB baseline", "OTB"),
    _advantages("oblr", "OBLR-PO baseline, leave-one-out", "OBLRBaseline"),
    _advantages("reinforce_rej", "Reinforce-Rej", "ReinforceAdvantages"),
    _advantages("entropic", "entropic advantages", "EntropicAdvantages"),
    # --- with worked answers, which no other arm has
    Arm("hpt", "HPT: demonstrations for hopeless groups", OFF, {"hybrid_gate": Made("HybridGate")}),
    Arm(
        "process_rewards",
        "outcome and the share of right steps",
        OFF,
        {"advantage_transform": Made("ProcessRewards", {"columns": "steps", "how": "mean"})},
        side="steps",
    ),
    # --- together
    Arm(
        "speed_exact",
        "SPEED + exact switches",
        ON,
        {"screening": Made("Screening", {"initial": 4, "candidates": 2.0})},
        control="random_speed_exact",
        combination=True,
    ),
    Arm(
        "random_speed_exact",
        "screening, random prompts go on + exact switches",
        ON,
        {"screening": Made(f"{_CONTROLS}:RandomScreening", {"initial": 4, "candidates": 2.0})},
    ),
    Arm(
        "mopps_filter_cppo",
        "MoPPS + zero-variance filter + CPPO 0.5 + exact switches",
        {**ON, **DEAD_GROUPS, "prune_rate": 0.5, "prune_allocation": False},
        {"prompt_selector": Made("MoPPS", {"size": SIZE, "seed": SEED})},
        control="random_combination",
        combination=True,
    ),
    Arm(
        "random_combination",
        "random prompts, groups and half of the completions + exact switches",
        {**ON, **SHRINK, "prune_rate": 0.5, "prune_allocation": False, "prune_metric": "random"},
        {
            "prompt_selector": Made("ShuffledPrompts", {"size": SIZE, "seed": SEED}),
            "group_filter": Made(f"{_CONTROLS}:RandomGroups", {"rate": RATE, "seed": SEED}),
        },
        rate_of="mopps_filter_cppo",
    ),
    Arm(
        "mopps_filter",
        "MoPPS + zero-variance filter + exact switches",
        {**ON, **DEAD_GROUPS},
        {"prompt_selector": Made("MoPPS", {"size": SIZE, "seed": SEED})},
        control="random_mopps_filter",
        combination=True,
    ),
    Arm(
        "random_mopps_filter",
        "random prompts and groups + exact switches",
        {**ON, **SHRINK},
        {
            "prompt_selector": Made("ShuffledPrompts", {"size": SIZE, "seed": SEED}),
            "group_filter": Made(f"{_CONTROLS}:RandomGroups", {"rate": RATE, "seed": SEED}),
        },
        rate_of="mopps_filter",
    ),
    Arm(
        "recommended",
        "MoPPS + zero-variance filter + CPPO 0.75 + exact switches",
        {**ON, **DEAD_GROUPS, "prune_rate": 0.75, "prune_allocation": False},
        {"prompt_selector": Made("MoPPS", {"size": SIZE, "seed": SEED})},
        control="random_recommended",
        combination=True,
    ),
    Arm(
        "random_recommended",
        "random prompts, groups and a quarter of the completions + exact switches",
        {**ON, **SHRINK, "prune_rate": 0.75, "prune_allocation": False, "prune_metric": "random"},
        {
            "prompt_selector": Made("ShuffledPrompts", {"size": SIZE, "seed": SEED}),
            "group_filter": Made(f"{_CONTROLS}:RandomGroups", {"rate": RATE, "seed": SEED}),
        },
        rate_of="recommended",
    ),
    Arm(
        "speed_cppo",
        "SPEED + CPPO 0.75 + exact switches",
        {**ON, "prune_rate": 0.75, "prune_allocation": False},
        {"screening": Made("Screening", {"initial": 4, "candidates": 2.0})},
        control="random_speed_cppo",
        combination=True,
    ),
    Arm(
        "random_speed_cppo",
        "screening, random prompts and a quarter of their completions + exact switches",
        {**ON, "prune_rate": 0.75, "prune_allocation": False, "prune_metric": "random"},
        {"screening": Made(f"{_CONTROLS}:RandomScreening", {"initial": 4, "candidates": 2.0})},
    ),
    Arm(
        "filter_cppo",
        "zero-variance filter + CPPO 0.75 + exact switches",
        {**ON, **DEAD_GROUPS, "prune_rate": 0.75, "prune_allocation": False},
        control="random_recommended",
        combination=True,
    ),
)


def find_arm(key: str) -> Arm:
    """
    Return an arm by its key.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    found = {arm.key: arm for arm in ARMS}
    if key not in found:
        raise ValueError(f"unknown arm {key!r}. Known: {', '.join(found)}.")
    return found[key]


def choose(keys: Sequence[str] | None) -> tuple[Arm, ...]:
    """Return these arms in the order of the table, with the baseline and their controls; all of them for `None`."""
    if keys is None:
        return ARMS
    wanted = {BASELINE, *keys}
    wanted |= {find_arm(key).control for key in keys} - {None}
    wanted |= {find_arm(key).rate_of for key in list(wanted)} - {None}
    return tuple(arm for arm in ARMS if arm.key in wanted)
