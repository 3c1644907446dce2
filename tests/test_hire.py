"""Who is hired for a run, and with what."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from sparsify.cluster import ray_workers
from sparsify.cluster.hire import crew_of
from sparsify.cluster.job import Job

JOB = Job("", "", {}, None, None, None, [], 1, "cpu", 3, False, False)


class Asked:
    """Ray, as far as making an actor goes: what was asked for."""

    def __init__(self) -> None:
        self.options_: list[dict[str, Any]] = []

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 7.0}

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


def test_one_process_works_by_itself() -> None:
    for workers in (None, 1):
        with crew_of(JOB, workers, None, 1 << 30) as crew:
            assert crew is None


@pytest.mark.parametrize(("cluster", "memory"), [("local", None), ("auto", 9 << 30), ("ray://host:1", 9 << 30)])
def test_machines_of_a_cluster_set_threads_and_memory_aside(cluster: str, memory: int | None, ray: Asked) -> None:
    with crew_of(JOB, None, cluster, 9 << 30) as crew:
        assert crew is not None
        # Seven cores have room for two workers of three threads.
        assert len(crew) == 2
        for hire in crew._hire:
            hire()
    assert [wanted["num_cpus"] for wanted in ray.options_] == [3, 3]
    assert [wanted.get("memory") for wanted in ray.options_] == [memory, memory]
    assert ray.options_[0]["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "3"
