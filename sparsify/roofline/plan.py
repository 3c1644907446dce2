"""What sparsity would gain a model on a device, predicted before anything is pruned.

Of each linear the ratio dense time / sparse time is a range: from measured products of this device where near ones are
known, else from published ones and no higher than the roof, else from 1 (dense stays) to the roof. Whole steps add up
the linears and what sparsity leaves as it is. No predicted time is below its roof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsify.errors import UsageError
from sparsify.roofline import published
from sparsify.roofline.bounds import DENSE, Storage, Work, bound, linear_work, storage_of, total
from sparsify.roofline.calibration import Point, efficiency, near, pattern_key
from sparsify.roofline.devices import DEVICES, HERE, Device, completed, published_as
from sparsify.roofline.prediction import (
    CLIPPED,
    MEASURED,
    PUBLISHED,
    ROOF_ONLY,
    WHOLE_STEPS,
    LinearGain,
    Memory,
    Plan,
    StepGain,
)
from sparsify.roofline.work import LinearGroup, ModelWork
from sparsify.types import NofM, Pattern, parse_pattern

if TYPE_CHECKING:
    from sparsify.model import Skeleton

_PREFILL, _DECODE = "prefill", "decode"
# Most time of a dense step that is neither in products nor in any roof (attention's kernels, norms, quantising inputs,
# the host), over the time that is, by whole steps against their products. GPUs: those of Qwen2.5-7B and -14B in FP8 on
# H100 PCIe (see ``published``) would be explained by up to 2.0, the typical one by 0.9; prefill of 512 tokens, where
# next to nothing is gained, by 4 and 12. CPUs: SmolLM2-135M with two threads (docs/kernels.md) by up to 1.6, in vLLM.
OTHER_WORK = {"cuda": 2.0, "cpu": 1.6}


_Measured = tuple[tuple[float, float], str]


@dataclass(frozen=True)
class _Case:
    """What all predictions of a plan share."""

    device: Device
    dtype: str
    points: Sequence[Point]

    @property
    def published_name(self) -> str | None:
        """The device's name in published tables."""
        known = published_as(self.device)
        return known.name if known else None

    def measured(self, shape: tuple[int, int], density: float, name: str, tokens: float) -> _Measured | None:
        """The range of a product that was measured, and where; that of another machine only for want of one's own."""
        own = [point for point in self.points if point.own]
        if found := near(own, shape, self.dtype, density, name, tokens):
            return found, f"{MEASURED}{'here' if self.device.name == HERE else f'on {self.device.full_name}'}"
        found = near(self.points, shape, self.dtype, density, name, tokens)
        # By its name it could be this one; more of what records say is different, or they do not say it.
        kind = "CPU" if self.device.kind == "cpu" else "GPU"
        return (found, f"{MEASURED}on a {kind} named {self.device.full_name}") if found else None


def plan(
    skeleton: Skeleton,
    device: Device,
    patterns: Sequence[str] = ("2:4", "0.5", "0.6", "0.7"),
    dtype: str = "bfloat16",
    batches: Sequence[int] = (1,),
    prompt: int = 512,
    new: int = 128,
    points: Sequence[Point] = (),
    model: str = "",
) -> Plan:
    """Predict what ``patterns`` gain; nothing is measured and no weight is read.

    Args:
        skeleton: the model.
        device: published or measured.
        patterns: ``N:M`` or sparsities.
        dtype: of weights and inputs, a key of ``devices.DTYPE_BYTES``.
        batches: sequences at once.
        prompt: tokens of each.
        new: tokens generated for each.
        points: products measured on ``device``, see ``calibration``.
        model: its name, for the reader.

    Raises:
        UsageError: no peak of the device is known for the type, a pattern is none, or a number is below 1.
        ModelError: a number in the config makes no sense.
    """
    parsed = check(patterns, batches, prompt, new)
    device = completed(device)
    device.peak(dtype)
    case = _Case(device, dtype, points)
    dense = ModelWork.from_skeleton(skeleton, dtype)
    linears: list[LinearGain] = []
    steps: list[StepGain] = []
    memory = [_memory(None, dense, batches, prompt + new)]
    for text, pattern in parsed.items():
        _check_fits(dense, text, pattern)
        sparse = ModelWork.from_skeleton(skeleton, dtype, storage_of(pattern))
        memory.append(_memory(text, sparse, batches, prompt + new))
        for batch in batches:
            for phase, tokens in ((_PREFILL, batch * prompt), (_DECODE, batch)):
                gains = [_gain(case, group, text, pattern, tokens) for group in dense.linears]
                linears += _by_shape([row for row, _ in gains])
                at = _Step(text, phase, batch, tokens, prompt, new)
                steps.append(_step(case, at, dense, sparse, gains))
    weights = sum(group.count * group.n_out * group.n_in for group in dense.linears)
    return Plan(
        model, device, dtype, dense.n_weights, weights / dense.n_weights, prompt, new, tuple(linears), tuple(steps),
        tuple(_alternative(skeleton, device, dtype, batches, prompt, new)), tuple(memory),
    )  # fmt: skip


