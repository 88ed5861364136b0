"""What the programs here share: options, turns, videos, a bank, and how a report is written."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np

from actionclip_deploy import Bundle, LabelBank
from actionclip_deploy.benchmarks.runner import describe_surroundings

SUFFIXES = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".flv"}


def make_parser(docstring: str | None, *, rounds: int = 9) -> argparse.ArgumentParser:
    """A parser with the first line of a program's docstring, --rounds and --output."""
    parser = argparse.ArgumentParser(description=(docstring or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--output", type=Path, help="where to write the report as JSON")
    return parser


def write_report(report: dict[str, Any], output: Path | None, *, prints: bool = True) -> None:
    """Print a report with what surrounds it, and write it where a file was given."""
    text = json.dumps({**describe_surroundings(), **report}, indent=2)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    if prints:
        print(text)


def settings_of(given: argparse.Namespace) -> dict[str, str]:
    """The options as JSON takes them."""
    return {key: str(value) for key, value in vars(given).items() if key != "output"}


def time_in_turns(
    calls: dict[str, Callable[[], Any]],
    rounds: int,
    *,
    num_warm_up: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call in each round; each round begins with another call."""
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-num_warm_up, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            begin = clock()
            calls[name]()
            if turn >= 0:
                seconds[name].append(clock() - begin)
    return seconds


def find_videos(folder: Path, max_videos: int) -> list[Path]:
    """The first videos of a folder and its subfolders."""
    found = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES)
    return list(islice(found, max_videos))


def render_videos(folder: Path, count: int = 24) -> Path:
    """Noise that moves, 320 x 240, 5 seconds of 25 frames, H.264."""
    noise = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    for number in range(count):
        with av.open(str(folder / f"{number:02}.mp4"), "w") as file:
            stream = file.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            for step in range(125):
                picture = np.roll(noise, number, axis=0).repeat(16, axis=0).repeat(16, axis=1)
                picture = np.ascontiguousarray(np.roll(picture, 3 * step, axis=1))
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())
    return folder


def make_bank(bundle: Bundle) -> LabelBank:
    """400 labels of random embeddings: what they say does not change how long it takes."""
    width = bundle.manifest.model.embedding_dim
    embeddings = np.random.default_rng(0).normal(size=(16, 400, width)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    labels = tuple(f"label {number}" for number in range(400))
    templates = tuple(f"template {number}: {{}}" for number in range(16))
    return LabelBank("random", labels, templates, embeddings, bundle.textual_sha256)
