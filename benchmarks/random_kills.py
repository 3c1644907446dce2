"""Whoever is killed at whatever instant: does the run, resumed by any number of workers, end in the same bits?

Each run prunes a random Llama with two workers, processes or Ray's; at a random instant a worker or the driver is
killed. A run whose driver died is resumed with one to three workers of either kind until it ends.

    python benchmarks/random_kills.py --runs 30 --out benchmarks/results/random_kills.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster_speedup import digest
from depth_memory import make_model
from provenance import commit

from sparsify.bench.host import environment
from sparsify.files import staging_path
from sparsify.process_memory import tree

WIDTH = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 4}
# One for each way in which blocks depend on each other: by the dense blocks before them, the pruned ones, not at all.
METHODS = ("fistapruner", "sparsegpt", "magnitude")
WAYS: dict[str, list[str]] = {"processes": [], "ray": ["--cluster", "local"]}
# Every how manieth round of the methods is Ray's.
RAY_EVERY = 3
# In the environment of a run and of all that it starts, even of what has lost its parent.
MARK = "RANDOM_KILLS_RUN"
# What a dead driver leaves has to end by itself within that.
END_S = 60.0


@dataclass(frozen=True)
class Timing:
    """Of an undisturbed run, in seconds from its start: when work on the blocks began, and its end."""

    work: float
    end: float


class Run:
    """A run of ``sparsify prune`` in a process of its own."""

    def __init__(self, model: Path, ids: str, method: str, out: Path, workers: int, way: str) -> None:
        self.out, self.mark = out, secrets.token_hex(8)
        self.command = [
            sys.executable, "-m", "sparsify", "prune", str(model), "--method", method, "--pattern", "2:4",
            *(["--calibration", ids] if method != "magnitude" else []),
            "--out", str(out), "--workers", str(workers), *WAYS[way],
        ]  # fmt: skip
        self.began = time.time()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the run
        self.process = subprocess.Popen(
            self.command, stdout=self.log, stderr=self.log, env={**os.environ, MARK: self.mark}
        )

    def wait(self) -> None:
        """Until it has ended; one that failed ends the benchmark."""
        if code := self.process.wait():
            self.log.seek(0)
            raise SystemExit(f"{' '.join(self.command)}: exit status {code}\n{self.log.read().decode()}")

    def workers(self) -> list[int]:
        """Processes that do tasks."""
        return [pid for pid in tree(self.process.pid) if is_worker(pid)]

    def left(self) -> list[str]:
        """Names of the processes that it started and that are there, besides the driver."""
        found, mark = [], f"{MARK}={self.mark}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark in (folder / "environ").read_bytes() and int(folder.name) != self.process.pid:
                    found.append((folder / "comm").read_text().strip())
        return found

    def left_over(self) -> list[str]:
        """Those that do not end by themselves."""
        deadline = time.monotonic() + END_S
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left


def is_worker(pid: int) -> bool:
    """Whether a process is a worker's, or a Ray actor's."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"sparsify.cluster.worker" in line or line.startswith(b"ray::_Remote")


