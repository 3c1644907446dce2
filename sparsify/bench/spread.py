"""How samples spread, and when a difference may be claimed: pure functions of numbers.

A difference is claimed by paired ratios, one for each round: the interval of their median by the sign test (an order
statistic on either side, distribution-free) must not meet what the baseline differs by from itself. The baseline is two
processes, and a candidate has to differ from both: processes with the same model differ for as long as they live, and
no number of rounds shows by how much. What two processes differ by is one draw of that, so that a third one of the same
model differs by more now and then: where rounds hardly differ and processes do, it is beyond both, by more than they
are apart, in one case of three, half of them to either side (tests/test_spread.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb
from typing import Any, Literal

CONFIDENCE = 0.95
# A percentile needs samples beyond it: below these counts it would be the largest sample by another name.
_ENOUGH = {"p90": 10, "p99": 100}

# "not in turn": candidate and baseline were not measured alternately, so that drift may pass for a difference.
Claim = Literal["faster", "slower", "no difference shown", "too few rounds", "not in turn"]


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median, extremes, n, and the percentiles that n samples can tell (else None); as in the schema's ``spread``.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    found: dict[str, Any] = {
        "median": statistics.median(ordered), "min": ordered[0], "max": ordered[-1], "n": len(ordered)
    }  # fmt: skip
    for name, enough in _ENOUGH.items():
        found[name] = percentile(ordered, int(name[1:]) / 100) if len(ordered) >= enough else None
    return found


def percentile(samples: Sequence[float], share: float) -> float:
    """The sample below or at which ``share`` of all lie, linearly interpolated between neighbours."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """The narrowest pair of order statistics that holds the median with ``CONFIDENCE``; None where n is too small.

    The sign test: the k smallest and k largest of n are left out with P(Binomial(n, 1/2) < k) at most
    (1 - ``CONFIDENCE``) / 2. Six samples are the fewest.
    """
    n, ordered = len(samples), sorted(samples)
    below, dropped = 0.0, 0
    while dropped < n and (below := below + comb(n, dropped) / 2**n) <= (1 - CONFIDENCE) / 2:
        dropped += 1
    return (ordered[dropped - 1], ordered[n - dropped]) if dropped else None


@dataclass(frozen=True)
class Comparison:
    """A candidate against its baseline: ratios above 1 mean that the candidate is better.

    Attributes:
        ratio: median of the paired ratios; against the process of the baseline over which it is smaller.
        low, high: hull of the intervals of the medians against either process; None with too few rounds.
        noise_low, noise_high: what the baseline's processes differ by, in either direction.
        n: rounds; the fewer of both pairings.
        claim: what may be said.
    """

    ratio: float
    low: float | None
    high: float | None
    noise_low: float | None
    noise_high: float | None
    n: int
    claim: Claim

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def compare(first: Sequence[float], second: Sequence[float], noise: Sequence[float]) -> Comparison:
    """What paired ratios (baseline time / candidate time, or candidate rate / baseline rate) may claim.

    Args:
        first: to the baseline's first process, one for each round.
        second: to its second process; empty where there was none, and then nothing is claimed.
        noise: of one of these processes to the other, one for each round. Which is which means nothing: what they
            differ by in one direction, others may in the other.

    Raises:
        ValueError: no ratios to the first, or one that is not positive.
    """
    each = [ratios for ratios in (first, second) if ratios]
    if not first or min(map(min, (*each, noise or [1.0]))) <= 0:
        raise ValueError("ratios must be positive, and at least one is needed")
    middle, n = min(map(statistics.median, each)), min(map(len, each))
    one, other, outer = map(median_interval, (first, second, noise))
    if one is None or other is None or outer is None:
        return Comparison(middle, None, None, None, None, n, "too few rounds")
    low, high = min(one[0], other[0]), max(one[1], other[1])
    reach = max(outer[1], 1 / outer[0], 1.0)
    claim: Claim = "no difference shown"
    if low > reach:
        claim = "faster"
    elif high < 1 / reach:
        claim = "slower"
    return Comparison(middle, low, high, 1 / reach, reach, n, claim)
