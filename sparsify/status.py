"""What a folder says of the job in it, running or not. Nothing is written, and nothing in the folder is trusted.

The files may be cut, be of another version, or be anybody's: what cannot be understood counts as absent and is named in
``Status.problems``.
"""

from __future__ import annotations

import os
import stat
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparsify.errors import UsageError
from sparsify.files import staging_path
from sparsify.history import History, integer, mapping, number, read_history, snapshot_of, text
from sparsify.journal import JOURNAL, SNAPSHOT
from sparsify.metrics import Worker
from sparsify.processes import alive, lock_held, same_machine
from sparsify.untrusted import disk_bytes, read_lines, read_object

FORMAT = 1
_LOCK, _STATE = ".lock", ".state.json"
_PARTIAL = ".partial"
# Where prune-and-export builds its checkpoint, within its own folder.
_CHECKPOINT = "checkpoint"
_RECENT = 5


@dataclass(frozen=True)
class Status:
    """What is known of a job; None where it is not.

    Attributes:
        folder: where the job's files lie.
        state: ``running``, ``finished``, ``failed`` (by an error), ``interrupted`` (Ctrl-C), ``dead`` (killed, or the
            machine was), or ``unknown`` (another machine's, with no news from there).
        detail: the state in a sentence.
        resume: what to type in a shell to go on; None where there is nothing to resume, or it is not known.
        blocks_total, blocks_done, blocks_resumed: decoder blocks; the last: finished before this run was started.
        stage, percent: the current or last stage of progress, and how much of it is done.
        seconds: of this run so far, or until its last sign of life.
        seconds_left: until the blocks are done, for a running job.
        seconds_per_block: in the middle of the last blocks, each from its beginning to its end.
        seconds_by_step: of a block, the mean over those of this run.
        workers: each ``name``, ``doing``, ``block``, ``seconds`` (in it), ``seen_seconds`` (ago), ``alive``,
            ``peak_memory_bytes``.
        tasks_failed, tasks_retried, tasks: failed tasks of this run; and the last of them as the journal has them.
        notices: the last ones.
        silent_seconds: since the last sign of life.
        process: ``pid``, ``host`` and so on of the driver.
        runs: how often the job was started or resumed.
        disk_bytes: what the folder takes on the disk.
        problems: files and lines that could not be read.
    """

    folder: str
    state: str
    detail: str
    resume: str | None = None
    model: str | None = None
    method: str | None = None
    pattern: str | None = None
    blocks_total: int | None = None
    blocks_done: int | None = None
    blocks_resumed: int | None = None
    stage: str | None = None
    percent: float | None = None
    seconds: float | None = None
    seconds_left: float | None = None
    seconds_per_block: float | None = None
    seconds_by_step: dict[str, float] = field(default_factory=dict)
    workers: list[dict[str, Any]] = field(default_factory=list)
    tasks_failed: int = 0
    tasks_retried: int = 0
    tasks: list[dict[str, Any]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    silent_seconds: float | None = None
    process: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None
    runs: int = 0
    disk_bytes: int = 0
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As ``sparsify status --json`` prints it."""
        return {"format": FORMAT, **asdict(self)}


def status(folder: Path, *, now: float | None = None) -> Status:
    """The status of the job whose output, or ``<output>.partial``, is ``folder``.

    Args:
        folder: what the user named.
        now: seconds since 1970; the clock's where it is None.

    Raises:
        UsageError: there is no such folder, it cannot be read, or it holds no job.
    """
    root = _root(folder)
    now = time.time() if now is None else now
    problems: list[str] = []
    home = _home(root)
    history = read_history(read_lines(home / JOURNAL, problems), _RECENT)
    marks = {} if root.name.endswith(_PARTIAL) else _marks(root, problems)
    if marks:
        return _finished(root, marks, history, problems)
    if not history.start and not any(os.path.lexists(root / name) for name in (_LOCK, _STATE)):
        raise UsageError(f"{folder}: holds no job of sparsify's; name a folder that was given as --out")
    return _unfinished(root, home, history, now, problems)


# --- where it is -----------------------------------------------------------------------------------------------------


def _root(folder: Path) -> Path:
    """The folder of the job that the user means: where one is being built, that one."""
    folder = Path(os.path.abspath(folder))
    built = final = folder
    if folder.name.endswith(_PARTIAL) and folder.name != _PARTIAL:
        final = folder.with_name(folder.name.removesuffix(_PARTIAL))
    elif folder.name:
        built = staging_path(folder)
    for candidate in (built, final):
        try:
            # An output that was just replaced is called like a job until it is removed: nobody resumes that.
            replaced = (candidate / "sparsify.json").exists() and not (candidate / _STATE).exists()
            if stat.S_ISDIR(os.stat(candidate).st_mode) and (candidate == final or not replaced or not final.exists()):
                os.listdir(candidate)
                return candidate
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UsageError(
                f"{candidate}: cannot be read ({reason}); change its permissions or name another"
            ) from None
    what = "is not a folder" if os.path.lexists(folder) else f"does not exist, and no {built.name} beside it"
    raise UsageError(f"{folder}: {what}; name the folder that was given as --out")


def _home(root: Path) -> Path:
    """Where the journal of the job in ``root`` lies: of prune-and-export in the folder of its checkpoint."""
    inner = (root / (_CHECKPOINT + _PARTIAL), root / _CHECKPOINT)
    return next((path for path in (root, *inner) if os.path.lexists(path / JOURNAL)), root)


def _marks(root: Path, problems: list[str]) -> dict[str, Any]:
    """What the manifest, or the report, of a finished output says of it; empty where there is neither."""
    body = mapping(read_object(root / "sparsify.json", problems))
    if "recipe" in body and "files" in body:
        recipe, source = mapping(body["recipe"]), mapping(body.get("source"))
        return {"model": source.get("name"), "method": recipe.get("method"), "pattern": recipe.get("pattern")}
    body = mapping(read_object(root / "report.json", problems))
    return {key: body.get(key) for key in ("model", "method", "pattern")} if "artifacts" in body else {}


# --- what it means ---------------------------------------------------------------------------------------------------


def _finished(root: Path, marks: dict[str, Any], history: History, problems: list[str]) -> Status:
    run = mapping(read_object(root / "run.json", problems))
    return Status(
        folder=str(root),
        state="finished",
        detail="finished",
        **_about(marks, history.start),
        blocks_total=history.total,
        blocks_done=history.total,
        blocks_resumed=integer(run.get("blocks_resumed")),
        seconds=number(run.get("seconds")),
        peak_memory_bytes=integer(run.get("peak_memory_bytes")),
        threads=integer(run.get("threads")),
        disk_bytes=disk_bytes(root),
        problems=problems,
        **_told(history),
    )


def _unfinished(root: Path, home: Path, history: History, now: float, problems: list[str]) -> Status:
    snapshot = snapshot_of(read_object(home / SNAPSHOT, problems), history.run)
    signs = (history.last, snapshot.time if snapshot else None)
    seen = [each for each in signs if each is not None]
    silent = max(0.0, now - max(seen)) if seen else None
    word, detail = _state(root, home, history, silent)
    running = word == "running"
    end = now if running else max(seen, default=None)
    # What the state does not list never happened; while a run goes on, its snapshot is as true, and the state may be
    # large.
    done = snapshot.blocks.done if running and snapshot and snapshot.blocks else None
    stored = mapping(read_object(home / _STATE, problems)) if done is None else {}
    blocks = mapping(stored.get("state")).get("blocks")
    if done is None:
        done = len(blocks) if isinstance(blocks, list | dict) else history.done
    stage = snapshot.stages[-1] if snapshot and snapshot.stages else None
    return Status(
        folder=str(root),
        state=word,
        detail=detail,
        resume=None if running or word == "unknown" else history.resume(_here()),
        **_about(history.start, mapping(mapping(stored.get("fingerprint")).get("recipe"))),
        blocks_total=history.total,
        blocks_done=done,
        blocks_resumed=history.resumed,
        stage=stage.name if stage else history.stage,
        percent=100 * min(1.0, stage.done / stage.total) if stage and stage.total > 0 else None,
        seconds=max(0.0, end - history.began) if end is not None and history.began is not None else None,
        seconds_left=number(snapshot.seconds_left(now)) if running and snapshot else None,
        workers=[_worker(each, now, end or now) for each in snapshot.workers] if snapshot else [],
        peak_memory_bytes=snapshot.peak_memory_bytes if snapshot else None,
        silent_seconds=silent,
        threads=integer(history.start.get("threads")),
        disk_bytes=disk_bytes(root),
        problems=problems,
        **_told(history),
    )


def _about(*sources: dict[str, Any]) -> dict[str, Any]:
    """Model, method and pattern, from the first of ``sources`` that knows each."""
    keys = ("model", "method", "pattern")
    return {key: next(filter(None, (text(each.get(key)) for each in sources)), None) for key in keys}


def _told(history: History) -> dict[str, Any]:
    return {
        "seconds_per_block": history.seconds_per_block,
        "seconds_by_step": history.seconds_by_step,
        "tasks_failed": history.n_failed,
        "tasks_retried": history.n_retried,
        "tasks": history.tasks,
        "notices": history.notices,
        "process": history.process,
        "runs": history.runs,
    }


def _worker(worker: Worker, now: float, end: float) -> dict[str, Any]:
    return {
        "name": worker.name,
        "doing": worker.doing,
        "block": worker.block,
        "seconds": max(0.0, end - worker.since),
        "seen_seconds": max(0.0, now - worker.seen),
        "alive": worker.alive,
        "peak_memory_bytes": worker.peak_memory_bytes,
    }


def _here() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None


def _state(root: Path, home: Path, history: History, silent: float | None) -> tuple[str, str]:
    """The state of unfinished work, and a sentence on it."""
    process = history.process
    lives = alive(process) if process else None
    if lives and history.end is None:
        return "running", "running"
    held = lock_held(root)
    # Another process than the journal's last, or what prune-and-export does after pruning.
    if held and (lives is None or history.end == "finished"):
        return "running", "running"
    lost = home.name.endswith(_PARTIAL) and not os.path.lexists(home / _STATE)
    again = "nothing was finished, the same command starts again" if lost else "the same command resumes"
    if history.end in ("failed", "interrupted"):
        return history.end, f"{history.end}{f': {history.error}' if history.error else ''}; {again}"
    if held:
        return "dead", f"its driver is gone; a command just started or a worker left behind holds its lock; {again}"
    if held is None and os.path.lexists(root / _LOCK):
        return "unknown", "its lock cannot be tried"
    if process and lives is None and not same_machine(process):
        ago = f"last sign of life {silent:.0f} s ago" if silent is not None else "no sign of life"
        return "unknown", f"it was started on {process['host'] or 'another machine'}; {ago}"
    return "dead", f"no process works on it any more; {again}"
