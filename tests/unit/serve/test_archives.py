"""The archive of a server: searches, files in ranges of bytes, pictures, and what is refused."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from fakes import write_fake_bundle
from serving import (
    MP4_BYTES,
    SHOWN,
    WINDOWS,
    archive_model,
    error_of,
    make_service,
    put_video,
    running_app,
    text_embeddings,
    write_archive,
)
from serving_programs import until
from starlette.testclient import TestClient
from threaded_server import ThreadedServer

from actionclip_deploy.archive import ArchiveWriter
from actionclip_deploy.command_records import ArchiveAnswer, SearchAnswer
from actionclip_deploy.errors import ArchiveError
from actionclip_deploy.search import Archive
from actionclip_deploy.serve import archives

YARD, DOOR = SHOWN
RECORDED = datetime(2026, 11, 30, 18, 15).timestamp()
WAIT_SECONDS = 120.0
VIDEO_HEADERS = ("content-type", "content-length", "accept-ranges", "etag", "last-modified")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path)


@pytest.fixture
def client(tmp_path: Path, archive: Path) -> Iterator[TestClient]:
    with running_app(tmp_path, archive=archive) as client:
        yield client


def search(client: Any, text: str | None = "run", **fields: Any) -> Any:
    body = fields if text is None else {"text": text, **fields}
    return client.post("/v1/search", json=body)


def moments(client: Any, text: str | None = "run", **fields: Any) -> list[dict[str, Any]]:
    answer = search(client, text, **fields)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["moments"]
    return found


def id_of(client: Any, name: str = YARD) -> int:
    found = {Path(each["video"]).name: each["video_id"] for each in moments(client, top=100)}
    return int(found[Path(name).name])


# Searches


def test_words_find_the_moment_that_shows_them(client: TestClient, tmp_path: Path) -> None:
    answer = search(client, "walk").json()
    SearchAnswer.model_validate(answer)
    best = answer["moments"][0]
    assert best["video"] == str(tmp_path / "recordings" / DOOR)
    assert (best["rank"], best["folder"], best["window"]) == (1, "door", 9)
    assert best["peak_seconds"] == 6.5  # of the window from 4.5 to 8.5
    assert best["recorded_seconds"] is None
    assert best["cosine"] == pytest.approx(1, abs=1e-3)
    (shown,) = text_embeddings(tmp_path, ["walk"])
    with Archive.open(tmp_path / "archive") as opened:
        table = np.concatenate([np.asarray(each) for each in opened.snapshot().shards])
    cosines = table.astype(np.float64) @ shown
    # Eight windows lie over each half second: the mean where it is highest.
    means = [cosines[WINDOWS:][max(0, step - 7) : step + 1].mean() for step in range(WINDOWS + 7)]
    assert best["z"] == pytest.approx((max(means) - cosines.mean()) / cosines.std(), rel=1e-3)
    assert (answer["num_windows"], answer["num_searched"]) == (2 * WINDOWS, 2 * WINDOWS)
    assert {"labels", "queue", "search", "total"} <= set(answer["timings_ms"])
    (dated,) = [each for each in answer["moments"] if each["folder"] == "yard"][:1]
    assert dated["recorded_seconds"] == RECORDED + dated["start_seconds"]


def test_windows_nearer_to_what_is_not_meant_are_left_out(client: TestClient) -> None:
    found = search(client, "walk", without=["run"], top=100).json()
    assert found["query"] == "walk, not run"
    assert all((each["video"], each["window"]) != (YARD, 9) for each in found["moments"])
    assert moments(client, "walk", without=["walk it"])[0]["window"] == 9


@pytest.mark.parametrize("by", ["path", "end of the path", "id"])
def test_a_moment_finds_others_like_it(client: TestClient, tmp_path: Path, by: str) -> None:
    video = {"path": str(tmp_path / "recordings" / DOOR), "end of the path": "1.mp4", "id": 2}[by]
    found = moments(client, None, like={"video": video, "seconds": 6.4})
    assert (found[0]["folder"], found[0]["window"]) == ("door", 9)
    assert found[0]["cosine"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "folders", "num_undated"),
    [
        ({"cameras": ["door"]}, {"door"}, 0),
        ({"videos": ["20261130_181500.mp4"]}, {"yard"}, 0),
        ({"from_seconds": RECORDED}, {"yard"}, 1),
        ({"to_seconds": RECORDED - 1}, set(), 1),
        ({"from_seconds": -1e308, "to_seconds": 1e308}, {"yard"}, 1),
    ],
)
def test_only_what_was_asked_for_is_looked_among(
    client: TestClient, fields: dict[str, Any], folders: set[str], num_undated: int
) -> None:
    answer = search(client, top=100, **fields).json()
    assert {each["folder"] for each in answer["moments"]} == folders
    assert answer["num_undated"] == num_undated
    assert answer["num_windows"] == 2 * WINDOWS


def test_videos_that_others_add_meanwhile_are_seen(client: TestClient, tmp_path: Path) -> None:
    path = tmp_path / "recordings" / "hall" / "2.mp4"
    path.parent.mkdir()
    path.write_bytes(MP4_BYTES)
    (shown,) = text_embeddings(tmp_path, ["sit"])
    assert moments(client, "sit")[0]["folder"] != "hall"
    with ArchiveWriter.open(tmp_path / "archive", archive_model(tmp_path)) as writer:
        put_video(writer, path, shown)
        assert moments(client, "sit")[0]["folder"] == "hall"
    number = client.get("/metrics").text
    assert "actionclip_archive_videos 3.0" in number
    assert f"actionclip_archive_windows {3 * WINDOWS}.0" in number
    assert [each["name"] for each in client.get("/v1/archive").json()["cameras"]] == [
        *("door", "hall", "yard")
    ]


def test_a_name_that_is_not_utf8_is_found_and_played(tmp_path: Path) -> None:
    name = "k\udcfcche/caf\udce9.mp4"
    archive = write_archive(tmp_path, shown={name: "run"})
    path = tmp_path / "recordings" / name
    with running_app(tmp_path, archive=archive) as client:
        best = json.loads(search(client).content.decode())["moments"][0]
        assert (best["video"], best["folder"]) == (str(path), "k\udcfcche")
        assert best["video_bytes"] == quote(os.fsencode(path))
        assert client.get(best["video_url"]).content == MP4_BYTES
        assert client.get(best["thumbnail_url"]).content == b"a picture"
        (camera,) = json.loads(client.get("/v1/archive").content.decode())["cameras"]
        assert camera["name"] == "k\udcfcche"


def test_searches_are_counted(client: TestClient) -> None:
    for _ in range(3):
        moments(client)
    told = client.get("/metrics").text
    assert "actionclip_search_seconds_count 3.0" in told
    assert f"actionclip_search_windows_total {3 * 2 * WINDOWS}.0" in told


def test_what_there_is_to_be_searched_is_told(client: TestClient) -> None:
    answer = client.get("/v1/archive").json()
    ArchiveAnswer.model_validate(answer)
    cameras = [{"name": name, "num_videos": 1, "num_windows": WINDOWS} for name in ("door", "yard")]
    assert answer == {
        "name": "archive",
        "num_videos": 2,
        "num_windows": 2 * WINDOWS,
        "hours": pytest.approx(2 * 13.5 / 3600),
        "cameras": cameras,
        "first_seconds": RECORDED,
        "last_seconds": RECORDED + 13.5,
        "window_seconds": 4.0,
        "stride_seconds": 0.5,
    }
    assert client.get("/v1/info").json()["archive"] == "archive"


def test_without_an_archive_each_route_says_how_to_get_one(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        answers = [search(client), client.get("/v1/archive"), client.get("/v1/archive/videos/1")]
        answers.append(client.get("/v1/archive/thumbnails/1/1"))
        for answer in answers:
            assert answer.status_code == 404
            assert error_of(answer)["code"] == "no_archive"
            assert "--archive" in error_of(answer)["message"]
        assert client.get("/v1/info").json()["archive"] is None


def test_an_archive_of_another_text_encoder_is_refused(tmp_path: Path, archive: Path) -> None:
    other = write_fake_bundle(tmp_path / "other", textual=b"another")
    with Archive.open(archive) as opened, pytest.raises(ArchiveError, match="another text encoder"):
        opened.check_bundle(other)
    narrow = write_fake_bundle(tmp_path / "narrow", embedding_dim=8)
    with Archive.open(archive) as opened, pytest.raises(ArchiveError, match="embeddings of 8 val"):
        opened.check_bundle(narrow)


def test_a_damaged_archive_keeps_the_server_from_starting(tmp_path: Path, archive: Path) -> None:
    (archive / "vectors" / "0.f16").unlink()
    with pytest.raises(ArchiveError, match="are missing"), running_app(tmp_path, archive=archive):
        pass


def test_words_that_the_model_does_not_know_are_told(tmp_path: Path) -> None:
    archive = write_archive(tmp_path)
    with running_app(tmp_path, archive=archive, known="a photo of action run, an") as client:
        known = search(client, "run xylophone").json()
        assert known["unknown_words"] == ["xylophone"]
        answer = search(client, "xylophone")
        assert (answer.status_code, error_of(answer)["code"]) == (422, "unknown_words")
        told = error_of(answer)["message"]
        assert "knows no word of the text 'xylophone'" in told
        assert "To score such texts all the same, set allow_unknown_words." in told
        assert search(client, "xylophone", allow_unknown_words=True).status_code == 200


BAD_SEARCHES: dict[str, tuple[Any, int, str]] = {
    "nothing": ({}, 422, "bad_value"),
    "text and like": ({"text": "a", "like": {"video": "1.mp4", "seconds": 1}}, 422, "bad_value"),
    "no text": ({"text": ""}, 422, "bad_value"),
    "blanks": ({"text": "  "}, 422, "bad_value"),
    "a control character": ({"text": "a\nb"}, 422, "bad_value"),
    "a number as text": ({"text": 5}, 422, "bad_value"),
    "half a character": (b'{"text": "\\ud800"}', 422, "bad_value"),
    "a text of a book": ({"text": "a" * 1001}, 413, "too_many"),
    "many texts": ({"text": "a", "without": ["b"] * 17}, 413, "too_many"),
    "the text itself left out": ({"text": "a", "without": ["a"]}, 422, "bad_value"),
    "many cameras": ({"text": "a", "cameras": ["b"] * 17}, 413, "too_many"),
    "a long name": ({"text": "a", "videos": ["b" * 5000]}, 413, "too_many"),
    "top of nothing": ({"text": "a", "top": 0}, 422, "bad_value"),
    "top below it": ({"text": "a", "top": -5}, 422, "bad_value"),
    "a huge top": ({"text": "a", "top": 501}, 413, "too_many"),
    "a top beyond all numbers": ({"text": "a", "top": 10**100}, 413, "too_many"),
    "half a moment": ({"text": "a", "top": 1.5}, 422, "bad_value"),
    "a time that is none": (b'{"text": "a", "from_seconds": NaN}', 422, "bad_value"),
    "no end of time": (b'{"text": "a", "to_seconds": Infinity}', 422, "bad_value"),
    "a large time": (b'{"text": "a", "to_seconds": 1e999}', 422, "bad_value"),
    "a time in words": ({"text": "a", "to_seconds": "tomorrow"}, 422, "bad_value"),
    "a moment at no time": (b'{"like": {"video": "1.mp4", "seconds": NaN}}', 422, "bad_value"),
    "a moment without a video": ({"like": {"seconds": 1}}, 422, "bad_value"),
    "no such video": ({"like": {"video": "none.mp4", "seconds": 1}}, 404, "unknown_video"),
    "no such id": ({"like": {"video": 77, "seconds": 1}}, 404, "unknown_video"),
    "an id beyond all": ({"like": {"video": 2**70, "seconds": 1}}, 422, "bad_value"),
    "a path": ({"like": {"video": "/etc/passwd", "seconds": 1}}, 404, "unknown_video"),
    "no such time": ({"like": {"video": "1.mp4", "seconds": 9999}}, 422, "bad_value"),
    "a time before all": ({"like": {"video": "1.mp4", "seconds": -1}}, 422, "bad_value"),
    "no such camera": ({"text": "a", "cameras": ["nowhere"]}, 422, "bad_value"),
    "no such file": ({"text": "a", "videos": ["nowhere.mp4"]}, 404, "unknown_video"),
    "an end before the start": (
        {"text": "a", "from_seconds": 2, "to_seconds": 1},
        422,
        "bad_value",
    ),
    "another field": ({"text": "a", "limit": 5}, 422, "bad_value"),
    "a list": ([], 422, "bad_value"),
    "deep lists": (b"[" * 100_000, 400, "bad_request"),
    "deep fields": (b'{"like":' * 50_000, 400, "bad_request"),
    "no JSON": (b"run", 400, "bad_request"),
    "no time": ({"text": "a", "timeout_ms": 0}, 422, "bad_value"),
}


@pytest.mark.parametrize("case", BAD_SEARCHES)
def test_bad_searches_are_refused(client: TestClient, case: str) -> None:
    body, status, code = BAD_SEARCHES[case]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/search", content=content, headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (status, code), answer.text
    assert len(moments(client)) > 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "Neither text nor like was given; give one of them."),
        ({"text": "a", "like": {"video": 1, "seconds": 1}}, "text and like were given; give one"),
        ({"text": "a", "cameras": "yard"}, "cameras is a text; give a list."),
        ({"text": "a", "tpo": 5}, "tpo is no field of this request; its fields are text, like, "),
        ({"text": "a", "top": 0}, "top is 0; give 1 or more."),
        ({"text": ""}, "text is ''; give what can be seen in words"),
        ({"text": "a", "without": ["A"]}, "without is 'A', which is what is looked for"),
        ({"text": "a", "cameras": ["x"]}, "cameras names 'x', which is no camera of the archive"),
        ({"like": {"video": "1.mp4", "seconds": 9999}}, "1.mp4 has no window at 9999 s"),
    ],
)
def test_what_is_wrong_with_a_search_is_told_in_words(
    client: TestClient, body: dict[str, Any], message: str
) -> None:
    answer = client.post("/v1/search", json=body)
    assert answer.status_code == 422
    assert message in error_of(answer)["message"]


def test_a_search_is_json(client: TestClient) -> None:
    answer = client.post("/v1/search", data={"text": "run"}, files={"a": b"b"})
    assert (answer.status_code, error_of(answer)["code"]) == (415, "unsupported_type")


# A search that takes long


class HeldSearch:
    """Keeps searches of all archives waiting until `go_on`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_begun, self._may_end = threading.Event(), threading.Event()
        self.num_begun = 0
        real = Archive.search

        def held(*args: Any, **options: Any) -> Any:
            self.num_begun += 1
            self.has_begun.set()
            assert self._may_end.wait(WAIT_SECONDS)
            return real(*args, **options)

        monkeypatch.setattr(Archive, "search", held)

    def go_on(self) -> None:
        self._may_end.set()


