"""`auto`: the fastest runtime that is installed and agrees with PyTorch on this device.

Each candidate is opened, verified against the bundle's golden outputs and timed. What came out is
kept in the cache under a key of the bundle's graphs, the machine, the installed versions and the
engines that there are, so that only the first start takes that time. What was chosen, and why the
others were not, is logged as information. If one that runs here disagreed with PyTorch, the start
that found it out logs a warning, which Python shows where nobody configures logging.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import (
    ActionClipError,
    DamagedFileError,
    FileWriteError,
    IntegrityError,
    ParityError,
    RuntimeUnavailableError,
)
from actionclip_deploy.installation import install_command
from actionclip_deploy.keyed_store import Store, cache_folder
from actionclip_deploy.runtimes.base import Runtime, median_latency_ms
from actionclip_deploy.runtimes.machine import cpu_identity, cuda_devices, installed_versions
from actionclip_deploy.runtimes.parity import verify_bundle
from actionclip_deploy.runtimes.trt.api import ENGINE_RUNTIMES
from actionclip_deploy.runtimes.trt.store import engines_folder, graph_hashes

logger = logging.getLogger(__name__)

Opener = Callable[[str, str], Runtime]

# Where ONNX Runtime's execution providers compute.
_ON_DEVICE = {
    "cpu": ("CPUExecutionProvider", "DnnlExecutionProvider", "OpenVINOExecutionProvider"),
    "cuda": (
        *("TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"),
        "CUDAExecutionProvider",
    ),
}


@dataclass(frozen=True)
class Trial:
    """One candidate and what came of it.

    Attributes:
        runtime: Its name.
        execution_provider: ONNX Runtime's; empty for the others.
        latency_ms: Median of one clip from host memory to its embedding; None if it is not to be
            used.
        why_not: Why it is not to be used; None if it is.
        is_wrong: Whether it runs here and disagrees with PyTorch.
    """

    runtime: str
    execution_provider: str
    latency_ms: float | None
    why_not: str | None
    is_wrong: bool = False

    @property
    def title(self) -> str:
        """In words."""
        return self.runtime + (f" on {self.execution_provider}" if self.execution_provider else "")


def open_fastest(
    bundle: Bundle,
    opener: Opener,
    *,
    device: str | None = None,
    cache: bool | str | Path = True,
) -> Runtime:
    """Open the fastest runtime that passes verification on this device.

    Args:
        bundle: The bundle.
        opener: Opens a runtime, given its name and execution provider.
        device: As for `open_runtime`, for the fastest of those that run there; None for all.
            OpenVINO is one of them on a device of Intel's, or where ONNX Runtime is not installed.
        cache: Folder of the cache; True for the usual one, False to choose anew.

    Raises:
        RuntimeUnavailableError: If none can be used; says why each cannot.
        IntegrityError: If a file of the bundle was altered.
    """
    folder = cache_folder(cache)
    store = None if folder is None else Store(folder / "choices")
    key = None if folder is None else _key(bundle, folder, device)
    known = [] if store is None else _read(store, key)
    best = _best(known)
    if best is not None:
        try:
            runtime = opener(best.runtime, best.execution_provider)
            _tell(best, known, logging.INFO)
            return runtime
        except ActionClipError as exc:
            logger.warning("auto chooses again: %s no longer opens (%s)", best.title, exc)
    trials = [_try(bundle, opener, *candidate) for candidate in _candidates(device)]
    best = _best(trials)
    if best is None:
        reasons = "; ".join(f"{trial.title}: {trial.why_not}" for trial in trials)
        advice = f"Install one, for example with: {install_command('onnxruntime')}"
        if device not in (None, "cpu"):
            advice = f"`actionclip doctor` says what this machine has of {device}"
        raise RuntimeUnavailableError(
            f"No runtime can be used for {bundle.path} on this machine"
            f"{'' if device is None else f' with the device {device}'} ({reasons}). {advice}"
        )
    if store is not None:
        _write(store, key, trials)
    _tell(best, trials, logging.WARNING if any(t.is_wrong for t in trials) else logging.INFO)
    return opener(best.runtime, best.execution_provider)


def _candidates(device: str | None) -> list[tuple[str, str]]:
    """Names and execution providers to try, the likely fastest first."""
    if device not in (None, *_ON_DEVICE):
        return [("openvino", "")]
    others: list[tuple[str, str]] = []
    try:
        from actionclip_deploy.runtimes.ort import available_providers

        providers = list(available_providers())
    except ActionClipError:
        providers = ["cpu"]  # trying it says why it is not there
        if device != "cuda":
            others = [("openvino", "")]
    if device is not None:
        # One that is not there is tried as well, since trying says what is missing.
        providers = [one for one in providers if one in _ON_DEVICE[device]] or [device]
    engines = [] if device == "cpu" else [(name, "") for name in ENGINE_RUNTIMES]
    return [*engines, *(("onnxruntime", provider) for provider in providers), *others]


def _try(bundle: Bundle, opener: Opener, name: str, provider: str) -> Trial:
    try:
        with opener(name, provider) as runtime:
            verify_bundle(bundle, runtime).check()
            return Trial(name, provider, median_latency_ms(runtime), None)
    except IntegrityError:  # of the bundle: no other runtime would help
        raise
    except ActionClipError as exc:
        return Trial(name, provider, None, str(exc), is_wrong=isinstance(exc, ParityError))


def _best(trials: list[Trial]) -> Trial | None:
    usable = [trial for trial in trials if trial.latency_ms is not None]
    return min(usable, key=lambda trial: trial.latency_ms or 0.0, default=None)


def _tell(best: Trial, trials: list[Trial], level: int) -> None:
    others = [
        f"{trial.title} ({trial.why_not or f'{trial.latency_ms:.2f} ms'})"
        for trial in trials
        if trial != best
    ]
    logger.log(
        level,
        "auto chose %s: %.2f ms a clip, verified on this machine. Not chosen: %s",
        *(best.title, best.latency_ms, "; ".join(others) or "nothing else is there"),
    )


def _key(bundle: Bundle, folder: Path, device: str | None) -> dict[str, Any]:
    """Everything that the choice depends on."""
    engines = engines_folder(folder)
    return {
        **({} if device is None else {"device": device}),
        "graphs": graph_hashes(bundle),
        "cpu": cpu_identity(),
        "gpus": cuda_devices()[0],
        "versions": installed_versions(),
        "engines": sorted(path.name for path in engines.glob("[!.]*")),
    }


def _read(store: Store, key: Any) -> list[Trial]:
    """What was found out before; nothing where nothing was, or where it cannot be read."""
    try:
        entry = store.find(key)
        return [] if entry is None else [Trial(**trial) for trial in entry.record["trials"]]
    except (DamagedFileError, FileWriteError, LookupError, TypeError) as exc:
        logger.warning("auto chooses again: what it found before cannot be read (%s)", exc)
        return []


def _write(store: Store, key: Any, trials: list[Trial]) -> None:
    try:
        record = {"trials": [asdict(trial) for trial in trials]}
        store.add(key, lambda _: record, replace=True)
    except FileWriteError as exc:
        logger.warning("what auto found is not kept: %s", exc)
