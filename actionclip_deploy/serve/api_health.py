"""Routes about the server itself: is it alive, is it ready, its metrics. They need no key."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from actionclip_deploy.serve.service import Service

_METRICS = {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}


def make_router(service: Service) -> APIRouter:
    """The routes, bound to a service."""
    router = APIRouter()

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "alive"}

    @router.get("/readyz", responses={503: {"description": "Not ready, or ending."}})
    async def readyz() -> Response:
        """Whether it is verified, warm, and takes requests."""
        status = 200 if service.is_ready else 503
        return JSONResponse({"status": service.state}, status_code=status)

    @router.get("/metrics", responses={200: {"content": _METRICS}}, response_class=Response)
    async def metrics() -> Response:
        """What Prometheus reads."""
        service.update_metrics()
        numbers = service.metrics
        return Response(numbers.render(), media_type=numbers.content_type)

    return router