def test_others_are_answered_during_a_search_and_few_wait(
    tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldSearch(monkeypatch)
    options: dict[str, Any] = {"archive": archive, "limits": {"waiting_searches": 2}}
    with ThreadedServer(tmp_path, **options) as server:

        def ask(found: list[httpx.Response]) -> None:
            found.append(httpx.post(f"{server.url}/v1/search", json={"text": "run"}, timeout=None))

        answers: list[httpx.Response] = []
        threads = [threading.Thread(target=ask, args=(answers,)) for _ in range(2)]
        threads[0].start()
        assert held.has_begun.wait(WAIT_SECONDS)
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        assert httpx.get(f"{server.url}/v1/archive").status_code == 200
        threads[1].start()
        until(lambda: server.service.archive.num_waiting == 2)
        refused = httpx.post(f"{server.url}/v1/search", json={"text": "run"})
        assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
        assert refused.headers["retry-after"] == "1"
        assert answers == []
        held.go_on()
        for thread in threads:
            thread.join(WAIT_SECONDS)
        assert [answer.status_code for answer in answers] == [200, 200]


def test_a_search_whose_time_is_over_is_not_done(
    tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldSearch(monkeypatch)
    with ThreadedServer(tmp_path, archive=archive) as server:
        for _ in range(2):  # the second one waits for the first, which goes on without a client
            late = httpx.post(f"{server.url}/v1/search", json={"text": "run", "timeout_ms": 300})
            assert (late.status_code, error_of(late)["code"]) == (504, "deadline")
        held.go_on()
        found = httpx.post(f"{server.url}/v1/search", json={"text": "run"}, timeout=WAIT_SECONDS)
        assert found.status_code == 200
    assert held.num_begun == 2


# Files


def get_video(client: Any, number: int | None = None, **headers: str) -> Any:
    asked = {name.replace("_", "-"): value for name, value in headers.items()}
    number = id_of(client) if number is None else number
    return client.get(f"/v1/archive/videos/{number}", headers=asked)


def test_a_video_comes_as_it_is_and_opens_nothing_else(client: TestClient) -> None:
    (best, *_) = moments(client, "run")
    assert best["video_url"] == f"/v1/archive/videos/{best['video_id']}"
    answer = client.get(best["video_url"])
    assert answer.status_code == 200
    assert answer.content == MP4_BYTES
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; ")
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"


SIZE = len(MP4_BYTES)


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=100-199", 100, 199),
        ("bytes=5-", 5, SIZE - 1),
        ("bytes=-7", SIZE - 7, SIZE - 1),
        (f"bytes=-{10 * SIZE}", 0, SIZE - 1),
        (f"bytes=10-{10 * SIZE}", 10, SIZE - 1),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE - 1),
        ("BYTES=1-2", 1, 2),
        ("bytes= 1 - 2 ", 1, 2),
    ],
)
def test_a_player_gets_the_bytes_that_it_asks_for(
    client: TestClient, asked: str, first: int, last: int
) -> None:
    answer = get_video(client, range=asked)
    assert answer.status_code == 206
    assert answer.content == MP4_BYTES[first : last + 1]
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{SIZE}"
    assert answer.headers["content-length"] == str(last - first + 1)


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", f"bytes={SIZE}-{SIZE + 5}", "bytes=-0"])
def test_bytes_that_are_not_there_are_refused(client: TestClient, asked: str) -> None:
    answer = get_video(client, range=asked)
    assert (answer.status_code, error_of(answer)["code"]) == (416, "no_such_range")
    assert answer.headers["content-range"] == f"bytes */{SIZE}"


