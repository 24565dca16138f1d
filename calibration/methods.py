"""Rounding by statistics of the inputs: GPTQ (arXiv 2210.17323), AWQ (arXiv 2306.00978), SmoothQuant (arXiv 2211.10438).

Layers are processed in order, and each sees the preceding layers already quantized. AWQ scales inputs up and SmoothQuant
scales them down where that is exact and nothing else reads them, which is after a norm: its vectors take the inverse. The
inputs of the projections of attention's output and of the feed-forward's inner product are not scaled (their producers are
already quantized); there AWQ only searches the ranges.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.exporter.passes.linear import Linear, is_lm_head, linears
from headstart.exporter.passes.surgery import constant_of, own_initializer, producer
from headstart.exporter.passes.values import array_of, name_of, operand

from .feeds import Feeds
from .observers import Statistics, layer_of, observe
from .rounding import QuantizedWeight, WeightScheme, round_to_nearest, scales_of, spread

Progress = Callable[[str, int, int], None]
InputScale = Callable[[NDArray[np.float32], Statistics], NDArray[np.float32]]  # ([K, N] weight, its inputs) -> [K]
DAMPING = 0.01  # of the mean diagonal, added to the Hessian to make it invertible
BLOCK = 128  # inputs whose errors are propagated together
CLIPS = np.linspace(1.0, 0.6, 17)  # shares of a group's largest magnitude tried as its range
POWERS = np.linspace(0.0, 1.0, 21)  # of the mean magnitude, tried as an input's scale
MIGRATION = 0.5  # SmoothQuant's α: the share of an input's range that moves into its weights


class CalibratedRounder:
    """Observes an encoder or decoder layer when its first weight is requested, and rounds each weight by its inputs.

    Request the layers of `model` in the order of computation, while it is quantized in place.
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
        # Inputs that the previous layer shares have not changed: the encoder's states, which all cross-attention reads.
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
    """[K, N] rounded input by input; the remaining inputs compensate each input's error.

    `hessian`: [K, K], E[xᵀx]. The scales of a group are computed at its start, from the weights as corrected so far.
    """
    inputs, group = len(weight), scheme.group or len(weight)
    dead = np.diag(hessian) == 0
    work = np.where(dead[:, None], 0, weight).astype(np.float32)
    importance = np.diag(hessian).copy()  # of each input alone: correlated errors are compensated below
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
    """[K, K] upper triangular U with UᵀU = H⁻¹ (its rows are the factors by which GPTQ propagates errors)."""
    damped = hessian.copy()
    damped[dead, dead] = 1
    damped[np.diag_indices_from(damped)] += DAMPING * np.diag(damped).mean()
    inverse = np.linalg.inv(damped)
    return np.asarray(np.linalg.cholesky((inverse + inverse.T) / 2).T, np.float32)


def round_clipped(weight: NDArray[np.float32], gram: NDArray[np.float64], scheme: WeightScheme) -> QuantizedWeight:
    """To the nearest value, with searched scales; `gram`: [K, K], E[xᵀx] of the inputs."""
    scales = clipped_scales(weight, gram, scheme)
    values = np.clip(np.rint(weight / spread(scales, len(weight))), -scheme.largest, scheme.largest)
    return QuantizedWeight(values.astype(np.int8), scales)


def clipped_scales(weight: NDArray[np.float32], gram: NDArray[np.float64], scheme: WeightScheme) -> NDArray[np.float32]:
    """[N] or [K / group, N]: for each group, the range whose rounding changes the group's share of the output least.

    `gram`: [K, K], of which the groups' own blocks are read: errors of correlated inputs add up or cancel, which
    magnitudes alone do not show. int8 keeps the full range.
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
    """Scales for the inputs of layers that read one value, folded into the norm that produces it; False if no norm does.

    The weights of an input are multiplied by s and the norm's vectors divided by it: in float nothing changes.
    """
    norm = _norm_parameters(group[0].node.inputs[0], len(group))
    if norm is None or any(linear.transposed or len(linear.weight.uses()) > 1 for linear in group):
        return False
    scale = scale_of(np.concatenate([linear.dequantized() for linear in group], axis=1), statistics)
    for node, index in norm:
        parameter = own_initializer(node, index)
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
    """[K]: the power of the mean magnitude whose rounding changes the outputs least: ‖X ΔW‖², by the Gram matrix."""
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
    """The vectors to divide, as (node, input): an RMSNorm's weight, or a LayerNorm's weight and bias.

    None if something else also reads `value`, or if no norm produces it.
    """
    if value.shape is None or len(value.uses()) != readers or value.is_graph_output():
        return None
    norm = producer(value, "LayerNormalization")
    if norm is not None:
        indices = [index for index, v in enumerate(norm.inputs) if index and v is not None]
    else:
        norm = producer(value, "Mul")
        indices = [index for index in (0, 1) if operand(norm, index).is_initializer()] if norm is not None else []
    if norm is None or not indices:
        return None
    width, parameters = value.shape[-1], [operand(norm, index) for index in indices]
    vectors = all(constant_of(parameter) is not None and parameter.shape == (width,) for parameter in parameters)
    return [(norm, index) for index in indices] if vectors else None


def _rewrite(value: Any, array: NDArray[Any]) -> None:
    import onnx_ir as ir

    value.const_value = ir.tensor(np.ascontiguousarray(array, np.float32), name=value.name)
