"""A session whose logits are a function of the ids, for measurements that need no model."""

from collections.abc import Callable
from typing import Self

import numpy as np
from numpy.typing import NDArray

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

    def generate(self, ids: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        raise AssertionError("measurements of logits generate nothing")

    def engaged(self) -> dict[str, str]:
        return {}
