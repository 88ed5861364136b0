"""Label banks that are replaced while thousands of requests are scored by them.

Each answer names the version of the bank that it used. Expected scores of each version are computed
here, in numpy, from the embeddings of that version's own prompts.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fakes import FakeRuntime, write_fake_bundle
from serving import npy_bytes, run_service

from actionclip_deploy.errors import RequestRefusedError
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.serve.app import create_app
from actionclip_deploy.serve.banks import BankRegistry
from actionclip_deploy.serve.service import Service

NUM_REQUESTS = 10_000
NUM_REPLACEMENTS = 200
NUM_CLIENTS = 16
NUM_VIDEOS = 50
FILES = (b"one video", b"another")
DECODE_SECONDS = 0.02
LABELS = ("run", "walk", "sit", "jump", "wave")
# Scores are computed in float32; a batch of one is summed as any other.
TOLERANCE = 1e-5


def labels_of(version: int) -> list[str]:
    """Other labels, another number of them, in another order, with every version."""
    turned = [f"{label} {version}" for label in LABELS[version % 5 :] + LABELS[: version % 5]]
    return turned[: 2 + version % 4]


def expected_scores(embeddings: np.ndarray, video: np.ndarray) -> np.ndarray:
    """Softmax over labels for each template, averaged over templates; (K, C, D), (D,) -> (C,)."""
    logits = 100.0 * embeddings.astype(np.float64) @ video.astype(np.float64)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)


@dataclass
class Seen:
    """What one answer says of one video, for the checks at the end."""

    video: int
    version: int
    sha256: str
    num_labels: int
    predictions: list[tuple[str, float]]


class Clients:
    """Sends requests from several clients at a time while one of them replaces the bank."""

    def __init__(self, client: httpx.AsyncClient, videos: np.ndarray) -> None:
        self.seen: list[Seen] = []
        self.shas: dict[int, str] = {}
        self._client = client
        self._videos = videos
        self._num_sent = 0
        self._is_replaced = False

    async def replace(self) -> None:
        """Put the bank again and again, each time once the one before is active."""
        for version in range(2, NUM_REPLACEMENTS + 2):
            given = {"labels": labels_of(version)}
            answer = await self._client.put("/v1/labels/mine", json=given)
            assert answer.status_code == 202, answer.text
            while True:
                found = (await self._client.get("/v1/labels/mine")).json()
                assert found["build"]["error"] is None
                if found["active"]["version"] == version:
                    break
                await asyncio.sleep(0)
            assert found["labels"] == labels_of(version)
            self.shas[version] = found["active"]["sha256"]
            # The requests are spread over all of the replacements.
            share = NUM_REQUESTS * (version - 1) / (NUM_REPLACEMENTS + 1)
            while self._num_sent < share:
                await asyncio.sleep(0)
        self._is_replaced = True

    async def send(self) -> None:
        """Send requests until there were enough and all replacements are done."""
        while self._num_sent < NUM_REQUESTS or not self._is_replaced:
            number = self._num_sent
            self._num_sent += 1
            video = number % NUM_VIDEOS
            if number % 10:
                answer = await self._embedding(video, as_file=number % 2 == 0)
                sent = [video]
            else:
                # While these are decoded and embedded the bank is replaced, mostly.
                answer, sent = await self._files(), [NUM_VIDEOS, NUM_VIDEOS + 1]
            assert answer.status_code == 200, answer.text
            self.seen += _seen(sent, answer.json())

    async def _files(self) -> httpx.Response:
        files = [("video", (f"{n}.mp4", data)) for n, data in enumerate(FILES)]
        fields = {"labels": "mine", "top_k": "10"}
        return await self._client.post("/v1/classify", files=files, data=fields)

    async def _embedding(self, video: int, *, as_file: bool) -> httpx.Response:
        embedding = self._videos[video]
        if as_file:
            files = {"embeddings": ("a.npy", npy_bytes(embedding[np.newaxis]))}
            fields = {"labels": "mine", "top_k": "10"}
            return await self._client.post("/v1/classify", files=files, data=fields)
        body = {"labels": "mine", "top_k": 10, "embeddings": [[embedding.tolist()]]}
        return await self._client.post("/v1/classify", json=body)


def _seen(videos: list[int], answer: dict[str, Any]) -> list[Seen]:
    bank = answer["bank"]
    assert bank["name"] == "mine"
    return [
        Seen(
            video,
            bank["version"],
            bank["sha256"],
            bank["num_labels"],
            [(each["label"], each["score"]) for each in result["predictions"]],
        )
        for video, result in zip(videos, answer["results"], strict=True)
    ]


def test_a_bank_that_is_put_while_it_is_removed_is_there_in_the_end(tmp_path: Path) -> None:
    bundle = write_fake_bundle(tmp_path)
    gate, begun = threading.Event(), threading.Event()
    changes: list[bool] = []

    def build(name: str, labels: Sequence[str], *_: object) -> LabelBank:
        begun.set()
        assert gate.wait(10)
        return LabelBank.build(bundle, FakeRuntime(bundle.manifest), labels, name=name)

    async def run() -> None:
        registry = BankRegistry(
            build,
            max_banks=2,
            max_bytes=10**9,
            on_change=lambda _, active: changes.append(active is not None),
        )
        registry.start_build("mine", ["run"], None)
        await asyncio.to_thread(begun.wait)
        removing = asyncio.ensure_future(registry.remove("mine"))
        await asyncio.sleep(0)
        with pytest.raises(RequestRefusedError, match="is being deleted; try again"):
            registry.start_build("mine", ["walk"], None)
        gate.set()
        await removing
        again = registry.start_build("mine", ["walk"], None)
        assert again.task is not None
        await again.task
        assert registry.build_of("mine") is again
        assert registry.get("mine").bank.labels == ("walk",)
        await registry.stop()

    asyncio.run(run())
    assert changes == [False, True]


def test_builds_that_failed_are_not_kept_without_end(tmp_path: Path) -> None:
    def build(*_: object) -> LabelBank:
        raise OSError("no space left")

    async def run() -> list[str]:
        registry = BankRegistry(build, max_banks=3, max_bytes=10**9)
        names = [f"bank{n}" for n in range(10)]
        for name in names:
            task = registry.start_build(name, ["run"], None).task
            assert task is not None
            await task
        last = registry.build_of("bank9")
        assert last is not None
        assert last.error == "no space left"
        await registry.stop()
        return [name for name in names if registry.build_of(name) is not None]

    assert asyncio.run(run()) == ["bank6", "bank7", "bank8", "bank9"]


def test_10_000_answers_while_a_bank_is_replaced_200_times_are_each_of_the_version_they_name(
    tmp_path: Path,
) -> None:
    bundle = write_fake_bundle(tmp_path / "for_banks")
    banks = {
        version: LabelBank.build(
            bundle, FakeRuntime(bundle.manifest), labels_of(version), name="mine"
        )
        for version in range(1, NUM_REPLACEMENTS + 2)
    }
    videos = np.random.default_rng(0).normal(size=(NUM_VIDEOS, 16)).astype(np.float32)
    videos /= np.linalg.norm(videos, axis=1, keepdims=True)

    # What the stand-in for the decoding processes makes of the files.
    pixels = [
        np.random.default_rng(list(f)).integers(0, 256, (4, 32, 32, 3), np.uint8) for f in FILES
    ]
    embedded = FakeRuntime(bundle.manifest).encode_video(np.stack(pixels))
    videos = np.concatenate([videos, embedded])

    async def use(service: Service) -> Clients:
        service.pool.delay_seconds = DECODE_SECONDS  # type: ignore[attr-defined]
        transport = httpx.ASGITransport(create_app(service, manages_service=False))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            clients = Clients(client, videos)
            await asyncio.gather(clients.replace(), *(clients.send() for _ in range(NUM_CLIENTS)))
        return clients

    clients = run_service(tmp_path, use, banks=[banks[1]])

    assert len(clients.seen) >= NUM_REQUESTS * 1.1  # every tenth request has two videos
    versions = [each.version for each in clients.seen]
    assert set(versions) == set(banks), "every version has answered"
    expected = {
        version: np.array([expected_scores(bank.embeddings, video) for video in videos])
        for version, bank in banks.items()
    }
    for each in clients.seen:
        labels = labels_of(each.version)
        assert each.sha256 == banks[each.version].sha256
        assert each.num_labels == len(labels)
        assert sorted(label for label, _ in each.predictions) == sorted(labels)
        given = dict(each.predictions)
        difference = [given[label] for label in labels] - expected[each.version][each.video]
        assert np.abs(difference).max() < TOLERANCE
    assert clients.shas == {version: bank.sha256 for version, bank in banks.items() if version > 1}
    assert len(set(clients.shas.values())) == NUM_REPLACEMENTS
