"""The web page in a browser, at a real server of the default model."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_browser import Visit, running_browser
from PIL import Image
from playwright.sync_api import Browser, Route, expect
from serving_programs import Server, running_server

from actionclip_deploy import Bundle, LabelBank, open_runtime
from actionclip_deploy.calibration import Calibration
from actionclip_deploy.motions import MotionLabel, all_labels, render_clip, write_video
from actionclip_deploy.records import VideoRecord
from actionclip_deploy.serve.page import SAMPLES

LABELS = [str(label) for label in all_labels()][::7]
SHOWN = MotionLabel("cross", "green", "moving right")  # none of the samples
KEY = "a-key-of-the-tests"
MIN_CONTRAST = 4.5  # WCAG 2.1, AA, for text of usual size
PHONE = {"width": 320, "height": 640}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def bundle(
    browser: Browser, motions_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """The default model with two banks: one is calibrated, so that hardly anything fits."""
    folder = tmp_path_factory.mktemp("page")
    bundle = Bundle.open(shutil.copytree(motions_bundle, folder / "motions"))
    with open_runtime(bundle, "onnxruntime") as runtime:
        bank = LabelBank.build(bundle, runtime, LABELS, name="some")
    bank.save(bundle)
    replace(bank, name="strict", calibration=_never_sure(bundle)).save(bundle)
    return bundle


@pytest.fixture(scope="module")
def server(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--runtime", "onnxruntime", "--workers", "1")
    with running_server(bundle.path, tmp_path_factory.mktemp("server"), *options) as server:
        yield server


def _never_sure(bundle: Bundle) -> Calibration:
    """At this temperature the best of so many labels keeps a low score, whatever is shown."""
    return Calibration(
        temperature=10.0,
        threshold=0.99,
        method="template-softmax",
        views="1x1",
        visual_sha256=bundle.visual_sha256,
        target_kept=0.95,
        kept_known=0.95,
        rejected_unknown=None,
        num_known=10,
        num_unknown=0,
        error_before=0.1,
        error_after=0.1,
    )


@pytest.fixture
def visit(browser: Browser, server: Server) -> Iterator[Visit]:
    with Visit(browser, server.url) as visit:
        yield visit
        visit.check_manners()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "my holiday.mp4"
    return write_video(path, render_clip(SHOWN, seed=11))


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"no video at all " * 100)
    return path


def classify(server: Server, path: Path, **fields: Any) -> dict[str, Any]:
    """What the server says without a page."""
    with server.client() as client, path.open("rb") as file:
        files = {"video": (path.name, file)}
        answer: dict[str, Any] = client.post("/v1/classify", files=files, data=fields).json()
    return answer


def refuse(route: Route, status: int, code: str, **headers: str) -> None:
    error = {"code": code, "message": "A sentence of the server.", "request_id": "r1"}
    route.fulfill(status=status, headers=headers, json={"error": error})


@pytest.mark.parametrize("sample", [SAMPLES[1], SAMPLES[3]], ids=lambda sample: sample.name)
def test_a_sample_is_recognised_among_the_labels_that_come_with_it(
    visit: Visit, sample: Any
) -> None:
    visit.choose_sample(sample.name)
    expect(visit["labels-count"]).to_have_text(f"{2 * len(SAMPLES)} labels")
    expect(visit.page.locator("[aria-pressed=true]")).to_have_attribute("data-name", sample.name)
    visit.ask()
    label, score = visit.ranking()[0]
    assert label == sample.label()
    assert float(re.sub(r"[^0-9.]", "", score)) > 50
    expect(visit["status"]).to_contain_text(label)
    expect(visit.page.locator(".best-label")).to_have_text(label)


def held_sample(visit: Visit, name: str) -> Callable[[], None]:
    """Choose a sample whose file does not come before the function that this gives is called."""
    held: list[Route] = []
    address = visit.page.url
    visit.page.goto("about:blank")  # ends the requests that the page has made already
    visit.page.route(f"**/samples/{name}.mp4", lambda route: held.append(route))  # noqa: PLW0108
    visit.page.goto(address)
    visit.page.locator(f"[data-name={name}]").click()

    def let_come() -> None:
        while not held:  # Playwright calls the handler while it waits
            visit.page.wait_for_timeout(20)
        held[0].continue_()

    return let_come


def test_a_sample_that_comes_late_is_waited_for(visit: Visit) -> None:
    let_come = held_sample(visit, SAMPLES[0].name)
    visit["send"].click()
    expect(visit["missing"]).to_be_hidden()
    expect(visit["empty"]).to_be_visible()
    let_come()
    expect(visit["result"]).to_be_visible()
    assert visit.ranking()[0][0] == SAMPLES[0].label()


def test_a_sample_that_comes_too_late_replaces_nothing(visit: Visit, video: Path) -> None:
    name = SAMPLES[0].name
    let_come = held_sample(visit, name)
    visit.choose(video)
    with visit.page.expect_response(f"**/samples/{name}.mp4"):
        let_come()
    visit["labels"].fill(str(SHOWN))
    visit.ask()
    expect(visit.file_names).to_have_text(video.name)


def test_an_uploaded_video_is_recognised_among_labels_that_were_typed(
    visit: Visit, server: Server, video: Path
) -> None:
    others = [str(SHOWN._replace(motion="moving left")), str(SHOWN._replace(shape="heart"))]
    visit.choose(video)
    visit["labels"].fill("\n".join([others[0], "  ", f" {SHOWN} ", others[1], others[1]]))
    expect(visit["labels-count"]).to_have_text("3 labels")
    visit.ask()
    told = classify(server, video, labels=json.dumps([others[0], str(SHOWN), others[1]]))
    ranked = [each["label"] for each in told["results"][0]["predictions"]]
    assert [label for label, _ in visit.ranking()] == ranked
    assert ranked[0] == str(SHOWN)


def test_the_answer_says_all_that_the_server_says(visit: Visit, video: Path) -> None:
    visit.choose(video)
    visit.choose_bank("some")
    with visit.page.expect_response("**/v1/classify") as got:
        visit.ask()
    told = got.value.json()
    (result,) = told["results"]
    for (label, score), prediction in zip(visit.ranking(), result["predictions"], strict=True):
        assert label == prediction["label"]
        number = float(score.strip("<>% "))
        assert abs(number - 100 * prediction["score"]) <= 0.1  # one place after the point
    facts = visit.facts()
    assert facts["Runtime"] == told["runtime"]["name"] == "onnxruntime"
    assert facts["Execution provider"] == "CPU"
    assert facts["Precision"] == "fp32"
    assert facts["Engine"] == "none"
    assert (facts["Label bank"], facts["Bank version"]) == ("some", "1")
    assert told["bank"]["sha256"].startswith(facts["Bank SHA-256"].split()[0])
    num_templates = len(result["templates"])
    assert facts["Bank holds"] == f"{len(LABELS)} labels × {num_templates} templates"
    assert facts["Request"] == told["request_id"]
    agreeing = f"{sum(vote['agrees'] for vote in result['templates'])} of {num_templates} templates"
    expect(visit.page.locator("summary", has_text=agreeing)).to_be_visible()
    stages = visit.page.locator(".legend li").all_inner_texts()
    assert len(stages) == len(result["timings_ms"]) + 1  # and the rest
    assert any(text.startswith("decode") for text in stages)


def test_templates_that_choose_another_label_are_told_apart(
    visit: Visit, server: Server, video: Path
) -> None:
    told = classify(server, video, labels="some", per_template="true")
    other = {"label": "something else", "score": 0.4, "agrees": False}
    told["results"][0]["templates"][2].update(other)
    visit.page.route("**/v1/classify", lambda route: route.fulfill(json=told))
    visit.choose(video)
    visit.choose_bank("some")
    visit.ask()
    visit.page.locator("summary", has_text="15 of 16 templates").click()
    expect(visit.page.locator(".votes .differs")).to_have_count(1)
    expect(visit.page.locator(".votes .differs")).to_contain_text("something else, 40.0 %")


def test_the_frames_are_those_that_the_model_saw(visit: Visit, server: Server, video: Path) -> None:
    told = classify(server, video, labels="some", return_frames="true")["results"][0]
    num_frames, height, width, _ = told["pixels"]["shape"]
    expected = np.frombuffer(base64.b64decode(told["pixels"]["data"]), np.uint8)
    expected = expected.reshape(num_frames, height, width, 3)

    visit.choose(video)
    visit.choose_bank("some")
    visit.ask()
    drawn = visit.page.locator(".frames canvas").evaluate_all(
        """(all) => all.map((each) => Array.from(
             each.getContext("2d").getImageData(0, 0, each.width, each.height).data))"""
    )
    frames = np.array(drawn, np.uint8).reshape(-1, height, width, 4)
    np.testing.assert_array_equal(frames[..., :3], expected[told["pixels"]["views"][0]])
    assert (frames[..., 3] == 255).all()
    times = visit.page.locator(".frames li span").all_inner_texts()
    assert times == [f"{seconds:.2f} s" for seconds in told["frames"]["pts_seconds"][0]]


def test_several_clips_are_shown_one_by_one(visit: Visit, video: Path) -> None:
    visit.choose(video)
    visit.choose_bank("some")
    visit.page.get_by_text("Options").click()
    visit["clips"].select_option("3")
    visit.ask()
    expect(visit.page.locator(".frames")).to_have_count(3)
    for clip in (1, 2, 3):
        frames = visit.page.get_by_role("list", name=f"Clip {clip}").locator("canvas")
        expect(frames).to_have_count(8)


def test_labels_may_be_scored_each_by_itself(visit: Visit, video: Path) -> None:
    visit.choose(video)
    visit["labels"].fill(f"{SHOWN}\n{SHOWN._replace(motion='moving left')}")
    visit.page.get_by_text("Options").click()
    visit["multi"].check()
    visit.ask()
    assert visit.facts()["Scores"] == "each label by itself"


def test_unknown_is_said_where_a_calibrated_bank_says_so(visit: Visit, video: Path) -> None:
    visit.choose(video)
    visit.choose_bank("strict")
    visit.ask()
    expect(visit["bank"]).not_to_have_attribute("aria-invalid", "true")
    expect(visit.page.locator(".badge")).to_have_text("unknown")
    expect(visit["result"]).to_contain_text("below the label bank’s threshold of 99.0 %")
    expect(visit["status"]).to_contain_text("Unknown: no label fits well enough.")
    assert "threshold 99.0 %" in visit.facts()["Calibrated"]
    visit.choose_bank("some")
    visit.ask()
    expect(visit.page.locator(".badge")).to_have_count(0)


def test_a_bank_that_is_being_built_can_be_chosen_once_it_is_done(
    visit: Visit, server: Server
) -> None:
    with server.client() as client:
        told = client.get("/v1/labels").json()
    building = {"state": "building", "done": 30, "total": 120, "error": None, "version": None}
    first = {**told["banks"][0], "active": None, "build": building}
    listed = {"banks": [first, *told["banks"][1:]]}
    visit.page.route("**/v1/labels", lambda route: route.fulfill(json=listed))
    visit["source-bank"].check()
    option = visit["bank"].locator("option").first
    expect(option).to_have_text("some – building, 25 %")
    expect(option).to_be_disabled()
    visit.page.unroute("**/v1/labels")
    expect(option).to_have_text(f"some – {len(LABELS)} labels, version 1")
    expect(option).to_be_enabled()


def test_a_server_without_banks_says_how_to_get_one(visit: Visit, video: Path) -> None:
    visit.page.route("**/v1/labels", lambda route: route.fulfill(json={"banks": []}))
    visit.choose(video)
    visit["source-bank"].check()
    expect(visit["bank-hint"]).to_contain_text("PUT v1/labels/NAME")
    visit["send"].click()
    expect(visit["missing"]).to_have_text("Choose a label bank, or use your own labels.")


def test_a_video_may_be_dropped_anywhere_on_the_page(visit: Visit) -> None:
    transfer = visit.page.evaluate_handle(
        """() => {
          const transfer = new DataTransfer();
          transfer.items.add(new File(["bytes"], "dropped.mp4", { type: "video/mp4" }));
          return transfer;
        }"""
    )
    visit.page.dispatch_event("#drop", "dragenter", {"dataTransfer": transfer})
    expect(visit["drop"]).to_have_class(re.compile("over"))
    visit.page.dispatch_event("#answer", "drop", {"dataTransfer": transfer})
    expect(visit["drop"]).not_to_have_class(re.compile("over"))
    expect(visit.file_names).to_have_text("dropped.mp4")
    visit.page.get_by_role("button", name="Remove dropped.mp4").click()
    expect(visit["chosen"]).to_be_hidden()
    expect(visit["drop"]).to_be_focused()


def test_labels_that_somebody_typed_are_not_replaced_by_those_of_a_sample(visit: Visit) -> None:
    visit["labels"].fill("mine")
    visit.choose_sample(SAMPLES[0].name)
    expect(visit["labels"]).to_have_value("mine")
    visit["suggest"].click()
    expect(visit["labels-count"]).to_have_text(f"{2 * len(SAMPLES)} labels")


def test_a_broken_file_is_answered_by_the_sentence_of_the_server(
    visit: Visit, server: Server, broken: Path
) -> None:
    told = classify(server, broken, labels="some")["error"]
    visit.choose(broken)
    expect(visit["no-preview"]).to_be_visible()
    visit.choose_bank("some")
    visit["send"].click()
    expect(visit.error("message")).to_have_text(told["message"])
    expect(visit.error("title")).to_have_text("The video cannot be read")
    expect(visit.error("advice")).to_contain_text("convert it to MP4")
    expect(visit.error("facts")).to_have_text(
        re.compile("^Status 422 · video_unreadable · request [0-9a-f]{32}$")
    )
    expect(visit.retry).to_have_count(0)
    expect(visit["status"]).to_contain_text(told["message"])


def test_what_is_missing_is_said_before_anything_is_sent(visit: Visit, video: Path) -> None:
    visit["send"].click()
    expect(visit["missing"]).to_have_text("Choose a video first.")
    expect(visit["drop"]).to_be_focused()
    visit.choose(video)
    expect(visit["missing"]).to_be_hidden()
    visit["labels"].fill(" \n ")
    visit["send"].click()
    expect(visit["missing"]).to_have_text("Enter at least one label.")
    expect(visit["labels"]).to_be_focused()
    visit["labels"].fill("\n".join(map(str, range(257))))
    visit["send"].click()
    expect(visit["missing"]).to_contain_text("at most 256 labels")
    assert not any(url.endswith("/v1/classify") for url in visit.requests)


def test_a_busy_server_is_asked_again_when_it_says(visit: Visit, video: Path) -> None:
    visit.choose(video)
    visit.choose_bank("some")
    headers = {"retry-after": "2"}
    visit.page.route("**/v1/classify", lambda route: refuse(route, 429, "queue_full", **headers))
    visit["send"].click()
    expect(visit.error("title")).to_have_text("The server is busy")
    expect(visit.error("message")).to_have_text("A sentence of the server.")
    expect(visit.retry).to_have_text(re.compile(r"^Try again in [12] s$"))
    expect(visit.retry).to_be_disabled()
    expect(visit["status"]).to_contain_text("Try again in 2 s.")
    visit.page.unroute("**/v1/classify")
    expect(visit.retry).to_be_enabled()
    expect(visit.retry).to_have_text("Try again")
    visit.retry.click()
    expect(visit["result"]).to_be_visible()


def test_an_answer_that_is_none_of_the_server_is_shown_as_well(visit: Visit, video: Path) -> None:
    visit.choose(video)
    visit.choose_bank("some")
    visit.page.route(
        "**/v1/classify", lambda route: route.fulfill(status=502, body="<html>Bad gateway</html>")
    )
    visit["send"].click()
    expect(visit.error("message")).to_contain_text("The answer was 502")
    visit.page.unroute("**/v1/classify")
    visit.page.route("**/v1/classify", lambda route: route.abort())
    visit.retry.click()
    expect(visit.error("title")).to_have_text("The server does not answer")
    expect(visit.retry).to_be_enabled()


def test_a_request_can_be_cancelled(visit: Visit, video: Path) -> None:
    held: list[Route] = []
    visit.page.route("**/v1/classify", lambda route: held.append(route))  # noqa: PLW0108
    visit.choose(video)
    visit.choose_bank("some")
    visit["send"].click()
    expect(visit["busy"]).to_be_visible()
    expect(visit["busy-time"]).to_have_text(re.compile(r"^\d+\.\d s$"))
    expect(visit["answer"]).to_have_attribute("aria-busy", "true")
    visit["send"].dispatch_event("click")  # does nothing more
    with visit.page.expect_event("requestfailed") as failed:
        visit["cancel"].click()
    assert failed.value.url.endswith("/v1/classify")
    expect(visit["status"]).to_have_text("Cancelled.")
    expect(visit["empty"]).to_be_visible()
    expect(visit["cancel"]).to_be_hidden()
    expect(visit["send"]).to_be_focused()
    assert len(held) == 1
    visit.page.unroute("**/v1/classify")
    visit.ask()


def test_a_key_is_asked_for_and_kept_nowhere(
    browser: Browser, tiny_bundle: Path, video: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(KEY)
    options = ("--runtime", "onnxruntime", "--workers", "1", "--api-keys", str(keys))
    with (
        running_server(tiny_bundle, tmp_path, *options) as server,
        Visit(browser, server.url) as visit,
    ):
        expect(visit["key"]).to_be_focused()
        expect(visit["served"]).to_have_text("This server asks for a key.")
        for wrong, hint in (("käse", "ASCII"), ("another", "does not take this key")):
            visit["key"].fill(wrong)
            visit["key-use"].click()
            expect(visit["key-hint"]).to_contain_text(hint)
        visit["key"].fill(KEY)
        visit.page.keyboard.press("Enter")
        expect(visit["key-part"]).to_be_hidden()
        expect(visit["badge"]).to_contain_text("verified")
        visit.choose(video)
        visit["labels"].fill("run\nwalk")
        visit.ask()
        assert len(visit.ranking()) == 2
        kept = visit.page.evaluate(
            "[localStorage.length, sessionStorage.length, document.cookie, location.href]"
        )
        assert kept == [0, 0, "", f"{server.url}/"]
        assert not any(KEY in url for url in visit.requests)
        visit.check_manners()
        visit.page.reload()
        expect(visit["key"]).to_be_focused()
        expect(visit["key"]).to_have_value("")


def test_names_and_labels_are_text_whatever_they_look_like(
    visit: Visit, video: Path, tmp_path: Path
) -> None:
    markup = "star <img src=x onerror=x>"
    path = tmp_path / "<b onclick=alert(1)>.mp4"
    path.write_bytes(video.read_bytes())
    visit.choose(path)
    visit["labels"].fill(markup)
    visit.ask()
    assert visit.ranking() == [(markup, "100.0 %")]
    expect(visit.page.locator("img, #files b")).to_have_count(0)


def test_everything_can_be_done_by_keyboard(visit: Visit, video: Path) -> None:
    expect(visit.page.locator(".sample")).to_have_count(len(SAMPLES))
    visit.tab_to("drop")
    with visit.page.expect_file_chooser() as chooser:
        visit.page.keyboard.press("Enter")
    chooser.value.set_files(video)
    visit.tab_to(name=SAMPLES[2].name)
    visit.page.keyboard.press("Enter")
    expect(visit.file_names).to_have_text(f"{SAMPLES[2].name}.mp4")
    visit.tab_to("source-own")
    visit.page.keyboard.press("ArrowRight")
    expect(visit["bank-part"]).to_be_visible()
    expect(visit["bank"].locator("option")).to_have_count(2)
    visit.page.keyboard.press("ArrowLeft")
    visit.tab_to("labels")
    expect(visit["labels"]).to_have_value(re.compile(SAMPLES[2].label()))
    visit.tab_to("send")
    visit.page.keyboard.press("Enter")
    expect(visit["result"]).to_be_visible()
    expect(visit["send"]).to_be_focused()
    assert visit.ranking()[0][0] == SAMPLES[2].label()


def test_every_control_has_a_name(visit: Visit) -> None:
    expect(visit.page.locator(".sample")).to_have_count(len(SAMPLES))
    for role in ("button", "textbox", "combobox", "radio", "checkbox", "link"):
        for control in visit.page.get_by_role(role).all():
            expect(control).to_have_accessible_name(re.compile(r"\S"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_in_both_schemes(
    browser: Browser, server: Server, video: Path, broken: Path, scheme: str
) -> None:
    grounds = {"light": "rgb(245, 244, 240)", "dark": "rgb(18, 23, 26)"}
    with Visit(browser, server.url, color_scheme=scheme) as visit:
        expect(visit.page.locator("body")).to_have_css("background-color", grounds[scheme])
        visit["send"].click()  # with what is missing
        for part in ("#form", "#answer"):
            visit.page.locator(f"{part} details").evaluate_all(
                "(all) => all.forEach((each) => (each.open = true))"
            )
        assert visit.low_contrasts(MIN_CONTRAST)[1] == []
        visit.choose(broken)
        visit.choose_bank("strict")
        visit["send"].click()
        expect(visit["error"]).to_be_visible()
        assert visit.low_contrasts(MIN_CONTRAST)[1] == []
        visit.choose(video)
        visit.ask()
        visit.page.locator("#result details").evaluate("(each) => (each.open = true)")
        number, low = visit.low_contrasts(MIN_CONTRAST)
        assert low == []
        assert number > 50
        visit.check_manners()


def test_a_phone_of_320_pixels_shows_all_without_scrolling_sideways(
    browser: Browser, server: Server, broken: Path
) -> None:
    with Visit(browser, server.url, viewport=PHONE, has_touch=True, is_mobile=True) as visit:
        expect(visit.page.locator(".sample")).to_have_count(len(SAMPLES))
        assert visit.num_pixels_too_wide() == 0
        visit.choose_sample(SAMPLES[3].name)
        visit.ask()
        visit.page.locator("#result details").evaluate("(each) => (each.open = true)")
        assert visit.num_pixels_too_wide() == 0
        expect(visit.page.locator(".best-label")).to_be_in_viewport()
        long = broken.with_name(f"{'w' * 120}.mp4")
        broken.rename(long)
        visit.choose(long)
        visit["labels"].fill("w" * 200)
        visit["send"].click()
        expect(visit.error("title")).to_be_in_viewport()
        assert visit.num_pixels_too_wide() == 0
        visit.check_manners()


def test_nothing_moves_where_less_motion_is_wanted(
    browser: Browser, server: Server, video: Path
) -> None:
    for wish, moves in (("reduce", False), ("no-preference", True)):
        with Visit(browser, server.url, reduced_motion=wish) as visit:
            visit.page.route("**/v1/classify", lambda _: None)
            visit.choose(video)
            visit.choose_bank("some")
            visit["send"].click()
            expect(visit["busy"]).to_be_visible()
            expect(visit["preview"]).to_have_js_property("autoplay", moves)
            number = visit.page.evaluate("document.getAnimations().length")
            assert (number > 0) == moves


def test_the_page_works_behind_a_path_of_a_proxy(browser: Browser, server: Server) -> None:
    # What a proxy does: take its own folder off the path.
    def forward(route: Route) -> None:
        route.continue_(url=route.request.url.replace("/clips/", "/"))

    context = browser.new_context()
    context.route("**/clips/**", forward)
    page = context.new_page()
    page.goto(f"{server.url}/clips/")
    expect(page.locator("#badge")).to_contain_text("verified")
    expect(page.locator(".sample")).to_have_count(len(SAMPLES))
    context.close()


WIDTHS = (320, 360, 768, 1280)


@pytest.fixture
def several(video: Path, broken: Path, tmp_path: Path) -> list[Path]:
    """A video, a file that is none, and another video."""
    other = MotionLabel("heart", "red", "growing")
    last = write_video(tmp_path / 'a "heart", red.mp4', render_clip(other, seed=5))
    return [video, broken, last]


def ask_all(visit: Visit, paths: list[Path], *labels: str) -> None:
    visit.choose(*paths)
    visit["labels"].fill("\n".join(labels))
    visit["send"].click()
    expect(visit.page.locator(".downloads")).to_be_visible()


def saved(visit: Visit, kind: str) -> str:
    with visit.page.expect_download() as got:
        visit.page.get_by_role("button", name=f"Download {kind}").click()
    assert got.value.suggested_filename == f"actionclip.{kind.lower()}"
    return Path(got.value.path()).read_text(encoding="utf-8")


def test_several_videos_have_an_answer_each_and_an_error_stands_in_its_place(
    visit: Visit, server: Server, several: list[Path]
) -> None:
    ask_all(visit, several, str(SHOWN), "a red heart growing")
    outcomes = visit.page.locator(".outcome")
    expect(outcomes).to_have_count(3)
    expect(outcomes.nth(0).locator("summary").first).to_contain_text(str(SHOWN))
    expect(outcomes.nth(1)).to_contain_text("The video cannot be read")
    expect(outcomes.nth(1)).to_contain_text(
        classify(server, several[1], labels="some")["error"]["message"]
    )
    expect(outcomes.nth(2).locator("summary").first).to_contain_text("a red heart growing")
    expect(visit.page.locator(".told")).to_have_text("2 of 3 videos recognised")
    expect(visit["status"]).to_have_text("2 of 3 videos recognised, 1 failed.")
    # Of the others, the whole answer is a click away.
    assert outcomes.nth(2).locator("canvas").count() == 0
    outcomes.nth(2).locator("summary").first.click()
    expect(outcomes.nth(2).locator("canvas")).to_have_count(8)


def test_answers_can_be_kept_as_json_and_csv(visit: Visit, several: list[Path]) -> None:
    ask_all(visit, several, str(SHOWN), "a red heart growing")
    records = json.loads(saved(visit, "JSON"))
    assert [each["name"] for each in records] == [path.name for path in several]
    validated = [VideoRecord.model_validate(each) for each in records]
    assert validated[1].error is not None
    assert validated[1].error.code == "video_unreadable"
    assert validated[0].bank is not None
    assert all("pixels" not in each for each in records)
    rows = list(csv.DictReader(io.StringIO(saved(visit, "CSV"), newline="")))
    assert [(row["video"], row["rank"], row["label"]) for row in rows] == [
        (several[0].name, "1", str(SHOWN)),
        (several[0].name, "2", "a red heart growing"),
        (several[1].name, "", ""),
        (several[2].name, "1", "a red heart growing"),
        (several[2].name, "2", str(SHOWN)),
    ]
    assert rows[2]["error"] == validated[1].error.message
    assert validated[0].predictions is not None
    assert float(rows[0]["score"]) == validated[0].predictions[0].score


def test_the_answer_for_one_video_can_be_kept_too(visit: Visit, video: Path) -> None:
    visit.choose(video)
    visit["labels"].fill(str(SHOWN))
    visit.ask()
    (record,) = json.loads(saved(visit, "JSON"))
    assert record["predictions"][0]["label"] == str(SHOWN)


def test_one_of_several_videos_is_tried_again_by_itself(visit: Visit, several: list[Path]) -> None:
    asked: list[str] = []

    def busy_for_the_last(route: Route) -> None:
        body = route.request.post_data_buffer or b""
        asked.append("heart" if b"heart" in body.split(b"filename=")[-1][:40] else "other")
        if asked.count("heart") == 1 and asked[-1] == "heart":
            refuse(route, 429, "queue_full", **{"retry-after": "1"})
        else:
            route.continue_()

    visit.page.route("**/v1/classify", busy_for_the_last)
    ask_all(visit, [several[0], several[2]], str(SHOWN), "a red circle growing")
    expect(visit.page.locator(".told")).to_have_text("1 of 2 videos recognised")
    visit.retry.click()
    expect(visit.page.locator(".told")).to_have_text("2 of 2 videos recognised")
    assert asked == ["other", "heart", "heart"]
    visit.page.unroute("**/v1/classify")


def test_what_would_meet_every_video_is_asked_once(visit: Visit, several: list[Path]) -> None:
    asked: list[Route] = []

    def refuse_all(route: Route) -> None:
        asked.append(route)
        refuse(route, 422, "bad_value")

    visit.page.route("**/v1/classify", refuse_all)
    ask_all(visit, several, str(SHOWN))
    assert len(asked) == 1
    expect(visit.page.locator(".outcome-says")).to_have_text(
        ["The server cannot use what was entered", "not asked", "not asked"]
    )


def test_several_videos_can_be_cancelled(visit: Visit, several: list[Path]) -> None:
    visit.page.route("**/v1/classify", lambda _: None)
    visit.choose(*several)
    visit.choose_bank("some")
    visit["send"].click()
    expect(visit.page.locator(".outcome-says").first).to_have_text("is recognised …")
    visit["cancel"].click()
    expect(visit.page.locator(".outcome-says")).to_have_text(["cancelled"] * 3)
    visit.page.unroute("**/v1/classify")
    visit["send"].click()
    expect(visit.page.locator(".told")).to_have_text("2 of 3 videos recognised")


def test_a_video_of_several_can_be_looked_at_and_removed(visit: Visit, several: list[Path]) -> None:
    visit.choose(*several)
    visit.file_names.nth(1).click()
    expect(visit["no-preview"]).to_be_visible()
    visit.file_names.nth(2).click()
    expect(visit["preview"]).to_be_visible()
    visit.page.get_by_role("button", name="Remove broken.mp4").click()
    expect(visit.file_names).to_have_text([several[0].name, several[2].name])


def test_words_that_the_model_does_not_know_are_named(visit: Visit, video: Path) -> None:
    visit.choose(video)
    visit["labels"].fill(f"{SHOWN}\na green cross dancing")
    visit.ask()
    expect(visit.page.locator(".warnings")).to_contain_text("The model does not know “dancing”")


def test_labels_of_unknown_words_are_refused_unless_somebody_wants_it(
    visit: Visit, video: Path
) -> None:
    visit.choose(video)
    visit["labels"].fill("opening a door\nriding a bike")
    visit["send"].click()
    expect(visit.error("title")).to_have_text("The model does not know these words")
    expect(visit.error("message")).to_contain_text("'opening a door'")
    visit.page.get_by_role("button", name="Recognise all the same").click()
    expect(visit["result"]).to_be_visible()
    expect(visit.page.locator(".warnings")).to_contain_text("“opening”, “door”, “riding”, “bike”")
    visit["send"].click()
    expect(visit.error("title")).to_be_visible()  # it was allowed once


def test_the_page_says_what_was_verified_and_what_the_model_is_for(
    visit: Visit, server: Server
) -> None:
    with server.client() as client:
        number = client.get("/v1/info").json()["verification"]["num_comparisons"]
    expect(visit["badge"]).to_have_text(
        re.compile(
            r"^verified on \d+ \w+ 20\d\d, \d\d:\d\d: onnxruntime in fp32, "
            rf"{number} comparisons with PyTorch’s golden outputs agree$"
        )
    )
    expect(visit["note"]).to_contain_text("This model knows shapes in motion only.")
    expect(visit["note"].locator("code").last).to_have_text(
        "actionclip export actionclip-k400-vit-b-32-8f"
    )
    shown = visit["labels"].get_attribute("placeholder") or ""
    assert set(shown.splitlines()) <= set(map(str, all_labels()))


def test_another_model_has_examples_of_its_own(
    browser: Browser, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    options = ("--runtime", "onnxruntime", "--workers", "1", "--no-verify")
    with (
        running_server(bundle, tmp_path, *options) as server,
        Visit(browser, server.url) as visit,
    ):
        expect(visit["labels"]).to_have_attribute(
            "placeholder", "playing the violin\nriding a bike\nbrushing teeth"
        )
        expect(visit["badge"]).to_contain_text("not verified: onnxruntime in fp32 was not compared")
        expect(visit["note"]).to_be_hidden()
        expect(visit["samples-part"]).to_be_hidden()
        with server.client() as client:
            client.put("/v1/labels/doors", json={"labels": ["opening a door", "closing a door"]})
            while client.get("/v1/labels/doors").json()["active"] is None:
                time.sleep(0.1)
        visit.page.reload()
        expect(visit["labels"]).to_have_attribute("placeholder", "opening a door\nclosing a door")
        visit.check_manners()


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_stands_over_anything_else_at_any_width(
    browser: Browser, server: Server, several: list[Path], width: int
) -> None:
    with Visit(browser, server.url, viewport={"width": width, "height": 700}) as visit:
        expect(visit.page.locator(".sample")).to_have_count(len(SAMPLES))
        assert visit.page.evaluate(_OVERLAPS) == []
        ask_all(visit, several, str(SHOWN), "a red heart growing")
        assert visit.num_pixels_too_wide() == 0
        for part in ("labels", "send", "answer"):
            visit[part].scroll_into_view_if_needed()
            assert visit.page.evaluate(_OVERLAPS) == []


def test_pictures_of_the_page_are_made_by_a_program(bundle: Bundle, tmp_path: Path) -> None:
    program = Path(__file__).parents[2] / "scripts" / "page_picture.py"
    words = ("--bundle", bundle.path, "--output", tmp_path / "made", "--width", "400")
    done = subprocess.run(
        [sys.executable, program, *words, "--scene", "several", "--scene", "start"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "made" / "several-400.png") as picture:
        assert picture.width == 400
        assert picture.height > 1000
    assert (tmp_path / "made" / "start-400.png").exists()


# Pairs of the page's parts of which one stands over the other.
_OVERLAPS = """
() => {
  const parts = [...document.querySelectorAll(".top, .card, .go, footer")]
    .filter((each) => each.checkVisibility())
    .map((each) => [each.id || each.className, each.getBoundingClientRect()]);
  return parts.flatMap(([name, a], place) => parts.slice(place + 1)
    .filter(([, b]) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)
    .map(([other]) => `${name} over ${other}`));
}
"""


def test_the_page_of_the_api_loads_nothing_from_elsewhere_and_asks_the_server(
    visit: Visit,
) -> None:
    visit.page.get_by_role("link", name="API description").click()
    info = visit.page.locator(".opblock", has_text="/v1/info")
    info.locator(".opblock-summary-control").click()
    info.get_by_role("button", name="Try it out").click()
    info.get_by_role("button", name="Execute").click()
    expect(info.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
    expect(visit.page.locator(".opblock-tag")).to_have_count(3)


def test_the_page_of_the_api_works_behind_a_path_of_a_proxy(
    browser: Browser, server: Server
) -> None:
    def forward(route: Route) -> None:
        route.continue_(url=route.request.url.replace("/clips/", "/"))

    context = browser.new_context()
    context.route("**/clips/**", forward)
    page = context.new_page()
    page.goto(f"{server.url}/clips/docs")
    expect(page.locator(".opblock", has_text="/v1/info")).to_be_visible()
    context.close()
