"""From decoded frames to the model's input: resize and crop, uint8 in, uint8 out.

Division by 255 and normalisation are inside the graphs. The resampling is Pillow's, which widens
its filter when it shrinks a frame; OpenCV's and torch's plain resampling give other numbers.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import ArgumentError, ShapeError, VideoError
from actionclip_deploy.video.pixels import resized_size

Interpolation = Literal["bicubic", "bilinear"]
Region = Literal["frame", "crop", "swscale"]
_Pixels: TypeAlias = NDArray[np.uint8]

# How far the filters reach, in pixels of the larger of the two pictures.
_SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}
# Pixels of a resized frame, or of one that is half way, that are held: 4 bytes each in Pillow. The
# short side of one of 1 x 16,000 is made 256 times as long, and so is the other one.
_MAX_RESIZED_PIXELS = 2**25


def preprocess_frames(
    frames: NDArray[np.uint8],
    *,
    input_size: int = 224,
    resize_size: int = 256,
    interpolation: Interpolation = "bicubic",
    num_crops: int = 1,
    region: Region = "frame",
) -> NDArray[np.uint8]:
    """Resize frames by their shorter side and crop squares from them.

    One crop: the shorter side becomes `resize_size` and the square of `input_size` in the centre
    is kept; with the defaults this is the original's preprocessing to the last bit. Three crops:
    the shorter side becomes `input_size`, `resize_size` is not used, and the squares lie at the
    start, the centre and the end of the longer side; in a square frame they are the same.

    `region="crop"` resizes only what one crop keeps. Places in the frame are 32-bit floats then,
    which tips some values over a rounding: of 70 million values of frames of many videos 0.03%
    differed with bicubic, by one level but for 44 of them that differed by two. In a single frame
    0.4% were seen, and with bilinear three times as many. Side by side it took 0.55 to 0.6 of the
    time of `"frame"` for 16:9 and 0.7 to 0.8 for 4:3 and upright frames. It changes nothing where
    there is nothing to resize, or with three crops, which keep the whole frame. A frame that is
    hundreds of times as long as it is wide is resized so in any case, each crop for itself, to
    bound the memory.

    `region="swscale"` is `"frame"` here: frames that a reader has scaled already
    (`views.scaling_of`) are cropped, and others are resized as ever.

    Args:
        frames: RGB, uint8, shape (N, H, W, 3), with N = 1 or more.
        input_size: Side of the squares in pixels, S.
        resize_size: Shorter side of a frame before one crop, in pixels; S or more.
        interpolation: `"bicubic"` or `"bilinear"`.
        num_crops: 1 or 3.
        region: `"frame"`, `"crop"` or `"swscale"`.

    Returns:
        RGB, uint8, shape (num_crops, N, S, S, 3).

    Raises:
        ShapeError: If `frames` has another shape or dtype.
        ValueError: If another argument is not allowed.

    Source:
        One crop: sallymmx/ActionCLIP@31c34df datasets/transforms_ss.py, GroupScale and
        GroupCenterCrop, with torchvision's rounding of sizes and places. Three crops:
        GroupFCSample there, which no released code calls, and ThreeCrop of
        open-mmlab/mmaction2@4d6c934, which X-CLIP uses.
    """
    _check(frames, input_size, resize_size, interpolation, num_crops, region)
    num_frames, height, width, _ = frames.shape
    crops = np.empty((num_crops, num_frames, input_size, input_size, 3), dtype=np.uint8)
    if num_crops == 3:
        size = resized_size(width, height, input_size)
        corners = _three_corners(size, input_size)
        if not _fits(width, height, size):
            for n, frame in enumerate(frames):
                for k, corner in enumerate(corners):
                    crops[k, n] = _resize_crop(frame, size, corner, input_size, interpolation)
            return crops
        for n, frame in enumerate(frames):
            resized = _resize(frame, size, interpolation)
            for k, (left, top) in enumerate(corners):
                crops[k, n] = resized[top : top + input_size, left : left + input_size]
        return crops
    size = resized_size(width, height, resize_size)
    corner = _center_corner(size, input_size)
    exact = size == (width, height) or (region != "crop" and _fits(width, height, size))
    crop_one = _resize_then_crop if exact else _resize_crop
    for n, frame in enumerate(frames):
        crops[0, n] = crop_one(frame, size, corner, input_size, interpolation)
    return crops


def resize_frames(
    frames: NDArray[np.uint8], *, short_side: int, interpolation: Interpolation = "bicubic"
) -> NDArray[np.uint8]:
    """Resize frames and crop nothing; a crop of the result is what `preprocess_frames` gives.

    Args:
        frames: RGB, uint8, shape (N, H, W, 3), with N = 1 or more.
        short_side: Of the result, in pixels.
        interpolation: `"bicubic"` or `"bilinear"`.

    Returns:
        RGB, uint8, shape (N, height, width, 3).

    Raises:
        ShapeError: If `frames` has another shape or dtype.
        VideoError: If the result would take too much memory: a frame hundreds of times as long as
            it is wide.
        ValueError: If another argument is not allowed.
    """
    _check(frames, short_side, short_side, interpolation, 1, "frame")
    height, width = frames.shape[1:3]
    size = resized_size(width, height, short_side)
    if not _fits(width, height, size):
        raise VideoError(
            f"Frames of {width} x {height} would have {size[0]:,} x {size[1]:,} pixels with a "
            f"short side of {short_side}, which is too much; leave the video out or cut it."
        )
    return np.stack([_resize(frame, size, interpolation) for frame in frames])


def check_region(region: str) -> None:
    """Refuse what is no way to resize.

    Raises:
        ValueError: If it is none.
    """
    if region not in get_args(Region):
        raise ArgumentError(
            "region", f"is {region!r}; it must be one of {', '.join(get_args(Region))}."
        )


def _resize(frame: _Pixels, size: tuple[int, int], interpolation: str) -> _Pixels:
    """Resize (H, W, 3) to (width, height): first along rows, then along columns.

    Pillow 13 goes along columns first where that is less work, which rounds otherwise than every
    version before it (python-pillow/Pillow#9549); two calls keep to the original's order.
    """
    width, height = size
    along_rows = _resize_once(frame, (width, frame.shape[0]), interpolation)
    return _resize_once(along_rows, (width, height), interpolation)


def _resize_then_crop(
    frame: _Pixels,
    size: tuple[int, int],
    corner: tuple[int, int],
    input_size: int,
    interpolation: str,
) -> _Pixels:
    """Give the same pixels as `_resize` and a crop do, without most of those that are cut off.

    Rows that no kept pixel depends on are not resized, and only kept columns are.
    """
    left, top = corner
    rows = _reach(top, input_size, frame.shape[0], size[1], interpolation)
    along_rows = _resize_once(frame[rows], (size[0], rows.stop - rows.start), interpolation)
    columns = np.zeros((frame.shape[0], input_size, 3), dtype=np.uint8)
    columns[rows] = along_rows[:, left : left + input_size]
    return _resize_once(columns, (input_size, size[1]), interpolation)[top : top + input_size]


def _resize_crop(
    frame: _Pixels,
    size: tuple[int, int],
    corner: tuple[int, int],
    input_size: int,
    interpolation: str,
) -> _Pixels:
    """Compute the pixels of the crop alone; where they lie in the frame is a 32-bit float."""
    left, top = corner
    height, width, _ = frame.shape
    rows = _reach(top, input_size, height, size[1], interpolation)
    columns = _reach(left, input_size, width, size[0], interpolation)
    part = frame[rows, columns]
    start, stop = (x * width / size[0] - columns.start for x in (left, left + input_size))
    box = (start, 0, min(stop, part.shape[1]), part.shape[0])
    along_rows = _resize_once(part, (input_size, part.shape[0]), interpolation, box)
    start, stop = (y * height / size[1] - rows.start for y in (top, top + input_size))
    box = (0, start, input_size, min(stop, part.shape[0]))
    return _resize_once(along_rows, (input_size, input_size), interpolation, box)


def _resize_once(
    pixels: _Pixels,
    size: tuple[int, int],
    interpolation: str,
    box: tuple[float, float, float, float] | None = None,
) -> _Pixels:
    """Resize (H, W, 3) along at most one axis; `box` is left, top, right, bottom."""
    if box is None and size == (pixels.shape[1], pixels.shape[0]):
        return pixels
    from PIL import Image  # here, as it takes a while and not every import resizes

    resampling = Image.Resampling[interpolation.upper()]
    return np.asarray(Image.fromarray(pixels).resize(size, resampling, box=box))


def _reach(start: int, count: int, length: int, resized_length: int, interpolation: str) -> slice:
    """The pixels of a side that `count` pixels from `start` on depend on, once it is resized."""
    scale = length / resized_length
    reach = _SUPPORT[interpolation] * max(scale, 1.0) + 1
    first = max(0, int(start * scale - reach))
    return slice(first, min(length, math.ceil((start + count) * scale + reach)))


def _fits(width: int, height: int, size: tuple[int, int]) -> bool:
    """Whether a whole frame may be resized, first along its rows."""
    return max(size[0] * height, size[0] * size[1]) <= max(_MAX_RESIZED_PIXELS, width * height)


def _center_corner(size: tuple[int, int], input_size: int) -> tuple[int, int]:
    # Python's round takes halves to the even number, and so does torchvision.
    left, top = (round((side - input_size) / 2) for side in size)
    return left, top


def _three_corners(size: tuple[int, int], input_size: int) -> list[tuple[int, int]]:
    # The last crop starts at twice the step: one pixel before the end where the rest is odd.
    step_x, step_y = ((side - input_size) // 2 for side in size)
    return [(k * step_x, k * step_y) for k in range(3)]


def _check(
    frames: NDArray[np.uint8],
    input_size: int,
    resize_size: int,
    interpolation: str,
    num_crops: int,
    region: str,
) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ShapeError(
            f"frames are {frames.dtype} of shape {frames.shape}; expected uint8 RGB of shape "
            "(N, H, W, 3) with N, H and W of 1 or more."
        )
    if input_size < 1:
        raise ArgumentError("input_size", f"is {input_size}; it must be 1 or more.")
    if resize_size < input_size:
        raise ArgumentError(
            "resize_size",
            f"is {resize_size}; it must be input_size, {input_size}, or more, "
            "for the crop to lie inside of the frame.",
        )
    if interpolation not in _SUPPORT:
        raise ArgumentError(
            "interpolation", f"is {interpolation!r}; it must be one of {', '.join(_SUPPORT)}."
        )
    if num_crops not in (1, 3):
        raise ArgumentError("num_crops", f"is {num_crops}; it must be 1 or 3.")
    check_region(region)
