"""The page of the archive in a browser, at a real server of a bundle without graphs."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from page_browser import Visit, running_browser
from PIL import Image
from playwright.sync_api import Browser, Route, expect
from serving import archive_model, put_video, text_embeddings, write_archive
from threaded_server import ThreadedServer

from actionclip_deploy.archive import ArchiveWriter
from actionclip_deploy.motions import MotionLabel, render_clip, write_video

KEY = "a-key-of-the-tests"
MIN_CONTRAST = 4.5  # WCAG 2.1, AA, for text of usual size
PHONE = {"width": 320, "height": 640}
FPS, SECONDS = 8, 14  # of each video; its windows end at 13.5 s
START = 4.5  # of the window that shows a text; the moment that grows from it begins nearby
SHOWN = {"yard/20261130_181500.mp4": "a person falls", "door/<b>one<b>.mp4": "a person runs"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (96, 96), (200, 40, 40)).save(file, "JPEG")
    return file.getvalue()


def film(folder: Path) -> bytes:
    """A video that is as long as the windows say."""
    label = MotionLabel("star", "yellow", "orbiting")
    frames = render_clip(label, seed=3, num_frames=FPS * SECONDS)
    return write_video(folder / "film.mp4", frames, fps=FPS).read_bytes()


@pytest.fixture(scope="module")
def folder(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searched")
    write_archive(folder, shown=SHOWN, content=film(folder), picture=picture())
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ThreadedServer]:
    with ThreadedServer(folder, archive=folder / "archive") as server:
        yield server


@pytest.fixture
def visit(browser: Browser, server: ThreadedServer) -> Iterator[Visit]:
    with Visit(browser, server.url) as visit:
        visit.page.goto(f"{server.url}/search")
        yield visit
        visit.check_manners()
        visit.page.goto("about:blank")


def query_of(visit: Visit) -> dict[str, list[str]]:
    return parse_qs(urlsplit(visit.page.url).query)


def look_for(visit: Visit, text: str) -> None:
    visit["text"].fill(text)
    visit["text"].press("Enter")


def wait_for_film(visit: Visit) -> None:
    """Until a frame of the video is there."""
    visit["film"].evaluate(
        "film => film.readyState >= 2"
        " || new Promise((done) => film.addEventListener('loadeddata', () => done()))"
    )


def first_tile(visit: Visit) -> Any:
    return visit.page.locator("#moments li").first


def test_words_give_moments_with_picture_score_times_camera_and_file(visit: Visit) -> None:
    expect(visit["summary"]).to_have_text("archive: 2 videos, 27 s, 40 windows")
    expect(visit["empty"]).to_contain_text("Nothing searched yet")
    look_for(visit, "a person falls")
    tile = first_tile(visit)
    expect(tile.locator(".rank")).to_have_text("1. yard")
    expect(tile.locator(".facts-of-tile .number").first).to_have_text(re.compile(r"^z \d\.\d$"))
    expect(tile.locator(".play .number")).to_have_text(re.compile(r"^0:0\d\.\d – 0:\d\d\.\d$"))
    expect(tile.locator("time")).to_contain_text("30/11/2026, 18:15:")
    expect(tile.locator(".file")).to_have_text("20261130_181500.mp4")
    expect(tile.locator("img")).to_be_visible()
    assert tile.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)")
    expect(visit["status"]).to_contain_text("among 40 windows")
    assert query_of(visit) == {"text": ["a person falls"]}


def test_a_frame_of_the_video_stands_in_for_a_picture_that_was_not_kept(visit: Visit) -> None:
    look_for(visit, "a person runs")
    tile = first_tile(visit)
    expect(tile.locator(".rank")).to_have_text("1. door")
    expect(tile.locator(".file")).to_have_text("<b>one<b>.mp4")
    expect(tile.locator("canvas")).to_be_visible()
    colours = tile.locator("canvas").evaluate(
        "canvas => new Set(canvas.getContext('2d')"
        ".getImageData(0, 0, canvas.width, canvas.height).data).size"
    )
    assert colours > 10


def test_a_click_plays_the_video_from_the_moment_on(visit: Visit) -> None:
    look_for(visit, "a person falls")
    visit.page.get_by_role("button", name=re.compile("^Play moment 1,")).click()
    expect(visit["player"]).to_be_visible()
    wait_for_film(visit)
    time = visit["film"].evaluate("film => (film.pause(), film.currentTime)")
    said = visit["player-title"].inner_text()
    assert said.startswith("1. yard "), said
    found = re.search(r"(\d):(\d\d\.\d) – ", said)
    assert found is not None, said
    start = 60 * int(found[1]) + float(found[2])
    assert start > 0
    assert start - 0.2 <= time <= SECONDS
    assert visit["film"].evaluate("film => film.duration") == pytest.approx(SECONDS, abs=0.2)
    visit["film"].evaluate("film => { film.currentTime = 0 }")
    visit["again"].click()
    assert visit["film"].evaluate("film => (film.pause(), film.currentTime)") >= start - 0.2
    visit.page.keyboard.press("Escape")
    expect(visit["player"]).to_be_hidden()
    assert visit["film"].get_attribute("src") is None


def test_what_is_typed_stays_however_late_the_server_tells_of_its_archive(
    browser: Browser, server: ThreadedServer
) -> None:
    with Visit(browser, server.url) as visit:
        held: list[Route] = []

        def hold(route: Route) -> None:
            held.append(route)

        visit.page.route("**/v1/archive", hold)
        visit.page.goto(f"{server.url}/search")
        expect(visit["summary"]).to_contain_text("Asking the server")
        while not held:
            visit.page.wait_for_timeout(20)
        expect(visit["text"]).to_be_hidden()
        held[0].continue_()
        look_for(visit, "a person falls")
        expect(first_tile(visit).locator(".rank")).to_have_text("1. yard")
        expect(visit["text"]).to_have_value("a person falls")


def test_similar_moments_and_the_way_back(visit: Visit) -> None:
    look_for(visit, "a person runs")
    first_tile(visit).get_by_role("link", name="Find similar").click()
    expect(visit["like"]).to_have_text("<b>one<b>.mp4 at 0:06.5")
    expect(visit["text"]).to_be_hidden()
    expect(first_tile(visit).locator(".rank")).to_have_text("1. door")
    ((like,),) = query_of(visit).values()
    assert like.endswith("/door/<b>one<b>.mp4@6.5")
    visit.page.go_back()
    expect(visit["text"]).to_have_value("a person runs")
    assert query_of(visit) == {"text": ["a person runs"]}
    visit.page.go_forward()
    expect(visit["like"]).to_be_visible()
    visit["unlike"].click()
    expect(visit["text"]).to_be_focused()


def test_an_address_holds_the_whole_query(visit: Visit, server: ThreadedServer) -> None:
    asked = (
        "text=a+person+falls&without=a+person+runs&camera=yard&video=20261130_181500.mp4"
        "&from=2026-11-30T18%3A00&to=2026-11-30T19%3A00&top=10"
    )
    visit.page.goto(f"{server.url}/search?{asked}")
    expect(first_tile(visit).locator(".rank")).to_have_text("1. yard")
    for name, value in {
        "text": "a person falls",
        "without": "a person runs",
        "camera": "yard",
        "video": "20261130_181500.mp4",
        "from": "2026-11-30T18:00",
        "to": "2026-11-30T19:00",
        "top": "10",
    }.items():
        expect(visit[name]).to_have_value(value)
    expect(visit["where"]).to_have_attribute("open", "")
    expect(visit["status"]).to_contain_text("20 of 40 windows")
    visit["camera"].select_option("door")
    visit["video"].fill("")
    visit["send"].click()
    expect(visit["empty"]).to_contain_text("No moments")
    expect(visit["status"]).to_contain_text("1 video without a known time left out")
    assert query_of(visit)["camera"] == ["door"]
    options = visit["camera"].locator("option").all_inner_texts()
    assert options == ["All", "door (1 video)", "yard (1 video)"]


def test_a_camera_that_is_not_there_is_told_and_not_listed(
    visit: Visit, server: ThreadedServer
) -> None:
    visit.page.goto(f"{server.url}/search?text=a+person+falls&camera=nosuch")
    expect(visit["missing"]).to_have_text(
        "The archive has no camera “nosuch”; choose one of the list."
    )
    expect(visit["camera"]).to_be_focused()
    options = visit["camera"].locator("option").all_inner_texts()
    assert options == ["All", "door (1 video)", "yard (1 video)"]
    expect(first_tile(visit)).to_be_hidden()


def test_what_is_suggested_is_what_the_model_can_answer(
    visit: Visit, server: ThreadedServer, browser: Browser, tmp_path: Path
) -> None:
    (example, *_) = visit.page.request.get(f"{server.url}/samples").json()["examples"]
    expect(visit["example"]).to_have_text(example)
    visit.page.goto("about:blank")
    known = "a photo of action run"  # a model of few words, of which nobody knows what it shows
    write_archive(tmp_path)
    with (
        ThreadedServer(tmp_path, archive=tmp_path / "archive", known=known) as small,
        Visit(browser, small.url) as other,
    ):
        other.page.goto(f"{small.url}/search")
        expect(other["search"]).to_be_visible()
        expect(other["for-example"]).to_be_hidden()
        expect(other["example"]).to_have_text("")
        look_for(other, "xylophone")
        expect(other.error("message")).to_contain_text("no word of the text 'xylophone'")
        assert "allow" not in other.error("message").inner_text()
        other.page.get_by_role("button", name="Search all the same").click()
        expect(first_tile(other)).to_be_visible()
        other.page.goto("about:blank")


def test_what_cannot_be_done_is_told(visit: Visit) -> None:
    visit["send"].click()
    expect(visit["missing"]).to_have_text("Say what to look for.")
    expect(visit["text"]).to_be_focused()
    look_for(visit, "a" * 1001)
    expect(visit.error("message")).to_contain_text("characters in one of its texts")
    visit["where"].locator("summary").click()
    visit["from"].fill("2026-11-30T19:00")
    visit["to"].fill("2026-11-30T18:00")
    look_for(visit, "a person falls")
    expect(visit["missing"]).to_have_text("“Recorded from” is later than “Recorded until”.")
    expect(visit["from"]).to_be_focused()
    visit["from"].fill("")
    visit["to"].fill("")
    look_for(visit, "a person falls")
    expect(visit["error"]).to_be_hidden()
    expect(first_tile(visit)).to_be_visible()


def test_a_video_that_has_changed_says_so_in_the_player(browser: Browser, tmp_path: Path) -> None:
    content = film(tmp_path)
    write_archive(tmp_path, shown=SHOWN, content=content, picture=picture())
    (tmp_path / "recordings" / "yard" / "20261130_181500.mp4").write_bytes(content + b"more")
    (tmp_path / "recordings" / "door" / "<b>one<b>.mp4").unlink()
    with (
        ThreadedServer(tmp_path, archive=tmp_path / "archive") as server,
        Visit(browser, server.url) as visit,
    ):
        visit.page.goto(f"{server.url}/search?text=a+person+falls")
        visit.page.get_by_role("button", name=re.compile("^Play moment 1,")).click()
        expect(visit["film-trouble"]).to_contain_text("has changed")
        expect(visit["download"]).to_be_hidden()
        visit["close"].click()
        look_for(visit, "a person runs")
        expect(first_tile(visit).locator(".why")).to_have_text("No picture")
        visit.check_manners()
        visit.page.goto("about:blank")


def test_a_file_that_the_browser_cannot_play_says_where_the_moment_is(
    browser: Browser, tmp_path: Path
) -> None:
    write_archive(tmp_path, shown={"yard/a.avi": "a person falls"}, content=b"RIFF\0\0\0\0AVI LIST")
    with (
        ThreadedServer(tmp_path, archive=tmp_path / "archive") as server,
        Visit(browser, server.url) as visit,
    ):
        visit.page.goto(f"{server.url}/search?text=a+person+falls")
        visit.page.get_by_role("button", name=re.compile("^Play moment 1,")).click()
        expect(visit["film-trouble"]).to_contain_text("cannot play the file. The moment is at 0:0")
        expect(visit["again"]).to_be_hidden()
        with visit.page.expect_download() as download:
            visit["download"].click()
        assert download.value.suggested_filename == "a.avi"
        visit.page.goto("about:blank")


def test_it_can_be_used_by_keyboard(visit: Visit) -> None:
    expect(visit["search"]).to_be_visible()
    visit.tab_to("text")
    visit.page.keyboard.type("a person falls")
    visit.page.keyboard.press("Enter")
    expect(first_tile(visit)).to_be_visible()
    for _ in range(8):  # past the other fields
        visit.page.keyboard.press("Tab")
        if "play" in (visit.page.evaluate("document.activeElement.className") or ""):
            break
    visit.page.keyboard.press("Enter")
    expect(visit["player"]).to_be_visible()
    visit.tab_to("close")
    visit.page.keyboard.press("Enter")
    expect(visit["player"]).to_be_hidden()
    assert "play" in visit.page.evaluate("document.activeElement.className")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_and_every_text_can_be_read(
    browser: Browser, server: ThreadedServer, scheme: Any
) -> None:
    options: dict[str, Any] = {"viewport": PHONE, "is_mobile": True, "color_scheme": scheme}
    with Visit(browser, server.url, **options) as visit:
        expect(visit["pages"]).to_be_visible()
        expect(visit["pages"].get_by_role("link", name="Live")).to_be_hidden()
        visit["pages"].get_by_role("link", name="Search").click()
        visit["where"].locator("summary").click()
        look_for(visit, "a person falls")
        expect(first_tile(visit)).to_be_in_viewport()
        assert visit.num_pixels_too_wide() == 0
        number, low = visit.low_contrasts(MIN_CONTRAST)
        assert number > 20
        assert low == []
        visit.page.get_by_role("button", name=re.compile("^Play moment 1,")).click()
        expect(visit["player"]).to_be_visible()
        assert visit.low_contrasts(MIN_CONTRAST)[1] == []
        assert visit.num_pixels_too_wide() == 0
        visit.check_manners()
        visit.page.goto("about:blank")


def test_each_page_links_to_those_that_have_something_to_show(
    browser: Browser, server: ThreadedServer
) -> None:
    with Visit(browser, server.url) as visit:
        for path, there in {"/": [1, 0, 1], "/live": [1, 1, 1], "/search": [1, 0, 1]}.items():
            visit.page.goto(f"{server.url}{path}")
            links = visit.page.get_by_label("Pages").get_by_role("link")
            names = [
                name
                for name, is_there in zip(("Recognise", "Live", "Search"), there, strict=True)
                if is_there
            ]
            expect(links).to_have_text(names)


def test_a_server_without_an_archive_says_how_to_get_one(browser: Browser, tmp_path: Path) -> None:
    with ThreadedServer(tmp_path) as server, Visit(browser, server.url) as visit:
        expect(visit["version"]).to_contain_text("actionclip-deploy")
        expect(visit["pages"]).to_be_hidden()
        visit.page.goto(f"{server.url}/search")
        expect(visit["none"]).to_contain_text("--archive ARCHIVE")
        expect(visit["search"]).to_be_hidden()


def test_an_archive_that_fills_is_seen_without_a_new_start(
    browser: Browser, tmp_path: Path
) -> None:
    ArchiveWriter.open(tmp_path / "archive", archive_model(tmp_path)).close()
    with (
        ThreadedServer(tmp_path, archive=tmp_path / "archive") as server,
        Visit(browser, server.url) as visit,
    ):
        visit.page.goto(f"{server.url}/search?text=a+person+falls")
        expect(visit["empty"]).to_contain_text("has no windows yet")
        path = tmp_path / "a.mp4"
        path.write_bytes(b"nothing")
        with ArchiveWriter.open(tmp_path / "archive", archive_model(tmp_path)) as writer:
            put_video(writer, path, text_embeddings(tmp_path, ["a person falls"])[0])
        visit["send"].click()
        expect(first_tile(visit).locator(".file")).to_have_text("a.mp4")
        visit.page.goto("about:blank")


def test_a_key_is_asked_for_and_opens_pictures_and_videos_too(
    browser: Browser, folder: Path, tmp_path: Path
) -> None:
    server = ThreadedServer(tmp_path, archive=folder / "archive", api_keys=(KEY,))
    with server, Visit(browser, server.url) as visit:
        visit.page.goto(f"{server.url}/search?text=a+person+falls")
        expect(visit["key"]).to_be_focused()
        visit["key"].fill("another")
        visit.page.keyboard.press("Enter")
        expect(visit["key-hint"]).to_contain_text("does not take this key")
        visit["key"].fill(KEY)
        visit.page.keyboard.press("Enter")
        expect(visit["key-part"]).to_be_hidden()
        image = first_tile(visit).locator("img")
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 96
        visit.page.get_by_role("button", name=re.compile("^Play moment 1,")).click()
        wait_for_film(visit)
        assert not any(KEY in url for url in visit.requests)
        visit.check_manners()
        visit.page.goto("about:blank")
