"""Facts about this machine: cores that may be used, CPU, memory, GPUs, installed libraries.

Everything is read from files of the kernel, from the driver's library and from package metadata;
no framework is imported. GPUs are looked for in gpus.py, Jetsons in jetson.py, TensorRT in
nvidia_libraries.py.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from actionclip_deploy.runtimes.gpus import find_gpus
from actionclip_deploy.runtimes.jetson import read_file, read_jetson

# Instruction sets that decide how fast the CPU kernels of the runtimes are: x86, then Arm.
CPU_FLAGS = (
    *("avx2", "f16c", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)

DISTRIBUTIONS = (
    *("actionclip-deploy", "numpy", "pillow", "av", "tokenizers", "ftfy", "safetensors"),
    *("pydantic", "onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
    *("onnxruntime-directml", "onnx", "onnxscript", "torch", "torchvision", "open_clip_torch"),
    *("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx", "cuda-python"),
)

_ROOT = Path("/")


def num_available_cores(root: Path = _ROOT) -> int:
    """How many cores this process may really use.

    In a container the machine's count is misleading twice: the process may be pinned to some of
    the cores, and a quota may give it only part of their time. A quota of 1.5 cores counts as 2,
    since one thread would leave half a core unused.

    Args:
        root: Where `/proc` and `/sys` are; another one in tests.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no affinity
        cores = os.cpu_count() or 1
    quota = cpu_quota(root)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def cpu_quota(root: Path = _ROOT) -> float | None:
    """The smallest CPU quota of this process's control groups in cores; None without a quota."""
    given = []
    for folder in _group_folders(root, "cpu"):
        given.append(read_file(folder / "cpu.max").split())
        given.append([read_file(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")])
    # Without a quota the first number is "max" in version 2, and -1 in version 1.
    limited = [pair for pair in given if len(pair) == 2 and all(_is_count(n) for n in pair)]
    return min((int(quota) / int(period) for quota, period in limited), default=None)


def memory_limit_bytes(root: Path = _ROOT) -> int | None:
    """The smallest memory limit of this process's control groups; None without a limit."""
    names = ("memory.max", "memory.limit_in_bytes")
    given = [read_file(folder / n) for folder in _group_folders(root, "memory") for n in names]
    # Version 1 writes "no limit" as a number near 2**63.
    return min((int(n) for n in given if n.isdecimal() and int(n) < 1 << 60), default=None)


def _group_folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that bind this process, from its own up to the top one.

    Inside a container the path that the kernel tells may be the host's and not be there; the
    walk upwards then ends at the folder that is mounted.
    """
    for line in read_file(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if not colon or (controllers and controller not in controllers.split(",")):
            continue
        mounts = (controllers, controller) if controllers else ("", "unified")
        # A path with ".." is one that this process's namespace does not show.
        inner = PurePosixPath("" if ".." in path else path.lstrip("/"))
        for mount in mounts:
            for group in (inner, *inner.parents):
                yield root / "sys/fs/cgroup" / mount / group


def describe_machine(root: Path = _ROOT) -> dict[str, Any]:
    """Facts about this machine, ready for JSON; None where one cannot be found out.

    Args:
        root: Where `/proc`, `/sys` and `/etc` are; another one in tests.
    """
    cpuinfo = read_file(root / "proc/cpuinfo")
    gpus, why_none = cuda_devices()
    jetson = read_jetson(root)
    return {
        "python": platform.python_version(),
        "os": platform.platform(),
        "architecture": platform.machine(),
        "cpu": _cpu_model(root, cpuinfo),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in _cpu_flags(cpuinfo)],
        "cpu_cores": os.cpu_count(),
        "cpu_quota": cpu_quota(root),
        "cpu_cores_available": num_available_cores(root),
        "memory_bytes": _memory_bytes(root),
        "memory_limit_bytes": memory_limit_bytes(root),
        "gpus": gpus,
        "gpus_missing_because": why_none,
        "nvidia_driver": nvidia_driver(root),
        "jetson": jetson.in_words() if jetson else None,
    }


def cpu_identity(root: Path = _ROOT) -> str:
    """Everything that the kernels of a runtime may choose their data layout by, as a short hash.

    Args:
        root: Where `/proc` is; another one in tests.
    """
    cpuinfo = read_file(root / "proc/cpuinfo")
    facts = (platform.system(), platform.machine(), _cpu_model(root, cpuinfo))
    text = " ".join([*map(str, facts), *sorted(_cpu_flags(cpuinfo))])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cuda_devices() -> tuple[list[str], str | None]:
    """The GPUs that the CUDA driver gives to this process, in words, and why there are none."""
    gpus = find_gpus()
    return gpus.in_words(), gpus.missing_because


def installed_versions() -> dict[str, str]:
    """Versions of the distributions that matter here, without those that are not installed."""
    from importlib import metadata  # a twentieth of the package's import, for reports alone

    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def onnxruntime_providers() -> dict[str, str]:
    """Execution providers that the installed ONNX Runtime lists, each with `works` or why not.

    The list alone says little: the GPU build lists CUDA and TensorRT on every machine. So each
    one is tried, in a process of its own.
    """
    from actionclip_deploy.errors import ActionClipError

    try:
        from actionclip_deploy.runtimes.execution_providers import why_unavailable
        from actionclip_deploy.runtimes.ort import available_providers
    except ActionClipError as exc:
        return {"none": str(exc)}
    return {provider: why_unavailable(provider) or "works" for provider in available_providers()}


def _is_count(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def _cpu_flags(cpuinfo: str) -> set[str]:
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return set(found[1].split()) if found else set()


def _cpu_model(root: Path, cpuinfo: str) -> str | None:
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    if found:
        return found[1]
    # Arm boards name themselves in the device tree instead.
    return read_file(root / "proc/device-tree/model") or platform.processor() or None


def _memory_bytes(root: Path) -> int | None:
    found = re.search(r"^MemTotal:\s*(\d+) kB$", read_file(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def nvidia_driver(root: Path = _ROOT) -> str | None:
    """Version of NVIDIA's kernel driver; None where there is none.

    Args:
        root: Where `/proc` is; another one in tests.
    """
    found = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", read_file(root / "proc/driver/nvidia/version"))
    return found[0] if found else None
