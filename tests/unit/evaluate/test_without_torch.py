"""Evaluation as an edge installation has it: with nothing of training or export installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

# Importing one of these fails in the program, as it does where they are not installed.
BLOCKING = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        absent = "torch torchvision open_clip accelerate omegaconf yaml matplotlib".split()
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKING + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_module_of_evaluation_needs_torch_or_training() -> None:
    loaded = run(
        "import pkgutil, actionclip_deploy.evaluate as room\n"
        "for module in pkgutil.iter_modules(room.__path__):\n"
        "    __import__(f'{room.__name__}.{module.name}')\n"
        "print(*[n for n in sys.modules if n.startswith('actionclip_deploy.')])\n"
    ).split()
    assert "actionclip_deploy.evaluate.evaluate" in loaded
    rooms = {name.split(".")[1] for name in loaded}
    assert not rooms & {"train", "export", "model", "serve", "cli"}


def test_the_command_works_without_torch(
    tiny_bundle: Path, rendered_video: Path, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("abseiling\nyoga\n")
    videos = tmp_path / "list.txt"
    videos.write_text(f"{rendered_video} yoga\n")
    printed = run(
        "from actionclip_deploy.cli import app\napp(['evaluate', *sys.argv[1:], '--json'])\n",
        tiny_bundle,
        videos,
        "--labels",
        labels,
    )
    assert json.loads(printed)["num_videos"] == 1
