"""The page's files and its rendered samples, as the server gives them."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import error_of, make_service, running_app
from starlette.testclient import TestClient

from actionclip_deploy.motions import FRAME_SIZE, NUM_FRAMES, all_labels
from actionclip_deploy.serve import page
from actionclip_deploy.serve.app import create_app
from actionclip_deploy.serve.page import (
    PAGE_TYPES,
    SAMPLES,
    SWAGGER_TYPES,
    SampleVideos,
    page_file,
)
from actionclip_deploy.video import VideoReader

MAX_PAGE_BYTES = 112 * 1024  # of all pages together
MAX_SAMPLE_BYTES = 40 * 1024

ADDRESSES = {name: f"/page/{name}" for name in (*PAGE_TYPES, *SWAGGER_TYPES)}
ADDRESSES |= {"index.html": "/", "docs.html": "/docs"}
ADDRESSES |= {"live.html": "/live", "search.html": "/search"}
TYPES = {**PAGE_TYPES, **SWAGGER_TYPES}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with running_app(tmp_path) as client:
        yield client


@pytest.mark.parametrize("name", TYPES)
def test_each_file_of_the_page_has_its_type_and_the_policy(client: TestClient, name: str) -> None:
    response = client.get(ADDRESSES[name])
    assert response.status_code == 200
    assert response.content == page_file(name)
    assert response.headers["content-type"] == TYPES[name]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    policy = response.headers["content-security-policy"].split("; ")
    assert {"default-src 'self'", "object-src 'none'", "frame-ancestors 'none'"} <= set(policy)
    # Swagger UI draws with styles that it makes; no page runs scripts that it does not load.
    unsafe = {each for each in policy if "unsafe" in each}
    assert unsafe == ({"style-src 'self' 'unsafe-inline'"} if name == "docs.html" else set())


def test_the_folder_of_the_page_holds_the_files_that_are_served_and_no_others() -> None:
    folder = Path(page.__file__).parent
    names = {path.name for path in folder.iterdir()} - {"__init__.py", "__pycache__"}
    assert names == set(PAGE_TYPES)


def test_the_page_is_small() -> None:
    assert sum(len(page_file(name)) for name in PAGE_TYPES) < MAX_PAGE_BYTES


def test_the_page_asks_for_nothing_but_relative_addresses_that_there_are(
    client: TestClient,
) -> None:
    # Relative ones work behind a proxy that gives the server a folder of its own.
    asked = []
    for name in ("index.html", "live.html", "search.html"):
        asked += re.findall(r'(?:href|src)="([^"]*)"', page_file(name).decode())
    for name in ("page.js", "live.js", "search.js"):
        asked += re.findall(r'from "\./([^"]*)"', page_file(name).decode())
    assert len(asked) >= 5
    for address in asked:
        assert ":" not in address
        assert not address.startswith("/")
        found = [client.get(f"/{address}"), client.get(f"/page/{address}")]
        assert 200 in [response.status_code for response in found], address
    for name in PAGE_TYPES:
        outside = re.findall(r"https?://[^\s\"'`]+", page_file(name).decode())
        assert [each for each in outside if each != "http://www.w3.org/2000/svg"] == []


def test_nothing_in_the_page_needs_inline_styles_or_scripts() -> None:
    for name in ("index.html", "live.html", "search.html", "docs.html"):
        markup = page_file(name).decode()
        assert re.search(r"\s(style|on[a-z]+)=", markup) is None
        assert "<style" not in markup
        assert re.findall(r"<script(?![^>]*\ssrc=)", markup) == []
    for name in ("page.js", "live.js", "search.js", "answer.js", "queue.js", "requests.js"):
        forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Storage"
        assert re.search(forbidden, page_file(name).decode()) is None


@pytest.mark.parametrize(
    "path",
    [
        "/page/index.html",
        "/page/docs.html",
        "/page/live.html",
        "/live.html",
        "/page/search.html",
        "/page/main.py",
        "/page/other.js",
        "/page/%2e%2e%2fapi_page.py",
        "/page/..%2fservice.py",
        "/page/%2fetc%2fpasswd",
        "/page/page.css%00",
        "/page/",
        "/page",
        "/index.html",
        "/samples/none.mp4",
        "/samples/%2e%2e%2f%2e%2e%2fbundle%2fmanifest.mp4",
        f"/samples/{SAMPLES[0].name}",
        f"/samples/{SAMPLES[0].name}.avi",
    ],
)
def test_no_other_name_is_looked_for(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404
    assert error_of(response)["code"] == "not_found"


@pytest.mark.parametrize(
    "path", ["/", "/live", "/search", "/docs", "/page/page.js", f"/samples/{SAMPLES[0].name}.mp4"]
)
def test_what_a_browser_has_already_is_not_sent_again(client: TestClient, path: str) -> None:
    first = client.get(path)
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for given in (tag, f'"other", W/{tag}'):
        again = client.get(path, headers={"if-none-match": given})
        assert again.status_code == 304
        assert again.content == b""
        assert again.headers["etag"] == tag
    assert client.get(path, headers={"if-none-match": '"other"'}).content == first.content


@pytest.mark.parametrize("path", ["/", "/page/page.css", "/samples"])
def test_heads_are_those_of_the_bodies(client: TestClient, path: str) -> None:
    head, body = client.head(path), client.get(path)
    assert head.status_code == 200
    assert head.content == b""
    for name in ("content-type", "content-length"):
        assert head.headers[name] == body.headers[name]


def test_the_page_takes_nothing_that_changes_something(client: TestClient) -> None:
    for path in ("/", "/page/page.js", "/samples"):
        assert error_of(client.post(path))["code"] == "method_not_allowed"


def test_the_page_comes_without_a_key_and_the_api_does_not(tmp_path: Path) -> None:
    with running_app(tmp_path, api_keys=("secret",)) as client:
        for path in ("/", "/page/page.js", "/samples", f"/samples/{SAMPLES[0].name}.mp4"):
            assert client.get(path).status_code == 200
        assert client.get("/v1/info").status_code == 401


def test_the_page_comes_from_a_server_that_is_still_starting(tmp_path: Path) -> None:
    # Without a `with` nothing starts the service.
    client = TestClient(create_app(make_service(tmp_path)))
    assert client.get("/").status_code == 200
    assert error_of(client.get("/v1/info"))["code"] == "not_ready"


def test_the_document_of_the_api_is_about_the_api_alone(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    pages = ("/page", "/samples", "/docs", "/live", "/search")
    assert [path for path in paths if path == "/" or path.startswith(pages)] == []


def test_the_page_of_the_api_can_be_given_a_key_where_one_is_needed(tmp_path: Path) -> None:
    for keys, number in (((), 0), (("secret",), 1)):
        with running_app(tmp_path / str(number), api_keys=keys) as client:
            assert client.get("/docs").status_code == 200
            document = client.get("/openapi.json").json()
        schemes = document["components"].get("securitySchemes", {})
        assert [scheme["scheme"] for scheme in schemes.values()] == ["bearer"] * number
        assert ("security" in document["paths"]["/v1/classify"]["post"]) == bool(keys)
        assert "security" not in document["paths"]["/healthz"]["get"]


def test_samples_come_with_their_labels_among_those_to_choose_from(tmp_path: Path) -> None:
    with running_app(tmp_path, source_file="motions", known="a red star") as client:
        listed = client.get("/samples").json()
    labels = listed["labels"]
    known = {str(label) for label in all_labels()}
    assert [each["name"] for each in listed["samples"]] == [each.name for each in SAMPLES]
    for sample in listed["samples"]:
        assert sample["label"] in labels
        assert sample["name"] == re.sub(r"^an? ", "", sample["label"]).replace(" ", "-")
    assert set(labels) <= known
    assert len(set(labels)) == len(labels) == 2 * len(SAMPLES)
    assert set(listed["examples"]) <= known
    assert "shapes in motion only" in listed["note"]


def test_another_model_is_not_shown_with_samples_that_it_cannot_answer(tmp_path: Path) -> None:
    with running_app(tmp_path / "whole") as client:
        listed = client.get("/samples").json()
    assert (listed["samples"], listed["labels"], listed["note"]) == ([], [], None)
    assert "riding a bike" in listed["examples"]
    with running_app(tmp_path / "small", known="a red star") as client:
        listed = client.get("/samples").json()
    assert listed["samples"] == listed["examples"] == []
    assert re.match(r"This model was trained on \d+ of \d+ tokens", listed["note"])


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_each_sample_is_a_video(client: TestClient, tmp_path: Path, sample: page.DemoVideo) -> None:
    response = client.get(f"/samples/{sample.name}.mp4")
    assert response.headers["content-type"] == "video/mp4"
    assert len(response.content) < MAX_SAMPLE_BYTES
    path = tmp_path / "sample.mp4"
    path.write_bytes(response.content)
    with VideoReader(path) as video:
        assert video.num_frames == NUM_FRAMES
        assert video.height == video.width
        assert video.height >= FRAME_SIZE


def test_a_sample_is_rendered_once_however_many_ask_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rendered = []

    def render(sample: page.DemoVideo, folder: Path | None = None) -> bytes:
        rendered.append(sample.name)
        return sample.name.encode()

    monkeypatch.setattr(page.DemoVideo, "render", render)
    videos = SampleVideos()
    got: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: got.append(videos.get(SAMPLES[1]))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [SAMPLES[1].name.encode()] * 8
    assert videos.get(SAMPLES[0]) == SAMPLES[0].name.encode()
    assert rendered == [SAMPLES[1].name, SAMPLES[0].name]


def test_rendering_a_sample_leaves_no_file_behind(tmp_path: Path) -> None:
    assert SampleVideos(tmp_path).get(SAMPLES[0])
    assert list(tmp_path.iterdir()) == []
