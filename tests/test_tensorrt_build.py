"""Engine builds against a stand-in for TensorRT with a GPU: flags, profiles, twin, proof, refit, timing cache."""

import dataclasses
import hashlib
from pathlib import Path

import pytest

from sparsify.errors import ModelError, OutputError, SparsifyError, UsageError, VerificationError
from sparsify.exporters.tensorrt_engine import PROOF, TWIN, build_engine
from sparsify.exporters.tensorrt_header import check, read_header
from sparsify.exporters.tensorrt_options import EngineOptions
from sparsify.exporters.tensorrt_proof import read_proof
from sparsify.exporters.tensorrt_refit import refit_engine
from sparsify.exporters.tensorrt_trust import load_plan, was_built_here
from sparsify.progress import Silent
from tests.fake_tensorrt import SPARSE, Behaviour
from tests.tensorrt_models import (
    GPU,
    SMALL,
    Told,
    exported,
)

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("cache")


def test_sparse_engine_and_dense_twin(fake: Behaviour, out: Path) -> None:
    told = Told()
    options = EngineOptions.parse([*SMALL, "workspace=1GiB", "level=4"])
    fake.chosen_above = 40  # the key and value projections have 32 outputs
    built = build_engine(exported("fp16"), out, options, require_sparse=True, progress=told)
    sparse, dense = fake.builds
    assert sparse["flags"] == {"SPARSE_WEIGHTS"}
    assert dense["flags"] == set()
    for build in (sparse, dense):
        assert build["network"] == 1 << 0  # STRONGLY_TYPED by its number in this version
        assert build["pools"] == {"WORKSPACE": 1 << 30}
        assert build["level"] == 4
    assert told.stages == [("Building engine", 2)] * 2
    assert told.steps == 4
    assert built.proof.status == "sparse"
    assert built.proof.reason == "sparse kernels run 6 of 8 linears (6 in prefill, 6 in decode)"
    assert sorted(row.linear for row in built.proof.linears if not row.sparse) == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.v_proj",
    ]
    assert sum(row.kernels == {"prefill": SPARSE, "decode": SPARSE} for row in built.proof.linears) == 6
    assert built.proof.plans == {
        name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in ("model.engine", TWIN)
    }
    for digest in built.proof.plans.values():
        assert read_proof(out / PROOF, digest) == built.proof
    with pytest.raises(ModelError, match="about other engines"):
        read_proof(out / PROOF, "0" * 64)
    assert {path.name for path in out.iterdir()} == {
        *("model.engine", "model.engine.json", "dense.engine", "dense.engine.json"),
        *("build.log", "dense.log", PROOF),
    }
    assert "(Sparsity) Chose 6" in (out / "build.log").read_text()
    assert "(Sparsity) Chose 0" in (out / "dense.log").read_text()
    header = read_header(built.engine)
    assert header == dataclasses.replace(built.header, options=header.options)
    assert header.sparse
    assert header.precision == "float16"
    assert header.gpu == GPU.name
    assert not read_header(out / TWIN).sparse
    assert was_built_here(header.plan_sha256)
    check(built.engine, header, kind="tensorrt", version=fake.version, compute_capability="9.0")


def test_profiles_cover_prefill_and_decode(fake: Behaviour, out: Path) -> None:
    build_engine(exported("fp16"), out, EngineOptions.parse(SMALL), twin=False)
    prefill, decode = (profile.shapes for profile in fake.builds[0]["profiles"])
    assert prefill["input_ids"] == ((1, 1), (2, 16), (2, 16))
    assert prefill["past_key_values.0.key"] == ((1, 2, 0, 16), (2, 2, 0, 16), (2, 2, 0, 16))
    assert decode["input_ids"] == ((1, 1), (2, 1), (2, 1))
    assert decode["attention_mask"] == ((1, 2), (2, 16), (2, 32))
    assert decode["past_key_values.0.value"] == ((1, 2, 1, 16), (2, 2, 15, 16), (2, 2, 31, 16))
    for shapes in (prefill, decode):
        for bound in range(3):
            tokens = shapes["input_ids"][bound][1] + shapes["past_key_values.0.key"][bound][2]
            assert shapes["attention_mask"][bound] == (shapes["input_ids"][bound][0], tokens)


