"""Calibration data on its way through the blocks: the hidden states on disk, and the calls each block receives.

Hidden states live in files, one for each shard of the text and each block that is still to be pruned. The page cache
makes that as fast as memory while there is memory, only one window is held by a process, and the files are the
checkpoint from which an interrupted run, or another process, goes on.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify.chunks import SHARDS
from sparsify.errors import ModelError, NumericsError, SparsifyError
from sparsify.files import sync_folder, temporary_beside, writing
from sparsify.finite import all_finite
from sparsify.model import Skeleton
from sparsify.naming import Binding
from sparsify.readahead import advise


def shards_of(n_windows: int) -> list[range]:
    """The windows of each shard of ``n_windows``: consecutive, and of nearly the same number."""
    n = min(SHARDS, n_windows)
    if n < 1:
        return []
    ends = [n_windows * i // n for i in range(n + 1)]
    return [range(a, b) for a, b in pairwise(ends)]


@dataclass(frozen=True)
class Layout:
    """Shape of the hidden states: ``n_windows`` windows of ``length`` tokens, ``width`` channels, ``dtype``."""

    n_windows: int
    length: int
    width: int
    dtype: torch.dtype

    @property
    def window_bytes(self) -> int:
        """Bytes of one window."""
        return self.length * self.width * self.dtype.itemsize


class HiddenFile:
    """Hidden states in a file, read and written one window [1, length, width] at a time.

    Attributes:
        crc32: of what ``write`` wrote, for the state of an interruptible run.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.layout = layout
        self.crc32: int | None = None

    def windows(self, device: str) -> Iterator[torch.Tensor]:
        """Yield each window [1, length, width]."""
        layout = self.layout
        with self.path.open("rb") as file:
            for i in range(layout.n_windows):
                # The window after this one is read from disk while this one is computed with.
                advise(file, (i + 1) * layout.window_bytes, layout.window_bytes)
                buffer = bytearray(layout.window_bytes)
                if file.readinto(buffer) != layout.window_bytes:
                    raise ModelError(f"{self.path}: truncated; pass --overwrite to start again")
                window = torch.frombuffer(buffer, dtype=layout.dtype)
                yield window.reshape(1, layout.length, layout.width).to(device)

    def write(self, windows: Iterator[torch.Tensor]) -> None:
        """Replace the file by ``windows``; on disk when this returns.

        Raises:
            OutputError: disk full.
        """
        checksum = 0
        # Under its name when it is whole: one that was given up may still be at it when another has done it again.
        with writing(self.path), temporary_beside(self.path) as temporary:
            with temporary.open("wb") as file:
                for window in windows:
                    data = window.to("cpu", self.layout.dtype).contiguous().view(torch.uint8).numpy().data
                    checksum = zlib.crc32(data, checksum)
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
            sync_folder(self.path.parent)
        self.crc32 = checksum


class HiddenStates:
    """The hidden states of all windows, in a file for each shard: ``<stem>.<shard>``.

    Attributes:
        layout: of all windows.
        shards: the files.
    """

    def __init__(self, stem: Path, layout: Layout) -> None:
        self.layout = layout
        self.shards = [
            HiddenFile(stem.with_name(f"{stem.name}.{i}"), replace(layout, n_windows=len(windows)))
            for i, windows in enumerate(shards_of(layout.n_windows))
        ]

    def windows(self, device: str) -> Iterator[torch.Tensor]:
        """Yield each window [1, length, width]."""
        for shard in self.shards:
            yield from shard.windows(device)

    def write(self, windows: Iterator[torch.Tensor]) -> None:
        """Replace the files by ``windows``; on disk when this returns.

        Raises:
            OutputError: disk full.
        """
        for shard in self.shards:
            shard.write(islice(windows, shard.layout.n_windows))

    def remove(self) -> None:
        """Remove the files that are there."""
        for shard in self.shards:
            shard.path.unlink(missing_ok=True)


