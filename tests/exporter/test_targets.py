"""Targets as a table: both floors know the same devices, and every graph is compared with the canonical one within limits."""

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from cpu_target import written
from random_head import add_random_head

from headstart.exporter.build import build
from headstart.exporter.check import check_graphs
from headstart.exporter.graph import save_graph
from headstart.exporter.targets.cpu import CpuOptions
from headstart.exporter.targets.cuda import CudaOptions
from headstart.exporter.targets.options import options_for
from headstart.exporter.targets.table import TARGETS, target_for
from headstart.exporter.targets.target import Form, Target
from headstart.exporter.tensorrt.options import BuilderOptions, TensorRtOptions
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.info import engine_folder
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.engines.registry import ENGINES, Row, device_kind, open_engine
from headstart.runtime.errors import EngineError, OptionError
from headstart.runtime.loading import load
from headstart.runtime.precision import LIMITS, Limits

BundleOf = Callable[[str], Bundle]


def test_both_floors_know_the_same_devices() -> None:
    assert list(TARGETS) == list(ENGINES)


@pytest.mark.parametrize("device", ["tpu", "cpu:0", "cuda:1", "", "tensorrt-llm"])
def test_an_unknown_device_is_refused_by_one_message_that_lists_them(bundle_of: BundleOf, device: str) -> None:
    bundle = bundle_of("llama")
    messages = set()
    for use in (
        lambda: device_kind(device),
        lambda: target_for(device),
        lambda: open_engine(bundle, device),
        lambda: load(bundle.path, device),
        lambda: build(bundle.path, device),
        lambda: options_for(device, {}),
    ):
        with pytest.raises(OptionError) as caught:
            use()
        messages.add(str(caught.value))
    (message,) = messages
    assert all(f" {name}" in message for name in ENGINES)


@pytest.mark.parametrize(
    ("device", "kind"), [("cuda:tensorrt", "cuda"), ("trt-rtx:sm86,sm120", "trt-rtx"), ("tensorrt", "tensorrt")]
)
def test_devices_as_users_write_them(device: str, kind: str) -> None:
    assert device_kind(device) == kind and target_for(device) is TARGETS[kind]


def test_a_way_to_decode_is_no_device_to_build_for(bundle_of: BundleOf) -> None:
    with pytest.raises(OptionError, match="Fix: --device cuda"):
        build(bundle_of("llama").path, "cuda:tensorrt")


@pytest.mark.parametrize(
    ("device", "options", "wanted"),
    [
        ("cpu", CudaOptions(), "CpuOptions"),
        ("cuda", TensorRtOptions(), "CudaOptions"),
        ("tensorrt", CpuOptions(), "TensorRtOptions"),
    ],
)
def test_options_of_another_device_are_refused(bundle_of: BundleOf, device: str, options: CpuOptions, wanted: str) -> None:
    with pytest.raises(OptionError, match=f"takes {wanted}, got {type(options).__name__}"):
        build(bundle_of("llama").path, device, options=options)
    assert not engine_folder(bundle_of("llama"), device).exists()


def test_options_by_name() -> None:
    assert options_for("cpu", {"precision": None, "refit": False}) == CpuOptions()
    assert options_for("cuda", {"precision": "bfloat16"}) == CudaOptions("bfloat16")
    given = {"batch": 2, "workspace_mb": 64, "refit": True}
    assert options_for("trt-rtx:sm89", given) == TensorRtOptions(batch=2, builder=BuilderOptions(workspace_mb=64, refit=True))


