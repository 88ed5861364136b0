"""How long reading 8 frames of a video takes, beside decord, torchcodec and OpenCV.

    pip install -e ".[peers]"
    python benchmarks/bench_reading.py --videos FOLDER --output reading.json
    python benchmarks/bench_reading.py --videos FOLDER --against OTHER_CHECKOUT
    python benchmarks/bench_reading.py --videos FOLDER --resizes --min-seconds 0

Every reader gets the same file and the same frame numbers, opens the file, uses one thread and
gives RGB. First the answer is checked: our frames must be those of a plain decode of the whole
video, to the last bit; a peer's must be the same pictures but for the rounding of colours, or its
time for that video does not count. Then come rounds in which each reader reads each video once.
torchcodec brings no FFmpeg: it is given PyAV's, so that both decode with the same code, unless
--system-ffmpeg is set.

Where other programs run on the machine, --cpu-time counts the time that the process computed.

With --against, the reader of this checkout is held against that of another, by CPU time, each in a
process of its own; the frames of both must be the same.

With --resizes, reading and making the model's input of 224 pixels are timed for each value of
`--resize`, and how far values lie from those of `frame`.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias, get_args

import av
import numpy as np
from workbench import SUFFIXES, make_parser, write_report

from actionclip_deploy.errors import VideoError
from actionclip_deploy.preprocess import Region, preprocess_frames
from actionclip_deploy.runtimes.machine import installed_versions
from actionclip_deploy.sampling import sample_segments
from actionclip_deploy.video import VideoReader
from actionclip_deploy.video.pixels import FrameConverter, Scaling

Reader: TypeAlias = Callable[[Path, np.ndarray], np.ndarray]
Timer: TypeAlias = Callable[[Path, np.ndarray], float]  # milliseconds

OURS, OTHER = "actionclip", "other checkout"
PACKAGE = "actionclip_deploy"
# Mean over the values of a frame. Conversions to RGB differ by about 2 levels, more at the edges
# of colours; neighbouring frames of a moving picture by more than that.
SAME_PICTURE_LEVELS = 5.0
PACKAGES = ("av", "numpy", "decord", "torchcodec", "torch", "opencv-python-headless")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--videos", type=Path, required=True, help="searched with its subfolders")
    parser.add_argument("--frames", type=int, default=8, help="T, frames of a clip")
    parser.add_argument("--min-seconds", type=float, default=5.0, help="leave out shorter videos")
    parser.add_argument("--system-ffmpeg", action="store_true", help="for torchcodec")
    parser.add_argument(
        "--against", type=Path, metavar="FOLDER", help="another checkout of this project"
    )
    parser.add_argument("--resizes", action="store_true", help="our own ways to resize")
    parser.add_argument(
        "--cpu-time", action="store_true", help="not by the clock on the wall: on a busy machine"
    )
    options = parser.parse_args()
    if options.rounds < 1 or options.frames < 1:
        parser.error("--rounds and --frames must be 1 or more.")
    if not options.videos.is_dir():
        parser.error(f"--videos is {options.videos}; it must be a folder of videos.")
    if options.against is not None and not (options.against / PACKAGE).is_dir():
        parser.error(f"--against is {options.against}; it must be a checkout of this project.")
    if not options.system_ffmpeg and options.against is None:
        share_ffmpeg()

    readers, missing = {OURS: read_ours}, {}
    if options.resizes:
        ways = get_args(Region)
        readers = {OURS: prepared_by(ways[0]), **{way: prepared_by(way) for way in ways[1:]}}
    elif options.against is None:
        readers, missing = open_readers()
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}")
    videos = find_videos(options.videos, options.min_seconds, options.frames)
    if not videos:
        parser.error(f"--videos holds no readable video of {options.min_seconds:g} s or more.")
    excluded = {} if options.resizes else check_answers(readers, videos)
    clock = time.process_time if options.cpu_time else time.perf_counter
    timers: dict[str, Timer] = {name: timed(read, clock) for name, read in readers.items()}
    with ExitStack() as stack:
        if options.against is not None:
            folders = {OURS: Path(__file__).parents[1], OTHER: options.against}
            checkouts = {
                name: stack.enter_context(Checkout(folder)) for name, folder in folders.items()
            }
            check_checkouts(checkouts, videos)
            timers = {name: checkout.time_ms for name, checkout in checkouts.items()}
        times = measure(timers, videos, excluded, options.rounds)
    report = summarise(times, excluded)
    if options.resizes:
        report["differences"] = differences(readers, videos)
    print_table(report)
    for way, found in report.get("differences", {}).items():
        print(f"values of {way} beside frame: {json.dumps(found)}")
    if options.output is not None:
        report |= {"rounds": options.rounds, "frames": options.frames, "left_out": missing}
        is_cpu_time = options.cpu_time or options.against is not None
        report["clock"] = "CPU time" if is_cpu_time else "wall"
        write_report(report, options.output, prints=False)
        print(f"Wrote {options.output}.")


def share_ffmpeg() -> None:
    """Start again with PyAV's FFmpeg under the names that torchcodec looks for."""
    libraries = Path(av.__file__).parents[1] / "av.libs"
    if "SHARED_FFMPEG" in os.environ or not libraries.is_dir():
        return
    folder = tempfile.mkdtemp(prefix="ffmpeg-")
    for library in libraries.glob("lib*.so.*"):
        name, _, version = library.name.partition(".so.")
        link = Path(folder, f"{name.partition('-')[0]}.so.{version.partition('.')[0]}")
        if name.startswith(("libav", "libsw")) and not link.exists():
            link.symlink_to(library)
    paths = [folder, str(libraries), os.environ.get("LD_LIBRARY_PATH", "")]
    os.environ |= {"LD_LIBRARY_PATH": ":".join(filter(None, paths)), "SHARED_FFMPEG": folder}
    os.environ["OMP_NUM_THREADS"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.argv])


