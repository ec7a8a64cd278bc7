"""Golden tables of tags, constraints of IFEval and lengths; dispatch by a column."""

from __future__ import annotations

from typing import Any

import pytest
from trl.rewards import get_soft_overlong_punishment

from hf_effi.errors import RewardError
from hf_effi.functional.rewards import (
    INSTRUCTIONS,
    check_instruction,
    count_sentences,
    loose_forms,
    soft_overlong,
    tag_conditions,
)
from hf_effi.rewards import (
    InstructionReward,
    LastNumberReward,
    LengthMatchReward,
    Reward,
    SoftOverlongReward,
    TagFormatReward,
    VerifierReward,
    think_answer_format_reward,
    tulu_verifiers,
    verifier_reward,
)

# --- tags ------------------------------------------------------------------------------------------------------------

GOOD = "<think>2</think><answer>4</answer>"
#: text -> (reward, with only=True, the share of think, answer, apart and order)
TAGS = {
    GOOD: (1, 1, 1),
    "<think>2</think>\n\n<answer>4</answer>\n": (1, 1, 1),
    "<think>2</think> so <answer>4</answer>": (1, 0, 1),
    GOOD + " done": (1, 0, 1),
    "<answer>4</answer><think>2</think>": (0, 0, 3 / 4),
    "<think>2</think><answer>4": (0, 0, 1 / 4),
    "<think>2<answer>4</answer>": (0, 0, 1 / 4),
    "<think><answer>4</answer></think>": (0, 0, 2 / 4),
    "<think>1<answer>2</think>3</answer>": (0, 0, 2 / 4),
    GOOD + GOOD: (0, 0, 0),
    "<think>1</think>" + GOOD: (0, 0, 1 / 4),
    GOOD + "</answer>": (0, 0, 1 / 4),
    "<think></think><answer>4</answer>": (0, 0, 1 / 4),
    "<think> \n</think><answer>4</answer>": (0, 0, 1 / 4),
    "</think>2<think><answer>4</answer>": (0, 0, 1 / 4),
    "<Think>2</Think><answer>4</answer>": (0, 0, 1 / 4),
    "<think >2</think ><answer>4</answer>": (0, 0, 1 / 4),
    "2</think><answer>4</answer>": (0, 0, 1 / 4),
    "```\n" + GOOD + "\n```": (1, 0, 1),
    "": (0, 0, 0),
    "4": (0, 0, 0),
}


@pytest.mark.parametrize("text", TAGS)
def test_tags(text: str) -> None:
    reward, alone, share = TAGS[text]
    assert think_answer_format_reward(completions=[text]) == [reward]
    assert TagFormatReward(only=True)(completions=[text]) == [alone]
    assert TagFormatReward(partial=True)(completions=[text]) == [share]


def test_options_of_tags() -> None:
    assert TagFormatReward(order=False)(completions=["<answer>4</answer><think>2</think>"]) == [1.0]
    assert TagFormatReward(empty=True)(completions=["<think></think><answer>4</answer>"]) == [1.0]
    opened = TagFormatReward(opened=True, only=True)
    assert opened(completions=["2</think><answer>4</answer>", GOOD, " </think><answer>4</answer>"]) == [1.0, 0.0, 0.0]
    assert TagFormatReward(["a"])(completions=["<a>1</a>", "<a>1<a>"]) == [1.0, 0.0]
    assert tag_conditions("", ("a",), only=True) == {"a": False, "apart": False, "order": False, "only": False}
    for wrong, words in (
        ("think", "list of names"),
        ([], "list of names"),
        (["a", "a"], "each once"),
        (["<a>"], "brackets"),
    ):
        with pytest.raises(ValueError, match=words):
            TagFormatReward(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="order=1 must be True or False"):
        TagFormatReward(order=1)  # type: ignore[arg-type]


# --- constraints -----------------------------------------------------------------------------------------------------

