"""
What a probe answers: equal, different by how much and in what, or why it cannot look; never equal without a look.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from hf_effi.patching import (
    Finding,
    OtherStates,
    agreed,
    compare,
    draws_random_numbers,
    gradients,
    moved_in_padding,
    named_draws,
    out_of_reach,
    remembered,
    rows_see_each_other,
    tiny_tokens,
)
from hf_effi.patching._generators import HeldGenerators, owned_generators
from hf_effi.patching._inputs import _CannotLook
from hf_effi.patching.probe import looking
from tests.helpers import odd_models as odd
from tests.helpers import tiny_llama

EQUAL, DIFFERENT = "equal", "different"
#: class -> what is found about chance, other rows, and padding: a verdict, or a part of the reason why there is none
ANSWERS = {
    odd.Plain: (EQUAL, EQUAL, EQUAL),
    odd.RunsOverPadding: (EQUAL, EQUAL, DIFFERENT),
    odd.SeesOtherRows: (EQUAL, DIFFERENT, DIFFERENT),
    odd.ReturnsATuple: (EQUAL, EQUAL, EQUAL),
    odd.ReturnsText: ("returns a str without logits",) * 3,
    odd.GivesZero: ("all that the model gives is zero",) * 3,
    odd.Raises: ("does not run on a few tokens: KeyError: 'a model that fails half-way'",) * 3,
    odd.FunctionalDropout: (DIFFERENT, EQUAL, EQUAL),
    odd.NoDropout: (EQUAL, EQUAL, EQUAL),
    odd.SkipsLayers: (DIFFERENT, EQUAL, EQUAL),
    odd.SkipsNone: (EQUAL, EQUAL, EQUAL),
    odd.NumpyNoise: (DIFFERENT, EQUAL, "draws from numpy.random, other numbers in each of the two ways"),
    odd.OwnPython: (DIFFERENT, EQUAL, EQUAL),
    odd.OwnNumpyState: (DIFFERENT, EQUAL, EQUAL),
    odd.OwnNumpyGenerator: (DIFFERENT, "draws from the generator chance", "draws from the generator chance"),
    odd.OwnInAList: (DIFFERENT, "draws from the generator chances", "draws from the generator chances"),
    odd.OwnTorch: (DIFFERENT, EQUAL, EQUAL),
    odd.DrawsFromItsFile: (DIFFERENT, EQUAL, EQUAL),
    odd.DrawsFromItsClass: (DIFFERENT, EQUAL, EQUAL),
    odd.FreshEntropy: (DIFFERENT, "does not give one answer", "does not give one answer"),
    odd.CountsInBuffers: (EQUAL, DIFFERENT, DIFFERENT),
    odd.WritesAnAttribute: (EQUAL, EQUAL, EQUAL),
    odd.NormalisesItsWeights: (EQUAL, EQUAL, EQUAL),
    odd.FreezesItself: (EQUAL, EQUAL, EQUAL),
    odd.CountsInAnObject: (EQUAL, EQUAL, EQUAL),
    odd.CachesPositions: (EQUAL, EQUAL, DIFFERENT),
    odd.CachesInADict: (EQUAL, EQUAL, DIFFERENT),
    odd.CachesInItsClass: (EQUAL, EQUAL, DIFFERENT),
    odd.CachesInAFunction: (EQUAL, EQUAL, DIFFERENT),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_about_odd_models(kind):
    asked = (draws_random_numbers, rows_see_each_other, moved_in_padding)
    for ask, wanted in zip(asked, ANSWERS[kind], strict=True):
        found = ask(kind())
        if wanted in (EQUAL, DIFFERENT):
            assert found.looked and found.equal == (wanted == EQUAL), (ask.__name__, str(found))
            assert found.equal or found.gap > 1e-3
        else:
            assert not found.looked and not found.equal and wanted in str(found), (ask.__name__, str(found))


@pytest.mark.parametrize("kind", ANSWERS)
def test_chance_is_what_two_runs_with_other_seeds_show(kind):
    """The same without a probe: dropout, skipped layers and noise give other results for other seeds."""
    if ANSWERS[kind][0] not in (EQUAL, DIFFERENT):
        return
    model, ids = kind().train(), torch.arange(24).view(2, 12)
    results = []
    for seed in range(12):
        random.seed(seed), np.random.seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with torch.no_grad():
                out = model(ids)
        results.append(out["logits"] if isinstance(out, dict) else out[1])
    same = all(torch.equal(results[0], other) for other in results[1:])
    assert same == (ANSWERS[kind][0] == EQUAL)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (odd.FunctionalDropout, "bernoulli_"),
        (odd.SkipsLayers, "Python's random"),
        (odd.NumpyNoise, "numpy.random"),
        (odd.OwnPython, "the generator chance"),
        (odd.OwnInAList, "the generator chances"),
        (odd.OwnTorch, "multinomial"),
        (odd.DrawsFromItsFile, "the generator tests.helpers.odd_models.OF_FILE"),
        (odd.DrawsFromItsClass, "the generator tests.helpers.odd_models.DrawsFromItsClass.chance"),
    ],
)
def test_what_is_drawn_from_is_named(kind, named):
    found = draws_random_numbers(kind())
    assert named in found.drawn and named in str(found)


def test_draws_of_one_module_are_not_those_of_another():
    model = odd.SkipsLayers()
    assert not draws_random_numbers(model, within=[model]).equal
    found = draws_random_numbers(model, within=[model.layers[0], model.head])
    assert found.equal and found.drawn == ()


def test_named_draws_of_a_float_attribute():
    model = odd.Plain()
    model.router_jitter = 0.1
    assert named_draws(model) == {"router_jitter": 0.1}


# --- compare ---------------------------------------------------------------------------------------------------------


def _logits(model):
    return model(torch.arange(6)[None])["logits"]


def test_a_difference_is_measured_relative_to_the_largest_and_named():
    def other(model):
        return {"the logits": _logits(model) * 1.25, **gradients(model, _logits(model))}

    def one(model):
        return {"the logits": _logits(model), **gradients(model, _logits(model))}

    found = compare(odd.Plain(), one, other)
    assert found.gap == pytest.approx(0.25, rel=1e-9) and found.what == "the logits" and found.allowed == 1e-5
    assert str(found) == "the logits: a relative difference of 2.5e-01"


def test_results_that_only_one_way_has_are_a_difference():
    found = compare(odd.Plain(), _logits, lambda model: {"the results": _logits(model), "more": torch.ones(1)})
    assert found.gap == math.inf and "more" in found.what and not found.equal
    assert compare(odd.Plain(), _logits, lambda model: _logits(model)[:, :3]).gap == math.inf


def test_both_ways_run_twice_and_once():
    calls = []

    def way(name):
        def run(model):
            calls.append(name)
            return _logits(model)

        return run

    assert compare(odd.Plain(), way("one"), way("other")).equal
    assert calls == ["one", "one", "other"]


def test_a_way_that_is_not_repeatable_is_no_difference():
    numbers = iter(range(1, 100))
    found = compare(odd.Plain(), lambda model: _logits(model) * next(numbers), _logits)
    assert not found.looked and not found.failed
    assert "does not give one answer, two runs of one and the same way differ in the results" in found.reason


def test_memory_that_nobody_wrote_to_is_not_an_answer_in_double_precision():
    """As bitsandbytes' kernels for a CPU do, when they are asked for double: single precision decides."""
    calls = []

    class Garbage(odd.OddModel):
        def middle(self, x):
            calls.append(x.dtype)
            return x + len(calls) if x.dtype == torch.float64 else x

    found = rows_see_each_other(Garbage())
    assert found.equal and found.allowed == 1e-3 and torch.float32 in calls