@pytest.mark.parametrize(
    "asked",
    [
        *("", "bytes", "bytes=", "bytes=-", "bytes=a-b", "bytes=5-2", "items=0-1", "bytes=--1"),
        *("bytes=0-1,5-6", "bytes=" + ",".join(["0-"] * 5000), "bytes=1-2-3", "bytes=0x1-2"),
        *("bytes=" + "9" * 5000 + "-", "bytes=1-" + "9" * 30),
    ],
)
def test_what_is_no_range_of_bytes_is_ignored(client: TestClient, asked: str) -> None:
    answer = get_video(client, range=asked)
    assert (answer.status_code, len(answer.content)) == (200, SIZE)


def test_a_part_is_of_the_file_that_the_player_has_begun(client: TestClient) -> None:
    whole = get_video(client)
    for known in (whole.headers["etag"], whole.headers["last-modified"]):
        assert get_video(client, range="bytes=1-2", if_range=known).status_code == 206
    for other in ('"another"', f"W/{whole.headers['etag']}", "Mon, 30 Nov 2020 00:00:00 GMT"):
        answer = get_video(client, range="bytes=1-2", if_range=other)
        assert (answer.status_code, answer.content) == (200, MP4_BYTES)
        past = get_video(client, range=f"bytes={SIZE}-", if_range=other)
        assert past.status_code == 200


