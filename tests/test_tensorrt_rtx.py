"""Real builds: TensorRT-RTX parses and builds our exports without a GPU, and refuses what is damaged."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsify.errors import ModelError, OutputError, SparsifyError, VerificationError
from sparsify.exporters import tensorrt_engine
from sparsify.exporters.tensorrt_api import TensorRt, load_tensorrt
from sparsify.exporters.tensorrt_engine import TWIN, build_engine
from sparsify.exporters.tensorrt_evidence import logged_layers
from sparsify.exporters.tensorrt_header import read_header
from sparsify.exporters.tensorrt_log import BuildLog
from sparsify.exporters.tensorrt_options import EngineOptions
from sparsify.exporters.tensorrt_source import read_source
from sparsify.exporters.tensorrt_trust import load_plan
from tests.tensorrt_models import F16, INT8, SMALL, Told, exported, graph, node, two_four

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def rtx() -> str:
    pytest.importorskip("tensorrt_rtx_bindings")
    return "tensorrt-rtx"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_rtx_parses_and_builds(rtx: str, out: Path, precision: str) -> None:
    told = Told()
    options = EngineOptions.parse([*SMALL, f"runtime={rtx}"])
    built = build_engine(exported(precision), out, options, progress=told)
    assert [name for name, _ in told.stages] == ["Building engine"] * 2
    assert told.steps > 0
    header = read_header(built.engine)
    assert header.kind == "tensorrt-rtx"
    assert header.precision == {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[precision]
    assert set(header.compute_capabilities) >= {"8.0", "8.6", "8.9", "12.0"}
    assert load_plan(built.engine, header)
    assert load_plan(out / TWIN, read_header(out / TWIN))
    assert built.proof.status == "unknown"
    assert "at run time" in built.proof.reason
    logged = logged_layers((out / "build.log").read_text().splitlines())
    nodes = {node for layer in logged for node in layer.nodes}
    # The log's layers are those of our graph: every linear is found again, in both profiles.
    for row in built.proof.linears:
        assert row.node in nodes
    assert any("[profile 1]" in layer.name for layer in logged)


def test_rtx_cannot_prove(rtx: str, out: Path) -> None:
    with pytest.raises(VerificationError, match="proves nothing"):
        build_engine(exported("fp16"), out, EngineOptions(runtime=rtx), require_sparse=True)
    assert not list(out.iterdir())


def test_rtx_options(rtx: str, out: Path) -> None:
    options = EngineOptions.parse([*SMALL, f"runtime={rtx}", "targets=8.6", "weight-streaming=on", "level=1"])
    assert build_engine(exported("fp16"), out, options, twin=False).header.compute_capabilities == ("8.6",)
    for entry, part in (
        ("targets=9.0", "cannot build for compute capability 9.0"),
        ("hardware=ampere-plus", "leave hardware= out"),
        ("timing-cache=x", "leave timing-cache= out"),
        ("tactic-sources=CUDNN", "no tactic source CUDNN"),
        ("workspace=1MiB", "raise workspace="),
        ("version-compatible=on", "version-compatible"),
    ):
        with pytest.raises(SparsifyError, match=part) as caught:
            build_engine(exported("fp16"), out, EngineOptions.parse([*SMALL, f"runtime={rtx}", entry]), twin=False)
        assert "\n" not in str(caught.value)


def test_rtx_engines_can_be_captured(rtx: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the flag RTX may allocate at run time, which no CUDA graph survives."""
    seen: list[bool] = []
    original = TensorRt.set_targets

    def look(self: TensorRt, config: Any, capabilities: Any) -> Any:
        seen.append(config.get_flag(self.module.BuilderFlag.REQUIRE_USER_ALLOCATION))
        return original(self, config, capabilities)

    monkeypatch.setattr(TensorRt, "set_targets", look)
    build_engine(exported("fp16"), out, EngineOptions.parse([*SMALL, f"runtime={rtx}"]), twin=False)
    assert seen == [True]


