"""Runtimes and precisions beside each other, quiet and with a busy neighbour, and `auto` as well.

    python benchmarks/bench_runtimes.py --work FOLDER --threads 2
    python benchmarks/bench_runtimes.py --work FOLDER --backbone ViT-B-16 --clips 1

Each row is a process of its own that opens what a pipeline would. All take turns in each round,
another one first, quiet and with a neighbour that never rests. Ratios are medians over the rounds
of the ratio to ONNX Runtime in fp32 whose threads spin, its default, in the same round: above 1 is
faster. The cosine is the smallest to PyTorch's embeddings of the golden clips.

`auto` chooses anew for each number of clips, from what its bundle allows; its row tells what it
took, and its best row by hand is told beside it. --work is where ViT-B/32 or B/16 with random
weights lie in fp32 and static int8, or are exported to. --output is added to.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from bench_contention import Rows
from bench_int8 import WANTED, export_bundles
from workbench import make_parser, write_report

from actionclip_deploy import Bundle, open_runtime
from actionclip_deploy.runtimes.machine import SPIN_VARIABLE, cpu_has_bf16
from actionclip_deploy.runtimes.parity import Golden

BASE = "onnxruntime fp32, spins"
FP32, INT8 = "onnxruntime fp32", "onnxruntime int8 static"
# By name: the bundle, the runtime, what it computes in, and how its threads wait.
ROWS: dict[str, tuple[str, str, str | None, str]] = {
    BASE: (FP32, "onnxruntime", None, "-1"),
    "torch eager": (FP32, "torch", None, ""),
    "onnxruntime fp32": (FP32, "onnxruntime", None, ""),
    "openvino fp32": (FP32, "openvino", None, ""),
    "openvino bf16": (FP32, "openvino", "bf16", ""),
    "onnxruntime int8, spins": (INT8, "onnxruntime", None, "-1"),
    "onnxruntime int8": (INT8, "onnxruntime", None, ""),
    "openvino int8": (INT8, "openvino", None, ""),
    "openvino int8, the rest bf16": (INT8, "openvino", "bf16", ""),
    "auto of fp32": (FP32, "auto", None, ""),
    "auto of fp32, bf16 allowed": (FP32, "auto", "bf16", ""),
    "auto of int8, bf16 allowed": (INT8, "auto", "bf16", ""),
}
# The rows by hand that each of auto could take.
BY_HAND = {
    "auto of fp32": ("onnxruntime fp32", "openvino fp32"),
    "auto of fp32, bf16 allowed": ("onnxruntime fp32", "openvino fp32", "openvino bf16"),
    "auto of int8, bf16 allowed": (
        *("onnxruntime int8", "openvino int8", "openvino int8, the rest bf16"),
    ),
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the bundles")
    parser.add_argument("--backbone", default="ViT-B-32", choices=list(WANTED))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clips", type=int, nargs="+", default=[1, 4], help="in a call")
    parser.add_argument("--without", nargs="*", default=[], metavar="WORD", help="rows with it")
    options = parser.parse_args()
    folder = options.work / options.backbone
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, exported = export_bundles(options.backbone, folder)
    bundles = {name: bundle.path for name, bundle in exported.items()}
    chosen = {
        name: (bundles[bundle], checkpoint, *rest, options.threads, options.clips)
        for name, (bundle, *rest) in ROWS.items()
        if (cpu_has_bf16() or rest[1] is None) and not {*name.split()} & {*options.without}
    }
    rows = Rows(_encode, chosen)
    try:
        found = rows.take_turns(options.rounds, BASE)
    finally:
        rows.close()
    for numbers in found.values():
        _judge_auto(numbers, options.clips)
    took = {name: told for name, told in rows.told.items() if name.startswith("auto")}
    found["auto took"] = took
    known: dict[str, Any] = {}
    if options.output is not None and options.output.exists():
        known = json.loads(options.output.read_text(encoding="utf-8"))["results"]
    name = f"{options.backbone}, {options.threads} threads"
    write_report({"results": {**known, name: found}}, options.output, prints=False)
    print(json.dumps({name: found}, indent=1))


def _judge_auto(numbers: dict[str, Any], clips: list[int]) -> None:
    """Say what share of the best row by hand `auto` gets."""
    for name, rivals in BY_HAND.items():
        for count in clips:
            what = f"{count} clips, clips/s"
            rates = {rival: numbers[rival][what] for rival in rivals if rival in numbers}
            if name in numbers:
                best = max(rates, key=lambda rival: rates[rival])
                numbers[name][f"{count} clips, best by hand"] = best
                share = numbers[name][what] / rates[best]
                numbers[name][f"{count} clips, of the best by hand"] = round(share, 3)


def _encode(
    end: Connection,
    path: Path,
    checkpoint: Path,
    name: str,
    precision: str | None,
    spin_us: str,
    threads: int,
    clips: list[int],
) -> None:
    os.environ[SPIN_VARIABLE] = spin_us
    bundle = Bundle.open(path, verify=False)
    golden = Golden.load(bundle)
    model = bundle.manifest.model
    shape = (max(clips), model.num_frames, model.input_size, model.input_size, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with contextlib.ExitStack() as stack:
        runtimes = {
            count: stack.enter_context(
                open_runtime(
                    *(bundle, name),
                    precision=precision,
                    num_threads=threads,
                    checkpoint=checkpoint if name == "torch" else None,
                    prefer="latency" if count == 1 else "throughput",
                    cache=name != "auto",
                )
            )
            for count in clips
        }
        cosines = [
            float((runtime.encode_video(golden.frames) * golden.video_embeddings).sum(1).min())
            for runtime in runtimes.values()
        ]
        end.send({str(count): str(runtime.describe()) for count, runtime in runtimes.items()})
        with contextlib.suppress(EOFError):
            while end.recv():
                answer: dict[str, float] = {}
                for count, runtime in runtimes.items():
                    answer[f"{count} clips, clips/s"] = statistics.median(
                        _rate(runtime, frames[:count]) for _ in range(3 if count == 1 else 1)
                    )
                answer["cosine"] = min(cosines)
                end.send(answer)


def _rate(runtime: Any, frames: np.ndarray) -> float:
    began = time.perf_counter()
    runtime.encode_video(frames)
    return len(frames) / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
