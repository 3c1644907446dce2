"""ONNX Runtime as a session: both layouts, packed weights, padding, the cache and what ran."""

from __future__ import annotations

import gc
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsify.bench.parity import check_parity
from sparsify.errors import DataError
from sparsify.exporters.onnx_packed import PackAs, pack_onnx
from sparsify.runtimes.onnxruntime_graph import read_graph
from sparsify.runtimes.onnxruntime_providers import cuda_options
from sparsify.runtimes.onnxruntime_session import OnnxRuntimeSession
from sparsify.runtimes.onnxruntime_settings import CPU, CUDA, TENSORRT, OrtSettings
from sparsify.runtimes.session import positions
from sparsify.runtimes.torch_session import TorchSession
from sparsify.types import NofM
from tests.onnxruntime_artifacts import CONTEXT, ONE, VOCAB, fixture, make, random_ids, some_masks

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

standard, genai = fixture("standard"), fixture("genai")


@pytest.fixture(scope="module", params=["standard", "genai"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(dense artifact, the same with its linears packed)."""
    dense = make(request.param, tmp_path_factory)
    out = tmp_path_factory.mktemp("packed") / "onnx"
    shutil.copytree(dense, out)
    names = [t.name for t in onnx.load(dense / "model.onnx", load_external_data=False).graph.initializer]
    report = pack_onnx(
        out / "model.onnx", {name: PackAs(NofM(2, 4), 0) for name in names if "_proj" in name and "weight" in name}
    )
    assert len(report.packed) in (10, 14), report
    return dense, out


@pytest.fixture(params=["standard", "genai"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> TorchSession:
    return TorchSession(make("checkpoint", tmp_path_factory))


def test_parity(artifact: Path, reference: TorchSession) -> None:
    with OnnxRuntimeSession(artifact, ONE) as session:
        assert check_parity(reference, session, vocab_size=VOCAB).max_abs_diff < 1e-4
        assert session.context == CONTEXT
        assert session.notices == ()
        assert session.options() == {CPU: {}}


def test_a_step_of_layout_genai_refuses_what_it_would_compute_wrongly(genai: Path) -> None:
    ids, mask = random_ids(4, 12), some_masks()
    with OnnxRuntimeSession(genai, ONE) as session:
        for row in (0, 1):
            some = mask[row : row + 1]
            with pytest.raises(DataError, match="padding on the right only"):
                session.run(ids[:1], some, positions(some), session.empty_past(1))
        right = mask[2:3]
        _, past = session.run(ids[:1], right, positions(right), session.empty_past(1))
        after = np.concatenate((right, np.ones((1, 1), np.int64)), axis=1)
        with pytest.raises(DataError, match="padding on the right only"):
            session.run(ids[:1, :1], after, positions(after)[:, -1:], past)


def test_layout_standard_takes_padding_on_both_sides_in_a_step(standard: Path, reference: TorchSession) -> None:
    ids, mask = random_ids(4, 12), some_masks()
    with OnnxRuntimeSession(standard, ONE) as session:
        logits, _ = session.run(ids, mask, positions(mask), session.empty_past(4))
    for row in (0, 2, 3):
        alone = reference.logits(ids[row : row + 1, mask[row] == 1])[0]
        np.testing.assert_allclose(logits[row, mask[row] == 1], alone, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
def test_generation_to_the_end_of_the_context(artifact: Path, reference: TorchSession, batch: int) -> None:
    ids = random_ids(batch, 20)
    want = reference.generate(ids, CONTEXT - 19)
    with OnnxRuntimeSession(artifact, ONE) as session:
        np.testing.assert_array_equal(session.generate(ids, CONTEXT - 19), want)
        with pytest.raises(DataError, match=f"{CONTEXT + 1} tokens are more than the {CONTEXT}"):
            session.generate(ids, CONTEXT - 18)
        with pytest.raises(DataError, match=f"{CONTEXT + 1} tokens are more than the {CONTEXT}"):
            session.logits(random_ids(1, CONTEXT + 1))


def test_shared_and_growing_caches_agree_bit_for_bit(genai: Path) -> None:
    ids, ones = random_ids(2, 10), np.ones((2, 10), dtype=np.int64)
    with OnnxRuntimeSession(genai, ONE) as session:
        caches = [session.empty_past(2), session.empty_past(2, 10)]
        for start, stop in ((0, 6), *((i, i + 1) for i in range(6, 10))):
            mask = ones[:, :stop]
            results = []
            for i, cache in enumerate(caches):
                logits, caches[i] = session.run(ids[:, start:stop], mask, positions(mask)[:, start:], cache)
                results.append(logits)
            np.testing.assert_array_equal(results[0], results[1])
        shared = caches[1]
        assert (shared.capacity, shared.length) == (10, 10)
        more = np.ones((2, 11), dtype=np.int64)
        with pytest.raises(DataError, match="11 tokens are more than the cache's 10"):
            session.run(ids[:, :1], more, positions(more)[:, -1:], shared)


def test_shared_buffers_are_not_copied(genai: Path) -> None:
    ids, mask = random_ids(1, 4), np.ones((1, 4), dtype=np.int64)
    with OnnxRuntimeSession(genai, ONE) as session:
        empty = session.empty_past(1, 8)
        _, past = session.run(ids, mask, positions(mask), empty)
        assert [v.data_ptr() for v in past.values] == [v.data_ptr() for v in empty.values]


def test_layout_standard_hands_its_present_on_as_past(standard: Path) -> None:
    ids, mask = random_ids(1, 4), np.ones((1, 4), dtype=np.int64)
    with OnnxRuntimeSession(standard, ONE) as session:
        _, past = session.run(ids, mask, positions(mask), session.empty_past(1, 8))
        assert past.capacity is None
        assert {tuple(value.shape()) for value in past.values} == {(1, 2, 4, 16)}


def test_steps_of_the_wrong_shape(artifact: Path) -> None:
    ids, mask = random_ids(1, 4), np.ones((1, 4), dtype=np.int64)
    with OnnxRuntimeSession(artifact, ONE) as session:
        bads: list[Any] = [mask[:, :3], mask.astype(np.int32), np.ones((2, 4), dtype=np.int64)]
        for bad in bads:
            with pytest.raises(DataError, match="attention mask"):
                session.run(ids, bad, positions(mask), session.empty_past(1))


def test_logits_outlive_the_session(artifact: Path) -> None:
    session = OnnxRuntimeSession(artifact, ONE)
    first = session.logits(random_ids(1, 8))
    kept = first.copy()
    session.logits(random_ids(2, 8) - 1)
    session.__exit__()
    np.testing.assert_array_equal(first, kept)


def test_settings_do_not_change_the_result(artifact: Path) -> None:
    ids = random_ids(2, 9)
    with OnnxRuntimeSession(artifact, ONE) as session:
        want = session.logits(ids)
    for settings in (replace(ONE, arena=False), OrtSettings(threads=2, spinning=False, inter_op_threads=2)):
        with OnnxRuntimeSession(artifact, settings) as session:
            np.testing.assert_allclose(session.logits(ids), want, atol=1e-5)


def test_packed_weights_are_the_dense_ones(packed: tuple[Path, Path]) -> None:
    dense, small = packed
    ids = random_ids(2, 9)
    with OnnxRuntimeSession(dense, ONE) as want, OnnxRuntimeSession(small, ONE) as got:
        gc.collect()  # the arrays that the weights came in
        junk = [np.full((64, 128), np.nan, np.float32) for _ in range(100)]
        assert len(junk) == 100
        np.testing.assert_array_equal(got.logits(ids), want.logits(ids))
        np.testing.assert_array_equal(got.generate(ids, 5), want.generate(ids, 5))
        assert got.engaged() == want.engaged()


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_on_a_gpu(provider: str, artifact: Path, reference: TorchSession, request: pytest.FixtureRequest) -> None:
    name = {"cuda": CUDA, "tensorrt": TENSORRT}[provider]
    if name not in ort.get_available_providers() or not torch.cuda.is_available():
        pytest.skip(f"no CUDA device, or an ONNX Runtime without {name}")
    if provider == "tensorrt" and read_graph(artifact / "model.onnx").grouped:
        pytest.skip("TensorRT does not read layout genai")
    with OnnxRuntimeSession(artifact, OrtSettings(provider, max_length=CONTEXT)) as session:
        assert check_parity(reference, session, vocab_size=VOCAB).max_abs_diff < 1e-3
        ids = random_ids(2, 12)
        np.testing.assert_array_equal(session.generate(ids, 20), reference.generate(ids, 20))
        asked = cuda_options(OrtSettings(provider))
        assert session.options()[CUDA].items() >= asked.items()
