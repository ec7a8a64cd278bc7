import pytest
import torch

from hf_effi.callbacks.weight_averaging import WeightAveragingCallback
from hf_effi.functional.data import stability_dip
from hf_effi.recipes import cdma, cma, stability_gap

SCORES = [0.3, 0.1, 0.9, 0.5]


def parts(preset):
    sampler, schedule, average = preset["callbacks"]
    return sampler.sampler, schedule.built.bind(100), average


def test_cdma_sets_order_final_ratio_and_average_together():
    sampler, schedule, average = parts(cdma(SCORES))
    assert list(sampler) == [1, 0, 3, 2]
    assert schedule(50) == 1 and schedule(100) == pytest.approx(1 / 3)
    assert schedule(0) == pytest.approx(1 / 5) and schedule(4) == 1
    assert (average.last, average.kind, average.alpha, average.swap_in) == (6, "ema", 0.2, False)


def test_cma_is_constant_after_the_warm_up():
    sampler, schedule, _ = parts(cma(SCORES, seed=4))
    assert list(sampler) == [1, 0, 3, 2] and sampler.seed == 4
    assert {schedule(step) for step in range(5, 101)} == {1.0}


def test_own_average_and_order_options_are_used():
    own = WeightAveragingCallback(3, kind="uniform")
    sampler, _, average = parts(cdma(SCORES, average=own, buckets=2))
    assert average is own and sampler.options["buckets"] == 2


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: cdma([0.1, float("nan")]), ValueError, "NaN"),
        (lambda: cdma(SCORES, final_ratio=2), ValueError, "floor=2"),
        (lambda: cma(SCORES, bucket=2), TypeError, "bucket"),
        (lambda: WeightAveragingCallback(0), ValueError, "last=0"),
        (lambda: WeightAveragingCallback(kind="mean"), ValueError, "kind='mean'"),
        (lambda: WeightAveragingCallback(every_steps=0), ValueError, "every_steps=0"),
        (lambda: WeightAveragingCallback(folder="../x"), ValueError, "plain name"),
    ],
)
def test_refusals(build, error, match):
    with pytest.raises(error, match=match):
        build()


SOURCES = ["web"] * 30 + ["books"] * 10 + ["medical"] * 40
QUALITY = torch.cat([torch.full((40,), float("nan")), torch.arange(40).float()])  # old rows need no score


def test_stability_gap_composition_and_epochs():
    """10 of 40 new rows, 4 times, at 80 %: 50 samples, every block of 10 with 8 new rows; old ones 3 web to 1 book."""
    sampler = stability_gap(QUALITY, SOURCES, "medical", block=10, keep=0.25, new_share=0.8)["train_sampler"]
    order = list(sampler)
    assert len(order) == 50
    new = [row for row in order if row >= 40]
    assert sorted(new) == sorted(list(range(70, 80)) * 4)
    for end in range(10, 51, 10):  # no row is served for the third time before each was served twice
        counts = [order[:end].count(row) for row in range(70, 80)]
        assert max(counts) - min(counts) <= 1
    for begin in range(0, 50, 10):
        assert sum(row >= 40 for row in order[begin : begin + 10]) == 8
    old = [row for row in order if row < 40]
    assert len(set(old)) == len(old) == 10  # later epochs get old rows that were not seen yet
    assert sum(row >= 30 for row in old) in (2, 3)


def test_stability_gap_defaults_are_the_papers():
    sampler = stability_gap(QUALITY, SOURCES, "medical", block=10)["train_sampler"]
    assert len(sampler) == round(4 * 4 / 0.82)
    assert {row for row in sampler if row >= 40} == {76, 77, 78, 79}


def test_stability_gap_weights_of_old_sources():
    preset = stability_gap(QUALITY, SOURCES, "medical", block=10, keep=0.25, new_share=0.8, old_weights={"books": 1})
    assert {row for row in preset["train_sampler"] if row < 40} <= set(range(30, 40))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"new": "law"}, "new='law' is no source"),
        ({"keep": 0}, "keep=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"new_share": 1}, "new_share=1"),
        ({"old_weights": {"law": 1}}, "must weigh old sources"),
        ({"old_weights": {"web": 0}}, "must weigh old sources"),
        ({"sources": SOURCES[1:]}, "80 scores and 79 sources"),
        ({"sources": ["medical"] * 80, "scores": [0.5] * 80}, "must weigh old sources"),
        ({"scores": torch.full((80,), float("nan"))}, "NaN"),
    ],
)
def test_stability_gap_refuses(change, match):
    arguments = {"scores": QUALITY, "sources": SOURCES, "new": "medical", "block": 10, **change}
    with pytest.raises(ValueError, match=match):
        stability_gap(**arguments)


@pytest.mark.parametrize(
    ("values", "higher", "expected"),
    [
        ([0.5], True, (0.0, 0, 0)),
        ([0.5, 0.6, 0.7], True, (0.0, 0, 0)),
        ([0.5, 0.4, 0.2, 0.4], True, (0.3, 2, None)),
        ([2.0, 2.5, 2.25, 2.0], False, (0.5, 1, 3)),
    ],
)
def test_dip(values, higher, expected):
    dip = stability_dip(values, higher)
    assert (pytest.approx(dip.depth), dip.lowest, dip.recovered) == expected


@pytest.mark.parametrize("values", [[], [0.5, float("nan")]])
def test_dip_refuses(values):
    with pytest.raises(ValueError, match="finite numbers"):
        stability_dip(values)
