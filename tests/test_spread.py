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


def ratios(rng: np.random.Generator, rounds: int, speedup: float, noise: float) -> tuple[list[float], list[float]]:
    """Paired ratios of a candidate and of the baseline's second run, whose rounds share what the machine was doing."""
    shared = rng.lognormal(0, 0.2, rounds)
    first, again, candidate = (shared * rng.lognormal(0, noise, rounds) for _ in range(3))
    return list(first / (candidate / speedup)), list(first / again)


@pytest.mark.parametrize("rounds", [6, 7, 11, 25])
@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "outliers"])
def test_the_same_thing_is_hardly_ever_called_faster_or_slower(rounds: int, heavy: bool) -> None:
    rng = np.random.default_rng(1)
    claims = []
    for _ in range(2000):
        a, b = ratios(rng, rounds, 1.0, 0.02)
        if heavy:
            a = [value * (5 if rng.random() < 0.1 else 1) for value in a]
        claims.append(compare(a, b).claim)
    wrong = sum(claim != "no difference shown" for claim in claims)
    # Well under the level of the interval, since it has to leave the noise as well.
    assert wrong / len(claims) <= 0.05
    assert "too few rounds" not in claims


def test_real_differences_are_found() -> None:
    rng = np.random.default_rng(2)
    for speedup, claim in ((1.3, "faster"), (1 / 1.3, "slower")):
        found = [compare(*ratios(rng, 7, speedup, 0.02)) for _ in range(300)]
        assert np.mean([each.claim == claim for each in found]) > 0.95
        assert np.median([each.ratio for each in found]) == pytest.approx(speedup, rel=0.01)


def test_a_difference_within_the_noise_is_not_claimed() -> None:
    # Every round says 4 % faster, but the same thing twice differs by 5 %.
    found = compare([1.04] * 9, [1.05, 1 / 1.05] * 4 + [1.05])
    assert found.claim == "no difference shown"
    assert found.low == found.high == found.ratio == 1.04
    assert compare([1.04] * 9, [1.01] * 9).claim == "faster"
    assert compare([1 / 1.04] * 9, [1.01] * 9).claim == "slower"


@given(st.lists(POSITIVE, min_size=6, max_size=30), st.lists(POSITIVE, min_size=6, max_size=30))
def test_noise_and_claims_are_symmetric(a: list[float], b: list[float]) -> None:
    found = compare(a, b)
    assert found.noise_low is not None
    assert found.noise_high is not None
    assert found.noise_low <= 1 <= found.noise_high
    assert found.noise_low * found.noise_high == pytest.approx(1)
    # Which of the two runs of the baseline came first means nothing.
    turned = compare(a, [1 / value for value in b])
    assert turned.noise_high == pytest.approx(found.noise_high)
    mirrored = compare([1 / value for value in a], b)
    opposite = {"faster": "slower", "slower": "faster"}
    if not math.isclose(found.noise_high, found.low or 0) and not math.isclose(found.noise_low, found.high or 0):
        assert mirrored.claim == opposite.get(found.claim, found.claim)


@given(st.lists(POSITIVE, min_size=1, max_size=30), st.lists(POSITIVE, max_size=30))
def test_too_few_rounds_claim_nothing(a: list[float], b: list[float]) -> None:
    found = compare(a, b)
    few = len(a) < 6 or len(b) < 6
    assert (found.claim == "too few rounds") == few
    assert found.n == len(a)
    assert found.ratio == pytest.approx(np.median(a))
    assert {field.name for field in fields(Comparison)} == set(found.to_dict())
    if few:
        assert (found.low, found.high, found.noise_low, found.noise_high) == (None, None, None, None)


@pytest.mark.parametrize(("a", "b"), [([], [1.0]), ([0.0], [1.0]), ([-1.0], []), ([1.0], [0.0])])
def test_ratios_that_are_none(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        compare(a, b)
