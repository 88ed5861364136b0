"""Evaluation with a runtime in numpy, on videos and pictures that are read for real."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeRuntime, fake_manifest
from PIL import Image

from actionclip_deploy.errors import VideoError
from actionclip_deploy.evaluate.annotations import Sample
from actionclip_deploy.evaluate.evaluate import evaluate
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.recognizer import FailedVideo, Prediction, Recognizer
from actionclip_deploy.sampling import Views

LABELS = tuple(f"label {number}" for number in range(6))


@pytest.fixture
def recognizer() -> Recognizer:
    embeddings = np.random.default_rng(3).normal(size=(2, len(LABELS), 16))
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    bank = LabelBank(
        name="mine",
        labels=LABELS,
        templates=("{}", "{}, an action"),
        embeddings=embeddings.astype(np.float32),
        textual_sha256="0" * 64,
    )
    return Recognizer(FakeRuntime(fake_manifest()), bank, views=Views(2, 3))


def _picture_folder(folder: Path, num_frames: int) -> Sample:
    folder.mkdir()
    for number in range(1, num_frames + 1):
        Image.new("RGB", (60, 40), (20 * number, 90, 10)).save(folder / f"img_{number:05d}.jpg")
    return Sample(folder, (2,), num_frames=num_frames, image_template="img_{:05d}.jpg")


def test_videos_are_scored_as_they_are_recognised(
    recognizer: Recognizer, rendered_video: Path
) -> None:
    prediction = recognizer.predict(rendered_video)

    evaluation = evaluate(recognizer, [Sample(rendered_video, (4,))])

    assert evaluation.scores.tolist() == [prediction.scores.tolist()]
    assert evaluation.targets.tolist() == [[number == 4 for number in range(6)]]
    right = prediction.predictions[0].label == LABELS[4]
    assert evaluation.metrics.top1 == float(right)


def test_frames_that_are_equal_are_counted_and_encoded_once(
    recognizer: Recognizer, rendered_video: Path
) -> None:
    once = evaluate(recognizer, [Sample(rendered_video, (4,))]).summary()
    thrice = evaluate(recognizer, [Sample(rendered_video, (4,))] * 3).summary()
    num_frames = (once.num_frames_encoded or 0) + (once.num_frames_reused or 0)
    assert thrice.num_frames_encoded == once.num_frames_encoded
    assert thrice.num_frames_reused == 2 * num_frames + (once.num_frames_reused or 0)
    assert num_frames > 0


def test_parts_and_folders_of_pictures_are_scored_as_well(
    recognizer: Recognizer, rendered_video: Path, tmp_path: Path
) -> None:
    samples = [
        Sample(rendered_video, (0,)),
        Sample(rendered_video, (1,), start_seconds=2.0, end_seconds=3.0),
        _picture_folder(tmp_path / "pictures", 9),
    ]

    evaluation = evaluate(recognizer, samples)

    assert evaluation.samples == tuple(samples)
    assert len({row.tobytes() for row in evaluation.scores}) == 3
    assert evaluation.metrics.num_videos == 3


def test_videos_that_fail_are_counted_and_told(
    recognizer: Recognizer, rendered_video: Path, tmp_path: Path
) -> None:
    told: list[Prediction | FailedVideo] = []
    samples = [Sample(tmp_path / "gone.mp4", (0,)), Sample(rendered_video, (1,))]

    evaluation = evaluate(recognizer, samples, on_video=told.append)

    assert [type(outcome) for outcome in told] == [FailedVideo, Prediction]
    assert [failed.video.name for failed in evaluation.failed] == ["gone.mp4"]
    assert evaluation.metrics.num_videos == 1
    summary = evaluation.summary()
    assert summary.num_failed == 1
    assert "There is no file" in summary.failed[0].error


def test_videos_with_several_labels_or_none(recognizer: Recognizer, rendered_video: Path) -> None:
    samples = [Sample(rendered_video, (1, 3)), Sample(rendered_video, ())]

    evaluation = evaluate(recognizer, samples)

    assert evaluation.targets.sum(axis=1).tolist() == [2, 0]
    assert evaluation.metrics.num_videos == 1
    assert evaluation.metrics.confusion is None


def test_an_evaluation_is_ready_for_json(recognizer: Recognizer, rendered_video: Path) -> None:
    evaluation = evaluate(recognizer, [Sample(rendered_video, (4,))])

    data = json.loads(evaluation.record().to_json())

    assert data["views"] == "2x3"
    assert data["scores"] == "template-softmax"
    assert data["runtime"]["name"] == "fake"
    assert data["num_templates"] == 2
    assert len(data["per_class"]) == len(data["confusion"]) == data["num_labels"] == 6
    assert data["videos"][0]["labels"] == ["label 4"]
    assert data["videos"][0]["prediction"] in LABELS


def test_a_list_of_which_nothing_can_be_read_is_refused(
    recognizer: Recognizer, tmp_path: Path
) -> None:
    with pytest.raises(VideoError, match=r"None of the 1 videos .* The first: .*gone\.mp4"):
        evaluate(recognizer, [Sample(tmp_path / "gone.mp4", (0,))])


def odd_entries(folder: Path) -> list[Path]:
    """What a list may name that is not a video, or not any more."""
    names = ("folder.mp4", "pipe.mp4", "socket.mp4", "loop.mp4", "gone.mp4", "empty.mp4")
    directory, pipe, socket_path, loop, gone, empty = (folder / name for name in names)
    directory.mkdir()
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(socket_path))
    loop.symlink_to(loop)
    empty.touch()
    return [directory, pipe, socket_path, loop, gone, empty, folder / f"{'x' * 300}.mp4"]


def test_odd_entries_of_a_list_are_told_and_the_rest_go_on(
    recognizer: Recognizer, rendered_video: Path, tmp_path: Path
) -> None:
    odd = odd_entries(tmp_path)
    samples = [Sample(path, (0,)) for path in (*odd, rendered_video)]
    samples += [Sample(odd[1], (0,), num_frames=3, image_template="{}.png")]

    evaluation = evaluate(recognizer, samples)

    assert [each.video for each in evaluation.failed] == [*odd, odd[1]]
    assert [sample.path for sample in evaluation.samples] == [rendered_video]
    assert "is a pipe, and only files can be read" in str(evaluation.failed[1].error)
