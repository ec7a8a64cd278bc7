"""What the kernel is asked for around a program: namespaces, a root of its own, limits. Standard library only."""

from __future__ import annotations

import ctypes
import os
import resource
import socket
import stat
import struct
from collections.abc import Iterable

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
_MNT_DETACH, _AT_RECURSIVE, _AT_FDCWD = 2, 0x8000, -100
_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP = 4, 36, 38, 24
#: numbers that all architectures share
_SYS_PIDFD_OPEN, _SYS_CLOSE_RANGE, _SYS_MOUNT_SETATTR = 434, 436, 442

#: user ids that neither Linux distributions nor systemd give to anybody (systemd's table calls them unused)
FREE_UIDS = range(60578, 61184)
#: what a program may read of the machine, where it is there
SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store")
_SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime")
_DEVICES = ("null", "zero", "full", "random", "urandom")
#: in a root of its own: where a program may write, its folder there, and its place for temporary files
WRITABLE, BOX, TEMPORARY = "/box", "/box/folder", "/box/tmp"

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Leave namespaces; raises `OSError` where the kernel does not let this user."""
    _checked(_libc.unshare(flags), "unshare")


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process."""
    _checked(_libc.prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3), "prctl")


def hide_from_ptrace() -> None:
    """Let no process of the same user look into this one, or take its descriptors out of /proc."""
    prctl(_PR_SET_DUMPABLE, 0)


def adopt_orphans() -> None:
    """Become the parent of all descendants whose own parent ends."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def give_up_privileges() -> None:
    """Let no program that is executed later get more rights than this one has (set-user-id, file capabilities)."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """Take every capability out of what may be gained; stops at the first number that the kernel does not know."""
    for number in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(number), *[ctypes.c_ulong(0)] * 3) < 0:
            return


def process_descriptor(pid: int) -> int:
    """Return a descriptor that becomes readable when process `pid` ends."""
    return _checked(_libc.syscall(ctypes.c_long(_SYS_PIDFD_OPEN), ctypes.c_int(pid), ctypes.c_uint(0)), "pidfd_open")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Mount, or raise `OSError`."""
    args = [text.encode() if text else None for text in (source, target, kind)]
    _checked(_libc.mount(*args, ctypes.c_ulong(flags), data.encode() or None), f"mount on {target}")


def _make_read_only(path: str) -> None:
    """Make a mount and all below it read-only, without devices and set-user-id programs."""
    attributes = struct.pack("=QQQQ", _MS_RDONLY | _MS_NOSUID | _MS_NODEV, 0, 0, 0)
    found = _libc.syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_int(_AT_FDCWD),
        path.encode(),
        ctypes.c_uint(_AT_RECURSIVE),
        attributes,
        ctypes.c_size_t(len(attributes)),
    )
    _checked(found, f"mount_setattr of {path}")


def enter_user_namespace(uid: int | None) -> None:
    """
    Go into a user namespace, in which this process may make the other ones, and no program may make any more.

    Args:
        uid (`int`, *optional*): For root: the other user that exists inside. `None` for a user without privileges,
            who is alone there.
    """
    if uid is None:
        mine, group = os.getuid(), os.getgid()
        unshare(CLONE_NEWUSER)
        tell("/proc/self/setgroups", "deny")
        # Never 0 inside: what is executed by a user who is not root loses all capabilities.
        tell("/proc/self/uid_map", f"{mine or 65534} {mine} 1")
        tell("/proc/self/gid_map", f"{group} {group} 1")
    else:
        _enter_with_two_users(uid)


