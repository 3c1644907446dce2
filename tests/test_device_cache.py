"""What was measured on a device, written by several at once."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sparsify.kernels import device_cache


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    return tmp_path / "kernels"


def test_two_who_add_at_once_each_write_a_whole_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device_cache.add("kind", "name", {"before": 0})
    both, replace = threading.Barrier(2), Path.replace

    def together(self: Path, target: Path) -> Any:
        both.wait(60)  # both have written
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", together)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda key: device_cache.add("kind", "name", {key: 1}), ("one", "other")))
    assert device_cache.read("kind", "name") in ({"before": 0, "one": 1}, {"before": 0, "other": 1})
    assert [path.name for path in folder.iterdir()] == ["kind-name.json"]


def test_a_write_that_fails_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device_cache.add("kind", "name", {"before": 0})

    def full(self: Path, text: str, **options: Any) -> int:
        self.write_bytes(text[:5].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        device_cache.add("kind", "name", {"more": 1})
    (left,) = folder.iterdir()
    assert json.loads(left.read_text()) == {"before": 0}