INTERRUPTED = """
import signal, sys
from pathlib import Path
from sparsify.exporters import tensorrt_log
from sparsify.exporters.tensorrt_engine import build_engine
from sparsify.exporters.tensorrt_options import EngineOptions
from sparsify.progress import Silent

# Where the tests run in the background, children are born deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
write, n = tensorrt_log.BuildLog.write, 0

class Counting(Silent):
    def advance(self, steps=1):
        if sys.argv[3] == "step":
            signal.raise_signal(signal.SIGINT)

def noted(self, severity, message):
    global n
    write(self, severity, message)
    n += 1
    if sys.argv[3] == "log" and n == 200:
        signal.raise_signal(signal.SIGINT)

tensorrt_log.BuildLog.write = noted
options = EngineOptions(runtime="tensorrt-rtx", batch=2, prompt=16, total=32)
try:
    build_engine(Path(sys.argv[1]), Path(sys.argv[2]), options, progress=Counting())
except KeyboardInterrupt:
    print("interrupted after", n)
    # Ctrl-C is Python's own again.
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("and again")
"""


@pytest.mark.parametrize("where", ["log", "step"])
def test_ctrl_c_ends_a_build(rtx: str, out: Path, where: str) -> None:
    arguments = [sys.executable, "-c", INTERRUPTED, str(exported("fp16")), str(out), where]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("interrupted after"), done.stdout + done.stderr
    assert done.stdout.endswith("and again\n")
    assert "KeyboardInterrupt" not in done.stderr
    assert {path.name for path in out.iterdir()} == {"build.log"}


def test_ctrl_c_from_outside_ends_a_build(rtx: str, out: Path) -> None:
    arguments = [sys.executable, "-c", INTERRUPTED, str(exported("fp16")), str(out), "outside"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + 60
        # Within TensorRT's build, whose log grows.
        while not (out / "build.log").exists() or (out / "build.log").stat().st_size == 0:
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        stdout, stderr = child.communicate(timeout=60)
    assert stdout.startswith("interrupted after"), stdout + stderr
    assert not list(out.glob("*.engine"))


def test_rtx_parses_int8_with_scales(rtx: str, out: Path) -> None:
    """The case of a model that carries scales: strong typing makes the product int8 by its Q/DQ nodes alone."""
    helper = onnx.helper
    nodes = [
        node("QuantizeLinear", ["x", "s"], "xq"),
        node("DequantizeLinear", ["xq", "s"], "xd"),
        node("DequantizeLinear", ["w", "s"], "wd"),
        node("MatMul", ["xd", "wd"], "y"),
    ]
    scale = helper.make_tensor("s", F16, [], [0.5])
    zero = helper.make_tensor("z", INT8, [], [0])
    nodes[0].input.append("z")
    path = out / "model.onnx"
    onnx.save(graph(two_four(64, 64, np.int8), nodes, data_type=INT8, extra=[scale, zero]), path)
    source = read_source(path)
    assert source.quantized
    assert source.layout[0].eligible
    assert source.layout[0].dtype == "int8"
    api, log = load_tensorrt(rtx), BuildLog()
    logger = api.logger(log)
    builder = api.builder(logger, log)
    network = tensorrt_engine.parse(api, builder, logger, source)
    config = builder.create_builder_config()
    api.set_targets(config, ["8.0"])
    api.set_flags(config, ["SPARSE_WEIGHTS"])
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 64), (8, 64), (8, 64))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None, log.errors


def test_contrib_operators_are_refused(rtx: str, tmp_path: Path, out: Path) -> None:
    model = onnx.load(exported("fp16"))
    model.graph.node.append(onnx.helper.make_node("GroupQueryAttention", ["logits"], ["q"], domain="com.microsoft"))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"com\.microsoft::GroupQueryAttention; export .* --layout standard"):
        build_engine(tmp_path / "model.onnx", out, EngineOptions(runtime=rtx))


def test_parser_errors_name_thenode(rtx: str, out: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], "a"), node("StringConcat", ["a", "a"], "y")]
    onnx.save(graph(two_four(64, 64), nodes, data_type=F16), out / "model.onnx")
    with pytest.raises(ModelError, match=r"cannot parse it: node n_y \(StringConcat\)") as caught:
        build_engine(out / "model.onnx", out, EngineOptions(runtime=rtx))
    assert "\n" not in str(caught.value)


