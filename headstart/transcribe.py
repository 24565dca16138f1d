"""`headstart transcribe`: what is said in a recording, as text or subtitles."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .arguments import BuiltFor, BundleArg, DrafterName, DraftModel, Threads, Untuned

if TYPE_CHECKING:
    from headstart.runtime.segments import Segment
    from headstart.runtime.transcription import Transcript
    from headstart.runtime.word_times import Word


def transcribe(
    bundle: BundleArg,
    recording: Annotated[Path, typer.Argument(help="WAV, FLAC, …", show_default=False)],
    language: Annotated[str | None, typer.Option(help="Spoken in the recording, such as en; heard by default.")] = None,
    task: Annotated[str, typer.Option(help="transcribe, or translate where the model can.")] = "transcribe",
    form: Annotated[
        Literal["text", "srt", "vtt", "json"], typer.Option("--format", help="Of what is printed; all but text have times.")
    ] = "text",
    initial_prompt: Annotated[str, typer.Option(help="Text that the recording continues, for names and spelling.")] = "",
    conditioned: Annotated[bool, typer.Option("--conditioned", help="Each window reads the text before it, too.")] = False,
    fallback: Annotated[
        bool,
        typer.Option("--fallback/--no-fallback", help="Decode doubtful windows again; leave out those without speech."),
    ] = True,
    voice_activity: Annotated[bool, typer.Option("--voice-activity", help="Leave silence out first (extra vad).")] = False,
    words: Annotated[bool, typer.Option("--words", help="When each word was said; with --format json.")] = False,
    drafter: DrafterName = None,
    draft_model: DraftModel = None,
    device: BuiltFor = "cpu",
    threads: Threads = None,
    untuned: Untuned = False,
) -> None:
    """What is said in a recording of any length: text, subtitles or JSON."""
    from headstart.runtime.errors import OptionError
    from headstart.runtime.loading import load
    from headstart.runtime.speech_options import Fallback

    from .screen import print_notes

    if words and form != "json":
        raise OptionError("--words has a place in JSON only. Fix: --format json.")
    model = load(bundle, device, threads=threads, draft_model=draft_model, tuned=not untuned)
    heard = model.transcribe(
        recording,
        language,
        task,
        initial_prompt=initial_prompt,
        conditioned=conditioned,
        fallback=Fallback() if fallback else None,
        voice_activity=voice_activity,
        words=words,
        drafter="auto" if drafter is None else drafter,
    )
    print_notes(heard.notes)
    print(formatted(heard, form), end="" if form in ("srt", "vtt") else "\n")


def formatted(heard: "Transcript", form: str) -> str:
    from headstart.runtime.subtitles import to_srt, to_vtt

    if form == "json":
        segments = [
            {**_timed(one), **({"words": [_timed(word) for word in one.words]} if one.words else {})} for one in heard.segments
        ]
        content = {"language": heard.language, "duration": heard.duration_s, "text": heard.text, "segments": segments}
        content |= {"languages": heard.languages} if heard.languages else {}
        return json.dumps(content, ensure_ascii=False, indent=2)
    return {"srt": to_srt, "vtt": to_vtt}[form](heard.segments) if form != "text" else heard.text


def _timed(one: "Segment | Word") -> dict[str, object]:
    return {"start": one.start, "end": one.end, "text": one.text}
