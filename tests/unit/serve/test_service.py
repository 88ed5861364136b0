"""The service by itself: its states, calibrated banks, shared calls and the time of a request."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeRuntime, write_fake_bundle
from serving import make_service, run_service

from actionclip_deploy.calibration import Calibration, SavedQuery
from actionclip_deploy.errors import RequestRefusedError
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.recognizer import Recognizer
from actionclip_deploy.sampling import Views
from actionclip_deploy.serve.decode_pool import Decoded, DecodeJob
from actionclip_deploy.serve.decode_worker import ArrayFrames
from actionclip_deploy.serve.service import (
    ClassifiedVideo,
    ClassifyOptions,
    EmbeddingInput,
    Service,
    VideoInput,
)
from actionclip_deploy.serve.settings import Limits, ServerSettings
from actionclip_deploy.views import Stopwatch, ViewReader


def calibrated_bank(folder: Path, threshold: float) -> LabelBank:
    bundle = write_fake_bundle(folder / "for_banks")
    bank = LabelBank.build(bundle, FakeRuntime(bundle.manifest), ["run", "walk"], name="mine")
    return replace(
        bank,
        calibration=Calibration(
            temperature=1.0,
            threshold=threshold,
            method="template-softmax",
            views="1x1",
            visual_sha256=bundle.visual_sha256,
            target_kept=0.95,
            kept_known=0.95,
            rejected_unknown=0.5,
            num_known=20,
            num_unknown=20,
            error_before=0.1,
            error_after=0.05,
        ),
    )


def embedding(seed: int = 0) -> EmbeddingInput:
    vector = np.random.default_rng(seed).normal(size=(1, 16)).astype(np.float32)
    return EmbeddingInput(vector / np.linalg.norm(vector), "a.npy")


@pytest.mark.parametrize(("threshold", "is_unknown"), [(0.0, False), (1.0, True)])
def test_a_calibrated_bank_says_unknown(threshold: float, is_unknown: bool, tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        given = await service.classify([embedding()], ClassifyOptions("mine"))
        (video,) = given.videos
        answer = video.ranking.answer  # type: ignore[union-attr]
        assert answer is not None
        assert answer.is_unknown == is_unknown
        alone = ClassifyOptions("mine", multi_label=True)
        (other,) = (await service.classify([embedding()], alone)).videos
        assert other.ranking.answer is None  # type: ignore[union-attr]

    run_service(tmp_path, use, banks=[calibrated_bank(tmp_path, threshold)])


@pytest.mark.parametrize(("threshold_z", "is_unknown"), [(1e-6, False), (100.0, True)])
def test_the_bank_of_a_saved_query_is_read_as_that(
    threshold_z: float, is_unknown: bool, tmp_path: Path
) -> None:
    """By how far a video stands out; a softmax over its one label would always be 1."""
    bundle = write_fake_bundle(tmp_path / "for_banks")
    bank = LabelBank.build(bundle, FakeRuntime(bundle.manifest), ["run"], name="mine")
    saved = SavedQuery(
        mean=-1.0,
        std=0.1,
        threshold_z=threshold_z,
        num_accepted=1,
        num_rejected=0,
        num_windows=100,
        window_seconds=2.0,
        stride_seconds=0.5,
        visual_sha256=bundle.visual_sha256,
    )

    async def use(service: Service) -> None:
        given = await service.classify([embedding()], ClassifyOptions("mine"))
        (video,) = given.videos
        assert given.method == "independent"
        assert video.ranking.answer.is_unknown == is_unknown  # type: ignore[union-attr]

    run_service(tmp_path, use, banks=[replace(bank, query=saved)])


def test_it_takes_nothing_before_it_is_ready_and_after_it_was_stopped(tmp_path: Path) -> None:
    async def run() -> list[str]:
        service = make_service(tmp_path)
        codes = []
        for _ in range(2):
            with pytest.raises(RequestRefusedError) as caught:
                await service.embed_texts(["run"])
            codes.append(caught.value.code)
            if service.state == "new":
                await service.start()
                assert (await service.embed_texts(["run"])).shape == (1, 16)
                service.begin_stop()
                # What has begun goes on; what comes is refused.
                assert (await service.embed_texts(["run"])).shape == (1, 16)
                with pytest.raises(RequestRefusedError):
                    service.check_ready()
                await service.stop()
        return codes

    assert asyncio.run(run()) == ["not_ready", "shutting_down"]


def test_a_lone_video_does_not_wait_for_others(tmp_path: Path) -> None:
    async def use(service: Service) -> float:
        path = tmp_path / "a.mp4"
        path.write_bytes(b"some pixels")
        (video,) = await service.embed_videos([VideoInput(path, "a.mp4")], Views())
        queue: float = video.stages["queue"]  # type: ignore[union-attr]
        return queue

    # An hour of delay would be noticed.
    assert run_service(tmp_path, use, max_delay_ms=60_000.0) < 50


def test_videos_of_one_request_share_a_call(tmp_path: Path) -> None:
    async def use(service: Service) -> list[int]:
        videos = []
        for n in range(4):
            (tmp_path / f"{n}.mp4").write_bytes(bytes([n]))
            videos.append(VideoInput(tmp_path / f"{n}.mp4", f"{n}.mp4"))
        answers = await service.embed_videos(videos, Views())
        alone = [(await service.embed_videos([each], Views()))[0] for each in videos]
        for one, other in zip(answers, alone, strict=True):
            np.testing.assert_array_equal(one.embeddings, other.embeddings)  # type: ignore[union-attr]
        return [answer.batch_size for answer in answers]  # type: ignore[union-attr]

    assert run_service(tmp_path, use, max_delay_ms=1000.0) == [4, 4, 4, 4]


@pytest.mark.parametrize("views", [Views(), Views(2, 3)], ids=str)
def test_the_service_gives_what_the_recognizer_gives_to_the_last_bit(
    tmp_path: Path, views: Views
) -> None:
    rng = np.random.default_rng(5)
    videos = {n: rng.integers(0, 256, (9 + n, 40, 60, 3), np.uint8) for n in range(5)}

    async def use(service: Service) -> None:
        async def decode(job: DecodeJob, *, deadline: float | None = None) -> Decoded:
            # As a decoding process does, in this one.
            reader = ViewReader(service.manifest, job.views, "frame")
            frames = reader.read(ArrayFrames(videos[int(job.name)]), job.path, Stopwatch())
            return Decoded(
                pixels=frames.pixels,
                views=frames.views,
                indices=frames.indices,
                pts_seconds=None,
                timings_ms={"total": 0.0},
                warnings=(),
                wait_seconds=0.0,
            )

        service.pool.decode = decode  # type: ignore[method-assign]
        bank = calibrated_bank(tmp_path, 0.5)
        service.banks.activate(bank)
        inputs = [VideoInput(tmp_path, str(n)) for n in videos]
        given = await service.classify(inputs, ClassifyOptions("mine", views=views))
        recognizer = Recognizer(FakeRuntime(service.manifest), bank, views=views)
        for n, video in enumerate(given.videos):
            assert isinstance(video, ClassifiedVideo)
            expected = recognizer.predict_frames(ArrayFrames(videos[n]), video=video.embedded.name)
            assert video.ranking.scores.tobytes() == expected.scores.tobytes()
            assert video.ranking.predictions == expected.predictions
            assert video.ranking.answer == expected.answer
            np.testing.assert_array_equal(video.embedded.indices, expected.frame_indices)

    run_service(tmp_path, use, max_batch=16, max_delay_ms=500.0)


def test_a_request_may_have_less_time_than_the_limit_and_not_more(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        assert service.budget().seconds == 60
        assert service.budget(2).seconds == 2
        for seconds in (0, -1, 61, float("nan")):
            with pytest.raises(RequestRefusedError, match="timeout_ms is"):
                service.budget(seconds)

    run_service(tmp_path, use)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_batch": 0}, "max_batch is 0"),
        ({"queue": 4, "max_batch": 8}, "queue is 4 and max_batch 8"),
        ({"max_delay_ms": -1.0}, "max_delay_ms is -1"),
        ({"max_delay_ms": float("inf")}, "max_delay_ms is inf"),
        ({"port": 70000}, "port is 70000"),
        ({"api_keys": (" ",)}, "API key is empty"),
        ({"api_keys": ("schlüssel",)}, "API key is empty or not ASCII"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerSettings(**fields)  # type: ignore[arg-type]


def test_a_limit_cannot_be_switched_off() -> None:
    with pytest.raises(ValueError, match="body_bytes is 0"):
        Limits(body_bytes=0)


def test_keys_are_not_shown() -> None:
    assert "secret" not in repr(ServerSettings(api_keys=("secret",)))
