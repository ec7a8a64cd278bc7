"""The bench of token files runs in all its parts, and serves the same rows in each way."""

from __future__ import annotations

from bench import token_files


def test_every_part_runs():
    rows = token_files.main(["--quick"])
    assert [row["way"] for row in rows] == list(token_files.WAYS)
    assert all(row["rows_per_second"] > 0 and row["first_batch_seconds"] > 0 for row in rows)
    assert {figure["name"] for figure in token_files.figures(rows)} >= {"token_file_resident_bytes_ratio"}


def test_the_ways_serve_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "BATCH", 1)
    told = token_files.prepare(tmp_path, token_files.Size(tokens=10_000, length=64), 0)
    served = [
        sorted(tuple(batch["input_ids"][0].tolist()) for batch in token_files.loader(way, tmp_path, 64, 0))
        for way in token_files.WAYS
    ]
    assert served[0] == served[1] == served[2] and len(served[0]) == told["rows"]
