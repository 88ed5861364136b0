"""What this machine is: cores that may be used, CPU, memory, GPUs, Jetson, installed libraries.

Everything is read from files of the kernel, from the driver's library and from package metadata;
no framework is imported into this process.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from actionclip_deploy.errors import ArgumentError
from actionclip_deploy.files import sha256_of

_ROOT = Path("/")  # where /etc, /proc, /sys and /var are; another one in tests

# Instruction sets that decide how fast the CPU kernels of the runtimes are: x86, then Arm.
CPU_FLAGS = (
    *("avx2", "f16c", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni"),
    *("avx_ne_convert",),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)


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
    return sha256_of(text)[:16]


# Instructions that multiply bf16, of x86 and of Arm.
BF16_FLAGS = frozenset(("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"))


def cpu_has_bf16(root: Path = _ROOT) -> bool:
    """Whether the CPU multiplies bf16 by itself; False where that cannot be found out.

    Args:
        root: Where `/proc` is; another one in tests.
    """
    return bool(BF16_FLAGS & _cpu_flags(read_file(root / "proc/cpuinfo")))


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


def read_file(path: Path) -> str:
    """Text of a file of the system, without zeros and line ends around it; empty for none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


# Cores and memory that this process may use


def num_cores() -> int:
    """The cores that this process may be placed on, whatever its share of their time is."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no affinity
        return os.cpu_count() or 1


def num_available_cores(root: Path = _ROOT) -> int:
    """How many cores this process may really use.

    In a container the machine's count is misleading twice: the process may be pinned to some of
    the cores, and a quota may give it only part of their time. A quota of 1.5 cores counts as 2,
    since one thread would leave half a core unused.

    Args:
        root: Where `/proc` and `/sys` are; another one in tests.
    """
    cores, quota = num_cores(), cpu_quota(root)
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


# Bounds of what is asked of this machine

_THREADS_PER_CORE, _MIN_THREAD_BOUND = 4, 32
_MAX_SECONDS = 10_000_000.0  # 115 days
_MAX_SPIN_US = 1_000_000
_MEMORY_SHARE = 4  # one thing that was asked for takes at most a quarter


def is_cpu(execution_provider: str) -> bool:
    """Whether this is a name of the CPU: `cpu`, or ONNX Runtime's own."""
    return execution_provider.lower() in ("cpu", "cpuexecutionprovider")


def check_num_threads(name: str, number: int | None, *, root: Path = _ROOT) -> None:
    """Refuse a number of threads or processes that this machine would only suffer from.

    Raises:
        ValueError: If it is below 1 or above the bound, which is named.
    """
    if number is None:
        return
    if number < 1:
        raise ArgumentError(name, f"is {number}; it must be 1 or more, or None.")
    cores = num_available_cores(root)
    bound = max(_MIN_THREAD_BOUND, _THREADS_PER_CORE * cores)
    if number > bound:
        raise ArgumentError(
            name, f"is {number}; with the {cores} cores that there are, it may be {bound} at most."
        )


# Threads that wait for work

SPIN_VARIABLE = "ACTIONCLIP_SPIN_US"


def choose_spin_us(
    *, is_alone: bool = False, environment: Mapping[str, str] = os.environ, root: Path = _ROOT
) -> int | None:
    """How long threads of a runtime that have no work look for some before they sleep.

    A thread that looks on need not be woken, and keeps a core from whoever else has work for it:
    threads that read videos, HTTP, another program. So threads sleep, unless nothing else runs.

    Args:
        is_alone: Whether nothing else is to run meanwhile, as in a benchmark.
        environment: Where `ACTIONCLIP_SPIN_US` says otherwise: microseconds, or -1 for the
            runtime's own way; another one in tests.
        root: Where `/proc` and `/sys` are; another one in tests.

    Returns:
        Microseconds; 0 where they sleep at once, None where the runtime is left to itself.

    Raises:
        ArgumentError: If the variable is not such a number.
    """
    given = environment.get(SPIN_VARIABLE, "").strip()
    if given == "-1":
        return None
    if given:
        if not given.isdecimal() or int(given) > _MAX_SPIN_US:
            raise ArgumentError(
                SPIN_VARIABLE,
                f"is {given!r}; give microseconds, {_MAX_SPIN_US:,} at most, 0 for threads that "
                "sleep at once, or -1 for the runtime's own way.",
            )
        return int(given)
    # In a container with a quota, the time of threads that do nothing is taken off it.
    return None if is_alone and cpu_quota(root) is None else 0


