"""Bytes of a pruning run, phase by phase, in memory and on disk: arithmetic on shapes, nothing is allocated.

Every term is an upper bound of what the driver holds at that moment; a process needs what the largest phase holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from sparsify.budget.shapes import Block, Linear, Shapes
from sparsify.budget.working import derives, gram_bytes, parts_of, weight_bytes, working_bytes
from sparsify.chunks import CHUNK_BYTES, LARGE_BYTES, SHARDS
from sparsify.methods import Method
from sparsify.recipe import Recipe

_MIB = 1 << 20

# Code and buffers of the libraries that the first products bring in, beside what they hold once imported.
_LIBRARY_BYTES = 128 * _MIB
# Of a tokenizer, for each of its tokens, with the text it cuts.
_TOKEN_BYTES = 1536
# Text goes through it in pieces of at most this size, and takes so many times as much meanwhile (``data``).
_PIECE_BYTES, _TOKENIZING = 4 * _MIB, 100
# Tensors outside the blocks are copied in shards of at most this size, or one tensor.
_COPY_BYTES = 1 << 30
# What a pass of a window through a block holds at once, in copies of what its linears read and write: outputs and
# inputs, the products and activations between them, queries and keys before and after rotation, heads repeated.
_COPIES_OF_OUTPUTS = 2
_COPIES_OF_INPUTS = 1
_COPIES_OF_HEADS = 4
# Float32 copies of the residual stream in a norm, and copies of the stream itself (window read, residual, output).
_NORM_COPIES = 3
_STREAM_COPIES = 4
# Scores, their softmax in float32 and its copy in the model's type, where attention forms them.
_SCORE_COPIES = 3


@dataclass(frozen=True)
class Term:
    """A part of a sum: ``what`` it is, in words with the sizes that are multiplied, and ``n_bytes``.

    ``on_device`` tells memory of the device from that of the host, where they are two. What is ``in_file`` is in memory
    as far as there is room (``sparsify.offload``), as all that is ``large`` can be.
    """

    what: str
    n_bytes: int
    on_device: bool = True
    in_file: bool = False
    large: bool = False


@dataclass(frozen=True)
class Phase:
    """What is held at one moment of a run."""

    name: str
    terms: tuple[Term, ...]

    def n_bytes(self, *, device: bool) -> int:
        """Bytes on the device, or on the host."""
        return sum(term.n_bytes for term in self.terms if term.on_device == device and not term.in_file)

    @property
    def file_bytes(self) -> int:
        """Bytes of matrices in files."""
        return sum(term.n_bytes for term in self.terms if term.in_file)


def phases(
    shapes: Shapes,
    recipe: Recipe,
    *,
    on_gpu: bool = False,
    text_bytes: int = 0,
    workers: int = 1,
    offload: bool = False,
) -> list[Phase]:
    """The phases of a run in one process that may be the largest, without what the process is made of itself.

    Args:
        shapes: of the model.
        recipe: how to prune.
        on_gpu: weights and statistics lie on a GPU.
        text_bytes: of the calibration text; 0 where token ids are given.
        workers: processes at once.
        offload: large matrices lie in files.
    """
    plan = recipe.plan
    compute = {"float32": 4, "bfloat16": 2}[recipe.compute_dtype]
    found = []
    if plan.needs_data:
        found.append(_reading_text(shapes, recipe, text_bytes))
        found.append(_entering(shapes, recipe.length, compute, on_gpu))
    for block in shapes.blocks:
        found += _block_phases(shapes, block, recipe, compute, on_gpu, workers)
    if offload and not on_gpu:
        found = [replace(phase, terms=tuple(replace(t, in_file=t.large) for t in phase.terms)) for phase in found]
    largest = shapes.outside_largest
    outside = shapes.outside * shapes.value_bytes
    held = max(largest * shapes.value_bytes, min(outside, _COPY_BYTES))
    found.append(
        Phase(
            "copying what is outside the blocks",
            (
                Term(f"tensors of a shard, at most {_COPY_BYTES >> 30} GiB or the largest tensor", held, False),
                _checking(shapes, largest, 0),
            ),
        )
    )
    return found


def _reading_text(shapes: Shapes, recipe: Recipe, text_bytes: int) -> Phase:
    if recipe.calibration == "self":
        cache = 2 * shapes.kv_heads * shapes.head_dim * shapes.n_blocks * shapes.value_bytes
        cache *= recipe.windows * recipe.length
        logits = recipe.windows * shapes.vocabulary * 8
        whole = Term("the whole model, as stored", shapes.stored_bytes, False)
        return Phase("sampling text", (whole, Term("keys, values and logits of all windows", cache + logits, False)))
    piece = min(text_bytes, _PIECE_BYTES) * _TOKENIZING
    return Phase(
        "cutting the text into tokens",
        (Term(f"text, twice, and {_TOKENIZING} times a piece", 2 * text_bytes + piece, False),),
    )


def _checking(shapes: Shapes, largest: int, beside: int) -> Term:
    """Magnitudes and two masks while the largest tensor is searched for NaN, in the place of its copy to come."""
    n_bytes = largest * max(shapes.value_bytes + 2 - beside, 0)
    return Term(f"looking for NaN in a tensor of {largest:,} values, beyond its copy", n_bytes, False)


def _entering(shapes: Shapes, length: int, compute: int, on_gpu: bool) -> Phase:
    return Phase(
        "embedding the calibration text",
        (
            Term(f"{shapes.around:,} values around the blocks x {compute} B", shapes.around * compute),
            Term(
                f"the same as stored, x {shapes.value_bytes} B",
                shapes.around * shapes.value_bytes,
                False,
            ),
            _checking(shapes, shapes.around_largest, 0 if on_gpu else compute),
            Term(
                f"a window of {length} tokens x {shapes.width} channels, {_STREAM_COPIES} copies, and a mask",
                length * shapes.width * compute * _STREAM_COPIES + length * length * compute,
            ),
        ),
    )


def _block_phases(
    shapes: Shapes, block: Block, recipe: Recipe, compute: int, on_gpu: bool, workers: int
) -> Iterator[Phase]:
    plan = recipe.plan
    weights = Term(f"weights of a block, {block.n_values:,} x {compute} B", block.n_values * compute)
    stored = Term(
        f"the block as stored, {block.n_values:,} x {shapes.value_bytes} B", block.n_values * shapes.value_bytes, False
    )
    fused = [Term(f"experts before they are stacked, {block.fused:,} x {compute} B", block.fused * compute)]
    yield Phase(
        "reading a block",
        (
            weights,
            stored,
            *(fused if block.fused else []),
            _checking(shapes, block.largest, 0 if on_gpu else compute),
        ),
    )
    copy = [stored] if on_gpu or shapes.value_bytes != compute else []
    # What leaves the block is computed meanwhile.
    passing = window_terms(shapes, block, recipe.length, compute) if plan.needs_data else []
    yield Phase("writing a block", (weights, *copy, *(fused if block.fused else []), *passing))
    if not block.pruned:
        return
    twice = [Term(f"the dense block beside it, {block.n_values:,} x {compute} B", block.n_values * compute)]
    held = (weights, *(twice if plan.aim != "own" and plan.needs_data else []))
    groups = _groups(block, plan)
    for name, group in groups:
        stats = statistics_terms(shapes, group, plan) if plan.needs_data else []
        if plan.needs_data:
            activations = activation_terms(shapes, block, group, recipe, compute, plan)
            yield Phase(f"statistics of {name}", (*held, *stats, *activations))
            if workers > 1 and not independent(plan):
                strips = Term("their upper strips, on the way to a file", _strips_bytes(group, plan))
                terms = [*held, *stats, strips]
                if on_gpu:
                    # Files are written from the host, where all that goes into one is copied to first.
                    terms.append(Term("all sums, on the host", strips.n_bytes + sum(t.n_bytes for t in stats), False))
                yield Phase(f"writing sums of {name}", tuple(terms))
        linear = max(group, key=lambda each: working_bytes(each, plan, shapes.width))
        size = round(working_bytes(linear, plan, shapes.width))
        what = f"solving {linear.kind} [{linear.n_out} x {linear.n_in}] by {parts_of(plan)}"
        derived = min(size, gram_bytes(linear)) if derives(linear, plan) else 0
        terms = [Term(what, size - derived)]
        if derived:
            terms.append(Term("and the matrix that it derives", derived, large=gram_bytes(linear) >= LARGE_BYTES))
        # Nothing is compared with the dense block once the last group's statistics are taken.
        without = held[:1] if group is groups[-1][1] else held
        if plan.aim != "own" and len(group) == 1:
            # What is needed of drift and shift is as large as the weight, and taken before the linear is solved.
            pulled = Term("what the dense model computes, in the size of the weight, twice", 2 * weight_bytes(linear))
            yield Phase(f"comparing {name}", (*without, *stats, pulled))
            stats = statistics_terms(shapes, group, replace(plan, aim="own"))
        yield Phase(f"solving {name}", (*without, *stats, *terms))
    if plan.allocate != "uniform" or plan.permute == "residual":
        yield _surveying(shapes, block, recipe, weights, compute)


def _surveying(shapes: Shapes, block: Block, recipe: Recipe, weights: Term, compute: int) -> Phase:
    """Passes over the dense model before anything is pruned take the statistics of a block all at once."""
    plan = recipe.plan
    plain = Method("", "", solver="sparsegpt" if plan.allocate == "error" else "none", score=plan.score)
    stats = statistics_terms(shapes, block.pruned, plain if plan.allocate != "uniform" else plan)
    most = max(working_bytes(each, plain if plan.allocate == "error" else plan, 0) for each in block.pruned)
    scores = sum(map(weight_bytes, block.pruned)) if plan.allocate == "owl" else 0
    return Phase(
        "survey of the dense model",
        (
            weights,
            *stats,
            *activation_terms(shapes, block, block.pruned, recipe, compute, plain),
            Term("trying sparsities, or orders, on its largest linear; scores of the block", round(most) + scores),
        ),
    )


def _groups(block: Block, plan: Method) -> list[tuple[str, tuple[Linear, ...]]]:
    """Linears whose statistics are held at the same time."""
    if plan.order == "block":
        return [("a block", block.pruned)]
    groups: dict[str, list[Linear]] = {}
    for linear in block.pruned:
        # All experts' gates and ups go together, then all downs.
        groups.setdefault(any_expert(linear.source, linear), []).append(linear)
    return [(key, tuple(group)) for key, group in groups.items()]


def any_expert(name: str, linear: Linear) -> str:
    """``name``, the same for all experts."""
    return name if linear.expert is None else name.replace(f".{linear.expert}.", ".*.")


def sources(group: tuple[Linear, ...]) -> list[Linear]:
    """One linear for every distinct input."""
    return list({linear.source: linear for linear in group}.values())


def statistics_terms(shapes: Shapes, group: tuple[Linear, ...], plan: Method) -> list[Term]:
    """Sums over the calibration tokens of every distinct input of ``group``."""
    inputs = sources(group)
    widths = " + ".join(f"{n} x {each}^2" for each, n in _counted(linear.n_in for linear in inputs).items())
    terms = [Term(f"sums of {len(inputs)} inputs", sum(3 * 8 * each.n_in for each in inputs))]
    if plan.needs_gram:
        terms += _by_size(f"Gram matrices, ({widths}) x 4 B", map(gram_bytes, inputs))
    if plan.aim != "own":
        terms += _by_size(f"drift from the dense model, ({widths}) x 4 B", map(gram_bytes, inputs))
    if plan.aim == "residual":
        writers = sources(tuple(each for each in group if each.n_out == shapes.width and each.expert is None))
        sizes = (4 * shapes.width * each.n_in for each in writers)
        terms += _by_size(f"shift of the residual stream, {shapes.width} x inputs x 4 B", sizes)
    return terms


def _by_size(what: str, sizes: Iterable[int]) -> list[Term]:
    """Matrices that can lie in files, and those that cannot."""
    sizes = list(sizes)
    large = sum(size for size in sizes if size >= LARGE_BYTES)
    found = [Term(what, n_bytes, large=n_bytes == large) for n_bytes in (large, sum(sizes) - large) if n_bytes]
    return found or [Term(what, 0)]


def _strips_bytes(group: tuple[Linear, ...], plan: Method) -> int:
    """Upper strips of the Gram matrices of a group (9/16 of each; a narrow one is a single strip)."""
    return sum(map(gram_bytes, sources(group))) if plan.needs_gram else 0


def window_terms(shapes: Shapes, block: Block, length: int, compute: int) -> list[Term]:
    """What a pass of one window of ``length`` tokens through a block holds."""
    # Experts run one after the other.
    once = {any_expert(linear.kind, linear): linear for linear in block.linears}
    through = sum(each.n_out for each in once.values()) * _COPIES_OF_OUTPUTS
    through += sum(each.n_in for each in sources(tuple(once.values()))) * _COPIES_OF_INPUTS
    through += (shapes.heads + shapes.kv_heads) * shapes.head_dim * _COPIES_OF_HEADS
    through += shapes.width * _STREAM_COPIES
    terms = [
        Term(f"a window of {length} tokens x {through} channels x {compute} B", length * through * compute),
        Term(f"norms in float32, {_NORM_COPIES} x {length} x {shapes.width} x 4 B",
             _NORM_COPIES * length * shapes.width * 4),
        Term(f"a mask of {length}^2", length * length * compute),
    ]  # fmt: skip
    if shapes.eager:
        size = shapes.heads * length * length * 4 * _SCORE_COPIES
        terms.append(Term(f"scores of attention, {shapes.heads} x {length}^2 x {_SCORE_COPIES} x 4 B", size))
    return terms


def activation_terms(
    shapes: Shapes, block: Block, group: tuple[Linear, ...], recipe: Recipe, compute: int, plan: Method
) -> list[Term]:
    """What passes over a shard hold: a window, the dense model's beside it, and inputs until they are summed."""
    length = recipe.length
    terms = window_terms(shapes, block, length, compute)
    widest = max(each.n_in for each in group)
    counted = length * widest * ((4 if compute < 4 else 0) + (24 if plan.needs_mean else 0))
    if plan.aim != "own":
        kept = sum(each.n_in for each in sources(group)) + 2 * shapes.width
        terms.append(Term(f"inputs of the dense pass, {length} x {kept} x {compute} B", length * kept * compute))
        counted += length * (widest + shapes.width) * (8 if compute < 4 else 4)
    if counted:
        terms.append(Term("tokens of a window in the type of the sums", counted))
    if plan.needs_gram or plan.aim != "own":
        tokens = -(-recipe.windows // SHARDS) * length
        # Of experts each sees a share of the tokens; twice that, since they are not chosen evenly.
        shares = ((1.0 if each.expert is None else min(2 * shapes.share, 1.0), each) for each in sources(group))
        held = round(sum(share * each.n_in for share, each in shares)) * (1 if plan.aim == "own" else 2)
        writers = sources(tuple(each for each in group if each.n_out == shapes.width and each.expert is None))
        held += shapes.width * len(writers) if plan.aim == "residual" else 0
        terms.append(
            Term(f"inputs of a shard, {tokens} tokens x {held} channels x {compute} B", tokens * held * compute)
        )
        # One of 8 of a wide matrix, or 256 rows; of more than that as many as a chunk holds.
        strip = max(max(-(-each.n_in // 8), min(each.n_in, 256)) * each.n_in * 4 for each in group)
        terms.append(Term("products of a shard, a strip of rows at a time", max(strip, min(strip * 8, CHUNK_BYTES))))
    return terms


def _counted(values: Iterator[int]) -> dict[int, int]:
    found: dict[int, int] = {}
    for value in values:
        found[value] = found.get(value, 0) + 1
    return found


def independent(plan: Method) -> bool:
    """Whether blocks can be pruned at the same time: none waits for what a pruned one puts out."""
    return not plan.needs_data or plan.inputs == "dense"


def disk_terms(shapes: Shapes, recipe: Recipe, workers: int = 1, *, offload: bool = False) -> list[Term]:
    """Files of a run: the output while it is staged, hidden states, what workers hand on, and matrices."""
    plan = recipe.plan
    terms = [Term("the output, as large as the stored model", shapes.stored_bytes, False)]
    if not plan.needs_data:
        return terms
    compute = {"float32": 4, "bfloat16": 2}[recipe.compute_dtype]
    streams = 1 if plan.aim == "own" or plan.inputs == "dense" else 2
    size = recipe.windows * recipe.length * shapes.width * compute
    # What enters a block and what leaves it; a dense model's may be ahead of the workers by one more than they are, and
    # where workers share a block, the next one's shards are written before it is.
    files = streams * (2 if workers == 1 else 3 if not independent(plan) else min(workers + 3, shapes.n_blocks + 1))
    what = f"hidden states, {recipe.windows} x {recipe.length} tokens x {shapes.width} channels x {compute} B"
    terms.append(Term(f"{what}, {files} files", files * size, False))
    if workers > 1 and not independent(plan):
        sums = max(
            (sum(t.n_bytes for t in statistics_terms(shapes, group, plan))
             for block in shapes.blocks for _, group in _groups(block, plan) if block.pruned),
            default=0,
        )  # fmt: skip
        shards = min(SHARDS, recipe.windows)
        terms.append(Term(f"sums of a group of linears, {shards} shards", shards * sums, False))
        parts = max(sum(each.n_weights for each in block.pruned) for block in shapes.blocks) * compute
        terms.append(Term("solved linears of two blocks", 2 * parts, False))
    if offload:
        found = phases(shapes, recipe, workers=workers, offload=True)
        size = max(phase.file_bytes for phase in found)
        terms.append(Term(f"matrices of {workers} processes", workers * size, False))
    if plan.permute != "none":
        orders = sum(block.count * sum(4 * each.n_in for each in block.pruned) for block in shapes.blocks)
        terms.append(Term("orders of inputs, 4 B each, in parts and joined", 2 * orders, False))
    return terms


def process_bytes(base: int, vocabulary: int = 0) -> int:
    """What a process is made of: ``base``, resident once everything is imported, libraries at work, and a tokenizer."""
    return base + _LIBRARY_BYTES + vocabulary * _TOKEN_BYTES
