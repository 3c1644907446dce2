"""Engine files: header, trust, and everything that can be wrong with them."""

import dataclasses
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsify.errors import MissingExtraError, ModelError, OutputError, UsageError
from sparsify.exporters.tensorrt_api import TensorRt, check_gpu, check_opset, load_tensorrt
from sparsify.exporters.tensorrt_engine import build_engine
from sparsify.exporters.tensorrt_header import EngineHeader, check, header_path, read_header, write_header
from sparsify.exporters.tensorrt_options import EngineOptions
from sparsify.exporters.tensorrt_trust import load_plan
from tests.fake_tensorrt import Behaviour
from tests.tensorrt_models import (
    GPU,
    SMALL,
    exported,
)

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def engine(fake: Behaviour, out: Path) -> Path:
    return build_engine(exported("fp16"), out, EngineOptions.parse(SMALL), twin=False).engine


def test_engines_that_do_not_fit(engine: Path) -> None:
    header = read_header(engine)
    here: dict[str, Any] = {"kind": "tensorrt", "version": "11.4.0.106", "compute_capability": "9.0"}
    check(engine, header, **here, source_sha256=dict(header.source_sha256))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"kind": "tensorrt-rtx"}, "is an engine for tensorrt, this is tensorrt-rtx"),
        ({"version": "11.5.0.1"}, r"was built with tensorrt 11\.4\.0\.106, this is 11\.5\.0\.1"),
        ({"version": "10.16.1.11"}, "this is 10"),
        ({"compute_capability": "8.9"}, r"compute capability 9\.0 \(Pretend GPU\), this GPU has 8\.9"),
        ({"source_sha256": {"model.onnx": "0" * 64}}, r"from another model\.onnx"),
    ]
    for change, part in changes:
        with pytest.raises(ModelError, match=part) as caught:
            check(engine, header, **{**here, **change})
        assert "\n" not in str(caught.value)
    newer = dataclasses.replace(header, version_compatible=True)
    check(engine, newer, kind="tensorrt", version="11.5.0.1", compute_capability="9.0")
    for version in ("12.0.0.0", "11.3.0.0"):
        with pytest.raises(ModelError, match="was built with"):
            check(engine, newer, kind="tensorrt", version=version, compute_capability="9.0")
    with pytest.raises(ModelError, match="several versions"):
        check(
            engine,
            dataclasses.replace(newer, kind="tensorrt-rtx", version="1.7.1.116"),
            **{**here, "kind": "tensorrt-rtx", "version": "1.7.1.116"},
        )
    wide = dataclasses.replace(header, hardware_compatibility="ampere-plus")
    check(engine, wide, kind="tensorrt", version="11.4.0.106", compute_capability="12.0")
    with pytest.raises(ModelError, match="and later"):
        check(engine, wide, kind="tensorrt", version="11.4.0.106", compute_capability="7.5")


def test_engine_files_that_are_damaged(engine: Path) -> None:
    header = read_header(engine)
    content = engine.read_bytes()
    engine.write_bytes(content[:-1])
    with pytest.raises(ModelError, match="truncated"):
        read_header(engine)
    engine.write_bytes(content + b"x")
    with pytest.raises(ModelError, match="longer"):
        read_header(engine)
    engine.write_bytes(content[:-1] + b"x")
    with pytest.raises(ModelError, match="differs"):
        load_plan(engine, read_header(engine))
    header_path(engine).unlink()
    with pytest.raises(ModelError, match="no header"):
        read_header(engine)
    engine.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        read_header(engine)
    with pytest.raises(ModelError, match="cannot be read"):
        load_plan(engine, header)


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_headers_that_are_damaged(engine: Path, data: st.DataObject) -> None:
    path = header_path(engine)
    whole = path.read_text()
    value = json.loads(whole)
    junk: list[Any] = [None, True, -1, 1.5, "x", "", [], {}, [[]], {"a": 1}, [{"name": 1}], "0" * 64]
    if data.draw(st.booleans()):
        text = whole.encode()
        cut = data.draw(st.integers(0, len(text)))
        path.write_bytes(text[:cut] + data.draw(st.binary(max_size=3)))
    else:
        key = data.draw(st.sampled_from(sorted(value)))
        path.write_text(json.dumps({**value, key: data.draw(st.sampled_from(junk))}))
    # What is read is well-formed: it can be written and read again. What is not is refused in one line.
    message, header = _attempt(lambda: read_header(engine))
    assert "\n" not in message
    if header is not None:
        write_header(engine, header)
        assert read_header(engine) == header
    path.write_text(whole)