def check_seconds(name: str, seconds: float) -> None:
    """Refuse a time that is none, or so long that a system's clocks and queues do not take it.

    Raises:
        ArgumentError: If it is not above 0, or above the bound, which is named.
    """
    if not 0 < seconds <= _MAX_SECONDS:
        raise ArgumentError(
            name, f"is {seconds}; it must be a positive number, {_MAX_SECONDS:,.0f} at most."
        )


def check_memory(name: str, number: int, bytes_each: int, *, root: Path = _ROOT) -> None:
    """Refuse a number of things that the memory of this machine has no room for.

    Args:
        name: Of the number, in the message.
        number: How many.
        bytes_each: What one takes at the least.
        root: Where `/proc` and `/sys` are; another one in tests.

    Raises:
        ValueError: If they take more than a quarter of the memory; says how many may be.
    """
    known = [size for size in (_memory_bytes(root), memory_limit_bytes(root)) if size]
    if not known:
        return
    bound = max(1, min(known) // _MEMORY_SHARE // max(1, bytes_each))
    if number > bound:
        raise ArgumentError(
            name,
            f"is {number}, which takes {number * bytes_each / 2**30:.1f} GiB or more; this "
            f"machine has {min(known) / 2**30:.1f} GiB, so it may be {bound} at most.",
        )


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


def _is_count(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


# NVIDIA GPUs, as the CUDA driver tells them

# CUDA driver API, cuda.h: CUdevice_attribute.
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: As the driver calls it.
        compute_capability: Such as `8.7`.
        memory_bytes: All of it; on a Jetson, that of the board.
    """

    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Gpus:
    """What the CUDA driver gives to this process.

    Attributes:
        found: The GPUs; may be none.
        cuda: Newest CUDA that the driver runs, such as `13.0`; None without a driver.
        missing_because: Why there are none; None where there are.
    """

    found: tuple[Gpu, ...] = ()
    cuda: str | None = None
    missing_because: str | None = None

    def in_words(self) -> list[str]:
        """A line for each GPU."""
        return [
            f"{gpu.name}, compute capability {gpu.compute_capability}, "
            f"{gpu.memory_bytes / 2**30:.1f} GiB, CUDA {self.cuda}"
            for gpu in self.found
        ]


def find_gpus() -> Gpus:
    """The GPUs that the CUDA driver gives to this process, or why there are none."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError as exc:
        return Gpus(missing_because=f"the CUDA driver is not installed ({exc})")
    count = ctypes.c_int()
    code = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if code:
        return Gpus(missing_because=f"the CUDA driver fails with {_error_name(cuda, code)}")
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    return Gpus(
        found=tuple(_describe(cuda, i) for i in range(count.value)),
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
        missing_because=None if count.value else "the CUDA driver shows no device",
    )


def _error_name(cuda: ctypes.CDLL, code: int) -> str:
    name = ctypes.c_char_p()
    cuda.cuGetErrorName(code, ctypes.byref(name))
    return name.value.decode() if name.value else f"error {code}"


def _describe(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    memory, name = ctypes.c_size_t(), ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=f"{major.value}.{minor.value}",
        memory_bytes=memory.value,
    )


def cuda_devices() -> tuple[list[str], str | None]:
    """The GPUs that the CUDA driver gives to this process, in words, and why there are none."""
    gpus = find_gpus()
    return gpus.in_words(), gpus.missing_because


def nvidia_driver(root: Path = _ROOT) -> str | None:
    """Version of NVIDIA's kernel driver; None where there is none.

    Args:
        root: Where `/proc` is; another one in tests.
    """
    found = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", read_file(root / "proc/driver/nvidia/version"))
    return found[0] if found else None


# Jetsons

_QUERY_TIMEOUT_SECONDS = 10

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
            [program, "-q"],
            capture_output=True,
            text=True,
            timeout=_QUERY_TIMEOUT_SECONDS,
            check=False,
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


# Installed libraries

DISTRIBUTIONS = (
    *("actionclip-deploy", "numpy", "pillow", "av", "tokenizers", "ftfy", "safetensors"),
    *("pydantic", "onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
    *(
        "onnxruntime-directml",
        "openvino",
        "onnx",
        "onnxscript",
        "torch",
        "torchvision",
        "open_clip_torch",
    ),
    *("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx", "cuda-python"),
)


def version_numbers(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with, to be compared.

    `10.3.0` gives (10, 3, 0), `6.1 to 6.2.x` gives (6, 1), `7.2.x` gives (7, 2), and a text that
    begins with no number gives ().
    """
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


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


# TensorRT: the Python module and the library, which are installed apart
#
# Everything is loaded in a process of its own, which TensorRT brings down where there is no driver,
# or where its module and its library are of different versions.

_IMPORT_TIMEOUT_SECONDS = 60

# Names of the libraries, newest first.
_LIBRARIES = {
    "tensorrt": (
        ("nvinfer_11.dll", "nvinfer_10.dll")
        if os.name == "nt"
        else ("libnvinfer.so.11", "libnvinfer.so.10", "libnvinfer.so.8")
    ),
    "tensorrt_rtx": () if os.name == "nt" else ("libtensorrt_rtx.so.1",),
}

# Every line is printed as soon as it is known, since the next step may end the process. The
# module comes first: it loads the libraries that pip installed, where nothing else finds them.
_PROGRAM = """
import ctypes, importlib, sys
module, *names = sys.argv[1:]
sys.path = [path for path in sys.path if path]  # a folder here may be called as the module is
try:
    print("module", importlib.import_module(module).__version__, flush=True)
except BaseException as exc:
    print("because", type(exc).__name__, " ".join(str(exc).split()), flush=True)
for name in names:
    try:
        library = ctypes.CDLL(name)
    except OSError:
        continue
    print("library", name, library.getInferLibVersion(), flush=True)
"""


@dataclass(frozen=True)
class TensorRT:
    """An installation of TensorRT, or of TensorRT for RTX.

    Attributes:
        module: Version of the Python module, if it can be imported.
        missing_because: Why it cannot; None where it can.
        libraries: Versions of the libraries that can be loaded, by file name.
    """

    module: str | None = None
    missing_because: str | None = None
    libraries: dict[str, str] = field(default_factory=dict)

    @property
    def version(self) -> str | None:
        """The version to go by: of the module, or else of the first library."""
        return self.module or next(iter(self.libraries.values()), None)


def find_tensorrt(module: str = "tensorrt") -> TensorRT:
    """The TensorRT that is installed.

    Args:
        module: `tensorrt` or `tensorrt_rtx`.
    """
    command = [sys.executable, "-c", _PROGRAM, module, *_LIBRARIES[module]]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_IMPORT_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return TensorRT(missing_because=f"trying it failed ({exc})")
    return _understand(module, done.stdout, done.returncode)


def _understand(module: str, printed: str, code: int) -> TensorRT:
    """What the lines of the program say."""
    found = re.search(r"^module (\S+)$", printed, re.MULTILINE)
    because = re.search(r"^because (\w+) (.*)$", printed, re.MULTILINE)
    libraries = {
        name: _library_version(int(number), module)
        for name, number in re.findall(r"^library (\S+) (\d+)$", printed, re.MULTILINE)
    }
    if found:
        return TensorRT(found[1], None, libraries)
    if because and because[1] == "ModuleNotFoundError" and f"'{module}'" in because[2]:
        return TensorRT(None, "it is not installed", libraries)
    reason = because[2] if because else f"importing it ended Python with code {code}"
    return TensorRT(None, reason, libraries)


def _library_version(number: int, module: str = "tensorrt") -> str:
    """The version that getInferLibVersion gives: 100300 is 10.3.0, 8601 is 8.6.1 as before 10.

    Source: NVIDIA/TensorRT include/NvInferVersion.h, NV_TENSORRT_VERSION.
    """
    step = 1000 if module == "tensorrt" and number < 10000 else 10000
    return f"{number // step}.{number % step // 100}.{number % 100}"
