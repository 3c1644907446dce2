"""What a plan holds: predicted ranges with what each rests on. Nothing here was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sparsify.roofline.devices import Device

ROOF_ONLY = "roof only"
# How what a prediction rests on begins.
MEASURED, PUBLISHED, WHOLE_STEPS = "measured ", "published: ", "published for whole steps: "
# What people see in place of a range where there is none, see ``StepGain.too_small``.
TOO_SMALL = "too small"
# How it ends where what was measured or published exceeds the roof.
CLIPPED = ", clipped to the roof"


def span(low: float, high: float) -> str:
    """A range of ratios for people."""
    ends = list(dict.fromkeys((f"{low:.2f}", f"{high:.2f}")))
    return " to ".join(ends) if len(ends) > 1 else f"about {ends[0]}"


@dataclass(frozen=True)
class LinearGain:
    """Predicted for the linears of one shape, in one step.

    Attributes:
        linears: kinds of linears of this shape.
        count: how many in the model.
        shape: (out, in).
        pattern: as the user wrote it.
        tokens: rows of x; of an expert, those that reach it on average.
        low: dense time / sparse time, at least.
        high: at most.
        roof: what no kernel exceeds if dense runs at its roof.
        limited_by: what limits the sparse product there.
        basis: ``measured here``, ``measured on ...``, ``published: ...`` or ``roof only``; ``clipped to the roof``
            where that was above it.
    """

    linears: tuple[str, ...]
    count: int
    shape: tuple[int, int]
    pattern: str
    tokens: float
    low: float
    high: float
    roof: float
    limited_by: str
    basis: str


@dataclass(frozen=True)
class StepGain:
    """Predicted for a whole step of the model.

    Attributes:
        pattern: as the user wrote it.
        phase: ``prefill`` (time to the first token) or ``decode`` (time per further token).
        batch: sequences at once.
        tokens: rows of x of the linears.
        dense_s: time of the dense model, as far from its roof as the linears that were measured; else the roof.
        fastest_s: of the pruned model by ``high``.
        slowest_s: by ``low``.
        dense_roof_s: the least for the dense model.
        roof_s: the least for the pruned one.
        low: dense time / pruned time with much other work. Where a sparse product is slower, dense is taken to stay.
        high: the same with none.
        limited_by: what limits the pruned step at its roof.
        basis: basis -> share of the linears' time, or the one published figure for the whole step.
        too_small: so few weights on a GPU that launches and the host take the step's time: ``low`` and ``high``, which
            come from products and roofs, say nothing of it.
    """

    pattern: str
    phase: str
    batch: int
    tokens: int
    dense_s: float
    fastest_s: float
    slowest_s: float
    dense_roof_s: float
    roof_s: float
    low: float
    high: float
    limited_by: str
    basis: Mapping[str, float]
    too_small: bool = False

    @property
    def roof(self) -> float:
        """Ratio of the roofs."""
        return self.dense_roof_s / self.roof_s

    @property
    def dense_is_measured(self) -> bool:
        """Of its products at least some were; else the dense time is the roof."""
        return self.dense_s > self.dense_roof_s * (1 + 1e-9)


@dataclass(frozen=True)
class Memory:
    """Predicted bytes, ``pattern`` None for the dense model: weights, and keys and values of the largest batch."""

    pattern: str | None
    weight_bytes: float
    cache_bytes: float

    @property
    def n_bytes(self) -> float:
        """Together; what a runtime needs besides is not in it."""
        return self.weight_bytes + self.cache_bytes


@dataclass(frozen=True)
class Plan:
    """All that is predicted, and what was assumed.

    Attributes:
        model: what the user asked about.
        device: its ceilings.
        dtype: of weights and inputs.
        n_weights: of the model.
        prunable: share of them that patterns apply to.
        prompt: tokens of each prompt.
        new: tokens generated for each.
        linears: by pattern, step and shape.
        steps: by pattern, phase and batch.
        alternative: dense FP8 in place of 16 bits, at its roof; empty where that is no choice.
        memory: dense first.
    """

    model: str
    device: Device
    dtype: str
    n_weights: int
    prunable: float
    prompt: int
    new: int
    linears: tuple[LinearGain, ...]
    steps: tuple[StepGain, ...]
    alternative: tuple[StepGain, ...]
    memory: tuple[Memory, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON; ``prediction`` says that nothing in it was measured."""
        return {"prediction": True, **asdict(self)}
