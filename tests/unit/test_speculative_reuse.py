"""Speculative reuse of rollouts as pure functions: what is accepted, and which distribution comes out."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_effi.errors import BrokenFileError
from hf_effi.functional.rollouts import (
    Draft,
    DraftStore,
    SpeculativeReuse,
    acceptance,
    accepted_lengths,
    draw,
    hash_tokens,
    keep_top,
    residual,
)
from tests.helpers.chance import chi_square

END, VOCABULARY, LONGEST = 0, 4, 3


def policy(seed: int, sharpness: float = 1.5) -> dict[tuple[int, ...], Tensor]:
    """Log-probs of the next token after every prefix that has no end in it: a whole language model in a table."""
    random = torch.Generator().manual_seed(seed)
    prefixes = [p for n in range(LONGEST) for p in itertools.product(range(1, VOCABULARY), repeat=n)]
    return {p: (sharpness * torch.randn(VOCABULARY, generator=random)).log_softmax(0) for p in prefixes}


def sequences(table: dict[tuple[int, ...], Tensor]) -> dict[tuple[int, ...], float]:
    """The probability of every completion."""
    found: dict[tuple[int, ...], float] = {}
    for prefix, log_probs in table.items():
        before = sum(float(table[prefix[:i]][token]) for i, token in enumerate(prefix))
        for token in range(VOCABULARY):
            if token == END or len(prefix) == LONGEST - 1:
                found[(*prefix, token)] = math.exp(before + float(log_probs[token]))
    return found


def rows_of(table: dict[tuple[int, ...], Tensor], prefixes: list[tuple[int, ...]]) -> Tensor:
    return torch.stack([table[prefix] for prefix in prefixes])


def go_on(table: Any, texts: list[tuple[int, ...]], random: torch.Generator) -> list[tuple[int, ...]]:
    """Sample the rest of each completion."""
    texts = list(texts)
    for _ in range(LONGEST):
        open_ones = [i for i, text in enumerate(texts) if len(text) < LONGEST and END not in text]
        if not open_ones:
            break
        uniforms = torch.rand(len(open_ones), generator=random, dtype=torch.float64)
        tokens = draw(rows_of(table, [texts[i] for i in open_ones]).exp(), uniforms)
        for i, token in zip(open_ones, tokens.tolist(), strict=True):
            texts[i] = (*texts[i], token)
    return texts


def reuse(
    before: Any, now: Any, count: int, stored: int, lenience: float = 0.0, resample: str = "residual"
) -> tuple[list[tuple[int, ...]], float]:
    """Draw drafts from `before`, verify them against `now`; return the completions and the share of kept tokens."""
    random = torch.Generator().manual_seed(5)
    drafts = go_on(before, [()] * count, random)
    texts: list[tuple[int, ...]] = [()] * count
    alive = list(range(count))
    for position in range(LONGEST):
        alive = [i for i in alive if len(drafts[i]) > position]
        if not alive:
            break
        prefixes = [drafts[i][:position] for i in alive]
        tokens = torch.tensor([drafts[i][position] for i in alive])
        then, current = rows_of(before, prefixes), rows_of(now, prefixes)
        known = keep_top(then, stored)
        if resample == "nothing":  # as with a lenience: only the draft's own log-prob is known
            known = then.gather(1, tokens.unsqueeze(1)), tokens.unsqueeze(1).int()
        uniforms = torch.rand(2, len(alive), generator=random, dtype=torch.float64)
        accepted = uniforms[0] < acceptance(tokens, current, *known, lenience)
        drawn = draw(residual(current, *known), uniforms[1])
        for i, ok, token, other in zip(alive, accepted.tolist(), tokens.tolist(), drawn.tolist(), strict=True):
            if ok or resample == "residual":
                texts[i] = (*texts[i], token if ok else other)
        alive = [i for i, ok in zip(alive, accepted.tolist(), strict=True) if ok]
    kept = sum(len(text) for text in texts) / sum(map(len, drafts))
    return go_on(now, texts, random), kept


@pytest.mark.parametrize("stored", [1, 2, 3, 4, 9])
def test_the_strict_rule_has_the_distribution_of_the_current_policy(stored: int) -> None:
    before, now = policy(0), policy(1)
    assert sum(sequences(now).values()) == pytest.approx(1, abs=1e-6)
    texts, _ = reuse(before, now, 30_000, stored)
    statistic, limit = chi_square(texts, sequences(now))
    assert statistic < limit


def test_the_test_sees_a_lenience_and_the_rule_without_a_residual() -> None:
    before, now = policy(0), policy(1)
    for lenience in (0.0, 0.5):
        texts, _ = reuse(before, now, 30_000, 1, lenience, resample="nothing")
        statistic, limit = chi_square(texts, sequences(now))
        assert statistic > 2 * limit, lenience
    texts, _ = reuse(before, now, 30_000, 4)
    assert chi_square(texts, sequences(before))[0] > 2 * chi_square(texts, sequences(before))[1]


def test_a_set_that_depends_on_the_draw_is_not_exact() -> None:
    """Why the tokens that are kept are the most probable ones, and not those that happen to be at hand."""
    now, before = torch.tensor([0.2, 0.5, 0.3]).log(), torch.tensor([0.6, 0.2, 0.2]).log()
    random, count = torch.Generator().manual_seed(0), 40_000
    tokens = draw(before.exp().expand(count, 3), torch.rand(count, generator=random))
    own = before[tokens].unsqueeze(1), tokens.unsqueeze(1).int()
    uniforms = torch.rand(2, count, generator=random, dtype=torch.float64)
    rows = now.expand(count, 3)
    kept = uniforms[0] < acceptance(tokens, rows, *own)
    out = torch.where(kept, tokens, draw(residual(rows, *own), uniforms[1]))
    statistic, limit = chi_square(out.tolist(), dict(enumerate(now.exp().tolist())))
    assert statistic > 2 * limit


def test_a_lenient_step_is_biased_as_the_docstring_says() -> None:
    now, before = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.6, 0.2, 0.2])
    random, count, lenience = torch.Generator().manual_seed(0), 40_000, 0.5
    tokens = draw(before.expand(count, 3), torch.rand(count, generator=random))
    own = before.log()[tokens].unsqueeze(1), tokens.unsqueeze(1).int()
    uniforms = torch.rand(2, count, generator=random, dtype=torch.float64)
    kept = uniforms[0] < acceptance(tokens, now.log().expand(count, 3), *own, lenience)
    out = torch.where(kept, tokens, draw(now.expand(count, 3), uniforms[1]))
    accepted = torch.minimum(before, math.exp(lenience) * now)
    expected = accepted + (1 - accepted.sum()) * now
    assert expected.sum() == pytest.approx(1)
    assert (expected / now).max() <= math.exp(lenience) + 1 - accepted.sum()
    assert (expected / now).min() >= 1 - accepted.sum()
    statistic, limit = chi_square(out.tolist(), dict(enumerate(expected.tolist())))
    assert statistic < limit


def test_tokens_are_accepted_as_often_as_the_formula_says() -> None:
    random = torch.Generator().manual_seed(2)
    now, before = (torch.randn(6, generator=random).log_softmax(0) for _ in range(2))
    known = keep_top(before, 4)
    for lenience in (0.0, 0.7):
        for token in range(6):
            ratio = math.exp(lenience + float(now[token] - before[token]))
            wanted = min(1.0, ratio) if token in known[1].tolist() else 0.0
            p = float(acceptance(torch.tensor([token]), now[None], known[0][None], known[1][None], lenience))
            assert p == pytest.approx(wanted, abs=1e-6)
            share = float((torch.rand(20_000, generator=random, dtype=torch.float64) < p).double().mean())
            assert abs(share - wanted) < 4 * math.sqrt(0.25 / 20_000)


def test_an_equal_policy_accepts_everything() -> None:
    same = policy(3)
    texts, kept = reuse(same, same, 2_000, VOCABULARY)
    assert kept == 1.0
    random = torch.Generator().manual_seed(5)
    assert texts == go_on(same, [()] * 2_000, random)  # the drafts themselves
    assert torch.allclose(residual(same[()], *keep_top(same[()], 4)).float(), same[()].exp())


def test_another_policy_accepts_less_the_fewer_tokens_are_known() -> None:
    shares = [reuse(policy(3), policy(3), 2_000, stored)[1] for stored in (1, 2, 3, 4)]
    assert shares == sorted(shares) and shares[0] < shares[-1] == 1.0


def test_what_the_previous_policy_could_not_draw_is_rejected() -> None:
    now = torch.tensor([[0.5, 0.5, 0.0]]).log()
    known = torch.tensor([[0.0]]), torch.tensor([[2]], dtype=torch.int32)
    assert acceptance(torch.tensor([2]), now, *known).tolist() == [0.0]
    assert residual(now, *known).tolist() == [[0.5, 0.5, 0.0]]
    nothing = torch.tensor([[-math.inf]]), torch.tensor([[-1]], dtype=torch.int32)
    assert acceptance(torch.tensor([0]), now, *nothing, lenience=9.0).tolist() == [0.0]
    assert residual(now, *nothing).tolist() == [[0.5, 0.5, 0.0]]


@pytest.mark.parametrize(
    ("accepted", "lengths", "expected"),
    [
        ([[True, True]], [0], [0]),
        ([[True, True]], [2], [2]),
        ([[True, True]], [1], [1]),
        ([[False, True]], [2], [0]),
        ([[]], [0], [0]),
        ([], [], []),
    ],
)
def test_lengths_at_the_edges(accepted: list[list[bool]], lengths: list[int], expected: list[int]) -> None:
    columns = len(accepted[0]) if accepted else 3
    mask = torch.tensor(accepted, dtype=torch.bool).reshape(len(lengths), columns)
    assert accepted_lengths(mask, torch.tensor(lengths, dtype=torch.long)).tolist() == expected


def test_a_draw_at_the_edges() -> None:
    p = torch.tensor([[0.0, 1.0, 0.0], [0.1, 0.2, 0.7], [0.5, 0.5, 0.0]])
    top = torch.full((3,), 1 - 2**-53, dtype=torch.float64)
    assert draw(p, torch.zeros(3)).tolist() == [1, 0, 0]
    assert draw(p, top).tolist() == [1, 2, 1]
    for bad in (torch.full((1, 2), math.nan), torch.zeros(1, 2)):
        with pytest.raises(ValueError, match="not numbers"):
            draw(bad, torch.zeros(1))


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"lenience": -0.1}, "lenience must be a finite number >= 0, got -0.1"),
        ({"lenience": math.inf}, "lenience must be a finite number"),
        ({"lenience": math.nan}, "lenience must be a finite number"),
        ({"stored_tokens": 0}, "stored_tokens must be an integer >= 1, got 0"),
        ({"stored_tokens": True}, "stored_tokens must be an integer"),
        ({"stored_tokens": 2.5}, "stored_tokens must be an integer"),
        ({"max_bytes": 0}, "max_bytes must be an integer >= 1, got 0"),
        ({"max_bytes": "1GB"}, "max_bytes must be an integer >= 1, got '1GB'"),
        ({"max_bytes": 1e9}, "max_bytes must be an integer"),
        ({"lenience": 0.5, "stored_tokens": 8}, "stored_tokens=8 only acts with lenience=0. Leave it at 64."),
    ],
)
def test_bad_options_are_named(over: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SpeculativeReuse(**over)


def draft(length: int, width: int = 2) -> Draft:
    values = torch.arange(length * width).float().view(length, width)
    return Draft(torch.arange(length, dtype=torch.int32), -values, values.int())


def test_a_store_keeps_the_newest_whatever_their_length() -> None:
    store = DraftStore(3)
    for key, length in (("a", 1), ("b", 900), ("c", 1), ("a", 2), ("d", 1)):
        store.put(key, draft(length))
    assert store.take("b") is None and len(store) == 3  # `a` was put again, so that `b` is the oldest
    assert len(store.take("a").tokens) == 2 and store.take("a") is None


def test_a_store_goes_through_a_state_in_order_and_in_parts() -> None:
    store, again = DraftStore(9), DraftStore(2)
    for key, (length, width) in zip("abcd", [(3, 2), (0, 2), (1, 5), (4, 1)], strict=True):
        store.put(key, draft(length, width))
    state = store.state_dict()
    again.load_state_dict(state)
    assert len(again) == 2 and again.take("a") is None
    for part, names in ((0, "ac"), (1, "bd")):
        half = DraftStore(9)
        half.load_state_dict(state, part=part, parts=2)
        assert len(half) == 2
        for name in names:
            mine, theirs = half.take(name), store.take(name)
            for field in ("tokens", "stored", "stored_tokens"):
                assert torch.equal(getattr(mine, field), getattr(theirs, field))
    empty = DraftStore(1)
    empty.load_state_dict(DraftStore(1).state_dict())
    assert len(empty) == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("keys", ["a"]),
        ("keys", "ab"),
        ("tokens", torch.zeros(3)),
        ("tokens", None),
        ("lengths", torch.tensor([1, -1])),
        ("lengths", torch.tensor([1, 10**9])),
        ("widths", torch.tensor([2])),
        ("stored", torch.zeros(2, 2)),
        ("stored_tokens", torch.zeros(1, dtype=torch.int32)),
    ],
)
def test_a_damaged_state_is_refused(key: str, value: Any) -> None:
    store = DraftStore(2)
    store.put("a", draft(1))
    store.put("b", draft(2))
    with pytest.raises(BrokenFileError, match="drafts of rollouts are damaged"):
        DraftStore(2).load_state_dict({**store.state_dict(), key: value})


def test_prompts_are_told_apart_by_their_tokens() -> None:
    assert (
        hash_tokens([1, 2]) == hash_tokens((1, 2)) and len({hash_tokens(x) for x in ([1, 2], [2, 1], [12], [])}) == 4
    )


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("tokens", -1),
        ("tokens", 2**31 - 1),
        ("stored_tokens", -2),
        ("stored_tokens", 50),
        ("stored", math.nan),
        ("stored", 3.0),
    ],
)
def test_numbers_that_no_run_stores_are_refused(part: str, value: float) -> None:
    """Else a file of somebody else would be looked up in the model's embedding, or be a probability."""
    store = DraftStore(2)
    store.put("a", Draft(torch.tensor([3, 4]).int(), torch.zeros(2, 1), torch.tensor([[3], [4]]).int()))
    state = store.state_dict()
    state[part][1] = value
    with pytest.raises(BrokenFileError, match="drafts of rollouts"):
        DraftStore(2).load_state_dict(state, vocabulary=50)


def test_shapes_that_overflow_are_refused() -> None:
    state = DraftStore(1).state_dict() | {"keys": ["a", "b"]}
    for lengths, widths in (([2**62, 2**62], [4, 4]), ([2**63 - 1, 1], [1, 1]), ([0, 2], [2**62, 2**62])):
        both = {"lengths": torch.tensor(lengths), "widths": torch.tensor(widths)}
        with pytest.raises(BrokenFileError, match="damaged"):
            DraftStore(1).load_state_dict({**state, **both})


@pytest.mark.parametrize("lenience", ["0.5", None, True])
def test_a_lenience_that_is_no_number_is_named(lenience: Any) -> None:
    with pytest.raises(TypeError, match=f"lenience must be a number >= 0, got {lenience!r}"):
        SpeculativeReuse(lenience=lenience)
