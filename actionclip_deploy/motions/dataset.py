"""Videos of `motions` as files, with the list of their labels that training reads."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import av
import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import ShapeError
from actionclip_deploy.files import staged_file, write_text
from actionclip_deploy.motions.rendering import (
    FRAME_SIZE,
    Act,
    all_captions,
    describe_moment,
    render_acts,
    render_clip,
    render_picture,
)
from actionclip_deploy.motions.vocabulary import (
    COLOURS,
    MOTIONS,
    SHAPES,
    SPLITS,
    MotionLabel,
    all_labels,
    labels,
)

CODECS = ("libx264", "mpeg4")

_FPS = range(8, 16)
_CRF = range(18, 31)  # x264's constant rate factor, from nearly lossless to visibly blurred
_MPEG4_BITS_PER_PIXEL = 0.4
_CHUNK = 32  # videos that a process takes at a time

Progress = Callable[[int, int], None]  # with the number of videos written, and of all
_Written = TypeVar("_Written", "_Video", "_LongVideo")
_Told = TypeVar("_Told")


def write_video(
    path: str | Path,
    frames: NDArray[np.uint8],
    *,
    fps: int = 12,
    codec: str = "libx264",
    crf: int = 23,
) -> Path:
    """Encode frames as a video file.

    Args:
        path: Where to; the ending says which container.
        frames: RGB, uint8, shape (F, H, W, 3), H and W even.
        fps: Frames per second.
        codec: One of `CODECS`; mpeg4 is in every build of FFmpeg and looks worse.
        crf: Constant rate factor of libx264, 0 to 51, lower is better; unused by mpeg4.

    Returns:
        The path.

    Raises:
        ShapeError: If the frames are not such an array.
        ValueError: If the codec is another.
    """
    _check(codec)
    shape = frames.shape
    if (
        frames.dtype != np.uint8
        or len(shape) != 4
        or shape[-1] != 3
        or any(n % 2 for n in shape[1:3])
    ):
        raise ShapeError(
            f"frames are {frames.dtype} of shape {shape}; give uint8 (F, H, W, 3) of even H and W"
        )
    path = Path(path)
    with staged_file(path, durable=False) as staged, av.open(str(staged), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # the same bytes whatever the number of cores
        if codec == "libx264":
            stream.options = {"crf": str(crf), "preset": "veryfast"}
        else:
            stream.bit_rate = int(shape[1] * shape[2] * fps * _MPEG4_BITS_PER_PIXEL)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    return path


def write_dataset(
    folder: str | Path,
    split: str,
    num_videos: int,
    seed: int,
    *,
    size: int = FRAME_SIZE,
    codec: str = "libx264",
    workers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Write videos of a split, the list that says what each shows, and the labels.

    Beside the list there is a table that gives each video two texts, its label and its motion
    alone, such as "moving left". Trained on both, a model learns motions many times faster: most
    pairs of labels in a batch differ in shape or colour, which tells them apart without a look
    at what moves.

    Args:
        folder: Made if missing. It gets SPLIT/NUMBER.mp4; SPLIT.txt, a line `path label` for
            each video, paths relative to the folder; labels.csv, the labels of all splits;
            SPLIT.csv, the table, in the form that Charades has for several labels of a video; and
            phrases.csv, its texts, the labels first.
        split: One of `SPLITS`.
        num_videos: How many.
        seed: 0 or more; decides all that is shown. libx264 does not always make the same bytes of
            the same frames, mpeg4 does.
        size: Height and width of the videos in pixels.
        codec: One of `CODECS`.
        workers: Processes that render.
        progress: Called as videos are written.

    Returns:
        The path of the list.

    Raises:
        ValueError: If there is no such split or codec, or there are no workers.
    """
    _check(codec, workers)
    folder, shown = Path(folder), draw_labels(split, num_videos, seed)
    names = [str(label) for label in all_labels()]
    _write_texts(folder, "labels.csv", names)
    number_of = _write_texts(folder, "phrases.csv", [*names, *MOTIONS])
    videos = [
        _Video(folder / split / f"{index:06d}.mp4", (seed, SPLITS.index(split), index), label)
        for index, label in enumerate(shown)
    ]
    _write_videos(videos, size, codec, workers, progress)
    lines, rows = [], []
    for video, label in zip(videos, shown, strict=True):
        lines.append(f"{split}/{video.path.name} {number_of[str(label)]}\n")
        rows.append((video.path.stem, [number_of[str(label)], number_of[label.motion]]))
    _write_actions(folder / f"{split}.csv", rows)
    annotations = folder / f"{split}.txt"
    write_text(annotations, "".join(lines))
    return annotations


