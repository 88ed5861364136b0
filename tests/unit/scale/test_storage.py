"""Videos in storage: fsspec's own memory file system stands in for a cloud's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from actionclip_deploy.errors import MissingExtraError, VideoListError
from actionclip_deploy.scale.storage import (
    FailedFetchError,
    FetchRoom,
    ListedVideo,
    fetched,
    list_in_storage,
)

fsspec = pytest.importorskip("fsspec", reason="needs the extra `remote`")

MIB = 2**20


@pytest.fixture
def bucket() -> Iterator[Any]:
    store = fsspec.filesystem("memory")
    store.store.clear()
    for name in ("day/a.mp4", "day/night/b.MKV", "day/notes.txt", "other.mp4"):
        store.pipe(f"/{name}", name.encode())
    yield store
    store.store.clear()


def names(*given: str, **options: bool) -> list[str]:
    return [video.uri for video in list_in_storage(given, **options)]


def test_below_an_address_are_all_files_that_end_as_a_video_does(bucket: Any) -> None:
    assert names("memory://day") == ["memory:///day/a.mp4", "memory:///day/night/b.MKV"]
    assert names("memory://*.mp4") == ["memory:///other.mp4"]
    (video,) = list_in_storage(["memory://other.mp4"])
    assert video.size_bytes == len("other.mp4")
    assert video.etag  # of the time at which it was made


def test_a_folder_wildcards_and_a_file_name_each_video_once(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.mp4", ".hidden.mp4", "notes.txt", "in/c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    a, b, c = (str(tmp_path / name) for name in ("a.mp4", "b.mp4", "in/c.mp4"))
    assert names(str(tmp_path)) == [a, b]
    assert names(str(tmp_path), recursive=True) == [a, b, c]
    assert names(b, str(tmp_path), str(tmp_path / "*.mp4")) == [b, a]


def test_the_tag_of_a_local_file_changes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"12345")
    (before,) = list_in_storage([str(path)])
    assert before.size_bytes == 5
    os.utime(path, ns=(1, 1))
    (after,) = list_in_storage([str(path)])
    assert after.etag != before.etag


def test_a_name_that_is_not_text_comes_back_as_it_was(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4"))
    path.write_bytes(b"12345")
    (video,) = list_in_storage([str(tmp_path)])
    video.uri.encode()  # which a table needs
    with fetched(video, FetchRoom(MIB)) as found:
        assert found == path


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ("memory://nowhere", "Nothing below memory://nowhere ends as a video does"),
        ("{folder}", "holds no video files; give a folder"),
        ("{folder}/*.mp4", "No file fits"),
        ("nosuch://bucket/a.mp4", "is of a storage that is not known"),
    ],
)
def test_what_gives_no_video_is_told(bucket: Any, tmp_path: Path, given: str, what: str) -> None:
    with pytest.raises(VideoListError, match=what):
        list_in_storage([given.format(folder=tmp_path)])


def test_a_storage_whose_package_is_missing_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(uri: str) -> None:
        raise ImportError("install gcsfs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(MissingExtraError, match="remote"):
        list_in_storage(["gs://bucket/a.mp4"])


# Fetching


def fetch(video: ListedVideo, **options: Any) -> bytes:
    with fetched(video, FetchRoom(MIB), sleep=lambda _: None, **options) as path:
        return path.read_bytes()


def failure(video: ListedVideo, **options: Any) -> tuple[str, str]:
    with pytest.raises(FailedFetchError) as caught:
        fetch(video, **options)
    return caught.value.failure.kind, caught.value.failure.message


def test_a_fetched_file_is_gone_after_the_block(bucket: Any) -> None:
    with fetched(ListedVideo("memory://other.mp4"), FetchRoom(MIB)) as path:
        assert path.read_bytes() == b"other.mp4"
        assert path.suffix == ".mp4"
    assert not path.exists()


def test_a_video_that_is_not_there_is_no_passing_failure(bucket: Any) -> None:
    kind, message = failure(ListedVideo("memory://gone.mp4"))
    assert kind == "not_found"
    assert "memory://gone.mp4 is not there" in message


@pytest.mark.parametrize(("num_failures", "kind"), [(3, None), (4, "fetch_failed")])
def test_a_storage_that_fails_is_asked_four_times(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, num_failures: int, kind: str | None
) -> None:
    real, failures = type(bucket).get_file, iter(range(num_failures))

    def get_file(self: Any, *words: Any, **options: Any) -> Any:
        if next(failures, None) is not None:
            raise ConnectionResetError("reset by peer")
        return real(self, *words, **options)

    monkeypatch.setattr(type(bucket), "get_file", get_file)
    if kind is None:
        assert fetch(ListedVideo("memory://other.mp4")) == b"other.mp4"
    else:
        found, message = failure(ListedVideo("memory://other.mp4"))
        assert found == kind
        assert "reset by peer" in message


def test_credentials_that_do_not_suffice_are_told(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get_file(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(bucket), "get_file", get_file)
    kind, message = failure(ListedVideo("memory://other.mp4"))
    assert kind == "not_permitted"
    assert "check the credentials on each node" in message


def test_a_video_that_is_not_what_was_listed_is_told(bucket: Any, tmp_path: Path) -> None:
    for size in (3, 100):
        assert failure(ListedVideo("memory://other.mp4", "tag", size))[0] == "changed"
    path = tmp_path / "a.mp4"
    path.write_bytes(b"12345")
    assert failure(ListedVideo(str(path), "another tag", 5))[0] == "changed"


def test_a_video_above_the_bound_is_not_fetched(bucket: Any) -> None:
    kind, message = failure(ListedVideo("memory://other.mp4", "", 2 * MIB))
    assert kind == "video_too_large"
    assert "raise --fetch-mib" in message


def test_files_wait_for_room(bucket: Any) -> None:
    room, inside, leave = FetchRoom(10), Event(), Event()

    def hold() -> None:
        with room.hold(8):
            inside.set()
            leave.wait(10)

    first = Thread(target=hold)
    first.start()
    inside.wait(10)
    entered = Event()

    def enter() -> None:
        with room.hold(8):
            entered.set()

    second = Thread(target=enter)
    second.start()
    with room.hold(2):  # for which there is room
        assert not entered.is_set()
    leave.set()
    second.join(10)
    assert entered.is_set()
    first.join(10)
