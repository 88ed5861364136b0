"""Runtimes: what executes the graphs of a bundle, and `open_runtime`, which opens one of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.runtimes.base import Runtime, RuntimeInfo
from actionclip_deploy.runtimes.machine import check_num_threads, is_cpu

logger = logging.getLogger(__name__)

__all__ = ["RUNTIMES", "Runtime", "RuntimeInfo", "open_runtime"]


@dataclass(frozen=True)
class _Options:
    """What `open_runtime` was given besides the bundle and the name."""

    execution_provider: str
    num_threads: int | None
    checkpoint: Path | None
    base: Path | None
    cache: bool | str | Path
    cuda_graphs: bool


def open_runtime(
    bundle: Bundle,
    name: str = "onnxruntime",
    *,
    execution_provider: str = "cpu",
    num_threads: int | None = None,
    checkpoint: Path | None = None,
    base: Path | None = None,
    cache: bool | str | Path = True,
    cuda_graphs: bool = False,
) -> Runtime:
    """Open a bundle in a runtime; use it as a context manager.

    Args:
        bundle: The bundle to execute.
        name: `onnxruntime`; `tensorrt` or `tensorrt-rtx` for engines that `actionclip build`
            made; `auto` for the fastest that is installed and verified on this device; `torch`
            for the reference.
        execution_provider: ONNX Runtime's execution provider, as `cpu`, `cuda` or its own name;
            for `torch` the device, `cpu` or `cuda`. `auto` and engines have no choice of it.
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

    Raises:
        EngineError: If there are no engines for this device, or they do not pass verification.
        ValueError: If there is no such runtime or execution provider, or the checkpoint is
            missing, or an option is of no use to what was asked for.
        BundleError: If the checkpoint is not the one that the bundle was exported from.
        MissingExtraError: If the runtime is not installed.
        RuntimeUnavailableError: If it cannot be used on this machine.
    """
    if name not in RUNTIMES:
        raise ValueError(f"name is {name!r}; it must be one of {', '.join(RUNTIMES)}.")
    check_num_threads("num_threads", num_threads)
    options = _Options(execution_provider, num_threads, checkpoint, base, cache, cuda_graphs)
    return RUNTIMES[name](bundle, options)


def _open_onnxruntime(bundle: Bundle, options: _Options) -> Runtime:
    from actionclip_deploy.runtimes.graph_cache import open_cache
    from actionclip_deploy.runtimes.ort import OrtRuntime

    _refuse_checkpoint("onnxruntime", options)
    return OrtRuntime(
        bundle,
        execution_provider=options.execution_provider,
        num_threads=options.num_threads,
        cache=open_cache(options.cache),
        cuda_graphs=options.cuda_graphs,
    )


def _open_torch(bundle: Bundle, options: _Options) -> Runtime:
    from actionclip_deploy.runtimes.pyt import TorchRuntime

    if options.checkpoint is None:
        raise ValueError(
            "No checkpoint was given, and the torch runtime needs the one that the bundle was "
            f"exported from, {bundle.manifest.source.file}; give it as checkpoint (--checkpoint)."
        )
    _refuse_cuda_graphs("torch", options)
    return TorchRuntime.from_bundle(
        bundle,
        options.checkpoint,
        options.base,
        device=options.execution_provider,
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
        raise ValueError(
            f"checkpoint is {options.checkpoint} and base is {options.base}; {name} executes "
            "the bundle's own graphs: leave both out, or ask for the torch runtime."
        )


def _refuse_what_is_of_the_cpu(name: str, options: _Options) -> None:
    if options.num_threads is not None:
        raise ValueError(
            f"num_threads is {options.num_threads} and name is {name!r}, whose engines are "
            "executed on the GPU and have no use for it; leave it out."
        )
    if not is_cpu(options.execution_provider):
        raise ValueError(
            f"execution_provider is {options.execution_provider!r} and name is {name!r}, whose "
            "engines are executed on the GPU in any case; leave it out, or ask for onnxruntime."
        )


def _refuse_cuda_graphs(name: str, options: _Options) -> None:
    if options.cuda_graphs:
        raise ValueError(
            f"cuda_graphs is True and name is {name!r}; only onnxruntime and tensorrt have them."
        )


def _open_auto(bundle: Bundle, options: _Options) -> Runtime:
    from actionclip_deploy.runtimes.auto import open_fastest

    _refuse_checkpoint("auto", options)
    _refuse_cuda_graphs("auto", options)
    if options.execution_provider != "cpu":
        raise ValueError(
            f"execution_provider is {options.execution_provider!r} and name is 'auto', which "
            "chooses it; leave it out, or ask for onnxruntime."
        )

    def opener(name: str, execution_provider: str) -> Runtime:
        takes_threads = name == "onnxruntime" and is_cpu(execution_provider)
        return open_runtime(
            bundle,
            name,
            execution_provider=execution_provider or "cpu",
            num_threads=options.num_threads if takes_threads else None,
            cache=options.cache,
        )

    runtime = open_fastest(bundle, opener, cache=options.cache)
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
    "tensorrt": _open_tensorrt,
    "tensorrt-rtx": _open_tensorrt_rtx,
    "torch": _open_torch,
}
