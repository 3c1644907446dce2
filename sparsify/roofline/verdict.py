"""A plan in plain sentences: for each pattern whether it pays, and what a user should know before believing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sparsify.roofline import published
from sparsify.roofline.devices import HERE, published_as
from sparsify.roofline.plan import OTHER_WORK
from sparsify.roofline.prediction import MEASURED, ROOF_ONLY, TOO_SMALL, Plan, StepGain, span

Pays = Literal["yes", "no", "unclear"]
# Less is not worth the loss of accuracy, nor the work.
_WORTH = 1.05
_GPU_SIXTEEN_BITS = ("bfloat16", "float16")
# Most tokens that the kernel for unstructured weights on GPUs takes.
_MOST_TRITON_TOKENS = 64
# cuSPARSELt gains nothing with so many tokens or fewer.
_FEW_TOKENS = 64


@dataclass(frozen=True)
class Verdict:
    """Whether a pattern pays, and why, in sentences."""

    pattern: str
    pays: Pays
    reasons: tuple[str, ...]


def verdicts(plan: Plan) -> list[Verdict]:
    """One for each pattern, in order."""
    return [_verdict(plan, pattern) for pattern in dict.fromkeys(step.pattern for step in plan.steps)]


def notes(plan: Plan) -> list[str]:
    """What holds for all patterns."""
    device, found = plan.device, []
    if plan.dtype == "float8":
        found.append(
            "the baseline is FP8 dense: gains come on top of what FP8 brings; no kernel of this package multiplies "
            "float8 weights as they are (cusparselt_fp8, by name only, rounds 16 bits to 8 itself)"
        )
    small = [step for step in (*plan.steps, *plan.alternative) if step.too_small]
    if small:
        found.append(
            f"{TOO_SMALL}: with so few weights launches and the host take most of a step on a GPU; they are in no "
            "roof, nor in the table of single linears"
        )
    if plan.alternative and not any(step.too_small for step in plan.alternative):
        decode, prefill = (
            max(row.roof for row in plan.alternative if row.phase == phase) for phase in ("decode", "prefill")
        )
        found.append(
            f"the free alternative is FP8 dense, without pruning: up to {decode:.2f} times for decode and "
            f"{prefill:.2f} for prefill; published: {published.FP8_SOURCE}; plan on top of it with "
            "--dtype float8"
        )
    elif (
        not plan.alternative and device.kind == "cuda" and plan.dtype in _GPU_SIXTEEN_BITS and not published_as(device)
    ):
        found.append("whether this GPU has FP8, and what FP8 dense would gain without pruning, is not known here")
    needed = plan.memory[0].n_bytes
    if needed > device.memory_bytes:
        fits = [each.pattern for each in plan.memory[1:] if each.pattern and each.n_bytes <= device.memory_bytes]
        then = f"with {' or '.join(fits)} it would" if fits else "nor does any of these patterns make it fit"
        found.append(
            f"the dense model needs {_gb(needed)} for weights and cache and does not fit {device.name}'s "
            f"{_gb(device.memory_bytes)}; {then}"
        )
    if device.cache_bytes and plan.memory[0].weight_bytes < device.cache_bytes:
        found.append(
            f"the weights ({_gb(plan.memory[0].weight_bytes)}) fit the last-level cache; what does not come from "
            "memory can be faster than these roofs, and then sparsity gains less"
        )
    if device.kind == "cuda":
        found.append(
            "kernels for GPUs are in this package and not yet measured on one: auto runs dense until sparsify tune has "
            "measured this GPU"
        )
    found.append(
        "dense times leave out other work (attention's kernels, norms, the host); with ≈ they rest on products "
        "measured on this device, with ≥ they are roofs; ranges of whole steps begin where other work takes "
        f"{_share(OTHER_WORK[device.kind])} of the dense step"
    )
    found.append("accuracy is not predicted: prune, then sparsify eval")
    return found


def _verdict(plan: Plan, pattern: str) -> Verdict:
    steps = [step for step in plan.steps if step.pattern == pattern]
    reasons: list[str] = []
    measured = any(_rests_on(step, MEASURED) for step in steps)
    told = [step for step in steps if not step.too_small]
    sure, maybe = [s for s in told if s.low >= _WORTH], [s for s in told if s.high >= _WORTH]
    pays: Pays = "yes" if sure else "unclear" if maybe else "no"
    if len(told) < len(steps):
        reasons.append(
            f"{plan.n_weights / 1e9:.2g} billion weights are few for a GPU: launches and the host take the time that "
            f"sparsity would save; published{'' if pattern == '2:4' else ' of 2:4 alone'}: {published.SMALL_SOURCE}"
        )
    if pays == "no" and told:
        reasons.append(f"no step gains {100 * (_WORTH - 1):.0f} %")
    elif told and not measured and plan.alternative and _fp8_wins(plan, steps):
        pays = "no"
        reasons.append("FP8 dense has as high a roof or a higher one in every step and needs no pruning")
    elif pays == "yes":
        reasons.append("; ".join(_ranges(sure)))
    elif maybe:
        reasons.append(f"between no gain and {'; '.join(f'{s.high:.2f} times for {_name(s)}' for s in maybe)}")
    flat = [step for step in told if step not in maybe]
    if flat and maybe and pays != "no":
        reasons.append(f"no gain for {_names(flat)}")
    if pays != "no" and any(ROOF_ONLY in step.basis for step in maybe):
        reasons.append("where the basis is the roof alone, the range ends at an upper bound that no kernel has shown")
    if pays != "no":
        reasons += _kernels(plan, pattern, steps)
    return Verdict(pattern, pays, tuple(reasons))


def _rests_on(step: StepGain, beginning: str) -> bool:
    return any(basis.startswith(beginning) for basis in step.basis)


def _fp8_wins(plan: Plan, steps: Sequence[StepGain]) -> bool:
    fp8 = {(step.phase, step.batch): step.roof for step in plan.alternative}
    return all(fp8[step.phase, step.batch] >= step.roof for step in steps)


def _kernels(plan: Plan, pattern: str, steps: Sequence[StepGain]) -> list[str]:
    """What of this package would run, where that is not what a reader would expect."""
    device, found = plan.device, []
    structured = pattern == "2:4"
    if device.kind == "cuda":
        unknown = [step for step in steps if ROOF_ONLY in step.basis]
        if structured and unknown:
            few = any(step.tokens < _FEW_TOKENS for step in unknown)
            found.append(
                f"nothing is published for 2:4 products of as many tokens as in {_names(unknown)}"
                + (
                    ", and cuSPARSELt is no library for few: at 64 it equals dense on H100 PCIe in bfloat16"
                    if few
                    else ""
                )
            )
        if not structured and plan.dtype not in _GPU_SIXTEEN_BITS:
            found.append(f"no kernel of this package takes such weights in {plan.dtype} on GPUs")
        elif not structured and any(step.tokens > _MOST_TRITON_TOKENS for step in steps):
            found.append(
                f"the kernel for such weights on GPUs takes up to {_MOST_TRITON_TOKENS} tokens; beyond, dense runs"
            )
    elif device.name == HERE and not any(_rests_on(step, f"{MEASURED}{HERE}") for step in steps):
        found.append(
            "nothing like its products was measured on this machine with this number of threads, so auto runs dense: "
            "sparsify tune --model MODEL measures them"
        )
    return found


def _ranges(steps: Sequence[StepGain]) -> list[str]:
    return [f"{span(step.low, step.high)} times for {_name(step)}" for step in steps]


def _name(step: StepGain) -> str:
    return f"{step.phase} at batch {step.batch}"


def _names(steps: Sequence[StepGain]) -> str:
    return ", ".join(dict.fromkeys(map(_name, steps)))


def _share(other: float) -> str:
    return f"{100 * other / (1 + other):.0f} %"


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