@pytest.mark.parametrize(
    ("device", "given", "message"),
    [
        ("cpu", {"workspace_mb": 64}, "--workspace-mb does not go with --device cpu, which takes no options"),
        ("cpu", {"precision": "float16"}, "--precision does not go with --device cpu"),
        ("cuda", {"cache": 64}, "--cache does not go with --device cuda, which takes --precision"),
        ("cuda", {"strip_weights": True}, "--strip-weights does not go with --device cuda"),
    ],
)
def test_an_option_of_another_device_is_refused_by_name(device: str, given: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        options_for(device, given)


@pytest.fixture
def bundle(bundle_of: BundleOf, tmp_path: Path) -> Bundle:
    """A llama with a random Medusa head, of its own."""
    shutil.copytree(bundle_of("llama").path, tmp_path / "bundle")
    add_random_head(tmp_path / "bundle", tmp_path / "head")
    return Bundle.load(tmp_path / "bundle")


def edit_weight(file: Path, part: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the first weight of a written graph whose name contains `part`."""
    model = ir.load(file)
    weight = next(value for name, value in model.graph.initializers.items() if part in name)
    assert weight.const_value is not None
    weight.const_value = ir.tensor(change(weight.const_value.numpy().copy()), name=weight.name)
    ir.save(model, file, external_data=f"{file.name}.edited")


def test_every_graph_is_compared(bundle: Bundle, tmp_path: Path) -> None:
    differences = check_graphs(bundle, written(bundle, tmp_path / "engine"))
    assert set(differences) == {"decoder", "heads/medusa"}
    assert all(found.largest < 2e-6 for found in differences.values())


@pytest.mark.parametrize(("graph", "part"), [("decoder", "q_proj"), ("decoder_batch", "q_proj"), ("heads/medusa", "0")])
def test_a_wrong_weight_of_any_graph_is_a_fault_that_names_it(bundle: Bundle, tmp_path: Path, graph: str, part: str) -> None:
    target = written(bundle, tmp_path / "engine")
    edit_weight(target.folder / target.graphs[graph], part, lambda weight: weight[::-1])
    with pytest.raises(EngineError, match=f"The graph {graph.removesuffix('_batch')} lowered for cpu differs"):
        check_graphs(bundle, target)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("graph", ["decoder", "heads/medusa"])
def test_a_lowered_graph_of_nan_is_a_fault_that_names_it(bundle: Bundle, tmp_path: Path, graph: str, value: float) -> None:
    target = written(bundle, tmp_path / "engine")
    edit_weight(target.folder / target.graphs[graph], "norm" if graph == "decoder" else "0", lambda weight: weight * value)
    with pytest.raises(EngineError, match=rf"the graph {graph} lowered for cpu, output .* computes NaN or infinity"):
        check_graphs(bundle, target)


def test_a_canonical_graph_of_nan_is_a_fault_and_nothing_is_written(bundle: Bundle) -> None:
    file = bundle.path / bundle.manifest.graphs["decoder"].file
    edit_weight(file, "norm", lambda weight: weight * np.nan)
    edited = dataclasses.replace(bundle.manifest, files={})
    (bundle.path / "manifest.json").write_text(_json(edited), "utf-8")
    with pytest.raises(EngineError, match=r"the canonical graph decoder, output .* computes NaN or infinity"):
        build(bundle.path)
    assert not engine_folder(bundle, "cpu").exists()


def _json(value: object) -> str:
    from headstart.runtime.documents import to_json

    return to_json(value)


@pytest.mark.parametrize("limits", [Limits(0.0, 1.0, 0.0, ""), Limits(1.0, 0.0, 0.0, "")])
def test_both_bounds_of_the_table_count(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, limits: Limits) -> None:
    monkeypatch.setitem(LIMITS, "float32", limits)
    with pytest.raises(EngineError, match="float32 may differ by"):
        build(bundle.path)


class ToyTarget(Target[CpuOptions, ir.Model]):
    """A device that runs the canonical graphs as they are: all that a new row has to implement."""

    options_type = CpuOptions

    def lower(self, name: str, model: ir.Model) -> ir.Model:
        return model

    def write(self, name: str, lowered: ir.Model) -> None:
        self.graphs[name], self.precisions[name] = f"{name}.onnx", "float32"
        save_graph(lowered, self.folder / self.graphs[name])

    def forms(self, name: str) -> tuple[Form, ...]:
        return (Form(self.folder / self.graphs[name]),)


def test_a_device_is_one_line_in_each_table(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "toy", ToyTarget)
    monkeypatch.setitem(ENGINES, "toy", Row(lambda bundle, device, threads: OnnxRuntimeEngine(bundle, threads), "toy"))
    info = build(bundle.path, "toy")
    assert set(info.graphs) == {"decoder", "heads/medusa"} == set(info.differences)
    assert info.relative_difference == 0 and (engine_folder(bundle, "toy") / "heads/medusa.onnx").is_file()
    assert open_engine(bundle, "toy").model == bundle.manifest.model
    with pytest.raises(OptionError, match=r"'tpu' is unknown\. .*toy"):
        build(bundle.path, "tpu")


def test_the_command_line_refuses_an_option_of_another_device(bundle: Bundle) -> None:
    for arguments, wrong in (
        (["--device", "cpu", "--workspace-mb", "64"], "--workspace-mb does not go with --device cpu"),
        (["--device", "cuda", "--cache", "64"], "--cache does not go with --device cuda"),
    ):
        finished = subprocess.run(
            [sys.executable, "-m", "headstart", "build", str(bundle.path), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 2 and wrong in finished.stderr
    assert not (bundle.path / "engines").exists()
