"""From a video file to clips, and from a source to frames: decodes only what was asked for."""

from actionclip_deploy.video.live import LiveFrame, LiveReader, SourceState
from actionclip_deploy.video.reader import MAX_PIXELS, Clip, Decoder, VideoReader, read_clip
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
