"""Bounds on logits: one table, and no NaN passes it."""

import numpy as np
import pytest

from headstart.runtime.errors import EngineError
from headstart.runtime.precision import LIMITS, Difference, difference, precision_of

REFERENCE = np.random.default_rng(0).standard_normal((3, 24, 5000)).astype(np.float32)


def test_equal_logits_differ_by_nothing() -> None:
    assert difference("decoder", REFERENCE, REFERENCE) == Difference(0.0, 0.0)


def test_a_difference_is_relative_to_the_rows_range() -> None:
    ours = REFERENCE.copy()
    ours[1, 2, 3] += 0.5 * np.ptp(REFERENCE[1, 2])
    found = difference("decoder", ours, REFERENCE)
    assert found.largest == pytest.approx(0.5, rel=1e-4)
    assert found.median == 0
    assert difference("decoder", 100 * ours, 100 * REFERENCE).largest == pytest.approx(found.largest, rel=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["ours", "reference"])
def test_one_value_that_is_not_finite_is_refused_on_either_side_and_the_graph_is_named(value: float, side: str) -> None:
    spoiled = REFERENCE.copy()
    spoiled[2, 5, 17] = value
    pair = (spoiled, REFERENCE) if side == "ours" else (REFERENCE, spoiled)
    with pytest.raises(EngineError, match=r"heads/medusa.* NaN or infinity: 1 of"):
        difference("heads/medusa", *pair)


@pytest.mark.parametrize("precision", LIMITS)
def test_a_difference_of_nan_is_within_no_limit(precision: str) -> None:
    assert Difference(0.0, 0.0).within(LIMITS[precision])
    assert not Difference(float("nan"), 0.0).within(LIMITS[precision])
    assert not Difference(0.0, float("nan")).within(LIMITS[precision])


@pytest.mark.parametrize("precision", LIMITS)
def test_both_bounds_count(precision: str) -> None:
    limits = LIMITS[precision]
    assert not Difference(2 * limits.largest, 0.0).within(limits)
    assert not Difference(limits.largest, 2 * limits.median).within(limits)


def test_the_precision_of_an_engine() -> None:
    assert precision_of("bfloat16", integer_products=False) == "bfloat16"
    assert precision_of("float32", integer_products=False, weights="int8") == "float32"
    assert precision_of("float32", integer_products=True, weights="int8") == "int8_per_row"
    assert precision_of("float32", integer_products=True, weights="int4, groups of 32") == "int4"


def test_limits_follow_what_rounding_does_where_that_is_more() -> None:
    limits = LIMITS["int8_per_row"]
    assert limits.widened(Difference(0.001, 0.001)) == limits
    wider = limits.widened(Difference(0.2, 0.05))
    assert (wider.largest, wider.median, wider.tie) == pytest.approx((0.6, 0.15, 0.15))
    assert Difference(0.5, 0.1).within(wider) and not Difference(0.7, 0.1).within(wider)
    assert not Difference(0.5, 0.1).within(limits)
