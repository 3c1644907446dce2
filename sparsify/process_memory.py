"""Memory of a process and all that it started, as the kernel and the GPU's driver count it."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Memory:
    """Of the processes of a tree that are alive.

    Attributes:
        processes: how many.
        resident_bytes: resident now, added up; pages that several share count in each.
        peak_bytes: the largest each has been, added up.
        device_bytes: held on GPUs now; None where no driver tells, or none by these processes.
    """

    processes: int
    resident_bytes: int
    peak_bytes: int
    device_bytes: int | None


def memory_of(pid: int) -> Memory:
    """Of process ``pid`` and its descendants; zeros where it has ended."""
    count = resident = peak = 0
    pids = tree(pid)
    for member in pids:
        with suppress(OSError):
            status = Path(f"/proc/{member}/status").read_text(encoding="ascii", errors="replace")
            sizes = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith("Vm")}
            if "VmRSS" in sizes:  # else it has ended and waits for its parent
                count += 1
                resident += int(sizes["VmRSS"]) * 1024
                peak += int(sizes["VmHWM"]) * 1024
    return Memory(count, resident, peak, _device_bytes(set(pids)))


def session_members(session: int) -> list[int]:
    """Processes of a session (as of ``setsid``), from /proc: also those whose parents have ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(stat.parent.name))
    return found


def tree(pid: int) -> list[int]:
    """``pid`` and its descendants, from /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            # The name in parentheses may hold anything.
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def _device_bytes(pids: set[int]) -> int | None:
    command = ["nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        rows = [line.split(",") for line in done.stdout.splitlines() if line.strip()]
        mine = [int(row[1]) << 20 for row in rows if int(row[0]) in pids]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    # Not a zero: in a container the driver may know processes by other numbers than ours.
    return sum(mine) if mine else None
