"""Programs that try to break out, by name: as this user, as one without privileges, and without namespaces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from hf_effi.rewards import probe_isolation
from tests.helpers import sandbox_attacks as attacks

ROOT = Path(__file__).parents[2]
NOBODY = 65534
LINUX = sys.platform == "linux"
pytestmark = pytest.mark.skipif(not LINUX, reason="the sandbox is Linux's")

ALWAYS = [
    "infinite_loop",
    "fork_bomb",
    "thread_bomb",
    "output_flood",
    "allocation_10_gb",
    "memory_of_children",
    "memory_files",
    "large_file",
    "open_files",
    "descriptors",
    "daemon",
]
#: what a user of its own is enough for
OF_A_UID = ["write_outside", "read_secrets", "environment", "kill_the_parent", "trace_the_parent"]

#: attack -> (status, what it prints)
EXPECTED: dict[str, tuple[str, str | None]] = {
    "infinite_loop": ("timeout", ""),
    "sleep": ("timeout", ""),
    "fork_bomb": ("ok", None),
    "thread_bomb": ("ok", None),
    "output_flood": ("output", None),
    "error_flood": ("output", ""),
    "allocation_10_gb": ("exit", ""),
    "memory_of_children": ("memory", ""),
    "memory_files": ("memory", ""),
    "shared_segments": ("memory", ""),
    "large_file": ("exit", ""),
    "many_files": ("exit", ""),
    "open_files": ("exit", ""),
    "write_outside": ("ok", "[]\n"),
    "read_secrets": ("ok", "[]\n"),
    "environment": ("ok", "False ['HOME', 'LANG', 'PATH', 'TMPDIR']\n"),
    "descriptors": ("ok", "[0, 1, 2]\n"),
    "kill_the_parent": ("", "still here\n"),
    "trace_the_parent": ("ok", "[-1, -1, -1, -1]\n"),
    "network": ("ok", "[]\n"),
    "more_rights": ("ok", "-1 -1 -1 -1\n"),
    "daemon": ("ok", "started\n"),
    "leaves_something": ("ok", None),
    "finds_something": ("ok", "False ['main.py']\n"),
}
SAYS = {
    "allocation_10_gb": "MemoryError",
    "large_file": "File too large",
    "many_files": "No space left",
    "open_files": "Too many open files",
}


def run(mode: str, names: list[str], user: int | None) -> dict[str, Any]:
    """Run attacks in a process of its own, as `user`."""
    if user is None and mode == "full":
        found: dict[str, Any] = json.loads(_output([sys.executable], ROOT, mode, names, None))
        return found
    with tempfile.TemporaryDirectory() as folder:  # the sources may lie where nobody else can read
        os.chmod(folder, 0o755)
        shutil.copytree(ROOT / "hf_effi", f"{folder}/hf_effi", ignore=shutil.ignore_patterns("__pycache__"))
        python = "/usr/bin/python3"
        return dict(json.loads(_output([python, "-B"], folder, mode, names, user)))


def _output(python: list[str], folder: Any, mode: str, names: list[str], user: int | None) -> bytes:
    as_user: dict[str, Any] = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    script = Path(attacks.__file__).read_bytes()
    done = subprocess.run(
        [*python, "-", mode, *names], input=script, capture_output=True, cwd=folder, timeout=300, **as_user
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout


def modes() -> dict[str, tuple[str, list[str], int | None, str]]:
    """Return name -> (mode, attacks, user, why it cannot be run here)."""
    root = os.geteuid() == 0
    plain = Path("/usr/bin/python3")
    old = "" if plain.exists() and sys.version_info[:2] >= (3, 10) else "there is no /usr/bin/python3"
    weaker = ", ".join(probe_isolation().missing) if LINUX else ""
    full = f"this machine lacks: {weaker}" if weaker else ""
    return {
        "this user": ("full", list(EXPECTED), None, full),
        "nobody": ("full", list(EXPECTED), NOBODY if root else None, full or old if root else "this user is not root"),
        "root without namespaces": ("uid", ALWAYS + OF_A_UID, None, old if root else "this user is not root"),
        "nobody without namespaces": ("bare", ALWAYS, NOBODY if root else None, old),
    }


MODES = modes()
_found: dict[str, dict[str, Any]] = {}


@pytest.mark.parametrize(("who", "attack"), [(who, name) for who, (_, names, _, _) in MODES.items() for name in names])
def test_attack(who: str, attack: str) -> None:
    mode, names, user, why = MODES[who]
    if why:
        pytest.skip(why)
    if who not in _found:
        _found[who] = run(mode, names, user)
    found = _found[who][attack]
    status, printed = EXPECTED[attack]
    assert not status or found["status"] == status, found
    assert printed is None or found["stdout"] == printed, found
    assert SAYS.get(attack, "") in found["stderr"]
    if attack in ("fork_bomb", "thread_bomb"):  # one of the 8 is the program; without a namespace others may end
        assert 5 <= int(found["stdout"]) <= (7 if mode != "bare" else 30), found
    if "flood" in attack:
        assert found["bytes"] == attacks.bounded().output_bytes
    # Whatever it did: nothing is left running, the worker serves on, nothing was written outside, and it was quick.
    assert found["running"] == [] and found["same_worker"] and found["outside"] == ["secret"]
    assert found["seconds"] < 9
