"""CTranslate2: int8 and float32; T5 as a translator, Whisper on features. It has no speculation.

It has no step that returns ids, so prefill is the time of one token. Beam search is its default; one beam is asked for.
"""

import json
import sys
from pathlib import Path
from typing import Any

from .protocol import Answer, Rival, Served, Setup, main, run_converter, split_by_length, version_of, with_end
from .recording import is_speech, log_mel

RIVAL = Rival(
    name="ctranslate2",
    program="CTranslate2",
    packages=("ctranslate2==4.8.5", "faster-whisper==1.2.1", "transformers==5.23.0", "torch==2.13.0"),
    weights=("int8", "float32"),
    groups=(("plain",),),
)
COPIED = ("tokenizer.json", "generation_config.json", "preprocessor_config.json")


def convert(checkpoint: Path, weights: str, folder: Path) -> None:
    """Its converter for transformers."""
    command = [str(Path(sys.executable).with_name("ct2-transformers-converter")), "--model", str(checkpoint)]
    copied = [name for name in COPIED if (checkpoint / name).is_file()]
    run_converter([*command, "--output_dir", str(folder), "--quantization", weights, "--copy_files", *copied])
    _name_an_unknown_token(folder / "config.json")


def _name_an_unknown_token(file: Path) -> None:
    """It writes null for a tokenizer without one, which it then cannot read. Byte-level vocabularies never need it."""
    config = json.loads(file.read_text("utf-8"))
    if config.get("unk_token", "") is None:
        file.write_text(json.dumps(config | {"unk_token": config["decoder_start_token"]}), "utf-8")


def load(setup: Setup) -> Served:
    """One model with one worker of so many threads."""
    import ctranslate2

    kind = ctranslate2.models.Whisper if is_speech(setup.model) else ctranslate2.Translator
    options = {"compute_type": setup.weights, "inter_threads": 1, "intra_threads": setup.threads}
    model = kind(setup.model, device="cpu", **options)
    generate = (_hear if is_speech(setup.model) else _translate)(setup, model)
    notes = ["its MB include transformers, which makes its features"] if is_speech(setup.model) else []
    return Served(version_of("ctranslate2"), setup.modes, generate, notes)


def _translate(setup: Setup, model: Any) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(setup.model, "tokenizer.json")))

    def generate(request: dict[str, Any]) -> Answer:
        source = [tokenizer.id_to_token(number) for number in request["prompt_ids"]]

        def run(new_tokens: int) -> list[int]:
            limits = {"beam_size": 1, "max_decoding_length": new_tokens, "return_end_token": True}
            (result,) = model.translate_batch([source], **limits)
            return [tokenizer.token_to_id(token) for token in result.hypotheses[0]]

        return _answer(*split_by_length(run, request["new_tokens"]))

    return generate


def _hear(setup: Setup, model: Any) -> Any:
    import ctranslate2

    end = json.loads(Path(setup.model, "generation_config.json").read_text("utf-8"))["eos_token_id"]

    def generate(request: dict[str, Any]) -> Answer:
        features = ctranslate2.StorageView.from_array(log_mel(setup.model, request["audio"]))
        start = request["prompt_ids"]

        def run(new_tokens: int) -> list[int]:
            (result,) = model.generate(features, [start], beam_size=1, max_length=length_of(new_tokens, len(start)))
            return with_end(result.sequences_ids[0], end, new_tokens)

        return _answer(*split_by_length(run, request["new_tokens"]))

    return generate


def length_of(new_tokens: int, start: int) -> int:
    """Its `max_length` for so many tokens: it takes the half, and no more than what the start tokens but the last leave."""
    return max(2 * new_tokens, new_tokens + start - 1)


def _answer(token_ids: list[int], prefill_s: float, decode_s: float) -> Answer:
    return Answer(token_ids, prefill_s, decode_s, len(token_ids) - 1)


if __name__ == "__main__":
    main(convert, load)
