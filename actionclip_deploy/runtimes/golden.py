"""Golden data: inputs, and what PyTorch computed from them, stored in the bundle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import BundleError, IntegrityError, ShapeError
from actionclip_deploy.manifest import Manifest
from actionclip_deploy.runtimes.base import Float32Array, Runtime
from actionclip_deploy.scoring import score

GOLDEN_ARRAYS = "golden/golden.safetensors"
GOLDEN_TEXT = "golden/golden.json"


@dataclass(frozen=True, eq=False)
class Golden:
    """Inputs and the reference's outputs at each graph and end to end.

    Letters: B clips of T frames of S x S pixels, M = K x C prompts of L tokens, D the embedding
    width. The K templates are those of the manifest; prompts are template-major.

    Attributes:
        frames: RGB, uint8, shape (B, T, S, S, 3).
        frame_features: Before normalisation, float32, shape (B, T, D); None where the visual
            prompt mixes the frames of a clip and there are none.
        video_embeddings: Unit norm, float32, shape (B, D).
        tokens: int32, shape (M, L).
        text_embeddings: Unit norm, float32, shape (M, D).
        scores: By the manifest's method and scale, float32, shape (B, C).
        labels: The C labels.
        origin: Where the frames came from, in words.
    """

    frames: NDArray[np.uint8]
    frame_features: Float32Array | None
    video_embeddings: Float32Array
    tokens: NDArray[np.int32]
    text_embeddings: Float32Array
    scores: Float32Array
    labels: tuple[str, ...]
    origin: str

    def __post_init__(self) -> None:
        for name, (dtype, shape) in self._layout().items():
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != shape:
                raise ShapeError(
                    f"The golden {name} have shape {array.shape} and dtype {array.dtype}; "
                    f"expected {shape} and {np.dtype(dtype).name} beside the other arrays."
                )
        if self.tokens.shape[0] % len(self.labels):
            raise ShapeError(
                f"The golden tokens are {self.tokens.shape[0]} prompts and there are "
                f"{len(self.labels)} labels; expected as many prompts of each label as templates."
            )

    def _layout(self) -> dict[str, tuple[type, tuple[int, ...]]]:
        """Dtype and shape of each array, given the first one's of each letter."""
        num_clips, num_frames, size = self.frames.shape[:3]
        num_prompts, num_tokens = self.tokens.shape
        width = self.video_embeddings.shape[-1]
        layout: dict[str, tuple[type, tuple[int, ...]]] = {
            "frames": (np.uint8, (num_clips, num_frames, size, size, 3)),
            "video_embeddings": (np.float32, (num_clips, width)),
            "tokens": (np.int32, (num_prompts, num_tokens)),
            "text_embeddings": (np.float32, (num_prompts, width)),
            "scores": (np.float32, (num_clips, len(self.labels))),
        }
        if self.frame_features is not None:
            layout["frame_features"] = (np.float32, (num_clips, num_frames, width))
        return layout

    @classmethod
    def from_reference(
        cls,
        reference: Runtime,
        frames: NDArray[np.uint8],
        tokens: NDArray[np.int32],
        labels: Sequence[str],
        *,
        origin: str,
    ) -> Golden:
        """Compute the outputs with a runtime that is trusted, which is `torch`.

        Args:
            reference: The runtime.
            frames: RGB, uint8, shape (B, T, S, S, 3).
            tokens: Of the manifest's templates filled with the labels, template-major, int32,
                shape (K x C, L).
            labels: The C labels.
            origin: Where the frames came from, in words.
        """
        features = None
        if reference.frames_are_independent:
            flat = frames.reshape(-1, *frames.shape[2:])
            features = reference.encode_frames(flat).reshape(*frames.shape[:2], -1)
            video_embeddings = reference.encode_clips(features)
        else:
            video_embeddings = reference.encode_video(frames)
        text_embeddings = reference.encode_text(tokens)
        scores = golden_scores(reference.manifest, video_embeddings, text_embeddings)
        return cls(
            frames, features, video_embeddings, tokens, text_embeddings, scores,
            labels=tuple(labels), origin=origin,
        )  # fmt: skip

    def save(self, folder: Path) -> None:
        """Write the golden data into the folder of a bundle that is being made."""
        (folder / GOLDEN_ARRAYS).parent.mkdir(exist_ok=True)
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in self._layout()}
        # Not save_file, which makes a file that only its owner can read.
        (folder / GOLDEN_ARRAYS).write_bytes(save(arrays))
        text = {"labels": list(self.labels), "origin": self.origin}
        (folder / GOLDEN_TEXT).write_text(
            json.dumps(text, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, bundle: Bundle) -> Golden:
        """Read the golden data of a bundle.

        Raises:
            BundleError: If the bundle has none.
            IntegrityError: If it cannot be read or is not of this bundle's model.
        """
        for name in (GOLDEN_ARRAYS, GOLDEN_TEXT):
            if name not in bundle.manifest.files:
                raise BundleError(
                    f"The bundle {bundle.path} has no {name}, so there is nothing to compare with; "
                    "export it again."
                )
        try:
            arrays = load_file(bundle.file(GOLDEN_ARRAYS))
            text = json.loads(bundle.file(GOLDEN_TEXT).read_text(encoding="utf-8"))
            golden = cls(
                frames=arrays["frames"],
                frame_features=arrays.get("frame_features"),
                video_embeddings=arrays["video_embeddings"],
                tokens=arrays["tokens"],
                text_embeddings=arrays["text_embeddings"],
                scores=arrays["scores"],
                labels=tuple(text["labels"]),
                origin=text["origin"],
            )
            golden.check_model(bundle.manifest)
        # KeyError: an array is missing. ValueError: not JSON, or shapes that do not fit together.
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as exc:
            raise IntegrityError(
                f"The golden data of {bundle.path} cannot be used ({exc}); "
                "copy the bundle again or export it again."
            ) from exc
        return golden

    def check_model(self, manifest: Manifest) -> None:
        """Compare the shapes with those of a model.

        Raises:
            ShapeError: If they are of another model.
        """
        model = manifest.model
        size, width = model.input_size, model.embedding_dim
        given = (self.frames.shape[1:3], self.video_embeddings.shape[1], len(self.tokens))
        wanted = ((model.num_frames, size), width, len(manifest.templates) * len(self.labels))
        if given != wanted:
            raise ShapeError(
                f"The golden data has (T, S), D and K x C of {given} and the model {wanted}; "
                "they are of different models."
            )


def golden_scores(
    manifest: Manifest, video_embeddings: Float32Array, text_embeddings: Float32Array
) -> Float32Array:
    """Scores by the manifest's method and scale.

    Args:
        manifest: Says the method, the scale and K.
        video_embeddings: Unit norm, float32, shape (B, D).
        text_embeddings: Unit norm, template-major, float32, shape (K x C, D).

    Returns:
        float32, shape (B, C).

    Raises:
        InferenceError: If an embedding is not finite.
    """
    label_embeddings = text_embeddings.reshape(
        len(manifest.templates), -1, text_embeddings.shape[-1]
    )
    method, scale = manifest.scores.method, manifest.scores.scale
    return score(method, video_embeddings, label_embeddings, scale=scale)
