"""Who works in a staging folder: what a process writes down of itself, and whether that process still lives.

A process number alone says little: numbers are used again, and mean another process in another container or on another
machine. Everything here only looks; nothing disturbs the process in question.
"""

from __future__ import annotations

import fcntl
import os
import platform
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_LOCK = ".lock"
# As large as Linux numbers processes.
_LARGEST = 1 << 22


def identity() -> dict[str, Any]:
    """This process: ``pid``, ``born`` (ticks after boot), ``host``, and ``boot`` and ``namespace`` of that number."""
    pid = os.getpid()
    return {"pid": pid, "born": _born(pid), **_place()}


def _place() -> dict[str, str]:
    boot = namespace = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return {"host": platform.node(), "boot": boot, "namespace": namespace}


def _born(pid: int) -> int | None:
    """When process ``pid`` started, in clock ticks after boot; None where that cannot be seen, or it is a zombie."""
    try:
        # The name, in brackets, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def alive(process: Mapping[str, Any]) -> bool | None:
    """Whether the process that called itself ``process`` still runs; None where that cannot be seen from here."""
    pid, here = process.get("pid"), _place()
    same = all(here[key] and process.get(key) == here[key] for key in ("boot", "namespace"))
    if not same or not isinstance(pid, int) or not 0 < pid <= _LARGEST:
        return None
    born = _born(pid)
    if born is not None:
        return born == process.get("born")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # It exists, and is another user's whose start is not shown to us.
        return None
    # A zombie: it answers, and does nothing.
    return False


def same_machine(process: Mapping[str, Any]) -> bool:
    """Whether ``process`` ran on this machine, before its last start or since."""
    here = _place()
    return any(bool(here[key]) and process.get(key) == here[key] for key in ("host", "boot"))


def lock_held(folder: Path) -> bool | None:
    """Whether a process holds the lock of a staging folder; None where that cannot be tried.

    It is tried by taking the lock, shared and for an instant. A command that starts in just that instant is refused as
    by any other that works there, so ask ``alive`` first.
    """
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False
