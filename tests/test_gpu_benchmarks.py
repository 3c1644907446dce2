"""The parts of the GPU benchmarks that need no GPU: batches of files, records, comparisons, and the order of calls."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import math
import shutil
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch.nn import functional

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from gpu_machine.batches import pack_folders, take
from gpu_machine.llama import LLAMA_8B, LLAMA_70B
from gpu_machine.record import NOT_RUN, WRONG, Record
from gpu_machine.wheels import REPORTING
from gpu_report import __main__ as gpu_report
from gpu_report import generation
from gpu_report import report as gpu_records
from gpu_report.cases import Generation, Product, Search, cases, searches
from gpu_report.report import BEGUN, RECORDS, Report, measure
from kernels_gpu.layers import LAYERS, SHARDS
from kernels_gpu.timing import add_bound
from onnx_gpu.__main__ import parse
from onnx_gpu.compare import CASES, NEW, check_session, references
from onnx_gpu.pack import unit
from onnx_gpu.tasks import TASKS
from onnx_gpu.timing import time_sessions

from sparsify.bench.records import read
from sparsify.exporters.tensorrt_api import TensorRt
from sparsify.exporters.tensorrt_header import read_header, write_header
from sparsify.exporters.tensorrt_options import EngineOptions
from sparsify.format.packed import Packed, decode
from sparsify.report.pairs import pairs
from sparsify.runtimes import tensorrt_session
from sparsify.runtimes.torch_session import TorchSession
from tests import trt_double
from tests.engines import VOCAB, build, make
from tests.fakes import FakeSession

TOOL = Path(__file__).parents[1] / "benchmarks/onnx_gpu"
LIMIT = 1 << 20


def folders(root: Path) -> dict[str, Path]:
    """Two units, one of them larger than a batch however well it is compressed."""
    noise = np.random.default_rng(0)
    for name, sizes in {"large": [1_500_000, 900_000], "small": [1000, 0]}.items():
        for i, size in enumerate(sizes):
            path = root / name / f"{name}/file{i}.so"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(noise.bytes(size))
    return {path.name: path for path in sorted(root.iterdir())}


def test_batches_are_small_and_come_back_whole(tmp_path: Path) -> None:
    units = folders(tmp_path / "units-in")
    (tmp_path / "out").mkdir()
    batches = pack_folders(units, tmp_path / "out", LIMIT)
    assert len(batches) >= 3
    assert all(path.stat().st_size <= LIMIT for path in batches)
    into = tmp_path / "into"
    for i, batch in enumerate(batches):
        # They arrive one at a time, in any order.
        arrived = tmp_path / f"arrived-{i}"
        arrived.mkdir()
        shutil.copy(batch, arrived)
        assert take(arrived, into, TOOL) == 0
        assert (into / "env").exists() is (i == len(batches) - 1)
    for folder in units.values():
        for path in folder.rglob("*.so"):
            assert (into / "site" / path.relative_to(folder)).read_bytes() == path.read_bytes()
    env = (into / "env").read_text()
    assert f"PYTHONPATH='{into / 'site'}'" in env
    assert env.splitlines()[1].startswith("onnx_gpu() {")


def test_a_damaged_batch_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    batches = pack_folders(folders(tmp_path / "units-in"), tmp_path / "out", LIMIT)
    victim = bytearray(batches[0].read_bytes())
    with tarfile.open(batches[0]) as archive:
        part = archive.getmembers()[1]
    victim[part.offset_data + 1000] ^= 1
    batches[0].write_bytes(bytes(victim))
    assert take(tmp_path / "out", tmp_path / "into", TOOL) == WRONG
    assert "differs from its checksum; send batch-1.tar again" in capsys.readouterr().out
    assert take(tmp_path / "units-in", tmp_path / "into", TOOL) == NOT_RUN


def test_arguments() -> None:
    options = parse(["run", "--out", "x.json"])
    assert options.precisions == ["fp16", "bf16"]
    assert options.parts == ["export", "build", "engine", "onnxruntime", "genai"]
    assert options.budget_s < 600
    assert set(options.parts) < TASKS.keys()
    with pytest.raises(SystemExit):
        parse(["run", "--out", "x.json", "--parts", "nothing"])
    own = Path("sparsify_toolkit-0.1-py3-none-any.whl")
    assert unit(own, own) == "sparsify"
    assert unit(Path("onnxruntime_gpu-1.31.1-cp312.whl"), own) == "onnxruntime_gpu"
    assert unit(Path("onnx-1.23.2-cp312.whl"), own) == "packages"


def test_a_record_says_what_went_wrong(tmp_path: Path) -> None:
    options = argparse.Namespace(out=tmp_path / "a/record.json", budget_s=100, device="cpu", run=print)
    record = Record("benchmark", options, ("torch", "no-such-package"))
    assert 90 < record.left_s <= 100
    assert record.close() == 0
    record.not_run("this", "no GPU")
    assert record.close() == NOT_RUN
    record.failed("that", "differs")
    assert record.close() == WRONG
    body = json.loads((tmp_path / "a/record.json").read_text())
    assert body["not_run"] == [{"what": "this", "why": "no GPU"}]
    assert body["failed"] == [{"what": "that", "why": "differs"}]
    assert body["environment"]["versions"].keys() >= {"torch", "python"}
    assert "run" not in body["arguments"]


def test_cases_that_the_budget_is_not_enough_for_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    record = Record("benchmark", argparse.Namespace(out=tmp_path / "record.json", budget_s=50, device="cpu"), ())
    seen = []
    for what, case in record.affordable([("quick", 1.0), ("slow", 30.0), ("as slow", 30.0), ("last", 1.0)]):
        seen.append(what)
        now += case
    assert seen == ["quick", "slow"]
    assert record.body["not_run"] == [
        {"what": what, "why": "the budget is spent: 19 s left"} for what in ("as slow", "last")
    ]


def test_a_long_case_costs_others_of_its_kind_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    record = Record("benchmark", argparse.Namespace(out=tmp_path / "record.json", budget_s=160, device="cpu"), ())
    kinds = {"g": ("generation", 90.0), "p": ("product", 5.0)}
    wanted = [("p1", 1.0), ("g1", 70.0), ("p2", 2.0), ("g2", 70.0), ("p3", 2.0), ("g3", 1.0), ("p4", 6.0), ("p5", 6.0)]
    seen = []
    for what, (_, taken) in record.affordable([(n, (n, t)) for n, t in wanted], lambda case: kinds[case[0][0]]):
        seen.append(what)
        now += taken
    assert seen == ["p1", "g1", "p2", "g2", "p3", "p4", "p5"]
    # Of which none has been measured, 90 s are not left.
    late = record.affordable([("g", ("g", 0.0)), ("p", ("p", 0.0))], lambda case: kinds[case[0][0]])
    assert [what for what, _ in late] == []
    assert [row["what"] for row in record.body["not_run"]] == ["g3", "g", "p"]


def test_fused_linears_hold_the_same_weights() -> None:
    for sizes in (LLAMA_8B, LLAMA_70B):
        assert sum(map(math.prod, sizes.fused().values())) == sum(map(math.prod, sizes.linears.values()))
    assert LAYERS["8b qkv"] == (6144, 4096)
    assert LAYERS["70b down"] == (8192, 28672)
    assert SHARDS["70b/8 qkv"] == (1280, 8192)
    assert sum(map(math.prod, SHARDS.values())) * 8 == sum(map(math.prod, LLAMA_70B.linears.values()))


def test_bounds_are_of_memory_or_of_arithmetic() -> None:
    ceilings = {"bytes_per_s": 1e9, "dense_flops": 1e12}
    entries: dict[str, dict[str, Any]] = {"dense": {"bytes": 2 * 1000 * 500}, "cusparselt": {"bytes": 562_500}}
    add_bound(entries, (1000, 500), 1, ceilings)
    # 1,500 values of two bytes besides the weight.
    assert entries["dense"]["bound_us"] == pytest.approx(1000 + 3)
    assert entries["cusparselt"]["bound_us"] == pytest.approx(562.5 + 3)
    add_bound(entries, (1000, 500), 1000, {**ceilings, "bytes_per_s": 1e15})
    assert entries["dense"]["bound_us"] == pytest.approx(1000)
    assert entries["cusparselt"]["bound_us"] == pytest.approx(500)


def report_options(out: Path, *arguments: str) -> argparse.Namespace:
    out.mkdir(exist_ok=True)
    return gpu_report.parse(["--out", str(out), "--device", "cpu", "--tiny", "--rounds", "2", *arguments])


def test_every_linear_of_the_report_is_measured_at_every_number_of_tokens(tmp_path: Path) -> None:
    options = gpu_report.parse(["--out", str(tmp_path)])
    assert options.budget_s < 900
    found = cases(options)
    assert len({case.what for case in found}) == len(found)
    products = [case for case in found if isinstance(case, Product)]
    shapes = {case.shape for case in products}
    assert shapes == {*LLAMA_8B.fused().values(), *LLAMA_8B.linears.values()}
    for pattern in ("2:4", "0.5"):
        for tokens in (1, 2, 4, 8, 16, 32, 64, 512, 1024, 2048, 4096, 8192):
            assert {case.shape for case in products if (case.pattern, case.tokens) == (pattern, tokens)} == shapes
    assert any(isinstance(case, Generation) for case in found)
    # Few minutes are enough for what matters most.
    early = found[: len(found) // 4]
    assert {("2:4", 1), ("2:4", 8), ("0.5", 1)} <= {(c.pattern, c.tokens) for c in early if isinstance(c, Product)}
    other = cases(gpu_report.parse(["--out", str(tmp_path), "--size", "70b", "--patterns", "2:4"]))
    assert {case.shape for case in other if isinstance(case, Product)} >= set(LLAMA_70B.fused().values())
    assert not any(isinstance(case, Generation) for case in other)


def test_the_report_is_measured_without_a_gpu(tmp_path: Path) -> None:
    options = report_options(tmp_path, "--patterns", "2:4", "0.5")
    with Report(options) as report:
        measure(report, cases(options))
    # The kernels of GPUs were not measured here.
    assert report.status == NOT_RUN
    records = read([tmp_path / RECORDS])
    assert len(records.of("run")) == len(records.of("end")) == 1
    products = [case for case in cases(options) if isinstance(case, Product)]
    assert len(records.of("kernel")) == len(products) > 0
    for record, case in zip(records.of("kernel"), products, strict=True):
        assert (record["artifact"], record["tokens"], tuple(record["shape"])) == (case.pattern, case.tokens, case.shape)
        assert len(record["kernels"]) >= 2
        assert all(times["roof_us"] > 0 for times in record["kernels"].values())
    latencies = records.of("latency")
    assert [record["artifact"] for record in latencies] == [
        "dense beside 2:4", "2:4 packed", "dense beside 0.5", "0.5 packed"
    ]  # fmt: skip
    assert len(pairs(records)) == 2
    for record in latencies:
        dense = record["baseline"] is None
        assert record["artifact"].startswith("dense") == dense
        assert set(record["engaged"].values()) == {"dense" if dense else "packed"}
        assert len(record["engaged"]) == 4 * 2
        assert len(record["rounds"]) == (4 if dense else 2)
    assert {record["what"] for record in records.of("missing")} == {
        "kernel triton", "kernel cusparselt", "kernel cutlass"
    }  # fmt: skip
    # The same again has nothing left to measure.
    with Report(options) as again:
        measure(again, cases(options))
    more = read([tmp_path / RECORDS])
    assert len(more.of("run")) == 2
    assert len(more.of("kernel")) == len(products)
    assert len(more.of("latency")) == len(latencies)


def test_what_took_the_process_down_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = report_options(tmp_path, "--patterns", "2:4")
    wanted = [case for case in cases(options) if isinstance(case, Product)][:3]
    measured = gpu_records._measure_product
    victim = wanted[1]

    def dies(report: Report, case: Product) -> None:
        if case == victim:
            raise RuntimeError("an illegal memory access was encountered")
        measured(report, case)

    monkeypatch.setattr(gpu_records, "_measure_product", dies)
    with pytest.raises(RuntimeError, match="illegal"), Report(options) as report:
        measure(report, wanted)
    assert gpu_records.last_begun(tmp_path) == victim.what
    with Report(options) as report:
        measure(report, wanted)
    assert report.status == WRONG
    assert not (tmp_path / BEGUN).exists()
    records = read([tmp_path / RECORDS])
    assert [record["tokens"] for record in records.of("kernel")] == [wanted[0].tokens, wanted[2].tokens]
    (failed,) = (record for record in records.of("missing") if record["failed"])
    assert failed["what"] == victim.what
    assert failed["why"] == "RuntimeError: an illegal memory access was encountered"
    assert [record["failed"] for record in records.of("end")] == [1, 1]
    assert len(records.of("run")) == 2


def test_what_a_process_was_at_that_could_not_say_so(tmp_path: Path) -> None:
    options = report_options(tmp_path)
    (victim, after) = [case for case in cases(options) if isinstance(case, Product)][:2]
    (tmp_path / BEGUN).write_text(victim.what)
    with Report(options) as report:
        measure(report, [victim, after])
    assert report.status == WRONG
    records = read([tmp_path / RECORDS])
    (failed,) = (record for record in records.of("missing") if record["failed"])
    assert (failed["what"], failed["why"]) == (victim.what, "the process that measured it did not come back")
    assert [record["linear"] for record in records.of("kernel")] == [after.linear]


# Imported by every process that PYTHONPATH shows it to.
RAISES = """
import sys

