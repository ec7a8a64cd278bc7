"""
Every keyword of a public object acts or raises.

A keyword that another one can turn off is in `IDLE`, with a call that turns it off and has to raise. Every other
keyword acts whatever the others are: the source reads it, and the docstring says what it does.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Trainer

import hf_effi
from hf_effi import data, samplers
from hf_effi.functional import rollouts
from hf_effi.functional.averaging import averaging_weights
from hf_effi.functional.schedules import SHAPES, Schedule, ScheduleLR, linear
from tests.contract._sources import PACKAGE, python_files, tree_of
from tests.helpers.public import public_objects as everything


def of_warmup(name: str, **rest: Any) -> dict[tuple[str, str], Callable[[], Any]]:
    """Without a length there is no warm-up, and nothing reads how it goes."""
    schedule = everything()[name]
    return {
        (name, "warmup_start"): lambda: schedule(100, warmup_start=0.5, **rest),
        (name, "warmup_offset"): lambda: schedule(100, warmup_offset=0, **rest),
    }


def sgd(head: str = "top") -> torch.nn.ModuleDict:
    return torch.nn.ModuleDict({head: torch.nn.Linear(2, 2)})


@functools.cache
def tiny() -> Any:
    from tests.helpers import tiny_qwen3

    model = tiny_qwen3()
    model.gradient_checkpointing_enable()
    return model


def planned(**over: Any) -> Any:
    return hf_effi.plan_memory(tiny().config, seq_len=8, **over)


def of_modes(mode: str, **over: Any) -> Any:
    return hf_effi.memory.LayerModes(tiny(), mode, **over)


def improved(folder: Any = "unused", **over: Any) -> data.SelfImprovement:
    settings = {"rows": [], "problem": lambda level, rng: str(level), "levels": [1], "per_round": 1}
    return data.SelfImprovement(folder, **{**settings, **over})


def one_vote() -> Any:
    return improved(min_agreement=0.9)._answer([lambda prompts: ["1"] * len(prompts)])


def paced(**over: Any) -> Any:
    return samplers.SelfPacedSampler(4, lambda model, rows: [], **over)


def denoised(**over: Any) -> Any:
    return hf_effi.data.UL2Denoising(range(90, 100), 0, 32, **over)


def as_it_is(column: list[float]) -> list[float]:
    return column


def scored(**over: Any) -> Any:
    from datasets import Dataset

    scorer = data.ColumnScore(as_it_is, ["x"])
    return data.add_score(Dataset.from_dict({"x": [1.0]}), "score", scorer, **over)


def auto(**over: Any) -> Any:
    return hf_effi.callbacks.AutoLRSCallback(1e-4, 1e-2, probes=1, **over)


def injected(**over: Any) -> data.InjectionPlan:
    return data.InjectionPlan([data.Injection("canary", [[1, 2], [2, 1]], copies=1)], **over)


def counted(**over: Any) -> Any:
    return hf_effi.callbacks.InjectionCallback(
        data.InjectedDataset([{"input_ids": [3, 3]}], injected(), base_tokens=1000), **over
    )


PATTERN, WSD = hf_effi.attention.AttentionPattern, hf_effi.schedules.wsd
CALLBACK, PRUNER, KEEP = hf_effi.LRScheduleCallback, rollouts.AdvantagePruner, rollouts.keep_by_advantage

#: (object, keyword) -> a call in which nothing would read the keyword
IDLE: dict[tuple[str, str], Callable[[], Any]] = {
    ("ScheduleLR", "allow_lr_jump"): lambda: ScheduleLR(
        torch.optim.SGD(sgd().parameters(), 0.1), linear(4), allow_lr_jump=True
    ),
    ("decay", "power"): lambda: hf_effi.schedules.decay("linear", 0.5, power=2.0),
    ("AdvantagePruner", "balance_signs"): lambda: PRUNER(0.5, metric="random", balance_signs=True),
    ("AdvantagePruner", "seed"): lambda: PRUNER(0.5, seed=3),
    ("AttentionPattern", "sink"): lambda: PATTERN(sink=2),
    ("AttentionPattern", "stride"): lambda: PATTERN(stride=2),
    ("AttentionPattern", "stride_block"): lambda: PATTERN(window=4, stride_block=2),
    ("AutoLRSCallback", "evaluate"): lambda: auto(evaluate=lambda model: 0.0),
    ("AutoLRSCallback", "kappa"): lambda: auto(kappa=1e6),
    ("FusedLMHead", "filter_weight"): lambda: hf_effi.kernels.FusedLMHead(filter_weight=True),
    ("InjectionCallback", "until_learned"): lambda: counted(until_learned={"canary": 1.0}),
    ("InjectionPlan", "rows_per_update"): lambda: injected(rows_per_update=4),
    ("LastNumberReward", "marks"): lambda: hf_effi.rewards.LastNumberReward(marks=["answer is"]),
    ("VerifierReward", "non_stop_penalty"): lambda: hf_effi.rewards.VerifierReward(non_stop_penalty=-10.0),
    ("VerifierReward", "stop_ids"): lambda: hf_effi.rewards.VerifierReward(stop_ids=[1]),
    ("LRScheduleCallback", "allow_lr_jump"): lambda: CALLBACK(WSD(), "stored", allow_lr_jump=True),
    ("LRScheduleCallback", "counter"): lambda: CALLBACK(WSD(), counter=lambda: 1.0),
    ("LRScheduleCallback", "stop_when_decayed"): lambda: CALLBACK(linear(), stop_when_decayed=False),
    ("LayerModes", "offloader"): lambda: of_modes("checkpoint", offloader=object()),
    ("LayerModes", "save_ops"): lambda: of_modes("checkpoint", save_ops=[torch.ops.aten.mm.default]),
    ("MaskingRatioCurriculum", "warmup_from"): lambda: hf_effi.data.MaskingRatioCurriculum(
        4, [0], 100, warmup_from=0.2
    ),
    ("Multigrid", "short_steps"): lambda: hf_effi.data.Multigrid(64, short_cycle=(1,), short_steps=2),
    ("SelfImprovement", "length_quantile"): lambda: improved(length_quantile=0.5),
    ("SelfImprovement", "min_agreement"): one_vote,
    ("SpeculativeReuse", "stored_tokens"): lambda: rollouts.SpeculativeReuse(lenience=0.5, stored_tokens=8),
    ("SelfPacedSampler", "growth"): lambda: paced(share=0.5, growth=1.5),
    ("SelfPacedSampler", "share_step"): lambda: paced(threshold=1.0, share_step=0.5),
    ("to_lambda_lr", "allow_lr_jump"): lambda: hf_effi.schedules.to_lambda_lr(
        linear(4), torch.optim.SGD(sgd().parameters(), 0.1), allow_lr_jump=True
    ),
    ("UL2Denoising", "separator_id"): lambda: denoised(max_target_length=32, separator_id=80),
    ("EMACallback", "decay"): lambda: hf_effi.callbacks.EMACallback(0.5, half_life_steps=10),
    ("BLEUReward", "smoothing_value"): lambda: hf_effi.rewards.BLEUReward(smoothing_value=0.1),
    ("StepReward", "outcome"): lambda: hf_effi.rewards.StepReward(len, outcome=len),
    ("classification", "cap"): lambda: hf_effi.rewards.classification(["a"], len, cap=0.3),
    ("FastForwardCallback", "rows"): lambda: hf_effi.callbacks.FastForwardCallback(rows=8, evaluate=lambda model: 0.0),
    ("WeightAveragingCallback", "alpha"): lambda: hf_effi.WeightAveragingCallback(kind="uniform", alpha=0.5),
    ("WeightAveragingCallback", "last"): lambda: hf_effi.WeightAveragingCallback(3, kind="swa"),
    ("WeightAveragingCallback", "start_step"): lambda: hf_effi.WeightAveragingCallback(start_step=3),
    ("WeightAveragingCallback", "store"): lambda: hf_effi.WeightAveragingCallback(kind="swa", store="disk"),
    ("add_score", "columns"): lambda: scored(columns=["x"]),
    ("add_score", "fingerprint"): lambda: scored(fingerprint="v1"),
    ("average_checkpoints", "alpha"): lambda: hf_effi.checkpoint.average_checkpoints(
        "a", "b", kind="linear", alpha=0.5
    ),
    ("average_checkpoints", "penalty"): lambda: hf_effi.checkpoint.average_checkpoints("a", "b", penalty=2.0),
    ("average_checkpoints", "greater_is_better"): lambda: hf_effi.checkpoint.average_checkpoints(
        "a", "b", kind="loss", greater_is_better=True
    ),
    ("plan_average", "alpha"): lambda: hf_effi.checkpoint.plan_average("a", kind="trend", alpha=0.5),
    ("plan_average", "greater_is_better"): lambda: hf_effi.checkpoint.plan_average(
        "a", kind="step", greater_is_better=True
    ),
    ("plan_average", "penalty"): lambda: hf_effi.checkpoint.plan_average("a", kind="trend", penalty=0.5),
    ("search_coefficients", "last"): lambda: hf_effi.checkpoint.search_coefficients([], len, confirm_fn=None, last=3),
    ("search_coefficients", "output_dir"): lambda: hf_effi.checkpoint.search_coefficients(
        [], len, confirm_fn=None, output_dir="b"
    ),
    ("constant", "floor"): lambda: hf_effi.schedules.constant(100, floor=0.1),
    ("extend_to", "method"): lambda: hf_effi.schedules.extend_to(linear(100, floor=0.1), 200, method="plateau"),
    ("extend_to", "transition_steps"): lambda: hf_effi.schedules.extend_to(WSD(100), 200, transition_steps=5),
    ("infinite", "alpha"): lambda: hf_effi.schedules.infinite(100, alpha=5.0),
    ("keep_by_advantage", "balance_signs"): lambda: KEEP(torch.ones(4), 2, metric="random", balance_signs=True),
    ("keep_by_advantage", "generator"): lambda: KEEP(torch.ones(4), 2, generator=torch.Generator()),
    ("MIGUCallback", "seed"): lambda: hf_effi.callbacks.MIGUCallback(seed=3),
    ("layerwise_param_groups", "head_factor"): lambda: hf_effi.schedules.layerwise_param_groups(
        sgd(), 1e-3, head_factor=2.0
    ),
    ("layerwise_param_groups", "no_decay"): lambda: hf_effi.schedules.layerwise_param_groups(
        sgd(), 1e-3, no_decay=["norm"]
    ),
    ("register_gradient_compression", "rank"): lambda: hf_effi.recipes.register_gradient_compression(
        None, "fp16", rank=2
    ),
    ("register_gradient_compression", "start_steps"): lambda: hf_effi.recipes.register_gradient_compression(
        None, "fp16", start_steps=5
    ),
    ("register_gradient_compression", "min_rate"): lambda: hf_effi.recipes.register_gradient_compression(
        None, "fp16", min_rate=3.0
    ),
    ("longgen_patterns", "stride_block"): lambda: hf_effi.recipes.longgen_patterns(6, window=4, stride_block=2),
    ("patch", "inputs"): lambda: hf_effi.patch(tiny(), {"RMSNorm": "liger"}, verify=False, inputs={"RMSNorm": print}),
    ("patch", "on_mismatch"): lambda: hf_effi.patch(tiny(), {"RMSNorm": "liger"}, verify=False, on_mismatch="eager"),
    ("plan_memory", "headroom"): lambda: planned(headroom=0.2),
    ("plan_memory", "lora_targets"): lambda: planned(lora_targets=["q_proj"]),
    ("rewarm_redecay", "warmup_start"): lambda: hf_effi.schedules.rewarm_redecay(
        100, data_fractions=(1.0,), warmup_start=0.5
    ),
    ("sft_learning_rate", "factor"): lambda: hf_effi.recipes.sft_learning_rate(1e-5, factor=0.5),
    ("wsd", "half_life_steps"): lambda: WSD(100, half_life_steps=5.0),
    ("wsd", "power"): lambda: WSD(100, power=2.0),
    ("wsd_s", "power"): lambda: hf_effi.schedules.wsd_s(100, power=2.0),
    ("wsd_s", "rewarm_steps"): lambda: hf_effi.schedules.wsd_s(100, budgets=(1.0,), rewarm_steps=5),
    ("wsdc", "half_life_steps"): lambda: hf_effi.schedules.wsdc(100, half_life_steps=5.0),
    ("wsdc", "power"): lambda: hf_effi.schedules.wsdc(100, power=2.0),
    **of_warmup("constant"),
    **of_warmup("cosine"),
    **of_warmup("cosine_power"),
    **of_warmup("damped_cosine"),
    **of_warmup("infinite"),
    **of_warmup("inverse_sqrt"),
    **of_warmup("linear"),
    **of_warmup("power", tokens_per_step=1000),
    **of_warmup("rex"),
    **of_warmup("uba"),
    **of_warmup("wsd"),
    **of_warmup("wsd_s"),
    **of_warmup("wsdc"),
}


def public_objects() -> dict[str, Any]:
    """Return public callables by name: not the configs, which `test_every_option.py` walks, nor what only tells."""
    return {
        name: value
        for name, value in everything().items()
        if callable(value)
        and not isinstance(value, hf_effi.rewards.Reward)  # ready-made; its class is here
        and not name.endswith(("Config", "Arguments", "Error", "Warning"))
        and name not in ("Finding", "Followed", "MemoryPlan", "Method", "SequenceLayout")
    }


def keywords_of(value: Any) -> list[str]:
    """Return the parameters with a default; of a trainer those that the stock one has not."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(value).parameters.values()
    found = [p.name for p in parameters if p.kind in kinds and p.default is not inspect.Parameter.empty]
    if not (isinstance(value, type) and issubclass(value, Trainer)):
        return found
    stock = next(base for base in value.__mro__ if base.__module__.startswith(("transformers.", "trl.")))
    return [name for name in found if name not in inspect.signature(stock).parameters]


