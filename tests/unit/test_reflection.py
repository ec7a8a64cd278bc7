"""CyclicReflex: the wave by hand, and which logits it moves, row by row."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from hf_effi.functional.rollouts import reflection_bonus
from hf_effi.recipes import CyclicalReflection

VOCABULARY = ["<pad>", "<unk>", "wait", " wait", "But", " but", "<", "/think>", "</think>", "x"]
WAIT, SPACED_WAIT, BUT, SPACED_BUT, OPEN, CLOSE, END, X = range(2, 10)


def words(vocabulary=VOCABULARY) -> PreTrainedTokenizerFast:
    core = Tokenizer(WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = Split("|", "removed")  # a text without it is one token
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")


def test_the_wave_by_hand() -> None:
    steps = (0, 75, 150, 300, 450, 525, 600)
    assert [reflection_bonus(step, 5, 600) for step in steps] == [0, 2.5, 5, 0, -5, -2.5, 0]
    assert reflection_bonus(0, 5, 600, shift=0.25) == 5 and reflection_bonus(150, 5, 600, shift=1.0) == 5
    assert reflection_bonus(675, 1.0, 600) == 0.5 and reflection_bonus(75, 0.0) == 0
    assert sum(reflection_bonus(step, 5, 600) for step in range(600)) == pytest.approx(0, abs=1e-9)
    for wrong in ({"step": -1}, {"amplitude": -1.0}, {"period": 0}, {"shift": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            reflection_bonus(**{"step": 0, **wrong})


def test_both_spellings_move_and_nothing_else() -> None:
    reflect = CyclicalReflection(words(), 2, amplitude=5.0, period=4)
    assert reflect.token_ids == [WAIT, SPACED_WAIT, BUT, SPACED_BUT]
    written = torch.tensor([[X, X, X], [WAIT, X, X]])  # one token after the prompt: a quarter of the period
    scores = torch.zeros(2, len(VOCABULARY))
    moved = reflect(written, scores)
    assert not scores.any() and moved is not scores
    assert moved[:, reflect.token_ids].eq(5.0).all() and moved.sum() == 2 * 4 * 5.0
    assert torch.equal(reflect(written[:, :2], scores), scores)  # the wave begins at 0


def test_it_ends_row_by_row() -> None:
    reflect = CyclicalReflection(words(), 1, period=8)
    rows = torch.tensor([[END, X, X], [X, END, X], [X, X, END], [X, X, X]])  # an end in the prompt is none
    moved = reflect(rows, torch.zeros(4, len(VOCABULARY)))[:, WAIT]
    assert moved.tolist() == [5.0, 0.0, 0.0, 5.0]
    two = CyclicalReflection(words([w for w in VOCABULARY if w != "</think>"]), 1, period=8, end="<|/think>")
    assert two.end == [OPEN, CLOSE]
    rows = torch.tensor([[X, OPEN, CLOSE], [X, CLOSE, OPEN], [OPEN, CLOSE, X]])
    assert two(rows, torch.zeros(3, len(VOCABULARY) - 1))[:, WAIT].tolist() == [0.0, 5.0, 5.0]
    never = CyclicalReflection(words(), 1, period=8, end=None)
    assert never(torch.tensor([[X, END, X]]), torch.zeros(1, len(VOCABULARY)))[0, WAIT] == 5.0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"words": []}, "must be a list of words"),
        ({"words": "wait"}, "must be a list of words"),
        ({"words": ["hmm"]}, "is one token of this tokenizer"),
        ({"end": "</done>"}, "no text that this tokenizer knows"),
        ({"prompt_length": -1}, "prompt_length=-1"),
        ({"amplitude": -1.0}, "amplitude=-1.0"),
        ({"period": 0}, "period=0"),
        ({"shift": 2.0}, "shift=2.0"),
    ],
)
def test_what_is_refused(arguments, match) -> None:
    with pytest.raises(ValueError, match=match):
        CyclicalReflection(words(), **{"prompt_length": 0, **arguments})
