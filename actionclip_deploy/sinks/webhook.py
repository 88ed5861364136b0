"""Events to an address by HTTP: signed, tried again, in order, kept on disk until they arrive."""

# Signatures and headers are those of Standard Webhooks (standardwebhooks.com), which many
# languages have libraries to check by; PyPI's is of no use to a sender besides `sign`, 20 lines.

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from actionclip_deploy.client import retry_after
from actionclip_deploy.errors import FileWriteError, MissingExtraError, SinkError
from actionclip_deploy.files import entries_of, try_lock, unique_name, write_bytes, write_errors
from actionclip_deploy.keyed_store import key_name
from actionclip_deploy.records import EventRecord
from actionclip_deploy.sinks.delivery import Sink, pause_seconds

if TYPE_CHECKING:
    from types import ModuleType

    import httpx

logger = logging.getLogger(__name__)

SECRET_VARIABLE = "ACTIONCLIP_WEBHOOK_SECRET"
SPOOL_VARIABLE = "ACTIONCLIP_SPOOL"
_MAX_SPOOLED = 10_000
_MAX_SPOOLED_BYTES = 64 << 20
_MESSAGES = "[0-9]*.json"  # of a file that a killed program began, the name begins with a dot
_TIMEOUT_SECONDS = 10.0
_LONGEST_RETRY_AFTER_SECONDS = 3600.0
# What is wrong with one message; every other refusal is of the address and may end.
_REFUSED = (400, 413, 415, 422)


class WebhookSink(Sink):
    """Sends each message as a POST of its JSON, until the answer is 2xx.

    Messages wait in a folder, in order, and those that a program left are sent by the next one. One
    that arrived but whose answer was lost is sent again: `webhook-id` is the same then. Redirects
    are not followed, so that events go nowhere else.

    With a secret in `ACTIONCLIP_WEBHOOK_SECRET`, `webhook-signature` is `v1,` and the base64 of
    HMAC-SHA256 over `webhook-id`, `webhook-timestamp` and the body, joined by dots.

    Args:
        address: Of http or https.
        environ: Of the secret and of the spool's folder, `ACTIONCLIP_SPOOL`.
        spool: Folder of messages that wait, beside those of other addresses; None for the
            environment's or the user's.
        timeout_seconds: For a connection, and for each part of an answer.
        max_spooled: Messages that wait at most. Beyond it the oldest `update` is dropped, or else
            the oldest message.

    Raises:
        ValueError: If the address is none.
        MissingExtraError: If httpx is not installed.
    """

    kind = "webhook"

    def __init__(
        self,
        address: str,
        *,
        environ: Mapping[str, str] = os.environ,
        spool: str | Path | None = None,
        timeout_seconds: float = _TIMEOUT_SECONDS,
        max_spooled: int = _MAX_SPOOLED,
    ) -> None:
        library = _load_httpx()
        try:
            url = library.URL(address)
        except library.InvalidURL:
            url = None
        if url is None or url.scheme not in ("http", "https") or not url.host:
            raise ValueError(
                "The address of the webhook is not one; expected https://HOST/PATH with a host."
            ) from None
        # Many services put their secret into the path.
        port = "" if url.port is None else f":{url.port}"
        super().__init__(f"{url.scheme}://{url.host}{port}/***")
        self._address = address
        self._key = _signing_key(environ.get(SECRET_VARIABLE))
        self._http: httpx.Client = library.Client(
            timeout=library.Timeout(timeout_seconds), follow_redirects=False
        )
        folder = _spool_folder(spool, environ)
        self._spool = _Spool(
            None if folder is None else folder / key_name({"webhook": address}),
            max_messages=max_spooled,
            max_bytes=_MAX_SPOOLED_BYTES,
        )
        self._httpx_errors = (library.HTTPError, library.InvalidURL, library.StreamError)
        self._can_end = threading.Event()
        self._sender = threading.Thread(target=self._send, name="sink-webhook-sender", daemon=True)
        _hide_requests_of(self._sender.name)
        if num_found := len(self._spool):
            logger.info("%s: %d messages of an earlier run are sent first", self.name, num_found)
        self._sender.start()
        self._thread.start()

    def close(self, timeout_seconds: float = 5.0) -> None:
        """As of every sink; what cannot be delivered in time stays on disk for the next run."""
        until = time.monotonic() + timeout_seconds
        super().close(timeout_seconds)
        self._can_end.set()
        self._spool.wake()
        self._sender.join(max(until - time.monotonic(), 0.1))
        kept, lost = self._spool.close()
        self._note_dropped("closed", lost)
        self._http.close()
        if kept:
            logger.warning("%s: %d messages are sent by the next run", self.name, kept)

    def _deliver(self, event: EventRecord) -> None:
        why = self._spool.add(event)
        if why is not None:
            self._note_failure(why)
        if num_dropped := self._spool.make_room():
            self._note_dropped("spool_full", num_dropped)

    def _num_kept(self) -> int:
        return len(self._spool)

    def _send(self) -> None:
        with self._told():
            self._send_all()

    def _send_all(self) -> None:
        num_failed = 0
        while (found := self._spool.oldest(until=self._can_end)) is not None:
            name, body = found
            retry_after_seconds = None
            message_id = _id_of(body)
            try:
                if message_id is None:
                    self._note_dropped("damaged")
                elif self._post(message_id, body):
                    self._note_sent()
                else:
                    self._note_dropped("refused")
            except SinkError as exc:
                if self._is_ending:
                    return
                self._note_failure(str(exc))
                retry_after_seconds = exc.retry_after_seconds
            else:
                self._spool.remove(name)
                num_failed = 0
                continue
            if self._can_end.wait(pause_seconds(num_failed, retry_after_seconds)):
                return
            num_failed += 1

    @property
    def _is_ending(self) -> bool:
        return self._can_end.is_set()

    def _post(self, message_id: str, body: bytes) -> bool:
        """Whether the message arrived; it never will where False."""
        now = int(time.time())
        headers = {
            "content-type": "application/json",
            "user-agent": "actionclip-deploy",
            "webhook-id": message_id,
            "webhook-timestamp": str(now),
        }
        if self._key is not None:
            headers["webhook-signature"] = sign(self._key, message_id, now, body)
        try:
            # The body of the answer is not read: nothing in it is of use, and it may be endless.
            with self._http.stream("POST", self._address, content=body, headers=headers) as reply:
                status, seconds = reply.status_code, retry_after(reply.headers)
        except self._httpx_errors as exc:
            why = str(exc) or type(exc).__name__
            raise SinkError(f"no answer ({why.replace(self._address, self.name)})") from exc
        if 200 <= status < 300:
            return True
        if status in _REFUSED:
            self._note_failure(f"a message is refused (status {status})")
            return False
        if 300 <= status < 400:
            raise SinkError(
                f"the answer is a redirect (status {status}), which is not followed; give the "
                "address that it leads to"
            )
        if seconds is not None:
            seconds = min(seconds, _LONGEST_RETRY_AFTER_SECONDS)
        raise SinkError(f"the answer has status {status}", retry_after_seconds=seconds)


