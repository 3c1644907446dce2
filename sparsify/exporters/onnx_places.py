"""Places of weights inside an ONNX file."""

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

# Query, key and value of their own, gate and up: three at most are known.
MOST_PIECES = 8


@dataclass(frozen=True)
class WeightLocation:
    """One linear's weight, or some rows of it, inside an ONNX file.

    Attributes:
        initializer: name of the ONNX initializer.
        transposed: whether it is stored [in, out] instead of [out, in] (last two axes).
        expert: index along the first axis, for the per-expert weight of a fused [experts, ...] initializer.
        rows: (start, stop) of the output features, for a linear fused with others along them.
    """

    initializer: str
    transposed: bool
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def view(self, stored: NDArray[Any]) -> NDArray[Any]:
        """These rows of the weight ([rows, in], or [experts, out, in] for a fused one) as a view of the initializer."""
        weight = stored if self.expert is None else stored[self.expert]
        if self.transposed:
            weight = weight.swapaxes(-1, -2)
        return weight if self.rows is None else weight[self.rows[0] : self.rows[1]]
