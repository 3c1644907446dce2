"""Packed weights in ONNX files: what ONNX Runtime folds and what we read; numpy is the reference."""

import shutil
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, Qwen2Config

from sparsify.exporters import onnx_packed_codec
from sparsify.exporters.onnx_functions import load_peak_bytes
from sparsify.exporters.onnx_packed import PackAs, PackReport, pack_onnx, unpack_onnx
from sparsify.exporters.onnx_packed_reader import PackedWeights
from sparsify.exporters.onnx_packed_session import dense_for_session
from sparsify.exporters.onnx_standard import export_onnx
from sparsify.types import NofM
from tests.packed_onnx import MANY, PATTERNS, TYPES, WANTED, Bits, keep_random, random_bits, several, write_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def folded(path: Path) -> dict[str, bytes]:
    """The initializers that plain ONNX Runtime has after basic optimisation, and nothing else was computed."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path.with_name("optimized.onnx"))
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(path.with_name("optimized.onnx")).graph
    assert {node.op_type for node in graph.node} == {"Reshape"}
    return {tensor.name: onnx.numpy_helper.to_array(tensor).tobytes() for tensor in graph.initializer}


def check_everywhere(path: Path, weights: dict[str, tuple[int, Bits]], report: PackReport) -> None:
    """ONNX Runtime, the reader, the unpacked file and the arrays for a session all hold the dense bits."""
    packed = PackedWeights(path)
    assert packed.names == report.packed
    in_session = dense_for_session(path)
    out = path.parent / "dense"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    unpack_onnx(path, out)
    unpacked = onnx.load(out / "model.onnx")
    assert not unpacked.functions
    assert [node.op_type for node in unpacked.graph.node] == ["Reshape"] * len(weights)
    stored = {tensor.name: tensor for tensor in unpacked.graph.initializer}
    assert stored.keys() == weights.keys()
    runtime = folded(path)
    for name, (data_type, bits) in weights.items():
        assert runtime[name] == bits.tobytes()
        assert onnx.numpy_helper.to_array(stored[name]).tobytes() == bits.tobytes()
        assert (stored[name].data_type, tuple(stored[name].dims)) == (data_type, bits.shape)
        if name in packed.names:
            read = packed.read(name)
            assert read.shape == bits.shape
            assert read.dtype == onnx.helper.tensor_dtype_to_np_dtype(data_type)
            assert read.tobytes() == bits.tobytes()
            place = in_session.names.index(name)
            assert in_session.arrays[place].tobytes() == bits.tobytes()


@st.composite
def patterned(draw: st.DrawFn) -> tuple[int, Bits, PackAs]:
    data_type = draw(st.sampled_from(sorted(TYPES)))
    pattern = draw(st.sampled_from(PATTERNS))
    shape = [draw(st.integers(1, 7)) for _ in range(draw(st.sampled_from([2, 3])))]
    axis = len(shape) - draw(st.sampled_from([1, 2]))
    shape[axis] = 8 * draw(st.integers(1, 5))
    seed = draw(st.integers(0, 1000))
    bits = random_bits(tuple(shape), data_type, seed)
    bits[~keep_random(tuple(shape), pattern, axis, seed)] = 0
    # More zeros than the pattern wants, up to all.
    bits[np.random.default_rng(seed).random(shape) < draw(st.sampled_from([0, 0, 0.3, 1]))] = 0
    return data_type, bits, PackAs(pattern, axis)


@st.composite
def unpatterned(draw: st.DrawFn) -> tuple[int, Bits, PackAs]:
    data_type = draw(st.sampled_from(sorted(TYPES)))
    shape = tuple(draw(st.integers(1, 40)) for _ in range(draw(st.sampled_from([2, 3]))))
    seed = draw(st.integers(0, 1000))
    bits = random_bits(shape, data_type, seed)
    bits[np.random.default_rng(seed).random(shape) < draw(st.sampled_from([0, 0.3, 0.5, 0.9, 0.99, 0.999, 1]))] = 0
    bits[draw(st.integers(0, shape[0])) :] = 0
    return data_type, bits, PackAs(None, 0)


@MANY
@given(case=st.one_of(patterned(), unpatterned()), opset=st.integers(18, 24), external=st.booleans())
def test_packed_is_dense_bit_for_bit(
    tmp_path: Path, case: tuple[int, Bits, PackAs], opset: int, external: bool
) -> None:
    data_type, bits, wanted = case
    path = write_model(tmp_path, {"w": (data_type, bits)}, opset=opset, external=external)
    before = path.read_bytes()
    report = pack_onnx(path, {"w": wanted})
    if wanted.pattern is None and not report.packed:
        # The bits say whether there was anything to gain: a value and half a byte for each kept weight.
        assert path.read_bytes() == before
        assert 2 * np.count_nonzero(bits) * (bits.itemsize + 0.5) >= bits.nbytes or bits.size < 64
        return
    assert report.dense == {}
    assert report.dense_bytes == bits.nbytes
    assert report.packed_bytes < report.dense_bytes
    check_everywhere(path, {"w": (data_type, bits)}, report)


@given(case=st.one_of(patterned(), unpatterned()))
@MANY
def test_blocks_do_not_show(case: tuple[int, Bits, PackAs], tmp_path: Path) -> None:
    data_type, bits, wanted = case
    results = []
    for block in (8, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(onnx_packed_codec, "_BLOCK", block)
            path = write_model(tmp_path, {"w": (data_type, bits)})
            if not pack_onnx(path, {"w": wanted}).packed:
                return
            assert PackedWeights(path).read_bits("w").tobytes() == bits.tobytes()
            results.append([path.read_bytes(), *(x.read_bytes() for x in sorted(tmp_path.glob("*.packed.data")))])
    assert results[0] == results[1]


def test_several_weights_share_what_they_can(tmp_path: Path) -> None:
    weights = several()
    path = write_model(tmp_path, weights)
    report = pack_onnx(path, WANTED)
    assert report.packed == ("a", "b", "f", "c", "d")
    assert list(report.dense) == ["e"]
    assert "would take" in report.dense["e"]
    check_everywhere(path, weights, report)
    stored = onnx.load(path, load_external_data=False)
    counts = Counter(node.op_type for node in stored.graph.node)
    # Zeros: [32, 64], [2048] and [3, 16, 24]; tables for 8, 4 and 2 bytes along the axis.
    assert counts == {"Unpack4of8": 4, "UnpackGaps": 1, "Tables4of8": 3, "ConstantOfShape": 3, "Reshape": 6}
    assert not stored.graph.sparse_initializer
    assert {x.name for x in tmp_path.iterdir()} == {"model.onnx", "model.onnx.packed.data", "dense", "optimized.onnx"}


def inlined_bytes(model: Any) -> int:
    """Bytes of everything that the unpacking nodes compute, from ONNX's own inliner and shape inference."""
    from onnx import inliner

    plain = inliner.inline_local_functions(model)
    inferred = onnx.shape_inference.infer_shapes(plain, data_prop=True, strict_mode=True)
    infos = {info.name: info.type.tensor_type for info in (*inferred.graph.value_info, *inferred.graph.output)}
    total = 0
    for node in inferred.graph.node:
        if node.op_type in ("Constant", "Reshape") and node.output[0].startswith("y_"):
            continue
        for output in node.output:
            dims = [dim.dim_value for dim in infos[output].shape.dim]
            assert all(infos[output].shape.dim[i].HasField("dim_value") for i in range(len(dims)))
            total += prod(dims) * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(infos[output].elem_type)).itemsize
    return total


