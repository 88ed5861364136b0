"""An fp16 bundle on an NVIDIA GPU: the share of the matrix-product rate, latency, videos a second.

    python benchmarks/bench_cuda.py --rounds 20 --output cuda.json

Needs PyTorch with CUDA and onnxruntime-gpu. Models are full-size with random weights; each bundle
is compared with PyTorch on the GPU before anything is timed. For the share, the graph runs on
buffers that lie on the GPU, and the rate is that of bf16 products in the same run. Latency and
videos a second are of calls as a user makes them, with copies both ways. FLOPs are the model's,
although the graph computes about 7% fewer.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from random_models import make_bundle
from workbench import make_parser, settings_of, time_in_turns, write_report

from actionclip_deploy import Bundle, open_runtime, verify_bundle
from actionclip_deploy.runtimes.machine import cuda_devices

BATCH = 256  # frames
# Paper, Table 7: videos a second on an RTX 3090, one view.
PAPER_VIDEOS_PER_SECOND = {
    ("ViT-B-32", 8): 144.7,
    ("ViT-B-16", 8): 43.2,
    ("ViT-B-16", 16): 21.2,
    ("ViT-B-16", 32): 13.0,
}


def main() -> None:
    parser = make_parser(__doc__, rounds=20)
    parser.add_argument("--backbones", default="ViT-B-32,ViT-B-16")
    given = parser.parse_args()
    devices, why_none = cuda_devices()
    if not devices:
        sys.exit(f"This benchmark needs an NVIDIA GPU and found none: {why_none}.")
    import torch

    from actionclip_deploy.benchmarks.worker import matmul_rate

    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a PyTorch with CUDA; install one for this driver.")
    results: dict[str, Any] = {}
    for backbone in given.backbones.split(","):
        with tempfile.TemporaryDirectory() as folder:
            make_bundle(backbone, "fp16", Path(folder))
            rate = matmul_rate(1, torch=torch).flops_per_second
            results[backbone] = measure(backbone, Path(folder), given.rounds, rate)
    report = {"results": results, "settings": settings_of(given), "gpus": devices}
    write_report(report, given.output)


def measure(backbone: str, folder: Path, rounds: int, rate: float) -> dict[str, Any]:
    """All numbers of one backbone."""
    bundle = Bundle.open(folder / "bundle")
    flops = bundle.manifest.model.num_flops / bundle.manifest.model.num_frames
    result: dict[str, Any] = {"bf16_matmul_flops_per_second": rate}
    checkpoint = folder / "random-8f.pt"
    with (
        open_runtime(bundle, execution_provider="cuda") as plain,
        open_runtime(bundle, execution_provider="cuda", cuda_graphs=True) as recorded,
        open_runtime(bundle, "torch", device="cuda", checkpoint=checkpoint) as reference,
    ):
        rows = {"onnxruntime": plain, "onnxruntime, CUDA graphs": recorded, "torch": reference}
        for runtime in (plain, recorded):
            verify_bundle(bundle, runtime).check()
        one, many = _frames(bundle, 1), _frames(bundle, BATCH)
        result["frame_latency_ms"] = _medians(
            {name: lambda r=r: r.encode_frames(one) for name, r in rows.items()}, rounds
        )
        result["batch_ms"] = _medians(
            {name: lambda r=r: r.encode_frames(many) for name, r in rows.items()}, rounds
        )
        for name, runtime in (("onnxruntime", plain), ("onnxruntime, CUDA graphs", recorded)):
            seconds = _seconds_on_the_gpu(runtime, many.shape, rounds)
            result[f"share_of_matmul_rate, {name}"] = flops * BATCH / seconds / rate
        result["videos_per_second"] = _videos_per_second(backbone, bundle, rows, rounds)
    latency = result["frame_latency_ms"]
    result["latency_times"] = {name: latency["torch"] / latency[name] for name in rows}
    return result


def _frames(bundle: Bundle, *shape: int) -> np.ndarray:
    size = bundle.manifest.model.input_size
    return np.random.default_rng(0).integers(0, 256, (*shape, size, size, 3), dtype=np.uint8)


def _medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of calls that take turns; each ends when its result is on the host."""
    times = time_in_turns(calls, rounds, num_warm_up=5)  # records, and raises the clocks
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def _seconds_on_the_gpu(runtime: Any, shape: tuple[int, ...], rounds: int) -> float:
    """Of one run on buffers that are filled already; ONNX Runtime waits for the end of each."""
    device = runtime._sessions["visual"]

    def run() -> float:
        buffers = device._buffers(shape)
        begin = time.perf_counter()
        device._session.run_with_iobinding(buffers.binding, buffers.options)
        return time.perf_counter() - begin

    return statistics.median([device._thread.call(run) for _ in range(rounds)])


def _videos_per_second(
    backbone: str, bundle: Bundle, rows: dict[str, Any], rounds: int
) -> dict[str, Any]:
    """Videos of T frames in batches of 256 frames, decoded already, beside the paper's."""
    table = {}
    for (name, num_frames), paper in PAPER_VIDEOS_PER_SECOND.items():
        if name != backbone:
            continue
        num_clips = BATCH // num_frames
        clips = _frames(bundle, num_clips, num_frames)
        calls = {row: lambda r=r, c=clips: r.encode_video(c) for row, r in rows.items()}
        medians = _medians(calls, rounds)
        table[f"{num_frames} frames"] = {
            "paper, RTX 3090": paper,
            **{row: 1e3 * num_clips / ms for row, ms in medians.items()},
        }
    return table


if __name__ == "__main__":
    main()
