"""What stands between a program and the machine: measured, and said in sentences."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import RefusedError
from ._worker import read_message

#: guard -> what holds with it, and what a program may do without it
GUARDS = {
    "network": (
        "No network: it has none but a loopback device that is down.",
        "It can use the network of this machine, and whatever listens there.",
    ),
    "files": (
        "It can neither read nor change the files of the user who trains.",
        "It can read and change every file that the user who trains can.",
    ),
    "leftovers": (
        "It writes into a folder of its own in memory, which is gone when it ends; everything else is read-only.",
        "It can leave files where everybody may write, as in /tmp, and read what everybody may read.",
    ),
    "processes": (
        "The number of its processes and threads is limited: a fork bomb stops at the limit.",
        "The number of its processes is not limited: a fork bomb takes the machine.",
    ),
    "parent": (
        "It can neither see nor signal the trainer.",
        "It can see, signal and trace every process of the user who trains, the trainer too.",
    ),
    "memory": (
        "Its processes together hold no more memory than allowed (looked at 20 times a second).",
        "Each process has a limit on memory, but nothing counts what all of them hold together.",
    ),
}
_START = "import sys; sys.path.append(sys.argv[1]); from hf_effi.rewards.{} import main; main({})"


@dataclass(frozen=True)
class Isolation:
    """
    What this kernel allows this user, as [`probe_isolation`] found it by trying.

    Args:
        root (`bool`): The user is root, whom the limits on processes do not bind.
        own_uid (`bool`): Programs run as a user of their own, one for each worker, from 60578 to 61183.
        user_namespace (`bool`): A user namespace can be made, in which the other ones need no privileges.
        network (`bool`): A network namespace can be made, and nothing answers in it.
        private_root (`bool`): Programs can get a root of their own with the folders of the system, read-only.
        pid_namespace (`bool`): Programs see no other process, and what they start ends with them.
        proc (`bool`): They can have a `/proc` of their own; by it the memory of all processes is counted.
        no_more_namespaces (`bool`): Programs cannot make user namespaces, in which memory has no limit.
        process_limit (`str`): `"own"`: the limit counts what the sandbox started; `"shared"`: all processes of the
            user count, and the limit lies that much higher; `"none"`: it does not bind.
        no_new_privileges (`bool`): Programs that change the user who runs them can be kept from it.
        watching (`bool`): The kernel tells when a process ends (Linux 5.3); without it nothing works.
    """

    root: bool
    own_uid: bool
    user_namespace: bool
    network: bool
    private_root: bool
    pid_namespace: bool
    proc: bool
    no_more_namespaces: bool
    process_limit: str
    no_new_privileges: bool
    watching: bool

    @property
    def guards(self) -> tuple[str, ...]:
        """The guards that hold, out of `network`, `files`, `leftovers`, `processes`, `parent`, `memory`."""
        held = {
            "network": self.network,
            "files": self.private_root or self.own_uid,
            "leftovers": self.private_root,
            "processes": self.process_limit != "none",
            "parent": self.pid_namespace or self.own_uid,
            "memory": self.no_more_namespaces and (self.proc or not self.private_root),
        }
        return tuple(name for name in GUARDS if held[name])

    @property
    def missing(self) -> tuple[str, ...]:
        """The guards that do not hold."""
        return tuple(name for name in GUARDS if name not in self.guards)

    def describe(self) -> str:
        """Return in sentences what holds here and what does not."""
        lines = [f"+ {GUARDS[name][0]}" for name in self.guards]
        lines += [f"- {name}: {GUARDS[name][1]}" for name in self.missing]
        return "\n".join(lines)


def worker_command(module: str, argument: str = "") -> list[str]:
    """Return the command that runs `main` of a module of this package in a bare interpreter."""
    return [sys.executable, "-I", "-S", "-c", _START.format(module, argument), str(Path(__file__).parents[2])]


def shown_to_programs(readable: Sequence[str]) -> tuple[str, ...]:
    """Return the folders to show beside those of the system: that of the interpreter, and the user's choice."""
    return (os.path.realpath(sys.base_prefix), *(os.path.abspath(path) for path in readable))


@functools.lru_cache(maxsize=16)
def _measured(shown: tuple[str, ...], pid: int) -> Isolation:
    process = subprocess.Popen(
        worker_command("_probe", "sys.argv[2:]") + list(shown),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        cwd="/",
    )
    with process:
        try:
            found = read_message(process.stdout.fileno(), time.monotonic() + 60)  # type: ignore[union-attr]
        except TimeoutError:
            found = None
        finally:
            process.kill()
        if found is None:
            told = process.stderr.read(2000).decode(errors="replace").strip()  # type: ignore[union-attr]
            raise RefusedError(f"the sandbox could not find out what this machine allows: {told or 'no answer'}.")
    return Isolation(**{field.name: found[0][field.name] for field in fields(Isolation)})


def probe_isolation(readable: Sequence[str] = ()) -> Isolation:
    """
    Return what this kernel allows this user, found by trying each thing in a process of its own (about 0.3 s, once).

    Args:
        readable (`Sequence[str]`, *optional*): Folders that programs are to read, as in [`Sandbox`].

    Raises:
        RefusedError: this is not Linux, or nothing could be tried.

    Example:
    ```python
    >>> isolation = probe_isolation()
    >>> set(isolation.guards) | set(isolation.missing) == set(GUARDS)
    True
    ```
    """
    if sys.platform != "linux":
        raise RefusedError(
            f"the sandbox needs Linux, this is {sys.platform}. Pass container=, a command that runs programs in a "
            "container."
        )
    return _measured(shown_to_programs(readable), os.getpid())


def refuse_if_weaker(isolation: Isolation, accept: Sequence[str]) -> None:
    """
    Refuse a machine where a guard is missing that was not given up by name.

    Raises:
        RefusedError: with the guards that are missing, and the option that accepts it.
    """
    if not isolation.watching or not isolation.no_new_privileges:
        raise RefusedError("the sandbox needs Linux 5.3 or later. Pass container=, or run on a newer kernel.")
    missing = [name for name in isolation.missing if name not in accept]
    if missing:
        told = " ".join(f"{name}: {GUARDS[name][1]}" for name in missing)
        raise RefusedError(
            f"the isolation of programs is weaker here than asked for. {told} Run where user namespaces are allowed "
            "(Docker's default profiles forbid them), pass container=, or accept it: "
            f"accept={tuple(dict.fromkeys((*accept, *missing)))!r}."
        )
