import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparsify.data import Split, load_windows
from sparsify.errors import DataError, MissingExtraError, ModelError


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time there was a little dog named Max. He liked to run in the park. " * 200)
    return path


def load(source: Any, folder: Path, split: Split = "calibration", **options: Any) -> Any:
    return load_windows(str(source), folder, **{"n_windows": 4, "length": 32, "split": split, **options})


def test_windows_are_seeded_hashed_and_from_the_text(stories: Path, text_file: Path) -> None:
    first, again = load(text_file, stories, bos=False), load(text_file, stories, bos=False)
    assert first.ids.shape == (4, 32)
    assert first.ids.dtype == np.int64
    assert first.sha256 == again.sha256
    assert load(text_file, stories, bos=False, seed=1).sha256 != first.sha256
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(stories)(text_file.read_text(), add_special_tokens=False)["input_ids"]
    rows = {tuple(tokens[i : i + 32]) for i in range(0, len(tokens) - 31, 32)}
    assert {tuple(row) for row in first.ids.tolist()} <= rows


def test_evaluation_takes_the_first_windows_in_order(stories: Path, text_file: Path) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(stories)(text_file.read_text(), add_special_tokens=False)["input_ids"]
    windows = load(text_file, stories, "evaluation", bos=False)
    assert windows.ids.flatten().tolist() == tokens[:128]
    assert windows.seed is None


def test_bos_starts_every_window_when_asked(stories: Path, text_file: Path) -> None:
    windows = load(text_file, stories, bos=True)
    assert windows.ids.shape == (4, 32)
    assert (windows.ids[:, 0] == 1).all()
    assert windows.bos
    assert windows.describe()["bos"] is True


def test_jsonl_and_text_are_read_alike(stories: Path, tmp_path: Path) -> None:
    documents = ["The cat sat on the mat. " * 80, "A bird\u2028 sang.\u0085 " * 90]
    lines = [json.dumps({"text": d}, ensure_ascii=False) for d in documents]
    (tmp_path / "d.jsonl").write_text("\ufeff" + "\n".join(lines) + "\n\n")
    (tmp_path / "d.txt").write_text("\n\n".join(documents))
    assert load(tmp_path / "d.jsonl", stories).sha256 == load(tmp_path / "d.txt", stories).sha256


def test_ids_are_used_as_they_stand(stories: Path, tmp_path: Path) -> None:
    ids = torch.randint(0, 512, (7, 19))
    save_file({"ids": ids.to(torch.int16)}, tmp_path / "i.safetensors")
    assert (load(f"{tmp_path}/i.safetensors:ids", stories).ids == ids.numpy()).all()


def test_strided_evaluation_windows_overlap_as_said(stories: Path, text_file: Path) -> None:
    from sparsify.bench.perplexity import perplexity
    from sparsify.runtimes.torch_session import TorchSession

    windows = load(text_file, stories, "evaluation", bos=False, stride=8)
    assert (windows.ids[1:, :24] == windows.ids[:-1, 8:]).all()
    with TorchSession(stories) as session:
        assert perplexity(session, windows.ids, stride=8).n_tokens == 31 + 3 * 8
    with pytest.raises(DataError, match="stride"):
        load(text_file, stories, "evaluation", bos=False, stride=33)
    with pytest.raises(DataError, match="BOS"):
        load(text_file, stories, "evaluation", bos=True, stride=8)


def test_pydoc_needs_no_file_and_its_splits_share_no_window(stories: Path) -> None:
    calibration = load("pydoc", stories, n_windows=50, bos=False)
    evaluation = load("pydoc", stories, "evaluation", n_windows=50, bos=False)
    seen = {tuple(row) for row in calibration.ids.tolist()}
    assert not any(tuple(row) in seen for row in evaluation.ids.tolist())


def test_self_samples_are_seeded(stories: Path) -> None:
    first = load("self", stories, n_windows=6, length=48)
    assert first.ids.shape == (6, 48)
    assert first.sha256 == load("self", stories, n_windows=6, length=48).sha256
    assert first.sha256 != load("self", stories, n_windows=6, length=48, seed=1).sha256


