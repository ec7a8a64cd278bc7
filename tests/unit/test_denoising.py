import pytest
import torch

from hf_effi.data.denoising import UL2Denoising
from hf_effi.errors import RefusedError
from hf_effi.functional.data import (
    UL2_DENOISERS,
    UL2R_DENOISERS,
    Denoiser,
    denoised_lengths,
    fitting_length,
    noise_counts,
    seeded,
    span_mask,
    split_spans,
)

SENTINELS = list(range(900, 1000))
MODES = {"R": 800, "X": 801, "S": 802}
R, S = UL2_DENOISERS[0], UL2_DENOISERS[-1]


def restore(inputs, targets):
    """Put the spans back where their sentinels stand."""
    spans, current = {}, None
    for token in targets:
        if token in SENTINELS:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [t for token in inputs for t in (spans.pop(token) if token in SENTINELS else [token])], spans


def test_counts_are_those_of_t5():
    # random_spans_helper of the T5 code: 512 inputs and 114 targets, one end token each, come from 568 tokens
    assert fitting_length([R], 511, 113) == 568
    assert denoised_lengths(568, R) == (511, 113)
    assert noise_counts(568, R) == (85, 28)
    assert [noise_counts(n, R) for n in (2, 3, 10, 100)] == [(1, 1), (1, 1), (2, 1), (15, 5)]
    assert noise_counts(4, Denoiser("X", 0.9, 1)) == (3, 1), "there is one plain span a hidden one"
    assert noise_counts(100, S) == (25, 1)


@pytest.mark.parametrize("denoiser", [*UL2_DENOISERS, *UL2R_DENOISERS], ids=str)
@pytest.mark.parametrize("length", [2, 3, 17, 100, 256])
def test_every_draw_has_the_counts_and_every_token_is_in_one_place(denoiser, length):
    ids = torch.randperm(500, generator=seeded(1))[:length]
    for seed in range(5):
        hidden = span_mask(length, denoiser, seeded(seed))
        noise, spans = noise_counts(length, denoiser)
        begins = hidden & ~torch.cat([torch.tensor([False]), hidden[:-1]])
        assert (int(hidden.sum()), int(begins.sum())) == (noise, spans)
        assert not hidden[0] and hidden[-1]
        inputs, targets = split_spans(ids, hidden, SENTINELS)
        assert (len(inputs), len(targets)) == denoised_lengths(length, denoiser)
        assert restore(inputs.tolist(), targets.tolist()) == (ids.tolist(), {})
        kept = [t for t in [*inputs.tolist(), *targets.tolist()] if t not in SENTINELS]
        assert sorted(kept) == sorted(ids.tolist())


def test_all_splits_are_equally_likely():
    # 5 tokens, 2 hidden in 2 spans: 3 plain ones in 2 spans, so 1+2 or 2+1
    denoiser = Denoiser("X", 0.4, 1)
    drawn = [tuple(span_mask(5, denoiser, seeded(seed)).int().tolist()) for seed in range(1000)]
    assert set(drawn) == {(0, 1, 0, 0, 1), (0, 0, 1, 0, 1)}
    assert abs(drawn.count((0, 1, 0, 0, 1)) - 500) < 60


def test_fitting_length_is_the_longest():
    for room in (10, 33, 64, 512):
        longest = fitting_length(UL2_DENOISERS, room)
        assert max(sum(denoised_lengths(longest, d)) for d in UL2_DENOISERS) <= room
        assert max(sum(denoised_lengths(longest + 1, d)) for d in UL2_DENOISERS) > room
    with pytest.raises(ValueError, match="No row of 2 tokens fits into max_length=3"):
        fitting_length([R], 3)
    with pytest.raises(ValueError, match="denoisers is empty"):
        fitting_length([], 30)


def made(**over):
    settings = {"sentinel_ids": SENTINELS, "pad_token_id": 0, "max_length": 64, "mode_ids": MODES, "eos_token_id": 2}
    return UL2Denoising(**{**settings, **over})


def batch_of(rows, width):
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def test_prefix_row_by_hand():
    transform = made(denoisers=[S], separator_id=700, max_length=16)
    assert transform.row_length == 16 - 3 - 2
    out = transform(batch_of([range(10, 18)], 11), 0, 1, seeded(0))
    assert out["input_ids"].tolist() == [[802, 10, 11, 12, 13, 14, 15, 900, 700, 900, 16, 17, 2, 0, 0, 0]]
    assert out["labels"].tolist() == [[-100] * 9 + [900, 16, 17, 2] + [-100] * 3]
    assert out["attention_mask"].tolist() == [[1] * 13 + [0] * 3]


