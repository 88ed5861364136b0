"""The client: against the application itself, and against answers that are made up."""

from __future__ import annotations

import asyncio
import io
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import pytest
from fakes import TEMPLATES, FakeRuntime, fake_event, fake_manifest, write_fake_bundle
from serving import make_service, npy_bytes, write_archive
from threaded_server import ThreadedServer

from actionclip_deploy import AsyncClient, Client
from actionclip_deploy import client as client_module
from actionclip_deploy.client import RefusedVideo, ServerEmbeddings, ServerPrediction
from actionclip_deploy.errors import (
    LabelBankError,
    MissingExtraError,
    RequestRefusedError,
    RuntimeUnavailableError,
    VideoError,
)
from actionclip_deploy.installation import install_command
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.serve.app import create_app

Result = TypeVar("Result")
Handler = Callable[[httpx.Request], httpx.Response]

URL = "http://testserver"
LABELS = ["run", "walk", "sit"]
SEED = b"the seed of some pixels"
# Scores and embeddings travel as decimal numbers of float32.
ATOL = 1e-6


def run(
    folder: Path,
    use: Callable[[AsyncClient], Awaitable[Result]],
    *,
    key: str | None = None,
    **kw: Any,
) -> Result:
    """Use a client of the application, in this process."""

    async def use_it() -> Result:
        bundle = write_fake_bundle(folder / "for_banks")
        bank = LabelBank.build(bundle, FakeRuntime(bundle.manifest), LABELS, name="mine")
        service = make_service(folder, banks=[bank], **kw)
        app = create_app(service)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            AsyncClient(URL, api_key=key, max_retries=0, transport=transport) as client,
        ):
            return await use(client)

    return asyncio.run(use_it())


def expected_embedding(seed: bytes) -> np.ndarray:
    """What the stand-ins for decoder and runtime make of a file with these bytes."""
    pixels = np.random.default_rng(list(seed)).integers(0, 256, (4, 32, 32, 3), np.uint8)
    return FakeRuntime(fake_manifest()).encode_video(pixels[np.newaxis])


def test_a_path_bytes_and_open_files_are_the_same_video(tmp_path: Path) -> None:
    path = tmp_path / "a video.mp4"
    path.write_bytes(SEED)
    later = io.BytesIO(b"not this" + SEED)
    later.seek(len(b"not this"))

    async def use(client: AsyncClient) -> Any:
        with path.open("rb") as file:
            return await client.classify([path, str(path), SEED, file, later], "mine", top_k=2)

    results = run(tmp_path, use)
    assert [result.name for result in results] == [
        *("a video.mp4", "a video.mp4", "videos[2]", "a video.mp4", "videos[4]")
    ]
    for result in results:
        assert isinstance(result, ServerPrediction)
        assert result.predictions == results[0].predictions
        assert len(result.predictions) == 2


def test_a_prediction_tells_frames_bank_runtime_and_timings(tmp_path: Path) -> None:
    async def use(client: AsyncClient) -> Any:
        return await client.classify(SEED, "mine", per_template=True)

    (result,) = run(tmp_path, use)
    np.testing.assert_array_equal(result.frame_indices, [[2, 7, 12, 17]])
    np.testing.assert_allclose(result.pts_seconds, [[0.2, 0.7, 1.2, 1.7]])
    assert (result.bank.name, result.bank.version, result.bank.num_labels) == ("mine", 1, 3)
    assert len(result.bank.sha256) == 64
    assert result.runtime == FakeRuntime(fake_manifest()).describe()
    assert result.method == "template-softmax"
    assert {"decode", "queue", "score"} <= set(result.timings_ms)
    assert result.answer is None
    assert result.warnings == ()
    assert result.batch_size == 1
    assert [vote.template for vote in result.templates] == list(TEMPLATES)
    assert result.template_agreement in (0.0, 0.5, 1.0)
    assert sum(score.score for score in result.predictions) == pytest.approx(1.0)


