"""What only observes never ends a run, and a record says how its run ended."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_effi import EffiTrainer, EffiTrainingArguments, RunRecordCallback, TrainDoctor, read_run
from hf_effi._run_record import FOLDER, SUMMARY, RunStore, redact
from hf_effi.callbacks import _endings
from hf_effi.hub.uploads import HubUploader
from tests.helpers import lm_dataset, push_args, tiny_qwen3
from tests.helpers.distributed import start_children


class Handle:
    """As of a client that is not connected."""

    def __repr__(self) -> str:
        raise RuntimeError("not connected")


def loop() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["me"] = value
    return value


def deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(5000):
        value = [value]
    return value


def alias_bomb() -> list[Any]:
    value: list[Any] = ["x"]
    for _ in range(30):
        value = [value] * 10
    return value


STRANGE = {
    "repr": Handle,
    "loop": loop,
    "deep": deep,
    "bomb": alias_bomb,
    "large": lambda: 10**400,
    "larger": lambda: 10**5000,
    "surrogate": lambda: "\ud800",
    "keys": lambda: {Handle(): 1},
    "bytes": lambda: b"\xff",
}


class Logs(TrainerCallback):
    """Shows our callbacks a value among the logs. Those of transformers print it, which need not work."""

    def __init__(self, value: Any, *observers: TrainerCallback) -> None:
        self.value, self.observers = value, observers

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for observer in self.observers:
            logs = {"effi/rows_generated": self.value, "effi/tokens_forward": self.value, "loss": self.value}
            observer.on_log(args, state, control, logs=logs, **kwargs)


def make(folder: Path, cls: type = EffiTrainer, data: Any = None, callbacks: Any = (), **over: Any) -> Any:
    config = EffiTrainingArguments if issubclass(cls, EffiTrainer) else TrainingArguments
    args = push_args(folder, config, **over)
    return cls(tiny_qwen3(), args, train_dataset=lm_dataset(16) if data is None else data, callbacks=list(callbacks))


@pytest.mark.parametrize("name", STRANGE)
def test_any_argument_can_be_recorded(tmp_path: Path, name: str) -> None:
    trainer = make(tmp_path, max_steps=2, save_strategy="no")
    trainer.args.lr_scheduler_kwargs = None
    trainer.args.project = STRANGE[name]()  # a field that only trackers read
    assert trainer.train().global_step == 2
    assert read_run(tmp_path)["status"] == "finished"


@pytest.mark.parametrize("name", STRANGE)
def test_any_metric_can_be_recorded(tmp_path: Path, name: str) -> None:
    record, doctor = RunRecordCallback(), TrainDoctor(say=lambda sentence: None)
    logs = Logs(STRANGE[name](), record, doctor)
    trainer = make(tmp_path, callbacks=[record, doctor, logs], max_steps=2, save_strategy="no")
    assert trainer.train().global_step == 2
    found = read_run(tmp_path)
    assert found["status"] == "finished" and json.dumps(found)


def test_strange_values_are_told_and_bounded() -> None:
    assert redact(Handle()) == "<Handle without a text: RuntimeError>"
    assert redact(loop()) == {"me": "<dict that contains itself>"}
    assert redact([1, 10**400]) == [1, "<integer of 1329 bits>"]
    shared = [1]
    assert redact([shared, shared]) == [[1], [1]]  # twice is not inside itself
    assert len(json.dumps(redact(deep()))) < 1000
    assert len(json.dumps(redact(alias_bomb()))) < 10_000_000


class Rows:
    """Serves each row once, which a second reader breaks."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        if "describe_data" in {frame.f_code.co_name for frame in _frames()}:
            raise ConnectionError("only the training may read")
        return lm_dataset(16)[index]


def _frames() -> list[Any]:
    frame, found = sys._getframe(), []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def test_rows_that_cannot_be_read_for_a_fingerprint(tmp_path: Path) -> None:
    assert make(tmp_path, data=Rows(), max_steps=2, save_strategy="no").train().global_step == 2
    assert read_run(tmp_path)["data"]["train"] == {
        "class": "Rows",
        "columns": None,
        "rows": 16,
        "fingerprint": None,
    }


@pytest.mark.parametrize("method", ["begin", "event", "save"])
@pytest.mark.parametrize("error", [RuntimeError, RecursionError, ValueError, KeyError])
def test_whatever_fails_in_a_record_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str, error: type
) -> None:
    def fails(self: Any, *args: Any, **kwargs: Any) -> None:
        raise error("by chance")

    monkeypatch.setattr(RunStore, method, fails)
    with caplog.at_level(logging.WARNING):
        assert make(tmp_path).train().global_step == 4
    assert len([m for m in caplog.messages if "goes on without its record" in m]) == 1
    assert not _endings._open


def test_a_summary_or_a_card_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise KeyError("progress")

    monkeypatch.setattr("hf_effi.trainers.mixins.run_record.summary_lines", fails)
    monkeypatch.setattr("hf_effi.hub.publish.add_section", fails)
    trainer = make(tmp_path, disable_tqdm=False)
    assert trainer.train().global_step == 4
    trainer.create_model_card(model_name="x")
    text = "\n".join(caplog.messages)
    assert "has no summary: KeyError" in text and "without its recipe: KeyError" in text


