"""``sparsify tune``: what it measures, what it writes, and what it refuses. Nothing here depends on how fast it was."""

import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsify.errors import UsageError
from sparsify.format.bits import count_bits
from sparsify.format.packed import decode, fits
from sparsify.kernels import cusparselt_search, native, table, triton_decode, tuning_cpu, tuning_gpu
from sparsify.kernels.cusparselt_search import Problem
from sparsify.kernels.dispatch import NATIVE, choose
from sparsify.kernels.kernel import State
from sparsify.kernels.packed_reference import PACKED
from sparsify.kernels.semi_structured import CUSPARSELT, CUTLASS
from sparsify.kernels.triton_decode import TRITON
from sparsify.kernels.tuning import tune
from sparsify.kernels.tuning_cpu import copies_of, interleaved
from sparsify.kernels.tuning_request import Request, check, random_packed
from sparsify.types import NofM, parse_pattern
from tests.conftest import Run, refuse
from tests.fakes import Notices

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(
    NATIVE.absent(CPU) is not None, reason=native.missing() or "this processor has no AVX-512 with VBMI2"
)
SMALL = Request(
    dtypes=("f32", "int8-f32"), patterns=("2:4", "0.7"), shapes=((48, 64), (100, 40)), tokens=(1, 64), rounds=3,
    n_bytes=1 << 16,
)  # fmt: skip


# What is measured.


@needs_native
def test_every_weight_is_measured_beside_dense(cache: Path) -> None:
    steps = Notices()
    kept: list[table.Table] = []
    found = tune(SMALL, steps, kept.append)
    assert not steps.texts
    assert steps.done == steps.total == 4  # two shapes, one type of inputs, two numbers of tokens
    assert [len(each.entries) for each in kept] == [4, 8]
    assert (found.device, found.threads) == (table.device_key(CPU), torch.get_num_threads())
    assert found.run["wait_policy"] is not None
    assert {entry.key for entry in found.entries} == {
        (values, "f32", pattern, density, *shape)
        for values in ("f32", "i8")
        for pattern, density in (("2:4", 0.5), ("unstructured", 0.3))
        for shape in SMALL.shapes
    }
    for entry in found.entries:
        assert list(entry.tokens) == [1, 64]
        for tokens, times in entry.tokens.items():
            values = {"f32": torch.float32, "i8": torch.int8}[entry.values]
            have = set(native.ways(values, torch.float32, tokens, entry.n_in))
            packed = times.keys() - {"dense", "loop", "gather"}
            assert packed
            assert packed <= have
            assert times.keys() >= {"dense", "gather"}
            assert all(
                each.n in (3, 12) and 0 < each.min_us <= each.median_us <= each.max_us for each in times.values()
            )
        assert entry.rival_us(1) <= entry.tokens[1]["dense"].median_us
        ways = entry.tokens[1].keys() - {"dense", "loop", "gather"}
        assert entry.packed_us(1) == min(entry.tokens[1][way].median_us for way in ways)


@needs_native
def test_int8_is_measured_at_fewer_densities_unless_asked() -> None:
    default = {(values, pattern) for _, weights in Request().kinds() for values, pattern in weights}
    assert (torch.bfloat16, "0.7") in default
    assert (torch.int8, "0.5") in default
    assert (torch.int8, "0.7") not in default
    asked = {(values, pattern) for _, weights in Request(patterns=("0.7",)).kinds() for values, pattern in weights}
    assert asked == {(torch.bfloat16, "0.7"), (torch.int8, "0.7")}


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "0.5", "0.7"])
@pytest.mark.parametrize("shape", [(5, 40), (64, 48), (200, 64)])
def test_random_weights_are_what_they_say(pattern: str, shape: tuple[int, int]) -> None:
    parsed = parse_pattern(pattern)
    for values in (torch.bfloat16, torch.int8):
        packed = random_packed(shape, parsed, values, torch.bfloat16)
        assert (packed.shape, packed.values.dtype, packed.dtype) == (shape, values, torch.bfloat16)
        assert packed.pattern == (parsed if isinstance(parsed, NofM) else None)
        if isinstance(parsed, NofM):
            assert fits(decode(packed), parsed)
        share = int(count_bits(packed.mask).sum()) / (shape[0] * shape[1])
        assert abs(share - float(1 - parsed.sparsity)) < (1e-9 if packed.pattern else 0.1)


def test_copies_lie_apart_and_aligned() -> None:
    tensor = torch.randn(7, 5).bfloat16()
    found = copies_of(tensor, 4)
    assert all(torch.equal(copy, tensor) for copy in found)
    places = [copy.data_ptr() for copy in found]
    assert all(place % 64 == 0 for place in places)
    assert all(after - before >= tensor.nbytes for before, after in itertools.pairwise(places))
    assert len(copies_of(torch.empty(0, dtype=torch.int64), 3)) == 3


