"""What may be measured and compared: artifacts as they were exported, and their own dense model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsify.bench.request import grid, opens
from sparsify.bench.subjects import check_baseline, identify
from sparsify.errors import ModelError, UsageError, VerificationError
from tests.conftest import Run, save_random_model


@pytest.fixture
def pruned(prune: Run, tmp_path: Path) -> Path:
    assert prune("--pattern", "2:4", "--method", "magnitude").returncode == 0
    return tmp_path / "out"


def test_an_artifact_and_its_model(pruned: Path, llama: Path) -> None:
    dense, sparse = identify([str(llama), str(pruned)])
    assert check_baseline(sparse, dense) == []
    assert (dense.label, sparse.label) == ("llama", "out")
    record = sparse.record("candidate")
    assert (record["pattern"], record["method"], record["sparsity"], record["kind"]) == (
        "2:4", "magnitude", 0.5, "checkpoint"
    )  # fmt: skip
    assert record["source_sha256"] == dense.record("baseline")["source_sha256"]
    assert dense.record("baseline")["pattern"] is None
    assert record["weight_bytes"] == sum(path.stat().st_size for path in pruned.glob("*.safetensors"))
    assert opens("torch", sparse)
    assert not opens("onnxruntime", sparse)
    # Another name for the same files is the same artifact.
    assert identify([f"{pruned}/"])[0].sha256 == sparse.sha256


def test_an_artifact_that_was_changed_is_refused(pruned: Path) -> None:
    shard = next(pruned.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(VerificationError, match=f"{shard.name}: content differs.*changed after its export"):
        identify([str(pruned)])


def test_a_baseline_of_another_model_is_refused(pruned: Path, tmp_path: Path) -> None:
    import transformers

    from tests.conftest import CONFIGS

    config = CONFIGS["llama"]()
    assert isinstance(config, transformers.LlamaConfig)
    config.rms_norm_eps = 1e-3
    other = save_random_model(tmp_path / "other", config)
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    sparse, dense = identify([str(pruned), str(other)])
    with pytest.raises(UsageError, match="is another model: its shards are not those"):
        check_baseline(sparse, dense)
    with pytest.raises(UsageError, match="was pruned itself"):
        check_baseline(dense, sparse)


def test_a_baseline_with_another_tokenizer_is_refused(pruned: Path, llama: Path, tmp_path: Path) -> None:
    fp8 = Path(shutil.copytree(llama, tmp_path / "fp8"))
    (llama / "tokenizer.json").write_text("{}")
    (fp8 / "tokenizer.json").write_text('{"other": 1}')
    dense, candidate = identify([str(llama), str(fp8)])
    with pytest.raises(UsageError, match="its tokenizer is another"):
        check_baseline(candidate, dense)


def test_what_is_no_model_is_refused(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds neither sparsify\.json nor config\.json"):
        identify([str(tmp_path / "empty")])
    with pytest.raises(ModelError, match="no such folder"):
        identify([str(tmp_path / "absent")])
    with pytest.raises(UsageError, match="named twice"):
        identify([str(llama), f"{llama}/"])


def test_labels_are_as_short_as_tells_them_apart(llama: Path, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a/hf", "b/hf", "b/onnx")]
    for path in paths:
        shutil.copytree(llama, path)
    assert [each.label for each in identify([str(path) for path in paths])] == ["a/hf", "b/hf", "onnx"]


def test_the_grid_has_each_combination_once() -> None:
    found = grid([8, 16, 8], [4], [1, 2])
    assert [(each.prompt_tokens, each.batch) for each in found] == [(8, 1), (8, 2), (16, 1), (16, 2)]
    assert found[0].record("vllm-server")["load"] == "concurrency"
    for bad in ([[0], [1], [1]], [[1], [-1], [1]], [[1], [1], [0]]):
        with pytest.raises(UsageError, match="is below 1"):
            grid(*bad)


def test_a_model_pruned_by_nothing_is_a_baseline(prune: Run, llama: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    # Zeros that were there before, as in a dequantised model.
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][:4] = torch.zeros(4, 32)
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    assert prune("--pattern", "0", "--method", "magnitude").returncode == 0
    dense, nothing = identify([str(llama), str(tmp_path / "out")])
    assert not nothing.sparse
    assert nothing.record("baseline")["sparsity"] is None
    check_baseline(dense, nothing)


def test_the_current_folder_has_a_name(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pruned)
    assert identify(["."])[0].label == "out"


def test_files_of_another_tokenizer_library_do_not_matter(llama: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(llama, tmp_path / "other"))
    (llama / "tokenizer.json").write_text("{}")
    (other / "tokenizer.json").write_text("{}")
    (other / "tokenizer.model").write_bytes(b"of sentencepiece")
    dense, candidate = identify([str(llama), str(other)])
    assert check_baseline(candidate, dense) == []


def _copy(model: Path, to: Path, **config: Any) -> Path:
    """A copy with other weights, and with ``config`` in its config."""
    shutil.copytree(model, to)
    weights = to / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    body = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**body, **config}))
    return to


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 5}, {"hidden_size": 64}, {"vocab_size": 77}, {"model_type": "mistral"},
        {"text_config": {"hidden_size": 64}},
    ],
)  # fmt: skip
def test_without_a_manifest_the_configs_have_to_be_alike(llama: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    dense, candidate = identify([str(llama), str(_copy(llama, tmp_path / "other", **config))])
    ((key, value),) = config.get("text_config", config).items()
    with pytest.raises(UsageError, match=f"key {key} in its config.json is .*, in that of .*other {value}; give"):
        check_baseline(candidate, dense)


def test_what_nothing_tells_is_a_doubt(llama: Path, pruned: Path, tmp_path: Path) -> None:
    dense, same = identify([str(llama), str(_copy(llama, tmp_path / "same"))])
    (doubt,) = check_baseline(same, dense)
    assert "no manifest names its shards" in doubt
    assert "alike in model_type, num_hidden_layers, hidden_size, vocab_size" in doubt
    # A manifest that does not say what it was made from, and one of a baseline that does not.
    (sparse,) = identify([str(pruned)])
    other = _copy(llama, tmp_path / "other", vocab_size=77)
    nothing: frozenset[str] = frozenset()
    for candidate, baseline in ((replace(sparse, source=nothing), dense), (sparse, replace(dense, source=nothing))):
        assert check_baseline(candidate, baseline) == [doubt]
        with pytest.raises(UsageError, match="key vocab_size"):
            check_baseline(candidate, replace(baseline, folder=other))
    bare = replace(same, folder=tmp_path / "without config")
    (doubt,) = check_baseline(bare, dense)
    assert "nor do configs" in doubt


def test_tokenizers_without_a_common_file_are_a_doubt(llama: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(llama, tmp_path / "other"))
    (other / "tokenizer.model").write_bytes(b"of sentencepiece")
    for there in ("tokenizer.json", None):
        if there:
            (llama / there).write_text("{}")
        else:
            (llama / "tokenizer.json").unlink()
        dense, candidate = identify([str(llama), str(other)])
        (doubt,) = check_baseline(candidate, dense)
        assert "no tokenizer file in common" in doubt
