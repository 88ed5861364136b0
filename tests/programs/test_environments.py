"""The environments in runtimes/: what they name exists, and their smoke test runs."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from tiny_graphs import write_tiny_bundle

from actionclip_deploy.runtimes.machine import cuda_devices

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ROOT / "runtimes" / "smoke.py"
# These have tests of their own: they are no runtime's.
FOLDERS = sorted(
    path.name
    for path in (ROOT / "runtimes").iterdir()
    if path.is_dir() and path.name not in ("server", "triton", "kubernetes", "__pycache__")
)
DOCKERFILES = sorted(p for name in FOLDERS for p in (ROOT / "runtimes" / name).glob("Dockerfile*"))
IMAGES = [*DOCKERFILES, *sorted((ROOT / "runtimes" / "server").glob("Dockerfile*"))]
HAVE_RUN = [ROOT / "runtimes" / name / "Dockerfile" for name in ("onnxruntime", "openvino")]
BUILD = ROOT / "runtimes" / "build_image.sh"
REQUIREMENTS = sorted(
    p for name in FOLDERS for p in (ROOT / "runtimes" / name).glob("requirements*.txt")
)


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT / "runtimes").as_posix() for path in paths]


def requirements(path: Path) -> dict[str, Requirement]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    given = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in given}


def needs_of_the_package(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for, with some extras."""
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.M | re.S)
    assert block
    lines = re.findall(r'"([^"]+)"', block[1])
    for extra in extras:
        line = re.search(rf"^{extra} = \[(.*)\]$", text, re.M)
        assert line, extra
        lines += [need for need in re.findall(r'"([^"]+)"', line[1]) if "[" not in need]
    return [Requirement(line) for line in lines]


def test_every_runtime_has_an_environment() -> None:
    assert FOLDERS == ["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]
    for folder in FOLDERS:
        present = {path.name for path in (ROOT / "runtimes" / folder).iterdir()}
        assert {"Dockerfile", "README.md", "requirements.txt"} <= present


@pytest.mark.parametrize("path", REQUIREMENTS, ids=names(REQUIREMENTS))
def test_every_requirement_is_pinned_to_one_version(path: Path) -> None:
    for requirement in requirements(path).values():
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        Version(specifier.version)


@pytest.mark.parametrize("path", REQUIREMENTS, ids=names(REQUIREMENTS))
def test_the_pins_are_what_the_package_asks_for(path: Path) -> None:
    is_engine = path.parent.name.startswith("tensorrt")
    extras = ["cuda"] if is_engine else []
    if path.parent.name == "openvino":
        extras += ["openvino"]
    else:
        extras += ["onnxruntime-gpu"] if path.stem.endswith("-gpu") else ["onnxruntime"]
    extras += ["rtx"] if path.parent.name == "tensorrt-rtx" else []
    pinned = requirements(path)
    python = {"python_version": "3.10" if path.stem.endswith("-jetpack6") else "3.12"}
    for need in needs_of_the_package(*extras):
        if need.marker is not None and not need.marker.evaluate(python):
            continue
        (specifier,) = pinned[canonicalize_name(need.name)].specifier
        assert need.specifier.contains(specifier.version), need


@pytest.mark.parametrize("path", REQUIREMENTS, ids=names(REQUIREMENTS))
def test_tensorrt_itself_is_never_pinned_over_the_system_s(path: Path) -> None:
    tensorrt = {name for name in requirements(path) if name.startswith(("tensorrt", "torch"))}
    assert tensorrt == ({"tensorrt-rtx"} if path.parent.name == "tensorrt-rtx" else set())


@pytest.mark.parametrize("path", DOCKERFILES, ids=names(DOCKERFILES))
def test_what_an_image_copies_exists_and_is_let_through(path: Path) -> None:
    sources = [
        source
        for line in re.findall(r"^COPY (.+)$", path.read_text(), re.M)
        for source in line.split()[:-1]
    ]
    let_through = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")
    }
    assert "runtimes/smoke.py" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in let_through