def open_readers() -> tuple[dict[str, Reader], dict[str, str]]:
    """Each reader under its name, and why others cannot be used."""
    readers: dict[str, Reader] = {OURS: read_ours}
    missing = {}
    for name, opener in PEERS.items():
        try:
            readers |= opener()
        except (ImportError, RuntimeError, OSError) as exc:
            missing[name] = str(exc).strip().partition("\n")[0]
    return readers, missing


def read_ours(path: Path, indices: np.ndarray) -> np.ndarray:
    with VideoReader(path) as reader:
        return reader.read(indices).frames


def prepared_by(region: Region) -> Reader:
    """Reads frames and makes those of a model's input of them, of the usual size."""

    def read(path: Path, indices: np.ndarray) -> np.ndarray:
        with VideoReader(path) as reader:
            if region == "swscale":
                reader.scale_to(Scaling(short_side=256, interpolation="bicubic"))
            return preprocess_frames(reader.read(indices).frames, region=region)[0]

    return read


def differences(
    readers: dict[str, Reader], videos: dict[Path, np.ndarray]
) -> dict[str, dict[str, float]]:
    """How far the values of each other reader lie from ours, in levels, over all videos."""
    histograms = {name: np.zeros(256, np.int64) for name in readers if name != OURS}
    for path, indices in videos.items():
        ours = readers[OURS](path, indices).astype(np.int16)
        for name, histogram in histograms.items():
            apart = np.abs(readers[name](path, indices) - ours)
            histogram += np.bincount(apart.reshape(-1), minlength=256)
    return {name: _in_levels(histogram) for name, histogram in histograms.items()}


def _in_levels(histogram: np.ndarray) -> dict[str, float]:
    shares = histogram / histogram.sum()
    levels = np.arange(len(shares))
    return {
        "mean": float(shares @ levels),
        "share_equal": float(shares[0]),
        "share_above_2": float(shares[3:].sum()),
        "share_above_8": float(shares[9:].sum()),
        "max": int(levels[histogram > 0].max()),
    }


def timed(read: Reader, clock: Callable[[], float]) -> Timer:
    """Time a reader of this process by a clock in seconds."""

    def time_ms(path: Path, indices: np.ndarray) -> float:
        start = clock()
        read(path, indices)
        return (clock() - start) * 1e3

    return time_ms


