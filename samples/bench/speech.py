"""Time per recording, side by side: the speech sample's bundles with every drafter, and faster-whisper in int8.

    pip install faster-whisper
    python samples/bench/speech.py .demo/speech .demo/speech-int8 --faster-whisper samples/checkpoints/speech

Contenders take turns on each recording, so that whatever else the machine does meets all of them; medians over the rounds are
added up. All decode greedily, with timestamps, on the same number of threads. faster-whisper supposes windows of 30 s; the
one constant that says so is set to the checkpoint's.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import headstart
from headstart.runtime.audio import Samples, load_audio

RECORDINGS = Path(__file__).parent.parent / "checkpoints" / "speech" / "recordings"
Contender = Callable[[Samples], tuple[str, int | None]]  # samples -> (text, decoder forwards after the prompt's own)


def bundle_contenders(bundle: Path, threads: int) -> dict[str, Contender]:
    model = headstart.load(bundle, threads=threads)

    def contender(drafter: str, samples: Samples) -> tuple[str, int | None]:
        transcript = model.transcribe(samples, drafter=drafter)
        return transcript.text, sum(window.stats.verify_calls for window in transcript.windows)

    return {f"{bundle.name}, {name}": functools.partial(contender, name) for name in ("none", *model.drafters)}


def faster_whisper(checkpoint: Path, threads: int, folder: Path) -> Contender:
    import ctranslate2
    import faster_whisper.transcribe as implementation

    copied = ["tokenizer.json", "preprocessor_config.json"]
    ctranslate2.converters.TransformersConverter(str(checkpoint), copy_files=copied).convert(str(folder), quantization="int8")
    frames = 2 * json.loads((checkpoint / "config.json").read_text("utf-8"))["max_source_positions"]
    implementation.pad_or_trim = functools.partial(implementation.pad_or_trim, length=frames)
    model = implementation.WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=threads)

    def contender(samples: Samples) -> tuple[str, int | None]:
        segments, _ = model.transcribe(
            samples, language="en", beam_size=1, temperature=0.0, condition_on_previous_text=False, max_initial_timestamp=3.0
        )
        return " ".join(segment.text.strip() for segment in segments), None

    return contender


def measure(contenders: dict[str, Contender], recordings: list[Samples], rounds: int) -> dict[str, dict]:
    """Median seconds, text and forwards of each recording, by contender."""
    found: dict[str, dict] = {}
    for name, contender in contenders.items():
        answers = [contender(samples) for samples in recordings]  # also opens what is opened at the first call
        found[name] = {
            "texts": [text for text, _ in answers],
            "forwards": [forwards for _, forwards in answers],
            "median_s": [],
        }
    for samples in recordings:
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, contender in contenders.items():
                started = time.perf_counter()
                contender(samples)
                times[name].append(time.perf_counter() - started)
        for name, values in times.items():
            found[name]["median_s"].append(statistics.median(values))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--faster-whisper", type=Path, help="a checkpoint for it to convert")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    contenders: dict[str, Contender] = {}
    for bundle in args.bundles:
        contenders |= bundle_contenders(bundle, args.threads)
    lines = (RECORDINGS / "texts.jsonl").read_text("utf-8").splitlines()
    recordings = [load_audio(RECORDINGS / json.loads(line)["audio"]).samples for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        if args.faster_whisper:
            contenders["faster-whisper int8"] = faster_whisper(args.faster_whisper, args.threads, Path(folder) / "converted")
        found = measure(contenders, recordings, args.rounds)
    sound_s = sum(map(len, recordings)) / 16_000
    said = [json.loads(line)["text"] for line in lines]
    print(f"{'':32} ms / recording   of real time   forwards   texts as said")
    for name, facts in found.items():
        spent, right = sum(facts["median_s"]), sum(a == b for a, b in zip(facts["texts"], said, strict=True))
        forwards = "" if facts["forwards"][0] is None else sum(facts["forwards"])
        print(f"{name:32} {1000 * spent / len(said):14.1f} {spent / sound_s:14.4f} {forwards:10} {right:9} of {len(said)}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
