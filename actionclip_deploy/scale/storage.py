"""Videos in storage: which there are, and how one comes to this machine for the time of a block.

Local files are read where they are. All others come through fsspec, which knows S3, Google's and
Azure's storage and HTTP by the beginning of an address, to a temporary file: decoders need to
seek. Of other libraries, pyarrow.fs knows no HTTP, and smart_open cannot list.
"""

from __future__ import annotations

import glob
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from threading import Condition, Event
from typing import Any, Literal, TypeAlias
from urllib.parse import quote, unquote_to_bytes, urlsplit

from actionclip_deploy.errors import FileWriteError, MissingExtraError, VideoListError
from actionclip_deploy.files import write_errors
from actionclip_deploy.video.reader import VIDEO_SUFFIXES, list_videos

FailureKind: TypeAlias = Literal[
    "changed",
    "decoder_crashed",
    "fetch_failed",
    "not_found",
    "not_permitted",
    "out_of_memory",
    "timed_out",
    "video_too_large",
    "video_unreadable",
]
# What another try may mend: storage, the network, and what else this machine does.
TRANSIENT_KINDS = frozenset({"changed", "fetch_failed", "out_of_memory", "timed_out"})

ADDRESS = r"^[A-Za-z][A-Za-z0-9+.-]+://"  # how one begins
_WILDCARDS = re.compile(r"[*?\[]")
_ATTEMPTS = 4
_FIRST_PAUSE_SECONDS = 0.5
_STAT_THREADS = 32
_STEP_SECONDS = 0.1


@dataclass(frozen=True)
class Failure:
    """Why a video gave no result."""

    kind: FailureKind
    message: str

    @property
    def is_transient(self) -> bool:
        """Whether another try may succeed."""
        return self.kind in TRANSIENT_KINDS


class FailedFetchError(Exception):
    """A video that did not come; never leaves this folder."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.failure = Failure(kind, message)


@dataclass(frozen=True)
class ListedVideo:
    """A video of a list.

    Attributes:
        uri: An absolute path, or the address in its storage.
        etag: What changes with its content: the storage's own tag, or of a local file its size and
            the time of its last change; empty where nobody knows.
        size_bytes: None where nobody knows.
        columns: What the list says of it besides.
    """

    uri: str
    etag: str = ""
    size_bytes: int | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


def is_address(text: str) -> bool:
    """Whether it names something by the protocol that it is got by, such as s3://bucket/key."""
    return re.match(ADDRESS, text) is not None


def list_in_storage(given: Sequence[str], *, recursive: bool = False) -> list[ListedVideo]:
    """The videos of files, folders, prefixes and wildcards, each once, in the given order.

    Args:
        given: Paths and addresses. Of what holds others, files with the suffix of a video count;
            below an address all of them, below a folder those in it.
        recursive: Whether folders in a folder are looked through as well.

    Raises:
        VideoListError: If a folder, a prefix or wildcards hold no video, or cannot be read.
        MissingExtraError: If a storage needs a package that is not installed.
    """
    found: dict[str, ListedVideo] = {}
    for text in given:
        listed = _list_address(text) if is_address(text) else _list_local(text, recursive)
        for video in listed:
            found.setdefault(video.uri, video)
    return list(found.values())


def describe(uri: str) -> ListedVideo:
    """What the storage says of one video; nothing of one that is not there."""
    if not is_address(uri) or uri.startswith("file://"):
        return _of_local_file(_local_path(uri))
    fs, path = _open_storage(uri)
    try:
        info = fs.info(path)
    except Exception:  # noqa: BLE001 - each storage has errors of its own; fetching tells them
        return ListedVideo(uri)
    return ListedVideo(uri, _etag(info), info.get("size"))


def describe_all(uris: Iterable[str]) -> Iterator[ListedVideo]:
    """As `describe`, of many in their order, several at a time."""
    with ThreadPoolExecutor(_STAT_THREADS, thread_name_prefix="actionclip-stat") as pool:
        yield from pool.map(describe, uris)


