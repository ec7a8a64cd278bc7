"""`RolloutPipeline` around a generation that only counts: which rows are trained on, and what is computed for them."""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from hf_effi import EffiGRPOConfig
from hf_effi.functional import metrics
from hf_effi.trainers.grpo.accounting import StepAccounting
from hf_effi.trainers.grpo.pipeline import RolloutPipeline
from hf_effi.trainers.grpo.selection_objects import SelectionObjects
from hf_effi.trainers.grpo.settings import GRPOSettings
from tests.helpers import grpo_args

#: rewards of the two completions of prompt 0, 1, ...: every other group has no gradient
REWARDS = [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]


class Policy(nn.Module):
    is_gradient_checkpointing = False


class Setup:
    """A host of one rank, a generation of 4 rows, and notes of what was asked for."""

    def __init__(self, folder: Path, skip: bool = False, objects: Any = None, **over: Any) -> None:
        args = grpo_args(folder, EffiGRPOConfig, num_iterations=2, **over)
        self.prompts: list[list[int]] = []
        self.scored: list[tuple[str, list[int]]] = []
        self.log: dict[str, list[float]] = defaultdict(list)
        model = Policy()
        self.host = SimpleNamespace(
            args=args,
            model=model,
            ref_model=Policy(),
            accelerator=SimpleNamespace(
                num_processes=1, process_index=0, device=torch.device("cpu"), gather=lambda values: values
            ),
            state=SimpleNamespace(global_step=0, max_steps=3),
            callback_handler=SimpleNamespace(callbacks=[]),
            scale_rewards="group",
            _logs={"advantages": deque(maxlen=4)},
            train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(16)]}),
            _tokenizer=SimpleNamespace(pad_token_id=0),
            _metrics={"train": self.log},
            tools=None,
            environment_factories=None,
            rollout_func=None,
            reward_func_names=["right"],
            reward_weights=torch.ones(1),
            num_generations=2,
            multi_objective_aggregation="sum_then_normalize",
            loss_type="dapo",
            use_vllm=False,
            _is_vlm=False,
            vllm_importance_sampling_correction=True,
            vllm_importance_sampling_mode="token_mask",
            vllm_importance_sampling_clip_min=None,
            vllm_importance_sampling_clip_max=None,
            _get_per_token_logps_and_entropies=self.score,
        )
        forward = SimpleNamespace(
            exact_savings=("skip",) if skip else (), skipping=lambda batch: contextlib.nullcontext()
        )
        self.accounting = StepAccounting()
        self.pipeline = RolloutPipeline(
            self.host, GRPOSettings.of(args), self.accounting, forward, SelectionObjects(**(objects or {}))
        )

    def score(self, model: Any, ids: Tensor, mask: Tensor, columns: int, batch_size: int | None = None) -> Any:
        later = self.pipeline.put_off(mask, columns)
        if later is not None:
            return later, None, None
        who = "policy" if model is self.host.model else "reference"
        self.scored.append((who, ids[:, 0].tolist()))
        return ids[:, -columns:].float(), None, None

    def stock(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Row `i` of prompt `p` has the prompt token `p + 1`; old and reference log-probs are asked for first."""
        numbers = [int(row["prompt"]) for row in inputs]
        self.prompts.append(numbers)
        tokens = torch.tensor([[number + 1] for number in numbers])
        ids, mask = torch.cat([tokens, tokens + 100], 1), torch.ones(len(numbers), 2, dtype=torch.long)
        old, _, _ = self.score(self.host.model, ids, mask, 1)
        ref, _, _ = self.score(self.host.ref_model, ids, mask, 1)
        self.pipeline.put_no_more_off()
        rewards = torch.tensor([REWARDS[numbers[i] % 4][i % 2] for i in range(len(numbers))])
        self.pipeline.rewards = rewards.unsqueeze(1)
        return {
            "prompt_ids": tokens,
            "prompt_mask": torch.ones_like(tokens),
            "completion_ids": tokens + 100,
            "completion_mask": torch.ones_like(tokens),
            "advantages": rewards - rewards.view(-1, 2).mean(1).repeat_interleave(2),
            "num_items_in_batch": torch.tensor(len(numbers)),
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
        }

    def generate(self, *prompts: int) -> dict[str, Any]:
        return self.pipeline.generate(self.stock, [{"prompt": str(p)} for p in prompts for _ in range(2)])


def kept(batch: dict[str, Any]) -> list[int]:
    return (batch["prompt_ids"][:, 0] - 1).tolist()


def test_off_gives_what_stock_gives(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    batch = setup.generate(0, 1)
    assert kept(batch) == [0, 0, 1, 1] and len(setup.prompts) == 1 and setup.pipeline.generations_done == 1
    assert [who for who, _ in setup.scored] == ["policy", "reference"]  # at once, in stock's order
    assert setup.accounting.counts[metrics.ROWS_GENERATED] == 4
    assert setup.accounting.counts[metrics.ROWS_TRAINED] == 2


def test_log_probs_that_were_put_off_come_with_the_rows_that_stay(tmp_path: Path) -> None:
    setup = Setup(tmp_path, skip=True)
    batch = setup.generate(0, 1)
    assert setup.scored == [("policy", [1, 1, 2, 2]), ("reference", [1, 1, 2, 2])]
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        assert torch.equal(batch[name], batch["completion_ids"].float())


def test_a_filter_refills_with_prompts_that_the_step_does_not_have(tmp_path: Path) -> None:
    setup = Setup(tmp_path, difficulty_range=(0, 1), difficulty_max_rounds=8)
    batch = setup.generate(0, 1)
    first, *refills = setup.prompts
    assert first == [0, 0, 1, 1] and refills and not {0, 1} & {number for more in refills for number in more}
    assert len(kept(batch)) == 4 and all(number % 2 == 0 for number in kept(batch))
    assert all(rows == [number + 1 for number in kept(batch)] for _, rows in setup.scored)  # none of a dropped row
    assert setup.log[metrics.GEN_ROUNDS] == [len(setup.prompts)] and setup.log[metrics.UNDERFILLED] == [0.0]
    assert batch["num_items_in_batch"] == 4
    assert setup.pipeline.prompts is not None


def test_without_refills_the_least_bad_groups_fill_the_batch(tmp_path: Path) -> None:
    setup = Setup(tmp_path, difficulty_range=(0, 1), difficulty_max_rounds=1)
    assert kept(setup.generate(0, 1)) == [0, 0, 1, 1] and setup.log[metrics.GROUPS_FILLED] == [1.0]
    setup = Setup(tmp_path, difficulty_range=(0, 1), difficulty_max_rounds=1, difficulty_underfill="shrink")
    assert kept(setup.generate(0, 1)) == [0, 0] and setup.log[metrics.UNDERFILLED] == [1.0]


def test_pruning_keeps_the_rows_with_the_largest_advantages(tmp_path: Path) -> None:
    setup = Setup(tmp_path, prune_rate=0.5)
    batch = setup.generate(0, 1, 2, 3)  # twice as many prompts
    assert kept(batch) == [0, 0, 2, 2] and setup.log[metrics.DROPPED + "pruned"] == [4.0]
    assert batch["advantages"].tolist() == [0.5, -0.5, -0.5, 0.5]


def test_part_of_a_generation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the loader gave 4 rows where a generation of 8"):
        Setup(tmp_path, prune_rate=0.5).generate(0, 1)


def test_nothing_stays_put_off_after_an_error(tmp_path: Path) -> None:
    setup = Setup(tmp_path, skip=True)

    def fails(inputs: Any) -> Any:
        assert setup.pipeline.put_off(torch.ones(1, 2), 1) is not None
        raise KeyError("answer")

    with pytest.raises(KeyError):
        setup.pipeline.generate(fails, [])
    assert setup.pipeline.put_off(torch.ones(1, 2), 1) is None