LEAST, LESS = {"relation": "at least"}, {"relation": "less than"}
#: id -> arguments, texts that keep it, texts that do not
KEPT: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "keywords:existence": ({"keywords": ["sun", "Moon"]}, ["Sun and moon", "sunmoon"], ["sun", "moo", ""]),
    "keywords:frequency": ({"keyword": "la", "frequency": 2, **LEAST}, ["La la", "lalala"], ["la", ""]),
    "keywords:forbidden_words": ({"forbidden_words": ["cat", "C++"]}, ["category", "dog"], ["a Cat.", "(C++)"]),
    "keywords:letter_frequency": (
        {"letter": "E", "let_frequency": 3, "let_relation": "less than"}, ["eE", "x"], ["eee", "tree e"]
    ),
    "length_constraints:number_words": ({"num_words": 3, **LEAST}, ["a b c", "a-b c"], ["a b", "- . !", ""]),
    "length_constraints:number_sentences": (
        {"num_sentences": 2, **LESS}, ["One.", "One", "Dr. No has 3.5"], ["One. Two", "A? B!"],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2}, ["a\n***\nb", "***a***b***"], ["a", "a******b", "a***b***c"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "well"},
        ["x\n\nWell, y", "x\n\n\n\n\"well\" y"],
        ["well\n\nx", "x\n\nwelly", "x\n\ny\n\nwell", "x\nwell", "x\n\n!"],
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2}, ["[a] [b c]"], ["[a]", "[a\nb] [c]", "[] []", "[[[["],
    ),
    "detectable_content:postscript": (
        {"postscript_marker": "P.S."}, ["x\nP.S. y", "p. s. y"], ["PS y", "x\nP.S.", ""],
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2}, ["* a\n* b", "- a\n\n- b"], ["* a", "**a**\n**b**", "* a\n* b\n* c"],
    ),
    "detectable_format:constrained_response": (
        {}, ["My answer is yes.", "Well. My answer is no."], ["yes", "my answer is yes"],
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2}, ["*a* and *b*", "**a** *b*"], ["*a*", "** ** **", "*a\n* b*", "****"]
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2}, ["Section 1 a Section 2 b"],
        ["Section 1", "section 1 section 2"],
    ),
    "detectable_format:json_format": (
        {}, ['{"a": 1}', '```json\n[1]\n```'], ["{'a': 1}", '{"a": 1', "so {}", "[" * 10**5],
    ),
    "detectable_format:title": ({}, ["<<Joy>>\nx", "x <<a b>> y"], ["<<>>", "<< >>", "<Joy>", "<<a\nb>>", ">>a<<"]),
    "combination:two_responses": ({}, ["a ****** b"], ["a", "a****** a", "a******b******c", "******a"]),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say it."}, ["say it. Yes"], ["Yes. Say it.", "Say"]),
    "startend:end_checker": ({"end_phrase": "Any more?"}, ['x "any more?"', "Any more?\n"], ["any more? No", "more?"]),
    "startend:start_checker": ({"start_phrase": "Well"}, ["well, x", '"Well"'], ["x well", "we"]),
    "startend:quotation": ({}, ['"x"', ' "a" b "c" '], ['"', '""', '"x', "'x'"]),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"}, ["A BC d", "I AM"], ["A b", "Ab Cd"]
    ),
    "change_case:english_capital": ({}, ["A 1!"], ["Ab", "1", ""]),
    "change_case:english_lowercase": ({}, ["a 1!"], ["Ab", "1", ""]),
    "punctuation:no_comma": ({}, ["a; b"], ["a, b", "a\uff0c b", "", " "]),
}  # fmt: skip


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_constraints(name: str) -> None:
    arguments, kept, broken = KEPT[name]
    assert [text for text in kept if not check_instruction(text, name, arguments)] == []
    assert [text for text in broken if check_instruction(text, name, arguments)] == []
    # As `datasets` gives them: with the arguments of all others, None.
    padded = {**{key: None for other in KEPT.values() for key in other[0]}, **arguments}
    assert check_instruction(kept[0], name, padded)


