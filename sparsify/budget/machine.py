"""What this machine has free, and what it reaches in a calibration of a few seconds."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from sparsify.budget.operations import Rates
from sparsify.errors import OutputError
from sparsify.files import writing

_MIB = 1 << 20
# Each figure is the best of a few rounds within this time; products are of at most this many inputs and outputs, and
# factors of this order, so that nothing here takes more memory than the run.
_SECONDS = 0.25
_MOST_SIZE, _MOST_ORDER, _MOST_SPECTRUM = 2048, 1024, 512
_FILE_BYTES = 64 * _MIB


@dataclass(frozen=True)
class Available:
    """What is free for a run.

    Attributes:
        memory_bytes: for its processes, what this one holds already included.
        disk_bytes: where the output goes.
        device_bytes: of the GPU; None where there is none in use.
        memory_source: what sets ``memory_bytes``.
    """

    memory_bytes: int
    disk_bytes: int
    device_bytes: int | None = None
    memory_source: str = "free memory"


def available(out: Path, device: str = "cpu") -> Available:
    """What this process may still take here, and what is free on the disk of ``out`` (which need not exist)."""
    own = resident_bytes()
    memory, source = _system_bytes() + own, "free memory"
    limit = _cgroup_bytes()
    if limit is not None and limit + own < memory:
        memory, source = limit + own, "limit of the control group"
    on_device = None
    if device != "cpu":
        import torch

        on_device = int(torch.cuda.mem_get_info(torch.device(device))[0])
    disk = shutil.disk_usage(existing(out))
    # What has no size, such as /proc, stores nothing: writing to it will say so.
    return Available(memory, disk.free if disk.total else sys.maxsize, on_device, source)


def existing(path: Path) -> Path:
    """The nearest folder that exists at or above ``path``."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def resident_bytes() -> int:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _system_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_bytes() -> int | None:
    """What the control groups of this process leave, files in the page cache counted as free; None without a limit."""
    found = []
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found.append(_left(path, Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"))
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            found.append(_left(path, root, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
    known = [each for each in found if each is not None]
    return min(known, default=None)


def _left(path: str, root: Path, most: str, used: str, cached: str) -> int | None:
    folder = root / path.lstrip("/")
    # In a container the path may be the host's; the group is then at the root of what is mounted.
    if not (folder / most).exists():
        folder = root
    left: int | None = None
    while folder.is_relative_to(root):
        try:
            limit = (folder / most).read_text(encoding="ascii").strip()
            taken = int((folder / used).read_text(encoding="ascii"))
            stat = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
            # Without a limit the first version says so with the largest number of whole pages.
            if limit != "max" and int(limit) < 1 << 60:
                free = int(limit) - taken + int(stat.get(cached, 0))
                left = free if left is None else min(left, free)
        except (OSError, ValueError):
            pass
        folder = folder.parent
    return left


def measure_rates(folder: Path, device: str, *, width: int, widest: int, length: int) -> Rates:
    """Rates of this machine for a model of these sizes.

    Args:
        folder: where the output goes; a file of 64 MiB is written beside it and removed.
        device: of products and factors.
        width: of the residual stream.
        widest: the most inputs of a linear.
        length: tokens of a window.

    Raises:
        OutputError: ``folder`` cannot be written.
    """
    import torch

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: Any = torch.float32) -> Any:
        return torch.randn(*shape, generator=generator, dtype=dtype).to(device)

    rows, n_in, n_out = (min(size, _MOST_SIZE) for size in (length, widest, width))
    order, small = min(widest, _MOST_ORDER), min(widest, _MOST_SPECTRUM)
    x, w = random(rows, n_in), random(n_in, n_out)
    x64, w64 = random(min(rows, 512), n_in, dtype=torch.float64), random(n_in, min(n_out, 512), dtype=torch.float64)
    square = random(order, order, dtype=torch.float64)
    square = square @ square.t() / order
    square.diagonal().add_(1)
    large, near = random(4 * _MIB), random(min(order // 4, 256), 512)
    with torch.inference_mode():
        best = {
            "product": _rate(lambda: x @ w, 2 * rows * n_in * n_out, device),
            "product64": _rate(lambda: x64 @ w64, 2 * len(x64) * n_in * w64.shape[1], device),
            "factor": _rate(lambda: torch.cholesky_inverse(torch.linalg.cholesky(square)), order**3, device),
            "spectrum": _rate(lambda: torch.linalg.eigh(square[:small, :small]), small**3, device),
            "distance": _rate(lambda: torch.cdist(near, near, p=1.0), near.shape[0] ** 2 * near.shape[1], device),
            "memory": _rate(lambda: large.mul_(1.0), 2 * large.nbytes, device),
        }
    read, write = _disk(folder)
    block = bytes(8 * _MIB)
    return Rates(**best, read=read, write=write, digest=_rate(lambda: sha256(block), len(block), "cpu"))


def _rate(run: Callable[[], Any], amount: float, device: str) -> float:
    """The best of as many rounds as go into the time, the first being for warming up."""
    best, began = float("inf"), time.perf_counter()
    for i in range(50):
        seconds = _seconds(run, device)
        if i:
            best = min(best, seconds)
        if i and time.perf_counter() - began > _SECONDS:
            break
    return amount / max(best, 1e-9)


def _seconds(run: Callable[[], Any], device: str) -> float:
    import torch

    started = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize(torch.device(device))
    return time.perf_counter() - started


def _disk(folder: Path) -> tuple[float, float]:
    """Bytes per second read and written, the page cache left out as far as the system lets it."""
    chunk = os.urandom(_MIB) * 4
    n_chunks = _FILE_BYTES // len(chunk)
    place = existing(folder)
    if shutil.disk_usage(place).free < 2 * _FILE_BYTES:
        raise OutputError(
            f"{place}: has no {_FILE_BYTES // _MIB} MiB free to measure the disk with; pass --no-calibration"
        )
    with writing(place), tempfile.TemporaryFile(dir=place) as file:
        started = time.perf_counter()
        for _ in range(n_chunks):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        write = _FILE_BYTES / (time.perf_counter() - started)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        started = time.perf_counter()
        while file.read(len(chunk)):
            pass
        return _FILE_BYTES / (time.perf_counter() - started), write
