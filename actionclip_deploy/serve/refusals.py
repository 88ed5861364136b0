"""What is answered to a request that is refused: a status, a code and one sentence.

| status | codes |
|---|---|
| 400 | bad_request, bad_tensor |
| 401 | no_key |
| 403 | foreign_origin |
| 404 | unknown_bank, unknown_model, unknown_stream, no_frame, not_found |
| 404 | no_archive, unknown_video, no_thumbnail |
| 405 | method_not_allowed |
| 408 | slow_body |
| 409 | bank_building, bank_watched |
| 410 | video_gone |
| 413 | body_too_large, video_too_large, too_many |
| 415 | unsupported_type |
| 416 | no_such_range |
| 421 | unknown_host |
| 422 | video_unreadable, bad_value, unknown_words |
| 429 | queue_full; with Retry-After in seconds |
| 499 | disconnected; nobody reads it, logs and metrics count it |
| 503 | not_ready, shutting_down, spool_full, out_of_memory; with Retry-After |
| 504 | deadline |

500 `failed` is a runtime or a server that failed, never a request that is wrong. /v2 has the same
statuses and the body of its protocol; there the code is in the log and the metrics alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from actionclip_deploy.errors import (
    ActionClipError,
    ArchiveChoiceError,
    LabelError,
    RequestRefusedError,
    ShapeError,
    UnknownVideoError,
    UnknownWordsError,
)
from actionclip_deploy.records import ErrorAnswer, ErrorAnswerV2, ErrorDetail, printable

logger = logging.getLogger(__name__)

RETRY_SECONDS = 5.0
# Messages name what a client sent, which may be long.
_MESSAGE_CHARACTERS = 800


def bad_request(message: str) -> RequestRefusedError:
    """The body or a parameter is not what the route takes."""
    return RequestRefusedError(message, status=400, code="bad_request")


def bad_tensor(message: str) -> RequestRefusedError:
    """A tensor has another name, type or shape than the model's, or not the bytes of it."""
    return RequestRefusedError(message, status=400, code="bad_tensor")


def bad_value(message: str) -> RequestRefusedError:
    """The form is right and a value in it is not allowed."""
    return RequestRefusedError(message, status=422, code="bad_value")


def unknown_words(message: str) -> RequestRefusedError:
    """Labels in words that the model was never trained on."""
    return RequestRefusedError(message, status=422, code="unknown_words")


def no_key() -> RequestRefusedError:
    """Keys are asked for, and none of them was given."""
    return RequestRefusedError(
        "The request has no key of this server; send one as `Authorization: Bearer KEY`.",
        status=401,
        code="no_key",
    )


def unknown_host(host: str) -> RequestRefusedError:
    """The request is for a name that is not the server's."""
    return RequestRefusedError(
        f"The request is for the host {host!r}, which is not a name of this server; ask it by its "
        "address, or start it with --allowed-host and that name.",
        status=421,
        code="unknown_host",
    )


def foreign_origin(origin: str) -> RequestRefusedError:
    """A page of another site asks for more than to read."""
    return RequestRefusedError(
        f"A page of {origin!r} sent this request, and pages of other sites may change nothing "
        "here; use the server's own page, or start it with --allowed-host and that page's host.",
        status=403,
        code="foreign_origin",
    )


def unknown_bank(name: str, names: list[str]) -> RequestRefusedError:
    """There is no such label bank."""
    there = ", ".join(names) or "none"
    return RequestRefusedError(
        f"There is no label bank {name!r} (there are: {there}); build it with "
        "PUT /v1/labels/NAME, or give a list of labels.",
        status=404,
        code="unknown_bank",
    )


def unknown_model(name: str, names: list[str]) -> RequestRefusedError:
    """There is no such model."""
    return RequestRefusedError(
        f"There is no model {name!r}; the models are {', '.join(names)}.",
        status=404,
        code="unknown_model",
    )


