"""The line that stands for what a Trainer without a bar prints."""

from __future__ import annotations

import io

import pytest
from transformers import Trainer, TrainingArguments

from bench._progress import EndLine, ProgressLine, with_line
from tests.helpers import lm_dataset, tiny_qwen3


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("live", [True, False])
def test_one_line_in_place_of_dictionaries(tmp_path, capsys, live):
    args = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(tiny_qwen3(), args, train_dataset=lm_dataset(8))
    with_line(trainer, "stock, seed 0", live=live).train()
    shown = capsys.readouterr()
    assert shown.out == "", "no dictionaries"
    assert [line.split(" in ")[0] for line in shown.err.splitlines() if "updates" in line] == [
        "stock, seed 0: 3 updates"
    ]


def test_a_terminal_sees_how_far_it_is(monkeypatch):
    class State:
        global_step, max_steps = 2, 9

    monkeypatch.setattr("bench._progress._SECONDS_BETWEEN", 0.0)
    for cls, shown in ((ProgressLine, "\rours: update 2 of 9\rours: 2 updates"), (EndLine, "\rours: 2 updates")):
        stream = Terminal()
        line = cls("ours", stream)
        line.on_train_begin(None, State, None)
        line.on_step_end(None, State, None)
        line.on_train_end(None, State, None)
        assert stream.getvalue().startswith(shown) and stream.getvalue().endswith(" s\n")
    quiet = io.StringIO()
    line = ProgressLine("ours", quiet)
    line.on_train_begin(None, State, None)
    line.on_step_end(None, State, None)
    assert quiet.getvalue() == "", "a file gets the line at the end only"
