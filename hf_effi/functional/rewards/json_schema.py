"""How much of a JSON value is as a schema wants it, and how many of its fields are right."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .json_text import DEEPEST, MOST_NODES

#: what a schema may say; anything else is refused when it is read
TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
_BOUNDS = {
    "minimum": "number",
    "maximum": "number",
    "minLength": "count",
    "maxLength": "count",
    "minItems": "count",
    "maxItems": "count",
}
_ACTING = ("type", "enum", "const", "properties", "required", "additionalProperties", "items", "$ref", *_BOUNDS)
_TOLD = ("title", "description", "default", "examples", "deprecated", "$schema", "$id", "$comment", "$defs")
KEYWORDS = (*_ACTING, *_TOLD)


@dataclass(frozen=True)
class Schema:
    """
    A schema that was read by [`read_schema`].

    Args:
        types (`tuple[str, ...]`): Allowed types; empty: any.
        allowed (`tuple`, *optional*): Of `enum` or `const`.
        properties, required: Of an object.
        closed (`bool`): Other keys than `properties` are unknown (`additionalProperties: false`).
        items (`Schema`, *optional*): Of an array.
        bounds (`dict`): `minimum`, `maxLength` and the like.
    """

    types: tuple[str, ...] = ()
    allowed: tuple[Any, ...] | None = None
    properties: Mapping[str, Schema] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    closed: bool = False
    items: Schema | None = None
    bounds: Mapping[str, float] = field(default_factory=dict)

    @functools.cached_property
    def leaves(self) -> int:
        """Number of paths that end in a required leaf."""
        inner = [self.properties[name] for name in self.required] or ([self.items] if self.items else [])
        return sum(one.leaves for one in inner) or 1


def read_schema(schema: Any) -> Schema:
    """
    Read the part of JSON Schema that rewards go by, and refuse the rest.

    Read are `type` (one or a list), `enum`, `const`, `properties`, `required`, `additionalProperties` (true or false),
    `items` (one schema), `minimum`, `maximum`, `minLength`, `maxLength`, `minItems`, `maxItems`, and `$ref` to an
    entry of `$defs`, as Pydantic writes them. Passed over are `title`, `description`, `default`, `examples` and the
    like. Patterns are refused: they would run on whatever a model wrote.

    Args:
        schema (`dict`): JSON Schema.

    Raises:
        ValueError: a keyword that is not read, or a value that it cannot have; the message says where.

    Example:
    ```python
    >>> read_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}).required
    ('a',)
    >>> read_schema({"anyOf": []})
    Traceback (most recent call last):
    ...
    ValueError: schema: 'anyOf' is no keyword that is read here. Use type, enum, const, properties, required, \
additionalProperties, items, $ref, minimum, maximum, minLength, maxLength, minItems, maxItems; for a value that may \
be null write {"type": ["string", "null"]}.
    ```
    """
    definitions = schema.get("$defs", {}) if isinstance(schema, Mapping) else {}
    return _read(schema, definitions, "schema", 0)


def _read(schema: Any, definitions: Any, where: str, depth: int) -> Schema:
    if not isinstance(schema, Mapping):
        raise ValueError(f"{where}={schema!r} must be a JSON Schema, a mapping such as {{'type': 'integer'}}.")
    if depth > DEEPEST:
        raise ValueError(
            f"{where} is deeper than {DEEPEST}, or contains itself. Write out as many levels as you need."
        )
    for word in schema:
        if word not in KEYWORDS:
            raise ValueError(
                f"{where}: {word!r} is no keyword that is read here. Use {', '.join(_ACTING)}; for a value that may "
                'be null write {"type": ["string", "null"]}.'
            )
    if "$ref" in schema:
        beside = [word for word in schema if word in _ACTING and word != "$ref"]
        name = str(schema["$ref"]).removeprefix("#/$defs/")
        if beside or not isinstance(definitions, Mapping) or name not in definitions:
            raise ValueError(f"{where}: $ref={schema['$ref']!r} must be '#/$defs/<name>' of $defs, and stand alone.")
        return _read(definitions[name], definitions, f"{where}.{name}", depth + 1)
    types = schema.get("type", ())
    types = (types,) if isinstance(types, str) else tuple(types)
    properties, required = schema.get("properties", {}), schema.get("required", [])
    closed, allowed = schema.get("additionalProperties", True), schema.get("enum")
    names = isinstance(required, (list, tuple)) and all(isinstance(name, str) for name in required)
    for word, good, wanted in (
        ("type", all(one in TYPES for one in types), f"one of {', '.join(TYPES)}, or a list of them"),
        ("properties", isinstance(properties, Mapping), "a mapping"),
        ("required", names, "a list of names"),
        ("additionalProperties", isinstance(closed, bool), "true or false"),
        ("enum", allowed is None or isinstance(allowed, (list, tuple)) and bool(allowed), "a list of values"),
    ):
        if not good:
            raise ValueError(f"{where}: {word}={schema.get(word)!r} must be {wanted}.")
    _check_bounds(schema, where)
    for word, owner in (("properties", "object"), ("required", "object"), ("items", "array")):
        if word in schema and types and owner not in types:
            raise ValueError(f"{where}: {word} is for type {owner!r}, and type is {schema['type']!r}.")
    return Schema(
        types=types,
        allowed=(schema["const"],) if "const" in schema else None if allowed is None else tuple(allowed),
        properties={
            name: _read(one, definitions, f"{where}.{name}", depth + 1)
            for name, one in {**dict.fromkeys(required, {}), **properties}.items()
        },
        required=tuple(dict.fromkeys(required)),
        closed=not closed,
        items=_read(schema["items"], definitions, f"{where}.items", depth + 1) if "items" in schema else None,
        bounds={word: schema[word] for word in _BOUNDS if word in schema},
    )


def _check_bounds(schema: Mapping[str, Any], where: str) -> None:
    for word, kind in _BOUNDS.items():
        value = schema.get(word, 0)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (kind == "count" and (value < 0 or value != int(value))):
            raise ValueError(f"{where}: {word}={value!r} must be a {'number' if kind == 'number' else 'count >= 0'}.")


# --- structure -------------------------------------------------------------------------------------------------------


def structure_score(value: Any, schema: Schema) -> float:
    """
    Share of what a schema requires that a value has, with the right types.

    `sum_l ok_l / (L + U)`: over the paths `l` that end in a required leaf, each is there and as the schema wants it,
    or not. Under an array a path counts by the share of the elements in which it is right. Each key that nobody knows
    adds 1 to `U` where `additionalProperties` is false, and an optional property adds what is wrong of it.

    Args:
        value: As [`read_json`] returns it.
        schema (`Schema`): From [`read_schema`].

    Returns:
        `float`: In [0, 1].

    Example:
    ```python
    >>> properties = {"a": {"type": "integer"}, "b": {"type": "string"}}
    >>> schema = read_schema({"type": "object", "properties": properties, "required": ["a", "b"]})
    >>> [structure_score(value, schema) for value in ({"a": 1, "b": "x"}, {"a": 1}, {"a": "1", "b": "x"}, [1])]
    [1.0, 0.5, 0.5, 0.0]
    ```
    """
    right, leaves, wrong = _structure(value, schema, [MOST_NODES])
    return right / (leaves + wrong)


def _structure(value: Any, schema: Schema, left: list[int]) -> tuple[float, int, float]:
    """Return what is right, of how many leaves, and what is wrong beside them."""
    leaves = schema.leaves
    left[0] -= 1
    if left[0] < 0 or not _fits(value, schema):
        return 0.0, leaves, 0.0
    if isinstance(value, dict):
        if not (schema.required or schema.properties or schema.closed):
            return float(leaves), leaves, 0.0
        right, wrong = 0.0, float(sum(name not in schema.properties for name in value)) if schema.closed else 0.0
        for name, inner in schema.properties.items():
            needed = name in schema.required
            if name in value:
                some, count, beside = _structure(value[name], inner, left)
                right += some if needed else 0.0
                wrong += beside if needed else 1.0 - some / (count + beside)
        return (right if schema.required else 1.0), leaves, wrong
    if isinstance(value, list) and schema.items is not None and value:
        parts = [_structure(one, schema.items, left) for one in value]
        return sum(part[0] for part in parts) / len(parts), leaves, sum(part[2] for part in parts) / len(parts)
    return float(leaves), leaves, 0.0


def _fits(value: Any, schema: Schema) -> bool:
    if schema.types and not any(_is_of(value, one) for one in schema.types):
        return False
    if schema.allowed is not None and not any(_same(value, one) for one in schema.allowed):
        return False
    size: Any = value
    for word, limit in schema.bounds.items():
        if word.endswith("imum"):
            if not _is_of(value, "number"):
                continue
        elif isinstance(value, str if word.endswith("Length") else list):
            size = len(value)
        else:
            continue
        if (size < limit) if word.startswith("min") else (size > limit):
            return False
    return True


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or kind == "boolean":
        return isinstance(value, bool) and kind == "boolean"
    if kind == "integer":
        return isinstance(value, int) or isinstance(value, float) and value.is_integer()
    known: dict[str, type | tuple[type, ...]] = {
        "object": dict,
        "array": list,
        "string": str,
        "number": (int, float),
        "null": type(None),
    }
    return isinstance(value, known[kind])


def _same(one: Any, other: Any) -> bool:
    """JSON's equality: 1 is 1.0, and not true."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


