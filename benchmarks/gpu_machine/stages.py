"""Command lines: a folder that Python runs has stages, and runs itself for what needs a process of its own."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpu_machine.batches import take
from gpu_machine.children import Task, child
from gpu_machine.record import NOT_RUN


def stage_options(tool: str, budget_s: float) -> argparse.ArgumentParser:
    """What every stage that writes a record takes: a parent of its parser."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True)
    common.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    common.add_argument("--tiny", action="store_true", help="sizes that an ordinary machine runs in minutes")
    common.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / tool)
    common.add_argument("--budget-s", type=float, default=budget_s)
    return common


def add_packing(stages: Any, pack: Callable[[argparse.Namespace], int], tool: Path) -> argparse.ArgumentParser:
    """The stages ``pack``, which is returned, and ``unpack``, after which the batches' ``env`` runs ``tool``."""
    packing: argparse.ArgumentParser = stages.add_parser(
        "pack", help="what the GPU machine lacks, in batches", description=pack.__doc__
    )
    packing.add_argument("--out", type=Path, required=True)
    packing.add_argument("--limit-mib", type=float, default=60, help="of a batch; the checkout's own files travel too")
    packing.set_defaults(run=pack)
    stage = stages.add_parser("unpack", help="join, verify and unpack the batches")
    stage.add_argument("--batches", type=Path, required=True)
    stage.add_argument("--into", type=Path, required=True)
    stage.set_defaults(run=lambda options: take(options.batches, options.into, tool))
    return packing


def main(parse: Callable[[list[str]], argparse.Namespace], tasks: Mapping[str, Task]) -> None:
    """Run the stage that is asked for and exit with its status, or one of ``tasks`` for the process that waits."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["child"]:
        child(tasks[arguments[1]], Path(arguments[2]))
        return
    options = parse(arguments)
    if getattr(options, "device", None) == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("no CUDA device: this needs an NVIDIA GPU and a CUDA build of torch; try --device cpu --tiny")
            sys.exit(NOT_RUN)
    sys.exit(options.run(options))
