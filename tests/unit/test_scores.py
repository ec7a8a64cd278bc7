"""Score helpers: the rules by hand, and the cached column (fingerprint, resume, refusals)."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets

from hf_effi.data import ColumnScore, ModelScore, add_score, model_fingerprint
from hf_effi.errors import MismatchError
from hf_effi.functional.data import (
    INSTRUCT_MINING_V1,
    instruct_mining,
    keep_by_judge,
    keep_top,
    kept_shares,
    learnability,
    perplexity,
    rarity_under,
    row_lengths,
    token_counts,
    word_rarity,
)
from tests.helpers import lm_dataset, tiny_gpt2, tiny_qwen3

NAN = float("nan")
INDICATORS = ("reward", "understandability", "naturalness", "coherence")


# --- pure rules -----------------------------------------------------------------------------------------------------


def test_perplexity_is_the_exponential_of_the_loss():
    values = perplexity([0.0, math.log(7.0), NAN]).tolist()
    assert values[:2] == pytest.approx([1.0, 7.0]) and math.isnan(values[2])
    assert perplexity([]).numel() == 0
    with pytest.raises(ValueError, match=r"loss=-0.5 is negative.*\[0, inf\)"):
        perplexity([1.0, -0.5])


def test_lengths():
    assert row_lengths([[1], [], [1, 2, 3]]).tolist() == [1.0, 0.0, 3.0]
    assert row_lengths([]).numel() == 0


def test_rarity_equals_word_rarity_and_does_not_depend_on_neighbours():
    rows = [[1, 1, 2], [3], [], [1, 2, 3]]
    counts = token_counts(rows)
    assert counts == {1: 3, 2: 2, 3: 2}
    together = rarity_under(rows, counts=counts)
    assert torch.equal(together, word_rarity(rows))
    assert torch.equal(together, torch.cat([rarity_under([row], counts=counts) for row in rows]))
    assert together[1].item() == pytest.approx(math.log(7 / 2))
    assert together[2].item() == 0.0
    assert rarity_under([[5, 5]], counts={5: 9}).tolist() == [0.0]
    assert token_counts([]) == {} and rarity_under([], counts={}).numel() == 0


@pytest.mark.parametrize(("counts", "message"), [({1: 1}, "counts has no token 2"), ({1: 0, 2: 1}, "at least 1")])
def test_rarity_refuses(counts, message):
    with pytest.raises(ValueError, match=message):
        rarity_under([[1, 2]], counts=counts)


def test_instruct_mining_by_hand():
    given = dict.fromkeys(INDICATORS, [0.0])
    assert instruct_mining(given).tolist() == [0.0274]
    given = dict.fromkeys(INDICATORS, [1.0])
    assert instruct_mining(given).item() == pytest.approx(0.0274 - 0.0078 + 0.4421 - 0.3212 - 0.1520)
    first = {"reward": [1.0, 1.0], "length": [100.0, 0.0], "knn6": [0.5, 0.5]}
    assert instruct_mining(first, coefficients=INSTRUCT_MINING_V1).tolist() == pytest.approx([0.460357, 0.4521])
    assert instruct_mining({"x": [1.0, 3.0]}, coefficients={"x": 2.0}).tolist() == [2.0, 6.0]


def test_instruct_mining_ranks_and_treats_equals_equally():
    reward = {**dict.fromkeys(INDICATORS, [0.5] * 3), "reward": [2.0, -1.0, 2.0]}
    scores = instruct_mining(reward)
    assert scores[0] == scores[2] < scores[1]  # a higher reward predicts a lower loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": [NAN, 1.0]}, "reward has 1 NaN"),
        ({"reward": [1.0]}, "different lengths"),
        ({"extra": [1.0, 1.0]}, "do not fit"),
        ({name: [] for name in INDICATORS}, "at least one"),
    ],
)
def test_instruct_mining_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        instruct_mining({**dict.fromkeys(INDICATORS, [1.0, 2.0]), **change})
    with pytest.raises(ValueError, match="do not fit"):
        instruct_mining({}, coefficients={"intercept": 1.0})


def test_judge_threshold_is_inclusive():
    assert keep_by_judge([0.0, 4.49, 4.5, 5.0]).tolist() == [False, False, True, True]
    assert keep_by_judge([3.0, 3.0], threshold=3.0).tolist() == [True, True]
    assert keep_by_judge([3.0, 3.0], threshold=5.0).tolist() == [False, False]
    assert keep_by_judge([0.2, 1.0], threshold=0.5, highest=1.0).tolist() == [False, True]


@pytest.mark.parametrize(
    ("ratings", "options", "message"),
    [
        ([], {}, "at least one"),
        ([NAN], {}, "1 NaN"),
        ([1.0, 9.0], {}, r"ratings\[1\]=9.0 is outside \[0.0, 5.0\]"),
        ([1.0], {"threshold": 6.0}, r"threshold=6.0 is outside \[0.0, 5.0\]"),
    ],
)
def test_judge_refuses(ratings, options, message):
    with pytest.raises(ValueError, match=message):
        keep_by_judge(ratings, **options)


def test_top_k_breaks_ties_by_row():
    assert keep_top([1.0, 1.0, 1.0], 2).tolist() == [True, True, False]
    assert keep_top([1.0, 2.0], 0).tolist() == [False, False]
    assert keep_top([1.0, 2.0], 2).tolist() == [True, True]
    with pytest.raises(ValueError, match=r"count=3 exceeds the 2 rows"):
        keep_top([1.0, 2.0], 3)
    with pytest.raises(ValueError, match="NaN"):
        keep_top([NAN], 1)


def test_kept_shares():
    assert kept_shares([True, False, False, True], ["a", "b", "a", "a"]) == {"a": pytest.approx(2 / 3), "b": 0.0}
    assert kept_shares([], []) == {}
    with pytest.raises(ValueError, match="1 rows and groups has 2"):
        kept_shares([True], ["a", "b"])


# --- the cached column ----------------------------------------------------------------------------------------------


class Counting:
    """Twice `x`; counts the rows it saw, and may be interrupted before a row."""

    def __init__(self, stop_at=None):
        self.rows, self.stop_at = [], stop_at

    def __call__(self, batch):
        if self.stop_at in batch["x"]:
            raise KeyboardInterrupt
        self.rows += batch["x"]
        return [2.0 * x for x in batch["x"]]


def numbers(size=10):
    return Dataset.from_dict({"x": list(range(size)), "other": ["a"] * size})


def score(dataset, function, folder, **options):
    settings = {"fingerprint": "twice", "columns": ["x"], "shard_size": 3, "batch_size": 2, "progress": False}
    return add_score(dataset, "s", function, cache_dir=folder, **{**settings, **options})


def test_column_and_fingerprint_are_added(tmp_path):
    found = score(numbers(), Counting(), tmp_path)
    assert found.column_names == ["x", "other", "s", "s_fingerprint"]
    assert found["s"][:] == [2.0 * x for x in range(10)]
    assert len(set(found["s_fingerprint"])) == 10


def test_interrupted_scoring_resumes_from_finished_shards(tmp_path):
    first = Counting(stop_at=7)  # in the third shard, rows 6 to 8
    with pytest.raises(KeyboardInterrupt):
        score(numbers(), first, tmp_path)
    assert first.rows == [0, 1, 2, 3, 4, 5]
    second = Counting()
    resumed = score(numbers(), second, tmp_path)
    assert second.rows == [6, 7, 8, 9]
    whole = score(numbers(), Counting(), tmp_path / "elsewhere")
    assert resumed[:] == whole[:]


def test_a_failing_scorer_leaves_no_half_shard(tmp_path):
    with pytest.raises(ValueError, match=r"shape \(1,\) for 2 rows"):
        score(numbers(), lambda batch: [1.0], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_second_call_scores_nothing(tmp_path):
    scored = score(numbers(), Counting(), tmp_path)
    again = Counting()
    assert score(scored, again, tmp_path / "empty") is scored
    assert score(numbers(), again, tmp_path)["s"][:] == scored["s"][:]
    assert again.rows == []


def test_fingerprint_survives_shuffle_filter_and_concatenation(tmp_path):
    scored = score(numbers(), Counting(), tmp_path)
    moved = concatenate_datasets([scored.shuffle(seed=0), scored.select([3, 1])])
    again = Counting()
    assert score(moved, again, tmp_path) is moved and again.rows == []
    assert moved["s"][:] == [2.0 * x for x in moved["x"]]


def test_only_new_shards_are_scored_when_rows_are_appended(tmp_path):
    score(numbers(9), Counting(), tmp_path)
    more = Counting()
    score(numbers(12), more, tmp_path)
    assert more.rows == [9, 10, 11]


def test_columns_that_are_not_read_do_not_matter(tmp_path):
    score(numbers(), Counting(), tmp_path)
    again = Counting()
    score(numbers().remove_columns("other"), again, tmp_path)
    assert again.rows == []


def test_another_fingerprint_is_refused(tmp_path):
    scored = score(numbers(), Counting(), tmp_path)
    with pytest.raises(MismatchError, match="another fingerprint in row 0.*overwrite=True"):
        score(scored, Counting(), tmp_path, fingerprint="thrice")
    changed = scored.map(lambda row: {"x": row["x"] + (row["x"] == 4)})
    with pytest.raises(MismatchError, match="in row 4"):
        score(changed, Counting(), tmp_path)
    replaced = score(changed, Counting(), tmp_path, overwrite=True)
    assert replaced["s"][4] == 10.0
    assert replaced.column_names == ["x", "other", "s", "s_fingerprint"]


@pytest.mark.parametrize("column", ["s", "s_fingerprint"])
def test_a_column_of_unknown_origin_is_refused(tmp_path, column):
    dataset = numbers().add_column(column, [1.0] * 10)
    with pytest.raises(MismatchError, match=f"'{column}' exists without its partner"):
        score(dataset, Counting(), tmp_path)
    assert score(dataset, Counting(), tmp_path, overwrite=True)["s"][9] == 18.0


def test_nan_is_named_or_kept(tmp_path):
    def fails(batch):
        return [NAN if x == 5 else float(x) for x in batch["x"]]

    with pytest.raises(ValueError, match="score of row 5 is NaN"):
        score(numbers(), fails, tmp_path)
    kept = score(numbers(), fails, tmp_path, nan="keep")
    assert math.isnan(kept["s"][5]) and kept["s"][6] == 6.0
    with pytest.raises(ValueError, match="score of row 5 is NaN"):
        score(numbers(), fails, tmp_path)  # not even from the cache


def test_all_equal_scores(tmp_path):
    assert set(score(numbers(), lambda batch: torch.ones(len(batch["x"])), tmp_path)["s"]) == {1.0}


@pytest.mark.parametrize(("content", "message"), [("[1.0, ", "is damaged"), ("[1.0]", "does not hold 3 scores")])
def test_a_damaged_shard_is_named(tmp_path, content, message):
    score(numbers(3), Counting(), tmp_path)
    (shard,) = tmp_path.iterdir()
    shard.write_text(content)
    with pytest.raises(ValueError, match=f"{shard.name} {message}.*Delete it"):
        score(numbers(3), Counting(), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"shard_size": 1.5}, "shard_size=1.5"),
        ({"nan": "drop"}, "nan='drop'"),
        ({"fingerprint": None}, "needs fingerprint="),
        ({"columns": ["y"]}, r"no column \['y'\]"),
        ({"columns": []}, "leaves nothing"),
    ],
)
def test_arguments_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        score(numbers(), Counting(), tmp_path, **options)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (numbers(0), "no row"),
        ({"train": numbers()}, "dataset is a dict"),
        (IterableDataset.from_generator(lambda: iter(())), "not streaming"),
    ],
)
def test_datasets_are_checked(tmp_path, dataset, message):
    with pytest.raises(ValueError, match=message):
        score(dataset, Counting(), tmp_path)


def test_name_and_function_are_checked(tmp_path):
    with pytest.raises(ValueError, match="name=''"):
        add_score(numbers(), "", Counting(), fingerprint="f", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="score_fn=3"):
        add_score(numbers(), "s", 3, fingerprint="f", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="knows its fingerprint"):
        add_score(numbers(), "s", ColumnScore(row_lengths, ["other"]), fingerprint="f", cache_dir=tmp_path)


def test_one_bar_over_the_rows(tmp_path, capfd):
    score(numbers(), Counting(), tmp_path, progress=True)
    shown = capfd.readouterr().err
    assert "Scoring s: 100%" in shown and "10/10" in shown
    score(numbers(), Counting(), tmp_path, progress=False)
    assert "Scoring" not in capfd.readouterr().err


# --- scorers --------------------------------------------------------------------------------------------------------


def by_hand(model, ids, labels=None):
    """Mean loss of one row alone."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    wanted = [(place, token) for place, token in enumerate(labels or ids) if place and token != -100]
    return -sum(logits[place - 1, token].item() for place, token in wanted) / len(wanted)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_qwen3])
