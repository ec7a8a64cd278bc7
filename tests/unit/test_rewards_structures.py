"""JSON and tables: golden scores, parts, hostile texts, schemas that are refused."""

from __future__ import annotations

import pickle
import time
from typing import Any

import pytest

from hf_effi.errors import RewardError
from hf_effi.functional.rewards import field_f1, read_json, read_schema, read_tables, structure_score, table_scores
from hf_effi.rewards import JSONReward, TableReward

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
    "required": ["a", "b"],
}
GOLD = '{"a": 1, "b": "x"}'


def parts_of(text: str, **over: Any) -> dict[str, float | None]:
    reward = JSONReward(**{"schema": SCHEMA, "column": "answer", **over})
    return reward.measured([text], *([[GOLD]] if reward.needs else []))[0]


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, valid, structure, form, content",
    [
        ('{"a":1,"b":"x"}', 1, 1, 1, 1),
        (' \n{"b":"X","a":1.0000005}\n', 1, 0.5, 1, 1),
        ('```json\n{"a":1,"b":"x"}\n```', 1, 1, 0.5, 1),
        ('Here it is: {"a":1,"b":"x"}. Anything {else}?', 1, 1, 0.5, 1),
        ('{"a":1}', 1, 0.5, 1, 2 / 3),
        ('{"a":"1","b":"x"}', 1, 0.5, 1, 0.5),
        ("[1]", 1, 0, 1, 0),
        ("5", 1, 0, 1, 0),
        ("null", 1, 0, 1, 0),
        ('{"a":1,', 0, 0, 0, 0),
        ('{"a":1,"b":"x"} {"a":1,"b":"x"}', 0, 0, 0, 0),
        ('[] then {"a":1,"b":"x"}', 0, 0, 0, 0),
        ('{"a":NaN,"b":"x"}', 0, 0, 0, 0),
        ('{"a":Infinity,"b":"x"}', 0, 0, 0, 0),
        ('{"a":-Infinity,"b":"x"}', 0, 0, 0, 0),
        ('{"a":1e999,"b":"x"}', 0, 0, 0, 0),
        ('{"a":1,"a":1,"b":"x"}', 0, 0, 0, 0),
        ('{"a":true,"b":"x"}', 1, 0.5, 1, 0.5),
        ("{'a':1,'b':'x'}", 0, 0, 0, 0),
        ("", 0, 0, 0, 0),
        ("no JSON at all", 0, 0, 0, 0),
    ],
)
def test_golden_parts(text: str, valid: float, structure: float, form: float, content: float):
    parts = {"valid": valid, "structure": structure, "format": form, "content": content}
    assert parts_of(text) == pytest.approx(parts)
    mean = (valid + structure + 0.5 * form + 2 * content) / 4.5
    assert JSONReward(SCHEMA, column="answer")(completions=[text], answer=[GOLD]) == [pytest.approx(mean)]


