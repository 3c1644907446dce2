"""The status of a job whose files may hold anything: what is wrong is said, and nothing is believed."""

import json
import math
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsify.errors import UsageError
from sparsify.journal import JOURNAL, METRICS, SNAPSHOT
from sparsify.status import status
from sparsify.untrusted import read_lines
from tests import test_status
from tests.conftest import Run
from tests.test_status import change_start

job = test_status.job


def test_a_journal_with_anything_in_it(job: Path) -> None:
    lines = (job / JOURNAL).read_bytes()
    junk = [b"\0" * 100, b"\xff\xfe", b"[1]", b'{"event": "start"', b"x" * (3 << 20), b"[" * 100_000, b"1" * 5000, b""]
    (job / JOURNAL).write_bytes(lines + b"\n".join(junk) + b'\n{"event": "notice", "text": "at the end"}\n{"eve')
    found = status(job)
    assert (found.state, found.blocks_done, found.notices) == ("running", 1, ["a notice", "at the end"])
    assert found.problems == [f"{JOURNAL}: {len(junk) + 1} lines that cannot be read"]


def test_a_journal_without_end_is_read_at_both_ends(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.untrusted._JOURNAL_BYTES", 1000)
    with (job / JOURNAL).open("a") as file:
        file.writelines(json.dumps({"event": "notice", "text": f"number {i}"}) + "\n" for i in range(10_000))
    found = list(read_lines(job / JOURNAL, []))
    assert found[0]["event"] == "start"
    assert found[-1]["text"] == "number 9999"
    assert len(found) < 100
    assert status(job).model == "a model"


@pytest.mark.parametrize("name", [JOURNAL, SNAPSHOT, ".state.json", ".lock", "sparsify.json", "checkpoint"])
@pytest.mark.parametrize("kind", ["link", "loop", "folder", "pipe", "zero"])
def test_files_that_are_none(cli: Run, job: Path, name: str, kind: str) -> None:
    path = job / name
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to("/etc/passwd")
    elif kind == "loop":
        path.symlink_to(name)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        # A file without an end.
        path.symlink_to("/dev/zero")
    result = cli("status", job)
    assert result.returncode == 0, result.stderr
    assert "root:" not in result.stdout


def test_a_folder_that_is_not_to_be_read(job: Path) -> None:
    job.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            # The superuser may read everything.
            os.seteuid(65534)
        with pytest.raises(UsageError, match="cannot be read"):
            status(job)
    finally:
        os.seteuid(user)
        job.chmod(0o700)


def test_what_is_shown_cannot_talk_to_the_terminal(cli: Run, job: Path) -> None:
    with (job / JOURNAL).open("a") as file:
        file.write(json.dumps({"event": "notice", "text": "\033]0;title\a\ud800\u202e\nerror: x"}) + "\n")
    shown = cli("status", job).stdout
    assert "title" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert not [line for line in shown.splitlines() if line.startswith("error")]


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(st.characters(), max_size=30)
    | st.sampled_from(["start", "block", "end", "resume", "failed", 1 << 62, 5e-324, 1e308, -1, 0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value within ``value``."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """``value`` with ``new`` at ``path``."""
    if not path:
        return new
    key, *rest = path
    if isinstance(value, dict):
        return {**value, key: changed(value[key], tuple(rest), new)}
    return [changed(each, tuple(rest), new) if i == key else each for i, each in enumerate(value)]


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_value_in_any_file_is_a_fault(cli: Run, job: Path, data: st.DataObject) -> None:
    files = {
        JOURNAL: [json.loads(line) for line in (job / JOURNAL).read_text().splitlines()],
        SNAPSHOT: [json.loads((job / SNAPSHOT).read_text())],
        ".state.json": [{"fingerprint": {"recipe": {"method": "fast"}}, "state": {"blocks": [1]}}],
    }
    work = job.parent / "fuzzed.partial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (work / ".lock").touch()
    targets = [
        (name, i, place) for name, body in files.items() for i, each in enumerate(body) for place in places(each)
    ]
    for _ in range(data.draw(st.integers(1, 3))):
        name, i, place = data.draw(st.sampled_from(targets))
        files[name][i] = changed(files[name][i], place, data.draw(_VALUES)) if place in places(files[name][i]) else None
    for name, body in files.items():
        (work / name).write_text("".join(json.dumps(each) + "\n" for each in body))
    for options in ((), ("--json",)):
        result = cli("status", work, *options)
        assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["state"] in ("running", "dead", "failed", "interrupted", "unknown")
    assert not any(isinstance(each, float) and not math.isfinite(each) for each in found.values())


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_in_any_file_are_a_fault(cli: Run, job: Path, data: st.DataObject) -> None:
    work = job.parent / "fuzzed.partial"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(job, work)
    for name in (JOURNAL, SNAPSHOT, ".state.json", "run.json", METRICS):
        whole = (work / name).read_bytes() if (work / name).exists() else b"{}"
        cut = data.draw(st.integers(0, len(whole)))
        (work / name).write_bytes(
            whole[:cut] + data.draw(st.binary(max_size=20)) + whole[data.draw(st.integers(0, cut)) :]
        )
    result = cli("status", work)
    assert result.returncode == 0, result.stderr


def test_shell_words_of_the_start_are_what_was_typed(job: Path) -> None:
    change_start(job, command=["sparsify", "prune", "a model", "--out", "it's"], cwd=os.getcwd(), born=1)
    resume = status(job).resume
    assert resume is not None
    assert shlex.split(resume) == ["sparsify", "prune", "a model", "--out", "it's"]
    change_start(job, cwd="/else where")
    assert status(job).resume == f"cd '/else where' && {resume}"
    for nothing in (None, [], [1], "prune", ["a\0b"]):
        change_start(job, command=nothing)
        assert status(job).resume is None
