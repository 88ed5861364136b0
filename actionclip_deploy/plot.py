"""Pictures of predictions and of an evaluation, in a notebook or in a file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import MissingExtraError
from actionclip_deploy.files import staged_file
from actionclip_deploy.records import LabelScore, printable
from actionclip_deploy.video import Clip
from actionclip_deploy.video.memory import OpenVideo

try:
    from matplotlib.figure import Figure
except ImportError as exc:
    raise MissingExtraError("A picture", "plot") from exc

MAX_FRAMES = 8  # of a clip with more, some are shown
MAX_VIDEOS = 100  # 21,000 pixels high; a longer picture cannot be looked at, and ends at 65,535
SUFFIXES = (".png", ".jpg", ".pdf", ".svg")

_DPI = 100
_ROW_INCHES, _WIDTH_INCHES, _NOTE_INCHES = 2.1, 16.5, 0.3
_FRAMES_INCHES = 11.2  # of a row, for its frames; then labels and their bars
_LABELS_INCHES = 2.2
_PICTURE_INCHES = 1.55  # the height of a frame
_LABEL_LENGTH = 30  # characters that have room beside a bar
_MAX_NAMED_LABELS = 60  # more names than that cannot be read beside a matrix
_MAX_COUNTED_LABELS = 20


def save_figure(figure: Figure, path: Path, *, dpi: int = 110) -> None:
    """Write a figure, or leave what was there.

    Raises:
        FileWriteError: If it cannot be written.
    """
    with staged_file(path) as staged:
        figure.savefig(staged, dpi=dpi, format=path.suffix[1:].lower())


class FrameReader(Protocol):
    """Where the frames of a prediction are read again."""

    def read(self, indices: NDArray[np.int64]) -> Clip:
        """Read frames by their numbers, from 0."""
        ...


class Drawable(Protocol):
    """A `recognizer.Prediction`, as far as it is drawn."""

    @property
    def name(self) -> str:
        """What the video is called."""
        ...

    @property
    def predictions(self) -> tuple[LabelScore, ...]:
        """The best labels, best first."""
        ...

    @property
    def frame_indices(self) -> NDArray[np.int64]:
        """Frames that were used, shape (num_clips, T)."""
        ...

    def open_frames(self) -> AbstractContextManager[FrameReader]:
        """Open the video again, for the time of a block."""
        ...


class Picture(Figure):
    """A figure that a notebook shows, also where pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="png", dpi=_DPI)
        return data.getvalue()


def plot_predictions(predictions: Sequence[Drawable], path: Path | None = None) -> Picture:
    """Draw one row per video, which must still be there: frames of a clip, labels as bars.

    Of more than `MAX_VIDEOS` the first are drawn, and a line says so: a picture has an end.

    Args:
        predictions: What was recognised in videos.
        path: A file to write, in the format of its suffix; None for none.

    Raises:
        VideoError: If a video cannot be read again.
        FileWriteError: If the file cannot be written.
    """
    shown = predictions[:MAX_VIDEOS]
    clips = [_read_frames(prediction) for prediction in shown]
    left_out = (
        f"and {len(predictions) - len(shown)} more videos" if predictions[MAX_VIDEOS:] else ""
    )
    rows: float = len(shown) * _ROW_INCHES + bool(left_out) * _NOTE_INCHES
    figure = Picture(figsize=(_WIDTH_INCHES, rows))
    # All places are computed here, and frames have no axes of their own. A layout that matplotlib
    # solves takes a time that grows faster than the rows (matplotlib#10655): 104 s for 40 videos.
    sheet = figure.add_axes((0, 0, 1, 1), xlim=(0, _WIDTH_INCHES), ylim=(0, rows))
    sheet.set_axis_off()
    for number, (prediction, clip) in enumerate(zip(shown, clips, strict=True)):
        bottom = rows - (number + 1) * _ROW_INCHES
        _draw_frames(sheet, bottom, prediction, clip)
        left = _FRAMES_INCHES + _LABELS_INCHES
        wide = _WIDTH_INCHES - left - 0.15
        place = (left / _WIDTH_INCHES, (bottom + 0.3) / rows, wide / _WIDTH_INCHES, 1.35 / rows)
        _draw_bars(figure.add_axes(place), prediction)
    if left_out:
        sheet.text(0.1, 0.1, left_out, fontsize=10)
    if path is not None:
        save_figure(figure, path, dpi=_DPI)
    return figure


