"""What may befall the workers of a run besides their death: a full disk, a standstill, a lost machine, a full store."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sparsify import manifest
from sparsify.cluster.processes import Process
from sparsify.cluster.ray_workers import _Remote
from sparsify.errors import NumericsError, OutputError
from sparsify.process_memory import tree as processes
from sparsify.prune import prune
from sparsify.status import Status, status
from tests.fakes import Notices
from tests.test_cluster import is_worker, ray_warnings, recipe
from tests.test_prune import source, tree


def blocks_of(out: Path) -> set[str]:
    """Blocks that an interrupted run commits to."""
    path = out.with_name(f"{out.name}.partial") / ".state.json"
    return set(json.loads(path.read_text())["state"]["blocks"]) if path.exists() else set()


class After(Notices):
    """Progress that does something once, in the driver, when a run commits to its first block."""

    def __init__(self, out: Path, then: Callable[[], object]) -> None:
        super().__init__()
        self._out, self._then, self.before = out, then, set[str]()

    def advance(self, steps: int = 1) -> None:
        super().advance(steps)
        if not self.before and (before := blocks_of(self._out)):
            self.before = before
            self._then()


# --- disk ----------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_for_workers_ends_the_run_and_keeps_its_blocks(
    deep: Path, ids_file: str, tmp_path: Path
) -> None:
    how, out = recipe("dense inputs", ids_file), tmp_path / "out"
    whole = prune(source(deep), how, tmp_path / "whole")

    def fill() -> None:
        # No file of theirs grows past it: the system answers as a full disk does, in the middle of a file.
        for pid in processes(os.getpid()):
            if is_worker(pid):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (2_000, 2_000))

    told = After(out, fill)
    with pytest.raises(OutputError, match=r"out\.partial/.*free space") as caught:
        prune(source(deep), how, out, workers=2, progress=told)
    assert "\n" not in str(caught.value)
    assert told.before <= blocks_of(out) < set("012345")
    assert not out.exists()
    assert not list(tmp_path.glob("out.partial/*.tmp"))
    assert tree(prune(source(deep), how, out, workers=3)) == tree(whole)
    assert json.loads((out / manifest.RUN).read_text())["blocks_resumed"] >= len(told.before)


# --- a standstill ----------------------------------------------------------------------------------------------------


def test_a_worker_that_stands_still_is_seen_and_the_others_go_on(
    deep: Path, ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how, out = recipe("no text", ids_file), tmp_path / "out"
    whole = prune(source(deep), how, tmp_path / "whole")
    given: list[Process] = []
    ask = Process.ask

    def stopping(self: Process, *rest: Any) -> dict[str, Any]:
        given.append(self)
        if len(given) == 2:
            os.kill(self.pid, signal.SIGSTOP)
        return ask(self, *rest)

    found: list[Status] = []

    def watch() -> None:
        deadline = time.monotonic() + 120
        try:
            while time.monotonic() < deadline and not (found and seen(found[-1], given[1].name)["seen_seconds"] > 2):
                time.sleep(0.05)
                if len(blocks_of(out)) == 5:
                    found.append(status(out))
        finally:
            for worker in given:
                os.kill(worker.pid, signal.SIGCONT)

    monkeypatch.setattr(Process, "ask", stopping)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        prune(source(deep), how, out, workers=2)
    finally:
        watcher.join()
    # What it has is named, and for how long nothing was heard of it; the driver is well.
    still = seen(found[-1], given[1].name)
    assert found[-1].state == "running"
    assert still["alive"]
    assert still["doing"] == "prune"
    assert still["block"] not in (None, *blocks_of(out))
    assert still["seen_seconds"] > 2
    assert tree(out) == tree(whole)
    told = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    assert sorted(line["block"] for line in told if line["event"] == "block") == list(range(6))
    assert not any(line["event"] == "lost" for line in told)


def test_a_worker_that_stands_still_for_long_is_ended_and_another_does_its_task(
    deep: Path, ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how, out = recipe("no text", ids_file), tmp_path / "out"
    whole = prune(source(deep), how, tmp_path / "whole")
    # Tasks of this model take far less.
    monkeypatch.setattr("sparsify.cluster.crew.SILENT_S", 10.0)
    stopped, one = list[int](), threading.Lock()
    ask = Process.ask

    def stopping(self: Process, *rest: Any) -> dict[str, Any]:
        with one:
            first = not stopped
            stopped.append(self.pid)
        if first:
            os.kill(self.pid, signal.SIGSTOP)
        return ask(self, *rest)

    monkeypatch.setattr(Process, "ask", stopping)
    prune(source(deep), how, out, workers=2)
    assert not Path(f"/proc/{stopped[0]}").exists()
    assert tree(out) == tree(whole)
    told = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    (lost,) = (line for line in told if line["event"] == "lost")
    assert "no sign of life for 10 s" in lost["error"]


def seen(found: Status, name: str) -> dict[str, Any]:
    return next(worker for worker in found.workers if worker["name"] == name)


# --- Ray -------------------------------------------------------------------------------------------------------------


def test_what_an_actor_did_not_expect_is_told_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # Else this process would end with whoever started it.
    monkeypatch.setattr("sparsify.workers.end_with_parent", lambda: None)
    remote = _Remote({"no": "job"})
    assert remote.ready()["kind"] == "WorkerError"

    def fails() -> dict[str, Any]:
        raise MemoryError("no room for\n9 GB")

    remote._known = {"prune": fails}
    remote.begin("prune", {})
    assert remote.said() == [{"error": "MemoryError: no room for 9 GB", "kind": "WorkerError"}]


@contextmanager
def machines(monkeypatch: pytest.MonkeyPatch, *cpus: int, **head: Any) -> Iterator[list[Any]]:
    """A cluster of Ray that ``--cluster auto`` finds: its head, and so many machines, which are processes here."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **head})
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield [cluster, *(cluster.add_node(num_cpus=n) for n in cpus)]
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]


