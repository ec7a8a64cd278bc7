"""Advantages of groups of different sizes: brute force over the rows that are there, and TRL itself on full groups."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from hf_effi.functional.rollouts import ragged_advantages
from hf_effi.functional.rollouts.ragged import AGGREGATIONS, REWARD_SCALES
from tests.helpers.data import prompt_dataset
from tests.helpers.grpo import grpo_args, run_grpo

NAN = math.nan


def _std(values):
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else NAN


def _normalized(values, among):
    """(v - mean) / (std + 1e-4) of what is not NaN; NaN where there is no standard deviation."""
    known = [v for v in among if not math.isnan(v)]
    return [(v - sum(known) / len(known)) / (_std(known) + 1e-4) if known else NAN for v in values]


def _sum(weights, row):
    return sum(w * r for w, r in zip(weights, row, strict=True) if not math.isnan(r))


def brute_force(rewards, weights, present, aggregation, scale):
    """Lists of groups of rows of rewards -> lists of groups of advantages, 0 where a row is not there."""
    groups = [
        [row for row, there in zip(group, mask, strict=True) if there]
        for group, mask in zip(rewards, present, strict=True)
    ]
    unscorable = [[all(map(math.isnan, row)) for row in group] for group in groups]
    if aggregation == "normalize_then_sum":
        scaled = []
        for group in groups:
            columns = [_normalized(column, column) for column in zip(*group, strict=True)]
            scaled.append([list(row) for row in zip(*columns, strict=True)])
        groups = scaled
    sums = [
        [sum(w * r for w, r in zip(weights, row, strict=True) if not math.isnan(r)) for row in group]
        for group in groups
    ]
    sums = [[NAN if dead else s for s, dead in zip(*pair, strict=True)] for pair in zip(sums, unscorable, strict=True)]
    everything = [s for group in sums for s in group]
    result = []
    for group, mask in zip(sums, present, strict=True):
        if aggregation == "normalize_then_sum":
            values = _normalized(group, everything)
        elif scale == "group":
            values = _normalized(group, group)
        else:
            known = [s for s in group if not math.isnan(s)]
            mean = sum(known) / len(known) if known else NAN
            divisor = _std([s for s in everything if not math.isnan(s)]) + 1e-4 if scale == "batch" else 1.0
            values = [(s - mean) / divisor for s in group]
        given = iter(values)
        row = [next(given) if there else 0.0 for there in mask]
        result.append([0.0 if math.isnan(v) else v for v in row])
    return result


@pytest.mark.parametrize(("aggregation", "scale"), list(itertools.product(AGGREGATIONS, REWARD_SCALES)))
@pytest.mark.parametrize("seed", range(4))
def test_ragged_groups_equal_brute_force(aggregation, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 4, (5, 6, 2), generator=generator).double()
    rewards[torch.rand(rewards.shape, generator=generator) < 0.2] = NAN
    present = torch.rand((5, 6), generator=generator) < 0.7
    present[0] = False
    present[1] = torch.arange(6) == 2  # alone in its group
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    got = ragged_advantages(rewards, weights, present, aggregation, scale)
    expected = brute_force(rewards.tolist(), weights.tolist(), present.tolist(), aggregation, scale)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6)
    assert not got[~present].any()


def test_hand_computed():
    rewards = torch.tensor([[[1.0], [0.0], [NAN], [5.0]], [[2.0], [2.0], [2.0], [2.0]]])
    present = torch.tensor([[True, True, True, False], [True] * 4])
    got = ragged_advantages(rewards, torch.tensor([2.0]), present)
    unit = 1.0 / (math.sqrt(2.0) + 1e-4)  # rewards 2 and 0: mean 1, standard deviation sqrt(2)
    torch.testing.assert_close(got, torch.tensor([[unit, -unit, 0.0, 0.0], [0.0] * 4]))


def test_a_row_alone_and_no_row_give_zero():
    for scale in REWARD_SCALES:
        one = ragged_advantages(torch.ones(2, 1, 1), torch.ones(1), scale_rewards=scale)
        assert one.tolist() == [[0.0], [0.0]]
        assert ragged_advantages(torch.ones(0, 4, 1), torch.ones(1), scale_rewards=scale).shape == (0, 4)
        nothing = ragged_advantages(torch.ones(1, 3, 1), torch.ones(1), torch.zeros(1, 3, dtype=torch.bool))
        assert nothing.tolist() == [[0.0] * 3]


def test_places_that_are_not_there_do_not_matter():
    rewards = torch.rand(3, 5, 2, generator=torch.Generator().manual_seed(0))
    present = torch.tensor([[True] * 5, [True, True, True, False, False], [True, False, True, False, True]])
    other = rewards.clone()
    other[~present] = 1e9
    for aggregation, scale in itertools.product(AGGREGATIONS, REWARD_SCALES):
        settings = (torch.ones(2), present, aggregation, scale)
        assert torch.equal(ragged_advantages(rewards, *settings), ragged_advantages(other, *settings))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rewards_per_func": torch.ones(2, 3)}, "unsqueeze"),
        ({"weights": torch.ones(2)}, "one number per function"),
        ({"present": torch.ones(2, 3)}, "boolean"),
        ({"present": torch.ones(2, 2, dtype=torch.bool)}, "boolean"),
        ({"aggregation": "sum"}, "sum_then_normalize"),
        ({"scale_rewards": True}, "'group'"),
    ],
)
def test_bad_values_are_named(changes, words):
    settings = {"rewards_per_func": torch.ones(2, 3, 1), "weights": torch.ones(1), **changes}
    with pytest.raises(ValueError, match=words):
        ragged_advantages(**settings)


def _some_reward(prompts, completion_ids, **kwargs):
    return [None if sum(ids) % 5 == 0 else (sum(ids) % 7) / 7 for ids in completion_ids]


def _other_reward(prompts, completion_ids, **kwargs):
    return [None if sum(ids) % 3 == 0 else float(len(ids)) for ids in completion_ids]


def test_full_groups_have_the_bits_of_trl(tmp_path):
    from trl import GRPOTrainer

    class Watched(GRPOTrainer):
        def _calculate_rewards(self, *args):
            self.seen = super()._calculate_rewards(*args)
            return self.seen

    args = grpo_args(
        tmp_path, per_device_train_batch_size=12, num_generations=4, reward_weights=[0.7, 0.3], temperature=1.5
    )
    trainer = run_grpo(Watched, args, reward_funcs=[_some_reward, _other_reward], train=False)
    trainer.model.train()
    inputs = [row for row in prompt_dataset(3) for _ in range(4)]
    for aggregation, scale in itertools.product(AGGREGATIONS, REWARD_SCALES):
        trainer.multi_objective_aggregation, trainer.scale_rewards = aggregation, scale
        advantages = trainer._generate_and_score_completions(inputs)["advantages"]
        assert torch.isnan(trainer.seen).any() and advantages.abs().sum() > 0
        got = ragged_advantages(trainer.seen.view(3, 4, 2), trainer.reward_weights, None, aggregation, scale)
        assert torch.equal(got.view(-1), advantages), (aggregation, scale)
