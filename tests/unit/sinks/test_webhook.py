"""Webhooks, against a server that fails in every way."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_event
from full_disk import small_files
from http_receiver import WAIT_SECONDS, Receiver, receiving

from actionclip_deploy.sinks import Sink, delivery, parse_sink
from actionclip_deploy.sinks.webhook import WebhookSink

SECRET = "a secret"


def wait_until(is_true: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    # A pause is seconds, which a test cannot wait for.
    monkeypatch.setattr(delivery, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(delivery, "_LONGEST_PAUSE_SECONDS", 0.02)


def webhook(address: str, spool: Path, **options: Any) -> WebhookSink:
    return WebhookSink(address, **{"environ": {}, "spool": spool, **options})


def numbers(server: Receiver) -> list[int]:
    return [json.loads(post.body)["number"] for post in server.posts]


def spooled(folder: Path) -> list[Path]:
    return sorted(folder.rglob("[0-9]*.json"))


def test_messages_arrive_in_order_signed_over_id_time_and_body(tmp_path: Path) -> None:
    with receiving() as server:
        sink = webhook(server.url, tmp_path, environ={"ACTIONCLIP_WEBHOOK_SECRET": SECRET})
        for number in range(5):
            sink.send(fake_event("update", number))
        server.wait_for(5)
        wait_until(lambda: sink.stats.num_sent == 5)
        sink.close()
    assert numbers(server) == [0, 1, 2, 3, 4]
    assert spooled(tmp_path) == []
    for post in server.posts:
        sent = json.loads(post.body)
        assert post.path == "/hook"
        assert post.headers["content-type"] == "application/json"
        assert post.headers["webhook-id"] == f"{sent['id']}-{sent['number']}"
        assert abs(time.time() - int(post.headers["webhook-timestamp"])) < 600
        signed = f"{post.headers['webhook-id']}.{post.headers['webhook-timestamp']}.".encode()
        digest = hmac.new(SECRET.encode(), signed + post.body, hashlib.sha256).digest()
        assert post.headers["webhook-signature"] == f"v1,{base64.b64encode(digest).decode()}"


def test_a_signature_is_that_of_the_specifications_example(tmp_path: Path) -> None:
    # From the README of standard-webhooks, "Signature scheme".
    from actionclip_deploy.sinks import webhook as module

    key = module._signing_key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    assert key is not None
    made = module.sign(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert made == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_without_a_secret_there_is_no_signature_and_a_broken_one_is_refused(
    tmp_path: Path,
) -> None:
    with receiving() as server:
        sink = webhook(server.url, tmp_path)
        sink.send(fake_event())
        server.wait_for(1)
        sink.close()
    assert "webhook-signature" not in server.posts[0].headers
    with pytest.raises(ValueError, match="what follows is not base64") as caught:
        webhook(server.url, tmp_path, environ={"ACTIONCLIP_WEBHOOK_SECRET": "whsec_geheim!"})
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    ("statuses", "told"),
    [
        ([500, 502, 204], "the answer has status 50"),
        (["drop", "drop", 200], "no answer"),
        ([404, 401, 201], "the answer has status 40"),
        ([302, 308, 202], "a redirect .*, which is not followed; give the address"),
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again_with_the_same_id(
    tmp_path: Path, statuses: list[Any], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    with receiving(statuses, {"location": "http://127.0.0.1:1/elsewhere"}) as server:
        sink = webhook(server.url, tmp_path)
        sink.send(fake_event("new", 0))
        sink.send(fake_event("end", 1))
        server.wait_for(4)
        wait_until(lambda: sink.stats.num_sent == 2)
        sink.close()
    assert numbers(server) == [0, 0, 0, 1]
    assert len({post.headers["webhook-id"] for post in server.posts}) == 2
    assert sink.stats.num_failures == 2
    (said,) = [r.getMessage() for r in caplog.records if "fails, and is tried" in r.getMessage()]
    assert re.search(told, said)


def test_a_server_that_hangs_holds_up_nobody_but_its_sink(tmp_path: Path) -> None:
    with receiving(["hang", 204]) as server:
        sink = webhook(server.url, tmp_path / "spool", timeout_seconds=0.2)
        other = parse_sink(str(tmp_path / "events.jsonl"))
        for number in range(3):
            for each in (sink, other):
                each.send(fake_event("update", number))
        wait_until(lambda: sink.stats.num_sent == 3)
        wait_until(lambda: other.stats.num_sent == 3)
        for each in (sink, other):
            each.close()
    assert numbers(server) == [0, 0, 1, 2]
    assert "no answer" in (sink.stats.last_error or "")


def test_a_server_that_is_full_is_asked_again_when_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float | None] = []
    from actionclip_deploy.sinks import webhook as module

    def pause(num_failed: int, retry_after_seconds: float | None = None) -> float:
        asked.append(retry_after_seconds)
        return 0.01

    monkeypatch.setattr(module, "pause_seconds", pause)  # it would be 7 seconds
    with receiving([429, 503, 204], {"retry-after": "7"}) as server:
        sink = webhook(server.url, tmp_path)
        sink.send(fake_event())
        wait_until(lambda: sink.stats.num_sent == 1)
        sink.close()
    assert asked == [7.0, 7.0]


def test_a_message_that_is_refused_is_dropped_and_the_next_is_sent(tmp_path: Path) -> None:
    with receiving([422, 204]) as server:
        sink = webhook(server.url, tmp_path)
        for number in range(2):
            sink.send(fake_event("update", number))
        wait_until(lambda: sink.stats.num_sent == 1)
        sink.close()
    assert numbers(server) == [0, 1]
    assert sink.stats.dropped == {"refused": 1}
    assert spooled(tmp_path) == []


def test_what_waits_is_sent_by_the_next_program_in_order(tmp_path: Path) -> None:
    with receiving([500]) as server:
        sink = webhook(server.url, tmp_path)
        for number in range(4):
            sink.send(fake_event("update", number))
        wait_until(lambda: sink.stats.num_waiting == 4 and len(spooled(tmp_path)) == 4)
        sink.close(timeout_seconds=1)
        assert sink.stats.dropped == {}
        server.statuses[:] = [204]
        num_before = len(server.posts)
        again = webhook(server.url, tmp_path)
        again.send(fake_event("update", 4))
        wait_until(lambda: again.stats.num_sent == 5)
        again.close()
        assert numbers(server)[num_before:] == [0, 1, 2, 3, 4]
    assert spooled(tmp_path) == []


def test_a_server_that_hangs_does_not_hold_up_the_end_and_nothing_is_lost(tmp_path: Path) -> None:
    with receiving(["hang"]) as server:
        sink = webhook(server.url, tmp_path, timeout_seconds=WAIT_SECONDS)
        sink.send(fake_event("new", 0))
        server.wait_for(1)
        sink.send(fake_event("end", 1))
        sink.close(timeout_seconds=0.3)
        assert sink.stats.state == "closed"
        assert sink.stats.dropped == {}
        assert len(spooled(tmp_path)) == 2


def test_a_program_that_is_killed_leaves_what_waits_to_the_next(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from fakes import fake_event\n"
        "from actionclip_deploy.sinks.webhook import WebhookSink\n"
        "sink = WebhookSink(sys.argv[1], environ={}, spool=sys.argv[2])\n"
        "for number in range(3): sink.send(fake_event('update', number))\n"
        "while len(list(Path(sys.argv[2]).rglob('[0-9]*.json'))) < 3: time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    folders = os.pathsep.join([str(Path(__file__).parents[3]), str(Path(__file__).parents[2])])
    with receiving([503]) as server:
        subprocess.run(
            [sys.executable, "-c", program, server.url, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": folders},
            timeout=WAIT_SECONDS,
            check=False,
        )
        server.statuses[:] = [204]
        num_before = len(server.posts)
        sink = webhook(server.url, tmp_path)
        wait_until(lambda: sink.stats.num_sent == 3)
        sink.close()
        assert numbers(server)[num_before:] == [0, 1, 2]


def test_two_programs_with_one_address_have_folders_of_their_own(tmp_path: Path) -> None:
    with receiving([500]) as server:
        one, other = webhook(server.url, tmp_path), webhook(server.url, tmp_path)
        one.send(fake_event("update", 0))
        wait_until(lambda: one.stats.num_waiting == 1 and len(spooled(tmp_path)) == 1)
        other.send(fake_event("update", 1))
        wait_until(lambda: other.stats.num_waiting == 1 and len(spooled(tmp_path)) == 2)
        for each in (other, one):
            each.close(timeout_seconds=1)
        assert len({path.parent for path in spooled(tmp_path)}) == 2
        server.statuses[:] = [204]
        num_before = len(server.posts)
        again = webhook(server.url, tmp_path)  # takes over what both left
        wait_until(lambda: again.stats.num_sent == 2)
        again.close()
        assert numbers(server)[num_before:] == [0, 1]


def test_a_spool_is_bounded_and_drops_updates_first(tmp_path: Path) -> None:
    with receiving(["hang", 204]) as server:
        sink = webhook(server.url, tmp_path, max_spooled=3, timeout_seconds=0.5)
        sink.send(fake_event("new", 0))
        server.wait_for(1)
        for number, kind in enumerate(["end", "update", "new", "end"], 1):
            sink.send(fake_event(kind, number))
        wait_until(lambda: sink.stats.dropped == {"spool_full": 2})
        wait_until(lambda: sink.stats.num_sent == 3)
        sink.close()
    # The update goes, and then the oldest but the one that is on its way.
    assert numbers(server) == [0, 0, 3, 4]


def test_damaged_messages_are_counted_and_left_out(tmp_path: Path) -> None:
    with receiving([500]) as server:
        sink = webhook(server.url, tmp_path)
        for number in range(2):
            sink.send(fake_event("update", number))
        wait_until(lambda: len(spooled(tmp_path)) == 2)
        sink.close(timeout_seconds=1)
        spooled(tmp_path)[0].write_bytes(b"")
        server.statuses[:] = [204]
        again = webhook(server.url, tmp_path)
        wait_until(lambda: again.stats.num_sent == 1)
        again.close()
    assert again.stats.dropped == {"damaged": 1}
    assert numbers(server)[-1] == 1


def test_a_full_disk_keeps_messages_in_memory(tmp_path: Path) -> None:
    with receiving() as server:
        sink = webhook(server.url, tmp_path)
        with small_files(10):
            sink.send(fake_event())
            wait_until(lambda: sink.stats.num_sent == 1)
        sink.close()
    assert numbers(server) == [0]
    assert "wait in memory meanwhile" in (sink.stats.last_error or "")


def test_a_folder_that_cannot_be_made_is_told_and_messages_are_sent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with receiving() as server:
        sink = webhook(server.url, tmp_path / "file")
        sink.send(fake_event())
        wait_until(lambda: sink.stats.num_sent == 1)
        sink.close()
    assert "wait in memory alone" in caplog.text


def test_the_path_user_and_query_of_an_address_are_nowhere_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with receiving([500, 204]) as server:
        address = server.url.replace("http://", "http://me:geheim1@").replace("hook", "${TOKEN}")
        sink: Sink = parse_sink(
            f"{address}?key=geheim3", environ={"TOKEN": "geheim2"}, spool=tmp_path
        )
        sink.send(fake_event())
        wait_until(lambda: sink.stats.num_sent == 1)
        sink.close()
    assert server.posts[0].path == "/geheim2?key=geheim3"
    told = caplog.text + repr(sink.stats) + " ".join(map(str, tmp_path.rglob("*")))
    assert "fails, and is tried again" in told
    assert "geheim" not in told
    assert sink.name == server.url.replace("hook", "***")


def test_an_address_that_is_none_is_refused(tmp_path: Path) -> None:
    for address in ("https://", "http:///x", "https://host:port/x"):
        with pytest.raises(ValueError, match="address of the webhook is not one"):
            webhook(address, tmp_path)