def _enter_with_two_users(uid: int) -> None:
    """Only a process outside, with the rights of root there, may say who exists inside: a child that stays behind."""
    me, (asked, ask) = os.getpid(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(ask)
            if os.read(asked, 1):
                for name in ("uid_map", "gid_map"):
                    tell(f"/proc/{me}/{name}", f"0 0 1\n{uid} {uid} 1")
                os._exit(0)
        finally:
            os._exit(1)
    os.close(asked)
    try:
        unshare(CLONE_NEWUSER)
        os.write(ask, b"x")
    finally:
        os.close(ask)
        status = os.waitpid(child, 0)[1]
    if status:
        raise PermissionError("the users of a user namespace cannot be set")


def forbid_user_namespaces() -> None:
    """Let nobody in this user namespace make another one, where memory could be mounted without a limit."""
    tell("/proc/sys/user/max_user_namespaces", "0")


def tell(path: str, text: str) -> None:
    """Write a text into a file of /proc."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def take_free_uid() -> tuple[int, socket.socket]:
    """
    Return a user id that no other worker on this machine has, and the socket that reserves it until it is closed.

    A name in the abstract space of sockets is given back by the kernel whatever happens to its owner.
    """
    for uid in FREE_UIDS:
        lock = socket.socket(socket.AF_UNIX)
        try:
            lock.bind(f"\0hf_effi.sandbox.{uid}")
        except OSError:
            lock.close()
        else:
            return uid, lock
    raise OSError(f"all user ids from {FREE_UIDS.start} to {FREE_UIDS.stop - 1} are taken by other workers")


def become(uid: int) -> None:
    """Give up root for good."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _shown_folders(readable: Iterable[str]) -> list[str]:
    """Return the folders to show, without those that lie in another one of them."""
    found: list[str] = []
    for path in sorted({*SYSTEM_FOLDERS, *map(os.path.abspath, readable)}):
        if not any(path == above or path.startswith(above + "/") for above in found) and os.path.lexists(path):
            found.append(path)
    return found


def enter_private_root(readable: Iterable[str], proc: bool) -> None:
    """
    Make a root that holds the folders of the system and `readable`, read-only, and nothing else; and go there.

    Needs a mount namespace of its own. With `proc` it has the /proc of before, which [`mount_proc`] covers: in a user
    namespace the kernel mounts a new one only where one is to be seen.
    """
    mount("", "/", "", _MS_REC | _MS_PRIVATE)
    root = "/sys"  # is on every machine, is a folder, and nothing that is shown lies below it
    mount("sandbox", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")
    for path in (*_shown_folders(readable), *filter(os.path.exists, _SYSTEM_FILES)):
        place = root + path
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), place)
        else:
            _bind(path, place)
    for path in (WRITABLE, "/proc", "/dev"):
        os.makedirs(root + path, exist_ok=True)
    if not os.path.lexists(f"{root}/tmp"):  # else something below it is shown
        os.symlink(TEMPORARY, f"{root}/tmp")
    for name in _DEVICES:
        _make_empty(f"{root}/dev/{name}")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"{root}/dev/{name}")
    os.symlink("/proc/self/fd", f"{root}/dev/fd")
    os.symlink(TEMPORARY, f"{root}/dev/shm")
    _make_read_only(root)
    for name in _DEVICES:
        mount(f"/dev/{name}", f"{root}/dev/{name}", "", _MS_BIND)
    if proc:
        mount("/proc", f"{root}/proc", "", _MS_BIND | _MS_REC)
    os.chdir(root)
    _checked(_libc.pivot_root(b".", b"."), "pivot_root")
    _checked(_libc.umount2(b".", _MNT_DETACH), "umount")
    os.chdir("/")


def _bind(path: str, place: str) -> None:
    if os.path.isdir(path):
        os.makedirs(place, exist_ok=True)
    else:
        _make_empty(place)
    mount(path, place, "", _MS_BIND | _MS_REC)


def _make_empty(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))


def mount_box(total_bytes: int, uid: int) -> None:
    """Mount an empty place in memory, of at most `total_bytes` and 4,096 files, with the program's folders in it."""
    options = f"mode=755,size={total_bytes},nr_inodes=4096"
    mount("sandbox", WRITABLE, "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    for path in (BOX, TEMPORARY):
        os.mkdir(path, 0o700)
        os.chown(path, uid, -1)


def mount_proc() -> None:
    """Mount /proc of this pid namespace, which shows no other process."""
    mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)


