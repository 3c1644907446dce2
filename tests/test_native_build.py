"""The compiled module: it is there, its stub is true, and its C++ is clean under the sanitizers without Python."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "sparsify" / "csrc"
STUB = ROOT / "sparsify" / "_kernels.pyi"
PATHS = {"avx512", "bf16", "vnni", "amx"}


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


needs_kernels = pytest.mark.skipif(
    bool(os.environ.get("SPARSIFY_WITHOUT_KERNELS")), reason="SPARSIFY_WITHOUT_KERNELS is set"
)


@needs_kernels
def test_the_module_was_compiled() -> None:
    try:
        from sparsify import _kernels
    except ImportError as error:
        pytest.fail(f"{error}: `pip install -v --no-deps -e .` says why, SPARSIFY_WITHOUT_KERNELS=1 does without")
    assert set(_kernels.features()) <= PATHS
    assert Path(_kernels.__file__ or "").parent != ROOT / "sparsify", "nothing compiled belongs into the checkout"


@needs_kernels
def test_the_stub_is_what_nanobind_makes_of_the_module(tmp_path: Path) -> None:
    made = tmp_path / "made.pyi"
    run(sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "sparsify._kernels", "-o", made)
    assert STUB.read_text() == made.read_text(), (
        "`pip install --no-deps -e .` if the module is old, then python -m nanobind.stubgen -m sparsify._kernels -o "
        "sparsify/_kernels.pyi"
    )


def test_python_is_imported_from_the_checkout_that_a_process_was_started_in(tmp_path: Path) -> None:
    package = tmp_path / "sparsify"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "errors.py").write_text("where = __file__")
    code = "import sparsify.errors; print(sparsify.errors.where)"
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == str(package / "errors.py")


def test_every_source_is_compiled_with_the_instructions_that_its_name_says() -> None:
    lists = dict(re.findall(r"set\(SOURCES(\w*) ([^)]+)\)", (ROOT / "CMakeLists.txt").read_text()))
    listed = {name: {file.rsplit("/", 1)[-1] for file in files.split()} for name, files in lists.items()}
    assert set(listed) == {"", *(f"_{path.upper()}" for path in PATHS)}
    found: dict[str, set[str]] = {name: set() for name in listed}
    for file in CSRC.glob("*.cpp"):
        suffix = file.stem.rpartition("_")[2]
        if file.name != "module.cpp":
            found[f"_{suffix.upper()}" if suffix in PATHS else ""].add(file.name)
    assert found == listed


# The two cannot be built into one program.
@pytest.mark.parametrize(("sanitizers", "cases"), [("address,undefined", 1500), ("thread", 400)])
def test_the_kernels_are_right_and_clean_under_sanitizers(sanitizers: str, cases: int, tmp_path: Path) -> None:
    cmake, compiler = (
        shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"),
        shutil.which("g++"),
    )
    if compiler is None:
        pytest.skip("there is no g++")
    if cmake is None:
        pytest.skip("there is no cmake")
    run(
        *(cmake, "-S", ROOT, "-B", tmp_path, f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_BUILD_TYPE=Release"),
        *("-DSPARSIFY_NATIVE_TESTS=ON", f"-DSPARSIFY_SANITIZERS={sanitizers}"),
    )
    run(cmake, "--build", tmp_path, "--parallel", str(os.cpu_count() or 1))
    printed = run(
        tmp_path / "tests" / "native" / "kernels_test",
        str(cases),
        ASAN_OPTIONS="detect_stack_use_after_return=1",
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    report = dict(line.split(":") for line in printed.splitlines())
    features = set(report.pop("features").split())
    if not features:
        pytest.skip("this processor has none of the instructions")
    expected = features | {"expand"} | ({"dense"} if "bf16" in features else set())
    assert {name for name, count in report.items() if int(count) >= cases // 20} >= expected, report
    assert int(report["regions"]) >= 10, "the work was never divided"