@pytest.mark.parametrize(
    "answer", ["null", "[]", '"done"', "{}", '{"error": 1}', '{"error": "x"}', '{"repo_id": "a/b", "commit": 3}', "no"]
)
def test_an_answer_that_is_none_does_not_hold_up_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str
) -> None:
    class Worker:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def communicate(self, *args: Any, **kwargs: Any) -> tuple[str, str]:
            return answer, ""

    monkeypatch.setattr("hf_effi.hub.uploads.subprocess.Popen", Worker)
    uploader = HubUploader("me/x", token="a", seconds=30, tries=1)
    assert uploader.submit(tmp_path, "m").result(timeout=20) is None
    assert uploader.idle or uploader.wait(5) is False
    assert uploader.failure


# --- how a run ended ------------------------------------------------------------------------------------------------


class Raises(TrainerCallback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise self.error


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), "interrupted"), (SystemExit(1), "interrupted"), (ValueError("bad row"), "failed")],
)
def test_an_effi_trainer_says_how_its_run_ended(tmp_path: Path, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)):
        make(tmp_path, callbacks=[Raises(error)]).train()
    found = read_run(tmp_path)
    assert found["status"] == status and found["error"].startswith(type(error).__name__)
    assert found["events"][-1]["event"] == "end" and found["events"][-1]["status"] == status
    assert found["segments"][-1]["end_step"] == 2  # the last one that was logged
    assert not _endings._open and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    make(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found = read_run(tmp_path)
    assert found["status"] == "finished" and "error" not in found


def test_the_next_run_closes_the_record_of_one_that_raised(tmp_path: Path) -> None:
    record, raises = RunRecordCallback(), Raises(ValueError())
    trainer = make(tmp_path, Trainer, callbacks=[record, raises])
    with pytest.raises(ValueError):
        trainer.train()
    assert read_run(tmp_path)["status"] == "running"  # nobody has told
    trainer.remove_callback(raises)
    trainer.train()
    first = json.loads((tmp_path / FOLDER / SUMMARY).with_stem("effi_run-1").read_text())
    assert first["status"] == "interrupted" and read_run(tmp_path)["status"] == "finished"


class Waits(TrainerCallback):
    """Raises after the second update, or waits for a signal."""

    def __init__(self, folder: str, how: str) -> None:
        self.folder, self.how = folder, how

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            if self.how == "raise":
                raise ValueError("a row is bad")
            Path(self.folder, "waits").touch()
            time.sleep(60)


def ended(folder: str, kind: str, how: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it runs behind it ignore Ctrl-C
    if kind == "stock":
        callbacks = [RunRecordCallback(), Waits(folder, how)]
        trainer = Trainer(tiny_qwen3(), push_args(folder), train_dataset=lm_dataset(16), callbacks=callbacks)
    else:
        args = push_args(folder, EffiTrainingArguments, dataloader_num_workers=1)
        trainer = EffiTrainer(tiny_qwen3(), args, train_dataset=lm_dataset(16), callbacks=[Waits(folder, how)])
    trainer.train()


@pytest.mark.parametrize("kind", ["stock", "effi"])
@pytest.mark.parametrize("how", ["raise", "SIGINT", "SIGTERM"])
def test_a_process_that_ends_leaves_the_reason(tmp_path: Path, kind: str, how: str) -> None:
    children = start_children(ended, 1, tmp_path / "child", str(tmp_path), kind, how)
    try:
        if how != "raise":
            children.wait(200, until=(tmp_path / "waits").exists)
            os.kill(children.processes[0].pid, getattr(signal, how))
        children.wait(200, until=lambda: children.processes[0].poll() is not None)
    finally:
        children.kill()
    errors = children.output(0).read_text()
    found = read_run(tmp_path)
    status, reason = {
        "raise": ("failed", "ValueError: a row is bad"),
        "SIGINT": ("interrupted", "KeyboardInterrupt:"),
        "SIGTERM": ("interrupted", "SIGTERM"),
    }[how]
    assert (found["status"], found["error"]) == (status, reason), errors[-2000:]
    assert children.processes[0].returncode == {"raise": 1, "SIGINT": -signal.SIGINT, "SIGTERM": -signal.SIGTERM}[how]


def test_a_signal_that_somebody_handles_is_left_to_him(tmp_path: Path) -> None:
    def mine(number: int, frame: Any) -> None:
        pass

    signal.signal(signal.SIGTERM, mine)
    try:
        make(tmp_path, callbacks=[Raises(ValueError())], save_strategy="no")
        seen: list[Any] = []

        class Looks(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                seen.append(signal.getsignal(signal.SIGTERM))

        make(tmp_path, callbacks=[Looks()]).train()
        assert set(seen) == {mine} and signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_run_in_a_thread_is_recorded_without_signals(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert read_run(tmp_path)["status"] == "finished"


def test_a_forked_child_does_not_close_the_record_of_its_parent(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.begin({"data": {}}, 0)
    _endings.watch_end(store)
    try:
        child = os.fork()
        if child == 0:
            _endings._at_exit()
            os._exit(0)
        os.waitpid(child, 0)
        assert read_run(tmp_path)["status"] == "running"
    finally:
        _endings.forget_end(store)


def test_data_without_a_name(tmp_path: Path) -> None:
    assert make(tmp_path, data=Dataset.from_list(lm_dataset(16).to_list())).train().global_step == 4
