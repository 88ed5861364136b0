"""Windows that share frames, beside recomputed ones; and how many cameras a model carries.

    python benchmarks/bench_streams.py --backbone ViT-B-32 --output streams.json
    python benchmarks/bench_streams.py --bundle motions-bundle --streams 1 4 8 --output ages.json
    python benchmarks/bench_streams.py --bundle motions-bundle --streams 8 --soak 1800

Windows: a rendered video is scored in windows that share the features of their frames, and each
window by itself, in turns in one process; before that, both have to give the same scores bit for
bit. Visual work falls by T / k, and time by less, since the temporal graph runs for each window.

Streams: so many sources of motions, 12 frames a second with the clock of this machine in their
pixels, are watched for --seconds. The age of a frame at the answer is as `watch` tells it; what
the pixels of every 20th frame say is held against it. --soak watches for so long, and samples
memory, threads and open files.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from random_models import make_bundle
from workbench import make_bank, make_parser, time_in_turns, write_report

from actionclip_deploy import Bundle, Recognizer, Runtime, VideoReader, open_runtime
from actionclip_deploy.benchmarks.worker import resident_bytes
from actionclip_deploy.events import WatchedLabels
from actionclip_deploy.motions import EndlessMotions
from actionclip_deploy.stream import WindowGrid
from actionclip_deploy.timeline import Timeline, read_timeline
from actionclip_deploy.video import parse_source
from actionclip_deploy.video.live import LiveFrame
from actionclip_deploy.video.memory import ArrayVideo
from actionclip_deploy.video.pixels import read_clock
from actionclip_deploy.watch import Camera, WatchedBank, Watcher

_SETTLED_SECONDS = 5.0  # of a watch, whose frames are not counted: sources open, graphs warm up
_SAMPLE_SECONDS = 1.0
_FPS, _SECONDS = 16, 30


def main() -> None:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--backbone", default="ViT-B-32", help="of random weights")
    parser.add_argument("--precision", default="fp32", help="of random weights: fp32 or int8")
    parser.add_argument("--bundle", type=Path, help="in the place of random weights")
    parser.add_argument("--threads", type=int, help="of the runtime; by default the cores")
    parser.add_argument("--strides", type=int, nargs="*", default=[1, 2, 4, 8], help="grid steps")
    parser.add_argument("--streams", type=int, nargs="*", default=[], help="sources at a time")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each watch")
    parser.add_argument("--window", type=float, default=4.0)
    parser.add_argument("--soak", type=float, default=0.0, help="seconds of a long watch; 0: none")
    options = parser.parse_args()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle or make_bundle(options.backbone, options.precision, Path(folder))
        opened = Bundle.open(bundle)
        with open_runtime(opened, num_threads=options.threads) as runtime:
            bench = StreamBench(runtime, opened, options.window)
            report["model"] = opened.manifest.model.backbone
            report["precision"] = opened.manifest.precision()
            if not options.streams:
                video = render_video(Path(folder) / "long.mp4")
                report["windows"] = [
                    bench.windows(video, k, options.rounds) for k in options.strides
                ]
            report["streams"] = [bench.streams(n, options.seconds) for n in options.streams]
            if options.soak:
                report["soak"] = bench.soak(max(options.streams or [8]), options.soak)
    write_report(report, options.output)


def render_video(path: Path) -> Path:
    """Motions, 224 x 224 pixels, one after the other."""
    import av

    render = EndlessMotions(seed=0, size=224)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=_FPS)
        stream.width, stream.height, stream.pix_fmt = 224, 224, "yuv420p"
        for number in range(_FPS * _SECONDS):
            frame = av.VideoFrame.from_ndarray(render(number), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


class StreamBench:
    """Does the work of a long video and of cameras."""

    def __init__(self, runtime: Runtime, bundle: Bundle, window_seconds: float) -> None:
        self.runtime = runtime
        self.recognizer = Recognizer(runtime, make_bank(bundle))
        self.window_seconds = window_seconds

    def windows(self, video: Path, stride_steps: int, num_rounds: int) -> dict[str, Any]:
        """Windows that share frames beside the same ones by themselves."""
        num_frames = self.runtime.manifest.model.num_frames
        grid = WindowGrid(self.window_seconds, num_frames, stride_steps)
        shared = self._share(video, grid)
        alone = self._recompute(video, shared)
        if not np.array_equal(shared.scores, alone):
            difference = float(np.abs(shared.scores - alone).max())
            if self.runtime.manifest.precision() == "fp32":
                raise SystemExit(f"Windows that share frames score otherwise, by {difference:g}.")
        seconds = time_in_turns(
            {
                "shared": lambda: self._share(video, grid),
                "alone": lambda: self._recompute(video, shared),
            },
            num_rounds,
        )
        ratios = [a / s for a, s in zip(seconds["alone"], seconds["shared"], strict=True)]
        num_windows = len(shared.windows)
        encoded = shared.counts.num_frames - shared.counts.num_reused
        return {
            "stride_steps": stride_steps,
            "num_windows": num_windows,
            "frames_encoded": encoded,
            "frames_encoded_alone": num_windows * num_frames,
            "windows_per_second": {
                name: round(num_windows / statistics.median(values), 2)
                for name, values in seconds.items()
            },
            "times_as_fast": round(statistics.median(ratios), 3),
        }

    def _share(self, video: Path, grid: WindowGrid) -> Timeline:
        bank = self.recognizer.bank
        watched = WatchedLabels.of(bank, self.recognizer.method, thresholds=0.9)
        return read_timeline(self.recognizer, video, grid, watched=watched)

    def _recompute(self, video: Path, timeline: Timeline) -> np.ndarray:
        """Each window as a video of its own; its frames are read as those of the others."""
        rows = []
        per_window = round(timeline.grid.window_seconds * _FPS)
        with VideoReader(video) as reader:
            everything = reader.read(np.arange(reader.num_frames)).frames
        for window in timeline.windows:
            first = round(window.start_seconds * _FPS)
            cut = ArrayVideo(everything[first : first + per_window])
            rows.append(self.recognizer.predict(cut).scores)
        return np.stack(rows)

    def streams(self, count: int, seconds: float) -> dict[str, Any]:
        """Watch so many sources for a while."""
        print(f"{count} streams for {seconds:.0f} s", file=sys.stderr)
        errors: list[float] = []
        watcher = self._watcher(count, errors)
        usage = os.times()
        stop = threading.Event()
        thread = threading.Thread(target=watcher.run, args=(stop,))
        begin = time.monotonic()
        thread.start()
        time.sleep(_SETTLED_SECONDS)
        before = {state.name: state for state in watcher.states()}
        settled = {name: len(watcher.ages_ms(name)) for name in watcher.names}
        time.sleep(max(0.0, seconds - _SETTLED_SECONDS))
        states = watcher.states()
        ages = [age for name in watcher.names for age in watcher.ages_ms(name)[settled[name] :]]
        stop.set()
        thread.join()
        elapsed = time.monotonic() - begin
        spent = os.times()
        cpu_seconds = spent.user + spent.system - usage.user - usage.system
        windows = sum(state.windows - before[state.name].windows for state in states)
        dropped = sum(
            sum(state.windows_dropped.values()) - sum(before[state.name].windows_dropped.values())
            for state in states
        )
        percentiles = np.percentile(ages, (50, 95, 99)) if ages else (None,) * 3
        return {
            "num_streams": count,
            "frames_per_second_to_encode": round(
                count * self.runtime.manifest.model.num_frames / self.window_seconds, 3
            ),
            "windows": windows,
            "dropped": dropped,
            "age_ms": dict(
                zip(
                    ("p50", "p95", "p99"),
                    [None if p is None else round(float(p), 1) for p in percentiles],
                    strict=True,
                )
            ),
            # Of the times that frames have, beside the clock in their pixels.
            "clock_error_ms_max": round(max(errors, default=0.0), 1),
            "cores_busy": round(cpu_seconds / elapsed, 2),
        }

    def soak(self, count: int, seconds: float) -> dict[str, Any]:
        """Watch for long, and sample what the process holds."""
        watcher = self._watcher(count)
        stop = threading.Event()
        thread = threading.Thread(target=watcher.run, args=(stop,))
        thread.start()
        samples = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(_SAMPLE_SECONDS)
            num_files = sum(1 for _ in Path("/proc/self/fd").iterdir())
            samples.append((resident_bytes() / 2**20, threading.active_count(), num_files))
        states = watcher.states()
        stop.set()
        thread.join()
        settled = np.array(samples[len(samples) // 10 :])
        names = ("mib", "threads", "files")
        return {
            "num_streams": count,
            "seconds": seconds,
            "windows": sum(state.windows for state in states),
            "dropped": sum(sum(state.windows_dropped.values()) for state in states),
            "reconnects": sum(state.reconnects for state in states),
            **{
                f"{name}_{when}": round(float(value), 1)
                for place, name in enumerate(names)
                for when, value in (
                    ("start", settled[0, place]),
                    ("max", settled[:, place].max()),
                    ("end", settled[-1, place]),
                )
            },
        }

    def _watcher(self, count: int, errors: list[float] | None = None) -> Watcher:
        seen = 0

        def look(_: str, frame: LiveFrame) -> None:
            nonlocal seen
            seen += 1
            if errors is not None and seen % 20 == 0:
                shown = read_clock(frame.to_rgb(), now=time.time())
                errors.append(abs(frame.wall_seconds - shown) * 1000)

        cameras = [
            Camera(
                parse_source("test:clock", name=f"camera {number}"),
                window_seconds=self.window_seconds,
                thresholds=0.9,
            )
            for number in range(count)
        ]
        return Watcher(
            self.runtime,
            cameras,
            {"random": WatchedBank.of(self.recognizer.bank)},
            on_event=lambda _: None,
            on_frame=look,
            render=EndlessMotions(seed=0, size=224),
        )


if __name__ == "__main__":
    main()
