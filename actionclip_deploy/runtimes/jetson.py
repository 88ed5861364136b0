"""What kind of Jetson this machine is, read from files: JetPack, L4T and the power mode."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actionclip_deploy.runtimes.versions import version_numbers

_ROOT = Path("/")
_TIMEOUT_SECONDS = 10

# JetPack by L4T, the longest match counts. Source: NVIDIA's JetPack archive, and
# dusty-nv/jetson-containers jetson_containers/l4t_version.py for the exact revisions.
_JETPACKS = {
    "34": "5.0",
    "35": "5.x",
    "36.2": "6.0 DP",
    "36.3": "6.0",
    "36.4": "6.1 to 6.2.x",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.5": "6.2.x",
    "38.2": "7.0",
    "38.4": "7.1",
    "39": "7.2.x",
}


@dataclass(frozen=True)
class Jetson:
    """A Jetson.

    Attributes:
        model: Of the board, from the device tree.
        l4t: Version of Linux for Tegra, such as `36.4.3`; None where it is not told, as in a
            container of another maker.
        jetpack: Version of JetPack: that of its package, or else the one that L4T belongs to.
        power_mode: Name and number of the mode that nvpmodel has set.
    """

    model: str | None
    l4t: str | None
    jetpack: str | None
    power_mode: str | None

    @property
    def jetpack_major(self) -> int | None:
        """The first number of JetPack's version."""
        return version_numbers(self.jetpack)[0] if self.jetpack else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    def in_words(self) -> str:
        """One line."""
        return (
            f"JetPack {self.jetpack or 'unknown'}, L4T {self.l4t or 'unknown'}, power mode "
            f"{self.power_mode or 'unknown'}"
        )


def ask_nvpmodel() -> str:
    """What `nvpmodel -q` prints; empty where it is not there or may not be asked."""
    program = shutil.which("nvpmodel")
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, "-q"], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def read_jetson(root: Path = _ROOT, query: Callable[[], str] = ask_nvpmodel) -> Jetson | None:
    """The Jetson that this is; None elsewhere.

    Args:
        root: Where `/etc`, `/proc` and `/var` are; another one in tests.
        query: Gives what `nvpmodel -q` prints, where its file cannot be read.
    """
    model = read_file(root / "proc/device-tree/model") or None
    release = re.search(
        r"R(\d+) \(release\), REVISION: ([\d.]+)", read_file(root / "etc/nv_tegra_release")
    )
    if release is None and "jetson" not in (model or "").lower():
        return None
    l4t = f"{release[1]}.{release[2]}" if release else None
    return Jetson(
        model=model,
        l4t=l4t,
        jetpack=_installed_jetpack(root) or _jetpack_of(l4t),
        power_mode=_power_mode(root, query),
    )


def _installed_jetpack(root: Path) -> str | None:
    """Version of the package nvidia-jetpack, such as 6.2.1 of `6.2.1+b38`."""
    for entry in re.split(r"\n\s*\n", read_file(root / "var/lib/dpkg/status")):
        if re.search(r"^Package: nvidia-jetpack$", entry, re.MULTILINE):
            installed = re.search(r"^Status: .* installed$", entry, re.MULTILINE)
            version = re.search(r"^Version: (\d+(?:\.\d+)+)", entry, re.MULTILINE)
            return version[1] if installed and version else None
    return None


def _jetpack_of(l4t: str | None) -> str | None:
    parts = l4t.split(".") if l4t else []
    for length in range(len(parts), 0, -1):
        found = _JETPACKS.get(".".join(parts[:length]))
        if found:
            return found
    return None


def _power_mode(root: Path, query: Callable[[], str]) -> str | None:
    status = re.search(r"pmode:(\d+)", read_file(root / "var/lib/nvpmodel/status"))
    if status:
        number = int(status[1])
        pattern = rf"<\s*POWER_MODEL\s+ID={number}\s+NAME=([^\s>]+)\s*>"
        name = re.search(pattern, read_file(root / "etc/nvpmodel.conf"))
        return f"{name[1]} ({number})" if name else str(number)
    told = re.search(r"NV Power Mode:\s*(\S+)\s+(\d+)", query())
    return f"{told[1]} ({told[2]})" if told else None


def read_file(path: Path) -> str:
    """Text of a file of the system, without zeros and line ends around it; empty for none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""