def file_crc32(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


@dataclass
class Calls:
    """How the model calls each block, with the hidden states left out.

    Attributes:
        width: channels of the hidden states.
        arguments: per block, (positional arguments after the hidden states, keyword arguments).
        by_keyword: name under which the hidden states are passed, or None where they come first.
    """

    width: int
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    by_keyword: str | None

    def run(self, block: nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output [1, length, width] for one window."""
        rest, keywords = self.arguments[index]
        if self.by_keyword is None:
            output = block(hidden, *rest, **keywords)
        else:
            output = block(*rest, **{self.by_keyword: hidden}, **keywords)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result


class _Recorder:
    """Stands in for the blocks while the model runs up to and around them."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.returns_tuple = False
        self.reset()

    def reset(self) -> None:
        self.first: torch.Tensor | None = None
        self.by_keyword: str | None = None
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.passed_through = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args:
            self.by_keyword = "hidden_states"
            hidden = kwargs.pop("hidden_states")
        else:
            hidden, args = args[0], args[1:]
        if self.first is None:
            self.first = hidden
        # A model that unpacks a tuple turns a bare tensor into its first row, and the reverse.
        self.passed_through &= hidden is self.first
        self.arguments.append((args, kwargs))
        return (hidden,) if self.returns_tuple else hidden

    @contextmanager
    def installed(self) -> Iterator[None]:
        blocks = [self.skeleton.block(i) for i in range(self.skeleton.n_blocks)]
        try:
            for block in blocks:
                # On the instance: the model may read attributes of its blocks, so the modules stay in place.
                block.__dict__["forward"] = self
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)


def enter(
    binding: Binding,
    ids: torch.Tensor,
    stems: Sequence[Path],
    dtype: torch.dtype,
    device: str,
) -> tuple[Calls, list[HiddenStates]]:
    """Run everything before the blocks on ``ids`` [windows, length].

    Returns the calls that every block receives, and for each of ``stems`` files that hold the first block's inputs;
    without any, only the first window is run.

    Raises:
        ModelError: the blocks are called in a way that depends on the tokens, or not in sequence.
        NumericsError: NaN or Inf in the embeddings of a window.
    """
    skeleton = binding.skeleton
    recorder = _Recorder(skeleton)
    base = skeleton.model.base_model
    binding.load_surroundings(dtype, device)
    first = _record(recorder, base, ids[:1].to(device))
    calls = Calls(first.shape[-1], recorder.arguments, recorder.by_keyword)
    layout = Layout(ids.shape[0], ids.shape[1], calls.width, dtype)
    made = [HiddenStates(stem, layout) for stem in stems]

    def windows() -> Iterator[torch.Tensor]:
        for i, window in enumerate(ids):
            hidden = _record(recorder, base, window[None].to(device))
            if not all_finite(hidden):
                channel = int((~torch.isfinite(hidden)).flatten(0, -2).any(dim=0).nonzero()[0])
                raise NumericsError(f"the embeddings hold NaN or Inf in channel {channel} (window {i}); fix the model")
            if not _same(calls.arguments, recorder.arguments):
                raise ModelError(
                    f"model type {skeleton.config['model_type']}: its blocks receive inputs that depend on the tokens; "
                    "this architecture is not supported yet"
                )
            yield hidden

    for i, states in enumerate(made):
        states.write(made[0].windows("cpu") if i else windows())
    binding.unload(base)
    return calls, made


def _record(recorder: _Recorder, base: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    for attempt in (0, 1):
        recorder.reset()
        try:
            with recorder.installed():
                base(input_ids=ids, use_cache=False)
        except (SparsifyError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            # The wrong return form fails in whatever way the model's next line fails; the other form decides.
            if attempt:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ModelError(
                    f"model type {recorder.skeleton.config['model_type']}: its blocks cannot be run one by one "
                    f"({reason}); this architecture is not supported yet, --method magnitude needs no run"
                ) from error
            recorder.passed_through = False
        in_order = len(recorder.arguments) == recorder.skeleton.n_blocks
        if recorder.first is not None and recorder.passed_through and in_order and recorder.first.dim() == 3:
            return recorder.first
        recorder.returns_tuple = not recorder.returns_tuple
    raise ModelError(
        f"model type {recorder.skeleton.config['model_type']}: its blocks are not run one after the other; "
        "this architecture is not supported yet"
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return isinstance(b, type(a)) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return bool(a == b) if isinstance(a, bool | int | float | str) else type(a) is type(b)
