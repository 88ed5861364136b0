"""Events as pictures: a thumbnail and a clip of each, and a copy of the video with labels."""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from actionclip_deploy.errors import FileWriteError
from actionclip_deploy.files import write_errors
from actionclip_deploy.records import EventRecord, printable
from actionclip_deploy.sinks.delivery import Frame, Sink, pause_seconds, slug
from actionclip_deploy.video.recording import (
    FootageRing,
    VideoWriter,
    draw_caption,
    shrink,
    write_jpeg,
)

logger = logging.getLogger(__name__)

_MAX_BYTES = 16 << 20  # of a camera
_MAX_WIDTH = 640
# An event is told of so long after its frames: half a window, its shortest length, what is merged.
_DELAY_SECONDS = 30.0
_INTO_THE_EVENT_SECONDS = 1.0  # where its picture is taken: at its start little is seen of it
_MAX_TRIES = 6
_MAX_RINGS = 3  # of a camera that connects again and again
_SOURCE = "{source}"


class _Pace:
    """Lets frames of each source through, so many a second; from the threads of readers."""

    def __init__(self, frames_per_second: float) -> None:
        self._seconds = 1.0 / frames_per_second
        self._due: dict[str, tuple[int, float]] = {}
        self._lock = threading.Lock()

    def takes(self, source: str, frame: Frame) -> bool:
        with self._lock:
            session, due = self._due.get(source, (frame.session, -math.inf))
            # Half a frame early is due: sources do not keep time to the millisecond.
            if session == frame.session and frame.pts_seconds < due - self._seconds / 4:
                return False
            is_on_time = session == frame.session and frame.pts_seconds < due + self._seconds
            start = due if is_on_time else frame.pts_seconds
            self._due[source] = (frame.session, start + self._seconds)
            return True


@dataclass
class _Clip:
    """A clip that is to be written once its last frame is there."""

    event: EventRecord
    ring: FootageRing
    start: float
    end: float | None = None
    num_failed: int = 0
    due: float = -math.inf


class ClipSink(Sink):
    """Writes a picture of each event when it begins, and a clip when it is over.

    Files are `FOLDER/SOURCE/TIME_LABEL_ID.jpg` and `.mp4`; TIME is that of the start, in UTC. A
    clip has the seconds before and after the event and begins up to a second earlier; of a long
    event it has the first `max_seconds`. The last frames of each camera are kept in memory for it,
    encoded, at most 16 MB; of a clip that would need more, the beginning is missing.

    Args:
        folder: Of the files; made if it is not there.
        seconds_before: What a clip has before the event.
        seconds_after: What it has after it.
        max_seconds: Of the event itself.
        frames_per_second: Of the clip, at most.
        max_width: Wider frames are made smaller.
        max_bytes: Of the frames of one camera.

    Raises:
        FileWriteError: If the folder cannot be written to.
    """

    kind = "clips"
    wants_frames = True

    def __init__(
        self,
        folder: str | Path,
        *,
        seconds_before: float = 5.0,
        seconds_after: float = 5.0,
        max_seconds: float = 60.0,
        frames_per_second: float = 8.0,
        max_width: int = _MAX_WIDTH,
        max_bytes: int = _MAX_BYTES,
    ) -> None:
        for name, value in (("seconds_before", seconds_before), ("seconds_after", seconds_after)):
            if not 0 <= value <= 300:
                raise ValueError(f"{name} is {value}; it must be from 0 to 300.")
        super().__init__(f"clips:{folder}")
        self._folder = Path(folder)
        self._before, self._after, self._longest = seconds_before, seconds_after, max_seconds
        self._fps, self._max_width, self._max_bytes = frames_per_second, max_width, max_bytes
        self._pace = _Pace(frames_per_second)
        self._rings: dict[str, dict[int, FootageRing]] = {}
        self._clips: dict[str, _Clip] = {}
        with write_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def _wants(self, source: str, frame: Frame) -> bool:
        return self._pace.takes(source, frame)

    def _take(self, source: str, frame: Frame) -> None:
        rings = self._rings.setdefault(source, {})
        pixels = shrink(frame.to_rgb(), self._max_width)
        size = pixels.shape[1], pixels.shape[0]
        ring = rings.get(frame.session)
        if ring is None or ring.size != size:
            ring = rings[frame.session] = FootageRing(
                width=size[0],
                height=size[1],
                max_seconds=self._before + self._longest + self._after + _DELAY_SECONDS,
                max_bytes=self._max_bytes,
                frames_per_second=self._fps,
            )
            while len(rings) > _MAX_RINGS:
                del rings[min(rings)]
        ring.add(pixels, frame.wall_seconds)
        # What an older session holds counts too.
        while sum(each.num_bytes for each in rings.values()) > self._max_bytes and len(rings) > 1:
            del rings[min(rings)]
        for clip in [each for each in self._clips.values() if each.event.source == source]:
            self._write_if_complete(clip, frame.wall_seconds)

    def _deliver(self, event: EventRecord) -> None:
        start = _unix_seconds(event.start_time)
        clip = self._clips.get(event.id)
        if clip is None and event.kind == "new":
            ring = self._ring_of(event.source, start)
            if ring is None:
                self._note_dropped("no_frames")
                return
            self._clips[event.id] = _Clip(event, ring, start - self._before)
            self._write_picture(event, ring, start + _INTO_THE_EVENT_SECONDS)
        elif clip is not None and event.kind == "end" and event.end_time is not None:
            clip.end = _unix_seconds(event.end_time) + self._after
            newest = max(each.end_seconds for each in self._rings[event.source].values())
            self._write_if_complete(clip, newest)

    def _write_picture(self, event: EventRecord, ring: FootageRing, seconds: float) -> None:
        picture = ring.frame_at(seconds)
        if picture is None:
            return
        try:
            write_jpeg(self._path_of(event, ".jpg"), picture)
        except FileWriteError as exc:  # another try would hold up the clips
            self._note_failure(str(exc))
            self._note_dropped("unwritten")
        else:
            self._note_sent()

    def _ring_of(self, source: str, seconds: float) -> FootageRing | None:
        """The frames of a source that have a time, or the nearest before it."""
        found = [ring for ring in self._rings.get(source, {}).values() if len(ring)]
        holding = [ring for ring in found if ring.start_seconds - 1 <= seconds]
        return max(holding or found, key=lambda ring: ring.start_seconds, default=None)

    def _write_if_complete(self, clip: _Clip, now: float, *, is_over: bool = False) -> None:
        longest = clip.start + self._before + self._longest
        end = min(longest if clip.end is None else clip.end, longest + self._after)
        # Frames of a session that is over are all there.
        is_there = clip.ring.end_seconds >= end or (clip.end is not None and now >= end)
        if not (is_there or is_over) or (now < clip.due and not is_over):
            return
        try:
            is_written = clip.ring.write_clip(self._path_of(clip.event, ".mp4"), clip.start, end)
        except FileWriteError as exc:
            self._note_failure(str(exc))
            clip.due = now + pause_seconds(clip.num_failed)
            clip.num_failed += 1
            if clip.num_failed < _MAX_TRIES and not is_over:
                return
            self._note_dropped("unwritten")
        else:
            self._note_sent() if is_written else self._note_dropped("no_frames")
        del self._clips[clip.event.id]

    def _finish(self) -> None:
        for clip in list(self._clips.values()):
            self._write_if_complete(clip, clip.ring.end_seconds, is_over=True)

    def _num_kept(self) -> int:
        return len(self._clips)

    def _path_of(self, event: EventRecord, suffix: str) -> Path:
        folder = self._folder / slug(event.source)
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        time = event.start_time.replace(":", "").replace("-", "").replace(".", "")
        return folder / f"{time}_{slug(event.label)}_{event.id}{suffix}"


