import logging

import pytest
import torch

from hf_effi.data import RowCorrect, RowLoss
from hf_effi.errors import MismatchError
from hf_effi.functional.data import interleave_levels, score_order
from hf_effi.samplers import (
    AbilitySampler,
    CompetenceSampler,
    CyclicalSampler,
    GroupSampler,
    InterleavedSampler,
    QualityAscendingSampler,
    SelfPacedSampler,
)

SCORES = torch.rand(20, generator=torch.Generator().manual_seed(0))


def test_quality_ascending_serves_score_order_and_warns_of_a_second_epoch(caplog):
    sampler = QualityAscendingSampler(SCORES, buckets=4, seed=3)
    assert list(sampler) == score_order(SCORES, buckets=4, seed=3).tolist()
    sampler.set_epoch(1)
    with caplog.at_level(logging.WARNING):
        assert list(sampler) == score_order(SCORES, buckets=4, seed=3).tolist()
    assert "second epoch" in caplog.text


@pytest.mark.parametrize(
    "changed",
    [
        QualityAscendingSampler(SCORES, seed=1),
        QualityAscendingSampler(SCORES.flip(0)),
        QualityAscendingSampler(SCORES, descending=True),
        QualityAscendingSampler(SCORES, folds=2),
    ],
)
def test_a_state_of_another_order_is_refused(changed):
    if changed.seed == 1 and list(changed) == list(QualityAscendingSampler(SCORES)):
        changed.seed = 1  # distinct scores: the seed changes nothing but the fingerprint
    with pytest.raises(MismatchError):
        QualityAscendingSampler(SCORES).load_state_dict(changed.state_dict())


def test_interleaved():
    levels, subjects = [2, 1, 1, 1], ["a", "a", "b", "b"]
    assert list(InterleavedSampler(levels, subjects, seed=2)) == interleave_levels(levels, subjects, seed=2).tolist()


def test_cyclical_stages_are_draws_without_duplicates():
    sampler = CyclicalSampler(SCORES, total_epochs=3, full_epochs=1)
    assert sampler.stages == [20, 5, 10, 20, 10, 5, 10]
    assert len(sampler) == 80
    order, first = list(sampler), 0
    for size in sampler.stages:
        stage = order[first : first + size]
        assert len(set(stage)) == size
        first += size
    with pytest.raises(ValueError, match="num_train_epochs=1"):
        sampler.set_epoch(1)
    assert CyclicalSampler([1.0, 1.0], total_epochs=0.1).stages == [1]
    assert sorted(CyclicalSampler([0.0, 1.0], total_epochs=1, start=1.0)) == [0, 1]
    with pytest.raises(ValueError, match="negative"):
        CyclicalSampler([-1.0], total_epochs=1)


def test_cyclical_prefers_low_loss_in_small_stages():
    losses = torch.cat([torch.full((10,), 0.01), torch.full((30,), 10.0)])
    sampler = CyclicalSampler(losses, total_epochs=0.25)
    assert sampler.stages == [10]
    assert sum(row < 10 for row in sampler) >= 9


def test_cyclical_weights_are_inverse_losses_floored():
    sampler = CyclicalSampler([0.5, 2.0, 0.0], total_epochs=1)
    assert sampler.weights.tolist() == pytest.approx([2.0, 0.5, 1e8])


def test_pudf_defaults_are_the_papers():
    """At most 1000 items are answered, the window reaches up to the ability, and stagnation shifts it by 0.1."""
    sampler = AbilitySampler(torch.zeros(1500), losses_of)
    assert len(set(sampler.rows_to_measure(0))) == 1000
    assert (sampler.lower, sampler.upper, sampler.shift) == (-float("inf"), 0.0, 0.1)


def test_competence_is_a_plan_and_checks_early():
    sampler = CompetenceSampler(SCORES, 50, start=0.1)
    assert len(list(sampler)) == 50
    assert list(sampler)[0] in SCORES.argsort()[:2]
    with pytest.raises(ValueError, match="root=0"):
        CompetenceSampler(SCORES, root=0)
    with pytest.raises(MismatchError):
        CompetenceSampler(SCORES, 50, start=0.2).load_state_dict(sampler.state_dict())


def losses_of(model, rows):
    return SCORES[rows]


def test_self_paced_share_grows_and_state_keeps_the_epoch():
    sampler = SelfPacedSampler(20, losses_of, share=0.5, share_step=0.25)
    easiest = SCORES.argsort().tolist()
    for epoch, kept in ((0, 10), (1, 15), (2, 20), (3, 20)):
        sampler.set_epoch(epoch)
        sampler.observe(epoch, losses_of(None, sampler.rows_to_measure(epoch)))
        assert set(sampler) == set(easiest[:kept])
        assert len(list(sampler)) == len(sampler) == 20
    again = SelfPacedSampler(20, losses_of, share=0.5, share_step=0.25)
    again.load_state_dict(sampler.state_dict())
    assert list(again) == list(sampler)


