"""One file over HTTP: resumed where it was cut off, and never taken for what it is not.

FILE           the file, which appears under this name only whole and checked
FILE.sha256    the hash that it had at its first download, which later ones are held to
FILE.part      what has come so far, and `FILE.part.json` which file of the server's it is of
"""

# Judged from what is known of them, not run: pooch and torch.hub do not resume; the http_get of
# huggingface_hub is not public and resumes
# whatever now stands at the address; httpx would be a dependency for what urllib does as well.
# What is ours is Range with If-Range, the limit of the time to connect, and the sentences.

from __future__ import annotations

import http
import http.client
import ipaddress
import json
import os
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit, urlunsplit

from actionclip_deploy.errors import CheckpointError, DamagedFileError
from actionclip_deploy.files import (
    sha256_of_file,
    staged_file,
    try_lock,
    write_errors,
    write_json,
    write_text,
)

OnBytes: TypeAlias = Callable[[int, "int | None"], object]
MIRROR_VARIABLE = "ACTIONCLIP_MIRROR"

_CONNECT_SECONDS = 4.0  # so that it is told within five that there is no network
_READ_SECONDS = 30.0
_LOCK_STEP_SECONDS = 0.1
_PIECE_BYTES = 1 << 18
_MAX_CUTS = 3  # in a row, without a byte in between
_MIN_SHA256_DIGITS = 64
_MAGICS = (b"PK\x03\x04", b"\x80")  # a zip of torch.save or TorchScript, and a bare pickle


def mirrored(address: str) -> str:
    """An address, at the server that `ACTIONCLIP_MIRROR` names where it is set."""
    mirror = os.environ.get(MIRROR_VARIABLE, "").strip().rstrip("/")
    return mirror + urlsplit(address).path if mirror else address


def why_refused(address: str, *, came_from: str | None = None) -> str | None:
    """Why nothing is fetched from an address, as the end of a sentence; None where it may be.

    Args:
        address: The address.
        came_from: The address that redirected to it.
    """
    parts = urlsplit(address)
    if parts.scheme == "https" and parts.hostname:
        return None
    if came_from is not None and urlsplit(came_from).scheme == "https":
        return f"leads from https to {address}, where anybody on the way could change the file"
    if parts.scheme == "http" and _is_this_machine(parts.hostname or ""):
        return None
    return "is not an https address, so that anybody on the way could change the file"


