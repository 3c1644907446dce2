"""The journal of a run, its metrics as a scraper reads them, and the time that is left."""

import json
import math
import os
import re
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify import journal as module
from sparsify.errors import NumericsError, OutputError
from sparsify.journal import JOURNAL, METRICS, SNAPSHOT, About, Journal, Stopwatch
from sparsify.metrics import Blocks, Snapshot, Stage, Worker, exposition
from tests.watched_run import ABOUT, row

# The text format 0.0.4, https://prometheus.io/docs/instrumenting/exposition_formats/
_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_HELP = re.compile(rf"# HELP ({_NAME}) ((?:[^\\\n]|\\\\|\\n)*)")
_TYPE = re.compile(rf"# TYPE ({_NAME}) (counter|gauge)")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^\\"\n]|\\\\|\\"|\\n)*)"(,|$)')
_SAMPLE = re.compile(rf"({_NAME})(?:\{{(.*)\}})? ([-+]?[0-9.]+(?:e[-+]?[0-9]+)?|NaN|[-+]Inf)")
_ESCAPES = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(text: str) -> Samples:
    """The samples of an exposition, which has to keep every rule of the format."""
    assert text.endswith("\n")
    found: Samples = {}
    described: list[str] = []
    kind = family = ""
    # Not splitlines, which ends lines at characters that a label may hold.
    for line in text.removesuffix("\n").split("\n"):
        if match := _HELP.fullmatch(line):
            family = match[1]
            assert family not in described
            described.append(family)
            kind = ""
        elif match := _TYPE.fullmatch(line):
            assert match[1] == family
            assert not kind
            kind = match[2]
            assert (kind == "counter") == family.endswith("_total")
        else:
            match = _SAMPLE.fullmatch(line)
            assert match, line
            # Samples of a family lie together, after its type.
            assert match[1] == family
            assert kind
            labels, rest = [], match[2] or ""
            while rest:
                label = _LABEL.match(rest)
                assert label, rest
                labels.append((label[1], re.sub(r"\\.", lambda escape: _ESCAPES[escape[0]], label[2])))
                rest = rest[label.end() :]
            key = (match[1], tuple(labels))
            assert key not in found
            assert len({name for name, _ in labels}) == len(labels)
            found[key] = float(match[3].replace("Inf", "inf"))
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"sparsify_prune_{name}", tuple(labels.items())]


