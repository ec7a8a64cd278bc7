"""`python -m bench.zoo --feature KEY` puts one feature's cells into the file, and touches no other."""

from __future__ import annotations

import pytest

from bench.zoo import headlines, merged

EQUAL, REFUSED = {"mark": "equal"}, {"mark": "refused", "why": "no"}
ROWS = [
    {"kind": "causal", "class": "A", "model_type": "a", "cells": {"trim": EQUAL, "varlen": {"mark": "neither"}}},
    {"kind": "causal", "class": "B", "model_type": "b", "error": "does not build"},
    {"kind": "masked", "class": "A", "model_type": "a", "cells": {"trim": EQUAL}},
    {"axis": "lora", "level": "yes", "counts": {"trim": [1, 0], "varlen": [5, 5]}},
]
AGAIN = [
    {"kind": "causal", "class": "A", "model_type": "a", "cells": {"varlen": REFUSED}},
    {"axis": "packing", "level": "yes", "counts": {"varlen": [0, 1]}},
]


def test_only_the_cells_and_counts_of_the_feature_change():
    rows = merged(ROWS, AGAIN, ["varlen"])
    assert rows[0]["cells"] == {"trim": EQUAL, "varlen": REFUSED}
    assert rows[1:3] == ROWS[1:3], "a class that does not build, and a kind that the feature is not for"
    assert {(r["axis"], r["level"]): r["counts"] for r in rows[3:]} == {
        ("lora", "yes"): {"trim": [1, 0]},
        ("packing", "yes"): {"varlen": [0, 1]},
    }
    figures = {figure["name"]: figure["value"] for figure in headlines(rows)}
    assert figures["classes"] == 3 and figures["classes_built"] == 2
    assert (figures["cells_equal"], figures["cells_refused"], figures["cells_neither"]) == (2, 1, 0)


def test_another_release_of_transformers_is_named():
    with pytest.raises(ValueError, match="other classes than the installed transformers"):
        merged(ROWS, [{"kind": "causal", "class": "C", "model_type": "m", "cells": {}}], ["varlen"])


def test_a_class_of_two_model_types_keeps_both_and_features_their_order():
    rows = [{**ROWS[0], "model_type": name} for name in ("one", "two")]
    again = [{"kind": ROWS[0]["kind"], "class": ROWS[0]["class"], "model_type": name, "cells": {"trim": mark}}
             for name, mark in (("one", EQUAL), ("two", REFUSED))]  # fmt: skip
    found = merged(rows, again, ["trim"])
    assert [(row["model_type"], row["cells"]["trim"]) for row in found] == [("one", EQUAL), ("two", REFUSED)]
    assert [list(row["cells"]) for row in found] == [list(ROWS[0]["cells"])] * 2
