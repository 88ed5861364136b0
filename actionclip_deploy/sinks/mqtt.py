"""Events to an MQTT broker, with what Home Assistant needs to find them."""

# aiomqtt was looked at: it wraps paho, and needs an event loop that nothing else here has.

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import unquote, urlsplit

from actionclip_deploy.errors import MissingExtraError, SinkError
from actionclip_deploy.files import unique_name
from actionclip_deploy.records import EventRecord
from actionclip_deploy.sinks.delivery import Sink, slug

try:
    import paho.mqtt.client as paho
    from paho.mqtt.enums import CallbackAPIVersion
except ImportError as exc:
    raise MissingExtraError("MQTT", "mqtt") from exc

USER_VARIABLE = "ACTIONCLIP_MQTT_USER"
PASSWORD_VARIABLE = "ACTIONCLIP_MQTT_PASSWORD"
CA_VARIABLE = "ACTIONCLIP_MQTT_CA"
_PORTS = {"mqtt": 1883, "mqtts": 8883}
_MAX_QUEUED = 500
_LONGEST_RECONNECT_SECONDS = 30
_LAST_WORD_SECONDS = 2.0
_ONLINE, _OFFLINE = b"online", b"offline"
_ON, _OFF = b"ON", b"OFF"


class MqttSink(Sink):
    """Publishes events below a topic, with quality of service 1.

    - `TOPIC/events`: each message as JSON.
    - `TOPIC/SOURCE/LABEL/state`, retained: `ON` while an event is open, else `OFF`.
    - `TOPIC/SOURCE/LABEL/event`, retained: the last message of its events.
    - `TOPIC/availability`, retained: `online`, or `offline`, which is also the last will.
    - `homeassistant/binary_sensor/.../config`, retained: what Home Assistant finds each state by.

    A broker that is missing at the start or goes away is connected to again. States that a program
    before this one left `ON` are set to `OFF`. Each program needs a topic of its own.

    Args:
        address: `mqtt://[USER[:PASSWORD]@]HOST[:PORT]/TOPIC`, or `mqtts://` for TLS.
        environ: Of `ACTIONCLIP_MQTT_USER`, `ACTIONCLIP_MQTT_PASSWORD`, and `ACTIONCLIP_MQTT_CA`,
            a file of certificates to trust instead of the system's.
        discovery: Topic below which Home Assistant looks; None to tell it nothing.

    Raises:
        ValueError: If the address is none.
    """

    kind = "mqtt"

    def __init__(
        self,
        address: str,
        *,
        environ: Mapping[str, str] = os.environ,
        discovery: str | None = "homeassistant",
    ) -> None:
        parts = urlsplit(address)
        try:
            port = parts.port
        except ValueError:
            port = -1
        topic = unquote(parts.path).strip("/")
        if parts.scheme not in _PORTS or not parts.hostname or port == -1:
            raise ValueError("The address of the broker is not one; expected mqtt://HOST/TOPIC.")
        if not topic or any(each in topic for each in "+#\0") or "//" in topic:
            raise ValueError(
                f"The topic is {topic!r}; give one without + and #: mqtt://HOST/actionclip."
            )
        port = port or _PORTS[parts.scheme]
        super().__init__(f"{parts.scheme}://{parts.hostname}:{port}/{topic}")
        self._topic = topic
        self._discovery = discovery
        self._announced: dict[str, bytes] = {}  # what Home Assistant was told, by topic
        self._on: set[str] = set()
        self._waiting: dict[int, bool] = {}  # whether it is an event, by the number of its message
        self._arrived: set[int] = set()
        self._was_connected = False  # else the reason is another, and was told
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=f"actionclip-{unique_name()}"
        )
        user = unquote(parts.username or "") or environ.get(USER_VARIABLE)
        password = unquote(parts.password or "") or environ.get(PASSWORD_VARIABLE)
        if user or password:
            self._client.username_pw_set(user or "", password)
        if parts.scheme == "mqtts":
            self._trust(environ.get(CA_VARIABLE))
        self._client.will_set(f"{topic}/availability", _OFFLINE, qos=1, retain=True)
        self._client.reconnect_delay_set(1, _LONGEST_RECONNECT_SECONDS)
        self._client.max_queued_messages_set(_MAX_QUEUED)
        self._client.on_connect = self._on_connect
        self._client.on_connect_fail = self._on_connect_fail
        self._client.on_disconnect = self._on_disconnect
        self._client.on_message = self._on_message
        self._client.on_publish = self._on_publish
        self._client.connect_async(parts.hostname, port)
        self._client.loop_start()
        self._thread.start()

    def _trust(self, certificates: str | None) -> None:
        try:
            self._client.tls_set(ca_certs=certificates or None)
        except OSError as exc:
            raise ValueError(
                f"{CA_VARIABLE} names {certificates!r}, which is not a file of certificates "
                f"({exc}); give one in PEM form."
            ) from exc

    def _deliver(self, event: EventRecord) -> None:
        self._count_sent()
        body = event.to_json()
        self._publish("events", body, retain=False)
        place = f"{slug(event.source)}/{slug(event.label)}"
        self._tell_home_assistant(event, place)
        self._publish(f"{place}/event", body)
        if event.kind == "end":
            self._on.discard(f"{self._topic}/{place}/state")
        else:
            self._on.add(f"{self._topic}/{place}/state")
        if event.kind != "update":
            self._publish(f"{place}/state", _OFF if event.kind == "end" else _ON)

    def _publish(self, place: str, body: bytes, *, retain: bool = True) -> None:
        """Publish below the topic, at once or when there is a connection again."""
        self._publish_at(f"{self._topic}/{place}", body, retain=retain)

    def _publish_at(self, topic: str, body: bytes, *, retain: bool = True) -> None:
        sent = self._client.publish(topic, body, qos=1, retain=retain)
        if sent.rc == paho.MQTT_ERR_QUEUE_SIZE:
            raise SinkError(f"the broker has not taken {_MAX_QUEUED} messages so far")
        self._waiting[sent.mid] = topic == f"{self._topic}/events"

    def _tell_home_assistant(self, event: EventRecord, place: str) -> None:
        if self._discovery is None:
            return
        device = f"actionclip_{slug(self._topic)}_{slug(event.source)}"
        name = f"{device}_{slug(event.label)}"
        topic = f"{self._discovery}/binary_sensor/{name}/config"
        if topic in self._announced:
            return
        self._announced[topic] = json.dumps(
            {
                "name": event.label,
                "unique_id": name,
                "state_topic": f"{self._topic}/{place}/state",
                "payload_on": _ON.decode(),
                "payload_off": _OFF.decode(),
                "json_attributes_topic": f"{self._topic}/{place}/event",
                "availability_topic": f"{self._topic}/availability",
                "device": {
                    "identifiers": [device],
                    "name": event.source,
                    "manufacturer": "actionclip-deploy",
                },
                "origin": {"name": "actionclip-deploy"},
            },
            ensure_ascii=False,
        ).encode()
        self._publish_at(topic, self._announced[topic])

    def _count_sent(self) -> None:
        with self._changed:
            for number in self._arrived & self._waiting.keys():
                self._arrived.discard(number)
                if self._waiting.pop(number):
                    self._note_sent()

    def _num_kept(self) -> int:
        self._count_sent()
        return sum(self._waiting.values())

    def _finish(self) -> None:
        self._publish("availability", _OFFLINE)
        until = time.monotonic() + _LAST_WORD_SECONDS
        while self._client.is_connected() and self._waiting and time.monotonic() < until:
            time.sleep(_LAST_WORD_SECONDS / 100)
            self._count_sent()
        self._note_dropped("closed", self._num_kept())
        self._client.disconnect()
        self._client.loop_stop()

    # In the client's thread.

    def _on_connect(
        self, client: paho.Client, _: object, __: object, reason: Any, *___: object
    ) -> None:
        if reason.is_failure:
            self._note_failure(f"the broker refuses the connection ({reason})")
            return
        self._was_connected = True
        self._note_working()
        with suppress(SinkError):  # a queue that is full is said where events are
            self._publish("availability", _ONLINE)
        client.subscribe(f"{self._topic}/+/+/state", qos=1)

    def _on_connect_fail(self, *_: object) -> None:
        why = sys.exc_info()[1]  # paho calls this while it handles the error, and does not pass it
        self._note_failure(f"the broker cannot be reached ({why or 'no reason is known'})")

    def _on_disconnect(
        self, _: paho.Client, __: object, ___: object, reason: Any, *____: object
    ) -> None:
        was_connected, self._was_connected = self._was_connected, False
        if was_connected and reason.is_failure and not self._is_closing.is_set():
            self._note_failure(f"the connection was lost ({reason})")

    def _on_message(self, client: paho.Client, _: object, message: paho.MQTTMessage) -> None:
        is_left_over = message.retain and message.payload == _ON and message.topic not in self._on
        if is_left_over:
            client.publish(message.topic, _OFF, qos=0, retain=True)

    def _on_publish(self, _: paho.Client, __: object, number: int, *___: object) -> None:
        self._arrived.add(number)  # no lock: the client holds one of its own here
