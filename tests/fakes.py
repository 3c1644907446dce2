"""Stand-ins: a session whose logits are a function of the ids, and progress that keeps what it is told."""

from collections.abc import Callable
from typing import Self

import numpy as np
from numpy.typing import NDArray

from sparsify.runtimes.session import Stream

Logits = Callable[[NDArray[np.int64]], NDArray[np.float32]]


class FakeSession:
    """``of`` maps ids [batch, length] to logits [batch, length, vocab]; it generates nothing."""

    name = "fake"

    def __init__(self, of: Logits) -> None:
        self.of = of

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def logits(self, ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        return self.of(ids)

    def stream(self, ids: NDArray[np.int64], n: int) -> Stream:
        raise AssertionError("measurements of logits generate nothing")

    def generate(self, ids: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        raise AssertionError("measurements of logits generate nothing")

    def engaged(self) -> dict[str, str]:
        return {}


class Notices:
    """Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.total = self.done = 0

    def stage(self, name: str, total: int) -> None:
        self.total, self.done = total, 0

    def advance(self, steps: int = 1) -> None:
        self.done += steps

    def notice(self, text: str) -> None:
        self.texts.append(text)