def _attempt(read: Callable[[], EngineHeader]) -> tuple[str, EngineHeader | None]:
    try:
        return "", read()
    except ModelError as error:
        return str(error), None


def test_a_header_too_large_to_be_one(engine: Path) -> None:
    header_path(engine).write_text("[" * (5 << 20))
    with pytest.raises(ModelError, match="larger than"):
        read_header(engine)
    header_path(engine).write_text("[" * 100_000)
    with pytest.raises(ModelError, match="is not an engine header"):
        read_header(engine)


def test_only_own_engines_are_loaded(engine: Path, cache: Path, tmp_path: Path) -> None:
    header = read_header(engine)
    assert load_plan(engine, header) == engine.read_bytes()
    moved = tmp_path / "moved.engine"
    shutil.copy(engine, moved)
    shutil.copy(header_path(engine), header_path(moved))
    assert load_plan(moved, read_header(moved)) == engine.read_bytes()
    registry = cache / "engines"
    assert registry.stat().st_mode & 0o777 == 0o700
    # A registry that others can write to vouches for nothing.
    registry.chmod(0o777)
    with pytest.raises(UsageError, match="--trust-engine"):
        load_plan(engine, header)
    registry.chmod(0o700)
    (registry / header.plan_sha256).unlink()
    with pytest.raises(UsageError, match="--trust-engine") as caught:
        load_plan(engine, header)
    assert "\n" not in str(caught.value)
    assert load_plan(engine, header, trust_engine=True) == engine.read_bytes()


def test_a_cache_that_is_not_ones_own(fake: Behaviour, out: Path, cache: Path) -> None:
    (cache / "engines").mkdir(parents=True)
    (cache / "engines").chmod(0o777)
    with pytest.raises(OutputError, match="chmod 700"):
        build_engine(exported("fp16"), out, EngineOptions.parse(SMALL), twin=False)


def test_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="choose one of tensorrt, tensorrt-rtx"):
        load_tensorrt("trt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="tensorrt not found; run: pip install tensorrt-cu13") as caught:
        load_tensorrt("tensorrt")
    assert "\n" not in str(caught.value)
    with pytest.raises(MissingExtraError, match="tensorrt-rtx-cu13-libs"):
        load_tensorrt()


def test_a_broken_tensorrt_is_not_replaced_by_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        if name == "tensorrt":
            raise OSError("libnvinfer.so.11: cannot open shared object file")
        return SimpleNamespace(__version__="1.7.1.116")

    installed = {"tensorrt", "tensorrt_rtx"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(importlib, "import_module", load)
    with pytest.raises(MissingExtraError, match=r"libnvinfer\.so\.11.*runtime=tensorrt-rtx") as caught:
        load_tensorrt()
    assert "\n" not in str(caught.value)
    assert load_tensorrt("tensorrt-rtx").kind == "tensorrt-rtx"
    installed.remove("tensorrt")
    assert load_tensorrt().kind == "tensorrt-rtx"


@pytest.mark.parametrize(
    ("kind", "version", "opset", "fits"),
    [
        ("tensorrt", "8.6.1", 23, False),
        ("tensorrt", "10.14.1.48", 23, False),
        ("tensorrt", "10.14.1.48", 22, True),
        ("tensorrt", "8.6.1", 18, True),
        ("tensorrt", "10.15.1.29", 23, True),
        ("tensorrt", "11.4.0.106", 24, True),
        ("tensorrt-rtx", "1.7.1.116", 23, True),
    ],
)
def test_opsets_that_a_version_reads(kind: str, version: str, opset: int, fits: bool) -> None:
    api = TensorRt(SimpleNamespace(__version__=version), kind)
    if fits:
        check_opset(api, opset)
        return
    with pytest.raises(UsageError, match="--opset 18"):
        check_opset(api, opset)


def test_builds_that_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    trt, rtx = (TensorRt(SimpleNamespace(__version__="11.4"), kind) for kind in ("tensorrt", "tensorrt-rtx"))
    monkeypatch.setattr("sparsify.exporters.tensorrt_api.find_gpu", lambda: None)
    check_gpu(rtx)
    with pytest.raises(UsageError, match="refit=on"):
        check_gpu(rtx, refit=True)
    with pytest.raises(UsageError, match="runtime=tensorrt-rtx"):
        check_gpu(trt)
    monkeypatch.setattr("sparsify.exporters.tensorrt_api.find_gpu", lambda: GPU)
    for api in (trt, rtx):
        check_gpu(api, refit=True)
