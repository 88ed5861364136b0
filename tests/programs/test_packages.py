"""What is in the wheel and the sdist, and that the wheel works where there is no torch.

`scripts/check` builds them and the environment; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

pytestmark = pytest.mark.edge

ROOT = Path(__file__).resolve().parents[2]
# Wheels of other Python versions and processors are a little larger or smaller.
SIZE_TOLERANCE = 0.2
EDGE_PROGRAM = Path(__file__).with_name("edge_program.py")


def _only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    assert len(found) == 1, found
    return found[0]


def test_the_wheel_holds_the_package_and_nothing_else(built_packages: Path) -> None:
    with zipfile.ZipFile(_only(built_packages, "*.whl")) as wheel:
        names = [PurePosixPath(name) for name in wheel.namelist()]
    tops = {name.parts[0] for name in names}
    assert {top.partition("-")[0] for top in tops} == {"actionclip_deploy"}
    in_package = {str(name) for name in names if name.parts[0] == "actionclip_deploy"}
    in_checkout = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "actionclip_deploy").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert in_package == in_checkout
    data = {
        "actionclip_deploy/motions/motions.json",
        "actionclip_deploy/motions/motions.safetensors",
        "actionclip_deploy/published/checkpoints.json",
        "actionclip_deploy/published/kinetics-400.json",
    }
    assert data <= in_package
    page = {name for name in in_package if name.startswith("actionclip_deploy/serve/page/")}
    page.discard("actionclip_deploy/serve/page/__init__.py")
    assert {PurePosixPath(name).suffix for name in page} == {".html", ".css", ".js", ".svg"}
    suffixes = {PurePosixPath(name).suffix for name in in_package - data - page}
    assert suffixes == {".py", ".typed", ".toml", ".proto", ".binpb"}
    tables = {name for name in in_package if name.endswith(".toml")}
    assert tables == {"actionclip_deploy/runtimes/known_bad.toml"}
    assert "actionclip_deploy/py.typed" in in_package


def test_the_sdist_holds_what_a_build_needs(built_packages: Path) -> None:
    with tarfile.open(_only(built_packages, "*.tar.gz")) as sdist:
        names = {PurePosixPath(*PurePosixPath(name).parts[1:]) for name in sdist.getnames()}
    tops = {name.parts[0] for name in names if name.parts}
    assert tops == {
        ".gitignore",
        "CHANGELOG.md",
        "LICENSE",
        "PKG-INFO",
        "README.md",
        "actionclip_deploy",
        "pyproject.toml",
    }


def use_a_bundle(python: Path, bundle: Path, video: Path, folder: Path) -> str:
    """Run the program of an edge device with another interpreter; gives what it prints."""
    copy = shutil.copytree(bundle, folder / "bundle")
    labels = folder / "labels.txt"
    labels.write_text("abseiling\nair drumming\narchery\n", encoding="utf-8")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, EDGE_PROGRAM, copy, video, labels],
        cwd=folder,
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_bundle_works_where_torch_is_not_installed(
    edge_python: Path, tiny_bundle: Path, rendered_video: Path, tmp_path: Path
) -> None:
    printed = use_a_bundle(edge_python, tiny_bundle, rendered_video, tmp_path)
    measured = re.search(r"site-packages: (\d+) MB", printed)
    stated = re.search(r"about (\d+) MB in all", (ROOT / "README.md").read_text("utf-8"))
    assert measured
    assert stated
    assert int(stated[1]) == pytest.approx(int(measured[1]), rel=SIZE_TOLERANCE)


def test_a_bundle_works_with_the_lowest_versions_that_are_allowed(
    edge_lowest_python: Path, tiny_bundle: Path, rendered_video: Path, tmp_path: Path
) -> None:
    ask = (
        "import json; from importlib.metadata import distributions, requires; "
        "print(json.dumps([requires('actionclip-deploy'), "
        "{each.name.lower(): each.version for each in distributions()}]))"
    )
    done = subprocess.run([edge_lowest_python, "-c", ask], capture_output=True, check=True)
    needs, installed = json.loads(done.stdout)
    checked = 0
    for need in map(Requirement, needs):
        if need.marker is None or any(
            need.marker.evaluate({"extra": extra}) for extra in ("onnxruntime", "openvino")
        ):
            (bound,) = [each.version for each in need.specifier if each.operator == ">="]
            # A bound of 17.1 is met by 17.1.0 first.
            assert (
                Version(installed[need.name]).release[: bound.count(".") + 1]
                == Version(bound).release
            )
            checked += 1
    assert checked >= 10
    use_a_bundle(edge_lowest_python, tiny_bundle, rendered_video, tmp_path)
