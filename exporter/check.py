"""Lowered graphs against the canonical ones: each graph of a bundle, run by ONNX Runtime on the CPU, output by output.

Inputs come from the golden file by their contract names: a prefill, then a tree after it, so that history, ancestors and
positions all count. Both sides read the canonical encoder's states, so that a difference belongs to the graph it is reported
for. Knows no device: what runs here, and within which limits, each target says (`Target.forms`, `Target.precisions`).
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.bundle import Bundle, GraphInfo, TensorInfo
from headstart.runtime.engines.ort_session import open_session
from headstart.runtime.errors import EngineError
from headstart.runtime.precision import INTEGERS, LIMITS, Difference, check_finite, difference
from headstart.runtime.tree import ROOT, DraftTree

from . import canonical
from .golden import read_golden
from .graph import save_graph
from .passes.row_rounding import round_rows
from .targets.target import Form, Target

Arrays = dict[str, NDArray[Any]]
TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": ml_dtypes.bfloat16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}
# What a graph is for, in this order: where it has one of these outputs, that is bounded, and the others need only be finite.
BOUNDED = (contract.LOGITS, contract.ENCODER_HIDDEN, contract.INPUT_FEATURES)
TREE = np.array([ROOT, ROOT, 0, 0, 1], np.int64)  # parents of the five drafts that the second step verifies
AUDIO_S = 1  # seconds of noise for a front-end that takes any length


def check_graphs(bundle: Bundle, target: Target[Any, Any]) -> dict[str, Difference]:
    """Graph -> how far its forms are from the canonical graph; graphs that cannot be run on this machine are left out.

    Raises EngineError, naming the graph, for one beyond the target's limits, or with NaN or infinity on either side.
    """
    found: dict[str, Difference] = {}
    golden = read_golden(bundle)
    inputs = Inputs(bundle, golden["input_ids"][:1], golden["sources"][:1] if "sources" in golden else None)
    for name in sorted(filter(target.runs, bundle.graphs), key=_order):
        forms = target.forms(name)
        reference = [_finite(f"the canonical graph {name}", step) for step in inputs.reference(name)] if forms else []
        for form in forms:
            target.progress(f"comparing {name} with the canonical graph")
            ours = [_finite(f"the graph {name} lowered for {target.device}", step) for step in inputs.run(name, form)]
            worst = _difference(name, ours, reference, form.batch)
            _check_limits(name, worst, target, partial(_rounding, name, inputs, reference))
            found[name] = _larger(found.get(name, worst), worst)
    return found


def _order(name: str) -> int:
    """Encoders first, then decoders, then what reads theirs."""
    return {"frontend": 0, "encoder": 1, "decoder": 2}.get(name, 3)


def _finite(what: str, outputs: Arrays) -> Arrays:
    for name, array in outputs.items():
        if array.dtype.kind == "f":
            check_finite(f"{what}, output {name},", array)
    return outputs


def _larger(a: Difference, b: Difference) -> Difference:
    return Difference(max(a.largest, b.largest), max(a.median, b.median))


def _difference(name: str, ours: Sequence[Arrays], reference: Sequence[Arrays], batch: int) -> Difference:
    """Of every bounded output, over all steps; a batch of equal sequences is compared with the one."""
    worst = Difference(0.0, 0.0)
    for one, other in zip(ours, reference, strict=True):
        bounded = [output for output in BOUNDED if output in other] or _floats(other)
        for output in bounded:
            repeated = np.repeat(other[output], batch, axis=0)
            worst = _larger(worst, difference(f"output {output} of the graph {name}", one[output], repeated))
    return worst


def _floats(outputs: Arrays) -> list[str]:
    return [name for name, array in outputs.items() if array.dtype.kind == "f"]


def _rounding(name: str, inputs: "Inputs", reference: Sequence[Arrays]) -> Difference:
    """What rounding activations to 8 bits does to the canonical graph, in floats and without any other pass."""
    with tempfile.TemporaryDirectory() as folder:
        rounded, _ = round_rows(canonical.load_graph(inputs.bundle, name))
        save_graph(rounded, Path(folder) / "rounded.onnx")
        return _difference(name, inputs.run(name, Form(Path(folder) / "rounded.onnx")), reference, 1)


def _check_limits(name: str, found: Difference, target: Target[Any, Any], rounding: Callable[[], Difference]) -> None:
    """Raises EngineError beyond the precision's limits, unless 8-bit activations by themselves lead that far.

    On a model with a few large channels they do: there the last bit of a float decides about whole steps, so that two graphs
    which round alike are as far from each other as from the floats.
    """
    precision = target.precisions[name]
    limits, integers = LIMITS[precision], precision in INTEGERS
    if found.within(limits) or (integers and found.within(limits.widened(rounding()))):
        return
    raise EngineError(
        f"The graph {name} lowered for {target.device} differs from the canonical one by {found.largest:.1e} of its range "
        f"(median {found.median:.1e}); {precision} may differ by {limits.largest:.0e} (median {limits.median:.0e})"
        f"{', or by what rounding the activations does to the canonical graph' if integers else ''}. This is a defect of a "
        f"lowering pass. Fix: decode {target.bundle.path} without building it, and report this."
    )


class Inputs:
    """What a bundle's graphs are compared on, and what its canonical graphs return for that.

    Attributes:
        known: tensors by contract name that later graphs read: the encoder's outputs, the decoder's hidden states.
    """

    def __init__(self, bundle: Bundle, input_ids: NDArray[np.int64], source: NDArray[Any] | None = None) -> None:
        """`input_ids` [1, T] and, with an encoder, `source` [1, …] as its graph takes it."""
        self.bundle, self.input_ids = bundle, input_ids
        self.known: Arrays = {}
        if "encoder" in bundle.manifest.graphs and source is not None:
            self.known[bundle.manifest.graphs["encoder"].inputs[0].name] = source
            self.known[contract.ENCODER_MASK] = np.ones(source.shape[:2], np.bool_)

    def reference(self, name: str) -> list[Arrays]:
        """Outputs of the canonical graph, step by step. Quantized graphs compute in floats here, as they are written."""
        info = self.bundle.graphs[name]
        runner = Runner(self.bundle.path / info.file, shared=_shared(self.bundle, name))
        outputs = list(self._outputs(name, runner, 1, self._steps()))
        self.read_from(outputs[-1])
        return outputs

    def read_from(self, outputs: Arrays) -> None:
        """Let later graphs read these outputs."""
        self.known |= {output: array for output, array in outputs.items() if output != contract.LOGITS}
        if contract.ENCODER_HIDDEN in outputs:
            self.known[contract.ENCODER_MASK] = np.ones(outputs[contract.ENCODER_HIDDEN].shape[:2], np.bool_)

    def run(self, name: str, form: Form, steps: Sequence[Arrays] = ()) -> list[Arrays]:
        """Outputs of a lowered graph on the same inputs; `steps` of a cached graph in place of the prefill and the tree."""
        runner = Runner(form.file, lm_head=form.lm_head)
        return list(self._outputs(name, runner, form.batch, steps or self._steps()))

    def _steps(self) -> tuple[Arrays, ...]:
        slots = 2 * self.input_ids.shape[1]
        return prefill_step(self.input_ids, slots), tree_step(self.input_ids, slots)

    def _outputs(self, name: str, runner: "Runner", batch: int, steps: Sequence[Arrays]) -> Iterator[Arrays]:
        info = self.bundle.graphs[name]
        if all(tensor.name != contract.WRITE_INDEX for tensor in info.inputs):
            yield runner.run(_repeated(self._values(info.inputs), batch))
            return
        others = self._values(_besides_the_step(info))
        runner.new_states(batch, steps[0][contract.ATTENTION_MASK].shape[3])
        for step in steps:
            yield runner.run(_repeated(others | step, batch))

    def _values(self, tensors: Sequence[TensorInfo]) -> Arrays:
        return {tensor.name: self._value(tensor.name, tensor.shape, tensor.dtype) for tensor in tensors}

    def _value(self, name: str, shape: Sequence[int | str], dtype: str) -> NDArray[Any]:
        if name == contract.AUDIO and self.bundle.manifest.audio is not None:
            audio = self.bundle.manifest.audio
            return _noise((1, audio.window or AUDIO_S * audio.sampling_rate), "float32")
        if name not in self.known:
            return _noise(tuple(size if isinstance(size, int) else 1 for size in shape), dtype)
        value = self.known[name]
        one_row = len(shape) == 3 and shape[1] == 1 and value.shape[1] > 1  # heads that read one state at a time
        return value[:, -1:] if one_row else value


def _besides_the_step(info: GraphInfo) -> list[TensorInfo]:
    """Inputs of a cached graph other than the step's own and the states."""
    own = {tensor.name for tensor in info.outputs}
    return [t for t in info.inputs if t.name not in contract.STEP_INPUTS and contract.updated(t.name) not in own]