def test_rounds_alternate_and_go_on_through_the_copies() -> None:
    calls: list[tuple[str, int]] = []

    def run(name: str) -> None:
        def call(i: int) -> None:
            calls.append((name, i))
            time.sleep(0.011)  # two of them are a round

        ways[0 if name == "dense" else 1, name] = call

    ways: dict[tuple[int, str], object] = {}
    run("dense")
    run("amx")
    found = interleaved(ways, (0, "dense"), 5, 3)  # type: ignore[arg-type]
    assert all(len(samples) == 3 for samples in found.values())
    warm, rounds = calls[:3], calls[3:]
    assert warm == [("dense", 0), ("amx", 0), ("dense", 4)]
    assert rounds == [
        ("dense", 0), ("dense", 1), ("amx", 0), ("amx", 1),
        ("amx", 2), ("amx", 3), ("dense", 2), ("dense", 3),
        ("dense", 4), ("dense", 0), ("amx", 4), ("amx", 0),
    ]  # fmt: skip


def test_a_gpu_is_measured_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a kernel of any device in the place of those of a GPU, one that fails, and a clock that counts."""

    def broken(*arguments: object) -> torch.Tensor:
        raise RuntimeError("out of\n shared memory")

    def timed(run: Callable[[], torch.Tensor], device: torch.device) -> list[float]:
        return [float(run().numel()), 1.0, 1e6]

    picky = replace(PACKED, name="picky", refuse=lambda packed: "no" if packed.pattern is None else None)
    kernels = (PACKED, replace(PACKED, name="broken", linear=broken), picky)
    monkeypatch.setattr(tuning_gpu, "GPU_KERNELS", kernels)
    monkeypatch.setattr(tuning_gpu, "timed_us", timed)
    request = replace(SMALL, shapes=((48, 64),), tokens=(8, 2))
    weights = [(torch.bfloat16, "2:4"), (torch.bfloat16, "0.7")]
    steps = Notices()
    found = list(tuning_gpu.shape_on_gpu(request, (48, 64), torch.bfloat16, weights, steps))
    assert [entry.key[2:4] for entry in found] == [("2:4", 0.5), ("unstructured", 0.3)]
    assert [set(entry.tokens[2]) for entry in found] == [
        {"dense", "gather", "packed", "picky"}, {"dense", "gather", "packed"}
    ]  # fmt: skip
    assert {tokens: times["packed"].median_us for tokens, times in found[0].tokens.items()} == {2: 96.0, 8: 384.0}
    assert steps.done == 2
    assert len(steps.texts) == 4
    assert steps.texts[0] == "broken, 48x64 2:4, 2 tokens: out of shared memory"


def test_kernels_with_a_choice_of_launches_search_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(triton_decode, "tune", lambda x, tensors, sizes: asked.append(tuple(x.shape)))
    monkeypatch.setattr(cusparselt_search, "search", lambda problems, device: asked.extend(problems))
    state = State({}, {"n_out": 32, "n_in": 64})
    for tokens in (3, 64, 65):
        for kernel in (TRITON, CUSPARSELT, CUTLASS):
            tuning_gpu.search_launch(kernel, state, torch.zeros(tokens, 64, dtype=torch.bfloat16))
    problems = [Problem(32, 64, tokens, "bfloat16") for tokens in (8, 64, 72)]
    assert asked == [(3, 64), problems[0], (64, 64), problems[1], problems[2]]


def test_where_noise_could_decide_more_rounds_are_taken() -> None:
    samples = {(-1, "dense"): [9.0, 10.0, 11.0], (-1, "gather"): [1.0], (0, "amx"): [20.0], (0, "bf16"): [30.0]}
    samples |= {(1, "amx"): [9.0], (1, "slices"): [10.5]}
    assert tuning_cpu._close(samples) == set()
    samples |= {(2, "amx"): [10.5], (2, "slices"): [12.0], (2, "bf16"): [13.0]}
    assert tuning_cpu._close(samples) == {(-1, "dense"), (2, "amx"), (2, "slices")}


def test_what_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--dtype 'fp8' is unknown; choose bf16"):
        check(Request(dtypes=("fp8",)))
    with pytest.raises(UsageError, match="--pattern 2:4 does not divide the 30 columns of --shape 8x30"):
        check(Request(shapes=((8, 30),)))
    with pytest.raises(UsageError, match="not N:M"):
        check(Request(patterns=("2:x",)))
    with pytest.raises(UsageError, match="--rounds and --tokens"):
        check(Request(tokens=(0,)))
    with pytest.raises(UsageError, match="there are kernels for cpu and cuda"):
        check(Request(device=torch.device("meta")))
    monkeypatch.setattr(native, "features", frozenset)
    with pytest.raises(UsageError, match=r"nothing to measure on this CPU: .*AVX-512|no compiled kernels"):
        check(Request())


@needs_native
def test_a_type_that_cpus_do_not_have() -> None:
    with pytest.raises(UsageError, match="--dtype f16: this CPU has no kernel for it"):
        check(Request(dtypes=("f16",)))


# The command.

TINY = ["--shape", "48x64", "--dtype", "f32", "--pattern", "2:4", "--tokens", "1", "--tokens", "512", "--rounds", "2"]


@needs_native
def test_the_command_fills_the_cache_and_auto_chooses_by_it(
    cli: Run, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    result = cli("tune", *TINY, "--threads", threads)
    assert result.returncode == 0, result.stderr
    assert "48x64 f32 2:4" in result.stdout
    assert "OMP_WAIT_POLICY" in result.stderr
    [file] = (cache / "tables").iterdir()
    assert file == table.places(CPU)["measured here"]
    report = json.loads(cli("tune", *TINY, "--shape", "100x40", "--threads", threads, "--json").stdout)
    assert report["complete"]
    assert {(row["n_out"], row["n_in"]) for row in report["rows"]} == {(48, 64), (100, 40)}
    assert report["rows"][0]["speed"].keys() == {"1", "512"}
    monkeypatch.setattr(table, "SHIPPED", cache / "nothing")
    found = table.table_for(CPU)
    assert found is not None
    assert {entry.n_out for entry in found.entries} == {48, 100}
    choice = choose(random_packed((48, 64), NofM(2, 4), torch.float32, torch.float32), "auto")
    assert choice.name.partition(":")[0] in ("native", "native+dense", "dense")
    assert "not measured" not in choice.reason
    checks = {check["what"]: check for check in json.loads(cli("doctor", "--json").stdout)["checks"]}
    assert checks["compiled kernels"]["ok"]
    measured = checks["kernels measured on cpu"]
    # doctor's process has the number of threads that torch chooses.
    assert measured["ok"] == (str(file) in measured["detail"] or "shipped" in measured["detail"])


@needs_native
def test_a_file_that_is_no_table_is_left_alone(cli: Run, cache: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text('{"mine": 1}')
    refuse(cli("tune", *TINY, "--out", mine), 5, "mine.json", "choose another --out")
    assert mine.read_text() == '{"mine": 1}'
    # In the cache such a file is a damaged table, and measuring again is the remedy.
    place = table.places(CPU)["measured here"]
    place.parent.mkdir(parents=True)
    place.write_text("{")
    result = cli("tune", *TINY, "--threads", torch.get_num_threads())
    assert result.returncode == 0, result.stderr
    assert "is replaced" in result.stderr
    assert table.read(place, CPU) is not None


@needs_native
def test_the_shapes_of_a_model(cli: Run, cache: Path, llama: Path) -> None:
    options = ["--dtype", "f32", "--pattern", "0.5", "--tokens", "1", "--rounds", "1", "--json"]
    report = json.loads(cli("tune", "--model", llama, *options).stdout)
    config = json.loads((llama / "config.json").read_text())
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    found = {(row["n_out"], row["n_in"]) for row in report["rows"]}
    assert {(hidden, hidden), (wide, hidden), (hidden, wide)} <= found


def test_refusals(cli: Run, cache: Path) -> None:
    refuse(cli("tune", "--shape", "64"), 2, "--shape", "OUTxIN")
    refuse(cli("tune", "--threads", "0"), 2, "--threads")
    refuse(cli("tune", "--device", "tpu"), 2, "tpu")
    refuse(cli("tune", "--dtype", "fp8"), 2, "--dtype")


@needs_native
def test_an_interrupted_run_keeps_the_shapes_that_were_finished(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    shapes = [part for width in range(64, 64 * 400, 64) for part in ("--shape", f"16x{width}")]
    # Where the tests run in the background, children are born deaf to Ctrl-C.
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    start += "from sparsify.cli import main; main()"
    command = [sys.executable, "-c", start, "tune", *shapes, "--dtype", "f32", "--tokens", "1", "--rounds", "1"]
    with subprocess.Popen([*command, "--out", out], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            deadline = time.monotonic() + 60
            while not out.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            child.send_signal(signal.SIGINT)
            _, errors = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 130, errors
    assert "Traceback" not in errors
    found = table.parse(json.loads(out.read_text()))
    assert 0 < len(found.entries) < 4 * 399
    assert not list(tmp_path.glob("*.tmp"))


def test_the_cache_of_the_processor_is_read() -> None:
    assert table.last_level_cache_bytes() >= 0
    assert tuning_cpu.available_bytes() > 1 << 20


def test_the_version_says_whether_there_are_kernels(cli: Run) -> None:
    text = cli("--version").stdout
    assert ("without compiled kernels" in text) == (native.missing() is not None)
    assert all(feature in text for feature in native.features())
