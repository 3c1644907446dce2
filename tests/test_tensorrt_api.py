"""Every name of TensorRT that our code uses exists in the real bindings of 10.16, 11.4 and TensorRT-RTX.

The bindings load without TensorRT's libraries where stubs stand in for these, so this needs gcc and no GPU. ``make
install`` puts the bindings under the environment's folder. Our code calls objects by what they are (``builder``,
``config``, ``engine``), which is what tells their class here.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sparsify
from tests.fake_tensorrt import Behaviour, make_tensorrt

SOURCES = sorted(Path(sparsify.__file__).parent.glob("*/tensorrt_*.py"))
VERSIONS = {"11": "11.4.0.106", "10": "10.16.1.11"}
# What the bindings need of the libraries to be imported; every call would return a null pointer.
SYMBOLS = [
    *("createInferBuilder_INTERNAL", "createInferRuntime_INTERNAL", "createInferRefitter_INTERNAL"),
    *("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion"),
    *("getBuilderPluginRegistry", "getPluginRegistry", "getInferLibVersion", "getLogger", "initLibNvInferPlugins"),
]
# Name of a variable in our code -> the classes it may be of.
VARIABLES = {
    "builder": ["Builder"],
    "network": ["INetworkDefinition"],
    "config": ["IBuilderConfig", "IRuntimeConfig"],
    "profile": ["IOptimizationProfile"],
    "parser": ["OnnxParser", "OnnxParserRefitter"],
    "cache": ["ITimingCache"],
    "runtime": ["Runtime"],
    "engine": ["ICudaEngine"],
    "native": ["ICudaEngine"],
    "loaded": ["ICudaEngine"],
    "context": ["IExecutionContext"],
    "refitter": ["Refitter"],
    "layer": ["ILayer", "IAttentionInputLayer"],
    "attention": ["IAttention"],
    "inspector": ["EngineInspector"],
    "parser_error": ["ParserError"],
}
# Where such a name, not annotated, stands for an object of ours.
ELSEWHERE = {("tensorrt_session.py", "engine")}
# What 11.4 no longer has, or has not: asked for behind a check of the version.
OLDER = {"EXPLICIT_BATCH", "FP16", "INT8", "device_memory_size", "create_execution_context_without_device_memory"}
OLDER |= {"get_device_memory_size_for_profile", "weight_streaming_budget"}
ONLY_RTX = {"ComputeCapability", "CURRENT", "num_compute_capabilities", "set_compute_capability"}
ONLY_RTX |= {"dynamic_shapes_kernel_specialization_strategy", "DynamicShapesKernelSpecializationStrategy"}
ONLY_RTX |= {"EAGER", "LAZY", "REQUIRE_USER_ALLOCATION", "is_stream_capturable"}


@dataclass(frozen=True)
class Use:
    """One use of a name: of which classes (the module itself where none), and with how many arguments if called."""

    where: str
    classes: tuple[str, ...]
    name: str
    arguments: int | None = None


def _uses(path: Path) -> Iterator[Use]:
    tree = ast.parse(path.read_text())
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    ours = set(_not_tensorrts(tree))
    ours |= {id(n) for n in ast.walk(tree) if isinstance(n, ast.Name) and (path.name, n.id) in ELSEWHERE}
    for node in ast.walk(tree):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute):
            call = calls.get(id(node))
            simple = call is not None and not any(isinstance(a, ast.Starred) for a in call.args)
            n = len(call.args) + len(call.keywords) if call is not None and simple else None
            owner = node.value
            of_module = owner.attr == "module" if isinstance(owner, ast.Attribute) else _is_name(owner, "trt")
            if of_module and node.attr != "__version__":
                yield Use(where, (), node.attr)
            elif isinstance(owner, ast.Name) and owner.id in VARIABLES and id(owner) not in ours:
                yield Use(where, tuple(VARIABLES[owner.id]), node.attr, n)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
            owner, name = node.args[0], node.args[1]
            known = isinstance(owner, ast.Name) and owner.id in VARIABLES and id(owner) not in ours
            if known and isinstance(owner, ast.Name) and isinstance(name, ast.Constant):
                yield Use(where, tuple(VARIABLES[owner.id]), str(name.value))


def _not_tensorrts(tree: ast.AST) -> Iterator[int]:
    """Ids of the nodes of names that are of a type of ours: so annotated, made by a plain call, or run over."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        arguments = [*function.args.args, *function.args.kwonlyargs]
        typed = {a.arg for a in arguments if a.annotation is not None and not _is_name(a.annotation, "Any")}
        for node in ast.walk(function):
            target: ast.AST | None = None
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.value, ast.Call)
                and isinstance(node.value.func, ast.Name)
            ):
                target = node.targets[0]
            elif isinstance(node, ast.For | ast.comprehension):
                target = node.target
            if isinstance(target, ast.Name):
                typed.add(target.id)
        yield from (id(n) for n in ast.walk(function) if isinstance(n, ast.Name) and n.id in typed)


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _enum_members(path: Path) -> set[str]:
    """Texts in capitals: names of enum members, which our code looks up by name."""
    found = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
    return {text for text in found if isinstance(text, str) and re.fullmatch(r"[A-Z][A-Z0-9_]{2,}", text)}


