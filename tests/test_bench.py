"""Whole runs of ``sparsify bench`` on tiny models, and what it does when something fails on the way."""

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise, permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify import manifest
from sparsify.bench.records import Records, read, writer
from sparsify.bench.request import Request, Scenario
from sparsify.bench.rounds import orders
from sparsify.bench.run import run
from sparsify.bench.subjects import identify
from sparsify.bench.workers import WorkerProcess
from sparsify.errors import MeasurementError, ModelError, OutputError, UsageError
from sparsify.process_memory import session_members
from sparsify.roofline.devices import Device
from sparsify.runtimes import Runtime
from tests.conftest import Run, interrupt, refuse

SMALL = ("--prompt", 8, "--new", 3, "--rounds", 6, "--batch", 2, "--dtype", "float32", "--threads", 1)
SCENARIO = Scenario(8, 3, 1)
CEILINGS = Device("here", "some CPU", 1e10, {"float32": 1e11}, {}, 1 << 34, "made up", kind="cpu", how="measured")


@pytest.fixture(scope="module")
def artifacts(cli: Run, random_models: Callable[[str], Path], ids_file: str, tmp_path_factory: Any) -> Path:
    """A folder with ``pruned`` and ``vllm`` of the tiny llama."""
    root: Path = tmp_path_factory.mktemp("artifacts")
    pruned = root / "pruned"
    model = random_models("llama")
    options = ("--pattern", "2:4", "--method", "magnitude", "--calibration", ids_file)
    assert cli("prune", model, *options, "--out", pruned).returncode == 0
    assert cli("export", pruned, "--target", "vllm", "--out", root / "vllm").returncode == 0
    return root


@pytest.fixture
def dense(random_models: Callable[[str], Path]) -> Path:
    return random_models("llama")


def request(**changes: Any) -> Request:
    runtime = Runtime(dtype="float32", threads=1)
    return Request(**{"scenarios": (SCENARIO,), "runtimes": ("torch",), "runtime": runtime, "rounds": 2, **changes})


def measure(out: Path, candidates: list[Path], dense: Path, asked: Request) -> tuple[int, Records]:
    subjects = identify([str(dense), *map(str, candidates)])
    with writer(out) as to:
        failed = run(subjects[1:], subjects[:1], asked, to, command=["test"], ceilings=CEILINGS)
    return failed, read([out])


