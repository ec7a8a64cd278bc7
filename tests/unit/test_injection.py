"""Injection plans: places, shares, collisions, what is found in a batch, and what a model made of it, by hand."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset

from hf_effi.data import InjectedDataset, Injection, InjectionPlan, InjectionResult
from hf_effi.errors import RefusedError
from hf_effi.functional.data.injection import (
    Interaction,
    as_ids,
    continuations,
    count_rows,
    draw_places,
    find_rows,
    measure_interactions,
)
from hf_effi.recipes import interaction_test
from hf_effi.recipes.interactions import loss_below_twins
from tests.helpers import tiny_qwen3

#: rows that `base` does not have
ROWS = [[30, 31, 32, 33], [33, 32, 31, 30], [30, 32, 31, 33], [31, 30, 33, 32]]


def base(count: int = 1000, length: int = 16) -> list[dict[str, list[int]]]:
    return [{"input_ids": [5 + i % 7] * length, "labels": [5 + i % 7] * length} for i in range(count)]


def of(name: str = "canary", rows=ROWS, **over) -> Injection:
    return Injection(name, rows, **{"copies": 1, **over})


# --- places -----------------------------------------------------------------------------------------------------


def test_a_rate_of_one_percent_is_ten_rows_fixed_by_the_seed() -> None:
    plan = InjectionPlan([of(copies=None, rate=0.01)], seed=3)
    golden = draw_places(10, 1000, (), "3 canary")
    assert plan.places(1000) == {"canary": golden} and len(set(golden)) == 10
    assert golden == [388, 292, 504, 840, 385, 159, 904, 136, 397, 54]
    rows = InjectedDataset(base(), plan)
    assert len(rows) == 1000 and sorted(rows.places) == sorted(golden)
    for index in range(1000):  # all others are what they were
        assert (rows[index] == base()[index]) == (index not in golden)
    assert rows[golden[0]] == {
        "input_ids": list(plan.injected("canary")[0]),
        "labels": list(plan.injected("canary")[0]),
    }
    turns = [rows[index]["input_ids"] for index in golden]
    assert turns[::2] == [turns[0]] * 5 and turns[1::2] == [turns[1]] * 5  # two of four rows are injected, in turn
    assert rows.share == 10 * 4 / 16000


def test_draws_depend_on_their_key_alone() -> None:
    torch.manual_seed(0)
    assert draw_places(3, 10, {0, 1, 2}, "0 canary") == draw_places(3, 10, [2, 1, 0], "0 canary") == [4, 6, 3]
    assert draw_places(0, 0, (), "x") == [] and draw_places(1, 1, (), "x") == [0]
    assert sorted(draw_places(10, 10, (), "x")) == list(range(10)) == sorted(draw_places(9, 10, {3}, "x") + [3])
    for count, total, taken in ((2, 1, ()), (1, 1, {0})):
        with pytest.raises(ValueError, match="free"):
            draw_places(count, total, taken, "x")


def test_an_experiment_keeps_its_places_beside_others_and_without_them() -> None:
    fact = of("fact", [[9, 3, 9, 3], [3, 9, 9, 3]])
    plan = InjectionPlan([of(copies=8), fact], seed=1)
    both = plan.places(100)
    assert plan.only(["fact"]).places(100) == {"fact": both["fact"]} and not set(both["fact"]) & set(both["canary"])
    assert plan.only([]).places(100) == {} and InjectedDataset(base(), plan.only([])).share == 0
    with pytest.raises(ValueError, match="'poison': the plan has canary, fact"):
        plan.only(["poison"])


def test_steps_are_updates_of_data_in_sequence() -> None:
    plan = InjectionPlan([of(copies=None, steps=[1, 3, 3])], rows_per_update=4)
    first, second, third = plan.places(12)["canary"]
    assert first < 4 and 8 <= second < 12 and 8 <= third < 12 and second != third
    with pytest.raises(ValueError, match="update 3; 11 rows make 2"):
        plan.places(11)
    for over in ({"steps": [1]}, {}):
        with pytest.raises(ValueError, match="rows_per_update"):
            InjectionPlan([of(copies=None if over else 1, **over)], rows_per_update=None if over else 4)


def test_collisions_and_shares_are_refused() -> None:
    one = of("one", copies=None, at=[7, 8])
    with pytest.raises(ValueError, match="row 8 is wanted by 'one' and 'two'"):
        InjectionPlan([one, of("two", [[9, 9, 3], [3, 9, 3]], copies=None, at=[8])]).places(10)
    full = InjectionPlan([one, of("two", [[9, 9, 3], [3, 9, 3]], copies=8)])
    assert sorted(full.places(10)["two"]) == [0, 1, 2, 3, 4, 5, 6, 9]  # what is drawn makes room
    with pytest.raises(ValueError, match="names row 8 of 8"):
        full.places(8)
    with pytest.raises(ValueError, match=r"8 of 160 tokens, 5.00%, and max_share=0.01"):
        InjectedDataset(base(10), InjectionPlan([one]))
    assert InjectedDataset(base(10), InjectionPlan([one], max_share=0.05)).share == 0.05
    assert InjectedDataset(base(10), InjectionPlan([one]), base_tokens=800).share == 0.01
    with pytest.raises(ValueError, match="is none"):
        InjectionPlan([of(copies=None, rate=0.01)]).places(10)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"name": "a b"}, "name="),
        ({"name": ""}, "name="),
        ({"rows": []}, "at least one"),
        ({"rows": [[1, 2], [1, 2]]}, "no two equal"),
        ({"rows": ["text"]}, "Pass token ids"),
        ({"rows": [[1]]}, "has 1 tokens"),
        ({"rows": [[1, True]]}, "Pass token ids"),
        ({"rows": [[1, math.nan]]}, "Pass token ids"),
        ({"copies": 0}, "copies"),
        ({"copies": None}, "none of rate"),
        ({"rate": 0.1}, "rate and copies"),
        ({"copies": None, "rate": 0.0}, "rate"),
        ({"copies": None, "rate": math.nan}, "rate"),
        ({"copies": None, "at": []}, "at least one number"),
        ({"copies": None, "at": [1, 1]}, "none twice"),
        ({"copies": None, "at": [-1]}, "at=-1"),
        ({"copies": None, "steps": [0]}, "steps=0"),
        ({"positions": "end"}, "positions"),
        ({"prompt_tokens": 4}, "leaves nothing"),
        ({"prompt_tokens": 0}, "prompt_tokens"),
        ({"held_out": 1.0}, "held_out"),
        ({"held_out": 0.1}, "no twin"),
        ({"rows": [[1, 2]]}, "held_out=0"),
    ],
)
def test_wrong_experiments(change, match) -> None:
    with pytest.raises(ValueError, match=match):
        Injection(**{"name": "x", "rows": ROWS, "copies": 1, **change})


def test_wrong_plans_and_datasets() -> None:
    for injections in ([], [of(), of()]):
        with pytest.raises(ValueError, match="a name of its own"):
            InjectionPlan(injections)
    with pytest.raises(ValueError, match="have one row"):
        InjectionPlan([of("one"), of("two")])
    with pytest.raises(ValueError, match="a part of one of 'one'"):
        InjectionPlan([of("one"), of("two", [[31, 32], [9, 9]])])
    for over in ({"max_share": 0.0}, {"max_share": 1.5}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(over))):
            InjectionPlan([of()], **over)
    plan = InjectionPlan([of()], max_share=1.0)
    with pytest.raises(RefusedError, match="is a stream"):
        InjectedDataset(IterableDataset.from_generator(lambda: iter(base())), plan)
    with pytest.raises(RefusedError, match="row 1 of the dataset has a row of 'canary' already"):
        InjectedDataset([*base(1), {"input_ids": [1, *ROWS[2]]}], plan)
    odd = InjectedDataset([{**row, "position_ids": row["labels"]} for row in base(4)], plan)
    with pytest.raises(RefusedError, match="position_ids"):
        odd[min(odd.places)]
    with pytest.raises(ValueError, match="which has 3"):
        InjectedDataset(base(4, length=3), InjectionPlan([of(positions="start")], max_share=1.0))
    with pytest.raises(RefusedError, match=r"needs a datasets.Dataset"):
        InjectedDataset(base(), plan).as_dataset()


# --- rows of the dataset ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["start", "random"])
def test_tokens_are_written_over_those_of_the_row(positions) -> None:
    rows = InjectedDataset(base(), InjectionPlan([of(positions=positions, copies=3)], seed=2))
    offsets = set()
    for index, place in rows.places.items():
        before, now = base()[index], rows[index]
        offsets.add(place.offset)
        ids = list(rows.injected_row(place))
        expected = before["input_ids"][: place.offset] + ids + before["input_ids"][place.offset + 4 :]
        assert now == {"input_ids": expected, "labels": expected} and len(expected) == 16
    assert offsets == {0} if positions == "start" else len(offsets) > 2 and max(offsets) <= 12


def test_tensors_masks_and_negative_numbers() -> None:
    tensors = [{"input_ids": torch.full((16,), 5), "attention_mask": torch.ones(16, dtype=torch.int32)}] * 200
    rows = InjectedDataset(tensors, InjectionPlan([of()]))
    index = min(rows.places)
    assert rows[index]["input_ids"].dtype == torch.int64 and rows[index]["attention_mask"].tolist() == [1] * 4
    assert rows[index - 200] is not None and torch.equal(rows[index - 200]["input_ids"], rows[index]["input_ids"])
    for wrong, error in ((200, IndexError), (-201, IndexError), (slice(2), TypeError)):
        with pytest.raises(error):
            rows[wrong]
    assert pickle.loads(pickle.dumps(rows)).places == rows.places  # workers that are spawned get one


def test_as_a_dataset_it_has_the_same_rows_and_features() -> None:
    plain = Dataset.from_list(base(200))
    rows = InjectedDataset(plain, InjectionPlan([of(positions="random")], seed=5))
    made = rows.as_dataset()
    assert made.features == plain.features and len(made) == 200
    assert made.to_list() == [rows[index] for index in range(200)]
    none = InjectedDataset(plain, rows.plan.only([]))
    assert none.as_dataset() is plain


def test_the_manifest_says_all(tmp_path) -> None:
    rows = InjectedDataset(base(), InjectionPlan([of(positions="random")], seed=5))
    stored = json.loads(rows.save_manifest(tmp_path).read_text())
    assert stored == rows.manifest() and stored["rows"] == 1000 and stored["share"] == rows.share
    mine = stored["experiments"]["canary"]
    assert sorted(mine["injected"] + mine["twins"]) == sorted(ROWS) and len(mine["twins"]) == 2
    for place in mine["places"]:
        row = mine["injected"][place["row"]]
        assert rows[place["index"]]["input_ids"][place["offset"] : place["offset"] + 4] == row


# --- found again ------------------------------------------------------------------------------------------------


def test_rows_are_found_in_padded_and_packed_batches() -> None:
    tokens = torch.tensor([[0, 0, 1, 2, 3], [1, 2, 1, 2, 9]])
    assert count_rows(tokens, [[1, 2], [1, 2, 3], [9], [7, 7]]) == [3, 1, 1, 0]
    assert sorted(find_rows(tokens, [[1, 2]])) == [(0, 0, 2), (0, 1, 0), (0, 1, 2)]
    assert count_rows(torch.tensor([4, 1, 2]), [[1, 2]]) == [1] and count_rows(torch.tensor([1]), [[1, 2]]) == [0]
    assert count_rows(tokens, []) == [] and count_rows(torch.zeros(0, 5), [[0]]) == [0]
    assert count_rows(torch.ones(1, 5), [[1, 1]]) == [4]  # they overlap
    with pytest.raises(ValueError, match="no token"):
        count_rows(tokens, [[]])


def test_the_search_equals_a_slow_one() -> None:
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 3, (7, 40), generator=draws)
    rows = [tuple(torch.randint(0, 3, (n,), generator=draws).tolist()) for n in (1, 2, 3, 4, 5, 5, 6)]
    rows = list(dict.fromkeys(rows))
    slow = [
        sum(tuple(line[start : start + len(row)]) == row for line in tokens.tolist() for start in range(40))
        for row in rows
    ]
    assert count_rows(tokens, rows) == slow and sum(slow) > 100


def test_token_ids() -> None:
    assert as_ids([1, 2], "x") == as_ids(torch.tensor([1, 2]), "x") == (1, 2)
    for wrong in ("12", 12, [1, -1], [1.0, 2.0], {1: 2}):
        with pytest.raises(ValueError, match="Pass token ids"):
            as_ids(wrong, "x")


# --- what a model made of it -----------------------------------------------------------------------------------


def test_one_forward_says_what_a_greedy_decoder_writes() -> None:
    model = tiny_qwen3()
    prompt = torch.tensor([[30, 31, 32]])
    written = model.generate(prompt, do_sample=False, max_new_tokens=3, min_new_tokens=3)[0].tolist()
    other = [*written[:5], (written[5] + 1) % 40]
    plan = InjectionPlan([of("own", [written, other], prompt_tokens=3, held_out=0)])
    before = torch.get_rng_state()
    found = plan.evaluate(model.train())["own"]
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert found.memorised == 0.5 and found.loss_gap is None and (found.rows, found.twins) == (2, 0)
    slow = [
        float(F.cross_entropy(model.eval()(torch.tensor([row])).logits[0, 2:5].detach(), torch.tensor(row[3:])))
        for row in (written, other)
    ]
    assert found.loss == pytest.approx(sum(slow) / 2, abs=1e-6)


def test_rows_of_several_lengths_and_small_batches_change_nothing() -> None:
    rows = [[34, 31], [31, 32, 33], [33, 33, 30, 30, 31, 32], [32, 30, 32, 31]]
    plan, model = InjectionPlan([of(rows=rows)]), tiny_qwen3()
    one, many = plan.evaluate(model, batch_size=1)["canary"], plan.evaluate(model)["canary"]
    assert many.loss == pytest.approx(one.loss, abs=1e-6) and many.twins_loss == pytest.approx(
        one.twins_loss, abs=1e-6
    )
    assert many.loss_gap == many.twins_loss - many.loss and many.twins == 2
    with pytest.raises(ValueError, match="batch_size"):
        plan.evaluate(model, batch_size=0)


def test_continuations_by_hand() -> None:
    logits = torch.tensor([[[0.0, math.log(3)], [math.log(3), 0.0], [5.0, 0.0]]] * 2)
    ids, start, length = torch.tensor([[0, 1, 1], [0, 1, 1]]), torch.tensor([1, 1]), torch.tensor([3, 2])
    exact, loss = continuations(logits, ids, start, length)
    assert exact.tolist() == [False, True]
    assert loss.tolist() == pytest.approx([-(math.log(0.75) + math.log(0.25)) / 2, -math.log(0.75)])


# --- interactions -----------------------------------------------------------------------------------------------


def arms(alone: float, together: float, other: float = 0.5) -> dict[str, dict[str, float]]:
    a, b = {"a": alone, "b": 0.0}, {"a": 0.0, "b": other}
    return {
        "all": {"a": together, "b": other},
        "none": {"a": 0.0, "b": 0.0},
        "only a": a,
        "only b": b,
        "without a": b,
        "without b": a,
    }


def test_interactions_by_hand() -> None:
    found = measure_interactions({seed: arms(1.0, 1.0 + gap) for seed, gap in enumerate((0.1, 0.2, 0.3))})
    half = 4.303 * 0.1 / math.sqrt(3)
    a = found["a"]
    assert (a.alone, a.together, a.difference) == pytest.approx((1.0, 1.2, 0.2))
    assert (a.low, a.high) == pytest.approx((0.2 - half, 0.2 + half)) and a.within_noise
    assert a.bound == pytest.approx(0.2 + half) and "within the noise" in str(a)
    clear = measure_interactions({seed: arms(1.0, 2.0 + gap) for seed, gap in enumerate((0.01, 0.02, 0.03))})["a"]
    assert not clear.within_noise and "BEYOND" in str(clear)
    same = found["b"]
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0) and same.within_noise
    many = measure_interactions({seed: arms(1.0, 1.0) for seed in range(12)})["a"]
    assert many == Interaction("a", 1.0, 1.0, 0.0, 0.0, 0.0, 12)


def test_interactions_that_cannot_be_told() -> None:
    with pytest.raises(ValueError, match="1 seed"):
        measure_interactions({0: arms(1.0, 1.0)})
    with pytest.raises(ValueError, match="seed 1 has no finite measure of 'a' in the arm 'all'"):
        measure_interactions({0: arms(1.0, 1.0), 1: arms(1.0, math.nan)})
    gone = arms(1.0, 1.0)
    del gone["none"]
    with pytest.raises(ValueError, match="'none'"):
        measure_interactions({0: arms(1.0, 1.0), 1: gone})
    plan = InjectionPlan([of("one"), of("two", [[9, 9, 3], [3, 9, 3]])])
    with pytest.raises(ValueError, match="takes 2 to interact"):
        interaction_test(lambda rows, seed: None, base(), plan.only(["one"]))
    for seeds in ([0], [0, 0]):
        with pytest.raises(ValueError, match="no two equal"):
            interaction_test(lambda rows, seed: None, base(), plan, seeds)
    with pytest.raises(RefusedError, match="held_out=0"):
        loss_below_twins(InjectionResult(1.0, 1.0, None, None, 1, 0))
    assert loss_below_twins(InjectionResult(1.0, 1.0, 0.0, 3.0, 1, 1)) == 2.0
