"""The workers of a run: none, processes of this machine, or Ray's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from sparsify.cluster.crew import Crew, Worker
from sparsify.cluster.job import Job


@contextmanager
def crew_of(
    job: Job, workers: int | None, cluster: str | None, worker_bytes: int | None, *told: Callable[..., Any]
) -> Iterator[Crew | None]:
    """Other processes that do a run's tasks; None where this one does.

    Args:
        job: of the run.
        workers: how many are wanted; None: one, or as many as the cluster has room for.
        cluster: where Ray runs them (``ray_workers``); None: without Ray, on this machine.
        worker_bytes: that the machines of a cluster set aside for each; None: they do not.
        told: ``Crew``'s ``begun``, ``lost``, ``waits`` and ``failed``.

    Raises:
        UsageError: no cluster, or fewer GPUs than workers.
        MissingExtraError: Ray is not installed.
    """
    if cluster is None and workers in (None, 1):
        yield None
        return
    with ExitStack() as stack:
        hire: list[Callable[[], Worker]]
        if cluster is None:
            from sparsify.cluster.processes import Process, devices

            places = devices(job.device, workers or 1)
            hire = [partial(Process, f"worker {i}", job, place) for i, place in enumerate(places, 1)]
        else:
            from sparsify.cluster.ray_workers import Actor, places_of, ray_cluster

            ray = stack.enter_context(ray_cluster(cluster, workers, job.threads))
            # On this machine alone memory was looked at before the run; Ray would count otherwise.
            memory = None if cluster == "local" else worker_bytes
            n = workers or places_of(ray, job, memory)
            hire = [partial(Actor, ray, f"worker {i}", job, memory) for i in range(1, n + 1)]
        yield stack.enter_context(Crew(hire, *told))