def unknown_version(model: str, version: str, there: str) -> RequestRefusedError:
    """There is no such version of a model."""
    return RequestRefusedError(
        f"The model {model} has no version {version!r}; ask for {there}, or for none.",
        status=404,
        code="unknown_model",
    )


def bank_building(name: str) -> RequestRefusedError:
    """Another build of the bank is under way."""
    return RequestRefusedError(
        f"The label bank {name!r} is being built; wait until its build has ended "
        f"(GET /v1/labels/{name}) or end it with DELETE.",
        status=409,
        code="bank_building",
    )


def bank_leaving(name: str) -> RequestRefusedError:
    """The bank is being removed."""
    return RequestRefusedError(
        f"The label bank {name!r} is being deleted; try again once that is answered.",
        status=409,
        code="bank_building",
    )


def bank_watched(name: str, cameras: Sequence[str]) -> RequestRefusedError:
    """The bank is to be removed, and cameras are watched with it."""
    return RequestRefusedError(
        f"The label bank {name!r} is what {_cameras(cameras)} watched with, so it stays; start the "
        "server with another one for them, or replace its labels with PUT.",
        status=409,
        code="bank_watched",
    )


def bank_lacks(name: str, camera: str, label: str) -> RequestRefusedError:
    """The bank would lack a label that a camera is set up for."""
    return RequestRefusedError(
        f"The camera {camera!r} is watched with the label bank {name!r} and has a threshold or a "
        f"group for {label!r}, which is not among the new labels; put that label as well, or "
        "change the camera's settings and start the server again.",
        status=409,
        code="bank_watched",
    )


def unknown_stream(name: str, names: Sequence[str]) -> RequestRefusedError:
    """No camera of this name is watched."""
    if not names:
        return no_streams()
    return RequestRefusedError(
        f"There is no stream {name!r} (there are: {', '.join(names)}).",
        status=404,
        code="unknown_stream",
    )


def no_streams() -> RequestRefusedError:
    """No camera is watched at all."""
    return RequestRefusedError(
        "There is no stream, as the server was started without --watch; whoever runs it can give "
        "it cameras.",
        status=404,
        code="unknown_stream",
    )


def no_frame(name: str) -> RequestRefusedError:
    """Nothing was seen yet of a camera."""
    return RequestRefusedError(
        f"No frame of the stream {name!r} has come yet; GET /v1/streams/NAME says how it is.",
        status=404,
        code="no_frame",
    )


def no_archive() -> RequestRefusedError:
    """There is nothing to search."""
    return RequestRefusedError(
        "There is nothing to search, as the server was started without --archive; whoever runs it "
        "can give it an archive, which `actionclip index` makes.",
        status=404,
        code="no_archive",
    )


def unknown_video(message: str) -> RequestRefusedError:
    """The archive has no such video."""
    return RequestRefusedError(message, status=404, code="unknown_video")


def unknown_video_id(video_id: int) -> RequestRefusedError:
    """The archive has no video of this id, or has it no more."""
    return unknown_video(
        f"The archive has no video {video_id}, or has it no more, as a video that changed gets "
        "another id; search again."
    )


def video_left(name: str) -> RequestRefusedError:
    """What lies where a video lay is somewhere else, by a link, or is no file."""
    return unknown_video(
        f"{name} is not served: it is no file, or a link that leads out of its folder."
    )


def video_gone(name: str, what: str) -> RequestRefusedError:
    """A video's file is not what was indexed."""
    return RequestRefusedError(
        f"The file of {name} {what}, and the archive knows nothing of that yet; whoever runs the "
        "server can bring it up to date with `actionclip index`.",
        status=410,
        code="video_gone",
    )


def no_thumbnail(video_id: int, window: int) -> RequestRefusedError:
    """No picture was kept of a window."""
    return RequestRefusedError(
        f"The archive has no picture of window {window} of the video {video_id}; it has some if "
        "it was made with `actionclip index --thumbnails`.",
        status=404,
        code="no_thumbnail",
    )


