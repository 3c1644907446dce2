"""NaN and Inf are found wherever they stand."""

import pytest
import torch

from sparsify.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_is_found_at_every_place(dtype: torch.dtype, bad: float) -> None:
    """Of vector registers and their remainders, and of matrices that are no whole piece of memory."""
    matrix = torch.randn(7, 41, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert all_finite(matrix)
    for place in range(matrix.numel()):
        other = matrix.clone()
        other.view(-1)[place] = bad
        assert not all_finite(other)
        assert not all_finite(other.t())
        assert all_finite(other[:, : place % 41])
        assert all_finite(other[: place // 41])


def test_what_has_no_such_values_is_finite() -> None:
    assert all_finite(torch.zeros(0, 3))
    assert all_finite(torch.arange(4))
    assert all_finite(torch.tensor([True, False]))
