"""`check_reward`: each rule is shown on a reward function that has the fault, and none on one that has none."""

from __future__ import annotations

import importlib
import json
import random
import re
import time

import pytest

from hf_effi import rewards
from hf_effi.cli import main
from hf_effi.report import check_reward, reward_check
from hf_effi.report.reward_probes import make_probes, wrong_answer

ROWS = [{"prompt": f"What is {a}+{b}?", "answer": str(a + b)} for a in range(10, 14) for b in range(20, 22)]


def per_row(score):
    """Return a reward function that scores each text with its row's answer."""

    def reward(completions, answer, **kwargs):
        return [score(text, right) for text, right in zip(completions, answer, strict=True)]

    return reward


def marked(text, right):
    found = re.findall(r"^#### (\S+)$", text, re.MULTILINE)
    return float(len(set(found)) == 1 and found[0] == right)


def good(completions, answer, **kwargs):
    return [marked(text, right) for text, right in zip(completions, answer, strict=True)]


@pytest.fixture(autouse=True)
def _short_long_text(monkeypatch):
    """A megabyte for each rule costs more than all the rest; one test uses it."""
    monkeypatch.setattr(reward_check, "_LONG", 20_000)


def rules(reward, rows=ROWS, **arguments):
    return {one.rule: one for one in check_reward(reward, rows, **{"other_process": False, **arguments}).findings}


def test_nothing_is_said_of_a_good_one():
    report = check_reward(good, ROWS, other_process=False)
    assert report.form == "hash" and not report.findings, str(report)
    assert "no problem was found" in str(report) and 0 < report.seconds_per_completion < 1
    table = {row["kind"]: row for row in report.table}
    assert table["right"]["mean"] == 1 and table["wrong"]["as_good"] == table["swapped"]["as_good"] == 0


def slow(completions, **kwargs):
    time.sleep(0.011 * len(completions))
    return good(completions, **kwargs)


def by_place(completions, answer, **kwargs):
    return [value + place / 1000 for place, value in enumerate(good(completions, answer))]


def mean_of_batch(completions, answer, **kwargs):
    values = good(completions, answer)
    return [value - sum(values) / len(values) for value in values]


def counting(completions, answer, calls=[], **kwargs):  # noqa: B006
    calls.append(1)
    return [value + len(calls) / 1000 for value in good(completions, answer)]


def clearing(completions, answer, **kwargs):
    values = good(completions, answer)
    completions.clear()
    return values


def last_number(text, right):
    return float((re.findall(r"\d+", text) or [None])[-1] == right)


#: rule -> reward function that breaks it
BROKEN = {
    "rewards_wrong": per_row(lambda text, right: float(bool(re.search(r"#### \d+", text)))),
    "ignores_the_row": per_row(lambda text, right: float(text.strip() in {row["answer"] for row in ROWS})),
    "rewards_empty": per_row(lambda text, right: float(not text.strip() or text == right)),
    "rewards_truncated": per_row(lambda text, right: float(bool(text) and right.startswith(text))),
    "rewards_copies": per_row(lambda text, right: float(text.startswith("What is") or text == right)),
    "rewards_parts": per_row(lambda text, right: float(right in text)),
    "rewards_guesses": per_row(lambda text, right: float(right in re.findall(r"\d+", text))),
    "reads_one_of_two": per_row(last_number),
    "never_varies": per_row(lambda text, right: 0.5),
    "right_is_not_better": per_row(lambda text, right: -marked(text, right)),
    "never_applies": per_row(lambda text, right: None),
    "none_for_bad": per_row(lambda text, right: marked(text, right) if "####" in text else None),
    "partial_credit": per_row(lambda text, right: 0.2 * bool(re.search(r"#### \d", text)) + marked(text, right)),
    "depends_on_length": per_row(lambda text, right: marked(text, right) / (1 + len(text) / 100)),
    "strange_text": per_row(lambda text, right: marked(text, right) * text.isascii()),
    "misses_right": per_row(lambda text, right: marked(text, right) * (right != "30")),
    "does_not_apply": per_row(lambda text, right: None if right == "30" else marked(text, right)),
    "raises": per_row(lambda text, right: float(text.split("####")[1].strip() == right)),
    "not_repeatable": per_row(lambda text, right: random.random()),
    "depends_on_order": by_place,
    "depends_on_batch": mean_of_batch,
    "changes_arguments": clearing,
    "slow": slow,
}