def test_the_head_of_a_video_is_that_of_its_file(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = id_of(client)
    whole = get_video(client, number)
    head = client.head(f"/v1/archive/videos/{number}")
    assert (head.status_code, head.content) == (200, b"")
    for name in VIDEO_HEADERS:
        assert head.headers[name] == whole.headers[name]
    assert client.head("/v1/archive/videos/77").status_code == 404


def test_files_are_closed_after_each_answer(client: TestClient) -> None:
    number = id_of(client)
    get_video(client, number)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for headers in ({}, {"range": "bytes=0-5"}, {"range": f"bytes={SIZE}-"}):
        for _ in range(5):
            get_video(client, number, **headers)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def test_few_videos_are_sent_at_a_time(tmp_path: Path, archive: Path) -> None:
    with running_app(tmp_path, archive=archive, limits={"archive_files": 1}) as client:
        number = id_of(client)
        assert get_video(client, number).status_code == 200
        with client.service.archive.sending():  # type: ignore[attr-defined]
            answer = get_video(client, number)
        assert (answer.status_code, error_of(answer)["code"]) == (429, "queue_full")
        assert get_video(client, number).status_code == 200


@pytest.mark.parametrize(
    ("start", "media_type"),
    [
        (b"\0\0\0\x14ftypqt  ", "video/quicktime"),
        (b"\x1a\x45\xdf\xa3\x01\0\0\0\0\0\0\x1f\x42\x82\x84webm", "video/webm"),
        (b"\x1a\x45\xdf\xa3\x01\0\0\0\0\0\0\x1f\x42\x82\x88matroska", "video/x-matroska"),
        (b"RIFF\0\0\0\0AVI LIST", "video/x-msvideo"),
        (b"\x47" + bytes(187) + b"\x47", "video/mp2t"),
        (b"<!doctype html><script>alert(1)</script>", "application/octet-stream"),
    ],
)
def test_the_type_is_told_by_the_content(tmp_path: Path, start: bytes, media_type: str) -> None:
    archive = write_archive(tmp_path, shown={"cam/a.html": "run"}, content=start + bytes(500))
    with running_app(tmp_path, archive=archive) as client:
        answer = get_video(client, 1)
    assert answer.headers["content-type"].partition(";")[0] == media_type
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_folder_that_is_a_link_is_the_cameras_own(tmp_path: Path) -> None:
    (tmp_path / "disk" / "yard").mkdir(parents=True)
    (tmp_path / "recordings").mkdir()
    (tmp_path / "recordings" / "yard").symlink_to(tmp_path / "disk" / "yard")
    archive = write_archive(tmp_path)
    with running_app(tmp_path, archive=archive) as client:
        assert get_video(client).content == MP4_BYTES


def leave(path: Path) -> None:
    """Put a link that leads out of the folder, to a file of the same size and time."""
    outside = path.parent.parent / "outside.mp4"
    path.rename(outside)
    path.symlink_to(outside)


def be_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def be_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def lead_to_a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def be_another_file(path: Path) -> None:
    path.write_bytes(MP4_BYTES[::-1])


def grow(path: Path) -> None:
    state = path.stat()
    path.write_bytes(MP4_BYTES + b"more")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "status", "code", "message"),
    [
        (leave, 404, "unknown_video", "a link that leads out of its folder"),
        (be_a_pipe, 404, "unknown_video", "it is no file"),
        (be_a_folder, 404, "unknown_video", "it is no file"),
        (lead_to_a_device, 404, "unknown_video", "it is no file"),
        (Path.unlink, 410, "video_gone", "cannot be read (No such file or directory)"),
        (be_another_file, 410, "video_gone", "has changed"),
        (grow, 410, "video_gone", "has changed"),
    ],
)
def test_a_file_that_is_not_what_was_indexed_is_not_served(
    client: TestClient, tmp_path: Path, change: Any, status: int, code: str, message: str
) -> None:
    number = id_of(client)
    change(tmp_path / "recordings" / YARD)
    answer = get_video(client, number)
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)
    assert message in error_of(answer)["message"]
    assert str(tmp_path) not in answer.text
    assert get_video(client, id_of(client, DOOR)).status_code == 200


