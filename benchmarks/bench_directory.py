"""Scoring a folder: reading and computing at the same time, beside each of the two alone.

    python benchmarks/bench_directory.py --bundle bundle --videos FOLDER --output directory.json

In each round the same videos are read only, computed only (from pixels in memory), and scored by
`Recognizer.predict_all`, which does both at once. The throughput to compare with is that of the
slower stage; each stage alone has the threads that it has in the pipeline, no more. Before, the
answers of the pipeline are compared with those of one video at a time. Without --videos, some are
rendered. --memory-videos scores that many videos, round and round, and samples the memory in use.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from workbench import find_videos, make_bank, make_parser, render_videos, write_report

from actionclip_deploy import Bundle, Prediction, Recognizer, VideoReader, open_runtime
from actionclip_deploy.benchmarks.worker import resident_bytes
from actionclip_deploy.runtimes.call_sizes import CallSizes
from actionclip_deploy.views import (
    Stopwatch,
    VideoFrames,
    ViewReader,
    encode_views,
    work_ahead,
)

# Of scores. Views of several videos are fused in one call, whose last bits depend on its rows.
TOLERANCE = 1e-5


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="of a model of frames apart")
    parser.add_argument("--videos", type=Path, help="searched with its subfolders")
    parser.add_argument("--max-videos", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1, help="of the runtime")
    parser.add_argument("--workers", type=int, default=1, help="threads that read")
    parser.add_argument("--memory-videos", type=int, default=0, help="score so many; 0 leaves out")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_runtime(bundle, num_threads=options.threads) as runtime,
    ):
        if not runtime.frames_are_independent:
            parser.error("--bundle mixes the frames of a clip; give one of another visual prompt.")
        videos = find_videos(options.videos or render_videos(Path(folder)), options.max_videos)
        if not videos:
            parser.error(f"--videos is {options.videos}; no video is in there.")
        bench = DirectoryBench(Recognizer(runtime, make_bank(bundle)), options.workers)
        videos = bench.check_answers(videos)
        report = bench.measure(videos, options.rounds)
        if options.memory_videos:
            report["memory"] = bench.sample_memory(videos, options.memory_videos)
    report |= {"threads": options.threads, "workers": options.workers}
    write_report(report, options.output)


class DirectoryBench:
    """Does the work of a folder, in whole and in halves."""

    def __init__(self, recognizer: Recognizer, num_workers: int) -> None:
        self.recognizer = recognizer
        self.num_workers = num_workers
        self.view_reader = ViewReader(recognizer.runtime.manifest, recognizer.views, "frame")

    def check_answers(self, videos: list[Path]) -> list[Path]:
        """Compare with one video at a time; gives the videos that can be read."""
        outcomes = list(self.recognizer.predict_all(videos, num_workers=self.num_workers))
        good = [outcome for outcome in outcomes if isinstance(outcome, Prediction)]
        for outcome in good:
            alone = self.recognizer.predict(outcome.video)
            if not np.allclose(alone.scores, outcome.scores, rtol=0, atol=TOLERANCE):
                raise SystemExit(f"{outcome.video} scores otherwise among others than alone.")
        return [outcome.video for outcome in good]

    def measure(self, videos: list[Path], num_rounds: int) -> dict[str, Any]:
        """Time the halves and the whole, round by round."""
        pixels = list(self.read(videos))
        stages = {
            "read": lambda: sum(1 for _ in self.read(videos)),
            "compute": lambda: self.compute(pixels),
            "both": lambda: sum(
                1 for _ in self.recognizer.predict_all(videos, num_workers=self.num_workers)
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in stages}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in stages}
        for turn in range(num_rounds):
            for name, stage in stages.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                stage()
                seconds[name].append(time.perf_counter() - start)
                cpu_seconds[name].append(time.process_time() - cpu_start)
            print(f"round {turn + 1} of {num_rounds}", file=sys.stderr)
        rounds = zip(*seconds.values(), strict=True)
        ratios = [max(read, compute) / both for read, compute, both in rounds]
        return {
            "num_videos": len(videos),
            "num_rounds": num_rounds,
            "videos_per_second": {
                name: round(len(videos) / statistics.median(values), 3)
                for name, values in seconds.items()
            },
            # On a busy machine these say more: both together should take no more than the two.
            "cpu_seconds": {n: round(statistics.median(v), 3) for n, v in cpu_seconds.items()},
            "of_slower_stage_median": round(statistics.median(ratios), 3),
            "of_slower_stage_by_round": [round(ratio, 3) for ratio in ratios],
        }

    def read(self, videos: list[Path]) -> Iterator[VideoFrames]:
        """Read the frames of videos and compute nothing."""

        def work(path: Path, stop: Event) -> VideoFrames:
            with VideoReader(path) as reader:
                return self.view_reader.read(reader, path, Stopwatch(), stop)

        return work_ahead(videos, work, num_workers=self.num_workers, max_ahead=32)

    def compute(self, videos: list[VideoFrames]) -> None:
        """Score videos of which the frames are there."""
        runtime = self.recognizer.runtime
        sizes = CallSizes.of_videos(runtime.manifest.model)
        for encoded in encode_views(runtime, videos, sizes=sizes):
            self.recognizer.ranker.rank(encoded.embeddings)

    def sample_memory(self, videos: list[Path], count: int) -> dict[str, float]:
        """Megabytes in use after a tenth of the videos, at most from then on, and at the end."""
        endless = islice(cycle(videos), count)
        outcomes = self.recognizer.predict_all(endless, num_workers=self.num_workers)
        samples = [resident_bytes() / 2**20 for _ in outcomes]
        settled = samples[count // 10 :]
        names = ("start_mib", "max_mib", "end_mib")
        values = (settled[0], max(settled), settled[-1])
        return {"num_videos": count} | {n: round(v, 1) for n, v in zip(names, values, strict=True)}


if __name__ == "__main__":
    main()
