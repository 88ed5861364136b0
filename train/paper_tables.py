"""Run the paper's comparisons on `motions`, and write ours into the documentation.

    python train/paper_tables.py run [--seeds 0 1 2] [--rows transf meanp ...] [KEY=VALUE ...]
    python train/paper_tables.py write
    python train/paper_tables.py cost [--models vitb32-8f ...] [--clips 8]

Every row is train/configs/motions-tables.yaml with one thing changed, from the weights of
motions-pictures.yaml. A run that was stopped continues, and one that is done is not repeated.
Several of these programs may run at once, each with rows or seeds of its own. `write` puts the
tables of all results into docs/motions.md, and the numbers into train/results/motions-tables.json.
`cost` prints the paper's table 7 for this machine: what the published models cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from rich.console import Console

from actionclip_deploy.errors import ActionClipError
from actionclip_deploy.evaluate.annotations import read_annotations
from actionclip_deploy.evaluate.metrics import measure_motions
from actionclip_deploy.files import write_json, write_text
from actionclip_deploy.model import (
    ModelConfig,
    build_model,
    count_macs,
    count_parameters,
    load_checkpoint,
)
from actionclip_deploy.prompts import read_labels
from actionclip_deploy.train.data import VideoClips, open_cache, open_training_data
from actionclip_deploy.train.learner import prompt_tokens
from actionclip_deploy.train.loop import score_samples, start_accelerator, train
from actionclip_deploy.train.models import TrainedModel
from actionclip_deploy.train.run_config import TrainConfig, load_config

CONFIG = Path("train/configs/motions-tables.yaml")
FOLDER = Path("runs/motions-tables")
RESULTS = Path("train/results/motions-tables.json")
PAGE = Path("docs/motions.md")
MARKS = ("<!-- tables -->", "<!-- /tables -->")


class Row(NamedTuple):
    """One experiment: its name in the paper, and what it changes."""

    name: str
    changes: tuple[str, ...] = ()


ROWS = {
    "unimodal": Row("unimodal (classifier)", ("model.classifier=true",)),
    "label-only": Row("only label", ("data.label_only=true",)),
    **{
        prompt: Row(prompt, (f"model.visual_prompt={prompt}",))
        for prompt in ("joint", "shift", "meanp", "lstm", "conv1d", "transf_cls", "transf")
    },
    "frozen-both": Row("neither tuned", ("model.freeze=both",)),
    "frozen-textual": Row("vision tuned", ("model.freeze=textual",)),
    "frozen-visual": Row("language tuned", ("model.freeze=visual",)),
}
# Table 7 of arXiv 2109.08472: backbone, T, 10^9 MAC, 10^6 parameters, and videos a second of an
# RTX 3090.
COSTS = {
    "vitb32-8f": ("ViT-B-32", 8, 35.4, 144.1, 144.7),
    "vitb16-8f": ("ViT-B-16", 8, 140.8, 141.7, 43.2),
    "vitb16-16f": ("ViT-B-16", 16, 281.6, 141.7, 21.2),
    "vitb16-32f": ("ViT-B-16", 32, 563.1, 141.7, 13.0),
}
DEFAULTS = "transf"  # the row that is the defaults in tables 1, 3, 4 and 5
TABLES = {
    "Table 1: text or a classifier": ("unimodal", DEFAULTS),
    "Table 3: prompts or the label alone": ("label-only", DEFAULTS),
    "Table 4: visual prompts": (
        *("joint", "shift", "meanp", "lstm", "conv1d", "transf_cls"),
        DEFAULTS,
    ),
    "Table 5: frozen or tuned": ("frozen-both", "frozen-textual", "frozen-visual", DEFAULTS),
}

console = Console()


def main() -> None:
    """Run rows, or write what was run."""
    parser = argparse.ArgumentParser(description="The paper's comparisons on motions.")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--seeds", type=int, nargs="+", default=[0])
    running.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    running.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    commands.add_parser("write")
    costing = commands.add_parser("cost")
    costing.add_argument("--models", nargs="+", choices=list(COSTS), default=list(COSTS))
    costing.add_argument("--clips", type=int, default=4, help="clips to time; 0 for no timing")
    arguments = parser.parse_args()
    if arguments.command == "cost":
        console.print(format_costs(arguments.models, arguments.clips), highlight=False)
        return
    if arguments.command == "write":
        write()
        return
    for seed in arguments.seeds:
        for name in arguments.rows:
            run_row(name, seed, tuple(arguments.changes))


def run_row(name: str, seed: int, changes: tuple[str, ...]) -> None:
    """Train and measure one row with one seed, unless that was done."""
    folder = FOLDER / f"{name}-{seed}"
    result = folder / "motions.json"
    own = (f"run.output={folder}", f"run.seed={seed}")
    config = load_config(CONFIG, [*ROWS[name].changes, *changes, *own])
    if result.exists():
        if differences := load_config(folder / "config.yaml").differences(config):
            sys.exit(f"{folder} was run with another configuration ({differences}); remove it.")
        return
    data = open_training_data(config)
    trained = train(config, data, resume=True)
    model = load_result(config, trained.checkpoint, len(data.labels))
    measured = measure_splits(config, model, data.templates)
    content = {
        "row": name,
        "seed": seed,
        "steps": trained.metrics["steps"],
        "seconds": trained.metrics["seconds"],
        **measured,
    }
    write_json(result, content)
    console.print(f"{name}, seed {seed}: {json.dumps(measured)}", highlight=False)


def load_result(config: TrainConfig, checkpoint: Path, num_labels: int) -> TrainedModel:
    """The model of a run as it was given out, with its classifier if it has one."""
    model = load_checkpoint(
        checkpoint,
        num_frames=config.model.num_frames,
        with_classifier=config.model.classifier,
    ).model
    trained = TrainedModel(model, num_labels=num_labels if config.model.classifier else None)
    if trained.classifier is not None:
        path = checkpoint.with_name("classifier.safetensors")
        trained.classifier.load_state_dict(safetensors.torch.load_file(path))
    return trained


def measure_splits(
    config: TrainConfig, model: TrainedModel, templates: Sequence[str]
) -> dict[str, Any]:
    """Score the videos of the test splits as validation does, and measure the scores."""
    data_folder, size = config.data.annotations.parent, model.model.config.input_size
    labels = read_labels(data_folder / "labels.csv")
    # A classifier has learnt nothing that could recognise a label which it has not seen.
    splits = ("test",) if config.model.classifier else ("test", "heldout")
    samples = {split: read_annotations(data_folder / f"{split}.txt", labels) for split in splits}
    clips = VideoClips(
        [sample for found in samples.values() for sample in found],
        num_frames=config.model.num_frames,
        input_size=size,
        cache=open_cache(config.data, size),
    )
    scores, _ = score_samples(
        model,
        clips,
        prompt_tokens(labels, templates, model.model.config),
        start_accelerator(config.run),
        num_labels=len(labels),
        batch_size=config.run.batch_size,
    )
    scores = scores[:, : len(labels)]  # a classifier has only the motions after them
    parts = np.split(scores, np.cumsum([len(found) for found in samples.values()])[:-1])
    return {
        split: measure_motions(part, [sample.label_ids[0] for sample in found])
        for part, (split, found) in zip(parts, samples.items(), strict=True)
    }


def write() -> None:
    """Collect the results of all runs, and write them as JSON and as tables."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*/motions.json"))]
    if len({result["steps"] for result in found}) != 1:
        sys.exit(f"The runs in {FOLDER} are none, or of different lengths; run or remove some.")
    before, start, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (start and end):
        sys.exit(f"{PAGE} has no place for the tables; put {' and '.join(MARKS)} into it.")
    RESULTS.parent.mkdir(exist_ok=True)
    write_text(RESULTS, json.dumps(found, indent=1) + "\n")
    text = f"{before}{start}\n\n{format_tables(found)}\n{end}{after}"
    write_text(PAGE, text)
    console.print(f"Wrote {RESULTS} and the tables in {PAGE}.", highlight=False)


