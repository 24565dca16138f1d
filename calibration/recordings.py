"""Recordings as sources of a speech model's own outputs, on which its draft heads are trained."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from headstart.exporter.golden import decoder_start
from headstart.runtime.audio import Samples, load_audio
from headstart.runtime.errors import OptionError

from .distill import DistillOptions
from .outputs import Inputs

WINDOW_S = 30  # seconds, where the feature extractor names no window


class AudioInputs(Sequence[Inputs]):
    """Batches of windows of the recordings, and the decoder's prompts; features are computed on access.

    A model that writes times if it is not told otherwise writes them for every second batch.

    Raises OptionError without files, AudioError for one that cannot be read.
    """

    def __init__(self, model: Any, extractor: Any, files: Sequence[Path], options: DistillOptions, seed: int) -> None:
        if not files:
            raise OptionError("No recordings were given. Fix: --data FILE, repeated, or a folder of sound files.")
        shuffled = random.Random(seed).sample(list(files), len(files))
        windows = [window for file in shuffled for window in _windows(extractor, file)][: options.sequences]
        windows.sort(key=len)
        self._batches = [windows[start : start + options.batch] for start in range(0, len(windows), options.batch)]
        self._model, self._extractor = model, extractor

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> Inputs: ...

    @overload
    def __getitem__(self, index: slice) -> list[Inputs]: ...

    def __getitem__(self, index: int | slice) -> Inputs | list[Inputs]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        extractor = self._extractor
        padding = "max_length" if hasattr(extractor, "n_samples") else "longest"  # a fixed window must be filled
        features = extractor(self._batches[index], sampling_rate=extractor.sampling_rate, return_tensors="pt", padding=padding)
        inputs = dict(features)
        return {**inputs, "decoder_input_ids": decoder_prompts(self._model, inputs, times=index % 2 == 1)}


def _windows(extractor: Any, file: Path) -> list[Samples]:
    samples = load_audio(file, extractor.sampling_rate).samples
    size = getattr(extractor, "n_samples", WINDOW_S * extractor.sampling_rate)
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def decoder_prompts(model: Any, inputs: Inputs, times: bool = False) -> Tensor:
    """[B, P] start token; then, of models that have them, the language heard, "transcribe", "no timestamps" if not `times`."""
    settings = model.generation_config
    batch = len(next(iter(inputs.values())))
    columns = [torch.full((batch,), decoder_start(model))]
    if languages := getattr(settings, "lang_to_id", None):
        known = torch.tensor(list(languages.values()))
        with torch.no_grad():
            logits = model(**inputs, decoder_input_ids=torch.stack(columns, dim=1), use_cache=False).logits[:, -1]
        columns.append(known[logits[:, known].argmax(-1)])
    task = (getattr(settings, "task_to_id", None) or {}).get("transcribe")
    for token_id in (task, None if times else getattr(settings, "no_timestamps_token_id", None)):
        if token_id is not None:
            columns.append(torch.full((batch,), token_id))
    return torch.stack(columns, dim=1)
