"""From a video file to clips, and from a source to frames: decodes only what was asked for."""

from importlib import import_module
from typing import TYPE_CHECKING

from actionclip_deploy.video.reader import MAX_PIXELS, Clip, Decoder, VideoReader, read_clip

if TYPE_CHECKING:
    from actionclip_deploy.video.live import LiveFrame, LiveReader, SourceState
    from actionclip_deploy.video.sources import Source, expand_sources, parse_source

__all__ = [
    "MAX_PIXELS",
    "Clip",
    "Decoder",
    "LiveFrame",
    "LiveReader",
    "Source",
    "SourceState",
    "VideoReader",
    "expand_sources",
    "parse_source",
    "read_clip",
]

# Who reads files imports nothing of cameras.
_HOMES = {
    **dict.fromkeys(("LiveFrame", "LiveReader", "SourceState"), "live"),
    **dict.fromkeys(("Source", "expand_sources", "parse_source"), "sources"),
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
