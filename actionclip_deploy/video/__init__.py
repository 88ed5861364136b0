"""From a video file to clips: decodes only what was asked for."""

from actionclip_deploy.video.reader import MAX_PIXELS, Clip, Decoder, VideoReader, read_clip

__all__ = ["MAX_PIXELS", "Clip", "Decoder", "VideoReader", "read_clip"]
