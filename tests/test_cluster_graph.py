"""The graph of a run by its properties, and the crew with workers that die, fail and dawdle."""

import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.cluster.beats import beating
from sparsify.cluster.crew import Crew, Event, Here, work_alone
from sparsify.cluster.graph import Graph, Task
from sparsify.cluster.plan import Inputs, inputs_wanted, run_graph
from sparsify.errors import NumericsError, WorkerError


def test_tasks_wait_for_those_they_name() -> None:
    graph = Graph([Task("a", "do"), Task("b", "do", after=frozenset({"a"}), rank=(0,)), Task("c", "do", rank=(1,))])
    assert [task.name for task in graph.ready()] == ["a", "c"]
    a, c = graph.ready()
    graph.take(a)
    assert graph.ready() == [c]
    graph.give_back(a)
    assert graph.ready() == [a, c]
    graph.take(a)
    graph.finish(a)
    assert [task.name for task in graph.ready()] == ["b", "c"]
    assert (len(graph), graph.left) == (3, 2)
    graph.add(Task("d", "do", after=frozenset({"a"})))
    assert "d" in [task.name for task in graph.ready()]


@pytest.mark.parametrize(
    ("task", "words"), [(Task("a", "do"), "there already"), (Task("b", "do", after=frozenset({"z"})), "waits for z")]
)
def test_a_graph_has_no_circles_and_no_doubles(task: Task, words: str) -> None:
    graph = Graph([Task("a", "do")])
    with pytest.raises(ValueError, match=words):
        graph.add(task)


class Folder:
    """What tasks of a run read and write, without the work: a task fails where its inputs are not there."""

    def __init__(self, n_blocks: int, last: int, inputs: Inputs) -> None:
        self.n_blocks, self.last, self.inputs = n_blocks, last, inputs
        self.done: set[int] = set()
        self.entered = {0} if inputs != "none" else set[int]()
        self.most_inputs = 0

    def graph(self, ahead: int) -> Graph:
        return run_graph(
            self.n_blocks, self.last, done=self.done, entered=self.entered, inputs=self.inputs, ahead=ahead
        )

    def do(self, task: Task) -> None:
        block = task.arguments["block"]
        needs = self.inputs != "none" and block <= self.last
        assert task.do == "prune" or self.inputs == "dense"
        assert not needs or block in self.entered, f"{task.name} has no inputs"
        if task.do == "prune":
            assert block not in self.done, f"{task.name} is done already"
            self.done.add(block)
        if task.do == "forward" or task.arguments["leave"]:
            assert block + 1 not in self.entered
            self.entered.add(block + 1)
        self.most_inputs = max(self.most_inputs, len(self.entered))
        self.entered = inputs_wanted(self.last, done=self.done, entered=self.entered)


@given(
    st.integers(1, 9),
    st.integers(0, 8),
    st.sampled_from(["none", "dense", "pruned"]),
    st.lists(st.integers(0, 4), max_size=4),
    st.integers(),
)
def test_interrupted_anywhere_and_resumed_with_any_workers_every_block_is_pruned_once(
    n_blocks: int, last: int, inputs: Inputs, crews: list[int], seed: int
) -> None:
    folder, draw = Folder(n_blocks, min(last, n_blocks - 1), inputs), random.Random(seed)
    for ahead in crews:
        ahead = ahead if inputs == "dense" else 0
        graph = folder.graph(ahead)
        # All orders that the graph allows, up to an interruption; tasks that were under way are lost.
        for _ in range(draw.randint(0, graph.left)):
            task = draw.choice(graph.ready())
            graph.take(task)
            folder.do(task)
            graph.finish(task)
            # By so many blocks the forward pass is ahead at most, besides what an earlier crew left.
            if len(crews) <= 1:
                assert len(folder.entered) <= max(ahead, 1) + 2
    graph = folder.graph(0)
    while graph.left:
        task = graph.ready()[0]
        graph.take(task)
        folder.do(task)
        graph.finish(task)
    assert folder.done == set(range(n_blocks))
    assert not folder.entered


def test_inputs_that_nothing_makes_are_missed() -> None:
    with pytest.raises(ValueError, match="inputs of block 0"):
        run_graph(3, 2, done=set(), entered=set(), inputs="dense", ahead=0)
    with pytest.raises(ValueError, match="inputs of block 1"):
        run_graph(4, 3, done={0, 2}, entered={3}, inputs="dense", ahead=2)
    with pytest.raises(ValueError, match="inputs of block 2"):
        run_graph(4, 3, done={0, 1}, entered={1}, inputs="pruned", ahead=0)
    assert [task.name for task in run_graph(4, 3, done={0, 1}, entered={1}, inputs="dense", ahead=0)] == [
        "forward 1", "prune 2", "prune 3"
    ]  # fmt: skip


