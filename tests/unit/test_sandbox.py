"""The sandbox itself: what it refuses, its workers, its limits, its arguments."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bench import _sandbox_throughput as throughput
from hf_effi.errors import RefusedError
from hf_effi.rewards import Isolation, ProgramResult, Sandbox, SandboxLimits, probe_isolation
from hf_effi.rewards import _pool as pool_module
from hf_effi.rewards import sandbox as sandbox_module
from hf_effi.rewards._isolation import GUARDS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
ANYWHERE = tuple(GUARDS)
PYTHON = ["python3", "-I", "-S", "main.py"]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(SandboxLimits(wall_seconds=20.0), workers=2, accept=ANYWHERE) as made:
        yield made


def workers(sandbox: Sandbox) -> list[int]:
    return [client.process.pid for client in sandbox._pools[os.getpid()]._clients]


# --- results ---------------------------------------------------------------------------------------------------------


def test_what_a_program_says(sandbox: Sandbox) -> None:
    program = "import sys\nprint(input() + 'é')\nsys.stderr.write('e')\nsys.exit(3)"
    result = sandbox.run(PYTHON, "ü\n", {"main.py": program})
    assert (result.status, result.exit_code, result.text, result.stderr) == ("exit", 3, "üé\n", b"e")
    assert result.describe().startswith("exit (exit code 3), after ")
    assert 0 < result.cpu_seconds < 5 and 0 < result.seconds < 20 and not result.ok


def test_signals_and_programs_that_are_not_there(sandbox: Sandbox) -> None:
    killed = sandbox.run(["sh", "-c", "kill -SEGV $$"])
    assert (killed.status, killed.exit_code, killed.message) == ("signal", None, f"signal {int(signal.SIGSEGV)}")
    missing = sandbox.run(["no-such-program"])
    assert missing.status == "not_started" and "No such file" in missing.message
    no_program = sandbox.run(["./text"], files={"text": "\x7fELF"})
    assert no_program.status == "not_started" and "Exec format" in no_program.message


def test_standard_input_of_a_megabyte_that_nobody_reads_and_one_that_is_read(sandbox: Sandbox) -> None:
    given = b"x" * 1_000_000
    assert sandbox.run(["true"], given).ok
    assert sandbox.run(["cat"], given).stdout == given


def test_cpu_time() -> None:
    with Sandbox(SandboxLimits(wall_seconds=30.0, cpu_seconds=1), workers=1, accept=ANYWHERE) as sandbox:
        result = sandbox.run(["sh", "-c", "while :; do :; done"])
    assert (result.status, result.message) == ("timeout", "CPU time") and result.cpu_seconds < 3


def test_files_in_and_out(sandbox: Sandbox) -> None:
    program = "mkdir d && cp a/b d/c && ln -s /etc/passwd l && ln -s /usr e && mkfifo p && ./run"
    files = {"a/b": b"\0\xff", "run": "#!/bin/sh\necho executable"}
    result = sandbox.run(["sh", "-c", program], files=files, keep=True)
    assert result.text == "executable\n"
    assert result.files == {"a/b": b"\0\xff", "d/c": b"\0\xff", "run": b"#!/bin/sh\necho executable"}
    assert not sandbox.run(["true"], files=files).files


def test_folders_that_cannot_be_kept(sandbox: Sandbox) -> None:
    large = sandbox.run(
        ["sh", "-c", "head -c 3000000 /dev/zero > x"], keep=True, limits=SandboxLimits(folder_bytes=4_000_000)
    )
    assert (large.status, large.files) == ("output", {}) and "2,000,000 bytes" in large.message
    deep = "import os\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')"
    assert sandbox.run(PYTHON, files={"main.py": deep}, keep=True).status == "output"


def test_the_environment_that_is_given() -> None:
    with Sandbox(environment={"NAME": "a b"}, workers=1, accept=ANYWHERE) as sandbox:
        assert sandbox.run(["sh", "-c", "echo $NAME $LANG"]).text == "a b C.UTF-8\n"


def test_readable_folders(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("shown")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder.name.startswith(("pytest", "test")):
            folder.chmod(0o755)
    with Sandbox(readable=[str(tmp_path)], workers=1, accept=ANYWHERE) as sandbox:
        result = sandbox.run(["sh", "-c", f"cat {tmp_path}/data; echo x > {tmp_path}/new"])
        assert result.text == "shown" and result.status == "exit" and not (tmp_path / "new").exists()


# --- workers ---------------------------------------------------------------------------------------------------------


def test_a_worker_that_was_killed_is_replaced(sandbox: Sandbox) -> None:
    sandbox.run(["true"])
    before = workers(sandbox)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert sandbox.run(["echo", "1"]).text == "1\n"
    assert not set(workers(sandbox)) & set(before) or len(workers(sandbox)) <= 2


def test_a_program_is_tried_again_once_and_then_lost(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    ask = pool_module.Client.ask

    def killed(self: Any, request: Any, blobs: Any) -> Any:
        asked.append(self.process.pid)
        self.process.kill()
        self.process.wait()
        return ask(self, request, blobs)

    with monkeypatch.context() as patch:
        patch.setattr(pool_module.Client, "ask", killed)
        result = sandbox.run(["true"])
    assert result.status == "lost" and len(set(asked)) == 2
    assert sandbox.run(["true"]).ok


def test_a_program_ends_with_its_worker() -> None:
    """Nobody waits for a program any more: it must not run on. It is tried again, once."""
    mark = f"7{os.getpid()}"
    with Sandbox(SandboxLimits(wall_seconds=60.0), workers=1, accept=ANYWHERE) as sandbox:
        future = sandbox._submit(["sleep", mark], b"", None, None, False)
        wait_until(lambda: running(mark) != [])
        (first,) = running(mark)
        os.kill(workers(sandbox)[-1], signal.SIGKILL)
        wait_until(lambda: running(mark) not in ([], [first]) and first not in running(mark))
        os.kill(workers(sandbox)[-1], signal.SIGKILL)
        assert future.result(timeout=30).status == "lost"
        wait_until(lambda: running(mark) == [])


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def running(mark: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == f"sleep\0{mark}\0".encode():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_twenty_programs_at_once(sandbox: Sandbox) -> None:
    async def together() -> list[ProgramResult]:
        return await asyncio.gather(*(sandbox.run_async(["sh", "-c", f"echo {i}"]) for i in range(20)))

    assert [result.text for result in asyncio.run(together())] == [f"{i}\n" for i in range(20)]
    assert len(workers(sandbox)) <= 2


@pytest.mark.skipif(os.geteuid() != 0, reason="programs run as other users only where this one is root")
def test_every_worker_has_a_user_of_its_own(sandbox: Sandbox) -> None:
    """The limit on processes counts by user, also over the processes of a distributed run."""
    script = ["sh", "-c", "id -u; sleep 0.3"]
    with Sandbox(workers=1, accept=ANYWHERE) as other:
        futures = [room._submit(script, b"", None, None, False) for room in (sandbox, sandbox, other)]
        users = [int(future.result().text) for future in futures]
    assert len(set(users)) == 3 and min(users) >= 60578 and max(users) <= 61183


def test_it_pickles_without_its_workers(sandbox: Sandbox) -> None:
    sandbox.run(["true"])
    copy = pickle.loads(pickle.dumps(sandbox))
    assert copy._pools == {} and copy.limits == sandbox.limits
    with copy:
        assert copy.run(["echo", "1"]).text == "1\n"


def test_a_fork_has_workers_of_its_own(sandbox: Sandbox) -> None:
    sandbox.run(["true"])
    before = workers(sandbox)

    def in_a_fork(queue: Any) -> None:
        found = sandbox.run(["echo", "1"]).text
        queue.put((found, workers(sandbox)))
        sandbox.close()

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_a_fork, args=(queue,))
    child.start()
    found, others = queue.get(timeout=60)
    child.join(30)
    assert found == "1\n" and not set(others) & set(before)
    assert sandbox.run(["echo", "2"]).text == "2\n" and workers(sandbox)[: len(before)] == before


def test_closed_and_opened_again() -> None:
    sandbox = Sandbox(workers=1, accept=ANYWHERE)
    sandbox.run(["true"])
    pid = workers(sandbox)[0]
    sandbox.close()
    sandbox.close()
    assert not Path(f"/proc/{pid}").exists()
    assert sandbox.run(["true"]).ok
    sandbox.close()


# --- what it refuses -------------------------------------------------------------------------------------------------

STRONG = Isolation(
    root=True,
    own_uid=True,
    user_namespace=True,
    network=True,
    private_root=True,
    pid_namespace=True,
    proc=True,
    no_more_namespaces=True,
    process_limit="own",
    no_new_privileges=True,
    watching=True,
)
NOTHING = replace(
    STRONG,
    own_uid=False,
    user_namespace=False,
    network=False,
    private_root=False,
    pid_namespace=False,
    proc=False,
    no_more_namespaces=False,
    process_limit="none",
)


@pytest.mark.parametrize(
    ("less", "missing"),
    [
        ({}, ()),
        ({"network": False}, ("network",)),
        ({"private_root": False}, ("leftovers",)),
        ({"private_root": False, "own_uid": False}, ("files", "leftovers")),
        ({"process_limit": "none"}, ("processes",)),
        ({"process_limit": "shared"}, ()),
        ({"pid_namespace": False, "own_uid": False}, ("parent",)),
        ({"pid_namespace": False}, ()),
        ({"proc": False}, ("memory",)),
        ({"no_more_namespaces": False}, ("memory",)),
        (asdict(NOTHING), ANYWHERE),
    ],
)
def test_what_is_missing_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, less: dict[str, Any], missing: tuple[str, ...]
) -> None:
    isolation = replace(STRONG, **less)
    assert isolation.missing == missing and set(isolation.guards) | set(missing) == set(GUARDS)
    monkeypatch.setattr(sandbox_module, "probe_isolation", lambda readable=(): isolation)
    if missing:
        with pytest.raises(RefusedError, match=f"weaker here than asked for. {missing[0]}: .*accept=") as refused:
            Sandbox()
        assert repr(missing) in str(refused.value)
        with pytest.raises(RefusedError):
            Sandbox(accept=[name for name in GUARDS if name != missing[-1]])
    told = Sandbox(accept=missing).describe()
    for name, (held, lacking) in GUARDS.items():
        assert (lacking if name in missing else held) in told
        assert (held if name in missing else lacking) not in told


def test_old_kernels_are_refused_whatever_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "probe_isolation", lambda readable=(): replace(STRONG, watching=False))
    with pytest.raises(RefusedError, match=r"needs Linux 5\.3"):
        Sandbox(accept=ANYWHERE)


def test_a_pickled_sandbox_looks_again_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "probe_isolation", lambda readable=(): STRONG)
    copy = pickle.loads(pickle.dumps(Sandbox()))
    monkeypatch.setattr(sandbox_module, "probe_isolation", lambda readable=(): replace(STRONG, network=False))
    with pytest.raises(RefusedError, match="network"):
        copy.run(["true"])


def test_what_is_measured_is_measured_once() -> None:
    assert probe_isolation() is probe_isolation()
    assert probe_isolation().root == (os.geteuid() == 0)


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"readable": ["/proc/1"]}, ValueError, "'/proc/1' must be a folder, and neither"),
        ({"readable": ["/no/such/folder"]}, ValueError, "must be a folder"),
        ({"limits": 3}, TypeError, "must be a SandboxLimits, got int 3"),
        ({"workers": 0}, ValueError, "workers=0"),
        ({"accept": "network"}, TypeError, "accept='network' must be a list"),
        ({"accept": ["nothing"]}, ValueError, "'nothing' is no guard. Guards: network, files"),
        ({"environment": {"A=B": "c"}}, ValueError, "'A=B'"),
        ({"container": ["run"]}, ValueError, r"must have '\{folder\}'"),
        ({"container": "run {folder}"}, TypeError, "must be a list of texts"),
        ({"container": ["run", "{folder}"], "accept": ["network"]}, ValueError, "leave accept= and readable= out"),
        ({"container": ["run", "{folder}"], "container_stop": ["stop"]}, ValueError, r"must have '\{name\}'"),
        ({"container": ["run", "{folder}"], "container_stop": ["s", "{name}"]}, ValueError, "container= must have"),
        ({"container_stop": ["stop", "{name}"]}, ValueError, "there is no container="),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        Sandbox(**{"accept": ANYWHERE, **arguments} if "container" not in arguments else arguments)


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"wall_seconds": 0}, "wall_seconds=0"),
        ({"wall_seconds": float("nan")}, "wall_seconds=nan"),
        ({"cpu_seconds": 0.5}, "cpu_seconds=0.5"),
        ({"memory_bytes": 1000}, "at least 33554432"),
        ({"address_bytes": 1}, "address_bytes=1"),
        ({"processes": 0}, "processes=0"),
        ({"open_files": True}, "open_files=True"),
    ],
)
def test_bad_limits(limits: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SandboxLimits(**limits)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "", "a\0b"])
def test_bad_paths(sandbox: Sandbox, path: str) -> None:
    with pytest.raises(ValueError, match="must be a path inside the folder"):
        sandbox.run(["true"], files={path: ""})


def test_bad_programs(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match="must name a program"):
        sandbox.run([])
    with pytest.raises(TypeError, match="must be a list of texts"):
        sandbox.run("true")
    with pytest.raises(ValueError, match="more than folder_bytes=5,000"):
        sandbox.run(["true"], files={"x": "x" * 6000}, limits=SandboxLimits(folder_bytes=5000))


# --- containers ------------------------------------------------------------------------------------------------------

FAKE = """#!/bin/sh
# what a container engine is called as: run --name NAME --volume FOLDER:/box --memory BYTES program...
echo "$@" > "{calls}"
if [ "$1" = kill ]; then exit 0; fi
cd "${{5%:/box}}" || exit 9
shift 7
exec "$@"
"""


@pytest.fixture
def container(tmp_path: Path) -> tuple[Sandbox, Path]:
    engine, calls = tmp_path / "engine", tmp_path / "calls"
    engine.write_text(FAKE.format(calls=calls))
    engine.chmod(0o755)
    command = [str(engine), "run", "--name", "{name}", "--volume", "{folder}:/box", "--memory={memory_bytes}", "--"]
    command[4:8] = ["--volume", "{folder}:/box", "--memory", "{memory_bytes}"]
    limits = SandboxLimits(wall_seconds=20.0, output_bytes=1000)
    return Sandbox(limits, workers=1, container=command, container_stop=[str(engine), "kill", "{name}"]), calls


def test_a_container(container: tuple[Sandbox, Path]) -> None:
    sandbox, calls = container
    with sandbox:
        result = sandbox.run(["sh", "-c", "cat; cat a; echo b > c; exit 0"], "x", {"a": "y"}, keep=True)
        assert (result.status, result.text, result.files) == ("ok", "xy", {"a": b"y", "c": b"b\n"})
        assert " --memory 536870912 sh -c" in calls.read_text() and "--name hf_effi-" in calls.read_text()
        assert sandbox.run(["sh", "-c", "exit 4"]).exit_code == 4
        assert sandbox.run(["sh", "-c", "yes"]).status == "output"
        assert calls.read_text().startswith("kill hf_effi-")
        slow = sandbox.run(["sleep", "60"], limits=replace(sandbox.limits, wall_seconds=0.2))
        assert slow.status == "timeout" and slow.seconds < 15
    assert sandbox.isolation is None and "nothing is measured" in sandbox.describe()


def test_a_container_engine_that_is_not_there() -> None:
    with (
        Sandbox(workers=1, container=["/no/such/engine", "{folder}"]) as sandbox,
        pytest.raises(OSError, match="the container's command could not be started"),
    ):
        sandbox.run(["true"])


# --- the bench ---


@pytest.mark.skipif(bool(sys.platform == "linux" and probe_isolation().missing), reason="the bench accepts no less")
def test_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "PROGRAMS", 2)
    monkeypatch.setattr(throughput, "COLD_PROGRAMS", 1)
    monkeypatch.setattr(throughput, "WORKERS", (2,))
    (figure,), rows = throughput.measure([0])
    assert figure["name"] == "sandbox_programs_per_second" and figure["value"] > 0
    assert [row["state"] for row in rows[:3]] == ["plain", "cold", "warm"]
    assert rows[2]["programs_per_second"] == figure["value"] and rows[1]["programs"] == 1
