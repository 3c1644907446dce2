"""Workers that are Ray actors, on this machine or a cluster whose machines share the folders of model and output.

Through Ray's object store go only small JSON values.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from sparsify import errors
from sparsify.cluster.beats import beating
from sparsify.cluster.crew import Event
from sparsify.cluster.graph import Task
from sparsify.cluster.job import Job
from sparsify.errors import SparsifyError, UsageError, WorkerError
from sparsify.extras import require

# Longest wait for a place on the cluster.
_PLACE_S = 600.0
# To see whether anybody is there.
_CONNECT_S = 10.0


@contextlib.contextmanager
def ray_cluster(address: str, workers: int | None, threads: int) -> Iterator[Any]:
    """Ray, connected for the length of the context.

    Args:
        address: ``local`` (a cluster of this machine alone, which ends with the context), ``auto`` (the one that this
            machine is part of), or ``ray://HOST:PORT``.
        workers: how many are wanted, for ``local``; None: as many as there are cores for.
        threads: of each.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: there is no cluster.
        WorkerError: it does not start on this machine.
    """
    require("ray", f"--cluster {address}")
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "include_dashboard": False, "configure_logging": False}
    if address == "local":
        options |= {"address": "local", "num_cpus": None if workers is None else workers * threads}
    else:
        silent = _silent(address)
        if silent:
            raise UsageError(
                f"--cluster {address}: no Ray cluster there ({silent} does not answer); start one with 'ray start "
                "--head', or use --cluster local"
            )
        options |= {"address": address}
        options.pop("include_dashboard")
    try:
        ray.init(**options)
    except Exception as error:
        # It raises Exception itself where its processes are not up in time.
        ray.shutdown()
        if address == "local":
            raise WorkerError(
                f"--cluster local: Ray does not start ({_reason(error)}); see that there is room on the disk, in "
                "/dev/shm and in memory, or use --workers alone"
            ) from error
        raise UsageError(
            f"--cluster {address}: no Ray cluster there ({_reason(error)}); start one with 'ray start --head', or use "
            "--cluster local"
        ) from error
    try:
        # It tells of workers that died on stdout, which is for results.
        with contextlib.redirect_stdout(sys.stderr):
            yield ray
    finally:
        ray.shutdown()


def _silent(address: str) -> str | None:
    """Host and port of the cluster if nobody listens there: Ray would try for minutes. None where that is not known."""
    if address == "auto":
        # Where it was when one was started here last, even if that has died.
        noted = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray/ray_current_cluster"
        with contextlib.suppress(OSError):
            address = noted.read_text(encoding="utf-8").strip()
        address = os.environ.get("RAY_ADDRESS", address)
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        return None
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S):
            return None
    except OSError:
        return f"{host}:{port}"


def places_of(ray: Any, job: Job) -> int:
    """How many workers the cluster has room for, at least one."""
    total = ray.cluster_resources()
    if job.device == "cuda":
        return max(int(total.get("GPU", 0)), 1)
    return max(int(total.get("CPU", 1) // job.threads), 1)


class Actor:
    """A worker that is a Ray actor.

    Args:
        ray: connected.
        name: of it, for people.
        job: whose tasks it does.
        memory_bytes: that are set aside for it; None: none.
    """

    def __init__(self, ray: Any, name: str, job: Job, memory_bytes: int | None = None) -> None:
        self.name, self._ray = name, ray
        self._wanted = f"{job.threads} CPUs" + (f" and {memory_bytes / 1e9:.1f} GB of memory" if memory_bytes else "")
        self._actor: Any = None
        wanted: dict[str, Any] = {"num_cpus": job.threads, "max_restarts": 0}
        if job.device == "cuda":
            wanted["num_gpus"] = 1
        if memory_bytes is not None:
            wanted["memory"] = memory_bytes
        # Threads are counted when torch is imported.
        wanted["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(job.threads)}}
        self._make = partial(ray.remote(_Remote).options(**wanted).remote, asdict(job))

    def ready(self) -> None:
        """As ``Worker``."""
        try:
            self._actor = self._make()
            where = self._ray.get(self._actor.ready.remote(), timeout=_PLACE_S)
        except self._ray.exceptions.GetTimeoutError as error:
            raise WorkerError(
                f"{self.name}: no place on the cluster for {self._wanted} within {_PLACE_S:g} s; use fewer --workers"
            ) from error
        except (self._ray.exceptions.RayError, ConnectionError) as error:
            raise WorkerError(f"{self.name}: {_reason(error)}") from error
        if "error" in where:
            raise _met(where)
        self.name = f"{self.name} on {where['host']}"

    def ask(self, task: Task, event: Event) -> dict[str, Any]:
        """As ``Worker``."""
        answer: dict[str, Any] | None = None
        assert self._actor is not None
        try:
            for reference in self._actor.ask.remote(task.do, dict(task.arguments)):
                found = self._ray.get(reference)
                if "error" in found:
                    raise _met(found)
                if "answer" in found:
                    answer = found["answer"]
                else:
                    event(found)
        except self._ray.exceptions.RayError as error:
            raise WorkerError(f"{self.name}: its process is gone ({_reason(error)})") from error
        if answer is None:
            raise WorkerError(f"{self.name}: it gave no answer to {task.name}")
        return answer

    def close(self) -> None:
        """As ``Worker``."""
        self.kill()

    def kill(self) -> None:
        """As ``Worker``: what it writes appears whole or not at all."""
        # Where the cluster is gone, so is the actor.
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            if self._actor is not None:
                self._ray.kill(self._actor)


class _Remote:
    """What runs in the actor's process. It answers with dicts: Ray would pickle exceptions."""

    def __init__(self, job: dict[str, Any]) -> None:
        from sparsify.workers import end_with_parent

        end_with_parent()
        self._said: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._error: dict[str, Any] | None = None
        self._known: Mapping[str, Callable[..., dict[str, Any]]] = {}
        self._error = self._try(lambda: self._open(job))

    def _open(self, job: dict[str, Any]) -> None:
        from sparsify.cluster.job import Bench
        from sparsify.cluster.pieces import handlers_of
        from sparsify.cluster.worker import Told

        self._known = handlers_of(Bench(Job(**job), Told(lambda **what: self._said.put(what))))

    def ready(self) -> dict[str, Any]:
        """Where it is, or why it cannot work."""
        import socket

        return self._error or {"host": socket.gethostname()}

    def ask(self, do: str, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Do a task in a thread, and pass on what it says meanwhile."""

        def answer() -> None:
            with beating(lambda: self._said.put({})):
                found = self._known[do](**arguments)
            self._said.put({"answer": found})

        def work() -> None:
            error = self._try(answer)
            if error is not None:
                self._said.put(error)
            self._said.put(None)

        threading.Thread(target=work, daemon=True).start()
        while (found := self._said.get()) is not None:
            yield found

    @staticmethod
    def _try(work: Callable[[], object]) -> dict[str, Any] | None:
        try:
            work()
        except SparsifyError as error:
            return {"error": " ".join(str(error).split()), "kind": type(error).__name__}
        except Exception as error:
            # As where a process of this machine ends by it: whoever waits has to hear of it.
            return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300], "kind": "WorkerError"}
        return None


def _met(found: dict[str, Any]) -> SparsifyError:
    kind = getattr(errors, str(found.get("kind")), WorkerError)
    return kind(found["error"]) if issubclass(kind, SparsifyError) else WorkerError(str(found["error"]))


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:300]
