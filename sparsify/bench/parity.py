"""Does an exported decoder compute what the checkpoint computes? Prefill, cache, padding and batch, by value."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from sparsify.errors import UsageError, VerificationError
from sparsify.runtimes.onnxruntime_session import OnnxRuntimeSession
from sparsify.runtimes.session import Session, positions
from sparsify.runtimes.torch_session import TorchSession

# Two float32 programs that add in different orders differ by about 1e-7 of the terms they add, and depth multiplies
# it: 1.5e-4 was measured on 30 layers with logits up to about 30. A faulty mask, position or cache is far above this;
# a weight changed in its last bits is below it, which is what find_weights is for. The absolute part is for models
# whose logits are all near zero.
# A 50 % pruned SmolLM2 on random tokens differed by 1.7e-4 of its largest logit: pruning leaves large activations that
# cancel less well than the dense model's.
RELATIVE = 1e-3
ABSOLUTE = 1e-4
# A graph for 16 bits holds more than its weights in 16 bits: tables of cosines, constants that scale embeddings. In
# its float32 twin they stay rounded (2^-11, 2^-8 of their value), and the PyTorch model has them exact.
RELATIVE_16 = {"fp16": 1e-2, "bf16": 5e-2}

# Long enough for a mask or cache that is off by one to matter, short enough for any model's context.
LENGTH = 24
PADDING = 5


@dataclass(frozen=True)
class Parity:
    """Largest absolute differences of logits, by case, all within tolerance.

    Attributes:
        prefill: one sequence in one step, without padding.
        decode: the same sequence, its second half token by token on the cache.
        left_padding: a batch of 2 with padding before the shorter sequence; None where the graph takes none, and the
            session moves the tokens.
        right_padding: the same with padding behind it.
        batch: a batch of 3 sequences of one length.
        n_compared: logits compared, over all cases.
        absolute: absolute part of the tolerance.
        relative: part of the tolerance per unit of the largest reference logit of the case.
    """

    prefill: float
    decode: float
    left_padding: float | None
    right_padding: float
    batch: float
    n_compared: int
    absolute: float = ABSOLUTE
    relative: float = RELATIVE

    @property
    def max_abs_diff(self) -> float:
        """The largest difference of all cases."""
        return max(self.prefill, self.decode, self.left_padding or 0.0, self.right_padding, self.batch)


def _decode(session: OnnxRuntimeSession, ids: NDArray[np.int64], prefix: int) -> NDArray[np.float32]:
    """Logits [1, length, vocab] with ``prefix`` tokens in the first step and one in each after it."""
    past, pieces = session.empty_past(1, LENGTH), []
    for start, stop in [(0, prefix), *((i, i + 1) for i in range(prefix, ids.shape[1]))]:
        mask = np.ones((1, stop), dtype=np.int64)
        logits, past = session.run(ids[:, start:stop], mask, positions(mask)[:, start:], past)
        pieces.append(logits)
    return np.concatenate(pieces, axis=1)


def _difference(
    case: str,
    name: str,
    want: NDArray[np.float32],
    got: NDArray[np.float32],
    relative: float,
    mask: NDArray[np.int64] | None = None,
) -> tuple[float, int]:
    """(largest absolute difference at the tokens of ``mask``, logits compared), or VerificationError."""
    if want.shape != got.shape:
        raise VerificationError(f"{name}: {case}: logits are {list(got.shape)}, the model's {list(want.shape)}")
    if mask is not None:
        want, got = want[mask == 1], got[mask == 1]
    if want.size == 0:
        raise VerificationError(f"{name}: {case}: nothing was compared")
    allowed = ABSOLUTE + relative * float(np.abs(want).max())
    difference = float(np.abs(want - got).max())
    # Written so that NaN fails.
    if not difference <= allowed:
        raise VerificationError(
            f"{name}: {case}: logits differ from the model's by {difference:.3g}, more than {allowed:.3g} "
            f"({ABSOLUTE:g} + {relative:g} x largest logit)"
        )
    return difference, want.size


def check_parity(
    reference: TorchSession,
    candidate: OnnxRuntimeSession,
    *,
    vocab_size: int,
    seed: int = 0,
    relative: float = RELATIVE,
) -> Parity:
    """Differences between an exported decoder and the checkpoint it came from, on seeded random tokens.

    Sequences are 24 tokens: sliding windows longer than that are not reached.

    Args:
        reference: the checkpoint in float32; every case is compared with its one-step prefill.
        candidate: the exported artifact.
        vocab_size: tokens are drawn from [0, vocab_size).
        seed: of the tokens.
        relative: tolerance per unit of the largest reference logit.

    Raises:
        UsageError: ``vocab_size`` is larger than a session's vocabulary, or below 2.
        VerificationError: a difference above tolerance, with case, difference and tolerance; or NaN.
    """
    most = min(reference.vocab_size, candidate.vocab_size)
    if not 2 <= vocab_size <= most:
        raise UsageError(f"vocab_size {vocab_size}: want 2 to {most}, the vocabulary both sessions know")
    ids = np.random.default_rng(seed).integers(0, vocab_size, size=(3, LENGTH), dtype=np.int64)
    one, two = ids[:1], ids[:2]
    left, right = np.ones_like(two), np.ones_like(two)
    left[1, :PADDING], right[1, -PADDING:] = 0, 0
    name = str(candidate.path)
    prefill = reference.logits(one)
    results = {
        "prefill": _difference("prefill", name, prefill, candidate.logits(one), relative),
        "decode": _difference("decode with cache", name, prefill, _decode(candidate, one, LENGTH // 2), relative),
        "batch": _difference("batch of 3", name, reference.logits(ids), candidate.logits(ids), relative),
    }
    for case, mask in (("left_padding", left), ("right_padding", right)):
        # The model alone on the shorter sequence, so that a fault in padding shared by both programs shows too.
        short = two[1:, mask[1] == 1]
        got = candidate.logits(two, mask)
        full = _difference(case, name, reference.logits(two[:1]), got[:1], relative)
        padded = _difference(case, name, reference.logits(short), got[1:, mask[1] == 1], relative)
        results[case] = (max(full[0], padded[0]), full[1] + padded[1])
    # Where the session moves the tokens, no left-padded row has reached the graph.
    moved = candidate.pads_right_only
    return Parity(
        prefill=results["prefill"][0],
        decode=results["decode"][0],
        left_padding=None if moved else results["left_padding"][0],
        right_padding=results["right_padding"][0],
        batch=results["batch"][0],
        n_compared=sum(count for case, (_, count) in results.items() if case != "left_padding" or not moved),
        relative=relative,
    )


@dataclass(frozen=True)
class Rounding:
    """What the arithmetic of a delivered graph changes against the unrounded model, on the tokens of ``check_parity``.

    Attributes:
        max_abs_diff: largest difference of logits.
        largest_logit: of the model, to read the former by.
        mean_kl_nats: mean divergence of the next-token distributions from the model's.
        top1_agreement: share of positions with the same first choice.
    """

    max_abs_diff: float
    largest_logit: float
    mean_kl_nats: float
    top1_agreement: float


def measure_rounding(reference: Session, candidate: Session, *, vocab_size: int, seed: int = 0) -> Rounding:
    """How far the artifact's own arithmetic is from the model's.

    Raises:
        VerificationError: the artifact's logits are not finite.
    """
    ids = np.random.default_rng(seed).integers(0, vocab_size, size=(3, LENGTH), dtype=np.int64)
    want, got = reference.logits(ids).astype(np.float64), candidate.logits(ids).astype(np.float64)
    if not np.isfinite(got).all():
        raise VerificationError(f"{candidate.name}: logits are not finite; take bf16 or fp32")
    log_p, log_q = log_softmax(want, axis=-1), log_softmax(got, axis=-1)
    return Rounding(
        max_abs_diff=float(np.abs(want - got).max()),
        largest_logit=float(np.abs(want).max()),
        mean_kl_nats=float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()),
        top1_agreement=float((want.argmax(-1) == got.argmax(-1)).mean()),
    )
