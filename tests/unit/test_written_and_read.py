"""Every object that a card may hold is written as data and read back as an object that does the same."""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import json
import pickle
import re
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import torch

from hf_effi import callbacks, data, rewards, samplers, schedules, selection
from hf_effi.errors import RecipeError
from hf_effi.functional import rewards as budgets
from hf_effi.functional import rollouts
from hf_effi.functional.kept_arguments import LARGEST_LIST, NotKept, arguments_of, keeps_arguments
from hf_effi.hub.admitted import CLASSES
from hf_effi.hub.objects import from_plain, to_plain
from hf_effi.samplers import CompetenceSampler, EffiSampler, QualityAscendingSampler, ShuffledSampler
from hf_effi.trainers import mixins

WARM: dict[str, Any] = {"total_steps": 20, "warmup_steps": 2, "warmup_start": 0.1, "warmup_offset": 0}
#: close to each other in double precision, and equal in single
SCORES = torch.tensor([0.5, 0.1, 0.3, 0.3 + 1e-12, 0.9, 0.2], dtype=torch.float64)
SUBJECTS = ["law", "art", "law", "art", "law", "art"]
WAYPOINTS = [(0.0, {"law": 3, "art": 1}), (0.5, {"law": 1, "art": 1})]


def limits(cls: type, **over: Any) -> Any:
    return cls(lr_zero_logs=7, padding=0.4, **over)


