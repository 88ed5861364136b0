"""From a video file to clips: decodes only what was asked for."""

from actionclip_deploy.video.opening import Decoder
from actionclip_deploy.video.reader import VideoReader, read_clip
from actionclip_deploy.video.result import Clip

__all__ = ["Clip", "Decoder", "VideoReader", "read_clip"]
