"""The numbers behind `CausesCallback`, computed by hand, and the rules that read them on made-up traces."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bench import causes as bench
from hf_effi.callbacks import CausesCallback
from hf_effi.errors import RefusedError
from hf_effi.functional import causes, metrics
from hf_effi.functional.doctor import diagnose
from hf_effi.functional.doctor_causes import CAUSE_RULES
from hf_effi.functional.findings import RunFacts, TrainLimits
from hf_effi.optim.layer_parts import layer_modules, layer_weights
from hf_effi.recipes import probe_gradients
from hf_effi.report.cause_pictures import cause_curves
from tests.helpers import tiny_gpt2, tiny_qwen3

NAN = math.nan

# --- outliers --------------------------------------------------------------------------------------------------------


def test_kurtosis_is_centred_and_by_token() -> None:
    """[0, 0, 0, 10]: without centring, with an unbiased deviation, it would be 1.0."""
    found = causes.excess_kurtosis(torch.tensor([[0.0, 0, 0, 10], [5, 5, 5, 5], [NAN, 1, 2, 3]]))
    assert found[0].item() == pytest.approx(-2 / 3) and found[1:].isnan().all()
    shifted = causes.excess_kurtosis(torch.tensor([[100.0, 100, 100, 110]]))
    assert shifted.item() == pytest.approx(-2 / 3, abs=1e-4)
    one = torch.zeros(64)
    one[3] = 1.0
    assert causes.excess_kurtosis(one).item() == pytest.approx(64**2 / 63 - 6, rel=1e-4)


def test_kurtosis_of_normal_numbers_is_0() -> None:
    values = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    assert abs(causes.excess_kurtosis(values).item()) < 0.05


def test_outliers_of_tokens_with_padding_and_without_any() -> None:
    hidden = torch.tensor([[[1.0, 1, 2, 2000], [1, 2, 3, 4], [9, 9, 9, 9]]])
    tokens, with_one, total, ratio, massive = causes.count_outliers(hidden, torch.tensor([[1, 1, 0]])).tolist()
    assert (tokens, with_one, ratio, massive) == (2, 2, 2000, 1)
    assert total == pytest.approx(-2 / 3 - 1.36, abs=1e-3)
    assert causes.count_outliers(hidden, torch.zeros(1, 3)).tolist() == [0.0] * 5
    assert causes.count_outliers(hidden, torch.ones(1, 7))[0] == 3, "a mask of other tokens"
    # Even rows have no kurtosis, and a row of zeros no outlier; one value beside zeros has no ratio but is massive.
    odd = causes.count_outliers(torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 500]])).tolist()
    assert odd[:2] == [2, 1] and odd[3:] == [1, 1]
    joined = causes.join_outliers([[0.0] * 5, [0.0] * 5])
    assert joined.tokens == 0 and math.isnan(joined.kurtosis) and math.isnan(joined.ratio) and joined.massive == 0


# --- gradients -------------------------------------------------------------------------------------------------------


def test_the_spectral_norm_is_that_of_the_singular_values_from_below() -> None:
    draw = torch.Generator().manual_seed(0)
    low = torch.randn(40, 2, generator=draw) @ torch.randn(2, 30, generator=draw)
    exact = torch.linalg.svdvals(low).max()
    assert causes.spectral_norm(low, 8) == pytest.approx(exact.item(), rel=1e-4)
    full = torch.randn(40, 30, generator=draw)
    assert 0.75 * torch.linalg.svdvals(full).max() < causes.spectral_norm(full) <= torch.linalg.svdvals(full).max()
    assert causes.spectral_norm(torch.zeros(3, 2)) == 0
    for scale in (1e-12, 1e12):
        assert causes.spectral_norm(scale * full) == pytest.approx(scale * causes.spectral_norm(full).item(), rel=1e-4)
    several = torch.stack([torch.eye(3), 7 * torch.eye(3)])
    assert causes.spectral_norm(several) == pytest.approx(7)
    with pytest.raises(ValueError, match="steps=0"):
        causes.spectral_norm(full, 0)


def test_small_numbers() -> None:
    assert causes.mean_absolute_difference([]) == causes.mean_absolute_difference([3.0]) == 0
    assert causes.mean_absolute_difference([2.0, 2.0, 5.0]) == 1.5
    assert causes.unclipped_factor(4.0, 2.0) == pytest.approx(2.0) and causes.unclipped_factor(2.0, math.inf) == 1
    assert causes.frobenius_norm(torch.tensor([[3.0], [4.0]]).bfloat16()).item() == 5


class OneLinear(nn.Module):
    """Returns `mean |W x|^2 / 2`: its gradient is `W x x^T / 2` for one row of two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
        with torch.no_grad():
            for number, layer in enumerate(self.layers):
                layer.weight.copy_((number + 1) * torch.eye(8))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        x = nn.functional.one_hot(input_ids[0, 0], 8).float()
        first, second = (layer(x) for layer in self.layers)
        return SimpleNamespace(loss=(first.square().sum() + second.square().sum()) / 2)


