"""Pictures of the server's page: `python scripts/page_picture.py --output build/page`.

Serves the default model (or --bundle), opens its page in a headless Chromium, recognises rendered
videos there, and writes a PNG of each scene at each width. Needs the extras of `dev`, and Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from actionclip_deploy import Bundle, open_runtime
from actionclip_deploy.export import export_checkpoint
from actionclip_deploy.motions import MotionLabel, render_clip, write_video
from actionclip_deploy.serve.page import SAMPLES

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = (360, 768, 1280)
HEIGHTS = {360: 740, 768: 1024, 1280: 860}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WAIT_MS = 30_000
SHOWN = (
    MotionLabel("star", "yellow", "moving left"),
    MotionLabel("heart", "red", "growing"),
)


@contextmanager
def served(bundle: Path) -> Iterator[str]:
    """The address of a server of a bundle, in a thread of this process."""
    sys.path.insert(0, str(ROOT / "tests"))
    from threaded_server import ThreadedServer

    from actionclip_deploy.serve.service import Service
    from actionclip_deploy.serve.settings import ServerSettings

    opened = Bundle.open(bundle)
    service = Service(opened, open_runtime(opened), ServerSettings(workers=1))
    with ThreadedServer(service) as server:
        yield server.url


def write_videos(folder: Path) -> list[Path]:
    """Two videos, and between them a file that is none."""
    first, last = (
        write_video(folder / f"{str(label).replace(' ', '-')}.mp4", render_clip(label, seed=7))
        for label in SHOWN
    )
    damaged = folder / "cut-off.mp4"
    damaged.write_bytes(first.read_bytes()[:700])
    return [first, damaged, last]


def open_page(page: Page, _: list[Path]) -> None:
    """As a visitor finds it."""
    expect(page.locator(".sample")).to_have_count(len(SAMPLES))
    expect(page.locator("#badge")).to_be_visible()
    # Not `wait_for_function`, which needs eval, and the page's policy has none.
    drawn = "(all) => all.every((each) => each.readyState >= 2)"
    while not page.locator(".sample video").evaluate_all(drawn):
        page.wait_for_timeout(100)


def ask_sample(page: Page, _: list[Path]) -> None:
    """The answer for a sample among the samples' labels."""
    page.locator(f"[data-name={SAMPLES[0].name}]").click()
    expect(page.locator("#files .name")).to_have_count(1)
    page.locator("#send").click()
    expect(page.locator(".best-label")).to_be_visible()


def ask_several(page: Page, videos: list[Path]) -> None:
    """Answers for three files, one of them damaged, and words that the model does not know."""
    page.locator("#file").set_input_files(videos)
    labels = [*map(str, SHOWN), "a yellow star juggling"]
    page.locator("#labels").fill("\n".join(labels))
    page.locator("#send").click()
    expect(page.locator(".outcome.done")).to_have_count(2)
    expect(page.locator(".outcome.failed")).to_have_count(1)


def ask_unknown(page: Page, videos: list[Path]) -> None:
    """The refusal of labels of which the model knows no word."""
    page.locator("#file").set_input_files(videos[:1])
    page.locator("#labels").fill("opening a door\nclosing a door")
    page.locator("#send").click()
    expect(page.locator(".error")).to_be_visible()


SCENES: dict[str, Callable[[Page, list[Path]], None]] = {
    "start": open_page,
    "answer": ask_sample,
    "several": ask_several,
    "unknown": ask_unknown,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--bundle", type=Path, help="of the default model; exported if not given")
    parser.add_argument("--width", type=int, action="append", help=f"by default {WIDTHS}")
    parser.add_argument("--scene", choices=SCENES, action="append", help="by default all")
    given = parser.parse_args()
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    given.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        bundle = given.bundle or export_checkpoint("motions", folder / "motions").bundle.path
        videos = write_videos(folder)
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        with served(bundle) as url:
            for width in given.width or WIDTHS:
                for scene in given.scene or SCENES:
                    size = {"width": width, "height": HEIGHTS.get(width, 900)}
                    page = browser.new_page(viewport=size, color_scheme="light")
                    page.set_default_timeout(WAIT_MS)
                    page.goto(url)
                    SCENES[scene](page, videos)
                    page.wait_for_timeout(500)  # videos draw their first picture
                    path = given.output / f"{scene}-{width}.png"
                    page.screenshot(path=path, full_page=True)
                    page.close()
                    print(path)
        browser.close()


if __name__ == "__main__":
    main()
