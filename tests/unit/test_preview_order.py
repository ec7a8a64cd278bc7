import argparse
import json

import pytest

from hf_effi.report import preview_order
from hf_effi.samplers import CompetenceSampler, QualityAscendingSampler, ShuffledSampler


def call(*words):
    parser = argparse.ArgumentParser()
    preview_order.add_arguments(parser)
    return preview_order.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"score": (7 * i) % 20, "source": "ab"[i % 2]} for i in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_parts_rise_and_cover_the_epoch():
    values = [float((7 * i) % 20) for i in range(20)]
    shown = preview_order.preview(QualityAscendingSampler(values), values, ["x"] * 20, parts=3)
    assert [part["samples"] for part in shown["parts"]] == [7, 6, 7]
    assert [part["low"] for part in shown["parts"]] == [0, 7, 13]
    assert shown["parts"][0]["shares"] == {"x": 1.0}
    assert (shown["samples"], shown["distinct_rows"], shown["most_often"]) == (20, 20, 1)


def test_repeats_and_missing_rows_are_counted():
    shown = preview_order.preview(CompetenceSampler([0.0, 1.0], 6, start=0.5, full_at=1.0, root=1), [0.0, 1.0])
    assert shown["samples"] == 6 and shown["most_often"] >= 3
    assert len(shown["parts"]) == 6
    with pytest.raises(ValueError, match="values has 1 entries for 2 rows"):
        preview_order.preview(ShuffledSampler(2), [1.0])
    with pytest.raises(ValueError, match="batch_size=0"):
        preview_order.preview(ShuffledSampler(1), [1.0], batch_size=0)


@pytest.mark.parametrize("order", ["shuffled", "quality-ascending", "competence", "cyclical", "interleaved"])
def test_command_prints_text_and_json(table, capsys, order):
    assert call(order, table, "--column", "score", "--group", "source") == 0
    assert "part" in capsys.readouterr().out
    assert call(order, table, "--column", "score", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["parts"]) == 10


def test_command_shows_strata(table, capsys):
    assert call("quality-ascending", table, "--column", "score", "--group", "source", "--json") == 0
    for part in json.loads(capsys.readouterr().out)["parts"]:
        assert part["shares"] == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--column", "quality"], 1, "no column 'quality'"),
        (["--column", "source"], 1, "source='a' is not a number"),
        (["--column", "score", "--samples", "3"], 2, "--samples does not act on quality-ascending"),
        (["--column", "score", "--buckets", "99"], 1, "buckets=99 exceeds the 20 rows"),
    ],
)
def test_bad_input_is_one_line(table, capsys, words, code, message):
    assert call("quality-ascending", table, *words) == code
    assert message in capsys.readouterr().err


def test_files(tmp_path):
    (tmp_path / "a.csv").write_text("score,x\n1,2\n3,4\n")
    assert preview_order.read_column(tmp_path / "a.csv", "score") == ["1", "3"]
    (tmp_path / "a.json").write_text('[{"score": 1}]')
    assert preview_order.read_column(tmp_path / "a.json", "score") == [1]
    for name, text, message in (("a.txt", "", "is not known"), ("b.jsonl", "", "no rows")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            preview_order.read_column(tmp_path / name, "score")
