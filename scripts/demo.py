"""The whole way in a minute: the default model becomes a bundle and recognises new videos.

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

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from actionclip_deploy.benchmarks import read_report
from actionclip_deploy.evaluate.annotations import read_annotations
from actionclip_deploy.motions import write_dataset
from actionclip_deploy.prompts import read_labels

FOLDER = Path("demo")
VIDEOS = FOLDER / "videos"
BUNDLE = FOLDER / "bundle"
PREDICTIONS = FOLDER / "predictions.png"
BENCHMARK = FOLDER / "benchmark.json"
THROUGHPUT = FOLDER / "throughput.png"
MODEL = "motions"
SOME_VIDEOS_FAILED = 3

SEED = 2026  # training and the measurements in the documentation use 0
SPLITS = {"test": "trained on", "heldout": "never trained on"}
NUM_VIDEOS = 100  # of each split
NUM_DRAWN = 3  # of each, in the picture

WHAT_COMES = (
    "Eight steps, about a minute, without a network: render videos, export, verify, embed labels, "
    "recognise, accuracy twice, speed."
)
REAL_ACTIONS = """
This model knows rendered shapes alone. For real actions, which are a download:

    actionclip models                              # published checkpoints
    actionclip export actionclip-k400-vit-b-32-8f  # one of them, as a bundle

`actionclip` is in .venv/bin; `. .venv/bin/activate` puts it on the path."""

console = Console()


def main(own_videos: list[Path]) -> None:
    """Run every step, then print what happened and how to go on."""
    console.print(WHAT_COMES, highlight=False)
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
    page = BENCHMARK.with_suffix(".html")
    console.print(f"Look at {PREDICTIONS}, {THROUGHPUT} and {page}.", highlight=False)
    console.print(REAL_ACTIONS, highlight=False, markup=False)


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
    """Measure ONNX Runtime beside PyTorch, in turns, with parity beside the speed-up."""
    run(
        *("benchmark", BUNDLE, "--checkpoint", MODEL, "--batch", "1,8", "--duration", "2"),
        *("--output", BENCHMARK, "--html", BENCHMARK.with_suffix(".html"), "--plot", THROUGHPUT),
    )
    _, ours = read_report(BENCHMARK).rows
    ratios = [result.speedup.value for result in ours.results if result.speedup]
    difference = max(result.parity.max_abs_difference or 0.0 for result in ours.results)
    return (
        f"ONNX Runtime {ratios[0]:.1f} (1 clip) and {ratios[-1]:.1f} (8 clips) times as fast as "
        f"PyTorch; embeddings within {difference:.0e}"
    )


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
