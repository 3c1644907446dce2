"""Real workers: whoever does the tasks, whatever dies, the bits are those of one process."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sparsify import manifest
from sparsify.cluster.processes import devices
from sparsify.errors import NumericsError, UsageError, WorkerError
from sparsify.process_memory import tree as processes
from sparsify.prune import prune
from sparsify.recipe import Recipe
from sparsify.source import Source
from tests.fakes import Notices
from tests.test_prune import source, tree

# A method for each way in which blocks may depend on each other.
RECIPES: dict[str, dict[str, Any]] = {
    "no text": {"pattern": "2:4", "method": "magnitude"},
    "dense inputs": {"pattern": "2:4", "method": "fistapruner"},
    "dense inputs, own aim": {"pattern": "0.5", "method": "sparsegpt", "inputs": "dense", "aim": "own"},
    "pruned inputs": {"pattern": "2:4", "method": "sparsegpt"},
    "pruned inputs, dense aims": {"pattern": "2:4", "method": "fast"},
    "an allocation": {"pattern": "0.5", "method": "wanda", "inputs": "dense", "allocate": "owl"},
    "an order": {"pattern": "2:4", "method": "ria", "inputs": "dense", "permute": "residual"},
}


def recipe(kind: str, ids_file: str) -> Recipe:
    return Recipe(calibration=ids_file, **RECIPES[kind])


# Ray's own, of what it leaves open and of what it will change.
ray_warnings = pytest.mark.filterwarnings(
    "ignore:.*:ResourceWarning", "ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning"
)


@pytest.mark.parametrize(
    "kind",
    [
        "dense inputs",
        "pruned inputs",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in RECIPES
            if kind not in ("dense inputs", "pruned inputs")
        ),
    ],
)
def test_processes_give_the_bits_of_one(kind: str, deep: Path, ids_file: str, tmp_path: Path) -> None:
    found = {}
    for workers in (1, 2):
        told = Notices()
        found[workers] = prune(
            source(deep), recipe(kind, ids_file), tmp_path / f"{workers}", workers=workers, progress=told
        )
        assert told.done == told.total > 0
        assert len(told.texts) == len(set(told.texts))
    assert tree(found[2]) == tree(found[1])


@pytest.mark.slow
def test_other_workers_go_on_where_some_were_interrupted(
    deep: Path, ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = recipe("dense inputs", ids_file)
    whole = prune(source(deep), how, tmp_path / "whole")
    out = tmp_path / "out"
    for workers, blocks in ((2, 1), (1, 3)):
        with monkeypatch.context() as patch:
            patch.setattr("sparsify.prune._Run._done", stopping_after(blocks))
            with pytest.raises(KeyboardInterrupt):
                prune(source(deep), how, out, workers=workers)
        assert len(json.loads((tmp_path / "out.partial/.state.json").read_text())["state"]["blocks"]) == blocks
    assert tree(prune(source(deep), how, out)) == tree(whole)
    assert json.loads((out / manifest.RUN).read_text())["blocks_resumed"] == 3


def stopping_after(blocks: int) -> Callable[..., None]:
    from sparsify.prune import _Run

    original = _Run._done

    def done(run: _Run, *rest: Any) -> None:
        original(run, *rest)
        if len(run.state["blocks"]) >= blocks:
            raise KeyboardInterrupt

    return done


def test_workers_that_are_killed_cost_their_task_only(deep: Path, ids_file: str, tmp_path: Path) -> None:
    how = recipe("dense inputs", ids_file)
    whole = prune(source(deep), how, tmp_path / "whole")
    told, over = Notices(), threading.Event()
    killed: list[int] = []

    def kill() -> None:
        draw, before = random.Random(0), 0
        while not over.wait(0.01) and len(killed) < 3:
            # Each has come some way: who dies at the start three times in a row ends the run.
            workers = [pid for pid in processes(os.getpid()) if is_worker(pid)] if told.done > before else []
            if workers:
                killed.append(draw.choice(workers))
                os.kill(killed[-1], signal.SIGKILL)
                before = told.done + 5

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        out = prune(source(deep), how, tmp_path / "out", workers=2, progress=told)
    finally:
        over.set()
        thread.join()
    assert killed
    assert tree(out) == tree(whole)


def is_worker(pid: int) -> bool:
    try:
        return b"sparsify.cluster.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_a_driver_that_is_killed_takes_its_workers_along_and_resumes(deep: Path, ids_file: str, tmp_path: Path) -> None:
    # By the name that the command has for it.
    whole = prune(Source(str(deep), deep, "folder"), recipe("dense inputs", ids_file), tmp_path / "whole")
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "sparsify",
        "prune",
        str(deep),
        "--method",
        "fistapruner",
        "--calibration",
        ids_file,
    ]
    command += ["--out", str(out), "--workers", "2"]
    run = subprocess.Popen(
        command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": str(threads_of(tmp_path / "whole"))}
    )
    state = tmp_path / "out.partial/.state.json"
    while run.poll() is None and not (state.exists() and json.loads(state.read_text())["state"]["blocks"]):
        time.sleep(0.01)
    workers = [pid for pid in processes(run.pid) if is_worker(pid)]
    assert len(workers) == 2
    run.kill()
    run.communicate()
    deadline = time.monotonic() + 60
    while any(is_worker(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive the driver"
        time.sleep(0.05)
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads_of(tmp_path / "whole"))})
    assert json.loads((out / manifest.RUN).read_text())["blocks_resumed"] >= 1
    assert tree(out) == tree(whole)


def threads_of(out: Path) -> int:
    threads: int = json.loads((out / manifest.RUN).read_text())["threads"]
    return threads


def test_nan_in_one_block_stops_cleanly_and_keeps_the_others(deep: Path, ids_file: str, tmp_path: Path) -> None:
    tensors = load_file(deep / "model.safetensors")
    tensors["model.layers.4.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, deep / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"model\.layers\.4\.mlp\.up_proj: channel 5"):
        prune(source(deep), recipe("no text", ids_file), tmp_path / "out", workers=2)
    state = json.loads((tmp_path / "out.partial/.state.json").read_text())["state"]
    assert {"0", "1", "2"} <= set(state["blocks"])
    assert "4" not in state["blocks"]
    failed_once(tmp_path / "out.partial")
    with pytest.raises(NumericsError, match="channel 5"):
        prune(source(deep), recipe("no text", ids_file), tmp_path / "alone")
    failed_once(tmp_path / "alone.partial")


def failed_once(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    [task] = [line for line in lines if line["event"] == "task"]
    assert (task["state"], task["kind"], task["block"]) == ("failed", "prune", 4)
    assert "model.layers.4.mlp.up_proj: channel 5" in task["error"]
    assert "sparsify_prune_tasks_failed_total 1" in (folder / "metrics.prom").read_text(encoding="utf-8")


def test_workers_of_one_gpu_are_refused(deep: Path, ids_file: str, tmp_path: Path) -> None:
    for how in ({"workers": 2}, {"cluster": "local"}):
        with pytest.raises(UsageError, match="--device cuda:1 is one GPU"):
            prune(source(deep), recipe("no text", ids_file), tmp_path / "out", device="cuda:1", **how)


def test_the_journal_has_the_threads_of_the_run(deep: Path, ids_file: str, tmp_path: Path) -> None:
    out = prune(source(deep), recipe("no text", ids_file), tmp_path / "out", workers=2)
    start = json.loads((out / "journal.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert start["threads"] == threads_of(out)


def test_a_worker_that_cannot_live_is_told_of(
    deep: Path, ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsify.cluster.processes._MODULE", "sparsify.no_such_module")
    with pytest.raises(WorkerError, match=r"no worker can be had for it.*No module named"):
        prune(source(deep), recipe("no text", ids_file), tmp_path / "out", workers=2)


def test_numbers_of_workers() -> None:
    assert devices("cpu", 3) == ["cpu"] * 3
    with pytest.raises(UsageError, match=r"--workers 99: there are \d+ GPUs"):
        devices("cuda", 99)
    with pytest.raises(UsageError, match="--workers is 0"):
        prune(source(Path()), Recipe(), Path("out"), workers=0)


@pytest.fixture
def ray() -> Iterator[Any]:
    """Ray is installed and nothing of it is left behind."""
    module = pytest.importorskip("ray", reason="Ray is not installed")
    yield module
    module.shutdown()


@ray_warnings
@pytest.mark.parametrize("kind", ["dense inputs", pytest.param("pruned inputs", marks=pytest.mark.slow)])
def test_ray_gives_the_bits_of_one_process(kind: str, deep: Path, ids_file: str, tmp_path: Path, ray: Any) -> None:
    one = prune(source(deep), recipe(kind, ids_file), tmp_path / "one")
    told = Notices()
    two = prune(source(deep), recipe(kind, ids_file), tmp_path / "two", cluster="local", workers=2, progress=told)
    assert tree(two) == tree(one)
    assert told.done == told.total


@pytest.mark.slow
@ray_warnings
def test_actors_that_die_cost_their_task_only(deep: Path, ids_file: str, tmp_path: Path, ray: Any) -> None:
    whole = prune(source(deep), recipe("dense inputs", ids_file), tmp_path / "whole")
    told, over = Notices(), threading.Event()
    killed: list[int] = []

    def kill() -> None:
        while not over.wait(0.01) and not killed:
            if told.done > 5:
                killed.extend(pid for pid in processes(os.getpid()) if is_actor(pid))
                # All: one at least is at work.
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        recipe_ = recipe("dense inputs", ids_file)
        out = prune(source(deep), recipe_, tmp_path / "out", cluster="local", workers=2, progress=told)
    finally:
        over.set()
        thread.join()
    assert killed
    assert any("gone" in text for text in told.texts)
    assert tree(out) == tree(whole)


def is_actor(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::_Remote")
    except OSError:
        return False


def test_a_cluster_that_is_not_there(
    deep: Path, ids_file: str, tmp_path: Path, ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the one that was there last, whose address Ray keeps in a file."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        gone = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text(gone)
    for address in ("auto", f"ray://{gone}"):
        with pytest.raises(UsageError, match=f"--cluster {address}: no Ray cluster there .{gone} does not answer"):
            prune(source(deep), recipe("no text", ids_file), tmp_path / "out", cluster=address)