KEYWORDS = {name: found for name, value in public_objects().items() if (found := keywords_of(value))}


def test_the_table_names_keywords_that_are_there():
    assert sum(map(len, KEYWORDS.values())) > 400
    gone = {(name, keyword) for name, keyword in IDLE if keyword not in KEYWORDS.get(name, ())}
    assert not gone, f"these are gone: {sorted(gone)}"


@pytest.mark.parametrize("case", IDLE, ids=".".join)
def test_a_keyword_that_nothing_reads_raises(case: tuple[str, str], tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for those that make a folder
    with pytest.raises(Exception, match=case[1]) as caught:
        IDLE[case]()
    assert isinstance(caught.value, (ValueError, RuntimeError)) and not isinstance(caught.value, NotImplementedError)


@functools.cache
def attributes_read() -> frozenset[str]:
    """Return all attributes that the package reads."""
    nodes = (node for path in python_files(PACKAGE.name) for node in ast.walk(tree_of(path)))
    return frozenset(n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load))


def reads(value: Any, keyword: str) -> bool:
    """Whether the source of a function, of a class's constructor, or of anybody who has the dataclass, reads it."""
    if dataclasses.is_dataclass(value):
        return keyword in attributes_read()
    owner = constructor_of(value, keyword) if isinstance(value, type) else value
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    return any(isinstance(n, ast.Name) and n.id == keyword and isinstance(n.ctx, ast.Load) for n in ast.walk(tree))


