import math

import pytest
import torch

from hf_effi.functional.averaging import (
    RunningAverage,
    WindowAverage,
    averaging_weights,
    ema_decay,
    ema_rate,
    exchange,
    merge_weights,
    trend_weights,
    weighted_average,
)
from hf_effi.functional.schedules import cosine, final_lr_ratio, linear, to_lambda_lr, wsd


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(0.2, [0.32768, 0.08192, 0.1024, 0.128, 0.16, 0.2]), (0.8, [0.00032, 0.00128, 0.0064, 0.032, 0.16, 0.8])],
)
def test_ema_golden_in_both_readings_of_alpha(alpha, expected):
    assert averaging_weights(6, "ema", alpha) == pytest.approx(expected, abs=1e-12)


def test_ema_weights_are_the_recursion():
    checkpoints = [3.0, -1.0, 4.0, 1.5]
    mean = checkpoints[0]
    for value in checkpoints[1:]:
        mean = 0.7 * mean + 0.3 * value
    weights = averaging_weights(4, "ema", 0.3)
    assert sum(w * c for w, c in zip(weights, checkpoints, strict=True)) == pytest.approx(mean)


@pytest.mark.parametrize("kind", ["ema", "uniform", "linear"])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_weights_sum_to_one_and_one_checkpoint_is_itself(kind, count):
    weights = averaging_weights(count, kind)
    assert len(weights) == count and sum(weights) == pytest.approx(1)
    assert averaging_weights(1, kind) == [1]


@pytest.mark.parametrize("kind", ["ema", "uniform", "linear"])
def test_a_prefix_is_the_average_of_fewer_checkpoints(kind):
    """What a run that ends early has pushed is the right average of what it has."""
    prefix = averaging_weights(6, kind)[:4]
    assert [w / sum(prefix) for w in prefix] == pytest.approx(averaging_weights(4, kind))


def test_merge_golden():
    decay = [1 - math.sqrt(i / 6) for i in range(1, 7)]
    expected = [0.4082, 0.1691, 0.1298, 0.1094, 0.0964, 0.0871, 0]
    assert merge_weights(decay) == pytest.approx(expected, abs=5e-5)
    assert merge_weights([0.0]) == [1.0, 0.0]


def test_merging_equals_the_decayed_run_where_gradients_are_frozen():
    gradients = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    decay = [0.8, 0.6, 0.4, 0.2]
    constant = [-gradients[:n].sum(0) for n in range(5)]
    decayed = -(torch.tensor(decay)[:, None] * gradients).sum(0)
    merged = weighted_average([{"w": w} for w in constant], merge_weights(decay))["w"]
    torch.testing.assert_close(merged, decayed)


@pytest.mark.parametrize("bad", [[], [1.1], [0.5, 0.6], [float("nan")], [-0.1]])
def test_merge_refuses(bad):
    with pytest.raises(ValueError, match="falling factors"):
        merge_weights(bad)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [((0,), "count=0"), ((True,), "count=True"), ((2, "mean"), "kind='mean'"), ((2, "ema", 0), r"alpha=0 .*\(0, 1\]")],
)
def test_weights_refuse(arguments, match):
    with pytest.raises(ValueError, match=match):
        averaging_weights(*arguments)


def test_running_average_is_the_weighted_mean():
    states = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    weights = averaging_weights(7)
    expected = (states.double() * torch.tensor(weights).double()[:, None]).sum(0)
    found = weighted_average(({"w": row} for row in states), [10 * w for w in weights])["w"]
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


def test_one_state_is_kept_to_the_bit_without_aliasing():
    live = torch.randn(3)
    average = RunningAverage()
    average.push({"w": live})
    before = live.clone()
    live.add_(1)
    assert torch.equal(average.mean["w"], before)


def test_small_shares_move_bfloat16_weights():
    low, high = torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 1.5, dtype=torch.bfloat16)
    average = RunningAverage()
    average.push({"w": low}, 0.999)
    average.push({"w": high}, 0.001)
    assert average.mean["w"].dtype is torch.float32
    assert average.mean["w"].item() == pytest.approx(1.0005)


def test_integers_are_the_latest_and_doubles_stay_double():
    found = weighted_average(
        [{"n": torch.tensor(3), "d": torch.zeros(1).double()}, {"n": torch.tensor(8), "d": torch.ones(1).double()}],
        [1, 1],
    )
    assert found["n"].item() == 8 and found["d"].dtype is torch.float64 and found["d"].item() == 0.5


def test_a_stored_average_goes_on_to_the_bit():
    states = [{"w": torch.randn(4)} for _ in range(4)]
    whole, first, second = RunningAverage(), RunningAverage(), RunningAverage()
    for state in states:
        whole.push(state, 0.3)
    for state in states[:2]:
        first.push(state, 0.3)
    second.load_state_dict(first.state_dict())
    for state in states[2:]:
        second.push(state, 0.3)
    assert torch.equal(whole.mean["w"], second.mean["w"]) and second.count == 4


def test_average_refuses_other_shapes_and_weights():
    average = RunningAverage()
    average.push({"w": torch.zeros(2)})
    with pytest.raises(ValueError, match="other tensors"):
        average.push({"w": torch.zeros(3)})
    for weight in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite number"):
            average.push({"w": torch.zeros(2)}, weight)
    with pytest.raises(ValueError, match="at least one must be positive"):
        weighted_average([{"w": torch.zeros(1)}], [0])


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [1]), (2, [0, 1]), (3, [-1 / 6, 1 / 3, 5 / 6]), (5, [-0.2, 0, 0.2, 0.4, 0.6])]
)
def test_trend_golden(count, expected):
    assert trend_weights(count) == pytest.approx(expected, abs=1e-12)
    assert sum(trend_weights(count)) == pytest.approx(1)


