"""`CodeIOReward` through `trainer.train()`: what programs print decides, to the bit as if a function had said it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from trl import GRPOConfig, GRPOTrainer

from hf_effi.rewards import CodeIOReward, Sandbox, SandboxLimits
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import assert_bitwise_equal, grpo_args, prompt_dataset, run_grpo

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")

#: a language in which every text is a program: it prints whether the text has an even number of characters
PARITY = {"filename": "main.txt", "execute": "sh -c 'echo $(( ($(wc -m < {filename}) - 1) % 2 ))'"}
WEAK = ("network", "files", "leftovers", "processes", "parent", "memory")


class Everything(CodeIOReward):
    """Takes whole completions for programs: a model that was never trained writes no fences."""

    async def __call__(self, prompts: Any = None, completions: Any = None, **columns: Any) -> Any:
        fenced = [f"~~~\n{text.replace('~', '')}\n~~~" for text in completions]
        return await super().__call__(prompts, fenced, **columns)


def said(completions: list[str], tests: list[Any], **kwargs: Any) -> list[float | None]:
    """What the programs are to come to."""
    parities = [str(len(text.replace("~", "")) % 2) for text in completions]
    return [
        None if not rows else float(rows[0]["output"] == parity) for rows, parity in zip(tests, parities, strict=True)
    ]


@pytest.fixture(scope="module")
def room() -> Iterator[Sandbox]:
    with Sandbox(SandboxLimits(), workers=2, accept=WEAK) as made:
        yield made


@pytest.mark.parametrize(("cls", "config"), [(GRPOTrainer, GRPOConfig), (EffiGRPOTrainer, EffiGRPOConfig)])
def test_training(tmp_path: Any, room: Sandbox, cls: type, config: type) -> None:
    rows = prompt_dataset(16)
    tests = [None if place % 5 == 4 else [{"input": "", "output": str(place % 2)}] for place in range(16)]
    rows = rows.add_column("tests", tests)
    reward = Everything(PARITY, sandbox=room, name="said")
    trainers = [
        run_grpo(cls, grpo_args(tmp_path / name, config, max_steps=2), reward_funcs=fn, train_dataset=rows)
        for name, fn in (("programs", reward), ("function", said))
    ]
    assert_bitwise_equal(*(trainer.model.state_dict() for trainer in trainers))
    programs, function = ([entry for entry in t.state.log_history if "loss" in entry] for t in trainers)
    for ran, told in zip(programs, function, strict=True):
        assert ran["rewards/said/mean"] == told["rewards/said/mean"]
        shares = {name: value for name, value in ran.items() if name.startswith("effi/code/")}
        assert len(shares) == 6 and sum(shares.values()) == pytest.approx(1.0)
        assert shares["effi/code/right"] == pytest.approx(ran["rewards/said/mean"])
    assert any(0 < entry["rewards/said/mean"] < 1 for entry in programs)


def test_a_column_of_the_wrong_shape_ends_the_run(tmp_path: Any, room: Sandbox) -> None:
    rows = prompt_dataset(16).add_column("tests", ["1"] * 16)
    with pytest.raises(ValueError, match="the column 'tests' of completion 0 holds '1'"):
        run_grpo(
            EffiGRPOTrainer,
            grpo_args(tmp_path, EffiGRPOConfig, max_steps=1),
            reward_funcs=CodeIOReward(sandbox=room),
            train_dataset=rows,
        )
