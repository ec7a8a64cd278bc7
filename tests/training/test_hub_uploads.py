"""The uploader over real HTTP: what arrives, what is tried again, what is told, and what it never waits for."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import CommitInfo

from hf_effi.errors import HubRefusedError
from hf_effi.hub.uploads import HubUploader
from tests.helpers import Fault, LocalHub

TOKEN = "my-very-own-write-key"  # has no known form: only its place tells that it is a secret
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub(monkeypatch):
    with LocalHub(token=TOKEN) as server:
        server.use(monkeypatch)
        yield server


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(os.urandom(20_000))
    return path


def uploader(**over) -> HubUploader:
    return HubUploader("tester/run", **{"token": TOKEN, "pause": 0.05, "seconds": 60.0, **over})


def test_a_folder_arrives_whole_in_one_commit(hub, folder):
    upload = uploader()
    done = upload.submit(folder, "first")
    assert not done.cancel(), "an upload that runs cannot be taken back"
    assert upload.wait()
    commit = done.result(timeout=0)
    assert isinstance(commit, CommitInfo) and commit.commit_url.startswith(f"{hub.url}/tester/run/commit/")
    assert commit.oid == hub.repos["tester/run"][-1][0] and commit.commit_message == "first"
    assert commit.repo_url.repo_id == "tester/run"
    assert hub.messages("tester/run") == ["first"]
    assert hub.files("tester/run") == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/commit/", status=503),
        Fault("/commit/", status=409),
        Fault("/commit/", status=429),
        Fault("/preupload/", status=500, times=2),
        Fault("/commit/", cut=True),
        Fault("/api/repos/create", cut=True),
        Fault("/objects/batch", status=500),
        Fault("/lfs-up/", cut=True),
    ],
    ids=[
        "commit 503",
        "commit 409",
        "commit 429",
        "preupload 500 twice",
        "commit cut",
        "create cut",
        "LFS batch 500",
        "LFS file cut",
    ],
)
def test_what_passes_is_tried_again(hub, folder, fault):
    hub.faults.append(fault)
    upload = uploader()
    upload.submit(folder, "again")
    assert upload.wait(), upload.failure
    assert hub.messages("tester/run") == ["again"]
    assert fault.times == 0, "the fault was never met"


def test_the_pauses_between_tries_grow(folder, monkeypatch):
    upload, pauses = uploader(pause=2.0, seconds=600.0), []
    busy = {"error": "busy", "status": 503, "retry": True, "retry_after": None}
    monkeypatch.setattr(upload, "_run", lambda job, seconds: busy)
    monkeypatch.setattr(upload._stopped, "wait", pauses.append)
    upload.submit(folder, "again")
    assert not upload.wait() and pauses == [2.0, 4.0, 8.0, 16.0]


def test_the_pause_that_the_server_asks_for_is_kept(hub, folder):
    hub.faults.append(Fault("/commit/", status=429, headers={"Retry-After": "2"}))
    upload = uploader()
    upload.submit(folder, "patient")
    assert upload.wait()
    refused, accepted = (when for when, (_, path) in zip(hub.times, hub.requests, strict=True) if "/commit/" in path)
    assert accepted - refused >= 2.0


@pytest.mark.parametrize("status, words", [(401, "hf auth login"), (403, "write access")])
def test_a_refusal_is_told_once_and_not_tried_again(hub, folder, status, words, caplog):
    hub.faults.append(Fault("/commit/", status=status, times=9, echo=True))
    upload = uploader()
    with caplog.at_level(logging.INFO):
        upload.submit(folder, "no")
        assert not upload.wait()
    assert words in upload.failure and words in caplog.text and "kept on this machine" in caplog.text
    assert TOKEN not in upload.failure and TOKEN not in caplog.text  # though the server repeated it
    assert sum("/commit/" in path for _, path in hub.requests) == 1


def test_a_wrong_token_is_told_before_training(hub):
    with pytest.raises(HubRefusedError, match="hf auth login"):
        uploader(token="wrong").create_repo()


def test_tries_end(hub, folder):
    hub.faults.append(Fault("/commit/", status=500, times=99))
    upload = uploader(tries=2)
    done = upload.submit(folder, "never")
    assert not upload.wait()
    assert "500" in upload.failure and done.result(timeout=0) is None
    assert hub.messages("tester/run") == []


def test_a_server_that_never_answers_is_left_behind(hub, folder):
    hub.faults.append(Fault("/commit/", delay=120.0))
    upload = uploader()
    upload.submit(folder, "slow")
    assert not upload.wait(4.0)
    assert "did not finish within 4 s" in upload.failure and upload.idle


def test_python_ends_though_the_server_never_answers(hub, folder):
    hub.faults.append(Fault("/api/repos/create", delay=300.0))
    code = (
        "import sys, time; from hf_effi.hub.uploads import HubUploader\n"
        f"HubUploader('tester/run', token='{TOKEN}').submit(sys.argv[1], 'x'); time.sleep(3)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, timeout=100, check=False)
    assert done.returncode == 0


def test_the_newest_waiting_folder_wins_and_temporary_ones_go(hub, folder, tmp_path):
    hub.faults.append(Fault("/api/repos/create", delay=2.0))
    upload, copies, done = uploader(), [], []
    for number in range(3):
        copies.append(tmp_path / f"copy-{number}")
        shutil.copytree(folder, copies[-1])
        (copies[-1] / "step.txt").write_text(str(number))
        done.append(upload.submit(copies[-1], f"step {number}", temporary=True))
        time.sleep(0.3)
    assert upload.wait()
    assert [future.result(timeout=0) is None for future in done] == [False, True, False]
    assert hub.messages("tester/run") == ["step 0", "step 2"]
    assert hub.files("tester/run")["step.txt"] == b"2"
    assert not any(copy.exists() for copy in copies)


@pytest.mark.parametrize("bad", [{"seconds": 0}, {"tries": 0}])
def test_impossible_limits_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        HubUploader("tester/run", **bad)


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_where_the_hub_may_not_be_asked_it_is_said_at_once(hub, folder, monkeypatch, caplog, name):
    """Not after five tries with growing pauses: nothing would change."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("no process is started for it"))
    upload = uploader(pause=1000.0)
    assert upload.submit(folder, "never").result(timeout=30) is None
    assert "HF_HUB_OFFLINE is set" in upload.failure and "try 2" not in caplog.text
    with pytest.raises(HubRefusedError, match="HF_HUB_OFFLINE is set.*Unset it"):
        uploader().create_repo()
    assert hub.repos == {}
