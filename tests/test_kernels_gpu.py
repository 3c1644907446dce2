"""The benchmark of the GPU kernels without a GPU: its stages on the CPU, its records, and wrong products."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_machine.record import NOT_RUN
from kernels_gpu.__main__ import parse
from kernels_gpu.check import TASKS, check_kernel
from kernels_gpu.layers import LAYERS, MLP, Variant, copies_needed, kernels, packed_weight, prepared
from kernels_gpu.timing import summary, time_variants

from sparsify.format.packed import decode


def run(stage: str, folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """A stage on the CPU in small sizes; its exit status and record."""
    out = folder / f"{stage}.json"
    common = ["--device", "cpu", "--tiny", "--out", str(out), "--work", str(folder / "work"), "--samples", "2"]
    options = parse([stage, *common, *arguments])
    return options.run(options), json.loads(out.read_text())


def test_arguments() -> None:
    options = parse(["tune", "--out", "x.json"])
    assert options.tokens == [1, 2, 4, 8, 16, 32]
    assert options.patterns == ["2:4", "0.5", "0.6", "0.7"]
    assert options.layers == list(LAYERS)
    assert parse(["prefill", "--out", "x.json"]).layers == MLP
    assert len(MLP) == 4
    assert parse(["check", "--out", "x.json"]).parts == list(TASKS)
    assert set(TASKS) == set(kernels())
    with pytest.raises(SystemExit):
        parse(["tune", "--out", "x.json", "--layers", "9b qkv"])


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "0.5", "0.7"])
def test_weights(pattern: str) -> None:
    packed = packed_weight((256, 512), pattern, "cpu")
    zeros = float((decode(packed) == 0).double().mean())
    assert zeros == (0.5 if ":" in pattern else pytest.approx(float(pattern), abs=0.01))
    assert packed.dtype == torch.bfloat16
    assert copies_needed((256, 512), pattern, "cpu") == 2


def test_many_tokens(tmp_path: Path) -> None:
    status, body = run("prefill", tmp_path, "--tokens", "8", "40")
    assert (status, body["failed"], body["not_run"]) == (0, [], [])
    assert [row["tokens"] for row in body["rows"]] == [8, 40]
    assert body["summary"][-1]["n"] == 2
    for row in body["rows"]:
        dense, packed = row["variants"]["dense"], row["variants"]["packed"]
        assert len(dense["samples_us"]) == len(packed["samples_us"]) == 2
        assert dense["bytes"] == 2 * 96 * 192
        assert packed["bytes"] < 0.6 * dense["bytes"]
        assert dense["speedup"] == 1
        assert packed["speedup"] == dense["us"]["median"] / packed["us"]["median"]


def test_a_spent_budget_is_said(tmp_path: Path) -> None:
    status, body = run("prefill", tmp_path, "--budget-s", "0")
    assert status == NOT_RUN
    assert len(body["not_run"]) == 1
    assert body["rows"] == []


def test_what_needs_a_gpu_is_said(tmp_path: Path) -> None:
    status, body = run("tune", tmp_path)
    assert status == NOT_RUN
    assert body["not_run"] == [{"what": "tune", "why": "no CUDA device"}]
    status, body = run("check", tmp_path, "--parts", "packed", "triton")
    assert status == NOT_RUN
    assert [row["what"] for row in body["not_run"]] == ["triton"]
    assert len(body["cases"]) == 36
    assert body["failed"] == []
    assert isinstance(prepared("cutlass", packed_weight((64, 64), "2:4", "cpu"), "cpu"), str)


@pytest.mark.parametrize("seed", range(4))
def test_the_check_tells_right_from_wrong(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(name: str, packed: Any, device: str) -> Any:
        weight = decode(packed)
        # One value is missing from the last row.
        weight[-1, int(weight[-1].abs().argmax())] = 0
        return 1, lambda x: torch.nn.functional.linear(x, weight)

    seeded = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda _: seeded(seed))
    arguments = {"kernel": "packed", "device": "cpu", "tiny": True}
    assert all(case["ok"] for case in check_kernel(arguments))
    monkeypatch.setattr("kernels_gpu.check.prepared", wrong)
    cases = list(check_kernel(arguments))
    assert len(cases) == 36
    assert not any(case["ok"] for case in cases)


def test_wrong_variants_are_not_timed() -> None:
    weight = torch.randn(8, 16)

    def crashes(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image\nis available")

    variants = {
        "dense": Variant(512, [lambda x: torch.nn.functional.linear(x, weight)] * 2),
        "wrong": Variant(256, [lambda x: torch.nn.functional.linear(x, weight) * 1.1]),
        "nan": Variant(256, [lambda x: torch.nn.functional.linear(x, weight) * float("nan")]),
        "crashes": Variant(256, [crashes]),
        "same": Variant(256, [lambda x: torch.nn.functional.linear(x, weight)]),
    }
    entries, failed = time_variants(variants, torch.randn(3, 16), 3, on_gpu=False)
    assert entries.keys() == {"dense", "same"}
    assert failed.keys() == {"wrong", "nan", "crashes"}
    assert failed["crashes"] == "RuntimeError: no kernel image"


def test_the_summary_is_a_geometric_mean() -> None:
    rows = [
        {"tokens": tokens, "variants": {"dense": {"speedup": 1.0}, "triton": {"speedup": speedup}}}
        for tokens, speedup in ((1, 2.0), (1, 8.0), (2, 3.0))
    ]
    first, second = summary(rows, ("tokens",))
    assert first == {
        "tokens": 1, "variant": "triton", "geometric_mean": pytest.approx(4.0), "min": 2.0, "max": 8.0, "n": 2,
    }  # fmt: skip
    assert second["geometric_mean"] == pytest.approx(3.0)
