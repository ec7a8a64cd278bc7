"""APOLLO and APOLLO-Mini, by hand, against AdamW, in bytes, and saved inside a projection."""

import io

import pytest
import torch
from torch import nn

from hf_effi.errors import MismatchError, RefusedError
from hf_effi.functional.low_rank import draw_seed, growth_factor, project, random_projection, step_scale
from hf_effi.optim import APOLLO, apollo, apollo_mini, optimizer_report
from tests.helpers import tiny_gpt2, tiny_llama


class Fixed(APOLLO):
    """With a projection that the test gives."""

    given = None

    def _projection(self, group, parameter, gradient, name, index):
        return self.given


def fixed(weight, projection, **over):
    optimizer = Fixed([weight], **{"lr": 0.1, "rank": 1, "eps": 1e-12, **over})
    optimizer.given = projection
    return optimizer


def run(optimizer, weights, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step()


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_two_steps_by_hand():
    gradient, weight = double([1, 1], [0, 2]), nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    optimizer = fixed(weight, double([1, 1]), betas=(0.5, 0.75), scale=4.0, weight_decay=1.0)
    # t=1: R = 2, M = 1, V = 1, N = 1, s = 1/2 for each row; corrections 0.5 / 0.5 = 1, sqrt(scale) = 2.
    weight.grad = gradient
    optimizer.step()
    after = 0.9 - 0.1 * gradient
    torch.testing.assert_close(weight.detach(), after)
    # t=2: R = 20, M = 10.5, V = 100.75; |u| would grow by 10.5 / sqrt(100.75) = 1.046, and may by 1.01.
    weight.grad = 10 * gradient
    optimizer.step()
    expected = 0.9 * after - 0.1 * 0.4375**0.5 / 0.75 * 2 * (1.01 / 2) * gradient
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("scaling", ["channel", "tensor"])
def test_without_compression_the_step_is_as_long_as_that_of_adamw(shape, scaling):
    one, two = (nn.Parameter(torch.ones(shape, dtype=torch.float64)) for _ in range(2))
    ours = fixed(one, torch.eye(min(shape), dtype=torch.float64), gamma=None, scaling=scaling)
    adamw = torch.optim.AdamW([two], lr=0.1, eps=1e-12, weight_decay=0.0)
    axis = () if scaling == "tensor" else (1 if shape[0] >= shape[1] else 0)
    for step in range(3):
        before = one.detach().clone(), two.detach().clone()
        run(ours, [one], 1, step)
        run(adamw, [two], 1, step)
        moved, reference = one.detach() - before[0], two.detach() - before[1]
        torch.testing.assert_close(moved.norm(dim=axis), reference.norm(dim=axis))
        shares = moved / one.grad
        torch.testing.assert_close(shares, shares.amin(dim=axis, keepdim=True).expand_as(shares))  # along the gradient


@pytest.mark.parametrize(("shape", "kept"), [((12, 5), (12, 2)), ((5, 12), (2, 12)), ((7, 7), (7, 2))])
def test_the_longer_side_keeps_its_channels(shape, kept):
    weight = nn.Parameter(torch.ones(shape))
    optimizer = APOLLO([weight], lr=0.1, rank=2)
    run(optimizer, [weight], 1)
    assert optimizer.state[weight]["exp_avg"].shape == kept == project(weight, torch.ones(2, min(shape))).shape


def test_a_transposed_weight_makes_the_transposed_step():
    weight = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    one, two = nn.Parameter(weight.clone()), nn.Parameter(weight.T.clone())  # Linear and Conv1D
    first, second = (APOLLO([("w", p)], lr=0.1, rank=2, update_gap=2) for p in (one, two))
    for step in range(4):
        one.grad = torch.randn(12, 5, generator=torch.Generator().manual_seed(step))
        two.grad = one.grad.T.clone()
        first.step(), second.step()
    torch.testing.assert_close(one.T, two)


def test_growth_is_held():
    def held(norm, previous, gamma=1.01):
        factor, kept = growth_factor(torch.tensor(norm), torch.tensor(previous), gamma)
        return pytest.approx(factor.item() * norm), pytest.approx(kept.item())

    assert held(1.0, 0.0) == (1.0, 1.0)  # the first update
    assert held(10.0, 1.0) == (1.01, 1.01)
    assert held(1.0, 1.0) == (1.0, 1.0) and held(0.5, 1.0) == (0.5, 0.5)
    assert held(0.0, 2.0) == (0.0, 2.0) and held(0.0, 0.0) == (0.0, 0.0)  # nothing is not what growth is counted from
    factor, kept = growth_factor(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 1.0]), 1.01)
    assert factor.tolist() == [1.0, 1.0] and kept.tolist() == [1.0, 1.0]
    many, few = (growth_factor(c * torch.tensor(10.0), c * torch.tensor(1.0), 1.01)[0] for c in (11.3, 1.0))
    torch.testing.assert_close(many, few)  # so that a factor before the limiter is one after it


