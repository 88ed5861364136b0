"""Many videos at a time through the server, beside the same videos one by one without it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from serving import run_service

from actionclip_deploy import (
    Bundle,
    LabelBank,
    Prediction,
    Recognizer,
    VideoReader,
    open_runtime,
)
from actionclip_deploy.runtimes.call_sizes import CallSizes
from actionclip_deploy.runtimes.parity import tolerance_of
from actionclip_deploy.sampling import Views
from actionclip_deploy.serve.app import create_app
from actionclip_deploy.serve.service import ClassifyOptions, Service, VideoInput
from actionclip_deploy.serve.settings import ServerSettings
from actionclip_deploy.views import Stopwatch, VideoFrames, ViewReader, encode_views

NUM_VIDEOS = 24
MAX_BATCH = 16
LABELS = ("abseiling", "air drumming", "archery", "juggling balls", "yoga")
# Of embeddings and scores: the temporal graph's last bits depend on how many views it is given.
JOINED_CALL = 2e-6
Answers = list[dict[str, Any]]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of other sizes, lengths and colours; the shortest has fewer frames than a clip."""
    import av

    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    paths = []
    for number in range(NUM_VIDEOS):
        width, height = 64 + 16 * (number % 5), 64 + 16 * (number % 3)
        picture = rng.integers(0, 256, (height, width, 3), np.uint8)
        paths.append(folder / f"{number}.mp4")
        with av.open(str(paths[-1]), "w") as file:
            stream = file.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for step in range(5 + 2 * number):
                moved = np.roll(picture, 3 * step, axis=1)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
            file.mux(stream.encode())
    return paths


async def ask(service: Service, route: str, videos: list[Path], fields: dict[str, str]) -> Answers:
    """One request for each video, all at the same time; their results in order."""
    transport = httpx.ASGITransport(create_app(service, manages_service=False))

    async with httpx.AsyncClient(
        transport=transport, base_url="http://localhost", timeout=60.0
    ) as client:

        async def one(path: Path) -> dict[str, Any]:
            files = {"video": (path.name, path.read_bytes())}
            answer = await client.post(route, files=files, data=fields)
            assert answer.status_code == 200, answer.text
            (result,) = answer.json()["results"]
            assert result["name"] == path.name
            return dict(result)

        return await asyncio.gather(*map(one, videos))


@pytest.mark.parametrize("views", ["1x1", "2x3"])
def test_videos_that_share_calls_get_the_scores_that_they_get_alone(
    tiny_bundle: Path, videos: list[Path], views: str
) -> None:
    bundle = Bundle.open(tiny_bundle)
    tolerance = tolerance_of(bundle.manifest, "temporal")

    async def serve() -> tuple[Answers, Answers]:
        # Without a wait for others a call takes what is there; with it, calls are shared for sure.
        settings = ServerSettings(max_batch=MAX_BATCH, max_delay_ms=500, verify=False)
        service = Service(bundle, open_runtime(bundle, num_threads=1), settings)
        await service.start()
        try:
            service.batcher.best_batch = MAX_BATCH
            service.banks.activate(bank)
            fields = {"labels": bank.name, "views": views, "top_k": str(len(LABELS))}
            classified = await ask(service, "/v1/classify", videos, fields)
            return classified, await ask(service, "/v1/embed", videos, {"views": views})
        finally:
            await service.stop()

    with open_runtime(bundle, num_threads=1) as runtime:
        bank = LabelBank.build(bundle, runtime, LABELS, name="mine")
        recognizer = Recognizer(runtime, bank, views=Views.parse(views), top_k=len(LABELS))
        alone = [recognizer.predict(path) for path in videos]
        classified, embedded = asyncio.run(serve())

        for result, expected in zip(classified, alone, strict=True):
            scores = {each["label"]: each["score"] for each in result["predictions"]}
            difference = np.array([scores[label] for label in LABELS]) - expected.scores
            assert np.abs(difference).max() <= tolerance.score, result["name"]
            assert result["frames"]["indices"] == expected.frame_indices.tolist()
        for path, result in zip(videos, embedded, strict=True):
            expected_embeddings = embed_alone(runtime, path, Views.parse(views))
            difference = np.array(result["embeddings"]) - expected_embeddings
            assert np.abs(difference).max() <= tolerance.row, result["name"]
    # Each call has some of the videos; if none were shared, each would be of one video's size.
    sizes = [result["batch_size"] for result in classified]
    largest = Views.parse(views).num_views
    assert sum(size > largest for size in sizes) > NUM_VIDEOS / 2, sizes


def read_alone(runtime: Any, path: Path, views: Views) -> VideoFrames:
    with VideoReader(path) as video:
        return ViewReader(runtime.manifest, views, "frame").read(video, path, Stopwatch())


def embed_alone(runtime: Any, path: Path, views: Views) -> np.ndarray:
    read = read_alone(runtime, path, views)
    return np.concatenate([runtime.encode_video(read.pixels[view][None]) for view in read.views])


@pytest.mark.parametrize("views", ["1x1", "2x3"])
def test_a_folder_gets_the_features_and_scores_of_its_videos_alone(
    tiny_bundle: Path, videos: list[Path], views: str
) -> None:
    bundle = Bundle.open(tiny_bundle)
    sizes = CallSizes.of_videos(bundle.manifest.model)
    with open_runtime(bundle, num_threads=1) as runtime:
        bank = LabelBank.build(bundle, runtime, LABELS, name="mine")
        recognizer = Recognizer(runtime, bank, views=Views.parse(views))
        for path, together in zip(videos, recognizer.predict_all(videos), strict=True):
            assert isinstance(together, Prediction)
            alone = recognizer.predict(path)
            np.testing.assert_allclose(together.scores, alone.scores, rtol=0, atol=JOINED_CALL)
            assert together.frame_indices.tolist() == alone.frame_indices.tolist()

        works = [read_alone(runtime, path, Views.parse(views)) for path in videos]
        for encoded in encode_views(runtime, works, sizes=sizes):
            (alone_encoded,) = encode_views(runtime, [encoded.work], sizes=sizes)
            np.testing.assert_array_equal(encoded.features, alone_encoded.features)
            np.testing.assert_allclose(
                encoded.embeddings, alone_encoded.embeddings, rtol=0, atol=JOINED_CALL
            )


def test_frames_are_kept_until_the_answer_only_where_they_are_asked_for(
    rendered_video: Path, tmp_path: Path
) -> None:
    async def use(service: Service) -> list[bool]:
        options = [ClassifyOptions(("run", "walk"), return_frames=given) for given in (False, True)]
        video = VideoInput(rendered_video, "a.mp4")
        found = [(await service.classify([video], each)).videos[0] for each in options]
        return [each.embedded.work is not None for each in found]  # type: ignore[union-attr]

    assert run_service(tmp_path, use) == [False, True]
