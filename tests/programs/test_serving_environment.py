"""What the files of runtimes/server name exists: in the checkout, the verb and the metrics."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from serving_programs import bundle_with_bank
from typer.testing import CliRunner

from actionclip_deploy.cli import app
from actionclip_deploy.serve.observability import ServerMetrics

ROOT = Path(__file__).resolve().parents[2]
SERVER = ROOT / "runtimes" / "server"
DOCKERFILES = (SERVER / "Dockerfile", SERVER / "Dockerfile.gpu")
DASHBOARD = SERVER / "grafana" / "dashboards" / "actionclip.json"


def instruction(path: Path, name: str) -> list[str]:
    text = path.read_text().replace("\\\n", " ")
    found = re.findall(rf"^\s*{name} (.+)$", text, re.M)
    assert found, (path.name, name)
    return found


@pytest.fixture(scope="module")
def options() -> set[str]:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    return set(re.findall(r"--[a-z-]+", shown))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_copies_what_is_there_and_let_through(path: Path) -> None:
    let_through = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")
    }
    for line in instruction(path, "COPY"):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source.split("/")[0] in let_through


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_the_verb_without_rights_and_is_asked_whether_it_is_ready(
    path: Path, options: set[str]
) -> None:
    command = json.loads(instruction(path, "ENTRYPOINT")[0])
    command += json.loads(instruction(path, "CMD")[-1])
    assert command[:3] == ["actionclip", "serve", "/bundle"]
    assert {word for word in command if word.startswith("--")} <= options
    # A number: `runAsNonRoot` of Kubernetes refuses a name, behind which might be root.
    (user,) = instruction(path, "USER")
    assert int(user) > 0
    text = path.read_text()
    check, port = instruction(path, "HEALTHCHECK")[0], command[command.index("--port") + 1]
    assert f"127.0.0.1:{port}/readyz" in check
    assert instruction(path, "EXPOSE") == [port]
    # What it writes to is the user's, before the user is taken.
    spool = command[command.index("--spool") + 1]
    assert f"useradd --uid {user} --create-home actionclip" in text
    assert text.index(f"chown actionclip /cache {spool}") < text.index(f"USER {user}")
    assert json.loads(instruction(path, "VOLUME")[0]) == ["/cache", spool]


@pytest.fixture(scope="session")
def built_image() -> str:
    """What `runtimes/build_image.sh server` makes, where it was called before."""
    name, podman = "actionclip-serve", shutil.which("podman")
    asked = [str(podman), "image", "exists", name]
    if podman is None or subprocess.run(asked, capture_output=True, check=False).returncode:
        pytest.skip("needs podman and an image that was built")
    return name


def try_image(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SERVER / "try_image.py", *words],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_built_image_starts_as_a_pod_does_and_ends_when_it_is_told(
    built_image: str, tiny_bundle: Path, rendered_video: Path, tmp_path: Path
) -> None:
    bundle = bundle_with_bank(tiny_bundle, tmp_path, "mine", ["run", "walk", "sit"])
    done = try_image(bundle, rendered_video, "--engine", "podman", "--image", built_image)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"User": ""}, "USER is a number"),
        ({"User": "actionclip"}, "USER is a number"),
        ({"Entrypoint": ["/bin/sh", "-c", "actionclip serve /bundle"]}, "without a shell"),
        ({"Healthcheck": None}, "HEALTHCHECK is in the image"),
    ],
)
def test_an_image_that_is_not_as_a_pod_needs_it_is_told(
    config: dict[str, Any], told: str, tmp_path: Path
) -> None:
    good = {"User": "10001", "Entrypoint": ["actionclip"], "Healthcheck": {"Test": ["CMD", "a"]}}
    image = {"Config": good | config, "Size": 500_000_000, "Architecture": "arm64"}
    engine = tmp_path / "engine"
    engine.write_text(f"#!/bin/sh\necho '{json.dumps([image])}'\n")
    engine.chmod(0o755)
    done = try_image(tmp_path, tmp_path, "--engine", engine)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert told in done.stderr


def test_the_requirements_are_pinned_to_what_the_package_asks_for() -> None:
    given = [Requirement(line) for line in _lines(SERVER / "requirements.txt")]
    text = (ROOT / "pyproject.toml").read_text()
    wanted = [
        Requirement(need)
        for extra in ("serve", "grpc", "tracing")
        for need in re.findall(r'"([^"]+)"', re.search(rf"^{extra} = \[(.*)\]$", text, re.M)[1])  # type: ignore[index]
        if "[" not in need or not need.startswith("actionclip")
    ]
    pinned = {requirement.name: requirement for requirement in given}
    assert set(pinned) == {requirement.name for requirement in wanted}
    for need in wanted:
        (specifier,) = pinned[need.name].specifier
        assert specifier.operator == "=="
        assert need.specifier.contains(specifier.version), need


def test_compose_gives_the_server_what_its_image_needs() -> None:
    services = _yaml("compose.yaml")["services"]
    serve = services["serve"]
    assert serve["read_only"] is True
    targets = {
        volume.split(":")[-2 if volume.endswith(":ro") else -1] for volume in serve["volumes"]
    }
    assert targets == {"/bundle", "/cache", "/spool"}
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service.get("volumes", []):
            if volume.startswith("."):
                assert (SERVER / volume.split(":")[0]).exists(), volume
    grace = int(serve["stop_grace_period"].removesuffix("s"))
    assert grace > _default("--drain-seconds")
    over = _yaml("compose.gpu.yaml")["services"]["serve"]
    assert (SERVER / serve["build"]["context"]).resolve() == ROOT
    for given in (serve, over):
        assert (ROOT / given["build"]["dockerfile"]).exists()


def test_prometheus_reads_the_server() -> None:
    config = _yaml("prometheus/prometheus.yml")
    (job,) = config["scrape_configs"]
    ((target,),) = [each["targets"] for each in job["static_configs"]]
    host, port = target.split(":")
    service = _yaml("compose.yaml")["services"][host]
    assert service["ports"][0].endswith(f":{port}")
    tool = shutil.which("promtool")
    if tool is not None:
        subprocess.run(
            [tool, "check", "config", SERVER / "prometheus" / "prometheus.yml"],
            check=True,
            capture_output=True,
        )


def test_every_query_of_the_dashboard_is_of_numbers_that_there_are() -> None:
    metrics = ServerMetrics()
    metrics.watch(lambda: (), lambda: ())  # no cameras, whose numbers are there nevertheless
    there = set()
    for family in metrics.registry.collect():
        suffixes = {
            "counter": ["_total"],
            "histogram": ["_bucket", "_sum", "_count"],
        }.get(family.type, [""])
        there |= {family.name + suffix for suffix in suffixes}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = set()
    for panel in panels:
        for target in panel["targets"]:
            names = set(re.findall(r"\bactionclip_\w+", target["expr"]))
            assert names, panel["title"]
            assert names <= there, (panel["title"], names - there)
            asked |= names
    # Nothing that is measured is left unlooked at, but for the two that others are shares of.
    stems = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in asked}
    measured = {family.name for family in metrics.registry.collect()}
    assert measured - stems <= {"actionclip_decode_workers"}
    datasource = _yaml("grafana/provisioning/datasources/prometheus.yaml")["datasources"][0]
    assert {panel["datasource"]["uid"] for panel in panels} == {datasource["uid"]}


def _default(option: str) -> float:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    found = re.search(rf"{option}.*?\[default: ([\d.]+)\]", shown, re.S)
    assert found, shown
    return float(found[1])


def _yaml(name: str) -> Any:
    return yaml.safe_load((SERVER / name).read_text())


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
