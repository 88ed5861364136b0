"""Runtimes: what executes the graphs of a bundle, behind one protocol.

base.py    the protocol
ort.py     ONNX Runtime
pyt.py     PyTorch, the reference, from the checkpoint itself
parity.py  agreement of a runtime with the reference
machine.py what this machine has
"""

from __future__ import annotations

from pathlib import Path

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.runtimes.base import Runtime, RuntimeInfo

__all__ = ["RUNTIMES", "Runtime", "RuntimeInfo", "open_runtime"]


def open_runtime(
    bundle: Bundle,
    name: str = "onnxruntime",
    *,
    execution_provider: str = "cpu",
    num_threads: int | None = None,
    checkpoint: Path | None = None,
    base: Path | None = None,
) -> Runtime:
    """Open a bundle in a runtime; use it as a context manager.

    Args:
        bundle: The bundle to execute.
        name: `onnxruntime`, or `torch` for the reference.
        execution_provider: ONNX Runtime's execution provider, as `cpu`, `cuda` or its own name;
            for `torch` the device, `cpu` or `cuda`.
        num_threads: Threads of one call on the CPU; None takes the cores that this process may
            use. For `torch` it is a setting of the whole process, and None changes nothing.
        checkpoint: For `torch`, the checkpoint that the bundle was exported from.
        base: For `torch`, the checkpoint that supplied a tower, where there was one.

    Raises:
        ValueError: If there is no such runtime or execution provider, or the checkpoint is
            missing or not of use.
        BundleError: If the checkpoint is not the one that the bundle was exported from.
        MissingExtraError: If the runtime is not installed.
        RuntimeUnavailableError: If it cannot be used on this machine.
    """
    if name not in RUNTIMES:
        raise ValueError(f"name is {name!r}; it must be one of {', '.join(RUNTIMES)}.")
    return RUNTIMES[name](bundle, execution_provider, num_threads, checkpoint, base)


def _open_onnxruntime(
    bundle: Bundle,
    execution_provider: str,
    num_threads: int | None,
    checkpoint: Path | None,
    base: Path | None,
) -> Runtime:
    from actionclip_deploy.runtimes.ort import OrtRuntime

    if checkpoint is not None or base is not None:
        raise ValueError(
            f"checkpoint is {checkpoint} and base is {base}; onnxruntime executes the bundle's own "
            "graphs: leave both out, or ask for the torch runtime."
        )
    return OrtRuntime(bundle, execution_provider=execution_provider, num_threads=num_threads)


def _open_torch(
    bundle: Bundle,
    execution_provider: str,
    num_threads: int | None,
    checkpoint: Path | None,
    base: Path | None,
) -> Runtime:
    from actionclip_deploy.runtimes.pyt import TorchRuntime

    if checkpoint is None:
        raise ValueError(
            "No checkpoint was given, and the torch runtime needs the one that the bundle was "
            f"exported from, {bundle.manifest.source.file}; give it as checkpoint (--checkpoint)."
        )
    return TorchRuntime.from_bundle(
        bundle, checkpoint, base, device=execution_provider, num_threads=num_threads
    )


RUNTIMES = {"onnxruntime": _open_onnxruntime, "torch": _open_torch}