def check(patterns: Sequence[str], batches: Sequence[int], prompt: int, new: int) -> dict[str, Pattern]:
    """The patterns by their text.

    Raises:
        UsageError: a pattern is none, or a number is below 1.
    """
    if min(*batches, prompt, new) < 1:
        raise UsageError("--batch, --prompt and --new are whole numbers above 0")
    return {text: parse_pattern(text, where="--pattern") for text in patterns}


@dataclass(frozen=True)
class _Step:
    pattern: str
    phase: str
    batch: int
    tokens: int
    prompt: int
    new: int

    def works(self, model: ModelWork) -> list[Work]:
        if self.phase == _PREFILL:
            return list(model.prefill(self.batch, self.prompt))
        return list(model.decode(self.batch, self.prompt + (self.new + 1) / 2))

    def rest(self, model: ModelWork) -> list[Work]:
        if self.phase == _PREFILL:
            return list(model.rest_of_prefill(self.batch, self.prompt))
        return list(model.rest_of_decode(self.batch, self.prompt + (self.new + 1) / 2))


def _check_fits(model: ModelWork, text: str, pattern: Pattern) -> None:
    for group in model.linears:
        if isinstance(pattern, NofM) and group.n_in % pattern.m:
            raise UsageError(
                f"--pattern {text} does not divide the {group.n_in} inputs of {group.kind}; choose another"
            )


def _reaching(group: LinearGroup, tokens: int) -> float:
    """Tokens at each linear of a group that any token reaches."""
    return tokens * group.share / group.reached(tokens)


def _work(case: _Case, group: LinearGroup, storage: Storage, tokens: float) -> Work:
    return linear_work(group.n_out, group.n_in, tokens, case.dtype, storage)


def _gain(case: _Case, group: LinearGroup, text: str, pattern: Pattern, tokens: int) -> tuple[LinearGain, float]:
    """The prediction for a group of linears, and how near to its roof the dense product comes."""
    storage, (name, density) = storage_of(pattern), pattern_key(pattern)
    each = _reaching(group, tokens)
    shape = (group.n_out, group.n_in)
    sparse = bound(_work(case, group, storage, each), case.device)
    roof = bound(_work(case, group, DENSE, each), case.device).seconds / sparse.seconds
    reached = efficiency(case.points, case.device, shape, case.dtype, each)
    low, high, most, basis = min(1.0, roof), roof, roof, ROOF_ONLY
    measured = case.measured(shape, density, name, each)
    if measured:
        # The sparse product cannot be faster than its own roof.
        ((low, high), basis), most = measured, roof / reached
    elif case.published_name and (name == "2:4" or not isinstance(pattern, NofM)):
        found = published.kernel_ratio(
            case.published_name, case.dtype, density, structured=name == "2:4", tokens=round(each)
        )
        if found:
            low, high, basis = found.low, found.high, PUBLISHED + _source(case, found)
    basis += CLIPPED if high > most else ""
    low, high = min(low, most), min(high, most)
    row = LinearGain((group.kind,), group.count, shape, text, each, low, high, roof, sparse.limited_by, basis)
    return row, reached


def _source(case: _Case, found: published.Found) -> str:
    other = "" if found.device == case.published_name else f" (measured on {DEVICES[found.device].full_name})"
    return f"{found.source}{other}"


def _by_shape(rows: Sequence[LinearGain]) -> list[LinearGain]:
    """One row for all linears of a shape: what is predicted of them is the same."""
    found: dict[tuple[tuple[int, int], float], list[LinearGain]] = {}
    for row in rows:
        found.setdefault((row.shape, row.tokens), []).append(row)
    return [
        LinearGain(
            tuple(dict.fromkeys(kind for row in same for kind in row.linears)), sum(row.count for row in same),
            same[0].shape, same[0].pattern, same[0].tokens, same[0].low, same[0].high, same[0].roof,
            same[0].limited_by, same[0].basis,
        )
        for same in found.values()
    ]  # fmt: skip


