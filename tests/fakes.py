"""A bundle without graphs and a runtime in numpy, for tests of which the graphs are no subject.

Tests import it by name: `from fakes import FakeRuntime, write_fake_bundle`.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from actionclip_deploy.bundle import Bundle, hash_files, write_manifest
from actionclip_deploy.manifest import (
    GraphName,
    GraphSpec,
    Manifest,
    ModelSpec,
    PreprocessingSpec,
    ScoreSpec,
    SourceSpec,
    TensorSpec,
)
from actionclip_deploy.records import EventRecord, UsedBank
from actionclip_deploy.runtimes.base import Runtime, RuntimeInfo
from actionclip_deploy.tokenizer import Tokenizer, Vocabulary

TEMPLATES = ("a photo of action {}", "{}, an action")


class FakeRuntime(Runtime):
    """Arithmetic that needs no graph: each row depends on itself alone, norms are 1."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.closed = False

    def describe(self) -> RuntimeInfo:
        return RuntimeInfo("fake", "numpy", "fp32", num_threads=1)

    def close(self) -> None:
        self.closed = True

    def _run(self, graph: GraphName, array: np.ndarray) -> np.ndarray:
        self.calls.append((graph, array.shape))
        if graph == "temporal":
            return _unit_norm(array.mean(axis=1))
        if graph == "textual":
            # Padding is 0 and sin(0) is 0; a letter in another place gives another angle.
            places = np.arange(1, array.shape[1] + 1)
            return _unit_norm(self._spread(array * places / 7.0))
        pixels = array.reshape(*array.shape[:-3], -1)[..., ::97] / 64.0
        if graph == "video":
            return _unit_norm(self._spread(pixels).mean(axis=1))
        return self._spread(pixels)

    def _spread(self, values: np.ndarray) -> np.ndarray:
        """(..., X) -> (..., D), a sum of sines of D frequencies."""
        frequencies = np.arange(1, self.manifest.model.embedding_dim + 1)
        waves = np.sin(values[..., None] * frequencies).sum(axis=-2)
        return waves.astype(np.float32)


def _unit_norm(features: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(features, axis=-1, keepdims=True)
    return (features / norms).astype(np.float32)


def fake_manifest(
    *,
    visual_prompt: str = "transf",
    templates: tuple[str, ...] = TEMPLATES,
    scale: float = 100.0,
    source_file: str = "fake.pt",
    **model: Any,
) -> Manifest:
    """A manifest of a small model; `model` replaces fields of its ModelSpec."""
    sizes = {"num_frames": 4, "max_frames": 77, "fixed_num_frames": False, "input_size": 32}
    sizes |= {"embedding_dim": 16, "context_length": 77, "num_macs": 1000, "num_flops": 1990}
    spec = ModelSpec(
        **{
            "backbone": "fake",
            "visual_prompt": visual_prompt,
            "num_parameters": {"total": 1},
            **sizes,
            **model,
        }
    )
    names = ["video", "textual"] if visual_prompt in ("joint", "shift") else None
    return Manifest(
        model=spec,
        preprocessing=PreprocessingSpec(
            resize_size=spec.input_size + 4,
            interpolation="bicubic",
            pixel_mean=(0.5, 0.5, 0.5),
            pixel_std=(0.25, 0.25, 0.25),
        ),
        scores=ScoreSpec(scale=scale),
        templates=templates,
        graphs={
            name: _graph_spec(name, spec) for name in names or ["visual", "temporal", "textual"]
        },
        source=SourceSpec(
            family="original", file=source_file, sha256="0" * 64, num_frames_from="option"
        ),
        versions={"actionclip-deploy": "0"},
        files={},
    )


def _graph_spec(name: str, model: ModelSpec) -> GraphSpec:
    size, width = model.input_size, model.embedding_dim
    inputs = {
        "visual": TensorSpec(name="frames", dtype="uint8", shape=("N", size, size, 3)),
        "video": TensorSpec(name="frames", dtype="uint8", shape=("B", "T", size, size, 3)),
        "temporal": TensorSpec(name="frame_features", dtype="float32", shape=("B", "T", width)),
        "textual": TensorSpec(name="tokens", dtype="int32", shape=("M", "L")),
    }
    output = {
        "visual": ("frame_features", "N"),
        "video": ("video_embedding", "B"),
        "temporal": ("video_embedding", "B"),
        "textual": ("text_embedding", "M"),
    }[name]
    return GraphSpec(
        file=f"{name}.onnx",
        precision="fp32",
        opset=18,
        input=inputs[name],
        output=TensorSpec(name=output[0], dtype="float32", shape=(output[1], width)),
    )


def write_fake_bundle(folder: Path, **manifest: Any) -> Bundle:
    """Write a bundle whose graph files hold a few bytes each, and open it.

    Args:
        folder: Where; made if it is not there.
        manifest: Arguments of `fake_manifest`; `textual=b"..."` changes the bytes of the textual
            graph, and with them the hash that label banks are bound to; `known="a red star"` gives
            a text encoder that was trained on these words alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    textual = manifest.pop("textual", b"textual")
    known = manifest.pop("known", None)
    description = fake_manifest(**manifest)
    for name, graph in description.graphs.items():
        (folder / graph.file).write_bytes(textual if name == "textual" else name.encode())
    tokenizer = fake_tokenizer(folder)
    tokenizer.save(folder / "tokenizer.json")
    (folder / "fake_merges.txt.gz").unlink()
    files = hash_files(folder)
    write_manifest(folder, description.model_copy(update={"files": files}))
    if known is not None:
        know_only(folder, tokenizer, known)
    return Bundle.open(folder, check_hashes=True)


def know_only(folder: Path, tokenizer: Tokenizer, words: str) -> None:
    """Make a bundle one of a text encoder that was trained on some words alone."""
    is_known = np.zeros(tokenizer.num_tokens, np.bool_)
    is_known[tokenizer([words], context_length=10_000)[0]] = True
    Vocabulary(is_known).save(folder / "vocabulary.json")
    manifest = Bundle.open(folder).manifest.model_copy(update={"files": hash_files(folder)})
    write_manifest(folder, manifest)


def fake_tokenizer(folder: Path) -> Tokenizer:
    """CLIP's tokenizer with three byte pairs: nearly one token for each letter."""
    path = folder / "fake_merges.txt.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("#version: 0.2\na n\nan d</w>\ni n\n")
    return Tokenizer.from_clip_merges(path)


def fake_event(kind: str = "new", number: int = 0, **changes: Any) -> EventRecord:
    """A message about an event, of the label "run" at the source "door"."""
    has_ended = kind == "end"
    given: dict[str, Any] = {
        "kind": kind,
        "id": "1800000000000-000000-0123456789",
        "number": number,
        "source": "door",
        "label": "run",
        "start_seconds": 2.5,
        "end_seconds": 6.0 if has_ended else None,
        "start_time": "2027-01-15T08:00:02.500Z",
        "end_time": "2027-01-15T08:00:06.000Z" if has_ended else None,
        "end_reason": "closed" if has_ended else None,
        "score": 0.9,
        "mean": 0.8,
        "peak": 0.9,
        "threshold": 0.6,
        "method": "template-softmax",
        "bank": UsedBank(name="mine", version=3, sha256="ab", num_labels=1, num_templates=1),
        "runtime": RuntimeInfo("onnxruntime", "CPUExecutionProvider", "fp32", 1),
    }
    return EventRecord(**{**given, **changes})
