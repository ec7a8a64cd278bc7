"""The record on disk: what is written, what is left out, and what a reader gets after a kill."""

import json

import pytest
import torch
from datasets import Dataset

from hf_effi._run_record import EVENTS, REDACTED, SUMMARY, RunStore, read_run, redact
from hf_effi.callbacks.run_record import (
    RunRecordCallback,
    describe_data,
    methods_by_name,
)


def fake_token(prefix):
    return prefix + "0123456789abcdefghijABCDEFGHIJ"


def test_the_value_of_an_option_that_names_a_secret_goes():
    found = redact("train.py --hub_token abc --eos_token <end> --api-key=def --lr 1")
    assert found == f"train.py --hub_token {REDACTED} --eos_token <end> --api-key={REDACTED} --lr 1"


@pytest.mark.parametrize("name", ["hub_token", "token", "API_KEY", "secret_key", "aws_secret", "password", "auth"])
def test_a_value_under_a_secret_name_is_left_out(name):
    assert redact({name: "anything"}) == {name: REDACTED}
    assert redact({"outer": [{name: "anything"}]}) == {"outer": [{name: REDACTED}]}


@pytest.mark.parametrize("name", ["eos_token", "pad_token", "num_tokens", "max_tokens", "token_type", "keyboard"])
def test_names_that_only_look_alike_are_kept(name):
    assert redact({name: "<end>"}) == {name: "<end>"}


@pytest.mark.parametrize("prefix", ["hf_", "sk-", "ghp_", "glpat-"])
def test_a_token_anywhere_is_left_out(prefix):
    text = f"python train.py --x={fake_token(prefix)} --y=1"
    assert redact(text) == f"python train.py --x={REDACTED} --y=1"


