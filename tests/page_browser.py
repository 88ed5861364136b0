"""The web page in a browser: what is done there by tests, and what is listened for.

Tests import it by name: `from page_browser import Visit`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_WAIT_MS = 120_000.0  # on a machine that does much else

# Kept by the page itself, since a violation is an event and nothing else.
_LISTEN = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
"""

# Contrast by WCAG 2.1 of every text that can be seen, with what it stands on: colours are drawn on
# a canvas, where the browser turns each notation into numbers. Gives those below the bound.
_LOW_CONTRAST = """
(bound) => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const over = (colours) => {
    context.fillStyle = "white";
    context.fillRect(0, 0, 1, 1);
    for (const colour of colours) {
      context.fillStyle = colour;
      context.fillRect(0, 0, 1, 1);
    }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let number = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    if (!text || !element.checkVisibility() || element.closest("noscript, option, .unseen")) {
      continue;
    }
    const grounds = [];
    for (let each = element; each; each = each.parentElement) {
      grounds.unshift(getComputedStyle(each).backgroundColor);
    }
    const ground = over(grounds);
    const [light, dark] = [ground, over([...grounds, getComputedStyle(element).color])]
      .map(luminance).sort((a, b) => b - a);
    const contrast = (light + 0.05) / (dark + 0.05);
    number += 1;
    if (contrast < bound) found.push(`${contrast.toFixed(2)} ${text}`);
  }
  return [number, found];
}
"""

# Whether the focus can be seen: an outline on the element, or beside a radio that is drawn as one.
_FOCUS = """
() => {
  const focused = document.activeElement;
  const shown = focused.matches(".switch input") ? focused.nextElementSibling : focused;
  const style = getComputedStyle(shown);
  return {
    id: focused.id,
    name: focused.dataset?.name ?? "",
    isSeen: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
    tag: focused.tagName,
  };
}
"""


@contextmanager
def running_browser() -> Iterator[Browser]:
    """A headless Chromium of this machine; without one, tests are skipped."""
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path  # of `playwright install chromium`
        found = [path for path in map(shutil.which, (*_BROWSERS, own)) if path is not None]
        if not found:
            names = ", ".join(_BROWSERS)
            pytest.skip(f"the web page is tested in a browser; install one of {names}")
        browser = playwright.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """The page, opened at a server.

    Args:
        browser: Opens a window of its own for it.
        url: Of the server.
        options: Of `browser.new_context`, such as `color_scheme`.
    """

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.url = url
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._context = browser.new_context(**options)
        self._context.set_default_timeout(_WAIT_MS)
        expect.set_options(timeout=_WAIT_MS)
        self._context.add_init_script(_LISTEN)
        self.page: Page = self._context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._listen)
        # Whoever listens only when a chooser is about to open may be too late for it.
        self.page.on("filechooser", lambda _: None)
        self.page.goto(url)

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *exc: object) -> None:
        self._context.close()

    def _listen(self, message: Any) -> None:
        # A refusal is told by the browser as well, whatever the page makes of it.
        is_refusal = message.text.startswith("Failed to load resource")
        if message.type in ("error", "warning") and not is_refusal:
            self.complaints.append(message.text)

    def __getitem__(self, id: str) -> Locator:
        """The element with an id."""
        return self.page.locator(f"#{id}")

    def check_manners(self) -> None:
        """Nothing went elsewhere, was refused by the policy, or was complained about."""
        assert self.complaints == []
        assert self.page.evaluate("window.violations") == []
        for request in self.requests:
            assert urlsplit(request).scheme == "blob" or request.startswith(f"{self.url}/"), request

    @property
    def file_names(self) -> Locator:
        """The names of the chosen videos."""
        return self.page.locator("#files .name")

    def error(self, part: str) -> Locator:
        """A part of what is said of a refusal: title, message, advice or facts."""
        return self.page.locator(".error .facts" if part == "facts" else f".error-{part}")

    @property
    def retry(self) -> Locator:
        """The button that asks again."""
        return self.page.locator(".retry")

    def choose(self, *paths: Path) -> None:
        """Choose files as the videos."""
        self["file"].set_input_files(list(paths))
        expect(self.file_names).to_have_text([path.name for path in paths])

    def choose_sample(self, name: str) -> None:
        """Press the button of a sample."""
        self.page.locator(f"[data-name={name}]").click()
        expect(self.file_names).to_have_text(f"{name}.mp4")

    def choose_bank(self, name: str) -> None:
        """Ask for a label bank."""
        self["source-bank"].check()
        self["bank"].select_option(name)

    def ask(self) -> None:
        """Press the button and wait for the answer."""
        self["send"].click()
        expect(self["result"]).to_be_visible()

    def ranking(self) -> list[tuple[str, str]]:
        """Labels and scores, as they are written."""
        lines = self.page.locator(".ranking li")
        return [
            (line.locator(".label").inner_text(), line.locator(".number").inner_text())
            for line in lines.all()
        ]

    def facts(self) -> dict[str, str]:
        """What the answer says that it came from."""
        lines = self.page.locator(".origin div").all()
        return {line.locator("dt").inner_text(): line.locator("dd").inner_text() for line in lines}

    def low_contrasts(self, bound: float) -> tuple[int, list[str]]:
        """How many texts can be seen, and those with less contrast than that."""
        number, found = self.page.evaluate(_LOW_CONTRAST, bound)
        return number, found

    def tab_to(self, id: str = "", name: str = "") -> None:
        """Press Tab until an element has the focus, which has to be seen on the whole way."""
        for _ in range(60):
            self.page.keyboard.press("Tab")
            focus = self.page.evaluate(_FOCUS)
            # The controls of a video are drawn by the browser, and so is their focus.
            assert focus["isSeen"] or focus["tag"] in ("VIDEO", "BODY"), focus
            if (id and focus["id"] == id) or (name and focus["name"] == name):
                return
        raise AssertionError(f"Tab never reaches {id or name}")

    def num_pixels_too_wide(self) -> int:
        """By how much the page is wider than the window."""
        wide: int = self.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        return wide
