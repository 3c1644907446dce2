"""What each part of a method holds while it works on a linear: the table, and how the parts of a method add up."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.budget.shapes import Linear
from sparsify.chunks import CHUNK_BYTES, WIDE
from sparsify.methods import Method

_MIB = 1 << 20


@dataclass(frozen=True)
class Working:
    """What a part of a method holds while it works on a linear, and what it leaves for those after it.

    Attributes:
        gram: multiples of the linear's Gram matrix in float32, beside that itself, while it works.
        weight: the same of its weight.
        chunks: of ``sparsify.chunks``, or less where gram and weight are smaller than one.
        fixed_mib: batches of a fixed size.
        left_gram: multiples that stay.
        left_weight: the same of the weight.
    """

    gram: float
    weight: float
    chunks: float = 0.0
    fixed_mib: float = 0.0
    left_gram: float = 0.0
    left_weight: float = 0.0

    def peak(self, linear: Linear) -> float:
        """Bytes while it works."""
        gram, weight = gram_bytes(linear), weight_bytes(linear)
        pieces = self.chunks * min(CHUNK_BYTES, max(gram, weight)) + self.fixed_mib * _MIB
        return self.gram * gram + self.weight * weight + pieces


# Multiples of a Gram matrix above which a part holds one of its own.
_WHOLE = 0.5
# Measured by benchmarks/solver_memory.py (results/solver_memory.json), rounded up; tests/test_budget.py measures again.
# Part -> for ordinary Gram matrices, and for wide ones.
WORKING: dict[str, tuple[Working, Working]] = {
    "score=magnitude": (
        Working(0, 1.8, chunks=2.9, left_weight=1.1),
        Working(0, 1.8, chunks=2.9, left_weight=1.1),
    ),
    "score=wanda": (
        Working(0, 1.8, chunks=2.9, left_weight=1.1),
        Working(0, 1.8, chunks=2.9, left_weight=1.1),
    ),
    "score=ria": (
        Working(0, 1.8, chunks=2.9, left_weight=1.1),
        Working(0, 1.8, chunks=2.9, left_weight=1.1),
    ),
    "score=stochria": (
        Working(0, 1.8, chunks=3.2, left_weight=1.1),
        Working(0, 1.8, chunks=3.2, left_weight=1.1),
    ),
    "score=symwanda": (
        Working(0, 2.9, chunks=3.1, left_weight=1.1),
        Working(0, 2.9, chunks=3.1, left_weight=1.1),
    ),
    "refine=dsnot": (
        Working(0, 1.3, chunks=8.1, left_weight=1.1),
        Working(0, 1.3, chunks=8.1, left_weight=1.1),
    ),
    "refine=r2-dsnot": (
        Working(0, 1.1, chunks=9.6, left_weight=1.1),
        Working(0, 1.1, chunks=9.6, left_weight=1.1),
    ),
    "refine=swaps": (
        Working(0, 0.7, chunks=18.7, left_weight=1.1),
        Working(0, 0.7, chunks=18.5, left_weight=1.1),
    ),
    "solver=sparsegpt": (
        Working(8.4, 0.3, left_gram=2.2, left_weight=1.1),
        Working(1.1, 1.4, chunks=4.8, left_gram=1.1, left_weight=1.1),
    ),
    "solver=mrp": (
        Working(5.1, 3, fixed_mib=377.6, left_gram=2.2, left_weight=1.1),
        Working(0.9, 3.5, fixed_mib=419.2, left_gram=1.1, left_weight=1.1),
    ),
    "solver=fista": (
        Working(7.1, 5.5, left_gram=3.2, left_weight=1.1),
        Working(1, 6.1, chunks=3.7, left_gram=1.1, left_weight=1.1),
    ),
    "solver=admm": (
        Working(6, 1.8, chunks=4.2, left_gram=0.1, left_weight=1.1),
        Working(0.8, 2.5, chunks=8.9, left_gram=0.1, left_weight=1.1),
    ),
    "solver=alps": (
        Working(9, 2.5, chunks=5.2, left_gram=2.2, left_weight=1.1),
        Working(0.8, 3.2, chunks=12.1, left_gram=1.1, left_weight=1.1),
    ),
    "refit=cg": (
        Working(3.4, 1.9, chunks=7.1, left_weight=1.1),
        Working(1.1, 2.4, chunks=9.8, left_gram=1.1, left_weight=1.1),
    ),
    "refit=exact": (
        Working(1, 3.3, fixed_mib=401.6, left_weight=1.1),
        Working(0.9, 3.5, fixed_mib=422.4, left_gram=1.1, left_weight=1.1),
    ),
    "aim=residual": (
        Working(4.3, 1.1, chunks=1.8, left_gram=2.2, left_weight=1.1),
        Working(1.2, 1.1, chunks=3.3, left_gram=1.1, left_weight=1.1),
    ),
    "permute=by solver": (
        Working(6, 2.6, left_gram=2.2, left_weight=0.1),
        Working(0.7, 3.2, chunks=2, left_gram=0.1, left_weight=0.1),
    ),
    "permute=by score": (
        Working(0, 3, chunks=4.2, left_weight=0.1),
        Working(0, 3, chunks=4.2, left_weight=0.1),
    ),
}
# Of what comes after these: rounding of the result and its error, in chunks that sums make twice as large.
_REPORTING = Working(0.0, 0.0, chunks=5.0)


def working_bytes(linear: Linear, plan: Method, width: int) -> float:
    """The most that is held for one linear beside weights and statistics: its stages one after the other.

    Args:
        linear: that is pruned.
        plan: the method.
        width: channels of the residual stream.
    """
    wide = linear.n_in > WIDE
    aim = [] if plan.aim == "own" else [WORKING["aim=residual"][wide]]
    solving = [WORKING[f"{part}={value}"][wide] for part, value in _solving(plan)]
    gram, weight = gram_bytes(linear), weight_bytes(linear)
    most = kept = inverse = 0.0
    for stage in aim:
        most = max(most, stage.peak(linear))
        kept += stage.left_weight * weight
        inverse = stage.left_gram * gram
    if _reorders(linear, plan):
        search = WORKING["permute=by solver" if plan.score == "own" else "permute=by score"][wide]
        most = max(most, kept + search.peak(linear))
        inverse = max(inverse, search.left_gram * gram)
        if plan.permute != "fold" and plan.permute != "residual":
            # A recorded order is that of copies.
            kept += weight + gram * plan.needs_gram
    # A wide matrix has one derived from it at a time, in the same storage; others keep them all.
    kept += 0 if wide else inverse
    for stage in (*solving, _REPORTING):
        most = max(most, kept + stage.peak(linear))
        kept += stage.left_weight * weight + (0 if wide else stage.left_gram * gram)
    # An expert that no token reaches is solved with a matrix of its own.
    return most + (gram if linear.expert is not None and plan.needs_gram else 0)


def derives(linear: Linear, plan: Method) -> bool:
    """Whether a matrix as large as the Gram matrix is derived from a wide one."""
    aim = [] if plan.aim == "own" else [WORKING["aim=residual"][True]]
    parts = [*aim, *(WORKING[f"{part}={value}"][True] for part, value in _solving(plan))]
    return linear.n_in > WIDE and any(part.gram >= _WHOLE for part in parts)


def _solving(plan: Method) -> list[tuple[str, str]]:
    parts = [("score", plan.score), ("refine", plan.refine), ("solver", plan.solver), ("refit", plan.refit)]
    return [(part, value) for part, value in parts if value not in ("none", "own")]


def parts_of(plan: Method) -> str:
    """What works on a linear, for people."""
    aim = [] if plan.aim == "own" else [f"aim={plan.aim}"]
    order = [] if plan.permute == "none" else [f"permute={plan.permute}"]
    return ", ".join([*order, *aim, *(f"{part}={value}" for part, value in _solving(plan))])


def _reorders(linear: Linear, plan: Method) -> bool:
    return plan.permute != "none" and linear.m > 0


def gram_bytes(linear: Linear) -> int:
    """Of the Gram matrix of its inputs, float32."""
    return 4 * linear.n_in**2


def weight_bytes(linear: Linear) -> int:
    """Of its weight, float32."""
    return 4 * linear.n_weights
