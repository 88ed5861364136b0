"""TensorRT and TensorRT for RTX: loading one, or saying why not, and hearing what it says."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from actionclip_deploy.errors import MissingExtraError, RuntimeUnavailableError
from actionclip_deploy.installation import pip_install
from actionclip_deploy.runtimes.machine import cuda_devices, version_numbers

logger = logging.getLogger(__name__)

EngineRuntime = Literal["tensorrt", "tensorrt-rtx"]
ENGINE_RUNTIMES: tuple[EngineRuntime, ...] = ("tensorrt", "tensorrt-rtx")

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
_PACKAGES = {"tensorrt": "tensorrt-cu13", "tensorrt-rtx": "tensorrt-rtx"}
_TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}

# First version whose strongly typed networks and calls are those that are used here, and the last
# major version that was examined.
_OLDEST = {"tensorrt": (10, 3), "tensorrt-rtx": (1, 5)}
_NEWEST_MAJOR = {"tensorrt": 11, "tensorrt-rtx": 1}

_ROOT = Path("/")


@dataclass(frozen=True)
class Api:
    """A loaded TensorRT."""

    name: EngineRuntime  # which one, as `open_runtime` takes it
    trt: Any  # the Python module
    version: str

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT for RTX, which compiles for GPUs that are not there."""
        return self.name == "tensorrt-rtx"

    @property
    def title(self) -> str:
        """Name and version for messages."""
        return f"{_TITLES[self.name]} {self.version}"


def load_api(name: EngineRuntime, *, root: Path = _ROOT) -> Api:
    """Import TensorRT; `root` is where `/etc` is, another one in tests.

    Raises:
        MissingExtraError: If it is not installed.
        RuntimeUnavailableError: If it cannot be loaded, or is older or newer than what is known.
    """
    module = _MODULES[name]
    try:
        trt = importlib.import_module(module)
    except ModuleNotFoundError as exc:
        if exc.name != module:
            raise _cannot_load(name, exc) from exc
        if name == "tensorrt" and (root / "etc/nv_tegra_release").exists():
            raise RuntimeUnavailableError(
                "TensorRT's Python module is missing; on a Jetson it is part of JetPack: run "
                "sudo apt install python3-libnvinfer, and create the environment with "
                "python3 -m venv --system-site-packages."
            ) from exc
        raise MissingExtraError(f"The {name} runtime", _EXTRAS[name]) from exc
    except (ImportError, OSError) as exc:
        raise _cannot_load(name, exc) from exc
    version = str(trt.__version__)
    numbers = version_numbers(version)[:2]
    oldest, newest = _OLDEST[name], _NEWEST_MAJOR[name]
    if not oldest <= numbers < (newest + 1,):
        side = "old" if numbers < oldest else "new"
        raise RuntimeUnavailableError(
            f"{_TITLES[name]} {version} is too {side}: {oldest[0]}.{oldest[1]} to {newest}.x are "
            "known to this version of actionclip-deploy; install one of these"
            f"{'' if side == 'old' else ', or a newer actionclip-deploy'}."
        )
    return Api(name, trt, version)


def require_gpu(api: Api) -> None:
    """Do nothing where the CUDA driver gives a GPU to this process.

    Checked before TensorRT is used: without a driver it gives null pointers, or ends the process.

    Raises:
        RuntimeUnavailableError: If it gives none.
    """
    devices, why_none = cuda_devices()
    if not devices:
        raise RuntimeUnavailableError(
            f"{api.title} needs an NVIDIA GPU with its driver, and {why_none}; run this on the "
            "device that the engine is for, in a container with --gpus all or --runtime nvidia."
        )


def _cannot_load(name: EngineRuntime, exc: Exception) -> RuntimeUnavailableError:
    return RuntimeUnavailableError(
        f"{_TITLES[name]} is installed but its libraries cannot be loaded ({exc}); install the "
        f"libraries of the same version, or run: {pip_install()} --force-reinstall "
        f"{_PACKAGES[name]}"
    )


class MessageLog:
    """Keeps the errors of TensorRT, whose calls only say that they failed.

    Attributes:
        logger: What TensorRT's objects take; this object has to live as long as they do.
        errors: The errors so far.
    """

    def __init__(self, trt: Any) -> None:
        self.errors: list[str] = []
        errors = self.errors

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    errors.append(str(message).strip())
                elif severity == trt.ILogger.WARNING:
                    logger.debug("%s", message)

        self.logger = Logger()

    def text(self) -> str:
        """The last errors in one line, or that there were none."""
        return "; ".join(self.errors[-3:]) or "it gave no reason"
