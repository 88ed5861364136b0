"""What a client is made with, checked, the same for both forms."""

from __future__ import annotations

import math
import random
import time
from urllib.parse import urlsplit

from actionclip_deploy.client.exchange import Connection

DEFAULT_TIMEOUT_SECONDS = 120.0
DEFAULT_RETRIES = 3


def make_connection(base_url: str, timeout_seconds: float, max_retries: int) -> Connection:
    """Check what a client was given.

    Raises:
        ValueError: If it is not allowed.
    """
    try:
        parts = urlsplit(base_url)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port or an address in brackets that is none
        is_address = False
    if not is_address:
        raise ValueError(
            f"The server's address is {base_url!r}; give one such as http://127.0.0.1:8000."
        )
    if not (math.isfinite(timeout_seconds) and timeout_seconds > 0):
        raise ValueError(f"timeout_seconds is {timeout_seconds}; it must be positive.")
    if max_retries < 0:
        raise ValueError(f"max_retries is {max_retries}; it must be 0 or more.")
    return Connection(
        base_url.rstrip("/"), timeout_seconds, max_retries, time.monotonic, random.Random()
    )


def make_headers(api_key: str | None) -> dict[str, str]:
    """Headers of every request.

    Raises:
        ValueError: If the key cannot be one.
    """
    headers = {"accept": "application/json"}
    if api_key is not None:
        if not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
            raise ValueError("The API key is empty or holds characters that no key has; check it.")
        headers["authorization"] = f"Bearer {api_key.strip()}"
    return headers
