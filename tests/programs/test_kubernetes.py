"""The manifests of runtimes/kubernetes: valid, about things that exist, and a pod's life."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import kubernetes_validate
import pytest
import yaml
from serving_programs import bundle_with_bank, until
from typer.testing import CliRunner

from actionclip_deploy.cli import app
from actionclip_deploy.serve.observability import ServerMetrics

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "runtimes" / "kubernetes"
DOCKERFILE = ROOT / "runtimes" / "server" / "Dockerfile"
# The oldest and the newest Kubernetes whose published schemas the manifests are held against.
VERSIONS = ("1.27", "1.37")
CUSTOM = json.loads((ROOT / "tests" / "data" / "custom_resources.json").read_text())


def objects() -> list[Any]:
    return [
        pytest.param(each, id=f"{path.stem}-{each['kind']}")
        for path in sorted(FOLDER.glob("*.yaml"))
        for each in yaml.safe_load_all(path.read_text())
    ]


def find(kind: str) -> Any:
    (found,) = [each.values[0] for each in objects() if each.values[0]["kind"] == kind]
    return found


def kind_of(each: Any) -> str:
    return f"{each['apiVersion']} {each['kind']}"


def check(each: Any) -> None:
    """Refuse an object that is not as the published schemas have it, or has a field too many."""
    schema = CUSTOM.get(kind_of(each))
    if schema is not None:
        jsonschema.validate(each, schema)
        return
    for version in VERSIONS:
        kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("each", objects())
def test_a_manifest_is_as_the_published_schemas_have_it(each: Any) -> None:
    check(each)


@pytest.mark.parametrize("each", objects())
def test_a_misspelt_field_is_refused(each: Any) -> None:
    where = each["spec"]
    name = next(iter(where))
    misspelt = {**each, "spec": {**where, f"{name}s": where[name]}}
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(misspelt)


def containers() -> dict[str, Any]:
    deployed, runtime = find("Deployment"), find("ServingRuntime")
    return {
        "Deployment": deployed["spec"]["template"]["spec"],
        "ServingRuntime": runtime["spec"],
    }


def test_the_container_of_kserve_is_one_of_a_pod() -> None:
    spec = containers()["ServingRuntime"]
    pod = {"containers": spec["containers"], "volumes": spec["volumes"]}
    for version in VERSIONS:
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": pod},
            version,
            strict=True,
        )


@pytest.mark.parametrize("kind", ["Deployment", "ServingRuntime"])
def test_a_container_runs_what_the_image_has_with_options_that_exist(kind: str) -> None:
    (container,) = containers()[kind]["containers"]
    entry, _ = image_command()
    command = container.get("command", entry) + container["args"]
    assert command[:2] == ["actionclip", "serve"]
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    options = set(re.findall(r"--[a-z-]+", shown))
    assert {word for word in command if word.startswith("--")} <= options
    ports = {str(port["containerPort"]) for port in container["ports"]}
    given = {
        command[at + 1] for at, word in enumerate(command) if word in ("--port", "--grpc-port")
    }
    assert ports == given
    mounted = {volume["mountPath"] for volume in container["volumeMounts"]}
    assert {command[command.index("--spool") + 1], "/cache", "/tmp"} <= mounted
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_objects_name_each_other() -> None:
    deployed, service = find("Deployment"), find("Service")
    labels = deployed["spec"]["template"]["metadata"]["labels"]
    assert deployed["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert service["spec"]["selector"].items() <= labels.items()
    assert find("PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    selected = find("ServiceMonitor")["spec"]["selector"]["matchLabels"]
    assert selected.items() <= service["metadata"]["labels"].items()
    ports = {port["name"] for port in service["spec"]["ports"]}
    assert {each["port"] for each in find("ServiceMonitor")["spec"]["endpoints"]} <= ports
    (container,) = deployed["spec"]["template"]["spec"]["containers"]
    named = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= named
    for kind in ("HorizontalPodAutoscaler", "ScaledObject"):
        assert find(kind)["spec"]["scaleTargetRef"]["name"] == deployed["metadata"]["name"]
    model = find("InferenceService")["spec"]["predictor"]["model"]
    runtime = find("ServingRuntime")
    assert model["runtime"] == runtime["metadata"]["name"]
    formats = [each["name"] for each in runtime["spec"]["supportedModelFormats"]]
    assert model["modelFormat"]["name"] in formats


def test_there_is_time_to_finish_before_a_pod_is_killed() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    drain = float(re.search(r"--drain-seconds.*?default: ([\d.]+)", shown, re.DOTALL)[1])  # type: ignore[index]
    pod = containers()["Deployment"]
    (container,) = pod["containers"]
    pause = float(re.search(r"sleep\((\d+)\)", str(container["lifecycle"]["preStop"]))[1])  # type: ignore[index]
    assert pod["terminationGracePeriodSeconds"] > drain + pause + 10
    predictor = find("InferenceService")["spec"]["predictor"]
    assert predictor["terminationGracePeriodSeconds"] > drain + 10


def test_queries_are_about_metrics_that_the_server_has() -> None:
    text = "".join(path.read_text() for path in FOLDER.glob("*.yaml"))
    named = set(re.findall(r"\bactionclip_[a-z_]+\b", text))
    assert {"actionclip_queue_clips", "actionclip_decode_queue", "actionclip_ready"} <= named
    metrics = ServerMetrics()
    metrics.requests.labels("/a", "GET", 200).inc()
    metrics.request_seconds.labels("/a").observe(1)
    there = set(re.findall(r"^(actionclip_\w+)", metrics.render().decode(), re.M))
    assert named <= there


def image_command() -> tuple[list[str], list[str]]:
    """What the image runs: its ENTRYPOINT, and the CMD that a pod's `args` replace."""
    text = DOCKERFILE.read_text()
    found = [re.search(rf"^{name} (.+)$", text, re.M) for name in ("ENTRYPOINT", "CMD")]
    entry, command = (json.loads(each[1]) for each in found if each is not None)
    return entry, command


