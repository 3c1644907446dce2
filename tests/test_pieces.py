"""Blocks pruned in pieces, shards of text and linears, in whatever order: the bits of blocks pruned whole."""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparsify import manifest
from sparsify.block import _bundled
from sparsify.cluster.crew import Here
from sparsify.cluster.graph import Graph
from sparsify.cluster.job import Bench, Job
from sparsify.cluster.pieces import handlers_of
from sparsify.cluster.pipeline import Pipeline
from sparsify.progress import Silent
from sparsify.prune import _Run, prune
from sparsify.recipe import Recipe
from sparsify.types import LinearSpec
from tests.test_prune import source, tree

# Everything that a block's linears may have to do with each other.
RECIPES: dict[str, dict[str, Any]] = {
    "norms": {"pattern": "0.5", "method": "wanda"},
    "means": {"pattern": "2:4", "method": "dsnot"},
    "a block's statistics at once": {"pattern": "2:4", "method": "sparsegpt"},
    "orders folded at once": {"pattern": "2:4", "method": "ria-cp"},
    "groups, aims, orders folded": {"pattern": "2:4", "method": "fast"},
    "dense targets": {"pattern": "0.5", "method": "best", "aim": "dense"},
    "orders recorded, shared": {"pattern": "2:4", "method": "ria", "permute": "gather"},
    "orders recorded": {"pattern": "2:4", "method": "sparsegpt", "permute": "simulate"},
    "some blocks dense": {"pattern": "2:4", "method": "sparsegpt", "exclude": ("*.1.*",)},
}


class Shuffled:
    """Two workers, as far as the driver knows: tasks are done one by one, any that is ready."""

    def __init__(self, job: Job, begun: Callable[..., None], seed: int) -> None:
        self._worker, self._begun, self._draw = Here(handlers_of(Bench(job, Silent()))), begun, random.Random(seed)
        self.did: list[str] = []

    def __len__(self) -> int:
        return 2

    def work(self, graph: Graph, done: Callable[..., None], told: Callable[..., None]) -> None:
        while graph.left:
            task = self._draw.choice(graph.ready())
            graph.take(task)
            self._begun(task, "worker 1")
            done(task, self._worker.ask(task, lambda _event: None), "worker 1")
            graph.finish(task)
            self.did.append(task.name)


@pytest.fixture
def shuffled(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[Shuffled]]:
    """Have ``prune`` hire such workers; the list is theirs, once it has."""

    def install(seed: int) -> list[Shuffled]:
        hired: list[Shuffled] = []
        monkeypatch.setattr("sparsify.prune.crew_of", _crew(seed, hired))
        return hired

    return install


def _crew(seed: int, hired: list[Shuffled]) -> Callable[..., AbstractContextManager[Shuffled]]:
    @contextmanager
    def crew_of(
        job: Job, _workers: Any, _cluster: Any, _bytes: Any, begun: Callable[..., None], *_: Any
    ) -> Iterator[Shuffled]:
        hired.append(Shuffled(job, begun, seed))
        yield hired[-1]

    return crew_of


def seven_windows(folder: Path) -> str:
    path = folder / "ids.safetensors"
    save_file({"ids": torch.randint(3, 64, (11, 16), generator=torch.Generator().manual_seed(1))}, path)
    return f"{path}:ids"


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "phi3"])
def test_pieces_in_any_order_give_the_bits_of_whole_blocks(
    kind: str,
    model_type: str,
    random_models: Callable[[str], Path],
    shuffled: Callable[[int], list[Shuffled]],
    tmp_path: Path,
) -> None:
    how, model = Recipe(calibration=seven_windows(tmp_path), **RECIPES[kind]), source(random_models(model_type))
    whole = prune(model, how, tmp_path / "whole")
    hired = shuffled(1)
    out = prune(model, how, tmp_path / "pieces")
    assert tree(out) == tree(whole)
    assert sum(name.startswith("sum ") for name in hired[0].did) >= 8


def test_what_is_derived_for_one_linear_is_of_use_to_another_in_pieces_too(
    llama: Path, shuffled: Callable[[int], list[Shuffled]], tmp_path: Path
) -> None:
    # k has no order of its inputs; q and v have, and share them with it.
    how = Recipe("2:4", "alps", permute="simulate", overrides={"*k_proj": "0.5"}, calibration=seven_windows(tmp_path))
    whole = prune(source(llama), how, tmp_path / "whole")
    shuffled(1)
    assert tree(prune(source(llama), how, tmp_path / "pieces")) == tree(whole)


@pytest.mark.parametrize("kind", ["orders recorded, shared", "groups, aims, orders folded"])
def test_experts_that_the_first_window_does_not_reach_are_solved_as_in_one_process(
    kind: str, random_models: Callable[[str], Path], shuffled: Callable[[int], list[Shuffled]], tmp_path: Path
) -> None:
    path = tmp_path / "ids.safetensors"
    ids = torch.randint(3, 64, (11, 16), generator=torch.Generator().manual_seed(1))
    ids[0] = 7
    save_file({"ids": ids}, path)
    how, model = Recipe(calibration=f"{path}:ids", **RECIPES[kind]), source(random_models("mixtral"))
    whole = prune(model, how, tmp_path / "whole")
    shuffled(2)
    assert tree(prune(model, how, tmp_path / "pieces")) == tree(whole)


