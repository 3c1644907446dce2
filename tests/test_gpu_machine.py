"""What the GPU benchmarks share and needs no GPU: batches of files, records, budgets, shapes and bounds."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_machine.batches import pack_folders, take
from gpu_machine.llama import LLAMA_8B, LLAMA_70B
from gpu_machine.record import NOT_RUN, WRONG, Record
from kernels_gpu.layers import LAYERS, SHARDS
from kernels_gpu.timing import add_bound

TOOL = Path(__file__).parents[1] / "benchmarks/onnx_gpu"
LIMIT = 1 << 20


def folders(root: Path) -> dict[str, Path]:
    """Two units, one of them larger than a batch however well it is compressed."""
    noise = np.random.default_rng(0)
    for name, sizes in {"large": [1_500_000, 900_000], "small": [1000, 0]}.items():
        for i, size in enumerate(sizes):
            path = root / name / f"{name}/file{i}.so"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(noise.bytes(size))
    return {path.name: path for path in sorted(root.iterdir())}


def test_batches_are_small_and_come_back_whole(tmp_path: Path) -> None:
    units = folders(tmp_path / "units-in")
    (tmp_path / "out").mkdir()
    batches = pack_folders(units, tmp_path / "out", LIMIT)
    assert len(batches) >= 3
    assert all(path.stat().st_size <= LIMIT for path in batches)
    into = tmp_path / "into"
    for i, batch in enumerate(batches):
        # They arrive one at a time, in any order.
        arrived = tmp_path / f"arrived-{i}"
        arrived.mkdir()
        shutil.copy(batch, arrived)
        assert take(arrived, into, TOOL) == 0
        assert (into / "env").exists() is (i == len(batches) - 1)
    for folder in units.values():
        for path in folder.rglob("*.so"):
            assert (into / "site" / path.relative_to(folder)).read_bytes() == path.read_bytes()
    env = (into / "env").read_text()
    assert f"PYTHONPATH='{into / 'site'}'" in env
    assert env.splitlines()[1].startswith("onnx_gpu() {")


def test_a_damaged_batch_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    batches = pack_folders(folders(tmp_path / "units-in"), tmp_path / "out", LIMIT)
    victim = bytearray(batches[0].read_bytes())
    with tarfile.open(batches[0]) as archive:
        part = archive.getmembers()[1]
    victim[part.offset_data + 1000] ^= 1
    batches[0].write_bytes(bytes(victim))
    assert take(tmp_path / "out", tmp_path / "into", TOOL) == WRONG
    assert "differs from its checksum; send batch-1.tar again" in capsys.readouterr().out
    assert take(tmp_path / "units-in", tmp_path / "into", TOOL) == NOT_RUN


def test_a_record_says_what_went_wrong(tmp_path: Path) -> None:
    options = argparse.Namespace(out=tmp_path / "a/record.json", budget_s=100, device="cpu", run=print)
    record = Record("benchmark", options, ("torch", "no-such-package"))
    assert 90 < record.left_s <= 100
    assert record.close() == 0
    record.not_run("this", "no GPU")
    assert record.close() == NOT_RUN
    record.failed("that", "differs")
    assert record.close() == WRONG
    body = json.loads((tmp_path / "a/record.json").read_text())
    assert body["not_run"] == [{"what": "this", "why": "no GPU"}]
    assert body["failed"] == [{"what": "that", "why": "differs"}]
    assert body["environment"]["versions"].keys() >= {"torch", "python"}
    assert "run" not in body["arguments"]


def test_cases_that_the_budget_is_not_enough_for_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    record = Record("benchmark", argparse.Namespace(out=tmp_path / "record.json", budget_s=50, device="cpu"), ())
    seen = []
    for what, case in record.affordable([("quick", 1.0), ("slow", 30.0), ("as slow", 30.0), ("last", 1.0)]):
        seen.append(what)
        now += case
    assert seen == ["quick", "slow"]
    assert record.body["not_run"] == [
        {"what": what, "why": "the budget is spent: 19 s left"} for what in ("as slow", "last")
    ]


def test_a_long_case_costs_others_of_its_kind_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    record = Record("benchmark", argparse.Namespace(out=tmp_path / "record.json", budget_s=160, device="cpu"), ())
    kinds = {"g": ("generation", 90.0), "p": ("product", 5.0)}
    wanted = [("p1", 1.0), ("g1", 70.0), ("p2", 2.0), ("g2", 70.0), ("p3", 2.0), ("g3", 1.0), ("p4", 6.0), ("p5", 6.0)]
    seen = []
    for what, (_, taken) in record.affordable([(n, (n, t)) for n, t in wanted], lambda case: kinds[case[0][0]]):
        seen.append(what)
        now += taken
    assert seen == ["p1", "g1", "p2", "g2", "p3", "p4", "p5"]
    # Of which none has been measured, 90 s are not left.
    late = record.affordable([("g", ("g", 0.0)), ("p", ("p", 0.0))], lambda case: kinds[case[0][0]])
    assert [what for what, _ in late] == []
    assert [row["what"] for row in record.body["not_run"]] == ["g3", "g", "p"]


def test_fused_linears_hold_the_same_weights() -> None:
    for sizes in (LLAMA_8B, LLAMA_70B):
        assert sum(map(math.prod, sizes.fused().values())) == sum(map(math.prod, sizes.linears.values()))
    assert LAYERS["8b qkv"] == (6144, 4096)
    assert LAYERS["70b down"] == (8192, 28672)
    assert SHARDS["70b/8 qkv"] == (1280, 8192)
    assert sum(map(math.prod, SHARDS.values())) * 8 == sum(map(math.prod, LLAMA_70B.linears.values()))


def test_bounds_are_of_memory_or_of_arithmetic() -> None:
    ceilings = {"bytes_per_s": 1e9, "dense_flops": 1e12}
    entries: dict[str, dict[str, Any]] = {"dense": {"bytes": 2 * 1000 * 500}, "cusparselt": {"bytes": 562_500}}
    add_bound(entries, (1000, 500), 1, ceilings)
    # 1,500 values of two bytes besides the weight.
    assert entries["dense"]["bound_us"] == pytest.approx(1000 + 3)
    assert entries["cusparselt"]["bound_us"] == pytest.approx(562.5 + 3)
    add_bound(entries, (1000, 500), 1000, {**ceilings, "bytes_per_s": 1e15})
    assert entries["dense"]["bound_us"] == pytest.approx(1000)
    assert entries["cusparselt"]["bound_us"] == pytest.approx(500)