class VideoSink(Sink):
    """Writes a copy of a source's video with the labels and scores of its open events.

    The file appears when the program ends. A label is there from when it was told of, which is
    some seconds after its start.

    Args:
        path: Of the MP4 file. `{source}` in it stands for the source's name, which several sources
            need.
        frames_per_second: At most.
        max_width: Wider frames are made smaller.

    Raises:
        FileWriteError: If it cannot be written.
    """

    kind = "video"
    wants_frames = True

    def __init__(
        self, path: str | Path, *, frames_per_second: float = 15.0, max_width: int = 1280
    ) -> None:
        super().__init__(f"video:{path}")
        self._path = str(path)
        self._max_width = max_width
        self._pace = _Pace(frames_per_second)
        self._writers: dict[str, VideoWriter | None] = {}
        self._open: dict[str, EventRecord] = {}
        folder = Path(path).parent
        if _SOURCE not in str(folder):
            with write_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def _wants(self, source: str, frame: Frame) -> bool:
        return self._pace.takes(source, frame)

    def _deliver(self, event: EventRecord) -> None:
        if event.kind == "end":
            self._open.pop(event.id, None)
        else:
            self._open[event.id] = event

    def _take(self, source: str, frame: Frame) -> None:
        pixels = shrink(frame.to_rgb(), self._max_width)
        if source not in self._writers:
            self._writers[source] = self._writer(source, pixels.shape[1], pixels.shape[0])
        writer = self._writers[source]
        if writer is None:
            self._note_dropped("frames")
            return
        events = [each for each in self._open.values() if each.source == source]
        lines = [printable(f"{each.label}  {each.score:.2f}", kept="") for each in events]
        try:
            writer.write(draw_caption(pixels, lines), frame.wall_seconds)
        except FileWriteError:
            self._writers[source] = None  # half a video is none
            writer.discard()
            self._note_dropped("unwritten")
            raise

    def _writer(self, source: str, width: int, height: int) -> VideoWriter | None:
        if _SOURCE not in self._path and self._writers:
            logger.warning(
                "the sink %s has one file and there are several sources; write {source} into its "
                "name: of %s nothing is written",
                self.name,
                source,
            )
            return None
        path = Path(self._path.replace(_SOURCE, slug(source)))
        return VideoWriter(path, width=width, height=height)

    def _finish(self) -> None:
        for source, writer in self._writers.items():
            if writer is not None:
                self._writers[source] = None
                writer.close()
                self._note_sent()


def _unix_seconds(text: str) -> float:
    # Python 3.10 does not know the Z.
    return datetime.fromisoformat(text.removesuffix("Z") + "+00:00").timestamp()
