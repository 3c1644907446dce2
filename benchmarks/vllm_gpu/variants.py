"""One model in vLLM: as it is, compressed and unpacked to dense weights, and with each kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_gpu.children import Outcome, run_child
from vllm_gpu.record import Record

KERNELS = ("packed", "cusparselt", "cutlass")
VARIANTS = ("plain", "dense", *KERNELS)


def absent(variant: str, device: str) -> str | None:
    """Why ``variant`` cannot run on ``device``; None if it can."""
    import torch

    from sparsify.kernels.dispatch import KERNELS as TABLE

    return TABLE[variant].absent(torch.device(device)) if variant in KERNELS else None


def present(record: Record, what: str, variants: list[str], device: str) -> list[str]:
    """Those of ``variants`` that can run on ``device``; the record says why the others cannot."""
    reasons = {variant: absent(variant, device) for variant in variants}
    for variant, reason in reasons.items():
        if reason:
            record.not_run(f"{what} {variant}", reason)
    return [variant for variant, reason in reasons.items() if not reason]


def run_engine(
    record: Record, what: str, task: str, variant: str, root: Path, settings: dict[str, Any], timeout_s: float
) -> Outcome:
    """Run ``task`` with an engine on the model in ``root``; the record says where another kernel ran."""
    kernel = None if variant == "plain" else variant
    arguments = {**settings, "folder": str(root / ("compressed" if kernel else "plain")), "kernel": kernel}
    outcome = run_child(record, what, task, arguments, root.parent, timeout_s)
    other = "" if outcome.why else not_engaged(outcome.engaged, kernel)
    if other:
        record.failed(what, other)
    return outcome


def not_engaged(rows: list[dict[str, Any]], kernel: str | None) -> str:
    """Why what ran is not what was asked for; "" if it is. Without a kernel the plugin has nothing to report."""
    if kernel is None:
        return "the plugin took part in a plain checkpoint" if rows else ""
    others = (row for row in rows if row["kernel"] != kernel)
    found = "; ".join(f"{row['linears']} linears by {row['kernel']}: {row['reason']}" for row in others)
    return found if rows else "the plugin reported nothing"
