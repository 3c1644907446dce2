"""Spread and claims: intervals hold what they say they hold, and a model against itself is not called faster."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from numpy.typing import NDArray
from scipy.stats import binom

from sparsify.bench.record_check import schema
from sparsify.bench.spread import CONFIDENCE, Comparison, compare, median_interval, percentile, spread

POSITIVE = st.floats(1e-6, 1e6)
Draw = Callable[[np.random.Generator, tuple[int, ...]], NDArray[np.float64]]


def coverage(n: int, dropped: int) -> float:
    """P(the interval from the (dropped + 1)-th to the (n - dropped)-th of n samples holds the median)."""
    return float(1 - 2 * binom.cdf(dropped, n, 0.5))


@pytest.mark.parametrize("n", range(1, 200))
def test_the_interval_is_the_narrowest_of_the_sign_test(n: int) -> None:
    # Samples that are their own rank.
    found = median_interval([float(i) for i in range(n)])
    dropped = max((k for k in range(n // 2 + 1) if coverage(n, k) >= CONFIDENCE), default=None)
    assert found == (None if dropped is None else (dropped, n - 1 - dropped))
    assert (found is None) == (n < 6)


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, shape: rng.normal(0, 1, shape),
        lambda rng, shape: rng.exponential(1, shape) - math.log(2),
        lambda rng, shape: rng.standard_cauchy(shape),
    ],
    ids=["normal", "exponential", "cauchy"],
)
def test_the_interval_holds_the_median_as_often_as_the_binomial_says(draw: Draw) -> None:
    rng = np.random.default_rng(0)
    for n in (7, 15, 40):
        samples = draw(rng, (4000, n))
        intervals = [median_interval(list(row)) for row in samples]
        held = np.mean([low <= 0 <= high for low, high in filter(None, intervals)])
        low, _ = median_interval([float(i) for i in range(n)]) or (0.0, 0.0)
        expected = coverage(n, int(low))
        assert expected >= CONFIDENCE
        # Four standard errors of 4000 draws.
        assert abs(held - expected) < 4 * math.sqrt(expected * (1 - expected) / 4000)


@given(st.lists(POSITIVE, min_size=1, max_size=150))
def test_spread_is_that_of_numpy_and_of_the_schema(samples: list[float]) -> None:
    found = spread(samples)
    assert found["median"] == pytest.approx(np.median(samples))
    assert (found["min"], found["max"], found["n"]) == (min(samples), max(samples), len(samples))
    for name, share, enough in (("p90", 90, 10), ("p99", 99, 100)):
        if len(samples) < enough:
            assert found[name] is None
        else:
            assert found[name] == pytest.approx(np.percentile(samples, share))
    validator = Draft202012Validator({"$ref": "#/$defs/spread", "$defs": schema()["$defs"]})
    assert validator.is_valid(json.loads(json.dumps(found)))


def test_spread_of_nothing() -> None:
    with pytest.raises(ValueError, match="no samples"):
        spread([])


@given(st.lists(POSITIVE, min_size=1, max_size=40), st.floats(0, 1))
def test_percentile_is_that_of_numpy(samples: list[float], share: float) -> None:
    assert percentile(samples, share) == pytest.approx(np.percentile(samples, share * 100))
    assert percentile(samples[::-1], share) == percentile(samples, share)


Ratios = tuple[list[float], list[float], list[float]]


def ratios(rng: np.random.Generator, rounds: int, speedup: float, noise: float, process: float = 0.0) -> Ratios:
    """What ``compare`` takes of two processes of a baseline and one of a candidate.

    Rounds share what the machine was doing; ``noise`` is of one round, ``process`` stays with a process for all.
    """
    shared = rng.lognormal(0, 0.2, rounds)
    one, two, candidate = (shared * rng.lognormal(0, process) * rng.lognormal(0, noise, rounds) for _ in range(3))
    return list(one / (candidate / speedup)), list(two / (candidate / speedup)), list(one / two)


def share(claim: str, count: int, rng: np.random.Generator, *of: float) -> float:
    """How often ``claim`` is made of ``ratios(rng, *of)``."""
    return sum(compare(*ratios(rng, *of)).claim == claim for _ in range(count)) / count  # type: ignore[arg-type]


@pytest.mark.parametrize("rounds", [6, 7, 11, 25])
@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "outliers"])
def test_the_same_thing_is_hardly_ever_called_faster_or_slower(rounds: int, heavy: bool) -> None:
    """Where processes of the same thing do not differ."""
    rng = np.random.default_rng(1)
    claims = []
    for _ in range(2000):
        a, b, noise = ratios(rng, rounds, 1.0, 0.02)
        if heavy:
            slower = [5 if rng.random() < 0.1 else 1 for _ in a]
            a, b = ([value * by for value, by in zip(each, slower, strict=True)] for each in (a, b))
        claims.append(compare(a, b, noise).claim)
    wrong = sum(claim != "no difference shown" for claim in claims)
    # Well under the level of the interval, since it has to leave the noise as well.
    assert wrong / len(claims) <= 0.05
    assert "too few rounds" not in claims


# Of the same thing: rounds, what rounds and processes spread by, and how often it may be called faster. What it was in
# 20000 draws of another seed stands behind.
SAME = [
    (7, 0.03, 0.03, 0.01),  # 0.1 %
    (7, 0.02, 0.05, 0.04),  # 2.4 %
    (25, 0.03, 0.03, 0.04),  # 2.6 %
    (25, 0.02, 0.05, 0.11),  # 8.6 %
    (25, 0.03, 0.10, 0.13),  # 10.2 %
    (100, 0.03, 0.10, 0.17),  # 13.7 %
]


@pytest.mark.parametrize(("rounds", "noise", "process", "most"), SAME)
def test_processes_that_differ_for_good_are_seldom_called_faster(
    rounds: int, noise: float, process: float, most: float
) -> None:
    """With two processes of the baseline one case of six is the most, however many the rounds; two runs must agree."""
    rng = np.random.default_rng(4)
    found = share("faster", 1000, rng, rounds, 1.0, noise, process)
    assert found <= most <= 1 / 6 + 0.005
    # Against one of the processes alone it is more often.
    rng = np.random.default_rng(4)
    alone = sum(
        compare(one, one, both).claim == "faster"
        for one, _, both in (ratios(rng, rounds, 1.0, noise, process) for _ in range(1000))
    )
    assert found < alone / 1000 or alone == 0
    # A second run has other processes.
    assert found**2 <= 0.03


@pytest.mark.parametrize(
    ("rounds", "noise", "process", "least"),
    [(7, 0.03, 0.03, 0.99), (7, 0.02, 0.05, 0.95), (25, 0.02, 0.05, 0.98), (25, 0.03, 0.10, 0.8)],
)
def test_half_as_fast_again_is_found(rounds: int, noise: float, process: float, least: float) -> None:
    rng = np.random.default_rng(5)
    assert share("faster", 500, rng, rounds, 1.5, noise, process) >= least
    assert share("slower", 500, rng, rounds, 1 / 1.5, noise, process) >= least


def test_real_differences_are_found() -> None:
    rng = np.random.default_rng(2)
    for speedup, claim in ((1.3, "faster"), (1 / 1.3, "slower")):
        found = [compare(*ratios(rng, 7, speedup, 0.02)) for _ in range(300)]
        assert np.mean([each.claim == claim for each in found]) > 0.95
        assert np.median([each.ratio for each in found]) == pytest.approx(speedup, rel=0.02)


def test_a_difference_within_the_noise_is_not_claimed() -> None:
    # Every round says 4 % faster, but the same thing twice differs by 5 %.
    same = [1.04] * 9
    found = compare(same, same, [1.05, 1 / 1.05] * 4 + [1.05])
    assert found.claim == "no difference shown"
    assert found.low == found.high == found.ratio == 1.04
    assert compare(same, same, [1.01] * 9).claim == "faster"
    assert compare([1 / 1.04] * 9, [1 / 1.04] * 9, [1.01] * 9).claim == "slower"


def test_a_difference_to_one_process_is_none() -> None:
    found = compare([1.2] * 9, [1.04] * 9, [1.15] * 9)
    assert (found.ratio, found.low, found.high, found.claim) == (1.04, 1.04, 1.2, "no difference shown")
    assert compare([1.2] * 9, [1.2] * 9, [1.15] * 9).claim == "faster"
    # What the two differ by to one side, others may to the other.
    for noise in (1.15, 1 / 1.15):
        assert compare([1.1] * 9, [1.1 / noise] * 9, [noise] * 9).claim == "no difference shown"
    assert compare([1 / 1.2] * 9, [1 / 1.04] * 9, [1.15] * 9).claim == "no difference shown"


SIX = st.lists(POSITIVE, min_size=6, max_size=30)


@given(SIX, SIX, SIX)
def test_noise_and_claims_are_symmetric(a: list[float], b: list[float], noise: list[float]) -> None:
    found = compare(a, b, noise)
    assert found.noise_low is not None
    assert found.noise_high is not None
    assert found.noise_low <= 1 <= found.noise_high
    assert found.noise_low * found.noise_high == pytest.approx(1)
    # Which of the two processes of the baseline came first means nothing.
    turned = compare(b, a, [1 / value for value in noise])
    assert turned.noise_high == pytest.approx(found.noise_high)
    assert (turned.ratio, turned.low, turned.high, turned.n) == (found.ratio, found.low, found.high, found.n)
    mirrored = compare([1 / value for value in a], [1 / value for value in b], noise)
    opposite = {"faster": "slower", "slower": "faster"}
    if not math.isclose(found.noise_high, found.low or 0) and not math.isclose(found.noise_low, found.high or 0):
        assert mirrored.claim == opposite.get(found.claim, found.claim)


@given(SIX, SIX, SIX)
def test_what_is_claimed_holds_against_either_process(a: list[float], b: list[float], noise: list[float]) -> None:
    found = compare(a, b, noise)
    each = [compare(one, one, noise) for one in (a, b)]
    assert found.ratio == min(one.ratio for one in each)
    assert found.low == min(one.low or 0 for one in each)
    assert found.high == max(one.high or 0 for one in each)
    if found.claim != "no difference shown":
        assert {one.claim for one in each} == {found.claim}


FEW = st.lists(POSITIVE, max_size=30)


@given(st.lists(POSITIVE, min_size=1, max_size=30), FEW, FEW)
def test_too_few_rounds_claim_nothing(a: list[float], b: list[float], noise: list[float]) -> None:
    found = compare(a, b, noise)
    few = len(a) < 6 or len(b) < 6 or len(noise) < 6
    assert (found.claim == "too few rounds") == few
    assert found.n == min(len(a), len(b) or len(a))
    assert found.ratio == pytest.approx(min(np.median(each) for each in (a, b) if each))
    assert {field.name for field in fields(Comparison)} == set(found.to_dict())
    if few:
        assert (found.low, found.high, found.noise_low, found.noise_high) == (None, None, None, None)


@pytest.mark.parametrize(
    ("a", "b", "noise"),
    [([], [1.0], [1.0]), ([0.0], [1.0], [1.0]), ([-1.0], [], []), ([1.0], [0.0], [1.0]), ([1.0], [1.0], [0.0])],
)
def test_ratios_that_are_none(a: list[float], b: list[float], noise: list[float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        compare(a, b, noise)