def test_model_loss_and_perplexity_by_hand(tmp_path, build):
    model = build().train()
    rows = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    labels = [[-100, -100, 7, 8, 9], [10, 11], [12, -100, 14]]
    dataset = Dataset.from_dict({"input_ids": rows, "labels": labels})
    with torch.no_grad():
        expected = [by_hand(model.eval(), ids, wanted) for ids, wanted in zip(rows, labels, strict=True)]
    model.train()
    found = add_score(dataset, "loss", ModelScore(model), cache_dir=tmp_path, progress=False)
    assert found["loss"][:] == pytest.approx(expected, abs=1e-5)
    assert model.training
    found = add_score(found, "ppl", ModelScore(model, "perplexity"), cache_dir=tmp_path, progress=False)
    assert found["ppl"][:] == pytest.approx([math.exp(loss) for loss in expected], rel=1e-5)


def test_model_loss_without_labels_ignores_padding_of_the_dataset(tmp_path):
    model = tiny_gpt2()
    dataset = Dataset.from_dict(
        {"input_ids": [[0, 0, 5, 6, 7], [5, 6, 7, 0, 0]], "attention_mask": [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]}
    )
    found = add_score(dataset, "loss", ModelScore(model), cache_dir=tmp_path, progress=False)
    with torch.no_grad():
        assert found["loss"][:] == pytest.approx([by_hand(model, [5, 6, 7])] * 2, abs=1e-5)


