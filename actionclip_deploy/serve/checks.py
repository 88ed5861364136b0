"""Checks of tensors that strangers send, before they wait for a call that others share."""

from __future__ import annotations

import numpy as np

from actionclip_deploy.manifest import Manifest
from actionclip_deploy.runtimes.base import Array, Float32Array
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.execution import GraphOrClip

# fp16 embeddings that a client rounded once more are still within it.
_NORM_TOLERANCE = 1e-2
_DTYPES = {
    "visual": np.uint8,
    "temporal": np.float32,
    "textual": np.int32,
    "video": np.uint8,
    "clip": np.uint8,
}


def input_shape(manifest: Manifest, graph: GraphOrClip) -> tuple[int | str, ...]:
    """Shape of a graph's input; a letter stands for any positive number."""
    model = manifest.model
    frame = (model.input_size, model.input_size, 3)
    num_frames: int | str = model.num_frames if model.fixed_num_frames else "T"
    return {
        "visual": ("N", *frame),
        "temporal": ("B", num_frames, model.embedding_dim),
        "textual": ("M", "L"),
        "video": ("B", num_frames, *frame),
        "clip": ("B", num_frames, *frame),
    }[graph]


def check_graph_input(
    manifest: Manifest, graph: GraphOrClip, array: Array, num_tokens: int, max_rows: int
) -> None:
    """Refuse what a graph would fail on, or answer with what is no number.

    Args:
        manifest: Of the model.
        graph: The graph, or `clip`.
        array: Its input.
        num_tokens: Size of the vocabulary.
        max_rows: Rows that a request may have.

    Raises:
        RequestRefusedError: If it is no input of the graph.
    """
    shape, dtype = input_shape(manifest, graph), _DTYPES[graph]
    fits = array.dtype == dtype and array.ndim == len(shape)
    if not fits or any(
        given == 0 or (isinstance(size, int) and given != size)
        for given, size in zip(array.shape, shape, strict=True)
    ):
        wanted = ", ".join(map(str, shape))
        raise refusals.bad_tensor(
            f"The input of {graph} has shape {array.shape} and type {array.dtype}; expected "
            f"({wanted}) and {np.dtype(dtype)}, none of its sizes zero."
        )
    if len(array) > max_rows:
        raise refusals.too_many("rows", len(array), max_rows)
    if graph == "textual":
        _check_tokens(manifest, array, num_tokens)
    elif graph != "visual":
        _check_num_frames(manifest, graph, array.shape[1])
    if graph == "temporal" and not np.isfinite(array).all():
        raise refusals.bad_tensor(
            "The input of temporal holds values that are not finite; send frame features as the "
            "visual graph gives them."
        )


def check_embeddings(manifest: Manifest, array: Float32Array, name: str) -> None:
    """Refuse what are no embeddings of a video's views, shape (V, D), of unit norm.

    Raises:
        RequestRefusedError: If they are not.
    """
    width = manifest.model.embedding_dim
    if array.ndim != 2 or array.shape[1] != width or not len(array):
        raise refusals.bad_tensor(
            f"{name} has shape {array.shape}; expected embeddings of the views of one video, "
            f"(V, {width})."
        )
    with np.errstate(over="ignore", invalid="ignore"):
        errors = np.abs(np.linalg.norm(array.astype(np.float64), axis=1) - 1)
    if not (errors <= _NORM_TOLERANCE).all():  # written so that NaN fails
        raise refusals.bad_value(
            f"{name} holds vectors that are not of norm 1; send embeddings as /v1/embed gives them."
        )


def _check_tokens(manifest: Manifest, tokens: Array, num_tokens: int) -> None:
    limit = manifest.model.context_length
    if tokens.shape[1] > limit:
        raise refusals.bad_tensor(
            f"The input of textual has {tokens.shape[1]} columns and may have {limit}; "
            "shorten the prompts."
        )
    if tokens.min() < 0 or tokens.max() >= num_tokens:
        raise refusals.bad_tensor(
            f"The input of textual holds tokens from {tokens.min()} to {tokens.max()}; they must "
            f"be from 0 to {num_tokens - 1}."
        )


def _check_num_frames(manifest: Manifest, graph: str, num_frames: int) -> None:
    limit = manifest.model.max_frames
    if limit is not None and num_frames > limit:
        raise refusals.bad_tensor(
            f"The input of {graph} has {num_frames} frames per clip and the model takes {limit} "
            "at most; send fewer."
        )
