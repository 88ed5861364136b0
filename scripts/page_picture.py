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
from typing import Literal

from playwright.sync_api import Page, expect, sync_playwright

from actionclip_deploy import Bundle, LabelBank, open_runtime
from actionclip_deploy.export import export_checkpoint
from actionclip_deploy.motions import MotionLabel, all_labels, render_clip, write_video
from actionclip_deploy.serve.page import SAMPLES
from actionclip_deploy.video.sources import parse_source
from actionclip_deploy.watch import Camera

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = (360, 768, 1280)
HEIGHTS = {360: 740, 768: 1024, 1280: 860}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WAIT_MS = 30_000
WATCHED_MS = 10_000
SHOWN = (
    MotionLabel("star", "yellow", "moving left"),
    MotionLabel("heart", "red", "growing"),
)


# Of the scene "live": two that are there, and one that is not.
CAMERAS = {"hall": "test:?fps=12", "yard": "test:clock?fps=12", "door": "rtsp://127.0.0.1:9/door"}


@contextmanager
def served(bundle: Path) -> Iterator[str]:
    """The address of a server of a bundle, in a thread of this process."""
    sys.path.insert(0, str(ROOT / "tests"))
    from threaded_server import ThreadedServer

    from actionclip_deploy.serve.service import Service
    from actionclip_deploy.serve.settings import ServerSettings

    opened = Bundle.open(bundle)
    names = opened.label_bank_names()[:1]
    cameras = [
        Camera(parse_source(source, name=name), labels=names[0], window_seconds=2.0, thresholds=0.5)
        for name, source in CAMERAS.items()
        if names
    ]
    settings = ServerSettings(workers=1)
    service = Service(opened, open_runtime(opened), settings, cameras=cameras)
    with ThreadedServer(service) as server:
        yield server.url


def export_default(folder: Path) -> Path:
    """The default model with a label bank, which cameras are watched with."""
    bundle = export_checkpoint("motions", folder).bundle
    labels = [str(label) for label in all_labels()]
    with open_runtime(bundle) as runtime:
        LabelBank.build(bundle, runtime, labels, name="motions").save(bundle)
    return bundle.path


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


def watch(page: Page, _: list[Path]) -> None:
    """Cameras, of which one is lost, and events."""
    page.goto(f"{page.url}live")
    expect(page.locator(".tile")).to_have_count(len(CAMERAS))
    expect(page.locator("#events li").nth(3)).to_be_visible()
    page.wait_for_timeout(WATCHED_MS)


def enlarge(page: Page, videos: list[Path]) -> None:
    """One camera, large, with all that is known of it."""
    watch(page, videos)
    page.get_by_role("button", name="hall").click()


SCENES: dict[str, Callable[[Page, list[Path]], None]] = {
    "start": open_page,
    "answer": ask_sample,
    "several": ask_several,
    "unknown": ask_unknown,
    "live": watch,
    "camera": enlarge,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--bundle", type=Path, help="of the default model; exported if not given")
    parser.add_argument("--width", type=int, action="append", help=f"by default {WIDTHS}")
    parser.add_argument("--dark", action="store_true", help="in dark colours")
    parser.add_argument("--scene", choices=SCENES, action="append", help="by default all")
    given = parser.parse_args()
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    scheme: Literal["light", "dark"] = "dark" if given.dark else "light"
    given.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        bundle = given.bundle or export_default(folder / "motions")
        videos = write_videos(folder)
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        with served(bundle) as url:
            for width in given.width or WIDTHS:
                for scene in given.scene or SCENES:
                    size = {"width": width, "height": HEIGHTS.get(width, 900)}
                    page = browser.new_page(viewport=size, color_scheme=scheme)
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