def test_a_graph_that_is_no_decoder(rtx: str, out: Path) -> None:
    onnx.save(graph(two_four(64, 64), [node("MatMul", ["x", "w"], "y")], data_type=F16), out / "model.onnx")
    with pytest.raises(ModelError, match=r"input x .* is not one of a decoder"):
        build_engine(out / "model.onnx", out, EngineOptions(runtime=rtx))


def test_onnx_files_that_are_damaged(rtx: str, tmp_path: Path, out: Path) -> None:
    content = exported("fp16").read_bytes()
    path = tmp_path / "model.onnx"
    options = EngineOptions(runtime=rtx)
    for damaged in (b"", content[: len(content) // 2], b"\x00" * 100):
        path.write_bytes(damaged)
        with pytest.raises(SparsifyError) as caught:
            build_engine(path, out, options)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ModelError, match="missing"):
        build_engine(path, out, options)


def test_external_data_that_is_damaged(rtx: str, tmp_path: Path, out: Path) -> None:
    model = onnx.load(exported("fp16"))
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    options = EngineOptions.parse([*SMALL, f"runtime={rtx}"])
    built = build_engine(path, out, options, twin=False)
    assert set(built.header.source_sha256) == {"model.onnx", "model.onnx.data"}
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(ModelError, match="truncated"):
        build_engine(path, out, options)
    data.unlink()
    with pytest.raises(ModelError, match="external data"):
        build_engine(path, out, options)
    model = onnx.load(path, load_external_data=False)
    for location in ("../model.onnx.data", "/etc/passwd", "", ".", ".."):
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        onnx.save(model, path)
        with pytest.raises(ModelError, match="not one beside it"):
            build_engine(path, out, options)


def test_external_data_of_every_kind(rtx: str, tmp_path: Path, out: Path) -> None:
    path, data = tmp_path / "model.onnx", tmp_path / "data"
    data.write_bytes(bytes(64 * 64 * 2))

    def outside(name: str, **where: str) -> Any:
        tensor = onnx.TensorProto(name=name, data_type=F16, dims=(64, 64), data_location=onnx.TensorProto.EXTERNAL)
        for key, value in {"location": "data", **where}.items():
            tensor.external_data.add(key=key, value=value)
        return tensor

    def save(tensor: Any, place: str) -> None:
        model = graph(two_four(64, 64), [node("MatMul", ["x", "w"], "y")], data_type=F16)
        if place == "initializer":
            model.graph.initializer.append(tensor)
        elif place == "sparse":
            model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=tensor, dims=[64, 64]))
        else:
            constant = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
            if place == "function":
                imports = [onnx.helper.make_opsetid("", 21)]
                model.functions.append(onnx.helper.make_function("", "F", [], ["c"], [constant], imports))
            else:
                inner = onnx.helper.make_graph([constant], "inner", [], [])
                model.graph.node.append(onnx.helper.make_node("If", ["x"], [], then_branch=inner, else_branch=inner))
        onnx.save(model, path)

    for place in ("initializer", "sparse", "function", "subgraph"):
        save(outside("t"), place)
        assert set(read_source(path).sha256) == {"model.onnx", "data"}
        for where in ({"offset": "2"}, {"offset": "-2"}, {"length": "2"}, {"length": "99999"}, {"offset": "x"}):
            save(outside("t", **where), place)
            with pytest.raises(ModelError, match=r"truncated|malformed") as caught:
                read_source(path)
            assert "\n" not in str(caught.value)
    (tmp_path / "folder").mkdir()
    save(outside("t", location="folder"), "initializer")
    with pytest.raises(ModelError, match="no file"):
        read_source(path)
    negative = outside("t")
    negative.dims[0] = -64
    save(negative, "initializer")
    with pytest.raises(ModelError, match="malformed"):
        read_source(path)


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not a folder"):
        build_engine(exported("fp16"), tmp_path / "absent")
