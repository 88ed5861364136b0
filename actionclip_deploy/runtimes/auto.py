"""`auto`: the fastest runtime that is installed and agrees with PyTorch on this device.

Each candidate is opened, verified against the bundle's golden outputs, and timed in turns with the
best so far, which stays open: at most two are open at a time, and the winner is opened once. What
came out is kept in the cache under a key of the bundle's graphs, the machine, the installed
versions, the engines that there are, and what was asked for, so that only the first start takes
that time. What was chosen, and why the others were not, is logged as information. If one that runs
here disagreed with PyTorch, the start that found it out logs a warning, which Python shows where
nobody configures logging.

Timing a candidate ends after `_DUEL_SECONDS`; verifying it takes the golden clips in calls of five
sizes, once by graph and once the whole way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
from actionclip_deploy.runtimes.base import Preference, Runtime
from actionclip_deploy.runtimes.call_sizes import CallSizes
from actionclip_deploy.runtimes.machine import (
    cpu_identity,
    cuda_devices,
    installed_versions,
)
from actionclip_deploy.runtimes.parity import verify_bundle
from actionclip_deploy.runtimes.trt.api import ENGINE_RUNTIMES
from actionclip_deploy.runtimes.trt.store import engines_folder, graph_hashes

logger = logging.getLogger(__name__)

# Of a duel between two runtimes; they take turns, so that what else the machine does meets both.
_DUEL_SECONDS, _MIN_ROUNDS, _MAX_ROUNDS = 4.0, 3, 11
# What is tried later has to be faster by this share, and OpenVINO by so much of a clip as well: it
# takes twice as long to start as ONNX Runtime, and a choice should not hang on a fraction of that.
_FASTER_SHARE, _FASTER_MS = 0.97, 1.0


@dataclass(frozen=True)
class Candidate:
    """A way to run a bundle.

    Attributes:
        runtime: Its name.
        execution_provider: ONNX Runtime's; empty for the others.
        precision: What it computes in where that is not the graphs' own; empty where it is.
    """

    runtime: str
    execution_provider: str = ""
    precision: str = ""

    @property
    def title(self) -> str:
        """In words."""
        where = f" on {self.execution_provider}" if self.execution_provider else ""
        return self.runtime + where + (f" in {self.precision}" if self.precision else "")


Opener = Callable[[Candidate], Runtime]

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
        candidate: What was tried.
        clip_ms: Milliseconds for a clip from host memory to its embedding, in calls as they were
            asked for, in the last duel that it was in; None if it is not to be used.
        why_not: Why it is not to be used; None if it is.
        is_wrong: Whether it runs here and disagrees with PyTorch.
        is_best: Whether it won.
    """

    candidate: Candidate
    clip_ms: float | None
    why_not: str | None
    is_wrong: bool = False
    is_best: bool = False

    @property
    def title(self) -> str:
        """The candidate in words."""
        return self.candidate.title


def open_fastest(
    bundle: Bundle,
    opener: Opener,
    *,
    device: str | None = None,
    precision: str | None = None,
    prefer: Preference = "latency",
    setup: str = "",
    cache: bool | str | Path = True,
) -> Runtime:
    """Open the fastest runtime that passes verification on this device.

    Args:
        bundle: The bundle.
        opener: Opens a candidate.
        device: As for `open_runtime`, for the fastest of those that run there; None for all.
        precision: What may be computed in besides the precision of the graphs, as `bf16`.
        prefer: Whether a clip alone is to be quick, or many clips, several in a call.
        setup: Whatever else `opener` gives its runtimes, such as threads, as far as speed depends
            on it.
        cache: Folder of the cache; True for the usual one, False to choose anew.

    Raises:
        RuntimeUnavailableError: If none can be used; says why each cannot.
        IntegrityError: If a file of the bundle was altered.
    """
    folder = cache_folder(cache)
    store = None if folder is None else Store(folder / "choices")
    key = None if folder is None else _key(bundle, folder, [device, precision, prefer, setup])
    known = [] if store is None else _read(store, key)
    best = _best(known)
    if best is not None:
        try:
            runtime = opener(best.candidate)
            _tell(best, known, logging.INFO, "takes, as it chose before,", prefer)
            return runtime
        except ActionClipError as exc:
            logger.warning("auto chooses again: %s no longer opens (%s)", best.title, exc)
    own = bundle.manifest.precision()
    winner, trials = _choose(bundle, opener, _candidates(device, precision, own), prefer)
    best = _best(trials)
    if best is None or winner is None:
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
    level = logging.WARNING if any(t.is_wrong for t in trials) else logging.INFO
    _tell(best, trials, level, "chose", prefer)
    return winner


def _candidates(device: str | None, precision: str | None, own: str) -> list[Candidate]:
    """What to try, the likely fastest first.

    Args:
        device: That was asked for.
        precision: What may be computed in besides that of the graphs.
        own: That of the graphs.
    """
    openvino = [Candidate("openvino")]
    if precision is not None and precision != own:
        openvino.insert(0, Candidate("openvino", precision=precision))
    if device not in (None, *_ON_DEVICE):
        return openvino
    try:
        from actionclip_deploy.runtimes.ort import available_providers

        providers = list(available_providers())
    except ActionClipError:
        providers = ["cpu"]  # trying it says why it is not there
    if device is not None:
        # One that is not there is tried as well, since trying says what is missing.
        providers = [one for one in providers if one in _ON_DEVICE[device]] or [device]
    engines = [] if device == "cpu" else [Candidate(name) for name in ENGINE_RUNTIMES]
    of_ort = [Candidate("onnxruntime", provider) for provider in providers]
    return [*engines, *of_ort, *(openvino if device != "cuda" else [])]


