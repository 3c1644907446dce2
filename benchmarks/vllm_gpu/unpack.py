"""The stage that takes the batches on the GPU machine."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tarfile
from pathlib import Path

from vllm_gpu.record import MANIFEST, NOT_RUN, WRONG


def unpack(options: argparse.Namespace) -> int:
    """Take the batches that are here; when all have come, join and unpack what they hold."""
    into: Path = options.into.resolve()
    parts = into / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    batches = sorted(options.batches.glob("batch-*.tar"))
    if not batches:
        print(f"{options.batches}: holds no batch-*.tar")
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
    run = f"vllm_gpu() {{ '{sys.executable}' '{Path(__file__).resolve().parent}' \"$@\"; }}"
    (into / "env").write_text(f"export PYTHONPATH='{site}'\n{run}\n", encoding="utf-8")
    print(f"{n_files} files in {site}; continue with: . {into / 'env'}")
    return 0


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
