"""Put the weights of a run of `motions` into the package, with what they come from and reach.

    python train/package_motions.py [RUN] [--output FILE.safetensors]

RUN, by default runs/motions, is the folder of a finished run of train/configs/motions.yaml; the
runs that it started from are read as well. Accuracy is measured in PyTorch, and that of the
exported bundles next to it, in fp32 and fp16, as they are deployed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import ActionClipError
from actionclip_deploy.evaluate.annotations import read_annotations
from actionclip_deploy.evaluate.evaluate import evaluate
from actionclip_deploy.evaluate.metrics import measure_motions
from actionclip_deploy.export import export_checkpoint
from actionclip_deploy.export.pipeline import open_checkpoint
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.model import ActionClipNetwork, load_checkpoint, save_original_checkpoint
from actionclip_deploy.model.zoo import packaged_path, write_packaged
from actionclip_deploy.motions.rendering import all_captions
from actionclip_deploy.prompts import TEMPLATES, fill_prompts, read_labels
from actionclip_deploy.recognizer import Recognizer
from actionclip_deploy.runtimes import Runtime, open_runtime
from actionclip_deploy.tokenizer import Tokenizer, find_clip_merges

NAME = "motions"
DATA = Path("data/motions")
SPLITS = ("test", "heldout")

console = Console()


def main() -> None:
    """Measure, then write."""
    parser = argparse.ArgumentParser(description="Ship the weights of a run of motions.")
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/motions"))
    parser.add_argument("--output", type=Path, default=packaged_path(NAME))
    arguments = parser.parse_args()
    run: Path = arguments.run
    stages = [describe_stage(folder) for folder in run_folders(run)]
    num_frames = stages[-1]["config"]["model"]["num_frames"]
    loaded = load_checkpoint(run / "model.pt", num_frames=num_frames)
    model = loaded.model
    provenance: dict[str, Any] = {
        "name": NAME,
        "licence": "MIT",
        "commit": commit(),
        "seed": stages[-1]["config"]["run"]["seed"],
        "seconds": sum(stage["seconds"] for stage in stages),
        "versions": stages[-1].pop("versions"),
        "stages": stages,
        "clip_seconds": loaded.clip_seconds,
    }
    # What is measured is what ships: a token that was left out by mistake would be noticed.
    rows = known_tokens()
    forget_other_tokens(model, rows)
    with TemporaryDirectory() as folder:
        checkpoint = Path(folder) / f"{NAME}-{num_frames}f.pt"
        save_original_checkpoint(model, checkpoint)
        measured = measure_runtimes(checkpoint, Path(folder))
    provenance["metrics"] = measured.pop("torch")
    provenance["exported"] = measured
    path: Path = arguments.output
    write_packaged(model, rows, provenance, path)
    console.print(f"Wrote {path}, {path.stat().st_size / 1e6:.1f} MB. For docs/motions.md:")
    for line in format_rows(provenance):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def format_rows(provenance: dict[str, Any]) -> list[str]:
    """The lines of the tables in docs/motions.md that state length and accuracy."""
    stages = provenance["stages"]
    steps = [f"{s['steps']:,} of {s['config']['run']['batch_size']}" for s in stages]
    minutes = [f"{s['seconds'] / 60:.0f}" for s in stages]
    rows = [
        f"| steps, and clips in each | {' | '.join(steps)} |",
        f"| minutes on one core | {' | '.join(minutes)} |",
    ]
    measured = {"PyTorch, fp32": provenance["metrics"]}
    for precision, found in provenance["exported"].items():
        measured[f"ONNX Runtime, {precision}"] = found
    for name, found in measured.items():
        values = (
            *(found["test"]["top1"], found["test"]["order"]),
            *(found["heldout"]["top1"], found["heldout"]["top1_of_held_out"]),
        )
        rows.append(f"| {name} | {' | '.join(f'{100 * value:.2f}' for value in values)} |")
    return rows


def run_folders(run: Path) -> list[Path]:
    """The folders of a run and of those that it started from, the first one first."""
    start = yaml.safe_load((run / "config.yaml").read_text("utf-8"))["model"]["checkpoint"]
    return [*(run_folders(Path(start).parent) if start else ()), run]


def describe_stage(folder: Path) -> dict[str, Any]:
    """Configuration, length and loss of a run."""
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    kept = ("steps", "epochs", "num_videos", "device", "seconds", "loss", "versions", "config")
    return {key: metrics[key] for key in kept}


def commit() -> str:
    """The commit of the checkout that this program is of."""
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def known_tokens() -> list[int]:
    """Numbers of the tokens that occur in captions, or in labels in any template."""
    prompts = [*all_captions(), *fill_prompts(read_labels(DATA / "labels.csv"), TEMPLATES)]
    tokens = Tokenizer.from_clip_merges(find_clip_merges())(prompts, context_length=77)
    return sorted(set(np.unique(tokens).tolist()))


def forget_other_tokens(model: ActionClipNetwork, rows: list[int]) -> None:
    """Leave nothing of the tokens whose rows do not ship."""
    table = model.towers.token_embedding.weight
    with torch.no_grad():
        kept = table[rows].clone()
        table.zero_()
        table[rows] = kept


def measure_runtimes(checkpoint: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Accuracy of a checkpoint in PyTorch, and in ONNX Runtime in both precisions."""
    with open_checkpoint(checkpoint) as (bundle, runtime):
        measured = {"torch": measure(bundle, runtime)}
    for precision in ("fp32", "fp16"):
        bundle = export_checkpoint(checkpoint, folder / precision, precision=precision).bundle
        with open_runtime(bundle, "onnxruntime") as runtime:
            measured[precision] = measure(bundle, runtime)
    return measured


def measure(bundle: Bundle, runtime: Runtime) -> dict[str, Any]:
    """Read, score and measure the videos of every split, among all labels."""
    labels = read_labels(DATA / "labels.csv")
    bank = LabelBank.build(bundle, runtime, labels, name=NAME)
    found = {}
    for split in SPLITS:
        samples = read_annotations(DATA / f"{split}.txt", labels, format="videos")
        evaluation = evaluate(Recognizer(runtime, bank), samples)
        ids = [sample.label_ids[0] for sample in evaluation.samples]
        found[split] = {"num_videos": len(ids), **measure_motions(evaluation.scores, ids)}
        console.print(runtime.describe(), split, found[split], highlight=False)
    return found


if __name__ == "__main__":
    try:
        main()
    except (ActionClipError, OSError, ValueError) as exc:
        sys.exit(f"error: {exc}")