def bank_not_removed(name: str, why: str) -> RequestRefusedError:
    """What was saved of a bank is still there, and would be back after the next start."""
    return RequestRefusedError(
        f"The label bank {name!r} cannot be removed from the bundle's folder ({why}), so it stays; "
        "tell whoever runs the server.",
        status=500,
        code="failed",
    )


def too_many(what: str, number: float, limit: float) -> RequestRefusedError:
    """More of something than a request may have."""
    return RequestRefusedError(
        f"The request has {number:,} {what} and may have {limit:,}; send fewer at a time.",
        status=413,
        code="too_many",
    )


def too_many_bytes_of_json(limit: int) -> RequestRefusedError:
    """The part of the body that is JSON is longer than allowed."""
    return RequestRefusedError(
        f"The request has more than {limit:,} bytes of JSON, which is the limit; send tensors as "
        "binary data after the JSON, or fewer rows at a time.",
        status=413,
        code="too_many",
    )


def too_many_values(limit_bytes: int) -> RequestRefusedError:
    """What is no raw tensor takes more than allowed, in a message of gRPC."""
    return RequestRefusedError(
        f"The request has more than {limit_bytes:,} bytes besides raw_input_contents, which is the "
        "limit; send tensors there, or fewer rows at a time.",
        status=413,
        code="too_many",
    )


def body_too_large(limit_bytes: int) -> RequestRefusedError:
    """The body is longer than allowed."""
    return RequestRefusedError(
        f"The body has more than {limit_bytes:,} bytes, which is the limit; send less at a time.",
        status=413,
        code="body_too_large",
    )


def slow_body(seconds: float) -> RequestRefusedError:
    """The body did not arrive in time."""
    return RequestRefusedError(
        f"The body was not there after {seconds:g} seconds; send it again, or less at a time.",
        status=408,
        code="slow_body",
    )


def not_taken(seconds: float) -> RequestRefusedError:
    """The client has not read its answer, and perhaps never will."""
    return RequestRefusedError(
        f"The answer was not read within {seconds:g} seconds.", status=499, code="disconnected"
    )


def tiny_pieces(least_bytes: int) -> RequestRefusedError:
    """The body comes in so many pieces that reading it keeps others waiting."""
    return bad_request(
        f"The body comes in thousands of pieces of less than {least_bytes} bytes; send it in "
        "larger ones, or with its Content-Length."
    )


def video_too_large(message: str, *, limit: str | None = None) -> RequestRefusedError:
    """A video takes more than it may: time, memory, pixels, frames or duration."""
    return RequestRefusedError(message, status=413, code="video_too_large", limit=limit)


def video_unreadable(message: str, *, limit: str | None = None) -> RequestRefusedError:
    """No frame can be had from a video."""
    return RequestRefusedError(message, status=422, code="video_unreadable", limit=limit)


def decoder_out_of_memory(name: str) -> RequestRefusedError:
    """Decoding processes had no memory for a video, which need not be the video's doing."""
    return RequestRefusedError(
        f"The server had not enough memory to decode {name}, which says nothing about the file; "
        "try again after the time in Retry-After.",
        status=503,
        code="out_of_memory",
        retry_after_seconds=RETRY_SECONDS,
        limit="memory",
    )


def unsupported_type(message: str) -> RequestRefusedError:
    """The body is of a type that the route does not take."""
    return RequestRefusedError(message, status=415, code="unsupported_type")


def queue_full(message: str, *, retry_after_seconds: float) -> RequestRefusedError:
    """More waits already than may."""
    return RequestRefusedError(
        message, status=429, code="queue_full", retry_after_seconds=retry_after_seconds
    )


def too_many_requests(limit: int, retry_after_seconds: float) -> RequestRefusedError:
    """As many requests as may be are worked on."""
    return queue_full(
        f"{limit} requests are worked on, which is the limit; try again after the time in "
        "Retry-After.",
        retry_after_seconds=max(1.0, retry_after_seconds),
    )


