"""`ActionCLIP`: the same numbers as the steps below it, whatever form videos and labels have."""

from __future__ import annotations

import gc
import io
import json
import os
import pty
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rendering import render
from typer.testing import CliRunner

from actionclip_deploy import (
    ActionCLIP,
    ActionClipError,
    BundleError,
    FailedVideo,
    LabelBank,
    LabelBankError,
    LabelError,
    Prediction,
    Predictions,
    Recognizer,
    RuntimeUnavailableError,
    ShapeError,
    VideoError,
    Views,
    WrongKindError,
    read_clip,
)
from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli import app
from actionclip_deploy.motions import all_labels, render_clip, write_video
from actionclip_deploy.video import VideoReader

LABELS = ("opening a door", "closing a door", "running")


@pytest.fixture(scope="module")
def tiny_model(tiny_bundle: Path) -> Iterator[ActionCLIP]:
    with ActionCLIP(tiny_bundle, runtime="onnxruntime", num_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def frames(rendered_video: Path) -> np.ndarray:
    with VideoReader(rendered_video) as reader:
        return reader.read(np.arange(reader.num_frames)).frames


@pytest.fixture
def damaged_video(tmp_path: Path) -> Path:
    path = tmp_path / "damaged.mp4"
    path.write_bytes(b"no video" * 100)
    return path


def recognizer_of(model: ActionCLIP, labels: Any = LABELS, **options: Any) -> Recognizer:
    bank = LabelBank.build(model.bundle, model.runtime, labels, name="a")
    return Recognizer(model.runtime, bank, **options)


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "timings_ms"}


# One road


@pytest.mark.parametrize("views", ["1x1", "2x3"])
def test_scores_are_those_of_the_recognizer_bit_for_bit(
    tiny_model: ActionCLIP, rendered_video: Path, views: str
) -> None:
    expected = recognizer_of(tiny_model, views=Views.parse(views)).predict(rendered_video)
    prediction = tiny_model(rendered_video, labels=LABELS, views=views)
    assert prediction.scores.tobytes() == expected.scores.tobytes()
    assert prediction.predictions == expected.predictions
    assert prediction.frame_indices.tolist() == expected.frame_indices.tolist()


def test_records_are_those_of_the_command_line(
    tiny_bundle: Path, rendered_video: Path, tmp_path: Path, damaged_video: Path
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(LABELS))
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")  # others use the first one
    with ActionCLIP(folder, runtime="onnxruntime") as model:
        bundle = Bundle(model.bundle.path, model.bundle.manifest)
        bank = LabelBank.build(bundle, model.runtime, LABELS, name="of-actionclip")
        bank.save(bundle)
        videos = [rendered_video, damaged_video, rendered_video.parent / "none.mp4"]
        found = model(videos, labels="of-actionclip")
        alone = model(rendered_video, labels="of-actionclip", top_k=2)
    arguments = ["predict", str(folder), *map(str, videos), "--labels", "of-actionclip"]
    # The same runtime, whatever the command line would take by itself.
    printed = CliRunner().invoke(app, [*arguments, "--runtime", "onnxruntime", "--json"])
    records = [json.loads(line) for line in printed.stdout.splitlines()]
    assert [without_times(each.to_dict()) for each in found] == list(map(without_times, records))
    assert json.loads(found.to_json()) == found.to_dict()
    assert json.loads(alone.to_json())["predictions"] == records[0]["predictions"][:2]


@pytest.mark.parametrize(
    "kind",
    ["path", "string", "array", "frames", "pictures", "tensor", "bytes", "file", "memory", "view"],
)
def test_a_video_in_any_form_is_scored_as_its_file(
    tiny_model: ActionCLIP, rendered_video: Path, frames: np.ndarray, kind: str
) -> None:
    import torch

    data = rendered_video.read_bytes()
    given: dict[str, Any] = {
        "path": rendered_video,
        "string": str(rendered_video),
        "array": frames,
        "frames": list(frames),
        "pictures": [Image.fromarray(frame) for frame in frames],
        "tensor": torch.from_numpy(frames.copy()),
        "bytes": data,
        "file": rendered_video.open("rb"),
        "memory": io.BytesIO(data),
        "view": memoryview(data),
    }
    expected = tiny_model(rendered_video, labels=LABELS)
    prediction = tiny_model(given[kind], labels=LABELS)
    given["file"].close()
    assert prediction.scores.tobytes() == expected.scores.tobytes()