def _choose(
    bundle: Bundle, opener: Opener, candidates: list[Candidate], prefer: Preference
) -> tuple[Runtime | None, list[Trial]]:
    """Try candidates one after the other; gives the winner, open, and what came of each."""
    winner: Runtime | None = None
    trials: dict[Candidate, Trial] = {}
    best: Candidate | None = None
    with ExitStack() as stack:
        for candidate in candidates:
            challenger = None
            try:
                challenger = opener(candidate)
                verify_bundle(bundle, challenger).check()
                mine, other = _duel(challenger, winner, prefer)
            except IntegrityError:  # of the bundle: no other runtime would help
                _close(challenger)
                raise
            except ActionClipError as exc:
                _close(challenger)
                is_wrong = isinstance(exc, ParityError)
                trials[candidate] = Trial(candidate, None, str(exc), is_wrong=is_wrong)
                continue
            except BaseException:
                _close(challenger)
                raise
            trials[candidate] = Trial(candidate, mine, None)
            if best is not None and other is not None:
                trials[best] = Trial(best, other, None)
                if not _is_worth_it(candidate, mine, other):
                    _close(challenger)
                    continue
            stack.close()
            winner, best = challenger, candidate
            stack.callback(_close, winner)
        stack.pop_all()
    if best is not None:
        trials[best] = Trial(best, trials[best].clip_ms, None, is_best=True)
    return winner, list(trials.values())


def _is_worth_it(candidate: Candidate, mine: float, other: float) -> bool:
    """Whether a candidate is so much faster than the best before it, in ms a clip."""
    margin = _FASTER_MS if candidate.runtime == "openvino" else 0.0
    return mine < _FASTER_SHARE * other and mine < other - margin


def _close(runtime: Runtime | None) -> None:
    if runtime is not None:
        runtime.close()


def _duel(one: Runtime, other: Runtime | None, prefer: Preference) -> tuple[float, float | None]:
    """Time the calls of two runtimes in turns; gives the milliseconds a clip of each.

    The shortest of all rounds, which what else the machine does disturbs least.
    """
    model = one.manifest.model
    num_clips = 1 if prefer == "latency" else CallSizes.of_videos(model).temporal
    shape = (num_clips, model.num_frames, model.input_size, model.input_size, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    runtimes = [one] if other is None else [one, other]
    times: list[list[float]] = [[] for _ in runtimes]
    end = time.perf_counter() + _DUEL_SECONDS
    for runtime in runtimes:
        runtime.encode_video(frames)  # warm
    while len(times[0]) < _MAX_ROUNDS:
        if len(times[0]) >= _MIN_ROUNDS and time.perf_counter() > end:
            break
        for runtime, mine in zip(runtimes, times, strict=True):
            started = time.perf_counter()
            runtime.encode_video(frames)
            mine.append((time.perf_counter() - started) * 1000 / num_clips)
    return min(times[0]), min(times[1]) if other is not None else None


def _best(trials: list[Trial]) -> Trial | None:
    return next((trial for trial in trials if trial.is_best), None)


def _tell(best: Trial, trials: list[Trial], level: int, how: str, prefer: Preference) -> None:
    calls = "" if prefer == "latency" else ", several in a call"
    slower = [f"{t.title} {t.clip_ms:.2f}" for t in trials if t.clip_ms and not t.is_best]
    absent = [trial.title for trial in trials if trial.clip_ms is None and not trial.is_wrong]
    wrong = [f"{trial.title} disagrees: {trial.why_not}" for trial in trials if trial.is_wrong]
    found = [
        f"auto {how} {best.title}: {best.clip_ms:.2f} ms a clip{calls}, verified on this machine",
        *([f"slower: {', '.join(slower)}"] if slower else []),
        *([f"not usable here: {', '.join(absent)}"] if absent else []),
        *wrong,
    ]
    logger.log(level, "%s", "; ".join(found))
    for trial in trials:
        if trial.why_not is not None:
            logger.debug("not usable here: %s (%s)", trial.title, trial.why_not)


def _key(bundle: Bundle, folder: Path, asked: list[str | None]) -> dict[str, Any]:
    """Everything that the choice depends on."""
    engines = engines_folder(folder)
    return {
        "asked": asked,
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
        if entry is None:
            return []
        return [
            Trial(**{**trial, "candidate": Candidate(**trial["candidate"])})
            for trial in entry.record["trials"]
        ]
    except (DamagedFileError, FileWriteError, LookupError, TypeError) as exc:
        logger.warning("auto chooses again: what it found before cannot be read (%s)", exc)
        return []


def _write(store: Store, key: Any, trials: list[Trial]) -> None:
    try:
        record = {"trials": [asdict(trial) for trial in trials]}
        store.add(key, lambda _: record, replace=True)
    except FileWriteError as exc:
        logger.warning("what auto found is not kept: %s", exc)
