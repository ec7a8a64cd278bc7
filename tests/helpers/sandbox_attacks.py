"""
Programs that try to break out, each bounded so that a hole costs nothing; run as a script, `attacks.py MODE`, which
prints as JSON what came of each. It needs no torch, so that it runs as any user with any Python.

Modes: `full` (what this machine has), `uid` (as in a container: root without namespaces), `bare` (no root, no
namespaces).
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

MARK = f"hf-effi-attack-{os.getpid()}"
MIB = 2**20
#: name -> program; `{...}` are filled in by `run_all`
PROGRAMS = {
    "infinite_loop": "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
    "sleep": "import time; time.sleep(60)",
    "fork_bomb": """
import os, time
for made in range(200):
    try:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
    except OSError:
        break
else:
    made = 200
print(made)
""",
    "thread_bomb": """
import threading, time
try:
    for made in range(200):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
except RuntimeError:
    print(made, flush=True)
import os; os._exit(0)
""",
    "output_flood": "import os\nfor _ in range(50): os.write(1, b'x' * 2**20)",
    "error_flood": "import os\nfor _ in range(50): os.write(2, b'x' * 2**20)",
    "allocation_10_gb": "x = bytearray(10 * 2**30)",
    "memory_of_children": """
import os, time
for _ in range(4):
    if os.fork() == 0:
        x = b"x" * (50 * 2**20)
        time.sleep(20)
        os._exit(0)
time.sleep(20)
""",
    "memory_files": """
import os, time
held = [os.memfd_create("x") for _ in range(20)]
for file in held: os.write(file, b"x" * (10 * 2**20))
time.sleep(20)
""",
    "shared_segments": """
import ctypes, time
c = ctypes.CDLL(None)
c.shmat.restype = ctypes.c_void_p
for _ in range(5):
    at = c.shmat(c.shmget(0, 40 * 2**20, 0o1600), None, 0)
    ctypes.memset(ctypes.c_void_p(at), 1, 40 * 2**20)
    c.shmdt(ctypes.c_void_p(at))
time.sleep(20)
""",
    "large_file": "open('x', 'wb').write(b'x' * 20 * 2**20)",
    "many_files": "for i in range(20): open(str(i), 'wb').write(b'x' * 10 * 2**20)",
    "open_files": "held = [open('/dev/null') for _ in range(200)]",
    "write_outside": """
import os
done = []
for path in ("/usr/x", "/etc/x", "/x", "/dev/x", "{host}/written", os.path.expanduser("~root/x")):
    try:
        open(path, "w")
        done.append(path)
    except OSError:
        pass
print(done)
""",
    "read_secrets": """
import os
done = []
keys = os.path.expanduser("~root/.profile")
for path in ("{host}/secret", "/etc/shadow", keys, "/proc/1/environ", "/proc/{parent}/environ"):
    try:
        done.append(open(path).read())
    except OSError:
        pass
print(done)
""",
    "environment": """
import glob, os
found = [os.environ]
for path in glob.glob("/proc/[0-9]*/environ"):
    try:
        found.append(open(path).read())
    except OSError:
        pass
print("SECRET" in str(found).replace("HF_EFFI_" + "SECRET_NOT", ""), sorted(os.environ))
""",
    "descriptors": """
import os
open_ones = []
for number in range(64):
    try:
        os.fstat(number)
        open_ones.append(number)
    except OSError:
        pass
print(open_ones)
""",
    "kill_the_parent": """
import os, signal
for pid in {{os.getppid(), {parent}, {worker}, 1}} | set(range(2, 400)):
    if pid != os.getpid():
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
print("still here", flush=True)
os.kill(-1, signal.SIGKILL)
""",
    "trace_the_parent": """
import ctypes, os
c = ctypes.CDLL(None)
print([c.ptrace(16, pid, None, None) for pid in (os.getppid(), {parent}, {worker}, 1)])
""",
    "network": """
import socket
done = []
for family, address in ((socket.AF_INET, ("127.0.0.1", {port})), (socket.AF_UNIX, "\\0{mark}")):
    try:
        with socket.socket(family) as client:
            client.connect(address)
            done.append(address)
    except OSError:
        pass
