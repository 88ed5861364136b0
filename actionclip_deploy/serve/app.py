"""The ASGI application: routes behind the guards, errors as statuses with one sentence.

    app = create_app(Service(bundle, runtime, ServerSettings()))

It starts and stops the service with its own life, unless somebody else does (`running.py`, which
listens before the service is ready, so that /readyz can say so).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from actionclip_deploy import __version__
from actionclip_deploy.errors import (
    ActionClipError,
    LabelError,
    RequestRefusedError,
    ShapeError,
)
from actionclip_deploy.serve import api_health, api_v1, oip, page, refusals
from actionclip_deploy.serve.guards import Guards, refusal_headers
from actionclip_deploy.serve.service import Service
from actionclip_deploy.serve.spool import Spool
from actionclip_deploy.serve.v2_refusals import error_body

logger = logging.getLogger(__name__)

_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(service: Service, *, manages_service: bool = True) -> FastAPI:
    """Make the application.

    Args:
        service: What does the work.
        manages_service: Whether the application starts the service before it takes requests, and
            stops it in the end.
    """
    spool = Spool(service.settings.spool_folder, max_bytes=service.limits.spool_bytes)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with spool:
            if not manages_service:
                yield
                return
            await service.start()
            try:
                yield
            finally:
                await service.stop()

    app = FastAPI(
        title="ActionCLIP",
        version=__version__,
        lifespan=lifespan,
        # Their pages load scripts from elsewhere; the document is at /openapi.json.
        docs_url=None,
        redoc_url=None,
    )
    app.include_router(api_health.make_router(service))
    app.include_router(api_v1.make_router(service, spool))
    app.include_router(oip.make_router(service))
    app.include_router(page.make_router(service))
    _add_error_handlers(app)
    app.add_middleware(Guards, service=service)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestRefusedError)
    async def refused(request: Request, exc: RequestRefusedError) -> JSONResponse:
        return _answer(request, exc)

    @app.exception_handler(LabelError)
    async def wrong_label(request: Request, exc: LabelError) -> JSONResponse:
        return _answer(request, refusals.bad_value(str(exc)))

    @app.exception_handler(ShapeError)
    async def wrong_shape(request: Request, exc: ShapeError) -> JSONResponse:
        return _answer(request, refusals.bad_tensor(str(exc)))

    @app.exception_handler(RequestValidationError)
    async def wrong_value(request: Request, exc: RequestValidationError) -> JSONResponse:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return _answer(request, refusals.bad_value(f"{where}: {first['msg']}; see /openapi.json."))

    @app.exception_handler(HTTPException)
    async def of_the_framework(request: Request, exc: HTTPException) -> JSONResponse:
        status = exc.status_code
        error = RequestRefusedError(
            f"{HTTPStatus(status).phrase}: {request.method} {request.url.path}; "
            "see /openapi.json for what there is.",
            status=status,
            code=_CODES.get(status, "bad_request"),
        )
        return _answer(request, error, dict(exc.headers or {}))

    @app.exception_handler(ActionClipError)
    async def failed(request: Request, exc: ActionClipError) -> JSONResponse:
        logger.error("A request failed: %s", exc, exc_info=exc)
        return _answer(request, refusals.failed())

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, exc: Exception) -> JSONResponse:  # noqa: ARG001
        # Outside of the guards, which have logged it; who serves the application logs the reason.
        return _answer(request, refusals.failed(), {"x-request-id": request.state.request_id})


def _answer(
    request: Request, error: RequestRefusedError, headers: dict[str, str] | None = None
) -> JSONResponse:
    request.state.code = error.code
    return JSONResponse(
        error_body(request.url.path, error, request.state.request_id),
        status_code=error.status,
        headers={**dict(refusal_headers(error)), **(headers or {})},
    )
