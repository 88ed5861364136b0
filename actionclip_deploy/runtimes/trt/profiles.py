"""Optimization profiles: the batch sizes that an engine is built for.

Profiles are narrow on purpose. The width of a profile changes the kernels that TensorRT chooses,
with them their speed, and in some versions whether they are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actionclip_deploy.manifest import GraphName, Manifest

# In clips. A batch between two profiles is filled up to the smallest of the larger one.
PRESETS = {"latency": (1, 1, 1), "throughput": (2, 8, 8)}
DEFAULT_PROFILES = tuple(PRESETS)

# Prompts, and tokens of each: text is embedded once for a label bank.
_PROMPTS = (1, 16, 64)
_MIN_TOKENS, _OPT_TOKENS = 2, 16


@dataclass(frozen=True)
class Profile:
    """Numbers of clips in a call.

    Attributes:
        name: `latency`, `throughput`, or the three numbers.
        min_clips: Fewest; smaller batches are filled up.
        opt_clips: What the kernels are chosen for.
        max_clips: Most; larger batches are split.
    """

    name: str
    min_clips: int
    opt_clips: int
    max_clips: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_clips <= self.opt_clips <= self.max_clips:
            raise ValueError(
                f"The profile {self.name!r} has {self.min_clips}, {self.opt_clips} and "
                f"{self.max_clips} clips; expected three numbers from 1 up, none smaller than the "
                "one before: MIN,OPT,MAX."
            )


@dataclass(frozen=True)
class ShapeRange:
    """Smallest, preferred and largest shape of the input of one graph."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    @property
    def is_fixed_but_rows(self) -> bool:
        """Whether only the number of rows is free."""
        return self.min[1:] == self.max[1:]

    def to_list(self) -> list[list[int]]:
        """As JSON takes it."""
        return [list(self.min), list(self.opt), list(self.max)]

    @classmethod
    def from_list(cls, values: Sequence[Sequence[int]]) -> ShapeRange:
        """From what `to_list` gave."""
        smallest, preferred, largest = (tuple(int(size) for size in shape) for shape in values)
        return cls(smallest, preferred, largest)


def narrowest(shapes: Sequence[ShapeRange], rows: int) -> int:
    """Place of the profile that serves a batch: the first of those with the smallest room for it.

    Args:
        shapes: Of an input in each profile.
        rows: At most those of the largest profile.
    """
    fitting = [place for place, shape in enumerate(shapes) if shape.max[0] >= rows]
    return min(fitting, key=lambda place: shapes[place].max[0])


def parse_profiles(texts: Sequence[str]) -> tuple[Profile, ...]:
    """Profiles from their names or numbers, in the order of their largest batch.

    Args:
        texts: Each `latency`, `throughput` or `MIN,OPT,MAX` in clips; none for both names.

    Raises:
        ValueError: If one is neither, or the numbers do not rise.
    """
    profiles = []
    for text in texts or DEFAULT_PROFILES:
        numbers = PRESETS.get(text) or tuple(
            int(part) if part.strip().isdecimal() else 0 for part in text.split(",")
        )
        if len(numbers) != 3 or 0 in numbers:
            raise ValueError(
                f"The profile {text!r} is none; it must be one of {', '.join(PRESETS)}, or three "
                "numbers of clips as in 1,4,8."
            )
        profiles.append(Profile(text, *numbers))
    return tuple(sorted(set(profiles), key=lambda p: (p.max_clips, p.min_clips)))


def shape_ranges(
    manifest: Manifest, graph: GraphName, profiles: Sequence[Profile], num_frames: int
) -> tuple[ShapeRange, ...]:
    """What the input of a graph may be in each profile; those that are equal come once.

    Args:
        manifest: Of the bundle.
        graph: One of its graphs.
        profiles: In the order of their largest batch.
        num_frames: T.
    """
    model, shape = manifest.model, manifest.graphs[graph].input.shape
    if graph == "textual":
        opt = min(_OPT_TOKENS, model.context_length)
        lengths = (min(_MIN_TOKENS, opt), opt, model.context_length)
        return (ShapeRange(*zip(_PROMPTS, lengths, strict=True)),)
    fixed = tuple(num_frames if size == "T" else int(size) for size in shape[1:])
    ranges = []
    for profile in profiles:
        rows = (profile.min_clips, profile.opt_clips, profile.max_clips)
        if graph == "visual":
            # A stream gives single frames to the profile of one clip.
            few, usual, most = (count * num_frames for count in rows)
            rows = (1 if profile.min_clips == 1 else few, usual, most)
        ranges.append(ShapeRange(*((count, *fixed) for count in rows)))
    return tuple(dict.fromkeys(ranges))