def test_requiring_sparse_kernels(fake: Behaviour, out: Path) -> None:
    fake.chosen_above = 10_000
    with pytest.raises(VerificationError, match="a dense kernel for all 8 linears") as caught:
        build_engine(exported("fp16"), out, EngineOptions.parse(SMALL), require_sparse=True)
    assert "\n" not in str(caught.value)
    assert {path.name for path in out.iterdir()} == {"build.log"}
    with pytest.raises(VerificationError, match="float32 has no sparse kernels"):
        build_engine(exported("fp32"), out, EngineOptions.parse(SMALL), require_sparse=True)
    assert len(fake.builds) == 1
    with pytest.raises(UsageError, match="sparse=off"):
        build_engine(exported("fp16"), out, EngineOptions(sparse=False), require_sparse=True)
    fake.detailed = fake.report = False
    with pytest.raises(VerificationError, match="dense twin"):
        build_engine(exported("fp16"), out, EngineOptions.parse(SMALL), require_sparse=True)


def test_tensorrt_8(fake: Behaviour, out: Path) -> None:
    fake.version = "8.6.0"
    built = build_engine(exported("fp16"), out, EngineOptions.parse(SMALL), progress=Told())
    assert fake.builds[0]["flags"] == {"SPARSE_WEIGHTS", "FP16"}
    assert fake.builds[1]["flags"] == {"FP16"}
    assert built.proof.status == "sparse"
    build_engine(exported("fp32"), out, EngineOptions.parse(SMALL), twin=False)
    assert "FP16" not in fake.builds[2]["flags"]
    with pytest.raises(UsageError, match="no bfloat16"):
        build_engine(exported("bf16"), out)
    with pytest.raises(UsageError, match="no builder flag WEIGHT_STREAMING"):
        build_engine(exported("fp16"), out, EngineOptions(weight_streaming=True))
    with pytest.raises(UsageError, match="SAME_COMPUTE_CAPABILITY"):
        build_engine(exported("fp16"), out, EngineOptions(hardware="same-compute-capability"))
    with pytest.raises(UsageError, match="leave targets= out"):
        build_engine(exported("fp16"), out, EngineOptions(targets=("8.0",)))
    with pytest.raises(UsageError, match="no tactic source CUBLAS"):
        build_engine(exported("fp16"), out, EngineOptions(tactic_sources=("CUBLAS",)))


@pytest.mark.parametrize(
    ("message", "part"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 17179869184 bytes.)", "out of memory; lower workspace="),
        ("[cuda] cudaErrorMemoryAllocation", "out of memory"),
        ("no tactics to implement the operation within workspace limit", "raise workspace="),
        ("something\nelse", "cannot build an engine: something else"),
    ],
)
def test_builds_that_fail(fake: Behaviour, out: Path, message: str, part: str) -> None:
    fake.errors = [message]
    with pytest.raises(SparsifyError, match=part) as caught:
        build_engine(exported("fp16"), out, EngineOptions.parse(SMALL))
    assert "\n" not in str(caught.value)
    assert {path.name for path in out.iterdir()} == {"build.log"}


def test_cancelling_a_build(fake: Behaviour, out: Path) -> None:
    class Interrupted(Silent):
        def advance(self, steps: int = 1) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(exported("fp16"), out, EngineOptions.parse(SMALL), progress=Interrupted())
    assert not list(out.glob("*.engine"))


def test_an_engine_for_several_versions_is_inspected_and_refitted(fake: Behaviour, out: Path) -> None:
    options = EngineOptions.parse([*SMALL, "version-compatible=on", "refit=on"])
    built = build_engine(exported("fp16"), out, options, twin=False)
    assert all(row.kernels for row in built.proof.linears)
    assert "no inspection" not in (out / "build.log").read_text()
    assert refit_engine(built.engine, exported("fp16")).version_compatible


