"""HIVE keeps what the policy is least sure of, in the order of the selector that it checks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_effi.errors import MismatchError
from hf_effi.functional.kept_arguments import arguments_of
from hf_effi.functional.rollouts import ShuffledPrompts, token_entropy
from hf_effi.protocols import PromptSelector
from hf_effi.selection import HIVE, PCL

NAN = float("nan")


class Context:
    """The logits of row `n` are `(0, n / 4)`, so that lower rows are less sure."""

    size, group_size, seed = 16, 4, 0

    def read_prompts(self, rows: Any, read: Any, layer: str = "last") -> torch.Tensor:
        assert layer == "next"
        return torch.stack([read(torch.tensor([[0.0, row / 4]]), torch.tensor([1])) for row in rows])


def made(**over: Any) -> HIVE:
    selector = HIVE(ShuffledPrompts(16, seed=3), **over)
    selector.attach(Context())
    return selector


def test_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, math.log(3.0), -math.inf], [-math.inf, 5.0, -math.inf]])
    by_hand = [math.log(3), -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)), 0.0]
    assert token_entropy(logits).tolist() == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.7])
def test_the_least_sure_half_is_kept_in_the_selectors_order(keep: float) -> None:
    selector, stream = made(keep=keep), ShuffledPrompts(16, seed=3)
    for count in (3, 1):
        offered = stream.select(math.ceil(count / keep))
        found = selector.select(count)
        assert set(found) == set(sorted(offered)[:count])
        assert found == [row for row in offered if row in found]
    numbers = selector.metrics()
    assert numbers["entropy_kept"] >= numbers["entropy_offered"]


def test_all_is_kept_where_there_is_no_more() -> None:
    assert made(keep=1.0).select(5) == ShuffledPrompts(16, seed=3).select(5)
    assert sorted(made().select(16)) == list(range(16))
    assert len(made().select(20)) == 20


def test_state_metrics_and_rewards_are_the_selectors() -> None:
    class Told(ShuffledPrompts):
        def observe(self, rows: list[int], groups: Any) -> None:
            self.told = rows, groups

        def metrics(self) -> dict[str, float]:
            return {"own": 1.0}

    inner = Told(16)
    selector = HIVE(inner)
    selector.attach(Context())
    rows = selector.select(2)
    selector.observe(rows, "groups")
    assert inner.told == (rows, "groups") and selector.metrics()["own"] == 1.0
    other = HIVE(Told(16))
    other.attach(Context())
    other.load_state_dict(selector.state_dict())
    assert other.select(3) == selector.select(3)
    with pytest.raises(MismatchError, match="checks a Told, this one a ShuffledPrompts"):
        made().load_state_dict(selector.state_dict())


def test_what_it_takes() -> None:
    assert isinstance(HIVE(PCL(8)), PromptSelector)
    assert list(arguments_of(HIVE(PCL(8), keep=0.3))) == ["selector", "keep"]
    for keep in (0.0, 1.5, NAN, True):
        with pytest.raises(ValueError, match="keep="):
            HIVE(PCL(8), keep=keep)
    with pytest.raises(TypeError, match="selector=3 has no select, observe"):
        HIVE(3)
    with pytest.raises(ValueError, match="HIVE has no model to read prompts with"):
        HIVE(PCL(8)).select(1)
