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
