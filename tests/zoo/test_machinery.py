"""The zoo's own parts: the design covers every pair, and the comparison sees faults that are planted."""

from __future__ import annotations

import contextlib
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from transformers.models.nemotron.modeling_nemotron import NemotronDecoderLayer

from tests.zoo import features
from tests.zoo.builders import CannotBuild, Family, build, families
from tests.zoo.cases import Case, describe
from tests.zoo.compare import all_double, largest_difference
from tests.zoo.design import axes_of, compatible, covering_design, pairs
from tests.zoo.features import FEATURES, Feature, Pair, run
from tests.zoo.run import everything, in_shard, number, read_shard, rows_of, run_family

LLAMA = Family("causal", "llama", "LlamaForCausalLM")
SEED_OSS = Family("causal", "seed_oss", "SeedOssForCausalLM")


# --- the covering design -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_every_allowed_pair_of_levels_comes_together(seed):
    rng = random.Random(seed)
    axes = {f"axis{i}": tuple(f"level{j}" for j in range(rng.randint(2, 6))) for i in range(rng.randint(2, 8))}
    rows = covering_design(axes, seed)
    seen = {pair for row in rows for pair in itertools.combinations(sorted(row.items()), 2)}
    assert seen >= set(pairs(axes, lambda row: True))
    assert rows[0] == {name: levels[0] for name, levels in axes.items()}
    assert rows == covering_design(axes, seed)
    largest = sorted(map(len, axes.values()))[-2:]
    assert largest[0] * largest[1] <= len(rows) < 2 * largest[0] * largest[1] + len(axes)


def test_rows_of_a_class_cover_all_pairs_that_can_be():
    axes = axes_of(build(Family("causal", "mixtral", "MixtralForCausalLM")).model.config)
    assert {"padding", "packing", "lora", "checkpointing", "heads", "window", "tied", "dropout", "router", "rope"} == {
        *axes
    }
    rows = covering_design(axes, allowed=compatible)
    assert all(map(compatible, rows))
    seen = {pair for row in rows for pair in itertools.combinations(sorted(row.items()), 2)}
    assert seen >= set(pairs(axes, compatible))
    assert not {(("packing", "yes"), ("padding", "left"))} & seen


def test_axes_are_those_that_the_config_has():
    gpt2 = axes_of(build(Family("causal", "gpt2", "GPT2LMHeadModel")).model.config)
    assert gpt2["dropout"] == ("none", "attention", "residual", "embedding")
    assert not {"rope", "heads", "window", "router", "softcap"} & gpt2.keys()
    assert axes_of(build(SEED_OSS).model.config)["dropout"] == ("none", "attention", "residual")


# --- what the comparison sees --------------------------------------------------------------------------------------


def planted(change, **kwargs) -> Feature:
    """A feature that changes the call of the model by `change(model, call) -> call`."""

    @contextlib.contextmanager
    def open_(case):
        model = case.fresh()
        yield Pair(case.expected(), case.ready(model), change(model, case.call), **kwargs)

    return Feature("planted", open_)


def test_a_feature_that_does_nothing_is_equal():
    for row in ({}, {"dropout": "residual"}, {"padding": "left", "lora": "yes", "checkpointing": "yes"}):
        outcome = run(planted(lambda model, call: call), Case(SEED_OSS, row))
        assert (outcome.status, outcome.difference) == ("equal", 0.0), (row, outcome)


def test_a_gradient_that_is_off_by_a_millionth_is_seen():
    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * (1 + 1e-6)

    def change(model, call):
        model.model.norm.register_forward_hook(lambda module, args, out: Off.apply(out))
        return call

    outcome = run(planted(change), Case(LLAMA, {}))
    assert outcome.status == "different" and outcome.difference == pytest.approx(1e-6, rel=1e-3)


def test_dropout_that_is_lost_is_seen():
    def change(model, call):
        def silent(model):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(F, "dropout", lambda x, *args, **kwargs: x)
                return call(model)

        return silent

    outcome = run(planted(change), Case(SEED_OSS, {"dropout": "residual"}))
    assert outcome.status == "different" and "dropout of the model is lost" in outcome.note


def test_a_gradient_of_other_dropout_masks_is_seen():
    """A loss of one draw with the gradient of another, as a recomputation with masks of its own has."""

    def change(model, call):
        def twice(model):
            with torch.no_grad():
                value, _ = call(model)
            loss, outputs = call(model)
            return loss - loss.detach() + value, outputs

        return twice

    outcome = run(planted(change), Case(SEED_OSS, {"dropout": "residual"}))
    assert outcome.status == "different" and "other dropout masks" in outcome.note


def test_other_dropout_masks_of_the_same_law_are_equal():
    def change(model, call):
        def later(model):
            torch.rand(3)
            return call(model)

        return later

    assert run(planted(change), Case(SEED_OSS, {"dropout": "residual"})).status == "equal"
    assert run(planted(change), Case(SEED_OSS, {})).difference == 0.0


def test_a_layer_that_drops_its_keywords_is_seen_with_a_shared_prefix(monkeypatch):
    """Nemotron's layer of transformers 5.23 did; the check of the model is out of the way."""
    forward = NemotronDecoderLayer.forward

    def without(self, hidden_states, attention_mask=None, position_ids=None, position_embeddings=None, **kwargs):
        return forward(self, hidden_states, attention_mask, position_ids, position_embeddings=position_embeddings)

    monkeypatch.setattr(NemotronDecoderLayer, "forward", without)
    monkeypatch.setattr(features, "check_shared_prefix", lambda model: None)
    feature = next(feature for feature in FEATURES if feature.key == "shared prefix")
    outcome = run(feature, Case(Family("causal", "nemotron", "NemotronForCausalLM"), {}))
    assert outcome.status == "different" and outcome.difference > 0.1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (AttributeError("'Model' object has no attribute 'layers'"), "error"),
        (ValueError("raised by the test, not by the package"), "error"),
        (RuntimeError("shapes"), "error"),
    ],
)
def test_a_foreign_exception_is_no_refusal(error, status):
    def change(model, call):
        raise error

    outcome = run(planted(change), Case(LLAMA, {}))
    assert outcome.status == status and str(error) in outcome.note and not outcome.ok