class Fake:
    """A worker that does what ``script`` says."""

    def __init__(self, name: str, script: Callable[[Task], Any], closed: list[str]) -> None:
        self.name, self._script, self._closed = name, script, closed

    def ready(self) -> None: ...

    def ask(self, task: Task, event: Event) -> dict[str, Any]:
        event({"advance": 1})
        return {"value": self._script(task)}

    def kill(self) -> None: ...

    def close(self) -> None:
        self._closed.append(self.name)


def crew_of(*scripts: Callable[[Task], Any], closed: list[str] | None = None, lost: list[str] | None = None) -> Crew:
    ended, told = [each if each is not None else [] for each in (closed, lost)]
    hired = [0] * len(scripts)

    def hire(place: int) -> Fake:
        hired[place] += 1
        return Fake(f"{place}.{hired[place]}", scripts[place], ended)

    return Crew(
        [lambda place=place: hire(place) for place in range(len(scripts))],  # type: ignore[misc]
        lost=lambda task, worker, error, n, again: told.append(f"{task.name} {n}: {error}" + "; again" * again),
    )


def chain_and_fan() -> Graph:
    tasks = [Task("0", "do")]
    tasks += [Task(str(i), "do", {"i": i}, frozenset({str(i - 1)}), (i,)) for i in range(1, 4)]
    tasks += [Task(f"fan {i}", "do", {}, frozenset({"1"}), (9, i)) for i in range(5)]
    return Graph(tasks)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_crew_does_everything_once_and_in_order(n: int) -> None:
    order: list[str] = []
    lock, steps = threading.Lock(), []

    def script(task: Task) -> str:
        time.sleep(random.random() / 500)
        with lock:
            order.append(task.name)
        return task.name

    answers: dict[str, Any] = {}

    def done(task: Task, answer: Mapping[str, Any], worker: str) -> None:
        assert worker
        answers[task.name] = answer["value"]

    graph = chain_and_fan()
    with crew_of(*[script] * n) as crew:
        assert len(crew) == n
        crew.work(graph, done, lambda worker, what: steps.append((worker, what)))
    assert sorted(order) == sorted(task.name for task in graph)
    assert all(name == value for name, value in answers.items())
    assert len(answers) == len(steps) == 9
    for task in graph:
        assert all(order.index(before) < order.index(task.name) for before in task.after)


def test_a_worker_that_dies_is_replaced_and_its_task_done_by_another() -> None:
    deaths = {"fan 0": 2, "2": 1}
    lost: list[str] = []
    closed: list[str] = []

    def script(task: Task) -> None:
        if deaths.get(task.name, 0):
            deaths[task.name] -= 1
            raise WorkerError("killed")

    seen: list[str] = []
    with crew_of(script, script, lost=lost, closed=closed) as crew:
        crew.work(chain_and_fan(), lambda task, *_: seen.append(task.name), lambda *_: None)
    assert len(seen) == len(set(seen)) == 9
    assert sorted(lost) == ["2 1: killed; again", "fan 0 1: killed; again", "fan 0 2: killed; again"]
    # Three that died, two at the end.
    assert len(closed) == 5


def test_a_task_that_kills_every_worker_ends_the_run_with_the_remedy() -> None:
    def script(task: Task) -> None:
        if task.name == "2":
            raise WorkerError("killed by SIGKILL")

    seen: list[str] = []
    with crew_of(script, script) as crew, pytest.raises(WorkerError, match=r"2: 3 workers died .*SIGKILL.*--workers"):
        crew.work(chain_and_fan(), lambda task, *_: seen.append(task.name), lambda *_: None)
    assert {"0", "1"} <= set(seen)
    assert not {"2", "3"} & set(seen)


def test_after_an_error_what_is_under_way_is_kept_and_nothing_new_begins() -> None:
    begun, failed = threading.Event(), threading.Event()

    def script(task: Task) -> None:
        if task.name == "2":
            begun.wait(10)
            failed.set()
            raise NumericsError("block 2: NaN")
        if task.name == "fan 0":
            begun.set()
            failed.wait(10)
            time.sleep(0.05)

    seen: list[str] = []
    with crew_of(script, script) as crew, pytest.raises(NumericsError, match="block 2: NaN"):
        crew.work(chain_and_fan(), lambda task, *_: seen.append(task.name), lambda *_: None)
    assert seen == ["0", "1", "fan 0"]


def test_a_worker_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def hire() -> Fake:
        raise NumericsError("no such model")

    with Crew([hire]) as crew, pytest.raises(NumericsError, match="no such model"):
        crew.work(chain_and_fan(), lambda *_: None, lambda *_: None)