# Reads what a line asks for, and answers with its milliseconds and what the frames hash to.
_WORKER = """
import hashlib, json, sys, time, warnings
from actionclip_deploy.video import VideoReader
warnings.simplefilter("ignore")
for line in sys.stdin:
    path, indices = json.loads(line)
    start = time.process_time()
    with VideoReader(path) as reader:
        frames = reader.read(indices).frames
    milliseconds = (time.process_time() - start) * 1e3
    print(json.dumps([milliseconds, hashlib.sha256(frames).hexdigest()]), flush=True)
"""


class Checkout:
    """The reader of a checkout, in a process that goes on; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Checkout:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def ask(self, path: Path, indices: np.ndarray) -> tuple[float, str]:
        """Milliseconds of CPU time for reading frames, and their sha256."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([str(path.absolute()), indices.tolist()]) + "\n")
        process.stdin.flush()
        milliseconds, digest = json.loads(process.stdout.readline())
        return milliseconds, digest

    def time_ms(self, path: Path, indices: np.ndarray) -> float:
        """Milliseconds of CPU time for reading frames."""
        return self.ask(path, indices)[0]


def check_checkouts(checkouts: dict[str, Checkout], videos: dict[Path, np.ndarray]) -> None:
    """Stop unless all give the same frames; each has then read each video once."""
    for path, indices in videos.items():
        if len({checkout.ask(path, indices)[1] for checkout in checkouts.values()}) > 1:
            raise SystemExit(f"{path}: the checkouts give different frames.")


def open_decord() -> dict[str, Reader]:
    import decord

    def read(path: Path, indices: np.ndarray) -> np.ndarray:
        return decord.VideoReader(str(path), num_threads=1).get_batch(indices.tolist()).asnumpy()

    return {"decord": read}


def open_torchcodec() -> dict[str, Reader]:
    import torch
    from torchcodec.decoders import VideoDecoder

    torch.set_num_threads(1)

    def reader(mode: str) -> Reader:
        def read(path: Path, indices: np.ndarray) -> np.ndarray:
            decoder = VideoDecoder(
                str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=mode
            )
            return decoder.get_frames_at(indices.tolist()).data.numpy()

        return read

    return {f"torchcodec {mode}": reader(mode) for mode in ("exact", "approximate")}


def open_opencv() -> dict[str, Reader]:
    import cv2

    cv2.setNumThreads(1)

    def read(path: Path, indices: np.ndarray) -> np.ndarray:
        capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        wanted, frames = set(indices.tolist()), []
        for index in range(int(indices[-1]) + 1):
            if not capture.grab():
                raise RuntimeError(f"OpenCV finds {index} frames in {Path(path).name}.")
            if index in wanted:
                frames.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
        capture.release()
        return np.stack(frames)

    return {"opencv": read}


PEERS = {"decord": open_decord, "torchcodec": open_torchcodec, "opencv": open_opencv}


def find_videos(folder: Path, min_seconds: float, num_frames: int) -> dict[Path, np.ndarray]:
    """Videos of some length, each with the frames to read; brings them into the page cache."""
    videos = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES:
            continue
        try:
            found: list[Warning] = []
            with VideoReader(path, on_warning=found.append) as reader:
                if found:
                    print(f"{path} is left out: it is damaged")
                elif reader.duration_seconds >= min_seconds:
                    videos[path] = sample_segments(reader.num_frames, num_frames)
        except VideoError as exc:
            print(f"{path} is left out: {exc}")
            continue
        path.read_bytes()
    return videos


def check_answers(
    readers: dict[str, Reader], videos: dict[Path, np.ndarray]
) -> dict[tuple[str, Path], str]:
    """Compare with a full decode; gives which peers are not comparable on which video, and why."""
    excluded = {}
    for path, indices in videos.items():
        expected = decode_everything(path, indices)
        if not np.array_equal(read_ours(path, indices), expected):
            raise SystemExit(f"{path}: our frames are not those of a full decode.")
        for name, read in readers.items():
            if name == OURS:
                continue
            try:
                frames = read(path, indices)
            except Exception as exc:  # noqa: BLE001 - whatever a peer raises is said
                excluded[name, path] = str(exc).strip().partition("\n")[0][:120]
                continue
            if frames.shape != expected.shape:
                excluded[name, path] = f"gives {frames.shape}, not {expected.shape}"
                continue
            levels = np.abs(frames.astype(np.int16) - expected).mean(axis=(1, 2, 3)).max()
            if levels > SAME_PICTURE_LEVELS:
                excluded[name, path] = f"gives other pictures ({levels:.0f} levels off)"
    return excluded


