"""What both vLLM sessions share: checks of what is asked, arrays of what is answered, and reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import DataError, UsageError
from sparsify.runtimes.session import Stream, check_count, check_ids
from sparsify.runtimes.vllm_settings import Report, Settings

# Tokens made, and of each token of the prompt after its first the log-probability and whether it is the greedy choice.
Completion = tuple[list[int], list[tuple[float, bool]]]
# The likeliest tokens asked of vLLM besides the prompt's own: two show a tie for the first place, common in bfloat16.
LISTED = 2


def pick(listed: Mapping[int, float], token: int) -> tuple[float, bool]:
    """Log-probability of ``token`` among those listed for its place, and whether greedy decoding would choose it."""
    highest = max(listed.values())
    return listed[token], token == min(other for other, value in listed.items() if value == highest)


class VllmRuntime(ABC):
    """The part of a session that does not depend on where the engine runs: checks, arrays, reports.

    vLLM gives log-probabilities of tokens and no logits, so ``logits`` of the protocol only refuses; perplexity is
    computed from ``prompt_logprobs``.

    Attributes:
        name: version, device and dtype, for reports (``vllm 0.32.0 cpu bfloat16``).
        settings: of the engine.
    """

    name: str
    settings: Settings
    _report: Report

    @abstractmethod
    def _complete(self, ids: NDArray[np.int64], n: int, *, scored: bool) -> list[Completion]:
        """Per row of checked ids: ``n`` new tokens; where ``scored``, what ``pick`` says of the row after its first."""

    @abstractmethod
    def close(self) -> None:
        """Stop the engine and free what it holds; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def vocab_size(self) -> int:
        """Ids lie in [0, vocab_size)."""
        return self.settings.vocab_size

    def prompt_logprobs(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Log-probability, in nats, of each token given those before it in its row: float32 [batch, length - 1].

        ids is [batch, length] int64, length 2 to ``max_length``; no token is added to it.

        Raises:
            DataError: ids of another dtype, rank or length, or outside the vocabulary.
            ModelError: the engine failed; the message says why.
        """
        return self.prompt_scores(ids)[0]

    def prompt_scores(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """``prompt_logprobs``, and whether each of these tokens is the greedy choice, bool [batch, length - 1].

        Of equally likely tokens it is the one of the lowest id; where three or more tie, of those that vLLM lists.

        Raises:
            DataError, ModelError: as ``prompt_logprobs``.
        """
        self._check(ids, 1)
        if ids.shape[1] < 2:
            raise DataError("token ids: a single token has none before it that could predict it")
        rows = [scores for _, scores in self._complete(ids, 1, scored=True)]
        logprobs = np.array([[logprob for logprob, _ in row] for row in rows], dtype=np.float32)
        return logprobs, np.array([[greedy for _, greedy in row] for row in rows], dtype=np.bool_)

    @abstractmethod
    def stream(self, ids: NDArray[np.int64], n: int) -> Stream:
        """See ``Session.stream``: each item is what one step of the engine gave, or what the server has sent by then.

        Raises:
            DataError: as ``generate``.
            ModelError: the engine failed; the message says why.
        """

    def generate(self, ids: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        """The next ``n`` tokens [batch, n] int64 of ids [batch, length], greedily; nothing stops it early.

        Raises:
            DataError: ids as in ``prompt_logprobs``, ``n`` below 1, or more than ``max_length`` tokens to run.
            ModelError: the engine failed; the message says why.
        """
        self._check(ids, n)
        return np.array([tokens for tokens, _ in self._complete(ids, n, scored=False)], dtype=np.int64)

    def _check(self, ids: NDArray[np.int64], n: int) -> None:
        check_ids(ids, self.vocab_size)
        check_count(n)
        # The last token made is not run.
        length = ids.shape[1] + n - 1
        if length > self.settings.max_length:
            raise DataError(f"token ids: {length} tokens to run, max_length is {self.settings.max_length}")

    def logits(self, ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None) -> NoReturn:
        """Not available: always ``UsageError``."""
        raise UsageError(
            f"{self.name}: vLLM gives log-probabilities of single tokens, no logits; perplexity is all it can measure"
        )

    def engaged(self) -> dict[str, str]:
        """Per linear, the kernel that runs: as the plugin reports it from the engine's processes, see ``read_report``.

        With several processes that differ, the names are joined by ``RANKS``.
        """
        return dict(self._report.engaged)

    def weights(self) -> dict[str, dict[str, int]]:
        """Per kernel, ``dense_bytes`` and ``resident_bytes`` of the linears that run by it, over all processes."""
        return {kernel: dict(sizes) for kernel, sizes in self._report.weights.items()}
