"""The chi-square test: its tail, and that it finds the bias it claims to find and nothing where there is none."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from headstart.calibration.verification.chi_square import (
    LEAST_EXPECTED,
    MOST,
    SIGNIFICANCE,
    critical_value,
    detectable_bias,
    noncentral_tail,
    pool,
    tail,
)
from headstart.calibration.verification.sampling import Drawn, Prefix, judge


@pytest.mark.parametrize(("statistic", "degrees", "expected"), [(18.307, 10, 0.05), (37.566, 20, 0.01), (5.991, 2, 0.05)])
def test_tail_is_the_tables(statistic: float, degrees: int, expected: float) -> None:
    assert tail(statistic, degrees) == pytest.approx(expected, rel=1e-3)
    assert tail(critical_value(degrees), degrees) == pytest.approx(SIGNIFICANCE, rel=1e-6)


def test_noncentral_tail_is_what_shifted_normals_give() -> None:
    drawn = np.random.default_rng(0).standard_normal((200_000, 10))
    drawn[:, 0] += np.sqrt(12.0)
    share = float(((drawn**2).sum(axis=1) > 30.0).mean())
    assert noncentral_tail(30.0, 10, 12.0) == pytest.approx(share, abs=0.005)
    assert noncentral_tail(30.0, 10, 0.0) == tail(30.0, 10)


def test_categories_are_odd_in_number_and_none_is_rare() -> None:
    generator = np.random.default_rng(1)
    for outcomes in (1, 2, 5, 81):
        law = generator.dirichlet(np.full(outcomes, 0.5))
        counts = generator.multinomial(500, law)
        pooled = pool(law, counts)
        assert len(pooled.expected) % 2 == 1 and len(pooled.expected) <= MOST
        assert len(pooled.expected) == 1 or pooled.expected.min() >= LEAST_EXPECTED
        assert pooled.observed.sum() == 500 == round(pooled.expected.sum())


def test_the_stated_bias_is_found_and_an_unbiased_sampler_passes() -> None:
    """500 experiments each: power 0.99 leaves 5 of 500 unfound on average; significance 1e-6 leaves no false alarm."""
    generator = np.random.default_rng(2)
    law = generator.dirichlet(np.full(9, 3.0))
    samples = 1000
    bias = detectable_bias(samples, 8)
    wrong = law.copy()
    order = np.argsort(-law)
    wrong[order[0]] -= bias
    wrong[order[1:]] += bias * law[order[1:]] / law[order[1:]].sum()
    assert 0.05 < bias < 0.2 and wrong.min() > 0

    def p_values(true: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        pooled = [pool(law, generator.multinomial(samples, true)) for _ in range(500)]
        return np.array([tail(one.statistic, one.degrees) for one in pooled])

    assert (p_values(wrong) < SIGNIFICANCE).mean() > 0.97
    assert p_values(law).min() >= SIGNIFICANCE


def test_nothing_is_found_without_samples_or_choice() -> None:
    assert detectable_bias(0, 8) == detectable_bias(1000, 0) == 1.0
    assert detectable_bias(4000, 8) < detectable_bias(1000, 8) < detectable_bias(1000, 32)


def test_what_cannot_be_drawn_is_counted() -> None:
    request: Any = None  # only drawing reads it
    prefix = Prefix(request, {}, {(1, 1): 0.5, (2, 2): 0.5}, {})
    drawn = Drawn(Counter({(1, 1): 49, (2, 2): 49, (3, 9): 2}))
    assert judge("none", "default", [prefix], [drawn]).impossible == 2
