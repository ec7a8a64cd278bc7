"""Rewards that depend on the row: a column of the dataset says which verifier a completion goes to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

from ..errors import RewardError
from ..functional.data import check_number
from ..functional.kept_arguments import keeps_arguments
from .answers import LastNumberReward, NormalizedMatchReward, TokenF1Reward, check_name
from .base import Reward
from .formats import How, InstructionReward, LengthMatchReward
from .math import MathReward


def tulu_verifiers(column: str = "ground_truth") -> dict[str, Reward]:
    """
    Return the verifiers of Tülu 3's code by their names, each reading its gold answer from `column`.

    `gsm8k`, `math`, `strict_math` (Minerva's form only), `string_matcher` (within `<answer>`), `f1`, `ifeval` (which
    reads IFEval's two columns), `max_length` and `up_to_max_length`.

    Args:
        column (`str`, *optional*, defaults to `"ground_truth"`): Of the dataset.

    Raises:
        ValueError: a name that is none.

    Example:
    ```python
    >>> sorted(tulu_verifiers())[:3]
    ['f1', 'gsm8k', 'ifeval']
    ```
    """
    return {
        "gsm8k": LastNumberReward(column),
        "math": MathReward(column),
        "strict_math": MathReward(column, places=["final"]),
        "string_matcher": NormalizedMatchReward(column, within_tag="answer"),
        "f1": TokenF1Reward(column),
        "ifeval": InstructionReward(),
        "max_length": LengthMatchReward(column),
        "up_to_max_length": LengthMatchReward(column, over_only=True),
    }


class VerifierReward(Reward):
    """
    Send each completion to the verifier that its row names, and multiply what that says by `alpha`.

    The column names one verifier, several, or `None`. A row without one, or whose verifiers say `None`, has no reward:
    it is left to other reward functions. Each verifier is called once with its rows. From Tülu 3,
    [2411.15124](https://huggingface.co/papers/2411.15124), whose code has `alpha=10` and a reward of -10 for a
    completion that does not stop.

    Args:
        verifiers (`Mapping[str, Callable]`, *optional*): Name -> reward function of TRL's form, also `None` values.
            Defaults to [`tulu_verifiers`].
        column (`str`, *optional*, defaults to `"verifier"`): Column with the names.
        alpha (`float`, *optional*, defaults to 10.0): Factor, > 0. It is felt beside other rewards, or with
            `scale_rewards="none"`.
        how (`str`, *optional*, defaults to `"sum"`): What several verifiers of a row become: `"sum"`, `"mean"`, or the
            `"last"` one that has a reward.
        non_stop_penalty (`float`, *optional*): Reward in place of that of a verifier for a completion whose last token
            is none of `stop_ids`. Tülu 3 has -10.
        stop_ids (`Sequence[int]`, *optional*): The token ids that end a completion, with `non_stop_penalty` only.
        name (`str`, *optional*): What the trainer logs it as.

    Raises:
        ValueError: an option out of range, or a penalty without `stop_ids`.
        TypeError: a verifier that cannot be called, or is asynchronous.
        RewardError: of a call: a row names a verifier that is not there.

    Example:
    ```python
    >>> reward = VerifierReward()
    >>> reward(
    ...     completions=["It is 4.", "\\\\boxed{x}", "hello"],
    ...     verifier=["gsm8k", "math", None],
    ...     ground_truth=["4", "y", None],
    ... )
    [10.0, 0.0, None]
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        verifiers: Mapping[str, Callable[..., Any]] | None = None,
        column: str = "verifier",
        alpha: float = 10.0,
        how: How = "sum",
        non_stop_penalty: float | None = None,
        stop_ids: Sequence[int] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        check_name("column", column, optional=False)
        self.verifiers = dict(tulu_verifiers() if verifiers is None else verifiers)
        self._check_verifiers()
        if how not in get_args(How):
            raise ValueError(f"how={how!r} is none of {', '.join(get_args(How))}.")
        if (non_stop_penalty is None) != (stop_ids is None):
            raise ValueError(
                f"non_stop_penalty={non_stop_penalty!r} and stop_ids={stop_ids!r} go together: the penalty is for "
                "completions whose last token is none of them, e.g. [tokenizer.eos_token_id]."
            )
        self.column_name, self.how = column, how
        self.alpha = check_number("alpha", alpha, 0.0, open_low=True)
        self.non_stop_penalty = (
            None if non_stop_penalty is None else check_number("non_stop_penalty", non_stop_penalty, float("-inf"))
        )
        self.stop_ids = frozenset(_ids(stop_ids or ()))
        if stop_ids is not None and not self.stop_ids:
            raise ValueError("stop_ids=[] has no token: every completion would be one that does not stop.")

    def _check_verifiers(self) -> None:
        if not self.verifiers:
            raise ValueError("verifiers={} has none: every row would be without a reward.")
        import inspect

        for key, verifier in self.verifiers.items():
            check_name("a verifier", key, optional=False)
            call = getattr(verifier, "__call__", None)  # noqa: B004
            if not callable(verifier):
                raise TypeError(f"verifiers[{key!r}]={verifier!r} must be a reward function.")
            if inspect.iscoroutinefunction(verifier) or inspect.iscoroutinefunction(call):
                raise TypeError(f"verifiers[{key!r}] is asynchronous; it must return its rewards.")

    def __call__(
        self, prompts: Sequence[Any] | None = None, completions: Sequence[Any] | None = None, **columns: Any
    ) -> list[float | None]:
        """
        Return one reward per completion, as TRL calls it.

        Raises:
            RewardError: no completions, no such column, a row with a verifier that is not there, or a verifier that
                returns another number of rewards.
        """
        if completions is None:
            raise RewardError(f"{self.__name__} needs completions=, a list of texts or of lists of messages.")
        total = len(completions)
        wanted = [self._names(value) for value in self.column(self.column_name, total, columns)]
        found: list[list[float | None]] = [[None] * len(names) for names in wanted]
        for key, verifier in self.verifiers.items():
            rows = [(row, place) for row, names in enumerate(wanted) for place, one in enumerate(names) if one == key]
            if rows:
                values = self._ask(key, verifier, [row for row, _ in rows], total, prompts, completions, columns)
                for (row, place), value in zip(rows, values, strict=True):
                    found[row][place] = value
        rewards = [self._joined(values) for values in found]
        if self.non_stop_penalty is not None:
            ids = self.column("completion_ids", total, columns)
            for row, reward in enumerate(rewards):
                if reward is not None and not (len(ids[row]) and int(ids[row][-1]) in self.stop_ids):
                    rewards[row] = self.non_stop_penalty
        return rewards

    def _names(self, value: Any) -> list[str]:
        names = [] if value is None else [value] if isinstance(value, str) else list(value)
        for name in names:
            if name not in self.verifiers:
                raise RewardError(
                    f"{self.__name__}: a row asks for the verifier {name!r}. There are: "
                    f"{', '.join(sorted(self.verifiers))}. Add it to verifiers=, or put None into its row."
                )
        return names

    def _ask(
        self,
        key: str,
        verifier: Callable[..., Any],
        rows: list[int],
        total: int,
        prompts: Sequence[Any] | None,
        completions: Sequence[Any],
        columns: Mapping[str, Any],
    ) -> list[float | None]:
        given = {name: _rows_of(value, rows, total) for name, value in columns.items()}
        if prompts is not None:
            given["prompts"] = [prompts[row] for row in rows]
        values = verifier(completions=[completions[row] for row in rows], **given)
        if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
            raise RewardError(f"{self.__name__}: the verifier {key!r} returned {values!r}, not a list of rewards.")
        values = list(values)
        if len(values) != len(rows):
            raise RewardError(
                f"{self.__name__}: the verifier {key!r} returned {len(values)} rewards for {len(rows)} completions."
            )
        return [None if value is None or value != value else float(value) for value in values]

    def _joined(self, values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        if not known:
            return None
        if self.how == "last":
            return self.alpha * known[-1]
        return self.alpha * sum(known) / (len(known) if self.how == "mean" else 1)


def _rows_of(value: Any, rows: list[int], total: int) -> Any:
    """Take the rows of a column; what is none, such as `trainer_state`, is passed as it is."""
    if isinstance(value, (list, tuple)) and len(value) == total:
        return [value[row] for row in rows]
    return value


def _ids(values: Iterable[Any]) -> list[int]:
    found = list(values)
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in found):
        raise ValueError(f"stop_ids={found!r} must be token ids.")
    return found


#: [`VerifierReward`] with [`tulu_verifiers`], for a YAML
verifier_reward = VerifierReward()
