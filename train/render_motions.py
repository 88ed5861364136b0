"""Render the files that the recipes of `motions` train on and are measured on.

    python train/render_motions.py [FOLDER]

FOLDER, by default data/motions, gets pictures with captions for the first stage, training videos
for the second, test videos with the labels of training, and videos whose labels never occur in it.
In FOLDER/long are long videos of known labels one after the other, with the intervals of each;
--only long renders these alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.progress import Progress

from actionclip_deploy.errors import ActionClipError
from actionclip_deploy.motions import write_dataset, write_long_videos, write_pictures

NUM_PICTURES = 40_000
NUM_VIDEOS = {"train": 16_000, "test": 2_000, "heldout": 1_000}
NUM_LONG_VIDEOS = {"tune": 6, "test": 12}
LONG_SECONDS = 300.0
SEED = 0


def main() -> None:
    """Render everything, with as many processes as there are cores."""
    parser = argparse.ArgumentParser(description="Render the files of motions.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data/motions"))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--share", type=float, default=1.0, help="Of the number of files.")
    parser.add_argument("--only", choices=("pictures", *NUM_VIDEOS, "long"))
    arguments = parser.parse_args()
    folder = arguments.folder
    # Of a share that is less than one video, a shorter one.
    seconds = LONG_SECONDS * max(0.2, min(1.0, arguments.share * min(NUM_LONG_VIDEOS.values())))
    # Titles, how many there are of each, and what writes them.
    jobs: list[tuple[str, int, Callable[..., Path]]] = [
        ("pictures", NUM_PICTURES, partial(write_pictures, folder))
    ]
    jobs += [
        (name, number, partial(write_dataset, folder, name)) for name, number in NUM_VIDEOS.items()
    ]
    jobs += [
        (f"long {name}", number, partial(write_long_videos, folder / "long", name, seconds=seconds))
        for name, number in NUM_LONG_VIDEOS.items()
    ]
    with Progress() as bar:
        for title, number, write in jobs:
            if arguments.only is None or title.startswith(arguments.only):
                number = max(1, round(number * arguments.share))
                task = bar.add_task(title, total=number)
                write(
                    number,
                    SEED,
                    workers=arguments.workers,
                    progress=lambda done, _, task=task: bar.update(task, completed=done),
                )


if __name__ == "__main__":
    try:
        main()
    except (ActionClipError, OSError, ValueError) as exc:
        sys.exit(f"error: {exc}")