def test_a_place_that_nobody_comes_to_holds_nothing_up() -> None:
    closed, seen = list[str](), list[str]()
    ended = threading.Event()

    class Awaited(Fake):
        def ready(self) -> None:
            # As long as a cluster may look for room.
            assert ended.wait(60)
            raise WorkerError("closed")

        def close(self) -> None:
            super().close()
            ended.set()

    crew = Crew([lambda: Fake("one", lambda task: None, closed), lambda: Awaited("two", lambda task: None, closed)])
    with crew:
        crew.work(chain_and_fan(), lambda task, _, worker: seen.append(worker), lambda *_: None)
        assert not ended.is_set()
    assert seen == ["one"] * 9
    assert sorted(closed) == ["one", "two"]


def test_a_place_is_given_up_where_no_worker_lives_and_the_run_where_none_does() -> None:
    starts, lost = [0, 0], list[tuple[str, int, bool]]()

    class Stillborn(Fake):
        def ready(self) -> None:
            starts[int(self.name)] += 1
            raise WorkerError("no memory")

    def told(task: Task, worker: str, error: Exception, n: int, again: bool) -> None:
        lost.append((worker, n, again))

    def slow(task: Task) -> None:
        # While others wait: a second worker is asked for as long as one would have something to do.
        while task.name == "fan 0" and len(lost) < 3:
            time.sleep(0.001)

    seen: list[str] = []
    with Crew([lambda: Fake("0", slow, []), lambda: Stillborn("1", slow, [])], lost=told) as crew:
        crew.work(chain_and_fan(), lambda task, *_: seen.append(task.name), lambda *_: None)
    assert len(seen) == 9
    assert starts == [0, 3]
    assert lost == [("worker 2", n, True) for n in (1, 2, 3)]
    lost.clear()
    with (
        Crew([lambda: Stillborn("0", slow, []), lambda: Stillborn("1", slow, [])], lost=told) as crew,
        pytest.raises(WorkerError, match=r"0: no worker can be had for it, the last said: no memory"),
    ):
        crew.work(chain_and_fan(), lambda *_: None, lambda *_: None)
    # One task is ready: there is one worker too few, and then another.
    assert starts == [3, 6]
    assert [again for *_, again in lost] == [True] * 5 + [False]


def test_a_worker_that_shows_no_sign_of_life_is_ended_and_its_task_done_by_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sparsify.cluster.crew._WAIT_S", 0.05)
    monkeypatch.setattr("sparsify.cluster.crew.SILENT_S", 0.4)
    monkeypatch.setattr("sparsify.cluster.beats.BEAT_S", 0.02)
    ended, kills, lost = threading.Event(), set[str](), list[str]()

    class Still(Fake):
        def ask(self, task: Task, event: Event) -> dict[str, Any]:
            if task.name == "fan 0" and not ended.is_set():
                assert ended.wait(60)
                raise WorkerError("killed by SIGKILL")
            with beating(lambda: event({})):
                return super().ask(task, event)

        def kill(self) -> None:
            kills.add(self.name)
            ended.set()

    def slow(task: Task) -> None:
        # It takes as long as the other, but is heard of.
        assert task.name != "2" or ended.wait(60)

    seen: list[str] = []
    crew = Crew(
        [lambda: Still("one", slow, []), lambda: Still("two", slow, [])],
        lost=lambda task, worker, error, n, again: lost.append(f"{task.name} {n}, {error}"),
    )
    with crew:
        crew.work(chain_and_fan(), lambda task, *_: seen.append(task.name), lambda *_: None)
    assert len(seen) == len(set(seen)) == 9
    (silent,) = kills
    assert lost == [f"fan 0 1, {silent}: it showed no sign of life for 0.4 s and was ended"]


def test_an_interruption_ends_the_workers() -> None:
    closed: list[str] = []
    stop = threading.Event()

    class Slow(Fake):
        def close(self) -> None:
            super().close()
            stop.set()

    def script(task: Task) -> None:
        if task.name == "fan 0":
            stop.wait(20)
            raise WorkerError("closed")

    def done(task: Task, *_: object) -> None:
        if task.name == "2":
            raise KeyboardInterrupt

    crew = Crew([lambda: Slow("one", script, closed), lambda: Slow("two", script, closed)])
    with crew, pytest.raises(KeyboardInterrupt):
        crew.work(chain_and_fan(), done, lambda *_: None)
    assert set(closed) == {"one", "two"}


def test_alone_it_goes_by_rank() -> None:
    order: list[str] = []

    def do(**_: int) -> dict[str, Any]:
        return {"one": 1}

    begun: list[str] = []
    work_alone(
        chain_and_fan(), Here({"do": do}), lambda task, _: begun.append(task.name),
        lambda task, *_: order.append(task.name), lambda *_: None,
    )  # fmt: skip
    assert begun == order
    assert order == ["0", "1", "2", "3", *(f"fan {i}" for i in range(5))]


def test_alone_it_shows_signs_of_life_while_a_task_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.cluster.beats.BEAT_S", 0.01)
    heard = threading.Event()

    def do() -> dict[str, Any]:
        return {"heard": heard.wait(60)}

    assert Here({"do": do}).ask(Task("0", "do"), lambda what: heard.set()) == {"heard": True}