def test_a_link_within_the_folder_is_served(client: TestClient, tmp_path: Path) -> None:
    number, path = id_of(client), tmp_path / "recordings" / YARD
    path.rename(path.with_name("moved.mp4"))
    path.symlink_to("moved.mp4")
    assert get_video(client, number).content == MP4_BYTES


def test_the_id_of_a_video_that_changed_is_no_other_video(
    client: TestClient, tmp_path: Path
) -> None:
    number, path = id_of(client, DOOR), tmp_path / "recordings" / DOOR
    (shown,) = text_embeddings(tmp_path, ["run"])
    with ArchiveWriter.open(tmp_path / "archive", archive_model(tmp_path)) as writer:
        put_video(writer, path, shown)  # in the place of the last one that was put
    answer = get_video(client, number)
    assert (answer.status_code, error_of(answer)["code"]) == (404, "unknown_video")
    assert id_of(client, DOOR) != number


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("videos/77", 404),
        ("videos/-1", 422),
        ("videos/1.5", 422),
        ("videos/abc", 422),
        ("videos/99999999999999999999", 422),
        ("videos/%2e%2e%2f%2e%2e%2fetc%2fpasswd", 404),
        ("videos/..%2f..%2farchive.db", 404),
        ("videos/1%00", 422),
        ("videos/%2fetc%2fpasswd", 404),
        ("videos/1/../../archive.db", 404),
        ("videos/", 404),
        ("archive.db", 404),
        ("vectors/0.f16", 404),
        ("thumbnails/1", 404),
        ("thumbnails/1/-1", 422),
        ("thumbnails/1/1e3", 422),
        ("thumbnails/77/0", 404),
        ("thumbnails/1/99999", 404),
        ("thumbnails/99999999999999999999/0", 422),
    ],
)
def test_nothing_but_ids_of_videos_is_looked_for(
    client: TestClient, path: str, status: int
) -> None:
    answer = client.get(f"/v1/archive/{path}")
    assert answer.status_code == status, answer.text
    assert error_of(answer)["message"]


