"""optimum-onnx on ONNX Runtime: float32 and its dynamic int8; plain alone.

It takes prompt lookup and assistants of transformers and fails on them: its cache is a tuple, which nobody can shorten. It
has no step, so prefill is the time of one token. It reads checkpoints with transformers below 4.58 alone.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from .protocol import Answer, Rival, Served, Setup, main, run_converter, version_of
from .recording import is_speech
from .transformers_seq2seq import generate_with

RIVAL = Rival(
    name="optimum_onnx",
    program="optimum-onnx",
    packages=("optimum-onnx==0.1.0", "transformers==4.57.6", "onnxruntime==1.31.1", "onnx==1.23.2", "torch==2.13.0"),
    weights=("int8", "float32"),
    groups=(("plain",),),
)


def convert(checkpoint: Path, weights: str, folder: Path) -> None:
    """Its export with one decoder for the first and all later tokens, and its quantization for this processor."""
    cli = str(Path(sys.executable).with_name("optimum-cli"))
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary) / "plain"
        run_converter([cli, "export", "onnx", "--model", str(checkpoint), *_task(checkpoint), str(plain)])
        if weights == "int8":
            run_converter([cli, "onnxruntime", "quantize", "--onnx_model", str(plain), _processor(), "-o", str(folder)])
        for file in plain.iterdir():  # quantizing leaves configurations behind
            if weights == "float32" or (file.suffix == ".json" and not (folder / file.name).exists()):
                folder.mkdir(exist_ok=True)
                shutil.copyfile(file, folder / file.name)


def _task(checkpoint: Path) -> list[str]:
    if not is_speech(str(checkpoint)):
        return ["--task", "text2text-generation-with-past"]
    frames = json.loads((checkpoint / "preprocessor_config.json").read_text("utf-8"))["nb_max_frames"]
    return ["--task", "automatic-speech-recognition-with-past", "--nb_max_frames", str(frames)]


def _processor() -> str:
    """Its quantization has one setting for each kind of processor."""
    known = Path("/proc/cpuinfo").read_text("utf-8")
    return next((f"--{kind}" for kind in ("avx512_vnni", "avx512", "avx2") if kind in known), "--arm64")


def load(setup: Setup) -> Served:
    """Encoder and merged decoder, each a session with so many threads."""
    from onnxruntime import SessionOptions
    from optimum.onnxruntime import ORTModelForSeq2SeqLM, ORTModelForSpeechSeq2Seq

    session = SessionOptions()
    session.intra_op_num_threads = setup.threads
    suffix = "_quantized" if setup.weights == "int8" else ""
    files = {"encoder_file_name": f"encoder_model{suffix}.onnx", "decoder_file_name": f"decoder_model_merged{suffix}.onnx"}
    kind = ORTModelForSpeechSeq2Seq if is_speech(setup.model) else ORTModelForSeq2SeqLM
    model = kind.from_pretrained(setup.model, session_options=session, use_merged=True, **files)

    def generate(request: dict[str, Any]) -> Answer:
        return generate_with(model, setup.model, request, {})

    return Served(version_of("optimum-onnx", "onnxruntime", "transformers"), setup.modes, generate)


if __name__ == "__main__":
    main(convert, load)
