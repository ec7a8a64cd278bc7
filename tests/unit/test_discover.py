"""The archive of TTT-Discover and the loss of SAMI: golden values of the specifications, hand-computed ones, edges."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_effi.data import SAMICollator
from hf_effi.demo import toy
from hf_effi.errors import MismatchError, RefusedError, RewardError
from hf_effi.functional.mutual_information import response_logps, sami_loss
from hf_effi.functional.rollouts import PUCTArchive, puct_scores
from hf_effi.protocols import RolloutGroups
from hf_effi.selection import DiscoverPrompts

NAN = math.nan


# --- PUCT ------------------------------------------------------------------------------------------------------------


def test_golden_scores() -> None:
    found = puct_scores([0, 1, 3], [0, 2, 1], [0, 2, 3], total=3, c=1.0)
    assert found.tolist() == pytest.approx([1.0, 2.0 + 2 / 3, 4.5])


def test_scores_by_hand() -> None:
    # No bonus: what came of a state; its own value where nothing valid did.
    assert puct_scores([1.0, 2.0], [3, 1], [NAN, 0.5], total=4, c=0.0).tolist() == [1.0, 0.5]
    # The range is that of the states that are not initial; P = 3/6, 2/6, 1/6.
    found = puct_scores([-5.0, 1.0, 2.0], [0, 0, 0], [0.0] * 3, total=0, initial=[True, False, False])
    assert found.tolist() == pytest.approx([-5 + 1 / 6, 1 + 2 / 6, 2 + 3 / 6])
    # One state that is not initial has no range, and equal values rank by age.
    found = puct_scores([1.0, 1.0], [0, 0], [0.0, 0.0], total=0)
    assert found.tolist() == pytest.approx([1 + 1e-6 * 2 / 3, 1 + 1e-6 / 3], abs=1e-12) and found[0] > found[1]
    assert puct_scores([], [], [], total=0).tolist() == []
    for arguments, match in (
        (([1.0], [0, 1], [0.0], 0), "one number per state"),
        (([NAN], [0], [0.0], 0), "must be finite"),
        (([1.0], [-1], [0.0], 0), "visits at least 0"),
        (([1.0], [0], [0.0], -1), "total=-1"),
        (([1.0], [0], [0.0], 0, -1.0), "c=-1.0"),
    ):
        with pytest.raises(ValueError, match=match):
            puct_scores(*arguments)  # type: ignore[arg-type]


def test_an_expansion_counts_for_a_state_and_its_ancestors() -> None:
    archive = PUCTArchive({"a": 0.0, "b": 0.5})
    assert archive.record({0: [("c", 1.0)]}) == [2]
    assert archive.record({2: [("d", 2.0), ("e", 1.5), ("f", 1.8)], 1: []}) == [3, 5]
    nodes = archive.nodes
    assert {number: node.visits for number, node in nodes.items()} == {0: 2, 1: 1, 2: 1, 3: 0, 5: 0}
    assert archive.total == 3 and nodes[3].ancestors == [2, 0]
    # Only the parent learns what its children are worth, from all of them.
    assert nodes[0].best_child == 1.0 and nodes[2].best_child == 2.0 and math.isnan(nodes[1].best_child)
    assert archive.best == ("d", 2.0) and len(archive) == 5


def test_a_batch_blocks_lines() -> None:
    archive = PUCTArchive({"a": 0.0, "b": 0.1}, c=0.0)
    archive.record({0: [("c", 1.0), ("d", 0.9)]})
    archive.record({2: [("e", 5.0), ("f", 4.0)]})
    assert archive.pick(9) == [4, 5, 3, 1]  # without 2 and 0, from which they descend
    assert archive.pick(2) == [4, 5] and archive.pick(0) == []
    assert archive.pick(9, taken=[3]) == [4, 5, 1] and archive.pick(9, taken=[0]) == [1]
    assert archive.ranking()[:3] == [4, 2, 5]  # of equal scores the better value: Q of 2 is that of 4


def test_two_children_of_a_state_stay() -> None:
    archive = PUCTArchive({"a": 0.0})
    assert archive.record({0: [("b", 1.0), ("c", 2.0), ("d", 3.0)]}) == [2, 3]
    assert archive.record({0: [("e", 2.5)]}) == [4]  # over all batches: c goes
    assert {node.state for node in archive.nodes.values()} == {"a", "d", "e"}
    assert archive.record({0: [("d", 9.0), ("e", 2.5)]}) == []  # known
    assert archive.best == ("d", 9.0)


def test_the_archive_is_bounded_and_keeps_what_it_began_with() -> None:
    archive = PUCTArchive({"a": -9.0}, children=100, capacity=4)
    archive.record({0: [(f"s{i}", float(i)) for i in range(10)]})
    assert [node.value for node in archive.nodes.values()] == [-9.0, 7.0, 8.0, 9.0]
    gone = PUCTArchive({"a": 0.0}, capacity=2)
    gone.record({0: [("b", 1.0)]})
    gone.record({0: [("c", 2.0)]})
    assert gone.record({1: [("x", 5.0)]}) == [] and gone.total == 2  # b left the archive since it was picked


def test_states_of_checkpoints() -> None:
    archive = PUCTArchive({"a": 0.0, "b": 1.0})
    archive.record({0: [("c", 2.0)], 1: []})
    stored = json.loads(json.dumps(archive.state_dict()))
    again = PUCTArchive({"a": 0.0, "b": 1.0})
    again.load_state_dict(stored)
    assert again.scores() == archive.scores() and again.pick(3) == archive.pick(3) and again.best == archive.best
    more = [one.record({2: [("z", 3.0)]}) for one in (archive, again)]
    assert more[0] == more[1] == [3]
    with pytest.raises(MismatchError, match="began with 2 states, this one with 1"):
        PUCTArchive({"a": 0.0}).load_state_dict(stored)
    with pytest.raises(MismatchError, match="is no archive"):
        again.load_state_dict({"nodes": [[1]]})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PUCTArchive({}), "at least one state"),
        (lambda: PUCTArchive(["a"]), "at least one state"),  # type: ignore[arg-type]
        (lambda: PUCTArchive({"a": NAN}), "value=nan"),
        (lambda: PUCTArchive({3: 1.0}), "must be a text, got 3"),  # type: ignore[dict-item]
        (lambda: PUCTArchive({"a": 1.0}, c=-1), "c=-1"),
        (lambda: PUCTArchive({"a": 1.0}, children=0), "children=0"),
        (lambda: PUCTArchive({"a": 1.0, "b": 1.0}, capacity=1), "capacity=1 is below the 2 initial"),
        (lambda: PUCTArchive({"a": 1.0}).record({0: [("b", math.inf)]}), "value=inf"),
        (lambda: PUCTArchive({"a": 1.0}).record({0: [(None, 1.0)]}), "must be a text"),  # type: ignore[list-item]
    ],
)
def test_archives_refuse(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


# --- prompts ---------------------------------------------------------------------------------------------------------


def append(state: str, text: str) -> tuple[str | None, float | None]:
    if text == "fail":
        raise KeyError("nothing")
    return (None, 0.0) if not text else (state + text, float(len(state + text)))


def made(**over: Any) -> DiscoverPrompts:
    return DiscoverPrompts({"": 0.0}, lambda state: f"{state}?", append, **over)


def groups_of(sizes: int, rows: int, generation: int = 1) -> RolloutGroups:
    rewards = torch.zeros(rows, sizes)
    return RolloutGroups(rewards, rewards, rewards, step=0, generation=generation)


def tried(discover: DiscoverPrompts, number: int, texts: list[str]) -> Any:
    state = discover.state_of(number)
    return discover.reward(["?"] * len(texts), texts, state=[state] * len(texts), state_number=[number] * len(texts))


def test_a_generation_of_discoveries() -> None:
    discover = made()
    rows = discover.open_stream(iter([]))
    assert rows[0] == {"prompt": "?", "state": "", "state_number": 0} and len(rows) == 1
    assert discover.select(2) == [0, 0]  # nothing else is there
    assert tried(discover, 0, ["ab", ""]) == [2.0, 0.0] and tried(discover, 0, ["c", "de"]) == [1.0, 2.0]
    discover.observe([0, 0], groups_of(2, 2))
    assert [rows[n]["state"] for n in range(1, 4) if n in discover.archive.nodes] == ["ab", "de"]
    found = discover.metrics()
    assert found["best"] == 2.0 and found["states"] == 3.0 and found["new_states"] == 2.0
    assert found["valid"] == 0.75 and found["best_of_generation"] == 2.0 and found["repeated"] == 0.5
    assert sorted(discover.select(2)) == [1, 3] and discover.select(3)[2] == 0  # lines are used up: the ancestor
    assert discover.select(2, exclude=frozenset({1, 3})) == [0, 0]
    again = made()
    again.load_state_dict(json.loads(json.dumps(discover.state_dict())))
    assert again.select(3) == discover.select(3)
    discover.attach(SimpleNamespace())  # type: ignore[arg-type]
    assert len(discover.archive) == 1


def test_rows_that_left_can_be_read_until_the_next_generation() -> None:
    discover = made(capacity=2)
    discover.select(1)
    tried(discover, 0, ["a"])
    discover.observe([0], groups_of(1, 1, generation=1))
    assert 1 in discover.select(2)
    tried(discover, 0, ["bb"])
    tried(discover, 1, [""])
    discover.observe([0, 1], groups_of(1, 2, generation=2))
    assert 1 not in discover.archive.nodes and discover.state_of(1) == "a"
    tried(discover, 0, [""])
    discover.observe([0], groups_of(1, 1, generation=3))
    with pytest.raises(IndexError, match="state 1 is not in the archive"):
        discover.state_of(1)


def test_what_goes_wrong_is_told_to_all() -> None:
    discover = made()
    assert tried(discover, 0, ["fail", "a"]) == [None, 1.0]
    with pytest.raises(RewardError, match="step failed on process 0: KeyError: 'nothing'"):
        discover.observe([0], groups_of(2, 1))
    with pytest.raises(ValueError, match="told of 0 attempts at 2 completions.*discover.reward"):
        discover.observe([0], groups_of(2, 1))
    for step in (lambda s, t: (3, 1.0), lambda s, t: ("a", None), lambda s, t: ("a", NAN), lambda s, t: None):
        wrong = DiscoverPrompts({"": 0.0}, str, step)  # type: ignore[arg-type, return-value]
        assert tried(wrong, 0, ["x"]) == [None]
        with pytest.raises(RewardError, match="step failed on process 0"):
            wrong.observe([0], groups_of(1, 1))
    with pytest.raises(RewardError, match="come from no archive"):
        discover.reward(["?"], ["x"])
    with pytest.raises(RefusedError, match="has 3 rows that would never be read"):
        discover.open_stream([1, 2, 3])
    with pytest.raises(TypeError, match="render=3"):
        DiscoverPrompts({"": 0.0}, 3, append)  # type: ignore[arg-type]
    assert not hasattr(discover.placeholder(4), "__len__")


# --- SAMI ------------------------------------------------------------------------------------------------------------


def test_golden_loss() -> None:
    assert float(sami_loss(torch.tensor([[-1.0, -2.0], [-3.0, -1.5]]))) == pytest.approx(0.27892, abs=1e-5)
    assert float(sami_loss(torch.full((2, 2), -7.0))) == pytest.approx(math.log(2))
    assert float(sami_loss(torch.full((4, 3, 3), 0.5))) == pytest.approx(math.log(3))


def test_each_term_ignores_shifts_of_its_own_side() -> None:
    table = torch.tensor([[-1.0, -2.0], [-3.0, -1.5]])
    rows, columns = torch.tensor([[0.7], [-1.1]]), torch.tensor([[0.4, -2.0]])
    for side, shift, other in (("responses", rows, columns), ("principles", columns, rows)):
        assert float(sami_loss(table + shift, side)) == pytest.approx(float(sami_loss(table, side)), abs=1e-6)
        assert abs(float(sami_loss(table + other, side)) - float(sami_loss(table, side))) > 0.1
    both = (sami_loss(table, "responses") + sami_loss(table, "principles")) / 2
    assert float(sami_loss(table)) == pytest.approx(float(both))


def test_a_batch_is_the_mean_of_its_queries() -> None:
    table = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert float(sami_loss(table)) == pytest.approx(float(torch.stack([sami_loss(one) for one in table]).mean()))


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (2,), (0, 2, 2)])
def test_one_principle_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="C of at least 2"):
        sami_loss(torch.zeros(shape))


def test_log_probs_of_responses() -> None:
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, -100, 3, 1], [-100, 2, -100, -100]])
    logs = logits.log_softmax(-1)
    sums = [float(logs[0, 1, 3] + logs[0, 2, 1]), float(logs[1, 0, 2])]
    assert response_logps(logits, labels, "sum").tolist() == pytest.approx(sums)
    assert response_logps(logits, labels).tolist() == pytest.approx([sums[0] / 2, sums[1]])
    with pytest.raises(ValueError, match="row 1 has no token"):
        response_logps(logits, torch.tensor([[-100, 1, 1, 1], [2, -100, -100, -100]]))
    for call in (lambda: response_logps(logits, labels, "max"), lambda: sami_loss(torch.zeros(2, 2), "left")):
        with pytest.raises(ValueError, match="must be"):
            call()


def test_every_response_stands_under_every_principle() -> None:
    tokenizer = toy().tokenizer
    row = {"prompts": ["1+1=", "22+2="], "responses": ["2", "24"]}
    batch = SAMICollator(tokenizer)([row, row])
    assert batch["sami_principles"].tolist() == [2, 2] and len(batch["input_ids"]) == 8
    said = [
        tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert said[:4] == ["1+1=2", "1+1=24", "22+2=2", "22+2=24"] == said[4:]
    answers = [tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert answers[:4] == ["2", "24", "2", "24"]
    ends = SAMICollator(tokenizer, mask_eos=False)([row])["labels"]
    assert [int(labels[labels != -100][-1]) for labels in ends] == [tokenizer.eos_token_id] * 4
    for wrong, match in (
        ({"prompts": ["a"]}, "remove_unused_columns=False"),
        ({"prompts": ["1"], "responses": ["1"]}, "at least two"),
        ({"prompts": ["1", "2"], "responses": ["1"]}, "2 prompts and 1 responses"),
        ({"prompts": ["1", "2"], "responses": ["1", ""]}, "empty response"),
        ({"prompts": ["1", ""], "responses": ["1", "2"]}, "prompt without a token"),
    ):
        with pytest.raises(ValueError, match=match):
            SAMICollator(tokenizer)([wrong])
    three = {"prompts": ["1", "2", "3"], "responses": ["1", "2", "3"]}
    with pytest.raises(ValueError, match=r"queries of one batch have \[2, 3\] principles"):
        SAMICollator(tokenizer)([row, three])
    with pytest.raises(ValueError, match="mask_eos=1"):
        SAMICollator(tokenizer, mask_eos=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no eos_token_id"):
        SAMICollator(SimpleNamespace(pad_token_id=0, eos_token_id=None), mask_eos=False)
