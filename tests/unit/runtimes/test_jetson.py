from __future__ import annotations

from pathlib import Path

import pytest

from actionclip_deploy.runtimes import machine
from actionclip_deploy.runtimes.machine import ask_nvpmodel, read_jetson

# As the files of an Orin Nano with JetPack 6.2.1 have them.
RELEASE = (
    "# R36 (release), REVISION: 4.4, GCID: 41062509, BOARD: generic, EABI: aarch64, DATE: Mon\n"
    "# KERNEL_VARIANT: oot\n"
)
MODES = (
    "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"
    "< PM_CONFIG DEFAULT=0 >\n"
)
PACKAGES = (
    "Package: nvidia-jetpack-runtime\nStatus: install ok installed\nVersion: 6.2.1+b38\n\n"
    "Package: nvidia-jetpack\nStatus: {}\nPriority: standard\nVersion: 6.2.1+b38\n\n"
    "Package: zlib1g\nStatus: install ok installed\nVersion: 1:1.2.11\n"
)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def silent() -> str:
    return ""


def test_a_jetson_tells_its_board_versions_and_power_mode(tmp_path: Path) -> None:
    files = {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit\0",
        "etc/nv_tegra_release": RELEASE,
        "var/lib/dpkg/status": PACKAGES.format("install ok installed"),
        "var/lib/nvpmodel/status": "pmode:0002",
        "etc/nvpmodel.conf": MODES,
    }
    found = read_jetson(write(tmp_path, files), silent)
    assert found is not None
    assert found.model == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit"
    assert (found.l4t, found.jetpack, found.jetpack_major) == ("36.4.4", "6.2.1", 6)
    assert found.power_mode == "MAXN_SUPER (2)"
    assert found.in_words() == "JetPack 6.2.1, L4T 36.4.4, power mode MAXN_SUPER (2)"


@pytest.mark.parametrize(
    ("release", "jetpack"),
    [
        ("R35 (release), REVISION: 4.1", "5.x"),
        ("R36 (release), REVISION: 3.0", "6.0"),
        ("R36 (release), REVISION: 4.0", "6.1"),
        ("R36 (release), REVISION: 4.3", "6.2"),
        ("R36 (release), REVISION: 4.7", "6.1 to 6.2.x"),
        ("R38 (release), REVISION: 2.0", "7.0"),
        ("R38 (release), REVISION: 4.0", "7.1"),
        ("R39 (release), REVISION: 2.0", "7.2.x"),
        ("R32 (release), REVISION: 7.1", None),
    ],
)
def test_without_its_package_jetpack_is_the_one_of_l4t(
    tmp_path: Path, release: str, jetpack: str | None
) -> None:
    found = read_jetson(write(tmp_path, {"etc/nv_tegra_release": f"# {release}, X"}), silent)
    assert found is not None
    assert found.jetpack == jetpack


def test_a_package_that_was_removed_does_not_count(tmp_path: Path) -> None:
    files = {
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.0, X",
        "var/lib/dpkg/status": PACKAGES.format("deinstall ok config-files"),
    }
    found = read_jetson(write(tmp_path, files), silent)
    assert found is not None
    assert found.jetpack == "6.1"


def test_in_a_container_the_board_is_known_by_its_device_tree(tmp_path: Path) -> None:
    model = {"proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0"}
    found = read_jetson(write(tmp_path, model), silent)
    assert found is not None
    assert (found.l4t, found.jetpack, found.jetpack_major) == (None, None, None)
    assert found.in_words() == "JetPack unknown, L4T unknown, power mode unknown"


def test_other_boards_and_machines_are_no_jetson(tmp_path: Path) -> None:
    assert read_jetson(tmp_path, silent) is None
    other = write(tmp_path, {"proc/device-tree/model": "Raspberry Pi 5 Model B\0"})
    assert read_jetson(other, silent) is None


@pytest.mark.parametrize(
    ("status", "printed", "expected"),
    [
        ("pmode:0000", "", "15W (0)"),
        ("pmode:0009", "", "9"),
        (None, "NV Power Mode: 25W\n1\n", "25W (1)"),
        (None, "", None),
    ],
)
def test_the_power_mode_is_read_or_asked_for(
    tmp_path: Path, status: str | None, printed: str, expected: str | None
) -> None:
    files = {"etc/nv_tegra_release": RELEASE, "etc/nvpmodel.conf": MODES}
    if status:
        files["var/lib/nvpmodel/status"] = status
    found = read_jetson(write(tmp_path, files), lambda: printed)
    assert found is not None
    assert found.power_mode == expected


@pytest.mark.parametrize("script", ["echo 'NV Power Mode: 15W'; echo 0", "exit 1"])
def test_nvpmodel_is_asked_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    program = tmp_path / "nvpmodel"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(machine.shutil, "which", lambda _: str(program))
    assert ask_nvpmodel() == ("NV Power Mode: 15W\n0\n" if "echo" in script else "")
    monkeypatch.setattr(machine.shutil, "which", lambda _: None)
    assert ask_nvpmodel() == ""
