"""Records of kernels: which weights are measured, in which ways, beside which roof. Nothing here depends on speed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement_kernels import compared
from torch.utils.benchmark import Timer

from sparsify import manifest
from sparsify.bench import product_times
from sparsify.bench.kernel_times import kernel_records
from sparsify.bench.product_times import DENSE, LOOP, Products, measure
from sparsify.bench.records import check
from sparsify.errors import UsageError, VerificationError
from sparsify.format.packed import Packed, decode, encode, quantise
from sparsify.kernels import dispatch, native, tuning_gpu
from sparsify.kernels.dispatch import NATIVE, Choice
from sparsify.kernels.packed_reference import PACKED
from sparsify.pipeline import export
from sparsify.prune import prune
from sparsify.recipe import Recipe
from sparsify.roofline.devices import Device
from sparsify.source import Source
from sparsify.targets import Options
from sparsify.types import NofM
from tests.checkpoints import Folders, make_folders
from tests.fakes import Notices

SMALL = 1 << 14
SLICES = "native, expanded"
DEVICE = Device("cpu", "cpu", 1e10, {"bfloat16": 1e11, "float32": 1e11}, {}, 0, "made up", kind="cpu")
needs_native = pytest.mark.skipif(
    NATIVE.absent(torch.device("cpu")) is not None, reason=native.missing() or "this processor has no AVX-512 VBMI2"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, ids_file: str) -> Folders:
    return make_folders(tmp_path_factory.mktemp("folders"), ids_file)


def checked(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """``found``, each as it would be written."""
    rows = list(found)
    head = {
        "format": 1, "record": "kernel", "run": "0" * 16, "time": "now", "artifact": "it", "linear": "one",
        "linears": 1, "shape": [1, 1], "pattern": "2:4",
    }  # fmt: skip
    for row in rows:
        check(json.loads(json.dumps({**head, **row}, allow_nan=False)), "a record")
    return rows


TWO_OF_FOUR = NofM(2, 4)


def weight(shape: tuple[int, int] = (48, 64), pattern: NofM | None = TWO_OF_FOUR) -> Packed:
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    dense.view(-1, 4)[:, :2] = 0
    return encode(dense, pattern)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("pattern", ["2:4", "0.5", "permuted"])
def test_every_shape_of_a_model_is_measured_once(folders: Folders, pattern: str, which: int) -> None:
    folder = folders("llama", pattern)[which]
    told = Notices()
    ceilings = [DEVICE.to_record()]
    rows = checked(kernel_records(folder, tokens=(1, 5), rounds=2, ceilings=ceilings, progress=told, n_bytes=SMALL))
    assert not told.texts
    assert told.done == told.total == len(rows)
    linears = manifest.read(folder)["linears"]
    shapes = [tuple(row["shape"]) for row in rows]
    assert set(shapes) == {tuple(row["shape"]) for row in linears}
    assert len(shapes) == 2 * len(set(shapes))
    assert sum(row["linears"] for row in rows) == 2 * len(linears)
    # A permuted weight is 2:4 only in the order in which the compressed checkpoint stores it.
    kept = pattern if pattern != "permuted" else "2:4" if which else "unstructured"
    for row in rows:
        assert row["pattern"] == kept
        assert row["density"] == pytest.approx(0.5, abs=0.05)
        assert (row["device"], row["dtype"], row["graphs"]) == ("cpu", "bfloat16", False)
        assert row["threads"] == torch.get_num_threads()
        assert all(len(times["samples_us"]) == 2 for times in row["kernels"].values())
        # Of a few kilobytes, which no copies make more than a cache holds.
        assert row["cold"] is False


@needs_native
def test_values_in_8_bits_are_measured_as_they_are_stored(folders: Folders, tmp_path: Path) -> None:
    plain, _ = folders("llama", "2:4")
    folder = tmp_path / "int8"
    export(plain, "vllm", folder, options=Options(precision="int8"))
    rows = checked(kernel_records(folder, tokens=(1,), rounds=1, ceilings=[DEVICE.to_record()], n_bytes=SMALL))
    assert rows
    for row in rows:
        n_out, n_in = row["shape"]
        moved = 2 * n_in + 2 * n_out
        roofs = {name: times["roof_us"] * DEVICE.bytes_per_s / 1e6 - moved for name, times in row["kernels"].items()}
        assert roofs[DENSE] == pytest.approx(2 * n_out * n_in)
        # Half the values, a bit a weight, a scale in float32 a row.
        assert roofs["native"] == pytest.approx(n_out * (n_in / 2 + n_in / 8 + 4))


@needs_native
def test_ways_on_a_cpu() -> None:
    few, many = checked(measure(weight(), (1, 64), 3, DEVICE, n_bytes=SMALL))
    own = {LOOP} if "bf16" in native.features() else set()
    assert few["kernels"].keys() == {DENSE, "native"} | own
    # Our loop goes row by row and is for few tokens.
    plan = dispatch.choose(weight(), "native").plan
    assert many["kernels"].keys() == {DENSE, SLICES if native.way_for(plan, 64) == native.SLICES else "native"}
    assert {few["best_dense"], many["best_dense"]} <= {DENSE, LOOP}
    dense, sparse = few["kernels"][DENSE], few["kernels"]["native"]
    assert dense["median_us"] == sorted(dense["samples_us"])[1]
    assert dense["limited_by"] == "bandwidth"
    assert dense["roof_us"] == pytest.approx((2 * 48 * 64 + 2 * (48 + 64)) / 1e10 * 1e6)
    assert sparse["roof_us"] == pytest.approx((9 / 16 * 2 * 48 * 64 + 2 * (48 + 64)) / 1e10 * 1e6)
    assert many["kernels"][DENSE]["roof_us"] == pytest.approx(2 * 64 * 48 * 64 / 1e11 * 1e6)
    assert many["kernels"][DENSE]["limited_by"] == "compute"


def test_the_best_dense_way_is_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    for slower, best in ((DENSE, LOOP), (LOOP, DENSE)):
        monkeypatch.setattr(
            product_times, "_samples",
            lambda *given, slower=slower, **options: {name: [2.0 if name == slower else 1.0] for name in (DENSE, LOOP)},
        )  # fmt: skip
        (row,) = measure(weight(), (1,), 1)
        assert row["best_dense"] == best


@needs_native
@pytest.mark.parametrize(
    ("plan", "runs"), [("", (DENSE, DENSE)), ("slices", (SLICES, SLICES)), ("slices<=4,dense", (SLICES, DENSE))]
)
def test_what_auto_runs_is_said_for_each_number_of_tokens(
    monkeypatch: pytest.MonkeyPatch, plan: str, runs: tuple[str, str]
) -> None:
    made = Choice(native.native(plan), plan=plan) if plan else Choice(None, "not measured")

    def chosen(packed: Packed, requested: str, x_dtype: torch.dtype | None = None) -> Choice:
        return made if requested == "auto" else dispatch.choose(packed, requested, x_dtype)

    monkeypatch.setattr(product_times, "choose", chosen)
    rows = checked(measure(weight(), (4, 5), 1, n_bytes=SMALL))
    assert tuple(row["auto"] for row in rows) == runs
    assert all(row["kernels"][DENSE]["roof_us"] is None for row in rows)


def test_the_reference_is_measured_where_nothing_else_takes_a_weight() -> None:
    (row,) = checked(measure(weight().to(torch.float16), (2,), 1, DEVICE, n_bytes=SMALL))
    assert row["kernels"].keys() == {DENSE, "packed"}
    assert row["auto"] == DENSE
    # No ceiling is known for the type.
    assert row["kernels"]["packed"]["roof_us"] is None


def test_a_wrong_or_failing_kernel_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> torch.Tensor:
        raise RuntimeError("it\nbroke")

    wrong = replace(PACKED, name="wrong", linear=lambda *arguments: 1.1 * PACKED.linear(*arguments))
    nan = replace(PACKED, name="nan", linear=lambda *arguments: math.nan * PACKED.linear(*arguments))
    kernels = {"packed": PACKED, "wrong": wrong, "nan": nan, "broken": replace(PACKED, name="broken", linear=fails)}
    monkeypatch.setattr(product_times, "_kernels", lambda packed: kernels)
    told: list[str] = []
    (row,) = checked(measure(weight(pattern=None).to(torch.float32), (3,), 1, told=told.append, n_bytes=SMALL))
    assert row["kernels"].keys() == {DENSE, "packed"}
    assert told[0] == "wrong, 3 tokens: differs from the dense product by 0.100"
    assert told[1] == "nan, 3 tokens: differs from the dense product by nan"
    assert told[2] == "broken, 3 tokens: RuntimeError: it broke"


def test_on_a_gpu_graphs_of_calls_with_every_copy_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[int]] = {"dense torch": [], "other": []}

    def call(name: str, i: int) -> torch.Tensor:
        asked[name].append(i)
        return torch.ones(2, 3)

    monkeypatch.setattr(product_times, "captured", lambda run: (run, run()))
    monkeypatch.setattr(product_times, "replayed_us", lambda graphs, rounds: {name: [60.0] * rounds for name in graphs})
    run = {name: partial(call, name) for name in asked}
    for n, calls in ((6, 6), (3, 4), (1, 4)):
        samples = product_times._samples(run, torch.ones(2, 5), n, 3, print, on_gpu=True)
        assert samples == {name: [60 / calls] * 3 for name in asked}
        for found in asked.values():
            assert found[-calls:] == [i % n for i in range(calls)]


def test_a_kernel_without_a_launch_keeps_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def searched(kernel: Any, state: Any, x: torch.Tensor) -> None:
        raise RuntimeError("no configuration ran")

    monkeypatch.setattr(tuning_gpu, "search_launch", searched)
    told: list[str] = []
    products = Products(weight().to(torch.float16), SMALL)
    products.search(torch.ones(3, 64), told.append)
    assert told == ["packed, 3 tokens: RuntimeError: no configuration ran"]


def test_an_error_of_any_kind_costs_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> Any:
        raise ValueError("min() of nothing")

    monkeypatch.setattr(tuning_gpu, "search_launch", fails)
    kernels = {"packed": PACKED, "formless": replace(PACKED, name="formless", prepare=fails)}
    monkeypatch.setattr(product_times, "_kernels", lambda packed: kernels)
    told: list[str] = []
    products = Products(weight().to(torch.float16), SMALL, told.append)
    products.search(torch.ones(3, 64), told.append)
    assert products.calls(torch.ones(3, 64).half()).keys() == {DENSE, "packed"}
    assert told == [
        "formless, its form of the weight: ValueError: min() of nothing",
        "packed, 3 tokens: ValueError: min() of nothing",
    ]


def test_without_a_dense_product_there_is_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> torch.Tensor:
        raise ValueError("no memory")

    monkeypatch.setattr(product_times, "linear", fails)
    told: list[str] = []
    assert list(measure(weight(), (2,), 1, told=told.append, n_bytes=SMALL)) == []
    assert told == ["dense torch, 2 tokens: ValueError: no memory"]


def test_a_kernel_that_expands_is_named_so(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = replace(PACKED, name="triton", densely="+expanded:65-")
    monkeypatch.setattr(product_times, "_kernels", lambda packed: {"triton": kernel})
    monkeypatch.setattr(product_times, "choose", lambda *given: Choice(kernel))
    few, many = checked(measure(weight(), (64, 65), 1, DEVICE, n_bytes=SMALL))
    assert (few["auto"], many["auto"]) == ("triton", "triton, expanded")
    assert few["kernels"].keys() - {LOOP} == {DENSE, "triton"}
    assert many["kernels"].keys() == {DENSE, "triton, expanded"}
    assert many["kernels"]["triton, expanded"]["roof_us"] > 0


@pytest.mark.skipif(not hasattr(torch.backends.cuda, "preferred_blas_library"), reason="not in this torch")
def test_the_second_library_is_chosen_for_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ["cublas"]

    def library(name: str | None = None) -> str:
        if name is not None:
            chosen.append(name)
        return chosen[-1]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", library)
    x, dense = torch.randn(2, 8), torch.randn(3, 8)
    assert torch.equal(product_times._cublaslt(x, dense), torch.nn.functional.linear(x, dense))
    with pytest.raises(RuntimeError):
        product_times._cublaslt(x, dense.T)
    assert chosen == ["cublas", "cublaslt", "cublas", "cublaslt", "cublas"]


def test_a_weight_of_zeros_is_measured() -> None:
    told: list[str] = []
    (row,) = checked(measure(encode(torch.zeros(16, 32), TWO_OF_FOUR), (2,), 1, told=told.append, n_bytes=SMALL))
    assert not told
    assert len(row["kernels"]) == 2


def test_weights_are_in_memory_more_often_than_a_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = 1 << 20
    monkeypatch.setattr(product_times, "last_level_cache_bytes", lambda: cache)
    packed = quantise(weight((256, 512), None))
    products = Products(packed)
    assert products.cold
    forms = products._forms
    assert all(len(form.copies) == products.n_copies for form in forms.values())
    smallest = min(form.n_bytes for form in forms.values())
    assert cache < products.n_copies * smallest <= 1.25 * cache + smallest
    tensors = [tensor for form in forms.values() for copy in form.copies for tensor in copy.values()]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    assert all(torch.equal(copy["dense"], decode(packed)) for copy in forms[DENSE].copies)
    assert not Products(packed, 1).cold


def test_what_has_no_sparse_kernel_is_refused(folders: Folders, tmp_path: Path) -> None:
    plain, packed = folders("llama", "2:4")
    with pytest.raises(VerificationError, match=r"has no sparsify\.json"):
        next(kernel_records(plain.parent / "dense"))
    body = manifest.read(packed)
    other = tmp_path / "other"
    other.mkdir()
    manifest.write(other, {**body, "kind": "onnx"})
    with pytest.raises(UsageError, match="is for onnx, whose kernels are its own"):
        next(kernel_records(other))
    rows = [{**row, "zeros": 0} for row in body["linears"]]
    manifest.write(other, {**body, "linears": rows, "coverage": {**body["coverage"], "zeros": 0}})
    with pytest.raises(UsageError, match="has no pruned linears"):
        next(kernel_records(other))


def test_few_zeros_are_not_packed(folders: Folders, random_models: Any, tmp_path: Path) -> None:
    folder = prune(
        Source("llama", random_models("llama"), "folder"), Recipe("0.1", "magnitude"), tmp_path / "sparse"
    )  # fmt: skip
    told = Notices()
    assert list(kernel_records(folder, tokens=(1, 2), progress=told)) == []
    assert told.done == told.total > 0
    assert "too few zeros to be packed" in told.texts[0]


def test_experts_are_measured_too(folders: Folders) -> None:
    plain, packed = folders("mixtral", "2:4")
    for folder in (plain, packed):
        rows = checked(kernel_records(folder, tokens=(1,), rounds=1, n_bytes=SMALL))
        assert sum(row["linears"] for row in rows) == len(manifest.read(folder)["linears"])


def test_every_copy_is_multiplied_by() -> None:
    """What benchmarks/agreement_kernels.py hands to an independent timer."""
    packed = weight()
    products = Products(packed, SMALL)
    x = torch.randn(2, 64).bfloat16()
    calls = products.calls(x)
    assert len(calls) > 1
    assert products.n_copies > 1
    wanted = torch.nn.functional.linear(x, decode(packed))
    for name, call in calls.items():
        for i in range(products.n_copies):
            torch.testing.assert_close(call(i), wanted, rtol=0.02, atol=0.02, msg=name)
        with pytest.raises(IndexError):
            call(products.n_copies)
        assert Timer("call(0)", globals={"call": call}).timeit(3).median > 0


def test_the_comparison_with_an_independent_timer_has_every_way() -> None:
    rows = compared((32, 64), 2, 6, SMALL)
    assert {row["way"] for row in rows} == Products(weight(), SMALL).calls(torch.randn(2, 64).bfloat16()).keys()
    for row in rows:
        assert len(row["ratios"]) == row["ours_us"]["n"] == row["torch_us"]["n"] == 6
        low, high = row["ratio_interval"]
        assert low <= row["ratio"]["median"] <= high
