"""Runtimes: what executes the graphs of a bundle, and `open_runtime`, which opens one of them."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import ArgumentError
from actionclip_deploy.runtimes.base import PREFERENCES, Preference, Runtime, RuntimeInfo
from actionclip_deploy.runtimes.machine import (
    check_num_threads,
    choose_spin_us,
    is_cpu,
    num_available_cores,
)

logger = logging.getLogger(__name__)

__all__ = ["RUNTIMES", "Runtime", "RuntimeInfo", "open_runtime"]


DEVICES = ("cpu", "cuda", "gpu", "npu")
# Those of OpenVINO alone, for whatever runs the graphs otherwise.
_FLOATS = ("fp32", "fp16", "bf16")
_OF_THREADS = ("onnxruntime", "openvino")
_INTEL = re.compile(r"gpu(:\d+)?|npu")


@dataclass(frozen=True)
class _Options:
    """What `open_runtime` was given besides the bundle and the name."""

    device: str | None
    execution_provider: str | None
    precision: str | None
    num_threads: int | None
    checkpoint: Path | None
    base: Path | None
    cache: bool | str | Path
    cuda_graphs: bool
    prefer: Preference
    is_alone: bool


def open_runtime(
    bundle: Bundle,
    name: str = "onnxruntime",
    *,
    device: str | None = None,
    execution_provider: str | None = None,
    precision: str | None = None,
    num_threads: int | None = None,
    checkpoint: Path | None = None,
    base: Path | None = None,
    cache: bool | str | Path = True,
    cuda_graphs: bool = False,
    prefer: Preference = "latency",
    is_alone: bool = False,
) -> Runtime:
    """Open a bundle in a runtime; use it as a context manager.

    Args:
        bundle: The bundle to execute.
        name: `onnxruntime`; `openvino`; `tensorrt` or `tensorrt-rtx` for engines that
            `actionclip build` made; `auto` for the fastest that is installed and verified on this
            device; `torch` for the reference.
        device: Where it runs: `cpu`, `cuda`, or of Intel's `gpu`, `gpu:1` for the second one, or
            `npu`. None is the fastest place for `auto`, the GPU for engines and the CPU for the
            others.
        execution_provider: ONNX Runtime's execution provider in the place of a device, as `cpu`,
            `cuda` or its own name.
        precision: For `openvino`, what it computes in where the graphs are not quantised: `fp32`,
            `fp16` or `bf16`. None takes the precision of the graphs, as the others always do. For
            `auto`, what may be computed in besides, where that is faster.
        num_threads: Threads of one call on the CPU; None takes the cores that this process may
            use, and is all that there is elsewhere than on the CPU. For `torch` it is a setting of
            the whole process, and None changes nothing. `auto` gives it to what it tries on the
            CPU.
        checkpoint: For `torch`, the checkpoint that the bundle was exported from.
        base: For `torch`, the checkpoint that supplied a tower, where there was one.
        cache: Folder of the optimised graphs, which make a second start on the CPU quick, and of
            engines; True for the one of `ACTIONCLIP_CACHE` or else of the platform, False for
            none. `torch` has no use for it.
        cuda_graphs: For onnxruntime on `cuda` and for `tensorrt`: whether to record the work once
            per shape and replay it, which takes less of the CPU for small batches.
        prefer: For `auto`: "latency" for what gives a single clip first, "throughput" for what
            gives many clips in the shortest time. The others have no use for it.
        is_alone: Whether nothing else is to run on the CPU meanwhile, as in a benchmark of the
            runtime alone. Threads of ONNX Runtime that wait for work then do not sleep, see
            `RuntimeInfo.spin_us`.

    Raises:
        EngineError: If there are no engines for this device, or they do not pass verification.
        ValueError: If there is no such runtime, device or execution provider, or the checkpoint is
            missing, or an option is of no use to what was asked for.
        BundleError: If the checkpoint is not the one that the bundle was exported from.
        MissingExtraError: If the runtime is not installed.
        RuntimeUnavailableError: If it cannot be used on this machine.
    """
    if name not in RUNTIMES:
        raise ArgumentError("name", f"is {name!r}; it must be one of {', '.join(RUNTIMES)}.")
    check_num_threads("num_threads", num_threads)
    if device not in (None, *DEVICES) and not _INTEL.fullmatch(device):
        raise ArgumentError(
            "device",
            f"is {device!r}; it must be cpu, cuda, gpu (of Intel, gpu:1 for the second) or npu.",
        )
    if execution_provider is not None and (name != "onnxruntime" or device is not None):
        which = f"the runtime is {name}" if device is None else f"the device is {device}"
        raise ArgumentError(
            "execution_provider",
            f"is {execution_provider!r} and {which}; it chooses among ONNX Runtime's own in the "
            "place of a device: leave it out, or ask for onnxruntime without a device.",
        )
    if precision is not None and name not in ("openvino", "auto"):
        raise ArgumentError(
            "precision",
            f"is {precision!r} and the runtime is {name}, which computes in the precision of the "
            "graphs; leave it out, or ask for openvino or auto.",
        )
    if name == "auto" and precision not in (None, *_FLOATS):
        raise ArgumentError("precision", f"is {precision!r}; it must be {', '.join(_FLOATS)}.")
    if prefer not in PREFERENCES:
        raise ArgumentError("prefer", f"is {prefer!r}; it must be {' or '.join(PREFERENCES)}.")
    options = _Options(
        *(device, execution_provider, precision, num_threads, checkpoint, base, cache),
        *(cuda_graphs, prefer, is_alone),
    )
    return RUNTIMES[name](bundle, options)


def _open_onnxruntime(bundle: Bundle, options: _Options) -> Runtime:
    from actionclip_deploy.runtimes.graph_cache import open_cache
    from actionclip_deploy.runtimes.ort import OrtRuntime

    _refuse_checkpoint("onnxruntime", options)
    _refuse_intel("onnxruntime", options)
    return OrtRuntime(
        bundle,
        execution_provider=options.execution_provider or options.device or "cpu",
        num_threads=options.num_threads,
        spin_us=choose_spin_us(is_alone=options.is_alone),
        cache=open_cache(options.cache),
        cuda_graphs=options.cuda_graphs,
    )


def _open_openvino(bundle: Bundle, options: _Options) -> Runtime:
    from actionclip_deploy.runtimes.graph_cache import open_cache
    from actionclip_deploy.runtimes.ov import OpenVinoRuntime

    _refuse_checkpoint("openvino", options)
    _refuse_cuda_graphs("openvino", options)
    return OpenVinoRuntime(
        bundle,
        device=options.device or "cpu",
        precision=options.precision,
        num_threads=options.num_threads,
        cache=open_cache(options.cache),
    )


def _open_torch(bundle: Bundle, options: _Options) -> Runtime:
    from actionclip_deploy.runtimes.pyt import TorchRuntime

    if options.checkpoint is None:
        raise ArgumentError(
            "checkpoint",
            "is missing, and the torch runtime needs the one that the bundle was exported from; "
            f"give {bundle.manifest.source.file}.",
        )
    _refuse_cuda_graphs("torch", options)
    _refuse_intel("torch", options)
    return TorchRuntime.from_bundle(
        bundle,
        options.checkpoint,
        options.base,
        device=options.device or "cpu",
        num_threads=options.num_threads,
    )


def _open_tensorrt(bundle: Bundle, options: _Options) -> Runtime:
    from actionclip_deploy.runtimes.trt.runtime import open_engines

    _refuse_checkpoint("tensorrt", options)
    _refuse_what_is_of_the_cpu("tensorrt", options)
    return open_engines(bundle, "tensorrt", cache=options.cache, cuda_graphs=options.cuda_graphs)


def _open_tensorrt_rtx(bundle: Bundle, options: _Options) -> Runtime:
    from actionclip_deploy.runtimes.trt.runtime import open_engines

    _refuse_checkpoint("tensorrt-rtx", options)
    _refuse_what_is_of_the_cpu("tensorrt-rtx", options)
    _refuse_cuda_graphs("tensorrt-rtx", options)
    return open_engines(bundle, "tensorrt-rtx", cache=options.cache)


def _refuse_checkpoint(name: str, options: _Options) -> None:
    if options.checkpoint is not None or options.base is not None:
        raise ArgumentError(
            "checkpoint",
            f"is {options.checkpoint} and base is {options.base}; {name} executes "
            "the bundle's own graphs: leave both out, or ask for the torch runtime.",
        )


def _refuse_intel(name: str, options: _Options) -> None:
    if options.device is not None and _INTEL.fullmatch(options.device):
        raise ArgumentError(
            "device",
            f"is {options.device!r}, of Intel's, and {name} runs on cpu and cuda; ask for the "
            "openvino runtime.",
        )


def _refuse_what_is_of_the_cpu(name: str, options: _Options) -> None:
    _refuse_intel(name, options)
    if options.device == "cpu":
        raise ArgumentError(
            "device", f"is 'cpu' and {name} runs on NVIDIA's GPUs alone; leave it out."
        )
    if options.num_threads is not None:
        raise ArgumentError(
            "num_threads",
            f"is {options.num_threads} and the runtime is {name}, whose engines are executed on "
            "the GPU and have no use for it; leave it out.",
        )


def _refuse_cuda_graphs(name: str, options: _Options) -> None:
    if options.cuda_graphs:
        raise ValueError(
            f"cuda_graphs is True and name is {name!r}; only onnxruntime and tensorrt have them."
        )


def _open_auto(bundle: Bundle, options: _Options) -> Runtime:
    from actionclip_deploy.runtimes.auto import Candidate, open_fastest

    _refuse_checkpoint("auto", options)
    _refuse_cuda_graphs("auto", options)

    def opener(candidate: Candidate) -> Runtime:
        name, provider = candidate.runtime, candidate.execution_provider
        is_openvino = name == "openvino"
        on_cpu = options.device in (None, "cpu") if is_openvino else is_cpu(provider)
        return open_runtime(
            bundle,
            name,
            device=options.device if is_openvino else None,
            execution_provider=provider or None,
            precision=candidate.precision or None,
            num_threads=options.num_threads if on_cpu and name in _OF_THREADS else None,
            cache=options.cache,
            is_alone=options.is_alone,
        )

    runtime = open_fastest(
        bundle,
        opener,
        device=options.device,
        precision=options.precision,
        prefer=options.prefer,
        setup=f"{options.num_threads or num_available_cores()} threads"
        + (", alone" if options.is_alone else ""),
        cache=options.cache,
    )
    info = runtime.describe()
    if options.num_threads is not None and info.num_threads is None:
        logger.warning(
            "num_threads is %d, and auto chose %s on %s, which has no use for it",
            *(options.num_threads, info.name, info.execution_provider),
        )
    return runtime


RUNTIMES = {
    "auto": _open_auto,
    "onnxruntime": _open_onnxruntime,
    "openvino": _open_openvino,
    "tensorrt": _open_tensorrt,
    "tensorrt-rtx": _open_tensorrt_rtx,
    "torch": _open_torch,
}