#: those that reward no form more than another
NEEDS_TEMPLATE = {"right_is_not_better", "depends_on_batch"}


@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_on_what_breaks_it(rule):
    found = rules(BROKEN[rule], template="Let me think.\n#### {answer}" if rule in NEEDS_TEMPLATE else None)
    assert rule in found, sorted(found)
    assert str(found[rule]).endswith(".") and len(str(found[rule])) > 40


def test_state_between_calls():
    assert "not_repeatable" in rules(counting)


#: in a file of its own, so that the other process imports nothing else
LIGHT = """
def exact(completions, answer, trainer_state, **kwargs):
    assert trainer_state.global_step == 0
    return [float(text == right) for text, right in zip(completions, answer)]


def by_hash(completions, answer, **kwargs):
    return [float(text == right) + hash(text) % 100 / 1e4 for text, right in zip(completions, answer)]
"""


def test_another_process_has_another_hash_seed(tmp_path, monkeypatch):
    (tmp_path / "light_rewards_of_a_test.py").write_text(LIGHT)
    monkeypatch.syspath_prepend(tmp_path)
    light = importlib.import_module("light_rewards_of_a_test")
    assert not {"one_process", "depends_on_process"} & set(rules(light.exact, other_process=True))
    assert "depends_on_process" in rules(light.by_hash, other_process=True)
    local = rules(lambda completions, answer, **kw: light.exact(completions, answer, **kw), other_process=True)
    assert local["one_process"].severity == "note" and "cannot be pickled" in str(local["one_process"])


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
    "required": ["a", "b"],
}
#: column of the answer -> rewards of ours that read it
OURS = {
    "answer": [rewards.last_number_reward, rewards.strict_number_reward],
    "solution": [rewards.math_reward, rewards.strict_math_reward],
    "letter": [rewards.ChoiceReward("letter"), rewards.ChoiceReward("letter", strict=True)],
    "word": [
        rewards.ExactMatchReward("word", within_tag="answer"),
        rewards.NormalizedMatchReward("word"),
        rewards.TokenF1Reward("word"),
    ],
    "json": [rewards.JSONReward(SCHEMA, column="json")],
}


@pytest.mark.parametrize(("column", "reward"), [(column, one) for column, given in OURS.items() for one in given])
def test_our_own_rewards_have_no_problem(column, reward):
    rows = [
        {
            **row,
            "solution": row["answer"],
            "letter": "ABCD"[number % 4],
            "word": ["Paris", "Rome", "New York", "Oslo"][number % 4],
            "json": json.dumps({"a": number, "b": f"x{number}"}),
        }
        for number, row in enumerate(ROWS)
    ]
    template = "{answer}" if column == "json" else None
    report = check_reward(reward, rows, answer=column, template=template, other_process=False)
    assert not report.problems, str(report)
    # What stands behind a mark, in a tag or in a box is not one of several answers.
    strict = getattr(reward, "strict", False)
    assert not strict or report.findings == [], str(report)


def test_a_quadratic_pattern_is_seen(monkeypatch):
    monkeypatch.setattr(reward_check, "_LONG", 1_000_000)

    def quadratic(text, right):
        if len(text) > 500_000:  # stands for a pattern with two stars
            time.sleep(1.1)
        return marked(text, right)

    assert "slow_on_long" in rules(per_row(quadratic))


def test_what_returns_no_rewards_is_said_once():
    for broken in (
        lambda completions, **kw: None,
        lambda completions, **kw: ["a"] * len(completions),
        lambda **kw: 1 / 0,
    ):
        report = check_reward(broken, ROWS, other_process=False)
        assert [one.rule for one in report.findings] == ["raises"] and "nothing else was looked at" in str(report)


def test_messages_asynchronous_functions_and_token_ids():
    seen = {}

    async def reward(prompts, completions, completion_ids, answer, trainer_state, log_metric, **kwargs):
        seen["ids"] = completion_ids[0]
        log_metric("share", 1.0)
        assert trainer_state.global_step == 0
        return [marked(one[-1]["content"], right) for one, right in zip(completions, answer, strict=True)]

    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": int(row["answer"])} for row in ROWS]
    rows = [{**row, "answer": str(row["answer"])} for row in rows]
    assert not rules(reward, rows) and all(0 <= one < 256 for one in seen["ids"])


