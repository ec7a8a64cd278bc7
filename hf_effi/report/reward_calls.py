"""Calls of a reward function as `GRPOTrainer` makes them, and one in a process of its own."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerState

from .._untrusted import one_line
from ..errors import RewardError
from ..trainers.grpo.rewards import check_rewards
from .reward_child import call

#: columns that TRL passes under a name of its own, or not at all
_TAKEN = ("prompt", "completion", "completion_ids")
#: seconds that the other process has
_LONGEST = 300


class RewardCalls:
    """
    A reward function, the rows that it is called for, and what it did to its arguments.

    Args:
        reward (`Callable`): As TRL takes it, also asynchronous.
        rows (`Sequence[Mapping]`): Rows of the dataset, each with `prompt`.
        tokenize (`Callable`): Text to token ids, for `completion_ids`.
        name (`str`): What it is called in messages.
    """

    def __init__(
        self,
        reward: Callable[..., Any],
        rows: Sequence[Mapping[str, Any]],
        tokenize: Callable[[str], list[int]],
        name: str,
    ) -> None:
        self.reward, self.rows, self.tokenize, self.name = reward, rows, tokenize, name
        self.is_chat = not isinstance(rows[0]["prompt"], str)
        #: names of arguments that a call has changed
        self.changed: set[str] = set()

    def arguments(self, places: Sequence[int], texts: Sequence[str]) -> dict[str, Any]:
        """Return the keyword arguments of a call for these rows, as `GRPOTrainer._calculate_rewards` passes them."""
        keys = [key for key in self.rows[0] if key not in _TAKEN]
        columns = {key: [copy.deepcopy(self.rows[place][key]) for place in places] for key in keys}
        chat = [[{"role": "assistant", "content": text}] for text in texts]
        return {
            "prompts": [copy.deepcopy(self.rows[place]["prompt"]) for place in places],
            "completions": chat if self.is_chat else list(texts),
            "completion_ids": [self.tokenize(text) for text in texts],
            **columns,
        }

    def __call__(self, places: Sequence[int], texts: Sequence[str]) -> list[float | None]:
        """
        Return the rewards of completions.

        Raises:
            RewardError: what it returned are no rewards. What it raises itself goes through.
        """
        return self.timed(places, texts)[0]

    def timed(self, places: Sequence[int], texts: Sequence[str]) -> tuple[list[float | None], float]:
        """Return the rewards, and the wall-clock seconds of the call."""
        arguments = self.arguments(places, texts)
        before = copy.deepcopy(arguments)
        began = time.perf_counter()
        values = call(self.reward, arguments, TrainerState())
        seconds = time.perf_counter() - began
        self.changed |= {key for key, value in arguments.items() if value != before[key]}
        return check_rewards(values, len(texts), self.name, warn=False), seconds

    def in_another_process(self, places: Sequence[int], texts: Sequence[str]) -> list[float | None]:
        """
        Return the rewards that another process gives, whose hash seed is another one.

        Raises:
            RewardError: the function cannot be sent there, or fails there.
        """
        try:
            packed = pickle.dumps((self.reward, self.arguments(places, texts), vars(TrainerState())))
        except Exception as error:  # whatever an object says that cannot be pickled
            raise RewardError(f"it cannot be pickled ({one_line(error, 150)})") from None
        with tempfile.TemporaryDirectory() as folder:
            source, out = Path(folder, "call"), Path(folder, "values")
            source.write_bytes(packed)
            environment = {**os.environ, "PYTHONHASHSEED": "4242", "PYTHONPATH": os.pathsep.join(sys.path)}
            try:
                done = subprocess.run(
                    [sys.executable, "-m", "hf_effi.report.reward_child", str(source), str(out)],
                    env=environment, capture_output=True, text=True, timeout=_LONGEST, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise RewardError(f"it did not return within {_LONGEST} seconds") from None
            if not out.exists():
                raise RewardError(one_line((done.stderr.strip().split("\n") or [""])[-1], 200))
            values = pickle.loads(out.read_bytes())  # written a moment ago, by us, in a folder of our own
        return check_rewards(values, len(texts), self.name, warn=False)


def same(first: Sequence[float | None], second: Sequence[float | None]) -> bool:
    """Return whether two lists of rewards are equal, up to the precision in which TRL stores them (float32)."""
    return all(
        a is b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-7))
        for a, b in zip(first, second, strict=True)
    )
