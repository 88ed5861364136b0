"""The command that adds an extra, for each way in which the package can be there."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

import pytest

from actionclip_deploy.errors import MissingExtraError
from actionclip_deploy.installation import install_command, pip_install

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def active(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment whose `pip` is the first on the path, as after `activate`."""
    folder = tmp_path / "environment" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "pip"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return folder


def checkout(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text('[project]\nname = "actionclip-deploy"\n')
    return folder


def test_an_installed_package_is_named(active: Path, tmp_path: Path) -> None:
    assert install_command("serve", root=tmp_path) == 'pip install "actionclip-deploy[serve]"'


def test_a_checkout_is_named_by_its_path(active: Path, tmp_path: Path) -> None:
    root = checkout(tmp_path / "clone")
    assert install_command("serve", root=root) == f'pip install -e "{root}[serve]"'


def test_these_tests_run_from_a_checkout(active: Path) -> None:
    assert install_command("torch") == f'pip install -e "{ROOT}[torch]"'
    assert install_command("torch") in str(MissingExtraError("It", "torch"))


def test_another_project_around_the_package_is_no_checkout_of_it(
    active: Path, tmp_path: Path
) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "somebody-else"\n')
    assert install_command("serve", root=tmp_path) == 'pip install "actionclip-deploy[serve]"'


@pytest.mark.parametrize("name", ["with a space", "$HOME", 'a "quoted" one', "it's", "back`tick"])
def test_a_shell_reads_the_path_as_it_is(active: Path, tmp_path: Path, name: str) -> None:
    root = checkout(tmp_path / name)
    line = install_command("serve", root=root)
    assert shlex.split(line) == ["pip", "install", "-e", f"{root}[serve]"]


def test_an_environment_that_is_not_active_is_named(
    active: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other place" / "python"
    monkeypatch.setattr(sys, "executable", str(other))
    assert pip_install() == f'"{other}" -m pip install'


def test_an_environment_without_pip_is_one_of_uv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert pip_install() == f"uv pip install --python {sys.executable}"
