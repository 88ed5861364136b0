"""Routes of the Open Inference Protocol, version 2."""

from __future__ import annotations

from fastapi import APIRouter

from actionclip_deploy.serve.service import Service


def make_router(service: Service) -> APIRouter:  # noqa: ARG001
    """The routes, bound to a service."""
    return APIRouter()
