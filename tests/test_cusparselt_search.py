"""The search for cuSPARSELt's algorithms with stand-ins for GPU and library: its child, its cache, its use; and fp8."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear

from sparsify.format.packed import decode, encode
from sparsify.kernels import cusparselt_search, semi_structured
from sparsify.kernels.cusparselt_search import DEFAULT, Algorithm, Problem, algorithm, measure, search, trouble
from sparsify.kernels.kernel import gathered
from sparsify.kernels.semi_structured import CUSPARSELT_FP8, FP8, to_fp8
from sparsify.types import NofM

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PROBLEMS = [Problem(64, 128, tokens, "bfloat16") for tokens in (8, 16, 24)]
ROW = {"algorithm": {"alg_id": 7, "split_k": 1, "split_k_mode": -1}, "us": 1.0, "default_us": 2.0, "tried": 3}


@pytest.fixture(autouse=True)
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU by name only, and a cache of its own."""
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Test GPU")
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 800)
    forget()


def forget() -> None:
    """What a new process has not read yet."""
    cusparselt_search._known.cache_clear()
    cusparselt_search._name.cache_clear()


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Replace the child by one that runs ``answer`` for each problem; the result logs the problems it was given."""

    def replace(answer: str) -> Path:
        asked = tmp_path / "asked"
        code = (
            "import json, os, sys, time\n"
            "request = json.load(sys.stdin)\n"
            f"open({str(asked)!r}, 'a').write(json.dumps([p['tokens'] for p in request['problems']]) + '\\n')\n"
            f"row = {ROW!r}\n"
            "for problem in request['problems']:\n"
            f"    {answer}\n"
        )
        monkeypatch.setattr(cusparselt_search, "_COMMAND", [sys.executable, "-c", code])
        return asked

    return replace


def test_a_search_is_remembered(child: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # All rows at once: none may be lost between two looks at the pipe.
    asked = child("print(json.dumps(row), flush=problem['tokens'] == 24)")
    told: list[Problem] = []
    found = search(PROBLEMS, GPU, told=lambda problem, row: told.append(problem))
    assert found == {problem.key: ROW for problem in PROBLEMS}
    assert told == PROBLEMS
    assert algorithm(GPU, PROBLEMS[0]) == Algorithm(7)
    forget()
    assert search(PROBLEMS, GPU) == found
    assert asked.read_text().splitlines() == ["[8, 16, 24]"]
    assert algorithm(GPU, PROBLEMS[2]) == Algorithm(7)
    # Another version of the library has other algorithms.
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 900)
    assert algorithm(GPU, PROBLEMS[2]) == DEFAULT


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("sys.exit('no such GPU') if problem['tokens'] == 16 else print(json.dumps(row), flush=True)",
         "the search ended with status 1: no such GPU"),
        ("os.abort() if problem['tokens'] == 16 else print(json.dumps(row), flush=True)",
         "the search ended with status -6: it said nothing"),
        ("time.sleep(60 * (problem['tokens'] == 16)); print(json.dumps(row), flush=True)", "no answer after 5 s"),
        ("print('half a r' if problem['tokens'] == 16 else json.dumps(row), flush=True)",
         "the search ended with status 0: it said nothing"),
    ],
    ids=["error", "crash", "hang", "nonsense"],
)  # fmt: skip
def test_a_child_that_fails_costs_one_problem(child: Callable[[str], Path], answer: str, why: str) -> None:
    asked = child(answer)
    found = search(PROBLEMS, GPU, timeout_s=5)
    assert found == {PROBLEMS[0].key: ROW, PROBLEMS[1].key: {"failed": why}, PROBLEMS[2].key: ROW}
    assert asked.read_text().splitlines() == ["[8, 16, 24]", "[24]"]
    assert trouble(GPU, PROBLEMS[1]) == why
    assert trouble(GPU, PROBLEMS[0]) is None
    assert algorithm(GPU, PROBLEMS[1]) == DEFAULT
    # What failed is not tried again.
    assert search(PROBLEMS[1:2], GPU) == {PROBLEMS[1].key: {"failed": why}}
    assert len(asked.read_text().splitlines()) == 2


def test_a_child_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cusparselt_search, "_COMMAND", [sys.executable, "-c", "import no_such_module"])
    found = search(PROBLEMS, GPU)
    assert all("No module named 'no_such_module'" in row["failed"] for row in found.values())


def test_the_real_child_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    (row,) = search(PROBLEMS[:1], GPU).values()
    assert row["failed"].startswith("the search ended with status 1: ")


def test_other_numbers_of_tokens(child: Callable[[str], Path]) -> None:
    child("print(json.dumps(row), flush=True)")
    search([Problem(64, 128, 2048, "bfloat16")], GPU)
    for tokens, found in ((2048, 7), (1040, 7), (1024, 0), (2056, 0)):
        assert algorithm(GPU, Problem(64, 128, tokens, "bfloat16")) == Algorithm(found)
    assert algorithm(GPU, Problem(64, 128, 2048, "float16")) == DEFAULT
    assert algorithm(GPU, Problem(64, 128, 2048, "bfloat16", bias=True)) == DEFAULT
    assert algorithm(CPU, Problem(64, 128, 2048, "bfloat16")) == DEFAULT
    child("row['algorithm']['split_k'] = 4; row['algorithm']['split_k_mode'] = 1; print(json.dumps(row), flush=True)")
    search([Problem(64, 128, 512, "bfloat16")], GPU)
    assert algorithm(GPU, Problem(64, 128, 512, "bfloat16")) == Algorithm(7, 4, 1)
    assert algorithm(GPU, Problem(64, 128, 504, "bfloat16")) == DEFAULT


class Library:
    """Stands for cuSPARSELt: a weight is not compressed at all, algorithms differ in what they take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        self.us = {0: 5.0, 1: 4.0, 2: 1.0, 3: 2.0, 4: 3.0}
        monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight)
        monkeypatch.setattr(torch, "_cslt_sparse_mm", self.product)
        monkeypatch.setattr(torch._C, "_cusparselt", self, raising=False)
        monkeypatch.setattr(cusparselt_search, "timed_us", self.timed)

    def mm_search(self, *arguments: Any) -> tuple[int, int, int, int]:
        assert arguments[-1] is True
        return 3, 1, 0, 4

    def timed(self, run: Callable[[], torch.Tensor], device: torch.device) -> list[float]:
        run()
        return [self.us[self.calls[-1].get("alg_id", 0)]]

    def product(self, blob: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
        self.calls.append(options)
        assert options["transpose_result"] is True
        assert blob.dtype == b.dtype
        if options.get("alg_id") == 1:
            raise RuntimeError("CUSPARSE_STATUS_NOT_SUPPORTED")
        alpha = options.get("alpha")
        result = linear(b.t().float(), blob.float(), None)
        if alpha is not None:
            assert (alpha.dtype, tuple(alpha.shape)) == (torch.float32, (blob.shape[0],))
            result = result * alpha
        if options.get("bias") is not None:
            result = result + options["bias"].float()
        result = result.to(options.get("out_dtype") or b.dtype)
        # The fastest is wrong.
        return torch.zeros_like(result) if options.get("alg_id") == 2 else result


@pytest.mark.parametrize(
    ("dtype", "bias"), [("bfloat16", False), ("bfloat16", True), ("float16", True), ("float8_e4m3fn", False)]
)
def test_only_right_algorithms_are_chosen(monkeypatch: pytest.MonkeyPatch, dtype: str, bias: bool) -> None:
    library = Library(monkeypatch)
    row = measure(Problem(64, 128, 16, dtype, bias), CPU)
    assert row == {
        "algorithm": {"alg_id": 3, "split_k": 1, "split_k_mode": -1}, "us": 2.0, "default_us": 5.0, "tried": 3,
    }  # fmt: skip
    assert json.loads(json.dumps(row)) == row
    assert len({options.get("alg_id", 0) for options in library.calls}) == 5
    library.us[0] = 1.5
    assert measure(Problem(64, 128, 16, dtype), CPU)["algorithm"]["alg_id"] == 0


def test_what_was_found_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(monkeypatch)
    weight = encode(random_weight(64, 128).bfloat16(), NofM(2, 4))
    x, bias = torch.randn(13, 128).bfloat16(), torch.randn(64).bfloat16()
    asked: list[Problem] = []

    def found(device: torch.device, problem: Problem) -> Algorithm:
        asked.append(problem)
        return Algorithm(4, 2, 1)

    monkeypatch.setattr(semi_structured, "algorithm", found)
    result = semi_structured._cusparselt_linear(x, decode(weight), bias, 64, 128)
    torch.testing.assert_close(result, linear(x, decode(weight), bias))
    assert asked == [Problem(64, 128, 16, "bfloat16", bias=True)]
    assert {k: library.calls[-1][k] for k in ("alg_id", "split_k", "split_k_mode")} == {
        "alg_id": 4, "split_k": 2, "split_k_mode": 1,
    }  # fmt: skip
    # One that was found for other tokens and is refused for these.
    monkeypatch.setattr(semi_structured, "algorithm", lambda device, problem: Algorithm(1))
    result = semi_structured._cusparselt_linear(x, decode(weight), None, 64, 128)
    torch.testing.assert_close(result, linear(x, decode(weight)))
    assert [options.get("alg_id") for options in library.calls[-2:]] == [1, None]


# 8-bit floats.


def random_weight(n_out: int, n_in: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n_out, n_in // 4, 4, generator=generator)
    weight = weight.scatter(2, weight.abs().topk(2, dim=2, largest=False).indices, 0.0).view(n_out, n_in)
    # Rows of very different sizes, and one of zeros.
    weight *= torch.logspace(-3, 3, n_out).unsqueeze(1)
    weight[1] = 0
    return weight


def test_rounding_to_8_bits() -> None:
    weight = random_weight(64, 128)
    values, scale = to_fp8(weight.bfloat16(), 1)
    assert (values.dtype, tuple(scale.shape)) == (FP8, (64, 1))
    back = values.float() * scale
    assert not back[weight == 0].any()
    error = (back - weight.bfloat16().float()).abs()
    # Three bits after the leading one, and what is far below the row's largest.
    assert bool((error <= weight.abs() / 16 + scale * 2**-10 + 0.004 * weight.abs()).all())
    for extreme in (torch.zeros(4, 8), torch.full((4, 8), torch.finfo(torch.bfloat16).max).bfloat16()):
        values, scale = to_fp8(extreme, None)
        assert bool(values.float().isfinite().all())
        torch.testing.assert_close(values.float() * scale, extreme.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("perm", [False, True], ids=["", "permuted"])
def test_products_in_8_bits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, perm: bool) -> None:
    library = Library(monkeypatch)
    stored = random_weight(64, 128).to(dtype)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1)) if perm else None
    weight = stored
    if order is not None:
        weight = torch.empty_like(stored)
        weight[:, order] = stored
    packed = encode(weight, NofM(2, 4), order)
    state = CUSPARSELT_FP8.prepare(packed)
    back = state.tensors["blob"].float() * state.tensors["scale"].unsqueeze(1)
    generator = torch.Generator().manual_seed(2)
    for shape in ((1,), (13,), (2, 16), (0,)):
        x = torch.randn(*shape, 128, generator=generator).to(dtype)
        for bias in (None, torch.randn(64, generator=generator).to(dtype)):
            given = gathered(x, state.tensors)
            found = semi_structured._cusparselt_fp8_linear(
                given, state.tensors["blob"], state.tensors["scale"], bias, 64, 128
            )
            exact = linear(x.float(), weight.float(), None if bias is None else bias.float())
            assert (found.shape, found.dtype) == (exact.shape, dtype)
            if x.numel():
                values, scale = to_fp8(given, None)
                wanted = linear(values.float() * scale, back, None if bias is None else bias.float())
                torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2)
                # As exact as 8 bits are.
                assert 1e-3 < float((found.float() - exact).norm() / exact.norm()) < 0.1
    assert all(options["out_dtype"] == dtype for options in library.calls)
    with pytest.raises(RuntimeError, match=r"input is torch\.float32"):
        semi_structured._cusparselt_fp8_linear(
            torch.zeros(1, 128), state.tensors["blob"], state.tensors["scale"], None, 64, 128
        )


