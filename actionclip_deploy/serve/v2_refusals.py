"""What /v2 answers to a request that is not done: the protocol's body, `{"error": "sentence"}`.

Statuses and codes are those of refusals.py; the code is in the log and the metrics alone, and the
request's id is in the header `x-request-id`.
"""

from __future__ import annotations

from typing import Any

from actionclip_deploy.errors import RequestRefusedError
from actionclip_deploy.serve import refusals


def error_body(path: str, error: RequestRefusedError, request_id: str) -> dict[str, Any]:
    """The body of a refusal, as the protocol that a path belongs to has it."""
    if path == "/v2" or path.startswith("/v2/"):
        return {"error": refusals.shortened(str(error))}
    return refusals.error_body(error, request_id)


def unknown_version(model: str, version: str, there: str) -> RequestRefusedError:
    """There is no such version of a model."""
    return RequestRefusedError(
        f"The model {model} has no version {version!r}; ask for {there}, or for none.",
        status=404,
        code="unknown_model",
    )


def too_many_bytes_of_json(limit: int) -> RequestRefusedError:
    """The part of the body that is JSON is longer than allowed."""
    return RequestRefusedError(
        f"The request has more than {limit:,} bytes of JSON, which is the limit; send tensors as "
        "binary data after the JSON, or fewer rows at a time.",
        status=413,
        code="too_many",
    )


def memory_full(limit_bytes: int, retry_after_seconds: float) -> RequestRefusedError:
    """The tensors of other requests fill the memory that there is for them."""
    return refusals.queue_full(
        f"The tensors of all requests together may take {limit_bytes:,} bytes and would take more; "
        "try again after the time in Retry-After.",
        retry_after_seconds=retry_after_seconds,
    )