@pytest.fixture
def pod(tiny_bundle: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """The process that the container of the Deployment runs, its address, and its log.

    Folders of the image are others here, it listens on this machine alone, and its ports are free.
    """
    bundle = bundle_with_bank(tiny_bundle, tmp_path, "mine", ["run", "walk", "sit"])
    (tmp_path / "spool").mkdir()
    port = free_port()
    (container,) = containers()["Deployment"]["containers"]
    entry, _ = image_command()
    here = {"/bundle": str(bundle), "/spool": str(tmp_path / "spool"), "0.0.0.0": "127.0.0.1"}
    here |= {"8000": str(port), "8001": "0"}
    command = [here.get(word, word) for word in entry + container["args"]]
    program = str(Path(sys.executable).with_name(command[0]))
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen([program, *command[1:]], stdout=log, stderr=log) as process,
    ):
        try:
            yield process, f"http://127.0.0.1:{port}", tmp_path / "log"
        finally:
            process.kill()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def probe(url: str, kind: str) -> int | None:
    """The status that a probe of the Deployment gets; None where nothing listens yet."""
    (container,) = containers()["Deployment"]["containers"]
    path = container[kind]["httpGet"]["path"]
    try:
        return httpx.get(f"{url}{path}", trust_env=False, timeout=30).status_code
    except httpx.TransportError:
        return None


def test_the_life_of_a_pod(
    pod: tuple[subprocess.Popen[bytes], str, Path], rendered_video: Path
) -> None:
    process, url, log = pod
    # It starts: alive before it is ready, and nobody is sent to it.
    seen: list[int] = []

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()
        status = probe(url, "startupProbe")
        if status is not None and (not seen or seen[-1] != status):
            if status == 503:
                assert probe(url, "livenessProbe") == 200
            seen.append(status)
        return status == 200

    until(is_ready, seconds=120)
    assert seen == [503, 200]
    # Ready means verified: it says against what.
    assert b" verified; " in log.read_bytes()
    # It is told to end under load: what has begun is answered, whoever comes later is not let in.
    video, statuses, stop = rendered_video.read_bytes(), [], threading.Event()
    is_told = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
                    files, data = {"video": ("a.mp4", video)}, {"labels": "mine"}
                    answer = client.post("/v1/classify", files=files, data=data)
                    statuses.append(answer.status_code)
            except httpx.TransportError:
                # It listens no longer; or it is about to, and closes a connection of which it has
                # read nothing yet, which is the same to a client.
                assert is_told.is_set()
                return
            if statuses[-1] != 200:
                return

    clients = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for each in clients:
        each.start()
    until(lambda: len(statuses) > 8)
    assert probe(url, "readinessProbe") == 200
    told = time.monotonic()
    is_told.set()
    process.send_signal(signal.SIGTERM)
    grace = containers()["Deployment"]["terminationGracePeriodSeconds"]
    assert process.wait(grace) == 0
    assert time.monotonic() - told < grace
    stop.set()
    for each in clients:
        each.join(60)
    assert set(statuses) <= {200, 503}
    assert statuses.count(200) > 8
    # All that it answered has arrived.
    assert log.read_text().count("POST /v1/classify 200") == statuses.count(200)
