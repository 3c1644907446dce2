"""The command line as a user meets it: what it writes and prints, and what it leaves where it had to stop."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from tests.conftest import Run, files, refuse

# --- output ------------------------------------------------------------------------------------------------------


def test_an_output_that_exists(prune: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    refuse(prune(), 5, "not empty", "--overwrite")
    assert files(tmp_path / "out") == {"mine"}
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("a file")
    refuse(prune(), 5, "is a file")


def test_an_output_that_cannot_be_written(prune: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refuse(prune("--out", tmp_path / "file/out"), 5, "file/out")
    # /proc takes no folders, not even from root.
    refuse(prune("--out", "/proc/sparsify-out"), 5, "/proc/sparsify-out")


def limit_file_size() -> None:
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk_leaves_a_run_that_resumes(prune: Run, llama: Path, tmp_path: Path) -> None:
    # The kernel refuses to write past the limit, in the middle of a file, as a full disk does.
    refuse(prune(preexec_fn=limit_file_size), 5, "out.partial")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob("*.tmp"))
    assert prune().returncode == 0
    assert not (tmp_path / "out.partial").exists()


def test_a_full_disk_at_export_keeps_what_was_there(
    prune: Run, cli: Run, stories: Path, ids_file: str, tmp_path: Path
) -> None:
    pytest.importorskip("onnx")
    assert prune(model=stories).returncode == 0
    before = files(tmp_path)
    for target in ("hf", "onnx"):
        result = cli("export", tmp_path / "out", "-t", target, "-o", tmp_path / "art", preexec_fn=limit_file_size)
        refuse(result, 5, "art.partial")
        assert not (tmp_path / "art").exists()
        shutil.rmtree(tmp_path / "art.partial")
    assert files(tmp_path) == before


# --- what works --------------------------------------------------------------------------------------------------


def test_recipe_file_options_and_inspect_round_trip(
    prune: Run, cli: Run, llama: Path, ids_file: str, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(f"model: {llama}\npattern: '1:4'\nmethod: wanda\ncalibration: {ids_file}\n")
    result = cli("prune", "--recipe", tmp_path / "r.yaml", "--method", "ria", "--out", tmp_path / "a", "--json")
    assert result.returncode == 0, result.stderr
    body = json.loads(result.stdout)
    assert (body["recipe"]["pattern"], body["recipe"]["method"]) == ("1:4", "ria")
    assert body["coverage"]["zeros"] * 4 == body["coverage"]["selected"] * 3
    text = cli("inspect", tmp_path / "a", "--recipe").stdout
    assert yaml.safe_load(text)["pattern"] == "1:4"
    (tmp_path / "again.yaml").write_text(text)
    assert cli("prune", "--recipe", tmp_path / "again.yaml", "--out", tmp_path / "b").returncode == 0
    for path in (tmp_path / "a").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_inspect_tells_a_good_artifact_from_a_damaged_one(prune: Run, cli: Run, tmp_path: Path) -> None:
    assert prune().returncode == 0
    out = tmp_path / "out"
    result = cli("inspect", out, "--json")
    assert result.returncode == 0
    assert json.loads(result.stdout)["verified"] is True
    listed = cli("inspect", out, "--linears", env={"COLUMNS": "200"}).stdout
    assert listed.count("50.0000%") == 14
    shard = out / "model-00001-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    refuse(cli("inspect", out), 8, "1 problems")
    (out / "sparsify.json").write_text("{}")
    refuse(cli("inspect", out), 8, "sparsify.json")
    (out / "sparsify.json").unlink()
    refuse(cli("inspect", out), 8, "not an artifact")


def test_names_that_look_like_markup_are_printed_as_they_are(prune: Run, cli: Run, tmp_path: Path) -> None:
    assert prune().returncode == 0
    path = tmp_path / "out/sparsify.json"
    body = json.loads(path.read_text())
    body["source"]["name"] = "x[/x] [bold] :key:"
    path.write_text(json.dumps(body))
    result = cli("inspect", tmp_path / "out", env={"COLUMNS": "200"})
    assert result.returncode == 0, result.stderr
    assert "x[/x] [bold] :key:" in result.stdout


def test_eval_opens_no_pickle(cli: Run, llama: Path, ids_file: str) -> None:
    state = transformers.AutoModelForCausalLM.from_pretrained(llama).state_dict()
    torch.save(state, llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    refuse(cli("eval", llama, "--text", ids_file), 3, "pytorch_model.bin", "convert")


def test_a_target_whose_packages_are_missing_is_refused_before_any_work(
    cli: Run, llama: Path, ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else find(name, *a))
    command = ["prune-and-export", llama, "--calibration", ids_file, "--eval-text", "none", "--out", tmp_path / "out"]
    refuse(cli(*command, "--target", "onnx"), 7, "onnxruntime", "sparsify-toolkit[onnx]")
    assert {path.name for path in tmp_path.iterdir()} == {"llama"}


def test_version_and_doctor(cli: Run) -> None:
    assert cli("--version").stdout.startswith("sparsify 0.")
    state = json.loads(cli("doctor", "--json").stdout)
    checks = {check["what"]: check["ok"] for check in state["checks"]}
    assert checks["prune on CPU"]
    assert checks["prune on GPU"] == (torch.cuda.device_count() > 0)
    assert "can it" in cli("doctor").stdout


def test_interrupted_says_so_and_resumes(
    cli: Run, llama: Path, ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prune: Run
) -> None:
    import signal

    from sparsify import prune as driver

    monkeypatch.setattr(driver._Run, "finish", lambda self: signal.raise_signal(signal.SIGINT))
    # A test run in the background of a shell inherits an ignored SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = prune()
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    assert result.returncode == 130
    lines = [line for line in result.stderr.splitlines() if not line.startswith("notice:")]
    assert lines == ["interrupted; the same command resumes"]
    assert not (tmp_path / "out").exists()
    result = prune("--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["blocks_resumed"] == 2
