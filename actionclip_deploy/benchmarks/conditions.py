"""What surrounds a measurement: clocks, load, and which code it was."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from actionclip_deploy.benchmarks.power import open_nvml
from actionclip_deploy.benchmarks.report import Conditions
from actionclip_deploy.errors import MissingExtraError
from actionclip_deploy.runtimes.machine import describe_machine, installed_versions

try:
    import psutil
except ImportError as exc:
    raise MissingExtraError("actionclip benchmark", "benchmark") from exc

_PACKAGE = Path(__file__).resolve().parents[1]


class ConditionsReader:
    """Reads what the machine is doing; None for what it does not tell."""

    def __init__(self) -> None:
        self._nvml = open_nvml()
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
