"""Segments as subtitles: SubRip (.srt) and WebVTT (https://www.w3.org/TR/webvtt1)."""

from collections.abc import Sequence

from .segments import Segment


def to_srt(segments: Sequence[Segment]) -> str:
    """Numbered cues; a comma before the milliseconds."""
    cues = [
        f"{number}\n{_time(segment.start, ',')} --> {_time(segment.end, ',')}\n{_one_cue(segment.text)}\n"
        for number, segment in enumerate(segments, 1)
    ]
    return "\n".join(cues)


def to_vtt(segments: Sequence[Segment]) -> str:
    escaped = [(segment, segment.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")) for segment in segments]
    cues = [f"{_time(one.start, '.')} --> {_time(one.end, '.')}\n{_one_cue(text)}\n" for one, text in escaped]
    return "\n".join(["WEBVTT\n", *cues])


def _time(seconds: float, point: str) -> str:
    """hh:mm:ss and milliseconds; hours may have more digits."""
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"


def _one_cue(text: str) -> str:
    """An empty line would end the cue, and an arrow be read as times."""
    return " ".join(text.split()).replace("-->", "->")
