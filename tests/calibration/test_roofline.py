"""The cost model against published rows it was not fitted to, and what it says of boards and bundles."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from headstart.calibration.published import ROWS as PUBLISHED
from headstart.calibration.roofline import FITTED, Row, Work, fit, pass_ms, predicted_speedup
from headstart.calibration.simulate import predicted_cost, simulate
from headstart.calibration.tune import TuneOptions
from headstart.exporter.devices import DEVICES
from headstart.runtime.bundle import Bundle
from headstart.runtime.errors import OptionError, OutputError
from headstart.runtime.tuning import tuning_file

BundleOf = Callable[[str], Bundle]
LIMIT = 0.15  # median error of a predicted speed-up


def left_out_errors(rows: Sequence[Row] = PUBLISHED) -> list[float]:
    """|predicted / published speed-up - 1| of each row, by a fit to all other rows."""
    fits = [fit([other for other in rows if other is not row]) for row in rows]
    return [abs(predicted_speedup(row, fitted) / row.speedup - 1) for row, fitted in zip(rows, fits, strict=True)]


def left_out_device_errors(rows: Sequence[Row] = PUBLISHED) -> dict[str, float]:
    """Device -> median error of its rows by a fit to the other devices' rows alone: the error to expect for a new board."""
    errors = {}
    for device in dict.fromkeys(row.device for row in rows):
        fitted = fit([row for row in rows if row.device != device])
        own = [row for row in rows if row.device == device]
        errors[device] = statistics.median(abs(predicted_speedup(row, fitted) / row.speedup - 1) for row in own)
    return errors


def test_rows_left_out_are_predicted() -> None:
    errors = left_out_errors()
    assert len(errors) == len(PUBLISHED) and statistics.median(errors) < LIMIT


def test_boards_left_out_are_predicted() -> None:
    assert max(left_out_device_errors().values()) < LIMIT


def test_the_stored_coefficients_are_the_fit() -> None:
    found = fit(PUBLISHED)
    for name, stored in vars(FITTED).items():
        assert getattr(found, name) == pytest.approx(stored, rel=0.01)


def test_a_pass_is_bound_by_bytes_then_by_arithmetic() -> None:
    board = DEVICES["jetson-agx-orin-64gb"]
    one, few, many = (pass_ms(Work({"int4": 7000}, rows, 36), board) for rows in (1, 4, 256))
    assert few < 1.1 * one and many > 4 * one
    bandwidth_bound_ms = 7000e6 * 4.5 / 8 / (204.8e9 * FITTED.memory) * 1e3
    assert one == pytest.approx(bandwidth_bound_ms + 36 * FITTED.launch_us / 1e3, rel=0.01)


def test_every_device_states_its_source() -> None:
    for name, device in DEVICES.items():
        assert device.name == name and device.source and device.memory_gb > 0 and device.bandwidth_gb_s > 0
        assert device.float16_tflops > device.float32_tflops > 0


def test_larger_caches_cost_more(bundle_of: BundleOf) -> None:
    """An engine attends over all its slots: a capacity nobody needs is paid in every pass."""
    board = DEVICES["jetson-orin-nano-8gb"]
    small, large = (predicted_cost(bundle_of("llama"), board, slots).curve(1, 0) for slots in (64, 256))
    assert (large[1:] > small[1:]).all() and (small[2:] >= small[1:-1]).all()


def test_a_simulated_tuning_says_so(bundle_of: BundleOf, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(bundle_of("llama").path, tmp_path / "bundle")
    options = TuneOptions(max_new_tokens=16)
    found = simulate(copy, ["abc abc abc"], "jetson-orin-nano-8gb", threads=1, options=options)
    assert found.simulated and found.device == "jetson-orin-nano-8gb" and "simulated for jetson" in found.reason
    assert set(found.drafters) == {"ngram"} and found.drafters["ngram"].speedup > 0
    stored = json.loads(tuning_file(Bundle.load(copy), "jetson-orin-nano-8gb").read_text())
    assert stored["simulated"] is True and stored["fingerprint"]["engine"] == "simulated"
    with pytest.raises(OutputError, match="is not overwritten"):
        simulate(copy, ["abc"], "jetson-orin-nano-8gb", options=options)


def test_bad_input(bundle_of: BundleOf) -> None:
    with pytest.raises(OptionError, match=r"the board 'jetson' is unknown\. Known: jetson-orin-nano-4gb"):
        simulate(bundle_of("llama").path, ["abc"], "jetson")
    with pytest.raises(OptionError, match="Tuning, measured or simulated, needs prompts"):
        simulate(bundle_of("llama").path, [], "dgx-spark")