@pytest.mark.parametrize("name", ["a", "c", "d", "f"])
def test_load_peak_is_what_the_functions_compute(tmp_path: Path, name: str) -> None:
    weights = {name: several()[name]}
    path = write_model(tmp_path, weights)
    report = pack_onnx(path, {name: WANTED[name]})
    layouts = PackedWeights(path).layouts
    computed = inlined_bytes(onnx.load(path))
    # What is not counted: the constants of the functions and the starts of columns, some bytes each.
    assert 0 <= computed + report.packed_bytes - load_peak_bytes(layouts) < 256
    assert report.load_peak_bytes == PackedWeights(path).load_peak_bytes == load_peak_bytes(layouts)


def test_values_of_subgraphs_move_along(tmp_path: Path) -> None:
    path = write_model(tmp_path, several())
    stored = onnx.load(path)
    helper = onnx.helper
    inner = np.arange(512, dtype=np.float32)
    branch = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["o"])],
        "branch",
        [],
        [helper.make_tensor_value_info("o", 1, [512])],
        [onnx.numpy_helper.from_array(inner, "inner")],
    )
    stored.graph.input.append(helper.make_tensor_value_info("which", onnx.TensorProto.BOOL, []))
    stored.graph.output.append(helper.make_tensor_value_info("z", 1, [512]))
    stored.graph.node.append(helper.make_node("If", ["which"], ["z"], then_branch=branch, else_branch=branch))
    for file in tmp_path.iterdir():
        file.unlink()
    onnx.save(stored, path, save_as_external_data=True, location="model.onnx.data", size_threshold=64)
    outer = onnx.load(path, load_external_data=False)
    for attribute in outer.graph.node[-1].attribute:
        tensor = attribute.g.initializer[0]
        tensor.raw_data = inner.tobytes()
        onnx.external_data_helper.set_external_data(tensor, "inner.data", 0, inner.nbytes)
        tensor.ClearField("raw_data")
    (tmp_path / "inner.data").write_bytes(inner.tobytes())
    onnx.save(outer, path)
    pack_onnx(path, WANTED)
    assert {x.name for x in tmp_path.iterdir()} == {"model.onnx", "model.onnx.packed.data"}
    for attribute in onnx.load(path).graph.node[-1].attribute:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(attribute.g.initializer[0]), inner)


