"""Is a session right: against PyTorch in the same precision and in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sparsify.runtimes.session import Session

# A session may be this many times as far from float32 as PyTorch in the same precision is, plus a part of the largest
# logit that stands for another order of summation.
FACTOR, RELATIVE = 3.0, 1e-3
BATCH, LENGTH, PADDING, NEW = 3, 16, 5, 24
CASES = ("no padding", "left padding", "right padding")


@dataclass(frozen=True)
class References:
    """What PyTorch says of a few random sequences.

    Attributes:
        checkpoint: the model.
        device: where PyTorch runs.
        ids: [batch, length].
        left: mask with padding before the second sequence; the layout ``genai`` takes padding only behind, ``right``.
        right: as ``left``, behind.
        exact: mask's name -> float32 logits.
        allowed: largest error of a logit that counts as right.
        tokens: what PyTorch generates in the session's precision, [batch, new].
        vocab_size: of the model.
    """

    checkpoint: Path
    device: str
    ids: NDArray[np.int64]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    exact: dict[str, NDArray[np.float32]]
    allowed: float
    tokens: NDArray[np.int64]
    vocab_size: int


def references(checkpoint: Path, dtype: str, device: str) -> References:
    """Logits and tokens by PyTorch, in ``dtype`` and in float32."""
    from sparsify.runtimes.torch_session import TorchSession

    with TorchSession(checkpoint, device=device) as exact, TorchSession(checkpoint, dtype=dtype, device=device) as same:
        ids = np.random.default_rng(0).integers(3, exact.vocab_size, size=(BATCH, LENGTH), dtype=np.int64)
        left, right = np.ones_like(ids), np.ones_like(ids)
        left[1, :PADDING], right[1, -PADDING:] = 0, 0
        logits = {name: exact.logits(ids, mask) for name, mask in zip(CASES, (None, left, right), strict=True)}
        error = float(np.abs(same.logits(ids) - logits[CASES[0]]).max())
        allowed = FACTOR * error + RELATIVE * float(np.abs(logits[CASES[0]]).max())
        return References(
            checkpoint, device, ids, left, right, logits, allowed, same.generate(ids, NEW), exact.vocab_size
        )


def check_session(
    name: str, session: Session, wanted: References, cases: tuple[str, ...] = CASES
) -> Iterator[dict[str, Any]]:
    """Logits of a prompt, with padding too, and generated tokens, a case each; one that raises is a wrong one."""
    masks = dict(zip(CASES, (np.ones_like(wanted.ids), wanted.left, wanted.right), strict=True))
    for case in cases:
        mask = masks[case]
        try:
            got = session.logits(wanted.ids, None if case == CASES[0] else mask)
        except Exception as error:  # recorded as this case's result
            yield {"case": f"{name}, {case}", "ok": False, "why": f"{type(error).__name__}: {error}"}
            continue
        real = mask == 1
        difference = float(np.abs(got - wanted.exact[case])[real].max())
        why = "" if difference <= wanted.allowed else f"differs by {difference:.3g}, allowed is {wanted.allowed:.3g}"
        yield {
            "case": f"{name}, {case}",
            "ok": not why,
            "why": why,
            "difference": difference,
            "allowed": wanted.allowed,
        }
    yield _check_tokens(name, session, wanted)


def _check_tokens(name: str, session: Session, wanted: References) -> dict[str, Any]:
    """Greedy tokens may differ from PyTorch's where two logits nearly tie: then by float32 they must nearly tie too."""
    from sparsify.runtimes.torch_session import TorchSession

    case = f"{name}, generation"
    try:
        made = session.generate(wanted.ids, NEW)
    except Exception as error:  # recorded as this case's result
        return {"case": case, "ok": False, "why": f"{type(error).__name__}: {error}"}
    if made.shape != wanted.tokens.shape or made.min() < 0 or made.max() >= wanted.vocab_size:
        return {"case": case, "ok": False, "why": f"tokens {made.shape} from {made.min()} to {made.max()}"}
    with TorchSession(wanted.checkpoint, device=wanted.device) as exact:
        logits = exact.logits(np.concatenate([wanted.ids, made], axis=1))[:, LENGTH - 1 : -1]
    chosen = np.take_along_axis(logits, made[..., None], axis=-1)[..., 0]
    gap = float((logits.max(axis=-1) - chosen).max())
    # Both the largest logit and the chosen one may be off by what is allowed.
    why = (
        "" if gap <= 2 * wanted.allowed else f"a token is {gap:.3g} below the best, allowed is {2 * wanted.allowed:.3g}"
    )
    agreement = float((made == wanted.tokens).mean())
    return {"case": case, "ok": not why, "why": why, "gap": gap, "same_as_pytorch": agreement}