def test_pictures_of_windows(client: TestClient) -> None:
    found = moments(client, top=100)
    for each in found:
        has_one = each["folder"] == "yard"
        assert (each["thumbnail_url"] is not None) == has_one
        address = f"/v1/archive/thumbnails/{each['video_id']}/{each['window']}"
        answer = client.get(address)
        assert answer.status_code == (200 if has_one else 404)
        if has_one:
            assert each["thumbnail_url"] == address
            assert answer.content == b"a picture"
            assert answer.headers["content-type"] == "image/jpeg"
            assert answer.headers["x-content-type-options"] == "nosniff"
        else:
            assert error_of(answer)["code"] == "no_thumbnail"


# Keys


@pytest.fixture
def locked(tmp_path: Path, archive: Path) -> Iterator[TestClient]:
    with running_app(tmp_path, archive=archive, api_keys=("secret",)) as client:
        yield client


def test_all_of_the_archive_is_behind_the_key(locked: TestClient) -> None:
    answers = [search(locked), locked.get("/v1/archive"), locked.get("/v1/archive/videos/1")]
    answers.append(locked.get("/v1/archive/thumbnails/1/0"))
    for answer in answers:
        assert (answer.status_code, error_of(answer)["code"]) == (401, "no_key")
    key = {"x-api-key": "secret"}
    assert locked.get("/v1/archive/videos/1", headers=key).content == MP4_BYTES