def decode_everything(path: Path, indices: np.ndarray) -> np.ndarray:
    """Frames by their numbers, by decoding all with one thread and no frame left out."""
    wanted, frames = set(indices.tolist()), {}
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        assert stream is not None
        stream.thread_count = 1
        converter = None
        for index, frame in enumerate(container.decode(stream)):
            converter = converter or FrameConverter(frame)
            if index in wanted:
                frames[index] = converter.convert(frame)
    return np.stack([frames[index] for index in indices.tolist()])


def measure(
    timers: dict[str, Timer],
    videos: dict[Path, np.ndarray],
    excluded: dict[tuple[str, Path], str],
    num_rounds: int,
) -> dict[Path, dict[str, list[float]]]:
    """Milliseconds by video and reader, one per round; who comes first goes round."""
    times: dict[Path, dict[str, list[float]]] = {path: {} for path in videos}
    for turn in range(num_rounds):
        for path, indices in videos.items():
            names = [name for name in timers if (name, path) not in excluded]
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                times[path].setdefault(name, []).append(timers[name](path, indices))
        print(f"round {turn + 1} of {num_rounds}", file=sys.stderr)
    return times


def summarise(
    times: dict[Path, dict[str, list[float]]], excluded: dict[tuple[str, Path], str]
) -> dict[str, Any]:
    """Medians by video, and geometric means of how much longer a peer takes."""
    rows = []
    ratios: dict[str, dict[str, list[float]]] = {}
    for path, by_reader in times.items():
        medians = {name: statistics.median(values) for name, values in by_reader.items()}
        modes = [value for name, value in medians.items() if name.startswith("torchcodec")]
        if modes:
            medians["torchcodec better mode"] = min(modes)
        with VideoReader(path) as reader:
            facts = {"codec": reader.codec, "width": reader.width, "height": reader.height}
            facts |= {"num_frames": reader.num_frames, "fallback": reader.fallback_reason}
        rows.append({"video": path.name, **facts, "median_ms": medians})
        for name, value in medians.items():
            for group in ("all", facts["codec"]):
                by_group = ratios.setdefault(name, {}).setdefault(group, [])
                by_group.append(value / medians[OURS])
    reasons = [{"reader": name, "video": p.name, "why": why} for (name, p), why in excluded.items()]
    readers = {name: version for name in PACKAGES if (version := version_of(name))}
    readers["ffmpeg"] = av.ffmpeg_version_info
    return {
        "ratios": {
            name: {
                group: {"geometric_mean": geometric_mean(values), "num_videos": len(values)}
                for group, values in by_group.items()
            }
            for name, by_group in ratios.items()
            if name != OURS
        },
        "videos": rows,
        "not_comparable": reasons,
        "versions": installed_versions() | readers,
    }


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def print_table(report: dict[str, Any]) -> None:
    names = list(report["ratios"])
    print(f"\n{'video':34} {'codec':6} {'ms':>7}  how many times as long: {', '.join(names)}")
    for row in report["videos"]:
        medians = row["median_ms"]
        cells = [f"{medians[n] / medians[OURS]:6.2f}" if n in medians else "     -" for n in names]
        print(f"{row['video'][-34:]:34} {row['codec']:6} {medians[OURS]:7.1f} {' '.join(cells)}")
    for each in report["not_comparable"]:
        print(f"{each['reader']} on {each['video']} does not count: it {each['why']}")
    print("\ngeometric means of the ratios")
    for name, by_group in report["ratios"].items():
        cells = [
            f"{group} {mean['geometric_mean']:.2f} ({mean['num_videos']})"
            for group, mean in by_group.items()
        ]
        print(f"{name:24} {'  '.join(cells)}")


if __name__ == "__main__":
    main()