def journal(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's journal; a driver that was killed may have left one cut."""
    found = []
    with suppress(FileNotFoundError):
        for line in (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return found


def finished(out: Path) -> dict[str, tuple[int, int]]:
    """The files of the blocks that an interrupted run commits to, each as inode and time of its writing."""
    folder = staging_path(out)
    with suppress(FileNotFoundError):
        blocks = json.loads((folder / ".state.json").read_text())["state"]["blocks"]
        return {block["file"]: written(folder / block["file"]) for block in blocks.values()}
    return {}


def written(path: Path) -> tuple[int, int]:
    """Which file it is, and when it was written: another one where it was made again."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def timed(run: Run) -> Timing:
    """Let a run end, and say what took how long."""
    run.wait()
    ended = time.time()
    work = next(line["time"] for line in journal(run.out) if line["event"] == "stage" and line["stage"] == "pruning")
    return Timing(work - run.began, ended - run.began)


def disturbed(
    model: Path, ids: str, method: str, out: Path, way: str, timing: Timing, draw: random.Random
) -> dict[str, Any] | None:
    """One run with a kill, and those that finish it; None where it had ended before."""
    target = draw.choice(("worker", "driver"))
    # A third anywhere, the others once there is work to lose.
    at = draw.uniform(0 if draw.random() < 1 / 3 else timing.work, timing.end)
    record: dict[str, Any] = {"method": method, "way": way, "killed": target}
    run = Run(model, ids, method, out, 2, way)
    time.sleep(at)
    pid = run.process.pid
    if target == "worker":
        while run.process.poll() is None and not (workers := run.workers()):
            time.sleep(0.005)
        pid = draw.choice(workers) if run.process.poll() is None else 0
    record["at_s"], record["blocks_before"] = round(time.time() - run.began, 3), len(finished(out))
    if run.process.poll() is not None:
        run.wait()
        return None
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    if target == "worker":
        run.wait()
    else:
        run.process.wait()
    left = run.left_over()
    resumed: list[dict[str, Any]] = []
    kept: dict[str, tuple[int, int]] = {}
    # Killed, or after its last rename: then all of it is there.
    while not out.exists():
        others, way_ = draw.choice((1, 2, 3)), draw.choice(list(WAYS))
        kept |= finished(out)
        resumed.append({"workers": others, "way": way_, "blocks": len(kept)})
        again = Run(model, ids, method, out, others, way_)
        again.wait()
        left += again.left_over()
    lines = journal(out)
    blocks = Counter(line["block"] for line in lines if line["event"] == "block")
    record |= {
        "resumed": resumed,
        "workers_lost": sum(line["event"] == "lost" for line in lines),
        "blocks_redone": sorted(
            {f"block {block}" for block, n in blocks.items() if n > 1}
            | {name for name, file in kept.items() if written(out / name) != file}
        ),
        "left_over": left,
        "partial_left": staging_path(out).exists(),
        "digest": digest(out),
    }
    return record


def row(i: int, record: Mapping[str, Any]) -> str:
    """A line of the table."""
    resumed = ", ".join(f"{each['blocks']} by {each['workers']} ({each['way']})" for each in record["resumed"])
    cells = (
        i, record["method"], record["way"], f"{record['killed']} at {record['at_s']:.2f} s", record["blocks_before"],
        resumed or "-", "yes" if record["same_bits"] else "NO", record["blocks_redone"] or "none",
        record["left_over"] or "none",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def faulty(records: list[dict[str, Any]]) -> list[int]:
    """Numbers of the runs that are not as they should be."""
    return [
        i + 1
        for i, record in enumerate(records)
        if not record["same_bits"] or record["blocks_redone"] or record["left_over"] or record["partial_left"]
    ]


def main() -> None:
    """All runs; table and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blocks", type=int, default=24, help="of the model: more of them, more to lose")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    begun = commit()
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    import torch
    from safetensors.torch import save_file

    draw, early = random.Random(options.seed), 0
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, ids = folder / "model", f"{folder}/ids.safetensors:ids"
        make_model(model, options.blocks, WIDTH)
        tokens = torch.randint(0, 1024, (16, 128), generator=torch.Generator().manual_seed(0))
        save_file({"ids": tokens}, folder / "ids.safetensors")
        wanted, timings = {}, {}
        for method in METHODS:
            timed(Run(model, ids, method, folder / f"{method}-alone", 1, "processes"))
            wanted[method] = digest(folder / f"{method}-alone")
            for way in options.ways:
                out = folder / f"{method}-{way}"
                timings[method, way] = timed(Run(model, ids, method, out, 2, way))
                if digest(out) != wanted[method]:
                    raise SystemExit(f"{method}, {way}: undisturbed, and the bits differ from those of one process")
        print("| run | method | workers | killed | blocks done | resumed from | same bits | redone | left over |")
        print("|--:|---|---|---|--:|---|---|---|---|")
        while len(records) < options.runs:
            i = len(records)
            ray = "ray" in options.ways and (i // len(METHODS) % RAY_EVERY == RAY_EVERY - 1 or len(options.ways) == 1)
            method, way = METHODS[i % len(METHODS)], "ray" if ray else "processes"
            out = folder / f"run-{i}-{early}"
            record = disturbed(model, ids, method, out, way, timings[method, way], draw)
            if record is None:
                early += 1
                continue
            record["same_bits"] = record.pop("digest") == wanted[method]
            records.append(record)
            print(row(i + 1, record), flush=True)
            if options.out:
                # After each: what was seen is not lost where the next one hangs.
                result = {
                    "benchmark": "random_kills",
                    "commit": begun,
                    "environment": environment(1),
                    "arguments": {key: value for key, value in vars(options).items() if key != "out"},
                    "model": {**WIDTH, "blocks": options.blocks},
                    "undisturbed_s": {f"{method}, {way}": vars(timing) for (method, way), timing in timings.items()},
                    "ended_before_the_kill": early,
                    "runs": records,
                    "all_same": not faulty(records),
                }
                options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    bad = faulty(records)
    if bad:
        raise SystemExit(f"runs {bad} are not as they should be")


if __name__ == "__main__":
    main()
