"""The requests of a load measurement, made once, and what their answers say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.client.uploads import uploads
from actionclip_deploy.errors import BenchmarkError, MissingExtraError

try:
    import httpx
except ImportError as exc:
    raise MissingExtraError("actionclip benchmark --url", "client") from exc

Mode = Literal["video", "frames", "tensors", "embeddings"]
MODES: tuple[Mode, ...] = get_args(Mode)

_NUM_BODIES = 8  # of arrays, which nobody gave
_FRAME_SHAPE = (240, 320, 3)  # H, W and RGB of what stands for a camera's frames
_TENSOR_MODEL = "clip"
HEADER_LENGTH = "inference-header-content-length"


@dataclass(frozen=True)
class LoadRequest:
    """A request, as bytes.

    Attributes:
        path: After the server's address.
        headers: Of its body.
        body: All of it.
    """

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, eq=False)
class ReadAnswer:
    """What is compared of an answer.

    Attributes:
        values: The best scores, or the embedding.
        batch_size: Clips in its call of the runtime; None where it does not tell.
    """

    values: NDArray[np.float64]
    batch_size: int | None


def make_requests(
    mode: Mode,
    info: dict[str, Any],
    *,
    labels: str | Sequence[str],
    videos: Sequence[Path] = (),
    input_name: str = "frames",
    seed: int = 0,
) -> list[LoadRequest]:
    """Different requests of one kind, to be sent in turn.

    Args:
        mode: `video` uploads files; `frames` uploads arrays of frames, which take no decoding;
            `tensors` sends clips as the model takes them to /v2; `embeddings` is scoring alone.
        info: What the server told of itself.
        labels: Name of a bank, or labels that each request brings along.
        videos: Files for `video`.
        input_name: Of the input of the model `clip`, for `tensors`.
        seed: Of the arrays.

    Raises:
        BenchmarkError: If there are no files for `video`, or one cannot be read.
    """
    if mode == "video":
        if not videos:
            raise BenchmarkError("There is no video to send; give one with --video.")
        return [_classify(_read(path), path.name, labels) for path in videos]
    rng = np.random.default_rng(seed)
    model = info["model"]
    num_frames, size, width = model["num_frames"], model["input_size"], model["embedding_dim"]
    made = []
    for _ in range(_NUM_BODIES):
        if mode == "frames":
            given = rng.integers(0, 256, (num_frames, *_FRAME_SHAPE), np.uint8)
            made.append(_classify(given, "frames.npy", labels))
        elif mode == "embeddings":
            vector = rng.standard_normal((1, width)).astype(np.float32)
            vector /= np.linalg.norm(vector)
            made.append(_classify(vector, "embeddings.npy", labels))
        else:
            clip = rng.integers(0, 256, (1, num_frames, size, size, 3), np.uint8)
            made.append(infer_request(clip, input_name))
    return made


def infer_request(clip: NDArray[np.uint8], input_name: str) -> LoadRequest:
    """A clip in the inference protocol's binary form.

    Args:
        clip: uint8, shape (B, T, S, S, 3).
        input_name: Of the model's input.
    """
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": input_name,
                    "shape": list(clip.shape),
                    "datatype": "UINT8",
                    "parameters": {"binary_data_size": clip.nbytes},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(header))}
    return LoadRequest(f"/v2/models/{_TENSOR_MODEL}/infer", headers, header + clip.tobytes())


def read_answer(headers: httpx.Headers, body: bytes) -> ReadAnswer:
    """What is compared of an answer.

    Raises:
        ValueError: If it is not as the server answers.
    """
    length = headers.get(HEADER_LENGTH)
    try:
        if length is not None:
            values = np.frombuffer(body[int(length) :], np.float32).astype(np.float64)
            return ReadAnswer(values, None)
        (result,) = json.loads(body)["results"]
        scores = [each["score"] for each in result["predictions"]]
        # 0 is an answer that took no call.
        return ReadAnswer(np.array(scores, np.float64), result.get("batch_size") or None)
    except (KeyError, TypeError) as exc:
        raise ValueError(f"the answer has no {exc}") from exc


def _classify(video: bytes | NDArray[Any], name: str, labels: str | Sequence[str]) -> LoadRequest:
    (part,) = uploads(video)
    assert isinstance(part.source, bytes)
    fields = {"labels": labels if isinstance(labels, str) else json.dumps(list(labels))}
    request = httpx.Request(
        "POST",
        "http://localhost/v1/classify",
        data=fields,
        files={part.field: (name, part.source, "application/octet-stream")},
    )
    headers = {"content-type": request.headers["content-type"]}
    return LoadRequest("/v1/classify", headers, request.read())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise BenchmarkError(
            f"{path} cannot be read ({exc.strerror}); give a video that exists."
        ) from exc
