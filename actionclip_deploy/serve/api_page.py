"""Routes of the web page."""

from __future__ import annotations

from fastapi import APIRouter

from actionclip_deploy.serve.service import Service


def make_router(service: Service) -> APIRouter:  # noqa: ARG001
    """The routes, bound to a service."""
    return APIRouter()
