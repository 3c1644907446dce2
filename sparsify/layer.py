"""One linear through the stages of a method: score, mask, refinement, solver, refit. Tensors in, tensors out."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from sparsify.errors import NumericsError, SingularError
from sparsify.masks import keep_mask
from sparsify.methods import Method
from sparsify.scores import SCORES
from sparsify.solvers.admm import admm
from sparsify.solvers.alps import alps
from sparsify.solvers.dsnot import dsnot
from sparsify.solvers.exact import exact
from sparsify.solvers.fista import fista
from sparsify.solvers.mrp import mrp
from sparsify.solvers.quadratic import Gram, Solution, distance, removal, value
from sparsify.solvers.refit import refit
from sparsify.solvers.sparsegpt import sparsegpt
from sparsify.solvers.swaps import swaps
from sparsify.solvers.targets import correction, retarget_
from sparsify.stats import InputStats
from sparsify.types import Pattern

# Damping by more than the mean diagonal is another problem than the one posed.
_MOST_DAMPING = 1.0


@dataclass(frozen=True)
class Outcome:
    """What became of one linear.

    Attributes:
        weight: [out, in] float32, zeros where pruned.
        objective_before: error of the dense weights on the final mask, before any was updated, relative to the output
            aimed at; by the Gram matrix, None without.
        objective: the same for the weights returned.
        n_iter: iterations of solver and refinement together; 0 where nothing iterates.
        status: ``exact`` (a direct method), ``converged``, ``max_iter``, or what was done instead (``fallback: ...``).
        energy: of the output aimed at, ``quadratic.value``; None without a Gram matrix.
    """

    weight: torch.Tensor
    objective_before: float | None
    objective: float | None
    n_iter: int
    status: str
    energy: float | None = None


def prune_layer(
    weight: torch.Tensor,
    stats: InputStats | None,
    gram: Gram | None,
    pattern: Pattern,
    plan: Method,
    *,
    seed: int = 0,
    length: int = 1,
) -> Outcome:
    """Prune ``weight`` [out, in] by ``plan``.

    A system that is singular though the Gram matrix is not is solved with more damping, and the status says so.

    Args:
        weight: what the layer should compute: its dense weight, in any float type, or its target
            (``targets.retarget``). It is only read.
        stats: of its inputs; None where the plan needs no text.
        gram: of its inputs, where ``plan.needs_gram``.
        pattern: what to keep.
        plan: the method.
        seed: of random scores.
        length: tokens of a calibration window, the unit of DSnoT's threshold.

    Raises:
        NumericsError: NaN in a score, or a Gram matrix that stays singular.
        UsageError: a pattern that the method cannot do.
    """
    damping = None
    while True:
        try:
            outcome = _pruned(weight, stats, gram, pattern, plan, seed, length)
        except SingularError as error:
            assert gram is not None
            damping = 10 * max(gram.damping_used, 1e-7)
            if damping > _MOST_DAMPING:
                raise NumericsError(
                    f"{error}, which is {gram.damping_used:g} already; give more calibration text (--windows) or use "
                    "--method sparsegpt"
                ) from None
            gram.release()
            reason, gram = error, Gram(gram.matrix, gram.n_tokens, damping)
        else:
            if damping is None:
                return outcome
            return replace(outcome, status=f"fallback: damping raised to {damping:g}, {reason}; {outcome.status}")


def _pruned(
    weight: torch.Tensor,
    stats: InputStats | None,
    gram: Gram | None,
    pattern: Pattern,
    plan: Method,
    seed: int,
    length: int,
) -> Outcome:
    group = plan.group
    keep, n_iter, statuses = None, 0, []
    if plan.score != "own":
        keep = keep_mask(SCORES[plan.score](weight, stats, plan, seed), pattern, default_group=group)
    if plan.refine != "none":
        assert keep is not None
        keep, n_iter, status = _refine(weight, stats, gram, keep, pattern, plan, length)
        statuses.append(status)
    if plan.solver != "none":
        assert gram is not None
        solution = SOLVERS[plan.solver](weight, gram, pattern, plan, keep)
        n_iter += solution.n_iter
        statuses.append(solution.status)
        keep, solved = solution.keep, solution.weight
    else:
        assert keep is not None
        solved = weight.to(torch.float32, copy=True).masked_fill_(~keep, 0)
    if plan.refit != "none":
        assert gram is not None
        if plan.refit == "cg":
            solution = refit(weight, gram, keep, start=solved, n_iter=plan.setting("refit.iterations"))
        else:
            solution = exact(weight, gram, keep)
        n_iter += solution.n_iter
        statuses.append(solution.status)
        solved = solution.weight
    if gram is None:
        return Outcome(solved, None, None, n_iter, _summary(statuses))
    dead = int(gram.dead.sum())
    if dead and (plan.solver != "none" or plan.refit != "none"):
        statuses.append(f"fallback: inputs that are always 0 lose all weights, {dead} of {gram.n_in}")
    if gram.damping_used != gram.damping:
        statuses.append(f"fallback: damping raised to {gram.damping_used:g}, the inputs' Gram matrix was singular")
    whole = value(weight, gram.matrix)
    before, after = (
        error / whole if whole > 0 else 0.0
        for error in (removal(weight, keep, gram.matrix), distance(weight, solved, gram.matrix))
    )
    return Outcome(solved, before, after, n_iter, _summary(statuses), whole)


def pull(weight: torch.Tensor, stats: InputStats | None, plan: Method) -> tuple[torch.Tensor | None, str]:
    """What ``target`` needs of the dense model, ``targets.correction`` [out, in], and the aim; None where it is own.

    The aim is ``own`` too where there is nothing to compare with: no text, no token, or tokens routed otherwise than in
    the dense model; and ``dense`` where the output is added to no residual stream. The pull is the size of the weight,
    where the drift is that of the Gram matrix and of no more use then.
    """
    if plan.aim == "own" or stats is None or stats.gram is None or stats.drift is None or stats.n_tokens == 0:
        return None, "own"
    shift = stats.shift if stats.shift is not None and stats.shift.shape[0] == weight.shape[0] else None
    share = plan.setting("aim.residual_share") if plan.aim == "residual" else 0.0
    moved = correction(weight, stats.drift, plan.setting("aim.share"), shift, share)
    return moved, "dense" if shift is None else "residual"


def target(weight: torch.Tensor, gram: Gram | None, moved: torch.Tensor | None) -> torch.Tensor:
    """What a linear of dense ``weight`` [out, in] should compute: that itself without a ``pull``, else T, float32.

    T takes the place of ``moved``.

    Raises:
        NumericsError: the Gram matrix is singular in spite of damping.
    """
    if moved is None:
        return weight
    assert gram is not None
    return retarget_(weight, gram, moved)


def salience(
    weight: torch.Tensor, stats: InputStats | None, gram: Gram | None, plan: Method, seed: int = 0
) -> torch.Tensor:
    """[out, in], what each weight is worth: the plan's score, or for a solver's own mask w² / [A⁻¹]_jj.

    The latter is twice the loss of removing that weight alone with all others optimal (OBS), A the damped Gram matrix.
    """
    if plan.score != "own":
        return SCORES[plan.score](weight, stats, plan, seed)
    assert gram is not None
    return weight.to(torch.float32, copy=True).square_().div_(gram.inverse_diagonal)


def seed_of(name: str, seed: int) -> int:
    """A seed for the linear ``name``: the same draw whatever else is pruned, and in whatever order."""
    return zlib.crc32(name.encode(), seed & 0xFFFFFFFF)


def _summary(statuses: list[str]) -> str:
    special = [status for status in statuses if status not in ("exact", "converged")]
    if special and special != ["max_iter"]:
        return "; ".join(dict.fromkeys(sorted(special, key="max_iter".__eq__)))
    return next((status for status in ("max_iter", "converged") if status in statuses), "exact")


def _refine(
    weight: torch.Tensor,
    stats: InputStats | None,
    gram: Gram | None,
    keep: torch.Tensor,
    pattern: Pattern,
    plan: Method,
    length: int,
) -> tuple[torch.Tensor, int, str]:
    if plan.refine == "swaps":
        assert gram is not None
        return swaps(
            weight,
            gram,
            keep,
            pattern,
            n_iter=plan.setting("swaps.most"),
            candidates=plan.setting("swaps.candidates") or None,
        )
    assert stats is not None
    common = {
        "n_iter": plan.setting("dsnot.cycles"),
        "threshold": plan.setting("dsnot.threshold"),
        "variance_power": plan.setting("dsnot.variance"),
        "safe": plan.setting("dsnot.safe"),
        "tokens_per_sequence": length,
    }
    if plan.refine == "dsnot":
        return dsnot(weight, stats, keep, pattern, **common)
    return dsnot(
        weight,
        stats,
        keep,
        pattern,
        exponent=plan.setting("r2.exponent"),
        reweight=plan.setting("r2.reweight"),
        gamma_grow=plan.setting("r2.gamma_grow"),
        gamma_prune=plan.setting("r2.gamma_prune"),
        norm=plan.setting("r2.norm"),
        **common,
    )


def _solve_sparsegpt(
    weight: torch.Tensor, gram: Gram, pattern: Pattern, plan: Method, keep: torch.Tensor | None
) -> Solution:
    return sparsegpt(weight, gram, pattern, keep=keep, group=plan.group)


def _solve_mrp(weight: torch.Tensor, gram: Gram, pattern: Pattern, plan: Method, keep: torch.Tensor | None) -> Solution:
    return mrp(
        weight,
        gram,
        pattern,
        variant=plan.setting("mrp.variant"),
        block=plan.setting("mrp.block") or None,
        free=plan.setting("mrp.free"),
        keep=keep,
        group=plan.group,
    )


def _solve_fista(
    weight: torch.Tensor, gram: Gram, pattern: Pattern, plan: Method, keep: torch.Tensor | None
) -> Solution:
    kind = plan.setting("fista.start")
    if kind == "sparsegpt":
        start = sparsegpt(weight, gram, pattern, group=plan.group).weight
    elif kind == "wanda":
        size = weight.float().abs().mul_(gram.matrix.diagonal().sqrt())
        start = weight.float() * keep_mask(size, pattern, default_group=plan.group)
    else:
        start = weight
    return fista(
        weight,
        gram,
        pattern,
        start,
        n_iter=plan.setting("fista.steps"),
        patience=plan.setting("fista.patience"),
        improvement=plan.setting("fista.improvement"),
        threshold=plan.setting("fista.threshold"),
        scaled=plan.setting("fista.scaled"),
        group=plan.group,
    )


def _solve_admm(
    weight: torch.Tensor, gram: Gram, pattern: Pattern, plan: Method, keep: torch.Tensor | None
) -> Solution:
    return admm(weight, gram, pattern, n_iter=plan.setting("admm.iterations"), keep=keep, group=plan.group)


def _solve_alps(
    weight: torch.Tensor, gram: Gram, pattern: Pattern, plan: Method, keep: torch.Tensor | None
) -> Solution:
    return alps(
        weight,
        gram,
        pattern,
        n_iter=plan.setting("alps.iterations"),
        rho=plan.setting("alps.penalty"),
        group=plan.group,
    )


SOLVERS: dict[str, Callable[[torch.Tensor, Gram, Pattern, Method, torch.Tensor | None], Solution]] = {
    "sparsegpt": _solve_sparsegpt,
    "mrp": _solve_mrp,
    "fista": _solve_fista,
    "admm": _solve_admm,
    "alps": _solve_alps,
}
