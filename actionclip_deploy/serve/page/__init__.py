"""The web pages `/`, `/live` (cameras), `/search` (archive) and `/docs` (API), and their files.

They are not part of the API: they ask for no key, and pages send their key to /v1 alone. Rendered
videos are there to try the first page with.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import fastapi_swagger
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from actionclip_deploy.files import sha256_of
from actionclip_deploy.tokenizer import Vocabulary

# The files that there are; no other name is looked for.
PAGE_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "answer.js": "text/javascript; charset=utf-8",
    "queue.js": "text/javascript; charset=utf-8",
    "requests.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "live.html": "text/html; charset=utf-8",
    "live.css": "text/css; charset=utf-8",
    "live.js": "text/javascript; charset=utf-8",
    "search.html": "text/html; charset=utf-8",
    "search.css": "text/css; charset=utf-8",
    "search.js": "text/javascript; charset=utf-8",
    "docs.html": "text/html; charset=utf-8",
    "docs.js": "text/javascript; charset=utf-8",
}
# Files of Swagger UI. FastAPI's own page would load them from a server elsewhere, which an edge
# device may not reach. Of the packages that hold them, swagger-ui-bundle has none newer than 2023,
# and fastapi-offline brings ReDoc along; fastapi-swagger follows each release of Swagger UI.
SWAGGER_TYPES = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
}
_INDEX, _DOCS = "index.html", "docs.html"
# Pages of their own, by their addresses.
_PAGES = {"/": _INDEX, "/live": "live.html", "/search": "search.html"}
_BASE_POLICY = (
    "default-src 'self'",
    "object-src 'none'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
)
_POLICY = (
    *_BASE_POLICY,
    "media-src 'self' blob:",  # what the visitor chose is played from memory
    # No script can turn text into elements, whatever a file or a label is called.
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
)
# Swagger UI draws with styles of its own making and with pictures that are in its style sheet.
_DOCS_POLICY = (*_BASE_POLICY, "img-src 'self' data:", "style-src 'self' 'unsafe-inline'")
_HEADERS = {
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # kept, and asked about by its ETag
}
_SAMPLE_SIZE = 192  # pixels, twice what the default model learned from: people look at these
_SAMPLE_CRF = 28  # a tenth of the bytes of 23, as the noise is left out


@dataclass(frozen=True)
class DemoVideo:
    """A video that is rendered for the page.

    Attributes:
        shape: As `motions.MotionLabel` has it, like the others.
        colour: Of the shape.
        motion: What it does.
        confusable: A motion that is easily taken for it, for a label beside its own.
        seed: Decides all else.
    """

    shape: str
    colour: str
    motion: str
    confusable: str
    seed: int

    @property
    def name(self) -> str:
        """For addresses."""
        return f"{self.colour}-{self.shape}-{self.motion}".replace(" ", "-")

    def label(self, motion: str | None = None) -> str:
        """What it shows, or would show in another motion."""
        from actionclip_deploy.motions import MotionLabel

        return str(MotionLabel(self.shape, self.colour, motion or self.motion))

    def render(self, folder: Path | None = None) -> bytes:
        """The video's file, H.264 in MP4.

        Args:
            folder: Of a temporary file; None for the system's.
        """
        # It loads PyAV, which a server without visitors does not need.
        from actionclip_deploy.motions import MotionLabel, render_clip, write_video

        shown = MotionLabel(self.shape, self.colour, self.motion)
        frames = render_clip(shown, seed=self.seed, size=_SAMPLE_SIZE)
        with tempfile.TemporaryDirectory(prefix="actionclip-sample-", dir=folder) as made:
            return write_video(Path(made) / "sample.mp4", frames, crf=_SAMPLE_CRF).read_bytes()


SAMPLES = (
    DemoVideo("star", "yellow", "orbiting", "standing still", seed=3),
    DemoVideo("heart", "red", "growing", "shrinking", seed=1),
    DemoVideo("moon", "white", "moving left", "moving right", seed=2),
    DemoVideo("square", "blue", "turning clockwise", "turning counterclockwise", seed=4),
    DemoVideo("ring", "cyan", "bouncing", "blinking", seed=5),
    DemoVideo("triangle", "orange", "moving up", "moving down", seed=6),
)


# Of these the default model knows nothing, and most others know all words, so they are examples.
_ACTIONS = ("playing the violin", "riding a bike", "brushing teeth")
_DEFAULT_MODEL = "motions"
_DEFAULT_MODEL_NOTE = (
    "This model knows shapes in motion only. `actionclip models` lists checkpoints for real "
    "actions; `actionclip export actionclip-k400-vit-b-32-8f` fetches one."
)


class SampleVideos:
    """The samples' files, each rendered once, when it is first asked for.

    Args:
        folder: Of temporary files; None for the system's.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._files: dict[str, bytes] = {}

    def get(self, sample: DemoVideo) -> bytes:
        """The file of a sample; takes a tenth of a second the first time."""
        with self._lock:  # one at a time: rendering is not to crowd out what the server is for
            if sample.name not in self._files:
                self._files[sample.name] = sample.render(self._folder)
            return self._files[sample.name]


