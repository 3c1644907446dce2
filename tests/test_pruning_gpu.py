"""The benchmark of pruning on a GPU without one: it prunes, and what it could not do is said."""

import json
from pathlib import Path

import pruning_gpu
import pytest
import torch
from gpu_machine.record import NOT_RUN, WRONG

TINY = ["--device", "cpu", "--tiny"]


@pytest.mark.slow
def test_every_method_leaves_a_record(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    assert pruning_gpu.main([*TINY, "--out", str(out), "--work", str(tmp_path / "work")]) == 0
    body = json.loads(out.read_text())
    assert [run["method"] for run in body["runs"]] == ["fast", "best"]
    for run in body["runs"]:
        assert run["finished"]
        assert [block["block"] for block in run["blocks"]] == [0, 1, 2]
        assert run["peak_device_bytes"] == 0
        assert {"load", "statistics", "solve", "write"} <= run["blocks"][0]["seconds"].keys()
    assert not (tmp_path / "work").exists()


def test_a_method_that_fails_is_recorded(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    command = [*TINY, "--out", str(out), "--work", str(tmp_path / "work"), "--methods", "nothing"]
    assert pruning_gpu.main(command) == WRONG
    [failed] = json.loads(out.read_text())["failed"]
    assert failed["what"] == "nothing"
    assert "method 'nothing' is unknown" in failed["why"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_claimed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pruning_gpu.main(["--out", str(tmp_path / "record.json")]) == NOT_RUN
    assert "no CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "record.json").exists()