class Heard:
    """A ``Progress`` that remembers."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def stage(self, name: str, total: int) -> None:
        self.calls.append((name, total))

    def advance(self, steps: int = 1) -> None:
        self.calls.append(steps)

    def notice(self, text: str) -> None:
        self.calls.append(text)


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]


def metrics(folder: Path) -> Samples:
    return scrape((folder / METRICS).read_text())


# --- lines -------------------------------------------------------------------------------------------------------


def test_a_run_is_written_down_and_the_bars_are_told(tmp_path: Path) -> None:
    clock, bars = Clock(), Heard()
    with Journal(tmp_path, bars, ABOUT, clock=clock) as journal:
        journal.stage("pruning", 20)
        journal.blocks(2, weights=[32, 32])
        journal.worker("w1", "solve", 0, peak_memory_bytes=7)
        journal.worker("w2", "load", 1, peak_memory_bytes=5)
        clock.now += 4
        journal.advance(10)
        journal.seen("w2")
        journal.task("solve", 0, "w1", "killed", attempt=1, retried=True)
        journal.lost("w1", "killed by signal 9")
        journal.worker("w2", "solve", 0)
        journal.notice("worker w1 is gone")
        clock.now += 2
        journal.block(0, [row(0, 0.5)], {"solve": 3.5, "load": 0.25}, workers=["w1", "w2"])
        samples = metrics(tmp_path)
        journal.block(1, [], {"load": 0.5})
        journal.finish()
    assert bars.calls == [("pruning", 20), 10, "worker w1 is gone"]
    events = lines(tmp_path)
    names = ["start", "stage", "blocks", "task", "lost", "notice", "block", "block", "end"]
    assert [line["event"] for line in events] == names
    assert {"pid": os.getpid(), "model": "a model", "threads": 2, "workers": 2, "blocks_done": 0}.items() <= (
        events[0].items()
    )
    assert re.fullmatch("[0-9a-f]{64}", events[0]["fingerprint"])
    assert events[4] == {
        "event": "lost", "time": 1004.0, "worker": "w1", "error": "killed by signal 9", "doing": "solve", "block": 0,
    }  # fmt: skip
    assert events[6] == {
        "event": "block", "time": 1006.0, "block": 0, "took_s": 6.0, "seconds": {"solve": 3.5, "load": 0.25},
        "linears": 1, "weights": 32, "sparsity": 0.5, "worst": {"linear": "block.0.linear", "relative_error": 0.5},
        "workers": ["w1", "w2"], "peak_memory_bytes": None,
    }  # fmt: skip
    assert events[7]["worst"] is None
    assert events[8]["state"] == "finished"
    # Of a finished run the journal alone is kept.
    assert [path.name for path in tmp_path.iterdir()] == [JOURNAL]
    assert value(samples, "blocks") == 2
    assert value(samples, "blocks_done") == 1
    assert value(samples, "steps_done", stage="pruning") == 10
    assert value(samples, "steps", stage="pruning") == 20
    assert value(samples, "block_seconds_total", step="solve") == 3.5
    assert value(samples, "seconds_per_block") == 6
    assert value(samples, "tasks_failed_total") == value(samples, "tasks_retried_total") == 1
    assert value(samples, "workers_alive") == value(samples, "tasks_running") == value(samples, "running") == 1
    assert value(samples, "worker_last_seen_timestamp_seconds", worker="w1") == 1000
    assert value(samples, "worker_last_seen_timestamp_seconds", worker="w2") == 1004
    assert value(samples, "worker_peak_memory_bytes", worker="w2") == 5
    assert value(samples, "last_update_timestamp_seconds") == 1006
    assert value(samples, "peak_memory_bytes") > 1 << 20


@pytest.mark.parametrize(
    ("error", "state", "text"),
    [
        (NumericsError("block.1: NaN\nin the input"), "failed", "block.1: NaN in the input"),
        (ZeroDivisionError("by zero"), "failed", "ZeroDivisionError: by zero"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt:"),
    ],
)
def test_an_error_is_the_end_of_a_run(tmp_path: Path, error: BaseException, state: str, text: str) -> None:
    with pytest.raises(type(error)), Journal(tmp_path):
        raise error
    end = lines(tmp_path)[-1]
    assert (end["event"], end["state"], end["error"]) == ("end", state, text)
    assert value(metrics(tmp_path), "running") == 0
    assert json.loads((tmp_path / SNAPSHOT).read_text())["state"] == state


def test_an_output_that_cannot_be_committed_has_failed(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.finish()
    with pytest.raises(OutputError), journal:
        raise OutputError("out: not writable")
    assert [line.get("state") for line in lines(tmp_path)] == [None, "finished", "failed"]


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_cut_line_is_mended_and_nothing_before_it_changes(tmp_path: Path, cut: int) -> None:
    with Journal(tmp_path) as journal:
        journal.notice("before")
    path = tmp_path / JOURNAL
    left = path.read_bytes()[:-cut]
    path.write_bytes(left)
    with Journal(tmp_path, done=1) as journal:
        journal.notice("after")
    data = path.read_bytes()
    assert data.startswith(left + b"\n")
    added = [json.loads(line) for line in data[len(left) + 1 :].splitlines()]
    assert [line["event"] for line in added] == ["resume", "notice"]
    # Cut by its line end alone, the last line is whole again.
    whole = [line for line in data.splitlines() if line.endswith(b"}")]
    assert len(whole) == (4 if cut == 1 else 3)


def test_lines_of_several_threads_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EVERY_S", 0.0)
    with Journal(tmp_path) as journal:
        journal.stage("pruning", 200)

        def work(name: str) -> None:
            for index in range(25):
                journal.worker(name, "solve", index)
                journal.notice(f"{name} {index} " + "x" * 5000)
                journal.advance()

        threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert value(metrics(tmp_path), "steps_done", stage="pruning") == 200
    told = {line["text"].rsplit(" ", 1)[0] for line in lines(tmp_path) if line["event"] == "notice"}
    assert told == {f"w{i} {index}" for i in range(8) for index in range(25)}


def test_steps_are_timed_and_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 2.0, 10.0, 10.5, 20.0, 23.0])
    monkeypatch.setattr("sparsify.journal.time.monotonic", lambda: next(ticks))
    clock = Stopwatch()
    for step in ("load", "solve", "load"):
        with clock(step):
            pass
    assert clock.seconds == {"load": 5.0, "solve": 0.5}


# --- metrics -----------------------------------------------------------------------------------------------------


def test_metrics_are_replaced_at_events_and_else_at_most_once_an_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_EVERY_S", 1e9)
    with Journal(tmp_path) as journal:
        journal.stage("pruning", 10)
        journal.blocks(2)
        before = os.stat(tmp_path / METRICS).st_ino, os.stat(tmp_path / SNAPSHOT).st_ino
        journal.advance(3)
        journal.worker("w1")
        journal.beat()
        assert (os.stat(tmp_path / METRICS).st_ino, os.stat(tmp_path / SNAPSHOT).st_ino) == before
        journal.worker("w1", "solve", 0)
        assert value(metrics(tmp_path), "steps_done", stage="pruning") == 3
        journal.advance(2)
        journal.block(0, [], {})
        assert value(metrics(tmp_path), "steps_done", stage="pruning") == 5
        monkeypatch.setattr(module, "_EVERY_S", 0.0)
        journal.stage("checking", 5)
        journal.advance()
        assert value(metrics(tmp_path), "steps_done", stage="checking") == 1
        assert value(metrics(tmp_path), "steps_done", stage="pruning") == 10
    # Nothing but what was asked for is left behind.
    assert {path.name for path in tmp_path.iterdir()} == {JOURNAL, METRICS, SNAPSHOT}


_ANY = st.text(st.characters(codec="utf-8"), max_size=20)


@given(
    stages=st.lists(_ANY, min_size=1, max_size=3, unique=True),
    model=_ANY,
    worker=_ANY,
    number=st.floats(),
)
def test_any_name_and_any_number_survive_the_format(stages: list[str], model: str, worker: str, number: float) -> None:
    found = scrape(
        exposition(
            Snapshot(
                5.0,
                0.5,
                model=model,
                stages=tuple(Stage(name, 4, i, 0, 1.0) for i, name in enumerate(stages)),
                block_s={"solve": number},
                workers=(Worker(worker, None, None, 1.0, 1.5),),
            )
        )
    )
    for i, name in enumerate(stages):
        assert value(found, "steps_done", stage=name) == i
    assert value(found, "worker_last_seen_timestamp_seconds", worker=worker) == 1.5
    written = value(found, "block_seconds_total", step="solve")
    assert written == number or (math.isnan(written) and math.isnan(number))
    assert any(name == "sparsify_prune_info" and ("model", model) in labels for name, labels in found)


def test_a_name_that_is_no_text_leaves_the_metrics_readable(tmp_path: Path) -> None:
    name = os.fsdecode(b"model\xff")
    with Journal(tmp_path, about=About(model=name)):
        text = (tmp_path / METRICS).read_bytes().decode("utf-8")
    assert 'model="model?"' in text
    assert lines(tmp_path)[0]["model"] == name


def test_metrics_that_cannot_be_written_are_a_notice_and_no_end(tmp_path: Path) -> None:
    (tmp_path / METRICS / "in the way").mkdir(parents=True)
    bars = Heard()
    with Journal(tmp_path, bars) as journal:
        journal.stage("pruning", 2)
        journal.blocks(1)
        journal.block(0, [], {})
    notices = [call for call in bars.calls if isinstance(call, str)]
    assert len(notices) == 1
    assert METRICS in notices[0]
    assert [line["event"] for line in lines(tmp_path)] == ["start", "stage", "blocks", "block"]


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may grow past ``limit`` bytes: the system answers as a full disk does, in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_output_error_that_names_the_remedy(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.stage("pruning", 10)
    room = (tmp_path / JOURNAL).stat().st_size + 30
    full = pytest.raises(OutputError, match=r"journal\.jsonl: the disk is full; free space")
    with full, journal:
        with small_files(room), pytest.raises(OutputError):
            journal.notice("longer than what is left of the disk")
        # There is room again: what comes now does not go into the torn line.
        journal.notice("written")
        with small_files(100):
            journal.notice("not written")
    written = (tmp_path / JOURNAL).read_text().splitlines()
    assert not written[2].endswith("}")
    assert [json.loads(line)["event"] for line in written[:2] + written[3:]] == ["start", "stage", "notice", "end"]


def test_a_disk_that_is_too_full_for_metrics_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EVERY_S", 0.0)
    journal = Journal(tmp_path)
    for index in range(100):
        journal.worker(f"w{index}")
    before = metrics(tmp_path)
    with pytest.raises(OutputError, match=r"metrics\.prom: the disk is full"), journal, small_files(4000):
        journal.beat()
    assert [line["event"] for line in lines(tmp_path)] == ["start", "end"]
    # What stood there was not touched but for the end.
    assert before.items() - metrics(tmp_path).items() <= {
        key for key in before.items() if key[0][0].endswith(("running", "update_timestamp_seconds", "memory_bytes"))
    }
    assert not list(tmp_path.glob("*.tmp"))


# --- time left ---------------------------------------------------------------------------------------------------


def test_time_left_counts_this_process_and_not_what_it_found(tmp_path: Path) -> None:
    clock = Clock()
    with Journal(tmp_path, done=6, clock=clock) as journal:
        clock.now += 500  # loading and surveying are no work on blocks
        journal.stage("pruning", 100)
        journal.skip(60)
        journal.blocks(10, range(6))
        assert ("sparsify_prune_eta_seconds", ()) not in metrics(tmp_path)
        for index, left in ((6, 60), (7, 40), (8, 20), (9, 0)):
            clock.now += 20
            journal.advance(10)
            journal.block(index, [], {})
            assert value(metrics(tmp_path), "eta_seconds") == pytest.approx(left)


def test_time_left_before_the_first_block_is_by_steps_and_then_by_weights(tmp_path: Path) -> None:
    clock = Clock()
    with Journal(tmp_path, clock=clock) as journal:
        journal.stage("pruning", 40)
        journal.blocks(3, weights=[100, 100, 400])
        clock.now += 10
        journal.advance(10)
        assert journal._tally.snapshot().seconds_left(clock.now) == pytest.approx(30)
        journal.block(0, [], {})
        assert journal._tally.snapshot().seconds_left(clock.now) == pytest.approx(50)


def test_a_block_under_way_counts_by_its_age() -> None:
    blocks = Blocks(10, 2, 0, 0.0, 20.0, 2, 8, usual_s=10.0)
    assert blocks.seconds_left(20.0) == pytest.approx(80)
    assert blocks.seconds_left(25.0) == pytest.approx(75)
    # One that takes longer than usual promises nothing, and less speed.
    assert blocks.seconds_left(40.0) == pytest.approx(40 * 7 / 3)


def test_blocks_that_are_worked_on_at_once() -> None:
    # Ten workers, twenty blocks, each takes 100 s; the first is finished and nine are about to be.
    blocks = Blocks(20, 1, 0, 0.0, 100.0, 1, 19, usual_s=100.0, begun=(0.0,) * 9)
    assert blocks.seconds_left(100.0) == pytest.approx(100)


def test_no_work_no_estimate() -> None:
    assert Blocks(10, 4, 4, 0.0, 0.0, 0, 6).seconds_left(50.0) is None
    assert Blocks(10, 5, 4, 0.0, 0.0, 0, 6, usual_s=0.0).seconds_left(50.0) is None
    assert Blocks(10, 10, 10, 0.0, 0.0, 0, 0).seconds_left(50.0) == 0
    assert Snapshot(1.0, 0.0).seconds_left(1.0) is None


# --- a real run ----------------------------------------------------------------------------------------------------


def test_a_run_of_the_driver_goes_through_the_journal(llama: Path, ids_file: str, tmp_path: Path) -> None:
    from sparsify.prune import prune
    from sparsify.recipe import Recipe
    from sparsify.source import Source

    (tmp_path / "watch").mkdir()
    bars = Heard()
    with Journal(tmp_path / "watch", bars) as journal:
        recipe = Recipe("2:4", "wanda", calibration=ids_file)
        prune(Source("llama", llama, "folder"), recipe, tmp_path / "out", progress=journal)
        journal.stage("over", 1)
    found = metrics(tmp_path / "watch")
    total = value(found, "steps", stage="pruning")
    assert total > 0
    assert value(found, "steps_done", stage="pruning") == total
    assert sum(call for call in bars.calls if isinstance(call, int)) == total
