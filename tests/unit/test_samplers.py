import pytest
import torch
from trl.trainer.utils import RepeatSampler

from hf_effi.errors import MismatchError
from hf_effi.functional.data import clean_scores, repeat_layout, seeded
from hf_effi.samplers import EffiSampler, GroupSampler, ShuffledSampler


class Forward(EffiSampler):
    learns = False

    def order(self, epoch):
        return torch.arange(self.num_rows)


class Plan(Forward):
    single_pass = True


def test_shuffled_gives_a_permutation_that_depends_on_seed_and_epoch_only():
    sampler = ShuffledSampler(100, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(100))
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    other = ShuffledSampler(100, seed=3)
    other.set_epoch(1)
    assert list(other) == second
    assert list(ShuffledSampler(100, seed=4)) not in (first, second)


def test_seed_and_epoch_do_not_collide():
    """Seed 1 in epoch 0 must not be seed 0 in epoch 1, as with `seed + epoch`."""
    one, two = ShuffledSampler(50, seed=1), ShuffledSampler(50, seed=0)
    two.set_epoch(1)
    assert list(one) != list(two)
    assert torch.rand(1, generator=seeded(2, 3)) != torch.rand(1, generator=seeded(3, 2))


def test_set_epoch_is_idempotent_and_iteration_does_not_advance():
    sampler = ShuffledSampler(10)
    sampler.set_epoch(2)
    sampler.set_epoch(2)
    assert list(sampler) == list(sampler)
    assert sampler.epoch == 2


def test_start_from_gives_the_rest_once():
    sampler = ShuffledSampler(10)
    sampler.set_epoch(1)
    whole = list(sampler)
    again = ShuffledSampler(10)
    again.start_from(1, 4)
    assert list(again) == whole[4:]
    assert list(again) == whole
    again.start_from(1, 10)
    assert list(again) == []
    again.start_from(1, 3)
    again.set_epoch(2)
    assert len(list(again)) == 10
    with pytest.raises(ValueError, match=r"sample=11 is outside \[0, 10\]"):
        again.start_from(0, 11)


def test_start_from_under_a_trainer_is_refused():
    sampler = ShuffledSampler(10)
    sampler.check_not_started()
    sampler.start_from(0, 4)
    with pytest.raises(ValueError, match="skipped twice"):
        sampler.check_not_started()
    with pytest.raises(ValueError, match="skipped twice"):
        GroupSampler(sampler, 2, 2).check_not_started()


def test_state_round_trip_and_mismatches():
    sampler = ShuffledSampler(10, seed=1)
    sampler.set_epoch(2)
    state = sampler.state_dict()
    fresh = ShuffledSampler(10, seed=1)
    fresh.load_state_dict(state)
    assert list(fresh) == list(sampler)
    with pytest.raises(MismatchError, match="other settings, seed or scores"):
        ShuffledSampler(10, seed=2).load_state_dict(state)
    with pytest.raises(MismatchError, match="length=10, this run has 11"):
        ShuffledSampler(11, seed=1).load_state_dict(state)
    with pytest.raises(MismatchError, match="'ShuffledSampler', this run has 'Forward'"):
        Forward(10, seed=1).load_state_dict(state)


def test_a_state_of_an_earlier_version_says_by_a_letter_whether_it_learned():
    sampler = GroupSampler(ShuffledSampler(10, seed=1), 2, 2)
    sampler.set_epoch(3)
    state = sampler.state_dict()
    assert state.pop("learns") is True and state["learned"].pop("learns") is False
    state["rule"], state["learned"]["rule"] = "B", "A"
    fresh = GroupSampler(ShuffledSampler(10, seed=1), 2, 2)
    fresh.load_state_dict(state)
    assert list(fresh) == list(sampler)
    with pytest.raises(MismatchError, match="learns=False, this run has True"):
        fresh.load_state_dict({**state, "rule": "A"})


def test_a_plan_has_one_pass():
    plan = Plan(4)
    assert list(plan) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="num_train_epochs=1"):
        plan.set_epoch(1)


def test_whether_it_learns_must_be_declared():
    with pytest.raises(ValueError, match=r"Silent.learns must be False"):

        class Silent(EffiSampler):
            pass

    with pytest.raises(ValueError, match="earlier versions called it rule, 'A' for False and 'B' for True"):

        class OldForm(EffiSampler):
            rule = "A"


def test_an_order_of_the_wrong_length_or_type_is_named():
    class Short(Forward):
        def order(self, epoch):
            return torch.arange(3)

    class Wrong(Forward):
        def order(self, epoch):
            return torch.arange(4).float()

    with pytest.raises(ValueError, match=r"shape \(3,\), but len\(\) says 4"):
        list(Short(4))
    with pytest.raises(ValueError, match="float32"):
        list(Wrong(4))
    with pytest.raises(NotImplementedError, match="order"):
        type("Empty", (EffiSampler,), {"learns": False})(1).order(0)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_bad_sizes(bad):
    with pytest.raises(ValueError, match="num_rows"):
        ShuffledSampler(bad)


def test_chunked_iteration_is_the_order(monkeypatch):
    monkeypatch.setattr("hf_effi.samplers.base._CHUNK", 3)
    assert list(Forward(10)) == list(range(10))
    assert list(Forward(1)) == [0]


@pytest.mark.parametrize(("rows", "mini", "batch", "repeat"), [(7, 2, 3, 4), (8, 1, 1, 1), (5, 3, 5, 2), (9, 2, 4, 1)])
def test_group_layout_equals_trl(rows, mini, batch, repeat):
    stock = RepeatSampler(range(rows), mini, batch, repeat, shuffle=False)
    ours = GroupSampler(Forward(rows), mini, batch, repeat)
    assert list(ours) == list(stock)
    assert len(ours) == len(stock)


def test_group_sampler_follows_epochs_state_and_fingerprint():
    group = GroupSampler(ShuffledSampler(6), 2, 2, 1)
    first = list(group)
    group.set_epoch(1)
    assert list(group) != first
    again = GroupSampler(ShuffledSampler(6), 2, 2, 1)
    again.load_state_dict(group.state_dict())
    assert list(again) == list(group)
    with pytest.raises(MismatchError):
        GroupSampler(ShuffledSampler(6, seed=1), 2, 2, 1).load_state_dict(group.state_dict())
    with pytest.raises(ValueError, match="3 prompts per epoch, but one generation needs 4"):
        GroupSampler(ShuffledSampler(3), 2, 4)


def test_repeat_layout_edges():
    assert repeat_layout(torch.tensor([1, 2]), 2, 3).tolist() == []
    with pytest.raises(ValueError, match="mini_repeat_count=0"):
        repeat_layout(torch.tensor([1]), 0)


def test_clean_scores():
    assert clean_scores([1, 2]).dtype == torch.float64
    with pytest.raises(ValueError, match="1 NaN of 2, the first in row 1"):
        clean_scores([1.0, float("nan")])
    with pytest.raises(ValueError, match="NaN in every row"):
        clean_scores([float("nan")], nan="median")
    with pytest.raises(ValueError, match="shape"):
        clean_scores([])
    with pytest.raises(ValueError, match="nan='drop'"):
        clean_scores([1.0], nan="drop")
    given = torch.tensor([1.0, float("nan")], dtype=torch.float64)
    clean_scores(given, nan="median")
    assert torch.isnan(given[1])  # the caller's tensor is left alone