def _dump(name: str, **environment: str) -> Any:
    script = str(Path(__file__).with_name("tensorrt_dump.py"))
    done = subprocess.run(
        [sys.executable, script, name], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _bindings(major: str, folder: Path) -> Any:
    """What the real bindings of a version offer, imported over stubs of the libraries."""
    installed = Path(sys.prefix) / f"tensorrt-{major}"
    if not (installed / "tensorrt_bindings").is_dir():
        reason = f"{installed} is absent; make install puts tensorrt-cu13-bindings {VERSIONS[major]} there"
        # What CI has to check it must not skip.
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    if shutil.which("gcc") is None:
        pytest.skip("gcc is absent, which makes the stubs")
    source = folder / "stub.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        file = f"lib{library}.so.{major}"
        command = ["gcc", "-shared", "-fPIC", "-o", str(folder / file), str(source), f"-Wl,-soname,{file}"]
        subprocess.run(command, check=True, timeout=60)
    return _dump("tensorrt_bindings", LD_LIBRARY_PATH=str(folder), PYTHONPATH=str(installed))


@pytest.fixture(scope="module")
def offered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Version -> what it offers."""
    pytest.importorskip("tensorrt_rtx_bindings")
    found = {major: _bindings(major, tmp_path_factory.mktemp(f"trt{major}")) for major in VERSIONS}
    assert {major: entry["version"] for major, entry in found.items()} == VERSIONS
    return {**found, "rtx": _dump("tensorrt_rtx_bindings")}


def _has(version: Any, use: Use) -> bool:
    if not use.classes:
        return use.name in version["names"]
    classes = [version["classes"][name] for name in use.classes if name in version["classes"]]
    return any(use.name in entry["docs"] for entry in classes)


def _expected(name: str) -> set[str]:
    if name in OLDER:
        return {"10"}
    return {"rtx"} if name in ONLY_RTX else {"10", "11", "rtx"}


def test_every_attribute_exists(offered: dict[str, Any]) -> None:
    uses = [use for path in SOURCES for use in _uses(path)]
    assert len({(use.classes, use.name) for use in uses}) > 40
    for use in uses:
        found = {version for version, entry in offered.items() if _has(entry, use)}
        assert found >= _expected(use.name), f"{use}: only in {sorted(found)}"
        if use.name in OLDER:
            assert "11" not in found, f"{use}: 11 has it; it is not old"


def test_every_enum_member_exists(offered: dict[str, Any]) -> None:
    ours = {name for path in SOURCES for name in _enum_members(path)}
    # Severities are compared by name; the rest of the capitals are no members of TensorRT's.
    ours -= {"OPTIONS", "KEY", "JSON"}
    assert {"SPARSE_WEIGHTS", "STRONGLY_TYPED", "VERSION_COMPATIBLE", "WEIGHT_STREAMING", "REFIT"} <= ours
    members = {
        version: {name for kind in entry["classes"].values() for name in kind["members"]} | {"INTERNAL_ERROR", "ERROR"}
        for version, entry in offered.items()
    }
    for name in sorted(ours):
        found = {version for version, known in members.items() if name in known}
        assert found >= _expected(name), f"{name}: only in {sorted(found)}"


def _arity(doc: str) -> tuple[int, int] | None:
    """(least, most) arguments of a pybind signature without ``self``; None where it is overloaded or none."""
    match = re.fullmatch(r"\w+\((.*)\)(?: -> .*)?", doc)
    if match is None or "*args" in doc:
        return None
    arguments, depth = [""], 0
    for letter in match[1]:
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and not depth:
            arguments.append("")
        else:
            arguments[-1] += letter
    own = [argument for argument in arguments if argument.strip() and not argument.strip().startswith("self")]
    return sum("=" not in argument for argument in own), len(own)


def test_calls_fit_the_signatures(offered: dict[str, Any]) -> None:
    checked = 0
    for use in (use for path in SOURCES for use in _uses(path)):
        if use.arguments is None:
            continue
        for version, entry in offered.items():
            docs = [entry["classes"][c]["docs"].get(use.name) for c in use.classes if c in entry["classes"]]
            bounds = [bound for bound in (_arity(doc) for doc in docs if doc) if bound]
            if bounds:
                checked += 1
                assert any(low <= use.arguments <= high for low, high in bounds), f"{use} in {version}: {docs}"
    assert checked > 60


def test_signatures_are_read() -> None:
    assert _arity("f(self: a.B, x: typing.SupportsInt, y: str = None) -> bool") == (1, 2)
    assert _arity("f(self: a.B) -> None") == (0, 0)
    assert _arity("f(self: a.B, x: dict[str, int], y: tuple[int, int]) -> None") == (2, 2)
    assert _arity("f(*args, **kwargs)") is None
    assert _arity("some text") is None


def test_the_stand_in_offers_nothing_else(offered: dict[str, Any]) -> None:
    """A test against a stand-in proves something only as far as the stand-in is like the real thing."""
    compared = 0
    for name, kind in vars(make_tensorrt(Behaviour())).items():
        if not isinstance(kind, type) or name == "ILogger":
            continue
        real = offered["11"]["classes"][name]
        if real["members"]:
            assert set(kind.__members__) <= set(real["members"]), name  # type: ignore[attr-defined]
            continue
        for attribute in (a for a in vars(kind) if not a.startswith("_")):
            compared += 1
            assert attribute in real["docs"], f"{name}.{attribute}"
    assert compared > 20
