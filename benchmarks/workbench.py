"""What the programs here share: options, turns, videos, a bank, and how a report is written."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any

import av
import numpy as np

from actionclip_deploy import Bundle, LabelBank, Recognizer, Runtime, VideoReader
from actionclip_deploy.benchmarks.runner import describe_surroundings
from actionclip_deploy.runtimes.call_sizes import CallSizes
from actionclip_deploy.runtimes.machine import SPIN_VARIABLE
from actionclip_deploy.views import Stopwatch, VideoFrames, ViewReader, encode_views, work_ahead

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


def render_videos(folder: Path, count: int = 24, *, step: int = 3) -> Path:
    """Noise that moves by so many pixels, 320 x 240, 5 seconds of 25 frames, H.264."""
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (15, 20, 3), dtype=np.uint8)
        with av.open(str(folder / f"{number:02}.mp4"), "w") as file:
            stream = file.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            for shown in range(125):
                picture = noise.repeat(16, axis=0).repeat(16, axis=1)
                picture = np.ascontiguousarray(np.roll(picture, step * shown, axis=1))
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


def read_videos(
    recognizer: Recognizer, videos: list[Path], num_workers: int
) -> Iterator[VideoFrames]:
    """Read the frames of videos, as a run over a folder does, and compute nothing."""
    view_reader = ViewReader(recognizer.runtime.manifest, recognizer.views, "frame")

    def work(path: Path, stop: Event) -> VideoFrames:
        with VideoReader(path) as reader:
            return view_reader.read(reader, path, Stopwatch(), stop)

    return work_ahead(videos, work, num_workers=num_workers, max_ahead=32)


def compute_views(recognizer: Recognizer, videos: list[VideoFrames]) -> None:
    """Score videos of which the frames are there."""
    sizes = CallSizes.of_videos(recognizer.runtime.manifest.model)
    for encoded in encode_views(recognizer.runtime, videos, sizes=sizes):
        recognizer.ranker.rank(encoded.embeddings)


def runtime_rate(runtime: Runtime, batch: int, seconds: float) -> float:
    """Clips per second of the runtime, with nothing around it."""
    model = runtime.manifest.model
    shape = (batch, model.num_frames, model.input_size, model.input_size, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        runtime.encode_video(frames)
        done += batch
    return done / (time.perf_counter() - start)


@contextmanager
def server(
    bundle: Bundle,
    bank: str,
    *,
    max_batch: int,
    spin_us: str = "",
    runtime: str = "onnxruntime",
    precision: str | None = None,
) -> Iterator[str]:
    """A server of its own process; gives its address.

    Args:
        bundle: What it serves.
        bank: The label bank that it loads.
        max_batch: Clips in a call.
        spin_us: See `machine.choose_spin_us`; empty for what the server chooses.
        runtime: What executes the graphs.
        precision: What it computes in, where it may be told.
    """
    words = ["--runtime", runtime, "--labels", bank, "--port", "0"]
    if precision is not None:
        words += ["--precision", precision]
    program = (sys.executable, "-m", "actionclip_deploy.cli", "serve", str(bundle.path))
    process = subprocess.Popen(
        [*program, *words, "--max-batch", str(max_batch)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, SPIN_VARIABLE: spin_us},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if " at http" not in line:
            raise SystemExit("The server did not start; run `actionclip serve` to see why.")
        yield line.split(" at ")[1].split(": ")[0]
    finally:
        process.terminate()
        process.wait()
