"""Rewards of outputs that have a structure: JSON and tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import RewardError
from ..functional.kept_arguments import keeps_arguments
from ..functional.rewards import (
    TABLE_FORMATS,
    JSONText,
    field_f1,
    read_json,
    read_schema,
    read_tables,
    structure_score,
    table_scores,
)
from ._calls import PartedReward, Row, checked_number, checked_weights

#: weights of the parts of [`JSONReward`] and [`TableReward`]
JSON_WEIGHTS = {"valid": 1.0, "structure": 1.0, "format": 0.5, "content": 2.0}
TABLE_WEIGHTS = {"cells": 1.0, "header": 1.0}
#: what the content of [`JSONReward`] may wait for
JSON_GATES = ("valid", "structure", None)


class JSONReward(PartedReward):
    r"""
    How good a text is as JSON: valid, of the right structure, nothing around it, and with the right content.

    `sum_k w_k r_k / sum_k w_k`, in [0, 1], of four parts. `valid` is 1 where the text has exactly one JSON value, see
    [`~hf_effi.functional.rewards.read_json`]. `structure` is the share of what the schema requires that is there with
    the right type, see [`~hf_effi.functional.rewards.structure_score`]. `format` is 1 where there is nothing but the
    value, 0.5 in a fence or among prose. `content` is the F1 of the fields against those of the answer, see
    [`~hf_effi.functional.rewards.field_f1`]. A part that does not apply is left out of the mean.

    The four dimensions are those of [RL-Struct](https://huggingface.co/papers/2512.00319), whose weights are not
    known: these are ours. Decoding under a grammar makes every text valid without any training.

    Args:
        schema (`dict`, *optional*): JSON Schema, in the part that [`~hf_effi.functional.rewards.read_schema`] reads;
            other keywords are refused. Without one there is no `structure`.
        weights (`dict`, *optional*): Defaults to `{"valid": 1, "structure": 1, "format": 0.5, "content": 2}`, of the
            parts that apply. One that is not named weighs nothing, and is not measured.
        gate (`str`, *optional*, defaults to `"valid"`): `"valid"`: structure and content are 0 where the text is not
            valid. `"structure"`: content is also 0 unless the structure is right altogether. `None`: of a text that
            breaks off, what was complete by then counts for structure and content.
        content (`Callable`, *optional*): `content(value, answer)` in [0, 1], or `None` where it does not apply, in
            place of the F1. The answer is what the column says, `None` without a column.
        column (`str`, *optional*): Column of the dataset with the right answer, as JSON text, which a dataset keeps as
            it is, or as a mapping or list; `None` where there is none, and then `content` does not apply. Without a
            column or a function there is no `content`.
        after (`str`, *optional*): Only what stands behind the last of these is looked at, e.g. `"</think>"`; a text
            without it is not valid.
        name (`str`, *optional*): See [`Reward`].

    Raises:
        ValueError: a schema, weight or gate that is not understood, or a weight for a part that cannot be measured.

    Example:
    ```python
    >>> properties = {"a": {"type": "integer"}, "b": {"type": "string"}}
    >>> schema = {"type": "object", "properties": properties, "required": ["a", "b"]}
    >>> reward = JSONReward(schema, column="answer")
    >>> texts = ['{"a": 1, "b": "x"}', '```json\n{"a": 1, "b": "x"}\n```', '{"a": 1}', '{"a": 1,']
    >>> [round(r, 4) for r in reward(completions=texts, answer=['{"a": 1, "b": "x"}'] * 4)]
    [1.0, 0.9444, 0.7407, 0.0]
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        schema: Mapping[str, Any] | None = None,
        weights: Mapping[str, float] | None = None,
        gate: str | None = "valid",
        content: Callable[[Any, Any], float | None] | None = None,
        *,
        column: str | None = None,
        after: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if gate not in JSON_GATES:
            raise ValueError(f"gate={gate!r} must be one of {JSON_GATES}.")
        if content is not None and not callable(content):
            raise ValueError(f"content={content!r} must be a function of the value and the right answer.")
        for key, value in (("column", column), ("after", after)):
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{key}={value!r} must be a text, or None.")
        self.schema = None if schema is None else read_schema(schema)
        if gate == "structure" and self.schema is None:
            raise ValueError("gate='structure' needs a schema=.")
        absent = {} if self.schema else {"structure": "schema="}
        if content is None and column is None:
            absent["content"] = "column= with the right answer, and no function content="
        self.weights = checked_weights(weights, JSON_WEIGHTS, absent)
        self.gate, self.content, self.after = gate, content, after
        self.needs = () if column is None else (column,)

    def measure(self, text: str, *row: Any) -> Row:
        answer = self._answer(row[0]) if row else None
        found = self._read(text)
        readable = found.valid or found.cut
        parts: Row = {"valid": float(found.valid), "format": found.format, "structure": None, "content": None}
        if self.schema is not None:
            parts["structure"] = structure_score(found.value, self.schema) if readable else 0.0
        closed = not readable or (self.gate == "structure" and parts["structure"] != 1.0)
        if "content" in self.weights:
            parts["content"] = self._content(found, answer, closed)
        return {part: parts[part] for part in self.weights}

    def _read(self, text: str) -> JSONText:
        if self.after is not None:
            _, found, text = text.rpartition(self.after)
            text = text if found else ""
        return read_json(text, mend=self.gate is None)

    def _content(self, found: JSONText, answer: JSONText | None, closed: bool) -> float | None:
        if self.needs and answer is None:
            return None
        if closed:
            return 0.0
        gold = None if answer is None else answer.value
        if self.content is None:
            return field_f1(found.value, gold)
        value = checked_number(f"content of {self.__name__}", self.content(found.value, gold))
        if value is not None and not 0 <= value <= 1:
            raise RewardError(f"content of {self.__name__} returned {value!r}, which is outside [0, 1].")
        return value

    def _answer(self, answer: Any) -> JSONText | None:
        if answer is None:
            return None
        try:
            text = answer if isinstance(answer, str) else json.dumps(answer)
        except (TypeError, ValueError) as error:
            raise RewardError(f"{self.__name__}: the answer {answer!r} is no JSON: {error}.") from None
        found = read_json(text)
        if found.format != 1.0:
            raise RewardError(
                f"{self.__name__}: the answer {text[:200]!r} is not exactly one JSON value. A text has to be in "
                "quotation marks itself: '\"x\"'."
            )
        return found


class TableReward(PartedReward):
    r"""
    How alike the table in a text is to the right one: F1 of its cells and of its header.

    `w_cells F1_cells + w_header F1_header` over the sum of the weights. Columns are aligned by header, rows in order,
    see [`~hf_effi.functional.rewards.table_scores`]. A text without a table, or with two, gets 0.

    The task and its three formats are those of [Struc-Bench](https://huggingface.co/papers/2309.08963); it scores by
    similarity of texts and by a judge, and this by equal cells.

    Args:
        format (`str`, *optional*, defaults to `"markdown"`): `"markdown"`, `"html"` or `"latex"`.
        column (`str`, *optional*, defaults to `"answer"`): Column of the dataset with the right table, as a text in
            this format or as a list of rows of cells, the header first; `None` where there is none: the reward is
            `None`.
        weights (`dict`, *optional*): Defaults to `{"cells": 1, "header": 1}`.
        name (`str`, *optional*): See [`Reward`].

    Raises:
        ValueError: an argument is not understood.

    Example:
    ```python
    >>> right = "| name | goals |\n|---|---|\n| Ada | 3 |\n| Bo | 1 |"
    >>> reward = TableReward()
    >>> texts = [right, "| name | goals |\n|---|---|\n| Ada | 3 |", "Ada has 3."]
    >>> [round(r, 4) for r in reward(completions=texts, answer=[right] * 3)]
    [1.0, 0.8333, 0.0]
    ```
    """

    @keeps_arguments
    def __init__(
        self,
        format: str = "markdown",
        column: str = "answer",
        weights: Mapping[str, float] | None = None,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if format not in TABLE_FORMATS:
            raise ValueError(f"format={format!r} must be one of {TABLE_FORMATS}.")
        if not isinstance(column, str) or not column:
            raise ValueError(f"column={column!r} must be the name of a column.")
        self.format, self.needs = format, (column,)
        self.weights = checked_weights(weights, TABLE_WEIGHTS, {})

    def measure(self, text: str, *row: Any) -> Row:
        if row[0] is None:
            return dict.fromkeys(self.weights)
        gold, tables = self._answer(row[0]), read_tables(text, self.format)
        header, cells = table_scores(tables[0], gold) if len(tables) == 1 else (0.0, 0.0)
        parts = {"header": header, "cells": cells}
        return {part: parts[part] for part in self.weights}

    def _answer(self, answer: Any) -> list[list[str]]:
        if isinstance(answer, str):
            tables = read_tables(answer, self.format)
            if len(tables) == 1:
                return tables[0]
        elif isinstance(answer, (list, tuple)) and answer and all(isinstance(row, (list, tuple)) for row in answer):
            return [[str(cell) for cell in row] for row in answer]
        raise RewardError(
            f"{self.__name__}: the answer {str(answer)[:200]!r} is not one table in {self.format}, nor a list of rows."
        )