def test_two_runs_that_agree_by_chance_make_no_difference_of_the_third():
    """In double precision each run differs; in single precision only the third does."""
    factors = iter([1, 2, 3, 3, 4])
    found = compare(
        odd.Plain(), lambda model: _logits(model) * next(factors), lambda model: _logits(model) * next(factors)
    )
    assert not found.looked and "does not give one answer" in found.reason


def test_packed_weights_begin_at_single_precision():
    model = odd.Plain()
    model.codes = nn.Parameter(torch.arange(4, dtype=torch.uint8), requires_grad=False)
    seen = []
    assert compare(model, lambda m: seen.append(m.head.weight.dtype) or _logits(m), _logits).equal
    assert seen == [torch.float32] * 2


def test_a_way_that_fails_is_told_apart_from_a_model_that_does():
    def fails(model):
        raise IndexError("list index out of range")

    second = compare(odd.Plain(), _logits, fails)
    assert second.failed and str(second) == "it does not run the second way: IndexError: list index out of range"
    first = compare(odd.Plain(), fails, _logits)
    assert not first.failed and "the model does not run on a few tokens: IndexError" in str(first)

    def will_not(model):
        raise _CannotLook("the model returns no loss")

    assert str(compare(odd.Plain(), will_not, _logits)) == "this could not be measured: the model returns no loss"