def page_file(name: str) -> bytes:
    """One of the page's files.

    Args:
        name: One of `PAGE_TYPES` or `SWAGGER_TYPES`.
    """
    if name in SWAGGER_TYPES:
        return (files(fastapi_swagger) / "resources" / name).read_bytes()
    return (files("actionclip_deploy.serve") / "page" / name).read_bytes()


def make_router(folder: Path, source: str, vocabulary: Vocabulary | None) -> APIRouter:
    """The routes.

    Args:
        folder: Of temporary files, where samples are rendered.
        source: The checkpoint of the model that is served, as its manifest names it.
        vocabulary: Tokens that this model knows; None for all.
    """
    # They belong to the page and may change with it, so the OpenAPI document leaves them out.
    router = APIRouter(include_in_schema=False)
    types = {**PAGE_TYPES, **SWAGGER_TYPES}
    contents = {name: page_file(name) for name in types}
    by_name = {sample.name: sample for sample in SAMPLES}
    videos = SampleVideos(folder)

    @router.api_route("/", methods=["GET", "HEAD"])
    @router.api_route("/live", methods=["GET", "HEAD"])
    @router.api_route("/search", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        name = _PAGES[request.scope["route"].path]
        return _file(request, contents[name], PAGE_TYPES[name])

    @router.api_route("/docs", methods=["GET", "HEAD"])
    async def docs(request: Request) -> Response:
        return _file(request, contents[_DOCS], PAGE_TYPES[_DOCS], _DOCS_POLICY)

    @router.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def part(name: str, request: Request) -> Response:
        if name not in contents or name.endswith(".html"):
            raise HTTPException(404)
        return _file(request, contents[name], types[name])

    @router.api_route("/samples", methods=["GET", "HEAD"])
    async def samples() -> Response:
        return JSONResponse(await asyncio.to_thread(_list_samples, source, vocabulary))

    @router.api_route("/samples/{name}.mp4", methods=["GET", "HEAD"])
    async def sample(name: str, request: Request) -> Response:
        if name not in by_name:
            raise HTTPException(404)
        content = await asyncio.to_thread(videos.get, by_name[name])
        return _file(request, content, "video/mp4")

    return router


def _list_samples(source: str, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """What a visitor may try, of which each is something that the model can answer.

    Samples come with labels among which each finds its own; they are for the model that was made
    for them. `examples` show what labels look like, and `note` is what to know of the model.
    """
    if source == _DEFAULT_MODEL:
        labels = [
            each.label(motion) for each in SAMPLES for motion in (each.motion, each.confusable)
        ]
        return {
            "samples": [{"name": each.name, "label": each.label()} for each in SAMPLES],
            "labels": labels,
            "examples": labels[:3],
            "note": _DEFAULT_MODEL_NOTE,
        }
    if vocabulary is None:
        return {"samples": [], "labels": [], "examples": list(_ACTIONS), "note": None}
    note = (
        f"This model was trained on {vocabulary.num_known:,} of "
        f"{len(vocabulary.is_known):,} tokens; other words say nothing to it."
    )
    return {"samples": [], "labels": [], "examples": [], "note": note}


def _file(
    request: Request, content: bytes, media_type: str, policy: tuple[str, ...] = _POLICY
) -> Response:
    """The file, or that the client has it already."""
    tag = f'"{sha256_of(content)[:32]}"'
    headers = {**_HEADERS, "content-security-policy": "; ".join(policy), "etag": tag}
    known = request.headers.get("if-none-match", "")
    if tag in (each.strip().removeprefix("W/") for each in known.split(",")):
        return Response(status_code=304, headers=headers)
    # The charset is in the type already where there is one.
    return Response(content, headers={**headers, "content-type": media_type})
