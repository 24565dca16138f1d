"""Rounding that looks at what a layer reads: GPTQ (arXiv 2210.17323), AWQ (arXiv 2306.00978), SmoothQuant (arXiv 2211.10438).

All are asked for one layer after the other and see the layers before already quantized. AWQ scales inputs up and SmoothQuant
scales them down where that is exact and nothing else reads them, which is behind a norm: its vectors take the inverse. What
attention's output and the feed-forward's inner product are projected by is not scaled (their producers are quantized before
they are); there AWQ only searches the ranges.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.exporter.passes.linear import Linear, is_lm_head, linears
from headstart.exporter.passes.surgery import constant_of, producer
from headstart.exporter.passes.values import array_of, name_of, new_initializer, operand

from .feeds import Feeds
from .observers import Statistics, layer_of, observe
from .rounding import QuantizedWeight, WeightScheme, round_to_nearest, scales_of, spread

Progress = Callable[[str, int, int], None]
InputScale = Callable[[NDArray[np.float32], Statistics], NDArray[np.float32]]  # ([K, N] weight, what it reads) -> [K]
DAMPING = 0.01  # of the mean diagonal, added to the Hessian: it has to be invertible
BLOCK = 128  # inputs whose errors are passed on together
CLIPS = np.linspace(1.0, 0.6, 17)  # shares of a group's largest magnitude tried as its range
POWERS = np.linspace(0.0, 1.0, 21)  # of the mean magnitude, tried as an input's scale
MIGRATION = 0.5  # SmoothQuant's α: the share of an input's range that its weights take over


class CalibratedRounder:
    """Observes a layer of encoder or decoder when its first weight is asked for, and rounds each weight by what it reads.

    To be asked for the layers of `model` in the order of computation, while it is quantized in place.
    """

    def __init__(self, model: Any, vocab_size: int, method: str, feeds: Feeds, progress: Progress) -> None:
        self._model, self._vocab_size, self._method, self._feeds, self._progress = model, vocab_size, method, feeds, progress
        self._order = list(dict.fromkeys(layer_of(linear) for linear in self._own()))
        self._layer = ""
        self._statistics: dict[str, Statistics] = {}

    def _own(self) -> list[Linear]:
        return [linear for linear in linears(self._model) if not is_lm_head(linear, self._vocab_size)]

    def __call__(self, linear: Linear, scheme: WeightScheme) -> QuantizedWeight:
        if layer_of(linear) != self._layer:
            self._enter(layer_of(linear), scheme)
        statistics = self._statistics[name_of(linear.source)]
        weight = linear.dequantized()  # read now: entering the layer may have rescaled it
        gram = statistics.gram / statistics.rows
        if self._method == "gptq":
            return gptq(weight, gram, scheme)
        if self._method == "awq":
            return round_clipped(weight, gram, scheme)
        return round_to_nearest(weight, scheme)

    def _enter(self, layer: str, scheme: WeightScheme) -> None:
        self._layer = layer
        own = [linear for linear in self._own() if layer_of(linear) == layer and not linear.quantized]
        read = {name_of(linear.source) for linear in own}
        # What the layer before read, too, has not changed since: the encoder's states, which all cross-attention reads.
        known = {name: seen for name, seen in self._statistics.items() if name in read}
        new = [linear for linear in own if name_of(linear.source) not in known]
        self._statistics = known | observe(self._model, new, self._feeds)
        for name, statistics in self._statistics.items():
            group = [linear for linear in own if name_of(linear.source) == name]
            if self._method == "awq":
                scale_inputs(group, statistics, lambda weight, seen: best_input_scale(weight, seen, scheme))
            elif self._method == "smoothquant":
                scale_inputs(group, statistics, smooth_input_scale)
        self._progress("calibration", self._order.index(layer) + 1, len(self._order))


def gptq(weight: NDArray[np.float32], hessian: NDArray[np.float64], scheme: WeightScheme) -> QuantizedWeight:
    """[K, N] rounded input by input; each input's error is made up for by the inputs that are still to come.

    `hessian`: [K, K], E[xᵀx]. Scales of a group are found when it begins, on the weights as corrected so far.
    """
    inputs, group = len(weight), scheme.group or len(weight)
    dead = np.diag(hessian) == 0
    work = np.where(dead[:, None], 0, weight).astype(np.float32)
    importance = np.diag(hessian).copy()  # of each input alone: errors that go together are made up for below
    upper = _inverse_root(hessian, dead)
    values = np.zeros(weight.shape, np.int8)
    scales: list[NDArray[np.float32]] = []
    step = min(BLOCK, group)
    for start in range(0, inputs, step):
        stop = min(start + step, inputs)
        if start % group == 0:
            rows = slice(start, start + group)
            scales.append(clipped_scales(work[rows], np.diag(importance[rows]), WeightScheme(scheme.bits)))
        errors = np.zeros((stop - start, weight.shape[1]), np.float32)
        for i in range(start, stop):
            values[i] = np.clip(np.rint(work[i] / scales[-1]), -scheme.largest, scheme.largest)
            errors[i - start] = (work[i] - values[i] * scales[-1]) / upper[i, i]
            work[i + 1 : stop] -= np.outer(upper[i, i + 1 : stop], errors[i - start])
        work[stop:] -= upper[start:stop, stop:].T @ errors
    return QuantizedWeight(values, np.stack(scales) if scheme.group else scales[0])


def _inverse_root(hessian: NDArray[np.float64], dead: NDArray[np.bool_]) -> NDArray[np.float32]:
    """[K, K] upper triangular U with UᵀU = H⁻¹ (its rows are what GPTQ passes errors on by)."""
    damped = hessian.copy()
    damped[dead, dead] = 1
    damped[np.diag_indices_from(damped)] += DAMPING * np.diag(damped).mean()
    inverse = np.linalg.inv(damped)
    return np.asarray(np.linalg.cholesky((inverse + inverse.T) / 2).T, np.float32)


def round_clipped(weight: NDArray[np.float32], gram: NDArray[np.float64], scheme: WeightScheme) -> QuantizedWeight:
    """To the nearest value of scales that were searched; `gram`: [K, K], E[xᵀx] of the inputs."""
    scales = clipped_scales(weight, gram, scheme)
    values = np.clip(np.rint(weight / spread(scales, len(weight))), -scheme.largest, scheme.largest)
    return QuantizedWeight(values.astype(np.int8), scales)


def clipped_scales(weight: NDArray[np.float32], gram: NDArray[np.float64], scheme: WeightScheme) -> NDArray[np.float32]:
    """[N] or [K / group, N]: of each group, the range whose rounding moves the group's share of the output least.

    `gram`: [K, K], of which the groups' own blocks are read: errors of inputs that move together add up or cancel, which
    their magnitudes alone do not tell. int8 keeps the whole range.
    """
    whole = scales_of(weight, scheme)
    if scheme.bits == 8:
        return whole
    size = scheme.group or len(weight)
    blocks = np.stack([gram[i : i + size, i : i + size] for i in range(0, len(weight), size)]).astype(np.float32)
    best, least = whole, np.full(whole.shape, np.inf, np.float32)
    for clip in CLIPS:
        tried = (whole * clip).astype(np.float32)
        rows = spread(tried, len(weight))
        error = weight - rows * np.clip(np.rint(weight / rows), -scheme.largest, scheme.largest)
        grouped = error.reshape(len(blocks), size, weight.shape[1])
        total = ((blocks @ grouped) * grouped).sum(axis=1).reshape(whole.shape)
        best, least = np.where(total < least, tried, best), np.minimum(total, least)
    return best


def scale_inputs(group: Sequence[Linear], statistics: Statistics, scale_of: InputScale) -> bool:
    """Scales for the inputs of layers that read one value, folded into the norm that makes it; False where no norm does.

    The weights of an input are made larger by s and the input smaller, in the norm: in float nothing changes.
    """
    norm = _norm_parameters(group[0].node.inputs[0], len(group))
    if norm is None or any(linear.transposed or len(linear.weight.uses()) > 1 for linear in group):
        return False
    scale = scale_of(np.concatenate([linear.dequantized() for linear in group], axis=1), statistics)
    for node, index in norm:
        parameter = _own_parameter(node, index)
        _rewrite(parameter, array_of(parameter) / scale)
    for linear in group:
        _rewrite(linear.weight, array_of(linear.weight) * scale[:, None])
    statistics.divide(scale)
    return True


def smooth_input_scale(weight: NDArray[np.float32], statistics: Statistics) -> NDArray[np.float32]:
    """[K]: SmoothQuant's scales, max|x|^α / max|w|^(1 - α): outliers of the inputs move into the weights."""
    inputs, weights = np.maximum(statistics.largest, 1e-5), np.maximum(np.abs(weight).max(axis=1), 1e-5)
    scale: NDArray[np.float32] = (inputs**MIGRATION / weights ** (1 - MIGRATION)).astype(np.float32)
    return scale


