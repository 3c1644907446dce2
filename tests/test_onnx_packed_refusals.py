"""What is not packed in ONNX files, and packed weights that are damaged or forged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.errors import ModelError, OutputError, SparsifyError, UsageError, VerificationError
from sparsify.exporters import onnx_packed_codec
from sparsify.exporters.onnx_packed import PackAs, pack_onnx, unpack_onnx
from sparsify.exporters.onnx_packed_reader import RECORD, PackedWeights
from sparsify.exporters.onnx_reader import OnnxWeights
from sparsify.types import NofM
from tests.packed_onnx import MANY, WANTED, random_bits, several, write_model

onnx = pytest.importorskip("onnx")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = write_model(tmp_path, several())
    pack_onnx(path, WANTED)
    return path


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


def test_names_that_are_no_text_are_damage(tmp_path: Path) -> None:
    """Protobuf gives them as bytes."""
    path = write_model(tmp_path, several())
    pack_onnx(path, WANTED)
    content = path.read_bytes()
    graph = onnx.load(path, load_external_data=False).graph
    for name in (graph.node[0].output[0].encode(), graph.initializer[0].name.encode()):
        path.write_bytes(content.replace(name, bytes([name[0] | 0x80]) + name[1:]))
        for read in (PackedWeights, OnnxWeights):
            with pytest.raises(ModelError, match="is no text; export the model again"):
                read(path)


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
