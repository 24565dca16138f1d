"""Pearson's chi-square test: the tail, and the power against a bias of given size.

For an even number of degrees of freedom 2m the tail is a Poisson sum, P(X > x) = P(Poisson(x / 2) < m), and the noncentral
tail is a Poisson mixture of such tails; so categories are pooled until their number is odd, and no library is needed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIGNIFICANCE = 1e-6  # chance of calling an unbiased sampler faulty
POWER = 0.99  # chance of finding the bias that `detectable_bias` states
LEAST_EXPECTED = 8.0  # counts per category; with fewer, chi-square's tail is not Pearson's
MOST = 17  # categories: more of them cost power


@dataclass(frozen=True)
class Pooled:
    """Expected and observed counts, [K] each; K is odd."""

    expected: NDArray[np.float64]
    observed: NDArray[np.float64]

    @property
    def statistic(self) -> float:
        return float(((self.observed - self.expected) ** 2 / self.expected).sum())

    @property
    def degrees(self) -> int:
        return len(self.expected) - 1

    @property
    def total_variation(self) -> float:
        return float(np.abs(self.observed - self.expected).sum() / (2 * self.expected.sum()))


def pool(probabilities: NDArray[np.float64], observed: NDArray[np.int64]) -> Pooled:
    """Merge the rarest of [N] outcomes until each is expected LEAST_EXPECTED times, and an odd number up to MOST is left."""
    order = np.argsort(-probabilities, kind="stable")
    expected = (probabilities * observed.sum())[order].tolist()
    counts = observed[order].astype(np.float64).tolist()
    while len(expected) > 1 and (expected[-1] < LEAST_EXPECTED or len(expected) > MOST or len(expected) % 2 == 0):
        for values in (expected, counts):
            last = values.pop()
            values[-1] += last
    return Pooled(np.array(expected), np.array(counts))


def tail(statistic: float, degrees: int) -> float:
    """P(X > statistic) of a chi-square with an even number of degrees of freedom; 1 for none."""
    assert degrees % 2 == 0
    return min(1.0, math.fsum(_poisson(statistic / 2, degrees // 2))) if statistic > 0 else 1.0


def _poisson(mean: float, count: int) -> NDArray[np.float64]:
    """P(Poisson(mean) = k) for k below `count`, [count]; `mean` is positive."""
    k = np.arange(count)
    log_factorials = np.cumsum(np.log(np.maximum(k, 1)))
    return np.asarray(np.exp(k * math.log(mean) - mean - log_factorials), np.float64)


def critical_value(degrees: int, significance: float = SIGNIFICANCE) -> float:
    """The statistic whose tail is `significance`."""
    return _bisect(lambda x: tail(x, degrees) <= significance, 1000.0 + 10.0 * degrees)


def noncentral_tail(statistic: float, degrees: int, noncentrality: float) -> float:
    """P(X > statistic) of a noncentral chi-square: a mixture of central ones with Poisson(noncentrality / 2) more pairs."""
    assert degrees >= 2 and degrees % 2 == 0
    mean, pairs = noncentrality / 2, degrees // 2
    if mean == 0 or statistic <= 0:
        return tail(statistic, degrees)
    terms = int(mean + 12 * math.sqrt(mean) + 30)
    tails = np.cumsum(_poisson(statistic / 2, pairs + terms))[pairs - 1 :]  # of `degrees` + 2 j degrees at place j
    return min(1.0, float(_poisson(mean, terms) @ tails[:terms]))


def detectable_bias(samples: int, degrees: int) -> float:
    """The total variation that is found with probability POWER; 1 where no bias can be.

    A bias of total variation d has noncentrality n Σ (q - p)² / p ≥ 4 n d², by Cauchy and Schwarz: d is what any bias of that
    size is at least as visible as.
    """
    if degrees == 0 or samples == 0:
        return 1.0
    critical = critical_value(degrees)
    needed = _bisect(lambda x: noncentral_tail(critical, degrees, x) >= POWER, 1000.0 + 10.0 * degrees)
    return min(1.0, math.sqrt(needed / (4 * samples)))


def _bisect(reached: Callable[[float], bool], high: float) -> float:
    """The least x in (0, high) for which a monotone condition holds."""
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def combined(parts: Sequence[Pooled]) -> tuple[float, int]:
    """(statistic, degrees of freedom) of independent tests together."""
    return sum(part.statistic for part in parts), sum(part.degrees for part in parts)