def constructor_of(cls: type, keyword: str) -> Callable[..., None]:
    """
    Return the constructor that has the keyword: the class's own, or that of a mixin which takes it from the others.
    """
    own = [base.__init__ for base in cls.__mro__ if "__init__" in vars(base) and base is not object]
    having = (f for f in own if inspect.isfunction(f) and keyword in f.__code__.co_varnames)
    return next(having, own[0])


def described(value: Any) -> str:
    """Return the docstrings in which a keyword may be named: that of the object, and those of its bases of ours."""
    bases = [base for base in getattr(value, "__mro__", ()) if base.__module__.startswith("hf_effi.")]
    return "\n".join(found.__doc__ or "" for found in (value, *bases))


@pytest.mark.parametrize("name", sorted(KEYWORDS))
def test_a_keyword_acts_and_the_docstring_says_how(name: str):
    value = public_objects()[name]
    acting = [keyword for keyword in KEYWORDS[name] if (name, keyword) not in IDLE]
    unread = [keyword for keyword in acting if not reads(value, keyword)]
    assert not unread, f"{name} takes {unread} and nobody reads them"
    untold = [keyword for keyword in KEYWORDS[name] if not re.search(rf"\b{keyword}\b", described(value))]
    assert not untold, f"the docstring of {name} does not say what {untold} do"