def _is_this_machine(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


@dataclass(frozen=True)
class Download:
    """A file at an address, and its copy in a folder.

    Attributes:
        address: Where it is.
        folder: Where its copy is kept.
        sha256: Its hash or the beginning of it; None where the first download teaches it.
    """

    address: str
    folder: Path
    sha256: str | None = None

    @property
    def path(self) -> Path:
        """The copy, whether it is there or not; a file that is put there by hand is used."""
        name = Path(unquote(urlsplit(self.address).path)).name
        return self.folder / (name or "checkpoint.pth")

    @property
    def hash_path(self) -> Path:
        """The file of the hash that was learnt."""
        return self.path.with_name(f"{self.path.name}.sha256")

    @property
    def _part(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def _origin(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part.json")

    @property
    def copied_bytes(self) -> int:
        """Bytes of the copy; 0 where there is none."""
        return self.path.stat().st_size if self.path.is_file() else 0

    @property
    def partial_bytes(self) -> int:
        """Bytes that came of a file that was cut off."""
        return self._part.stat().st_size if self._part.is_file() else 0

    def remove(self) -> int:
        """Remove the copy and what came of it so far, not the hash; gives the bytes freed."""
        freed = 0
        for path in (self.path, self._part, self._origin):
            with write_errors(path):
                if path.is_file():
                    freed += path.stat().st_size
                    path.unlink()
        return freed

    def fetch(self, show: Callable[[str], AbstractContextManager[OnBytes]]) -> Path:
        """Fetch the file, or take the copy that is there.

        Args:
            show: Shows the progress; see `actionclip_deploy.published.show_downloads`.

        Raises:
            CheckpointError: If it cannot be fetched, or is not the file that it has to be.
            FileWriteError: If it cannot be written.
        """
        if self.path.is_file():
            self._check(self.path)
            return self.path
        why = why_refused(self.address)
        if why is not None:
            raise CheckpointError(f"{self.address} {why}; give an https address or a file")
        with write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self._part):
            if not self.path.is_file():  # another process may have fetched it
                with show(self.path.name) as on_bytes:
                    self._receive(on_bytes)
                self._check(self._part)
                with staged_file(self.path) as staged:
                    self._part.replace(staged)
                self._origin.unlink(missing_ok=True)
        self._check(self.path)
        return self.path

    # What came

    def _check(self, path: Path) -> None:
        """Hold a file against what it has to be, and keep its hash where nobody knew it."""
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(64)
        is_copy = path == self.path
        where = f"{path}, the copy of {self.address}," if is_copy else self.address
        advice = (
            f"remove it with `actionclip models remove` or by hand, and put the file of "
            f"{self.address} there"
            if is_copy
            else f"try again, or put the right file at {self.path}"
        )
        what = _what_else(path, begin, size)
        if what is not None:
            self._forget(path)
            raise CheckpointError(f"{where} {what}; {advice}")
        found = sha256_of_file(path)
        learnt = self.learnt_sha256()
        if self.sha256 is not None and not found.startswith(self.sha256):
            self._forget(path)
            raise CheckpointError(
                f"{where} has the sha256 {found}, and {self.sha256} was expected to begin it, so "
                f"it is refused; {advice}"
            )
        if learnt is not None and found != learnt:
            self._forget(path)
            raise CheckpointError(
                f"{where} has the sha256 {found}, and at its first download it had {learnt}, so it "
                f"is refused; {advice}. If its publisher says that it changed, remove "
                f"{self.hash_path}"
            )
        if learnt is None:
            write_text(self.hash_path, f"{found}  {self.path.name}\n")

    def _forget(self, path: Path) -> None:
        if path == self._part:  # a file that somebody put there is theirs
            path.unlink(missing_ok=True)
            self._origin.unlink(missing_ok=True)

    def learnt_sha256(self) -> str | None:
        """The hash of the first file that was fetched; None before that.

        Raises:
            DamagedFileError: If it cannot be read.
        """
        try:
            words = self.hash_path.read_text(encoding="utf-8").split()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as exc:
            raise DamagedFileError(f"{self.hash_path} cannot be read ({exc}); remove it") from exc
        if not words or len(words[0]) != _MIN_SHA256_DIGITS:
            raise DamagedFileError(f"{self.hash_path} holds no sha256; remove it")
        return words[0]

    # How it comes

    def _receive(self, on_bytes: OnBytes) -> None:
        """Bring `FILE.part` to the end of the file, going on where a connection was cut."""
        cuts = 0
        while True:
            before = self._part.stat().st_size
            try:
                if self._receive_once(on_bytes):
                    return
                why = "the connection was cut off"
            except (OSError, http.client.HTTPException) as exc:
                if isinstance(exc, CheckpointError) or getattr(exc, "filename", None):
                    raise
                why = _reason(exc)
            size = self._part.stat().st_size
            cuts = 0 if size > before else cuts + 1
            if cuts >= _MAX_CUTS or not self._origin.is_file():
                raise CheckpointError(
                    f"{self.address} was cut off after {size:,} bytes ({why}); run the same again, "
                    f"which goes on from there where the server can, or put the file at {self.path}"
                )

    def _receive_once(self, on_bytes: OnBytes) -> bool:
        """One request; gives whether all has come that the server said there is."""
        request = urllib.request.Request(self.address, headers={"Accept-Encoding": "identity"})
        have, validator = self._part.stat().st_size, self._validator()
        if have and validator:
            request.add_header("Range", f"bytes={have}-")
            request.add_header("If-Range", validator)
        try:
            response = _open(request)
        except urllib.error.HTTPError as exc:
            exc.close()
            if exc.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
                self._start_anew({})
                return False
            raise CheckpointError(self._no_answer(f"status {exc.code}, {_reason(exc)}")) from exc
        except OSError as exc:
            raise CheckpointError(self._no_answer(_reason(exc))) from exc
        with response:
            return self._write(response, on_bytes)

    def _write(self, response: Any, on_bytes: OnBytes) -> bool:
        headers, have = response.headers, self._part.stat().st_size
        goes_on = str(headers.get("Content-Range", "")).startswith(f"bytes {have}-")
        if response.status != http.HTTPStatus.PARTIAL_CONTENT or not goes_on:
            have = 0
            self._start_anew(headers)
            if response.status == http.HTTPStatus.PARTIAL_CONTENT:
                return False
        length = headers.get("Content-Length")
        total = have + int(length) if length is not None and length.isdecimal() else None
        on_bytes(have, total)
        with write_errors(self._part), self._part.open("ab") as file:
            while True:
                try:
                    piece = response.read(_PIECE_BYTES)
                except (OSError, http.client.HTTPException):
                    return False
                if not piece:
                    break
                file.write(piece)
                have += len(piece)
                on_bytes(have, total)
        return total is None or have == total

    def _start_anew(self, headers: Any) -> None:
        with write_errors(self._part):
            os.truncate(self._part, 0)
            self._origin.unlink(missing_ok=True)
        tag = headers.get("ETag")
        validator = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")
        if validator:
            write_json(self._origin, {"address": self.address, "validator": validator})

    def _validator(self) -> str | None:
        """What the server calls the file that the part is of; None where it cannot be told."""
        try:
            known = json.loads(self._origin.read_text(encoding="utf-8"))
            return str(known["validator"]) if known["address"] == self.address else None
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def _no_answer(self, why: str) -> str:
        return f"{self.address} could not be fetched ({why}); put the file at {self.path}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the part of a file, made where it is not there, for one process at a time."""
    while True:
        with write_errors(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # The one before may have given the file its name between the two calls.
            held = try_lock(handle) and os.path.samestat(os.fstat(handle), path.stat())
        except FileNotFoundError:
            held = False
        except OSError:  # a file system without locks
            held = True
        if held:
            break
        os.close(handle)
        time.sleep(_LOCK_STEP_SECONDS)
    try:
        yield
    finally:
        with suppress(OSError):
            # Not what another process has made since the part got its name.
            found = path.stat()
            if found.st_size == 0 and os.path.samestat(os.fstat(handle), found):
                path.unlink()
        os.close(handle)


def _what_else(path: Path, begin: bytes, size: int) -> str | None:
    """What a file is instead of a checkpoint, as the end of a sentence; None if it may be one."""
    if size == 0:
        return "is empty"
    if begin.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page and not a checkpoint, such as one that asks to log in"
    if begin.startswith(_MAGICS[0]) and not zipfile.is_zipfile(path):
        return "is cut off: the end of the file is missing"
    is_safetensors = begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") < size
    if not begin.startswith(_MAGICS) and not is_safetensors:
        return f"is not a checkpoint: it starts with the bytes {begin[:8]!r}"
    return None


def _reason(exc: BaseException) -> str:
    reason = getattr(exc, "reason", exc)
    text = str(getattr(reason, "strerror", None) or reason).strip()
    return text.splitlines()[0].rstrip(".") if text else type(exc).__name__


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        why = why_refused(newurl, came_from=req.full_url)
        if why is not None:
            fp.close()
            raise CheckpointError(
                f"{req.full_url} redirects to {newurl}, which is refused: it {why}; download the "
                "file by hand if you trust it, and give its path"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(request: urllib.request.Request) -> Any:
    """Send a request; that nobody can be reached is known within `_CONNECT_SECONDS`.

    Neither the look-up of a name nor several addresses of one host are bounded by a timeout of
    sockets, so it is done in a thread.
    """
    connected, done = threading.Event(), threading.Event()
    outcome: list[Any] = []

    class Plain(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            connected.set()

    class Secure(http.client.HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            connected.set()

    class PlainHandler(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Plain, req)

    class SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Secure, req)

    def send() -> None:
        try:
            opener = urllib.request.build_opener(_Redirects, PlainHandler, SecureHandler)
            outcome.append(opener.open(request, timeout=_READ_SECONDS))
        except Exception as exc:  # noqa: BLE001 - raised again by who waits
            outcome.append(exc)
        connected.set()
        done.set()

    threading.Thread(target=send, daemon=True).start()
    if not connected.wait(_CONNECT_SECONDS):
        raise TimeoutError(f"no connection within {_CONNECT_SECONDS:.0f} seconds")
    if not done.wait(2 * _READ_SECONDS):
        raise TimeoutError("no answer")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def is_reachable(address: str) -> bool:
    """Whether a server answers, whatever it says; known within five seconds if none does."""
    try:
        _open(urllib.request.Request(address, method="HEAD")).close()
    except (urllib.error.HTTPError, CheckpointError):
        return True
    except (OSError, http.client.HTTPException):
        return False
    return True


def with_sha256(address: str, sha256: str) -> str:
    """An address with the hash that its file has to have."""
    return urlunsplit(urlsplit(address)._replace(fragment=f"sha256={sha256}"))
