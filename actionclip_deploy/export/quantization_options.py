"""What an export in int8 or fp8 may be told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.export.calibration import NUM_CALIBRATION_CLIPS
from actionclip_deploy.manifest import Int8Recipe, QuantizedPrecision, RestPrecision, WeightRange
from actionclip_deploy.runtimes.machine import describe_machine

MIN_COSINE = 0.999
# fp8 keeps 4 bits of a number and int8 up to 8, so the same bound would send blocks of a good
# graph back. With all blocks in fp8 the default model keeps 0.997 and loses no accuracy, and a
# ViT-B/32 with random weights keeps 0.9989.
FP8_MIN_COSINE = 0.99
MAX_DROP_POINTS = 0.5

# Instructions that add products of int8 in 32 bits.
_VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


@dataclass(frozen=True)
class QuantizationOptions(ABC):
    """What a quantised graph is calibrated on and what it has to keep.

    Attributes:
        calibration: Video files, and folders of them.
        num_clips: Clips that are taken from them.
        min_cosine: What features have to keep, where no accuracy is measured.
        measure_top1: Gives the accuracy of a bundle in percent; None where there are no annotated
            videos.
        max_drop: Points of it that quantising may cost.
        on_progress: Called with a task in words, what is done and what there is to do.
    """

    calibration: tuple[Path, ...] = ()
    num_clips: int = NUM_CALIBRATION_CLIPS
    min_cosine: float = MIN_COSINE
    measure_top1: Callable[[Bundle], float] | None = None
    max_drop: float = MAX_DROP_POINTS
    on_progress: Callable[[str, int, int], None] = lambda *_: None

    def __post_init__(self) -> None:
        if self.num_clips < 1:
            raise ValueError(f"num_clips is {self.num_clips}; it must be 1 or more.")
        if not 0 <= self.max_drop <= 100:
            raise ValueError(f"max_drop is {self.max_drop}; it must be 0 to 100 points.")
        if not 0 < self.min_cosine < 1:
            raise ValueError(f"min_cosine is {self.min_cosine}; it must be between 0 and 1.")

    @property
    @abstractmethod
    def precision(self) -> QuantizedPrecision:
        """What the products are computed in."""

    @property
    @abstractmethod
    def chosen_recipe(self) -> Int8Recipe:
        """How activations are scaled."""

    @property
    @abstractmethod
    def chosen_weight_range(self) -> WeightRange | None:
        """How large a weight may become; None where there is no choice."""

    @property
    @abstractmethod
    def rest_precision(self) -> RestPrecision:
        """What the other products of the bundle are computed in, where they would not lose."""


@dataclass(frozen=True)
class Int8Options(QuantizationOptions):
    """How an int8 graph is made and what it has to keep.

    Attributes:
        recipe: `dynamic`, for CPUs, or `static`, which TensorRT takes too and which needs
            calibration; None for static where there are calibration videos.
        weight_range: `reduced` is right on every CPU; `full` needs VNNI on x86, and is a little
            closer to fp32.
        rest: What the other products are computed in: `fp32`, which CPUs want, or `fp16`, which
            GPUs want and the static recipe alone can have.
    """

    recipe: Int8Recipe | None = None
    weight_range: WeightRange = "reduced"
    rest: RestPrecision = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, allowed in (
            ("recipe", self.recipe, (None, *get_args(Int8Recipe))),
            ("weight_range", self.weight_range, get_args(WeightRange)),
            ("rest", self.rest, get_args(RestPrecision)),
        ):
            if value not in allowed:
                words = ", ".join(str(word) for word in allowed)
                raise ValueError(f"{name} is {value!r}; it must be one of {words}.")
        if self.recipe == "static" and not self.calibration:
            raise ValueError(
                "The recipe static needs calibration videos, from which it takes its scales; give "
                "some, or take the recipe dynamic."
            )
        if self.rest == "fp16" and self.chosen_recipe == "dynamic":
            raise ValueError(
                "The recipe dynamic is for CPUs and has its rest in fp32; give calibration videos "
                "for the recipe static, or leave the rest in fp32."
            )

    @property
    def precision(self) -> QuantizedPrecision:
        """What the products are computed in."""
        return "int8"

    @property
    def chosen_recipe(self) -> Int8Recipe:
        """The recipe that is taken."""
        return self.recipe or ("static" if self.calibration else "dynamic")

    @property
    def chosen_weight_range(self) -> WeightRange:
        """How large a weight may become."""
        return self.weight_range

    @property
    def rest_precision(self) -> RestPrecision:
        """What the other products of the bundle are computed in, where they would not lose."""
        return self.rest

    def check_machine(self) -> None:
        """Refuse weights that this CPU, on which the graph is judged, cannot compute with.

        Raises:
            ValueError: If they are full and products saturate here.
        """
        # Between fp16, ONNX Runtime multiplies dequantised numbers, which cannot saturate.
        saturates = self.weight_range == "full" and self.rest == "fp32"
        if saturates and exact_weight_range() != "full":
            raise ValueError(
                "weight_range is full, and this CPU has no VNNI: sums of such products saturate "
                "on it, so the graph cannot be judged here; take reduced weights, or export on a "
                "CPU with VNNI."
            )


@dataclass(frozen=True)
class Fp8Options(QuantizationOptions):
    """How an fp8 graph, which is for GPUs, is made and what it has to keep.

    Its scales are static and need calibration videos. The other products are as in fp16.
    """

    min_cosine: float = FP8_MIN_COSINE

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.calibration:
            raise ValueError(
                "fp8 needs calibration videos, from which it takes its scales; give some, or take "
                "the precision fp16."
            )

    @property
    def precision(self) -> QuantizedPrecision:
        """What the products are computed in."""
        return "fp8"

    @property
    def chosen_recipe(self) -> Int8Recipe:
        """How activations are scaled."""
        return "static"

    @property
    def chosen_weight_range(self) -> None:
        """There is one range."""

    @property
    def rest_precision(self) -> RestPrecision:
        """What the other products of the bundle are computed in, where they would not lose."""
        return "fp16"


def exact_weight_range() -> WeightRange:
    """The largest weights with which this CPU's int8 products do not saturate."""
    machine = describe_machine()
    # Arm's kernels add in 32 bits, or pairs that fit into 16.
    is_arm = machine["architecture"].lower() in ("aarch64", "arm64")
    return "full" if is_arm or _VNNI & set(machine["cpu_flags"]) else "reduced"
