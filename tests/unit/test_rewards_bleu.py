"""BLEU on token ids: NLTK's values, both ways of counting, padding, and the reward around it."""

from __future__ import annotations

import importlib.util
import pickle
import random
from typing import Any

import pytest
import torch

from hf_effi.errors import RewardError
from hf_effi.functional.rewards import COUNTINGS, SMOOTHINGS, corpus_bleu, sentence_bleu
from hf_effi.rewards import BLEUReward
from tests.helpers import tiny_tokenizer

# Candidate, references, and NLTK 3.10's sentence_bleu under its method0, 1, 2 and 3.
GOLDEN: list[tuple[list[int], list[list[int]], list[float]]] = [
    ([5, 6, 7, 8, 9, 10], [[5, 6, 7, 8, 9, 10]], [1.0, 1.0, 1.0, 1.0]),
    (
        [5, 6, 7, 8, 11, 12, 13],
        [[5, 6, 7, 8, 9, 10]],
        [0.41113361690051975, 0.41113361690051975, 0.5055201539008864, 0.41113361690051975],
    ),
    ([5, 6, 7], [[5, 6, 7, 8, 9]], [0.0, 0.288715663092199, 0.43173061492439624, 0.43173061492439624]),
    ([5], [[5, 6]], [0.0, 0.06541924356118012, 0.21874242445215208, 0.13006502375572224]),
    ([], [[5, 6]], [0.0, 0.0, 0.0, 0.0]),
    ([7, 7, 7, 7, 7], [[7, 8, 7, 9], [7, 7, 1]], [0.0, 0.11362193664674995, 0.33980884896942454, 0.21364350319811704]),
    (
        [3, 4, 5, 6, 3, 4, 5, 6, 9],
        [[3, 4, 5, 6, 9], [9, 3, 4, 5, 6, 3, 4, 8, 1, 2], [6, 3, 4, 5]],
        [0.6869054080634511, 0.6869054080634511, 0.7066452455664317, 0.6869054080634511],
    ),
    ([1, 2, 3, 4, 5, 6], [[7, 8, 9]], [0.0, 0.0, 0.0, 0.0]),
    (
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3],
        [[1, 2, 3, 9, 5, 6, 7, 1, 2, 3, 4, 4], [2, 3, 4, 5]],
        [0.5216948600244291, 0.5216948600244291, 0.5791460926441345, 0.5216948600244291],
    ),
    ([4, 5, 6, 7], [[4, 5, 6], [4, 5, 6, 7, 8]], [1.0, 1.0, 1.0, 1.0]),
    (
        [2, 3, 2, 3],
        [[3, 2, 3, 2, 3, 2]],
        [0.6065306597126334, 0.6065306597126334, 0.6065306597126334, 0.6065306597126334],
    ),
]
CORPUS = [0.5398169214814463, 0.5398169214814463, 0.5502691238612117, 0.5398169214814463]


def padded(rows: list[list[int]], width: int, left: int = 0, pad: int = 0) -> list[list[int]]:
    return [[pad] * left + row + [pad] * (width - len(row) - left) for row in rows]


