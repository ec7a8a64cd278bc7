"""Deficient rows and preference pairs, by hand."""

from __future__ import annotations

import pytest
import torch

from hf_effi.functional.data import deficient_rows, preference_pairs, text_overlap


def test_rows_by_hand() -> None:
    assert deficient_rows([3, 1, 2, 5], ["t", "t", "n", "n"], 0.5).tolist() == [0, 3]
    assert deficient_rows([3, 1, 2, 5], ratio=0.5).tolist() == [0, 3]
    assert deficient_rows([9, 8, 1, 2], ["t", "t", "n", "n"], 0.5).tolist() == [0, 3]  # each stratum its share
    assert deficient_rows(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0, 0, 0]), 0.3).tolist() == [0]  # tied
    assert deficient_rows([1.0], ratio=0.01).tolist() == [0]
    assert deficient_rows([1.0, 2.0], ratio=1.0).tolist() == [0, 1]


@pytest.mark.parametrize(("cap", "expected"), [(1.0, range(70, 100)), (0.99, range(69, 99)), (0.9, range(60, 90))])
def test_the_worst_are_capped(cap, expected) -> None:
    assert deficient_rows(list(range(100)), ratio=0.3, quantile_cap=cap).tolist() == list(expected)


def test_pairs_by_hand() -> None:
    texts = ["a b", "c d", "e f", "g h"]
    assert preference_pairs(texts, [1, 0.95, 0.2, -0.5]) == [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert preference_pairs(texts, [-0.5, 0.2, 0.95, 1]) == [(3, 1), (3, 0), (2, 1), (2, 0), (1, 0)]
    assert preference_pairs(texts[:2], [-0.3, -0.4]) == [(0, 1)]  # at the floor, at the gap
    assert preference_pairs(texts[:2], [-0.31, -1.0]) == []
    assert preference_pairs(texts[:3], [1.0, None, float("nan")]) == []
    assert preference_pairs(texts[:2], [0.5, 0.5], min_gap=0.0) == []
    assert preference_pairs([], []) == []


def test_pairs_that_hardly_differ_are_left_out() -> None:
    long = "call(" + ", ".join(f"x{place}=1" for place in range(20)) + ")"
    assert text_overlap(long, long.replace("x7=1", "x7=2")) > 0.95
    assert preference_pairs([long, long.replace("x7=1", "x7=2")], [1.0, 0.0]) == []
    assert preference_pairs([long, long.replace("x7=1", "x7=2")], [1.0, 0.0], max_overlap=1.0) == [(0, 1)]
    assert preference_pairs(["a", "b"], [1.0, 0.0], overlap=lambda one, two: 1.0) == []
    assert text_overlap("a b", "c") == 0.0 and text_overlap("a, b", "a , b") == 1.0


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: deficient_rows([1.0], ["a", "b"]), "2 labels for 1 rows"),
        (lambda: deficient_rows([]), "Pass one number"),
        (lambda: deficient_rows([float("nan")]), "has 1 NaN"),
        (lambda: deficient_rows([1.0], ratio=0.0), "ratio=0.0"),
        (lambda: deficient_rows([1.0], quantile_cap=0.0), "quantile_cap=0.0"),
        (lambda: preference_pairs(["a"], []), "0 values for 1 samples"),
        (lambda: preference_pairs([], [], min_gap=-1.0), "min_gap=-1.0"),
        (lambda: preference_pairs([], [], floor=float("nan")), "floor=nan"),
        (lambda: preference_pairs([], [], max_overlap=1.1), "max_overlap=1.1"),
    ],
)
def test_what_is_refused(call, match) -> None:
    with pytest.raises(ValueError, match=match):
        call()
