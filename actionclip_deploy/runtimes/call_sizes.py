"""How many rows a graph is given in one call: frames, clips or prompts.

Two things bound a call from above. Memory: a ViT-B/16 holds about 10 MB of activations for each
frame of a call. And time: whoever shares the runtime waits until the call is over.

On a CPU, the visual graph computes even fewer frames at a time (`frames_in_caches`); engines and
recorded CUDA graphs exist for some sizes alone (`PROFILES`, `RECORDED_SIZES`).
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace

import numpy as np

from actionclip_deploy.manifest import Manifest, ModelSpec
from actionclip_deploy.runtimes.base import Runtime

FRAMES_PER_CALL = 32
CLIPS_PER_CALL = 8  # of a graph that takes whole clips, so of T times as many frames
PROMPTS_PER_CALL = 64
# Where clips share the runtime with texts: a clip waits no longer than for these.
PROMPTS_BETWEEN_CLIPS = 16
# In the server, where calls are filled by whoever asks; may be set by its owner.
SERVER_CLIPS_PER_CALL = 16

# Profiles that an engine is built for: fewest, usual and most clips of a call; and prompts. They
# are narrow on purpose: the width of a profile changes the kernels that TensorRT chooses, with
# them their speed, and in some versions whether they are right.
PROFILES = {"latency": (1, 1, 1), "throughput": (2, 8, 8)}
PROMPT_PROFILE = (1, 16, PROMPTS_PER_CALL)

# Rows of a recorded call are filled up to one of these; at most a third of the work is for nothing.
RECORDED_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)

TOKENS_IN_CACHES = 800  # of a call; from 400 to 800 there is little between them
# Nearer to the best time of a clip than this, a smaller call is as good.
_AS_GOOD = 1.05
_REPEATS = 3


@dataclass(frozen=True)
class CallSizes:
    """The most rows of one call, by graph."""

    visual: int
    temporal: int
    video: int
    textual: int

    @classmethod
    def of_videos(cls, model: ModelSpec) -> CallSizes:
        """Where a program has the runtime for itself and videos come one after the other.

        As many clips are fused at a time as one call of the visual graph gives, so no video
        waits for others whose frames are not encoded yet.
        """
        return cls(
            visual=FRAMES_PER_CALL,
            temporal=max(1, FRAMES_PER_CALL // model.num_frames),
            video=CLIPS_PER_CALL,
            textual=PROMPTS_PER_CALL,
        )

    @classmethod
    def of_windows(cls, model: ModelSpec) -> CallSizes:
        """Where windows of a stream or a long video come one after the other.

        A window goes through the temporal graph alone, as a video does: the last bits of what
        comes out depend on how many are in the call. The graph is a small part of the work.
        """
        return replace(cls.of_videos(model), temporal=1, video=1)

    @classmethod
    def of_server(cls, model: ModelSpec, max_clips: int) -> CallSizes:
        """Where a call holds at most so many clips; the model's T frames count as one."""
        return cls(
            visual=max_clips * model.num_frames,
            temporal=max_clips,
            video=max_clips,
            textual=PROMPTS_BETWEEN_CLIPS,
        )


def frames_in_caches(manifest: Manifest) -> int | None:
    """How many frames a CPU is to compute at a time; None where a call is not cut.

    Frames do not see each other, so a large call may be cut. Its activations then stay in the
    caches of the processor, and memory does not grow with the call. Measured with one thread on
    an AMD EPYC with 32 MB of shared cache, relative to one call for all frames, at the same bits:
    ViT-B/16 0.98 for 8 frames and 0.86 for 32, ViT-B/32 0.90 for 64.

    Args:
        manifest: Its backbone says the size of a patch, as in `ViT-B-16`; others are not cut.
    """
    found = re.match(r"ViT-\w+-(\d+)", manifest.model.backbone)
    if not found or not int(found[1]):
        return None
    num_tokens = (manifest.model.input_size // int(found[1])) ** 2 + 1
    return max(1, TOKENS_IN_CACHES // num_tokens)


@dataclass(frozen=True)
class BestCall:
    """The call that a runtime computes best, as it was measured.

    Attributes:
        num_clips: Clips of the smallest call that is about as good per clip as any.
        ms_per_clip: By the clips of a call.
    """

    num_clips: int
    ms_per_clip: dict[int, float]


def measure_best_call(runtime: Runtime, *, max_clips: int, budget_seconds: float) -> BestCall:
    """Run calls of growing size, which warms the runtime up, and find the best.

    Sizes double up to `max_clips`; those that the budget has no time for are left out.
    """
    sizes = [1]
    while sizes[-1] < max_clips:
        sizes.append(min(2 * sizes[-1], max_clips))
    start = time.perf_counter()
    found: dict[int, float] = {}
    for size in sizes:
        spent = time.perf_counter() - start
        if found and 2 * size * min(found.values()) / 1000 > budget_seconds - spent:
            break
        found[size] = min(_seconds(runtime, size) for _ in range(_REPEATS)) * 1000 / size
    best = min(found.values())
    smallest = min(size for size, ms in found.items() if ms <= best * _AS_GOOD)
    return BestCall(smallest, {size: round(ms, 3) for size, ms in found.items()})


def _seconds(runtime: Runtime, num_clips: int) -> float:
    model = runtime.manifest.model
    shape = (num_clips, model.num_frames, model.input_size, model.input_size, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    started = time.perf_counter()
    runtime.encode_video(frames)
    return time.perf_counter() - started
