"""`sparsify plan-memory`, and the first lines of `sparsify prune`: what is said, refused, and how near it is."""

import json
from pathlib import Path
from typing import Any

import pytest

from sparsify.budget.machine import Available
from tests import conftest
from tests.conftest import Run, refuse
from tests.test_budget import SIZES, folder_of

PLENTY = Available(1 << 50, 1 << 50)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have this machine offer what a test says."""

    def offer(found: Available) -> None:
        for module in ("sparsify.budget.machine", "sparsify.budget.estimate"):
            monkeypatch.setattr(f"{module}.available", lambda out, device="cpu": found)

    return offer


def planned(cli: Run, *arguments: Any, code: int = 0, **options: Any) -> dict[str, Any]:
    result = cli("plan-memory", *arguments, "--no-calibration", "--json", **options)
    assert result.returncode == code, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("name", SIZES)
def test_a_config_is_enough(name: str, cli: Run, free: Any, tmp_path: Path) -> None:
    free(PLENTY)
    folder = folder_of(tmp_path / name, **SIZES[name])
    found = planned(cli, folder, "--pattern", "2:4", "--method", "fast", "--windows", 32, "--length", 2048)
    assert (found["fits"], found["problems"], found["blocks"]) == (True, [], SIZES[name]["num_hidden_layers"])
    assert found["time"] is None
    # What was held is the sum of what is said to be held, most of it for the widest linear.
    largest = max(found["phases"], key=lambda phase: phase["host_bytes"])
    assert "down_proj" in largest["phase"]
    gram = 4 * SIZES[name]["intermediate_size"] ** 2
    assert 3 * gram < found["memory_bytes"] < 40 * gram
    assert found["output_bytes"] > (130e9 if name == "70b" else 800e9)


def test_it_says_memory_disk_and_time(cli: Run, free: Any, llama: Path, ids_file: str, tmp_path: Path) -> None:
    free(PLENTY)
    before = conftest.files(tmp_path)
    result = cli("plan-memory", llama, "--calibration", ids_file, "--method", "best", "--out", tmp_path, "--threads", 1)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ESTIMATE for ")
    assert "4 x 24 tokens" in result.stdout
    assert "of memory (1126 TB available)" in result.stdout
    assert "(estimate)" in result.stdout
    assert result.stdout.rstrip().endswith("fits")
    assert conftest.files(tmp_path) == before


def test_json_shows_the_arithmetic_of_the_time(cli: Run, free: Any, llama: Path, ids_file: str) -> None:
    free(PLENTY)
    result = cli("plan-memory", llama, "--calibration", ids_file, "--method", "sparsegpt", "--json")
    assert result.returncode == 0, result.stderr
    time = json.loads(result.stdout)["time"]
    assert 0 < time["seconds_low"] <= time["seconds_high"]
    assert {part["for"] for part in time["terms"]} == {"each of 2 blocks", "once"}
    assert {"what", "formula", "rate", "seconds_low", "seconds_high"} <= time["terms"][0]["work"][0].keys()


def test_what_does_not_fit_ends_with_its_own_code(cli: Run, free: Any, tmp_path: Path) -> None:
    free(Available(14 << 30, 1 << 50))
    folder = folder_of(tmp_path / "70b", **SIZES["70b"])
    shown = cli("plan-memory", folder, "--method", "fast", "--no-calibration")
    assert "does not fit" in shown.stdout
    refuse(shown, 12, "memory: ", "15 GB available", "--offload needs")
    found = planned(cli, folder, "--method", "fast", code=12)
    assert not found["fits"]
    assert found["problems"][0].startswith("memory: ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--windows", "0"), ("windows 0",)),
        (("--windows", "-3"), ("windows -3",)),
        (("--length", "1"), ("length 1",)),
        (("--device", "tpu"), ("device 'tpu'", "cuda")),
        (("--workers", "0"), ("--workers is 0",)),
        (("--threads", "-1"), ("--threads is -1",)),
        (("--method", "nothing"), ("method 'nothing'",)),
        (("--pattern", "4:2"), ("4:2",)),
        (("--exclude", "nothing"), ("exclude 'nothing'",)),
    ],
)
def test_wrong_options_are_refused_in_a_line(
    options: tuple[str, str], words: tuple[str, ...], cli: Run, llama: Path
) -> None:
    refuse(cli("plan-memory", llama, *options, "--no-calibration"), 2, *words)


def test_no_ids_where_some_are_named(cli: Run, llama: Path, tmp_path: Path, ids_file: str) -> None:
    absent = cli("plan-memory", llama, "--calibration", f"{tmp_path / 'ids.safetensors'}:ids", "--no-calibration")
    refuse(absent, 4, "ids.safetensors")
    other = ids_file.rpartition(":")[0] + ":nothing"
    refuse(cli("plan-memory", llama, "--calibration", other, "--no-calibration"), 4, "'nothing'")


def test_no_model(cli: Run, tmp_path: Path) -> None:
    refuse(cli("plan-memory", "--no-calibration"), 2, "MODEL is missing")
    refuse(cli("plan-memory", tmp_path / "absent", "--no-calibration"), 3, "absent")
    refuse(cli("plan-memory", tmp_path, "--no-calibration"), 3, "config.json")
    (tmp_path / "file.txt").write_text("text")
    refuse(cli("plan-memory", tmp_path / "file.txt", "--no-calibration"), 3, "is a file")


@pytest.mark.parametrize(
    "damage",
    [
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
        {"num_attention_heads": 0},
        {"num_attention_heads": "many"},
        {"hidden_size": 0},
        {"hidden_size": -8},
        {"hidden_size": 1.5},
        {"intermediate_size": None},
        {"vocab_size": "all"},
        {"model_type": "no-such-model"},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ],
)
def test_strange_configs_are_refused_in_a_line(damage: dict[str, Any], cli: Run, tmp_path: Path) -> None:
    sizes = SIZES["70b"] | {"num_hidden_layers": 2} | damage
    refuse(cli("plan-memory", folder_of(tmp_path / "model", **sizes), "--no-calibration"), 3)


# --- prune -----------------------------------------------------------------------------------------------------------


def test_prune_says_what_it_needs_first(prune: Run, free: Any) -> None:
    free(PLENTY)
    result = prune("--method", "fast")
    assert result.returncode == 0, result.stderr
    first = result.stderr.splitlines()[0]
    assert first.startswith("notice: needs about ")
    assert "of memory" in first
    assert "of disk" in first


@pytest.mark.parametrize("command", ["prune", "prune-and-export"])
def test_what_cannot_fit_is_refused_before_any_work(
    command: str, cli: Run, free: Any, llama: Path, ids_file: str, tmp_path: Path
) -> None:
    free(Available(100 << 20, 1 << 50))
    arguments = (command, llama, "--calibration", ids_file, "--method", "fast", "--out", tmp_path / "out")
    before = conftest.files(tmp_path)
    refuse(cli(*arguments), 12, "memory: ", "105 MB available", "--no-budget")
    assert conftest.files(tmp_path) == before
    if command == "prune":
        result = cli(*arguments, "--no-budget")
        assert result.returncode == 0, result.stderr
        assert any(line.startswith("notice: does not fit: memory: ") for line in result.stderr.splitlines())


def test_what_an_interrupted_run_left_counts_as_there(prune: Run, free: Any, tmp_path: Path) -> None:
    free(Available(1 << 50, 1000))
    refuse(prune("--method", "sparsegpt"), 12, "disk: ")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / ".lock").touch()
    (tmp_path / "out.partial" / "hidden.0").write_bytes(bytes(4 << 20))
    result = prune("--method", "sparsegpt")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("fast", "2:4"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("magnitude", "0.5"), ("sparsegpt", "2:4"), ("best", "0.5"), ("mrp", "2:4"))
        ),
    ],
)
def test_a_run_takes_no_more_than_was_said(method: str, pattern: str, cli: Run, tmp_path: Path, ids_file: str) -> None:
    import transformers

    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2, "num_attention_heads": 8}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=4096, max_position_embeddings=64)
    folder = conftest.save_random_model(tmp_path / "model", config)
    shared = (folder, "--method", method, "--pattern", pattern, "--calibration", ids_file, "--out", tmp_path / "out")
    # In processes of their own: the peak of this one is that of all tests before.
    said = planned(cli, *shared, env={})["memory_bytes"]
    ran = cli("prune", *shared, "--json", env={})
    assert ran.returncode == 0, ran.stderr
    took = json.loads(ran.stdout)["peak_memory_bytes"]
    assert took <= said < 1.6 * took