def test_relations_and_sentences() -> None:
    for relation, wanted in (("less than", [1, 0, 0]), ("at least", [0, 1, 1]), ("at most", [1, 1, 0]),
                             ("more than", [0, 0, 1]), ("exactly", [0, 1, 0])):  # fmt: skip
        found = [
            check_instruction("a " * n, "length_constraints:number_words", {"num_words": 2.0, "relation": relation})
            for n in (1, 2, 3)
        ]
        assert found == wanted, relation
    counts = {"": 0, "...": 0, "A": 1, "A b. C d.": 2, "Is it? Yes!": 2, 'He said "no." Then left.': 2, "3.14": 1,
              "e.g. this": 1, "J. R. Smith.": 1, "\u4e00\u3002\u4e8c\u3002": 2}  # fmt: skip
    assert {text: count_sentences(text) for text in counts} == counts


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        (
            "language:response_language",
            {"language": "de"},
            "there is no instruction 'language:response_language'. Known",
        ),
        ("nothing", {}, "there is no instruction 'nothing'"),
        ("keywords:existence", {}, "needs keywords in its kwargs"),
        ("keywords:existence", {"keywords": None}, "needs keywords in its kwargs"),
        ("keywords:existence", {"keywords": "sun"}, "'sun' must be a list of texts"),
        (
            "keywords:letter_frequency",
            {"letter": "ab", "let_frequency": 1, "let_relation": "exactly"},
            "one character",
        ),
        ("length_constraints:number_words", {"num_words": "3", "relation": "exactly"}, "'3' must be a number"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "about"}, "relation 'about' is none of"),
    ],
)
def test_wrong_constraints(name: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_instruction("sun", name, arguments)
    with pytest.raises(RewardError, match=words):
        InstructionReward()(completions=["sun"], instruction_id_list=[[name]], kwargs=[[arguments]])


def test_the_reward_of_constraints() -> None:
    ids, arguments = ["punctuation:no_comma", "keywords:existence"], [{}, {"keywords": ["sun"]}]
    columns = {"instruction_id_list": [ids] * 4, "kwargs": [arguments] * 4}
    said = ["the sun", "the, sun", "the moon", "the, moon"]
    assert InstructionReward()(completions=said, **columns) == [1.0, 0.0, 0.0, 0.0]
    assert InstructionReward(fraction=True)(completions=said, **columns) == [1.0, 0.5, 0.5, 0.0]
    nothing = {"instruction_id_list": [None, [], ids[:1], ids[:1]], "kwargs": [None, [], None, [None]]}
    assert InstructionReward()(completions=said, **nothing) == [None, None, 1.0, 0.0]
    own = InstructionReward("ids", "arguments")
    assert own(completions=said[:1], ids=[ids], arguments=[arguments]) == [1.0]
    for wrong in ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [[{}]]},
                  {"instruction_id_list": [[3]], "kwargs": [[{}]]}, {"instruction_id_list": [ids], "kwargs": [[{}]]},
                  {"instruction_id_list": [ids], "kwargs": [[1, 2]]}):  # fmt: skip
        with pytest.raises(RewardError, match="must hold"):
            InstructionReward()(completions=["x"], **wrong)


def test_loose() -> None:
    assert loose_forms("a") == [
        "a",
        "",
    ] and loose_forms("") == [""]
    assert loose_forms("a\nb\nc") == ["a\nb\nc", "b\nc", "a\nb", "b"]
    columns = {"instruction_id_list": [["punctuation:no_comma"]] * 3, "kwargs": [[{}]] * 3}
    said = ["Sure, here:\nthe sun", "the sun\nThat, is it", "the, sun"]
    assert InstructionReward()(completions=said, **columns) == [0.0, 0.0, 0.0]
    assert InstructionReward(loose=True)(completions=said, **columns) == [1.0, 1.0, 0.0]


# --- lengths ---------------------------------------------------------------------------------------------------------