def test_shared_checks_reach_their_pure_functions():
    with pytest.raises(ValueError, match="alpha=0.5 only acts with kind='ema'. Leave it at 0.2"):
        averaging_weights(3, "linear", 0.5)
    with pytest.raises(ValueError, match="allow_lr_jump=True only acts with on_mismatch='new'"):
        ScheduleLR(torch.optim.SGD(sgd().parameters(), 0.1), linear(4), allow_lr_jump=True)


@pytest.mark.parametrize("shape", sorted({*SHAPES, "half-life"} - {"power"}))
def test_a_power_is_for_the_shape_of_that_name(shape: str):
    over = {"half_life_steps": 5.0} if shape == "half-life" else {}
    with pytest.raises(ValueError, match="power=2.0 only acts with shape='power'"):
        WSD(100, shape=shape, power=2.0, floor=0.1, **over)


def test_another_shape_at_the_start_of_a_decay_leaves_the_power_behind():
    schedule = WSD(100, shape="power", power=3.0, open_ended=True)
    assert schedule.start_decay(50).power == 3.0
    assert (schedule.start_decay(50, shape="linear").power, schedule.start_decay(50, power=2.0).power) == (1.0, 2.0)


def test_a_warm_up_of_no_updates_is_a_warm_up():
    """What a sweep over its length comes to."""
    schedule: Schedule = WSD(10, warmup_steps=0, warmup_start=0.5, warmup_offset=0)
    assert schedule.trace()[0] == 1.0
