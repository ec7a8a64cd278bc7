"""A file that can be read in one sitting: no Python file has more than 500 lines."""

from __future__ import annotations

from tests.contract._sources import committed_files, shown

LINES = 500


def test_no_python_file_is_longer():
    sizes = {
        shown(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in committed_files()
        if path.suffix == ".py"
    }
    assert len(sizes) > 100
    long = {name: size for name, size in sizes.items() if size > LINES}
    assert not long, f"files over {LINES} lines, to be split by what they say: {long}"