#: class -> makes an object whose every argument that a card may set differs from its default
CASES: dict[str, Callable[[], Any]] = {
    "AccuracyGradientCallback": lambda: callbacks.AccuracyGradientCallback(
        "eval_f1", 1e-5, factor=0.5, window=3, quiet=2, threshold=0.1, greater_is_better=False
    ),
    "ActivationOffloadCallback": lambda: callbacks.ActivationOffloadCallback(3),
    "AdaLoRACallback": lambda: callbacks.AdaLoRACallback(set_total_step=True),
    "AutoLRSCallback": lambda: callbacks.AutoLRSCallback(1e-4, 1e-2, 40, 4, 80, 3.0, 5, validation=False),
    "GRPODoctor": lambda: callbacks.GRPODoctor(limits(callbacks.GRPOLimits, truncated=0.5)),
    "GRPOLimits": lambda: limits(callbacks.GRPOLimits, truncated=0.5),
    "GradientSNRCallback": lambda: callbacks.GradientSNRCallback(0.9, lowest=0.2),
    "HypergradientCallback": lambda: callbacks.HypergradientCallback(0.2, 5.0, step_limit=1.2),
    "KernelPatchCallback": lambda: callbacks.KernelPatchCallback({"RMSNorm": "hf_effi", "*.mlp": "liger"}),
    "LRScheduleCallback": lambda: callbacks.LRScheduleCallback(
        schedules.wsd(warmup_steps=3, decay_steps=4, floor=0.1, open_ended=True),
        "new",
        allow_lr_jump=True,
        stop_when_decayed=False,
    ),
    "MIGUCallback": lambda: callbacks.MIGUCallback(
        0.5, "hard", choice="random", seed=3, start_update=9, modules=["q_proj"], parts={"c_attn": 3}
    ),
    "MemoryBudgetCallback": lambda: callbacks.MemoryBudgetCallback(2.5, max_tokens=64, offload=True),
    "MultigridLRCallback": lambda: callbacks.MultigridLRCallback(data.Multigrid(64), 0.5),
    "BudgetPromptCallback": lambda: callbacks.BudgetPromptCallback(budgets.LinearBudget(9, 3), "BUDGET"),
    "GRPOScheduleCallback": lambda: callbacks.GRPOScheduleCallback(schedules.constant(), schedules.cosine(floor=0.1)),
    "GenerationCapCallback": lambda: callbacks.GenerationCapCallback(12, ratio=1.5),
    "ExponentialBudget": lambda: budgets.ExponentialBudget(99, 0.5, None, least=3),
    "LinearBudget": lambda: budgets.LinearBudget(9, 3),
    "NDecayBudget": lambda: budgets.NDecayBudget(9, 3, 2),
    "LengthBudgetReward": lambda: rewards.LengthBudgetReward(
        budgets.NDecayBudget(9, 3, 2), "band", "right", 2.0, "length"
    ),
    "QKClipCallback": lambda: callbacks.QKClipCallback(50.0, 0.3, gqa="min", mode="bound", every_steps=10),
    "OSFProjectionCallback": lambda: callbacks.OSFProjectionCallback(),
    "RandomLTDCallback": lambda: callbacks.RandomLTDCallback(16, 64, ramp_fraction=0.5, multiple=8),
    "ReptileCallback": lambda: callbacks.ReptileCallback(5, 0.3, last_partial=True),
    "RewindCallback": lambda: callbacks.RewindCallback("spike", 7, 2, 3, 50, 5.0, 9),
    "SamplerCallback": lambda: callbacks.SamplerCallback(ShuffledSampler(6, seed=3)),
    "SelectiveCheckpointCallback": lambda: callbacks.SelectiveCheckpointCallback(),
    "TrainDoctor": lambda: callbacks.TrainDoctor(limits(callbacks.TrainLimits)),
    "TrainLimits": lambda: limits(callbacks.TrainLimits),
    "WeightAveragingCallback": lambda: callbacks.WeightAveragingCallback(
        3, every_steps=2, alpha=0.3, swap_in=True, folder="mean", evaluate_on="both", store="disk"
    ),
    "EMACallback": lambda: callbacks.EMACallback(
        0.9, every_steps=2, start_step=3, correction="bias", device="model", save_with_checkpoints=True
    ),
    "FastForwardCallback": lambda: callbacks.FastForwardCallback(10, rows=8, longest=9, limit=4, patience=2),
    "ForecastCallback": lambda: callbacks.ForecastCallback(
        "reward", greater_is_better=True, skip_fraction=0.2, tolerance=0.1, stop=0.05
    ),
    "Denoiser": lambda: data.Denoiser("R", 0.2, 4, weight=0.5),
    "MaskingRatioCurriculum": lambda: data.MaskingRatioCurriculum(
        4, torch.tensor([0, 1]), 50, start=0.4, end=0.2, warmup_fraction=0.1, warmup_from=0.3, random_share=0.2,
        keep_share=0.3, eval_ratio=0.25
    ),
    "MetadataCollator": lambda: data.MetadataCollator(0, bos_token_id=1, eos_token_id=2, max_length=9),
    "MetadataConditioning": lambda: data.MetadataConditioning(
        data.MetadataCollator(0, max_length=9), "append", cooldown_fraction=0.2, dropout=0.5
    ),
    "LocalUpdates": lambda: mixins.LocalUpdates(20, 0.5, 0.8),
    "Multigrid": lambda: data.Multigrid(64, (4, 2, 1), (2, 1), 3, 0.3),
    "UL2Denoising": lambda: data.UL2Denoising(
        range(60, 90), 0, 32, denoisers=[data.Denoiser("R", 0.2, 3), data.Denoiser("S", 0.25)],
        mode_ids={"R": 95, "S": 96}, separator_id=97, eos_token_id=98
    ),
    "AdaptiveNoise": lambda: rollouts.AdaptiveNoise(0.1, 0.01, 5, "code", head_norms=True, correction=True, seed=2),
    "AdvantagePruner": lambda: rollouts.AdvantagePruner(0.5, "random", "group", seed=4),
    "PassRateBand": lambda: rollouts.PassRateBand(0.1, 0.7, "right"),
    "ShuffledPrompts": lambda: rollouts.ShuffledPrompts(6, 4),
    "SpeculativeReuse": lambda: rollouts.SpeculativeReuse(stored_tokens=8, max_bytes=2**20),
    "ExactSpanReward": lambda: rewards.ExactSpanReward("span", False, "exact"),
    "BetaRates": lambda: selection.BetaRates((2.0, 1.0), 0.5),
    "D3S": lambda: selection.D3S((0.3, 0.6), 0.4, "global"),
    "EmbeddingRates": lambda: selection.EmbeddingRates("vector", 2.0, 0.3, 100),
    "FilterChain": lambda: selection.FilterChain(
        [rollouts.PassRateBand(0.1, 0.7), selection.ZeroVariance("right"), selection.LengthBand([(0.0, 0.5)])]
    ),
    "FirstRowsPruner": lambda: selection.FirstRowsPruner(3, "full"),
    "Knapsack": lambda: selection.Knapsack(3, 9, selection.BetaRates(forget=0.1), 0.5, success_at=0.7),
    "LengthBand": lambda: selection.LengthBand([(0.0, 0.2), (0.5, 1.0)], "right"),
    "MaxVariancePruner": lambda: selection.MaxVariancePruner(4, scope="global", adv_stats="full"),
    "RandomPruner": lambda: selection.RandomPruner(keep_fraction=(0.2, 0.4), scope="global", seed=3, adv_stats="full"),
    "ReinforceAdvantages": lambda: selection.ReinforceAdvantages(-0.5, reject=False),
    "SourceBands": lambda: selection.SourceBands("source", {"law": (0.1, 0.5)}, (0.0, 1.0), "right"),
    "VIP": lambda: selection.VIP("rloo", 3, 9, selection.EmbeddingRates("vector"), "relaxed", 0.5, success_at=0.7),
    "ZeroVariance": lambda: selection.ZeroVariance("right"),
    "AdaRFT": lambda: selection.AdaRFT(
        [0.5, 0.25, 1.0], target_reward=0.4, step_fraction=0.2, sensitivity=3.0, start_fraction=0.5, success_at=0.9,
        explore=0.3, seed=4
    ),
    "DUMP": lambda: selection.DUMP(
        ["law", "art", "law"], window=20, temperature=0.5, bonus=0.5, explore=0.3, seed=4
    ),
    "GRESO": lambda: selection.GRESO(
        6, target_dead=0.4, p_easy=0.6, p_hard=0.4, change=0.02, p_low=0.1, p_high=0.9, least=0.05, hard_at=0.1,
        easy_at=0.9, success_at=0.9, explore=0.3, seed=4
    ),
    "MoPPS": lambda: selection.MoPPS(
        band=(0.3, 0.7), forget=0.2, candidates=3.0, prior=(2.0, 1.0), passed=[1, 2, 3], tried=[4, 4, 4],
        warm_weight=1.0, rho=0.1, weak=[0.1, 0.2, 0.3], strong=[0.5, 0.6, 0.7], momentum=0.5, success_at=0.9,
        explore=0.3, seed=4
    ),
    "OfflineCurriculum": lambda: selection.OfflineCurriculum(
        [0.5, 0.25, 1.0], descending=False, start=0.4, root=1.0, full_at=0.8, explore=0.3, seed=4
    ),
    "DurationWeights": lambda: selection.DurationWeights("clock", force=True),
    "EntropicAdvantages": lambda: selection.EntropicAdvantages(0.5),
    "HybridGate": lambda: selection.HybridGate("solution", 1, 3, sft_coef=0.3, success_at=0.9),
    "OBLRBaseline": lambda: selection.OBLRBaseline("energies", leave_one_out=False),
    "OPO": lambda: selection.OPO(),
    "OTB": lambda: selection.OTB("zero"),
    "ProcessRewards": lambda: selection.ProcessRewards(["a", "b"], "mean", weight=0.5, scale="none"),
    "BufferedPrompts": lambda: selection.BufferedPrompts(selection.PCL(candidates=2), 8),
    "GainRL": lambda: selection.GainRL(
        9, scores_column="angle", subset=3, width=0.3, step=0.2, accuracy_gain=1.0, accuracy_target=0.4,
        angle_gain=1.5, success_at=0.9, seed=4
    ),
    "HIVE": lambda: selection.HIVE(selection.MoPPS(target=0.4), keep=0.3),
    "PCL": lambda: selection.PCL(
        9, target=0.4, candidates=3, explore=0.2, learning_rate=0.01, value_steps=2, success_at=0.9, seed=4
    ),
    "Screening": lambda: selection.Screening(2, 0.1, 0.9, candidates=3.0, success_at=0.9),
    "ChoiceReward": lambda: rewards.ChoiceReward("key", True, "think", "answer", "choice"),
    "ExactMatchReward": lambda: rewards.ExactMatchReward("key", "think", "answer", "exact"),
    "InstructionReward": lambda: rewards.InstructionReward("ids", "arguments", True, True, "constraints"),
    "LastNumberReward": lambda: rewards.LastNumberReward(
        "key", True, ["result is"], percent=True, tolerance=0.1, after_tag="think", within_tag="answer", name="number"
    ),
    "LengthMatchReward": lambda: rewards.LengthMatchReward("length", True, 100, "length"),
    "MathReward": lambda: rewards.MathReward(
        "key", True, ["final", "boxed"], "own", True, after_tag="think", within_tag="answer", name="math"
    ),
    "NormalizedMatchReward": lambda: rewards.NormalizedMatchReward(
        "key", True, True, True, False, after_tag="think", within_tag="answer", name="match"
    ),
    "SoftOverlongReward": lambda: rewards.SoftOverlongReward(100, 20, "long"),
    "TagFormatReward": lambda: rewards.TagFormatReward(
        ["plan", "code"], False, True, True, True, True, name="form"
    ),
    "TokenF1Reward": lambda: rewards.TokenF1Reward(
        "key", True, True, True, False, after_tag="think", within_tag="answer", name="f1"
    ),
    "VerifierReward": lambda: rewards.VerifierReward(
        column="kind", alpha=2.0, how="last", non_stop_penalty=-1.0, stop_ids=[3, 5], name="verified"
    ),
    "CompetenceSampler": lambda: CompetenceSampler(
        SCORES, 12, start=0.3, root=1.0, full_at=0.8, seed=5, nan="median"
    ),
    "CyclicalSampler": lambda: samplers.CyclicalSampler(
        SCORES.float().numpy(), 3, start=0.5, end=0.9, alpha=0.6, full_epochs=1, seed=5, nan="median"
    ),
    "InterleavedSampler": lambda: samplers.InterleavedSampler(
        [(1, 2), (1, 2), (1, 2), (1, 2), (0, 3), (0, 1)], tuple(SUBJECTS), seed=5
    ),
    "MixtureSampler": lambda: samplers.MixtureSampler(
        SUBJECTS, WAYPOINTS, block=4, num_samples=12, smooth=True, in_order=True, seed=5
    ),
    "QualityAscendingSampler": lambda: QualityAscendingSampler(
        SCORES, buckets=2, folds=2, descending=True, sources=SUBJECTS, seed=5, nan="median"
    ),
    "ReplaySampler": lambda: samplers.ReplaySampler(
        torch.tensor([True, False, False, True, False, False]), 0.3, block=4, num_samples=9, in_order=False, seed=5
    ),
    "ShuffledSampler": lambda: ShuffledSampler(6, 5),
    "TokenBudgetBatchSampler": lambda: samplers.TokenBudgetBatchSampler(
        torch.tensor([5, 7, 3, 2, 4]), 16, cost=(1.0, 0.1), padding_free=True, length_multiple=2, seed=5
    ),
    "constant": lambda: schedules.constant(**WARM),
    "cosine": lambda: schedules.cosine(**WARM, floor=0.2),
    "linear": lambda: schedules.linear(**WARM, floor=0.2),
    "cosine_power": lambda: schedules.cosine_power(**WARM, base=3.0, spread=True),
    "damped_cosine": lambda: schedules.damped_cosine(**WARM, cycles=2, gamma=0.5),
    "inverse_sqrt": lambda: schedules.inverse_sqrt(**WARM, timescale_steps=5),
    "rex": lambda: schedules.rex(**WARM, kappa=0.7),
    "uba": lambda: schedules.uba(**WARM, phi=2.0),
    "infinite": lambda: schedules.infinite(**WARM, cooldown_steps=5, anneal_steps=4, constant_ratio=0.2),
    "power": lambda: schedules.power(
        **WARM, tokens_per_step=1000, batch_changes=((5, 2000),), a=3.0, b=-0.4, decay_steps=4
    ),
    "rewarm_redecay": lambda: schedules.rewarm_redecay(
        20, warmup_steps=2, data_steps=(8, 12), peaks=(1.0, 0.5)
    ),
    "one_cycle": lambda: schedules.one_cycle(20, up_fraction=0.3, div=5.0, momentum_low=0.8),
    "slow_start_fast_decay": lambda: schedules.slow_start_fast_decay(20, rise_fraction=0.4, start=0.2),
    "table": lambda: schedules.table(20, values=(0.1, 1.0, 0.4), end=0.2),
    "triangular": lambda: schedules.triangular(20, half_cycle_steps=4, low=0.2),
    "wsd": lambda: schedules.wsd(**WARM, decay_steps=5, shape="power", power=2.0),
    "wsd_s": lambda: schedules.wsd_s(**WARM, budgets=(0.5, 1.0), decay_fraction=0.2),
    "wsdc": lambda: schedules.wsdc(**WARM, decay_steps=5, constant_steps=3),
    "join": lambda: schedules.join(20, schedules=(schedules.cosine(), schedules.linear()), boundaries=(8,)),
    "scale": lambda: schedules.scale(20, schedule=schedules.cosine(), factor=0.5),
    "token_indexed": lambda: schedules.token_indexed(20, schedule=schedules.cosine()),
    "BLEUReward": lambda: rewards.BLEUReward(
        None, "gold", 2, (0.3, 0.7), "floor", 0.2, ignore_ids=[0, 2], name="overlap"
    ),
    "ClassInTagReward": lambda: rewards.ClassInTagReward("label", ["up", "down"], "gold", name="right"),
    "JSONReward": lambda: rewards.JSONReward(
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {"structure": 2, "content": 1}, "structure", column="gold", after="Answer", name="json"
    ),
    "LengthBandReward": lambda: rewards.LengthBandReward(10, "most", 50, "words", name="length"),
    "TableReward": lambda: rewards.TableReward("html", "gold", {"cells": 3, "header": 1}, name="table"),
    "LoraConfig": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"q_proj": 2}),
    "AdaLoraConfig": lambda: peft.AdaLoraConfig(init_r=6, target_r=3, total_step=20, target_modules=["q_proj"]),
    "IA3Config": lambda: peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
    "LoHaConfig": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=["q_proj"]),
    "LNTuningConfig": lambda: peft.LNTuningConfig(target_modules=["norm"]),
}  # fmt: skip