def batch(pad: int = 0, left: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    number = max(len(references) for _, references, _ in GOLDEN)
    candidates = padded([candidate for candidate, _, _ in GOLDEN], 14, left, pad)
    references = [padded(refs + [[]] * (number - len(refs)), 15, left, pad) for _, refs, _ in GOLDEN]
    return torch.tensor(candidates), torch.tensor(references)


@pytest.mark.parametrize("counting", COUNTINGS)
@pytest.mark.parametrize("place, smoothing", list(enumerate(SMOOTHINGS)))
def test_it_is_what_nltk_says(place: int, smoothing: str, counting: str):
    found = sentence_bleu(*batch(), pad_id=0, smoothing=smoothing, counting=counting)
    assert found.tolist() == pytest.approx([values[place] for *_, values in GOLDEN], abs=1e-12)
    whole = corpus_bleu(*batch(), pad_id=0, smoothing=smoothing, counting=counting)
    assert whole.ndim == 0 and float(whole) == pytest.approx(CORPUS[place], abs=1e-12)


def test_by_hand():
    # 5 6 7 8 9 against 5 6 1 1: p = 2/4, 1/3; brevity exp(1 - 5/4)
    candidate, reference = torch.tensor([[5, 6, 1, 1]]), torch.tensor([[5, 6, 7, 8, 9]])
    penalty = float(torch.tensor(-0.25).double().exp())
    assert float(sentence_bleu(candidate, reference, 0, max_n=1)) == pytest.approx(penalty * 0.5)
    assert float(sentence_bleu(candidate, reference, 0, max_n=2)) == pytest.approx(penalty * (0.5 / 3) ** 0.5)
    assert float(sentence_bleu(candidate, reference, 0, max_n=2, weights=[1, 0])) == pytest.approx(penalty * 0.5)
    assert float(sentence_bleu(candidate, reference, 0)) == 0.0


@pytest.mark.parametrize("pad, left", [(0, 1), (-100, 0), (99, 1)])
def test_padding_may_be_anywhere_and_any_number(pad: int, left: int):
    assert torch.equal(sentence_bleu(*batch(pad, left), pad_id=pad), sentence_bleu(*batch(), pad_id=0))


def test_what_touches_padding_is_no_n_gram():
    inside, reference = torch.tensor([[5, 6, 0, 7, 8]]), torch.tensor([[5, 6, 7, 8, 0]])
    # 4 of 4 words, 2 of 2 pairs; no triple in the candidate, which NLTK counts as one without a match
    assert float(sentence_bleu(inside, reference, 0, max_n=2)) == 1.0
    assert float(sentence_bleu(inside, reference, 0, max_n=3, smoothing="floor")) == pytest.approx(0.1 ** (1 / 3))


def test_without_candidate_without_reference_without_rows():
    ids = torch.tensor([[0, 0], [5, 6]])
    found = sentence_bleu(ids, torch.tensor([[5, 6], [0, 0]]), 0, smoothing="add_k")
    assert found[0] == 0.0 and bool(found[1].isnan())
    assert float(corpus_bleu(ids, torch.tensor([[5, 6], [0, 0]]), 0)) == 0.0
    assert bool(corpus_bleu(ids, torch.zeros(2, 2, dtype=torch.long), 0).isnan())
    nothing = torch.zeros(0, 3, dtype=torch.long)
    for counting in COUNTINGS:
        assert sentence_bleu(nothing, nothing, 0, counting=counting).shape == (0,)
        assert sentence_bleu(ids[:, :0], ids + 1, 0, counting=counting).tolist() == [0.0, 0.0]
        assert bool(sentence_bleu(ids, torch.zeros(2, 0, 4).long(), 0, counting=counting).isnan().all())


@pytest.mark.parametrize("vocabulary", [2, 9, 150_000, 2**62])
def test_both_ways_of_counting_give_the_same_bits(vocabulary: int):
    """Also where four ids of the vocabulary do not fit 63 bits side by side, or one with its sentence does not."""
    drawn = torch.Generator().manual_seed(vocabulary % 1000)
    words = torch.randint(1, vocabulary, (6,), generator=drawn)
    candidates = words[torch.randint(0, 6, (8, 40), generator=drawn)]
    references = words[torch.randint(0, 6, (8, 2, 33), generator=drawn)]
    candidates[0, 5:], references[1, 0] = 0, 0
    for smoothing in SMOOTHINGS:
        one, other = (
            sentence_bleu(candidates, references, 0, 5, smoothing=smoothing, counting=way) for way in COUNTINGS
        )
        assert torch.equal(one, other) and bool((one > 0).any())


@pytest.mark.skipif(importlib.util.find_spec("nltk") is None, reason="nltk is not installed")
def test_against_nltk_itself():
    from nltk.translate.bleu_score import SmoothingFunction
    from nltk.translate.bleu_score import sentence_bleu as theirs

    rng = random.Random(0)
    methods = [getattr(SmoothingFunction(), f"method{number}") for number in range(4)]
    candidates = [[rng.randint(1, 5) for _ in range(rng.randint(0, 9))] for _ in range(40)]
    references = [[[rng.randint(1, 5) for _ in range(rng.randint(1, 9))] for _ in range(2)] for _ in range(40)]
    ids, others = torch.tensor(padded(candidates, 9)), torch.tensor([padded(refs, 9) for refs in references])
    for smoothing, method in zip(SMOOTHINGS, methods, strict=True):
        expected = [theirs(r, c, smoothing_function=method) for r, c in zip(references, candidates, strict=True)]
        assert sentence_bleu(ids, others, 0, smoothing=smoothing).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "over, words",
    [
        ({"max_n": 0}, "max_n=0 must be an integer from 1 to 64"),
        ({"max_n": 10**9}, "from 1 to 64"),
        ({"weights": [1.0]}, r"weights=\[1.0\] must be 4 numbers >= 0"),
        ({"weights": [0, 0, 0, 0]}, "not all of them 0"),
        ({"smoothing": "more"}, "smoothing must be one of"),
        ({"smoothing_value": 0.1}, "smoothing_value=0.1 would not be read"),
        ({"smoothing": "floor", "smoothing_value": 0.0}, "smoothing_value=0.0 must be a number above 0"),
        ({"counting": "guess"}, "counting must be one of"),
        ({"candidate_ids": torch.ones(1, 2)}, "must be integers of shape"),
        ({"candidate_ids": torch.ones(2, 2).long()}, "must be integers of shape"),
        ({"candidate_ids": torch.tensor([[-3, 1]])}, "Token ids must be >= 0, or pad_id=0; got -3"),
    ],
)
def test_what_is_wrong_is_named(over: dict[str, Any], words: str):
    ids = torch.ones(1, 2).long()
    with pytest.raises(ValueError, match=words):
        sentence_bleu(**{"candidate_ids": ids, "reference_ids": ids, "pad_id": 0, **over})


# --- the reward ------------------------------------------------------------------------------------------------------


def test_the_reward_reads_texts_lists_of_texts_and_none():
    tokenizer = tiny_tokenizer()
    reward = BLEUReward(tokenizer, max_n=2)
    ids = [tokenizer("1+1=2")["input_ids"] + [tokenizer.eos_token_id], tokenizer("12")["input_ids"], [5]]
    given = {"completions": ["1+1=2", "12", "x"], "completion_ids": ids}
    assert reward(**given, reference=["1+1=2", ["34", "12"], None]) == [1.0, 1.0, None]
    assert pickle.loads(pickle.dumps(reward))(**given, reference=["1+1=2"] * 3)[0] == 1.0
    assert reward(completions=[], completion_ids=[], reference=[]) == []


def test_the_reward_names_what_it_cannot_read():
    given = {"completions": ["a"], "completion_ids": [[5]]}
    with pytest.raises(RewardError, match="the reference 'a' is a text. Pass tokenizer="):
        BLEUReward()(**given, reference=["a"])
    with pytest.raises(RewardError, match="needs token ids >= 0"):
        BLEUReward()(**given, reference=[[0.5]])
    with pytest.raises(RewardError, match="reads the column 'reference'"):
        BLEUReward()(**given)
    for over in ({"tokenizer": 3}, {"column": ""}, {"weights": [1.0]}, {"smoothing": "none", "smoothing_value": 1.0}):
        with pytest.raises(ValueError):
            BLEUReward(**over)