def test_labels_of_the_caller_are_scored_with_the_caller_s_templates(tmp_path: Path) -> None:
    labels = ["one, with a comma", "[another]"]

    async def use(client: AsyncClient) -> Any:
        return (
            *await client.classify(SEED, labels, templates=["so {}"]),
            *await client.classify(SEED, labels[1:], multi_label=True),
        )

    several, one = run(tmp_path, use)
    assert {score.label for score in several.predictions} == set(labels)
    assert several.bank.name is None
    assert several.bank.version is None
    assert several.bank.num_templates == 1
    assert [score.label for score in one.predictions] == ["[another]"]
    assert one.method == "independent"


def test_embeddings_are_numpy_and_are_scored_as_their_video(tmp_path: Path) -> None:
    np.save(tmp_path / "saved.npy", expected_embedding(SEED))

    async def use(client: AsyncClient) -> Any:
        (embedded,) = await client.embed(SEED)
        vector = embedded.embeddings
        given = [SEED, vector, vector[0].astype(np.float64), tmp_path / "saved.npy"]
        return embedded, await client.classify(given, "mine")

    embedded, results = run(tmp_path, use)
    assert isinstance(embedded, ServerEmbeddings)
    assert embedded.embeddings.dtype == np.float32
    np.testing.assert_allclose(embedded.embeddings, expected_embedding(SEED), atol=ATOL)
    for result in results:
        assert [s.label for s in result.predictions] == [s.label for s in results[0].predictions]
    assert results[0].frame_indices is not None
    assert all(result.frame_indices is None for result in results[1:])


def test_frames_are_sent_as_a_npy_file(tmp_path: Path) -> None:
    frames = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    np.save(tmp_path / "frames.npy", frames)

    async def use(client: AsyncClient) -> Any:
        return await client.embed([frames, frames[:, ::-1], tmp_path / "frames.npy"])

    results = run(tmp_path, use)
    flipped = np.ascontiguousarray(frames[:, ::-1])
    for result, sent in zip(results, (frames, flipped, frames), strict=True):
        expected = expected_embedding(npy_bytes(sent))
        np.testing.assert_allclose(result.embeddings, expected, atol=ATOL)


def test_texts_are_embedded_as_they_are(tmp_path: Path) -> None:
    async def use(client: AsyncClient) -> Any:
        return await client.embed_texts(["in an", "and"], timeout_seconds=5)

    embeddings = run(tmp_path, use)
    assert embeddings.shape == (2, 16)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1.0, atol=ATOL)


def test_one_of_several_videos_that_fails_is_reported_in_its_place(tmp_path: Path) -> None:
    wrong = np.ones((1, 16), np.float32)  # not of norm 1

    async def use(client: AsyncClient) -> Any:
        with pytest.raises(RequestRefusedError, match="norm 1") as alone:
            await client.classify([wrong], "mine")
        return alone.value

    assert run(tmp_path, use).status == 422

    def answer(request: httpx.Request) -> httpx.Response:
        error = {"status": 422, "code": "video_unreadable", "message": "No frame in b.mp4."}
        return httpx.Response(200, json=classified({"name": "b.mp4", "error": error}))

    ok, failed = made_up(answer).classify([SEED, SEED], "mine")
    assert isinstance(ok, ServerPrediction)
    assert isinstance(failed, RefusedVideo)
    assert failed.name == "b.mp4"
    assert (failed.error.status, failed.error.code) == (422, "video_unreadable")
    assert failed.error.request_id == "0123"