def test_self_paced_threshold():
    sampler = SelfPacedSampler(20, losses_of, threshold=0.3, growth=2.0, min_rows=3)
    sampler.observe(0, SCORES)
    assert set(sampler) == set((SCORES < 0.3).nonzero().flatten().tolist())
    sampler.observe(0, SCORES + 5)
    assert set(sampler) <= set(SCORES.argsort()[:3].tolist())


def test_self_paced_refuses():
    for bad, match in (
        ({}, "exactly one"),
        ({"share": 0.5, "threshold": 1.0}, "exactly one"),
        ({"share": 0.0}, "share=0"),
        ({"threshold": -1}, "threshold=-1"),
        ({"share": 0.5, "min_rows": 21}, "min_rows=21"),
        ({"share": 0.5, "growth": 0.5}, "growth=0.5"),
    ):
        with pytest.raises(ValueError, match=match):
            SelfPacedSampler(20, losses_of, **bad)
    with pytest.raises(ValueError, match="function"):
        SelfPacedSampler(20, None, share=0.5)
    sampler = SelfPacedSampler(20, losses_of, share=0.5)
    with pytest.raises(ValueError, match="has not measured the model before epoch 0"):
        list(sampler)
    with pytest.raises(ValueError, match="2 values for 20 rows"):
        sampler.observe(0, [1.0, 2.0])
    with pytest.raises(ValueError, match="NaN"):
        sampler.observe(0, [float("nan")] * 20)


def test_a_new_measurement_of_one_epoch_is_not_served_from_the_cache():
    sampler = SelfPacedSampler(20, losses_of, share=0.5, share_step=0.0)
    group = GroupSampler(sampler, 2, 5)
    for epoch in (0, 1):
        group.set_epoch(epoch)
        sampler.observe(epoch, SCORES if epoch == 0 else -SCORES)
        assert set(group) == set(SCORES.argsort(descending=epoch == 1)[:10].tolist())


def test_ability_selects_shifts_and_ends_with_everything():
    b = torch.linspace(-2, 2, 20)
    sampler = AbilitySampler(b, losses_of, full_from_epoch=4, shift=0.5)
    answers = (b < 0).float()
    kept = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        rows = sampler.rows_to_measure(epoch)
        sampler.observe(epoch, answers[rows] if rows else [])
        kept.append(len(set(sampler)))
    # The ability stays; after two epochs without progress the shift opens more items, then the end takes all.
    assert kept[0] == kept[1] == 10
    assert kept[2] == kept[3] == 12
    assert kept[4] == 20
    assert len(sampler.history) == 4
    again = AbilitySampler(b, losses_of, full_from_epoch=4, shift=0.5)
    again.load_state_dict(sampler.state_dict())
    assert (again.history, again.shifted) == (sampler.history, 0.5)


def test_ability_probes_at_most_so_many_items():
    sampler = AbilitySampler(torch.zeros(50), losses_of, max_probe=8)
    one, two = sampler.rows_to_measure(0), sampler.rows_to_measure(1)
    assert len(set(one)) == len(set(two)) == 8
    assert one != two
    assert sampler.rows_to_measure(0) == one
    with pytest.raises(ValueError, match="min_rows"):
        AbilitySampler(torch.zeros(5), losses_of, min_rows=6)


def test_row_loss_and_row_correct_by_hand():
    class Model(torch.nn.Linear):
        def forward(self, input_ids):
            logits = torch.nn.functional.one_hot((input_ids + 1) % 4, 4).float() * 5
            return type("Out", (), {"logits": logits})()

    rows = [
        {"input_ids": [0, 1, 2], "labels": [-100, 1, 2]},
        {"input_ids": [0, 1, 0], "labels": [-100, 1, 0]},
        {"input_ids": [3, 3, 3], "labels": [-100, -100, -100]},
    ]

    def collate(batch):
        return {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}

    right = -torch.log_softmax(torch.tensor([5.0, 0, 0, 0]), 0)[0].item()
    wrong = right + 5
    for batch_size in (1, 2, 8):
        losses = RowLoss(rows, collate, batch_size)(Model(1, 1), [0, 1, 2])
        assert losses.tolist() == pytest.approx([right, (right + wrong) / 2, 0.0], rel=1e-5)
        assert RowCorrect(rows, collate, batch_size)(Model(1, 1), [1, 0]).tolist() == [0.0, 1.0]
    assert RowLoss(rows, collate)(Model(1, 1), []).tolist() == []


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (["easy"] * 64, r"row 0 has 'easy', which is no finite number\. Map words to numbers first"),
        ([1.0, None], "row 1 has None"),
        ([1.0, 10**400], "row 1 has 1000"),
        ("easy", "is str 'easy'. Pass a list or a tensor"),
        ({"a": 1}, "is dict"),
        ([[1.0], [1.0, 2.0]], r"row 0 has \[1.0\]"),
    ],
)
@pytest.mark.parametrize("sampler", [CompetenceSampler, QualityAscendingSampler])
def test_scores_that_are_no_numbers_get_one_sentence(sampler, scores, words):
    with pytest.raises(ValueError, match=f"scores must hold one number per row, and {words}"):
        sampler(scores)
