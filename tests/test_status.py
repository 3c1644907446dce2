"""What ``sparsify status`` says of jobs that run, died, failed and finished, and of folders that hold anything."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsify.errors import SparsifyError
from sparsify.files import staging_folder, staging_path
from sparsify.history import quoted
from sparsify.journal import JOURNAL, Journal
from sparsify.processes import alive, identity, lock_held
from sparsify.prune import prune
from sparsify.recipe import Recipe
from sparsify.source import Source
from sparsify.status import status
from tests.conftest import Run, interrupt, refuse
from tests.watched_run import ABOUT, row


@contextmanager
def driver(out: Path, total: int, pause: int) -> Iterator[subprocess.Popen[str]]:
    """A driver of ``total`` blocks that has finished ``pause`` of them and waits."""
    command = [sys.executable, "-m", "tests.watched_run", str(out), str(total), str(pause)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "waiting\n"
            yield process
        finally:
            process.kill()


# --- the life of a job ---------------------------------------------------------------------------------------------


def test_a_job_from_start_to_kill_to_its_end(cli: Run, tmp_path: Path) -> None:
    out = tmp_path / "an out"
    with driver(out, 4, 2) as process:
        for name in (out, staging_path(out)):
            found = status(name)
            assert (found.state, found.blocks_done, found.blocks_total) == ("running", 2, 4)
        assert found.folder == str(staging_path(out))
        assert (found.model, found.method, found.pattern, found.threads) == ("a model", "fast", "2:4", 2)
        assert (found.stage, found.percent, found.runs) == ("pruning", 50.0, 1)
        assert found.seconds_left is not None
        assert found.process["pid"] == process.pid
        assert found.resume is None
        assert found.notices == ["about to wait"]
        assert found.disk_bytes > 0
        assert [(each["name"], each["doing"], each["block"]) for each in found.workers] == [("w1", "solve", 2)]
        text = cli("status", out).stdout
        assert "2 of 4 finished" in text
        assert "about to wait" in text
        assert "w1" in text
        process.kill()
        process.wait()
        found = status(out)
        assert (found.state, found.blocks_done, found.blocks_resumed) == ("dead", 2, 0)
        assert found.resume is not None
        assert found.resume in cli("status", out).stdout
        # The command is one that a shell takes: with it the job goes on where it stopped.
        again = subprocess.run(["sh", "-c", found.resume], input="\n", text=True, capture_output=True, timeout=60)
        assert again.returncode == 0, again.stderr
    found = status(staging_path(out))
    assert (found.state, found.blocks_done, found.blocks_resumed, found.runs) == ("finished", 4, 2, 2)
    assert (found.seconds, found.peak_memory_bytes, found.model) == (1.5, 3 << 20, "a model")
    assert found.folder == str(out)
    assert {path.name for path in out.iterdir()} == {JOURNAL, "sparsify.json", "run.json"}
    result = cli("status", out, "--json")
    assert result.returncode == 0
    assert json.loads(result.stdout)["state"] == "finished"


def test_a_resumed_job_counts_what_it_found_and_not_its_time(tmp_path: Path) -> None:
    with driver(tmp_path / "out", 6, 3):
        pass
    with driver(tmp_path / "out", 6, 4):
        found = status(tmp_path / "out")
    assert (found.state, found.blocks_done, found.blocks_resumed, found.runs) == ("running", 4, 3, 2)
    assert found.percent == pytest.approx(400 / 6)
    assert len(found.seconds_by_step) == 1


def test_a_failed_job_says_why_and_how_to_go_on(cli: Run, tmp_path: Path) -> None:
    with staging_folder(tmp_path / "out", {}) as staging:
        staging.save({"blocks": [1]})
        journal = Journal(staging.path, None, ABOUT)
        journal.blocks(3)
        journal.task("solve", 0, "w1", "out of memory", attempt=1, retried=True)
        journal.task("solve", 0, "w1", "out of memory", attempt=2, retried=False)
        with pytest.raises(OSError, match="gone"), journal:
            raise OSError("the disk is gone")
    # This process lives on, as a notebook does.
    found = status(tmp_path / "out")
    assert (found.state, found.blocks_done) == ("failed", 1)
    assert "the disk is gone" in found.detail
    assert (found.tasks_failed, found.tasks_retried, len(found.tasks)) == (2, 1, 2)
    assert found.resume is not None
    result = cli("status", tmp_path / "out")
    assert result.returncode == 0
    assert "out of memory; given up" in result.stdout


def test_a_job_without_a_journal_is_known_by_its_lock(
    llama: Path, ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = Source("llama", llama, "folder"), Recipe("2:4", "wanda", calibration=ids_file), tmp_path / "out"
    with monkeypatch.context() as patched:
        interrupt(patched, "sparsify.cluster.job.write_shard", after=1)
        with pytest.raises(KeyboardInterrupt):
            prune(*arguments)
    folder = tmp_path / "out.partial"
    (folder / JOURNAL).unlink(missing_ok=True)
    found = status(tmp_path / "out")
    assert (found.state, found.blocks_done, found.method, found.pattern) == ("dead", 1, "wanda", "2:4")
    assert found.resume is None
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert status(tmp_path / "out").state == "running"
    prune(*arguments)
    found = status(tmp_path / "out")
    assert (found.state, found.method, found.pattern) == ("finished", "wanda", "2:4")


def test_asking_takes_no_lock_that_is_held(tmp_path: Path) -> None:
    with staging_folder(tmp_path / "out", {}) as staging:
        assert lock_held(staging.path) is True
        with pytest.raises(SparsifyError, match="another sparsify process"), staging_folder(tmp_path / "out", {}):
            pass
    assert lock_held(staging.path) is False
    with staging_folder(tmp_path / "out", {}):
        pass
    assert lock_held(tmp_path) is None


def test_what_follows_pruning_is_running_too(tmp_path: Path) -> None:
    """As prune-and-export has it: the journal lies in the checkpoint within."""
    out = tmp_path / "out"
    with staging_folder(out, {}) as staging:
        staging.save({})
        with staging_folder(staging.path / "checkpoint", {}) as inner:
            inner.save({"blocks": [1]})
            with Journal(inner.path, None, ABOUT) as journal:
                journal.blocks(1)
                found = status(out)
                assert (found.state, found.model) == ("running", "a model")
                journal.block(0, [row(0)], {})
                journal.finish()
            inner.commit()
        assert status(out).state == "running"
    found = status(out)
    assert (found.state, found.blocks_done) == ("dead", 1)
    assert "resumes" in found.detail


# --- whose process it is -------------------------------------------------------------------------------------------


def change_start(folder: Path, **changes: Any) -> None:
    first, *rest = (folder / JOURNAL).read_text().splitlines()
    (folder / JOURNAL).write_text("\n".join([json.dumps({**json.loads(first), **changes}), *rest]) + "\n")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job of this process that goes on; its lock is free, so that the process alone says that it does."""
    folder = tmp_path / "out.partial"
    folder.mkdir()
    (folder / ".lock").touch()
    journal = Journal(folder, None, ABOUT)
    journal.stage("pruning", 10)
    journal.blocks(2, weights=[5, 5])
    journal.worker("w1", "solve", 0)
    journal.task("solve", 0, "w1", "killed", attempt=1, retried=True)
    journal.notice("a notice")
    journal.block(0, [row(0)], {"solve": 1.0})
    os.close(journal._file)
    return folder


