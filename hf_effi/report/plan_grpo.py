"""`hf-effi plan grpo`: where the time of a GRPO run will go, what would save some of it, and which settings follow."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Any

from ..errors import RefusedError
from ..functional.forward_costs import ForwardCosts
from ..functional.grpo_expected import Lengths, dead_share
from ..functional.grpo_plan import PHASES, GRPOChoices, GRPOShape, PlannedWork, Speeds, planned_work
from ..functional.grpo_speeds import CARDS, DataSheet, ModelSize, datasheet_speeds
from ..functional.options import refuse_idle
from .grpo_advice import Outcome, advice

#: the columns of the table
_TITLES = {"gen": "generate", "reward": "reward", "logp": "log-probs", "train": "train", "update": "update"}


@dataclass(frozen=True)
class GRPOPlan:
    """
    What [`plan_grpo`] returns.

    Args:
        outcomes (`tuple[Outcome, ...]`): Of each set of choices: its seconds by phase, its groups, and the range of
            an update's seconds; the first is the run as `GRPOTrainer` would do it.
        dead_share (`float`): Share of groups without a gradient.
        dead_by_size (`dict[int, float]`): The same for other sizes of groups.
        suggestions (`tuple[tuple[str, str], ...]`): Setting, and why.
        source (`str`): Where the speeds come from.
        notes (`tuple[str, ...]`): What is assumed or left out.
        measured (`dict`, *optional*): Speeds and points, where this machine was measured.
    """

    outcomes: tuple[Outcome, ...]
    dead_share: float
    dead_by_size: dict[int, float]
    suggestions: tuple[tuple[str, str], ...]
    source: str
    notes: tuple[str, ...]
    measured: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        return {
            "source": self.source,
            "dead_share": self.dead_share,
            "dead_share_by_group_size": {str(size): share for size, share in self.dead_by_size.items()},
            "outcomes": [one.as_dict() for one in self.outcomes],
            "suggestions": [{"setting": setting, "reason": reason} for setting, reason in self.suggestions],
            "notes": list(self.notes),
            "measured": self.measured,
        }


def plan_grpo(
    config: Any,
    shape: GRPOShape,
    *,
    card: DataSheet | None = None,
    measure_seconds: float | None = None,
    dtype: str = "float32",
    reward_seconds: float = 0.0,
    filter_rounds: int = 3,
) -> GRPOPlan:
    """
    Plan the time of a GRPO run on one device.

    Args:
        config (`PreTrainedConfig` or `str`): A config, a folder, a `config.json`, or a name on the Hub.
        shape ([`~hf_effi.functional.grpo_plan.GRPOShape`]): What is trained on.
        card ([`~hf_effi.functional.grpo_speeds.DataSheet`], *optional*): A device by its data sheet; or
        measure_seconds (`float`, *optional*): Time short runs on this machine, for about so long. One of the two.
        dtype (`str`, *optional*, defaults to `"float32"`): Of the weights.
        reward_seconds (`float`, *optional*, defaults to `0.0`): What the reward functions need for a completion.
        filter_rounds (`int`, *optional*, defaults to `3`): `difficulty_max_rounds` of the filter that is weighed; at
            least 1.

    Raises:
        ValueError: neither or both of `card` and `measure_seconds`, or a number out of range.
        RefusedError: a config of no language model.

    Example:
    ```python
    lengths = Lengths.of_quantiles([(0, 20), (50, 200), (100, 1024)])
    shape = GRPOShape(32, 8, 8, Lengths((128,), (1.0,)), lengths, pass_rates=((0.0, 1.0), (0.5, 2.0)))
    plan = plan_grpo("path/to/model", shape, card=DataSheet(989, 3350), dtype="bfloat16")
    print(plan.dead_share, plan.outcomes[0].seconds)
    ```
    """
    from .model_shapes import load_config

    if (card is None) == (measure_seconds is None):
        raise ValueError("give one device: card=, the numbers of its data sheet, or measure_seconds=, this machine.")
    if not 0 <= reward_seconds < float("inf"):
        raise ValueError(f"reward_seconds={reward_seconds!r} must be a number from 0.")
    if filter_rounds < 1:
        raise ValueError(f"filter_rounds={filter_rounds!r} must be at least 1.")
    config = load_config(config) if isinstance(config, str) else config
    model, costs = model_size(config, dtype, on_card=card is not None)
    device = _of_card(model, card) if card is not None else _of_machine(config, costs, dtype, measure_seconds or 0.0)

    def outcome(name: str, choices: GRPOChoices, other: GRPOShape = shape) -> Outcome:
        return device.outcome(name, choices, planned_work(other, choices, costs), reward_seconds)

    outcomes = tuple(outcome(name, choices) for name, choices in scenarios(shape, filter_rounds))
    sizes = sorted({max(2, shape.group_size // 2), shape.group_size, 2 * shape.group_size, 4 * shape.group_size})
    by_size = {size: dead_share(shape.pass_rates, size) for size in sizes}
    suggestions = advice(shape, outcomes, by_size, outcome)
    notes = _notes(shape, device.measured)
    return GRPOPlan(outcomes, shape.dead, by_size, suggestions, device.source, notes, device.measured)


@dataclass(frozen=True)
class _Device:
    """
    Speeds of a device, and where they come from.

    Args:
        speeds, fast, slow (`Mapping`): As they are, and at the ends of their spread.
        source (`str`): For people.
        margin (`float`): Relative error of a measured fit.
        measured (`dict`, *optional*): What was measured.
    """

    speeds: Speeds
    fast: Speeds
    slow: Speeds
    source: str
    margin: float = 0.0
    measured: dict[str, Any] | None = None

    def outcome(self, name: str, choices: GRPOChoices, work: PlannedWork, reward_seconds: float) -> Outcome:
        """Return what some work comes to."""
        low, high = (sum(_seconds(work, end, reward_seconds).values()) for end in (self.fast, self.slow))
        return Outcome(
            name,
            choices,
            _seconds(work, self.speeds, reward_seconds),
            (low * (1 - self.margin), high * (1 + self.margin)),
            work.generated_groups / work.updates,
            work.live_groups,
            work.updates,
        )


def _of_card(model: ModelSize, card: DataSheet) -> _Device:
    source = (
        f"data sheet: {card.tflops:g} TFLOP/s, {card.gb_per_second:g} GB/s; of them {card.efficiency:.0%} and "
        f"{card.bandwidth_efficiency:.0%} reached, {card.layer_milliseconds:g} ms of the host for a layer, all "
        f"+- {card.spread:.0%}"
    )
    fast, slow = (datasheet_speeds(model, card.scaled(end)) for end in (1, -1))
    return _Device(datasheet_speeds(model, card), fast, slow, source)


def _of_machine(config: Any, costs: ForwardCosts, dtype: str, seconds: float) -> _Device:
    from .measure_grpo import measure_device

    found = measure_device(config, costs, dtype=dtype, budget_seconds=seconds)
    source = (
        f"measured on this machine in {found.seconds:.0f} s: {len(found.points)} short runs, which the fit meets "
        f"within {found.error:.0%}"
    )
    return _Device(found.speeds, found.speeds, found.speeds, source, found.error, dataclasses.asdict(found))


def scenarios(shape: GRPOShape, filter_rounds: int) -> list[tuple[str, GRPOChoices]]:
    """Return what is compared: stock, the exact savings one after the other, then the filter and pruning."""
    basic = ("trim", "sort", "skip") if shape.beta == 0 else ("trim", "sort")
    whole = (*basic, "pack", "share")
    found = [
        ("stock", GRPOChoices()),
        (" + ".join(basic), GRPOChoices(basic)),
        ("... + pack", GRPOChoices((*basic, "pack"))),
        ("... + share (exact_savings=auto)", GRPOChoices(whole)),
        (f"auto, filter, {filter_rounds} rounds", GRPOChoices(whole, filter_rounds=filter_rounds)),
    ]
    return [*found, *((f"auto, prune_rate={rate}", GRPOChoices(whole, prune_rate=rate)) for rate in (0.5, 0.75))]


def model_size(config: Any, dtype: str, on_card: bool) -> tuple[ModelSize, ForwardCosts]:
    """
    Return what a model's work depends on, and the costs by which the trainer chooses layouts.

    Args:
        config (`PreTrainedConfig`): The model; it is built without data.
        dtype (`str`): Of the weights.
        on_card (`bool`): Whether a GPU runs it, where one kernel takes all segments of a flat row.
    """
    import torch

    from ..trainers.grpo.packed import costs_of
    from .model_shapes import build_on_meta, setting

    model = build_on_meta(config, dtype, None)
    device = torch.device("cuda" if on_card or torch.cuda.is_available() else "cpu")
    costs = costs_of(model, device)
    text = model.config.get_text_config()
    heads = setting(text, "num_attention_heads") or 1
    head_dim = setting(text, "head_dim") or (setting(text, "hidden_size") or 0) // heads
    layers = setting(text, "num_hidden_layers") or 1
    head: Any = model.get_output_embeddings()
    embedded = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    outside = embedded | ({id(p) for p in head.parameters()} if head is not None else set())
    linear = sum(p.numel() for p in model.parameters() if id(p) not in outside and p.dim() > 1)
    kept = sum(p.numel() * p.element_size() for p in model.parameters())
    kv = 2 * layers * (setting(text, "num_key_value_heads") or heads) * head_dim * model.dtype.itemsize
    size = ModelSize(
        float(linear),
        float(head.weight.numel()) if head is not None else 0.0,
        float(sum(p.numel() for p in model.parameters())),
        layers,
        float(kept),
        float(kv),
        costs.per_pair,
    )
    return size, costs


def _seconds(work: PlannedWork, speeds: Speeds, reward_seconds: float) -> dict[str, float]:
    seconds = work.seconds(speeds)
    seconds["reward"] += reward_seconds * work.counts["reward"]["row"] / work.updates
    return {phase: seconds.get(phase, 0.0) for phase in PHASES}


def _notes(shape: GRPOShape, measured: dict[str, Any] | None) -> tuple[str, ...]:
    notes = [
        "One device, transformers' generate, whole generations; gradient accumulation over an update's rows.",
        "Completions and rewards (0 or 1) are taken as independent, and lengths as independent of rewards.",
    ]
    if shape.beta > 0:
        notes.append("The reference model is taken to cost what the policy costs.")
    if measured is None:
        notes.append("Achieved shares of a data sheet are guesses: give your own, or --measure on the machine itself.")
    else:
        notes.append("The model was measured with random weights; reward functions are counted by --reward-seconds.")
    return tuple(notes)


def parse_lengths(text: str) -> Lengths:
    """
    Read lengths: `256` (all), `128:1,512:3` (length:share), or `p50=200,p90=600,p100=1024` (quantiles).

    Raises:
        ValueError: text that is none of these.

    Example:
    ```python
    >>> parse_lengths("128:1,512:3").mean(), parse_lengths("p0=10,p100=20").longest_of(1)
    (416.0, 15.0)

    ```
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        if all(part.startswith("p") and "=" in part for part in parts):
            pairs = [part[1:].split("=") for part in parts]
            return Lengths.of_quantiles([(float(percent), float(length)) for percent, length in pairs])
        if len(parts) == 1 and ":" not in text:
            return Lengths((int(text),), (1.0,))
        return Lengths.of((int(length), float(share)) for length, share in (part.split(":") for part in parts))
    except ValueError as error:
        raise ValueError(
            f"{text!r} does not tell lengths ({error}). Give 256, 128:1,512:3 (length:share) or "
            "p50=200,p90=600,p100=1024 (quantiles)."
        ) from error


