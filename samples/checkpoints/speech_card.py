"""Measure the speech sample on recordings it never heard, and write its README.

    python samples/checkpoints/speech_card.py .demo/speech

The bundle is made when it is not there. Both sets of recordings are synthesised again (see recordings.py); nothing is chosen.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from recordings import OUTPUT, SETS, Recording, recordings

import headstart
from headstart.calibration.answers import word_error_rate
from headstart.runtime.model import Model

HERE = Path(__file__).parent / "speech"
COUNT = 150  # recordings of each set
CHUNK_S = 0.5  # of live captions
LIVE = 12  # recordings captioned live


def measure_set(model: Model, items: list[Recording]) -> dict:
    """Word error rate and real-time factor of plain decoding; verify calls and equality of each drafter."""
    facts: dict = {"recordings": len(items), "words": sum(len(item.text.split()) for item in items)}
    sound_s = sum(len(item.samples) for item in items) / 16_000
    plain: list = []
    for drafter in ("none", *model.drafters):
        model.transcribe(items[0].samples, drafter=drafter)  # sessions are opened
        started = time.perf_counter()
        found = [model.transcribe(item.samples, drafter=drafter).windows for item in items]
        seconds = time.perf_counter() - started
        plain = plain or found
        windows = [window for windows in found for window in windows]
        calls = sum(window.stats.verify_calls for window in windows)
        facts[drafter] = {
            "acceptance_length": round((sum(len(window.token_ids) for window in windows) - len(windows)) / calls, 2),
            "decode_s": round(sum(window.stats.decode_s for window in windows), 2),
            "real_time_factor": round(seconds / sound_s, 4),
            "equal_to_plain": sum(
                [w.token_ids for w in a] == [w.token_ids for w in b] for a, b in zip(found, plain, strict=True)
            ),
        }
    heard, said = [model.transcribe(item.samples).text for item in items], [item.text for item in items]
    facts["word_error_rate"] = round(word_error_rate(heard, said), 4)
    clean = [(text, item.text) for item, text in zip(items, heard, strict=True) if item.noise_db is None]
    facts["word_error_rate_without_noise"] = round(word_error_rate(*zip(*clean, strict=True)), 4)
    no_times = [model.transcribe(item.samples, timestamps=False).text for item in items]
    facts["word_error_rate_without_timestamps"] = round(word_error_rate(no_times, said), 4)
    return facts


def measure_live(model: Model, items: list[Recording]) -> dict:
    """Seconds from a chunk to its caption, and how much the previous hypothesis saves."""
    facts = {}
    for name, options in {"none": {"drafter": "none"}, "previous_hypothesis": {}}.items():
        delays, calls = [], 0
        for item in items:
            step = int(CHUNK_S * 16_000)
            chunks = (item.samples[begin : begin + step] for begin in range(0, len(item.samples), step))
            asked = time.perf_counter()
            for caption in model.stream_audio(chunks, **options):
                if caption.window is not None:
                    delays.append(time.perf_counter() - asked)
                    calls += caption.window.stats.verify_calls
                asked = time.perf_counter()
        facts[name] = {
            "median_delay_ms": round(1000 * float(np.median(delays)), 1),
            "verify_calls": calls,
            "captions": len(delays),
        }
    return facts


def card(training: dict, report: dict | None, measured: dict) -> str:
    rows = [
        f"| {name} | {facts['recordings']} | {facts['words']} | **{facts['word_error_rate']:.1%}** | "
        f"{facts['word_error_rate_without_noise']:.1%} | {facts['word_error_rate_without_timestamps']:.1%} |"
        for name, facts in measured["sets"].items()
    ]
    drafters = [name for name, value in next(iter(measured["sets"].values())).items() if isinstance(value, dict)]
    lengths = [
        f"| {set_name} | {name} | {facts[name]['acceptance_length']} | {facts[name]['equal_to_plain']} of {COUNT} |"
        for set_name, facts in measured["sets"].items()
        for name in drafters
    ]
    plain, drafted = measured["live"]["none"], measured["live"]["previous_hypothesis"]
    return f"""# speech

A Whisper of 4.0 M parameters (4 encoder and 3 decoder layers, width 192, 80 mel bands, windows of {training["window_s"]} s,
768 text tokens, then Whisper's special tokens and timestamps) that writes down spoken commands: numbers, times, dates,
timers, lights, shopping lists. Trained from scratch by [train_speech.py](../train_speech.py) on speech synthesised with
espeak-ng: {training["training_utterances"]:,} sentences of the grammar in [commands.py](../commands.py),
{training["training_speech_h"]} hours, five accents and ten voices at 130 to 210 words a minute, coloured noise 12 to 35 dB
below the speech (8 to 35 dB in the first 2,400 windows). It saw {training["windows_seen"]:,} windows of one to three
sentences in {training["training_s"] / 60:.0f} minutes of wall clock, on one thread of a machine that others used too.
It knows this grammar and these synthetic voices and nothing else: real speech was not tried.

## Word error rate

Of sentences that it never read (every twentieth by hash), in voices it knows, and in a voice it never heard (variant `f4`).
Every second recording has noise 15 to 30 dB below the speech.

| set | recordings | words | word error rate | of those without noise | decoded without timestamps |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

## Drafting

Greedy, with timestamps, float32 graphs. {heads_line(report)}

| set | drafter | acceptance length | equal to plain decoding |
| --- | --- | --- | --- |
{chr(10).join(lengths)}

Live captions, {CHUNK_S} s at a time, over {LIVE} recordings ({plain["captions"]} captions): {plain["verify_calls"]} verify
calls plain, {drafted["verify_calls"]} with each caption as the draft of the next.

The recordings in [recordings](recordings) are the first of each set, and one longer than a window; their texts are in
`texts.jsonl`. All figures: `evaluation.json`; the times in it were taken on a machine that was busy with other work and compare
nothing ([seq2seq_rivals.py](../../bench/seq2seq_rivals.py) does). espeak-ng is used as a program that speaks; nothing of it
is shipped.
"""


def heads_line(report: dict | None) -> str:
    if report is None:
        return "No heads were trained."
    ranks = ", ".join(f"{head[0]:.0%}" for head in report["held_out_accuracy"])
    return (
        f"{len(report['held_out_accuracy'])} Medusa heads that share the LM head, by [speech_heads.py](../speech_heads.py); "
        f"on outputs left out of their training the right token is their best guess in {ranks} of the places."
    )


def main() -> None:
    bundle, heads = Path(sys.argv[1]), HERE / "medusa"
    if not bundle.exists():
        headstart.export(HERE, bundle, heads=[heads] if heads.is_dir() else [])
    model = headstart.load(bundle, tuned=False)
    items = {name: list(recordings(name, COUNT)) for name in SETS}
    measured = {
        "sets": {name: measure_set(model, found) for name, found in items.items()},
        "live": measure_live(model, items["held-out sentences"][:LIVE]),
        "threads": model.engine.threads,
    }
    (HERE / "evaluation.json").write_text(json.dumps(measured, indent=2) + "\n", "utf-8")
    training = json.loads((HERE / "training.json").read_text("utf-8"))
    report = json.loads((heads / "report.json").read_text("utf-8")) if heads.is_dir() else None
    (HERE / "README.md").write_text(card(training, report, measured), "utf-8")
    assert (OUTPUT / "texts.jsonl").is_file(), "recordings.py comes first"


if __name__ == "__main__":
    main()
