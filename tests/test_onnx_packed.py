"""Packed weights in ONNX files: what ONNX Runtime folds, what we read, what damage does; numpy is the reference."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, Qwen2Config

from sparsify.errors import ModelError, OutputError, SparsifyError, UsageError, VerificationError
from sparsify.exporters import onnx_packed_codec
from sparsify.exporters.onnx_functions import load_peak_bytes
from sparsify.exporters.onnx_packed import PackAs, PackReport, pack_onnx, unpack_onnx
from sparsify.exporters.onnx_packed_reader import RECORD, PackedWeights
from sparsify.exporters.onnx_packed_session import dense_for_session
from sparsify.exporters.onnx_standard import export_onnx
from sparsify.types import NofM

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

Bits = NDArray[Any]
# onnx.TensorProto data types -> type of the bit patterns
TYPES: dict[int, np.dtype[Any]] = {1: np.dtype("u4"), 10: np.dtype("u2"), 16: np.dtype("u2")}
PATTERNS = [NofM(2, 4), NofM(1, 4), NofM(4, 8), NofM(1, 8), NofM(1, 2)]
MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_bits(shape: tuple[int, ...], data_type: int, seed: int) -> Bits:
    """Finite floats, no +0.0, some -0.0."""
    rng = np.random.default_rng(seed)
    dtype = TYPES[data_type]
    sign = np.uint64(1) << np.uint64(8 * dtype.itemsize - 1)
    bits = rng.integers(1, int(sign) // 2, shape, dtype=np.uint64) | (rng.integers(0, 2, shape, dtype=np.uint64) * sign)
    bits[rng.random(shape) < 0.05] = sign
    return bits.astype(dtype)


def keep_random(shape: tuple[int, ...], pattern: NofM, axis: int, seed: int) -> NDArray[np.bool_]:
    order = np.random.default_rng(seed).random((*shape[:axis], *shape[axis + 1 :], shape[axis] // pattern.m, pattern.m))
    keep = order.argsort(axis=-1) < pattern.n
    return np.ascontiguousarray(np.moveaxis(keep.reshape(*order.shape[:-2], shape[axis]), -1, axis))


def write_model(folder: Path, weights: dict[str, tuple[int, Bits]], *, opset: int = 23, external: bool = True) -> Path:
    """A model whose output ``y_NAME`` is the weight in the shape [size] that its input says."""
    helper = onnx.helper
    initializers = [
        helper.make_tensor(name, data_type, bits.shape, bits.tobytes(), raw=True)
        for name, (data_type, bits) in weights.items()
    ]
    nodes = [helper.make_node("Reshape", [name, "size"], [f"y_{name}"]) for name in weights]
    outputs = [helper.make_tensor_value_info(f"y_{name}", t, ["k"]) for name, (t, _) in weights.items()]
    size = [helper.make_tensor_value_info("size", onnx.TensorProto.INT64, [1])]
    graph = helper.make_graph(nodes, "g", size, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=external, location="model.onnx.data", size_threshold=64)
    return path


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


def several() -> dict[str, tuple[int, Bits]]:
    """Two of one layout, one along the other axis, experts, any pattern, and one that will not be packed."""
    weights = {name: (1, random_bits((32, 64), 1, seed)) for seed, name in enumerate("abcde")}
    for name, axis in (("a", 1), ("b", 1), ("c", 0)):
        weights[name][1][~keep_random((32, 64), NofM(2, 4), axis, 1)] = 0
    weights["d"][1][np.random.default_rng(0).random((32, 64)) < 0.6] = 0
    weights["f"] = (10, random_bits((3, 16, 24), 10, 9))
    weights["f"][1][~keep_random((3, 16, 24), NofM(2, 4), 1, 2)] = 0
    return weights


WANTED = {
    **{name: PackAs(NofM(2, 4), 1) for name in "abf"},
    "c": PackAs(NofM(2, 4), 0),
    "d": PackAs(None, 0),
    "e": PackAs(None, 0),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = write_model(tmp_path, several())
    pack_onnx(path, WANTED)
    return path


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


def test_what_cannot_gain_stays_dense(tmp_path: Path) -> None:
    weights = {
        "odd": (1, random_bits((4, 12), 1, 0)),
        "flat": (1, random_bits((64,), 1, 0)),
        "full": (1, random_bits((16, 16), 1, 0)),
        "stack": (1, np.zeros((8, 2, 8), np.uint32)),
        "wide": (1, np.zeros((4, 32), np.uint32)),
    }
    path = write_model(tmp_path, weights)
    before = {x.name: x.read_bytes() for x in tmp_path.iterdir()}
    two_four = NofM(2, 4)
    report = pack_onnx(
        path,
        {
            "odd": PackAs(two_four, 1),
            "flat": PackAs(None, 0),
            "full": PackAs(None, 0),
            "stack": PackAs(two_four, 0),
            "wide": PackAs(NofM(8, 16), 1),
        },
    )
    assert report.packed == ()
    assert {name: reason.split(",")[0][:20] for name, reason in report.dense.items()} == {
        "odd": "2:4 along an axis of",
        "flat": "has shape [64]",
        "full": "would take 1152 byte",
        "stack": "2:4 along axis 0 of ",
        "wide": "8:16 along an axis o",
    }
    assert {x.name: x.read_bytes() for x in tmp_path.iterdir()} == before


def test_refusals_leave_the_file(tmp_path: Path) -> None:
    path = write_model(tmp_path, several())
    before = {x.name: x.read_bytes() for x in tmp_path.iterdir()}
    with pytest.raises(VerificationError, match=r"initializer e: keeps more than 2:4"):
        pack_onnx(path, {"a": WANTED["a"], "e": PackAs(NofM(2, 4), 1)})
    with pytest.raises(UsageError, match=r"axis 2 of \[32, 64\]"):
        pack_onnx(path, {"a": PackAs(NofM(2, 4), 2)})
    with pytest.raises(ModelError, match="no initializer 'z'"):
        pack_onnx(path, {"z": WANTED["a"]})
    with pytest.MonkeyPatch.context() as patch:

        def refuse(path: str) -> None:
            raise onnx.checker.ValidationError("no")

        patch.setattr(onnx.checker, "check_model", refuse)
        with pytest.raises(VerificationError, match="ONNX's own checks"):
            pack_onnx(path, WANTED)
    assert {x.name: x.read_bytes() for x in tmp_path.iterdir()} == before
    with pytest.raises(ModelError, match="opset 17"):
        pack_onnx(write_model(tmp_path, several(), opset=17), WANTED)


def test_packing_twice_and_unpacking_dense_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="packed weights already"):
        pack_onnx(model, WANTED)
    with pytest.raises(OutputError, match="exists"):
        unpack_onnx(model, tmp_path)
    with pytest.raises(OutputError, match="not a folder"):
        unpack_onnx(model, tmp_path / "absent")
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    with pytest.raises(ModelError, match="no packed weights"):
        unpack_onnx(write_model(one, several()), other)
    with pytest.raises(ModelError, match="missing, truncated"):
        PackedWeights(tmp_path / "absent.onnx")


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


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.packed.data"])
@MANY
@given(data=st.data())
def test_damage_is_noticed(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    weights = several()
    path = write_model(folder, weights)
    pack_onnx(path, WANTED)
    content = bytearray((folder / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(content)
    out = folder / "out"
    out.mkdir()
    try:
        packed = PackedWeights(path)
        for weight in packed.names:
            assert packed.read_bits(weight).tobytes() == weights[weight][1].tobytes()
        unpack_onnx(path, out)
    except SparsifyError as error:
        damage = str(error)
    else:
        return
    assert "\n" not in damage
    assert not list(out.iterdir())


def edited(path: Path, edit: Callable[[Any], None]) -> Path:
    stored = onnx.load(path, load_external_data=False)
    edit(stored)
    path.write_bytes(stored.SerializeToString())
    return path


def edit_record(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], None]:
    def edit(stored: Any) -> None:
        entry = next(entry for entry in stored.metadata_props if entry.key == RECORD)
        content = json.loads(entry.value)
        change(content)
        entry.value = json.dumps(content)

    return edit


def entry_of(name: str, key: str, value: Any) -> Callable[[Any], None]:
    return edit_record(lambda record: record["weights"][name].update({key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shape", [32]),
        ("shape", [1 << 40, 64]),
        ("shape", [1 << 30, 1 << 30]),
        ("shape", [-32, 64]),
        ("shape", "ab"),
        ("shape", None),
        ("shape", [32, 128]),
        ("type", 7),
        ("type", 10),
        ("type", [1]),
        ("pattern", "4:2"),
        ("pattern", "0:0"),
        ("pattern", "2:3"),
        ("pattern", None),
        ("pattern", "1:2:3"),
        ("axis", 2),
        ("axis", -1),
        ("axis", 0),
        ("axis", True),
        ("n_values", 1 << 60),
        ("n_values", 1),
        ("gap_bits", 4),
        ("crc", [0, 0]),
        ("crc", [1]),
        ("crc", None),
    ],
)
def test_hostile_records(model: Path, key: str, value: Any) -> None:
    edited(model, entry_of("a", key, value))
    with pytest.raises(ModelError, match=r"model\.onnx"):
        PackedWeights(model).read("a")


@pytest.mark.parametrize("content", ["[]", "{", "null", '{"format": 2}', '{"format": 1, "weights": []}', "[" * 10000])
def test_hostile_record_texts(model: Path, content: str) -> None:
    def edit(stored: Any) -> None:
        next(entry for entry in stored.metadata_props if entry.key == RECORD).value = content

    with pytest.raises(ModelError, match=r"sparsify\.packed is malformed"):
        PackedWeights(edited(model, edit))


def swap(stored: Any, one: str, other: str) -> None:
    tensors = {tensor.name: tensor for tensor in stored.graph.initializer}
    a, b = tensors[one], tensors[other]
    a.name, b.name = other, one


def point(stored: Any, name: str, key: str, value: str) -> None:
    tensor = next(tensor for tensor in stored.graph.initializer if tensor.name == name)
    next(entry for entry in tensor.external_data if entry.key == key).value = value


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: swap(m, "a.values", "b.values"), "differs from its checksum"),
        (lambda m: swap(m, "a.values", "d.values"), "want type"),
        (lambda m: point(m, "a.values", "location", "../model.onnx.packed.data"), "not a file beside it"),
        (lambda m: point(m, "a.values", "location", "/etc/passwd"), "not a file beside it"),
        (lambda m: point(m, "a.values", "location", "absent"), "wants bytes"),
        (lambda m: point(m, "a.values", "offset", "-4096"), "wants bytes"),
        (lambda m: point(m, "a.values", "offset", str(1 << 70)), "wants bytes"),
        (lambda m: point(m, "a.values", "length", "4"), "has 4 bytes"),
        (lambda m: point(m, "a.values", "length", "x"), "invalid literal"),
        (lambda m: m.functions.pop(), "unpacking functions"),
        (lambda m: m.functions[0].node.pop(), "unpacking functions"),
        (lambda m: m.graph.node.pop(0), "unpacking nodes"),
        (lambda m: setattr(m.graph.initializer[-1], "name", "sparsify.other"), "unpacking tables"),
        (lambda m: setattr(m.opset_import[0], "version", 25), "opset 25"),
    ],
)
def test_hostile_graphs(model: Path, edit: Callable[[Any], None], message: str) -> None:
    edited(model, edit)
    with pytest.raises(ModelError, match=message):
        PackedWeights(model).read("a")
    out = model.parent / "out"
    out.mkdir()
    with pytest.raises(ModelError, match=message):
        unpack_onnx(model, out)
    assert not list(out.iterdir())


def test_forged_checksums_do_not_hide_a_wrong_mask(model: Path) -> None:
    packed = PackedWeights(model)
    for name, wrong, message in (("a", 0b11111111, "does not keep 2:4"), ("d", 0, "the same place")):
        layout = packed.layouts[name]
        places = np.full(layout.places_bytes, wrong, np.uint8)
        values = np.ones(layout.values_shape, np.uint32)
        shape = layout.places_shape if layout.pattern else places.shape
        with pytest.raises(ModelError, match=message):
            onnx_packed_codec.decode(values, places.reshape(shape), layout, name)
    far = np.full(packed.layouts["d"].places_bytes, 0xFF, np.uint8)
    with pytest.raises(ModelError, match="beyond its end"):
        onnx_packed_codec.decode(np.ones(packed.layouts["d"].values_shape, np.uint32), far, packed.layouts["d"], "d")


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
