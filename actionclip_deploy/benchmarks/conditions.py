"""What surrounds a measurement: clocks, load, power, and which code it was."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from actionclip_deploy.benchmarks.report import Conditions
from actionclip_deploy.errors import MissingExtraError
from actionclip_deploy.runtimes.machine import describe_machine, installed_versions

try:
    import psutil
except ImportError as exc:
    raise MissingExtraError("actionclip benchmark", "benchmark") from exc

_POWERCAP = Path("/sys/class/powercap")
_PACKAGE = Path(__file__).resolve().parents[1]


class ConditionsReader:
    """Reads what the machine is doing; None for what it does not tell."""

    def __init__(self) -> None:
        self._nvml = _open_nvml()
        self._busy, self._since = _busy_seconds_of_others(), time.monotonic()

    def read(self, moment: str) -> Conditions:
        """Read the conditions; the share of others is since the reading before.

        Args:
            moment: What is being done, for the report.
        """
        busy, now = _busy_seconds_of_others(), time.monotonic()
        span = (now - self._since) * (os.cpu_count() or 1)
        others = None if busy is None or self._busy is None else (busy - self._busy) / span * 100
        self._busy, self._since = busy, now
        frequency = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
        gpu = self._nvml.read() if self._nvml else {}
        return Conditions(
            moment=moment,
            load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            cpu_mhz=frequency.current if frequency and frequency.current else None,
            cpu_percent_of_others=None if others is None else max(0.0, others),
            gpu_mhz=gpu.get("mhz"),
            gpu_watts=gpu.get("watts"),
            gpu_celsius=gpu.get("celsius"),
        )


class EnergyMeter:
    """Counts energy: of the CPU package through Linux's powercap, and of an NVIDIA GPU.

    Most systems let only root read the CPU's counter; without either there is no power.

    Args:
        powercap: Where the kernel shows its counters; another folder in tests.
    """

    def __init__(self, powercap: Path = _POWERCAP) -> None:
        # Packages alone ("intel-rapl:0"; AMD's too): their parts would be counted twice.
        zones = sorted(powercap.glob("intel-rapl:[0-9]*")) if powercap.is_dir() else []
        self._zones = [zone for zone in zones if zone.name.count(":") == 1]
        self._nvml = _open_nvml()
        self._joules, self._since = self._read(), time.monotonic()

    def watts(self) -> float | None:
        """Mean power since the last call, or since this was made; None where it is not told."""
        joules, now = self._read(), time.monotonic()
        spent = [
            b - a
            for a, b in zip(self._joules, joules, strict=True)
            if a is not None and b is not None
        ]
        seconds = now - self._since
        self._joules, self._since = joules, now
        # A counter that began anew from zero makes no number.
        return sum(spent) / seconds if spent and min(spent) >= 0 and seconds > 0 else None

    def _read(self) -> list[float | None]:
        read: list[float | None] = [_microjoules(zone / "energy_uj") for zone in self._zones]
        return [*read, self._nvml.joules() if self._nvml else None]


def describe_surroundings() -> dict[str, Any]:
    """Machine, load, versions and commit, for the head of a report."""
    machine = describe_machine()
    names = ("cpu", "cpu_flags", "cpu_cores_available", "memory_bytes", "gpus", "os", "python")
    return {
        "machine": {name: machine[name] for name in names},
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": installed_versions(),
        "commit": toolkit_commit(),
    }


def toolkit_commit() -> str | None:
    """Commit of the checkout that this package lies in, with `-dirty` behind it if it differs."""
    command = ["git", "-C", str(_PACKAGE), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    is_ours = _PACKAGE.parent.joinpath(".git").exists()
    return done.stdout.strip() or None if is_ours and done.returncode == 0 else None


def _busy_seconds_of_others() -> float | None:
    """Seconds that all cores have been busy for anything but this process and its children."""
    try:
        times = psutil.cpu_times()
        total = sum(times) - times.idle - getattr(times, "iowait", 0.0)
        # Guests are counted in user time already.
        total -= getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        own = 0.0
        me = psutil.Process()
        for process in (me, *me.children(recursive=True)):
            spent = process.cpu_times()
            own += spent.user + spent.system
            # Those of children that have ended, which are no processes any more.
            own += getattr(spent, "children_user", 0.0) + getattr(spent, "children_system", 0.0)
        return float(total - own)
    except psutil.Error:
        return None


def _microjoules(path: Path) -> float | None:
    try:
        return int(path.read_text()) / 1e6
    except (OSError, ValueError):
        return None


class _Nvml:
    """The first GPU through NVIDIA's management library."""

    def __init__(self, pynvml: Any) -> None:
        self._library = pynvml
        self._device = pynvml.nvmlDeviceGetHandleByIndex(0)

    def read(self) -> dict[str, float | None]:
        nvml, device = self._library, self._device
        return {
            "mhz": self._value(nvml.nvmlDeviceGetClockInfo, device, nvml.NVML_CLOCK_SM),
            "watts": self._value(nvml.nvmlDeviceGetPowerUsage, device, scale=1e-3),
            "celsius": self._value(
                nvml.nvmlDeviceGetTemperature, device, nvml.NVML_TEMPERATURE_GPU
            ),
        }

    def joules(self) -> float | None:
        return self._value(
            self._library.nvmlDeviceGetTotalEnergyConsumption, self._device, scale=1e-3
        )

    def _value(self, function: Any, *arguments: Any, scale: float = 1.0) -> float | None:
        try:
            return float(function(*arguments)) * scale
        except self._library.NVMLError:
            return None


def _open_nvml() -> _Nvml | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return _Nvml(pynvml)
    except pynvml.NVMLError:
        return None