def behaviour(thing: Any) -> Any:
    """Return what an object does, as values that can be compared; of one that only acts in a run, what it holds."""
    if isinstance(thing, EffiSampler):
        return thing.state_dict(), thing.order(0).tolist(), list(thing)
    if isinstance(thing, schedules.Schedule):
        return thing.spec(), (thing if thing.total_steps else thing.bind(20)).trace()
    reads_the_model = (selection.BufferedPrompts, selection.GainRL, selection.HIVE, selection.PCL)
    if isinstance(thing, reads_the_model):
        return held(vars(thing))
    if hasattr(thing, "select") and hasattr(thing, "observe"):
        return thing.select(9), held(thing.state_dict())
    if isinstance(thing, data.BatchTransform):
        batch = {"input_ids": torch.arange(10, 26).repeat(4, 1), "attention_mask": torch.ones(4, 16, dtype=torch.long)}
        if isinstance(thing, data.MetadataConditioning):
            return behaviour(thing.collator), held({k: v for k, v in vars(thing).items() if k != "collator"})
        made = [thing(dict(batch), step, 10, torch.Generator().manual_seed(3)) for step in (0, 9)]
        return [{name: value.tolist() for name, value in part.items()} for part in (*made, thing.at_evaluation(batch))]
    if dataclasses.is_dataclass(thing):
        return {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}
    return held(vars(thing))


