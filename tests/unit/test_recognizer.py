"""The recognizer with a runtime in numpy and videos that are arrays."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeRuntime, fake_manifest

from actionclip_deploy import recognizer as module
from actionclip_deploy import views as reading
from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import InferenceError, LabelBankError, VideoError, VideoWarning
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.manifest import QuantizationSpec
from actionclip_deploy.preprocess import preprocess_frames
from actionclip_deploy.recognizer import FailedVideo, Prediction, Recognizer
from actionclip_deploy.runtimes import call_sizes, open_runtime
from actionclip_deploy.sampling import Views
from actionclip_deploy.scoring import score_clips
from actionclip_deploy.video import Clip
from actionclip_deploy.video.memory import ArrayVideo


class FakeReader:
    """A video of 20 frames at 10 frames per second; counts the frames that are read."""

    num_frames = 20
    frames_read = 0

    def __init__(self, path: str | Path, **options: object) -> None:
        if "missing" in str(path):
            raise VideoError(f"{path} does not exist.")
        if "damaged" in str(path) and "on_warning" in options:
            options["on_warning"](VideoWarning(f"{path} is damaged."))  # type: ignore[operator]
        self.pts_seconds = np.arange(self.num_frames) / 10
        rng = np.random.default_rng(list(str(path).encode()))
        self.frames = rng.integers(0, 256, (self.num_frames, 40, 60, 3), dtype=np.uint8)

    def read(self, indices: np.ndarray) -> Clip:
        FakeReader.frames_read += len(indices)
        return Clip(self.frames[indices], indices, self.pts_seconds[indices])

    def __enter__(self) -> FakeReader:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _fake_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VideoReader", FakeReader)
    monkeypatch.setattr(FakeReader, "frames_read", 0)


def make_bank(width: int = 16, num_labels: int = 6) -> LabelBank:
    embeddings = np.random.default_rng(3).normal(size=(2, num_labels, width))
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    return LabelBank(
        name="mine",
        labels=tuple(f"label {i}" for i in range(num_labels)),
        templates=("a photo of action {}", "{}, an action"),
        embeddings=embeddings.astype(np.float32),
        textual_sha256="0" * 64,
    )


def test_one_view_is_sampled_preprocessed_encoded_and_scored_in_that_order() -> None:
    runtime, bank = FakeRuntime(fake_manifest()), make_bank()
    prediction = Recognizer(runtime, bank, top_k=3).predict("a.mp4")

    # By hand: 20 frames, T = 4 -> segments of 5, centre at (5 - 1) / 2.
    indices = np.array([2, 7, 12, 17])
    frames = FakeReader("a.mp4").frames[indices]
    pixels = preprocess_frames(frames, input_size=32, resize_size=36)[0]
    embedding = runtime.encode_clips(runtime.encode_frames(pixels)[np.newaxis])
    scores = score_clips(embedding, bank.embeddings)[0]

    np.testing.assert_array_equal(prediction.frame_indices, [indices])
    np.testing.assert_allclose(prediction.pts_seconds, [[0.2, 0.7, 1.2, 1.7]])
    np.testing.assert_allclose(prediction.scores, scores, atol=1e-6)
    order = np.argsort(-scores)[:3]
    assert [best.label for best in prediction.predictions] == [bank.labels[i] for i in order]
    assert prediction.video == Path("a.mp4")
    assert set(prediction.timings_ms) == {
        "open", "read", "preprocess", "hash", "visual", "temporal", "score", "total",
    }  # fmt: skip


@pytest.mark.parametrize("views", [Views(3, 1), Views(1, 3), Views(2, 3)])
def test_scores_of_views_are_the_mean_of_the_scores_of_each(views: Views) -> None:
    runtime, bank = FakeRuntime(fake_manifest()), make_bank()
    prediction = Recognizer(runtime, bank, views=views).predict("a.mp4")

    frames = FakeReader("a.mp4").frames
    each = []
    for clip in prediction.frame_indices:
        crops = preprocess_frames(
            frames[clip], input_size=32, resize_size=36, num_crops=views.num_crops
        )
        each += [
            score_clips(runtime.encode_video(crop[np.newaxis]), bank.embeddings) for crop in crops
        ]
    np.testing.assert_allclose(prediction.scores, np.mean(each, axis=0)[0], atol=1e-6)
    assert prediction.frame_indices.shape == (views.num_clips, 4)


def test_a_frame_shared_by_several_clips_is_read_and_encoded_once() -> None:
    runtime = FakeRuntime(fake_manifest())
    prediction = Recognizer(runtime, make_bank(), views=Views(10, 1)).predict("a.mp4")
    distinct = len(np.unique(prediction.frame_indices))
    assert FakeReader.frames_read == distinct < prediction.frame_indices.size
    assert sum(shape[0] for graph, shape in runtime.calls if graph == "visual") == distinct


def test_work_is_cut_into_calls_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Recognizer(FakeRuntime(fake_manifest()), make_bank(), views=Views(3, 3))
    expected = whole.predict("a.mp4").scores
    monkeypatch.setattr(reading, "FRAMES_PER_READ", 3)
    monkeypatch.setattr(call_sizes, "FRAMES_PER_CALL", 3)
    runtime = FakeRuntime(fake_manifest())
    parts = Recognizer(runtime, make_bank(), views=Views(3, 3)).predict("a.mp4")
    assert max(shape[0] for graph, shape in runtime.calls if graph == "visual") == 3
    np.testing.assert_allclose(parts.scores, expected, atol=1e-6)


def test_a_model_that_mixes_frames_gets_whole_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_sizes, "CLIPS_PER_CALL", 2)
    runtime = FakeRuntime(fake_manifest(visual_prompt="shift"))
    prediction = Recognizer(runtime, make_bank(), views=Views(3, 1)).predict("a.mp4")
    assert [shape[:2] for _, shape in runtime.calls] == [(2, 4), (1, 4)]
    assert "video" in prediction.timings_ms


def test_frames_that_are_open_already_are_scored_as_their_video() -> None:
    recognizer = Recognizer(FakeRuntime(fake_manifest()), make_bank(), views=Views(2, 3))

    from_file = recognizer.predict("video.mp4")
    from_frames = recognizer.predict_frames(FakeReader("video.mp4"), video="other")

    assert from_frames.scores.tolist() == from_file.scores.tolist()
    assert from_frames.frame_indices.tolist() == from_file.frame_indices.tolist()
    assert from_frames.video == Path("other")
    assert "open" not in from_frames.timings_ms


def test_a_video_that_fails_is_given_in_its_place_and_the_rest_go_on() -> None:
    recognizer = Recognizer(FakeRuntime(fake_manifest()), make_bank())
    outcomes = list(recognizer.predict_all(["a.mp4", "missing.mp4", "b.mp4"]))
    assert [type(outcome) for outcome in outcomes] == [Prediction, FailedVideo, Prediction]
    assert isinstance(outcomes[1], FailedVideo)
    assert "does not exist" in str(outcomes[1].error)


def test_clips_are_sampled_again_when_damage_is_found_while_reading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read_and_find_damage(self: FakeReader, indices: np.ndarray) -> Clip:
        self.num_frames = 10
        indices = np.minimum(indices, 9)
        return Clip(self.frames[indices], indices, self.pts_seconds[indices])

    monkeypatch.setattr(FakeReader, "read", read_and_find_damage)
    prediction = Recognizer(FakeRuntime(fake_manifest()), make_bank()).predict("a.mp4")
    # By hand: 10 frames, T = 4 -> trunc(2.5 i + 0.75).
    np.testing.assert_array_equal(prediction.frame_indices, [[0, 3, 5, 8]])


def test_top_k_beyond_the_labels_gives_them_all() -> None:
    recognizer = Recognizer(FakeRuntime(fake_manifest()), make_bank(), top_k=100)
    assert len(recognizer.predict("a.mp4").predictions) == 6


def test_the_method_of_the_manifest_is_the_default_and_another_can_be_chosen() -> None:
    runtime = FakeRuntime(fake_manifest())
    softmax = Recognizer(runtime, make_bank()).predict("a.mp4").scores
    independent = Recognizer(runtime, make_bank(), method="independent").predict("a.mp4").scores
    assert softmax.sum() == pytest.approx(1.0, abs=1e-5)
    assert independent.sum() != pytest.approx(1.0, abs=1e-1)


def test_a_bank_of_another_width_is_refused() -> None:
    with pytest.raises(LabelBankError, match=r"width 8 and the model's are 16"):
        Recognizer(FakeRuntime(fake_manifest()), make_bank(width=8))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"method": "max"}, "method is 'max'; it must be one of template-softmax"),
        ({"decoder": "gpu"}, "decoder is 'gpu'; it must be 'software' or 'nvdec'"),
        ({"region": "middle"}, "region is 'middle'; it must be one of frame, crop, swscale"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Recognizer(FakeRuntime(fake_manifest()), make_bank(), **arguments)  # type: ignore[arg-type]


NAMES = ["a.mp4", "missing.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4", "f.mp4", "g.mp4"]


def one_by_one(recognizer: Recognizer, names: list[str]) -> Iterator[Prediction | FailedVideo]:
    for name in names:
        yield from recognizer.predict_all([name], num_workers=1)


def same(first: Prediction | FailedVideo, second: Prediction | FailedVideo) -> bool:
    if isinstance(first, FailedVideo) or isinstance(second, FailedVideo):
        return (first.video, type(first)) == (second.video, type(second))
    return (
        first.video == second.video
        and first.predictions == second.predictions
        and first.scores.tobytes() == second.scores.tobytes()
        and first.frame_indices.tolist() == second.frame_indices.tolist()
        and np.array_equal(first.pts_seconds, second.pts_seconds, equal_nan=True)
    )


@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("visual_prompt", ["transf", "shift"])
@pytest.mark.parametrize("views", [Views(1, 1), Views(3, 1), Views(2, 3)])
def test_a_run_over_many_videos_gives_what_each_gives_alone(
    views: Views, visual_prompt: str, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_sizes, "FRAMES_PER_CALL", 7)
    monkeypatch.setattr(call_sizes, "CLIPS_PER_CALL", 4)
    recognizer = Recognizer(
        FakeRuntime(fake_manifest(visual_prompt=visual_prompt)), make_bank(), views=views
    )
    together = list(recognizer.predict_all(NAMES, num_workers=num_workers))
    alone = list(one_by_one(recognizer, NAMES))
    assert [str(outcome.video) for outcome in together] == NAMES
    assert all(map(same, together, alone))
    assert same(together[0], recognizer.predict("a.mp4"))
    # The videos differ, so that one in the place of another would be seen.
    assert not same(together[0], recognizer.predict("b.mp4"))


def test_calls_are_full_across_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_sizes, "FRAMES_PER_CALL", 6)
    runtime = FakeRuntime(fake_manifest())
    list(Recognizer(runtime, make_bank()).predict_all(NAMES))
    # By hand: 7 videos of 4 frames in calls of 6.
    assert [shape[0] for graph, shape in runtime.calls if graph == "visual"] == [6, 6, 6, 6, 4]


STILL = ArrayVideo(np.full((4, 40, 60, 3), 90, np.uint8), "still")
ALMOST = np.full((4, 40, 60, 3), 90, np.uint8)
ALMOST[2, 20, 30, 1] += 100


def counts(outcomes: Iterable[Prediction | FailedVideo]) -> list[tuple[int | None, int | None]]:
    return [
        (each.num_frames_encoded, each.num_frames_reused)
        for each in outcomes
        if isinstance(each, Prediction)
    ]


@pytest.mark.parametrize("frames_per_call", [3, 4, 32])
def test_equal_frames_of_a_run_are_encoded_once(
    frames_per_call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_sizes, "FRAMES_PER_CALL", frames_per_call)
    videos = ["a.mp4", STILL, "b.mp4", "a.mp4", STILL, "missing.mp4", "b.mp4"]
    runtime, plain = FakeRuntime(fake_manifest()), FakeRuntime(fake_manifest())
    reused = list(Recognizer(runtime, make_bank()).predict_all(videos))
    anew = list(Recognizer(plain, make_bank(), reuse=False).predict_all(videos))
    assert all(map(same, reused, anew))
    assert counts(reused) == [(4, 0), (1, 3), (4, 0), (0, 4), (0, 4), (0, 4)]
    assert counts(anew) == [(4, 0)] * 6
    assert sum(shape[0] for graph, shape in runtime.calls if graph == "visual") == 9
    assert sum(shape[0] for graph, shape in plain.calls if graph == "visual") == 24


def test_a_frame_that_differs_in_one_pixel_is_encoded() -> None:
    recognizer = Recognizer(FakeRuntime(fake_manifest()), make_bank())
    almost = recognizer.predict(ArrayVideo(ALMOST))
    assert counts([recognizer.predict(STILL), almost]) == [(1, 3), (2, 2)]


def test_a_run_of_nothing_but_copies_gives_outcomes_before_its_end() -> None:
    drawn: list[int] = []

    def copies() -> Iterator[str]:
        while True:
            drawn.append(len(drawn))
            yield "a.mp4"

    outcomes = Recognizer(FakeRuntime(fake_manifest()), make_bank()).predict_all(
        copies(), num_workers=1
    )
    next(outcomes)
    outcomes.close()
    # Two calls of 32 frames that are known, beyond the first video, and what is read ahead.
    assert len(drawn) <= 1 + 64 // 4 + 1 + (1 + 2 * 8)


@pytest.mark.parametrize(
    "given", [{"visual_prompt": "shift"}, {"recipe": "dynamic"}, {"reuse": False}]
)
def test_frames_are_not_reused_where_that_could_change_a_result(given: dict[str, Any]) -> None:
    manifest = fake_manifest(visual_prompt=given.get("visual_prompt", "transf"))
    if "recipe" in given:
        quantization = QuantizationSpec.model_construct(recipe=given["recipe"])
        manifest = manifest.model_copy(update={"quantization": quantization})
    recognizer = Recognizer(
        FakeRuntime(manifest), make_bank(), reuse=bool(given.get("reuse", True))
    )
    outcomes = list(recognizer.predict_all([STILL, STILL], num_workers=1))
    assert counts(outcomes) == [(4, 0), (4, 0)]
    assert all("hash" not in each.timings_ms for each in outcomes if isinstance(each, Prediction))


def test_reused_features_change_no_bit_of_a_real_graph(
    tiny_bundle: Path, rendered_video: Path
) -> None:
    bundle = Bundle.open(tiny_bundle)
    videos = [STILL, rendered_video, ArrayVideo(ALMOST), rendered_video, STILL]
    with open_runtime(bundle, "onnxruntime", num_threads=1) as runtime:
        bank = make_bank(bundle.manifest.model.embedding_dim)
        outcomes = [
            list(
                Recognizer(runtime, bank, views=Views(2, 3), reuse=reuse).predict_all(
                    videos, num_workers=1
                )
            )
            for reuse in (True, False)
        ]
    assert all(map(same, *outcomes))
    assert sum(reused or 0 for _, reused in counts(outcomes[0])) > 0
    assert sum(reused or 0 for _, reused in counts(outcomes[1])) == 0


def test_a_graph_whose_rows_depend_on_the_call_gets_calls_of_one_video(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest = fake_manifest()
    quantization = QuantizationSpec.model_construct(recipe="dynamic")
    runtime = FakeRuntime(manifest.model_copy(update={"quantization": quantization}))
    list(Recognizer(runtime, make_bank()).predict_all(NAMES))
    assert [shape[0] for graph, shape in runtime.calls if graph == "visual"] == [4] * 7


def test_videos_are_drawn_no_further_ahead_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_sizes, "FRAMES_PER_CALL", 8)
    drawn = []

    def endless() -> Iterator[str]:
        while True:
            drawn.append(len(drawn))
            yield f"{len(drawn)}.mp4"

    outcomes = Recognizer(FakeRuntime(fake_manifest()), make_bank()).predict_all(
        endless(), num_workers=3
    )
    for _ in range(10):
        next(outcomes)
    outcomes.close()
    # Two videos fill a call: 10 outcomes, one more of the last call, 3 + 2 x 2 ahead of it.
    assert len(drawn) <= 10 + 1 + 3 + 2 * 2


def reading_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("actionclip-read")]


def test_leaving_early_stops_the_threads() -> None:
    outcomes = Recognizer(FakeRuntime(fake_manifest()), make_bank()).predict_all(NAMES * 50)
    next(outcomes)
    assert reading_threads()
    outcomes.close()
    assert reading_threads() == []


@pytest.mark.parametrize("error", [InferenceError("out of memory"), KeyboardInterrupt()])
def test_an_error_of_the_runtime_stops_the_threads(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> np.ndarray:
        raise error

    monkeypatch.setattr(FakeRuntime, "_run", fail)
    outcomes = Recognizer(FakeRuntime(fake_manifest()), make_bank()).predict_all(NAMES * 50)
    with pytest.raises(type(error)):
        next(outcomes)
    assert reading_threads() == []


def test_warnings_come_before_the_outcome_of_their_video() -> None:
    recognizer = Recognizer(FakeRuntime(fake_manifest()), make_bank())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", VideoWarning)
        seen = []
        for outcome in recognizer.predict_all(["a", "damaged", "b", "damaged missing", "c"]):
            seen += [str(warning.message) for warning in caught] + [str(outcome.video)]
            caught.clear()
    assert seen == ["a", "damaged is damaged.", "damaged", "b", "damaged missing", "c"]


def test_a_number_of_workers_below_one_is_named() -> None:
    recognizer = Recognizer(FakeRuntime(fake_manifest()), make_bank())
    with pytest.raises(ValueError, match="num_workers is 0; it must be 1 or more"):
        recognizer.predict_all(["a.mp4"], num_workers=0)


def test_stages_of_a_run_over_many_videos_add_up() -> None:
    recognizer = Recognizer(FakeRuntime(fake_manifest()), make_bank())
    for outcome in recognizer.predict_all(["a.mp4", "b.mp4", "c.mp4"]):
        assert isinstance(outcome, Prediction)
        stages = dict(outcome.timings_ms)
        total = stages.pop("total")
        names = {"open", "read", "preprocess", "hash", "visual", "temporal", "score"}
        assert set(stages) == names
        assert sum(stages.values()) == pytest.approx(total, abs=0.01)


# Decoded frames of one of the videos take 0.8 MB, its packets and its decoder more than 1 MB: a
# leak of either over 200 videos would be beyond this by far.
MAX_GROWTH_BYTES = 24 * 2**20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_flat_over_hundreds_of_videos(rendered_video: Path) -> None:
    embeddings = np.full((1, 3, 16), 0.25, np.float32)
    bank = LabelBank("mine", ("a", "b", "c"), ("{}",), embeddings, "0" * 64)
    recognizer = Recognizer(FakeRuntime(fake_manifest()), bank)
    start = 0
    for number, outcome in enumerate(
        recognizer.predict_all(repeat(rendered_video, 250), num_workers=2)
    ):
        assert isinstance(outcome, Prediction)
        if number == 50:  # buffers and pools have their size by then
            start = resident_bytes()
    assert resident_bytes() - start < MAX_GROWTH_BYTES