def sign(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """The signature of a message, as Standard Webhooks has it."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    digest = hmac.new(key, signed, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def _signing_key(secret: str | None) -> bytes | None:
    """A secret as it is, or what `whsec_` and base64 stand for."""
    if not secret:
        return None
    if secret.startswith("whsec_"):
        try:
            return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except binascii.Error:
            raise ValueError(
                f"{SECRET_VARIABLE} begins with whsec_, and what follows is not base64; give the "
                "whole secret, or one that begins otherwise."
            ) from None
    return secret.encode()


def _id_of(body: bytes) -> str | None:
    try:
        event = json.loads(body)
        return f"{event['id']}-{event['number']}"
    except (ValueError, LookupError, TypeError):
        return None


def _spool_folder(spool: str | Path | None, environ: Mapping[str, str]) -> Path | None:
    import platformdirs

    given = spool or environ.get(SPOOL_VARIABLE)
    try:
        if given:
            return Path(given).expanduser()
        found = Path(platformdirs.user_state_dir("actionclip-deploy", appauthor=False)) / "spool"
        return found.expanduser() if found.is_absolute() else None
    except RuntimeError:  # there is no home
        return None


class _Spool:
    """Messages that wait, oldest first: files of a folder, or in memory where none can be written.

    A program has a folder of its own, `N` below that of the address, for as long as it lives. What
    programs that have ended left in theirs is moved there.
    """

    def __init__(self, folder: Path | None, *, max_messages: int, max_bytes: int) -> None:
        self._changed = threading.Condition()
        self._max_messages, self._max_bytes = max_messages, max_bytes
        self._sizes: dict[str, int] = {}  # in order
        self._in_memory: dict[str, bytes] = {}
        self._current: str | None = None
        self._last = 0
        self._lock: int | None = None
        self._is_closed = False
        self._folder: Path | None = None
        if folder is not None:
            try:
                with write_errors(folder):
                    self._folder = self._claim(folder)
            except FileWriteError as exc:
                logger.warning("messages of a webhook wait in memory alone: %s", exc)

    def __len__(self) -> int:
        return len(self._sizes)

    def _claim(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        mine: Path | None = None
        number = 0
        while mine is None:
            mine = self._lock_of(folder / str(number))
            number += 1
        for other in sorted(entries_of(folder, "*")):
            if other == mine or not (other / "lock").exists():
                continue
            handle = os.open(other / "lock", os.O_RDWR)
            try:
                if try_lock(handle):
                    for path in entries_of(other, _MESSAGES):
                        path.rename(mine / path.name)
            finally:
                os.close(handle)
        for path in sorted(entries_of(mine, _MESSAGES)):
            self._sizes[path.name] = path.stat().st_size
            with suppress(ValueError):
                self._last = int(path.name.partition("-")[0])
        return mine

    def _lock_of(self, folder: Path) -> Path | None:
        folder.mkdir(exist_ok=True, mode=0o700)
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        if not try_lock(handle):
            os.close(handle)
            return None
        self._lock = handle
        return folder

    def add(self, event: EventRecord) -> str | None:
        """Keep a message; gives why it is in memory alone, or None."""
        body = event.to_json()
        self._last = max(self._last + 1, time.time_ns())
        name = f"{self._last:020d}-{event.kind}-{unique_name()}.json"
        why = None
        if self._folder is not None:
            try:
                write_bytes(self._folder / name, body)
            except FileWriteError as exc:
                why = f"{exc} Messages wait in memory meanwhile."
        with self._changed:
            if self._folder is None or why is not None:
                self._in_memory[name] = body
            self._sizes[name] = len(body)
            self._changed.notify_all()
        return why

    def make_room(self) -> int:
        """Drop what is over the bounds, `update`s first; gives how many."""
        num_dropped = 0
        with self._changed:
            while (
                len(self._sizes) > self._max_messages or sum(self._sizes.values()) > self._max_bytes
            ):
                free = [name for name in self._sizes if name != self._current]
                if not free:
                    break
                updates = (name for name in free if "-update-" in name)
                self._forget(next(updates, free[0]))
                num_dropped += 1
        return num_dropped

    def oldest(self, *, until: threading.Event) -> tuple[str, bytes] | None:
        """The name and the body of the message to send next, waited for until it is the end."""
        with self._changed:
            while not self._sizes:
                if until.is_set():
                    return None
                self._changed.wait()
            name = self._current = next(iter(self._sizes))
            body = self._in_memory.get(name)
        if body is None and self._folder is not None:
            with suppress(OSError):
                body = (self._folder / name).read_bytes()
        return name, body or b""

    def remove(self, name: str) -> None:
        """Forget a message that was sent."""
        with self._changed:
            self._current = None
            self._forget(name)

    def wake(self) -> None:
        """Let `oldest` see that it is the end."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> tuple[int, int]:
        """Leave the folder to the next program; gives how many messages are kept, and lost."""
        with self._changed:
            lost = len(self._in_memory)
            kept = len(self._sizes) - lost
            self._sizes.clear()
            self._in_memory.clear()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None
        return kept, lost

    def _forget(self, name: str) -> None:
        self._sizes.pop(name, None)
        if self._in_memory.pop(name, None) is None and self._folder is not None:
            with suppress(OSError):
                (self._folder / name).unlink()


class _HideRequests(logging.Filter):
    """Drops what httpx logs of requests by webhooks: the whole address, with what it hides."""

    def __init__(self, thread_name: str) -> None:
        super().__init__()
        self._thread_name = thread_name

    def filter(self, record: logging.LogRecord) -> bool:
        return record.threadName != self._thread_name


def _hide_requests_of(thread_name: str) -> None:
    httpx_logger = logging.getLogger("httpx")
    if not any(isinstance(each, _HideRequests) for each in httpx_logger.filters):
        httpx_logger.addFilter(_HideRequests(thread_name))


def _load_httpx() -> ModuleType:
    try:
        import httpx
    except ImportError as exc:
        raise MissingExtraError("A webhook", "client") from exc
    return httpx