def held(value: Any) -> Any:
    """Return the state of an object with those in it, and of a method its name."""
    if isinstance(value, dict):
        return {str(key): held(inner) for key, inner in value.items() if key != "_made_with"}
    if inspect.ismethod(value):
        return value.__qualname__
    if isinstance(value, (list, tuple, set)):
        return [held(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, (EffiSampler, schedules.Schedule)) or dataclasses.is_dataclass(value):
        return behaviour(value)
    if type(value).__module__.startswith("hf_effi."):
        return type(value), held(vars(value))
    return value


def test_there_is_a_case_for_every_class():
    assert set(CASES) == {name for classes in CLASSES.values() for name in classes}


@pytest.mark.parametrize("name", CASES)
def test_read_back_it_does_the_same(name: str):
    made = CASES[name]()
    plain = to_plain(made)
    again = from_plain(json.loads(json.dumps(plain)))
    assert type(again) is type(made) and to_plain(again) == plain
    assert behaviour(again) == behaviour(made)


@pytest.mark.parametrize("name", sorted({*CASES} - {"OPO", "OSFProjectionCallback", "SelectiveCheckpointCallback"}))
def test_what_is_written_tells_it_from_one_with_other_arguments(name: str):
    """A case whose arguments are all defaults would prove nothing."""
    assert to_plain(CASES[name]())["arguments"]


# --- what a class has to do for it -----------------------------------------------------------------------------------


class Kept:
    @keeps_arguments
    def __init__(self, first: Any, second: Any = 2, *, third: Any = None, **rest: Any) -> None:
        self.second = second


class Passing(Kept):
    def __init__(self, only: Any) -> None:
        super().__init__(only, 5)


class PassingAndKept(Kept):
    @keeps_arguments
    def __init__(self, only: Any) -> None:
        super().__init__([only], 5)


class Inheriting(Kept):
    pass


def test_arguments_are_those_of_the_outermost_constructor():
    assert arguments_of(Kept(1, third=3, fourth=4)) == {"first": 1, "third": 3, "fourth": 4}
    assert arguments_of(Inheriting(1, 7)) == {"first": 1, "second": 7}
    assert arguments_of(PassingAndKept(1)) == {"only": 1}
    assert arguments_of(Passing(1)) is None  # what it passed on is not what it was given
    assert list(inspect.signature(Kept).parameters) == ["first", "second", "third", "rest"]


def test_the_constructor_itself_says_what_is_wrong_with_the_arguments():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'first'"):
        Kept()
    with pytest.raises(TypeError, match="_own takes arguments without a name"):

        @keeps_arguments
        def _own(self: Any, *values: Any) -> None: ...


def test_copies_and_pickles_have_them_and_a_bare_object_has_none():
    made = CompetenceSampler(SCORES, 12, seed=3)
    for other in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert to_plain(other) == to_plain(made) and list(other) == list(made)
    with pytest.raises(RecipeError, match="CompetenceSampler, which does not remember what it was made with"):
        to_plain(CompetenceSampler.__new__(CompetenceSampler))


def test_a_list_that_changes_later_is_what_it_was():
    scores, nested = torch.tensor([1.0, 2.0]), [[1, 2]]
    made = Kept(scores, third=nested)
    scores.zero_(), nested[0].append(3)
    assert arguments_of(made) == {"first": [1.0, 2.0], "third": [[1, 2]]}


def test_a_number_that_the_object_keeps_counts_as_it_is_now():
    made = Kept(1, 4)
    made.second = 6
    assert arguments_of(made) == {"first": 1, "second": 6}
    made.second = "six"  # another kind is something else of the same name
    assert arguments_of(made)["second"] == 4


def test_an_iterator_is_left_to_the_constructor():
    values = iter([1, 2])
    assert arguments_of(Kept(values))["first"] is values and list(values) == [1, 2]


def test_nothing_large_stays_alive():
    scores = np.ones(LARGEST_LIST + 1)
    gone = weakref.ref(scores)
    made = Kept(scores)
    del scores
    gc.collect()
    assert gone() is None and isinstance(arguments_of(made)["first"], NotKept)


@pytest.mark.parametrize(
    "scores, words",
    [
        (torch.ones(300), r"scores: 300 values \(Tensor\), and a card holds at most 256 in a list"),
        ([1.0] * 300, r"scores: 300 values \(list\), and a card holds at most 256 in a list"),
    ],
)
def test_scores_that_are_too_many_are_named_with_the_limit_and_what_to_do(scores: Any, words: str):
    with pytest.raises(RecipeError, match=f"{words}. Make the QualityAscendingSampler again from your data, and"):
        to_plain(QualityAscendingSampler(scores))
    assert to_plain(QualityAscendingSampler(scores[:256]))["arguments"]["scores"] == [1.0] * 256


@pytest.mark.parametrize(
    "value, words",
    [
        (torch.ones(2, 2), r"a Tensor of shape \(2, 2\), and a card holds lists"),
        ([[0] * 200] * 30, "more than 4,096 values, the most that a card holds in one argument"),
        (torch.ones(2, device="meta"), "a Tensor that could not be read"),
    ],
)
def test_what_is_no_list_of_numbers_is_named(value: Any, words: str):
    found = arguments_of(Kept(value))["first"]
    assert isinstance(found, NotKept) and re.match(words, found.reason)


def test_scores_without_a_number_come_back():
    made = QualityAscendingSampler([0.3, float("nan"), float("inf"), 0.1], nan="median")
    plain = json.loads(json.dumps(to_plain(made)))
    assert plain["arguments"] == {"scores": [0.3, "nan", "inf", 0.1], "nan": "median"}
    assert list(from_plain(plain)) == list(made)


def test_options_that_are_passed_through_are_written_or_refused_and_never_lost():
    made = callbacks.AccuracyGradientCallback(window=3)
    assert to_plain(made)["arguments"] == {"window": 3}
    with pytest.raises(RecipeError, match="'verify' is no argument that a card may set there"):
        to_plain(callbacks.KernelPatchCallback("liger", verify=False))
    with pytest.raises(RecipeError, match="your own code"):
        to_plain(callbacks.AutoLRSCallback(1e-4, 1e-2, evaluate=lambda model: 0.0))