def test_gradients_of_rows_are_those_by_hand() -> None:
    model = OneLinear().train()
    probe = probe_gradients(model, [{"input_ids": [3], "labels": [3]}, {"input_ids": [5], "labels": [5]}])
    # (n + 1) e_i e_i^T: one singular value of n + 1, one entry of it among 64.
    assert probe.rows == 2 and probe.parts == ["weight"]
    for measure, value in (("frobenius", 1.0), ("nuclear", 1.0), ("largest", 1.0), ("maximum", 1.0), ("mean", 1 / 64)):
        assert probe.curve("weight", measure) == pytest.approx([value, 2 * value])
    assert probe.curve("weight", "smallest") == probe.curve("weight", "minimum") == [0, 0]
    assert probe.unevenness("weight") == pytest.approx(1) and probe.relative_unevenness("weight") == pytest.approx(
        2 / 3
    )
    assert "MAD 1, relative 0.67" in str(probe)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_gradients_of_rows_are_refused_by_name() -> None:
    row = {"input_ids": [3], "labels": [3]}
    for rows, words in (
        ([], "rows is empty"),
        ([{"input_ids": [1]}], "no label"),
        ([{**row, "labels": [-100]}], "no la"),
    ):
        with pytest.raises(ValueError, match=words):
            probe_gradients(OneLinear(), rows)
    with pytest.raises(ValueError, match="no trained matrix"):
        probe_gradients(nn.Embedding(4, 8), [row])
    with pytest.raises(ValueError, match="part='q' is not in this model. It has: weight"):
        probe_gradients(OneLinear(), [row]).curve("q")
    with pytest.raises(ValueError, match="measure='trace' must be one of"):
        probe_gradients(OneLinear(), [row]).curve("weight", "trace")
    model = OneLinear()
    model.forward = lambda **batch: SimpleNamespace(loss=None)  # type: ignore[method-assign]
    with pytest.raises(RefusedError, match="OneLinear returns no loss"):
        probe_gradients(model, [row])


def test_layers_and_parts_are_read_from_the_modules() -> None:
    weights = {weight.name: weight for weight in layer_weights(tiny_qwen3(num_hidden_layers=2))}
    assert weights["model.layers.1.self_attn.q_proj.weight"].layer == "1"
    assert weights["model.layers.1.self_attn.q_proj.weight"].part == "self_attn.q_proj"
    assert not weights["model.layers.1.input_layernorm.weight"].is_matrix
    assert weights["model.norm.weight"].layer == "" and weights["model.norm.weight"].part == "rest"
    assert weights["model.embed_tokens.weight"].part == "embedding"
    assert list(layer_modules(tiny_gpt2(n_layer=3))) == ["0", "1", "2"]
    two = nn.ModuleDict({name: nn.ModuleList([nn.Linear(8, 8) for _ in "ab"]) for name in ("encoder", "decoder")})
    assert list(layer_modules(two)) == ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]
    # Lists inside of a layer, as of experts, are parts; one whose members hold no matrix is no list of layers.
    inner = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]) for _ in "ab"])
    assert list(layer_modules(nn.ModuleDict({"a": inner, "b": nn.ModuleList([nn.ReLU(), nn.ReLU()])}))) == ["0", "1"]
    assert list(layer_modules(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))) == ["0", "1"]
    assert layer_modules(nn.Linear(8, 8)) == {}


# --- rules -----------------------------------------------------------------------------------------------------------

HEALTHY = {
    **{f"{metrics.CAUSE_LAYER_GRADIENT}{n}": size for n, size in enumerate([1.0, 0.5, 0.4, 0.8])},
    **{f"{metrics.CAUSE_KURTOSIS}{n}": 1.5 for n in range(4)},
    **{f"{metrics.CAUSE_MASSIVE_TOKENS}{n}": 0.0 for n in range(4)},
    metrics.CAUSE_EFFECTIVE_LR: 0.5,
    metrics.STRAGGLER_RATIO: 1.05,
    metrics.STRAGGLER_RANK: 1.0,
    metrics.STRAGGLER_PERSISTENCE: 1.0,
    metrics.STRAGGLER_WAITING: 0.05,
}
SICK: dict[str, dict[str, float]] = {
    "layer_gradient_high": {f"{metrics.CAUSE_LAYER_GRADIENT}1": 9.1},
    "layer_dead": {f"{metrics.CAUSE_LAYER_GRADIENT}2": 1e-5},
    "last_layer_dominates": {f"{metrics.CAUSE_LAYER_GRADIENT}3": 4.0},
    "quantization_will_hurt": {f"{metrics.CAUSE_KURTOSIS}2": 21.0},
    "effective_lr_collapse": {metrics.CAUSE_EFFECTIVE_LR: 0.03},
    "straggler": {metrics.STRAGGLER_RATIO: 1.2},
}


