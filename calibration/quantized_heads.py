"""Draft heads of quantized bundles."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from headstart.exporter.heads import install
from headstart.exporter.heads.embeddings import embeddings_of
from headstart.exporter.heads.storage import load_head, reference, save_head
from headstart.exporter.heads.tree_graph import looked_up
from headstart.exporter.passes.linear import Linear, linears
from headstart.exporter.passes.rotation import rotate
from headstart.exporter.passes.surgery import Writer, clean
from headstart.exporter.passes.values import name_of, shape_of
from headstart.runtime.bundle import Bundle, HeadInfo, Manifest, WeightInfo
from headstart.runtime.documents import to_json

from .rounded_nodes import replace_embedding, replace_linear
from .rounding import INT8, round_to_nearest


def quantize_head(bundle: Bundle, name: str, folder: Path, manifest: Manifest, rounded: bool) -> None:
    """Write `heads/<name>` of a bundle into `folder`, over that bundle's weights where the head shares any.

    `manifest`: of the bundle in `folder`; `rounded`: the head's own weights become int8.
    """
    info = bundle.head(name)
    model = _with_shapes(load_head(bundle, name))
    shared = {key: weight for key, weight in manifest.weights.items() if info.shared and key.startswith("lm_head")}
    for linear in [one for one in linears(model) if one.weight.name in info.shared]:
        _share(model, linear, shared)
    if rounded:
        _round(model)
    embeddings = embeddings_of(folder) if info.embeddings else {}
    _save(model, dataclasses.replace(info, shared=shared, embeddings=embeddings), folder)


def import_head(
    bundle: str | Path,
    folder: str | Path,
    name: str | None = None,
    top_k: int = 10,
    force: bool = False,
    lossy: bool = False,
) -> HeadInfo:
    """`exporter.heads.install.import_head`; where the bundle's heads are int8, the new one's own weights are rounded, too."""
    info = install.import_head(bundle, folder, name, top_k, force, lossy)
    opened = Bundle.load(Path(bundle).resolve())
    if opened.manifest.quantization.get("heads") != "int8":
        return info

    def write(workplace: Path, others: Manifest) -> Manifest:
        model = _with_shapes(load_head(opened, info.name))
        _round(model)
        _save(model, info, workplace)
        return dataclasses.replace(others, heads=(*others.heads, info.name))

    return install.install_head(opened, info.name, write, force=True)


def _with_shapes(model: Any) -> Any:
    from onnx_ir.passes.common import ShapeInferencePass

    return ShapeInferencePass()(model).model


def _round(model: Any) -> None:
    """All weights of its own; copies of the target's that are whole numbers already stay."""
    for linear in [one for one in linears(model) if not one.quantized]:
        replace_linear(model, linear, round_to_nearest(linear.dequantized(), INT8))
    for gather, table in list(looked_up(model)):
        replace_embedding(model, gather, table)


def _save(model: Any, info: HeadInfo, folder: Path) -> None:
    clean(model)
    target = folder / "heads" / info.name
    target.mkdir(parents=True)
    save_head(model, target / "head.onnx")
    (target / "head.json").write_text(to_json(info), "utf-8")


def _share(model: Any, linear: Linear, shared: dict[str, WeightInfo]) -> None:
    """Read the LM head where the quantized decoder keeps it, rotated as that one is."""
    import onnx_ir as ir

    weight, block = linear.weight, shared["lm_head"].rotation
    tensor = reference(name_of(weight), shared["lm_head"])
    weight.const_value, weight.dtype = tensor, tensor.dtype
    write = Writer(model, linear.node)
    if block:
        source = linear.source
        linear.node.replace_input_with(0, rotate(write, source, len(shape_of(source)), linear.shape[0], block))
    if "lm_head.scale" not in shared:
        return
    scale = write.constant("lm_head.scale", np.zeros(1, np.float32))
    scales = reference("lm_head.scale", shared["lm_head.scale"])
    scale.const_value, scale.shape = scales, ir.Shape(shared["lm_head.scale"].shape)
    result = write.node("DequantizeLinear", [weight, scale], axis=0 if linear.transposed else 1)
    if linear.transposed:
        result = write.node("Transpose", [result], perm=[1, 0])
    linear.node.replace_input_with(1, result)