def format_tables(found: list[dict[str, Any]]) -> str:
    """The tables as Markdown."""
    parts = []
    for title, names in TABLES.items():
        lines = [
            f"**{title}**",
            "",
            "| | seeds | seen labels, top-1 | order of frames | held-out labels, top-1 of all "
            "| held-out labels, top-1 of held out |",
            "|---|---|---|---|---|---|",
        ]
        for name in names:
            runs = [result for result in found if result["row"] == name]
            if runs:
                lines.append(format_row(ROWS[name].name, runs))
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def format_costs(names: Sequence[str], num_clips: int) -> str:
    """Table 7 as Markdown: ours, and in brackets what the paper prints.

    Our count of parameters is of all of them; the paper leaves out embeddings, norms and
    projections.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = [
        f"| model | 10^9 MAC | 10^6 parameters | videos a second ({device}) |",
        "|---|---|---|---|",
    ]
    for name in names:
        backbone, num_frames, macs, parameters, speed = COSTS[name]
        config = ModelConfig.from_open_clip(backbone, visual_prompt="transf", num_frames=num_frames)
        ours = count_macs(config) / 1e9, count_parameters(config)["total"] / 1e6
        measured = f"{clips_per_second(config, num_clips, device):.1f}" if num_clips else "-"
        lines.append(
            f"| {name} | {ours[0]:.1f} ({macs}) | {ours[1]:.1f} ({parameters}) "
            f"| {measured} ({speed}) |"
        )
    return "\n".join(lines)


@torch.inference_mode()
def clips_per_second(config: ModelConfig, num_clips: int, device: str) -> float:
    """Speed of random weights on single clips, whose cost is that of trained ones."""
    model = build_model(config).to(device).eval()
    size = config.input_size
    clip = torch.zeros(1, config.num_frames, 3, size, size, device=device)
    model.encode_video(clip).cpu()  # warm-up
    started = time.perf_counter()
    for _ in range(num_clips):
        model.encode_video(clip).cpu()
    return num_clips / (time.perf_counter() - started)


def format_row(name: str, runs: list[dict[str, Any]]) -> str:
    """One row: the mean over seeds, and the smallest and largest where there are several."""

    def cell(split: str, key: str) -> str:
        values = [100 * run[split][key] for run in runs if split in run]
        if not values:
            return "none: no text"
        mean = f"{statistics.mean(values):.1f}"
        return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"

    columns = (
        ("test", "top1"),
        ("test", "order"),
        ("heldout", "top1"),
        ("heldout", "top1_of_held_out"),
    )
    return f"| {name} | {len(runs)} | {' | '.join(cell(*column) for column in columns)} |"


if __name__ == "__main__":
    try:
        main()
    except (ActionClipError, OSError, ValueError) as exc:
        sys.exit(f"error: {exc}")
