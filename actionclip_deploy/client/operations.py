"""What can be asked of a server, as steps that `Client` and `AsyncClient` carry out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

from actionclip_deploy.client import answers
from actionclip_deploy.client.exchange import (
    Attempt,
    Call,
    Connection,
    NoReply,
    Pause,
    Reply,
    Steps,
    exchange,
    refusal,
    unreachable,
)
from actionclip_deploy.client.uploads import Videos, uploads
from actionclip_deploy.errors import LabelBankError, RuntimeUnavailableError
from actionclip_deploy.labels import LabelBankDiff
from actionclip_deploy.runtimes.base import Float32Array
from actionclip_deploy.sampling import Views

Result = TypeVar("Result")
OnProgress = Callable[[int, int], None]

_FIRST_POLL_SECONDS = 0.1
_LONGEST_POLL_SECONDS = 1.0
_READY_POLL_SECONDS = 0.25
_PROBE_SECONDS = 5.0


def classify(
    connection: Connection,
    videos: Videos,
    labels: str | Sequence[str],
    *,
    top_k: int,
    views: Views | str,
    templates: Sequence[str] | None,
    multi_label: bool,
    per_template: bool,
    timeout_seconds: float | None,
) -> Steps[tuple[answers.ServerPrediction | answers.RefusedVideo, ...]]:
    """Rank labels for videos."""
    fields = {
        "labels": labels if isinstance(labels, str) else _json_list(labels),
        "top_k": str(top_k),
        "views": str(views),
        "multi_label": json.dumps(multi_label),
        "per_template": json.dumps(per_template),
        **_timeout(timeout_seconds),
    }
    if templates is not None:
        fields["templates"] = _json_list(templates)
    call = Call("POST", "/v1/classify", fields=fields, uploads=uploads(videos))
    reply = yield from exchange(connection, call, connection.timer(timeout_seconds))
    return _read(connection, reply, answers.read_predictions)


def embed(
    connection: Connection, videos: Videos, *, views: Views | str, timeout_seconds: float | None
) -> Steps[tuple[answers.ServerEmbeddings | answers.RefusedVideo, ...]]:
    """Embed videos."""
    fields = {"views": str(views), **_timeout(timeout_seconds)}
    call = Call("POST", "/v1/embed", fields=fields, uploads=uploads(videos))
    reply = yield from exchange(connection, call, connection.timer(timeout_seconds))
    return _read(connection, reply, answers.read_embeddings)


def embed_texts(
    connection: Connection, texts: Sequence[str], *, timeout_seconds: float | None
) -> Steps[Float32Array]:
    """Embed prompts as they are."""
    body: dict[str, Any] = {"texts": _words(texts, "texts")}
    if timeout_seconds is not None:
        body["timeout_ms"] = timeout_seconds * 1000
    call = Call("POST", "/v1/embed", json=body)
    reply = yield from exchange(connection, call, connection.timer(timeout_seconds))
    return _read(connection, reply, answers.read_text_embeddings)


def info(connection: Connection) -> Steps[dict[str, Any]]:
    """What runs."""
    reply = yield from exchange(connection, Call("GET", "/v1/info"), connection.timer())
    return _read(connection, reply, dict)


def list_banks(connection: Connection) -> Steps[tuple[answers.BankState, ...]]:
    """All label banks."""
    reply = yield from exchange(connection, Call("GET", "/v1/labels"), connection.timer())
    return _read(connection, reply, lambda data: tuple(map(answers.read_bank, data["banks"])))


def get_bank(connection: Connection, name: str) -> Steps[answers.BankState]:
    """One label bank."""
    reply = yield from exchange(connection, Call("GET", _bank_path(name)), connection.timer())
    return _read(connection, reply, answers.read_bank)


def put_bank(
    connection: Connection,
    name: str,
    labels: Sequence[str],
    templates: Sequence[str] | None,
    *,
    wait: bool,
    on_progress: OnProgress | None,
    timeout_seconds: float,
) -> Steps[answers.BankState]:
    """Build a label bank, and wait until it is there."""
    body: dict[str, Any] = {"labels": _words(labels, "labels")}
    if templates is not None:
        body["templates"] = _words(templates, "templates")
    call = Call("PUT", _bank_path(name), json=body, is_idempotent=False)
    reply = yield from exchange(connection, call, connection.timer())
    state = _read(connection, reply, answers.read_bank)
    left = connection.timer(timeout_seconds)
    pause = _FIRST_POLL_SECONDS
    while wait:
        build = state.build
        if build is None:
            raise LabelBankError(f"The build of the label bank {name!r} was ended by a DELETE.")
        if on_progress is not None:
            on_progress(build.done, build.total)
        if build.is_over:
            break
        if left() <= 0:
            raise RuntimeUnavailableError(
                f"The label bank {name!r} was not built after {timeout_seconds:g} seconds "
                f"({build.done} of {build.total} prompts); the server goes on, ask for it later."
            )
        yield Pause(min(pause, max(left(), 0.0)))
        pause = min(2 * pause, _LONGEST_POLL_SECONDS)
        state = yield from get_bank(connection, name)
    build = state.build
    if wait and build is not None and build.state != "ready":
        why = build.error or f"its state is {build.state}"
        raise LabelBankError(f"The label bank {name!r} was not built: {why}")
    return state


def delete_bank(connection: Connection, name: str) -> Steps[None]:
    """Remove a label bank, or end its build."""
    call = Call("DELETE", _bank_path(name), is_idempotent=False)
    yield from exchange(connection, call, connection.timer())


def diff(connection: Connection, name: str, old: int, new: int | None) -> Steps[LabelBankDiff]:
    """What changed from one version of a label bank to another."""
    params = {"old": old} if new is None else {"old": old, "new": new}
    call = Call("GET", f"{_bank_path(name)}/diff", params=params)
    reply = yield from exchange(connection, call, connection.timer())
    return _read(connection, reply, answers.read_diff)


def is_ready(connection: Connection) -> Steps[bool]:
    """Whether requests are taken at this moment."""
    outcome = yield Attempt(Call("GET", "/readyz"), min(_PROBE_SECONDS, connection.timeout_seconds))
    return isinstance(outcome, Reply) and outcome.is_success


def wait_until_ready(connection: Connection, timeout_seconds: float) -> Steps[None]:
    """Wait until requests are taken."""
    left = connection.timer(timeout_seconds)
    while True:
        outcome = yield Attempt(Call("GET", "/readyz"), max(min(left(), _PROBE_SECONDS), 0.001))
        if isinstance(outcome, Reply) and outcome.is_success:
            return
        if left() <= _READY_POLL_SECONDS:
            why = _why_not_ready(connection, outcome)
            raise RuntimeUnavailableError(
                f"The server at {connection.base_url} was not ready after {timeout_seconds:g} "
                f"seconds: {why}"
            )
        yield Pause(_READY_POLL_SECONDS)


def _why_not_ready(connection: Connection, outcome: Reply | NoReply | None) -> str:
    if isinstance(outcome, NoReply):
        return str(unreachable(connection, outcome))
    assert outcome is not None
    try:
        return f"it is {outcome.json()['status']}; wait longer, or read its log."
    except (ValueError, TypeError, KeyError):
        return str(refusal(connection, outcome))


def _read(connection: Connection, reply: Reply, reader: Callable[[Any], Result]) -> Result:
    try:
        return reader(reply.json())
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as exc:
        raise RuntimeUnavailableError(
            f"{connection.base_url} does not answer as `actionclip serve` of this version does "
            f"({type(exc).__name__}: {exc}); check the address, and the version in /v1/info."
        ) from exc


def _bank_path(name: str) -> str:
    return f"/v1/labels/{quote(name, safe='')}"


def _timeout(seconds: float | None) -> dict[str, str]:
    return {} if seconds is None else {"timeout_ms": repr(seconds * 1000)}


def _json_list(words: Iterable[str]) -> str:
    return json.dumps(list(words))


def _words(words: Sequence[str], what: str) -> list[str]:
    if isinstance(words, str):
        raise ValueError(f"{what} is the string {words!r}; give a list of strings.")
    return list(words)
