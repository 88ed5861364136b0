"""The whole way in two minutes: the default model becomes a bundle and recognises new videos.

    python scripts/demo.py [VIDEO ...]

Everything is written to demo/. The commands are those that a user types; they are shown.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from actionclip_deploy import Bundle, Runtime, open_runtime
from actionclip_deploy.motions import write_dataset
from actionclip_deploy.prompts import read_labels
from actionclip_deploy.train.annotations import read_annotations

FOLDER = Path("demo")
VIDEOS = FOLDER / "videos"
BUNDLE = FOLDER / "bundle"
PREDICTIONS = FOLDER / "predictions.png"
THROUGHPUT = FOLDER / "throughput.png"
MODEL = "motions"
SOME_VIDEOS_FAILED = 3

SEED = 2026  # training and the measurements in the documentation use 0
SPLITS = {"test": "trained on", "heldout": "never trained on"}
NUM_VIDEOS = 100  # of each split
NUM_DRAWN = 3  # of each, in the picture

BATCHES = (1, 8)
ROUNDS, WARM_UP = 15, 3
TOLERANCE = 1e-4  # of embeddings of unit norm, in fp32

console = Console()


def main(own_videos: list[Path]) -> None:
    """Run every step, then print what happened."""
    FOLDER.mkdir(exist_ok=True)
    for folder in (BUNDLE, VIDEOS):  # of an earlier run
        shutil.rmtree(folder, ignore_errors=True)
    table = Table(title="What happened", title_justify="left", show_lines=False)
    for heading in ("step", "result", "seconds"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")

    def step(name: str, action: Callable[[], str]) -> None:
        console.rule(f"[bold]{name}", align="left")
        start = time.perf_counter()
        result = action()
        table.add_row(name, escape(result), f"{time.perf_counter() - start:.1f}")

    step("render videos", render_videos)
    step("export the default model", export)
    step("verify", verify)
    step("build a label bank", build_labels)
    step("recognise", lambda: predict(own_videos))
    for split, what in SPLITS.items():
        step(f"accuracy, labels {what}", lambda split=split: evaluate(split))
    step("latency and throughput", measure_throughput)
    console.print(table)
    console.print(f"Look at {PREDICTIONS} and {THROUGHPUT}.", highlight=False)


def render_videos() -> str:
    """Render videos that the model has never seen, half of them of labels that it has not."""
    for split in SPLITS:
        write_dataset(VIDEOS, split, NUM_VIDEOS, SEED)
    return f"{len(SPLITS) * NUM_VIDEOS} videos in {VIDEOS}"


def export() -> str:
    """Turn the checkpoint that comes with the package into a bundle."""
    run("export", MODEL, "--output", BUNDLE)
    size = sum(path.stat().st_size for path in BUNDLE.rglob("*") if path.is_file())
    return f"{BUNDLE}, {size / 1e6:.0f} MB, agrees with PyTorch"


def verify() -> str:
    """Compare ONNX Runtime with the golden outputs in the bundle."""
    run("verify", BUNDLE)
    return "ONNX Runtime on this machine agrees with PyTorch"


def build_labels() -> str:
    """Embed every label in all templates."""
    run("labels", "build", BUNDLE, "--labels", VIDEOS / "labels.csv", "--name", "motions")
    return f"{len(read_labels(VIDEOS / 'labels.csv')):,} labels"


def predict(own_videos: list[Path]) -> str:
    """Score some videos under names that say what they show, and draw what was seen."""
    named = []
    for split, what in SPLITS.items():
        for path, label in read_shown(split)[:NUM_DRAWN]:
            named.append(VIDEOS / f"{label} ({what}).mp4")
            shutil.copy(path, named[-1])
    options = ("--labels", "motions", "--top-k", "3", "--plot", PREDICTIONS)
    code = run(
        *("predict", BUNDLE, *named, *own_videos),
        *options,
        allowed=(0, SOME_VIDEOS_FAILED),
    )
    number = len(named) + len(own_videos)
    what = f"{number} videos" if code == 0 else "some videos failed, see above"
    return f"{what}; picture in {PREDICTIONS}"


def evaluate(split: str) -> str:
    """Measure accuracy on the rendered videos of a split, among all labels."""
    report = FOLDER / f"{split}.json"
    run(
        *("evaluate", BUNDLE, VIDEOS / f"{split}.txt"),
        *("--labels", "motions", "--output", report),
    )
    measured = json.loads(report.read_text(encoding="utf-8"))
    return f"top-1 {measured['top1']:.1%} of {measured['num_videos']} videos"


def measure_throughput() -> str:
    """Time clips in ONNX Runtime and PyTorch in turns, once their answers agree."""
    bundle = Bundle.open(BUNDLE)
    size, num_frames = bundle.manifest.model.input_size, bundle.manifest.model.num_frames
    clips = np.random.default_rng(0).integers(
        0, 256, (max(BATCHES), num_frames, size, size, 3), dtype=np.uint8
    )
    checkpoint = Path(MODEL)
    with (
        open_runtime(bundle, "onnxruntime") as ours,
        open_runtime(bundle, "torch", checkpoint=checkpoint) as reference,
    ):
        runtimes = {"ONNX Runtime": ours, "PyTorch": reference}
        difference = np.abs(ours.encode_video(clips) - reference.encode_video(clips)).max()
        if difference > TOLERANCE:
            sys.exit(f"ONNX Runtime and PyTorch differ by {difference:.0e}; the demo stops here.")
        seconds = {batch: time_in_turns(runtimes, clips[:batch]) for batch in BATCHES}
    table = Table(title=f"Clips of {num_frames} frames", title_justify="left")
    for heading in ("batch", "runtime", "median ms", "p95 ms", "clips/s", "times PyTorch"):
        table.add_column(heading, justify="left" if heading == "runtime" else "right")
    for batch, measured in seconds.items():
        for name, values in measured.items():
            median = float(np.median(values))
            table.add_row(
                str(batch),
                name,
                f"{1e3 * median:.2f}",
                f"{1e3 * np.percentile(values, 95):.2f}",
                f"{batch / median:.0f}",
                f"{np.median(measured['PyTorch']) / median:.2f}",
            )
    console.print(table)
    draw_throughput(seconds)
    ratios = [
        np.median(found["PyTorch"]) / np.median(found["ONNX Runtime"]) for found in seconds.values()
    ]
    return (
        f"ONNX Runtime {ratios[0]:.1f} to {ratios[-1]:.1f} times as fast as PyTorch; "
        f"embeddings within {difference:.0e}"
    )


def time_in_turns(runtimes: dict[str, Runtime], clips: np.ndarray) -> dict[str, list[float]]:
    """Seconds of each round, the runtimes one after the other in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in runtimes}
    for number in range(WARM_UP + ROUNDS):
        for name, runtime in runtimes.items():
            start = time.perf_counter()
            runtime.encode_video(clips)
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def draw_throughput(seconds: dict[int, dict[str, list[float]]]) -> None:
    """Draw throughput by batch and runtime."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    names = list(seconds[BATCHES[0]])
    for place, name in enumerate(names):
        rates = [batch / np.median(found[name]) for batch, found in seconds.items()]
        bars = axes.bar(np.arange(len(BATCHES)) + 0.4 * place, rates, width=0.38, label=name)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(np.arange(len(BATCHES)) + 0.2, [str(batch) for batch in BATCHES])
    axes.set_ylabel("clips per second")
    axes.set_xlabel("clips in a call")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(THROUGHPUT, dpi=120)


def read_shown(split: str) -> list[tuple[Path, str]]:
    """Each video of a split and the label that it shows."""
    labels = read_labels(VIDEOS / "labels.csv")
    samples = read_annotations(VIDEOS / f"{split}.txt", labels, format="videos")
    return [(sample.path, labels[sample.label_ids[0]]) for sample in samples]


def run(*arguments: str | Path, allowed: tuple[int, ...] = (0,)) -> int:
    """Run `actionclip` as a user would, and stop the demo if it fails."""
    words = [str(argument) for argument in arguments]
    command = f"$ actionclip {shlex.join(words)}"
    console.print(command, style="bold", markup=False, highlight=False, soft_wrap=True)
    program = Path(sys.executable).with_name("actionclip")
    code = subprocess.run([program, *words], check=False).returncode
    if code not in allowed:
        sys.exit(f"actionclip {words[0]} exited with {code}; the demo stops here.")
    return code


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