def _noise(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Seeded, of the loudness of speech features; zeros where an input holds integers."""
    values = 0.5 * np.random.default_rng(1).standard_normal(shape)
    return values.astype(dtype) if dtype.startswith(("float", "bfloat")) else np.zeros(shape, dtype)


def _repeated(arrays: Arrays, batch: int) -> Arrays:
    return {name: np.repeat(array, batch, axis=0) for name, array in arrays.items()}


def _shared(bundle: Bundle, name: str) -> Arrays:
    """Weights of a head that lie in the target's file, where ONNX Runtime does not look for them."""
    head = canonical.head_of(bundle, name)
    shared = {} if head is None else head.shared
    return {
        key: np.array(np.memmap(bundle.path / weight.file, weight.dtype, "r", weight.offset, weight.shape))
        for key, weight in shared.items()
    }


def prefill_step(input_ids: NDArray[np.int64], slots: int) -> Arrays:
    """A whole text [1, T] as a causal chain from the beginning."""
    length = input_ids.shape[1]
    return _step(input_ids, np.arange(length), np.tri(length, dtype=np.bool_), 0, slots)


def tree_step(input_ids: NDArray[np.int64], slots: int) -> Arrays:
    """After that text: a root and five drafts."""
    count, length = len(TREE) + 1, input_ids.shape[1]
    tree = DraftTree(input_ids[0, 1:count], TREE, np.zeros(len(TREE), np.float32))
    return _step(input_ids[:, :count], length + tree.depths(), tree.ancestor_mask(), length, slots)


def _step(ids: NDArray[np.int64], positions: NDArray[np.int64], row_mask: NDArray[np.bool_], start: int, slots: int) -> Arrays:
    rows = ids.shape[1]
    mask = np.zeros((1, 1, rows, slots), np.bool_)
    mask[..., :start] = True
    mask[0, 0, :, start : start + rows] = row_mask
    return {
        contract.INPUT_IDS: ids,
        contract.POSITION_IDS: positions[None],
        contract.ATTENTION_MASK: mask,
        contract.WRITE_INDEX: np.array([start]),
        contract.OUTPUT_ROWS: np.arange(rows)[None],
    }


@dataclass(frozen=True)
class Tensor:
    """An input or output of a session."""

    name: str
    type: Any
    shape: tuple[Any, ...]


class Runner:
    """One graph in ONNX Runtime on the CPU, its states updated in place as the engine does it."""

    def __init__(
        self,
        file: Path,
        threads: int = 0,
        shared: Mapping[str, NDArray[Any]] | None = None,
        lm_head: Path | None = None,
    ) -> None:
        """`shared`: weights that the file refers to elsewhere; `lm_head`: the file of a decoder's LM head, where it has none.

        Raises MissingExtraError without ONNX Runtime.
        """
        self._lm_head = None if lm_head is None else open_session(lm_head, threads, as_written=True)
        self._values = {name: _ort_value(array) for name, array in (shared or {}).items()}
        self._session = open_session(file, threads, self._values, as_written=True)
        self._inputs = [Tensor(node.name, TYPES[node.type], tuple(node.shape)) for node in self._session.get_inputs()]
        self._outputs = [node.name for node in self._session.get_outputs()]
        self._states: dict[str, Any] = {}

    def new_states(self, batch: int, slots: int) -> None:
        """Empty states: of every input that comes back as an output, [batch, G, slots, D]."""
        for tensor in self._inputs:
            if contract.updated(tensor.name) in self._outputs:
                _, heads, _, size = tensor.shape
                self._states[tensor.name] = _ort_value(np.zeros((batch, heads, slots, size), tensor.type))

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Outputs by name, without the states; floats as float32."""
        outputs = self._run(inputs)
        if self._lm_head is not None:
            rows = np.take_along_axis(outputs[contract.HIDDEN], inputs[contract.OUTPUT_ROWS][..., None], axis=1)
            outputs[contract.LOGITS] = self._lm_head.run([contract.LOGITS], {contract.HIDDEN: rows})[0]
        return outputs

    def _run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        binding = self._session.io_binding()
        for tensor in self._inputs:
            if tensor.name in self._states:
                binding.bind_ortvalue_input(tensor.name, self._states[tensor.name])
            else:
                binding.bind_cpu_input(tensor.name, np.ascontiguousarray(inputs[tensor.name], tensor.type))
        updated = {contract.updated(name): value for name, value in self._states.items()}
        for name in self._outputs:
            if name in updated:
                binding.bind_ortvalue_output(name, updated[name])
            else:
                binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        arrays = zip(self._outputs, binding.get_outputs(), strict=True)
        return {name: _widened(value.numpy()) for name, value in arrays if name not in updated}


def _ort_value(array: NDArray[Any]) -> Any:
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(array)


def _widened(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float32) if array.dtype == np.float16 else array
