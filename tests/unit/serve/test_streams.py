"""Cameras that a server watches: states, pictures, events as they come, banks that change."""

from __future__ import annotations

import asyncio
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fakes import FakeRuntime, fake_event, write_fake_bundle
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from serving import error_of, make_service, running_app
from starlette.testclient import TestClient
from threaded_server import ThreadedServer

from actionclip_deploy import AsyncClient, Client
from actionclip_deploy.errors import (
    InferenceError,
    LabelBankError,
    LabelError,
    RequestRefusedError,
    RuntimeUnavailableError,
)
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.records import EventRecord, HistoryAnswer, StreamListAnswer, StreamRecord
from actionclip_deploy.serve import streams as streams_module
from actionclip_deploy.sinks import JsonlSink
from actionclip_deploy.video.sources import parse_source
from actionclip_deploy.watch import Camera

LABELS = ("opening a door", "closing a door", "running")
ADDED = "walking"  # to the bank, while cameras are watched with it
ALWAYS = dict.fromkeys(LABELS, 1e-9)  # below every score
SECRET = "a-secret-of-the-address"
DEADLINE_SECONDS = 60.0
WINDOW_SECONDS = 0.4

pytestmark = pytest.mark.filterwarnings("ignore::actionclip_deploy.errors.ThresholdWarning")


def camera(name: str = "door", source: str = "test:?fps=40", **options: Any) -> Camera:
    given = {"labels": "mine", "thresholds": ALWAYS, "window_seconds": WINDOW_SECONDS, **options}
    return Camera(parse_source(source, name=name), **given)


def bank(folder: Path, name: str = "mine") -> LabelBank:
    bundle = write_fake_bundle(folder / "for_banks")
    return LabelBank.build(bundle, FakeRuntime(bundle.manifest), LABELS, name=name)


def until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + DEADLINE_SECONDS
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadedServer]:
    """Watches a camera that always shows something, and one that is not there."""
    folder = tmp_path_factory.mktemp("streams")
    lost = camera("gone", f"rtsp://me:{SECRET}@127.0.0.1:9/{SECRET}?token={SECRET}")
    sink = JsonlSink(folder / "events.jsonl")
    options = {"cameras": [camera(), lost], "banks": [bank(folder)], "sinks": [sink]}
    with ThreadedServer(folder, **options, limits={"event_clients": 2}) as server:
        yield server
    sink.close()


@pytest.fixture
def client(server: ThreadedServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=DEADLINE_SECONDS, trust_env=False) as client:
        yield client