def test_passwords_in_addresses_and_values_of_the_environment(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_API_KEY", "plain-looking-value")
    assert redact("https://me:word@host/x?k=plain-looking-value") == f"https://{REDACTED}@host/x?k={REDACTED}"


def test_everything_becomes_plain_json():
    value = {1: (1, 2.5, float("inf")), "t": torch.tensor(3.0), "none": None, "yes": True, "other": torch.float32}
    found = redact(value)
    assert found == {"1": [1, 2.5, "inf"], "t": 3.0, "none": None, "yes": True, "other": "torch.float32"}
    json.dumps(found, allow_nan=False)


def begun(folder, step=0, **header):
    store = RunStore(folder)
    store.begin({"arguments": {"hub_token": "x"}, **header}, step)
    return store


def log(store, step, loss, **totals):
    store.event("log", step=step, values={"loss": loss}, totals={"updates": step, **totals})


def test_the_events_know_more_than_the_last_summary(tmp_path):
    store = begun(tmp_path)
    log(store, 5, 2.0, seconds={"train": 1.0})
    log(store, 10, 1.0, seconds={"train": 2.5}, tokens={"forwarded": 150, "real": 100})
    run = read_run(tmp_path)
    assert json.loads((tmp_path / SUMMARY).read_text())["segments"][0]["end_step"] == 0
    assert run["segments"][0]["end_step"] == 10 and run["status"] == "running"
    assert run["log_history"] == [{"step": 5, "loss": 2.0}, {"step": 10, "loss": 1.0}]
    assert run["totals"]["seconds"] == {"train": 2.5}
    assert run["totals"]["tokens_forwarded_per_real_token"] == 1.5
    assert run["arguments"] == {"hub_token": REDACTED}


def test_a_torn_line_is_passed_over_and_not_continued(tmp_path):
    log(begun(tmp_path), 5, 2.0)
    with (tmp_path / EVENTS).open("a") as file:
        file.write('{"event": "log", "st')
    assert [event["event"] for event in read_run(tmp_path)["events"]] == ["begin", "log"]
    log(begun(tmp_path, step=5), 10, 1.0)
    run = read_run(tmp_path)
    assert [event["event"] for event in run["events"]] == ["begin", "log", "begin", "log"]
    assert len((tmp_path / EVENTS).read_text().splitlines()) == 5


def test_a_resume_is_a_segment_of_the_same_run(tmp_path):
    """Logs behind the checkpoint are superseded; the work that was done twice stays in the totals."""
    first = begun(tmp_path, versions={"torch": "1"})
    log(first, 5, 2.0, seconds={"train": 1.0}, peak_memory_bytes={"host": 10})
    first.event("checkpoint", step=5, path="checkpoint-5")
    log(first, 10, 9.0, seconds={"train": 2.0}, peak_memory_bytes={"host": 30})
    second = begun(tmp_path, step=5, versions={"torch": "2"})
    log(second, 10, 1.0, seconds={"train": 1.5}, peak_memory_bytes={"host": 20})
    run = read_run(tmp_path)
    assert run["run_id"] == first.summary["run_id"] == second.summary["run_id"]
    assert [(s["start_step"], s["end_step"]) for s in run["segments"]] == [(0, 10), (5, 10)]
    assert run["log_history"] == [{"step": 5, "loss": 2.0}, {"step": 10, "loss": 1.0}]
    assert run["totals"]["seconds"] == {"train": 3.5} and run["totals"]["peak_memory_bytes"] == {"host": 30}
    assert run["checkpoints"] == [{"step": 5, "path": "checkpoint-5"}]
    assert run["versions"] == {"torch": "2"}


def test_killed_between_the_first_event_of_a_segment_and_its_summary(tmp_path):
    first = begun(tmp_path)
    log(first, 5, 2.0)
    before = (tmp_path / SUMMARY).read_text()
    log(begun(tmp_path, step=5), 6, 1.0)
    (tmp_path / SUMMARY).write_text(before)
    assert [s["end_step"] for s in read_run(tmp_path)["segments"]] == [5, 6]


def test_a_new_run_puts_the_old_record_aside(tmp_path):
    names = []
    for _ in range(3):
        names.append(begun(tmp_path).summary["run_id"])
    assert read_run(tmp_path)["run_id"] == names[2]
    stored = [json.loads((tmp_path / f"effi_run-{n}.json").read_text())["run_id"] for n in (1, 2)]
    assert stored == names[:2]
    assert (tmp_path / "effi_events-2.jsonl").exists()


def test_a_resume_into_another_folder_starts_its_record_there(tmp_path):
    log(begun(tmp_path, step=5), 6, 1.0)
    assert read_run(tmp_path)["segments"][0]["start_step"] == 5


def test_no_record_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="RunRecordCallback"):
        read_run(tmp_path)


def test_fingerprint_of_data():
    rows = [{"text": f"row {i}"} for i in range(100)]
    found = describe_data(Dataset.from_list(rows))
    assert (found["rows"], found["columns"], found["class"]) == (100, ["text"], "Dataset")
    assert found["fingerprint"] == describe_data(rows)["fingerprint"]
    assert found["fingerprint"] != describe_data(rows[::-1])["fingerprint"]
    assert describe_data([])["rows"] == 0
    assert describe_data(None) is None
    assert describe_data(iter([1]))["fingerprint"] is None
    assert describe_data(Stream())["rows"] is None
    assert describe_data([object()])["fingerprint"] == describe_data([object()])["fingerprint"]


class Stream(torch.utils.data.IterableDataset):
    def __len__(self):
        return 4

    def __iter__(self):
        raise AssertionError("a stream must not be read")


def test_reading_rows_leaves_random_numbers_where_they_are():
    class Augmented:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.rand(2)

    before = torch.get_rng_state()
    describe_data(Augmented())
    assert torch.equal(torch.get_rng_state(), before)


def test_methods_by_the_names_of_their_entry_points():
    assert methods_by_name({"wsd", "ReptileCallback", "Nothing", None}) == ["wsd", "reptile"]


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="unknown method 'adalor'.*adalora"):
        RunRecordCallback(methods=["adalor"])
    for methods in ("adalora", None):
        with pytest.raises(ValueError, match="must be a list"):
            RunRecordCallback(methods=methods)