@pytest.mark.parametrize("row", [[], [5]])
def test_a_row_without_a_labelled_token_has_no_loss(tmp_path, row):
    dataset = Dataset.from_dict({"input_ids": [[5, 6], row]})
    with pytest.raises(ValueError, match="row 1 is NaN"):
        add_score(dataset, "loss", ModelScore(tiny_qwen3()), cache_dir=tmp_path, progress=False)


def test_a_row_whose_labels_do_not_fit_is_refused(tmp_path):
    dataset = Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[5]]})
    with pytest.raises(ValueError, match="'input_ids': 2, 'labels': 1.*one entry in each"):
        add_score(dataset, "loss", ModelScore(tiny_qwen3()), cache_dir=tmp_path, progress=False)


def test_fingerprint_survives_the_disk_and_a_format(tmp_path):
    scored = score(numbers().with_format("torch"), Counting(), tmp_path / "scores")
    scored.save_to_disk(tmp_path / "saved")
    loaded, again = Dataset.load_from_disk(tmp_path / "saved"), Counting()
    assert score(loaded, again, tmp_path / "scores") is loaded and again.rows == []


def test_another_model_has_another_fingerprint(tmp_path):
    assert model_fingerprint(tiny_qwen3(0)) == model_fingerprint(tiny_qwen3(0))
    assert model_fingerprint(tiny_qwen3(0)) != model_fingerprint(tiny_qwen3(1))
    assert model_fingerprint(tiny_qwen3(0)) != model_fingerprint(tiny_qwen3(0).to(torch.bfloat16))
    dataset = lm_dataset(4)
    scored = add_score(dataset, "loss", ModelScore(tiny_qwen3(0)), cache_dir=tmp_path, progress=False)
    assert add_score(scored, "loss", ModelScore(tiny_qwen3(0)), cache_dir=tmp_path) is scored
    with pytest.raises(MismatchError):
        add_score(scored, "loss", ModelScore(tiny_qwen3(1)), cache_dir=tmp_path)