def test_many_units_are_solved_in_few_bundles_of_neighbours() -> None:
    for n in (0, 1, 8, 9, 50):
        specs = [LinearSpec(f"{i}", f"{i}", 4, 4) for i in range(n)]
        bundles = _bundled([[spec] for spec in specs])
        assert [spec for bundle in bundles for spec in bundle] == specs
        assert all(bundles)
        assert len(bundles) == min(n, 8)


def test_nothing_is_left_of_the_pieces(
    random_models: Callable[[str], Path], shuffled: Callable[[int], list[Shuffled]], tmp_path: Path
) -> None:
    shuffled(0)
    how = Recipe("2:4", "fast", calibration=seven_windows(tmp_path))
    out = prune(source(random_models("llama")), how, tmp_path / "out")
    assert not [path.name for path in out.iterdir() if path.name.startswith(("sums", "part", "hidden", "dense"))]


@pytest.mark.parametrize("seed", range(6))
def test_a_run_interrupted_between_pieces_goes_on_in_other_ways(
    seed: int,
    random_models: Callable[[str], Path],
    shuffled: Callable[[int], list[Shuffled]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Any task may be the last that was done; in pieces or whole, finished blocks stay and the bits are the same."""
    how, model = Recipe("2:4", "fast", calibration=seven_windows(tmp_path)), source(random_models("llama"))
    whole = prune(model, how, tmp_path / "whole")
    original, left = _Run._done, random.Random(seed).randrange(1, 60)

    def done(run: _Run, *rest: Any) -> None:
        nonlocal left
        original(run, *rest)
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sparsify.prune._Run._done", done)
        patch.setattr("sparsify.prune.crew_of", _crew(seed, []))
        with pytest.raises(KeyboardInterrupt):
            prune(model, how, tmp_path / "out")
    state = json.loads((tmp_path / "out.partial/.state.json").read_text())["state"]
    if seed % 2:
        hired = shuffled(seed)
    out = prune(model, how, tmp_path / "out")
    assert json.loads((out / manifest.RUN).read_text())["blocks_resumed"] == len(state["blocks"])
    assert tree(out) == tree(whole)
    if seed % 2:
        assert not {name for name in hired[0].did if name.split()[1] in state["blocks"]}


def test_the_graph_lets_shards_go_ahead_and_nothing_else() -> None:
    graph = Graph()
    line = Pipeline(graph, 3, 1, [True, True, False], 2, dense=True, done=set(), entered={0})
    line.start()
    line.looked(0, [[["q"], ["k", "v"]], [["o"]]], {"o": ""})
    line.looked(1, [[["q"]]], {})
    after = {task.name: set(task.after) for task in graph}
    assert after == {
        "prune 2": set(),
        "look 0": set(),
        "sum 0 0 0": {"look 0"},
        "sum 0 0 1": {"look 0"},
        "solve 0 0 0": {"sum 0 0 0", "sum 0 0 1"},
        "solve 0 0 1": {"sum 0 0 0", "sum 0 0 1"},
        "sum 0 1 0": {"solve 0 0 0", "solve 0 0 1"},
        "sum 0 1 1": {"solve 0 0 0", "solve 0 0 1"},
        "solve 0 1 2": {"sum 0 1 0", "sum 0 1 1"},
        "leave 0 0": {"solve 0 1 2"},
        "leave 0 1": {"solve 0 1 2"},
        "write 0": {"solve 0 1 2", "leave 0 0", "leave 0 1", "sum 0 1 0", "sum 0 1 1"},
        # What enters the second block in the dense model came with the sums of the first.
        "look 1": {"leave 0 0", "sum 0 1 0"},
        "sum 1 0 0": {"look 1", "leave 0 0", "sum 0 1 0"},
        "sum 1 0 1": {"look 1", "leave 0 1", "sum 0 1 1"},
        "solve 1 0 0": {"sum 1 0 0", "sum 1 0 1"},
        "write 1": {"solve 1 0 0", "write 0"},
    }
    tasks = {task.name: task.arguments for task in graph}
    assert tasks["sum 0 1 1"]["parts"] == [0, 1]
    assert tasks["solve 0 0 1"] == {
        "block": 0, "group": 0, "names": ["q", "k", "v"], "unit": ["k", "v"], "part": 1, "parts": [],
    }  # fmt: skip
    assert [tasks[f"sum 0 {group} 0"]["leave"] for group in (0, 1)] == [False, True]
    assert not tasks["sum 1 0 0"]["leave"]


def test_nobody_goes_ahead_of_a_block_that_is_still_to_be_written() -> None:
    graph = Graph()
    line = Pipeline(graph, 4, 3, [True] * 4, 2, dense=False, done=set(), entered={0})
    line.start()
    for block in range(3):
        line.looked(block, [[["q"]]], {})
    after = {task.name: set(task.after) for task in graph}
    assert "write 0" not in after["sum 1 0 0"] | after["solve 1 0 0"]
    for shard in range(2):
        assert "write 0" in after[f"leave 1 {shard}"]
        assert f"leave 1 {shard}" in after[f"sum 2 0 {shard}"]


def test_blocks_without_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="inputs of block 1 are missing"):
        Pipeline(Graph(), 3, 2, [True] * 3, 2, dense=False, done={0}, entered={2}).start()
