"""Scoring a folder: reading and computing at the same time, beside each of the two alone.

    python benchmarks/bench_directory.py --bundle bundle --videos FOLDER --output directory.json

In each round the same videos are read only, computed only (from pixels in memory), and scored by
`Recognizer.predict_all`, which does both at once. The throughput to compare with is that of the
slower stage; each stage alone has the threads that it has in the pipeline, no more. Before, the
answers of the pipeline are compared with those of one video at a time. Without --videos, some are
rendered. --memory-videos scores that many videos, round and round, and samples the memory in use.

--reuse measures something else: folders of videos that differ, of copies (each video four times)
and of pictures that stand still, with frames that are equal encoded once and with each encoded, in
turns. Before, both have to give the same scores; bit for bit in fp32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from workbench import (
    compute_views,
    find_videos,
    make_bank,
    make_parser,
    read_videos,
    render_videos,
    time_in_turns,
    write_report,
)

from actionclip_deploy import Bundle, Prediction, Recognizer, open_runtime
from actionclip_deploy.benchmarks.worker import resident_bytes

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
    parser.add_argument("--reuse", action="store_true", help="what encoding equal frames once does")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_runtime(bundle, num_threads=options.threads) as runtime,
    ):
        if not runtime.frames_are_independent:
            parser.error("--bundle mixes the frames of a clip; give one of another visual prompt.")
        if options.reuse:
            bank = make_bank(bundle)
            recognizers = [Recognizer(runtime, bank, reuse=reuse) for reuse in (True, False)]
            found = measure_reuse(*recognizers, Path(folder), options)
            write_report({"reuse": found, "threads": options.threads}, options.output)
            return
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


def measure_reuse(
    once: Recognizer, each: Recognizer, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Encode equal frames once and each of them, in folders of three kinds."""
    count = options.max_videos
    different = find_videos(render_videos(make_folder(folder / "different"), count), count)
    still = find_videos(render_videos(make_folder(folder / "still"), count, step=0), count)
    kinds = {"different": different, "copies": different[: -(-count // 4)] * 4, "still": still}
    return {name: measure_kind(once, each, kind, options) for name, kind in kinds.items()}


def make_folder(path: Path) -> Path:
    """Make a folder."""
    path.mkdir()
    return path


def measure_kind(
    once: Recognizer, each: Recognizer, videos: list[Path], options: argparse.Namespace
) -> dict[str, Any]:
    """Time both on the same videos, and count frames."""

    def run(recognizer: Recognizer) -> list[Prediction]:
        outcomes = recognizer.predict_all(videos, num_workers=options.workers)
        return [outcome for outcome in outcomes if isinstance(outcome, Prediction)]

    found = run(once)
    for one, other in zip(found, run(each), strict=True):
        if not np.array_equal(one.scores, other.scores):
            difference = float(abs(one.scores - other.scores).max())
            if once.runtime.manifest.precision() == "fp32":
                raise SystemExit(f"{one.video} scores otherwise, by {difference:g}.")
    calls = {"once": lambda: run(once), "each": lambda: run(each)}
    seconds = time_in_turns(calls, options.rounds)
    cpu_seconds = time_in_turns(calls, 3, clock=time.process_time)
    ratios = [b / a for a, b in zip(seconds["once"], seconds["each"], strict=True)]
    hashing = sum(outcome.timings_ms["hash"] for outcome in found) / 1000
    return {
        "num_videos": len(videos),
        "frames_encoded": sum(outcome.num_frames_encoded or 0 for outcome in found),
        "frames_reused": sum(outcome.num_frames_reused or 0 for outcome in found),
        "videos_per_second": {
            name: round(len(videos) / statistics.median(values), 3)
            for name, values in seconds.items()
        },
        "times_as_fast_median": round(statistics.median(ratios), 3),
        "times_as_fast_by_round": [round(ratio, 3) for ratio in ratios],
        "hashing_of_cpu_seconds": round(hashing / statistics.median(cpu_seconds["each"]), 5),
    }


class DirectoryBench:
    """Does the work of a folder, in whole and in halves."""

    def __init__(self, recognizer: Recognizer, num_workers: int) -> None:
        self.recognizer = recognizer
        self.num_workers = num_workers

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
        pixels = list(read_videos(self.recognizer, videos, self.num_workers))
        stages = {
            "read": lambda: sum(1 for _ in read_videos(self.recognizer, videos, self.num_workers)),
            "compute": lambda: compute_views(self.recognizer, pixels),
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