def test_a_bank_is_put_followed_compared_and_removed(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    async def use(client: AsyncClient) -> Any:
        first = await client.put_bank("new", LABELS, on_progress=lambda *n: seen.append(n))
        second = await client.put_bank("new", ["sit", "jump"], ["so {}"])
        listed = await client.list_banks()
        changed = await client.diff("new", 1)
        await client.delete_bank("new")
        left = await client.list_banks()
        with pytest.raises(RequestRefusedError, match="no label bank 'new'"):
            await client.get_bank("new")
        return first, second, listed, changed, left

    first, second, listed, changed, left = run(tmp_path, use)
    assert first.active.version == 1
    assert first.labels == tuple(LABELS)
    assert seen[-1] == (6, 6)  # 3 labels in 2 templates
    assert second.active.version == 2
    assert [version.version for version in second.versions] == [1, 2]
    assert [bank.name for bank in listed] == ["mine", "new"]
    assert listed[0].labels is None
    assert changed.added == ("jump",)
    assert changed.removed == ("run", "walk")
    assert changed.moved == (("sit", 2, 0),)
    assert changed.templates_added == ("so {}",)
    assert [bank.name for bank in left] == ["mine"]


def test_a_server_s_refusal_is_raised_with_all_that_it_says(tmp_path: Path) -> None:
    async def use(client: AsyncClient) -> Any:
        with pytest.raises(RequestRefusedError, match="no label bank 'none'") as caught:
            await client.classify(SEED, "none")
        with pytest.raises(RequestRefusedError, match="timeout_ms"):
            await client.classify(SEED, "mine", timeout_seconds=10_000)
        return caught.value

    error = run(tmp_path, use)
    assert (error.status, error.code, error.retry_after_seconds) == (404, "unknown_bank", None)
    assert error.request_id


def test_a_key_is_given_where_the_server_asks_for_one(tmp_path: Path) -> None:
    async def info(client: AsyncClient) -> Any:
        return await client.info()

    told = run(tmp_path / "a", info, key="secret", api_keys=("secret",))
    assert told["runtime"]["name"] == "fake"
    assert told["banks"][0]["name"] == "mine"
    with pytest.raises(RequestRefusedError, match="Authorization: Bearer") as caught:
        run(tmp_path / "b", info, api_keys=("secret",))
    assert caught.value.status == 401


def test_a_server_tells_whether_it_is_ready(tmp_path: Path) -> None:
    async def use(client: AsyncClient) -> bool:
        await client.wait_until_ready(5)
        return await client.is_ready()

    assert run(tmp_path, use)


# What follows needs no server: answers are made up, and time is a number.


class FakeTime:
    """Passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    # The clock and the pauses of the client alone: those of its event loop go on.
    monkeypatch.setattr("actionclip_deploy.client.time", fake)
    monkeypatch.setattr("anyio.sleep", fake.sleep)
    return fake


def made_up(handler: Handler, **options: Any) -> Client:
    return Client(URL, transport=httpx.MockTransport(handler), **options)


def classified(*more: dict[str, Any]) -> dict[str, Any]:
    """An answer of /v1/classify, with keys that this client does not know."""
    result = {
        "name": "a.mp4",
        "predictions": [{"label": "run", "score": 0.9, "rank_of_the_future": 1}],
        "answer": {"label": None, "score": 0.4, "threshold": 0.5, "is_unknown": True},
        "frames": {"num_clips": 1, "indices": [[0, 1]], "pts_seconds": None},
        "timings_ms": {"decode": 1.0},
    }
    bank = {"name": "mine", "version": 3, "sha256": "ab", "num_labels": 1, "num_templates": 1}
    runtime = {"name": "fake", "execution_provider": "numpy", "precision": "fp32"}
    return {
        "request_id": "0123",
        "results": [result, *more],
        "bank": bank,
        "method": "template-softmax",
        "runtime": {**runtime, "num_threads": None, "versions": {}, "engine": None},
        "timings_ms": {"total": 2.0},
    }


def full(retry_after: str | None) -> httpx.Response:
    error = {"code": "queue_full", "message": "It is full; try later.", "request_id": "77"}
    headers = {} if retry_after is None else {"retry-after": retry_after}
    return httpx.Response(429, json={"error": error}, headers=headers)


class InTurn:
    """Answers with one thing after the other, and keeps the bodies that it got."""

    def __init__(self, *answers: httpx.Response | type[Exception]) -> None:
        self._answers = iter(answers)
        self.bodies: list[bytes] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(request.read())
        answer = next(self._answers)
        if isinstance(answer, httpx.Response):
            return answer
        raise answer("it broke", request=request)


def ok() -> httpx.Response:
    return httpx.Response(200, json=classified())


def test_a_calibrated_bank_s_answer_says_unknown() -> None:
    (result,) = made_up(lambda _: ok()).classify(SEED, "mine")
    assert result.answer is not None
    assert result.answer.is_unknown
    assert (result.answer.score, result.answer.threshold) == (0.4, 0.5)
    assert result.pts_seconds is None


def test_a_full_server_is_asked_again_after_the_time_that_it_says(fake_time: FakeTime) -> None:
    answers = InTurn(full("3"), httpx.Response(503, headers={"retry-after": "1"}), ok())
    made_up(answers).classify(SEED, "mine")
    first, second = fake_time.pauses
    assert 3.0 <= first <= 3.3
    assert 1.0 <= second <= 1.1
    assert len(answers.bodies) == 3


def test_the_asynchronous_client_tries_again_in_the_same_way(fake_time: FakeTime) -> None:
    answers = InTurn(full("3"), httpx.ConnectError, ok())

    async def use() -> Any:
        async with AsyncClient(URL, transport=httpx.MockTransport(answers)) as client:
            return await client.classify(io.BytesIO(SEED), "mine")

    (result,) = asyncio.run(use())
    assert isinstance(result, ServerPrediction)
    assert 3.0 <= fake_time.pauses[0] <= 3.3
    assert 0.25 <= fake_time.pauses[1] <= 0.5
    assert all(SEED in body for body in answers.bodies)
    assert len(answers.bodies) == 3


def test_a_date_in_retry_after_is_compared_with_the_server_s_clock(fake_time: FakeTime) -> None:
    headers = {
        "date": "Wed, 01 Jan 2025 10:00:00 GMT",
        "retry-after": "Wed, 01 Jan 2025 10:00:04 GMT",
    }
    made_up(InTurn(httpx.Response(503, headers=headers), ok())).classify(SEED, "mine")
    assert 4.0 <= fake_time.pauses[0] <= 4.4


def test_without_retry_after_pauses_grow(fake_time: FakeTime) -> None:
    made_up(InTurn(*[full(None)] * 6, ok()), max_retries=6).classify(SEED, "mine")
    for pause, longest in zip(fake_time.pauses, (0.25, 0.5, 1.0, 2.0, 4.0, 8.0), strict=True):
        assert longest / 2 <= pause <= longest


def test_clients_do_not_come_back_at_the_same_moment(fake_time: FakeTime) -> None:
    for seed in range(20):
        client = made_up(InTurn(full("10"), ok()))
        client._client._random = random.Random(seed)
        client.classify(SEED, "mine")
    assert len(set(fake_time.pauses)) == 20


def test_a_server_that_stays_full_ends_in_its_own_sentence(fake_time: FakeTime) -> None:
    answers = InTurn(*[full("2")] * 4)
    with pytest.raises(RequestRefusedError, match=r"It is full; try later\.") as caught:
        made_up(answers, max_retries=3).classify(SEED, "mine")
    error = caught.value
    assert (error.status, error.code, error.request_id) == (429, "queue_full", "77")
    assert error.retry_after_seconds == 2.0
    assert len(answers.bodies) == 4


def test_a_pause_that_is_longer_than_the_caller_s_time_is_not_begun(fake_time: FakeTime) -> None:
    answers = InTurn(full("3600"))
    with pytest.raises(RequestRefusedError):
        made_up(answers, timeout_seconds=30).classify(SEED, "mine")
    assert fake_time.pauses == []
    answers = InTurn(full("6"), full("6"))
    with pytest.raises(RequestRefusedError):
        made_up(answers).classify(SEED, "mine", timeout_seconds=10)
    assert len(fake_time.pauses) == 1


@pytest.mark.parametrize("status", [400, 401, 404, 408, 409, 413, 415, 422, 500, 502, 504])
def test_no_other_refusal_is_tried_again(fake_time: FakeTime, status: int) -> None:
    answers = InTurn(httpx.Response(status))
    with pytest.raises(RequestRefusedError, match=f"status {status}") as caught:
        made_up(answers).classify(SEED, "mine")
    assert caught.value.status == status
    assert fake_time.pauses == []


def test_a_failed_connection_is_tried_again_with_the_whole_file(
    fake_time: FakeTime, tmp_path: Path
) -> None:
    path = tmp_path / "long.mp4"
    path.write_bytes(random.Random(0).randbytes(200_000))
    file = io.BytesIO(b"before" + path.read_bytes())
    file.seek(6)
    for video in (path, path.read_bytes(), file):
        answers = InTurn(httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError, ok())
        made_up(answers).classify(video, "mine")
        assert len(answers.bodies) == 4
        assert all(body.count(path.read_bytes()) == 1 for body in answers.bodies)
        assert b"before" not in answers.bodies[0]


def test_what_cannot_be_read_twice_is_not_sent_twice(fake_time: FakeTime) -> None:
    for failure in (httpx.ReadError, full("1")):
        reading, writing = os.pipe()
        os.write(writing, SEED)
        os.close(writing)
        answers = InTurn(failure)
        expected = (RuntimeUnavailableError, RequestRefusedError)
        with os.fdopen(reading, "rb") as pipe, pytest.raises(expected):
            made_up(answers).classify(pipe, "mine")
        assert SEED in answers.bodies[0]
    assert fake_time.pauses == []


def test_a_bank_is_not_put_twice_unless_the_server_cannot_have_seen_it(
    fake_time: FakeTime,
) -> None:
    building = httpx.Response(
        202,
        json={
            **{"name": "new", "active": None, "labels": None, "templates": None, "versions": []},
            "build": {"state": "waiting", "done": 0, "total": 0, "error": None, "version": None},
        },
    )
    never_seen = InTurn(httpx.ConnectError, building)
    state = made_up(never_seen).put_bank("new", LABELS, wait=False)
    assert state.build is not None
    assert not state.build.is_over
    with pytest.raises(RuntimeUnavailableError, match="closed the connection"):
        made_up(InTurn(httpx.ReadError)).put_bank("new", LABELS, wait=False)
    with pytest.raises(RuntimeUnavailableError, match="closed the connection"):
        made_up(InTurn(httpx.ReadError)).delete_bank("new")


def building(state: str, **more: Any) -> httpx.Response:
    build = {"state": state, "done": 1, "total": 6, "error": None, "version": None, **more}
    parts = {"name": "new", "active": None, "labels": None, "templates": None, "versions": []}
    return httpx.Response(200, json={**parts, "build": build})


def test_a_build_that_fails_takes_too_long_or_is_ended_says_so(fake_time: FakeTime) -> None:
    answers = InTurn(building("waiting"), building("failed", error="The label is too long."))
    with pytest.raises(LabelBankError, match=r"not built: The label is too long\."):
        made_up(answers).put_bank("new", LABELS)
    slow = InTurn(*[building("building")] * 100)
    with pytest.raises(RuntimeUnavailableError, match=r"after 10 seconds \(1 of 6 prompts\)"):
        made_up(slow).put_bank("new", LABELS, timeout_seconds=10)
    with pytest.raises(LabelBankError, match="cancelled"):
        made_up(InTurn(building("cancelled"))).put_bank("new", LABELS)


def test_a_server_that_is_not_there_is_one_sentence(fake_time: FakeTime) -> None:
    client = made_up(InTurn(httpx.ConnectError, httpx.ConnectError), max_retries=1)
    with pytest.raises(RuntimeUnavailableError, match="cannot be reached") as caught:
        client.classify(SEED, "mine")
    assert URL in str(caught.value)
    assert "actionclip serve" in str(caught.value)


def test_an_answer_that_comes_too_late_is_one_sentence(fake_time: FakeTime) -> None:
    answers = InTurn(httpx.ReadTimeout)
    with pytest.raises(RuntimeUnavailableError, match=r"not answer in time \(5 seconds\)"):
        made_up(answers, timeout_seconds=5).info()


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>Welcome</html>"),
        httpx.Response(200, json=["something else"]),
        httpx.Response(200, json={"results": []}),
    ],
)
def test_another_program_at_the_address_is_noticed(answer: httpx.Response) -> None:
    with pytest.raises(RuntimeUnavailableError, match="does not answer as `actionclip serve`"):
        made_up(lambda _: answer).classify(SEED, "mine")


def test_a_redirect_is_not_followed_with_the_key() -> None:
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["authorization"])
        return httpx.Response(302, headers={"location": "http://elsewhere.test/"})

    with pytest.raises(RequestRefusedError, match=r"status 302 \(Found\)"):
        made_up(answer, api_key="secret").info()
    assert seen == ["Bearer secret"]


def test_waiting_for_a_server_ends_when_it_is_ready(fake_time: FakeTime) -> None:
    starting = httpx.Response(503, json={"status": "verifying"})
    answers = InTurn(httpx.ConnectError, starting, starting, httpx.Response(200, json={}))
    made_up(answers).wait_until_ready(10)
    assert fake_time.pauses == [0.25] * 3
    assert not made_up(InTurn(httpx.ConnectError)).is_ready()
    with pytest.raises(RuntimeUnavailableError, match="after 1 seconds: it is verifying"):
        made_up(lambda _: starting).wait_until_ready(1)


def test_a_video_that_is_not_there_is_told_before_anything_is_sent(tmp_path: Path) -> None:
    answers = InTurn()
    with pytest.raises(VideoError, match=r"none\.mp4 cannot be read \(No such file"):
        made_up(answers).classify(tmp_path / "none.mp4", "mine")
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(VideoError, match=r"is not a \.npy file"):
        made_up(answers).classify(tmp_path / "text.npy", "mine")
    (tmp_path / "empty.npy").touch()
    with pytest.raises(VideoError, match=r"is not a \.npy file"):
        made_up(answers).classify(tmp_path / "empty.npy", "mine")
    np.save(tmp_path / "cube.npy", np.zeros((1, 2, 3)))
    with pytest.raises(VideoError, match=r"cube\.npy is float64 of shape \(1, 2, 3\); give frames"):
        made_up(answers).classify(tmp_path / "cube.npy", "mine")
    assert answers.bodies == []


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        ([], "give one video or more"),
        (3, "give a path, bytes, a file"),
        (io.StringIO("text"), "opened with 'rb'"),
        (np.zeros((4, 4, 3), np.uint8), r"frames as uint8 \(N, H, W, 3\)"),
        (np.zeros((1, 2, 3), np.float32), r"embeddings as float32 \(V, D\)"),
    ],
)
def test_what_is_no_video_is_refused_by_the_client(videos: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made_up(InTurn()).classify(videos, "mine")


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("server:8000", {}, "give one such as http://"),
        ("http://", {}, "give one such as http://"),
        ("http://server:99999", {}, "give one such as http://"),
        (URL, {"timeout_seconds": 0}, "timeout_seconds is 0"),
        (URL, {"max_retries": -1}, "max_retries is -1"),
        (URL, {"api_key": "wörd"}, "API key is empty or holds"),
        (URL, {"api_key": "a\nb"}, "API key is empty or holds"),
    ],
)
def test_what_a_client_cannot_be_made_with_is_refused(
    url: str, options: dict[str, Any], message: str
) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match=message):
            kind(url, **options)


def test_without_httpx_a_client_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    monkeypatch.delitem(sys.modules, "actionclip_deploy.client", raising=False)
    monkeypatch.delattr("actionclip_deploy.client", raising=False)
    for kind in (Client, AsyncClient):
        with pytest.raises(MissingExtraError, match=re.escape(install_command("client"))):
            kind(URL)


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, Any]:
        public = {name: each for name, each in vars(kind).items() if not name.startswith("_")}
        return {name: each.__annotations__ for name, each in public.items()}

    blocking, awaited = methods(Client), methods(AsyncClient)
    assert blocking["events"].pop("return") == "Iterator[EventRecord]"
    assert awaited["events"].pop("return") == "AsyncGenerator[EventRecord, None]"
    assert blocking == awaited


# Events of cameras. What a server really sends is in serve/test_streams.py.


class Connections:
    """Answers each request for events with the next pieces of a connection, which then ends."""

    def __init__(self, *connections: Any) -> None:
        self._connections = iter(connections)
        self.last_ids: list[str | None] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        assert request.headers["accept"] == "text/event-stream"
        self.last_ids.append(request.headers.get("last-event-id"))
        given = next(self._connections)
        if isinstance(given, httpx.Response):
            return given
        if isinstance(given, type):
            raise given("it broke", request=request)
        return httpx.Response(
            200,
            headers={"content-type": "text/event-stream; charset=utf-8"},
            content=self._pieces(given),
        )

    async def _pieces(self, pieces: list[Any]) -> AsyncIterator[bytes]:
        for piece in pieces:
            if piece is None:  # says nothing any more
                await asyncio.sleep(60)
            elif isinstance(piece, type):
                raise piece("it broke")
            else:
                yield piece


def sent(number: int, **changes: Any) -> bytes:
    event = fake_event("update", number, **changes)
    return f"id: {event.message_id}\ndata: {event.to_json().decode()}\n\n".encode()


def id_of(number: int) -> str:
    return fake_event(number=number).message_id


def test_events_go_on_after_what_breaks_a_connection(fake_time: FakeTime) -> None:
    answers = Connections(
        [b"id: 0\nretry: 3000\n\n", sent(1), sent(2), httpx.ReadError],
        httpx.ConnectError,
        httpx.Response(503, headers={"retry-after": "1"}),  # it starts
        httpx.Response(502),  # of a proxy, behind which nobody is
        [],
        [sent(3)],
    )
    events = made_up(answers, max_retries=1).events("door")
    assert [next(events).number for _ in range(3)] == [1, 2, 3]
    assert answers.last_ids == [None, *[id_of(2)] * 5]
    assert 3.0 <= fake_time.pauses[0] <= 3.3  # as the server asks for


def test_a_connection_that_is_lost_before_anything_came_goes_on_from_its_start(
    fake_time: FakeTime,
) -> None:
    answers = Connections([b"id: 7.1\nretry: 10\n\n", b"id: 7.2\ndata: half of"], [sent(1)])
    assert next(made_up(answers).events()).number == 1
    assert answers.last_ids == [None, "7.1"]


def test_the_caller_says_after_what_to_go_on() -> None:
    answers = Connections([sent(5)])
    assert next(made_up(answers).events(last_id="4.2")).number == 5
    assert answers.last_ids == ["4.2"]


def test_messages_are_read_wherever_they_are_cut() -> None:
    label = "öffnet\u2028eine Tür"  # a line has an end in it, for Python and not for the protocol
    message = b": a comment\r\nother: field\r\n" + sent(1, label=label).replace(b"\n", b"\r\n")
    pieces = [message[n : n + 1] for n in range(len(message))]
    event = next(made_up(Connections(pieces)).events())
    assert (event.label, event.number) == (label, 1)


def test_a_connection_that_says_nothing_is_made_again(
    fake_time: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_SILENCE_SECONDS", 0.05)
    answers = Connections([sent(1), None], [b":\n\n", sent(2)])
    events = made_up(answers).events()
    assert [next(events).number for _ in range(2)] == [1, 2]


@pytest.mark.parametrize("retries", [1, 0])
def test_a_server_that_is_gone_for_good_ends_events_in_a_sentence(
    fake_time: FakeTime, retries: int
) -> None:
    answers = Connections([sent(1)], *[httpx.ConnectError] * 99)
    events = made_up(answers, max_retries=retries).events(timeout_seconds=5)
    assert next(events).number == 1
    with pytest.raises(RuntimeUnavailableError, match="events was lost") as caught:
        next(events)
    told = str(caught.value)
    assert f"The server at {URL} cannot be reached (it broke)" in told
    assert told.endswith(f"Listen again with last_id='{id_of(1)}' to be told what came meanwhile.")
    assert ("was not back after 5 seconds" in told) == (retries > 0)
    num_tries = len(answers.last_ids) - 1
    assert num_tries >= 3 if retries else num_tries == 1  # by the time, not by their number
    assert sum(fake_time.pauses) <= 5


def test_a_server_that_never_was_there_ends_events_as_everything() -> None:
    answers = Connections(httpx.ConnectError)
    with pytest.raises(RuntimeUnavailableError, match="cannot be reached") as caught:
        next(made_up(answers, max_retries=0).events())
    assert "Listen again" not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>Welcome</html>", headers={"content-type": "text/html"}),
        [b'data: {"kind": "something else"}\n\n'],
        [b"data: no JSON\n\n"],
        ["id: ö\ndata: {}\n\n".encode()],
        [b"data: " + bytes(2**20)] + [bytes(2**20)] * 16,
    ],
    ids=["page", "record", "text", "id", "endless"],
)
def test_another_program_is_noticed_where_events_are_expected(answer: Any) -> None:
    with pytest.raises(RuntimeUnavailableError, match="does not answer as `actionclip serve`"):
        next(made_up(Connections(answer)).events())


def test_a_client_that_is_closed_ends_who_listens_in_other_threads() -> None:
    client = made_up(Connections([sent(1), None]))
    ended = threading.Event()

    def listen() -> None:
        for _ in client.events():
            has_begun.set()
        ended.set()

    has_begun = threading.Event()
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    assert has_begun.wait(30)
    client.close()
    thread.join(30)
    assert ended.is_set()


def test_a_picture_that_is_none_is_noticed() -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"text/html.*and not image/jpeg"):
        made_up(lambda _: httpx.Response(200, html="<p>")).get_snapshot("door")


def test_a_large_file_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.mp4"
    with path.open("wb") as file:
        file.truncate(50_000_000)
    sizes: list[int] = []

    class Counting(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            sizes.extend([len(chunk) async for chunk in request.stream])  # type: ignore[union-attr]
            assert int(request.headers["content-length"]) == sum(sizes)
            return ok()

    Client(URL, transport=Counting()).classify(path, "mine")
    assert sum(sizes) > 50_000_000
    assert max(sizes) <= 2**16


def test_the_time_of_a_call_is_for_all_of_it() -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(60)
        return ok()

    client = Client(URL, transport=httpx.MockTransport(answer), timeout_seconds=0.05)
    with client, pytest.raises(RuntimeUnavailableError, match="not answer in time"):
        client.info()


def test_several_threads_use_one_client_at_a_time() -> None:
    together = threading.Barrier(4, timeout=120)

    async def answer(request: httpx.Request) -> httpx.Response:
        await asyncio.to_thread(together.wait)  # until all four are there
        return ok()

    with (
        Client(URL, transport=httpx.MockTransport(answer)) as client,
        ThreadPoolExecutor(4) as threads,
    ):
        results = list(threads.map(lambda _: client.classify(SEED, "mine"), range(4)))
    assert all(result.bank.name == "mine" for (result,) in results)


def test_a_client_that_is_closed_refuses_to_ask() -> None:
    client = made_up(lambda _: ok())
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="not running"):
        client.info()


def test_a_client_that_nobody_closes_lets_the_program_end() -> None:
    program = f"from actionclip_deploy import Client; client = Client({URL!r}); print('done')"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_client_whose_event_loop_cannot_be_made_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("anyio.run", fail)
    with pytest.raises(OSError, match="Too many open files"):
        Client(URL)


# The archive of a server.


def test_the_archive_is_searched_by_both_clients(tmp_path: Path) -> None:
    archive = write_archive(tmp_path)

    async def use(client: AsyncClient) -> None:
        told = await client.get_archive()
        assert [each.name for each in told.cameras] == ["door", "yard"]
        found = await client.search("run", without="walk", top=1)
        (best,) = found.moments
        assert (best.folder, best.window, found.query) == ("yard", 9, "run, not walk")
        (line,) = str(found).splitlines()
        assert line.startswith(f"  1  z {best.z:5.1f}  0:0")
        assert line.endswith(best.video)
        assert await client.get_thumbnail(best.video_id, best.window) == b"a picture"
        for video in (best.video, best.video_id):
            (like,) = (await client.search(like=(video, best.peak_seconds), top=1)).moments
            assert like.video == best.video
        where: dict[str, Any] = {"cameras": ["door"], "videos": ["1.mp4"]}
        assert (await client.search("run", **where)).num_searched == 20
        timed = await client.search("run", from_seconds=0.0, to_seconds=1e9, timeout_seconds=50)
        assert (timed.num_searched, timed.num_undated) == (0, 1)
        with pytest.raises(RequestRefusedError, match="one of them") as refused:
            await client.search()
        assert refused.value.code == "bad_value"
        with pytest.raises(RequestRefusedError, match="no picture of window 9"):
            await client.get_thumbnail(2, 9)
        with pytest.raises(ValueError, match="cameras is the string 'door'"):
            await client.search("run", cameras="door")

    run(tmp_path, use, archive=archive)
    with ThreadedServer(tmp_path, archive=archive) as server, Client(server.url) as client:
        assert client.search("walk", top=1).moments[0].folder == "door"
        assert client.get_archive().num_videos == 2
        assert client.get_thumbnail(1, 3) == b"a picture"


def test_a_server_without_an_archive_says_so_to_its_client(tmp_path: Path) -> None:
    async def use(client: AsyncClient) -> None:
        with pytest.raises(RequestRefusedError, match="--archive") as refused:
            await client.search("run")
        assert (refused.value.status, refused.value.code) == (404, "no_archive")

    run(tmp_path, use)
