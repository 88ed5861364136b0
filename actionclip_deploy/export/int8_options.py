"""What an int8 export may be told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.export.calibration import NUM_CALIBRATION_CLIPS
from actionclip_deploy.manifest import Int8Recipe, WeightRange
from actionclip_deploy.runtimes.machine import describe_machine

MIN_COSINE = 0.999
MAX_DROP_POINTS = 0.5

# Instructions that add products of int8 in 32 bits.
_VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


@dataclass(frozen=True)
class Int8Options:
    """How an int8 graph is made and what it has to keep.

    Attributes:
        recipe: `dynamic`, for CPUs, or `static`, which TensorRT takes too and which needs
            calibration; None for static where there are calibration videos.
        weight_range: `reduced` is right on every CPU; `full` needs VNNI on x86, and is a little
            closer to fp32.
        calibration: Video files, and folders of them.
        num_clips: Clips that are taken from them.
        min_cosine: What features have to keep, where no accuracy is measured.
        measure_top1: Gives the accuracy of a bundle in percent; None where there are no annotated
            videos.
        max_drop: Points of it that int8 may cost.
        on_progress: Called with a task in words, what is done and what there is to do.
    """

    recipe: Int8Recipe | None = None
    weight_range: WeightRange = "reduced"
    calibration: tuple[Path, ...] = ()
    num_clips: int = NUM_CALIBRATION_CLIPS
    min_cosine: float = MIN_COSINE
    measure_top1: Callable[[Bundle], float] | None = None
    max_drop: float = MAX_DROP_POINTS
    on_progress: Callable[[str, int, int], None] = lambda *_: None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("recipe", self.recipe, (None, *get_args(Int8Recipe))),
            ("weight_range", self.weight_range, get_args(WeightRange)),
        ):
            if value not in allowed:
                words = ", ".join(str(word) for word in allowed)
                raise ValueError(f"{name} is {value!r}; it must be one of {words}.")
        if self.recipe == "static" and not self.calibration:
            raise ValueError(
                "The recipe static needs calibration videos, from which it takes its scales; give "
                "some, or take the recipe dynamic."
            )
        if self.num_clips < 1:
            raise ValueError(f"num_clips is {self.num_clips}; it must be 1 or more.")
        if not 0 <= self.max_drop <= 100:
            raise ValueError(f"max_drop is {self.max_drop}; it must be 0 to 100 points.")
        if not 0 < self.min_cosine < 1:
            raise ValueError(f"min_cosine is {self.min_cosine}; it must be between 0 and 1.")

    @property
    def chosen_recipe(self) -> Int8Recipe:
        """The recipe that is taken."""
        return self.recipe or ("static" if self.calibration else "dynamic")

    def check_machine(self) -> None:
        """Refuse weights that this CPU, on which the graph is judged, cannot compute with.

        Raises:
            ValueError: If they are full and products saturate here.
        """
        if self.weight_range == "full" and exact_weight_range() != "full":
            raise ValueError(
                "weight_range is full, and this CPU has no VNNI: sums of such products saturate "
                "on it, so the graph cannot be judged here; take reduced weights, or export on a "
                "CPU with VNNI."
            )


def exact_weight_range() -> WeightRange:
    """The largest weights with which this CPU's int8 products do not saturate."""
    machine = describe_machine()
    # Arm's kernels add in 32 bits, or pairs that fit into 16.
    is_arm = machine["architecture"].lower() in ("aarch64", "arm64")
    return "full" if is_arm or _VNNI & set(machine["cpu_flags"]) else "reduced"
