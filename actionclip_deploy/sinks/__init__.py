"""Sinks: where events go. Each works in a thread of its own and never holds up a camera."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from actionclip_deploy.sinks.delivery import Frame, JsonlSink, Sink, SinkStats
from actionclip_deploy.video.sources import with_variables

__all__ = ["Frame", "JsonlSink", "Sink", "SinkStats", "frames_to", "parse_sink"]

_LINES = (".jsonl", ".ndjson")


def parse_sink(
    text: str, *, environ: Mapping[str, str] = os.environ, spool: str | Path | None = None
) -> Sink:
    """Open the sink that a user writes.

    Args:
        text: `-` (lines of JSON on standard output), `FILE.jsonl`, an `https://` address (webhook),
            `mqtt://HOST/TOPIC`, `clips:FOLDER` (a picture and a clip of each event) or
            `video:FILE.mp4` (a copy with labels). `${NAME}` is taken from the environment.
        environ: Of variables and secrets.
        spool: Where events wait for a webhook; None for the user's folder of state.

    Raises:
        ValueError: If the text is none of these, or a variable is not set.
        FileWriteError: If a file or folder cannot be written.
        MissingExtraError: If what it needs is not installed.
    """
    kind, _, rest = text.partition(":")
    filled, _secrets = with_variables(text, environ, what="sink")
    if text == "-":
        return JsonlSink(None)
    if (text.startswith("${") and "://" in filled) or rest.startswith("//"):
        kind = filled.partition(":")[0].lower()
        if kind in ("http", "https"):
            from actionclip_deploy.sinks.webhook import WebhookSink

            return WebhookSink(filled, environ=environ, spool=spool)
        if kind in ("mqtt", "mqtts"):
            from actionclip_deploy.sinks.mqtt import MqttSink

            return MqttSink(filled, environ=environ)
    elif kind == "clips" and rest:
        from actionclip_deploy.sinks.footage import ClipSink

        return ClipSink(filled.partition(":")[2])
    elif kind == "video" and rest.endswith(".mp4"):
        from actionclip_deploy.sinks.footage import VideoSink

        return VideoSink(filled.partition(":")[2])
    elif filled.endswith(_LINES):
        return JsonlSink(filled)
    shown = f"{kind}://..." if rest.startswith("//") else text  # an address may hold a password
    raise ValueError(
        f"{shown!r} is not a sink; expected '-', FILE.jsonl, https://HOST/PATH, mqtt://HOST/TOPIC, "
        "clips:FOLDER or video:FILE.mp4."
    )


def frames_to(
    sinks: Sequence[Sink], is_live: Mapping[str, bool]
) -> Callable[[str, Frame], None] | None:
    """What gives the frames of sources to the sinks that want them; None where none does.

    Args:
        sinks: Some of them may want frames.
        is_live: Whether a source is live, by its name; the frames of a file wait for room.
    """
    wanting = [each for each in sinks if each.wants_frames]
    if not wanting:
        return None

    def give(name: str, frame: Frame) -> None:
        for each in wanting:
            each.frame(name, frame, may_wait=not is_live[name])

    return give
