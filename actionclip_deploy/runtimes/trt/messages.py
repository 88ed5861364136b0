"""What TensorRT says while it works: its calls only tell that they failed."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


class MessageLog:
    """Keeps the errors of TensorRT, and passes its warnings on to `logging`.

    Args:
        trt: The Python module.

    Attributes:
        logger: What TensorRT's objects take; this object has to live as long as they do.
        errors: The errors so far.
    """

    def __init__(self, trt: Any) -> None:
        self.errors: list[str] = []
        errors = self.errors

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    errors.append(str(message).strip())
                elif severity == trt.ILogger.WARNING:
                    logger.debug("%s", message)

        self.logger = Logger()

    def text(self) -> str:
        """The last errors in one line, or that there were none."""
        return "; ".join(self.errors[-3:]) or "it gave no reason"
