"""MQTT, against mosquitto; skipped where it is not installed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fakes import fake_event

from actionclip_deploy.sinks import parse_sink

paho = pytest.importorskip("paho.mqtt.client")
MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
WAIT_SECONDS = 60.0

needs_broker = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")


def wait_until(is_true: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def broker(folder: Path, port: int, *lines: str) -> Iterator[None]:
    """Run mosquitto for the time of a block."""
    config = folder / f"mosquitto-{port}.conf"
    config.write_text("\n".join([f"listener {port} 127.0.0.1", *lines]) + "\n")
    process = subprocess.Popen(
        [str(MOSQUITTO), "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def answers() -> bool:
        with socket.socket() as made:
            return made.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(answers)
        yield
    finally:
        process.kill()
        process.wait()


class Listener:
    """Everything that a broker has, by topic, in order."""

    def __init__(self, port: int) -> None:
        self.got: dict[str, list[str]] = {}
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2)
        self.client.on_connect = lambda client, *_: client.subscribe("#", qos=1)
        self.client.on_message = self._take
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()

    def _take(self, _: object, __: object, message: paho.MQTTMessage) -> None:
        self.got.setdefault(message.topic, []).append(message.payload.decode())

    def last(self, topic: str) -> str | None:
        return self.got.get(topic, [None])[-1]

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    number = free_port()
    with broker(tmp_path, number, "allow_anonymous true"):
        yield number


PASSWORD = "geheim/@:#?"
STATE = "home/actionclip/door/run/state"


@needs_broker
def test_messages_states_and_discovery_are_published(port: int) -> None:
    sink = parse_sink(f"mqtt://127.0.0.1:{port}/home/actionclip", environ={})
    events = [fake_event("new", 0), fake_event("update", 1), fake_event("end", 2)]
    with Listener(port) as listener:
        wait_until(lambda: listener.last("home/actionclip/availability") == "online")
        sink.send(events[0])
        wait_until(lambda: listener.last(STATE) == "ON")
        for event in events[1:]:
            sink.send(event)
        wait_until(lambda: sink.stats.num_sent == 3)
        sink.close()
        wait_until(lambda: listener.last("home/actionclip/availability") == "offline")
    told = listener.got["home/actionclip/events"]
    assert [json.loads(each) for each in told] == [event.to_dict() for event in events]
    assert listener.got[STATE] == ["ON", "OFF"]
    ((topic, [config]),) = [
        (topic, given)
        for topic, given in listener.got.items()
        if topic.startswith("homeassistant/")
    ]
    told_of = json.loads(config)
    assert topic == f"homeassistant/binary_sensor/{told_of['unique_id']}/config"
    assert told_of["name"] == "run"
    assert told_of["device"]["name"] == "door"
    for key in ("state_topic", "json_attributes_topic", "availability_topic"):
        assert told_of[key] in listener.got
    assert sink.stats.dropped == {}
    # A listener that comes later gets what is retained, and no messages of the past.
    with Listener(port) as later:
        wait_until(lambda: len(later.got) == 4)
        assert later.last(STATE) == "OFF"
        assert json.loads(later.last("home/actionclip/door/run/event") or "")["kind"] == "end"
        assert "home/actionclip/events" not in later.got
        assert topic in later.got


PROGRAM = """
import sys, time
from fakes import fake_event
from actionclip_deploy.sinks import parse_sink
sink = parse_sink(sys.argv[1], environ={})
sink.send(fake_event())
while sink.stats.num_sent < 1: time.sleep(0.01)
print("sent", flush=True)
time.sleep(600)
"""


@needs_broker
def test_the_last_will_of_a_killed_program_says_offline_and_the_next_one_clears_its_states(
    port: int,
) -> None:
    address = f"mqtt://127.0.0.1:{port}/home/actionclip"
    folders = os.pathsep.join([str(Path(__file__).parents[3]), str(Path(__file__).parents[2])])
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, address],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": folders},
    )
    with Listener(port) as listener:
        assert process.stdout is not None
        assert process.stdout.readline() == b"sent\n"
        wait_until(lambda: listener.last("home/actionclip/availability") == "online")
        wait_until(lambda: listener.last(STATE) == "ON")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        wait_until(lambda: listener.last("home/actionclip/availability") == "offline")
        assert listener.last(STATE) == "ON"
        sink = parse_sink(address, environ={})
        wait_until(lambda: listener.last("home/actionclip/availability") == "online")
        wait_until(lambda: listener.last(STATE) == "OFF")
        sink.close()


@needs_broker
def test_a_broker_that_is_missing_and_comes_gets_what_waited(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    number = free_port()
    sink = parse_sink(f"mqtt://127.0.0.1:{number}/home/actionclip", environ={})
    for count in range(3):
        sink.send(fake_event("update", count))
    wait_until(lambda: sink.stats.state == "failing")
    assert sink.stats.num_waiting == 3
    assert "Connection refused" in (sink.stats.last_error or "")
    with broker(tmp_path, number, "allow_anonymous true"), Listener(number) as listener:
        wait_until(lambda: sink.stats.num_sent == 3)
        wait_until(lambda: len(listener.got.get("home/actionclip/events", [])) == 3)
        assert sink.stats.state == "running"
        sink.close()
    told = [json.loads(each)["number"] for each in listener.got["home/actionclip/events"]]
    assert told == [0, 1, 2]
    assert sum("fails, and is tried again" in r.getMessage() for r in caplog.records) == 1


@needs_broker
def test_passwords_come_from_the_environment_and_are_told_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    passwords = tmp_path / "passwords"
    tool = shutil.which("mosquitto_passwd")
    if tool is None:
        pytest.skip("mosquitto_passwd is not installed")
    subprocess.run([tool, "-b", "-c", str(passwords), "me", PASSWORD], check=True)
    passwords.chmod(0o644)
    number = free_port()
    lines = ("allow_anonymous false", f"password_file {passwords}", "user root")
    good = {"ACTIONCLIP_MQTT_USER": "me", "ACTIONCLIP_MQTT_PASSWORD": PASSWORD}
    with broker(tmp_path, number, *lines):
        address = f"mqtt://me:${{PASSWORD}}@127.0.0.1:{number}/x"
        wrong = parse_sink(address, environ={"PASSWORD": "geheim2"})
        wait_until(lambda: wrong.stats.state == "failing")
        assert "refuses the connection" in (wrong.stats.last_error or "")
        right = parse_sink(f"mqtt://127.0.0.1:{number}/x", environ=good)
        right.send(fake_event())
        wait_until(lambda: right.stats.num_sent == 1)
        in_place = parse_sink(address, environ={"PASSWORD": PASSWORD})
        in_place.send(fake_event())
        wait_until(lambda: in_place.stats.num_sent == 1)
        told = caplog.text + "".join(repr(sink.stats) for sink in (wrong, right, in_place))
        for sink in (wrong, right, in_place):
            sink.close()
    assert "geheim" not in told
    assert wrong.name == f"mqtt://127.0.0.1:{number}/x"


# paho 2.2 leaves the socket of a handshake that failed to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@needs_broker
def test_tls_trusts_the_certificate_that_is_given_and_no_other(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    words = [
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=127.0.0.1",
    ]
    words += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run([openssl, *words], check=True, capture_output=True)
    key.chmod(0o644)
    number = free_port()
    lines = ("allow_anonymous true", f"certfile {certificate}", f"keyfile {key}", "user root")
    with broker(tmp_path, number, *lines):
        address = f"mqtts://127.0.0.1:{number}/x"
        stranger = parse_sink(address, environ={})
        wait_until(lambda: stranger.stats.state == "failing")
        assert "certificate verify failed" in (stranger.stats.last_error or "")
        friend = parse_sink(address, environ={"ACTIONCLIP_MQTT_CA": str(certificate)})
        friend.send(fake_event())
        wait_until(lambda: friend.stats.num_sent == 1)
        for sink in (stranger, friend):
            sink.close()
    with pytest.raises(ValueError, match="which is not a file of certificates"):
        parse_sink(address, environ={"ACTIONCLIP_MQTT_CA": str(tmp_path / "missing.pem")})


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("mqtt:///topic", "address of the broker is not one"),
        ("mqtt://host:port/topic", "address of the broker is not one"),
        ("mqtt://host", "The topic is ''; give one without"),
        ("mqtt://host/a/+/b", "give one without"),
    ],
)
def test_addresses_that_are_none_are_refused(address: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_sink(address, environ={})