def test_column_scores(tmp_path):
    dataset = Dataset.from_dict({"input_ids": [[1, 2], [1], [3, 3, 3]], "rate": [0.5, 0.0, 1.0]})
    settings = {"cache_dir": tmp_path, "batch_size": 1, "progress": False}
    counts = token_counts(dataset["input_ids"])
    rarity = ColumnScore(rarity_under, ["input_ids"], counts=counts)
    dataset = add_score(dataset, "length", ColumnScore(row_lengths, ["input_ids"]), **settings)
    dataset = add_score(dataset, "rarity", rarity, **settings)
    dataset = add_score(dataset, "gain", ColumnScore(learnability, ["rate"]), **settings)
    assert dataset["length"][:] == [2.0, 1.0, 3.0]
    assert dataset["rarity"][:] == word_rarity(dataset["input_ids"][:]).tolist()
    assert dataset["gain"][:] == [0.25, 0.0, 0.0]
    assert ColumnScore(rarity_under, ["input_ids"], counts={1: 9}).fingerprint() != rarity.fingerprint()


def test_column_score_of_named_indicators(tmp_path):
    dataset = Dataset.from_dict({f"{name}_score": [1.0, 0.0] for name in INDICATORS})
    scorer = ColumnScore(instruct_mining, {name: f"{name}_score" for name in INDICATORS})
    found = add_score(dataset, "im", scorer, cache_dir=tmp_path, progress=False)
    assert found["im"][:] == pytest.approx([-0.0115, 0.0274])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ColumnScore(lambda rows: rows, ["x"]), "Define the function in a module"),
        (lambda: ColumnScore(word_rarity, ["x"]), "depends on all rows"),
        (lambda: ColumnScore(row_lengths, "x"), "must be a list of names"),
        (lambda: ColumnScore(row_lengths, []), "must be a list of names"),
        (lambda: ColumnScore(row_lengths, ["x"], bad=object()), "are no JSON"),
        (lambda: ColumnScore(row_lengths, ["y"]).columns_in(["x"]), r"no column \['y'\]"),
        (lambda: ModelScore(None, "bits"), "kind='bits'"),
        (lambda: ModelScore(None).columns_in(["text"]), r"no column \['input_ids'\]"),
    ],
)
def test_scorers_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_class_of_ones_own_is_not_taken_for_the_one_whose_name_it_has():
    model = tiny_qwen3(0)

    class Twice(ModelScore):
        """The same model and kind, and other numbers."""

    fork = type(type(model).__name__, (type(model),), {"__module__": __name__})
    other = fork(model.config)
    other.load_state_dict(model.state_dict())
    found = [scorer.fingerprint() for scorer in (ModelScore(model), Twice(model), ModelScore(other))]
    assert len(set(found)) == 3 and found[0] == ModelScore(tiny_qwen3(0)).fingerprint()