def set_limits(limits: dict[str, int], processes: int | None) -> None:
    """Set the limits of one process, hard and soft; `None` leaves the number of processes."""
    seconds = limits["cpu_seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    wanted = [
        (resource.RLIMIT_AS, limits["address_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ]
    if processes is not None:
        wanted.append((resource.RLIMIT_NPROC, processes))
    for kind, value in wanted:
        highest = resource.getrlimit(kind)[1]  # a limit that is lower already stays
        value = value if highest == resource.RLIM_INFINITY else min(value, highest)
        resource.setrlimit(kind, (value, value))


def close_from(first: int) -> None:
    """Close every descriptor from `first` on."""
    if _libc.syscall(ctypes.c_long(_SYS_CLOSE_RANGE), ctypes.c_uint(first), ctypes.c_uint(0xFFFFFFFF), 0) < 0:
        os.closerange(first, os.sysconf("SC_OPEN_MAX"))  # before Linux 5.9


def parents() -> dict[int, int]:
    """Return process -> parent of all that /proc shows."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    found[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue  # it has ended
    return found


def descendants(of: int) -> set[int]:
    """Return all processes below `of`."""
    by_parent: dict[int, list[int]] = {}
    for pid, parent in parents().items():
        by_parent.setdefault(parent, []).append(pid)
    found: set[int] = set()
    level = [of]
    while level := [child for pid in level for child in by_parent.get(pid, ()) if child not in found]:
        found.update(level)
    return found


def tasks_of(uid: int) -> int:
    """Return how many processes and threads a user has, as the limit counts them."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == uid:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue
    return count


def bytes_held(pids: Iterable[int], segments: bool) -> int:
    """
    Return the memory that processes hold: resident pages (what two share counts twice), files that exist in memory
    only, and, where they have an IPC namespace of their own, System V `segments`.
    """
    total, page = 0, os.sysconf("SC_PAGE_SIZE")
    files: dict[int, int] = {}
    for pid in pids:
        try:
            with open(f"/proc/{pid}/statm", "rb") as file:
                total += int(file.read().split()[1]) * page
            for name in os.listdir(f"/proc/{pid}/fd"):
                path = f"/proc/{pid}/fd/{name}"
                if os.readlink(path).startswith("/memfd:"):
                    found = os.stat(path)
                    files[found.st_ino] = found.st_blocks * 512
        except OSError:
            continue  # it has ended
    if segments:
        with open("/proc/sysvipc/shm") as table:
            rows = [row.split() for row in table]
        place = rows[0].index("rss")
        total += sum(int(row[place]) for row in rows[1:])
    return total + sum(files.values())


def write_files(folder: str, files: dict[str, bytes], uid: int) -> None:
    """Write files into an empty folder, executable, owned by the program's user."""
    for name, content in files.items():
        made = folder
        for part in name.split("/")[:-1]:
            made = f"{made}/{part}"
            if not os.path.isdir(made):
                os.mkdir(made, 0o700)
                os.chown(made, uid, -1)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(f"{folder}/{name}", flags, 0o755), "wb") as file:
            file.write(content)
            os.fchown(file.fileno(), uid, -1)


def read_files(folder: str, most_bytes: int, most_files: int = 1024) -> dict[str, bytes]:
    """
    Return the regular files of a folder that a program has written, `{path: content}`.

    Symbolic links are not followed, pipes and devices not opened.

    Raises:
        ValueError: there are more bytes or files than allowed.
    """
    found: dict[str, bytes] = {}
    left = most_bytes
    for place, folders, names in os.walk(folder, followlinks=False):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(place, name)
            if not stat.S_ISREG(os.lstat(path).st_mode):
                continue
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                content = file.read(left + 1)
            left -= len(content)
            if left < 0 or len(found) >= most_files:
                raise ValueError(f"more than {most_bytes:,} bytes or {most_files:,} files")
            found[os.path.relpath(path, folder)] = content
    return found