def test_whole_completions_and_templates():
    rows = [{**row, "solution": f"First {row['answer']}. #### {row['answer']}"} for row in ROWS]
    ends = per_row(lambda text, right: float(text.endswith(f"#### {right}")))
    assert check_reward(ends, rows, completion="solution", other_process=False).form == "solution"
    assert check_reward(good, ROWS, template="I say\n#### {answer}", other_process=False).problems == []
    found = rules(good, template="I say {answer}")
    assert "never_varies" in found and "--template" in str(found["never_varies"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"reward": 3}, "must be a function"),
        ({"rows": []}, "no rows"),
        ({"answer": "truth"}, "row 0 has no 'truth'; it has prompt, answer"),
        ({"template": "x"}, "must have {answer}"),
        ({"template": "{answer}", "completion": "prompt"}, "give one of them"),
        ({"rows": [{"prompt": "a", "answer": " "}]}, "is empty in all 1 rows"),
    ],
)
def test_wrong_arguments(arguments, said):
    given = {"reward": good, "rows": ROWS, **arguments}
    with pytest.raises((ValueError, TypeError), match=re.escape(said)):
        check_reward(given.pop("reward"), given.pop("rows"), **given)


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [("72", "73"), ("9.9", "9.10"), ("a1b", "a2b"), ("yes", "zft"), ("Z", "A"), ("", "x"), ("?", "?x")],
)
def test_a_wrong_answer_is_of_the_same_kind(answer, wrong):
    assert wrong_answer(answer) == wrong
    assert len(wrong_answer("9" * 100_000)) == 100_001


def test_probes_by_hand():
    probes = {one.kind: one for one in make_probes(["#12"], ["12"], "#{answer}", ["ask"])}
    assert {kind: one.texts for kind, one in probes.items() if kind not in ("long", "strange")} == {
        "right": ["#12"],
        "wrong": ["#13"],
        "longer answer": ["#125"],
        "swapped": [],  # there is no other answer
        "empty": [""],
        "blank": [" \n"],
        "truncated": ["#1"],
        "right then wrong": ["#12\n#13"],
        "wrong then right": ["#13\n#12"],
        "prompt": ["ask"],
    }
    of_text = {one.kind: one.texts for one in make_probes(["2 or 2."], ["2"], None, [""])}
    assert of_text["wrong"] == ["2 or 3."] and of_text["truncated"] == ["2 or "] and of_text["prompt"] == []


def test_command(tmp_path, capsys, monkeypatch):
    (tmp_path / "my_checked_rewards.py").write_text(
        "def fine(completions, answer, **kwargs):\n"
        "    return [float(text == right) for text, right in zip(completions, answer)]\n"
        "def part(completions, answer, **kwargs):\n"
        "    return [float(right in text) for text, right in zip(completions, answer)]\n"
        "number = 3\n"
    )
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({**row, "note": "a\u2028b"}, ensure_ascii=False) for row in ROWS))
    monkeypatch.chdir(tmp_path)
    assert main(["check-reward", "my_checked_rewards.fine", str(data)]) == 0
    assert "my_checked_rewards.fine: 8 rows" in capsys.readouterr().out
    assert main(["check-reward", "my_checked_rewards.part", str(data), "--json", "--rows", "4"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 4 and found["problems"] == 2
    for arguments, said in (
        (["my_checked_rewards.none", str(data)], "has no attribute"),
        (["my_checked_rewards.number", str(data)], "cannot be called"),
        (["no_such_module.x", str(data)], "No module named"),
        (["my_checked_rewards.fine", str(tmp_path / "none.jsonl")], "no such file"),
        (["my_checked_rewards.fine", str(data), "--answer", "truth"], "no column 'truth'"),
        (["my_checked_rewards.fine", str(data), "--rows", "1"], "--rows must be at least 2"),
    ):
        assert main(["check-reward", *arguments]) == 2
        assert said in capsys.readouterr().err
