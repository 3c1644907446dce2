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


def places_of(ray: Any, job: Job, memory_bytes: int | None = None) -> int:
    """How many workers the cluster's machines have room for, at least one: it may be given more machines for it."""
    wanted = _resources(job, memory_bytes)
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return max(sum(int(min(each.get(key, 0) // n for key, n in wanted.items())) for each in machines), 1)


def _resources(job: Job, memory_bytes: int | None) -> dict[str, float]:
    """What a worker reserves, as machines have it."""
    # Where a GPU computes, threads wait; a machine has fewer cores for each GPU than the driver's whole number.
    wanted: dict[str, float] = {"CPU": 1, "GPU": 1} if job.device == "cuda" else {"CPU": job.threads}
    return wanted | ({} if memory_bytes is None else {"memory": memory_bytes})


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
        resources = _resources(job, memory_bytes)
        gpu = " and a GPU" if "GPU" in resources else ""
        memory = f" and {memory_bytes / 1e9:.1f} GB of memory" if memory_bytes else ""
        self._wanted = f"{resources['CPU']:g} CPUs{gpu}{memory} of one machine"
        self._actor: Any = None
        self._closed = False
        names = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        wanted: dict[str, Any] = {names[key]: n for key, n in resources.items()} | {"max_restarts": 0}
        # Threads are counted when torch is imported.
        wanted["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(job.threads)}}
        self._make = partial(ray.remote(_Remote).options(**wanted).remote, asdict(job))

    def ready(self) -> None:
        """As ``Worker``."""
        try:
            self._actor = self._make()
            if self._closed:
                # In between: nobody else would end it.
                self.kill()
            where = self._ray.get(self._actor.ready.remote(), timeout=_PLACE_S)
        except self._ray.exceptions.GetTimeoutError as error:
            raise WorkerError(
                f"{self.name}: no place on the cluster for {self._wanted} within {_PLACE_S:g} s; use fewer --workers, "
                "or fewer threads (OMP_NUM_THREADS) from the run's beginning on"
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
            # By calls: a generator cannot be had by way of Ray's client (ray://).
            self._actor.begin.remote(task.do, dict(task.arguments))
            while answer is None:
                for found in self._ray.get(self._actor.said.remote()):
                    if "error" in found:
                        raise _met(found)
                    if "answer" in found:
                        answer = found["answer"]
                    else:
                        event(found)
        except (self._ray.exceptions.RayError, ConnectionError) as error:
            raise WorkerError(f"{self.name}: its process is gone ({_reason(error)})") from error
        return answer

    def close(self) -> None:
        """As ``Worker``."""
        self.kill()

    def kill(self) -> None:
        """As ``Worker``: what it writes appears whole or not at all."""
        self._closed = True
        # Where the cluster is gone, so is the actor.
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            if self._actor is not None:
                self._ray.kill(self._actor)


class _Remote:
    """What runs in the actor's process. It answers with dicts: Ray would pickle exceptions."""

    def __init__(self, job: dict[str, Any]) -> None:
        from sparsify.workers import end_with_parent

        end_with_parent()
        self._said: SimpleQueue[dict[str, Any]] = SimpleQueue()
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

    def begin(self, do: str, arguments: dict[str, Any]) -> None:
        """Do a task in a thread."""

        def answer() -> None:
            with beating(lambda: self._said.put({})):
                found = self._known[do](**arguments)
            self._said.put({"answer": found})

        def work() -> None:
            error = self._try(answer)
            if error is not None:
                self._said.put(error)

        # Nothing that an earlier one has said still.
        self._said = SimpleQueue()
        threading.Thread(target=work, daemon=True).start()

    def said(self) -> list[dict[str, Any]]:
        """What the task says, as soon as there is something; the last is its answer, or an error."""
        found = [self._said.get()]
        while not self._said.empty():
            found.append(self._said.get())
        return found

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