def memory_full(limit_bytes: int, retry_after_seconds: float) -> RequestRefusedError:
    """The tensors of other requests fill the memory that there is for them."""
    return queue_full(
        f"The tensors of all requests together may take {limit_bytes:,} bytes and would take more; "
        "try again after the time in Retry-After.",
        retry_after_seconds=retry_after_seconds,
    )


def spool_full(message: str) -> RequestRefusedError:
    """There is no room for an upload."""
    return RequestRefusedError(
        message, status=503, code="spool_full", retry_after_seconds=RETRY_SECONDS
    )


def too_many_searches(limit: int) -> RequestRefusedError:
    """As many searches as may be are waiting."""
    return queue_full(
        f"{limit} searches wait, which is the limit; try again after the time in Retry-After.",
        retry_after_seconds=1.0,
    )


def too_many_files(limit: int) -> RequestRefusedError:
    """As many videos of the archive as may be are being sent."""
    return queue_full(
        f"{limit} videos of the archive are being sent, which is the limit; try again after the "
        "time in Retry-After.",
        retry_after_seconds=RETRY_SECONDS,
    )


def too_many_streams(limit: int) -> RequestRefusedError:
    """As many streams as may be are open."""
    return queue_full(
        f"{limit} streams are open, which is the limit; close one, or send single requests.",
        retry_after_seconds=RETRY_SECONDS,
    )


def deadline(seconds: float | None = None) -> RequestRefusedError:
    """The answer would come later than the request allows."""
    after = "" if seconds is None else f" of {seconds:g} seconds"
    return RequestRefusedError(
        f"The request was not done within its time{after}; try again, or allow it more.",
        status=504,
        code="deadline",
    )


def not_ready() -> RequestRefusedError:
    """The server has not finished verification and warm-up."""
    return RequestRefusedError(
        "The server is still starting (verification and warm-up); try again in a moment.",
        status=503,
        code="not_ready",
        retry_after_seconds=RETRY_SECONDS,
    )


def shutting_down() -> RequestRefusedError:
    """The server was told to end."""
    return RequestRefusedError(
        "The server is ending and takes no new requests; send it to another one.",
        status=503,
        code="shutting_down",
        retry_after_seconds=RETRY_SECONDS,
    )


def failed() -> RequestRefusedError:
    """Something went wrong that is not the request's doing."""
    return RequestRefusedError(
        "The server failed while it computed this request; its log has the reason under the "
        "request's id.",
        status=500,
        code="failed",
    )


def of_error(error: ActionClipError) -> RequestRefusedError:
    """What is answered where the work of a request raised this."""
    if isinstance(error, RequestRefusedError):
        return error
    if isinstance(error, UnknownWordsError):
        return unknown_words(str(error).replace(" (--allow-unknown-words)", ""))
    if isinstance(error, UnknownVideoError):
        return unknown_video(str(error))
    if isinstance(error, ArchiveChoiceError | LabelError):
        return bad_value(str(error))
    if isinstance(error, ShapeError):
        return bad_tensor(str(error))
    logger.error("A request failed: %s", error, exc_info=error)
    return failed()


def message_of(error: RequestRefusedError) -> str:
    """The sentence of a refusal as it may be sent: not too long, and printable."""
    return _shortened(str(error))


def error_body(path: str, error: RequestRefusedError, request_id: str) -> bytes:
    """The body of a refusal, as the protocol that a path belongs to has it."""
    message = message_of(error)
    if path == "/v2" or path.startswith("/v2/"):
        return ErrorAnswerV2(error=message).to_json()
    detail = ErrorDetail(code=error.code, message=message, request_id=request_id)
    return ErrorAnswer(error=detail).to_json()


def _cameras(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"the camera {names[0]!r} is"
    return f"the cameras {', '.join(map(repr, names))} are"


def _shortened(message: str) -> str:
    """A message without its middle where it is long: its end says what to do."""
    half = _MESSAGE_CHARACTERS // 2
    if len(message) > _MESSAGE_CHARACTERS:
        message = f"{message[:half]} ... {message[-half:]}"
    # It may quote what moves a terminal's cursor, or half a character, which UTF-8 cannot hold.
    return printable(message)
