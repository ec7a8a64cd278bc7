"""
Children that a preloaded server forked are what fresh interpreters are: of their own, reported, and gone at the end.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import ChildFailure, run_distributed, servers
from tests.helpers._targets import show_environment
from tests.helpers.distributed import ROOT, child_environment
from tests.helpers.servers import server_pids, stop_servers


def who() -> dict[str, object]:
    import numpy

    return {
        "parent": os.getppid(),
        "leads": os.getsid(0) == os.getpid(),
        "hash": hash("a word"),
        "random": (random.random(), numpy.random.random()),
        "cwd": os.getcwd(),
    }


def end_by(how: str) -> None:
    print("on the way out", flush=True)
    if how == "exit":
        sys.exit(3)
    if how == "exception":
        raise KeyError("no such luck")
    os.kill(os.getpid(), signal.SIGSEGV if how == "crash" else signal.SIGKILL)


def kill_the_server() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def test_each_rank_has_a_server_and_a_hash_seed_of_its_own():
    (one, two), (later, _) = run_distributed(who, 2), run_distributed(who, 2)
    assert [one["parent"], two["parent"]] == server_pids()[:2]
    assert one["hash"] == later["hash"] != two["hash"]
    for left, right in zip(one["random"], later["random"], strict=True):
        assert left != right
    assert one["leads"] and one["cwd"] == str(ROOT)


def test_variables_given_for_a_job_need_an_interpreter_of_its_own():
    (given,) = run_distributed(who, 1, env={"SOME_VARIABLE": "1"})
    (fresh,) = run_distributed(who, 1, fresh=True)
    assert given["parent"] == fresh["parent"] == os.getpid()
    assert given["hash"] == fresh["hash"] == run_distributed(who, 1)[0]["hash"]


def test_a_server_is_replaced_when_the_variables_of_the_tests_change_and_when_it_has_died(monkeypatch):
    # Beside the servers of the other tests, which stay as they are.
    monkeypatch.setattr(servers, "_SERVERS", {})
    monkeypatch.setattr(servers, "PRELOAD", False)
    run_distributed(show_environment, 1, [])
    before = server_pids()[0]
    monkeypatch.setenv("SOME_VARIABLE", "seen while imported")
    assert run_distributed(show_environment, 1, ["SOME_VARIABLE"]) == [{"SOME_VARIABLE": "seen while imported"}]
    assert server_pids()[0] != before and not _alive(before)
    with pytest.raises(RuntimeError, match="server of rank 0 ended with exit code -9"):
        run_distributed(kill_the_server, 1)
    assert run_distributed(show_environment, 1, ["RANK"]) == [{"RANK": None}]
    stop_servers()
    assert not server_pids()


@pytest.mark.parametrize(
    ("how", "code", "text"),
    [
        ("exit", 3, ""),
        ("exception", 1, "KeyError: 'no such luck'"),
        ("crash", -11, "Fatal Python error"),
        ("kill", -9, ""),
    ],
)
def test_how_a_child_ended_is_told(how, code, text):
    with pytest.raises(ChildFailure) as failure:
        run_distributed(end_by, 1, how)
    assert f"exit codes [{code}]" in str(failure.value)
    assert "on the way out" in str(failure.value) and text in str(failure.value)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not (status := Path(f"/proc/{pid}/stat")).exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


SESSION = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it runs behind it ignore Ctrl-C
import sys, threading, time
from tests.helpers import run_distributed, servers
from tests.helpers._targets import hang, show_environment
servers.PRELOAD = False
run_distributed(show_environment, 1, [])
threading.Timer(0.5, lambda: print(*servers.server_pids(), flush=True)).start()
if sys.argv[1] == "busy":
    run_distributed(hang, 1)
"""


@pytest.mark.parametrize(
    ("state", "end"),
    [("idle", None), ("busy", signal.SIGINT), ("busy", signal.SIGKILL)],
    ids=["end", "ctrl-c", "kill"],
)
def test_nothing_is_left_behind(state, end):
    command = [sys.executable, "-c", SESSION, state]
    with subprocess.Popen(
        command, cwd=ROOT, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as tests:
        (server,) = map(int, tests.stdout.readline().split())
        children = Path(f"/proc/{server}/task/{server}/children")
        left = [server, *map(int, children.read_text().split())] if children.exists() else [server]
        if end is not None:
            tests.send_signal(end)
        tests.wait(timeout=60)
    deadline = time.monotonic() + 60
    while any(map(_alive, left)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, left))