def test_a_trend_follows_a_line_without_lag():
    line = [3.0 + 2.0 * place for place in range(7)]
    assert sum(w * x for w, x in zip(trend_weights(7), line, strict=True)) == pytest.approx(line[-1])


def test_decay_by_half_life():
    assert ema_decay(1) == 0.5 and ema_decay(7) ** 7 == pytest.approx(0.5)
    assert ema_decay(30, every_steps=10) ** 3 == pytest.approx(0.5)
    for arguments in ((0,), (math.inf,), (True,), (3, 0)):
        with pytest.raises(ValueError, match="half_life_steps=|every_steps="):
            ema_decay(*arguments)


@pytest.mark.parametrize(
    ("count", "correction", "expected"),
    [
        (0, "none", 1), (4, "none", 0.1), (0, "warmup", 1), (1, "warmup", 9 / 11), (8, "warmup", 0.5),
        (1000, "warmup", 0.1), (1, "bias", 1), (2, "bias", 0.1 / 0.19),
    ],
)  # fmt: skip
def test_ema_rate_golden(count, correction, expected):
    assert ema_rate(count, 0.9, correction) == pytest.approx(expected)


def test_the_corrected_average_is_the_one_from_zero_divided():
    """e_t = d e_{t-1} + (1 - d) x_t from 0, over 1 - d^t."""
    values, average, raw = [4.0, -1.0, 2.5, 3.0], RunningAverage(), 0.0
    for count, value in enumerate(values, 1):
        average.blend({"w": torch.tensor([value])}, ema_rate(count, 0.8, "bias"))
        raw = 0.8 * raw + 0.2 * value
        assert average.mean["w"].item() == pytest.approx(raw / (1 - 0.8**count))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [((1, 1.0), "decay=1.0"), ((1, True), "decay=True"), ((-1, 0.5), "count=-1"), ((1, 0.5, "adam"), "'adam'")],
)
def test_ema_rate_refuses(arguments, match):
    with pytest.raises(ValueError, match=match):
        ema_rate(*arguments)
    with pytest.raises(ValueError, match="rate=1.5"):
        RunningAverage().blend({"w": torch.zeros(1)}, 1.5)


@pytest.mark.parametrize("weights", [trend_weights, lambda n: averaging_weights(n, "linear")])
def test_a_window_is_the_mean_of_exactly_its_states_at_any_moment(weights):
    states = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    window, stored = WindowAverage(4, weights), WindowAverage(4, weights)
    assert window.mean == {} and window.count == 0
    for done, row in enumerate(states, 1):
        live = {"w": row.clone(), "n": torch.tensor(done)}
        window.push(live)
        live["w"].zero_()  # nothing is shared
        kept = states[max(0, done - 4) : done].double()
        expected = (kept * torch.tensor(weights(len(kept))).double()[:, None]).sum(0)
        torch.testing.assert_close(window.mean["w"].double(), expected, atol=1e-6, rtol=1e-6)
        assert window.mean["w"].dtype is torch.float32 and window.mean["n"].item() == done
    assert window.state_dict()["states"][0]["w"].dtype is torch.bfloat16
    stored.load_state_dict(window.state_dict())
    assert torch.equal(stored.mean["w"], window.mean["w"]) and stored.count == 4
    with pytest.raises(ValueError, match="other tensors"):
        window.push({"w": torch.zeros(2), "n": torch.tensor(1)})
    with pytest.raises(ValueError, match="last=0"):
        WindowAverage(0, weights)


def test_a_window_of_one_state_is_that_state_to_the_bit():
    row = torch.randn(5)
    for weights in (trend_weights, averaging_weights):
        window = WindowAverage(1, weights)
        window.push({"w": torch.zeros(5)})
        window.push({"w": row})
        assert torch.equal(window.mean["w"], row)


def test_exchange_twice_restores_to_the_bit():
    live = {"w": torch.randn(3).bfloat16(), "b": torch.tensor([-0.0])}
    before, mean = {n: t.clone() for n, t in live.items()}, {"w": torch.randn(3), "b": torch.ones(1)}
    exchange(live, mean)
    assert live["b"].item() == 1
    exchange(live, mean)
    assert all(torch.equal(live[n].view(torch.uint8), before[n].view(torch.uint8)) for n in live)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (linear(50, warmup_steps=5), 0.0),
        (cosine(50, floor=0.25), 0.25),
        (wsd(50, warmup_steps=5, floor=1 / 3), 1 / 3),
        (wsd(50, open_ended=True), 1.0),
    ],
)
def test_final_lr_ratio(schedule, expected):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    assert final_lr_ratio(to_lambda_lr(schedule, optimizer), 50) == pytest.approx(expected)


def test_final_lr_ratio_of_transformers_schedules_and_of_others():
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    for name in ("linear", "cosine", "polynomial"):
        assert final_lr_ratio(get_scheduler(name, optimizer, 2, 20), 20) < 1e-3
    assert final_lr_ratio(get_scheduler("constant_with_warmup", optimizer, 2, 20), 20) == 1
    assert final_lr_ratio(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), 20) is None
