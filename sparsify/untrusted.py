"""Files that nobody vouches for, read so that whatever lies there neither fails nor hangs nor fills the memory."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

# What is read of a file at most; of a journal; and of a line of one.
_FILE_BYTES = 64 << 20
_JOURNAL_BYTES = 64 << 20
_LINE_BYTES = 1 << 20


def opened(path: Path, problems: list[str]) -> BinaryIO | None:
    """A regular file, opened; None where it is absent, and with an entry in ``problems`` where it is something else."""
    try:
        # A pipe would wait for its other end, and a link may lead anywhere.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        problems.append(f"{path.name}: {'is a link' if path.is_symlink() else error.strerror or error}")
        return None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        problems.append(f"{path.name}: is not a file")
        return None
    return os.fdopen(descriptor, "rb")


def read_object(path: Path, problems: list[str]) -> Any:
    """The JSON value in ``path``; None where there is none, with an entry in ``problems`` unless it is absent."""
    file = opened(path, problems)
    if file is None:
        return None
    with file:
        try:
            data = file.read(_FILE_BYTES + 1)
            if len(data) > _FILE_BYTES:
                raise ValueError("too large")
            return json.loads(data)
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{path.name}: not readable as JSON ({type(error).__name__})")
            return None


def read_lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines, in order; of a very long file the first and those near its end.

    Lines that are something else are skipped, and counted in ``problems``.
    """
    file = opened(path, problems)
    if file is None:
        return
    unreadable = 0
    with file:
        try:
            size = os.fstat(file.fileno()).st_size
            while line := file.readline(_LINE_BYTES + 1):
                value: Any = None
                if line.endswith(b"\n"):
                    try:
                        value = json.loads(line)
                    except (ValueError, RecursionError):
                        value = None
                else:
                    # Cut, by who was killed while it wrote, or by our limit: then its rest is skipped too.
                    while line and not line.endswith(b"\n"):
                        line = file.readline(_LINE_BYTES)
                if isinstance(value, dict):
                    yield value
                else:
                    unreadable += 1
                if file.tell() < size - _JOURNAL_BYTES:
                    file.seek(size - _JOURNAL_BYTES)
                    file.readline(_LINE_BYTES)
        except OSError as error:
            problems.append(f"{path.name}: {error.strerror or error}")
    if unreadable:
        problems.append(f"{path.name}: {unreadable} line{'s' * (unreadable > 1)} that cannot be read")


def disk_bytes(root: Path) -> int:
    """What the files below ``root`` take on the disk: memory maps have holes. Links are not followed."""
    total = 0
    for parent, _, names in os.walk(root):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
            except OSError:
                continue
    return total