@pytest.mark.parametrize("path", DOCKERFILES, ids=names(DOCKERFILES))
def test_an_image_names_its_base_with_a_tag_and_says_whether_it_has_been_run(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"^ARG BASE=[\w./-]+:[\w.-]+$", text, re.M)
    assert f"docker build -f runtimes/{path.parent.name}/{path.name} -t " in text
    has_run = "# runtimes/README.md says with what it has been built and run" in text
    assert has_run == (path in HAVE_RUN)
    assert has_run or "not yet run on a device" in text


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What was asked of buildah and mmdebstrap, neither of which has to be there: a line a call."""
    log = tmp_path / "calls"
    for name in ("buildah", "mmdebstrap"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        # No image is there yet, and what is asked for a container gets one.
        program.write_text(
            f'#!/bin/sh\necho {name} "$@" >>{log}\n'
            '[ "$1" = inspect ] && exit 1\n[ "$1" = from ] && echo container\nexit 0\n'
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return log


@pytest.mark.parametrize("path", IMAGES, ids=names(IMAGES))
def test_an_image_is_built_without_docker_from_its_own_dockerfile(
    path: Path, recorded: Path, tmp_path: Path
) -> None:
    name = path.relative_to(ROOT / "runtimes").as_posix()
    subprocess.run([BUILD, name, "--no-cache"], check=True, cwd=tmp_path)
    (call,) = recorded.read_text().splitlines()
    asked = re.search(r"^#     docker build -f (\S+) -t (\S+) \.$", path.read_text(), re.M)
    assert asked
    named = f"--file {asked[1]} --tag {asked[2]}"
    assert call == f"buildah bud --format docker {named} --no-cache ."


def test_where_no_registry_is_reached_the_base_is_made_of_packages(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUITE", "noble")
    subprocess.run([BUILD, "server"], check=True)
    calls = recorded.read_text().splitlines()
    assert [" ".join(call.split()[:2]) for call in calls] == [
        "buildah inspect",
        "mmdebstrap --variant=apt",
        *("buildah from", "buildah add", "buildah config", "buildah commit"),
        "buildah bud",
    ]
    assert " noble " in calls[1]
    base = calls[5].split()[-1]
    assert f" --build-arg BASE={base} " in calls[6]


def test_an_image_that_there_is_not_is_told(recorded: Path) -> None:
    done = subprocess.run([BUILD, "tensorflow"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "runtimes/tensorflow has no Dockerfile; give one of" in done.stderr
    assert "onnxruntime" in done.stderr
    assert not recorded.exists()


@pytest.mark.parametrize("path", DOCKERFILES, ids=names(DOCKERFILES))
def test_an_image_says_how_its_smoke_test_is_run(path: Path) -> None:
    assert f"#     python /opt/smoke.py {path.parent.name} bundle" in path.read_text()


def run(
    runtime: str,
    *arguments: str | Path,
    python: str | Path = sys.executable,
    cwd: Path | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, SMOKE, runtime, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200", **environment},
    )


def test_the_smoke_test_of_onnxruntime_verifies_a_bundle(tiny_bundle: Path) -> None:
    done = run("onnxruntime", tiny_bundle)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "onnxruntime (CPUExecutionProvider, fp32) against PyTorch" in done.stdout
    assert "is verified on this machine" in done.stdout


def test_the_smoke_test_of_openvino_verifies_a_bundle(tiny_bundle: Path) -> None:
    done = run("openvino", tiny_bundle, "--precision", "fp32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "openvino (cpu, fp32) against PyTorch" in done.stdout
    assert "visual is computed in fp32." in done.stdout
    assert "is verified on this machine" in done.stdout


def test_the_smoke_test_of_onnxruntime_fails_where_verification_cannot_succeed(
    tmp_path: Path,
) -> None:
    done = run("onnxruntime", write_tiny_bundle(tmp_path).path)  # has no golden outputs
    assert done.returncode == 1
    assert "error:" in done.stderr


def test_the_smoke_test_of_tensorrt_ends_in_one_sentence_where_there_is_no_gpu(
    tiny_fp16_bundle: Path, tmp_path: Path
) -> None:
    if cuda_devices()[0]:
        pytest.skip("this machine has a GPU")
    done = run("tensorrt", tiny_fp16_bundle, ACTIONCLIP_CACHE=str(tmp_path))
    assert done.returncode == 1
    commands = [line for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert commands[-1] == f"$ actionclip build {tiny_fp16_bundle} --runtime tensorrt"
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert re.search(r"needs an NVIDIA GPU with its driver|packages that are not installed", error)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_is_built_before_it_is_verified(
    runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["smoke.py", runtime, "bundle"])
    monkeypatch.setattr(subprocess, "call", lambda words: ran.append(words[3:]) or 0)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SMOKE), run_name="__main__")
    assert stopped.value.code == 0
    assert ran == [
        ["doctor"],
        ["build", "bundle", "--runtime", runtime],
        ["verify", "bundle", "--runtime", runtime],
    ]


def test_the_smoke_test_ends_with_the_code_of_the_command_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(sys, "argv", ["smoke.py", "tensorrt", "bundle"])
    monkeypatch.setattr(
        subprocess, "call", lambda words: ran.append(words[3]) or 4 * (words[3] == "build")
    )
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SMOKE), run_name="__main__")
    assert stopped.value.code == 4
    assert ran == ["doctor", "build"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tensorflow", "bundle"], "choose from"),
        (["onnxruntime", "bundle", "--device", "gpu"], "are for openvino and not for onnxrunt"),
        (["openvino", "bundle", "--execution-provider", "cuda"], "is for onnxruntime"),
        (["tensorrt", "bundle", "--execution-provider", "cuda"], "is for onnxruntime"),
    ],
)
def test_a_smoke_test_that_there_is_not_is_refused(arguments: list[str], told: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert told in done.stderr


@pytest.mark.edge
def test_the_smoke_test_runs_where_torch_is_not_installed(
    edge_python: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    # From elsewhere, so that the wheel runs and not the checkout.
    done = run("onnxruntime", tiny_bundle, python=edge_python, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is verified on this machine" in done.stdout