def test_a_whole_run(cli: Run, artifacts: Path, dense: Path, ids_file: str, tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    options = ("--text", ids_file, "--windows", 3, "--length", 20, "--kernel-tokens", 2, "--out", out, "--json")
    done = cli("bench", artifacts / "vllm", "--baseline", dense, "--kernel", "packed", *SMALL, *options)
    assert done.returncode == 0, done.stderr
    records = read([out])
    assert json.loads(done.stdout)["failed"] == 0
    assert [len(records.of(kind)) for kind in ("run", "artifact", "latency", "memory", "perplexity", "end")] == [
        1, 2, 2, 2, 2, 1
    ]  # fmt: skip
    base, sparse = records.of("latency")
    assert (base["artifact"], base["baseline"]) == ("llama", None)
    assert (sparse["artifact"], sparse["baseline"], sparse["asked_sparse"]) == ("vllm", "llama", True)
    # What engaged, not what was asked: seven linears of each of the two blocks.
    assert list(sparse["engaged"].values()).count("packed") == 14
    assert set(base["engaged"].values()) == {"dense"}
    assert base["trace_sha256"] == sparse["trace_sha256"]
    assert [each["again"] for each in base["rounds"]].count(True) == 6 == len(sparse["rounds"])
    for number in range(6):
        places = [each["position"] for each in (*base["rounds"], *sparse["rounds"]) if each["round"] == number]
        assert sorted(places) == [0, 1, 2]
    assert all(len(each["ttft_s"]) == 2 and len(each["gaps_s"][1]) == 2 for each in sparse["rounds"])
    assert base["roof"]["tpot_s"] > sparse["roof"]["tpot_s"] > 0
    memory = records.of("memory")[1]
    assert memory["peak_resident_bytes"] >= memory["loaded_resident_bytes"] > memory["weights_resident_bytes"] > 0
    assert records.of("kernel")


def test_perplexity_is_that_of_eval(cli: Run, artifacts: Path, dense: Path, ids_file: str, tmp_path: Path) -> None:
    out, text = tmp_path / "records.jsonl", ("--text", ids_file, "--windows", 3, "--length", 20)
    pruned = artifacts / "pruned"
    assert cli("bench", pruned, "--baseline", dense, *SMALL, *text, "--no-kernels", "--out", out).returncode == 0
    found = {each["artifact"]: each for each in read([out]).of("perplexity")}
    done = cli("eval", pruned, *text, "--against", dense, "--runtime", "torch", "--json")
    alone = json.loads(done.stdout)
    assert found["pruned"]["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)
    assert found["pruned"]["kl"]["mean_nats"] == pytest.approx(alone["kl_to_reference"]["mean_nats"], rel=1e-4)
    assert found["pruned"]["kl"]["reference"] == "llama"
    # The dense model against itself in another process: what the numbers alone are worth.
    assert abs(found["llama"]["kl"]["mean_nats"]) < 1e-6


def test_a_runtime_that_dies_leaves_what_was_finished(
    artifacts: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = WorkerProcess.ask_all
    asked: list[str] = []

    def dying(self: WorkerProcess, do: str, /, **arguments: Any) -> Iterator[dict[str, Any]]:
        if do == "stream" and self.name.startswith("pruned"):
            asked.append(do)
            if len(asked) == 7:  # in the second scenario: each has a warm-up call, and two in each of two rounds
                os.kill(self.pid, signal.SIGKILL)
        return ask(self, do, **arguments)

    monkeypatch.setattr(WorkerProcess, "ask_all", dying)
    two = request(scenarios=(SCENARIO, Scenario(9, 3, 1)))
    failed, records = measure(tmp_path / "r.jsonl", [artifacts / "pruned", artifacts / "vllm"], dense, two)
    assert failed == 1
    (missing,) = records.of("missing")
    assert "killed by SIGKILL" in missing["why"]
    assert (missing["artifact"], missing["scenario"]["prompt_tokens"], missing["failed"]) == ("pruned", 9, True)
    finished = [(each["artifact"], each["scenario"]["prompt_tokens"]) for each in records.of("latency")]
    assert finished == [("llama", 8), ("pruned", 8), ("vllm", 8), ("llama", 9), ("vllm", 9)]
    assert [each["artifact"] for each in records.of("memory")] == ["llama", "vllm"]
    assert records.of("end")[0]["failed"] == 1


def test_a_runtime_that_hangs_is_ended(
    artifacts: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = WorkerProcess.ask_all
    stopped: list[int] = []

    def hanging(self: WorkerProcess, do: str, /, **arguments: Any) -> Iterator[dict[str, Any]]:
        if do == "stream" and self.name.startswith("pruned") and not stopped:
            stopped.append(self.pid)
            self._timeout_s = 0.5
            os.kill(self.pid, signal.SIGSTOP)
        return ask(self, do, **arguments)

    monkeypatch.setattr(WorkerProcess, "ask_all", hanging)
    failed, records = measure(tmp_path / "r.jsonl", [artifacts / "pruned"], dense, request())
    assert failed == 1
    assert "no answer for 0.5 s; raise --timeout" in records.of("missing")[0]["why"]
    with pytest.raises(ProcessLookupError):
        os.kill(stopped[0], 0)


def test_nan_is_not_measured(cli: Run, artifacts: Path, dense: Path, ids_file: str, tmp_path: Path) -> None:
    broken, out = tmp_path / "nan", tmp_path / "records.jsonl"
    broken.mkdir()
    for path in (artifacts / "pruned").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    body = manifest.read(broken)
    shard = next(path for path in broken.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    tensors = load_file(shard)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    manifest.write(broken, {key: value for key, value in body.items() if key != "files"})
    options = ("--text", "none", "--no-kernels", "--out", out)
    refuse(cli("bench", broken, "--baseline", dense, *SMALL, *options), 10, str(out), "1 measurements failed")
    (missing,) = read([out]).of("missing")
    assert "NaN or Inf" in missing["why"]
    assert [each["artifact"] for each in read([out]).of("latency")] == ["llama"]


def test_bad_requests_are_refused_before_anything_runs(
    cli: Run, artifacts: Path, dense: Path, tmp_path: Path, prune: Run
) -> None:
    out, pruned = tmp_path / "records.jsonl", artifacts / "pruned"

    def bench(*options: Any, artifact: Path = pruned, baseline: Path = dense) -> Any:
        return cli("bench", artifact, "--baseline", baseline, "--text", "none", "--out", out, *options)

    refuse(bench("--rounds", 0), 2, "--rounds 0")
    refuse(bench("--prompt", 0), 2, "--prompt 0 is below 1")
    refuse(bench("--runtime", "tpu"), 2, "'tpu'", "torch")
    refuse(bench("--runtime", "onnxruntime"), 2, "opens none of these artifacts", "checkpoint")
    for timeout in (0, -1, "nan", "inf", "-inf"):
        refuse(bench(f"--timeout={timeout}"), 2, f"--timeout {timeout}: want a number of seconds above 0")
    refuse(bench("--seed=-1"), 2, "--seed -1")
    refuse(bench("--device", "tpu"), 2, "tpu")
    refuse(bench("--kernel-tokens", 0), 2, "--kernel-tokens")
    refuse(bench(baseline=pruned.parent / "vllm"), 2, "was pruned itself")
    refuse(bench(artifact=tmp_path), 3, "holds neither")
    assert not out.exists()
    out.write_text("something of somebody's\n")
    refuse(bench(), 5, str(out), "no file of records")
    refuse(bench("--overwrite"), 5, str(out), "no file of records")
    assert out.read_text() == "something of somebody's\n"


def test_a_runtime_that_cannot_start_is_recorded(artifacts: Path, dense: Path, tmp_path: Path) -> None:
    asked = request(runtime=Runtime(dtype="float32", kernel="nosuch"))
    failed, records = measure(tmp_path / "r.jsonl", [artifacts / "pruned"], dense, asked)
    assert failed == 3  # the baseline in both its processes, and the artifact
    assert all("nosuch" in each["why"] for each in records.of("missing"))
    assert not records.of("latency")


def test_a_scenario_longer_than_the_model_fails_by_itself(
    cli: Run, artifacts: Path, dense: Path, tmp_path: Path
) -> None:
    graph = tmp_path / "onnx"
    assert cli("export", artifacts / "pruned", "--target", "onnx", "--out", graph).returncode == 0
    asked = request(scenarios=(SCENARIO, Scenario(62, 9, 1)), runtimes=("onnxruntime",))  # of 64 positions
    failed, records = measure(tmp_path / "r.jsonl", [graph], dense, asked)
    assert failed == 1
    whys = {each["why"] for each in records.of("missing") if each["failed"]}
    assert len(whys) == 1
    assert "are more than the 64 the model takes" in whys.pop()
    assert [each["scenario"]["prompt_tokens"] for each in records.of("latency")] == [8]
    # Nothing dense of that kind was given.
    assert any("no --baseline of this kind" in each["why"] for each in records.of("missing"))
    (latency,) = records.of("latency")
    assert latency["baseline"] is None
    assert not any(each["again"] for each in latency["rounds"])
    assert set(latency["engaged"].values()) == {"dense"}


def test_a_dense_graph_is_made_for_a_graph(cli: Run, artifacts: Path, dense: Path, tmp_path: Path) -> None:
    graph, out = tmp_path / "onnx", tmp_path / "records.jsonl"
    assert cli("export", artifacts / "pruned", "--target", "onnx", "--out", graph).returncode == 0
    command = ("bench", graph, "--baseline", dense, *SMALL, "--text", "none", "--no-kernels", "--out", out)
    assert cli(*command).returncode == 0
    base, sparse = read([out]).of("latency")
    assert base["artifact"] == sparse["baseline"] == "dense-standard-fp32-cpu"
    # No sparse kernel ran, so no weight was read without its zeros.
    assert base["roof"] is not None
    assert base["roof"] == sparse["roof"]
    made = tmp_path / "records.jsonl.baselines" / base["artifact"] / "model.onnx"
    before = made.stat().st_mtime_ns
    assert cli(*command, "--append").returncode == 0
    assert made.stat().st_mtime_ns == before
    assert len(read([out]).of("run")) == 2


def test_without_a_twin_nothing_is_claimed(artifacts: Path, dense: Path, tmp_path: Path) -> None:
    from sparsify.report.pairs import comparison, pairs

    failed, records = measure(tmp_path / "r.jsonl", [artifacts / "pruned"], dense, request(rounds=6, twin=False))
    assert failed == 0
    assert not any(each["again"] for each in records.of("latency")[0]["rounds"])
    (pair,) = pairs(records)
    found = comparison(pair, "total")
    assert found is not None
    assert found.claim == "too few rounds"


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 6])
def test_everybody_comes_after_everybody_else_alike(n: int) -> None:
    """After any number of rounds, not only after many."""
    assert orders(n, 12, 7) == orders(n, 12, 7)
    assert len({str(orders(n, 12, seed)) for seed in range(20)}) == {0: 1, 1: 1, 2: 2}.get(n, 20)
    for seed in range(5):
        found = orders(n, 40, seed)
        assert all(sorted(order) == list(range(n)) for order in found)
        # As many rounds are drawn as are wanted, and the first are the same.
        assert orders(n, 9, seed) == found[:9]
        for rounds in range(1, 41):
            line = [place for order in found[:rounds] for place in order]
            followers = Counter(pairwise(line))
            assert n < 2 or not any(followers[place, place] for place in range(n))
            counts = [followers[one, other] for one, other in permutations(range(n), 2)] or [0]
            assert max(counts) - min(counts) <= 2
            if n != 2:  # two can only alternate
                at = Counter(place for order in found[:rounds] for place in enumerate(order))
                early = [at[position, place] for position, place in product(range(n), repeat=2)] or [0]
                assert max(early) - min(early) <= 4


def test_what_a_worker_raises_comes_as_it_is(tmp_path: Path) -> None:
    with WorkerProcess("w", python=sys.executable, variables={}, timeout_s=60) as worker:
        with pytest.raises(ModelError, match=r"no such folder|config\.json"):
            worker.ask("open", path=str(tmp_path / "absent"), runtime={"name": "torch"}, vocab_size=8,
                       probe=2, trust_remote_code=False)  # fmt: skip
        with pytest.raises(UsageError, match="is unknown"):
            worker.ask("dance")
        pid = worker.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(UsageError, match="cannot start"):
        WorkerProcess("w", python=str(tmp_path / "python"), variables={}, timeout_s=60)
    false = tmp_path / "false"
    false.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'sparsify'\" >&2\nexit 3\n")
    false.chmod(0o755)
    with (
        WorkerProcess("w", python=str(false), variables={}, timeout_s=60) as worker,
        pytest.raises(MeasurementError, match="sparsify is not installed for"),
    ):
        worker.ask("ceilings", device="cpu")


def test_windows_reach_the_worker_as_they_are(artifacts: Path, dense: Path, tmp_path: Path) -> None:
    from sparsify.data import Windows

    windows = Windows(np.arange(3, 63, dtype=np.int64).reshape(3, 20), "made", False, None)
    failed, records = measure(
        tmp_path / "r.jsonl", [artifacts / "pruned"], dense, request(scenarios=(), windows=windows)
    )
    assert failed == 0
    text = records.of("perplexity")[0]["text"]
    assert text == {
        "source": "made", "windows": 3, "length": 20, "stride": 20, "bos": False, "sha256": windows.sha256
    }  # fmt: skip


SAY = "#!/bin/bash\nfor last; do :; done\nread request\n{}\n"


@pytest.mark.parametrize(
    "line",
    [
        "INFO engine ready",
        "[1]",
        '{"found": 3}',
        '{"other": 1}',
        '{"done": true}',
        '{"found": {}}\n{"found": {}}\n{"done": true}',
    ],
)
def test_what_is_no_answer_ends_the_worker_and_not_the_run(line: str, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text(SAY.format(f"printf '%s\\n' '{line}' >&$last\nsleep 60"))
    script.chmod(0o755)
    worker = WorkerProcess("w", python=str(script), variables={}, timeout_s=60)
    with worker, pytest.raises(MeasurementError, match="said what it should not"):
        worker.ask("ceilings", device="cpu")


def test_errors_of_other_names_are_measurement_errors(tmp_path: Path) -> None:
    script = tmp_path / "python"
    for kind in ("OutputError", "annotations", "KeyError", "SparsifyErrors"):
        script.write_text(SAY.format(f"""printf '{{"error": "why", "kind": "{kind}"}}\\n' >&$last"""))
        script.chmod(0o755)
        with (
            WorkerProcess("w", python=str(script), variables={}, timeout_s=60) as worker,
            pytest.raises(MeasurementError, match=r"^why$"),
        ):
            worker.ask("ceilings", device="cpu")


@pytest.mark.parametrize("end", ["exit 3", "kill -9 $$"])
def test_what_a_dead_worker_started_ends_too(end: str, tmp_path: Path) -> None:
    # The child holds the pipe of the answers open, and has lost its parent.
    script = tmp_path / "python"
    script.write_text(SAY.format(f"sleep 600 & {end}"))
    script.chmod(0o755)
    with WorkerProcess("w", python=str(script), variables={}, timeout_s=60) as worker:
        assert session_members(worker.pid)
        with pytest.raises(MeasurementError, match="its process died"):
            worker.ask("ceilings", device="cpu")
        assert not session_members(worker.pid)


def test_a_worker_does_not_run_what_lies_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('hijacked')\n")
    monkeypatch.chdir(tmp_path)
    with (
        WorkerProcess("w", python=sys.executable, variables={}, timeout_s=60) as worker,
        pytest.raises(UsageError, match="is unknown"),
    ):
        worker.ask("dance")


def test_a_model_without_a_tokenizer_is_refused_before_tasks(
    cli: Run, artifacts: Path, dense: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    out = tmp_path / "records.jsonl"
    options = ("--text", "none", "--no-kernels", "--task", "arc_easy", "--task-files", tmp_path, "--out", out)
    refuse(cli("bench", artifacts / "pruned", "--baseline", dense, *SMALL, *options), 3, "tokenizer")
    assert not out.exists()


def test_an_interrupted_run_keeps_what_is_finished(
    cli: Run, artifacts: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "records.jsonl"
    interrupt(monkeypatch, "sparsify.bench.measuring.perplexity_record")
    text = ("--text", artifacts / "no" / "such")
    command = ("bench", artifacts / "pruned", "--baseline", dense, *SMALL, "--no-kernels", "--out", out)
    assert cli(*command, *text).returncode == 4
    assert not out.exists()
    from sparsify.data import Windows

    windows = Windows(np.arange(3, 43, dtype=np.int64).reshape(2, 20), "made", False, None)
    with pytest.raises(KeyboardInterrupt):
        measure(out, [artifacts / "pruned"], dense, request(windows=windows))
    records = read([out])
    assert [len(records.of(kind)) for kind in ("latency", "memory", "perplexity", "end")] == [2, 2, 0, 0]


def test_records_that_cannot_be_written_end_the_run(
    artifacts: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsify.bench.records import Writer

    write = Writer.write

    def full(self: Writer, kind: str, /, **fields: Any) -> Any:
        if kind == "memory":
            raise OutputError("the disk is full")
        return write(self, kind, **fields)

    monkeypatch.setattr(Writer, "write", full)
    with pytest.raises(OutputError, match="the disk is full"):
        measure(tmp_path / "r.jsonl", [artifacts / "pruned"], dense, request())
    assert len(read([tmp_path / "r.jsonl"]).of("latency")) == 2
