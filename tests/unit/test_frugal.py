"""FRUGAL: its draws as functions of their number, its update by hand, against AdamW and signSGD, in bytes, resumed."""

import io
from collections import Counter

import pytest
import torch
from torch import nn

from hf_effi.errors import MismatchError, RefusedError
from hf_effi.functional.split_state import ORDERS, blocks_of_draw, draws_per_round, positions_of_draw
from hf_effi.optim import FRUGAL, frugal, optimizer_report
from tests.helpers import tiny_llama

SIZES = (5, 1, 7, 3, 3, 9, 2)


def weights(*shapes, dtype=torch.float32):
    return [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]


def named(parameters):
    return [(f"w{number}", parameter) for number, parameter in enumerate(parameters)]


def run(optimizer, parameters, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("density", [0.1, 0.25, 0.3, 0.5, 0.9, 1.0])
def test_a_round_reaches_every_block(order, density):
    count = draws_per_round(density)
    for round_ in range(3):
        draws = [blocks_of_draw(SIZES, density, round_ * count + place, order, seed=4) for place in range(count)]
        assert set().union(*draws) == set(range(len(SIZES)))
        for chosen in draws:
            covered = [SIZES[number] for number in chosen]
            assert density * sum(SIZES) - 1e-6 <= sum(covered) < density * sum(SIZES) + max(SIZES)
            assert list(chosen) == sorted(set(chosen))


def test_orders_and_edges_of_blocks():
    ascending = [blocks_of_draw((2, 2, 2), 1 / 3, index, "ascending") for index in range(4)]
    assert ascending == [(0,), (1,), (2,), (0,)]
    assert [blocks_of_draw((2, 2, 2), 1 / 3, index, "descending") for index in range(3)] == [(2,), (1,), (0,)]
    rounds = {tuple(blocks_of_draw([1] * 8, 0.125, 8 * r + i) for i in range(8)) for r in range(4)}
    assert len(rounds) == 4  # each round has an order of its own
    assert blocks_of_draw(SIZES, 0.25, 3) == blocks_of_draw(SIZES, 0.25, 3) != blocks_of_draw(SIZES, 0.25, 3, seed=1)
    assert blocks_of_draw(SIZES, 0.0, 0) == () == blocks_of_draw((), 0.5, 7)
    assert blocks_of_draw((4,), 0.01, 9) == (0,)
    for bad in (-0.1, 1.1, float("nan"), True, "a"):
        with pytest.raises(ValueError, match=r"must be a number in \[0, 1\]"):
            blocks_of_draw(SIZES, bad, 0)


@pytest.mark.parametrize(("length", "density"), [(8, 0.25), (7, 0.3), (5, 0.01), (6, 1.0), (1, 0.5)])
def test_a_round_reaches_every_position(length, density):
    size = len(positions_of_draw(length, density, 0, "w"))
    assert max(1, density * length - 1e-6) <= size < max(1, density * length) + 1
    count = -(-length // size)
    draws = [positions_of_draw(length, density, index, "w", seed=3).tolist() for index in range(2 * count)]
    for round_ in (draws[:count], draws[count:]):
        assert {place for chosen in round_ for place in chosen} == set(range(length))
        assert all(len(set(chosen)) == len(chosen) == size and chosen == sorted(chosen) for chosen in round_)


def test_draws_come_from_their_seed_alone():
    state = torch.get_rng_state()
    chosen = positions_of_draw(64, 0.25, 1, "w")
    blocks_of_draw(SIZES, 0.25, 1)
    assert torch.equal(state, torch.get_rng_state()) and len(positions_of_draw(64, 0.0, 1, "w")) == 0
    assert not torch.equal(chosen, positions_of_draw(64, 0.25, 1, "v"))
    assert not torch.equal(chosen, positions_of_draw(64, 0.25, 1, "w", seed=1))


def test_three_steps_by_hand():
    (weight,) = weights((2, 2), dtype=torch.float64)
    optimizer = FRUGAL(
        [weight], lr=0.1, density=0.5, update_gap=2, projection="columns", free_scale=0.5, eps=1e-12, weight_decay=1.0
    )
    expected = weight.detach().clone()
    mean = square = torch.zeros(2, dtype=torch.float64)
    for step in range(3):
        weight.grad = torch.tensor([[1.0, -2.0], [0.0, 4.0]], dtype=torch.float64) * (step + 1)
        optimizer.step()
        (column,) = positions_of_draw(2, 0.5, step // 2, "0.0").tolist()
        if step == 2:
            mean = square = torch.zeros(2, dtype=torch.float64)  # another draw
        gradient, count = weight.grad[:, column], step + 1 if step < 2 else 1
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        direction = mean / (1 - 0.9**count) / ((square / (1 - 0.999**count)).sqrt() + 1e-12)
        moved = 0.5 * weight.grad.sign()
        moved[:, column] = direction
        expected = 0.9 * expected - 0.1 * moved
        torch.testing.assert_close(weight.detach(), expected)


def test_all_of_it_without_a_second_draw_is_adamw_to_the_bit():
    one, two = weights((6, 4), (4, 6), (3,)), weights((6, 4), (4, 6), (3,))
    run(FRUGAL(one, lr=0.1, density=1.0, update_gap=None, weight_decay=0.1), one, 5)
    run(torch.optim.AdamW(two, lr=0.1, weight_decay=0.1, foreach=False), two, 5)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(one, two, strict=True))
    three = weights((6, 4), (4, 6), (3,))
    run(FRUGAL(three, lr=0.1, density=1.0, update_gap=2, weight_decay=0.1), three, 5)
    assert [torch.equal(ours, theirs) for ours, theirs in zip(three, two, strict=True)] == [False, False, True]


def test_nothing_of_it_is_sign_descent_on_the_matrices():
    matrix, vector = weights((6, 4), (3,))
    optimizer, expected = FRUGAL([matrix, vector], lr=0.125, density=0.0), torch.ones(6, 4)
    for step in range(3):
        run(optimizer, [matrix, vector], 1, step)
        expected -= 0.125 * matrix.grad.sign()
    assert torch.equal(matrix, expected) and matrix not in optimizer.state
    assert optimizer.state[vector]["step"] == 3


@pytest.mark.parametrize(("projection", "kept"), [("columns", (2, 6, 1)), ("rows", (2, 2, 4)), ("randk", (12,))])
def test_what_is_drawn_follows_adamw_and_the_rest_the_sign(projection, kept):
    one, two = weights((2, 6, 4))[0], weights((2, 6, 4))[0]
    optimizer = FRUGAL([("w", one)], lr=0.1, density=0.25, projection=projection, free_scale=0.5, seed=2)
    run(optimizer, [one], 3)
    run(torch.optim.AdamW([two], lr=0.1, weight_decay=0.0, foreach=False), [two], 3)
    assert optimizer.state[one]["exp_avg"].shape == kept
    free, drawn = torch.ones(2, 6, 4), torch.zeros(2, 6, 4, dtype=torch.bool)
    for step in range(3):
        free -= 0.05 * torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(step)).sign()
    axis = {"columns": -1, "rows": -2, "randk": None}[projection]
    places = positions_of_draw(48 if axis is None else one.shape[axis], 0.25, 0, "w", seed=2)
    if axis is None:
        drawn.view(-1)[places] = True
    else:
        drawn.index_fill_(axis, places, True)
    assert torch.equal(one[drawn], two[drawn])
    torch.testing.assert_close(one[~drawn].detach(), free[~drawn])


def test_a_weight_that_is_no_piece_of_memory():
    flat = nn.Parameter(torch.ones(4, 6).T)
    optimizer = FRUGAL([flat], lr=0.1, density=0.25, projection="randk")
    run(optimizer, [flat], 2)
    (same,) = weights((6, 4))
    run(FRUGAL([same], lr=0.1, density=0.25, projection="randk"), [same], 2)
    assert torch.equal(flat, same) and not flat.is_contiguous()


def test_blocks_that_leave_are_freed():
    parameters = weights((4, 4), (4, 4), (4, 4), (4, 4), (5,))
    optimizer = FRUGAL(parameters, lr=0.1, density=0.25, update_gap=2, order="ascending")
    for step in range(10):
        run(optimizer, parameters, 1, step)
        (held,) = [number for number in range(4) if parameters[number] in optimizer.state]
        assert held == (step // 2) % 4 and optimizer.state[parameters[held]]["step"] == step % 2 + 1
        assert optimizer_report(optimizer).state_bytes == 8 * 16 + 8 * 5
        assert optimizer.active() == {parameters[held]}
    assert optimizer.state[parameters[4]]["step"] == 10


def test_bytes_and_rules_of_a_model():
    model = tiny_llama()
    optimizer = frugal(model, lr=1e-3, projection="columns")
    run(optimizer, list(model.parameters()), 1)
    rows = optimizer_report(optimizer).rows
    counts = Counter(row.rule for row in rows)
    assert counts["frugal"] == 14 and {row.rule for row in rows if row.role != "hidden"} == {"adamw"}
    for row in rows:
        size = torch.Size(row.shape).numel()
        assert row.state_bytes == (2 * size if row.role == "hidden" else 8 * size), row.name
    blocks = frugal(model, lr=1e-3)
    run(blocks, list(model.parameters()), 1)
    hidden = sum(torch.Size(row.shape).numel() for row in rows if row.role == "hidden")
    held = sum(row.state_bytes for row in optimizer_report(blocks).rows if row.role == "hidden") / 8
    assert 0.25 * hidden <= held <= 0.25 * hidden + 32 * 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projection", ["block", "columns", "randk"])
def test_saved_inside_a_draw(projection, dtype):
    shapes = ((4, 6), (6, 4), (2, 4, 4), (4, 4), (3,))

    def made():
        parameters = weights(*shapes, dtype=dtype)
        return parameters, FRUGAL(named(parameters), lr=0.01, density=0.3, update_gap=4, projection=projection)

    whole, optimizer = made()
    run(optimizer, whole, 6)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, other = made()
    for one, two in zip(again, whole, strict=True):
        one.data.copy_(two.data)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.draw == optimizer.draw == 1
    run(optimizer, whole, 7, 6)
    run(other, again, 7, 6)
    assert all(torch.equal(one, two) for one, two in zip(again, whole, strict=True))
    for parameter in again:
        assert all(v.dtype == torch.float32 for k, v in other.state[parameter].items() if k.startswith("exp_avg"))


def test_a_matrix_without_a_gradient_loses_its_moments_too():
    first, second = weights((2, 2), (2, 2))
    optimizer = FRUGAL([first, second], lr=0.1, density=0.5, update_gap=1, order="ascending")
    run(optimizer, [first, second], 1)
    first.grad = None
    optimizer.step()
    assert first not in optimizer.state and second in optimizer.state


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"lr": -1}, "lr=-1 must be a number of at least 0"),
        ({"density": 1.5}, r"density=1.5 must be a number in \[0, 1\]"),
        ({"update_gap": 0}, "update_gap=0 must be an integer of at least 1"),
        ({"projection": "svd"}, "projection='svd' must be one of block, columns, rows, randk"),
        ({"order": "up"}, "order='up' must be one of random, ascending, descending"),
        (
            {"order": "ascending", "projection": "rows"},
            "is that of whole tensors, and projection='rows' draws in each",
        ),
        ({"density": 0, "projection": "rows"}, "density=0 draws nothing, so projection='rows' and order='random'"),
        ({"density": 1.0, "order": "ascending"}, "density=1.0 draws all, so"),
        ({"density": 1.0, "free_scale": 0.1}, "density=1 leaves nothing free"),
        ({"free_scale": float("nan")}, "free_scale=nan must be a number of at least 0"),
        ({"seed": 0.5}, "seed=0.5 must be an integer"),
    ],
)
def test_values_out_of_range(over, message):
    with pytest.raises(ValueError, match=message):
        FRUGAL(weights((2, 2)), **{"lr": 0.1, **over})


def test_what_has_no_matrices_or_other_options_is_refused():
    from peft import LoraConfig, get_peft_model

    with pytest.raises(RefusedError, match="only factors of LoRA train. Use optim='adamw_torch'"):
        frugal(get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules=["q_proj"])), lr=0.1)
    with pytest.raises(RefusedError, match="none trains"):
        frugal(nn.Embedding(16, 8), lr=0.1)
    (weight,) = weights((2, 2))
    optimizer = FRUGAL([weight], lr=0.1, seed=1)
    with pytest.raises(MismatchError, match="made with seed=1, and this optimizer has seed=0"):
        FRUGAL([weight], lr=0.1).load_state_dict(optimizer.state_dict())