def test_sparse_in_one_profile_is_said_to_be_that(fake: Behaviour, out: Path) -> None:
    fake.sparse_profiles = (1,)
    built = build_engine(exported("fp16"), out, EngineOptions.parse(SMALL), require_sparse=True, twin=False)
    assert built.proof.reason == "sparse kernels run 8 of 8 linears (0 in prefill, 8 in decode)"
    assert {row.why for row in built.proof.linears} == {"sparse in decode, dense in prefill"}
    assert built.proof.twin == "not asked for"


def test_a_twin_that_fails_costs_no_engine(fake: Behaviour, out: Path) -> None:
    fake.twin_errors = ["Error Code 2: OutOfMemory (Requested size was 17179869184 bytes.)"]
    told = Told()
    built = build_engine(exported("fp16"), out, EngineOptions.parse(SMALL), progress=told)
    assert built.twin is None
    assert built.proof.twin.startswith("failed (")
    assert "out of memory" in built.proof.twin
    assert read_proof(out / PROOF, built.header.plan_sha256) == built.proof
    assert any("out of memory" in notice and TWIN in notice for notice in told.notices)
    assert load_plan(built.engine, read_header(built.engine))
    assert not (out / TWIN).exists()


def test_what_cannot_be_written_is_refused_before_the_build(
    fake: Behaviour, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    options = EngineOptions.parse([*SMALL, f"timing-cache={tmp_path / 'file' / 'cache'}"])
    with pytest.raises(OutputError, match="file"):
        build_engine(exported("fp16"), out, options)
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="file"):
        build_engine(exported("fp16"), out, EngineOptions.parse(SMALL))
    assert not fake.builds


def test_a_timing_cache_that_fails_afterwards_costs_no_engine(
    fake: Behaviour, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, config: object) -> None:
        raise OutputError("cache: the disk is full")

    monkeypatch.setattr("sparsify.exporters.tensorrt_timing.TimingCache.update", fail)
    told = Told()
    options = EngineOptions.parse([*SMALL, f"timing-cache={tmp_path / 'timings'}"])
    built = build_engine(exported("fp16"), out, options, twin=False, progress=told)
    assert load_plan(built.engine, read_header(built.engine))
    assert "the timing cache was not updated: cache: the disk is full" in told.notices


def test_tactic_sources_that_are_refused(fake: Behaviour, out: Path) -> None:
    fake.takes_sources = False
    with pytest.raises(UsageError, match="refuses tactic-sources=JIT_CONVOLUTIONS"):
        build_engine(exported("fp16"), out, EngineOptions(tactic_sources=("JIT_CONVOLUTIONS",)))


def test_a_log_that_cannot_be_written_ends_the_build(
    fake: Behaviour, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, severity: str, message: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsify.exporters.tensorrt_log.BuildLog.write", full)
    with pytest.raises(OutputError, match="disk is full"):
        build_engine(exported("fp16"), out, EngineOptions.parse(SMALL), progress=Told())
    assert not list(out.glob("*.engine"))


def test_timing_cache(fake: Behaviour, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "timings" / "cache"
    options = EngineOptions.parse([*SMALL, f"timing-cache={path}"])
    build_engine(exported("fp16"), out, options, twin=False)
    content = path.read_bytes()
    assert b"node_linear" in content
    build_engine(exported("fp16"), out, options, twin=False)
    assert path.read_bytes() == content
    for damaged in (b"", b"onnx", content[:-1], content + b" ", content.replace(b"Pretend", b"Another"), b"[]\n"):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="delete it or name another") as caught:
            build_engine(exported("fp16"), out, options, twin=False)
        assert "\n" not in str(caught.value)
        # Whatever the file was, it is not ours to overwrite.
        assert path.read_bytes() == damaged
    path.write_bytes(content)
    fake.version = "11.5.0.1"
    with pytest.raises(UsageError, match=r"11\.4\.0\.106"):
        build_engine(exported("fp16"), out, options, twin=False)