def test_its_fake_has_the_shape_of_the_result() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 64, dtype=torch.bfloat16, device="cuda")
        blob, scale = torch.empty(32, 40, dtype=FP8, device="cuda"), torch.empty(32, device="cuda")
        result = torch.ops.sparsify.cusparselt_fp8_linear(x, blob, scale, None, 32, 64)
        assert (tuple(result.shape), result.dtype) == ((2, 3, 32), torch.bfloat16)


def test_where_8_bits_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    for capability, version, why in (
        ((7, 5), 800, "it needs compute capability 8.0"),
        ((8, 6), 800, "8-bit floats need compute capability 8.9, this GPU has 8.6"),
        ((9, 0), 502, "8-bit floats need cuSPARSELt 0.6.2, this build of torch has 502"),
        ((9, 0), 602, None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        monkeypatch.setattr(torch.backends.cusparselt, "version", lambda found=version: found)
        absent = CUSPARSELT_FP8.absent(GPU)
        assert absent == why if why is None else absent is not None and absent.startswith(why)
    assert CUSPARSELT_FP8.absent(CPU) == "it runs on NVIDIA GPUs only"
    packed = encode(random_weight(64, 128).bfloat16(), NofM(2, 4))
    assert CUSPARSELT_FP8.refuse(packed) is None
    assert "multiple of 32" in str(CUSPARSELT_FP8.refuse(encode(random_weight(64, 112).bfloat16(), NofM(2, 4))))