def test_no_results_and_results_that_are_no_numbers_are_no_equality():
    assert not compare(odd.Plain(), lambda model: {}, lambda model: {}).looked
    zero = compare(odd.Plain(), lambda model: _logits(model) * 0, lambda model: _logits(model) * 0)
    assert not zero.looked and "all that the model gives is zero" in zero.reason
    assert compare(odd.Plain(), lambda model: _logits(model) * 0, _logits).gap == math.inf
    nan = compare(odd.Plain(), lambda model: _logits(model) * math.nan, lambda model: _logits(model) * math.nan)
    assert not nan.looked and "not finite" in nan.reason


def test_half_precision_alone_is_no_look():
    class Half(odd.OddModel):
        def middle(self, x):
            if x.dtype != torch.bfloat16:
                raise TypeError("half precision only")
            return x

    found = rows_see_each_other(Half().to(torch.bfloat16))
    assert not found.looked and "bfloat16 only here, whose rounding hides an effect" in found.reason


def test_half_precision_weights_are_looked_at_in_double():
    """One percent is hidden by bfloat16's rounding, and found."""
    model = odd.Plain().to(torch.bfloat16)
    found = compare(model, _logits, lambda model: _logits(model) * 1.002)
    assert found.gap == pytest.approx(0.002, rel=1e-6)


def test_the_worst_finding_is_the_one_that_differs_most():
    equal, small, large = Finding(1e-9, "a", 1e-5), Finding(0.1, "b", 1e-5), Finding(0.5, "c", 1e-5)
    none = Finding(None, reason="why")
    assert equal.worst(Finding(1e-8, "d", 1e-5)).what == "d"
    assert small.worst(large) is large and large.worst(small) is large and equal.worst(small) is small
    assert none.worst(equal) is none and large.worst(none) is none
    # Below what it is allowed, though larger than the other gap.
    assert Finding(1e-4, "e", 1e-3).worst(Finding(5e-5, "f", 1e-5)).what == "f"


def test_alone_there_is_nothing_to_agree_on():
    found = Finding(0.1, "a", 1e-5)
    assert agreed(found) is found


def test_an_answer_is_kept_for_when_the_model_is_out_of_reach():
    model = odd.Plain()
    assert remembered(model, "rows", lambda: rows_see_each_other(model)).equal
    model.head.weight.ds_id = 3
    assert remembered(model, "rows", lambda: rows_see_each_other(model)).equal
    assert not remembered(model, "other", lambda: rows_see_each_other(model)).looked
    del model.head.weight.ds_id
    wanted = remembered(model, "rows", lambda: Finding(0.5, "now", 1e-5))
    assert wanted.what == "now", "a new look counts for more than an old one"


# --- who cannot be looked at -----------------------------------------------------------------------------------------


def _of_zero(model):
    model.head.weight.ds_id = 1


def _on_meta(model):
    model.head.to("meta")


def _empty(model):
    model.head.weight.data = torch.empty(0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_of_zero, r"sharded by DeepSpeed ZeRO-3 \(head.weight\)"),
        (_on_meta, r"on the meta device \(head.weight\)"),
        (_empty, "head.weight is empty, as in a shard of FSDP"),
        (lambda model: setattr(model.head.weight, "_fsdp_flattened", True), r"FullyShardedDataParallel, FSDP1 \(head"),
    ],
)
def test_weights_that_are_elsewhere_are_said_to_be(change, reason):
    model = odd.Plain()
    change(model)
    for ask in (draws_random_numbers, rows_see_each_other, moved_in_padding):
        found = ask(model)
        assert not found.looked and not found.equal
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(str(found))