def test_encoder_decoder_row_by_hand():
    transform = made(denoisers=[S], max_length=12, max_target_length=5)
    assert transform.row_length == 12  # 9 stay beside mode, sentinel and end; a quarter of 13, 3, stays below 4
    out = transform(batch_of([range(10, 18)], 8), 0, 1, seeded(0))
    assert out["input_ids"].tolist() == [[802, 10, 11, 12, 13, 14, 15, 900, 2, 0, 0, 0]]
    assert out["labels"].tolist() == [[900, 16, 17, 2, -100]]
    assert out["attention_mask"].tolist() == [[1] * 9 + [0] * 3]


@pytest.mark.parametrize("targets", [None, 40])
def test_full_rows_always_fit_and_lose_nothing(targets):
    transform = made(max_target_length=targets)
    rows = [torch.randperm(600, generator=seeded(i))[: transform.row_length].add(3).tolist() for i in range(64)]
    out = transform(batch_of(rows, transform.row_length), 0, 1, seeded(3))
    modes = set()
    for row, ids, mask, labels in zip(rows, out["input_ids"], out["attention_mask"], out["labels"], strict=True):
        ids, target = ids[mask.bool()].tolist(), labels[labels != -100].tolist()
        modes.add(ids[0])
        inputs = ids[1:-1] if targets else ids[1 : len(ids) - len(target)]
        assert target[-1] == 2 and (targets is None or ids[-1] == 2)
        assert restore(inputs, target[:-1]) == (row, {})
    assert modes == {800, 801, 802}
    assert out["input_ids"].shape == (64, 64)


def test_shares_of_the_mixture():
    transform = made(max_length=32)
    rows = [list(range(10, 10 + transform.row_length))] * 4000
    lead = transform(batch_of(rows, transform.row_length), 0, 1, seeded(0))["input_ids"][:, 0]
    for mode, share in (("R", 0.4), ("X", 0.4), ("S", 0.2)):
        assert abs((lead == MODES[mode]).double().mean().item() - share) < 0.03


def test_evaluation_is_the_same_each_time():
    transform, batch = made(), batch_of([range(10, 40), range(50, 90)], 40)
    assert torch.equal(transform.at_evaluation(batch)["input_ids"], transform.at_evaluation(batch)["input_ids"])


def test_padding_side_does_not_matter():
    transform, batch = made(), batch_of([range(10, 30), range(50, 90)], 40)
    left = {key: torch.stack([value[0].roll(20), value[1]]) for key, value in batch.items()}
    assert torch.equal(transform(batch, 0, 1, seeded(0))["labels"], transform(left, 0, 1, seeded(0))["labels"])


def test_refusals_name_the_fix():
    with pytest.raises(ValueError, match=r"density=1 is outside \(0, 1\)"):
        Denoiser("R", 1, 3)
    with pytest.raises(ValueError, match="mean_span=0.5"):
        Denoiser("R", 0.1, 0.5)
    with pytest.raises(ValueError, match="hidden in up to 8 spans, and there are 3 sentinel_ids"):
        made(sentinel_ids=SENTINELS[:3])
    with pytest.raises(ValueError, match="each must be a token id of its own"):
        made(sentinel_ids=[900] * 100)
    with pytest.raises(ValueError, match=r"mode_ids has no token for \['X'\]"):
        made(mode_ids={"R": 1, "S": 3})
    with pytest.raises(ValueError, match="separator_id is for decoder-only"):
        made(max_target_length=40, separator_id=5)
    with pytest.raises(ValueError, match=r"denoisers holds \('R', 0.15\), which is no Denoiser"):
        made(denoisers=[("R", 0.15)])
    transform = made()
    with pytest.raises(ValueError, match=f"A row has 60 tokens; 2 to row_length={transform.row_length} fit"):
        transform(batch_of([range(10, 70)], 60), 0, 1, seeded(0))
    with pytest.raises(ValueError, match="A row has 1 tokens"):
        transform(batch_of([[10]], 4), 0, 1, seeded(0))
    with pytest.raises(ValueError, match="holds a sentinel"):
        transform(batch_of([[10, 901, 12]], 4), 0, 1, seeded(0))
    with pytest.raises(RefusedError, match=r"carries \['position_ids'\]"):
        transform({**batch_of([[10, 11]], 2), "position_ids": torch.zeros(1, 2)}, 0, 1, seeded(0))
    with pytest.raises(ValueError, match="3 spans are hidden, and there are 1"):
        split_spans(torch.arange(6), torch.tensor([0, 1, 0, 1, 0, 1]).bool(), [9])
