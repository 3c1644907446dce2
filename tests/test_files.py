"""Output folders: what they may replace, and that nothing of the user's is lost."""

from pathlib import Path

import pytest

from sparsify.errors import ModelError, OutputError
from sparsify.files import staging_folder, write_json

MANIFEST = {"format": 1, "kind": "hf", "files": {"model.safetensors": {}, "sub/extra.jinja": {}}}


def make(out: Path, text: str, *, overwrite: bool = False) -> None:
    with staging_folder(out, {"text": text}, overwrite=overwrite) as staging:
        (staging.path / "model.safetensors").write_text(text)
        write_json(staging.path / "sparsify.json", MANIFEST)
        staging.commit()


def content(out: Path) -> str:
    return (out / "model.safetensors").read_text()


def test_overwrite_replaces_our_outputs_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, "one")
    with pytest.raises(OutputError, match="not empty"):
        make(out, "two")
    make(out, "two", overwrite=True)
    assert content(out) == "two"
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match=r"thesis\.tex is not part"):
        make(out, "three", overwrite=True)
    assert content(out) == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("mark", ["report.json", "sparsify.json", "gguf.json"])
@pytest.mark.parametrize("text", ["{}", "[]", "", '{"model": 1}'])
def test_a_file_that_only_has_the_name_marks_nothing(mark: str, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / mark).write_text(text)
    with pytest.raises(OutputError, match="not part of an output"):
        make(out, "one", overwrite=True)
    assert (out / mark).read_text() == text


def test_a_finished_output_whose_name_ends_in_partial_is_not_a_staging_folder(tmp_path: Path) -> None:
    make(tmp_path / "out.partial", "mine")
    with pytest.raises(OutputError, match="not a folder of sparsify's"):
        make(tmp_path / "out", "new")
    assert content(tmp_path / "out.partial") == "mine"


def test_a_link_is_followed_to_the_folder_it_names(tmp_path: Path) -> None:
    (tmp_path / "disk/real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk/real")
    make(tmp_path / "link", "one")
    make(tmp_path / "link", "two", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "disk/real") == "two"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


def test_folders_that_no_rename_can_replace_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here/below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/below")
    for out in (Path(), tmp_path / "here"):
        with pytest.raises(OutputError, match="current folder"):
            make(out, "one")
    with pytest.raises(OutputError, match="mount point"):
        make(Path("/proc"), "one")


def fail(out: Path, error: type[BaseException], keep: bool = False) -> None:
    with staging_folder(out, {}) as staging:
        staging.save({"done": 1})
        staging.keep = keep
        raise error("x")


@pytest.mark.parametrize(("error", "kept"), [(ModelError, False), (OutputError, True), (KeyboardInterrupt, True)])
def test_what_an_error_leaves_behind(error: type[BaseException], kept: bool, tmp_path: Path) -> None:
    with pytest.raises(error):
        fail(tmp_path / "out", error)
    assert (tmp_path / "out.partial").exists() == kept


def test_finished_work_outlives_a_later_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        fail(tmp_path / "out", ModelError, keep=True)
    assert (tmp_path / "out.partial").exists()
