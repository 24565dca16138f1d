"""Reads a CTranslate2 `model.bin`, binary version 6, and the Whisper in it.

The file, little-endian: u32 version; string specification; u32 revision; u32 number of variables; then for each variable its
string name, u8 rank, u32 sizes, u8 element type, u32 bytes, data; then u32 number of aliases, and two strings for each, the
alias and the variable it stands for. A string is a u16 length and that many bytes, the last of them zero. (CTranslate2,
`src/models/model.cc`.)
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.errors import CheckpointError

VERSION = 6
ELEMENTS = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
Variables = dict[str, NDArray[Any]]


def read_variables(file: Path) -> tuple[str, Variables]:
    """(the specification's name, variables and aliases by name).

    Raises CheckpointError for a file that is truncated, of another version, or has an unknown element type.
    """
    with file.open("rb") as stream:
        try:
            return _read(stream)
        except (struct.error, EOFError, UnicodeDecodeError) as error:
            raise _broken(file, "it ends too early, or is no such file") from error
        except ValueError as error:
            raise _broken(file, str(error)) from error


def _broken(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file} is not a CTranslate2 model of version {VERSION}: {reason}. Fix: fetch it again.")


def _read(stream: BinaryIO) -> tuple[str, Variables]:
    (version,) = _numbers(stream, "I")
    if version != VERSION:
        raise ValueError(f"it says version {version}")
    specification = _string(stream)
    _, count = _numbers(stream, "II")
    variables = dict(_variable(stream) for _ in range(count))
    (aliases,) = _numbers(stream, "I")
    for _ in range(aliases):
        alias, name = _string(stream), _string(stream)
        variables[alias] = variables[name]
    return specification, variables


def _variable(stream: BinaryIO) -> tuple[str, NDArray[Any]]:
    name = _string(stream)
    (rank,) = _numbers(stream, "B")
    shape = _numbers(stream, "I" * rank)
    element, size = _numbers(stream, "BI")
    if element not in ELEMENTS:
        raise ValueError(f"{name} has the unknown element type {element}")
    array: NDArray[Any] = np.frombuffer(_bytes(stream, size), ELEMENTS[element])
    return name, array.reshape(shape)


def _string(stream: BinaryIO) -> str:
    (length,) = _numbers(stream, "H")
    return _bytes(stream, length)[:-1].decode("utf-8")


def _numbers(stream: BinaryIO, kinds: str) -> tuple[int, ...]:
    return struct.unpack(f"<{kinds}", _bytes(stream, struct.calcsize(f"<{kinds}")))


def _bytes(stream: BinaryIO, count: int) -> bytes:
    content = stream.read(count)
    if len(content) != count:
        raise EOFError
    return content


def whisper_state(variables: Variables) -> Variables:
    """The weights under their names in transformers' WhisperForConditionalGeneration, in float32.

    Projections that CTranslate2 fuses are taken apart. Raises CheckpointError where the keys have a bias, which Whisper's have
    not.
    """
    state: Variables = {}
    for name, array in _named(variables):
        if name.endswith("k_proj.bias"):
            if np.any(array):
                raise CheckpointError(f"{name} is not zero, and Whisper's keys have no bias. Fix: fetch the checkpoint again.")
            continue
        state[f"model.{name}"] = array.astype(np.float32)
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state


# CTranslate2's module -> transformers'
LAYER = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_2": "encoder_attn.out_proj",
    "self_attention/linear_1": "self_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
FUSED = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
}
STACK = {
    "conv1": "conv1",
    "conv2": "conv2",
    "layer_norm": "layer_norm",
    "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
}
PARAMETERS = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias", "encodings": "weight"}


def _named(variables: Variables) -> Iterator[tuple[str, NDArray[Any]]]:
    """(name after "model.", weight) of every weight; settings, which are no weights, are left out."""
    for path, array in variables.items():
        stack, _, rest = path.partition("/")
        module, _, parameter = rest.rpartition("/")
        if parameter not in PARAMETERS or path == "decoder/projection/weight":
            continue
        if not module.startswith("layer_") or module == "layer_norm":
            yield f"{stack}.{STACK[module]}.{PARAMETERS[parameter]}", array
            continue
        layer, _, module = module.partition("/")
        names = FUSED.get(module) or (LAYER[module],)
        for name, part in zip(names, np.split(array, len(names)), strict=True):
            yield f"{stack}.layers.{layer.removeprefix('layer_')}.{name}.{PARAMETERS[parameter]}", part