def test_a_weight_without_a_gradient_at_first_is_not_held_for_ever():
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = APOLLO([weight], lr=0.1, rank=1)
    weight.grad = torch.zeros(4, 4)
    optimizer.step()
    assert torch.equal(weight, torch.ones(4, 4)) and optimizer.state[weight]["last_norm"].item() == 0
    run(optimizer, [weight], 1)
    assert (weight != 1).all()


def test_scales_of_nothing():
    assert step_scale(torch.zeros(2, 3), torch.zeros(2, 3), (-1,)).tolist() == [[0.0], [0.0]]
    with pytest.raises(ValueError, match="rank=0 and side=3 must be at least 1"):
        random_projection(0, 3, 0)


def test_projections_come_from_their_seed_alone():
    state = torch.get_rng_state()
    one = random_projection(8, 64, draw_seed(0, "w", 0))
    torch.manual_seed(5)
    assert torch.equal(one, random_projection(8, 64, draw_seed(0, "w", 0)))
    torch.set_rng_state(state)
    random_projection(8, 64, 1)
    assert torch.equal(state, torch.get_rng_state())
    seeds = {draw_seed(s, n, i) for s in (0, 1) for n in ("w", "v") for i in (0, 1)}
    assert len(seeds) == 8 and all(0 <= seed < 2**63 for seed in seeds)
    assert one.var().item() * 8 == pytest.approx(1, abs=0.2) and abs(one.mean().item()) < 0.05


@pytest.mark.parametrize("keep", [True, False])
def test_a_projection_is_drawn_anew_after_its_updates_and_its_state_is_numbers(keep):
    weight = nn.Parameter(torch.ones(8, 4))
    optimizer = APOLLO([("w", weight)], lr=0.1, rank=2, update_gap=2, keep_projection=keep)
    seen = []
    for step in range(4):
        run(optimizer, [weight], 1, step)
        seen.append(optimizer._projection(optimizer.param_groups[0], weight, weight.grad, "w", step // 2))
        assert bool(optimizer._kept) is keep
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3]) and not torch.equal(seen[0], seen[2])
    wrapped = APOLLO([("_orig_mod.module.w", nn.Parameter(torch.ones(8, 4)))], lr=0.1, rank=2, update_gap=2)
    run(wrapped, wrapped.param_groups[0]["params"], 4)
    assert torch.equal(wrapped.param_groups[0]["params"][0], weight)
    assert {key: type(value) for key, value in optimizer.state[weight].items()} == {
        "step": int,
        "exp_avg": torch.Tensor,
        "exp_avg_sq": torch.Tensor,
        "last_norm": torch.Tensor,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_inside_the_second_projection(dtype):
    def made():
        weights = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((8, 5), (5, 8), (3, 8, 5), (8,))]
        return weights, APOLLO([(f"w{i}", w) for i, w in enumerate(weights)], lr=1e-3, rank=2)

    whole, optimizer = made()
    run(optimizer, whole, 250)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, other = made()
    for one, two in zip(again, whole, strict=True):
        one.data.copy_(two.data)
    other.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, whole, 160, 250)
    run(other, again, 160, 250)  # into the third
    assert all(torch.equal(one, two) for one, two in zip(again, whole, strict=True))
    assert other.state[again[0]]["exp_avg"].dtype == torch.float32 and other.state[again[0]]["step"] == 410


