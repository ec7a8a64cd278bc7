"""`EffiGRPOConfig`: the scalars that a YAML file needs to drive the methods people want most."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from trl import GRPOConfig

from ...functional.data import check_number
from ...functional.rollouts import PRUNE_METRICS, PRUNE_SCOPES, GenerationLayout
from ...functional.rollouts.selection import check_difficulty_range, pruned_count
from .._common import EffiArguments

#: The exact savings and what each does.
EXACT_SAVINGS = ("trim", "sort", "skip", "pack", "share")

#: What rollouts by transformers' `generate` can save.
ROLLOUT_SAVINGS = ("prefill", "compact")

#: Options that generate otherwise than by transformers' `generate`, and how.
_OTHER_GENERATION = {"use_vllm": "vLLM", "use_transformers_continuous_batching": "continuous batching"}

#: Options that act only where completions are pruned by `prune_rate`.
_OF_PRUNING = ("prune_metric", "prune_scope", "prune_allocation", "prune_balance_signs")


@dataclass
class EffiGRPOConfig(EffiArguments, GRPOConfig):
    """
    Configuration of [`EffiGRPOTrainer`]: every argument of [`~trl.GRPOConfig`], plus the ones below.

    Parameters:
        > Parameters that save work without changing the gradient

        exact_savings (`str`, *optional*, defaults to `"auto"`):
            Which savings to use: `"auto"` (all that are exact for this configuration), `"off"` (bit-identical to
            `GRPOTrainer`), or a comma-separated list of `trim` (forward only real tokens), `sort` (group rows of
            similar length, or of one prompt, into the same micro-batch of an optimizer step), `skip` (do not forward
            rows whose advantage is exactly zero), `pack` (rows end to end without padding) and `share` (the same, with
            a prompt once for all of its completions). Of `trim`, `pack` and `share` the one that costs least for the
            lengths of a micro-batch is taken. A named saving that is not exact for the configuration raises.
        forward_buckets (`int`, *optional*, defaults to `0`):
            In how many length buckets `trim` splits a micro-batch; 0 chooses `rows // 8`, between 1 and 8. More
            buckets forward fewer padding tokens in smaller matrix products.
        loss_token_budget (`int`, *optional*):
            The most tokens of one forward with a gradient, as they are really forwarded: without the padding, the
            rows and the prompts that `exact_savings` saves. A micro-batch with more of them goes through forward and
            backward in pieces, so that its activations are never alive at once; the gradient is that of the whole. A
            row that is longer is a forward of its own. `None` or 0 forwards a micro-batch as it comes.
        score_token_budget (`int`, *optional*):
            The same for the log-probs without a gradient (old, reference), which need less memory for a token. It
            takes the place of `per_device_train_batch_size` there, so that it also makes forwards larger. `None` or 0
            forwards so many rows at a time.

        > Parameters that add to the loss

        ntp_coef (`float`, *optional*, defaults to 0.0):
            Weight of a next-token term on the tokens of prompts, from the same forward; 0 is off. Reinforcement
            Mid-Training has 0.1. It leaves out no token of a prompt, so that the exact savings are off.

        > Parameters that save work in generation

        rollout_savings (`str`, *optional*, defaults to `"off"`):
            What transformers' `generate` does not forward: `"auto"` (both, where the loaded model allows it), `"off"`,
            or a comma-separated list of `prefill` (each distinct prompt once) and `compact` (finished rows leave the
            batch where that pays). Tokens are those of `"off"` up to rounding. A named saving that the model rules out
            raises, as does any choice but `"off"` with `use_vllm`, `use_transformers_continuous_batching` or a
            `rollout_func`.

        > Parameters that choose groups (online difficulty filtering)

        difficulty_range (`list[float]` of two, *optional*):
            Train only on groups whose pass rate lies in `[low, high]`, e.g. `0.2 0.8`; the ends 0 and 1 are open, so
            `0 1` drops exactly the groups without a gradient. `None` turns the filter off.
        difficulty_reward (`str`, *optional*):
            Name of the 0/1 correctness reward the pass rate is taken from. Needed with several reward functions.
        difficulty_max_rounds (`int`, *optional*, defaults to `3`):
            Generation rounds of one step, the first included; 1 never refills.
        difficulty_underfill (`str`, *optional*, defaults to `"fill"`):
            What happens when the rounds do not fill the batch: `"fill"` takes the least bad rejected groups (constant
            number of rows), `"shrink"` trains on fewer rows.

        > Parameters that choose completions (CPPO)

        prune_rate (`float`, *optional*, defaults to `0.0`):
            Share of completions dropped before log-probs and loss, in [0, 1).
        prune_metric (`str`, *optional*, defaults to `"smallest"`):
            What is dropped: `"smallest"` |advantage| (CPPO), `"largest"`, or `"random"` rows, the control.
        prune_scope (`str`, *optional*, defaults to `"rank"`):
            Where rows compete: `"group"`, `"rank"` or `"global"`.
        prune_allocation (`bool`, *optional*, defaults to `True`):
            Dynamic completion allocation: generate `1 / (1 - prune_rate)` times more prompts, so that the trained
            rows of a step stay constant and an epoch takes that many times fewer steps. `False` trains fewer rows.
        prune_balance_signs (`bool`, *optional*, defaults to `False`):
            Keep as many completions with a positive as with a negative advantage, as far as there are.
        prune_normalizer (`str`, *optional*, defaults to `"kept"`):
            What the loss is averaged over: `"kept"` rows (CPPO) or the `"original"` rows (a dropped row counts as a
            row without gradient).

        > Parameters of the learning-rate schedule

        lr_schedule (`str`, *optional*):
            Name of a schedule of hf_effi, e.g. `"wsd"`; `None` leaves the Trainer's own.
        lr_schedule_kwargs (`dict` or `str`, *optional*):
            Its arguments, as a dict or as JSON.
        lr_schedule_on_mismatch (`str`, *optional*, defaults to `"error"`):
            What to do when a checkpoint holds another schedule: `"error"`, `"stored"` or `"new"`.
        sequence_parallel_size (`int`, *optional*, defaults to `1`):
            Number of consecutive ranks that share each sequence in the policy's forward and backward; 1 is off.

        > Parameters of the kernels

        kernel_patch (`str` or `dict`, *optional*):
            Kernels that hold during `train()`: `"liger"`, or a mapping from kernel names or module patterns to
            `"liger"`, `"hf_effi"` or `"organisation/repository:Layer"`, as a dict or as JSON. See [`~hf_effi.patch`].

        > Parameters of the record

        run_record (`bool`, *optional*, defaults to `True`):
            Write `effi_run.json` and `effi_events.jsonl`, the record of the run, into `output_dir/effi`.

        > Parameters of the uploads

        hub_wait_seconds (`float`, *optional*):
            How long one upload to the Hub may take, and how long the end of the run waits for it; 0.8 of `ddp_timeout`
            without it.
        safe_checkpoints (`str`, *optional*):
            Crash-safe checkpoints: `"sync"`, `"thread"` or `"process"`. Those of a stock Trainer without it.

        > Parameters of the optimizer; `optim` takes the names of [`~hf_effi.optim.optimizer_names`] too

        optim_groups (`dict` or `str`, *optional*):
            Arguments of [`~hf_effi.optim.GroupRules`]: LRs and weight decay by parameter, for every optimizer.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "lr_schedule_kwargs", "kernel_patch", "optim_groups"]

    exact_savings: str = field(
        default="auto",
        metadata={"help": "'auto', 'off', or a comma-separated list of trim, sort, skip, pack, share; all exact."},
    )
    forward_buckets: int = field(
        default=0, metadata={"help": "Length buckets of a micro-batch; 0 chooses rows // 8, between 1 and 8."}
    )
    loss_token_budget: int | None = field(
        default=None, metadata={"help": "Most tokens of a forward with a gradient; without it, a whole micro-batch."}
    )
    score_token_budget: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a forward for old and reference log-probs; without it, rows as in TRL."},
    )
    ntp_coef: float = field(
        default=0.0,
        metadata={"help": "Weight of a next-token loss on the tokens of prompts, beside GRPO's; 0 is off."},
    )
    rollout_savings: str = field(
        default="off",
        metadata={"help": "'off', 'auto', or a comma-separated list of prefill, compact: what `generate` leaves out."},
    )
    difficulty_range: list[float] | None = field(
        default=None,
        metadata={"help": "Train only on groups whose pass rate lies in this band, e.g. 0.2 0.8. 0 and 1 are open."},
    )
    difficulty_reward: str | None = field(
        default=None, metadata={"help": "Name of the 0/1 correctness reward that the pass rate is taken from."}
    )
    difficulty_max_rounds: int = field(
        default=3, metadata={"help": "Generation rounds of one step, the first included."}
    )
    difficulty_underfill: str = field(
        default="fill",
        metadata={"help": "'fill' with the least bad groups or 'shrink' the batch.", "choices": ["fill", "shrink"]},
    )
    prune_rate: float = field(
        default=0.0, metadata={"help": "Share of completions dropped before log-probs and loss, in [0, 1)."}
    )
    prune_metric: str = field(
        default="smallest",
        metadata={"help": "Drop the 'smallest' |advantage| (CPPO), the 'largest', or 'random' rows (control)."},
    )
    prune_scope: str = field(
        default="rank", metadata={"help": "Pool in which completions compete: 'group', 'rank' or 'global'."}
    )
    prune_allocation: bool = field(
        default=True,
        metadata={"help": "Generate 1 / (1 - prune_rate) times more prompts: trained rows stay constant."},
    )
    prune_balance_signs: bool = field(
        default=False, metadata={"help": "Keep as many positive as negative advantages, as far as there are."}
    )
    prune_normalizer: str = field(
        default="kept", metadata={"help": "Average the loss over the 'kept' rows (CPPO) or the 'original' rows."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = parse_exact_savings(self.exact_savings)
        if isinstance(self.forward_buckets, bool) or not isinstance(self.forward_buckets, int):
            raise TypeError(f"forward_buckets must be an int >= 0, got {self.forward_buckets!r}.")
        if self.forward_buckets < 0:
            raise ValueError(f"forward_buckets must be >= 0 (0 chooses), got {self.forward_buckets}.")
        if "trim" not in (EXACT_SAVINGS if wanted is None else wanted):
            refuse_unused(
                self,
                ("forward_buckets",),
                f"acts only with 'trim', which exact_savings={self.exact_savings!r} leaves out. Set "
                "exact_savings='auto'",
            )
        check_number("ntp_coef", self.ntp_coef, 0)
        self._check_budgets()
        self._check_rollouts()
        self._check_filter()
        self._check_pruning()

    @property
    def prune_oversample(self) -> int:
        """How many times more prompts a step generates under dynamic completion allocation; 1 without."""
        if not self.prune_rate or not self.prune_allocation:
            return 1
        return max(1, round(1 / (1 - self.prune_rate)))

    def _check_budgets(self) -> None:
        for name in ("loss_token_budget", "score_token_budget"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} must be a number of tokens (an int >= 1), or None, got {value!r}.")
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 1 token, or None or 0 for no budget, got {value}.")
        window, block = self.gradient_accumulation_steps, cast(int, self.steps_per_generation) * self.num_iterations
        corrects = self.use_vllm and self.vllm_importance_sampling_correction
        if self.score_token_budget and window % block == 0 and self.beta == 0.0 and not corrects:
            refuse_unused(
                self,
                ("score_token_budget",),
                "acts only where log-probs are computed without a gradient: with num_iterations > 1, "
                "steps_per_generation > gradient_accumulation_steps, beta, or vLLM and its correction. Set "
                "loss_token_budget for the loss",
            )

    def _check_rollouts(self) -> None:
        if parse_rollout_savings(self.rollout_savings) == ():
            return
        for name, engine in _OTHER_GENERATION.items():
            if getattr(self, name):
                raise ValueError(
                    f"rollout_savings={self.rollout_savings!r} acts in transformers' `generate`, and {name}=True "
                    f"generates by {engine}, which does this on its own. Set rollout_savings='off', or {name}=False."
                )

    def _check_filter(self) -> None:
        if self.difficulty_range is not None:
            low, high = _as_pair(self.difficulty_range)
            check_difficulty_range(low, high)
            # A tuple, which nobody changes in place; the parser of the command line needs the field to say `list`.
            self.difficulty_range = cast(Any, (low, high))
        rounds = self.difficulty_max_rounds
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
            raise ValueError(
                f"difficulty_max_rounds must be an int >= 1 (the first round counts), got "
                f"{self.difficulty_max_rounds!r}."
            )
        _check_choice("difficulty_underfill", self.difficulty_underfill, ("fill", "shrink"))

    def _check_pruning(self) -> None:
        rate = self.prune_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)):
            raise TypeError(f"prune_rate must be a number in [0, 1), got {rate!r}.")
        if not 0 <= rate < 1:
            raise ValueError(f"prune_rate must be in [0, 1), got {rate}. CPPO uses 0.5, 0.75, 0.875 or 0.9375.")
        for name in ("prune_allocation", "prune_balance_signs"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        _check_choice("prune_metric", self.prune_metric, PRUNE_METRICS)
        _check_choice("prune_scope", self.prune_scope, PRUNE_SCOPES)
        _check_choice("prune_normalizer", self.prune_normalizer, ("kept", "original"))
        if rate and self.prune_metric == "random" and self.prune_balance_signs:
            raise ValueError("prune_balance_signs has no meaning with prune_metric='random'. Turn one of them off.")
        if not rate:
            refuse_unused(
                self,
                _OF_PRUNING,
                "acts only with completion pruning by prune_rate, which is 0. Set it, e.g. prune_rate=0.5 (a "
                "rollout_pruner= object has options of its own)",
            )
            return
        group = cast(int, self.num_generations)  # TRL's checks have refused `None`
        if self.prune_allocation and abs(rate - (1 - 1 / self.prune_oversample)) > 1e-3:
            below, above = int(1 / (1 - rate)), int(1 / (1 - rate)) + 1
            raise ValueError(
                f"prune_rate={rate} with prune_allocation=True must be 1 - 1/R for a whole R, so that the trained "
                f"rows stay constant. Nearest: {1 - 1 / below:.4g} (R={below}) or {1 - 1 / above:.4g} (R={above}); or "
                "set prune_allocation=False."
            )
        if self.prune_scope == "group" and pruned_count(group, rate) < 1:
            raise ValueError(f"prune_rate={rate} leaves no completion of num_generations={group}. Lower it.")
        if self.prune_allocation:
            if self.prune_oversample == 1:
                raise ValueError(f"prune_rate={rate} drops nothing. Use 0.5 or more, or prune_allocation=False.")
            if self.prune_scope == "group" and group % self.prune_oversample:
                raise ValueError(
                    f"prune_rate={rate} keeps 1 of {self.prune_oversample} completions, which does not divide "
                    f"num_generations={group}. Use a multiple of {self.prune_oversample}, or prune_scope='rank'."
                )
            return
        self._check_shrunk_rows()

    def _check_shrunk_rows(self) -> None:
        """Without allocation fewer rows are trained, and each micro-batch of each rank must get the same number."""
        layout = GenerationLayout.of(self)
        rows, chunks = layout.generated_rows, layout.micro_batches
        pool = {"group": layout.num_generations, "rank": layout.loader_rows, "global": rows}[self.prune_scope]
        kept = pruned_count(pool, self.prune_rate) * (rows // pool)
        if kept == rows:
            raise ValueError(
                f"prune_rate={self.prune_rate} drops none of the {pool} completions that compete "
                f"(prune_scope={self.prune_scope!r}). Use at least {1 / pool:.4g}, or a larger pool."
            )
        if kept < chunks or kept % chunks:
            raise ValueError(
                f"prune_rate={self.prune_rate} with prune_allocation=False keeps {kept} of {rows} completions, which "
                f"cannot be split evenly over {self.world_size} processes x {self.steps_per_generation} micro-batches "
                f"(steps_per_generation). Choose a rate that keeps a multiple of {chunks}, or prune_allocation=True."
            )


def refuse_unused(settings: Any, names: tuple[str, ...], why: str) -> None:
    """
    Raise for an own field that was set while nothing reads it.

    Args:
        settings ([`EffiGRPOConfig`] or [`GRPOSettings`]): What has these fields.
        names (`tuple[str, ...]`): Own fields of [`EffiGRPOConfig`].
        why (`str`): What the field acts with, and what to set; begins with a verb and ends without a full stop.

    Raises:
        ValueError: naming the field, its value, and its default.
    """
    for name in names:
        value, default = getattr(settings, name), EffiGRPOConfig.__dataclass_fields__[name].default
        if value != default:
            raise ValueError(f"{name}={value!r} {why}, or leave {name} at its default {default!r}.")


def parse_exact_savings(value: Any) -> tuple[str, ...] | None:
    """
    Return the named savings, `()` for `"off"`, or `None` for `"auto"`.

    Example:
    ```python
    >>> parse_exact_savings("trim, skip"), parse_exact_savings("off"), parse_exact_savings("auto")
    (('trim', 'skip'), (), None)
    ```
    """
    return _savings_of("exact_savings", value, EXACT_SAVINGS)


def parse_rollout_savings(value: Any) -> tuple[str, ...] | None:
    """
    Return the named savings, `()` for `"off"`, or `None` for `"auto"`.

    Example:
    ```python
    >>> parse_rollout_savings("compact"), parse_rollout_savings("off"), parse_rollout_savings("auto")
    (('compact',), (), None)
    ```
    """
    return _savings_of("rollout_savings", value, ROLLOUT_SAVINGS)


def _savings_of(option: str, value: Any, allowed: tuple[str, ...]) -> tuple[str, ...] | None:
    if not isinstance(value, str):
        example = ",".join(allowed[:2])
        raise TypeError(f"{option} must be a string such as 'auto', 'off' or {example!r}, got {value!r}.")
    if value == "auto":
        return None
    if value == "off":
        return ()
    names = tuple(name.strip() for name in value.split(","))
    for name in names:
        if name not in allowed:
            raise ValueError(
                f"{option}={value!r}: unknown saving {name!r}. Allowed: 'auto', 'off', or a comma-separated list of "
                f"{', '.join(allowed)}."
            )
    return tuple(dict.fromkeys(names))


def _as_pair(value: Any) -> tuple[float, float]:
    """YAML and the command line give lists, and sometimes one string."""
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    try:
        low, high = (float(end) for end in value)
    except (TypeError, ValueError):
        raise ValueError(f"difficulty_range must be two numbers such as (0.2, 0.8), got {value!r}.") from None
    return low, high


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