def found(*over: dict[str, Any], limits: TrainLimits | None = None) -> list[str]:
    trace = [{"step": step, "loss": 1.0, **HEALTHY, **own} for step, own in enumerate(over, 1)]
    return [one.rule for one in diagnose(trace, RunFacts(max_steps=9), limits or TrainLimits(), CAUSE_RULES)]


def test_a_rule_speaks_alone_where_its_cause_lasts() -> None:
    assert set(SICK) == {rule.__name__ for rule in CAUSE_RULES} and found({}, {}, {}) == []
    for rule, over in SICK.items():
        assert found(over, over, over) == [rule]
        assert found(over) == [], "one reading"
        assert found(over, {}, over) == [], "healthy in between"
    assert found({f"{metrics.CAUSE_MASSIVE_TOKENS}0": 0.01}, {f"{metrics.CAUSE_MASSIVE_TOKENS}0": 0.01}) == [
        "quantization_will_hurt"
    ]


def test_entries_without_a_reading_do_not_count() -> None:
    sick = {"step": 1, "loss": 1.0, **HEALTHY, **SICK["layer_dead"]}
    trace = [sick, {"step": 2, "loss": 1.0}, {**sick, "step": 3}]
    (finding,) = diagnose(trace, RunFacts(max_steps=9), TrainLimits(), CAUSE_RULES)
    assert finding.rule == "layer_dead" and finding.step == 3 and "Layer 2 has less than 0.001" in finding.problem


def test_what_only_looks_alike_is_left_alone() -> None:
    names = [f"{metrics.CAUSE_LAYER_GRADIENT}{n}" for n in range(4)]
    high = [{names[0]: 9.0}, {names[1]: 9.0}]  # another layer each time
    assert found(*high) == []
    nothing: list[dict[str, Any]] = [dict.fromkeys(names, 0.0)] * 2  # no gradient at all has a rule of its own
    assert found(*nothing) == []
    assert found(*[{names[0]: 0.0, names[1]: 0.0, names[2]: 0.0}] * 2) == ["last_layer_dominates"]
    assert found(*[{names[2]: None, names[3]: None, names[0]: 90.0}] * 2) == [], "no median of two layers"
    one = [{metrics.STRAGGLER_RATIO: 1.2, metrics.STRAGGLER_RANK: float(rank)} for rank in (0, 1, 0)]
    assert found(*one) == [], "another process each time"
    assert found(*[{metrics.STRAGGLER_RATIO: 1.2, metrics.STRAGGLER_PERSISTENCE: 0.4}] * 3) == []
    assert found(*[SICK["layer_dead"]] * 2, limits=TrainLimits(dead_layer=1e-6)) == []


# --- arguments, pictures, bench --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"every_steps": 0}, "every_steps=0"),
        ({"every_steps": True}, "every_steps=True"),
        ({"outliers": 1}, "outliers=1 must be True or False"),
        ({"parts": [3]}, r"parts=\[3\] must be"),
        (dict.fromkeys(("gradients", "outliers", "weight_norms", "stragglers"), False), "Leave CausesCallback out"),
    ],
)
def test_arguments_out_of_range(over: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CausesCallback(**over)


def test_pictures_of_one_setting_and_of_two() -> None:
    def run(layers: int) -> dict[str, Any]:
        names = [f"{metrics.CAUSE_LAYER_GRADIENT}{n}" for n in range(layers)]
        return {"log_history": [{"step": s, **{name: s + n for n, name in enumerate(names)}} for s in (1, 2)]}

    assert cause_curves({"a": [{"log_history": [{"step": 1, "loss": 2.0}]}]}) == {}
    (caption,) = one = cause_curves({"a": [run(3)]})
    assert caption == "Gradient norm, before clipping, by layer" and "layer 2" in one[caption]
    (caption,) = many = cause_curves({"a": [run(20)]})
    assert caption.endswith("8 of 20 layers") and "layer 19" in many[caption] and "layer 0" in many[caption]
    (caption,) = cause_curves({"a": [run(2)], "b": [run(2)]})
    assert caption == "Gradient norm, before clipping, of the layer with the largest"


def test_every_part_of_the_bench_runs() -> None:
    rows = bench.measure(bench.SMOKE, processes=False)
    assert {row["part"] for row in rows} == {
        "cost", "between readings", "4 bits", "broken run", "healthy run", "arithmetic"
    }  # fmt: skip
    figures = {figure["name"]: figure["value"] for figure in bench.figures(rows)}
    assert figures["causes_false_alarms"] == 0 and figures["causes_broken_runs_with_their_rule_alone"] == 1
