"""Render the files that the recipes of `motions` train on and are measured on.

    python train/render_motions.py [FOLDER]

FOLDER, by default data/motions, gets pictures with captions for the first stage, training videos
for the second, test videos with the labels of training, and videos whose labels never occur in it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.progress import Progress

from actionclip_deploy.errors import ActionClipError
from actionclip_deploy.motions import SPLITS, write_dataset, write_pictures

NUM_PICTURES = 40_000
NUM_VIDEOS = {"train": 16_000, "test": 2_000, "heldout": 1_000}
SEED = 0


def main() -> None:
    """Render everything, with as many processes as there are cores."""
    parser = argparse.ArgumentParser(description="Render the files of motions.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data/motions"))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--share", type=float, default=1.0, help="Of the number of files.")
    arguments = parser.parse_args()
    with Progress() as bar:

        def render(name: str, number: int) -> None:
            number = max(1, round(number * arguments.share))
            task = bar.add_task(name, total=number)
            options = {
                "workers": arguments.workers,
                "progress": lambda done, _: bar.update(task, completed=done),
            }
            if name in SPLITS:
                write_dataset(arguments.folder, name, number, SEED, **options)
            else:
                write_pictures(arguments.folder, number, SEED, **options)

        render("pictures", NUM_PICTURES)
        for split, number in NUM_VIDEOS.items():
            render(split, number)


if __name__ == "__main__":
    try:
        main()
    except (ActionClipError, OSError, ValueError) as exc:
        sys.exit(f"error: {exc}")