def best_input_scale(weight: NDArray[np.float32], statistics: Statistics, scheme: WeightScheme) -> NDArray[np.float32]:
    """[K]: the power of the mean magnitude under which rounding disturbs the outputs least: ‖X ΔW‖², by the Gram matrix."""
    magnitude = np.maximum(statistics.magnitude / statistics.rows, 1e-8)
    gram = (statistics.gram / statistics.rows).astype(np.float32)
    best, least = np.ones(len(weight), np.float32), np.inf
    for power in POWERS:
        scale = magnitude**power
        scale = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)
        rounded = round_to_nearest(weight * scale[:, None], scheme).dequantized() / scale[:, None]
        difference = weight - rounded
        loss = float(np.einsum("kn,kn->", difference, gram @ difference))
        if loss < least:
            best, least = scale, loss
    return best


def _norm_parameters(value: Any, readers: int) -> list[tuple[Any, int]] | None:
    """Where the vectors to divide are read, as (node, input): an RMSNorm's weight, or a LayerNorm's weight and bias.

    None when something else reads `value`, too, or when it comes from no norm.
    """
    if value.shape is None or len(value.uses()) != readers or value.is_graph_output():
        return None
    norm = producer(value, "LayerNormalization")
    if norm is not None:
        found = [index for index, v in enumerate(norm.inputs) if index and v is not None]
    else:
        norm = producer(value, "Mul")
        found = [index for index in (0, 1) if operand(norm, index).is_initializer()] if norm is not None else []
    if norm is None or not found:
        return None
    width, parameters = value.shape[-1], [operand(norm, index) for index in found]
    vectors = all(constant_of(parameter) is not None and parameter.shape == (width,) for parameter in parameters)
    return [(norm, index) for index in found] if vectors else None


def _own_parameter(node: Any, index: int) -> Any:
    """The initializer `node` reads there; a copy of its own where others read it (equal vectors are stored once)."""
    import onnx_ir as ir

    shared = node.inputs[index]
    if len(shared.uses()) == 1:
        return shared
    tensor = ir.tensor(shared.const_value.numpy(), name=f"{shared.name}.{node.outputs[0].name}")
    own = new_initializer(tensor)
    node.graph.register_initializer(own)
    node.replace_input_with(index, own)
    return own


def _rewrite(value: Any, array: NDArray[Any]) -> None:
    import onnx_ir as ir

    value.const_value = ir.tensor(np.ascontiguousarray(array, np.float32), name=value.name)
