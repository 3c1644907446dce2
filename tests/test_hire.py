"""Who is hired for a run, and with what."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sparsify.cluster import ray_workers
from sparsify.cluster.hire import crew_of
from sparsify.cluster.job import Job
from sparsify.errors import WorkerError

JOB = Job("", "", {}, None, None, None, [], 1, "cpu", 3, False, False)


class Asked:
    """Ray, as far as making an actor goes: what was asked for."""

    def __init__(self) -> None:
        self.options_: list[dict[str, Any]] = []

    def nodes(self) -> list[dict[str, Any]]:
        # Together they have ten cores, and room for two workers of three.
        sizes = ((7.0, 64.0, True), (2.0, 64.0, True), (1.0, 64.0, True), (9.0, 64.0, False))
        return [{"Alive": alive, "Resources": {"CPU": n, "memory": gb * 2**30}} for n, gb, alive in sizes]

    def remote(self, *_: Any) -> "Asked":
        return self

    def options(self, **wanted: Any) -> "Asked":
        self.options_.append(wanted)
        return self


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()

    @contextmanager
    def cluster(*_: Any) -> Iterator[Asked]:
        yield asked

    monkeypatch.setattr(ray_workers, "ray_cluster", cluster)
    return asked


@pytest.mark.parametrize(("gb", "n"), [(9, 2), (40, 1), (90, 1)])
def test_a_machine_has_as_many_places_as_cores_and_memory_allow(gb: int, n: int, ray: Asked) -> None:
    assert ray_workers.places_of(ray, JOB, gb << 30) == n


def test_each_gpu_is_a_place(ray: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"Alive": True, "Resources": {"CPU": 64.0, "GPU": 8.0, "memory": 2.0**40}}
    monkeypatch.setattr(ray, "nodes", lambda: [machine, machine])
    job = replace(JOB, device="cuda", threads=64)
    assert ray_workers.places_of(ray, job, 9 << 30) == 16
    ray_workers.Actor(ray, "worker 1", job, 9 << 30)
    assert (ray.options_[0]["num_cpus"], ray.options_[0]["num_gpus"]) == (1, 1)


def test_an_actor_that_is_closed_before_it_is_made_is_ended(ray: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    class GoneError(Exception):
        pass

    killed: list[Any] = []

    def get(*_: Any, **__: Any) -> Any:
        raise GoneError("killed") if killed else AssertionError("nobody would end it")

    errors = SimpleNamespace(RayError=GoneError, GetTimeoutError=TimeoutError)
    for name, value in (("exceptions", errors), ("kill", killed.append), ("get", get)):
        monkeypatch.setattr(ray, name, value, raising=False)
    actor = ray_workers.Actor(ray, "worker 1", JOB)
    made = SimpleNamespace(ready=SimpleNamespace(remote=lambda: None))
    monkeypatch.setattr(actor, "_make", lambda: made)
    actor.close()
    with pytest.raises(WorkerError, match="worker 1: killed"):
        actor.ready()
    assert killed == [made]


def test_one_process_works_by_itself() -> None:
    for workers in (None, 1):
        with crew_of(JOB, workers, None, 1 << 30) as crew:
            assert crew is None


@pytest.mark.parametrize(("cluster", "memory"), [("local", None), ("auto", 9 << 30), ("ray://host:1", 9 << 30)])
def test_machines_of_a_cluster_set_threads_and_memory_aside(cluster: str, memory: int | None, ray: Asked) -> None:
    with crew_of(JOB, None, cluster, 9 << 30) as crew:
        assert crew is not None
        assert len(crew) == 2
        for hire in crew._hire:
            hire()
    assert [wanted["num_cpus"] for wanted in ray.options_] == [3, 3]
    assert [wanted.get("memory") for wanted in ray.options_] == [memory, memory]
    assert ray.options_[0]["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "3"
