"""A process that forks pruning runs and kills them; run by test_kill.py, apart from pytest's own threads.

Prints one line: the number of runs killed before they finished, and of those that had finished blocks to resume.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from sparsify import prune as driver
from sparsify.files import staging_path
from sparsify.recipe import Recipe
from sparsify.source import Source


def start(folder: Path, out: Path, ids: str) -> int:
    """Fork a run; the parent never computes, so the child's thread pool is its own."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        driver.prune(Source("stories", folder, "folder"), Recipe("2:4", "ria", calibration=ids), out)
        os._exit(0)
    return pid


def has_finished_blocks(folder: Path) -> bool:
    """Whether the state that a killed run left commits to at least one block."""
    state = folder / ".state.json"
    return state.exists() and bool(json.loads(state.read_text())["state"]["blocks"])


def wait_for_a_block(pid: int, folder: Path) -> None:
    """Return once the run has committed a block to resume from, or has ended."""
    while not has_finished_blocks(folder) and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.002)


def main() -> None:
    """Arguments: model folder, work folder, ids, number of kills, seed."""
    folder, work, ids = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    n_kills, generator = int(sys.argv[4]), random.Random(int(sys.argv[5]))
    # How long a run takes: the shortest of three, since a busy machine only ever adds.
    durations = []
    for name in ("whole", "timed", "timed-again"):
        began = time.monotonic()
        assert os.waitstatus_to_exitcode(os.waitpid(start(folder, work / name, ids), 0)[1]) == 0
        durations.append(time.monotonic() - began)
    duration = min(durations)
    killed = resumable = 0
    for trial in range(n_kills):
        out = work / f"killed-{trial}"
        # Cut every run at two instants: one anywhere, one after there is work to resume. The second waits for that
        # work: on a busy machine, no time measured beforehand says when a block will be finished.
        for await_block in (False, True):
            pid = start(folder, out, ids)
            if await_block:
                wait_for_a_block(pid, staging_path(out))
            time.sleep(generator.uniform(0, duration / 4 if await_block else duration))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            if not out.exists():
                killed += 1
                resumable += has_finished_blocks(staging_path(out))
            else:
                break
        if not out.exists():
            assert os.waitstatus_to_exitcode(os.waitpid(start(folder, out, ids), 0)[1]) == 0
    print(killed, resumable)


if __name__ == "__main__":
    main()
