"""SubRip and WebVTT."""

from headstart.runtime.segments import Segment
from headstart.runtime.subtitles import to_srt, to_vtt

SEGMENTS = (Segment(0.0, 1.25, "Hello, <world> & all."), Segment(3599.9996, 7262.004, "two\n\nlines --> one"))


def test_subrip() -> None:
    assert to_srt(SEGMENTS) == (
        "1\n00:00:00,000 --> 00:00:01,250\nHello, <world> & all.\n\n2\n01:00:00,000 --> 02:01:02,004\ntwo lines -> one\n"
    )
    assert to_srt(()) == ""


def test_webvtt() -> None:
    assert to_vtt(SEGMENTS) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.250\nHello, &lt;world&gt; &amp; all.\n\n"
        "01:00:00.000 --> 02:01:02.004\ntwo lines --&gt; one\n"
    )
    assert to_vtt(()) == "WEBVTT\n"
