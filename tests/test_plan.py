"""Predictions: what they rest on, that none beats its roof, and when they say no."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparsify.errors import ModelError, UsageError
from sparsify.kernels import table
from sparsify.model import Skeleton, load_skeleton
from sparsify.roofline import published
from sparsify.roofline.bounds import storage_of, total
from sparsify.roofline.calibration import from_records, from_table
from sparsify.roofline.devices import DEVICES, Device
from sparsify.roofline.plan import check, plan
from sparsify.roofline.prediction import CLIPPED, MEASURED, ROOF_ONLY, WHOLE_STEPS, Plan
from sparsify.roofline.verdict import Verdict, notes, verdicts
from sparsify.roofline.work import ModelWork
from sparsify.types import parse_pattern
from tests.conftest import Run, refuse
from tests.test_roofline import config_folder

H200 = DEVICES["h200"]
HERE = Device(
    "here", "A processor", 1e10, {"bfloat16": 1e12}, {}, 16 * 10**9, "made up", ("A processor",), "cpu", "measured", 2,
    cores=4,
)  # fmt: skip
SMALL = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32000}


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Skeleton:
    return load_skeleton(config_folder(tmp_path_factory.mktemp("config") / "8b"), weights=False)


@pytest.fixture(scope="module")
def llama_1b(tmp_path_factory: pytest.TempPathFactory) -> Skeleton:
    return load_skeleton(config_folder(tmp_path_factory.mktemp("config") / "1b", **SMALL), weights=False)


def lines(kernels: list[dict[str, Any]], device: str = "NVIDIA H200", precision: str | None = None) -> list[Any]:
    """The records of one run in which these kernels were measured, on a machine like ``HERE``."""
    head = {"run": "a" * 16, "artifact": "2:4"}
    host = {"cores": HERE.cores, "memory_bytes": HERE.memory_bytes}
    ceilings = {"device": device, "how": "measured", "bytes_per_s": HERE.bytes_per_s, "flops": dict(HERE.flops)}
    return [
        {**head, "record": "run", "environment": {"host": host}, "ceilings": [ceilings]},
        {**head, "record": "artifact", "precision": precision},
        *({**head, "record": "kernel", **kernel} for kernel in kernels),
    ]


def kernel(
    tokens: int = 1, dense: float = 100.0, sparse: float = 80.0, shape: tuple[int, int] = (4096, 4096), **other: Any
) -> dict[str, Any]:
    times = {
        "dense torch": {"samples_us": [dense] * 3},
        "dense own loop": {"samples_us": [9 * dense] * 3},
        "native": {"samples_us": [sparse] * 3},
        "packed": {"samples_us": [9 * sparse] * 3},
    }
    fields = {"pattern": "2:4", "density": 0.5, "dtype": "bfloat16", "tokens": tokens, "threads": None}
    return {"device": "cuda", "shape": list(shape), "kernels": times, "best_dense": "dense torch", **fields, **other}


def step(made: Plan, pattern: str, phase: str = "decode", batch: int = 1) -> Any:
    (found,) = [s for s in made.steps if (s.pattern, s.phase, s.batch) == (pattern, phase, batch)]
    return found


def verdict(made: Plan, pattern: str) -> Verdict:
    (found,) = [each for each in verdicts(made) if each.pattern == pattern]
    return found


# What predictions rest on.


def test_measured_goes_before_published_and_published_before_the_roof(llama_8b: Skeleton) -> None:
    options: dict[str, Any] = {"patterns": ("2:4", "0.5"), "batches": (1, 64), "prompt": 4096}
    bare = plan(llama_8b, H200, **options)
    assert set(step(bare, "2:4", "decode", 1).basis) == {ROOF_ONLY}
    (basis,) = step(bare, "2:4", "decode", 64).basis
    assert basis.startswith("published: SlideSparse")
    assert basis.endswith("(measured on NVIDIA H100 PCIe)")
    (basis,) = step(bare, "2:4", "prefill", 1).basis
    assert "CUDALibrarySamples#203" in basis
    assert verdict(plan(llama_8b, H200, ("2:4",), "float8", prompt=8192), "2:4").pays == "unclear"
    shapes = {(row.shape) for row in bare.linears}
    points = from_records(lines([kernel(tokens, shape=shape) for tokens in (1, 64) for shape in shapes]), H200)
    assert len(points) == 2 * len(shapes)
    made = plan(llama_8b, H200, points=points, **options)
    for batch in (1, 64):
        assert set(step(made, "2:4", "decode", batch).basis) == {"measured on NVIDIA H200 SXM"}
    # Neither other patterns nor other numbers of tokens.
    assert set(step(made, "0.5", "decode", 1).basis) == {ROOF_ONLY}
    assert step(made, "2:4", "prefill", 1) == step(bare, "2:4", "prefill", 1)
    row = next(row for row in made.linears if row.tokens == 1 and row.pattern == "2:4" and row.shape == (4096, 4096))
    assert row.low == row.high == pytest.approx(100 / 80)


def test_dense_times_are_those_of_all_patterns(llama_8b: Skeleton) -> None:
    shapes = {row.shape for row in plan(llama_8b, H200, ("2:4",)).linears}
    points = from_records(lines([kernel(dense=500.0, sparse=400.0, shape=shape) for shape in shapes]), H200)
    made = plan(llama_8b, H200, points=points)
    rows = [row for row in made.steps if row.phase == "decode"]
    assert len({row.dense_s for row in rows}) == 1
    assert rows[0].dense_is_measured
    assert not any(row.dense_is_measured for row in made.steps if row.phase == "prefill")
    roof_only = step(made, "0.5")
    assert set(roof_only.basis) == {ROOF_ONLY}
    assert roof_only.high <= roof_only.roof * (1 + 1e-9)


def test_tables_of_the_tuner_are_measurements_of_this_device(llama_1b: Skeleton) -> None:
    shapes = {(row.shape) for row in plan(llama_1b, HERE, ("2:4",)).linears}

    def times(us: float) -> dict[str, Any]:
        return {"median_us": us, "min_us": 0.8 * us, "max_us": 2 * us, "n": 7}

    def entry(shape: tuple[int, int], values: str = "bf16") -> dict[str, Any]:
        # Three times the roof; what the loop or the gathering take says nothing of the product.
        us = 3 * 1e6 * 2 * shape[0] * shape[1] / HERE.bytes_per_s
        ways = {"dense": times(us), "loop": times(us / 9), "gather": times(1.0), "bf16": times(us / 1.5)}
        return {
            "values": values, "x": "bf16", "pattern": "2:4", "density": 0.5, "n_out": shape[0], "n_in": shape[1],
            "tokens": {"1": ways},
        }  # fmt: skip

    entries = [*map(entry, shapes), entry((2048, 2048), "i8")]
    body = {"format": 1, "device": {}, "threads": 2, "versions": {}, "run": {}, "entries": entries}
    points = from_table(table.parse(body))
    assert len(points) == len(shapes)
    made = plan(llama_1b, HERE, ("2:4",), points=points)
    found = step(made, "2:4")
    assert set(found.basis) == {"measured here"}
    assert found.dense_s == pytest.approx(3 * found.dense_roof_s, rel=0.01)
    assert 1 < found.low < 1.5 < found.high < 1.5 / 0.8
    assert verdict(made, "2:4").pays == "yes"
    assert from_table(None) == []


# Roofs.


def _plans(skeleton: Skeleton) -> Iterator[Plan]:
    options: dict[str, Any] = {"patterns": ("2:4", "0.5", "0.7", "1:4"), "batches": (1, 8, 256), "prompt": 700}
    for device in DEVICES.values():
        for dtype in device.flops:
            yield plan(skeleton, device, dtype=dtype, **options)
    # As if sparse products took no time, or for ever, and as if dense ones did.
    for dense, sparse in ((100.0, 1e-3), (100.0, 1e5), (1e-3, 1e-3), (1e6, 1.0)):
        kernels = [
            kernel(tokens, dense, sparse, shape) for tokens in (1, 256, 1024) for shape in ((2048, 2048), (8192, 2048))
        ]
        yield plan(skeleton, H200, points=from_records(lines(kernels), H200), **options)


def test_no_prediction_beats_its_roof(llama_1b: Skeleton) -> None:
    seen = clipped = 0
    for made in _plans(llama_1b):
        for pattern in ("2:4", "0.5", "0.7", "1:4"):
            sparse = ModelWork.from_skeleton(llama_1b, made.dtype, storage_of(parse_pattern(pattern)))
            for row in (row for row in made.steps if row.pattern == pattern):
                seen += 1
                works = sparse.prefill(row.batch, 700) if row.phase == "prefill" else sparse.decode(row.batch, 764.5)
                assert row.roof_s == pytest.approx(total(works, made.device).seconds)
                assert row.roof_s <= row.fastest_s * (1 + 1e-9)
                assert row.dense_roof_s <= row.dense_s * (1 + 1e-9)
                assert 0 < row.low <= row.high
                assert row.fastest_s <= row.slowest_s
                assert sum(row.basis.values()) == pytest.approx(1)
                if not any(basis.startswith(MEASURED) for basis in row.basis):
                    assert row.high <= row.roof * (1 + 1e-9)
        for each in made.linears:
            assert 0 < each.low <= each.high
            clipped += each.basis.endswith(CLIPPED)
            if not each.basis.startswith(MEASURED):
                assert each.high <= each.roof
                assert each.basis.endswith(CLIPPED) <= (each.high == each.roof)
    assert seen > 500
    assert clipped


def test_ranges_of_steps_begin_lower_than_those_of_their_products(llama_8b: Skeleton) -> None:
    made = plan(llama_8b, DEVICES["b200"], ("2:4",), prompt=16384)
    products = [row for row in made.linears if row.tokens == 16384]
    assert {(row.low, row.high) for row in products} == {(1.64, 1.88)}
    found = step(made, "2:4", "prefill")
    assert 1 < found.low < 1.64
    assert found.low < found.high < 1.88


def test_memory_is_that_of_weights_and_cache(llama_8b: Skeleton) -> None:
    made = plan(llama_8b, H200, ("2:4",), batches=(1, 4), prompt=900, new=100)
    dense, half = made.memory
    assert dense.weight_bytes == 2 * 8_030_261_248
    assert dense.weight_bytes - half.weight_bytes == 6_979_321_856 * 2 * 7 / 16
    assert dense.cache_bytes == half.cache_bytes == 4 * 1000 * 131072


# Verdicts.


def test_small_models_do_not_pay_on_gpus(llama_1b: Skeleton) -> None:
    made = plan(llama_1b, H200, ("2:4", "0.7"), "float8")
    assert made.n_weights < published.SMALL_MODEL
    for pattern, of in (("2:4", "published: "), ("0.7", "published of 2:4 alone: ")):
        found = verdict(made, pattern)
        assert found.pays == "no"
        (reason,) = found.reasons
        assert "launches" in reason
        assert f"{of}SlideSparse" in reason
    assert all(row.too_small for row in made.steps)
    # Nor does another type of the dense model gain what its roof says.
    sixteen = plan(llama_1b, H200, ("2:4", "0.7"))
    assert all(row.too_small for row in sixteen.alternative)
    assert not any("free alternative" in note for note in notes(sixteen))
    assert any(note.startswith("too small: ") for note in notes(sixteen))
    assert [each.pays for each in verdicts(sixteen)] == ["no", "no"]
    # Products that were measured tell, and on a CPU a launch costs nothing.
    points = from_records(lines([kernel(shape=shape) for shape in {row.shape for row in made.linears}]), H200)
    told = plan(llama_1b, H200, ("2:4",), points=points)
    assert [step(told, "2:4", phase).too_small for phase in ("decode", "prefill")] == [False, True]
    assert not any(row.too_small for row in plan(llama_1b, HERE).steps)
    # Where whole steps of such a size were published, they tell.
    options: dict[str, Any] = {"dtype": "float8", "batches": (64,), "patterns": ("2:4",)}
    for prompt, pays in ((32, "no"), (256, "yes")):
        made = plan(llama_1b, DEVICES["h100-pcie"], prompt=prompt, **options)
        for phase in ("prefill", "decode"):
            assert next(iter(step(made, "2:4", phase, 64).basis)).startswith(WHOLE_STEPS)
        found = verdict(made, "2:4")
        assert found.pays == pays
        assert not any("launches" in reason for reason in found.reasons)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_a_gpu_at_hand_and_its_name_give_one_verdict(llama_8b: Skeleton, dtype: str) -> None:
    """That at hand reaches less than its peaks, and its products of 8-bit floats are not measured."""
    reached = {dtype: 0.7 * peak for dtype, peak in H200.flops.items() if dtype != "float8"}
    here = Device(
        "here", "NVIDIA H200", 0.85 * H200.bytes_per_s, reached, dict.fromkeys(("bfloat16", "float16", "int8"), 2.0),
        H200.memory_bytes, "measured here", ("NVIDIA H200",), "cuda", "measured",
    )  # fmt: skip
    options: dict[str, Any] = {"dtype": dtype, "batches": (1, 64), "prompt": 2048}
    by_name, at_hand = plan(llama_8b, H200, **options), plan(llama_8b, here, **options)
    assert [(each.pattern, each.pays) for each in verdicts(by_name)] == [
        (each.pattern, each.pays) for each in verdicts(at_hand)
    ]
    assert at_hand.device.flops["float8"] == pytest.approx(0.7 * H200.flops["float8"])
    assert at_hand.device.peak("float8", sparse=True) == 2 * at_hand.device.peak("float8")
    assert "float8 not measured" in at_hand.device.source
    assert len(at_hand.alternative) == len(by_name.alternative)
    unknown = plan(llama_8b, replace(here, known_as=("NVIDIA New",)), batches=(1,))
    assert any("whether this GPU has FP8" in note for note in notes(unknown))


def test_fp8_is_the_alternative_to_16_bits_and_the_baseline_in_8(llama_8b: Skeleton) -> None:
    made = plan(llama_8b, H200)
    assert {row.phase: round(row.roof, 1) for row in made.alternative} == {"prefill": 2.0, "decode": 2.0}
    for pattern in ("2:4", "0.5"):
        assert verdict(made, pattern).pays == "no"
        assert "FP8 dense" in verdict(made, pattern).reasons[0]
    assert verdict(made, "0.7").pays == "unclear"
    assert any("free alternative is FP8" in note and "ModelOpt" in note for note in notes(made))
    eight = plan(llama_8b, DEVICES["h100-pcie"], ("2:4",), "float8", (64,), prompt=64)
    assert not eight.alternative
    assert any("baseline is FP8 dense" in note for note in notes(eight))
    assert verdict(eight, "2:4").pays == "yes"
    (basis,) = step(eight, "2:4", "prefill", 64).basis
    assert "Qwen2.5-7B" in basis
    old = plan(llama_8b, DEVICES["a100-80gb"])
    assert not old.alternative
    assert verdict(old, "0.5").pays == "unclear"


def test_tiny_batches_and_missing_kernels_are_said(llama_8b: Skeleton) -> None:
    made = plan(llama_8b, DEVICES["a100-80gb"], ("2:4",), batches=(1, 32, 64))
    (reason,) = [each for each in verdict(made, "2:4").reasons if "nothing is published for 2:4" in each]
    assert "as in decode at batch 1, and cuSPARSELt" in reason
    # Many tokens are not few.
    made = plan(llama_8b, H200, ("2:4",), "float8", (1500,), prompt=8)
    (reason,) = [each for each in verdict(made, "2:4").reasons if "nothing is published for 2:4" in each]
    assert "decode at batch 1500" in reason
    assert "no library" not in reason
    reasons = " ".join(verdict(plan(llama_8b, DEVICES["a100-80gb"], ("0.6",)), "0.6").reasons)
    assert "takes up to 64 tokens" in reasons
    assert "upper bound" in reasons
    reasons = " ".join(verdict(plan(llama_8b, HERE, ("0.6",)), "0.6").reasons)
    assert "sparsify tune" in reasons


def test_prefill_of_unstructured_weights_gains_nothing(llama_8b: Skeleton) -> None:
    found = step(plan(llama_8b, H200, ("0.7",), prompt=4096), "0.7", "prefill")
    assert (found.low, found.high, found.limited_by) == (1.0, pytest.approx(1.0, abs=1e-6), "compute")


def test_what_does_not_fit_is_said(llama_8b: Skeleton) -> None:
    made = plan(llama_8b, DEVICES["rtx5080"], ("2:4", "0.7"))
    (note,) = [note for note in notes(made) if "does not fit" in note]
    assert "with 2:4 or 0.7 it would" in note
    assert not any("does not fit" in note for note in notes(plan(llama_8b, H200)))


# Refusals.


def test_what_means_nothing_is_refused(llama_8b: Skeleton) -> None:
    with pytest.raises(UsageError, match="--batch"):
        check(("2:4",), (1, 0), 1, 1)
    with pytest.raises(UsageError, match="--pattern"):
        check(("4:2",), (1,), 1, 1)
    with pytest.raises(UsageError, match="no peak of a100-80gb"):
        plan(llama_8b, DEVICES["a100-80gb"], dtype="float8")
    with pytest.raises(UsageError, match="--pattern 2:7 does not divide the 4096 inputs"):
        plan(llama_8b, H200, ("2:7",))


# The command.


def test_the_command_plans_a_config_without_weights(cli: Run, tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "8b")
    shown = cli("plan", folder, "--device", "h200", "--batch", 1, "--batch", 64, "--prompt", 2048)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("PREDICTION, this model was not run")
    assert "≥" in shown.stdout
    assert "≈" not in shown.stdout.partition("Note:")[0]
    assert "up to" in shown.stdout
    assert "[1] published: " in shown.stdout
    told = cli("plan", folder, "--device", "h200", "--pattern", "2:4", "--dtype", "fp8", "--json")
    body = json.loads(told.stdout)
    assert body["prediction"] is True
    assert body["dtype"] == "float8"
    assert [row["pattern"] for row in body["memory"]] == [None, "2:4"]
    assert {row["phase"] for row in body["steps"]} == {"prefill", "decode"}
    assert all(math.isfinite(row["high"]) and row["basis"] for row in body["linears"])
    assert body["verdicts"][0]["reasons"]


def test_the_command_shows_no_range_of_a_small_model_on_a_gpu(cli: Run, tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "1b", **SMALL)
    shown = cli("plan", folder, "--device", "h200", "--pattern", "2:4", "--pattern", "0.7").stdout
    steps = shown.partition("PREDICTED for each linear")[0]
    assert "too" in steps
    assert "up to" not in steps
    assert "may pay" not in shown
    assert shown.count("does not pay") == 2
    assert "Note: too small: " in shown


def test_the_command_measures_here(cli: Run, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsify.roofline import ceilings

    measure = ceilings.measure_ceilings
    monkeypatch.setattr(
        ceilings, "measure_ceilings", lambda device, quick: measure(device, quick=quick, n_bytes=1 << 20, size=64)
    )
    body = json.loads(cli("plan", llama, "--json").stdout)
    assert body["device"]["name"] == "here"
    assert body["device"]["how"] == "measured"


def test_the_command_takes_records(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsify.bench import records

    folder = config_folder(tmp_path / "8b")
    read: Callable[..., Any] = lambda files: records.Records(tuple(lines([kernel()])), ("",) * 3)  # noqa: E731
    monkeypatch.setattr(records, "read", read)
    arguments = ("--pattern", "2:4", "--records", tmp_path / "r.jsonl")
    body = json.loads(cli("plan", folder, "--device", "h200", *arguments, "--json").stdout)
    assert any(row["basis"] == "measured on NVIDIA H200 SXM" for row in body["linears"])
    result = cli("plan", folder, "--device", "b200", *arguments)
    refuse(result, 2, "no kernel was measured on NVIDIA B200", "those of NVIDIA H200")
    # A processor of the same name in another machine.
    from sparsify.roofline import ceilings

    made = tuple(lines([kernel(threads=2)], HERE.full_name))
    monkeypatch.setattr(records, "read", lambda files: records.Records(made, ("",) * 3))
    for cores, basis in ((4, "measured here"), (8, "measured on a CPU named A processor")):
        measured = SimpleNamespace(device=replace(HERE, cores=cores))
        monkeypatch.setattr(ceilings, "measure_ceilings", lambda device, quick, found=measured: found)
        monkeypatch.setattr(table, "table_for", lambda device: None)
        done = cli("plan", folder, *arguments, "--json")
        found = {row["basis"].removesuffix(CLIPPED) for row in json.loads(done.stdout)["linears"]}
        assert found == {basis, ROOF_ONLY}
        assert ("other cores, memory or ceilings" in done.stderr) == (cores == 8)


def test_the_command_refuses_in_one_line(cli: Run, tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "8b")
    refuse(cli("plan"), 2, "MODEL is missing")
    refuse(cli("plan", folder, "--device", "h900"), 2, "--device 'h900'", "h200")
    refuse(cli("plan", folder, "--device", "h200", "--dtype", "int5"), 2, "--dtype 'int5'")
    refuse(cli("plan", folder, "--device", "h200", "--prompt", 0), 2, "--prompt")
    refuse(cli("plan", folder, "--device", "h200", "--pattern", "5:4"), 2, "--pattern")
    refuse(cli("plan", folder, "--device", "h200", "--records", tmp_path / "none.jsonl"), 4, "none.jsonl")
    refuse(cli("plan", tmp_path, "--device", "h200"), 3, "no config.json")
    quantised = config_folder(tmp_path / "quantised", quantization_config={"quant_method": "fp8"})
    refuse(cli("plan", quantised, "--device", "h200"), 3, "quantization_config")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"sliding_window": -1, "model_type": "mistral"}, "sliding_window"),
        ({"num_key_value_heads": 2**40}, "num_key_value_heads"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 2.5}, "num_experts_per_tok"),
        ({"num_hidden_layers": 900, "num_experts": 2000}, "num_experts"),
        ({"num_hidden_layers": 900, "text_config": {"num_hidden_layers": 10**6, "num_local_experts": 8}}, "num_local"),
        ({"intermediate_size": 0}, "gate_proj"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(cli: Run, tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    folder = config_folder(tmp_path / "odd", **{"num_hidden_layers": 2, **changes})
    refuse(cli("plan", folder, "--device", "h200"), 3, "config.json", key)


def test_of_a_hub_model_only_the_config_is_downloaded(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def download(model: str, **options: Any) -> str:
        asked[model] = options["allow_patterns"]
        return str(config_folder(tmp_path / "downloaded"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert cli("plan", "owner/name", "--device", "h200").returncode == 0
    assert asked == {"owner/name": ["config.json", "*.py"]}


def test_a_checkpoint_is_still_compared_with_its_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        load_skeleton(config_folder(tmp_path / "8b"))