def test_an_error_of_the_package_is_a_refusal():
    def change(model, call):
        features.plan_shared_prefix([], [])

    outcome = run(planted(change), Case(LLAMA, {}))
    assert outcome.status == "refused" and outcome.ok
    with pytest.raises(ValueError, match="0 prompts") as raised:
        features.plan_shared_prefix([], [])
    assert outcome.note == str(raised.value)


def test_what_the_untouched_model_cannot_do_says_nothing_of_a_feature(monkeypatch):
    monkeypatch.setattr(Case, "call", lambda self, model: (_ for _ in ()).throw(RuntimeError("upstream")))
    outcome = run(planted(lambda model, call: call), Case(LLAMA, {}))
    assert outcome.status == "stock" and "upstream" in outcome.note


def test_no_gradient_is_no_equality():
    outcome = run(
        planted(lambda model, call: lambda m: tuple(x.detach() for x in (call(m)[0],)) + ({},)), Case(LLAMA, {})
    )
    assert outcome.status == "error" and "no gradient" in outcome.note


def test_rounding_is_the_change_by_the_last_bits_of_the_weights():
    assert 0 < Case(LLAMA, {}).rounding < 1e-13
    ill_conditioned = Case(Family("masked", "mobilebert", "MobileBertForMaskedLM"), {"lora": "yes"})
    assert 1e-9 < ill_conditioned.rounding <= 1e-6


def test_a_model_that_seeds_itself_does_not_repeat():
    assert Case(SEED_OSS, {"dropout": "residual"}).repeats
    assert not Case(
        Family("classifier", "reformer", "ReformerForSequenceClassification"), {"dropout": "residual"}
    ).repeats


def test_memory_that_nobody_wrote_to_is_found():
    assert not Case(LLAMA, {}).unsound
    case = Case(LLAMA, {})
    model = case.fresh()
    norm = model.model.norm
    norm.register_forward_hook(lambda module, args, out: out + torch.empty_like(out) * 0)
    case.fresh = lambda: model
    assert case.unsound


def test_largest_difference_by_hand():
    one = {"loss": torch.tensor(2.0), "grad a": torch.tensor([4.0, -2.0]), "grad b": torch.tensor([1e-12])}
    two = {"loss": torch.tensor(2.0), "grad a": torch.tensor([4.0, -1.0])}
    found, name = largest_difference(one, two)
    assert (found, name) == (0.25, "grad a")
    assert largest_difference(one, one) == (0.0, "")
    assert largest_difference({"loss": torch.tensor(1.0)}, {"loss": torch.tensor(float("nan"))})[0] == float("inf")


def test_fp64_stays_fp64_and_torch_is_put_back():
    before = {name: getattr(torch.Tensor, name) for name in ("to", "float", "softmax", "sum")}
    softmax, wide, narrow = F.softmax, torch.ones(2, dtype=torch.float64), torch.ones(2)
    with all_double():
        assert wide.float().dtype == wide.to(torch.float32).dtype == torch.float64
        assert F.softmax(wide, -1, dtype=torch.float32).dtype == torch.float64
        assert narrow.double().dtype == torch.float64 and narrow.float().dtype == torch.float32
        assert wide.to(torch.bfloat16).dtype == torch.bfloat16
    assert F.softmax is softmax and {name: getattr(torch.Tensor, name) for name in before} == before


# --- builders and shards -------------------------------------------------------------------------------------------


def test_a_class_that_cannot_be_built_is_listed_with_its_error(monkeypatch):
    monkeypatch.setattr(
        "tests.zoo.builders.tiny_settings", lambda *args: {"num_attention_heads": 3, "hidden_size": 32}
    )
    with pytest.raises(CannotBuild, match="hidden size"):
        build(LLAMA)
    (result,) = run_family(LLAMA)
    assert result.outcome.status == "not built" and "multiple of the number of attention" in result.outcome.note


def test_tiny_models_show_each_layer_type_and_are_small():
    gemma3 = build(Family("causal", "gemma3_text", "Gemma3ForCausalLM")).model
    assert sorted(set(gemma3.config.layer_types)) == ["full_attention", "sliding_attention"]
    assert gemma3.config.num_hidden_layers == 2 and sum(p.numel() for p in gemma3.parameters()) < 50_000
    assert build(LLAMA, layers=3).model.config.num_hidden_layers == 3


def test_each_cell_is_in_one_shard_and_each_class_has_its_rows():
    some = families("causal")[:20]
    for family, feature in itertools.product(some, FEATURES):
        assert sum(in_shard(family, feature.key, (index, 7)) for index in range(7)) == 1
    assert read_shard("all") == (0, 1) and read_shard("3/8") == (3, 8)
    for wrong in ("8/8", "x", "1", "-1/3"):
        with pytest.raises(ValueError, match="HF_EFFI_ZOO"):
            read_shard(wrong)
    assert number("a") == number("a") != number("b")
    rows = rows_of(LLAMA)
    assert describe(rows[0]) == "plain" and len(rows) == len({describe(row) for row in rows}) == 3
    assert len({(f.kind, f.model_type, f.name) for f in everything()}) == len(everything()) > 390
