"""How long a start takes: the import, a first start, and a later one with the cached graphs.

    python benchmarks/bench_start.py --rounds 9 --output start.json
    python benchmarks/bench_start.py --runtimes onnxruntime openvino --bundle FOLDER

Every start is a process of its own, in rounds: without a cache, with an empty cache, and with the
cache that the one before filled. What is timed begins after Python's own imports and ends with the
first answer. `load` is that without the time of the calls themselves, which no cache can shorten.
The answers of a runtime must be the same bits. Without --bundle, one with random weights is made.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from random_models import make_bundle
from workbench import make_parser, settings_of, time_in_turns, write_report

KINDS = ("no cache", "first start", "second start")

START = """
import hashlib, importlib, json, sys, time
import numpy as np
from actionclip_deploy import Bundle, open_runtime
import actionclip_deploy.runtimes.graph_cache
bundle, cache, threads, name = sys.argv[1], sys.argv[2] or False, int(sys.argv[3]), sys.argv[4]
importlib.import_module({"onnxruntime": "actionclip_deploy.runtimes.ort",
                         "openvino": "actionclip_deploy.runtimes.ov"}[name])
clock = time.perf_counter
begin = clock()
opened = Bundle.open(bundle)
size, frames = opened.manifest.model.input_size, opened.manifest.model.num_frames
clip = np.random.default_rng(0).integers(0, 256, (1, frames, size, size, 3), dtype=np.uint8)
tokens = np.ones((1, 8), np.int32)
with open_runtime(opened, name, cache=cache, num_threads=threads) as runtime:
    video = runtime.encode_video(clip)
    first = clock() - begin
    text = runtime.encode_text(tokens)
    both = clock() - begin
    calls, texts = [], []
    for _ in range(5):
        begin = clock(); runtime.encode_video(clip); calls.append(clock() - begin)
        begin = clock(); runtime.encode_text(tokens); texts.append(clock() - begin)
calls, texts = sorted(calls)[2], sorted(texts)[2]
answer = hashlib.sha256(video.tobytes() + text.tobytes()).hexdigest()
print(json.dumps({"first answer": first, "load": first - calls,
                  "load with text": both - calls - texts, "answer": answer}))
"""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--bundle", type=Path, help="an exported bundle")
    parser.add_argument("--backbone", default="ViT-B-32", help="of the bundle that is made")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--runtimes", nargs="+", default=["onnxruntime"], choices=("onnxruntime", "openvino")
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = given.bundle or make_bundle(given.backbone, given.precision, Path(folder))
        starts = measure_starts(
            bundle, Path(folder) / "cache", given.rounds, given.threads, given.runtimes
        )
    report = {
        "starts": {name: summarise_starts(of_one) for name, of_one in starts.items()},
        "imports": measure_imports(given.rounds),
        "settings": settings_of(given),
    }
    write_report(report, given.output)


def measure_starts(
    bundle: Path, cache: Path, rounds: int, threads: int, runtimes: list[str]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Start each runtime in each way once per round; checks that all of one answer alike."""
    time.sleep(3)  # a bundle written just now would be read again by the second start
    starts: dict[str, dict[str, list[dict[str, Any]]]] = {
        name: {kind: [] for kind in KINDS} for name in runtimes
    }
    for _ in range(rounds):
        shutil.rmtree(cache, ignore_errors=True)
        for kind in KINDS:
            folder = "" if kind == "no cache" else str(cache)
            for name in runtimes:
                command = [sys.executable, "-c", START, str(bundle), folder, str(threads), name]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                starts[name][kind].append(json.loads(done.stdout))
    for name, kinds in starts.items():
        answers = {start["answer"] for kind in KINDS for start in kinds[kind]}
        if len(answers) != 1:
            raise SystemExit(f"The starts of {name} gave {len(answers)} different answers.")
    return starts


def summarise_starts(starts: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians in seconds, and medians over rounds of the ratios to the second start."""
    summary: dict[str, Any] = {}
    for what in ("load", "load with text", "first answer"):
        seconds = {kind: [start[what] for start in starts[kind]] for kind in KINDS}
        second = seconds["second start"]
        summary[what] = {
            kind: {
                "median_seconds": statistics.median(seconds[kind]),
                "min_seconds": min(seconds[kind]),
                "times_the_second": statistics.median(
                    a / b for a, b in zip(seconds[kind], second, strict=True)
                ),
            }
            for kind in KINDS
        }
    return summary


def measure_imports(rounds: int) -> dict[str, Any]:
    """Seconds that the package's and torch's imports take beyond an empty program."""
    programs = {"nothing": "pass", "package": "import actionclip_deploy", "torch": "import torch"}
    calls = {
        name: partial(subprocess.run, [sys.executable, "-c", program], check=True)
        for name, program in programs.items()
    }
    seconds = time_in_turns(calls, rounds, num_warm_up=1)
    rows = list(zip(*seconds.values(), strict=True))
    return {
        "package_seconds": statistics.median(package - empty for empty, package, _ in rows),
        "torch_seconds": statistics.median(torch - empty for empty, _, torch in rows),
        "ratio": statistics.median((package - n) / (torch - n) for n, package, torch in rows),
    }


if __name__ == "__main__":
    main()