print(done)
""",
    "more_rights": """
import ctypes, os
c = ctypes.CDLL(None)
print(c.unshare(0x10000000), c.mount(b"x", b"/tmp", b"tmpfs", 0, None), c.umount2(b"/proc", 2), c.setuid(0))
""",
    "daemon": """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)", "{mark}"])
    os._exit(0)
os.wait()
time.sleep(0.2)
print("started")
""",
    "leaves_something": "import os; open('/tmp/left', 'w'); open('left', 'w'); print(os.listdir('.'))",
    "finds_something": "import os; print('left' in os.listdir('/tmp'), os.listdir('.'))",
}


def bounded() -> Any:
    from hf_effi.rewards import SandboxLimits

    return SandboxLimits(
        wall_seconds=10.0,
        cpu_seconds=10,
        memory_bytes=100 * MIB,
        address_bytes=400 * MIB,
        output_bytes=10_000,
        processes=8,
        folder_bytes=64 * MIB,
        file_bytes=16 * MIB,
    )


def weaken(mode: str) -> None:
    """Let the sandbox think that this machine has less than it has."""
    from hf_effi.rewards import _pool, probe_isolation, sandbox

    less = {
        "user_namespace": False,
        "network": False,
        "private_root": False,
        "pid_namespace": False,
        "proc": False,
        "no_more_namespaces": True,
    }
    if mode == "bare":
        less["process_limit"] = "shared"
    weak = replace(probe_isolation(), **less)
    _pool.probe_isolation = sandbox.probe_isolation = lambda readable=(): weak


def still_running(mark: str) -> list[int]:
    """Return the processes whose command line has the mark."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if mark.encode() in file.read() and int(pid) != os.getpid():
                    found.append(int(pid))
        except OSError:
            continue
    return found


def run_all(mode: str, names: list[str]) -> dict[str, Any]:
    from hf_effi.rewards import Sandbox
    from hf_effi.rewards._isolation import GUARDS

    os.environ["HF_EFFI_SECRET"] = "SECRET"
    if mode != "full":
        weaken(mode)
    leaked = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(leaked, True)
    python = "python3" if mode == "full" else "/usr/bin/python3"
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as host, socket.socket() as server, socket.socket(socket.AF_UNIX) as local:
        os.chmod(host, 0o755)  # others may read what is in it, but write nothing
        with open(f"{host}/secret", "w") as file:
            file.write("SECRET")
        os.chmod(f"{host}/secret", 0o600 if mode == "uid" else 0o644)
        server.bind(("127.0.0.1", 0))
        server.listen()
        local.bind(f"\0{MARK}")
        local.listen()
        with Sandbox(bounded(), workers=1, accept=() if mode == "full" else tuple(GUARDS)) as sandbox:
            sandbox.run(["true"])
            worker = worker_of(sandbox)
            values = {"host": host, "parent": os.getpid(), "worker": worker, "mark": MARK}
            for name in names:
                program = PROGRAMS[name]
                if "{" in program and ("{host}" in program or "{parent}" in program or "{mark}" in program):
                    program = program.format(port=server.getsockname()[1], **values)
                slow = name in ("infinite_loop", "sleep")
                limits = replace(bounded(), wall_seconds=0.3) if slow else bounded()
                before = time.monotonic()
                result = sandbox.run([python, "-I", "-S", "main.py"], "", {"main.py": program}, limits=limits)
                results[name] = {
                    "status": result.status,
                    "stdout": result.text[:2000],
                    "stderr": result.stderr.decode(errors="replace")[-300:],
                    "bytes": len(result.stdout) + len(result.stderr),
                    "seconds": time.monotonic() - before,
                    "running": still_running(MARK),
                    "same_worker": worker_of(sandbox) == worker,
                    "outside": sorted(os.listdir(host)),
                }
    os.close(leaked)
    return results


def worker_of(sandbox: Any) -> int:
    return int(sandbox._pools[os.getpid()]._clients[0].process.pid)


if __name__ == "__main__":
    mode, *names = sys.argv[1:]
    sys.path.append(os.getcwd())
    print(json.dumps(run_all(mode, names or list(PROGRAMS))))