def write_pictures(
    folder: str | Path,
    num_pictures: int,
    seed: int,
    *,
    size: int = FRAME_SIZE,
    codec: str = "libx264",
    workers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Write pictures as videos of one frame, with the table and the texts of their captions.

    The folder gets pictures/NUMBER.mp4; pictures.csv, with the captions of each picture in the form
    that Charades has for several labels of a video; and captions.csv. The other arguments are those
    of `write_dataset`.

    Returns:
        The path of the table.

    Raises:
        ValueError: If there is no such codec, or there are no workers.
    """
    _check(codec, workers)
    folder = Path(folder)
    number_of = _write_texts(folder, "captions.csv", all_captions())
    pictures = [
        _Video(folder / "pictures" / f"{index:06d}.mp4", (seed, len(SPLITS), index), None)
        for index in range(num_pictures)
    ]
    shown = _write_videos(pictures, size, codec, workers, progress)
    annotations = folder / "pictures.csv"
    _write_actions(
        annotations,
        [
            (picture.path.stem, [number_of[caption] for caption in captions])
            for picture, captions in zip(pictures, shown, strict=True)
        ],
    )
    return annotations


LONG_SPLITS = ("tune", "test")
_NUM_LONG_LABELS = 112
_ACT_SECONDS = (2.0, 12.0)
_GAP_SECONDS = (1.0, 8.0)
_ROUND_SECONDS = 3.0  # about as long as a clip of the training, which is one round


def write_long_videos(
    folder: str | Path,
    split: str,
    num_videos: int,
    seed: int,
    *,
    seconds: float = 300.0,
    shown: Sequence[MotionLabel] | None = None,
    gap_seconds: tuple[float, float] = _GAP_SECONDS,
    size: int = FRAME_SIZE,
    codec: str = "libx264",
    workers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Write long videos of motions that come one after the other, and when each is to be seen.

    A video is one scene. An object is there for 2 to 12 seconds and goes through its motion again
    and again, about three seconds each time; then there is nothing for 1 to 8 seconds but the scene
    and, half of the times, a small grey thing that passes. Each label is shown about as often as
    any other.

    Args:
        folder: Made if missing. It gets SPLIT/SPLIT-NUMBER.mp4; SPLIT.csv, a row
            `video,label,start,end` for each motion, paths relative to the folder, and for a video
            of none one that is empty but for its path; SPLIT.json, the same as ActivityNet has it;
            and labels.csv, the labels of all of `motions`.
        split: One of `LONG_SPLITS`: one to choose thresholds on, and one to report them on.
        num_videos: How many.
        seed: 0 or more; decides all that is shown.
        seconds: Length of each, 15 or more.
        shown: The labels; None for 112 of those of training, the same in both splits.
        gap_seconds: The shortest and the longest time in which there is nothing.

    The other arguments are those of `write_dataset`.

    Returns:
        The path of the table.

    Raises:
        ValueError: If there is no such split or codec, a video is too short, gaps are not two
            lengths of time, there is nothing to be shown, or there are no workers.
    """
    _check(codec, workers)
    if split not in LONG_SPLITS:
        raise ValueError(f"split is {split!r}; it has to be one of {list(LONG_SPLITS)}")
    if not seconds >= sum(_ACT_SECONDS) + 1:
        raise ValueError(f"seconds is {seconds}; it has to be 15 or more")
    if not 0 <= gap_seconds[0] <= gap_seconds[1] < math.inf:
        raise ValueError(f"gap_seconds is {gap_seconds}; give the shortest and then the longest")
    if shown is not None and not shown:
        raise ValueError("shown is empty; give a label or more")
    folder = Path(folder)
    _write_texts(folder, "labels.csv", [str(label) for label in all_labels()])
    if shown is None:
        pool = labels("train")
        drawn = np.random.default_rng(seed).permutation(len(pool))[:_NUM_LONG_LABELS]
        shown = [pool[index] for index in drawn]
    rng = np.random.default_rng((seed, LONG_SPLITS.index(split)))
    order = _endless(rng, shown)
    paths = [folder / split / f"{split}-{number:03d}.mp4" for number in range(num_videos)]
    videos = [_LongVideo.drawn(path, seconds, gap_seconds, order, rng) for path in paths]
    _write_all(videos, partial(_LongVideo.write, size=size, codec=codec), workers, progress)
    rows = [row for video in videos for row in video.rows(f"{split}/{video.path.name}")]
    annotations = folder / f"{split}.csv"
    _write_table(annotations, [("video", "label", "start", "end"), *rows])
    database = {
        video.path.stem: {
            "subset": "validation" if split == "tune" else "testing",
            "duration": round(video.num_frames / video.fps, 6),
            "annotations": [
                {"label": str(act.label), "segment": video.span(act)} for act in video.acts
            ],
        }
        for video in videos
    }
    release = {"version": f"motions, seed {seed}", "taxonomy": [], "database": database}
    write_text(folder / f"{split}.json", json.dumps(release, indent=1) + "\n")
    return annotations


class _LongVideo(NamedTuple):
    """What to write where."""

    path: Path
    acts: tuple[Act, ...]
    num_frames: int
    fps: int
    crf: int
    seed: int

    @classmethod
    def drawn(
        cls,
        path: Path,
        seconds: float,
        gap_seconds: tuple[float, float],
        order: Iterator[MotionLabel],
        rng: np.random.Generator,
    ) -> _LongVideo:
        """Draw when each of the next labels is shown."""
        fps, crf = (int(rng.choice(values)) for values in (_FPS, _CRF))
        acts, num_frames, clock = [], round(seconds * fps), 0
        while True:
            gap, length = (round(rng.uniform(*each) * fps) for each in (gap_seconds, _ACT_SECONDS))
            if clock + gap + length > num_frames - fps:  # a second of nothing at the end
                break
            rounds = max(1, round(length / fps / _ROUND_SECONDS))
            acts.append(Act(next(order), clock + gap, length, rounds))
            clock += gap + length
        return cls(path, tuple(acts), num_frames, fps, crf, int(rng.integers(2**63)))

    def span(self, act: Act) -> tuple[float, float]:
        """When an act begins and ends, in seconds."""
        first, end = act.first / self.fps, (act.first + act.num_frames) / self.fps
        return round(first, 6), round(end, 6)

    def rows(self, name: str) -> list[tuple[object, ...]]:
        """Of the table: one for each act, or one that says that there is none."""
        rows: list[tuple[object, ...]] = [
            (name, str(act.label), *self.span(act)) for act in self.acts
        ]
        return rows or [(name, "", "", "")]

    def write(self, size: int, codec: str) -> None:
        """Render and encode it."""
        frames = render_acts(self.acts, self.num_frames, fps=self.fps, seed=self.seed, size=size)
        write_video(self.path, frames, fps=self.fps, codec=codec, crf=self.crf)


def _endless(rng: np.random.Generator, shown: Sequence[MotionLabel]) -> Iterator[MotionLabel]:
    """Labels in an order that is drawn, each as often as any other up to one."""
    while True:
        for index in rng.permutation(len(shown)):
            yield shown[index]


def _check(codec: str, workers: int = 1) -> None:
    if codec not in CODECS:
        raise ValueError(f"codec is {codec!r}; it has to be one of {list(CODECS)}")
    if workers < 1:
        raise ValueError(f"workers is {workers}; it has to be 1 or more")


class _Video(NamedTuple):
    """What to write where; a picture if there is no label."""

    path: Path
    seed: tuple[int, ...]
    label: MotionLabel | None

    def write(self, size: int, codec: str) -> tuple[str, ...]:
        """Render and encode it; gives the texts of what it shows."""
        draw = np.random.default_rng(self.seed)
        fps, crf = (int(draw.choice(values)) for values in (_FPS, _CRF))
        seed = int(draw.integers(2**63))
        if self.label is not None:
            frames = render_clip(self.label, seed=seed, size=size)
            texts: tuple[str, ...] = (str(self.label),)
        else:
            shape, colour = str(draw.choice(SHAPES)), str(draw.choice(COLOURS))
            frames, moment = render_picture(shape, colour, seed=seed, size=size)
            texts = describe_moment(shape, colour, moment)
        write_video(self.path, frames, fps=fps, codec=codec, crf=crf)
        return texts


def _write_videos(
    videos: Sequence[_Video],
    size: int,
    codec: str,
    workers: int,
    progress: Progress | None,
) -> list[tuple[str, ...]]:
    """Write videos into their folders, and tell what each shows."""
    write = partial(_Video.write, size=size, codec=codec)
    return _write_all(videos, write, workers, progress, chunk=_CHUNK)


def _write_all(
    videos: Sequence[_Written],
    write: Callable[[_Written], _Told],
    workers: int,
    progress: Progress | None,
    chunk: int = 1,
) -> list[_Told]:
    """Write videos into their folders, in processes, and give what each writing gives."""
    for folder in {video.path.parent for video in videos}:
        folder.mkdir(parents=True, exist_ok=True)
    told = []
    with ExitStack() as stack:
        results: Iterable[_Told]
        if workers == 1:
            results = map(write, videos)
        else:
            pool = stack.enter_context(ProcessPoolExecutor(workers))
            results = pool.map(write, videos, chunksize=chunk)
        for each in results:
            told.append(each)
            if progress:
                progress(len(told), len(videos))
    return told


def _write_texts(folder: Path, name: str, texts: Sequence[str]) -> dict[str, int]:
    """Write a label file, and tell the number of each text."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_table(folder / name, [("id", "name"), *enumerate(texts)])
    return {text: number for number, text in enumerate(texts)}


def _write_actions(path: Path, rows: Iterable[tuple[str, Sequence[int]]]) -> None:
    """Write which texts each video has, as Charades says it: `NUMBER START END;...`."""
    actions = [(name, ";".join(f"{number} 0 1" for number in numbers)) for name, numbers in rows]
    _write_table(path, [("id", "actions"), *actions])


def _write_table(path: Path, rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def draw_labels(split: str, num_videos: int, seed: int) -> list[MotionLabel]:
    """Draw which label each video of a split shows, every label as often as any other up to one.

    Raises:
        ValueError: If there is no such split.
    """
    pool = labels(split)
    rng = np.random.default_rng((seed, SPLITS.index(split)))
    rounds = -(-num_videos // len(pool))
    order = np.concatenate([rng.permutation(len(pool)) for _ in range(rounds)] or [np.arange(0)])
    return [pool[index] for index in order[:num_videos]]
