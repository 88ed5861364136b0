"""From a video file to clips: decodes only what was asked for."""

from actionclip_deploy.video.reader import Clip, Decoder, VideoReader, read_clip

__all__ = ["Clip", "Decoder", "VideoReader", "read_clip"]
