from fractions import Fraction
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify import masks
from sparsify.errors import NumericsError, UsageError
from sparsify.masks import keep_mask, satisfies
from sparsify.types import Group, NofM, Unstructured, parse_pattern


def scores(n_out: int, n_in: int, seed: int, ties: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(0, 4, (n_out, n_in), generator=generator).float()
    return torch.rand(n_out, n_in, generator=generator)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 99), st.integers(0, 10**6), st.booleans())
def test_unstructured_count_is_exact_and_nothing_kept_is_worse(
    n_out: int, n_in: int, percent: int, seed: int, ties: bool
) -> None:
    score = scores(n_out, n_in, seed, ties)
    comparison: tuple[Group, ...] = ("layer", "row")
    for group in comparison:
        keep = keep_mask(score, Unstructured(Fraction(percent, 100), group))
        groups = [(score.flatten(), keep.flatten())] if group == "layer" else list(zip(score, keep, strict=True))
        for values, kept in groups:
            assert int((~kept).sum()) == percent * len(values) // 100
            if kept.any() and not kept.all():
                assert values[~kept].max() <= values[kept].min()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 9), st.integers(0, 10**6), st.booleans(), st.data())
def test_n_of_m_keeps_exactly_n_and_the_best(
    n_out: int, n_groups: int, m: int, seed: int, ties: bool, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, m - 1))
    score = scores(n_out, n_groups * m, seed, ties)
    keep = keep_mask(score, NofM(n, m))
    values, kept = score.reshape(-1, m), keep.reshape(-1, m)
    assert (kept.sum(dim=1) == n).all()
    best = torch.stack([values[:, list(c)].sum(dim=1) for c in combinations(range(m), n)]).max(dim=0).values
    assert torch.allclose((values * kept).sum(dim=1), best)


@pytest.mark.parametrize("ties", [False, True])
def test_wide_groups_follow_the_rule_of_narrow_ones(ties: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    score = scores(7, 48 * 5, 0, ties)
    by_sorting = keep_mask(score, NofM(17, 48))
    monkeypatch.setattr(masks, "_FEW", 48)
    assert torch.equal(keep_mask(score, NofM(17, 48)), by_sorting)


def test_ties_remove_the_lower_index_first() -> None:
    equal = torch.ones(2, 4)
    assert keep_mask(equal, NofM(2, 4)).tolist() == [[False, False, True, True]] * 2
    assert keep_mask(equal, parse_pattern("0.5", "row")).tolist() == [[False, False, True, True]] * 2
    assert keep_mask(equal, parse_pattern("0.5", "layer")).tolist() == [[False] * 4, [True] * 4]


def test_polarity_is_kept_of_group() -> None:
    assert int(keep_mask(torch.rand(1, 4), parse_pattern("1:4")).sum()) == 1
    assert int(keep_mask(torch.rand(1, 4), parse_pattern("3:4")).sum()) == 3


def test_decimal_sparsity_is_exact() -> None:
    # 0.29 * 100 is 28.999999999999996 in binary floating point.
    assert int((~keep_mask(torch.rand(10, 10), parse_pattern(0.29))).sum()) == 29


def test_the_default_group_is_used_only_where_the_pattern_leaves_it_open() -> None:
    score = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert keep_mask(score, parse_pattern("0.5"), default_group="row").tolist() == [[False, True], [False, True]]
    assert keep_mask(score, parse_pattern("0.5"), default_group="layer").tolist() == [[False, False], [True, True]]
    assert keep_mask(score, parse_pattern("0.5", "layer"), default_group="row").tolist() == [[False] * 2, [True] * 2]


def test_nan_and_width_are_refused() -> None:
    with pytest.raises(NumericsError, match="NaN"):
        keep_mask(torch.tensor([[float("nan"), 1.0]]), parse_pattern("0.5"))
    with pytest.raises(UsageError, match="not a multiple"):
        keep_mask(torch.rand(2, 6), NofM(2, 4))


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "2:", "a:b", "-0.1", "1", "1.0", "nan", "inf", "x", "2:4:8", ""])
def test_bad_patterns_are_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match="pattern"):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "3:7", "0.5", "0", "0.667"])
def test_satisfies_is_the_check_of_what_keep_mask_makes(text: str) -> None:
    pattern = parse_pattern(text)
    weight = torch.rand(8, 56) + 0.1
    assert satisfies(weight * keep_mask(weight, pattern), pattern)
    if text != "0":
        assert not satisfies(weight, pattern)
