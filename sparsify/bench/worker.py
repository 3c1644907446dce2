"""A process that holds one artifact in one runtime and answers requests: ``python -m sparsify.bench.worker FD``.

A process of its own for each: nothing leaks from one runtime into the next, and one that dies takes nothing with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sparsify.bench.host import environment_versions
from sparsify.errors import NumericsError, SparsifyError
from sparsify.workers import serve


class Worker:
    """Answers requests, each a dict with ``do`` and arguments."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._session: Any = None
        self._vocab_size = 0
        self.requests: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
            "open": self.open,
            "stream": self.stream,
            "perplexity": self.perplexity,
            "score": self.score,
            "generate": self.generate,
            "kernels": self.kernels,
            "ceilings": self.ceilings,
        }

    def open(
        self, path: str, runtime: dict[str, Any], vocab_size: int, probe: int, trust_remote_code: bool
    ) -> Iterator[dict[str, Any]]:
        """Open a session and see that what it computes is finite: NaN makes tokens as fast as sense does."""
        from sparsify.bench.scoring import score
        from sparsify.bench.stream_times import prompts
        from sparsify.runtimes import Runtime, open_session

        session = open_session(Path(path), Runtime(**runtime), trust_remote_code=trust_remote_code)
        self._session = self._stack.enter_context(session)
        self._vocab_size = vocab_size
        logprobs, _ = score(session, prompts(0, probe, 1, vocab_size))
        if not np.isfinite(logprobs).all():
            raise NumericsError(f"{session.name}: NaN or Inf in what {path} computes; it is not measured")
        yield {
            "session": session.name,
            "engaged": session.engaged(),
            "device": _device(session.name),
            "notices": list(getattr(session, "notices", ())),
            "versions": environment_versions(),
            "weights_resident_bytes": _weights(session),
        }

    def stream(self, seed: int, prompt_tokens: int, batch: int, n: int) -> Iterator[dict[str, Any]]:
        """Time one generation."""
        from sparsify.bench.stream_times import prompts, time_stream, trace_sha256

        ids = prompts(seed, prompt_tokens, batch, self._vocab_size)
        yield {**time_stream(self._session, ids, n), "trace_sha256": trace_sha256(ids)}

    def perplexity(
        self, windows: str, stride: int, reference: str | None, trust_remote_code: bool
    ) -> Iterator[dict[str, Any]]:
        """Perplexity, and KL divergence from ``reference`` in float32 PyTorch where the runtime gives logits."""
        from sparsify.bench.perplexity import compare, perplexity
        from sparsify.bench.scoring import Scorer
        from sparsify.runtimes.torch_session import TorchSession

        ids, kl, why = np.load(windows, allow_pickle=False), None, "no dense model to compare with"
        if isinstance(self._session, Scorer):
            reference, why = None, "it gives no logits"
        if reference is not None:
            try:
                dense = TorchSession(Path(reference), trust_remote_code=trust_remote_code)
            except SparsifyError as error:
                reference, why = None, str(error)
        if reference is None:
            measured = perplexity(self._session, ids, stride=stride)
        else:
            with dense:
                _, measured, kl = compare(dense, self._session, ids, stride=stride)
        yield {"perplexity": asdict(measured), "kl": None if kl is None else asdict(kl), "why_no_kl": why}

    def score(self, ids: list[list[int]], last: int) -> Iterator[dict[str, Any]]:
        """Log-probability of each of the ``last`` tokens, and whether it is the greedy choice."""
        from sparsify.bench.scoring import score

        logprobs, greedy = score(self._session, np.asarray(ids, dtype=np.int64), last)
        yield {"logprobs": [float(value) for value in logprobs], "greedy": [bool(value) for value in greedy]}

    def generate(self, ids: list[list[int]], n: int) -> Iterator[dict[str, Any]]:
        """Greedy tokens."""
        yield {"tokens": self._session.generate(np.asarray(ids, dtype=np.int64), n)[0].tolist()}

    def kernels(self, path: str, **request: Any) -> Iterator[dict[str, Any]]:
        """Times of the artifact's linears, one record after the other; no session is needed."""
        from sparsify.bench.kernel_times import kernel_records

        yield from kernel_records(Path(path), **request)

    def ceilings(self, device: str) -> Iterator[dict[str, Any]]:
        """What this device can do at best."""
        from sparsify.roofline.ceilings import measure_ceilings

        yield asdict(measure_ceilings(device, quick=True).device)


def _weights(session: Any) -> int | None:
    """Bytes of the tensors of a PyTorch model in memory; None in other runtimes, which do not tell."""
    model = getattr(session, "model", None)
    if model is None:
        return None
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    each: dict[int, int] = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(each.values())


def _device(name: str) -> str:
    """``cpu`` or ``cuda``, from the name of a session."""
    found = name.lower()
    return "cuda" if any(word in found for word in ("cuda", "tensorrt", "gpu")) else "cpu"


def main() -> None:
    """Answer requests until standard input ends."""
    with ExitStack() as stack:
        serve(lambda _say: Worker(stack).requests)


if __name__ == "__main__":
    main()