def test_overlong_is_that_of_dapo_and_of_trl() -> None:
    lengths = [0, 79, 80, 81, 90, 99, 100, 101, 5000]
    assert [soft_overlong(length, 100, 20) for length in lengths] == [0, 0, 0, -0.05, -0.5, -0.95, -1, -1, -1]
    ids = [[1] * length for length in lengths]
    stock = get_soft_overlong_punishment(100, 20)(completion_ids=ids)
    assert SoftOverlongReward(100, 20)(completions=[""] * len(ids), completion_ids=ids) == stock
    assert soft_overlong(1, 2, 2) == -0.5
    for arguments, words in (
        ((100, 0), "cache_tokens=0"),
        ((100, 101), "at most max_tokens=100"),
        ((0, 1), "max_tokens=0"),
    ):
        with pytest.raises(ValueError, match=words):
            SoftOverlongReward(*arguments)
    with pytest.raises(RewardError, match="completion_ids"):
        SoftOverlongReward(100, 20)(completions=["x"])


def test_wanted_lengths() -> None:
    columns = {"completion_ids": [[1] * 8] * 7, "answer": [8, 10, 6, "4", None, "x", -1]}
    both, over = LengthMatchReward(scale=10), LengthMatchReward(over_only=True, scale=10)
    assert both(completions=[""] * 7, **columns) == pytest.approx([1, 0.8, 0.8, 0.6] + [None] * 3)
    assert over(completions=[""] * 7, **columns) == pytest.approx([1, 1, 0.8, 0.6] + [None] * 3)
    assert LengthMatchReward(scale=2)(completions=[""], completion_ids=[[1] * 8], answer=[100]) == [0.0]
    with pytest.raises(ValueError, match="scale=0"):
        LengthMatchReward(scale=0)


# --- dispatch --------------------------------------------------------------------------------------------------------


def test_verifiers_of_tulu() -> None:
    rows = [
        ("gsm8k", "It is 1,000", "1000", 10.0),
        ("gsm8k", "It is 1,00", "1000", 0.0),
        ("math", r"\boxed{\frac12}", "0.5", 10.0),
        ("math", "The final answer is $0.5$.", r"\frac12", 10.0),
        ("math", "It is $0.5$", r"\frac12", 10.0),
        ("strict_math", r"\boxed{0.5}", "0.5", 0.0),
        ("strict_math", "The final answer is $0.5$.", "0.5", 10.0),
        ("string_matcher", "<answer>The Cat</answer>", "cat", 10.0),
        ("string_matcher", "cat", "cat", 0.0),
        ("f1", "the cat sat", "cat", 10 * 2 / 3),
        ("ifeval", "no comma", None, 10.0),
        ("max_length", "", "2", 10 * (1 - 1 / 8192)),
        ("up_to_max_length", "", "9", 10.0),
        (None, "x", "x", None),
        ([], "x", "x", None),
        ("gsm8k", "4", None, None),
        (["gsm8k", "f1"], "4", "4", 20.0),
        (["gsm8k", "f1"], "5", "4", 0.0),
        (["f1", "ifeval"], "a, b", "b", 10.0),
    ]
    names, said, golds, wanted = zip(*rows, strict=True)
    columns: dict[str, Any] = {
        "verifier": list(names),
        "ground_truth": list(golds),
        "instruction_id_list": [["punctuation:no_comma"]] * len(rows),
        "kwargs": [[{}]] * len(rows),
        "completion_ids": [[1, 2, 3]] * len(rows),
    }
    found = VerifierReward(tulu_verifiers())(completions=list(said), **columns)
    assert found == pytest.approx(wanted)
    assert verifier_reward(completions=list(said), **columns) == found
    assert set(tulu_verifiers()) == {"gsm8k", "math", "strict_math", "string_matcher", "f1", "ifeval", "max_length",
                                     "up_to_max_length"}  # fmt: skip


class Constant(Reward):
    def __init__(self, value: float | None) -> None:
        super().__init__()
        self.value = value

    def score(self, text: str, *row: Any) -> float | None:
        return self.value


