"""The pictures that `--plot` draws of predictions and of an evaluation."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.cli.output import usage_error
from actionclip_deploy.errors import MissingExtraError, VideoWarning
from actionclip_deploy.recognizer import Prediction
from actionclip_deploy.video import VideoReader

try:
    from matplotlib.figure import Figure
except ImportError as exc:
    raise MissingExtraError("--plot", "plot") from exc

from actionclip_deploy.benchmarks.charts import save_figure

MAX_FRAMES = 8  # of a clip with more, some are shown
SUFFIXES = (".png", ".jpg", ".pdf", ".svg")

_MAX_NAMED_LABELS = 60  # more names than that cannot be read beside a matrix
_MAX_COUNTED_LABELS = 20


def check_plot_path(path: Path) -> None:
    """Refuse now, by a usage error, a file that could not be written after the work."""
    if path.suffix.lower() not in SUFFIXES:
        raise usage_error(f"--plot is {path}; give a file that ends in {', '.join(SUFFIXES)}.")
    if path.is_dir() or (path.parent.is_dir() and not os.access(path.parent, os.W_OK)):
        raise usage_error(f"--plot is {path}, which cannot be written; choose another place.")
    if not path.parent.is_dir():
        raise usage_error(f"--plot is {path}, but {path.parent} is not a folder; make it first.")


def plot_predictions(predictions: Sequence[Prediction], path: Path) -> None:
    """Draw one row per video, whose file must still be there: frames of a clip, labels as bars."""
    figure = Figure(figsize=(16.5, 2.1 * len(predictions)), layout="constrained")
    rows = figure.subfigures(len(predictions), squeeze=False)[:, 0]
    for row, prediction in zip(rows, predictions, strict=True):
        title = row.suptitle(prediction.video.name, x=0.005, ha="left", fontsize=10, weight="bold")
        title.set_parse_math(False)
        _draw_row(row, prediction)
    save_figure(figure, path, dpi=100)


def _draw_row(row: Any, prediction: Prediction) -> None:
    indices = prediction.frame_indices[0]
    places = np.linspace(0, len(indices) - 1, min(MAX_FRAMES, len(indices))).round().astype(int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoWarning)  # it was told when the video was scored
        with VideoReader(prediction.video) as reader:
            clip = reader.read(indices[places])
    frames, bars = row.subfigures(1, 2, width_ratios=[3, 1])
    pictures = frames.subplots(1, len(places), squeeze=False)[0]
    for axes, frame, seconds in zip(pictures, clip.frames, clip.pts_seconds, strict=True):
        axes.imshow(frame)
        axes.set_title(f"{seconds:.2f} s", fontsize=8)
        axes.set_axis_off()
    _draw_bars(bars.subplots(), prediction)


def _draw_bars(axes: Any, prediction: Prediction) -> None:
    labels = [best.label for best in prediction.predictions][::-1]
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
