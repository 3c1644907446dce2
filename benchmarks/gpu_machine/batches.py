"""Files in batches of a limited size: packed here, joined and verified on a machine without a network."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from provenance import commit

from gpu_machine.record import MANIFEST, NOT_RUN, WRONG


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


def pack_folders(folders: dict[str, Path], out: Path, limit: int) -> list[Path]:
    """Unit -> folder of files, compressed (what did not change is kept) and written as batches of ``limit`` bytes."""
    n_files = 0
    units: dict[str, Path] = {}
    for unit, folder in folders.items():
        files = [path for path in folder.rglob("*") if path.is_file()]
        n_files += len(files)
        units[unit] = compress(unit, folder, out / "units")
        raw = sum(path.stat().st_size for path in files)
        size = units[unit].stat().st_size
        print(f"{unit}: {len(files)} files, {raw / 1e6:.1f} MB, compressed {size / 1e6:.1f} MB", flush=True)
    batches = write_batches(units, n_files, out, limit)
    for path in batches:
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, sha256 {sha256(path)}")
    return batches


def take(folder: Path, into: Path, tool: Path) -> int:
    """Take the batches that are in ``folder``; when all have come, join and unpack what they hold.

    ``into/env`` then makes the packages importable and names the command of ``tool``, a folder that Python can run.
    """
    into = into.resolve()
    parts = into / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    batches = sorted(folder.glob("batch-*.tar"))
    if not batches:
        print(f"{folder}: holds no batch-*.tar")
        return NOT_RUN
    kept = parts / MANIFEST
    for path in batches:
        with tarfile.open(path) as archive:
            member = archive.extractfile(MANIFEST)
            assert member is not None
            text = member.read().decode()
            if kept.exists() and kept.read_text(encoding="utf-8") != text:
                print(f"{path}: belongs to another set than the batches before; remove {into} and start again")
                return WRONG
            kept.write_text(text, encoding="utf-8")
            archive.extractall(parts, filter="data")
    manifest = json.loads(kept.read_text(encoding="utf-8"))
    coming = set()
    for unit in manifest["units"]:
        for part in unit["parts"]:
            path = parts / part["name"]
            if not path.exists():
                coming.add(part["batch"])
            elif sha256(path) != part["sha256"]:
                print(f"{path}: differs from its checksum; send {part['batch']} again")
                path.unlink()
                return WRONG
    print(f"{len(batches)} batch(es) taken")
    if coming:
        print(f"still to come: {', '.join(sorted(coming))}")
        return 0
    site = into / "site"
    shutil.rmtree(site, ignore_errors=True)
    for unit in manifest["units"]:
        joined = parts / f"{unit['name']}.tar.xz"
        pieces = [parts / part["name"] for part in unit["parts"]]
        if pieces != [joined]:
            with joined.open("wb") as file:
                for piece in pieces:
                    file.write(piece.read_bytes())
        if sha256(joined) != unit["sha256"]:
            print(f"{joined}: differs from its checksum after joining")
            return WRONG
        with tarfile.open(joined) as archive:
            archive.extractall(site, filter="data")
    n_files = sum(1 for path in site.rglob("*") if path.is_file())
    if n_files != manifest["files"]:
        print(f"{site}: has {n_files} files, the manifest says {manifest['files']}")
        return WRONG
    shutil.copy(kept, into / MANIFEST)
    shutil.rmtree(parts)
    # To be sourced: the same Python runs the other stages as ran this one.
    run = f"{tool.name}() {{ '{sys.executable}' '{tool.resolve()}' \"$@\"; }}"
    (into / "env").write_text(f"export PYTHONPATH='{site}'\n{run}\n", encoding="utf-8")
    print(f"{n_files} files in {site}; continue with: . {into / 'env'}")
    return 0


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