def parse_rates(text: str) -> tuple[tuple[float, float], ...]:
    """
    Read pass rates with their shares.

    Raises:
        ValueError: text that does not tell them.

    Example:
    ```python
    >>> parse_rates("0:1,0.5:2")
    ((0.0, 1.0), (0.5, 2.0))

    ```
    """
    try:
        return tuple((float(rate), float(share)) for rate, share in (part.split(":") for part in text.split(",")))
    except ValueError as error:
        raise ValueError(
            f"{text!r} does not tell pass rates. Give rate:share, such as 0:0.3,0.5:0.4,1:0.3."
        ) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hf-effi plan grpo` to `parser`."""
    parser.add_argument("config", metavar="CONFIG", help="config.json, a folder with one, or a model on the Hub")
    shape = parser.add_argument_group("what is trained on, on one device")
    shape.add_argument("--prompts", type=int, default=8, help="prompts of an update (default 8)")
    shape.add_argument("--group-size", type=int, default=8, help="completions of a prompt (default 8)")
    shape.add_argument("--micro-batch", type=int, help="rows of a micro-batch (default: the group size)")
    shape.add_argument("--num-iterations", type=int, default=1, help="updates for each generation (default 1)")
    shape.add_argument("--beta", type=float, default=0.0, help="KL coefficient; above 0 forwards the reference")
    lengths = "256, or 128:1,512:3 (length:share), or p50=200,p90=600,p100=1024 (quantiles)"
    shape.add_argument("--prompt-length", required=True, metavar="LENGTHS", help=lengths)
    shape.add_argument("--completion-length", required=True, metavar="LENGTHS", help="the same")
    shape.add_argument(
        "--pass-rates",
        default="0.5:1",
        metavar="RATES",
        help="rate:share of the prompts, such as 0:0.3,0.5:0.4,1:0.3 (default: all 0.5)",
    )
    shape.add_argument("--reward-seconds", type=float, default=0.0, help="reward of a completion (default 0)")
    shape.add_argument("--filter-rounds", type=int, default=3, help="difficulty_max_rounds to weigh (default 3)")
    device = parser.add_argument_group("the device: a card, its numbers, or this machine")
    device.add_argument("--card", choices=sorted(CARDS), help="a card whose data sheet is known")
    device.add_argument("--tflops", type=float, help="peak TFLOP/s in the dtype of training")
    device.add_argument("--gb-per-second", type=float, help="memory bandwidth")
    card = {field.name: field.default for field in dataclasses.fields(DataSheet)}
    for name, text in (
        ("efficiency", "share of the TFLOP/s that is reached"),
        ("bandwidth_efficiency", "share of the bandwidth that is reached"),
        ("layer_milliseconds", "of the host for a layer"),
        ("spread", "+- of the three"),
    ):
        option = "--" + name.replace("_", "-")
        device.add_argument(option, type=float, default=card[name], help=f"{text} (default {card[name]})")
    device.add_argument(
        "--measure",
        type=float,
        nargs="?",
        const=60.0,
        metavar="SECONDS",
        help="time short runs of the model on this machine, for about so long (default 60)",
    )
    parser.add_argument("--dtype", default="float32", help="dtype of the weights (default float32)")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")


def run(args: argparse.Namespace) -> int:
    """Print the plan; return the exit status: 2 for a bad value."""
    try:
        card = _card(args)
        rows = args.group_size if args.micro_batch is None else args.micro_batch
        shape = GRPOShape(
            args.prompts,
            args.group_size,
            rows,
            parse_lengths(args.prompt_length),
            parse_lengths(args.completion_length),
            parse_rates(args.pass_rates),
            args.num_iterations,
            args.beta,
        )
        with contextlib.redirect_stdout(sys.stderr):  # what trainers say
            plan = plan_grpo(
                args.config,
                shape,
                card=card,
                measure_seconds=args.measure,
                dtype=args.dtype,
                reward_seconds=args.reward_seconds,
                filter_rounds=args.filter_rounds,
            )
    except (RefusedError, ValueError) as error:
        print(f"hf-effi plan grpo: {error}", file=sys.stderr)
        return 2
    print(json.dumps(plan.as_dict(), indent=2) if args.json else as_text(plan, shape))
    return 0


def _card(args: argparse.Namespace) -> DataSheet | None:
    """Return the card that the options describe, or `None` for this machine."""
    numbers = CARDS[args.card] if args.card else (None, None)
    tflops = args.tflops if args.tflops is not None else numbers[0]
    speed = args.gb_per_second if args.gb_per_second is not None else numbers[1]
    names = ("efficiency", "bandwidth_efficiency", "layer_milliseconds", "spread")
    if args.measure is not None:
        if tflops is not None or speed is not None:
            raise ValueError("--measure is this machine, and --card, --tflops, --gb-per-second another. Drop one.")
        for name in names:
            default = DataSheet.__dataclass_fields__[name].default
            refuse_idle(name, getattr(args, name), default, False, "with a data sheet, not with --measure")
        return None
    if tflops is None or speed is None:
        raise ValueError(
            f"no device: give --card ({', '.join(sorted(CARDS))}), both --tflops and --gb-per-second, or --measure."
        )
    return DataSheet(tflops, speed, **{name: getattr(args, name) for name in names})


def as_text(plan: GRPOPlan, shape: GRPOShape) -> str:
    """Return the plan as text: the table of what would save something, and suggestions."""
    head = "".join(f"{_TITLES[phase]:>11}" for phase in PHASES)
    lines = [
        f"an update: {shape.prompts} prompts x {shape.group_size} = {shape.rows} completions of "
        f"{shape.completion_lengths.mean():.0f} tokens on average; the longest of an update's {shape.rows} has "
        f"{shape.completion_lengths.longest_of(shape.rows):.0f}",
        f"groups without a gradient: {plan.dead_share:.1%} at this size; "
        + ", ".join(f"{share:.1%} of {size}" for size, share in plan.dead_by_size.items()),
        f"speeds: {plan.source}",
        "",
        f"{'seconds of an update':<34}{'total':>9}{'range':>18}{head}{'live groups':>13}{'s / live':>10}",
    ]
    for one in plan.outcomes:
        cells = "".join(f"{one.seconds[phase]:>11.3g}" for phase in PHASES)
        span = f"{one.bounds[0]:.3g} - {one.bounds[1]:.3g}"
        live = one.live_groups / one.updates
        lines.append(
            f"{one.name:<34}{one.total:>9.3g}{span:>18}{cells}{live:>13.3g}{one.seconds_per_live_group:>10.3g}"
        )
    first = plan.outcomes[0]
    split = ", ".join(f"{_TITLES[phase]} {first.seconds[phase] / first.total:.0%}" for phase in PHASES)
    lines += ["", f"the split of stock: {split}", "", "suggested:"]
    lines += [f"  {setting}: {reason}" for setting, reason in plan.suggestions]
    return "\n".join([*lines, "", *(f"Note: {note}" for note in plan.notes)])
