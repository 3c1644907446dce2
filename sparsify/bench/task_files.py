"""Task files of lm-eval in a user's folder, held against what lm-eval does with broken ones: it passes them over.

A task of the same name that comes with sparsify would then be asked in its place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsify.errors import DataError

# Definitions whose data files are looked for in the user's folder.
READY = Path(__file__).resolve().parent / "tasks"
# Folders that lm-eval does not look into.
_IGNORED = {"__pycache__", ".ipynb_checkpoints"}


def check_files(folder: Path, names: Sequence[str], manager: Any = None) -> None:
    """Refuse task files of ``names`` that lm-eval passes over, in silence, for ours of the same name.

    Args:
        folder: of the user.
        names: of tasks, groups or tags.
        manager: lm-eval's list of ``folder`` and ``READY``, once there is one.

    Raises:
        DataError: a file that is named after one of ``names``, or names it, is broken or holds something else.
    """
    for path in _task_files(folder):
        if _concerns(path, names) and (fault := _fault(path)):
            raise fault
        entry = manager.task_index.get(path.stem) if manager and path.stem in names else None
        if entry is not None and entry.yaml_path is not None and entry.yaml_path.parent == READY:
            raise DataError(
                f"{path}: lm-eval finds no task {path.stem} in it (it has another name, or includes a file that is not "
                "there), and would take the one that comes with sparsify; mend or rename it"
            )


def _task_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.yaml") if not _IGNORED.intersection(path.parts))


def _concerns(path: Path, names: Sequence[str]) -> bool:
    """Whether a task file is named after a task of ``names``, or names one."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    return path.stem in names or any(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) for name in names)


def first_broken(folder: Path) -> DataError | None:
    """The first task file that lm-eval passes over, or that breaks its list."""
    return next(filter(None, map(_fault, _task_files(folder))), None)


def _fault(path: Path) -> DataError | None:
    """What is wrong with a task file by itself."""
    import yaml

    class Loader(yaml.SafeLoader):
        """With lm-eval's tag, unresolved."""

    Loader.add_constructor("!function", lambda loader, node: None)
    try:
        body = yaml.load(path.read_bytes(), Loader=Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        return DataError(f"{path}: not readable as YAML ({' '.join(str(error).split())}); mend or remove it")
    if not isinstance(body, dict):
        return DataError(f"{path}: holds no task; mend or remove it")
    key = "group" if "group" in body else "task"
    if not isinstance(body.get(key, ""), str):
        return DataError(f"{path}: {key} is {str(body[key])[:40]}, want a name; mend or remove it")
    return None
