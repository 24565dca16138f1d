"""The command line as a user meets it: what works, and what each mistake answers."""

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from speech import RATE, recording

from headstart.cli import main
from headstart.runtime.bundle import Bundle
from headstart.runtime.loading import load

BundleOf = Callable[[str], Bundle]
CheckpointOf = Callable[[str], Path]
COMMAND = [sys.executable, "-m", "headstart"]
COMMANDS = (
    "export",
    "quantize",
    "build",
    "plan",
    "tune",
    "compare",
    "bench",
    "inspect",
    "generate",
    "transcribe",
    "verify",
    "demo",
    "heads",
)


def headstart(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=300, check=False)


def refused(*arguments: object) -> str:
    """The message of a command that must fail as a user's mistake: exit code 2, one message, no traceback."""
    done = here(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in this process, whose modules are loaded already: of a mistake's seconds, most would go to imports."""
    command, output, errors = ["headstart", *map(str, arguments)], io.StringIO(), io.StringIO()
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", command)
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as ended:
            main()
    for number, handler in signals.items():
        signal.signal(number, handler)
    return subprocess.CompletedProcess(command, int(ended.value.code or 0), output.getvalue(), errors.getvalue())


def test_generate_streams_the_same_text(bundle_of: BundleOf) -> None:
    path = bundle_of("llama").path
    whole = headstart("generate", path, "abc", "-n", 20)
    streamed = headstart("generate", path, "-", "-n", 20, "--stream", "--stats", stdin="abc")
    assert whole.returncode == streamed.returncode == 0, whole.stderr + streamed.stderr
    assert whole.stdout == streamed.stdout
    assert "acceptance length" in streamed.stderr


def test_generate_with_beams(bundle_of: BundleOf) -> None:
    path = bundle_of("llama").path
    best = load(path, threads=1).beam_search("abc", 3, max_new_tokens=12)[0]
    assert headstart("generate", path, "abc", "-n", 12, "--beams", 3).stdout.strip() == best.text.strip()
    assert "--stream does not go with --beams" in refused("generate", path, "abc", "--beams", 3, "--stream")
    assert "--temperature does not go with --beams" in refused("generate", path, "abc", "--beams", 3, "--temperature", 1)
    assert "num_beams must be at least 1" in refused("generate", path, "abc", "--beams", -2)


def test_generate_from_a_recording(speech_bundle: Bundle, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", recording(2), 8000)
    done = headstart("generate", speech_bundle.path, "--audio", tmp_path / "a.wav", "--timestamps", "--stats")
    assert done.returncode == 0, done.stderr
    assert "→" in done.stdout.splitlines()[0]
    assert "note: 8000 Hz to 16000 Hz" in done.stderr and "of real time" in done.stderr
    captions = headstart("generate", speech_bundle.path, "--audio", tmp_path / "a.wav", "--stream").stdout
    assert captions.startswith("[  1.00 s]") and len(captions.splitlines()) == 5  # each second of four, and the end


def test_transcribe_writes_text_subtitles_and_json(speech_bundle: Bundle, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", recording(2), RATE)
    arguments = ("transcribe", speech_bundle.path, tmp_path / "a.wav", "--no-fallback", "--drafter", "none")
    written = {form: here(*arguments, "--format", form).stdout for form in ("text", "srt", "vtt", "json")}
    heard = json.loads(written["json"])
    assert heard["language"] == "en" and heard["duration"] == 2.0 and heard["text"] == written["text"].strip()
    assert written["srt"].count(" --> ") == written["vtt"].count(" --> ") == len(heard["segments"]) > 0
    assert written["srt"].startswith("1\n00:00:0") and written["vtt"].startswith("WEBVTT\n\n00:00:0")
    silent = tmp_path / "silent.wav"
    soundfile.write(silent, np.zeros(2 * RATE), RATE)
    assert here("transcribe", speech_bundle.path, silent, "--voice-activity").stdout == "\n"


def test_what_is_no_recording(speech_bundle: Bundle, bundle_of: BundleOf, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("not a sound")
    assert "cannot be read as sound" in refused("generate", speech_bundle.path, "--audio", tmp_path / "a.wav")
    assert "is not a file" in refused("generate", speech_bundle.path, "--audio", tmp_path / "b.wav")
    assert "cannot be read as sound" in refused("transcribe", speech_bundle.path, tmp_path / "a.wav")
    assert "reads text, not speech" in refused("transcribe", bundle_of("llama").path, tmp_path / "a.wav")
    assert "--words has a place in JSON only" in refused("transcribe", speech_bundle.path, tmp_path / "a.wav", "--words")
    words = ("transcribe", speech_bundle.path, tmp_path / "a.wav", "--words", "--format", "json")
    assert "names no alignment_heads" in refused(*words)
    assert "reads text, not speech" in refused("generate", bundle_of("llama").path, "--audio", tmp_path / "a.wav")


def test_inspect_and_heads_list(bundle_of: BundleOf) -> None:
    done = headstart("inspect", bundle_of("llama").path)
    assert done.returncode == 0 and "LlamaForCausalLM" in done.stdout and "all hashes match" in done.stdout
    assert "no draft heads" in headstart("heads", "list", bundle_of("llama").path).stdout


def test_verify_passes_and_reports(bundle_of: BundleOf, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    arguments = ("-n", 16, "--samples", 50, "--checkpoint", checkpoint_of("llama"), "--json", tmp_path / "r.json")
    done = headstart("verify", bundle_of("llama").path, *arguments, "--draft-model", bundle_of("qwen2").path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    references = {check["reference"] for check in report["logits"]}
    recorded = {"golden outputs", "canonical graph", str(checkpoint_of("llama"))}
    assert references == recorded | {"engine, all in one tree"} and report["device"] == "cpu"
    assert all(check["largest"] <= check["largest_limit"] for check in report["logits"])
    assert [check["drafter"] for check in report["greedy"]] == ["none", "none", "ngram", "draft_model"]
    assert {check["drafter"] for check in report["sampling"]} == {"none", "ngram", "draft_model"}
    drafted = [check for check in report["sampling"] if check["drafter"] == "draft_model"]
    assert all(check["accepted"] < check["drafted"] for check in drafted), "drafts are the draft model's, not the target's"
    assert "no fault" in done.stdout and "TV found at power 0.99" in done.stdout


def test_verify_fails_on_another_checkpoint(bundle_of: BundleOf, checkpoint_of: CheckpointOf) -> None:
    done = headstart("verify", bundle_of("llama").path, "-n", 8, "--samples", 0, "--checkpoint", checkpoint_of("qwen2"))
    assert done.returncode == 1 and "FAULT" in done.stdout


def test_checkpoint_mistakes(tmp_path: Path, checkpoint_of: CheckpointOf) -> None:
    out = tmp_path / "out"
    assert "not a folder" in refused("export", tmp_path / "nothing", "-o", out)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused("export", tmp_path / "empty", "-o", out)
    broken = shutil.copytree(checkpoint_of("llama"), tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "cannot be read" in refused("export", broken, "-o", out)
    weights.unlink()
    assert "no weights" in refused("export", broken, "-o", out)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    assert "Nearest: llama" in refused("export", broken, "-o", out)
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_architecture_that_does_other_things(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    BertForMaskedLM(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)).save_pretrained(
        tmp_path / "b"
    )
    assert "fill-mask" in refused("export", tmp_path / "b", "-o", tmp_path / "out")


def test_architecture_outside_the_attention_interface(tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=300)).save_pretrained(tmp_path / "b")
    message = refused("export", tmp_path / "b", "-o", tmp_path / "out")
    assert "BloomForCausalLM is not supported" in message and "Nearest supported" in message
    assert not (tmp_path / "out").exists()


def test_output_and_option_mistakes(tmp_path: Path, bundle_of: BundleOf, checkpoint_of: CheckpointOf) -> None:
    bundle = bundle_of("llama").path
    assert "--force" in refused("export", checkpoint_of("llama"), "-o", bundle)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused("export", checkpoint_of("llama"), "-o", tmp_path / "file" / "out")
    assert "limit of 256" in refused("export", checkpoint_of("llama"), "-o", tmp_path / "out", "--max-cache", 9999)
    assert "hidden states 0 to 2" in refused("export", checkpoint_of("llama"), "-o", tmp_path / "out", "--aux-layers", "7")
    assert "temperature" in refused("generate", bundle, "abc", "--temperature", -1)
    assert "auto, none, ngram" in refused("generate", bundle, "abc", "--drafter", "medusa")
    assert "empty" in refused("generate", bundle, "")
    assert "at most 255" in refused("generate", bundle, "x" * 300)
    assert "is not a bundle" in refused("inspect", tmp_path)
    assert "vocabulary" in refused("generate", bundle, "abc", "--draft-model", _other_vocabulary(tmp_path))


def test_a_gguf_is_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    message = refused("export", tmp_path / "model.gguf", "-o", tmp_path / "out")
    assert "is a GGUF file" in message and "gguf_file='model.gguf'" in message and not (tmp_path / "out").exists()


def _other_vocabulary(folder: Path) -> Path:
    from architectures import ARCHITECTURES, save_checkpoint
    from transformers import LlamaConfig, LlamaForCausalLM

    from headstart.exporter.export import export

    settings = {**ARCHITECTURES["llama"][1], "vocab_size": 310}
    save_checkpoint(LlamaForCausalLM(LlamaConfig(**settings)).eval(), folder / "other_checkpoint")
    export(folder / "other_checkpoint", folder / "other")
    return folder / "other"


def test_edited_bundle_is_refused_by_file_name(tmp_path: Path, bundle_of: BundleOf) -> None:
    copy = shutil.copytree(bundle_of("llama").path, tmp_path / "copy")
    data = copy / "graphs/decoder.onnx.data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    message = refused("generate", copy, "abc")
    assert "decoder.onnx.data was changed" in message and "sha256" in message


def test_interrupted_export_leaves_nothing(tmp_path: Path, checkpoint_of: CheckpointOf) -> None:
    # A parent that runs in the background ignores SIGINT, and children inherit that: the user's terminal does not.
    command = [*COMMAND, "export", str(checkpoint_of("gemma2")), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not list(tmp_path.iterdir()):  # the temporary folder is the sign that work began
        assert process.poll() is None
        time.sleep(0.02)
    while process.poll() is None:  # an interrupt that comes in a callback of torch's is lost there: users press again
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
    # Pressed again while Python ends, it ends by the signal itself, which a shell reports as 130, too.
    assert process.returncode in (130, -signal.SIGINT)
    assert list(tmp_path.iterdir()) == []


def test_prompt_files(tmp_path: Path, bundle_of: BundleOf) -> None:
    bundle = bundle_of("llama").path
    (tmp_path / "p.jsonl").write_text('{"prompt": "abc"}\n{"no": 1}\n')
    assert "line 2" in refused("verify", bundle, "--prompts", tmp_path / "p.jsonl")
    (tmp_path / "e.txt").write_text("\n \n")
    assert "no prompt" in refused("verify", bundle, "--prompts", tmp_path / "e.txt")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = here(command, "--help")
    assert done.returncode == 0 and "Usage" in done.stdout


def test_folders_stand_for_their_text_or_sound_files(tmp_path: Path) -> None:
    from headstart.calibration.files import training_files

    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.py").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "weights.bin").write_bytes(b"\x01\0\x02")
    assert training_files([tmp_path], sound=False) == [tmp_path / "a.txt", tmp_path / "sub/b.py"]
    assert training_files([tmp_path / "weights.bin"], sound=False) == [tmp_path / "weights.bin"], "what is named is taken"
    (tmp_path / "sub/said.WAV").write_bytes(b"RIFF\0")
    assert training_files([tmp_path], sound=True) == [tmp_path / "sub/said.WAV"], "transcripts beside recordings are none"
    assert tmp_path / "sub/said.WAV" not in training_files([tmp_path], sound=False), "recordings beside text are none"


def test_the_way_to_a_tuned_engine(bundle_of: BundleOf, tmp_path: Path) -> None:
    """quantize, build, tune, bench, generate: each by its command, each leaving what the next one reads."""
    small, prompts = tmp_path / "small", tmp_path / "prompts.txt"
    prompts.write_text("abc abc abc\nhello hello\n")
    done = headstart("quantize", bundle_of("llama").path, "-o", small, "--weights", "int4")
    assert done.returncode == 0 and "weights int4, method rtn" in done.stdout, done.stderr
    done = headstart("build", small)
    assert done.returncode == 0 and "fused attention layers" in done.stdout, done.stderr
    done = headstart("tune", small, "--data", prompts, "-n", 16)
    assert done.returncode == 0 and "chosen: " in done.stdout, done.stderr
    done = headstart("bench", small, "--prompts", prompts, "-n", 8, "--rounds", 1, "--json", tmp_path / "bench.json")
    assert done.returncode == 0 and "verify after" in done.stdout and "on cpu" in done.stdout, done.stderr
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert {"machine", "commit", "verify_ms", "rows"} <= set(figures)
    row = {
        "drafter",
        "prompt_class",
        "prefill_tokens_per_s",
        "ttft_ms",
        "decode_tokens_per_s",
        "acceptance_length",
        "round_cost",
    }
    assert row <= set(figures["rows"][0])
    done = headstart("generate", small, "abc", "-n", 8, "--stats")
    assert done.returncode == 0 and "acceptance length" in done.stderr


def test_mistakes_on_that_way(bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle = bundle_of("llama").path
    message = refused("build", bundle, "--device", "tpu")
    assert "device 'tpu' is unknown. Choose one of: cpu, cuda " in message and "trt-rtx:sm89" in message
    assert "cannot be read" in refused("tune", bundle, "--data", tmp_path / "none.txt")
    (tmp_path / "prompts.txt").write_text("abc\n")
    assert "drafter 'eagle' is unknown" in refused("bench", bundle, "--prompts", tmp_path / "prompts.txt", "--drafter", "eagle")
    (tmp_path / "tiny.txt").write_text("a b c")
    out = tmp_path / "out"
    assert "at least 512 are needed" in refused(
        "quantize", bundle, "-o", out, "--method", "gptq", "--data", tmp_path / "tiny.txt"
    )
    assert not out.exists()


def test_heads_shortlist(pycode: Bundle, tmp_path: Path) -> None:
    path = Path(shutil.copytree(pycode.path, tmp_path / "bundle"))
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 50)
    done = here("heads", "shortlist", path, "--data", tmp_path / "text.txt", "--tokens", 64)
    assert done.returncode == 0, done.stderr
    assert "64 of 4096 tokens, 100.0% of the text's" in done.stdout and f"headstart build {path}" in done.stdout
    assert "shortlist" in here("heads", "list", path).stdout
    before = (path / "manifest.json").read_bytes()
    assert "--force" in refused("heads", "shortlist", path, "--data", tmp_path / "text.txt", "--tokens", 64)
    assert "saves nothing" in refused("heads", "shortlist", path, "--tokens", 4000, "--force")
    assert "names another drafter" in refused("heads", "shortlist", path, "--tokens", 64, "--name", "ngram")
    lost = refused("heads", "shortlist", path, "--data", tmp_path / "none", "--tokens", 64, "--force")
    assert "cannot be read as UTF-8 text" in lost
    (tmp_path / "empty.txt").write_text("")
    assert "holds no text" in refused("heads", "shortlist", path, "--data", tmp_path / "empty.txt", "--tokens", 64, "--force")
    assert (path / "manifest.json").read_bytes() == before
    Bundle.load(path)


def test_plan_says_what_fits(bundle_of: BundleOf) -> None:
    bundle = bundle_of("llama").path
    done = headstart("plan", bundle, "--on", "jetson-orin-nano-8gb", "--on", "rtx-4090")
    assert done.returncode == 0, done.stderr
    assert "jetson-orin-nano-8gb" in done.stdout and "tensorrt" in done.stdout and "trt-rtx:sm89" in done.stdout
    assert "the board 'jetson-9' is unknown. Known: jetson" in refused("plan", bundle, "--on", "jetson-9")
    assert "is not built for trt-rtx:sm89" in refused("generate", bundle, "abc", "--device", "trt-rtx:sm89")


def test_an_engine_for_cuda_is_built_anywhere_and_run_on_a_gpu(bundle_of: BundleOf, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(bundle_of("llama").path, path)
    assert "engines" in headstart("inspect", path).stdout
    built = headstart("build", path, "--device", "cuda")
    assert built.returncode == 0, built.stderr
    assert "kernels checked" in built.stdout and "of the outputs' range" in built.stdout
    assert "cuda (float16)" in headstart("inspect", path).stdout
    message = refused("generate", path, "abc", "--device", "cuda")
    assert "has no CUDAExecutionProvider" in message or "could not start its CUDAExecutionProvider" in message
    assert "not built for cuda" in refused("generate", bundle_of("llama").path, "abc", "--device", "cuda:tensorrt")
