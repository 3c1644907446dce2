"""Does a built engine compute what its model computes? A prompt and a generation, on the GPU that the engine is for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsify.errors import UsageError, VerificationError
from sparsify.runtimes.session import Session
from sparsify.runtimes.tensorrt_session import TensorRtSession

# By the data type of the engine's weights: allowed difference per unit of the largest logit. Exported graphs of float16
# differed from float32 by 5e-3 of it on 30 layers; products of float32 are TF32, which keeps as many bits as float16;
# bfloat16 keeps three fewer. A lost bias, a faulty mask or a kernel on weights that it was not chosen for is far above.
RELATIVE = {"float32": 2e-2, "float16": 2e-2, "bfloat16": 1.5e-1}
LENGTH, PADDING, NEW = 24, 5, 16


@dataclass(frozen=True)
class EngineParity:
    """How far an engine is from its model, all within tolerance.

    Attributes:
        prefill: largest absolute difference of logits of a prompt without padding.
        left_padding: the same for a batch of 2 with padding before the second prompt; None where the engine takes one.
        decode_gap: how far the chosen tokens' logits, by the model, are below the model's largest.
        n_new: tokens that were generated.
        allowed: tolerance of the differences; twice that of the gap, since both logits may be off.
    """

    prefill: float
    left_padding: float | None
    decode_gap: float
    n_new: int
    allowed: float


def check_engine(
    reference: Session, engine: TensorRtSession, *, vocab_size: int, precision: str, seed: int = 0
) -> EngineParity:
    """Compare an engine with the model it was built from, on seeded random tokens.

    The engine has no logits of single decoding steps: what it generated is judged by the reference's logits.

    Args:
        reference: the model, with the engine's weights or unrounded ones.
        engine: opened.
        vocab_size: tokens are drawn from [0, vocab_size).
        precision: of the engine's header, as ``float16``.
        seed: of the tokens.

    Raises:
        UsageError: ``vocab_size`` is beyond the engine's, or ``precision`` is unknown.
        VerificationError: a difference above tolerance, or NaN.
    """
    if not 2 <= vocab_size <= engine.vocab_size:
        raise UsageError(f"vocab_size {vocab_size}: want 2 to {engine.vocab_size}, the engine's vocabulary")
    if precision not in RELATIVE:
        raise UsageError(f"precision {precision!r}: want one of {', '.join(RELATIVE)}")
    limits = engine.limits
    length = min(LENGTH, limits.max_prompt, limits.max_tokens - 1)
    n_new = min(NEW, limits.max_tokens - length)
    ids = np.random.default_rng(seed).integers(0, vocab_size, size=(max(2, limits.min_batch), length), dtype=np.int64)
    one = ids[: max(1, limits.min_batch)]
    want = reference.logits(one)
    allowed = RELATIVE[precision] * float(np.abs(want).max())
    prefill = _within(engine, "prefill", float(np.abs(engine.logits(one) - want).max()), allowed)
    padded: float | None = None
    if len(ids) <= limits.max_batch and length > PADDING:
        mask = np.ones_like(ids)
        mask[1, :PADDING] = 0
        # The model alone on the shorter prompt, so that padding itself is tested.
        short = reference.logits(ids[1:2, PADDING:])
        difference = np.abs(engine.logits(ids, mask)[1:2, PADDING:] - short)
        padded = _within(engine, "left padding", float(difference.max()), allowed)
    made = engine.generate(one, n_new)
    logits = reference.logits(np.concatenate([one, made], axis=1))[:, length - 1 : -1]
    chosen = np.take_along_axis(logits, made[..., None], axis=-1)[..., 0]
    gap = _within(engine, "decoding", float((logits.max(axis=-1) - chosen).max()), 2 * allowed)
    return EngineParity(prefill, padded, gap, n_new, allowed)


def _within(engine: TensorRtSession, case: str, difference: float, allowed: float) -> float:
    # Written so that NaN fails.
    if not difference <= allowed:
        raise VerificationError(
            f"{engine.path}: {case}: logits differ from the model's by {difference:.3g}, more than {allowed:.3g}; "
            "the engine computes something else"
        )
    return difference