def _step(
    case: _Case, at: _Step, dense: ModelWork, sparse: ModelWork, gains: Sequence[tuple[LinearGain, float]]
) -> StepGain:
    dense_s = fastest_s = slowest_s = linear_roof_s = 0.0
    basis: dict[str, float] = {}
    for group, stored, (row, reached) in zip(dense.linears, sparse.linears, gains, strict=True):
        least = bound(group.work(at.tokens, case.dtype), case.device).seconds
        taken = least / reached
        floor = bound(stored.work(at.tokens, case.dtype), case.device).seconds
        linear_roof_s += least
        dense_s += taken
        fastest_s += max(floor, taken / max(1.0, row.high))
        slowest_s += max(floor, taken / max(1.0, row.low))
        basis[row.basis] = basis.get(row.basis, 0.0) + taken
    basis = {name: share / dense_s for name, share in sorted(basis.items(), key=lambda item: -item[1])}
    # What sparsity leaves as it is was not measured: it is taken to be as far from its roof as the linears are.
    rest = total(at.rest(dense), case.device).seconds * dense_s / linear_roof_s
    dense_s, fastest_s, slowest_s = dense_s + rest, fastest_s + rest, slowest_s + rest
    roofs = [total(at.works(model), case.device) for model in (dense, sparse)]
    roof = roofs[0].seconds / roofs[1].seconds
    other = OTHER_WORK[case.device.kind] * dense_s
    low, high = (dense_s + other) / (slowest_s + other), dense_s / fastest_s
    if not any(name.startswith(MEASURED) for name in basis):
        # Dense products that are further from their roofs than others weigh more than in these.
        low, high = min(low, roof), min(high, roof)
        found = None
        if at.pattern == "2:4" and case.published_name:
            found = published.end_to_end_ratio(case.published_name, case.dtype, at.phase, dense.n_weights, at.tokens)
        if found:
            # Above the roof, sequences were shorter than the user's.
            clipped = CLIPPED if found.high > roof else ""
            low, high = found.low if found.low <= roof else low, min(found.high, roof)
            basis = {f"{WHOLE_STEPS}{_source(case, found)}{clipped}": 1.0}
    known = any(name.startswith((MEASURED, WHOLE_STEPS)) for name in basis)
    return StepGain(
        at.pattern, at.phase, at.batch, at.tokens, dense_s, dense_s / high, dense_s / low, roofs[0].seconds,
        roofs[1].seconds, low, high, roofs[1].limited_by, basis, _is_small(dense, case.device) and not known,
    )  # fmt: skip


def _is_small(dense: ModelWork, device: Device) -> bool:
    """Whether launches and the host take the time of this model's steps, whatever is done to its weights."""
    return device.kind == "cuda" and dense.n_weights < published.SMALL_MODEL


def _alternative(
    skeleton: Skeleton, device: Device, dtype: str, batches: Sequence[int], prompt: int, new: int
) -> list[StepGain]:
    """Dense FP8 where the model is in 16 bits and the device has it: no pruning, and next to no loss."""
    if dtype not in ("bfloat16", "float16") or "float8" not in device.flops:
        return []
    dense, fp8 = (ModelWork.from_skeleton(skeleton, each) for each in (dtype, "float8"))
    rows = []
    for batch in batches:
        for phase, tokens in ((_PREFILL, batch * prompt), (_DECODE, batch)):
            at = _Step("FP8 dense", phase, batch, tokens, prompt, new)
            before, after = total(at.works(dense), device), total(at.works(fp8), device)
            ratio = before.seconds / after.seconds
            rows.append(
                StepGain(
                    at.pattern, phase, batch, tokens, before.seconds, after.seconds, before.seconds, before.seconds,
                    after.seconds, 1.0, ratio, after.limited_by, {ROOF_ONLY: 1.0}, _is_small(dense, device),
                )
            )  # fmt: skip
    return rows


def _memory(pattern: str | None, model: ModelWork, batches: Sequence[int], context: int) -> Memory:
    return Memory(pattern, model.weight_bytes, model.cache_bytes(max(batches), context))
