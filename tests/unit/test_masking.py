import pytest
import torch

from hf_effi.data.masking import MaskingRatioCurriculum
from hf_effi.functional.data import continues_word, mask_tokens, masking_ratio, seeded

CLS, SEP, PAD, MASK, FIRST, VOCAB = 0, 1, 2, 3, 4, 54


def batch(rows=400, tokens=64):
    ids = torch.randint(FIRST, VOCAB, (rows, tokens), generator=seeded(9))
    ids[:, 0], ids[:, -3], ids[:, -2:] = CLS, SEP, PAD
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def curriculum(**over):
    return MaskingRatioCurriculum(MASK, [CLS, SEP, PAD, MASK], VOCAB, **over)


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_empirical_ratio_follows_the_curve(progress):
    made = batch()
    out = curriculum()(made, int(progress * 100), 100, seeded(0))
    share = (out["labels"] != -100).sum().item() / (400 * 60)
    assert abs(share - (0.3 - 0.15 * progress)) < 0.01


def test_only_ordinary_tokens_are_chosen_and_labels_are_theirs():
    made = batch()
    out = curriculum()(made, 0, 10, seeded(0))
    ids, new, labels = made["input_ids"], out["input_ids"], out["labels"]
    chosen = labels != -100
    assert bool((ids[chosen] >= FIRST).all()) and torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(new[~chosen], ids[~chosen])
    masked = (new[chosen] == MASK).double().mean().item()
    same = (new[chosen] == ids[chosen]).double().mean().item()
    # A random token is the mask or the token itself once in 54 times: 0.8 + 0.1 / 54, 0.1 + 0.1 / 54.
    assert abs(masked - 0.802) < 0.02 and abs(same - 0.102) < 0.02
    assert torch.equal(made["input_ids"], ids) and "labels" not in made


def test_all_masks():
    out = curriculum(random_share=0.0, keep_share=0.0)(batch(), 0, 10, seeded(0))
    assert bool((out["input_ids"][out["labels"] != -100] == MASK).all())


def test_at_least_one_in_each_row_that_has_any():
    ids = torch.tensor([[CLS, 7, 8, SEP], [CLS, SEP, PAD, PAD]])
    for seed in range(20):
        _, labels = mask_tokens(ids, ids >= FIRST, 1e-9, seeded(seed), mask_token_id=MASK, vocab_size=VOCAB)
        assert (labels != -100).sum(dim=1).tolist() == [1, 0]


def test_whole_words_or_none():
    continues = torch.zeros(VOCAB, dtype=torch.bool)
    continues[30:] = True
    made = batch()
    labels = curriculum(continues=continues)(made, 0, 10, seeded(0))["labels"]
    chosen, ids = labels != -100, made["input_ids"]
    joined = continues[ids[:, 1:]] & (ids[:, 1:] >= FIRST) & (ids[:, :-1] >= FIRST)
    assert int(joined.sum()) > 1000
    assert torch.equal(chosen[:, 1:][joined], chosen[:, :-1][joined])
    assert abs(chosen.sum().item() / (400 * 60) - 0.3) < 0.02
    # a piece right behind a special token, or first of all, begins a word
    row = torch.tensor([[31, CLS, 32]])
    for seed in range(20):
        _, labels = mask_tokens(
            row, row >= FIRST, 1e-9, seeded(seed), mask_token_id=MASK, vocab_size=VOCAB, continues=continues
        )
        assert (labels != -100).sum() == 1


def test_continuations():
    assert continues_word(["[CLS]", "a", "##b"]).tolist() == [False, False, True]
    assert continues_word(["\u0120a", "b", "\u2581c"], "prefix").tolist() == [False, True, False]
    with pytest.raises(ValueError, match="No token of the vocabulary"):
        continues_word(["a", "b"])
    with pytest.raises(ValueError, match="style='bpe'"):
        continues_word(["a"], "bpe")


def test_curve_edges():
    assert masking_ratio(0.99, 0.4, 0.4) == 0.4
    assert masking_ratio(0.5, 0.1, 0.5) == pytest.approx(0.3)
    assert masking_ratio(0.25, warmup_fraction=0.5) == pytest.approx(0.225)
    assert masking_ratio(0.5, warmup_fraction=0.5) == 0.3
    for bad in ({"start": 0.0}, {"end": 1.1}, {"warmup_fraction": 1.0}, {"warmup_from": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            masking_ratio(0.5, **bad)
    with pytest.raises(ValueError, match="progress=nan"):
        masking_ratio(float("nan"))


def test_evaluation_masks_the_same_tokens_each_time():
    made, ours = batch(), curriculum(eval_ratio=0.5)
    once, again = ours.at_evaluation(made), ours.at_evaluation(made)
    assert torch.equal(once["labels"], again["labels"]) and torch.equal(once["input_ids"], again["input_ids"])
    assert abs((once["labels"] != -100).sum().item() / (400 * 60) - 0.5) < 0.01


def test_refusals():
    for over in ({"start": 2.0}, {"eval_ratio": 0.0}, {"random_share": 0.6, "keep_share": 0.6}):
        with pytest.raises(ValueError):
            curriculum(**over)
    with pytest.raises(ValueError, match="3 entries for vocab_size=54"):
        curriculum(continues=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask_token_id=-1"):
        MaskingRatioCurriculum(-1, [], 5)