@pytest.mark.slow
@ray_warnings
def test_nan_in_an_actors_task_stops_cleanly_and_keeps_the_others(deep: Path, ids_file: str, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    tensors = load_file(deep / "model.safetensors")
    tensors["model.layers.4.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, deep / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    with pytest.raises(NumericsError, match=r"model\.layers\.4\.mlp\.up_proj: channel 5"):
        prune(source(deep), recipe("no text", ids_file), out, workers=2, cluster="local")
    assert {"0", "1", "2"} <= blocks_of(out)
    assert "4" not in blocks_of(out)
    assert not out.exists()


@pytest.mark.slow
@ray_warnings
def test_a_machine_that_is_lost_leaves_its_work_to_the_others(
    deep: Path, ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how, out = recipe("dense inputs", ids_file), tmp_path / "out"
    whole = prune(source(deep), how, tmp_path / "whole")
    with machines(monkeypatch, 1, 1) as (_, _, lost):
        # Its raylet at once, as where the power fails; there is no other room for its worker.
        pid = lost.all_processes["raylet"][0].process.pid
        told = After(out, lambda: os.kill(pid, signal.SIGKILL))
        prune(source(deep), how, out, cluster="auto", workers=2, progress=told)
    assert told.before
    assert any("attempt 1: worker " in text for text in told.texts)
    assert tree(out) == tree(whole)


@pytest.mark.slow
@ray_warnings
def test_by_way_of_rays_client(deep: Path, ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("grpc", reason="ray[client] is not installed")
    how = recipe("dense inputs", ids_file)
    whole = prune(source(deep), how, tmp_path / "whole")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with machines(monkeypatch, 1, 1, ray_client_server_port=port):
        monkeypatch.delenv("RAY_ADDRESS")
        out = prune(source(deep), how, tmp_path / "out", cluster=f"ray://127.0.0.1:{port}", workers=2)
    assert tree(out) == tree(whole)


@pytest.mark.slow
@ray_warnings
def test_a_run_needs_no_room_in_the_object_store(
    deep: Path, ids_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how, out = recipe("dense inputs", ids_file), tmp_path / "out"
    whole = prune(source(deep), how, tmp_path / "whole")
    size = 80 * 2**20
    head = {"object_store_memory": size, "_system_config": {"automatic_object_spilling_enabled": False}}
    with machines(monkeypatch, **{**head, "num_cpus": 2}) as (cluster,), filled(cluster.address, size):
        prune(source(deep), how, out, cluster="auto", workers=2)
    assert tree(out) == tree(whole)


# Ray may go on on the disk where it cannot in its store: more than fits is enough.
FILL = """
import numpy, ray, sys
ray.init(address=sys.argv[1], log_to_driver=False)
held = []
try:
    for _ in range(int(sys.argv[2]) // 2**20 + 2):
        held.append(ray.put(numpy.zeros(2**20, numpy.uint8)))
except ray.exceptions.ObjectStoreFullError:
    pass
print("full", flush=True)
sys.stdin.read()
"""


@contextmanager
def filled(address: str, size: int) -> Iterator[None]:
    """The object store of a cluster, of ``size`` bytes, is full for the length of the context."""
    command = [sys.executable, "-c", FILL, address, str(size)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "full\n"
            yield
        finally:
            process.kill()
