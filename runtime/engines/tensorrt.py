"""The engine on TensorRT, classic or for RTX: plans with fixed sizes, buffers on the device, caches updated where they lie.

A forward goes up in one copy (`buckets.Packed`) and runs through the smallest profile that holds its rows. Its best tokens
come down; logits and hidden states stay until somebody asks (`device_output`). A commit moves slots on the device. The host's
side is tested with stand-ins for `Device` and `Plan` that run the same lowered graphs in ONNX Runtime; `cuda.Cuda` and
`plans.LoadedPlan` HAVE NOT BEEN RUN ON A GPU YET.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.bundle import Bundle, HeadInfo
from headstart.runtime.cache import CrossState, KVCache
from headstart.runtime.engine import MAX_ROWS, SLOT_STEP, HostOutput, StepOutput
from headstart.runtime.engines.buckets import Packed, Pass, passes
from headstart.runtime.engines.device_cache import CacheLayout, CachePool, DeviceCache, decoder_addresses
from headstart.runtime.engines.device_output import DeviceOutput, OutputBuffers
from headstart.runtime.engines.half import STORED, narrowed, widened
from headstart.runtime.engines.info import EngineInfo, built_engine, engine_folder
from headstart.runtime.engines.sources import axis_size, check_length, filled, read_source
from headstart.runtime.engines.tensorrt_device import Device, Plan
from headstart.runtime.errors import EngineError

TENSORRT_DEVICES = ("trt-rtx", "tensorrt")  # of which the former names GPU generations behind a colon


class TensorRtEngine:
    """The bundle's decoder as built for one device."""

    def __init__(self, bundle: Bundle, info: EngineInfo, device: Device, open_plan: Callable[[str], Plan]) -> None:
        """`open_plan`: name of a graph of the engine -> its plan."""
        self.bundle, self.info, self.built = bundle, info, (info, engine_folder(bundle, info.device))
        self.device, self.threads = info.device, 0
        self.model = dataclasses.replace(bundle.manifest.model, max_cache=info.cache_slots - MAX_ROWS)
        self._memory, self._open_plan = device, open_plan
        self._precision = info.settings["precision"]
        self._profiles = info.plans["decoder"].profiles
        self._plan = open_plan("decoder")
        self._plans: dict[str, Plan] = {}  # of what runs once a source
        self._packed: dict[tuple[int, int, int], tuple[Packed, int]] = {}
        self._outputs = self._allocate_outputs()
        longest = max(profile.sizes["rows"][2] for profile in self._profiles)
        self._prompt_inputs = device.allocate(Packed(1, longest, 1).data.nbytes)
        manifest = bundle.manifest
        layout = CacheLayout.of(manifest.caches, manifest.cross_caches, info.cache_slots, info.source_rows)
        self._caches = CachePool(layout, device)

    @classmethod
    def open(cls, bundle: Bundle, device: str) -> "TensorRtEngine":
        """Raises EngineError when nothing was built for `device`, when it is stale, or when there is no GPU."""
        from .cuda import Cuda
        from .plans import PlanLoader

        if bundle.manifest.model.source and "encoder" not in bundle.manifest.graphs:
            raise EngineError(f"{bundle.path} is an assistant without an encoder of its own. Fix: --device cpu.")
        info = built_engine(bundle, device)
        if info is None:
            raise EngineError(f"{bundle.path} is not built for {device}. Fix: headstart build {bundle.path} --device {device}.")
        bundle.check_hashes(unread=info.replaced())
        loader = PlanLoader(info, engine_folder(bundle, device), Cuda)
        return cls(bundle, info, loader.cuda, loader.open)

    @property
    def exact(self) -> bool:
        """Half precision rounds differently for every number of rows."""
        return False

    def _allocate_outputs(self) -> OutputBuffers:
        """For the most rows a pass can have."""
        model = self.bundle.manifest.model
        sizes = [(profile.sizes.get("batch", (1, 1, 1))[2], profile.sizes) for profile in self._profiles]
        rows, chosen = (max(batch * size[name][2] for batch, size in sizes) for name in ("rows", "chosen"))
        widths = {contract.LOGITS: model.vocab_size, contract.BEST_IDS: 1, contract.HIDDEN: model.hidden_size}
        if model.aux_layers:
            widths[contract.AUX_HIDDEN] = model.hidden_size * len(model.aux_layers)
        most = {name: chosen if name in (contract.LOGITS, contract.BEST_IDS) else rows for name in widths}
        return OutputBuffers.allocate(self._memory, widths, most, self._precision)

    def features(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the encoder reads of a recording's [samples]: the samples themselves where there is no front-end.

        Raises PromptError for a length that the engine was not built for, EngineError for one built without a front-end.
        """
        frontend = self.bundle.manifest.graphs.get("frontend")
        if frontend is None:
            return samples
        if (plan := self.info.plans.get("frontend")) is None:
            raise EngineError(f"The engine for {self.device} has no front-end. Fix: headstart build --force, again.")
        if plan.profiles:
            check_length(plan, "samples", len(samples), "samples")
        sizes = {"batch": 1, "samples": len(samples)}
        shape = tuple(axis_size(axis, sizes) for axis in frontend.outputs[0].shape)
        inputs = {contract.AUDIO: np.ascontiguousarray(samples[None], np.float32)}
        features: NDArray[np.float32] = np.zeros(shape, np.float32)
        self._run_once("frontend", inputs, {contract.INPUT_FEATURES: features})
        first: NDArray[np.float32] = features[0]
        return first

    def encode(self, sources: Sequence[NDArray[Any]]) -> CrossState:
        """Run the encoder over one source after another; states are padded to the size built for, and stay in half precision.

        Raises PromptError for a source it has no room for.
        """
        found = [self._encode(source) for source in sources]
        buffers = zip(*(state.buffers for state in found), strict=True)
        mask, hidden = (np.concatenate([getattr(state, name) for state in found]) for name in ("mask", "hidden"))
        return CrossState(found[0].names, tuple(map(np.concatenate, buffers)), mask, hidden)

    def _encode(self, one: NDArray[Any]) -> CrossState:
        graph, most = self.bundle.manifest.graphs["encoder"], self.info.source_rows
        source = read_source(graph, self.info.plans.get("encoder"), one, most, self._precision)
        inputs, rows = source.inputs, source.rows
        if contract.ENCODER_MASK in {tensor.name for tensor in graph.inputs}:
            inputs[contract.ENCODER_MASK] = source.mask
        shapes: dict[str, tuple[int, ...]] = {contract.ENCODER_HIDDEN: (1, rows, int(graph.outputs[0].shape[2]))}
        for info in self.bundle.manifest.cross_caches:
            shapes[info.key_name] = (1, info.kv_heads, rows, info.key_size)
            shapes[info.value_name] = (1, info.kv_heads, rows, info.value_size)
        outputs = {name: np.zeros(shape, STORED[self._precision]) for name, shape in shapes.items()}
        found = {name: filled(array, -2, most) for name, array in self._run_once("encoder", inputs, outputs).items()}
        hidden = widened(found.pop(contract.ENCODER_HIDDEN), self._precision)
        return CrossState(tuple(found), tuple(found.values()), source.mask, hidden)

    def _run_once(
        self, name: str, inputs: Mapping[str, NDArray[Any]], outputs: dict[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        """One pass of a plan that runs once a source; `outputs` are filled. Its buffers live for this pass."""
        if name not in self._plans:
            self._plans[name] = self._open_plan(name)
        addresses = {key: self._memory.allocate(array.nbytes) for key, array in {**inputs, **outputs}.items()}
        for key, array in inputs.items():
            self._memory.upload(addresses[key], array)
        self._plans[name].run(0, {key: array.shape for key, array in inputs.items()}, addresses)
        for key, array in outputs.items():
            self._memory.download(array, addresses[key])
        for address in addresses.values():
            self._memory.free(address)
        return outputs

    def new_cache(self, batch: int, slots: int, cross: CrossState | None = None) -> KVCache:
        """Raises EngineError for more sequences, or more slots, than the engine was built with."""
        fix = f"Fix: headstart build {self.bundle.path} --device {self.device}"
        if batch > self.info.batch:
            raise EngineError(
                f"The engine for {self.device} decodes {self.info.batch} sequences together, and {batch} are wanted. "
                f"{fix} --batch {batch} --force, or fewer prompts (or beams) a call."
            )
        if slots >= self.info.cache_slots + SLOT_STEP:  # whoever asks rounds up
            raise EngineError(
                f"The engine for {self.device} holds {self.model.max_cache} tokens, and {slots} are wanted. "
                f"{fix} --cache {slots} --force, or a shorter text."
            )
        return self._caches.open(batch, cross)

    def forward(
        self,
        cache: KVCache,
        token_ids: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        row_mask: NDArray[np.bool_],
        output_rows: NDArray[np.int64],
    ) -> StepOutput:
        assert isinstance(cache, DeviceCache)
        (batch, rows), chosen = token_ids.shape, output_rows.shape[1]
        parts = list(passes(self._profiles, rows, chosen, batch))
        outputs: list[HostOutput] = []
        for part in parts:
            packed, address = self._packed_for(batch, part)
            packed.fill(cache.lengths, part, token_ids, position_ids, row_mask, output_rows)
            self._memory.upload(address, packed.data)
            places = {name: address + offset for name, offset in packed.offsets.items()}
            places |= decoder_addresses(cache) | dict(self._outputs.addresses)
            self._plan.run(part.profile, packed.shapes | cache.layout.shapes(batch), places)
            asked = output_rows if len(parts) == 1 else np.arange(part.end - part.begin)[None].repeat(batch, 0)
            asked = np.zeros((batch, 1), np.int64) if part.prompt else asked
            output = DeviceOutput(self._outputs, batch, part.end - part.begin, part.padded, asked, part.chosen)
            if len(parts) == 1:
                return output
            outputs.append(output.fetched())
        return _joined(parts, outputs, output_rows)

    def _packed_for(self, batch: int, part: Pass) -> tuple[Packed, int]:
        """The inputs' buffer on the host and on the device; one of each shape that comes again, one for all prompts."""
        key = (batch, part.padded, part.chosen)
        if part.prompt:
            return Packed(*key), self._prompt_inputs
        if key not in self._packed:
            packed = Packed(*key)
            self._packed[key] = packed, self._memory.allocate(packed.data.nbytes)
        return self._packed[key]

    def head(self, info: HeadInfo) -> "TensorRtHead":
        return TensorRtHead(info, self._open_plan(f"heads/{info.name}"), self._memory, self._precision, self.info.batch)


def _joined(parts: Sequence[Pass], outputs: Sequence[HostOutput], output_rows: NDArray[np.int64]) -> HostOutput:
    """A forward of several passes: long texts whose every row is wanted, or prompts longer than a pass."""
    hidden = np.concatenate([output.hidden for output in outputs], axis=1)
    aux = [output.aux_hidden for output in outputs if output.aux_hidden is not None]
    if parts[0].prompt:
        row = int(output_rows[0, 0])
        logits = next(output.logits for part, output in zip(parts, outputs, strict=True) if part.begin <= row < part.end)
    else:
        whole = np.concatenate([output.logits for output in outputs], axis=1)
        logits = np.take_along_axis(whole, output_rows[:, :, None], axis=1)
    return HostOutput(logits, hidden, np.concatenate(aux, axis=1) if aux else None)


class TensorRtHead:
    """One draft head."""

    def __init__(self, info: HeadInfo, plan: Plan, device: Device, precision: str, batch: int) -> None:
        """`batch`: the most sequences it is asked about at once."""
        self._info, self._plan, self._memory, self._precision = info, plan, device, precision
        count = info.heads * info.top_k
        sizes = {"hidden": 2 * info.hidden_size, "topk_ids": 8 * count, "topk_log_probs": 4 * count}
        self._addresses = {name: device.allocate(batch * size) for name, size in sizes.items()}

    def propose(self, hidden: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """[B, 1, H] to ([B, K, k] ids, log-probabilities)."""
        shape = (len(hidden), self._info.heads, self._info.top_k)
        self._memory.upload(self._addresses["hidden"], narrowed(hidden, self._precision))
        self._plan.run(0, {"hidden": hidden.shape}, self._addresses)
        ids, log_probs = np.empty(shape, np.int64), np.empty(shape, np.float32)
        self._memory.download(ids, self._addresses["topk_ids"])
        self._memory.download(log_probs, self._addresses["topk_log_probs"])
        return ids, log_probs
