"""int8 beside fp32 and PyTorch: full-size towers with random weights, interleaved rounds, ratios.

    python benchmarks/bench_int8.py --output int8.json
    python benchmarks/bench_int8.py --backbones ViT-B-32 --rounds 3 --threads 1

The answers are checked before anything is timed. Videos for the static recipe are rendered.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from random_models import NUM_FRAMES, write_checkpoint
from workbench import make_parser, time_in_turns, write_report

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.export import Int8Options, export_checkpoint
from actionclip_deploy.model import load_checkpoint
from actionclip_deploy.motions import write_dataset
from actionclip_deploy.runtimes.ort import OrtRuntime
from actionclip_deploy.runtimes.parity import Golden
from actionclip_deploy.runtimes.pyt import TorchRuntime

MIN_COSINE = 0.999
# Ratios to PyTorch eager that the dynamic recipe has to reach, at 8 frames a call.
WANTED = {"ViT-B-32": 1.75, "ViT-B-16": 2.4}

Encode = Callable[[np.ndarray], np.ndarray]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--backbones", nargs="+", default=list(WANTED), choices=list(WANTED))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder to keep checkpoints and bundles in")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.threads < 1:
        parser.error("--rounds and --threads must be 1 or more")
    return arguments


def export_bundles(backbone: str, folder: Path) -> tuple[Path, dict[str, Bundle]]:
    """Make a checkpoint with random weights, and its bundles by what they are called here."""
    checkpoint = folder / f"{backbone.lower()}-{NUM_FRAMES}f.pt"
    if not checkpoint.exists():
        write_checkpoint(backbone, checkpoint)
    videos = folder / "videos"
    if not videos.exists():
        write_dataset(videos, "train", 32, seed=5)
    dynamic, static = Int8Options(), Int8Options(calibration=(videos,))
    recipes: dict[str, Int8Options | None] = {
        "onnxruntime fp32": None,
        "onnxruntime int8 dynamic": dynamic,
        "onnxruntime int8 static": static,
    }
    bundles = {}
    for name, options in recipes.items():
        output = folder / f"{backbone}-{name.replace(' ', '-')}"
        if not output.exists():
            precision = "fp32" if options is None else "int8"
            export_checkpoint(checkpoint, output, precision=precision, int8=options)
        bundles[name] = Bundle.open(output)
    return checkpoint, bundles


def check_answers(encoders: dict[str, Encode], golden: Golden) -> dict[str, float]:
    """Smallest cosine of frame features to PyTorch's; stops where one is below the bound."""
    assert golden.frame_features is not None
    cosines = {}
    for name, encode in encoders.items():
        rows = [
            (encode(clip), wanted)
            for clip, wanted in zip(golden.frames, golden.frame_features, strict=True)
        ]
        given, wanted = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        norms = np.linalg.norm(given, axis=1) * np.linalg.norm(wanted, axis=1)
        cosines[name] = float(((given * wanted).sum(axis=1) / norms).min())
        if cosines[name] < MIN_COSINE:
            sys.exit(f"{name} has a cosine of {cosines[name]:.6f} to PyTorch, below {MIN_COSINE}.")
    return cosines


def measure_backbone(
    backbone: str, folder: Path, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row for each candidate."""
    checkpoint, bundles = export_bundles(backbone, folder)
    golden = Golden.load(bundles["onnxruntime fp32"])
    with ExitStack() as stack:
        manifest = bundles["onnxruntime fp32"].manifest
        model = load_checkpoint(checkpoint).model
        eager = TorchRuntime(manifest, model, num_threads=arguments.threads)
        encoders: dict[str, Encode] = {"torch eager": stack.enter_context(eager).encode_frames}
        for name, bundle in bundles.items():
            runtime = OrtRuntime(bundle, num_threads=arguments.threads)
            encoders[name] = stack.enter_context(runtime).encode_frames
        cosines = check_answers(encoders, golden)
        calls = {name: partial(encode, golden.frames[0]) for name, encode in encoders.items()}
        seconds = time_in_turns(calls, arguments.rounds, num_warm_up=1)
    times = {name: [1e3 * each for each in values] for name, values in seconds.items()}
    baseline = times["torch eager"]
    rows = []
    for name, values in times.items():
        ratios = [slow / fast for slow, fast in zip(baseline, values, strict=True)]
        graph = bundles[name].manifest.files["visual.onnx"] if name in bundles else None
        rows.append(
            {
                "backbone": backbone,
                "candidate": name,
                "median_ms": round(statistics.median(values), 2),
                "ratio_to_eager": round(statistics.median(baseline) / statistics.median(values), 3),
                "ratio_lowest_round": round(min(ratios), 3),
                "ratio_highest_round": round(max(ratios), 3),
                "min_cosine": round(cosines[name], 7),
                "visual_graph_bytes": graph.size_bytes if graph else None,
                "times_ms": [round(value, 2) for value in values],
            }
        )
    return rows


def main() -> None:
    """Measure, print, and write."""
    arguments = parse_arguments()
    rows = []
    with ExitStack() as stack:
        folder = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for backbone in arguments.backbones:
            measured = measure_backbone(backbone, folder, arguments)
            for row in measured:
                print(
                    f"{row['backbone']:9} {row['candidate']:25} {row['median_ms']:9.1f} ms  "
                    f"{row['ratio_to_eager']:5.2f}x  (rounds {row['ratio_lowest_round']:.2f} to "
                    f"{row['ratio_highest_round']:.2f})  cosine {row['min_cosine']:.6f}",
                    flush=True,
                )
            rows += measured
    report = {
        "frames_per_call": NUM_FRAMES,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "rows": rows,
    }
    write_report(report, arguments.output, prints=False)
    for row in rows:
        slow = row["ratio_to_eager"] < WANTED[row["backbone"]]
        if row["candidate"].endswith("dynamic") and slow:
            sys.exit(f"{row['backbone']} in int8 is below {WANTED[row['backbone']]}x of eager.")


if __name__ == "__main__":
    main()