def test_experts_are_matrices_of_their_own():
    stack = nn.Parameter(torch.ones(3, 8, 5))
    alone = [nn.Parameter(torch.ones(8, 5)) for _ in range(3)]
    together = APOLLO([("w", stack)], lr=0.1, rank=2)
    each = [APOLLO([("w", weight)], lr=0.1, rank=2) for weight in alone]  # one name, one projection
    for step in range(3):
        stack.grad = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(step)) * (step + 1) ** 2
        stack.grad[1] *= step != 0  # an expert that got no token
        for weight, gradient, optimizer in zip(alone, stack.grad, each, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
        together.step()
    torch.testing.assert_close(stack.detach(), torch.stack([weight.detach() for weight in alone]))
    assert together.state[stack]["last_norm"].shape == (3, 1, 1)


@pytest.mark.parametrize(("factory", "options", "rank"), [(apollo, {"rank": 4}, 4), (apollo_mini, {}, 1)])
def test_bytes_and_rules_of_a_model(factory, options, rank):
    for model in (tiny_llama(), tiny_gpt2()):
        optimizer = factory(model, lr=1e-3, **options)
        run(optimizer, list(model.parameters()), 1)
        rows = optimizer_report(optimizer).rows
        assert {row.rule for row in rows if row.role == "hidden"} == {factory.name}
        assert {row.rule for row in rows if row.role != "hidden"} == {"adamw"}
        for row in rows:
            size = torch.Size(row.shape).numel()
            projected = 2 * rank * max(row.shape) * 4 + 4  # M, V and one norm
            assert row.state_bytes == (projected if row.role == "hidden" else 8 * size), row.name


def test_what_is_not_projected_follows_adamw_to_the_bit():
    shapes = ((8, 2), (6,))  # a shorter side of at most the rank, a vector
    one, two = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    run(APOLLO(one, lr=0.1, rank=2, eps=1e-8, weight_decay=0.1), one, 4)
    run(torch.optim.AdamW(two, lr=0.1, eps=1e-8, weight_decay=0.1, foreach=False), two, 4)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(one, two, strict=True))


def test_factors_of_lora_are_refused_where_nothing_is_saved():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules=["q_proj"]))
    with pytest.raises(RefusedError, match=r"only factors of LoRA train, .* are 8 to 8, and rank=2 would need .* 8"):
        apollo(model, lr=1e-3, rank=2)
    assert {row.rule for row in optimizer_report(apollo_mini(model, lr=1e-3)).rows} == {"apollo_mini"}
    with pytest.raises(RefusedError, match="apollo projects matrices inside the layers, and none trains"):
        apollo(nn.ModuleDict({"embed": nn.Embedding(16, 8)}), lr=1e-3)
    with pytest.raises(ValueError, match=r"rank=256 is not below .* \(16 to 32\). Take a quarter of it, e.g. rank=8"):
        apollo(tiny_llama(), lr=1e-3)
    report = optimizer_report(apollo(tiny_llama(), lr=1e-3, rank=16))
    assert {row.rule for row in report.rows if "k_proj" in row.name} == {"adamw"}  # 16 x 32


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"lr": -1}, "lr=-1 must be a number of at least 0"),
        ({"rank": 0}, "rank=0 must be an integer of at least 1"),
        ({"update_gap": 1.5}, "update_gap=1.5 must be an integer"),
        ({"scale": 0}, "scale=0 must be a number above 0"),
        ({"scaling": "row"}, "scaling='row' must be one of channel, tensor"),
        ({"gamma": 1.0}, "gamma=1.0 must be above 1, e.g. 1.01, or None"),
        ({"seed": -1}, "seed=-1 must be an integer of at least 0"),
        ({"keep_projection": 1}, "keep_projection=1 must be True or False"),
    ],
)
def test_values_out_of_range(over, message):
    with pytest.raises(ValueError, match=message):
        APOLLO([nn.Parameter(torch.ones(2, 2))], **{"lr": 0.1, **over})


def test_a_state_of_other_options_is_refused():
    weight = nn.Parameter(torch.ones(8, 4))
    optimizer = APOLLO([weight], lr=0.1, rank=2)
    run(optimizer, [weight], 1)
    with pytest.raises(MismatchError, match="made with rank=2, and this optimizer has rank=3. Set it as it was"):
        APOLLO([weight], lr=0.1, rank=3).load_state_dict(optimizer.state_dict())
    for over in ({"scale": 2.0}, {"seed": 1}, {"gamma": None}, {"update_gap": 3}, {"scaling": "tensor"}):
        with pytest.raises(MismatchError, match=f"made with {next(iter(over))}="):
            APOLLO([weight], lr=0.1, **{"rank": 2, **over}).load_state_dict(optimizer.state_dict())
    again = APOLLO([weight], lr=0.1, rank=2, keep_projection=False)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["keep_projection"] is False
