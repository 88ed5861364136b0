"""Which TensorRT is here: the Python module, the library, and the one ONNX Runtime is linked to.

Everything is loaded in a process of its own, which TensorRT brings down where there is no driver,
or where its module and its library are of different versions.
"""

from __future__ import annotations

import ctypes
import importlib.util
import io
import logging
import os
import platform
import re
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from actionclip_deploy.runtimes.elf import needed_libraries

logger = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 60

# Names of the libraries, newest first.
_LIBRARIES = {
    "tensorrt": (
        ("nvinfer_11.dll", "nvinfer_10.dll")
        if os.name == "nt"
        else ("libnvinfer.so.11", "libnvinfer.so.10", "libnvinfer.so.8")
    ),
    "tensorrt_rtx": () if os.name == "nt" else ("libtensorrt_rtx.so.1",),
}

# What pip takes for a major version. The wheels of ONNX Runtime that link TensorRT 10 want CUDA 13.
_PINS = {"10": "tensorrt-cu13>=10.16,<11", "11": "tensorrt-cu13>=11,<12"}

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

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def find_tensorrt(module: str = "tensorrt") -> TensorRT:
    """The TensorRT that is installed.

    Args:
        module: `tensorrt` or `tensorrt_rtx`.
    """
    command = [sys.executable, "-c", _PROGRAM, module, *_LIBRARIES[module]]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return TensorRT(missing_because=f"trying it failed ({exc})")
    return _understand(module, done.stdout, done.returncode)


def _understand(module: str, printed: str, code: int) -> TensorRT:
    """What the lines of the program say."""
    found = re.search(r"^module (\S+)$", printed, re.MULTILINE)
    because = re.search(r"^because (\w+) (.*)$", printed, re.MULTILINE)
    libraries = {
        name: library_version(int(number), module)
        for name, number in re.findall(r"^library (\S+) (\d+)$", printed, re.MULTILINE)
    }
    if found:
        return TensorRT(found[1], None, libraries)
    if because and because[1] == "ModuleNotFoundError" and f"'{module}'" in because[2]:
        return TensorRT(None, "it is not installed", libraries)
    reason = because[2] if because else f"importing it ended Python with code {code}"
    return TensorRT(None, reason, libraries)


def library_version(number: int, module: str = "tensorrt") -> str:
    """The version that getInferLibVersion gives: 100300 is 10.3.0, 8601 is 8.6.1 as before 10.

    Source: NVIDIA/TensorRT include/NvInferVersion.h, NV_TENSORRT_VERSION.
    """
    step = 1000 if module == "tensorrt" and number < 10000 else 10000
    return f"{number // step}.{number % step // 100}.{number % 100}"


def linked_by_onnxruntime() -> str | None:
    """The TensorRT library that the installed ONNX Runtime's provider is linked to.

    Returns:
        Such as `libnvinfer.so.10`; None where ONNX Runtime has no such provider, or is no Linux's.
    """
    spec = importlib.util.find_spec("onnxruntime")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "capi" / "libonnxruntime_providers_tensorrt.so"
        try:
            names = needed_libraries(path)
        except (OSError, ValueError):
            continue
        return next((name for name in names if name.startswith("libnvinfer.so")), None)
    return None


def preload_libraries(provider: str, api: Any) -> None:
    """Load the libraries of an execution provider from their Python packages.

    The system's are loaded by the provider itself; nothing happens where pip installed none.

    Args:
        provider: ONNX Runtime's name of it.
        api: The module onnxruntime.
    """
    if provider.startswith(("CUDA", "Tensorrt")) and hasattr(api, "preload_dlls"):
        printed = io.StringIO()
        with redirect_stdout(printed):
            api.preload_dlls()
        logger.debug("preload_dlls: %s", printed.getvalue().strip())
    if provider.startswith("Tensorrt"):
        _preload_tensorrt()


def _preload_tensorrt() -> None:
    """Load the TensorRT that pip installed, if it is of the version that the provider wants."""
    linked = linked_by_onnxruntime()
    spec = importlib.util.find_spec("tensorrt_libs")
    for folder in (spec.submodule_search_locations or ()) if spec and linked else ():
        for name in (linked or "", (linked or "").replace("nvinfer", "nvonnxparser")):
            if (Path(folder) / name).is_file():
                # What is missing then is said by the provider itself.
                with suppress(OSError):
                    ctypes.CDLL(str(Path(folder) / name))


def why_provider_lacks_tensorrt(
    linked: str | None, found: TensorRT, architecture: str | None = None
) -> str | None:
    """Why ONNX Runtime's TensorRT provider cannot work with what is installed.

    Args:
        linked: What `linked_by_onnxruntime` gives.
        found: The TensorRT that is installed.
        architecture: Of the processor; None for that of this machine.

    Returns:
        One sentence without a full stop; None where nothing speaks against it.
    """
    if linked is None:
        if (architecture or platform.machine()).lower() in ("aarch64", "arm64"):
            return (
                "this onnxruntime has no TensorRT provider, as none of the wheels for aarch64 on "
                "PyPI has; install the wheel made for this JetPack, or use --runtime tensorrt"
            )
        return None
    if linked in found.libraries:
        return None
    major = linked.rpartition(".")[2]
    have = ", ".join(found.libraries.values()) or found.module
    what = f"TensorRT {have} is installed, which it cannot load" if have else "there is none"
    wanted = _PINS.get(major, f"tensorrt of version {major}")
    return (
        f"this onnxruntime is linked to {linked}, of TensorRT {major}, and {what}; install "
        f'"{wanted}" in an environment of its own, or use --runtime tensorrt, which takes TensorRT '
        "10 and 11"
    )
