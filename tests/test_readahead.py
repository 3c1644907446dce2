"""What the system is asked to read ahead is what is read next."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsify.checkpoint import CheckpointReader
from sparsify.hidden import HiddenStates, Layout
from sparsify.model import load_skeleton
from sparsify.naming import Binding
from sparsify.readahead import read_ahead


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The bytes of every range that the system is asked for."""
    found: list[bytes] = []

    def advise(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        found.append(os.pread(descriptor, length, offset))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return found


def test_the_next_block_is_read_ahead(random_models: Callable[[str], Path], asked: list[bytes]) -> None:
    folder = random_models("llama")
    reader = CheckpointReader(folder)
    binding = Binding(reader, load_skeleton(folder))
    binding.read_ahead(1)
    expected = {
        tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for _, tensor in reader.read(name for name in reader.tensors if name.startswith("model.layers.1."))
    }
    assert len(expected) >= 7
    assert set(asked) == expected
    asked.clear()
    binding.read_ahead(binding.skeleton.n_blocks)
    assert not asked


def test_the_next_window_is_read_ahead(tmp_path: Path, asked: list[bytes]) -> None:
    states = HiddenStates(tmp_path / "hidden.0", Layout(10, 4, 8, torch.float32))
    windows = [torch.full((1, 4, 8), float(i)) for i in range(10)]
    states.write(iter(windows))
    assert all(torch.equal(a, b) for a, b in zip(states.windows("cpu"), windows, strict=True))
    # Behind the last window of a shard there is none.
    assert sum(data == b"" for data in asked) == len(states.shards) == 8
    assert {data for data in asked if data} == {windows[i].numpy().tobytes() for i in (4, 9)}


def test_damage_is_left_to_whoever_reads(random_models: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = CheckpointReader(random_models("llama")).tensors
    for content in (b"", b"\xff" * 64, (20).to_bytes(8, "little") + b"[1]" + b" " * 17):
        path = tmp_path / "damaged"
        path.write_bytes(content)
        read_ahead({name: type(info)(path, info.shape, info.dtype) for name, info in tensors.items()}, tensors)
    missing = {name: type(info)(tmp_path / "none", info.shape, info.dtype) for name, info in tensors.items()}
    read_ahead(missing, missing)