class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == "gpu_report.generation":
            report = sys.modules["gpu_report.report"]
            measured = report._measure_product

            def fails(one, case):
                if (case.tokens, case.linear) == (4, "o"):
                    raise ValueError("min() of nothing")
                measured(one, case)

            report._measure_product = fails

sys.meta_path.insert(0, Hook())
"""


def test_an_error_of_any_kind_leaves_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(RAISES)
    monkeypatch.setenv("PYTHONPATH", str(hook))
    options = report_options(tmp_path / "out", "--patterns", "2:4", "--no-render")
    assert gpu_report.run(options) == WRONG
    records = read([options.out / RECORDS])
    assert len(records.of("run")) == len(records.of("end")) == 2
    (failed,) = (record for record in records.of("missing") if record["failed"])
    (victim,) = (
        case for case in cases(options) if isinstance(case, Product) and (case.tokens, case.linear) == (4, "o")
    )
    assert (failed["what"], failed["why"]) == (victim.what, "ValueError: min() of nothing")
    measured = {(record["tokens"], record["linear"]) for record in records.of("kernel")}
    products = {(case.tokens, case.linear) for case in cases(options) if isinstance(case, Product)}
    assert products - measured == {(4, "o")}
    assert len(records.of("latency")) == 2


def test_a_variant_that_fails_does_not_cost_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["right", "unprepared", "raises", "wrong", "late", "refuses"]
    built = 0

    def prepared(name: str, packed: Packed, device: str) -> Any:
        nonlocal built
        built += 1
        weight = decode(packed)

        def run(x: torch.Tensor) -> torch.Tensor:
            if name == "raises":
                raise OSError("no compiler")
            factor = 1.1 if name == "wrong" or (name == "late" and x.shape[1] == 1) else 1.0
            return factor * functional.linear(x, weight)

        if name == "unprepared":
            raise ValueError("no form")
        return "takes no such weight" if name == "refuses" else (weight.nbytes, run)

    options = report_options(tmp_path, "--patterns", "2:4")
    (case,) = (case for case in cases(options) if isinstance(case, Generation))
    other = Generation(case.pattern, 1, 4, 2)
    monkeypatch.setattr(generation, "prepared", prepared)
    monkeypatch.setattr(generation, "_variants", lambda device: names)
    with Report(options) as report:
        measure(report, [case, other])
    records = read([tmp_path / RECORDS])
    assert [record["artifact"] for record in records.of("latency")] == ["dense beside 2:4", "2:4 right"] * 2
    missing = {record["what"]: record["why"] for record in records.of("missing") if record["failed"]}
    assert missing["model, 2:4: unprepared"] == "ValueError: no form"
    assert missing.keys() == {"model, 2:4: unprepared"} | {
        f"{one.what}: {name}" for one in (case, other) for name in ("raises", "wrong", "late")
    }
    assert missing[f"{case.what}: raises"] == "OSError: no compiler"
    assert missing[f"{case.what}: wrong"].startswith("logits of the prompt differ")
    assert missing[f"{case.what}: late"].startswith("logits of a further token differ")
    (refused,) = (record for record in records.of("missing") if record["what"] == "model, 2:4: refuses")
    assert (refused["why"], refused["failed"]) == ("takes no such weight", False)
    # Once for all scenarios; those that cannot be had are asked for once.
    assert built == 4 * 2 * 4 + 2


def test_what_runs_as_a_dense_product_is_named_so() -> None:
    for batch, prompt, name in ((1, 64, "triton"), (1, 65, "triton+dense"), (2, 64, "triton+dense")):
        assert generation.engaged("triton", Generation("0.5", batch, prompt, 3)) == name
        assert generation.engaged("cusparselt", Generation("2:4", batch, prompt, 3)) == "cusparselt"


def test_each_shape_is_searched_for_once_before_its_first_product(tmp_path: Path) -> None:
    found = cases(gpu_report.parse(["--out", str(tmp_path)]))
    order = list(searches(found, LLAMA_8B))
    assert [case for case in order if not isinstance(case, Search)] == found
    asked = {case.shape: order.index(case) for case in order if isinstance(case, Search)}
    assert len(asked) == len(order) - len(found)
    for case in found:
        if isinstance(case, Product) and case.pattern == "2:4":
            search = order[asked[case.shape]]
            assert order.index(case) > asked[case.shape]
            assert isinstance(search, Search)
            assert case.tokens in search.tokens
    assert list(searches([case for case in found if case.pattern != "2:4"], LLAMA_8B)) == [
        case for case in found if case.pattern != "2:4"
    ]


def test_a_search_ends_when_its_time_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered: list[int] = []
    now = time.monotonic()

    def search(problems: Any, device: Any, timeout_s: float, told: Any) -> None:
        nonlocal now
        for problem in problems:
            answered.append(problem.tokens)
            now += 40
            told(problem, {"failed": "no answer"} if problem.tokens == 8 else {})

    report_ = Report(report_options(tmp_path, "--budget-s", "1000"))
    with report_ as report:
        monkeypatch.setattr("time.monotonic", lambda: now)
        monkeypatch.setattr(gpu_records, "search", search)
        gpu_records._search(report, Search((64, 64), (1, 8, 64, 2048, 512)))
        # Numbers of tokens are padded.
        assert answered == [8, 64]
        monkeypatch.setattr(gpu_records, "search", lambda *given: 1 / 0)
        gpu_records._search(report, Search((128, 64), (1,)))
    missing = {record["what"]: record["failed"] for record in read([tmp_path / RECORDS]).of("missing")}
    assert {what: failed for what, failed in missing.items() if what.startswith("search")} == {
        "search bfloat16 64x64 8": True, "search 64x64: rest": False, "search 128x64": True,
    }  # fmt: skip


def test_ceilings_of_a_gpu_are_not_those_of_a_glance(tmp_path: Path) -> None:
    assert gpu_records._ceiling_sizes(gpu_report.parse(["--out", str(tmp_path)])) == {
        "quick": False, "n_bytes": 4 << 30
    }  # fmt: skip
    assert gpu_records._ceiling_sizes(gpu_report.parse(["--out", str(tmp_path), "--device", "cpu"])) == {"quick": True}


def test_packages_are_looked_for_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = report_options(tmp_path)
    assert gpu_report.run(options) == NOT_RUN
    told = capsys.readouterr().out
    assert "cannot import matplotlib" in told
    assert "--pack --out DIR" in told
    assert list(tmp_path.iterdir()) == []
    assert gpu_report.unimportable(render=False) is None
    packed = {requirement.partition("==")[0] for requirement in REPORTING}
    assert {"jsonschema", "rpds-py", "jinja2", "matplotlib", "safetensors"} <= packed
    # And what they need, which pip is not asked for.
    for name in packed:
        for text in importlib.metadata.requires(name) or ():
            asked = Requirement(text)
            if asked.marker is None or asked.marker.evaluate({"python_version": "3.12", "extra": ""}):
                assert canonicalize_name(asked.name) in packed | {"numpy"}, name


def test_what_the_budget_was_not_enough_for_is_one_record(tmp_path: Path) -> None:
    options = report_options(tmp_path, "--budget-s", "1")
    with Report(options) as report:
        measure(report, cases(options))
    assert report.status == NOT_RUN
    records = read([tmp_path / RECORDS])
    assert records.of("kernel") == []
    (spent,) = (record for record in records.of("missing") if not record["what"].startswith("kernel "))
    assert spent["what"].startswith(f"{len(cases(options))} cases, from ")
    assert "give the same command again" in spent["why"]


def test_the_report_is_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    statuses: list[int] = []
    begun = tmp_path / BEGUN

    def started(command: list[str], **options: Any) -> argparse.Namespace:
        ran.append(command)
        status = statuses.pop(0)
        if status in (0, NOT_RUN, WRONG):
            begun.unlink(missing_ok=True)
        elif case:
            begun.write_text(case)
        return argparse.Namespace(returncode=status)

    monkeypatch.setattr("subprocess.run", started)
    for first, last in ((0, 0), (NOT_RUN, NOT_RUN), (WRONG, WRONG)):
        ran.clear()
        statuses[:] = [-11, first]
        case = "a case"
        assert gpu_report.run(report_options(tmp_path, "--no-render")) == last
        assert len(ran) == 2
        assert gpu_report.parse(ran[0][2:]).measure
    # One that cannot even start is not started again; nor where the one before it left something behind.
    case = ""
    statuses[:] = [-11]
    assert gpu_report.run(report_options(tmp_path, "--no-render")) == WRONG
    case = "a case"
    statuses[:] = [4, 4]
    assert gpu_report.run(report_options(tmp_path, "--no-render")) == WRONG
    assert statuses == []


class Wrong(TorchSession):
    """Attends to padding, and generates the second best token once."""

    def logits(self, ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        return super().logits(ids)

    def generate(self, ids: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        made = super().generate(ids, n)
        made[1, n // 2] = super().logits(np.concatenate([ids, made[:, : n // 2]], axis=1))[1, -1].argsort()[-2]
        return made


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make("llama", tmp_path_factory)


def test_comparison_tells_right_from_wrong(llama: tuple[Path, Path]) -> None:
    wanted = references(llama[0], "float32", "cpu")
    assert wanted.tokens.shape == (3, NEW)
    with TorchSession(llama[0]) as right, Wrong(llama[0]) as wrong:
        assert [row["ok"] for row in check_session("right", right, wanted)] == [True] * 4
        rows = {row["case"]: row for row in check_session("wrong", wrong, wanted)}
    assert [row["ok"] for row in rows.values()] == [True, False, True, False]
    assert "allowed is" in rows["wrong, left padding"]["why"]
    assert "below the best" in rows["wrong, generation"]["why"]
    nan = FakeSession(lambda ids: np.full((*ids.shape, VOCAB), np.nan, dtype=np.float32))
    failed = list(check_session("nan", nan, wanted, CASES[:1]))
    assert [row["ok"] for row in failed] == [False, False]
    assert "AssertionError" in failed[1]["why"]


def test_a_session_that_fails_does_not_stop_the_others(llama: tuple[Path, Path]) -> None:
    arguments = {
        "lengths": [4], "batches": [1, 2], "new_tokens": 6, "repeats": 2, "sizes": {"vocabulary": VOCAB},
    }  # fmt: skip
    with TorchSession(llama[0]) as works:
        fails = FakeSession(lambda ids: np.zeros((*ids.shape, VOCAB), dtype=np.float32))
        rows = list(time_sessions({"fails": fails, "works": works}, arguments))
    assert [row["ok"] for row in rows if "ok" in row] == [False] * 3
    timed = [row for row in rows if "timed" in row]
    assert [(row["timed"], row["batch"], row["session"]) for row in timed] == [
        ("prefill", 1, "works"),
        ("decode", 1, "works"),
        ("decode", 2, "works"),
    ]
    assert all(len(row["first_token_s"]) == 2 for row in timed)


def test_engines_are_checked_and_timed(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trt_double, "MEMORY", None)
    folder = tmp_path / "fp32/standard"
    build(folder, llama[1], EngineOptions(batch=3, prompt=24, total=64))
    shutil.copy(folder / "model.engine", folder / "dense.engine")
    write_header(folder / "dense.engine", read_header(folder / "model.engine"))
    shutil.copytree(llama[0], tmp_path / "model/plain")
    double = functools.partial(tensorrt_session.TensorRtSession, device="cpu", api=TensorRt(trt_double, "tensorrt"))
    monkeypatch.setattr(tensorrt_session, "TensorRtSession", double)
    arguments: dict[str, Any] = {
        "root": str(tmp_path), "precision": "fp32", "device": "cpu", "lengths": [8, 16], "batches": [1, 2],
        "new_tokens": 16, "repeats": 1, "sizes": {"vocabulary": VOCAB},
    }  # fmt: skip
    rows = list(TASKS["engine"](arguments))
    json.dumps(rows)
    checked = [row for row in rows if "ok" in row]
    assert len(checked) == 4 * 4
    assert all(row["ok"] for row in checked), [row["why"] for row in checked]
    sessions = {row["session"] for row in rows if "open_s" in row}
    assert sessions == {f"{kind}, {way}" for kind in ("sparse", "dense") for way in ("CUDA graphs", "growing cache")}
    timed = [row for row in rows if "timed" in row]
    assert len(timed) == 4 * (2 + 2)
    assert sum("engaged" in row for row in rows) == 2
    (folder / "dense.engine").unlink()
    rows = list(TASKS["engine"](arguments))
    assert [row["ok"] for row in rows if str(row.get("case", "")).startswith("dense")] == [False, False]
    assert len([row for row in rows if "timed" in row]) == 2 * (2 + 2)


def test_an_artifacts_engine_is_timed_against_its_twin(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trt_double, "MEMORY", None)
    folder = tmp_path / "artifact"
    build(folder, llama[1], EngineOptions(batch=2, prompt=8, total=32))
    double = functools.partial(tensorrt_session.TensorRtSession, device="cpu", api=TensorRt(trt_double, "tensorrt"))
    monkeypatch.setattr(tensorrt_session, "TensorRtSession", double)
    options = parse(["twin", "--artifact", str(folder), "--out", str(tmp_path / "twin.json"), "--repeats", "1"])
    options.device = "cpu"
    assert options.run(options) == NOT_RUN
    assert "dense.engine" in json.loads((tmp_path / "twin.json").read_text())["not_run"][0]["why"]
    shutil.copy(folder / "model.engine", folder / "dense.engine")
    write_header(folder / "dense.engine", read_header(folder / "model.engine"))
    status = options.run(options)
    body = json.loads((tmp_path / "twin.json").read_text())
    assert body["failed"] == []
    # Decoding two tokens takes microseconds here, and noise may exceed it; that is said.
    assert status == (NOT_RUN if body["not_run"] else 0)
    timed = [row for row in body["rows"] if "timed" in row]
    assert {(row["timed"], row["batch"], row["length"]) for row in timed} == {
        ("prefill", 1, 8), ("decode", 1, 8), ("decode", 2, 8),
    }  # fmt: skip
    assert all(row.get("new_tokens", 23) == 23 for row in timed)
    assert "prefill, batch 1, 8 tokens: sparse" in capsys.readouterr().out