# --- content ---------------------------------------------------------------------------------------------------------


def field_f1(value: Any, gold: Any, tolerance: float = 1e-6) -> float:
    """
    F1 of the fields of a value: those at a place where the other has an equal one.

    A field is a number, text, boolean or null with the path to it, elements of an array by their position; an object
    or array that is empty is a field too. Numbers are equal within a relative tolerance, texts by their folded case.

    Args:
        value, gold: As [`read_json`] returns them.
        tolerance (`float`, *optional*, defaults to 1e-6): Of numbers, relative.

    Returns:
        `float`: In [0, 1].

    Example:
    ```python
    >>> gold = {"a": 1, "b": "x"}
    >>> [round(field_f1(value, gold), 4) for value in (gold, {"a": 1}, {"a": 1.0000001, "b": "X"}, [1])]
    [1.0, 0.6667, 1.0, 0.0]
    ```
    """
    ours, theirs = _fields(value), _fields(gold)
    met = sum(path in theirs and _equal(one, theirs[path], tolerance) for path, one in ours.items())
    return 2.0 * met / (len(ours) + len(theirs))


def _fields(value: Any) -> dict[tuple[Any, ...], Any]:
    found: dict[tuple[Any, ...], Any] = {}
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while waiting:
        path, one = waiting.pop()
        if isinstance(one, Mapping) and one:
            waiting += [((*path, name), inner) for name, inner in one.items()]
        elif isinstance(one, Sequence) and not isinstance(one, str) and one:
            waiting += [((*path, place), inner) for place, inner in enumerate(one)]
        else:
            found[path] = one
    return found


def _equal(one: Any, other: Any, tolerance: float) -> bool:
    if isinstance(one, str) and isinstance(other, str):
        return one.casefold() == other.casefold()
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (one, other))
    return math.isclose(one, other, rel_tol=tolerance) if numbers else type(one) is type(other) and one == other