def test_session_without_folding(tmp_path: Path) -> None:
    weights = several()
    path = write_model(tmp_path, weights)
    pack_onnx(path, WANTED)
    dense = dense_for_session(path)
    assert "e" not in dense.names
    assert len(dense.proto) < sum(bits.nbytes for _, bits in weights.values()) / 4
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(dense.folder))
    values = [
        onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, data_type)
        for array, data_type in zip(dense.arrays, dense.data_types, strict=True)
    ]
    options.add_external_initializers(list(dense.names), values)
    session = onnxruntime.InferenceSession(dense.proto, options, providers=["CPUExecutionProvider"])
    outputs = session.run([f"y_{name}" for name in weights], {"size": np.array([-1])})
    for (name, (_, bits)), output in zip(weights.items(), outputs, strict=True):
        assert output.tobytes() == bits.tobytes(), name


def run_decoder(path: Path) -> tuple[list[tuple[str, str]], list[NDArray[Any]]]:
    """Operators left after optimisation, and every output for two sequences without a cache."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_name("optimized.onnx"))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    ids = np.arange(3, 15, dtype=np.int64).reshape(2, 6)
    feeds: dict[str, NDArray[Any]] = {}
    for value in session.get_inputs():
        past = len(value.shape) == 4
        feeds[value.name] = np.zeros((2, value.shape[1], 0, value.shape[3]) if past else 0, np.float32)
    feeds["input_ids"], feeds["attention_mask"] = ids, np.ones_like(ids)
    if "position_ids" in feeds:
        feeds["position_ids"] = np.broadcast_to(np.arange(6), (2, 6)).copy()
    nodes = onnx.load(path.with_name("optimized.onnx")).graph.node
    return sorted((node.domain, node.op_type) for node in nodes), session.run(None, feeds)


def test_exported_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    network = AutoModelForCausalLM.from_config(config)
    linears = {}
    for name, module in network.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.15)
            groups = module.weight.data.view(-1, 4)
            groups[torch.arange(len(groups)).unsqueeze(1), groups.abs().argsort(dim=1)[:, :2]] = 0
            linears[f"model.{name}"] = module.weight.detach().numpy()
    network.save_pretrained(tmp_path / "checkpoint")
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    dense.mkdir()
    export_onnx(tmp_path / "checkpoint", dense)
    shutil.copytree(dense, packed)
    contents = {weight.tobytes(): 1 for weight in linears.values()}
    contents.update({np.ascontiguousarray(weight.T).tobytes(): 0 for weight in linears.values()})
    wanted = {
        tensor.name: PackAs(NofM(2, 4), contents[tensor.raw_data])
        for tensor in onnx.load(dense / "model.onnx").graph.initializer
        if tensor.raw_data in contents
    }
    report = pack_onnx(packed / "model.onnx", wanted)
    assert len(report.packed) == len(linears) == 14
    # Half the values, and a bit for each of the others' 32.
    assert 32 * report.packed_bytes == 17 * report.dense_bytes
    (nodes, outputs), (packed_nodes, packed_outputs) = (
        run_decoder(dense / "model.onnx"),
        run_decoder(packed / "model.onnx"),
    )
    assert packed_nodes == nodes
    for output, packed_output in zip(outputs, packed_outputs, strict=True):
        np.testing.assert_array_equal(output, packed_output)