def test_one_module_with_a_hook_does_not_bring_in_the_weights_of_another():
    model = tiny_llama()
    model.model.norm._hf_hook = object()
    assert out_of_reach(model) is None
    model.lm_head.to("meta")
    assert "on the meta device (lm_head.weight)" in out_of_reach(model)


# --- weights elsewhere that come when they are called ----------------------------------------------------------------


def _offloaded(how, tmp_path):
    from accelerate import cpu_offload, disk_offload, dispatch_model

    model = tiny_llama()
    if how == "cpu":
        return cpu_offload(model, torch.device("cpu"))
    if how == "disk":
        disk_offload(model, tmp_path, torch.device("cpu"))
        return model
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    places = dict(zip(parts, ("cpu", "disk", "cpu", "cpu", "cpu", "disk"), strict=True))
    return dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)


@pytest.mark.filterwarnings("ignore:.*meta device")
@pytest.mark.parametrize("how", ["cpu", "disk", "device_map"])
def test_offloaded_weights_are_looked_at_where_they_are(how, tmp_path):
    model, ids = _offloaded(how, tmp_path), torch.arange(8)[None]
    assert torch.equal(model(ids).logits, wanted := tiny_llama()(ids).logits)  # accelerate's own first call is made
    assert any(p.is_meta for p in model.parameters())
    before = odd.picture(model)
    for ask in (draws_random_numbers, rows_see_each_other, moved_in_padding):
        assert ask(model).equal
    found = compare(model, lambda m: m(ids).logits, lambda m: m(ids).logits * 1.01)
    assert found.gap == pytest.approx(0.01, rel=1e-6)
    assert odd.picture(model) == before
    assert torch.equal(model(ids).logits, wanted)


# --- generators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "value"), [("low", 0.0), ("middle", 0.5), ("high", 1.0)])
def test_held_generators_give_a_level(level, value):
    model = odd.OwnPython()
    before = OtherStates()
    with looking(model, None, level) as look:
        numbers = [random.random(), float(np.random.rand()), model.chance.random(), float(torch.rand(1))]
        assert numbers == pytest.approx([value] * 4, abs=1e-5)
        assert not look.others.ran_out()
        assert look.others.moved() == ["Python's random", "numpy.random", "the generator chance"]
        for _ in range(400):
            random.random()
        assert look.others.ran_out() == ["Python's random"]
    assert before == OtherStates()


def test_every_generator_is_found_once():
    model = odd.DrawsFromItsFile()
    model.chance, model.again = np.random.default_rng(1), model
    model.counter = odd.Counter()
    model.counter.own = random.Random(2)
    names = list(owned_generators(model))
    assert sorted(names) == [
        "the generator Counter.own",
        "the generator chance",
        "the generator tests.helpers.odd_models.OF_FILE",
    ]


def test_other_bit_generators_differ_from_level_to_level():
    model = odd.Plain()
    model.chance = np.random.RandomState(np.random.PCG64(5))
    state = str(model.chance.get_state(legacy=False))
    numbers = []
    for level in ("low", "high"):
        held = HeldGenerators(model)
        with looking(model, None, level):
            numbers.append(model.chance.rand())
            held.hold(level)
            assert model.chance.rand() == numbers[-1] and held.ran_out() == ["the generator chance"]
    assert numbers[0] != numbers[1]
    assert str(model.chance.get_state(legacy=False)) == state


def test_a_generator_of_an_accelerator_that_is_not_in_use_gets_no_seed(monkeypatch):
    """`torch.manual_seed` leaves one that is used at the device's first draw, long after the probe."""
    model = odd.OwnTorch()
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds every device, now and later"))
    assert not draws_random_numbers(model).equal


def test_tokens_of_a_probe_are_no_special_ones():
    model = tiny_llama()
    tokens = tiny_tokens(model, 4, 40)
    assert tokens.shape == (4, 40) and tokens.unique().numel() > 20
    assert not {model.config.pad_token_id, model.config.eos_token_id} & set(tokens.flatten().tolist())
    assert not torch.equal(tokens, tiny_tokens(model, 4, 40, seed=1))
    with pytest.raises(_CannotLook, match="has no vocabulary"):
        tiny_tokens(nn.Linear(2, 2), 1, 1)