def listen(client: httpx.Client, path: str, number: int, last_id: str = "") -> list[dict[str, Any]]:
    """The first messages of a stream of events, with their ids."""
    found: list[dict[str, Any]] = []
    headers = {"last-event-id": last_id} if last_id else {}
    with client.stream("GET", path, headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        id_ = ""
        for line in response.iter_lines():
            if line.startswith("id: "):
                id_ = line.removeprefix("id: ")
            elif line.startswith("data: "):
                found.append({**json.loads(line.removeprefix("data: ")), "sse": id_})
            if len(found) == number:
                return found
    raise AssertionError(found)


def watched(client: httpx.Client) -> StreamRecord:
    """The camera that shows something, once a window of it was scored."""

    def look() -> StreamRecord | None:
        state = StreamRecord.model_validate(client.get("/v1/streams/door").json())
        return state if state.windows >= 3 else None

    found: StreamRecord = until(look)
    return found


def test_states_are_those_of_all_cameras(client: httpx.Client) -> None:
    state = watched(client)
    listed = StreamListAnswer.model_validate(client.get("/v1/streams").json())
    assert [each.name for each in listed.streams] == ["door", "gone"]
    assert (state.state, state.source) == ("running", "test:?fps=40")
    assert (state.window_seconds, state.stride_seconds) == (WINDOW_SECONDS, WINDOW_SECONDS / 4)
    assert (state.bank.name, state.bank.version, state.bank.num_labels) == ("mine", 1, 3)
    assert state.best is not None
    assert state.best.label in LABELS
    assert listed.streams[1].frames == 0
    assert client.get("/v1/info").json()["num_streams"] == 2


def test_no_secret_of_an_address_is_told(client: httpx.Client) -> None:
    watched(client)
    for path in ("/v1/streams", "/v1/streams/gone", "/metrics", "/v1/info", "/openapi.json"):
        assert SECRET not in client.get(path).text
    assert client.get("/v1/streams/gone").json()["source"].startswith("rtsp://***@127.0.0.1:9/")


def test_a_snapshot_is_the_newest_frame(client: httpx.Client) -> None:
    watched(client)
    response = client.get("/v1/streams/door/snapshot")
    assert response.headers["content-type"] == "image/jpeg"
    whole = Image.open(io.BytesIO(response.content))
    assert np.asarray(whole).std() > 1  # something is to be seen
    small = Image.open(io.BytesIO(client.get("/v1/streams/door/snapshot?width=48").content))
    assert small.size == (48, 48 * whole.height // whole.width)
    assert error_of(client.get("/v1/streams/gone/snapshot"))["code"] == "no_frame"


def test_the_history_is_the_best_labels_of_the_last_seconds(client: httpx.Client) -> None:
    watched(client)
    answer = HistoryAnswer.model_validate(client.get("/v1/streams/door/history").json())
    assert len(answer.points) >= 3
    times = [point.time for point in answer.points]
    assert times == sorted(times)
    assert {point.label for point in answer.points} <= set(LABELS)
    few = client.get("/v1/streams/door/history?seconds=0.000001").json()
    assert all(point["time"] > times[0] for point in few["points"])
    assert client.get("/v1/streams/door/history?seconds=1e9").status_code == 422


def test_events_come_as_server_sent_events(client: httpx.Client) -> None:
    for path in ("/v1/streams/door/events", "/v1/events"):
        (message,) = listen(client, path, 1)
        sse = message.pop("sse")
        record = EventRecord.model_validate(message)
        assert sse == f"{record.id}.{record.number}"
        assert record.source == "door"
        assert record.label in LABELS


def test_a_client_that_comes_back_is_told_what_it_missed(client: httpx.Client) -> None:
    first, second, third = listen(client, "/v1/streams/door/events", 3, last_id="none")
    again = listen(client, "/v1/events", 2, last_id=first["sse"])
    assert [each["sse"] for each in again] == [second["sse"], third["sse"]]


def test_a_client_that_heard_nothing_yet_knows_from_where_to_go_on(
    client: httpx.Client, server: ThreadedServer
) -> None:
    (before,) = listen(client, "/v1/streams/door/events", 1)
    with client.stream("GET", "/v1/streams/door/events") as response:
        first = next(line for line in response.iter_lines() if line)
        told = [message.id for message in server.service.streams._kept["door"]]
    id_ = first.removeprefix("id: ")
    assert id_ in told
    assert told.index(id_) >= told.index(before["sse"])
    with client.stream("GET", "/v1/streams/gone/events") as response:
        assert next(response.iter_lines()) == "id: 0"


def test_clients_are_limited_and_those_that_went_make_room(
    client: httpx.Client, server: ThreadedServer
) -> None:
    streams = server.service.streams
    until(lambda: streams.num_listeners == 0)
    with client.stream("GET", "/v1/events") as one, client.stream("GET", "/v1/events") as two:
        assert (one.status_code, two.status_code) == (200, 200)
        refused = client.get("/v1/events")
        assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
    until(lambda: streams.num_listeners == 0)


def test_heads_end_at_once(client: httpx.Client, server: ThreadedServer) -> None:
    paths = ("/v1/streams", "/v1/streams/door", "/v1/streams/door/snapshot", "/v1/events")
    for path in (*paths, "/v1/streams/door/history", "/v1/streams/door/events"):
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b""), path
    assert client.head("/v1/events").headers["content-type"].startswith("text/event-stream")
    until(lambda: server.service.streams.num_listeners == 0)


@pytest.mark.parametrize("part", ["", "/events", "/snapshot", "/history"])
def test_a_stream_that_is_not_there_is_named(client: httpx.Client, part: str) -> None:
    refused = client.get(f"/v1/streams/hall{part}")
    error = error_of(refused)
    assert (refused.status_code, error["code"]) == (404, "unknown_stream")
    assert "'hall' (there are: door, gone)" in error["message"]


def test_numbers_of_cameras_and_sinks_are_metrics(client: httpx.Client) -> None:
    watched(client)
    found = {
        (sample.name, sample.labels.get("stream", sample.labels.get("kind"))): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
        if sample.labels.get("state", "running") == "running"
    }
    state = watched(client)
    for name in ("frames", "grid_frames", "frames_encoded", "frames_reused", "windows"):
        total = found[f"actionclip_stream_{name}_total", "door"]
        assert total <= getattr(state, name)
    assert found["actionclip_stream_windows_total", "door"] >= 3
    assert found["actionclip_stream_age_seconds_count", "door"] >= 3
    assert found["actionclip_stream_state", "door"] == 1
    assert found["actionclip_stream_state", "gone"] == 0
    assert found["actionclip_stream_windows_dropped_total", "door"] >= 0
    assert found["actionclip_stream_windows_voided_total", "door"] >= 0
    assert found["actionclip_stream_reconnects_total", "gone"] == 0
    assert found["actionclip_stream_batch_windows_count", None] >= 1
    assert found["actionclip_sink_works", "jsonl"] == 1
    assert found["actionclip_sink_sent_total", "jsonl"] >= 1


def test_a_bank_that_is_replaced_is_used_from_the_next_window_on(client: httpx.Client) -> None:
    watched(client)
    body = {"labels": [*LABELS, ADDED]}
    assert client.put("/v1/labels/mine", json=body).status_code == 202

    def used() -> Any:
        bank = client.get("/v1/streams/door").json()["bank"]
        return bank if bank["version"] == 2 else None

    assert until(used)["num_labels"] == 4


def test_a_bank_that_a_camera_needs_stays_as_it_has_to_be(client: httpx.Client) -> None:
    refused = client.put("/v1/labels/mine", json={"labels": ["running", "opening a door"]})
    assert (refused.status_code, error_of(refused)["code"]) == (409, "bank_watched")
    assert "'door'" in error_of(refused)["message"]
    assert "'closing a door'" in error_of(refused)["message"]
    refused = client.delete("/v1/labels/mine")
    assert (refused.status_code, error_of(refused)["code"]) == (409, "bank_watched")
    assert "the cameras 'door', 'gone' are watched with" in error_of(refused)["message"]
    assert client.get("/v1/labels/mine").status_code == 200


def test_the_document_describes_the_messages_by_their_record(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    for path in ("/v1/events", "/v1/streams/{name}/events"):
        responses = document["paths"][path]["get"]["responses"]
        (media_type,) = responses["200"]["content"]
        assert media_type == "text/event-stream"
        data = responses["200"]["content"][media_type]["itemSchema"]["properties"]["data"]
        assert set(data["contentSchema"]["properties"]) == set(EventRecord.model_fields)
        assert list(responses["429"]["content"]) == ["application/json"]
    for name in re.findall(r'"#/components/schemas/([^"]*)"', json.dumps(document)):
        assert name in document["components"]["schemas"]
    snapshot = document["paths"]["/v1/streams/{name}/snapshot"]["get"]["responses"]["200"]
    assert list(snapshot["content"]) == ["image/jpeg"]


def test_streams_are_for_those_with_a_key(tmp_path: Path) -> None:
    with running_app(tmp_path, api_keys=("key",)) as client:
        for path in ("/v1/streams", "/v1/events", "/v1/streams/door/snapshot"):
            assert error_of(client.get(path))["code"] == "no_key"
        listed = client.get("/v1/streams", headers={"authorization": "Bearer key"})
        assert listed.json() == {"streams": []}


def test_a_server_that_ends_lets_its_listeners_go_and_tells_sinks_of_the_end(
    tmp_path: Path,
) -> None:
    """Without that, uvicorn would wait for those who listen until its time to finish is over."""
    path = tmp_path / "events.jsonl"
    sink = JsonlSink(path)
    options = {"cameras": [camera()], "banks": [bank(tmp_path)], "sinks": [sink]}
    with (
        ThreadedServer(tmp_path, **options) as server,
        httpx.Client(trust_env=False, timeout=DEADLINE_SECONDS) as client,
        client.stream("GET", f"{server.url}/v1/events") as response,
    ):
        lines = response.iter_lines()
        next(line for line in lines if line.startswith("data: "))
        server.service.begin_stop()
        assert all(not line.startswith("event: error") for line in lines)  # and they end
    sink.close()
    told = [json.loads(line) for line in path.read_text().splitlines()]
    begun = {each["id"] for each in told if each["kind"] == "new"}
    assert begun
    assert begun == {each["id"] for each in told if each["kind"] == "end"}


def test_a_runtime_that_fails_once_ends_no_camera(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_module, "_FIRST_PAUSE_SECONDS", 0.01)

    class FailsOnce(FakeRuntime):
        has_failed = False

        def _run(self, graph: Any, array: np.ndarray) -> np.ndarray:
            if graph == "visual" and server.service.is_ready and not self.has_failed:
                self.has_failed = True
                raise InferenceError("no memory this time")
            return super()._run(graph, array)

    server = ThreadedServer(tmp_path, runtime=FailsOnce, cameras=[camera()], banks=[bank(tmp_path)])
    with server, httpx.Client(base_url=server.url, trust_env=False) as client:
        assert watched(client).state == "running"
        assert server.service.runtime.has_failed  # type: ignore[attr-defined]


def test_a_listener_that_falls_behind_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_module, "_WAITING_MESSAGES", 2)
    closed: list[streams_module.Listener] = []
    listener = streams_module.Listener("door", "0", (), closed.append)
    for number in range(4):
        id_ = f"{fake_event().id}.{number}"
        listener.give(streams_module.StreamMessage(number, "door", id_, "{}"))
        listener.give(streams_module.StreamMessage(number, "hall", id_, "{}"))  # for others
    assert closed == [listener]
    assert listener.is_closed


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"labels": "other"}, LabelBankError, "'door'.*'other'.*the server has 'a', 'mine'"),
        ({"labels": None}, LabelBankError, "'door' names no label bank.*--labels"),
        ({"thresholds": {"dancing": 0.5}}, LabelError, "'dancing'"),
        ({"window_seconds": 0.4, "stride_seconds": 0.15}, ValueError, "stride"),
    ],
)
def test_what_is_wrong_with_a_camera_is_told_before_anything_begins(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    banks = [bank(tmp_path, name) for name in ("a", "mine")]
    with pytest.raises(error, match=match):
        make_service(tmp_path, cameras=[camera(**options)], banks=banks)


def test_a_camera_without_a_bank_has_the_only_one(tmp_path: Path) -> None:
    service = make_service(tmp_path, cameras=[camera(labels=None)], banks=[bank(tmp_path)])
    (state,) = service.streams.states()
    assert state.bank.name == "mine"


def test_a_server_without_cameras_has_no_streams(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        assert isinstance(client, TestClient)
        assert client.get("/v1/streams").json() == {"streams": []}
        for path in ("/v1/streams/door", "/v1/events"):  # the second would never say a word
            assert "the server was started without --watch" in error_of(client.get(path))["message"]


# Through the client


def test_the_client_tells_what_the_routes_tell(server: ThreadedServer) -> None:
    with Client(server.url) as client:
        state = until(lambda: (s := client.get_stream("door")).windows >= 3 and s)
        assert (state.name, state.state, state.bank.name) == ("door", "running", "mine")
        assert [each.name for each in client.list_streams()] == ["door", "gone"]
        picture = Image.open(io.BytesIO(client.get_snapshot("door", width=48)))
        assert (picture.format, picture.width) == ("JPEG", 48)
        assert Image.open(io.BytesIO(client.get_snapshot("door"))).width > 48
        points = client.get_history("door")
        assert len(points) >= 3
        assert {point.label for point in points} <= {*LABELS, ADDED}
        assert len(client.get_history("door", seconds=1e-6)) < len(points)
        with pytest.raises(RequestRefusedError, match="No frame of the stream 'gone' has come"):
            client.get_snapshot("gone")


def test_the_client_says_which_streams_there_are(server: ThreadedServer) -> None:
    with Client(server.url) as client:
        asked: list[Callable[[], Any]] = [
            lambda: client.get_stream("hall"),
            lambda: client.get_snapshot("hall"),
            lambda: client.get_history("hall"),
            lambda: next(client.events("hall")),
        ]
        for ask in asked:
            with pytest.raises(RequestRefusedError, match=r"'hall' \(there are: door, gone\)"):
                ask()


def test_both_clients_give_events_and_let_go_of_the_server(server: ThreadedServer) -> None:
    streams = server.service.streams

    async def first_two() -> list[EventRecord]:
        async with AsyncClient(server.url) as client:
            found = []
            async for event in client.events("door", last_id="0"):
                found.append(event)
                if len(found) == 2:
                    return found
        raise AssertionError

    until(lambda: streams.num_listeners == 0)
    one, two = asyncio.run(first_two())
    assert (one.source, two.source) == ("door", "door")
    with Client(server.url) as client:
        for event in client.events(last_id=one.message_id):
            assert event == two
            break
        until(lambda: streams.num_listeners == 0)  # though the client goes on
        assert client.is_ready()


@pytest.mark.parametrize("name", [None, "door"])
def test_events_go_on_when_a_server_has_ended_and_is_there_again(
    name: str | None, tmp_path: Path
) -> None:
    found: list[EventRecord] = []
    ended = threading.Event()
    options = {"cameras": [camera()], "banks": [bank(tmp_path)]}

    def listen_for_long(client: Client) -> None:
        found.extend(client.events(name, timeout_seconds=DEADLINE_SECONDS))
        ended.set()

    with ThreadedServer(tmp_path / "a", **options) as server:
        client = Client(server.url)
        thread = threading.Thread(target=listen_for_long, args=(client,), daemon=True)
        thread.start()
        until(lambda: found)
    num_before = len(found)
    with ThreadedServer(tmp_path / "b", port=server.port, **options):
        until(lambda: len(found) > num_before + 1)
        assert not ended.is_set()
        client.close()  # another thread listens
        thread.join(DEADLINE_SECONDS)
    assert ended.is_set()
    ids = [event.message_id for event in found]
    assert len(ids) == len(set(ids))
    assert list(client.events(name)) == []


def test_a_server_that_stays_away_is_one_sentence(tmp_path: Path) -> None:
    with ThreadedServer(tmp_path, cameras=[camera()], banks=[bank(tmp_path)]) as server:
        client = Client(server.url)
        events = client.events("door", timeout_seconds=0.5)
        seen = [next(events)]
    with pytest.raises(RuntimeUnavailableError, match=r"not back after 0\.5 seconds") as caught:
        seen.extend(events)
    event = seen[-1]
    assert "cannot be reached" in str(caught.value)
    assert f"with last_id='{event.message_id}'" in str(caught.value)
    client.close()