def test_an_address_of_an_answer_opens_its_file_and_no_other(
    locked: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = locked.post("/v1/search", json={"text": "run"}, headers={"x-api-key": "secret"})
    best = answer.json()["moments"][0]
    assert best["folder"] == "yard"
    for name, content in (("video_url", MP4_BYTES), ("thumbnail_url", b"a picture")):
        url = best[name]
        assert "secret" not in url
        assert locked.get(url).content == content
        address, ticket = url.split("?")
        until, signature = re.fullmatch(r"ticket=(\d+)\.(\w+)", ticket).groups()  # type: ignore[union-attr]
        bad = [
            *(address, f"{address}?ticket=", f"{address}?{ticket}0", f"{address}?{ticket}&a=b"),
            f"{address}?ticket={int(until) + 1}.{signature}",
            f"{address}?ticket={until}.{'0' * 64}",
            f"/v1/archive/videos/2?{ticket}",
            f"/v1/archive/thumbnails/1/5?{ticket}",
            *(f"/v1/archive?{ticket}", f"/v1/info?{ticket}"),
        ]
        for each in bad:
            refused = locked.get(each)
            assert (refused.status_code, error_of(refused)["code"]) == (401, "no_key"), each
        assert locked.get(url, headers={"x-api-key": "wrong"}).status_code == 401
    late = time.time() + 7 * 3600
    monkeypatch.setattr(archives.time, "time", lambda: late)
    assert locked.get(best["video_url"]).status_code == 401


def test_a_ticket_is_of_one_run_of_the_server(tmp_path: Path, archive: Path) -> None:
    urls = []
    for number in range(2):
        service = make_service(tmp_path / str(number), archive=archive, api_keys=("secret",))
        urls.append(service.archive.url("videos/1"))
        assert not service.has_ticket(*split(urls[0])) or number == 0
    assert urls[0] != urls[1]


def split(url: str) -> tuple[str, bytes]:
    path, _, query = url.partition("?")
    return path, query.encode()
