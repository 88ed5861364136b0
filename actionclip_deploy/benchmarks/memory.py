"""What this process has cost so far: memory on the host and on the GPU, and time to get here."""

from __future__ import annotations

import platform
import re
import time
from pathlib import Path

from actionclip_deploy.errors import MissingExtraError

try:
    import psutil
except ImportError as exc:
    raise MissingExtraError("actionclip benchmark", "benchmark") from exc


def seconds_since_start() -> float:
    """Seconds since the operating system started this process, to about 10 ms."""
    return time.time() - float(psutil.Process().create_time())


def resident_bytes() -> int:
    """Memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The most memory that this process has held."""
    system = platform.system()
    if system == "Windows":
        return int(psutil.Process().memory_info().peak_wset)
    if system == "Linux":
        # Not getrusage: its largest is inherited from the process that started this one.
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else resident_bytes()
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def device_bytes() -> int | None:
    """Memory that this process holds on the GPU, by the driver's count; None where unknown."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        own = psutil.Process().pid
        held = [
            process.usedGpuMemory
            for index in range(pynvml.nvmlDeviceGetCount())
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(
                pynvml.nvmlDeviceGetHandleByIndex(index)
            )
            if process.pid == own and process.usedGpuMemory is not None
        ]
    except pynvml.NVMLError:
        return None
    return sum(held) if held else None
