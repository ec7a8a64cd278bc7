"""Parallel-Distil-Refine over a stub that counts."""

from __future__ import annotations

import pytest

from hf_effi.functional.rollouts import (
    cut_workspace,
    keep_drafts,
    last_line,
    pdr,
    self_consistency,
    summary_request,
    with_workspace,
    workspace_of,
)

WORDS = {"encode": str.split, "decode": " ".join}


class Stub:
    """Writes a number of its own, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.made = 0

    def __call__(self, prompts: list[str]) -> list[str]:
        self.asked.append(prompts)
        self.made += len(prompts)
        return [f"so {self.made - len(prompts) + place}" for place in range(len(prompts))]


@pytest.mark.parametrize(("distil", "calls", "path"), [("top_k", 13, 3), ("random_k", 13, 3), ("summary", 15, 5)])
def test_calls_and_path(distil, calls, path) -> None:
    stub = Stub()
    done = pdr(stub, "2+2?", (8, 4, 1), distil, **WORDS)
    assert (done.calls, done.path, stub.made) == (calls, path, calls)
    assert [len(round) for round in done.drafts] == [8, 4, 1] and done.answer == done.drafts[-1][0]
    assert done.sequential_tokens < done.total_tokens and done.workspaces[0] == ""
    assert len(done.workspaces) == 3


def test_budgets_by_hand() -> None:
    # read 1 + written 2 in the first round, twice; "Draft 1: so 0 Draft 2: so 1" are 8 words, and the prompt 1
    done = pdr(Stub(), "2+2?", (2, 1), **WORDS, join=lambda prompt, workspace: f"{prompt} {workspace}".strip())
    assert (done.sequential_tokens, done.total_tokens) == (3 + 11, 6 + 11)


@pytest.mark.parametrize("rounds", [(1,), (1, 1, 1)])
def test_one_draft_at_a_time_makes_the_budgets_equal(rounds) -> None:
    done = pdr(Stub(), "2+2?", rounds, **WORDS)
    assert done.sequential_tokens == done.total_tokens and done.calls == done.path == len(rounds)


def test_a_workspace_is_cut_and_forgotten() -> None:
    stub = Stub()
    done = pdr(stub, "2+2?", (4, 2, 1), k=4, max_workspace_tokens=5, **WORDS)
    assert all(len(text.split()) <= 5 for text in done.workspaces) and done.workspaces[1] == "Draft 1: so 0 Draft"
    assert "so 0" not in stub.asked[2][0] and "so 4" in stub.asked[2][0]  # not persistent
    assert stub.asked[1][0] == stub.asked[1][1] == with_workspace("2+2?", done.workspaces[1])
    assert cut_workspace("a  b", 2, **WORDS) == "a  b"  # what fits is left as it is


def test_random_drafts_differ_between_the_drafts_of_the_next_round_and_repeat_by_seed() -> None:
    one, two, other = Stub(), Stub(), Stub()
    for stub, seed in ((one, 0), (two, 0), (other, 1)):
        pdr(stub, "2+2?", (8, 8, 1), "random_k", seed=seed, **WORDS)
    assert len(set(one.asked[1])) > 1 and one.asked == two.asked != other.asked


def test_top_k_is_by_agreement_and_never_sees_a_reference() -> None:
    seen = []

    def score(drafts):
        seen.append(list(drafts))
        return [float(draft.endswith("5")) for draft in drafts]

    done = pdr(Stub(), "2+2?", (8, 1), k=1, score=score, **WORDS)
    assert done.workspaces[1] == "Draft 1:\nso 5" and seen == [[f"so {place}" for place in range(8)]]
    assert keep_drafts(["4", "5", "6", "5"], "top_k", 2) == ["5", "5"]
    assert keep_drafts(["4", "5"], "top_k", 5) == ["4", "5"]  # tied: in their order
    assert self_consistency(len)(["a", "bc", "d"]) == pytest.approx([2 / 3, 1 / 3, 2 / 3])
    assert last_line("a\nb\n\n") == "b" and last_line("") is None


def test_a_function_may_distil() -> None:
    done = pdr(Stub(), "2+2?", (3, 1), lambda drafts: max(drafts), **WORDS)
    assert done.workspaces[1] == "so 2"
    assert workspace_of(["a"]) in summary_request("p", ["a"]) and "p" in summary_request("p", ["a"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"drafts": ()}, "must be a list"),
        ({"drafts": 4}, "must be a list"),
        ({"drafts": (4, 2)}, "ends with 2 drafts"),
        ({"drafts": (0, 1)}, "drafts=0"),
        ({"distil": "best"}, "distil='best'"),
        ({"k": 0}, "k=0"),
        ({"max_workspace_tokens": 0}, "max_workspace_tokens=0"),
        ({"distil": "random_k", "score": len}, "only acts with distil='top_k'"),
        ({"score": lambda drafts: [1.0]}, "1 scores for 4 drafts"),
        ({"generate": lambda prompts: ["x"]}, "1 completions for 4 prompts"),
    ],
)
def test_what_is_refused(arguments, match) -> None:
    with pytest.raises(ValueError, match=match):
        pdr(**{"generate": Stub(), "prompt": "2+2?", **WORDS, **arguments})
    with pytest.raises(ValueError, match="keeps no drafts"):
        keep_drafts(["a"], "summary", 1)
