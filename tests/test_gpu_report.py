"""The hardware report without a GPU: what is measured, in which order, and what a process that ends early costs."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_machine.llama import LLAMA_8B, LLAMA_70B
from gpu_machine.record import NOT_RUN, WRONG
from gpu_machine.wheels import REPORTING
from gpu_report import __main__ as gpu_report
from gpu_report import generation, measuring
from gpu_report import report as gpu_records
from gpu_report.cases import Generation, Product, Search, cases, searches
from gpu_report.measuring import measure
from gpu_report.report import BEGUN, RECORDS, Report
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch.nn import functional

from sparsify.bench.records import read
from sparsify.format.packed import Packed, decode
from sparsify.report.pairs import pairs


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
    measured = measuring._measure_product
    victim = wanted[1]

    def dies(report: Report, case: Product) -> None:
        if case == victim:
            raise RuntimeError("an illegal memory access was encountered")
        measured(report, case)

    monkeypatch.setattr(measuring, "_measure_product", dies)
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
from importlib.machinery import PathFinder

class Hook:
    def find_spec(self, name, path=None, target=None):
        if name != "gpu_report.measuring":
            return None
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            measured = module._measure_product

            def fails(report, case):
                if (case.tokens, case.linear) == (4, "o"):
                    raise ValueError("min() of nothing")
                measured(report, case)

            module._measure_product = fails

        spec.loader.exec_module = exec_module
        return spec

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
    for batch, prompt, name in ((1, 64, "triton"), (1, 65, "triton+expanded:65-"), (2, 64, "triton+expanded:65-")):
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
        monkeypatch.setattr(measuring, "search", search)
        measuring._search(report, Search((64, 64), (1, 8, 64, 2048, 512)))
        # Numbers of tokens are padded.
        assert answered == [8, 64]
        monkeypatch.setattr(measuring, "search", lambda *given: 1 / 0)
        measuring._search(report, Search((128, 64), (1,)))
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
