"""Self-Critique: entropies, their similarity, the AUC and its interval, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hf_effi.data import SELF_CRITIQUE, ContaminationProbe, contamination_scores
from hf_effi.data.contamination import _followed_by
from hf_effi.functional.data import (
    ContaminationReport,
    auc,
    contamination_report,
    entropy_similarity,
    top_k_entropy,
)
from hf_effi.functional.doctor import diagnose
from hf_effi.functional.doctor_grpo import contaminated_evaluation
from hf_effi.functional.findings import GRPOLimits, RunFacts
from tests.helpers import tiny_qwen3, tiny_tokenizer

NAN = float("nan")


def similarity(one, two, **settings):
    return entropy_similarity(one, two, **{"min_tokens": 0, **settings})


def test_similarity_by_hand() -> None:
    assert similarity([1, 2, 3], [1, 2, 3]) == pytest.approx(1.0, abs=1e-12)
    by_hand = 5 / (math.sqrt(14) * math.sqrt(5)) * 2 / 3
    assert similarity([1, 2, 3], [1, 2]) == pytest.approx(by_hand) == pytest.approx(0.3984, abs=1e-4)
    assert similarity([1, 2], [1, 2, 3]) == similarity([1, 2, 3], [1, 2])
    assert similarity([1, 2], []) == similarity([], []) == 0.0
    assert similarity([1, 0], [0, 1]) == 0.0


def test_where_nothing_can_be_said_it_is_nan() -> None:
    assert math.isnan(similarity(None, [1.0])) and math.isnan(similarity([1.0], None))
    assert math.isnan(similarity([0.0, 0.0], [1.0, 1.0]))  # no direction
    assert math.isnan(entropy_similarity([1.0] * 8, [1.0] * 7))
    assert entropy_similarity([1.0] * 8, [1.0] * 8) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("one", "match"), [([[1.0]], "shape"), ([-1.0], "at least 0"), ([NAN], "finite"), ([math.inf], "finite")]
)
def test_entropies_that_are_none(one, match) -> None:
    with pytest.raises(ValueError, match=match):
        similarity(one, [1.0])


def test_entropy_of_the_likeliest_tokens_is_not_renormalised() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]).log()
    assert top_k_entropy(logits, 2)[0] == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(4))
    full = top_k_entropy(logits, None)
    assert full.tolist() == pytest.approx([1.0397, 0.0], abs=1e-4)
    assert torch.equal(top_k_entropy(logits, 50), full)
    with pytest.raises(ValueError, match="top_k=0"):
        top_k_entropy(logits, 0)


def test_auc_by_hand() -> None:
    assert auc([0.9, 0.8, 0.4], [0.3, 0.8]) == pytest.approx((2 + 1.5 + 1) / 6)
    assert auc([1.0, NAN], [1.0]) == 0.5 and auc([0.0], [1.0]) == 0.0
    assert math.isnan(auc([NAN], [1.0])) and math.isnan(auc([], [1.0]))


def test_report_and_its_interval() -> None:
    draws = torch.Generator().manual_seed(0)
    one, two = torch.randn(80, generator=draws) + 1, torch.randn(80, generator=draws)
    report = contamination_report(one, two)
    assert report.auc == auc(one, two) and report.low < report.auc < report.high
    # of two Gaussians one apart it is 0.76, with a standard error of 0.037 at 80 and 80
    assert report.low < 0.76 < report.high and 0.10 < report.high - report.low < 0.20
    assert contamination_report(one, two) == report != contamination_report(one, two, seed=1)
    half = contamination_report(one, two, level=0.5)
    assert half.high - half.low < (report.high - report.low) / 2
    none = contamination_report([NAN, NAN], [1.0])
    assert math.isnan(none.auc) and (none.scored, none.reference, none.unscored) == (0, 1, 2)
    for wrong in ({"samples": 0}, {"level": 1.0}, {"level": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            contamination_report([1.0], [0.0], **wrong)


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (ContaminationReport(0.8, 0.6, 0.9, 8, 8), True),
        (ContaminationReport(0.8, 0.6, 0.9, 7, 8), False),
        (ContaminationReport(0.8, 0.6, 0.9, 8, 7), False),
        (ContaminationReport(0.59, 0.51, 0.7, 99, 99), False),
        (ContaminationReport(0.8, 0.5, 0.9, 8, 8), False),
        (ContaminationReport(NAN, NAN, NAN, 8, 8), False),
        (None, False),
    ],
)
def test_the_rule_needs_an_auc_an_interval_and_enough_prompts(report, said) -> None:
    facts = RunFacts(max_steps=10, contamination=report)
    found = diagnose([{"step": 10}], facts, GRPOLimits(), [contaminated_evaluation])
    assert bool(found) == said
    if said:
        assert "AUC 0.80 (0.60 to 0.90)" in str(found[0]) and found[0].step == 10
        assert not diagnose([], facts, GRPOLimits(contamination_auc=0.9), [contaminated_evaluation])


# --- with a model --------------------------------------------------------------------------------------------------

ASKED_AGAIN = "|{answer}|again:"


def slow_entropies(model, tokenizer, text: str, tokens: int) -> tuple[str, list[float]]:
    """One prompt, one forward per token."""
    ids, found, made = tokenizer(text)["input_ids"], [], []
    for _ in range(tokens):
        logits = model(input_ids=torch.tensor([ids + made])).logits[0, -1]
        found.append(float(top_k_entropy(logits, 5)))
        made.append(int(logits.argmax()))
        if made[-1] in model.generation_config.eos_token_id:
            break
    return tokenizer.decode(made, skip_special_tokens=True), found


@torch.no_grad()
def test_scores_are_those_of_a_slow_loop() -> None:
    model, tokenizer = tiny_qwen3(end_tokens=10).train(), tiny_tokenizer()
    prompts = ["abc?", "a longer one?", "z?"]
    settings = {"top_k": 5, "max_new_tokens": 6, "instruction": ASKED_AGAIN, "min_tokens": 0, "batch_size": 2}
    before = torch.get_rng_state()
    scores = contamination_scores(model, tokenizer, prompts, **settings)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    model.eval()
    for prompt, score in zip(prompts, scores.tolist(), strict=True):
        text, first = slow_entropies(model, tokenizer, prompt, 6)
        _, second = slow_entropies(model, tokenizer, prompt + ASKED_AGAIN.replace("{answer}", text), 12)
        assert score == pytest.approx(similarity(first, second), abs=1e-5)
    assert torch.isnan(contamination_scores(model, tokenizer, prompts, **{**settings, "min_tokens": 7})).all()


def test_messages_are_rendered() -> None:
    model, tokenizer = tiny_qwen3(), tiny_tokenizer()
    chat = [[{"role": "user", "content": "abc?"}]]
    text = tokenizer.apply_chat_template(chat[0], add_generation_prompt=True, tokenize=False)
    settings = {"max_new_tokens": 4, "min_tokens": 0}
    assert contamination_scores(model, tokenizer, chat, instruction="{answer}", **settings).shape == (1,)
    assert contamination_scores(model, tokenizer, [text], **settings).shape == (1,)
    bare = tiny_tokenizer(fresh=True)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        contamination_scores(model, bare, chat, **settings)
    parts = [[{"role": "user", "content": [{"type": "text", "text": "abc?"}]}]]
    with pytest.raises(ValueError, match="must have a text"):
        _followed_by(parts[0], "{answer}", "x")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"instruction": "again"}, "must have {answer} once"),
        ({"top_k": 0}, "top_k=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_settings_are_checked(settings, match) -> None:
    with pytest.raises(ValueError, match=match):
        contamination_scores(tiny_qwen3(), tiny_tokenizer(), ["a"], **settings)


def test_a_probe_needs_two_sides() -> None:
    assert SELF_CRITIQUE.count("{answer}") == 1
    for sides in ((["a"], ["b", "c"]), (["a", "b"], "cd")):
        with pytest.raises(ValueError, match="at least two prompts"):
            ContaminationProbe(tiny_tokenizer(), *sides)
    with pytest.raises(ValueError, match="no `generate`"):
        ContaminationProbe(tiny_tokenizer(), ["a", "b"], ["c", "d"])(torch.nn.Linear(1, 1))


def test_an_instruction_may_repeat_the_prompt():
    asked = _followed_by("1+1=", "{answer};{prompt}", "{prompt}2")
    assert asked == "1+1={prompt}2;1+1="
    messages = [{"role": "user", "content": "1+1="}]
    assert _followed_by(messages, " {answer} {prompt}", "2") == [{"role": "user", "content": "1+1= 2 1+1="}]
