"""A pass's inputs in one buffer: how they lie in it, what padding is, and which inputs are refused."""

import numpy as np
import pytest

from headstart.runtime import contract
from headstart.runtime.bundle import TensorInfo
from headstart.runtime.engines.step import ALIGNMENT, StepInputs, measured_sizes
from headstart.runtime.errors import EngineError

DECODER = [
    TensorInfo(contract.INPUT_IDS, "int64", ("batch", "rows")),
    TensorInfo(contract.POSITION_IDS, "int64", ("batch", "rows")),
    TensorInfo(contract.ROW_MASK, "bool", ("batch", "rows", "rows")),
    TensorInfo(contract.WRITE_INDEX, "int64", ("batch",)),
    TensorInfo(contract.OUTPUT_ROWS, "int64", ("batch", "chosen")),
]
FEATURES = TensorInfo("features", "bfloat16", ("batch", "rows", 256))


def sizes(batch: int, rows: int, chosen: int) -> dict[str, int]:
    return {"batch": batch, "rows": rows, "chosen": chosen}


def test_one_buffer_holds_all_inputs_aligned_and_apart() -> None:
    step = StepInputs([*DECODER, FEATURES], sizes(2, 3, 3))
    assert all(offset % ALIGNMENT == 0 for offset in step.offsets.values())
    assert len(set(step.offsets.values())) == len(step.shapes) == 6
    assert step.shapes[contract.ROW_MASK] == (2, 3, 3) and step.shapes[contract.WRITE_INDEX] == (2,)
    assert step.arrays["features"].dtype == "bfloat16" and step.shapes["features"] == (2, 3, 256)


def test_padding_sees_itself_and_no_row_sees_it() -> None:
    step = StepInputs([*DECODER, FEATURES], sizes(2, 4, 4))
    ids, mask = np.array([[7, 8, 9], [1, 2, 3]]), np.tri(3, dtype=np.bool_)[None].repeat(2, 0)
    features = np.arange(2 * 3 * 256, dtype=np.float32).reshape(2, 3, 256) / 256
    rows = np.arange(3)[None].repeat(2, 0)
    inputs = {contract.INPUT_IDS: ids, contract.POSITION_IDS: 5 + rows, contract.OUTPUT_ROWS: rows, "features": features}
    step.fill(inputs, np.array([5, 9]), mask)
    arrays = step.arrays
    assert arrays[contract.INPUT_IDS].tolist() == [[7, 8, 9, 9], [1, 2, 3, 3]]
    assert arrays[contract.WRITE_INDEX].tolist() == [5, 9] and arrays[contract.OUTPUT_ROWS].tolist() == [[0, 1, 2, 0]] * 2
    assert arrays[contract.ROW_MASK].astype(int).tolist() == [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]] * 2
    assert (arrays["features"][:, 3] == arrays["features"][:, 2]).all()
    assert arrays["features"].astype(np.float32)[0, 1, 0] == 1.0


def test_later_passes_are_written_after_earlier_ones() -> None:
    step = StepInputs(DECODER, sizes(1, 2, 1))
    ids, mask = np.arange(4)[None], np.tri(4, dtype=np.bool_)[None]
    inputs = {contract.INPUT_IDS: ids, contract.POSITION_IDS: ids, contract.OUTPUT_ROWS: np.array([[1]])}
    step.fill(inputs, np.array([1]), mask, 2, 4)
    arrays = step.arrays
    assert arrays[contract.WRITE_INDEX].tolist() == [3] and arrays[contract.INPUT_IDS].tolist() == [[2, 3]]
    assert arrays[contract.ROW_MASK].astype(int).tolist() == [[[1, 0], [1, 1]]]
    mask[0, 3, 0] = False
    with pytest.raises(AssertionError, match="has to fit one pass"):
        step.fill(inputs, np.array([1]), mask, 2, 4)


def test_the_attention_mask_covers_history_and_ancestors() -> None:
    tensor = TensorInfo(contract.ATTENTION_MASK, "bool", ("batch", 1, "rows", contract.SLOTS))
    mask = np.array([[[1, 0], [1, 1]]] * 2, np.bool_)
    for columns in (128, 64):
        step = StepInputs([*DECODER[:1], tensor], {"batch": 2, "rows": 3, contract.SLOTS: columns})
        step.fill({contract.INPUT_IDS: np.array([[1, 2], [3, 4]])}, np.array([5, 0]), mask)
        used = step.arrays[contract.ATTENTION_MASK]
        assert used.shape == (2, 1, 3, columns)
        seen = [np.flatnonzero(row).tolist() for row in used[:, 0].reshape(6, columns)]
        assert seen == [[*range(6)], [*range(7)], [*range(5), 7], [0], [0, 1], [2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"features": None},
            "'features' is missing or unknown: the graph takes features, input_ids, output_rows",
        ),
        ({"hidden": (1, 3, 256)}, "'hidden' is missing or unknown"),
        ({"features": (1, 3, 64)}, r"features has the shape \[1, 3, 64\]; the graph takes \['batch', 'rows', 256\]"),
        ({"features": (1, 4, 256)}, r"features has the shape \[1, 4, 256\]"),
        ({"features": (3, 256)}, r"features has the shape \[3, 256\]"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change: dict[str, tuple[int, ...] | None], message: str) -> None:
    shapes = {contract.INPUT_IDS: (1, 3), contract.POSITION_IDS: (1, 3), contract.OUTPUT_ROWS: (1, 1), "features": (1, 3, 256)}
    given = {name: np.zeros(shape) for name, shape in (shapes | change).items() if shape is not None}
    with pytest.raises(EngineError, match=message):
        measured_sizes([*DECODER, FEATURES], given)
    fitting = {name: np.zeros(shape) for name, shape in shapes.items()}
    assert measured_sizes([*DECODER, FEATURES], fitting) == {"batch": 1, "rows": 3, "chosen": 1}
