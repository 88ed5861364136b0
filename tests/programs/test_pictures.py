"""The README's pictures are there, small, and what the script makes of the product."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PICTURES = sorted((ROOT / "docs" / "pictures").glob("*"))
SCRIPT = ROOT / "scripts" / "pictures.py"
MAX_BYTES = 150_000
# Fonts of another machine move lines by some pixels.
SIZE_TOLERANCE = 0.05


def test_each_picture_is_shown_and_made_by_the_script() -> None:
    names = {path.name for path in PICTURES}
    shown = re.findall(r"docs/pictures/([\w.-]+)", (ROOT / "README.md").read_text("utf-8"))
    assert set(shown) == names
    written = set(re.findall(r'"(\w+\.png)"', SCRIPT.read_text("utf-8")))
    assert names == written


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_a_picture_is_small_and_not_empty(path: Path) -> None:
    assert path.stat().st_size <= MAX_BYTES
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        colours = picture.convert("RGB").getcolors(maxcolors=1 << 20)
    assert colours is not None
    assert len(colours) > 32


@pytest.mark.slow
def test_the_script_makes_pictures_of_the_same_size(tmp_path: Path) -> None:
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("the page is drawn by a browser")
    command = [sys.executable, SCRIPT, "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in PICTURES] == sorted(path.name for path in tmp_path.iterdir())
    for path in PICTURES:
        with Image.open(path) as kept, Image.open(tmp_path / path.name) as made:
            assert made.size == pytest.approx(kept.size, rel=SIZE_TOLERANCE)
