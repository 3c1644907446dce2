"""Operations and bytes of a pruning run, term by term, and the time they take at rates that were measured.

Low and high differ where a method decides how long it goes on, and by how much whole runs were seen to differ from the
sum of their parts (``_LOW``, ``_HIGH``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields

from sparsify.budget.memory import sources
from sparsify.budget.shapes import Block, Linear, Shapes
from sparsify.chunks import WIDE
from sparsify.methods import Method
from sparsify.recipe import Recipe

# A run takes from so much to so much of the sum of its terms, and seconds to begin and end whatever the model's size;
# benchmarks/budget_check.py compares them with runs.
_LOW, _HIGH = 0.8, 2.0
START_SECONDS = (1.0, 5.0)
# Symmetric products are summed in strips from the diagonal on, and products with symmetric matrices: 5/8 of the work.
_SYMMETRIC = 5 / 8
# Passes over memory, each of a read or a write of a float32 value, of what is not a product: per value of a block's
# activations (norms, rotation, activation functions), and per weight of a score, a mask, a column that is passed on.
_PASSES_ACTIVATION, _PASSES_SCORE, _PASSES_MASK, _PASSES_COLUMN, _PASSES_STEP = 12, 8, 20, 24, 12
# Rounds of FISTAPruner; share of the most iterations of ALPS and of conjugate gradients, least and most.
_FISTA_ROUNDS = (4, 12)
_ALPS_SHARE, _CG_SHARE, _SWAP_SHARE = (0.1, 1.0), (0.3, 1.0), (0.1, 1.0)
# Beyond the memory of its batches ``exact`` iterates, at most 500 times.
_EXACT_BYTES, _EXACT_STEPS = 1 << 28, (50, 500)


@dataclass(frozen=True)
class Rates:
    """What this machine reached a moment ago, per second.

    Attributes:
        product: operations of float32 products.
        product64: of float64 products.
        factor: n^3 of a Cholesky factorisation of order n in float64 and its inverse, together.
        spectrum: n^3 of eigenvalues and eigenvectors in float64.
        distance: additions of absolute differences, for orders of inputs.
        memory: bytes of simple operations on large float32 tensors.
        read: bytes from the disk of the output.
        write: bytes to it, until they are on it.
        digest: bytes of SHA-256.
    """

    product: float
    product64: float
    factor: float
    spectrum: float
    distance: float
    memory: float
    read: float
    write: float
    digest: float

    def to_dict(self) -> dict[str, float]:
        """By name."""
        return asdict(self)


RATES = tuple(field.name for field in fields(Rates))


@dataclass(frozen=True)
class Work:
    """A term of the time: ``formula`` in words, how often ``rate`` is needed at least and at most."""

    what: str
    formula: str
    rate: str
    low: float
    high: float

    def seconds(self, rates: Rates) -> tuple[float, float]:
        """At least and at most."""
        rate = getattr(rates, self.rate)
        return self.low / rate, self.high / rate


@dataclass(frozen=True)
class Time:
    """Seconds of a run.

    Attributes:
        low: at least.
        high: at most.
        block_low: of the block that takes longest, at least.
        block_high: at most.
    """

    low: float
    high: float
    block_low: float
    block_high: float


def time_of(shapes: Shapes, recipe: Recipe, rates: Rates, workers: int = 1) -> Time:
    """The time of a run; workers share the blocks, at best evenly and at worst not at all."""
    blocks = []
    for block in shapes.blocks:
        low, high = _sum(block_work(shapes, block, recipe), rates)
        blocks.append((block.count, low * _LOW, high * _HIGH))
    rest_low, rest_high = _sum(rest_work(shapes, recipe), rates)
    low = sum(count * each for count, each, _ in blocks) / workers + rest_low * _LOW + START_SECONDS[0]
    high = sum(count * each for count, _, each in blocks) + rest_high * _HIGH + START_SECONDS[1]
    return Time(low, high, max(each for _, each, _ in blocks), max(each for _, _, each in blocks))


def _sum(works: Iterator[Work], rates: Rates) -> tuple[float, float]:
    low = high = 0.0
    for work in works:
        least, most = work.seconds(rates)
        low, high = low + least, high + most
    return low, high


def block_work(shapes: Shapes, block: Block, recipe: Recipe) -> Iterator[Work]:
    """The terms of one block."""
    plan, size = recipe.plan, block.n_values * shapes.value_bytes
    yield Work("reading the block", f"{block.n_values:,} values x {shapes.value_bytes} B", "read", size, size)
    yield Work("writing it", f"{block.n_values:,} values x {shapes.value_bytes} B", "write", size, size)
    cast = 4.0 * block.n_values * 6
    yield Work("converting and checking it", f"{block.n_values:,} values x 6 passes x 4 B", "memory", cast, cast)
    if plan.needs_data and block.reached:
        yield from _passes(shapes, block, recipe)
        yield from _statistics(shapes, block, recipe)
    for linear in block.pruned:
        yield from _solver(linear, plan)
    for linear in sources(block.pruned):
        yield from _factors(linear, plan)


def _passes(shapes: Shapes, block: Block, recipe: Recipe) -> Iterator[Work]:
    """Forward passes: whole ones, and those that end where the last input has been seen."""
    plan, tokens = recipe.plan, recipe.windows * recipe.length
    full = sum(each.n_weights * _share(shapes, each) for each in block.linears)
    # By group, each pass runs what comes before the group, which is on average half of the block.
    groups = len({each.source for each in block.pruned if each.expert is None}) or 2
    ways = 1 if plan.aim == "own" else 2
    whole = 1.0 if plan.inputs == "pruned" or plan.aim == "own" else 0.0
    partial = (groups / 2 if plan.order == "group" else 0.75) * ways if block.pruned else 0.0
    # What leaves the dense block comes out of the last of its passes.
    whole += 0.5 if plan.aim != "own" and block.pruned else 0.0
    runs = whole + partial
    if plan.allocate != "uniform" or plan.permute == "residual":
        runs += 1.75
    flops = 2.0 * tokens * full * runs
    yield Work("forward passes, products", f"2 x {tokens:,} tokens x {full:,.0f} weights x {runs:g} passes", "product",
               flops, flops)  # fmt: skip
    heads = shapes.heads * shapes.head_dim
    least, most = 2.0 * tokens * recipe.length * heads * runs, 4.0 * tokens * recipe.length * heads * runs
    yield Work("forward passes, attention", f"2 to 4 x {tokens:,} tokens x {recipe.length} x {heads} x {runs:g} passes",
               "product", least, most)  # fmt: skip
    channels = sum((each.n_in + each.n_out) * _share(shapes, each) for each in block.linears)
    moved = 4.0 * tokens * channels * _PASSES_ACTIVATION * runs / 2
    yield Work("forward passes, the rest", f"{tokens:,} tokens x {channels:,.0f} channels x "
               f"{_PASSES_ACTIVATION / 2:g} x 4 B x {runs:g} passes", "memory", moved, moved)  # fmt: skip
    compute = {"float32": 4, "bfloat16": 2}[recipe.compute_dtype]
    states = float(tokens * shapes.width * compute)
    read = states * (groups if plan.order == "group" else 1) * ways + states * whole
    yield Work("hidden states read", f"{tokens:,} x {shapes.width} x {compute} B x {read / states:g}", "memory",
               read, read)  # fmt: skip
    written = states * (ways if plan.inputs == "pruned" else 1)
    yield Work("hidden states written", f"{tokens:,} x {shapes.width} x {compute} B x {written / states:g}", "write",
               written, written)  # fmt: skip


def _statistics(shapes: Shapes, block: Block, recipe: Recipe) -> Iterator[Work]:
    plan, tokens = recipe.plan, recipe.windows * recipe.length
    for each in sources(block.pruned):
        reached = tokens * _share(shapes, each)
        if plan.needs_gram:
            flops = 2.0 * reached * each.n_in**2 * _SYMMETRIC
            yield Work(f"Gram matrix of {each.source}", f"5/8 x 2 x {reached:,.0f} tokens x {each.n_in}^2", "product",
                       flops, flops)  # fmt: skip
        if plan.aim != "own":
            flops = 2.0 * reached * each.n_in**2
            yield Work(f"drift of {each.source}", f"2 x {reached:,.0f} tokens x {each.n_in}^2", "product",
                       flops, flops)  # fmt: skip
        if plan.aim == "residual" and each.n_out == shapes.width and each.expert is None:
            flops = 2.0 * reached * each.n_in * shapes.width
            yield Work(f"shift of {each.source}", f"2 x {reached:,.0f} tokens x {each.n_in} x {shapes.width}",
                       "product", flops, flops)  # fmt: skip
        moved = 8.0 * reached * each.n_in * (6 if plan.needs_mean else 1)
        yield Work(f"norms of {each.source}", f"{reached:,.0f} tokens x {each.n_in} inputs", "memory", moved, moved)


def _factors(linear: Linear, plan: Method) -> Iterator[Work]:
    """What is derived once from the Gram matrix of an input, for all linears that read it."""
    n = linear.n_in
    inverse = plan.aim != "own" or (plan.permute != "none" and plan.score == "own")
    upper = plan.solver in ("sparsegpt", "mrp", "fista")
    times = inverse + upper + (plan.solver == "alps" or plan.refit != "none")
    if times:
        yield _inverses(f"factors of {linear.source}", times, n)
    if plan.solver == "alps":
        yield Work(f"spectrum of {linear.source}", f"{n}^3", "spectrum", n**3, n**3)


def _inverses(what: str, times: int, n: int) -> Work:
    """A factor of order n and its inverse, so many times."""
    if n <= WIDE:
        return Work(what, f"{times} x {n}^3", "factor", times * n**3, times * n**3)
    # Panel by panel (``solvers.factor``): nearly all of it is products, n^3 / 3 operations for each of the two.
    least = times * n**3 * 2 / 3
    return Work(what, f"2/3 to 4/3 x {times} x {n}^3", "product64", least, 2 * least)


def _solver(linear: Linear, plan: Method) -> Iterator[Work]:
    """Scores, solvers and errors of one linear [out, in]."""
    out, n, kind = linear.n_out, linear.n_in, linear.kind
    product, values = 2.0 * out * n * n, 4.0 * out * n
    size = f"{out} x {n}"

    def products(what: str, low: float, high: float) -> Work:
        times = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        return Work(f"{what} of {kind}", f"{times} x 2 x {size} x {n}", "product", low * product, high * product)

    def passes(what: str, low: float, high: float) -> Work:
        times = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        return Work(f"{what} of {kind}", f"{times} passes x {size} x 4 B", "memory", low * values, high * values)

    yield passes("score and mask", _PASSES_SCORE + _PASSES_MASK, _PASSES_SCORE + _PASSES_MASK)
    if plan.needs_gram:
        # Energies: of the output aimed at, lost by mask and by solution, and as stored; of the dense output too.
        times = _SYMMETRIC * (4 if plan.aim == "own" else 5)
        yield products("errors before and after", times, times)
    if plan.aim != "own":
        # A recorded order is sought before the first linear of an input is solved, and the target is made again.
        times = 2 if plan.permute in ("gather", "simulate") and linear.m else 1
        yield products("target", times, times)
        yield Work(f"target of {kind}", f"{times} x 2 x {size} x {n} in float64", "product64",
                   times * product, times * product)  # fmt: skip
    if plan.permute != "none" and linear.m:
        sweeps = plan.setting("permute.sweeps")
        pairs = float(linear.m * (n // linear.m) ** 2 * out)
        yield Work(f"order of inputs of {kind}", f"1 to {sweeps} sweeps x {linear.m} x ({n} / {linear.m})^2 x {out}",
                   "distance", pairs, sweeps * pairs)  # fmt: skip
    if plan.refine in ("dsnot", "r2-dsnot"):
        cycles = plan.setting("dsnot.cycles")
        yield passes("swaps", _SWAP_SHARE[0] * cycles * _PASSES_STEP, _SWAP_SHARE[1] * cycles * _PASSES_STEP)
    if plan.refine == "swaps":
        most = plan.setting("swaps.most")
        yield passes("swaps", _SWAP_SHARE[0] * most * _PASSES_STEP, _SWAP_SHARE[1] * most * _PASSES_STEP)
    if plan.solver in ("sparsegpt", "mrp", "fista"):
        yield products("columns from left to right", 0.5, 0.5)
        yield passes("columns from left to right", _PASSES_COLUMN, _PASSES_COLUMN)
    if plan.solver == "fista":
        steps = plan.setting("fista.steps")
        yield products("gradient steps", _FISTA_ROUNDS[0] * (steps + 2), _FISTA_ROUNDS[1] * (steps + 2))
    if plan.solver == "admm":
        steps = plan.setting("admm.iterations")
        yield _inverses(f"inverse for the iterations of {kind}", 1, n)
        yield products("iterations", steps + 1, steps + 1)
        yield passes("iterations", steps * (_PASSES_STEP + _PASSES_MASK), steps * (_PASSES_STEP + _PASSES_MASK))
    if plan.solver == "alps":
        most = plan.setting("alps.iterations")
        low, high = min(_ALPS_SHARE[0] * most, 20), _ALPS_SHARE[1] * most
        yield products("iterations", low + 11, high + 11)
        yield passes("iterations", low * (_PASSES_STEP + _PASSES_MASK), high * (_PASSES_STEP + _PASSES_MASK))
        yield Work(f"inverses of {kind}", f"{low / 3:.3g} to {high / 3:.3g} x 2 x {n}^3", "product",
                   low / 3 * 2 * n**3, high / 3 * 2 * n**3)  # fmt: skip
    if plan.refit == "cg":
        most = plan.setting("refit.iterations")
        yield products("conjugate gradients", _CG_SHARE[0] * most, _CG_SHARE[1] * most)
    if plan.refit == "exact" or (plan.solver == "mrp" and plan.setting("mrp.free") == "all"):
        yield from _exact(linear, products)


def _exact(linear: Linear, products: Callable[[str, float, float], Work]) -> Iterator[Work]:
    """A system for every row, half of whose inputs are kept; conjugate gradients where they are too large."""
    kept = linear.n_in // 2
    if 8 * kept * kept > _EXACT_BYTES:
        yield products("conjugate gradients", *_EXACT_STEPS)
        return
    flops = linear.n_out * kept**3 / 3
    moved = 4.0 * linear.n_out * kept**2 * 8
    what = f"systems of every row of {linear.kind}"
    yield Work(what, f"1 to 8 x {linear.n_out} x ({linear.n_in} / 2)^3 / 3", "product", flops, 8 * flops)
    yield Work(what, f"8 to 24 passes x {linear.n_out} x ({linear.n_in} / 2)^2 x 4 B", "memory", moved, 3 * moved)


def rest_work(shapes: Shapes, recipe: Recipe) -> Iterator[Work]:
    """What is done once: what is outside the blocks, and hashes of source and output."""
    outside = float(shapes.outside * shapes.value_bytes)
    yield Work("reading what is outside the blocks", f"{shapes.outside:,} values x {shapes.value_bytes} B", "read",
               outside, 2 * outside)  # fmt: skip
    yield Work("writing what is outside the blocks", f"{shapes.outside:,} values x {shapes.value_bytes} B", "write",
               outside, outside)  # fmt: skip
    stored = float(shapes.stored_bytes)
    yield Work("hashes of source and output", f"2 x {shapes.stored_bytes:,} B", "digest", 2 * stored, 2 * stored)
    yield Work("reading both for it", f"0 to 2 x {shapes.stored_bytes:,} B", "read", 0, 2 * stored)
    if recipe.plan.needs_data:
        tokens = recipe.windows * recipe.length
        moved = 4.0 * tokens * shapes.width * 8
        yield Work("embedding the text", f"{tokens:,} tokens x {shapes.width} channels", "memory", moved, moved)


def _share(shapes: Shapes, linear: Linear) -> float:
    return shapes.share if linear.expert is not None else 1.0
