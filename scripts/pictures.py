"""Make the pictures of the README from the product itself.

    python scripts/pictures.py [--output docs/pictures] [--bundle BUNDLE]

predictions.png is what `actionclip predict --plot` draws of four new videos, page.png the page of
`actionclip serve` after one of its samples was asked about, in Chromium by Playwright. Run it when
either looks different, look at both, and commit them.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from PIL import Image
from playwright.sync_api import sync_playwright

from actionclip_deploy.motions import MotionLabel, all_labels, render_clip, write_video

FOLDER = Path("docs/pictures")
MAX_BYTES = 150_000
WIDTH = 1000  # pixels; the README is shown about 850 wide
NUM_COLOURS = 160
SEED = 2026  # training and the measurements in the documentation use 0

SHOWN = [
    MotionLabel("star", "red", "moving left"),
    MotionLabel("ring", "purple", "growing"),
    MotionLabel("cross", "white", "moving up"),
    MotionLabel("heart", "green", "bouncing"),
]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WINDOW = {"width": 1280, "height": 900}
WAIT_MS = 60_000.0
HAVE_CURRENT_DATA = 2  # of HTMLMediaElement.readyState


def main(output: Path, bundle: Path | None) -> None:
    """Make both pictures whole, then put them into the folder."""
    output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as place:
        folder = Path(place)
        if bundle is None:
            bundle = folder / "bundle"
            run("export", "motions", "--output", bundle)
        copy = shutil.copytree(bundle, folder / "motions")  # a bank is built into it
        draw_predictions(copy, folder)
        draw_page(copy, folder)
        for name in ("predictions.png", "page.png"):
            keep_small(folder / name)
            shutil.move(folder / name, output / name)
            print(f"{output / name}, {(output / name).stat().st_size / 1000:.0f} kB")


def draw_predictions(bundle: Path, folder: Path) -> None:
    """Score new videos among all labels, as a user does."""
    labels = folder / "labels.txt"
    labels.write_text("".join(f"{label}\n" for label in all_labels()), encoding="utf-8")
    run("labels", "build", bundle, "--labels", labels, "--name", "motions")
    videos = []
    for label in SHOWN:
        clip = render_clip(label, seed=SEED)
        videos.append(write_video(folder / f"{str(label).replace(' ', '-')}.mp4", clip))
    options = ("--labels", "motions", "--top-k", "4", "--plot", folder / "predictions.png")
    run("predict", bundle, *videos, *options)


def draw_page(bundle: Path, folder: Path) -> None:
    """Ask the served page about its first sample."""
    with served(bundle) as address, sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = [path for path in map(shutil.which, (*BROWSERS, own)) if path is not None]
        if not found:
            sys.exit(f"The page is drawn by a browser; install one of {', '.join(BROWSERS)}.")
        browser = playwright.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        page = browser.new_page(viewport=WINDOW, color_scheme="light")
        page.set_default_timeout(WAIT_MS)
        page.goto(address)
        page.locator("#samples [data-name]").first.click()
        page.locator("#send").click()
        page.locator("#result").wait_for(state="visible")
        page.evaluate("window.scrollTo(0, 0)")
        for video in page.locator("#samples video").all():
            while video.evaluate("video => video.readyState") < HAVE_CURRENT_DATA:
                page.wait_for_timeout(100)
        page.screenshot(path=folder / "page.png", animations="disabled")
        browser.close()


@contextmanager
def served(bundle: Path) -> Iterator[str]:
    """The address of a server that takes requests, which ends with the block."""
    command = [sys.executable, "-m", "actionclip_deploy.cli", "serve", bundle, "--port", "0"]
    with (
        TemporaryFile() as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            addresses = (
                word.rstrip(":,;.")
                for line in process.stdout
                for word in line.split()
                if word.startswith("http://")
            )
            address = next(addresses, None)
            if address is None:
                log.seek(0)
                sys.exit(f"actionclip serve took no requests: {log.read().decode()}")
            yield address
        finally:
            process.terminate()


def keep_small(path: Path) -> None:
    """Scale a picture down to what is shown, and store it with a palette."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    if picture.width > WIDTH:
        size = (WIDTH, round(picture.height * WIDTH / picture.width))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    # Median cut alone makes a red star purple; k-means moves the palette to what is there.
    palette = picture.quantize(NUM_COLOURS, kmeans=3, dither=Image.Dither.NONE)
    palette.save(path, optimize=True)
    size_bytes = path.stat().st_size
    if size_bytes > MAX_BYTES:
        sys.exit(f"{path.name} has {size_bytes} bytes, where {MAX_BYTES} is the most; shrink it.")


def run(*arguments: str | Path) -> None:
    """Run `actionclip` as a user would, and stop if it fails."""
    command = [sys.executable, "-m", "actionclip_deploy.cli", *map(str, arguments)]
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        sys.exit(f"actionclip {arguments[0]} exited with {code}; no picture was changed.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--bundle", type=Path, help="of the default model; exported if not given")
    given = parser.parse_args()
    main(given.output, given.bundle)
