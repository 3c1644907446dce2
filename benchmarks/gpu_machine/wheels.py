"""Wheels for a machine with Python 3.12 and no network, and their files as they lie in site-packages."""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Container, Iterable
from pathlib import Path

# pip matches the number exactly; this is every tag that a machine with glibc 2.39 takes.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)] + ["manylinux2014_x86_64"]

# What records and reports are checked and drawn with, and what that needs in turn beyond torch and its numpy.
REPORTING = (
    "attrs==26.1.0",
    "contourpy==1.3.3",
    "cycler==0.12.1",
    "fonttools==4.68.0",
    "jinja2==3.1.6",
    "jsonschema==4.26.0",
    "jsonschema-specifications==2025.9.1",
    "kiwisolver==1.5.1",
    "markupsafe==3.0.4",
    "matplotlib==3.11.2",
    "packaging==26.4",
    "pillow==13.0.0",
    "pyparsing==3.3.3",
    "python-dateutil==2.9.0.post0",
    "referencing==0.37.0",
    "rpds-py==2026.9.1",
    "safetensors==0.8.0",
    "six==1.17.0",
    "typing-extensions==4.16.0",
)


def download(wheels: Path, wanted: Iterable[str]) -> list[Path]:
    """The wheels of ``wanted`` (``name==version``); those that are there are not fetched again."""
    wheels.mkdir(parents=True, exist_ok=True)
    wanted = list(wanted)
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


def conflicts(wheels: list[Path], otherwise: Container[tuple[str, str]]) -> list[str]:
    """What a wheel asks of another one here and does not get; pip, which resolves nothing here, would not notice.

    ``otherwise`` holds pairs (who asks, for what) that are packed in another version on purpose.
    """
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
            if (part["Name"], asked.name) in otherwise:
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


def lay_out(wheels: list[Path], folder: Path, unit: Callable[[Path, str], str | None]) -> dict[str, Path]:
    """Unit -> folder with its files, as they lie in site-packages.

    Args:
        wheels: to unpack.
        folder: to unpack them into.
        unit: (wheel, its file) -> unit that the file goes to; None leaves it out.
    """
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                part, target = unit(wheel, member.filename), _in_site(member.filename)
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
