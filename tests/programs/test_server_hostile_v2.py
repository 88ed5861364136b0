"""Hostile requests of the inference protocol, to a real server: refused, soon, in little memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from serving_programs import Server, costs_at_most, memory_bytes, running_server

MIB = 1024 * 1024
URL = "/v2/models/textual/infer"
# Of all requests here; each is 7 MiB, of the 8 that JSON may have. Measured: 249 MiB.
GROWTH_BYTES = 512 * MIB
# What the server may compute to read 7 MiB of JSON and find them wrong, in times of what reading as
# much takes here.
ANSWER_COST = 50.0


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("v2")
    options = ("--runtime", "onnxruntime", "--no-verify", "--workers", "1")
    with running_server(tiny_bundle, folder, *options) as server:
        before = memory_bytes(server.process.pid)
        yield server
        assert memory_bytes(server.process.pid, "VmHWM") - before < GROWTH_BYTES
        assert [line for line in server.logs() if line["level"] in ("error", "critical")] == []


def infer(server: Server, body: str | bytes, **headers: str) -> httpx.Response:
    with server.client() as client:
        given = {"content-type": "application/json", **headers}
        return client.post(URL, content=body, headers=given)


def tokens(data: str, shape: str = "[1, 3]") -> str:
    given = f'{{"name": "tokens", "datatype": "INT32", "shape": {shape}, "data": {data}}}'
    return f'{{"inputs": [{given}]}}'


@pytest.fixture(autouse=True)
def _still_good(server: Server) -> Iterator[None]:
    yield
    assert infer(server, tokens("[1, 2, 3]")).status_code == 200


def many(item: str, *, num_bytes: int = 7 * MIB) -> str:
    return f"[{','.join([item] * (num_bytes // (len(item) + 1)))}]"


BODIES: dict[str, Callable[[], str]] = {
    "more numbers than the shape has": lambda: tokens(many("1")),
    "objects for numbers": lambda: tokens(many("{}")),
    "lists for numbers": lambda: tokens(many("[]")),
    "words for numbers": lambda: tokens(many('"a"')),
    "lists in lists": lambda: tokens("[" * 100_000 + "]" * 100_000),
    "a number of millions of digits": lambda: tokens(f"[{'9' * 4_000_000}]"),
    "what is no number": lambda: tokens("[NaN, 1, 2]"),
    "a shape without end": lambda: tokens("[1]", many("1")),
    "a shape that overflows": lambda: tokens("[1]", f"[{2**62}, {2**62}]"),
    "a negative shape": lambda: tokens("[1, 2, 3]", "[-1, -3]"),
    "inputs without end": lambda: f'{{"inputs": {many("{}")}}}',
    "outputs without end": lambda: f'{{"inputs": [], "outputs": {many("{}")}}}',
    "fields without end": lambda: json.dumps({f"f{n}": 1 for n in range(500_000)}),
    "a name without end": lambda: tokens("[1]").replace("tokens", "a" * 7 * MIB),
}


@pytest.mark.parametrize("name", BODIES)
def test_json_that_is_no_input_is_refused(server: Server, name: str) -> None:
    body = BODIES[name]()
    with costs_at_most(server, ANSWER_COST, num_bytes=7 * MIB):
        answer = infer(server, body)
    assert answer.status_code == 400
    assert 0 < len(answer.json()["error"]) < 1000


@pytest.mark.parametrize("length", ["-1", "0", "1", "99", "9" * 5000, "1e3", "+5", ""])
def test_a_length_of_json_that_is_none_is_refused(server: Server, length: str) -> None:
    answer = infer(server, b"{}", **{"inference-header-content-length": length})
    assert answer.status_code == 400
    assert 0 < len(answer.json()["error"]) < 1000


@pytest.mark.parametrize("size", ["-12", "0", "11", "13", str(2**63), "1.5", '"12"', "true"])
def test_a_size_of_binary_data_that_is_none_is_refused(server: Server, size: str) -> None:
    head = tokens("[]").replace('"data": []', f'"parameters": {{"binary_data_size": {size}}}')
    headers = {"inference-header-content-length": str(len(head))}
    answer = infer(server, head.encode() + bytes(12), **headers)
    assert answer.status_code == 400
    assert 0 < len(answer.json()["error"]) < 1000


def test_more_json_than_may_be_is_not_parsed(server: Server) -> None:
    answer = infer(server, tokens(many("1", num_bytes=20 * MIB)))
    assert answer.status_code == 413
