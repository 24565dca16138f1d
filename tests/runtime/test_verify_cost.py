"""t(B, n): as measured, and as learned while decoding."""

import numpy as np
import pytest

from headstart.runtime.graph import MAX_ROWS
from headstart.runtime.verify_cost import SLOPE, BatchCost, RunningCost, VerifyCost


def test_measured_costs_are_interpolated_over_batches_histories_and_rows() -> None:
    single = BatchCost(1, (1, 2), (0, 100), ((1.0, 2.0), (3.0, 4.0)))
    cost = VerifyCost((single, BatchCost(5, (1, 3), (0, 100), ((5.0, 9.0), (5.0, 9.0)))))
    assert cost.curve(1, 50)[1] == pytest.approx(2.0) and cost.curve(1, 1000)[2] == pytest.approx(4.0)
    assert cost.curve(5, 0)[2] == pytest.approx(7.0)
    assert cost.curve(3, 0)[1] == pytest.approx(3.0)
    assert cost.curve(9, 0)[1] == pytest.approx(9.0), "more sequences always cost more"
    assert cost.curve(5, 0)[MAX_ROWS] == pytest.approx(5.0 + 2 * (MAX_ROWS - 1)), "rows beyond the measured ones are not free"
    assert VerifyCost((single,)).curve(4, 0)[1] == pytest.approx(4.0)


def test_costs_are_learned_from_the_passes_that_ran() -> None:
    cost = RunningCost()
    assert cost.curve(1, 0)[5] / cost.curve(1, 0)[1] == pytest.approx(1 + 4 * SLOPE), "a careful assumption at first"
    for _ in range(50):
        cost.observe(1, 1, 10.0)
        cost.observe(1, 9, 14.0)
    curve = cost.curve(1, 0)
    assert curve[1] == pytest.approx(10.0) and curve[5] == pytest.approx(12.0)
    assert curve[19] == pytest.approx(14.0 + 10 * SLOPE * 10.0), "the assumed slope goes on beyond what was seen"
    assert (np.diff(curve[1:]) >= 0).all()
    assert cost.curve(8, 0)[1] == pytest.approx(1.0), "another batch has costs of its own"


def test_the_first_pass_of_a_shape_also_pays_for_its_buffers() -> None:
    cost = RunningCost()
    cost.observe(1, 1, 500.0)
    cost.observe(1, 1, 10.0)
    assert cost.curve(1, 0)[1] == pytest.approx(10.0)


def test_what_the_host_takes_for_nodes_is_part_of_the_cost() -> None:
    measured = VerifyCost((BatchCost(1, (1, 4), (8,), ((10.0, 13.0),)), BatchCost(2, (1, 4), (8,), ((12.0, 18.0),))))
    cost = measured.with_nodes(0.5)
    assert cost.curve(1, 8)[[1, 2, 4]].tolist() == [10.0, 11.5, 14.5]
    assert cost.curve(2, 8)[[1, 4]].tolist() == [12.0, 21.0]
