"""Transcribe recordings with the speech sample: single commands, a long recording with times, and live captions.

    python samples/03_transcribe_speech/run.py [BUNDLE]

Exports the sample first when BUNDLE (default: .demo/speech) is not there. The runtime itself needs no torch, only
`pip install 'headstart[cpu,audio]'`.
"""

import json
import sys
from pathlib import Path

import headstart
from headstart.runtime.audio import load_audio

SAMPLE = Path(__file__).parent.parent / "checkpoints" / "speech"
RECORDINGS = SAMPLE / "recordings"


def main() -> None:
    bundle = Path(sys.argv[1] if len(sys.argv) > 1 else ".demo/speech")
    if not bundle.exists():
        headstart.export(SAMPLE, bundle, heads=[SAMPLE / "medusa"])
    model = headstart.load(bundle)

    print("said | heard")
    for line in (RECORDINGS / "texts.jsonl").read_text("utf-8").splitlines():
        item = json.loads(line)
        transcript = model.transcribe(RECORDINGS / item["audio"])
        print(f"{item['text']} | {transcript.text}")

    print("\nA recording longer than the model's window, read segment by segment:")
    for segment in model.transcribe(RECORDINGS / "long.wav").segments:
        print(f"[{segment.start:5.2f} → {segment.end:5.2f}] {segment.text}")

    print("\nThe same, heard live, half a second at a time; each caption is the draft of the next:")
    audio = load_audio(RECORDINGS / "long.wav")
    step = audio.sampling_rate // 2
    chunks = (audio.samples[begin : begin + step] for begin in range(0, len(audio.samples), step))
    for caption in model.stream_audio(chunks):
        print(f"[{caption.heard_s:5.2f} s] {caption.text[-100:]}")

    print()
    for drafter in ("none", *model.drafters):
        windows = model.transcribe(RECORDINGS / "long.wav", drafter=drafter).windows
        tokens, calls = (
            sum(values) for values in zip(*((len(w.token_ids), w.stats.verify_calls) for w in windows), strict=True)
        )
        print(f"{drafter:8} {tokens} tokens in {calls} verify calls and {len(windows)} windows")


if __name__ == "__main__":
    main()
