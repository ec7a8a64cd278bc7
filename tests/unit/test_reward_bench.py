"""RewardBench 2: credits and the score of ties by hand, with the code of its authors worked through on paper."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification

from hf_effi.errors import BrokenFileError, MismatchError, RefusedError
from hf_effi.functional.rewards import best_of_credit, ties_score
from hf_effi.recipes import evaluate_reward_model
from tests.helpers import tiny_tokenizer
from tests.helpers.tokenizer import PAD_ID, VOCAB_SIZE


def test_credit_by_hand() -> None:
    assert best_of_credit([2, 1, 0, 1]) == 1.0 and best_of_credit([1, 2, 0, 0]) == 0.0
    assert best_of_credit([1, 1, 0, 1]) == pytest.approx(1 / 3) and best_of_credit([1, 1, 1, 1]) == 0.25
    assert best_of_credit([2, 1, 2, 0], 2) == 0.5 and best_of_credit([0, 2, 1], 2) == 1.0
    for wrong in (([1.0], 1), ([1.0, 0.0], 0), ([1.0, 0.0], 2), ([1.0, 0.0], True), ([math.nan, 0.0], 1)):
        with pytest.raises(ValueError):
            best_of_credit(*wrong)


def test_ties_by_hand() -> None:
    tied = {
        "1": ([3.0, 2.5, 1.0], 2),  # gap 1.5, spread 0.5
        "2": ([3.0, 1.0, 0.5], 2),  # gap 0.5, spread 2
        "3": ([1.0, 0.0, 0.5], 2),  # gap -0.5, spread 1
        "4": ([5.0, 5.0, 1.0], 2),  # without a reference
    }
    reference = {"1": ([1.2, 1.0], 1), "2": ([4.0, 1.0], 1), "3": ([0.0, 1.0], 1), "9": ([1.0, 0.0], 1)}
    found = ties_score(tied, reference)
    assert found.tied_accuracy == 3 / 4 and found.reference_accuracy == 3 / 4 and found.pairs == 3
    assert found.margin_preferred == pytest.approx(1 / 3) and found.margin_preferred_hard == 0.0
    margins = [math.tanh(0.2 / 0.5 - 1), math.tanh(0.5 / 2 - 1), math.tanh(-1.0 / 1 - 1)]
    assert found.margin == pytest.approx(sum(margins) / 3)
    assert found.score == pytest.approx(0.3 * 0.75 + 0.3 * 0.75 + 0.2 / 3 + 0.01 * sum(margins) / 3)
    assert ties_score(tied, reference, (1, 0, 0, 0, 0)).score == 0.75


def test_equal_right_answers_are_the_limit() -> None:
    def margin(gap: float) -> float:
        return ties_score({"1": ([1.0, 1.0, 1.0 - gap], 2)}, {"1": ([9.0, 0.0], 1)}).margin

    assert (margin(0.5), margin(0.0), margin(-0.5)) == (1.0, 0.0, -1.0)


@pytest.mark.parametrize(
    ("tied", "reference", "weights", "match"),
    [
        ({"1": ([1.0, 0.0], 1)}, {"1": ([1.0, 0.0], 1)}, None, "has one right answer"),
        ({"1": ([1.0, 1.0, 0.0], 2)}, {"2": ([1.0, 0.0], 1)}, None, "has a reference of the same name"),
        ({}, {}, None, "has a reference of the same name"),
        ({"1": ([1.0, 1.0, 0.0], 2)}, {"1": ([1.0, 0.0], 1)}, (1, 0), "must be 5 numbers"),
    ],
)
def test_ties_that_cannot_be_scored(tied, reference, weights, match) -> None:
    with pytest.raises(ValueError, match=match):
        ties_score(tied, reference, *([] if weights is None else [weights]))


# --- over a model --------------------------------------------------------------------------------------------------


def reward_model(num_labels: int = 1, seed: int = 0) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_labels=num_labels,
            pad_token_id=None,
        )
    )


ROWS: list[dict[str, Any]] = [
    {"id": "1", "prompt": "1+1?", "chosen": ["2"], "rejected": ["3", "fifty", "none of them"], "subset": "Math"},
    {"id": "2", "prompt": "2+2?", "chosen": ["four"], "rejected": ["3", "1", "no"], "subset": "Math"},
    {"id": "3", "prompt": "how?", "chosen": ["so"], "rejected": ["a", "b", "see"], "subset": "Focus"},
    {"id": "ref:7", "prompt": "a colour?", "chosen": ["red"], "rejected": ["one", "two"], "subset": "Ties"},
    {"id": "tied:7", "prompt": "colours?", "chosen": ["red", "blue"], "rejected": ["one", "two"], "subset": "Ties"},
]


def slow_scores(model: Any, row: dict[str, Any]) -> list[float]:
    """One answer, one forward, no padding."""
    found = []
    for answer in [*row["chosen"], *row["rejected"]]:
        chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
        ids = tiny_tokenizer().apply_chat_template(chat, return_dict=True)["input_ids"]
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            found.append(float(model.score(hidden)))
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_it_is_a_slow_loop_whatever_the_batch(batch_size) -> None:
    model = reward_model().train()
    result = evaluate_reward_model(model, Dataset.from_list(ROWS), tiny_tokenizer(), batch_size=batch_size)
    scores = {row["id"]: slow_scores(model, row) for row in ROWS}
    math_score = (best_of_credit(scores["1"]) + best_of_credit(scores["2"])) / 2
    ties = ties_score({"7": (scores["tied:7"], 2)}, {"7": (scores["ref:7"], 1)})
    assert result.subsets["Math"] == math_score and result.subsets["Focus"] == best_of_credit(scores["3"])
    assert result.ties.score == pytest.approx(ties.score, abs=1e-5) == pytest.approx(result.subsets["Ties"])
    assert result.counts == {"Math": 2, "Focus": 1, "Ties": 2} and result.scored == 19 and result.truncated == 0
    assert result.overall == pytest.approx(sum(result.subsets.values()) / 3)
    assert model.training and model.config.pad_token_id is None


def test_a_folder_and_a_stream(tmp_path) -> None:
    reward_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    assert evaluate_reward_model(str(tmp_path), stream) == evaluate_reward_model(
        reward_model(), ROWS, tiny_tokenizer()
    )


def test_started_again_it_scores_the_rest(tmp_path) -> None:
    path, model = tmp_path / "scores.jsonl", reward_model()
    whole = evaluate_reward_model(model, ROWS, tiny_tokenizer())

    def broken():
        yield from ROWS[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_reward_model(model, broken(), tiny_tokenizer(), batch_size=1, scores_file=path)
    assert len(path.read_text().splitlines()) == 3
    path.write_text(path.read_text() + '{"id": "3", "sco')  # ended while it wrote
    rest = evaluate_reward_model(model, ROWS, tiny_tokenizer(), scores_file=path)
    assert rest.scored == 11 and rest.subsets == pytest.approx(whole.subsets)
    assert evaluate_reward_model(model, ROWS, tiny_tokenizer(), scores_file=path).scored == 0
    with pytest.raises(MismatchError, match="another model"):
        evaluate_reward_model(reward_model(seed=1), ROWS, tiny_tokenizer(), scores_file=path)
    with pytest.raises(MismatchError, match="other answers to row '1'"):
        evaluate_reward_model(model, [{**ROWS[0], "chosen": ["two"]}], tiny_tokenizer(), scores_file=path)
    path.write_text(json.dumps({"schema": 1}) + "\nnonsense\n")
    with pytest.raises(BrokenFileError, match="is damaged"):
        evaluate_reward_model(model, ROWS, tiny_tokenizer(), scores_file=path)


def test_what_is_cut_off_is_counted_and_a_render_of_ones_own() -> None:
    short = evaluate_reward_model(
        reward_model(), ROWS[:3], tiny_tokenizer(), max_length=8, render=lambda p, a: f"{p}{a}"
    )
    assert short.truncated == 2  # "1+1?fifty" and "1+1?none of them"
    as_others = evaluate_reward_model(reward_model(), ROWS, tiny_tokenizer(), ties=None)
    assert as_others.ties is None and as_others.counts["Ties"] == 2


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"id": None}, "row 0 has no id"),
        ({"chosen": "2"}, "'chosen' must be a list"),
        ({"rejected": []}, "'rejected' must be a list"),
        ({"subset": "ties"}, "its id must be 'tied:<name>'"),
    ],
)
def test_rows_of_another_form(row, match) -> None:
    with pytest.raises(ValueError, match=match):
        evaluate_reward_model(reward_model(), [{**ROWS[0], **row}], tiny_tokenizer())


def test_models_and_settings_that_do_not_fit() -> None:
    bare = tiny_tokenizer(fresh=True)
    bare.chat_template = None
    with pytest.raises(RefusedError, match="no chat template"):
        evaluate_reward_model(reward_model(), ROWS, bare)
    with pytest.raises(RefusedError, match="has 2 labels"):
        evaluate_reward_model(reward_model(2), ROWS, tiny_tokenizer())
    with pytest.raises(ValueError, match="needs tokenizer="):
        evaluate_reward_model(reward_model(), ROWS)
    with pytest.raises(ValueError, match="there are no rows"):
        evaluate_reward_model(reward_model(), [], tiny_tokenizer())
    for name in ("batch_size", "max_length"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            evaluate_reward_model(reward_model(), ROWS, tiny_tokenizer(), **{name: 0})
    assert PAD_ID == tiny_tokenizer().pad_token_id
    bare.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        evaluate_reward_model(reward_model(), ROWS, bare)
