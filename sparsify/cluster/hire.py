"""The workers of a run: none, processes of this machine, or Ray's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from sparsify.cluster.crew import Crew, Worker
from sparsify.cluster.job import Job


@contextmanager
def crew_of(job: Job, workers: int | None, cluster: str | None, *told: Callable[..., Any]) -> Iterator[Crew | None]:
    """Other processes that do a run's tasks; None where this one does.

    Args:
        job: of the run.
        workers: how many are wanted; None: one, or as many as the cluster has room for.
        cluster: where Ray runs them (``ray_workers``); None: without Ray, on this machine.
        told: ``Crew``'s ``begun``, ``lost`` and ``waits``.

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
            hire = [partial(Actor, ray, f"worker {i}", job) for i in range(1, (workers or places_of(ray, job)) + 1)]
        yield stack.enter_context(Crew(hire, *told))