def test_several_verifiers_of_a_row_and_the_penalty() -> None:
    verifiers = {"one": Constant(1.0), "half": Constant(0.5), "none": Constant(None), "nan": Constant(float("nan"))}
    names = ["one", ["one", "half"], ["half", "one"], ["one", "none"], ["none", "nan"], None]
    for how, wanted in (("sum", [2, 3, 3, 2, None, None]), ("mean", [2, 1.5, 1.5, 2, None, None]),
                        ("last", [2, 1, 2, 2, None, None])):  # fmt: skip
        reward = VerifierReward(verifiers, alpha=2.0, how=how)  # type: ignore[arg-type]
        assert reward(completions=[""] * 6, verifier=names) == wanted
    reward = VerifierReward(verifiers, non_stop_penalty=-10.0, stop_ids=[7, 8])
    ids = [[1, 7], [8], [7, 1], [], [1], [1]]
    assert reward(completions=[""] * 6, verifier=names, completion_ids=ids) == [10.0, 15.0, -10.0, -10.0, None, None]


def test_a_verifier_gets_its_rows_and_what_is_no_column() -> None:
    seen: list[Any] = []

    def own(prompts: Any, completions: Any, answer: Any, trainer_state: Any, **kwargs: Any) -> list[float]:
        seen.append((prompts, completions, answer, trainer_state, sorted(kwargs)))
        return [1.0] * len(completions)

    reward = VerifierReward({"own": own, "other": LastNumberReward()}, alpha=1.0)
    found = reward(
        prompts=["p", "q", "r"], completions=["a", "2", "c"], verifier=["own", "other", "own"], answer=[1, 2, 3],
        trainer_state="state",
    )  # fmt: skip
    assert found == [1.0, 1.0, 1.0]
    assert seen == [(["p", "r"], ["a", "c"], [1, 3], "state", ["verifier"])]


async def later(completions: Any, **kwargs: Any) -> list[float]:
    return [0.0]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"verifiers": {}}, ValueError, "verifiers={} has none"),
        ({"verifiers": {"a b": len}}, ValueError, "must be a name"),
        ({"verifiers": {"a": 3}}, TypeError, "must be a reward function"),
        ({"verifiers": {"a": later}}, TypeError, "asynchronous"),
        ({"how": "max"}, ValueError, "how='max' is none of sum, mean, last"),
        ({"alpha": 0}, ValueError, "alpha=0"),
        ({"non_stop_penalty": -10.0}, ValueError, "go together"),
        ({"stop_ids": [1]}, ValueError, "go together"),
        ({"non_stop_penalty": -10.0, "stop_ids": []}, ValueError, "has no token"),
        ({"non_stop_penalty": -10.0, "stop_ids": ["</s>"]}, ValueError, "must be token ids"),
        ({"non_stop_penalty": "x", "stop_ids": [1]}, ValueError, "non_stop_penalty"),
        ({"column": ""}, ValueError, "column=''"),
    ],
)
def test_wrong_options_of_dispatch(arguments: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        VerifierReward(**arguments)


def test_wrong_calls_of_dispatch() -> None:
    for column, words in (
        (["magic"], "asks for the verifier 'magic'. There are: f1, gsm8k"),
        ("gsm8k", "must be a list"),
    ):
        with pytest.raises(RewardError, match=words):
            VerifierReward()(completions=["x"], verifier=column, ground_truth=["x"])
    with pytest.raises(RewardError, match="needs completions="):
        VerifierReward()(verifier=["gsm8k"])
    with pytest.raises(RewardError, match="returned 2 rewards for 1 completions"):
        VerifierReward({"a": lambda completions, **kwargs: [1.0, 2.0]})(completions=["x"], verifier=["a"])
    with pytest.raises(RewardError, match="returned 'good', not a list"):
        VerifierReward({"a": lambda completions, **kwargs: "good"})(completions=["x"], verifier=["a"])