def _read_frames(prediction: Drawable) -> tuple[list[NDArray[np.uint8]], NDArray[np.float64]]:
    """The frames of the first clip that are shown, as small as they are shown, and their times.

    A time is NaN where frames came without.
    """
    indices = prediction.frame_indices[0]
    places = np.linspace(0, len(indices) - 1, min(MAX_FRAMES, len(indices))).round().astype(int)
    with prediction.open_frames() as reader:
        clip = reader.read(indices[places])
    side = int(_DPI * max(_FRAMES_INCHES / len(places), _PICTURE_INCHES))
    step = max(1, max(clip.frames.shape[1:3]) // (2 * side))
    return [frame[::step, ::step] for frame in clip.frames], clip.pts_seconds


def _draw_frames(
    sheet: Any,
    bottom: float,
    prediction: Drawable,
    clip: tuple[list[NDArray[np.uint8]], NDArray[np.float64]],
) -> None:
    """Draw the frames of a row that begins `bottom` inches above the lower edge."""
    name = printable(prediction.name, kept="")
    top = bottom + _ROW_INCHES - 0.1
    title = sheet.text(0.1, top, name, va="top", fontsize=10, weight="bold")
    title.set_parse_math(False)
    each = _FRAMES_INCHES / len(clip[0])
    for number, (frame, seconds) in enumerate(zip(*clip, strict=True)):
        height, width = frame.shape[:2]
        scale = min((each - 0.1) / width, _PICTURE_INCHES / height)
        middle = 0.1 + (number + 0.5) * each
        half = scale * width / 2
        upper = bottom + 0.1 + scale * height
        sheet.imshow(
            frame, extent=(middle - half, middle + half, bottom + 0.1, upper), aspect="auto"
        )
        if not np.isnan(seconds):
            sheet.text(middle, upper + 0.04, f"{seconds:.2f} s", ha="center", fontsize=8)


def _draw_bars(axes: Any, prediction: Drawable) -> None:
    labels = [_cut(best.label) for best in prediction.predictions][::-1]
    scores = [best.score for best in prediction.predictions][::-1]
    axes.barh(range(len(labels)), scores, color="#4878a8")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    for text in axes.get_yticklabels():
        text.set_parse_math(False)  # a dollar sign in a label is one
    axes.set_xlim(0, 1)
    axes.tick_params(axis="x", labelsize=7)
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
    for place, value in enumerate(scores):
        axes.text(min(value + 0.02, 0.86), place, f"{value:.3f}", va="center", fontsize=7)


def _cut(label: str) -> str:
    return (
        label
        if len(label) <= _LABEL_LENGTH
        else f"{label[: _LABEL_LENGTH - 1]}\N{HORIZONTAL ELLIPSIS}"
    )


class LabelSpan(Protocol):
    """An `events.Event`, as far as it is drawn."""

    @property
    def label(self) -> str:
        """What held."""
        ...

    @property
    def start_seconds(self) -> float:
        """From when."""
        ...

    @property
    def end_seconds(self) -> float:
        """Until when."""
        ...

    @property
    def mean(self) -> float:
        """Its score."""
        ...


class DrawableTimeline(Protocol):
    """A `stream.Timeline`, as far as it is drawn."""

    @property
    def name(self) -> str:
        """What the video is called."""
        ...

    @property
    def duration_seconds(self) -> float:
        """Of the video."""
        ...

    @property
    def events(self) -> Sequence[LabelSpan]:
        """When labels held."""
        ...

    @property
    def watched_names(self) -> Sequence[str]:
        """Labels and groups, E of them."""
        ...

    def step_scores(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """When steps start, shape (G,), and scores, shape (G, E)."""
        ...

    def open_frames(self) -> AbstractContextManager[OpenVideo]:
        """Open the video again, for the time of a block."""
        ...


_TIMELINE_INCHES = 14.0
_THUMBNAIL_INCHES, _CURVES_INCHES, _BAR_INCHES = 1.5, 2.2, 0.34
_MAX_DRAWN_LABELS = 12
_COLOURS = ("#4878a8", "#c8703c", "#5a9a5a", "#a0568c", "#8c7a3c", "#3c9a9a", "#b04a4a", "#666666")


def plot_timeline(timeline: DrawableTimeline, path: Path | None = None) -> Picture:
    """Draw frames of a video along time, below them when labels held, and their scores.

    Of more than 12 labels the ones that held longest are drawn, and a line says so.

    Args:
        timeline: Of a video that must still be there.
        path: A file to write, in the format of its suffix; None for none.

    Raises:
        VideoError: If the video cannot be read again.
        FileWriteError: If the file cannot be written.
    """
    lengths: dict[str, float] = {}
    for event in timeline.events:
        seconds = event.end_seconds - event.start_seconds
        lengths[event.label] = lengths.get(event.label, 0.0) + seconds
    starts, scores = timeline.step_scores()
    names = list(timeline.watched_names)
    drawn = sorted(lengths, key=lambda label: -lengths[label])[:_MAX_DRAWN_LABELS]
    if not drawn and len(scores):  # then what came nearest
        drawn = [names[place] for place in np.argsort(-scores.max(axis=0))[:3]]
    bars = max(1, len(drawn)) * _BAR_INCHES
    height = 0.5 + _THUMBNAIL_INCHES + 0.35 + bars + 0.3 + _CURVES_INCHES + 0.6
    figure = Picture(figsize=(_TIMELINE_INCHES, height))
    left, right = 2.6 / _TIMELINE_INCHES, 0.98
    end = max(timeline.duration_seconds, 1e-3)

    def axes(top: float, inches: float) -> Any:
        bottom = height - top - inches
        return figure.add_axes(
            (left, bottom / height, right - left, inches / height), xlim=(0, end)
        )

    title = figure.text(0.1 / _TIMELINE_INCHES, 1 - 0.3 / height, printable(timeline.name, kept=""))
    title.set(fontsize=11, weight="bold", parse_math=False)
    _draw_thumbnails(axes(0.5, _THUMBNAIL_INCHES), timeline, end, (right - left) * _TIMELINE_INCHES)
    colours = {label: _COLOURS[place % len(_COLOURS)] for place, label in enumerate(drawn)}
    rows = axes(0.5 + _THUMBNAIL_INCHES + 0.35, bars)
    _draw_spans(rows, timeline.events, colours)
    curves = axes(0.5 + _THUMBNAIL_INCHES + 0.35 + bars + 0.3, _CURVES_INCHES)
    for label in drawn:
        times, values = _with_gaps(starts, scores[:, names.index(label)])
        curves.plot(times, values, color=colours[label], linewidth=1.2)
    curves.set_ylim(0, 1.02)
    curves.set_ylabel("score", fontsize=9)
    curves.set_xlabel(_time_unit(end), fontsize=9)
    for each in (rows, curves):
        each.tick_params(labelsize=8)
        each.grid(axis="x", color="#dddddd", linewidth=0.6)
        each.set_axisbelow(True)
        each.xaxis.set_major_formatter(lambda seconds, _: f"{seconds / _unit_of(end):g}")
        for spine in ("top", "right"):
            each.spines[spine].set_visible(False)
    rows.tick_params(labelbottom=False)
    num_more = len(lengths) - len(drawn)
    if num_more > 0:
        curves.set_title(f"and {num_more} more labels", fontsize=8, loc="right")
    if path is not None:
        save_figure(figure, path, dpi=_DPI)
    return figure


def _unit_of(end: float) -> float:
    return 1.0 if end <= 300 else 60.0 if end <= 18_000 else 3600.0


def _time_unit(end: float) -> str:
    return {1.0: "seconds", 60.0: "minutes", 3600.0: "hours"}[_unit_of(end)]


def _with_gaps(
    starts: NDArray[np.float64], values: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A curve that breaks where there is no score."""
    if len(starts) < 2:
        return starts, values
    steps = np.diff(starts)
    breaks = np.flatnonzero(steps > 1.5 * np.median(steps)) + 1
    return np.insert(starts, breaks, np.nan), np.insert(values, breaks, np.nan)


def _draw_thumbnails(axes: Any, timeline: DrawableTimeline, end: float, inches_wide: float) -> None:
    axes.set_axis_off()
    axes.set_ylim(0, _THUMBNAIL_INCHES)
    with timeline.open_frames() as video:
        seconds = video.pts_seconds - video.pts_seconds[0]
        first = video.read(np.array([0], np.int64)).frames[0]
        per_inch = end / inches_wide
        shown = min(_THUMBNAIL_INCHES - 0.2, 2.2 * first.shape[0] / first.shape[1])
        width = shown * first.shape[1] / first.shape[0] * per_inch
        count = max(1, min(MAX_FRAMES + 4, int(end / (1.05 * width))))
        middles = (np.arange(count) + 0.5) * end / count
        places = np.searchsorted(seconds, middles, side="right") - 1
        for middle, place in zip(middles, np.clip(places, 0, len(seconds) - 1), strict=True):
            frame = video.read(np.array([place], np.int64)).frames[0]
            step = max(1, frame.shape[0] // int(2 * _DPI * shown))
            extent = (middle - width / 2, middle + width / 2, 0, shown)
            axes.imshow(frame[::step, ::step], extent=extent, aspect="auto")
    axes.set_xlim(0, end)
    axes.set_ylim(0, _THUMBNAIL_INCHES)


def _draw_spans(axes: Any, events: Sequence[LabelSpan], colours: dict[str, str]) -> None:
    labels = list(colours)
    for event in events:
        if event.label in colours:
            row = labels.index(event.label)
            length = event.end_seconds - event.start_seconds
            alpha = 0.35 + 0.65 * min(1.0, max(0.0, event.mean))
            axes.barh(
                row, length, left=event.start_seconds, color=colours[event.label], alpha=alpha
            )
    axes.set_ylim(max(1, len(labels)) - 0.4, -0.6)
    axes.set_yticks(range(len(labels)), [_cut(label) for label in labels])
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    if not events:
        axes.text(0.5, 0.5, "no label held", transform=axes.transAxes, ha="center", fontsize=9)


def plot_confusion(confusion: NDArray[np.int64], labels: Sequence[str], path: Path) -> None:
    """Draw which of C labels were taken for which: videos by label and by first label, (C, C)."""
    counts = confusion.sum(axis=1, keepdims=True)
    shares = confusion / np.maximum(counts, 1)
    num_labels = len(labels)
    side = min(4.0 + 0.25 * num_labels, 16.0)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.6, label="share of a label's videos")
    axes.set_xlabel("recognised")
    axes.set_ylabel("label")
    if num_labels <= _MAX_NAMED_LABELS:
        axes.set_xticks(range(num_labels), labels, rotation=90, fontsize=8)
        axes.set_yticks(range(num_labels), labels, fontsize=8)
    if num_labels <= _MAX_COUNTED_LABELS:
        for row, column in np.ndindex(confusion.shape):
            if confusion[row, column]:
                colour = "white" if shares[row, column] > 0.5 else "black"
                count = str(confusion[row, column])
                axes.text(column, row, count, ha="center", va="center", color=colour, fontsize=8)
    save_figure(figure, path)