def test_a_process_is_known_by_more_than_its_number(job: Path) -> None:
    me = identity()
    assert alive(me) is True
    assert status(job).state == "running"
    change_start(job, born=me["born"] - 1)
    assert status(job).state == "dead"
    with subprocess.Popen(["true"]) as child:
        # Waited for by nobody: a zombie, whose number is still taken.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert alive({**me, "pid": child.pid}) is False
    assert alive({**me, "pid": child.pid}) is not True
    for pid in (None, "1", 0, -1, 1 << 70, True):
        assert alive({**me, "pid": pid}) is not True


def test_another_machine_is_not_judged_from_here(job: Path) -> None:
    change_start(job, host="node7", boot="elsewhere")
    found = status(job)
    assert found.state == "unknown"
    assert "node7; last sign of life 0 s ago" in found.detail
    assert found.resume is None
    with (job / ".lock").open("a") as lock:
        # A lock that is seen across machines says more.
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert status(job).state == "running"
    # This machine before its last start.
    change_start(job, host=identity()["host"])
    assert status(job).state == "dead"


def test_another_container_is_judged_by_the_lock(job: Path) -> None:
    change_start(job, namespace="pid:[1]")
    assert status(job).state == "dead"
    with (job / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert status(job).state == "running"


def test_a_worker_left_behind_holds_the_lock(job: Path) -> None:
    change_start(job, born=1)
    with (job / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = status(job)
    assert found.state == "dead"
    assert "lock" in found.detail


def test_a_snapshot_of_another_run_is_not_believed(job: Path) -> None:
    assert status(job).workers
    change_start(job, run="another")
    assert not status(job).workers


# --- the command ---------------------------------------------------------------------------------------------------


def test_folders_without_a_job(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    refuse(cli("status", tmp_path / "empty"), 2, "holds no job", "--out")
    refuse(cli("status", tmp_path / "absent"), 2, "does not exist", "absent.partial")
    refuse(cli("status", tmp_path / "file"), 2, "is not a folder")
    refuse(cli("status", "/"), 2, "holds no job")
    refuse(cli("status", tmp_path / "empty", "--watch", "0"), 2, "--watch")
    refuse(cli("status", tmp_path / "empty", "--watch", "nan"), 2, "--watch")


def test_watching_ends_with_the_job(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sparsify", "status", str(out), "--watch", "0.05", "--json"]
    with driver(out, 3, 1) as process, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        assert process.stdin is not None
        assert json.loads(watcher.stdout.readline())["state"] == "running"
        process.stdin.write("\n")
        process.stdin.flush()
        told = [json.loads(line) for line in watcher.stdout]
        assert watcher.wait(timeout=60) == 0
    assert told[-1]["state"] == "finished"
    assert all(each["blocks_done"] >= 1 for each in told)


def test_a_replaced_output_that_was_not_removed_is_no_job(tmp_path: Path) -> None:
    with driver(tmp_path / "out", 1, 0) as process:
        process.communicate("\n", timeout=60)
    shutil.copytree(tmp_path / "out", tmp_path / "out.partial")
    (tmp_path / "out.partial/.lock").touch()
    assert status(tmp_path / "out").state == "finished"


@given(st.text(min_size=1), st.binary(min_size=1))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arguments_are_quoted_as_bash_reads_them(tmp_path: Path, word: str, data: bytes) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    for argument in (word, os.fsdecode(data)):
        try:
            wanted = os.fsencode(argument)
            line = quoted(argument)
        except ValueError:
            continue
        assert line.isprintable()
        shown = subprocess.run([bash, "-c", f"printf %s {line}"], capture_output=True, check=True).stdout
        assert shown == wanted
