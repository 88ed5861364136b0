"""The page of cameras in a browser, at a real server of a bundle without graphs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeRuntime, write_fake_bundle
from page_browser import Visit, running_browser
from playwright.sync_api import Browser, expect
from threaded_server import ThreadedServer

from actionclip_deploy.labels import LabelBank
from actionclip_deploy.video.sources import parse_source
from actionclip_deploy.watch import Camera

LABELS = ("opening a door", "<b>closing</b> a door", "running")
KEY = "a-key-of-the-tests"
MIN_CONTRAST = 4.5  # WCAG 2.1, AA, for text of usual size
PHONE = {"width": 320, "height": 640}

pytestmark = pytest.mark.filterwarnings("ignore::actionclip_deploy.errors.ThresholdWarning")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


def watching_server(folder: Path, **options: Any) -> ThreadedServer:
    """A server of a camera that always shows something, and one that is not there."""
    bundle = write_fake_bundle(folder / "for_banks")
    bank = LabelBank.build(bundle, FakeRuntime(bundle.manifest), LABELS, name="mine")
    thresholds = dict.fromkeys(LABELS, 1e-9)  # below every score
    sources = {"hall": "test:?fps=20", "door": "rtsp://me:secret@127.0.0.1:9/door"}
    cameras = [
        Camera(parse_source(source, name=name), thresholds=thresholds, window_seconds=0.8)
        for name, source in sources.items()
    ]
    return ThreadedServer(folder, banks=[bank], cameras=cameras, **options)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadedServer]:
    with watching_server(tmp_path_factory.mktemp("live")) as server:
        yield server


@pytest.fixture
def visit(browser: Browser, server: ThreadedServer) -> Iterator[Visit]:
    with Visit(browser, server.url) as visit:
        visit.page.goto(f"{server.url}/live")
        yield visit
        visit.check_manners()


def test_the_page_shows_each_camera_with_picture_label_state_and_events(visit: Visit) -> None:
    expect(visit["summary"]).to_have_text("1 of 2 cameras live")
    hall = visit.page.locator(".tile[data-name=hall]")
    expect(hall.locator(".state")).to_have_text("Live")
    expect(hall.locator(".screen canvas")).to_be_visible()
    expect(hall.locator(".now .number")).to_contain_text("%")
    assert hall.locator(".now .label").inner_text() in LABELS
    expect(hall.locator(".keys li").first).to_be_visible()
    expect(hall.locator(".timeline")).to_have_attribute(
        "aria-label", re.compile("^Best labels of the last 5 min")
    )
    door = visit.page.locator(".tile[data-name=door]")
    expect(door.locator(".state")).to_have_text("Lost")
    expect(door.locator(".why")).to_contain_text("It is tried again.")
    expect(door).not_to_contain_text("secret")
    first = visit.page.locator("#events li").first
    expect(first).to_contain_text("hall")
    assert first.locator(".what").inner_text() in LABELS


def test_it_can_be_used_by_keyboard(visit: Visit) -> None:
    name = visit.page.get_by_role("button", name="hall")
    expect(name).to_be_visible()
    visit.tab_to("pause")
    visit.page.keyboard.press("Enter")
    expect(visit["pause"]).to_have_attribute("aria-pressed", "true")
    visit.page.keyboard.press("Tab")
    expect(name).to_be_focused()
    visit.page.keyboard.press("Enter")
    expect(name).to_have_attribute("aria-expanded", "true")
    expect(visit.page.locator(".tile.large .origin")).to_contain_text("test:?fps=20")
    visit.tab_to("log")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_and_every_text_can_be_read(
    browser: Browser, server: ThreadedServer, scheme: Any
) -> None:
    options: dict[str, Any] = {"viewport": PHONE, "is_mobile": True, "color_scheme": scheme}
    with Visit(browser, server.url, **options) as visit:
        expect(visit["pages"]).to_be_visible()
        visit["pages"].get_by_role("link", name="Live").click()
        expect(visit.page.locator("#events li").first).to_be_visible()
        expect(visit.page.locator(".tile[data-name=door] .why")).to_be_visible()
        assert visit.num_pixels_too_wide() == 0
        number, low = visit.low_contrasts(MIN_CONTRAST)
        assert number > 10
        assert low == []
        visit.check_manners()


def test_a_server_without_cameras_says_how_to_get_some(browser: Browser, tmp_path: Path) -> None:
    with ThreadedServer(tmp_path) as server, Visit(browser, server.url) as visit:
        expect(visit["version"]).to_contain_text("actionclip-deploy")
        expect(visit["pages"]).to_be_hidden()
        visit.page.goto(f"{server.url}/live")
        expect(visit["none"]).to_contain_text("--watch @cameras.toml")
        expect(visit["live"]).to_be_hidden()
        visit.page.goto("about:blank")  # ends the stream of events, which a server would wait for


def test_a_key_is_asked_for_and_opens_the_events_too(browser: Browser, tmp_path: Path) -> None:
    server = watching_server(tmp_path, api_keys=(KEY,))
    with server, Visit(browser, server.url) as visit:
        visit.page.goto(f"{server.url}/live")
        expect(visit["key"]).to_be_focused()
        visit["key"].fill("another")
        visit.page.keyboard.press("Enter")
        expect(visit["key-hint"]).to_contain_text("does not take this key")
        visit["key"].fill(KEY)
        visit.page.keyboard.press("Enter")
        expect(visit["key-part"]).to_be_hidden()
        expect(visit.page.locator("#events li").first).to_be_visible()
        expect(visit.page.locator(".tile[data-name=hall] .screen canvas")).to_be_visible()
        assert not any(KEY in url for url in visit.requests)
        visit.page.goto("about:blank")