def _list_local(text: str, recursive: bool) -> list[ListedVideo]:
    path = Path(os.path.abspath(text))  # noqa: PTH100 - links in it stay
    if path.is_dir():
        paths = list_videos(path, recursive=recursive, on_error=_raise_unreadable)
        if not paths:
            advice = " itself; folders in it are looked through with --recursive"
            more = advice if list_videos(path, recursive=True) else ""
            raise VideoListError(
                f"{path} holds no video files{more}; give a folder with files that end in "
                f"{', '.join(sorted(VIDEO_SUFFIXES))}."
            )
        return [_of_local_file(each) for each in paths]
    if not path.exists() and _WILDCARDS.search(text):
        names = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - of any beginning
        paths = [Path(each) for each in names if Path(each).is_file()]
        if not paths:
            raise VideoListError(f"No file fits {text}; give other wildcards, or a folder.")
        return [_of_local_file(each) for each in paths]
    return [_of_local_file(path)]


def _raise_unreadable(error: OSError) -> None:
    raise VideoListError(
        f"The folder {error.filename} cannot be read ({error.strerror}); change its permissions, "
        "or give the videos by their names."
    )


def _of_local_file(path: Path) -> ListedVideo:
    uri = _local_uri(path)
    try:
        status = path.stat()
    except OSError:
        return ListedVideo(uri)
    return ListedVideo(uri, f"{status.st_mtime_ns:x}-{status.st_size:x}", status.st_size)


