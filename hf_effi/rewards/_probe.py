"""What this kernel allows this user, found by trying each thing in a child. Standard library only."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from . import _kernel as kernel
from ._worker import pack, write_all


def works(attempt: Callable[[], object]) -> bool:
    """Return whether an attempt ends without an error (and not with `False`), in a child of its own."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(1 if attempt() is False else 0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def measure(readable: Sequence[str]) -> dict[str, Any]:
    """
    Return what works, by the names of the fields of `Isolation`.

    Args:
        readable (`Sequence[str]`): Folders that programs need beside those of the system.
    """
    root = os.geteuid() == 0
    uid, lock = kernel.take_free_uid()
    try:
        own_uid = root and works(lambda: kernel.become(uid))
        inside = uid if own_uid else None
        user_namespace = works(lambda: kernel.enter_user_namespace(inside))

        def begin() -> None:
            if user_namespace:
                kernel.enter_user_namespace(inside)

        def tries(attempt: Callable[[], object]) -> bool:
            return works(lambda: (begin(), attempt())[1])

        network = tries(_has_no_network)
        private_root = tries(lambda: _enter_root(readable))
        pid_namespace = private_root and tries(lambda: _is_first(readable, proc=False))
        proc = pid_namespace and tries(lambda: _is_first(readable, proc=True))
        no_more = user_namespace and works(lambda: (begin(), kernel.forbid_user_namespaces()))
        more = tries(lambda: (no_more and kernel.forbid_user_namespaces(), _gain_namespace(inside))[1])
        return {
            "root": root,
            "own_uid": own_uid,
            "user_namespace": user_namespace,
            "network": network,
            "private_root": private_root,
            "pid_namespace": pid_namespace,
            "proc": proc,
            "no_more_namespaces": not more,
            "process_limit": _process_limit(tries, inside),
            "no_new_privileges": works(kernel.give_up_privileges),
            "watching": works(lambda: os.close(kernel.process_descriptor(os.getpid()))),
        }
    finally:
        lock.close()


def _has_no_network() -> bool:
    kernel.unshare(kernel.CLONE_NEWNET)
    with socket.socket() as client:
        try:
            client.connect(("127.0.0.1", 9))
        except OSError as error:
            return not isinstance(error, ConnectionRefusedError)
    return False


def _enter_root(readable: Sequence[str]) -> bool:
    """Make the root, and look whether it can be written to."""
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.enter_private_root(readable, False)
    kernel.mount_box(1 << 20, os.getuid())
    with contextlib.suppress(OSError):
        os.open("/usr/hf_effi_probe", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
        os.unlink("/usr/hf_effi_probe")
        return False
    return sorted(os.listdir(kernel.WRITABLE)) == ["folder", "tmp"]


def _is_first(readable: Sequence[str], proc: bool) -> bool:
    """Start process 1 of a pid namespace; with `proc` it looks whether /proc shows itself and nobody else."""
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.enter_private_root(readable, proc)
    kernel.unshare(kernel.CLONE_NEWPID | kernel.CLONE_NEWIPC)

    def look() -> bool:
        if proc:
            kernel.mount_proc()
            shown = [name for name in os.listdir("/proc") if name.isdigit()]
            return shown == ["1"] and kernel.bytes_held([1], segments=True) > 0
        return os.getpid() == 1

    return works(look)


def _gain_namespace(uid: int | None) -> None:
    """What a program would try that wants rights: a user namespace of its own."""
    if uid is not None:
        kernel.become(uid)
    kernel.unshare(kernel.CLONE_NEWUSER)


def _process_limit(tries: Callable[[Callable[[], object]], bool], uid: int | None) -> str:
    """Return whether the limit counts the sandbox's processes only, all of the user's, or none."""

    def binds(first: int) -> bool:
        """With a limit that lets at most two processes be forked, the first works and a later one does not."""
        resource.setrlimit(resource.RLIMIT_NPROC, (first, first))
        if uid is not None:
            kernel.become(uid)
        children = []
        try:
            for _ in range(6):
                child = os.fork()
                if child == 0:
                    _wait()
                children.append(child)
        except OSError:
            return bool(children)
        finally:
            for child in children:
                os.kill(child, 9)
                os.waitpid(child, 0)
        return False

    if tries(lambda: binds(3)):
        return "own"
    if uid is None and os.getuid() != 0 and works(lambda: binds(kernel.tasks_of(os.getuid()) + 2)):
        return "shared"
    return "none"


def _wait() -> None:
    """Wait until killed, not for ever."""
    time.sleep(10)
    os._exit(0)


def main(readable: Sequence[str]) -> None:
    """Write what was measured to stdout."""
    write_all(1, pack(measure(readable), {}))
    sys.exit(0)