def test_self_samples_from_the_model(trained: Path) -> None:
    from transformers import AutoTokenizer

    # The model writes children's stories; noise would not spell their commonest words.
    ids = load("self", trained, n_windows=6, length=48).ids
    text = AutoTokenizer.from_pretrained(trained).decode(ids.flatten().tolist())
    assert sum(text.count(word) for word in (" the ", " and ", " to ", " was ")) > 5


def test_too_little_text_says_how_much_is_needed(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("short text")
    with pytest.raises(DataError, match=r"t\.txt.*need 128 tokens"):
        load(tmp_path / "t.txt", stories, bos=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text"),
        (b"  \n ", "holds no text"),
        (b"\x89PNG\x0d\x0a\xff\xfe", "not UTF-8"),
        (b"abc\0def", "binary"),
    ],
)
def test_bad_text_files(content: bytes, message: str, stories: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "t.txt", stories)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"txt": 1}', "line 2 has no"),
        ('{"text": ', "line 1 is not JSON"),
        ("[" * 10**5, "line 1 is not"),
        ("[1]", "line 1 has no"),
    ],
)
def test_bad_jsonl(content: str, message: str, stories: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "t.jsonl", stories)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 3), "integers"),
        (torch.zeros(4, dtype=torch.int64), "integers"),
        (torch.zeros(0, 4, dtype=torch.int64), "integers"),
        (torch.full((2, 3), 512), "vocabulary"),
        (torch.full((2, 3), -1), "vocabulary"),
    ],
)
def test_bad_ids(tensor: torch.Tensor, message: str, stories: Path, tmp_path: Path) -> None:
    save_file({"ids": tensor}, tmp_path / "i.safetensors")
    with pytest.raises(DataError, match=message):
        load(f"{tmp_path}/i.safetensors:ids", stories)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_windows_beyond_the_context_are_refused(
    model_type: str, random_models: Callable[[str], Path], stories: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="context of 512"):
        load(text_file, stories, length=513)
    save_file({"ids": torch.ones(1, 65, dtype=torch.int64)}, tmp_path / "i.safetensors")
    with pytest.raises(DataError, match="context of 64"):
        load(f"{tmp_path}/i.safetensors:ids", random_models(model_type), "evaluation")


@pytest.mark.parametrize("token", [99999, -1, "a", [1]])
def test_a_bos_token_outside_the_vocabulary(token: Any, llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "bos_token_id": token}))
    with pytest.raises((DataError, ModelError), match=r"config\.json|cannot be loaded"):
        load("self", llama)


def test_datasets_are_asked_for_by_name_configuration_split_and_column(
    stories: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.machinery
    import sys
    import types

    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> list[dict[str, str]]:
        asked.append((args, options))
        return [{"line": text_file.read_text()}]

    module = types.ModuleType("datasets")
    module.__dict__.update(load_dataset=load_dataset, __spec__=importlib.machinery.ModuleSpec("datasets", None))
    monkeypatch.setitem(sys.modules, "datasets", module)
    windows = load("hf:Salesforce/wikitext@wikitext-2-raw-v1:validation:line", stories, bos=False)
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "validation", "streaming": True})]
    assert windows.sha256 == load(text_file, stories, bos=False).sha256


def test_missing_sources(stories: Path, tmp_path: Path, llama: Path, text_file: Path) -> None:
    for source, message in [
        ("nowhere.txt", "no such text file"),
        (f"{tmp_path}/none.safetensors:ids", "no such file"),
        (f"{tmp_path}/i.safetensors", "name the tensor"),
        (f"{tmp_path}/i.safetensors:other", "has no tensor"),
        (f"{tmp_path}/broken.safetensors:ids", "not a readable safetensors"),
    ]:
        save_file({"ids": torch.ones(2, 3, dtype=torch.int64)}, tmp_path / "i.safetensors")
        (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 40)
        with pytest.raises(DataError, match=message):
            load(source, stories)
    with pytest.raises(DataError, match="tokenizer"):
        load(text_file, llama)


def test_datasets_is_named_with_its_command(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name))
    with pytest.raises(MissingExtraError, match="pip install"):
        load("hf:wikitext", stories)
