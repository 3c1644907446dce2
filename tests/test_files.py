"""Files that appear whole, and output folders: what they may replace, and that nothing of the user's is lost."""

import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sparsify.errors import ModelError, OutputError
from sparsify.files import staging_folder, write_atomic, write_json

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


HOLLOW = [
    "{}", "[]", "", '{"model": 1}', '{"format": 1, "kind": "x", "files": null}',
    '{"model": 1, "coverage": 2, "artifacts": 3}', '{"model": 1, "coverage": 2, "artifacts": [{"path": ".."}, 4]}',
]  # fmt: skip


@pytest.mark.parametrize("mark", ["report.json", "sparsify.json"])
@pytest.mark.parametrize("text", HOLLOW)
def test_a_file_that_only_has_the_name_marks_nothing(mark: str, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / mark).write_text(text)
    (out / "mine").write_text("mine")
    with pytest.raises(OutputError, match="not part of an output"):
        make(out, "one", overwrite=True)
    assert (out / mark).read_text() == text
    assert (out / "mine").exists()


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


def fail(out: Path, error: type[BaseException], *, committed: bool = False, nested: bool = False) -> None:
    with staging_folder(out, {}) as staging:
        (staging.path / "half").write_text("half")
        if committed:
            staging.save({"done": 1})
        if nested:
            (staging.path / "checkpoint.partial").mkdir()
        raise error("x")


@pytest.mark.parametrize(("error", "kept"), [(ModelError, False), (OutputError, True), (KeyboardInterrupt, True)])
def test_what_an_error_leaves_behind(error: type[BaseException], kept: bool, tmp_path: Path) -> None:
    with pytest.raises(error):
        fail(tmp_path / "out", error)
    assert (tmp_path / "out.partial").exists() == kept


@pytest.mark.parametrize("options", [{"committed": True}, {"nested": True}])
def test_work_that_was_committed_to_outlives_any_error(options: dict[str, bool], tmp_path: Path) -> None:
    for _ in range(2):  # the run and one that resumes it
        with pytest.raises(ModelError):
            fail(tmp_path / "out", ModelError, **options)
        assert (tmp_path / "out.partial/half").exists()


def test_an_empty_output_folder_and_a_kill_right_before_the_rename(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out", "one")
    (tmp_path / "out/.lock").touch()
    make(tmp_path / "out", "two", overwrite=True)
    assert content(tmp_path / "out") == "two"
    (tmp_path / "new").mkdir()
    (tmp_path / "new/.lock").touch()
    make(tmp_path / "new", "three")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["model.safetensors", "sparsify.json"]


def test_files_of_the_user_inside_an_artifact_are_seen(tmp_path: Path) -> None:
    with staging_folder(tmp_path / "out", {}) as staging:
        (staging.path / "hf").mkdir()
        write_json(staging.path / "hf/sparsify.json", {**MANIFEST, "files": {}})
        write_json(staging.path / "report.json", {"model": "m", "coverage": {}, "artifacts": [{"path": "hf"}]})
        staging.commit()
    (tmp_path / "out/hf/thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match=r"hf/thesis\.tex is not part"):
        make(tmp_path / "out", "one", overwrite=True)
    (tmp_path / "out/hf/thesis.tex").unlink()
    make(tmp_path / "out", "one", overwrite=True)


def test_two_may_write_a_file_at_once(tmp_path: Path) -> None:
    path, both = tmp_path / "file", threading.Barrier(2)

    def write(text: str) -> None:
        def fill(temporary: Path) -> None:
            temporary.write_text(text)
            both.wait(60)

        write_atomic(path, fill)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ("a" * 10, "b" * 20)))
    assert path.read_text() in ("a" * 10, "b" * 20)
    assert [left.name for left in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def fill(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="the disk is full"):
        write_atomic(path, fill)
    assert path.read_text() == "before"
    assert [left.name for left in tmp_path.iterdir()] == ["file"]


def test_files_are_as_readable_as_any_that_the_user_creates(tmp_path: Path) -> None:
    def fill(temporary: Path) -> None:
        temporary.write_text("private")
        temporary.chmod(0o600)

    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", fill)
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_files_that_a_killed_process_was_writing_are_not_part_of_the_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staging_folder(out, {}) as staging:
        staging.save({"done": 1})
        (staging.path / "sub").mkdir()
        for name in ("model.safetensors.0123456789ab.tmp", ".state.json.0123456789ab.tmp", "sub/x.0123456789ab.tmp"):
            (staging.path / name).write_text("half")
        # An output's own.
        (staging.path / "sub/notes.tmp").write_text("whole")
    with staging_folder(out, {}) as staging:
        assert staging.state == {"done": 1}
        write_json(staging.path / "sparsify.json", MANIFEST)
        staging.commit()
    assert sorted(path.name for path in out.rglob("*")) == ["notes.tmp", "sparsify.json", "sub"]
