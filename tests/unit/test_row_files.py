"""`read_rows`: every kind of file gives the same rows, and what is wrong with one is said with its row."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict

from hf_effi.data import row_files
from hf_effi.data.row_files import read_rows

#: a line separator inside a text is no new row
ROWS = [{"prompt": "a\u2028b\x0cc", "answer": "1"}, {"prompt": 'two\nlines, "quoted"', "answer": "2"}]


def test_every_kind_gives_the_same_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), "utf-8")
    (tmp_path / "a.json").write_text(json.dumps(ROWS), "utf-8-sig")
    (tmp_path / "a.csv").write_text('prompt,answer\n"a\u2028b\x0cc",1\n"two\nlines, ""quoted""",2\n', "utf-8")
    dataset = Dataset.from_list(ROWS)
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    dataset.save_to_disk(str(tmp_path / "folder"))
    DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(str(tmp_path / "splits"))
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "folder", "splits"):
        assert read_rows(tmp_path / name, ("prompt", "answer")) == ROWS, name


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"answer": 1}\n{"answer', "line 2 is not JSON"),
        ("a.jsonl", "", "has no rows"),
        ("a.jsonl", "[1]", "one object per row"),
        ("a.json", '{"answer": 1}', "one object per row"),
        ("a.json", "[" * 100_000, "cannot be read as .json"),
        ("a.jsonl", '{"answer": 1}\n{"prompt": 1}', "row 1: no column 'answer'. It has ['prompt']"),
        ("a.txt", "x", ".txt is not known"),
        ("a.parquet", "x", "is not a Parquet file"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as caught:
        read_rows(tmp_path / name, ("answer",))
    assert said in str(caught.value)


def test_folders_and_sizes(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such file or folder"):
        read_rows(tmp_path / "none")
    with pytest.raises(ValueError, match="is not a folder of `Dataset.save_to_disk`"):
        read_rows(tmp_path)
    DatasetDict(test=Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match="has the splits test, not 'train'"):
        read_rows(tmp_path / "splits")
    (tmp_path / "a.jsonl").write_text('{"answer": 1}')
    monkeypatch.setattr(row_files, "LARGEST_FILE", 4)
    with pytest.raises(ValueError, match="larger than 4 bytes"):
        read_rows(tmp_path / "a.jsonl")