HOSTILE = {
    "deep": "[" * 10_000 + "]" * 10_000,
    "deep objects": '{"a":' * 10_000,
    "open": "[" * 1_000_000,
    "many values": "[" + "1," * 500_000 + "1]",
    "many objects": "[" + "{}," * 330_000 + "{}]",
    "one long text": '{"a":"' + "x" * 1_000_000 + '"}',
    "a text that is never closed": '{"a":"' + '\\"' * 500_000,
    "quotation marks": "[" + '"' * 1_000_000,
    "backslashes": '"' + "\\" * 1_000_000,
    "prose in brackets": "{a} " * 250_000,
    "one long number": "9" * 1_000_000,
    "a long fraction": "[0." + "1" * 1_000_000 + "]",
    "white space": " " * 1_000_000 + "{",
    "commas": "[" + "," * 1_000_000,
    "fences": "```json\n" * 120_000,
    "no end": '{"a":1,' * 140_000,
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("gate", ["valid", None])
def test_hostile_texts_take_a_moment_and_never_raise(name: str, gate: str | None):
    """Measured on one core in a few tens of milliseconds each; what is quadratic would take minutes."""
    reward = JSONReward(SCHEMA, column="answer", gate=gate)
    begun = time.process_time()
    assert 0 <= reward(completions=[HOSTILE[name]], answer=[GOLD])[0] <= 1
    assert time.process_time() - begun < 2


def test_depth_and_size_have_a_limit():
    assert read_json("[" * 16 + "]" * 16).valid and not read_json("[" * 17 + "]" * 17).valid
    assert read_json("[" + "1," * 99_000 + "1]").valid and not read_json("[" + "1," * 100_001 + "1]").valid
    assert (
        read_json("9" * 300).valid and not read_json("9" * 400).valid and not read_json("[" + "1" * 2000 + "]").valid
    )


@pytest.mark.parametrize(
    "text, value",
    [
        ('{"a":1,"b":"x', {"a": 1}),
        ('{"a":12', {}),
        ('x {"a":[1,{"b":2,"c"', {"a": [1, {"b": 2}]}),
        ('[{"a":1}, {"a"', [{"a": 1}, {}]),
        ('{"a":1}}', None),
        ("[1}", None),
        ('{a:1,"b"', None),
        ("none", None),
    ],
)
def test_what_was_complete_when_a_text_broke_off(text: str, value: Any):
    found = read_json(text, mend=True)
    assert not found.valid or text == '{"a":1}}'
    assert found.cut == (value is not None) and (found.value == value or found.valid)


def test_gates():
    cut, wrong = '{"a":1,', '{"a":"1","b":"x"}'
    assert parts_of(cut, gate=None) == pytest.approx({"valid": 0, "structure": 0.5, "format": 0, "content": 2 / 3})
    assert parts_of(wrong, gate="structure")["content"] == 0 and parts_of(GOLD, gate="structure")["content"] == 1
    assert parts_of(wrong)["content"] == 0.5


def test_parts_that_do_not_apply_leave_the_mean():
    assert JSONReward()(completions=["[1]", "```\n[1]\n```", "["]) == pytest.approx([1.0, 1.25 / 1.5, 0.0])
    reward = JSONReward(column="gold")
    assert reward(completions=["[1]", "[2]"], gold=[None, "[1]"]) == pytest.approx([1.0, 1.5 / 3.5])
    only = JSONReward(SCHEMA, {"content": 1}, column="gold")
    assert only(completions=[GOLD, GOLD], gold=[None, {"a": 1, "b": "x"}]) == [None, 1.0]


def test_a_content_function_and_what_stands_before():
    reward = JSONReward(weights={"content": 1}, content=lambda value, gold: None if gold is None else value / gold)
    assert reward(completions=["5"]) == [None]
    half = JSONReward(
        weights={"content": 1}, content=lambda value, gold: value / gold, column="gold", after="</think>"
    )
    assert half(completions=["{1} </think> 5", "5"], gold=["10", "10"]) == [0.5, 0.0]
    for value, words in ((2.0, "outside"), ("x", "a reward is a finite number")):
        broken = JSONReward(weights={"content": 1}, content=lambda found, gold, value=value: value)
        with pytest.raises(RewardError, match=words):
            broken(completions=["5"])


def test_parts_are_columns_that_reward_nothing():
    reward = JSONReward(SCHEMA, column="answer", name="js")
    logged: dict[str, float] = {}
    columns = reward.parts()
    assert [column.__name__ for column in columns] == ["js_valid", "js_structure", "js_format", "js_content"]
    for column in pickle.loads(pickle.dumps(columns)):
        given = {"completions": [GOLD, '{"a":1}'], "answer": [GOLD] * 2, "log_metric": logged.__setitem__}
        assert column(**given) == [None, None]
    assert logged == pytest.approx({"js_valid": 1, "js_structure": 0.75, "js_format": 1, "js_content": 5 / 6})
    reward(completions=[GOLD], answer=[GOLD])
    measured = reward._last
    assert columns[0].fn(completions=[GOLD], answer=[GOLD]) == [1.0] and reward._last is measured  # once, not again


@pytest.mark.parametrize(
    "over, words",
    [
        ({"gate": "always"}, "gate='always' must be one of"),
        ({"gate": "structure"}, "needs a schema="),
        ({"weights": {"structure": 1}}, "structure=1 would weigh nothing, for there is no schema="),
        ({"weights": {"content": 1}}, "content=1 would weigh nothing, for there is no column="),
        ({"weights": {"valid": -1}}, "valid=-1 must be a number >= 0"),
        ({"weights": {"valid": 0}}, "weigh nothing"),
        ({"weights": {"speed": 1}}, "'speed' is no part"),
        ({"weights": 3}, "must be a mapping"),
        ({"content": 3}, "content=3 must be a function"),
        ({"column": ""}, "column='' must be a text"),
        ({"after": 3}, "after=3 must be a text"),
        ({"schema": {"pattern": ".*"}}, "'pattern' is no keyword that is read here"),
        ({"schema": {"type": "int"}}, "type='int' must be one of object"),
        ({"schema": {"properties": {"a": 3}}}, "schema.a=3 must be a JSON Schema"),
        ({"schema": {"items": [{}]}}, "schema.items="),
        ({"schema": {"additionalProperties": {}}}, "must be true or false"),
        ({"schema": {"required": "a"}}, "must be a list of names"),
        ({"schema": {"enum": []}}, "must be a list of values"),
        ({"schema": {"minLength": -1}}, "must be a count >= 0"),
        ({"schema": {"maximum": "3"}}, "must be a number"),
        ({"schema": {"type": "string", "required": ["a"]}}, "required is for type 'object'"),
        ({"schema": {"$ref": "#/$defs/no"}}, "must be '#/\\$defs/<name>'"),
        ({"schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}, "or contains itself"),
    ],
)
def test_what_is_wrong_is_named_when_it_is_made(over: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        JSONReward(**over)


def test_a_wrong_answer_of_the_dataset_is_named():
    for answer, words in (("x", "is not exactly one JSON value"), ({1, 2}, "is no JSON"), ("[NaN]", "is not exactly")):
        with pytest.raises(RewardError, match=words):
            JSONReward(column="answer")(completions=["1"], answer=[answer])
    with pytest.raises(RewardError, match="reads the column 'answer'"):
        JSONReward(column="answer")(completions=["1"])


NESTED = {
    "$defs": {"Item": {"type": "object", "properties": {"n": {"type": "number"}}, "required": ["n"]}},
    "type": "object",
    "additionalProperties": False,
    "required": ["kind", "items", "maker"],
    "properties": {
        "kind": {"enum": ["a", "b"]},
        "items": {"type": "array", "items": {"$ref": "#/$defs/Item"}, "minItems": 1},
        "maker": {
            "type": "object", "properties": {"x": {"type": "string", "maxLength": 2}, "y": {}}, "required": ["x", "y"]
        },
        "note": {"type": ["string", "null"]},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "value, score",
    [
        ({"kind": "a", "items": [{"n": 1}, {"n": 2.5}], "maker": {"x": "ab", "y": None}}, 1.0),
        ({"kind": "c", "items": [{"n": 1}], "maker": {"x": "ab", "y": 1}}, 3 / 4),
        ({"kind": "a", "items": [], "maker": {"x": "ab", "y": 1}}, 3 / 4),
        ({"kind": "a", "items": [{"n": 1}, {}], "maker": {"x": "ab", "y": 1}}, 3.5 / 4),
        ({"kind": "a", "items": [{"n": True}], "maker": {"x": "abc"}}, 1 / 4),
        ({"kind": "a", "items": {}, "maker": 3}, 1 / 4),
        ({}, 0.0),
        ({"kind": "a", "items": [{"n": 1}], "maker": {"x": "ab", "y": 1}, "z": 1}, 4 / 5),
        ({"kind": "a", "items": [{"n": 1}], "maker": {"x": "ab", "y": 1}, "note": None}, 1.0),
        ({"kind": "a", "items": [{"n": 1}], "maker": {"x": "ab", "y": 1}, "note": 3}, 4 / 5),
    ],
)
def test_structure_by_hand(value: Any, score: float):
    """Required leaves: kind, items[].n, maker.x, maker.y; an unknown key costs 1 / (4 + 1)."""
    assert structure_score(value, read_schema(NESTED)) == pytest.approx(score)


def test_a_long_array_buys_nothing_and_types_are_those_of_json():
    schema = read_schema(NESTED)
    assert structure_score({"items": [{"n": 1}] * 1000}, schema) == 1 / 4
    integer, number = read_schema({"type": "integer"}), read_schema({"type": "number", "minimum": 2})
    assert [structure_score(v, integer) for v in (1, 1.0, 1.5, True, "1")] == [1, 1, 0, 0, 0]
    assert [structure_score(v, number) for v in (2, 1, False)] == [1, 0, 0]
    assert (
        structure_score(1, read_schema({"const": True})) == 0
        and structure_score([1], read_schema({"const": [1.0]})) == 1
    )
    assert structure_score({"q": 1}, read_schema({})) == 1


@pytest.mark.parametrize(
    "value, gold, score",
    [
        ([1, 2, 3], [1, 2], 4 / 5),
        ([2, 1], [1, 2], 0),
        ([], [], 1),
        ({}, [], 0),
        ({"a": []}, {"a": [1]}, 0),
        (None, None, 1),
        (0, False, 0),
        ({"a": {"b": 1e9}}, {"a": {"b": 1e9 + 100}}, 1),
        ({"a": "STRASSE"}, {"a": "straße"}, 1),
    ],
)
def test_fields_by_hand(value: Any, gold: Any, score: float):
    assert field_f1(value, gold) == pytest.approx(score)


# --- tables ----------------------------------------------------------------------------------------------------------

WANTED = [["name", "goals"], ["Ada", "3"], ["Bo", "1"]]
TABLES = {
    "markdown": "The table:\n\n| name | goals |\n|:---|---:|\n| Ada | 3 |\n| Bo | 1 |\n\nThat is it.",
    "html": "<p><TABLE border=1><thead><tr><th>name</th><th>goals</th></tr></thead><tbody><tr><td><b>Ada</b></td>"
    "<td>3</td></tr><tr><td>Bo<td>1</table></p>",
    "latex": "\\begin{tabularx}{\\textwidth}{l@{ }r}\n\\toprule\nname & \\textbf{goals} \\\\ \\midrule % rule\n"
    "Ada & $3$ \\\\[2pt]\n\\cmidrule(lr){1-2} Bo & 1 \\\\ \\bottomrule\n\\end{tabularx}",
}


@pytest.mark.parametrize("form", TABLES)
def test_the_same_table_in_three_formats(form: str):
    assert read_tables(TABLES[form], form) == [WANTED]
    reward = TableReward(form)
    assert reward(completions=[TABLES[form]] * 4, answer=[TABLES[form], WANTED, None, [["name"], ["Ada"]]]) == [
        1.0, 1.0, None, pytest.approx((2 / 3 + 2 / 5) / 2)
    ]  # fmt: skip
    assert reward(completions=["none", TABLES[form] * 2], answer=[WANTED] * 2) == [0.0, 0.0]


@pytest.mark.parametrize(
    "table, header, cells",
    [
        (WANTED, 1, 1),
        ([["goals", "name"], ["3", "Ada"], ["1", "Bo"]], 1, 1),
        ([["name", "goals"], ["Bo", "1"], ["Ada", "3"]], 1, 0.5),
        ([["name", "goals"], ["Bo", "1"]], 1, 2 / 3),
        ([["name", "goals"], ["Ada", "3"], ["Cy", "9"], ["Bo", "1"]], 1, 0.8),
        ([["who", "goals"], ["**ada**", "3.0"], ["bo", "01"]], 0.5, 1),
        ([["name", "goals"]], 1, 0),
        ([["name"], ["Ada"], ["Bo"]], 2 / 3, 2 / 3),
        ([], 0, 0),
    ],
)
def test_alignment_by_hand(table: list[list[str]], header: float, cells: float):
    assert table_scores(table, WANTED) == (pytest.approx(header), pytest.approx(cells))


def test_edges_of_the_formats():
    assert read_tables("a | b\n--|--\n1 \\| 2 | 3", "markdown") == [[["a", "b"], ["1 | 2", "3"]]]
    assert read_tables("a | b\nno rule | here", "markdown") == read_tables("|a|\n|x|", "markdown") == []
    assert read_tables("<table><tr><td><table><tr><td>x</table></table>", "html") == []
    assert read_tables("</table><tr><td>x<table>", "html") == []
    assert read_tables("\\begin{tabular}{l} a", "latex") == []
    assert read_tables("|a|\n|-|\n" + "|1|\n" * 600, "markdown") == []
    assert table_scores([["n"], ["1,000"], ["0.1234567"]], [["N"], ["1000.0"], ["0.1234568"]]) == (1.0, 1.0)


@pytest.mark.parametrize("form", TABLES)
@pytest.mark.parametrize(
    "text",
    [
        "|-" * 100_000,
        "|a|\n|-|\n" * 30_000,
        "<table" * 50_000,
        "<td>" * 60_000,
        "\\begin{tabular}{" * 20_000,
        "\\begin{tabular}" + "{" * 200_000 + "\\end{tabular}",
        "<table><tr>" + "<td>1" * 50_000 + "</table>",
        "\\\\&" * 60_000,
    ],
    ids=range(8),
)
def test_hostile_tables_take_a_moment(form: str, text: str):
    begun = time.process_time()
    assert TableReward(form)(completions=[text], answer=[WANTED])[0] >= 0
    assert time.process_time() - begun < 2


def test_what_is_wrong_with_a_table_is_named():
    for over in ({"format": "csv"}, {"column": ""}, {"weights": {"rows": 1}}):
        with pytest.raises(ValueError):
            TableReward(**over)
    with pytest.raises(RewardError, match="is not one table in markdown, nor a list of rows"):
        TableReward()(completions=["x"], answer=["no table"])
    assert [column.__name__ for column in TableReward().parts()] == ["table_reward_cells", "table_reward_header"]
