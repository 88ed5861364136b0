"""What an int8 export may be told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.export.calibration import NUM_CALIBRATION_CLIPS
from actionclip_deploy.manifest import Int8Recipe, WeightRange

MIN_COSINE = 0.999
MAX_DROP_POINTS = 0.5


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