def _local_uri(path: Path) -> str:
    """The path; of one that is not UTF-8, which a table cannot hold, its address."""
    text = str(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"file://{quote(os.fsencode(text))}"
    return text


def _local_path(uri: str) -> Path:
    if not uri.startswith("file://"):
        return Path(os.path.abspath(uri))  # noqa: PTH100 - links in it stay
    return Path(os.fsdecode(unquote_to_bytes(uri.removeprefix("file://"))))


def suffix_of(text: str) -> str:
    """The suffix of a path or of the path in an address, in lower case."""
    protocol, _, rest = text.rpartition("://")
    if protocol in ("http", "https"):  # elsewhere ? and # are letters of a name
        rest = urlsplit(text).path
    return PurePosixPath(rest).suffix.lower()


def _list_address(uri: str) -> list[ListedVideo]:
    if uri.startswith("file://"):
        return _list_local(str(_local_path(uri)), recursive=True)
    fs, path = _open_storage(uri)
    protocol = uri.partition("://")[0]
    is_web = protocol in ("http", "https")  # whose addresses may hold ? and have no listing
    if is_web or (suffix_of(uri) in VIDEO_SUFFIXES and not _WILDCARDS.search(uri)):
        return [describe(uri)]
    try:
        if _WILDCARDS.search(path):
            files = fs.glob(path, detail=True)
        else:
            files = fs.find(path.rstrip("/"), detail=True)
    except Exception as exc:  # each storage has errors of its own
        raise VideoListError(
            f"{uri} cannot be listed ({_reason(exc)}); check the address and the permissions."
        ) from exc
    found = [
        ListedVideo(f"{protocol}://{name}", _etag(info), info.get("size"))
        for name, info in sorted(files.items())
        if info.get("type", "file") == "file" and suffix_of(name) in VIDEO_SUFFIXES
    ]
    if not found:
        raise VideoListError(
            f"Nothing below {uri} ends as a video does ({', '.join(sorted(VIDEO_SUFFIXES))}); give "
            "another prefix, or a list of addresses."
        )
    return found


def open_remote(uri: str) -> Any:
    """Open what an address names for reading, as a context manager."""
    fs, path = _open_storage(uri)
    return fs.open(path, "rb")


def _open_storage(uri: str) -> tuple[Any, str]:
    try:
        import fsspec

        fs, path = fsspec.core.url_to_fs(uri)
    except ImportError as exc:
        raise MissingExtraError(f"Reading {uri}", "remote") from exc
    except ValueError as exc:
        raise VideoListError(
            f"{uri} is of a storage that is not known ({exc}); give a path, or an address that "
            "begins with s3://, gs://, az:// or https://."
        ) from exc
    return fs, path


def _etag(info: Mapping[str, Any]) -> str:
    for name in ("ETag", "etag", "md5Hash"):
        if info.get(name):
            return str(info[name]).strip('"')
    for name in ("LastModified", "last_modified", "updated", "mtime", "created"):
        if info.get(name):
            return f"{info[name]}-{info.get('size')}"
    return ""


def _reason(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {str(exc).strip() or 'without a word'}"[:300]


class FetchRoom:
    """Bytes of temporary files that may lie on this machine at a time; threads wait for room."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._taken = 0
        self._changed = Condition()

    @contextmanager
    def hold(self, size_bytes: int, stop: Event | None = None) -> Iterator[None]:
        """Take room for the time of a block.

        Raises:
            ReadingStoppedError: If `stop` was set while it waited.
        """
        with self._changed:
            while self._taken and self._taken + size_bytes > self.max_bytes:
                if stop is not None and stop.is_set():
                    break
                self._changed.wait(_STEP_SECONDS)
            self._taken += size_bytes
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size_bytes
                self._changed.notify_all()


def _bounded(max_bytes: int, stop: Event | None) -> Any:
    """What fsspec tells of a transfer, which ends one that brings more than was said."""
    from fsspec.callbacks import Callback

    class Bounded(Callback):  # type: ignore[misc]
        num_bytes = 0

        def relative_update(self, inc: int = 1) -> None:
            self.num_bytes += inc
            if self.num_bytes > max_bytes:
                raise _TooManyBytesError
            if stop is not None and stop.is_set():
                raise InterruptedError("Nobody waits for the file any more.")

    return Bounded()


class _TooManyBytesError(Exception):
    pass


@contextmanager
def fetched(
    video: ListedVideo,
    room: FetchRoom,
    *,
    stop: Event | None = None,
    sleep: Callable[[float], object] = time.sleep,
) -> Iterator[Path]:
    """Give a video as a local file for the time of a block.

    What the storage refuses for the moment is asked for again, with growing pauses.

    Args:
        video: Of a list.
        room: Bounds what lies here.
        stop: Once set, the transfer ends.
        sleep: Waits between two attempts.

    Raises:
        FailedFetchError: If it does not come.
        FileWriteError: If there is no room for it on the disk.
    """
    if not is_address(video.uri) or video.uri.startswith("file://"):
        path = _local_path(video.uri)
        now = _of_local_file(path)
        if now.size_bytes is not None and video.etag and now.etag != video.etag:
            _raise_changed(video, "has changed")
        yield path
        return
    size = video.size_bytes
    if size is not None and size > room.max_bytes:
        raise FailedFetchError(
            "video_too_large",
            f"{video.uri} has {size:,} bytes, and {room.max_bytes:,} may be fetched at a time; "
            "raise --fetch-mib, or cut the video.",
        )
    # Of a size that nobody knows, as much is kept free as there may be.
    held = room.max_bytes if size is None else size
    with (
        room.hold(held, stop),
        tempfile.TemporaryDirectory(prefix="actionclip-fetch-") as folder,
    ):
        path = Path(folder, f"video{suffix_of(video.uri)[:16]}")
        for attempt in range(_ATTEMPTS):
            try:
                _transfer(video, path, held, stop)
                break
            except FailedFetchError as exc:
                last = not exc.failure.is_transient or attempt == _ATTEMPTS - 1
                if last or (stop is not None and stop.is_set()):
                    raise
            sleep(_FIRST_PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1.5))
        yield path


def _transfer(video: ListedVideo, path: Path, max_bytes: int, stop: Event | None) -> None:
    fs, name = _open_storage(video.uri)
    try:
        with write_errors(path, full_disk_only=True):
            fs.get_file(name, str(path), callback=_bounded(max_bytes, stop))
    except FileWriteError:
        raise
    except _TooManyBytesError:
        _raise_changed(video, f"has more than {max_bytes:,} bytes")
    except FileNotFoundError as exc:
        raise FailedFetchError(
            "not_found", f"{video.uri} is not there; check the list, or list the storage again."
        ) from exc
    except PermissionError as exc:
        raise FailedFetchError(
            "not_permitted",
            f"{video.uri} may not be read ({_reason(exc)}); check the credentials on each node.",
        ) from exc
    except Exception as exc:
        # Each storage has errors of its own, and what is none of the above may pass.
        raise FailedFetchError(
            "fetch_failed",
            f"{video.uri} could not be fetched in {_ATTEMPTS} attempts ({_reason(exc)}); resume "
            "once the storage answers.",
        ) from exc
    size = path.stat().st_size
    if video.size_bytes is not None and size != video.size_bytes:
        _raise_changed(video, f"has {size:,} bytes and was listed with {video.size_bytes:,}")


def _raise_changed(video: ListedVideo, how: str) -> None:
    raise FailedFetchError(
        "changed", f"{video.uri} {how} since it was listed; list the videos again and resume."
    )