@pytest.mark.parametrize("num_frames", [1, 3, 8, 40])
def test_frames_of_any_number_are_sampled_as_from_a_video(
    tiny_model: ActionCLIP, rendered_video: Path, frames: np.ndarray, num_frames: int
) -> None:
    from actionclip_deploy.sampling import sample_segments

    prediction = tiny_model(frames[:num_frames], labels=LABELS)
    num_sampled = tiny_model.bundle.manifest.model.num_frames
    expected = sample_segments(num_frames, num_sampled)
    assert prediction.frame_indices.tolist() == [expected.tolist()]
    clip = read_clip(rendered_video, num_frames=num_sampled)
    sampled = tiny_model(clip.frames, labels=LABELS)
    assert sampled.scores.tobytes() == tiny_model(rendered_video, labels=LABELS).scores.tobytes()


def test_several_videos_in_any_form_give_predictions_in_their_order(
    tiny_model: ActionCLIP, rendered_video: Path, frames: np.ndarray, tmp_path: Path
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("b.mp4", "a.mp4"):
        (folder / name).write_bytes(rendered_video.read_bytes())
    in_folder = tiny_model(folder, labels=LABELS)
    assert [each.name for each in in_folder] == ["a.mp4", "b.mp4"]
    mixed = [folder / "b.mp4", frames, rendered_video.read_bytes(), folder, list(frames[:8])]
    found = tiny_model(mixed, labels=LABELS)
    assert isinstance(found, Predictions)
    names = ["b.mp4", "frames[1]", "bytes[2]", "a.mp4", "b.mp4", "frames[4]"]
    assert [each.name for each in found] == names
    batch = np.stack([frames[:8], frames[8:16]])
    for several in (batch, list(batch), iter(batch), tuple(batch)):
        scores = [each.scores for each in tiny_model(several, labels=LABELS)]
        np.testing.assert_allclose(scores[1], tiny_model(batch[1], labels=LABELS).scores, atol=1e-5)
        assert len(scores) == 2
    assert len(tiny_model(np.array([str(rendered_video)] * 2), labels=LABELS)) == 2
    assert tiny_model([], labels=LABELS) == []


def test_a_stream_is_drawn_no_further_than_needed_and_holds_failures(
    tiny_model: ActionCLIP, rendered_video: Path, damaged_video: Path
) -> None:
    num_drawn = 0

    def endless() -> Iterator[Path]:
        nonlocal num_drawn
        while True:
            num_drawn += 1
            yield damaged_video if num_drawn == 2 else rendered_video

    outcomes = tiny_model(endless(), labels=LABELS, stream=True, workers=1)
    first, second, third = (next(outcomes) for _ in range(3))
    outcomes.close()
    assert isinstance(second, FailedVideo)
    assert first.scores.tobytes() == third.scores.tobytes()
    assert num_drawn < 100


def test_one_video_that_fails_raises_and_one_of_several_stands_in_its_place(
    tiny_model: ActionCLIP, rendered_video: Path, damaged_video: Path
) -> None:
    with pytest.raises(VideoError, match=r"damaged\.mp4 is not a video"):
        tiny_model(damaged_video, labels=LABELS)
    with pytest.raises(VideoError, match="bytes is not a video"):
        tiny_model(damaged_video.read_bytes(), labels=LABELS)
    with pytest.raises(VideoError, match=r"damaged\.mp4 is not a video"):
        tiny_model.embed([rendered_video, damaged_video])
    found = tiny_model([rendered_video, damaged_video], labels=LABELS)
    assert [each.name for each in found.failed] == ["damaged.mp4"]
    assert [each.name for each in found.scored] == [rendered_video.name]
    assert found[1].to_dict()["error"]["code"] == "video_unreadable"


# Labels


def test_labels_may_be_texts_a_file_a_bank_or_its_name_or_left_out(
    tiny_bundle: Path, tmp_path: Path, rendered_video: Path
) -> None:

    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle", ignore=lambda *_: {"labels"})
    file = tmp_path / "labels.csv"
    file.write_text("id,name\n" + "\n".join(f"{i},{each}" for i, each in enumerate(LABELS)))
    model = ActionCLIP(folder, runtime="onnxruntime")
    bank = LabelBank.build(model.bundle, model.runtime, LABELS, name="mine")
    expected = model(rendered_video, labels=LABELS)
    with pytest.raises(LabelBankError, match=r"labels is missing, and .* has no label bank"):
        model(rendered_video)
    bank.save(model.bundle)
    for labels in (list(LABELS), iter(LABELS), file, str(file), bank, "mine", None):
        found = model(rendered_video, labels=labels)
        assert found.scores.tobytes() == expected.scores.tobytes()
        assert found.labels == LABELS
    assert expected.to_dict()["bank"]["name"] is None
    assert found.to_dict()["bank"]["name"] == "mine"
    LabelBank.build(model.bundle, model.runtime, LABELS[:2], name="other").save(model.bundle)
    with pytest.raises(
        LabelBankError, match=r"labels is missing, and .* has the label banks mine, other"
    ):
        model(rendered_video)


def test_labels_are_embedded_once_and_a_bank_that_was_replaced_is_seen(
    tiny_bundle: Path, tmp_path: Path, rendered_video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    model = ActionCLIP(folder, runtime="onnxruntime")
    LabelBank.build(model.bundle, model.runtime, LABELS, name="mine").save(model.bundle)
    calls = []
    encode = model.runtime.encode_text
    monkeypatch.setattr(
        model.runtime, "encode_text", lambda tokens: (calls.append(1), encode(tokens))[1]
    )
    for _ in range(3):
        model(rendered_video, labels=LABELS)
        model(rendered_video, labels=list(LABELS), top_k=1)
    assert len(calls) == 1
    assert model(rendered_video, labels="mine").labels == LABELS
    bank = LabelBank.build(model.bundle, model.runtime, LABELS[:2], name="mine")
    bank.save(model.bundle, overwrite=True)
    assert model(rendered_video, labels="mine").labels == LABELS[:2]


def test_templates_of_a_call_come_before_those_of_the_model(
    tiny_bundle: Path, rendered_video: Path, tmp_path: Path
) -> None:
    file = tmp_path / "templates.txt"
    file.write_text("someone is {}\n")
    model = ActionCLIP(tiny_bundle, runtime="onnxruntime", templates=["{}"], top_k=2)
    first = model(rendered_video, labels=LABELS)
    assert first.to_dict()["bank"]["num_templates"] == 1
    assert len(first.predictions) == 2
    second = model(rendered_video, labels=LABELS, templates=file, top_k=1)
    assert len(second.predictions) == 1
    assert second.scores.tobytes() != first.scores.tobytes()


# Embeddings


def test_embeddings_are_those_that_scores_are_made_of(
    tiny_model: ActionCLIP, rendered_video: Path, frames: np.ndarray
) -> None:
    width = tiny_model.bundle.manifest.model.embedding_dim
    one = tiny_model.embed(rendered_video)
    assert one.shape == (1, width)
    assert tiny_model.embed(frames).tobytes() == one.tobytes()
    assert tiny_model.embed([rendered_video, frames], views="2x3").shape == (2, 6, width)
    assert tiny_model.embed([]).shape == (0, 1, width)
    texts = tiny_model.embed_text([*LABELS, LABELS[0]])
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(texts[0], texts[3])
    assert tiny_model.embed_text(LABELS[0]).shape == (1, width)
    cosines = 100 * (texts[:3] @ one[0]).astype(np.float64)
    expected = np.exp(cosines) / np.exp(cosines).sum()
    scores = tiny_model(rendered_video, labels=LABELS, templates=["{}"]).scores
    np.testing.assert_allclose(scores, expected, atol=1e-3)


# What is wrong is told


FRAMES = np.zeros((4, 6, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (5, WrongKindError, "videos is of type int; give a file's name, a folder, frames"),
        (None, WrongKindError, "of type NoneType"),
        ({"a.mp4": 1}, WrongKindError, "of type dict"),
        ({"a.mp4"}, WrongKindError, "of type set"),
        ([5], WrongKindError, "of type int"),
        (io.StringIO("text"), WrongKindError, "reads as str; open it in binary mode"),
        (FRAMES / 255, ShapeError, r"float64 .*\(frames \* 255\)\.round\(\)"),
        (FRAMES.astype(np.int64), ShapeError, "values from 0 to 255 as uint8"),
        (FRAMES.transpose(0, 3, 1, 2), ShapeError, r"frames\.transpose\(0, 2, 3, 1\)"),
        (FRAMES.transpose(3, 0, 1, 2), ShapeError, r"frames\.transpose\(1, 2, 3, 0\)"),
        (FRAMES[0], ShapeError, "this is one frame, and a clip is several"),
        (Image.new("RGB", (8, 6)), ShapeError, "this is one frame"),
        (FRAMES[..., :1], ShapeError, r"frames\.repeat\(3, axis=-1\)"),
        (np.zeros((4, 6, 8, 4), np.uint8), ShapeError, r"frames\[\.\.\., :3\]"),
        (FRAMES[:0], ShapeError, "one frame or more"),
        (FRAMES[0, 0], ShapeError, "one after the other in the first dimension"),
        ([FRAMES[0], FRAMES[0, :3]], ShapeError, "have different shapes"),
        ([FRAMES, FRAMES / 255], ShapeError, r"frames\[1\] is float64"),
        (b"", VideoError, "bytes is empty"),
        ("nowhere.mp4", VideoError, r"There is no file nowhere\.mp4"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("call", ["score", "embed"])
def test_what_is_no_video_is_told_with_what_to_pass(
    tiny_model: ActionCLIP, given: Any, error: type[Exception], match: str, call: str
) -> None:
    score: dict[str, Any] = {"labels": LABELS} if call == "score" else {}
    with pytest.raises(error, match=match) as caught:
        (tiny_model if call == "score" else tiny_model.embed)(given, **score)
    assert isinstance(caught.value, ActionClipError)


def test_tensors_are_told_in_the_words_of_torch(tiny_model: ActionCLIP) -> None:
    import torch

    tensor = torch.from_numpy(FRAMES.copy())
    with pytest.raises(ShapeError, match=r"frames\.permute\(0, 2, 3, 1\)"):
        tiny_model(tensor.permute(0, 3, 1, 2), labels=LABELS)
    with pytest.raises(WrongKindError, match=r"give frames\.detach\(\)\.cpu\(\)"):
        tiny_model(tensor.float().requires_grad_(), labels=LABELS)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"views": 3}, "views is 3; give CLIPSxCROPS as a string"),
        ({"views": "3"}, "views is '3'; it must be CLIPSxCROPS"),
        ({"top_k": "3"}, "top_k is '3'; give a whole number"),
        ({"top_k": 0}, "top_k is 0; it must be 1 or more"),
        ({"top_k": True}, "top_k is True; give a whole number"),
        ({"scores": "best"}, "scores is 'best'; it must be one of 'template-softmax'"),
        ({"resize": "big"}, "resize is 'big'; it must be one of 'frame', 'crop'"),
        ({"decoder": "gpu"}, "decoder is 'gpu'"),
        ({"max_pixels": 1.5}, "max_pixels is 1.5; give a whole number"),
        ({"workers": 0}, "workers is 0; it must be 1 or more"),
        ({"templates": 5}, r"templates are 5 \(int\)"),
        ({"templates": "{} now"}, "give templates as a list"),
    ],
)
def test_wrong_options_are_told_by_their_names_here(
    tiny_model: ActionCLIP, rendered_video: Path, options: dict[str, Any], match: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        tiny_model(rendered_video, labels=LABELS, **options)


@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        (5, WrongKindError, "model is of type int; give the folder of a bundle"),
        ("no/where", BundleError, "There is no bundle and no checkpoint no/where"),
        ("weights.pt", BundleError, r"no checkpoint weights\.pt; check its name"),
        (Path(__file__).parent, BundleError, r"has no manifest\.json, so it is not a bundle"),
    ],
)
def test_what_is_no_model_is_told(model: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ActionCLIP(model)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"runtime": "fast"}, "runtime is 'fast'; it must be one of auto, onnxruntime"),
        ({"device": 0}, "device is 0; give 'cpu', 'cuda', 'gpu', 'npu' or None"),
        ({"views": "0x1"}, "views is '0x1'"),
        ({"top_k": 0}, "top_k is 0"),
    ],
)
def test_wrong_options_are_told_before_a_checkpoint_is_exported(
    tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        ActionCLIP("motions", cache=tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_options_of_a_checkpoint_are_refused_with_a_bundle(tiny_bundle: Path) -> None:
    with pytest.raises(ValueError, match=r"num_frames was given, .* and .* is a folder"):
        ActionCLIP(tiny_bundle, num_frames=4)


@pytest.mark.parametrize("video", [5, None, FRAMES, b"bytes"])
def test_the_recognizer_says_what_it_takes(tiny_model: ActionCLIP, video: Any) -> None:
    recognizer = recognizer_of(tiny_model)
    with pytest.raises(WrongKindError, match=r"give the name of a file.* taken by ActionCLIP"):
        recognizer.predict(video)
    with pytest.raises(WrongKindError, match="give the name of a file"):
        list(recognizer.predict_all([video]))
    with pytest.raises(WrongKindError, match="give several, as a list of names"):
        recognizer.predict_all("a.mp4")


# Life


def test_a_closed_model_says_so_and_may_be_closed_again(
    tiny_bundle: Path, rendered_video: Path
) -> None:
    with ActionCLIP(tiny_bundle, runtime="onnxruntime") as model:
        assert "closed" not in repr(model)
    model.close()
    assert "closed" in repr(model)
    for use in (lambda: model(rendered_video, labels=LABELS), lambda: model.embed_text("a")):
        with pytest.raises(RuntimeUnavailableError, match="is closed; open it again"):
            use()


def test_a_model_that_nobody_closed_is_let_go_of(
    tiny_checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    model = ActionCLIP(tiny_checkpoints["meanP"], runtime="onnxruntime", cache=False)
    folder = model.bundle.path
    assert folder.is_dir()
    closed = []
    monkeypatch.setattr(type(model.runtime), "close", lambda _: closed.append(1))
    del model
    gc.collect()
    assert closed
    assert not folder.exists()
    assert not list(tmp_path.glob("actionclip-*"))


def test_a_checkpoint_is_exported_once_for_its_content_and_options(
    tiny_checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import actionclip_deploy.export as export

    made = []
    work = export.export_checkpoint

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append(options)
        return work(*arguments, **options)

    monkeypatch.setattr(export, "export_checkpoint", counted)
    cache = tmp_path / "cache"
    path = tiny_checkpoints["meanP"]

    def folder_of(checkpoint: Path, **options: Any) -> Path:
        with ActionCLIP(checkpoint, runtime="onnxruntime", cache=cache, **options) as model:
            return model.bundle.path

    first = folder_of(path)
    assert first.is_relative_to(cache)
    assert folder_of(path) == first
    moved = tmp_path / path.name
    moved.write_bytes(path.read_bytes())
    assert folder_of(moved) == first
    assert len(made) == 1
    assert folder_of(path, num_frames=4) != first
    assert len(made) == 2
    graph = first / "visual.onnx"
    data = bytearray(graph.read_bytes())
    data[-100] ^= 1
    graph.write_bytes(data)
    assert folder_of(path) == first  # made again, since it was damaged
    assert graph.read_bytes() != bytes(data)
    assert len(made) == 3


# What a user sees


def test_a_prediction_prints_its_labels_with_nothing_that_moves_a_terminal(
    tiny_model: ActionCLIP, rendered_video: Path, tmp_path: Path
) -> None:
    strange = tmp_path / "a\x1b[31m.mp4"
    strange.write_bytes(rendered_video.read_bytes())
    prediction = tiny_model(strange, labels=LABELS)
    assert len(repr(prediction)) < 100
    assert "\n" not in repr(prediction)
    for text in (str(prediction), repr(prediction), str(tiny_model([strange], labels=LABELS))):
        assert "\x1b" not in text
        assert prediction.label in text
        assert f"{prediction.score:.4f}" in text
    head, *lines = str(prediction).splitlines()
    assert head == r"a\x1b[31m.mp4"
    assert len(lines) == len(LABELS)
    assert prediction.score == max(prediction.scores) == prediction.predictions[0].score
    assert dict(zip(prediction.labels, prediction.scores.tolist(), strict=True)) == {
        best.label: best.score for best in prediction.predictions
    }


def test_many_predictions_print_the_first_and_the_number_of_the_others(
    tiny_model: ActionCLIP, rendered_video: Path
) -> None:
    prediction = tiny_model(rendered_video, labels=LABELS)
    failed = FailedVideo(Path("<b>.mp4"), VideoError("no\nframe"))
    many = Predictions([prediction, failed] * 40)
    for text in (repr(many), str(many), many._repr_html_()):
        assert "and 30 more" in text
        assert text.count(prediction.label) <= 50
    assert "<b>" not in many._repr_html_()
    assert "&lt;b&gt;.mp4" in many._repr_html_()
    assert "failed: no\\nframe" in many._repr_html_()


def test_an_unknown_video_has_no_label(tiny_model: ActionCLIP, rendered_video: Path) -> None:
    import dataclasses

    from actionclip_deploy.calibration import Answer

    found = tiny_model(rendered_video, labels=LABELS)
    prediction = dataclasses.replace(found, answer=Answer(None, 0.3, 0.5))
    assert prediction.label is None
    for text in (repr(prediction), str(prediction), prediction._repr_html_()):
        assert "unknown" in text
    assert prediction.to_dict()["answer"]["is_unknown"] is True


def test_a_table_has_a_row_for_each_label_and_each_failure(
    tiny_model: ActionCLIP, rendered_video: Path, damaged_video: Path
) -> None:
    found = tiny_model([rendered_video, damaged_video], labels=LABELS, top_k=2)
    table = found.to_dataframe()
    assert table.columns.tolist() == ["video", "rank", "label", "score", "error"]
    assert table["rank"].tolist()[:2] == [1, 2]
    assert table["label"].tolist()[:2] == [best.label for best in found[0].predictions]
    assert table["score"].tolist()[:2] == [best.score for best in found[0].predictions]
    assert "not a video" in table["error"].tolist()[2]
    assert table["score"].isna().tolist() == [False, False, True]
    assert len(found[0].to_dataframe()) == 2


def test_a_table_without_pandas_is_told_with_what_to_install(
    tiny_model: ActionCLIP, rendered_video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    prediction = tiny_model(rendered_video, labels=LABELS)
    with pytest.raises(ImportError, match=r"to_dataframe needs packages .*dataframe"):
        prediction.to_dataframe()


@pytest.mark.parametrize("kind", ["file", "array", "bytes"])
def test_a_picture_shows_the_frames_that_were_used(
    tiny_model: ActionCLIP, rendered_video: Path, frames: np.ndarray, tmp_path: Path, kind: str
) -> None:
    given = {"file": rendered_video, "array": frames, "bytes": rendered_video.read_bytes()}
    picture = tiny_model(given[kind], labels=LABELS).plot(tmp_path / "seen.png")
    with Image.open(tmp_path / "seen.png") as drawn:
        pixels = np.asarray(drawn.convert("RGB")).astype(int)
    is_square = (pixels[..., 0] > 180) & (pixels[..., 1:].max(axis=-1) < 100)
    columns = is_square.any(axis=0).astype(int)
    assert (np.diff(columns) == 1).sum() == 8  # the square of each frame
    assert picture._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"give a file that ends in \.png"):
        tiny_model(given[kind], labels=LABELS).plot(tmp_path / "seen.txt")


def test_a_damaged_video_warns_and_its_record_says_so(
    tiny_model: ActionCLIP, tmp_path: Path
) -> None:
    path = render(tmp_path / "cut.mp4", container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: int(0.7 * path.stat().st_size)])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        prediction = tiny_model(path, labels=LABELS)
        (again,) = tiny_model([path], labels=LABELS)
        in_memory = tiny_model(path.read_bytes(), labels=LABELS)
    texts = [str(warning.message) for warning in told]
    assert len(texts) == 3
    assert list(prediction.warnings) == list(again.warnings) == [texts[0]]
    assert texts[2].startswith("bytes is damaged")
    assert in_memory.scores.tobytes() == prediction.scores.tobytes()
    assert prediction.to_dict()["warnings"] == again.to_dict()["warnings"] == texts[:1]


PROGRAM = """
import sys
from actionclip_deploy import ActionCLIP
model = ActionCLIP(sys.argv[1], runtime="onnxruntime", num_threads=1)
model([sys.argv[2]] * 30, labels=["running", "walking"], progress=sys.argv[3] == "True")
assert "torch" not in sys.modules and "pandas" not in sys.modules
assert "matplotlib" not in sys.modules
"""


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_in_a_terminal_alone_and_nothing_heavy_is_imported(
    tiny_bundle: Path, rendered_video: Path, progress: bool
) -> None:
    arguments = [sys.executable, "-c", PROGRAM, str(tiny_bundle), str(rendered_video)]
    master, slave = pty.openpty()
    done = subprocess.run(
        [*arguments, str(progress)], stderr=slave, stdout=subprocess.PIPE, check=False, timeout=120
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(master)
    assert done.returncode == 0, shown
    assert (b"Scoring videos" in shown) == progress
    piped = subprocess.run(
        [*arguments, "True"], capture_output=True, check=True, text=True, timeout=120
    )
    assert piped.stderr == piped.stdout == ""


# The default model


@pytest.fixture(scope="module")
def motions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ActionCLIP]:
    cache = tmp_path_factory.mktemp("cache")
    with ActionCLIP("motions", runtime="onnxruntime", cache=cache) as model:
        yield model


def test_the_default_model_recognises_what_it_knows(motions: ActionCLIP, tmp_path: Path) -> None:
    chosen = all_labels()[:12]
    labels = [str(label) for label in chosen]
    videos = [
        write_video(tmp_path / f"{place}.mp4", render_clip(label, seed=place))
        for place, label in enumerate(chosen)
    ]
    found = motions(videos, labels=labels)
    right = sum(each.label == label for each, label in zip(found, labels, strict=True))
    assert right >= 10
    alone = motions(videos[0], labels=labels)
    assert isinstance(alone, Prediction)
    assert alone.label == found[0].label
    assert motions(render_clip(chosen[0], seed=0), labels=labels).label == labels[0]


def test_a_label_error_names_the_label(motions: ActionCLIP, rendered_video: Path) -> None:
    with pytest.raises(LabelError, match=r"label 2 \('a'\) repeats label 1"):
        motions(rendered_video, labels=["a", "a"])


# Another runtime


def test_openvino_gives_what_onnxruntime_gives(
    tiny_model: ActionCLIP, tiny_bundle: Path, rendered_video: Path
) -> None:
    expected = tiny_model(rendered_video, labels=LABELS)
    with ActionCLIP(tiny_bundle, runtime="openvino", run_precision="fp32", num_threads=1) as model:
        assert model.runtime.describe().name == "openvino"
        found = model(rendered_video, labels=LABELS)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)


def test_a_run_precision_is_of_openvino(tiny_bundle: Path) -> None:
    with pytest.raises(ValueError, match="precision is 'bf16' and the runtime is onnxruntime"):
        ActionCLIP(tiny_bundle, runtime="onnxruntime", run_precision="bf16")
