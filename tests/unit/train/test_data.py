"""What a run learns from: clips of annotated videos, and which of them can be used."""

from __future__ import annotations

import logging
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_fakes import SIZES

from actionclip_deploy.errors import LabelError, VideoError
from actionclip_deploy.evaluate.annotations import Sample, read_annotations, score_method_of
from actionclip_deploy.preprocess import preprocess_frames
from actionclip_deploy.prompts import LABEL_ONLY, TEMPLATES
from actionclip_deploy.sampling import sample_segments
from actionclip_deploy.train.augmentation import Augmentation
from actionclip_deploy.train.batches import Sharding, TrainingBatches, load_batches
from actionclip_deploy.train.data import (
    SampleKey,
    VideoClips,
    draw_few_shot,
    open_training_data,
    screen_samples,
)
from actionclip_deploy.train.run_config import AugmentationSection, TrainConfig, parse_config
from actionclip_deploy.video import VideoReader

SIZE, NUM_FRAMES = 32, 4


def _clips(*paths: Path, **choices: Any) -> VideoClips:
    samples = [Sample(path, (number,)) for number, path in enumerate(paths)]
    return VideoClips(samples, num_frames=NUM_FRAMES, input_size=SIZE, **choices)


def _training(*paths: Path, **choices: Any) -> VideoClips:
    augmentation = Augmentation(
        AugmentationSection(randaugment_operations=2), labels=(), input_size=SIZE
    )
    return _clips(*paths, sampling="random", augmentation=augmentation, **choices)


def test_without_augmentation_a_clip_is_what_deployment_sees(rendered_video: Path) -> None:
    with VideoReader(rendered_video) as reader:
        frames = reader.read(sample_segments(40, NUM_FRAMES)).frames
    expected = preprocess_frames(frames, input_size=SIZE, resize_size=SIZE * 256 // 224)[0]

    sample = _clips(rendered_video)[SampleKey(0, 99)]

    assert sample.frames.dtype == torch.uint8
    assert sample.frames.shape == (NUM_FRAMES, 3, SIZE, SIZE)
    assert (sample.frames.numpy() == expected.transpose(0, 3, 1, 2)).all()
    assert sample.label_ids == (0,)


def test_a_training_clip_is_a_function_of_its_key(rendered_video: Path) -> None:
    clips = _training(rendered_video, rendered_video)

    first, other = clips[SampleKey(1, 5)], clips[SampleKey(1, 6)]
    np.random.seed(4)
    torch.manual_seed(4)
    again = pickle.loads(pickle.dumps(clips))[SampleKey(1, 5)]

    assert torch.equal(first.frames, again.frames)
    assert not torch.equal(first.frames, other.frames)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_a_new_start_change_no_pixel(rendered_video: Path, workers: int) -> None:
    clips = _training(*[rendered_video] * 4)

    def batches(first: int, workers: int) -> list[torch.Tensor]:
        keys = TrainingBatches(4, Sharding(2), seed=3, first=first, last=4)
        loaded = load_batches(clips, keys, num_templates=1, num_labels=4, workers=workers)
        return [batch.frames for batch in loaded]

    whole = batches(0, 0)
    rest = batches(2, workers)

    assert len(whole) == 4
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))


def test_random_sampling_draws_one_frame_of_each_segment(rendered_video: Path) -> None:
    clips = _clips(rendered_video, sampling="random")
    with VideoReader(rendered_video) as reader:
        frames = reader.read(np.arange(40)).frames
    every = preprocess_frames(frames, input_size=SIZE, resize_size=SIZE * 256 // 224)[0]
    every = every.transpose(0, 3, 1, 2)

    starts = []
    for seed in range(20):
        clip = clips[SampleKey(0, seed)].frames.numpy()
        places = [[n for n in range(40) if (every[n] == frame).all()] for frame in clip]
        for segment, found in enumerate(places):
            assert any(10 * segment <= n < 10 * segment + 10 for n in found)
        starts.append(places[0][0])

    assert len(set(starts)) > 4


def test_the_length_of_the_videos_is_known(
    tmp_path: Path, rendered_video: Path, still_picture: Path
) -> None:
    """40 frames at 10 a second are 4 seconds; a picture and a broken file have no length."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    assert _training(rendered_video).typical_seconds() == pytest.approx(4.0)
    assert _training(broken, still_picture, rendered_video).typical_seconds() == pytest.approx(4.0)
    assert _training(broken).typical_seconds() is None


@pytest.fixture
def still_picture(tmp_path: Path) -> Path:
    import av

    path = tmp_path / "still.png"
    with av.open(str(path), "w", format="image2") as file:
        stream = file.add_stream("png")
        stream.width, stream.height, stream.pix_fmt = 32, 32, "rgb24"
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def test_another_video_comes_in_the_place_of_a_broken_one(
    rendered_video: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clips = _training(tmp_path / "gone.mp4", rendered_video)

    with caplog.at_level(logging.WARNING):
        for seed in range(5):
            sample = clips[SampleKey(0, seed)]
            assert sample.index == 1
            assert sample.label_ids == (1,)

    assert [record.message.count("gone.mp4") for record in caplog.records] == [1]


def test_a_broken_video_may_be_fatal(tmp_path: Path, rendered_video: Path) -> None:
    clips = _training(tmp_path / "gone.mp4", rendered_video, bad_videos="fail")

    with pytest.raises(VideoError, match=r"no file .*gone\.mp4"):
        clips[SampleKey(0, 1)]


def test_replacing_comes_to_an_end(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="gives no frames, and neither do 9 videos in its place"):
        _training(tmp_path / "gone.mp4")[SampleKey(0, 1)]


def test_a_video_of_too_few_frames_is_a_broken_one(rendered_video: Path) -> None:
    clips = _clips(rendered_video, bad_videos="fail", min_frames=50)

    with pytest.raises(VideoError, match="at least 50 are needed"):
        clips[SampleKey(0, 1)]


@pytest.fixture
def folder(tmp_path: Path, rendered_video: Path) -> Path:
    """Six training videos of two labels, one of them missing; one for validation."""
    for number in range(6):
        if number != 3:
            (tmp_path / f"{number}.mp4").write_bytes(rendered_video.read_bytes())
    lines = [f"{number}.mp4 {number % 2}\n" for number in range(6)]
    (tmp_path / "train.txt").write_text("".join(lines))
    (tmp_path / "val.txt").write_text("0.mp4 moving right\n")
    (tmp_path / "labels.txt").write_text("moving left\nmoving right\n")
    return tmp_path


def _config(folder: Path, **data: Any) -> TrainConfig:
    return parse_config(
        {
            "model": {"sizes": SIZES, "num_frames": NUM_FRAMES},
            "data": {
                "annotations": str(folder / "train.txt"),
                "validation": str(folder / "val.txt"),
                "labels": str(folder / "labels.txt"),
                **data,
            },
            "run": {"output": str(folder / "run"), "batch_size": 2},
        }
    )


def test_a_configuration_opens_its_videos_labels_and_templates(folder: Path) -> None:
    data = open_training_data(_config(folder))

    assert data.labels == ("moving left", "moving right")
    assert data.templates == TEMPLATES
    assert len(data.training) == 5
    assert data.training[SampleKey(0, 0)].frames.shape == (NUM_FRAMES, 3, SIZE, SIZE)
    assert data.validation is not None
    assert data.validation[SampleKey(0, 0)].label_ids == (1,)


def test_validation_clips_do_not_depend_on_the_seed(folder: Path) -> None:
    validation = open_training_data(_config(folder)).validation

    assert validation is not None
    first, other = (validation[SampleKey(0, seed)].frames for seed in (1, 2))
    assert torch.equal(first, other)


def test_bad_videos_can_end_a_run_before_it_starts(folder: Path) -> None:
    (folder / "5.mp4").write_bytes(b"no video")

    with pytest.raises(VideoError, match=r"2 videos cannot be used \(1 missing, 1 unreadable\)"):
        open_training_data(_config(folder, bad_videos="fail"))


def test_few_videos_of_each_label_can_be_asked_for(folder: Path) -> None:
    assert len(open_training_data(_config(folder, few_shot=1)).training) == 2


def test_the_bare_label_can_be_the_only_template(folder: Path) -> None:
    assert open_training_data(_config(folder, label_only=True)).templates == LABEL_ONLY


def test_labels_that_do_not_belong_to_the_list_are_refused(folder: Path) -> None:
    (folder / "labels.txt").write_text("moving left\n")

    with pytest.raises(LabelError, match=r"train\.txt line 2 has the label 1"):
        open_training_data(_config(folder))


def test_videos_without_a_label_are_left_out(folder: Path) -> None:
    (folder / "train.csv").write_text("id,actions\n0,c001 0 1;c000 1 2\n1,\n2,c000 0 1\n")

    data = open_training_data(
        _config(
            folder,
            annotations=str(folder / "train.csv"),
            validation=None,
            format="multi-label",
        )
    )

    assert [data.training[SampleKey(n, 0)].label_ids for n in range(2)] == [(0, 1), (0,)]
    assert len(data.training) == 2


def test_a_checkpoint_tells_the_size_of_frames(
    folder: Path, tiny_checkpoints: dict[str, Path]
) -> None:
    config = _config(folder)
    model = config.model.model_copy(
        update={"sizes": None, "checkpoint": str(tiny_checkpoints["Transf"]), "num_frames": 8}
    )

    data = open_training_data(config.model_copy(update={"model": model}))

    assert data.training[SampleKey(0, 0)].frames.shape == (8, 3, 64, 64)


SAMPLES = [Sample(Path(f"{number}.mp4"), (number % 5,)) for number in range(60)]


@pytest.mark.parametrize("per_label", [1, 4, 12])
def test_each_label_has_k_videos(per_label: int) -> None:
    drawn = draw_few_shot(SAMPLES, per_label, seed=0)

    assert Counter(s.label_ids for s in drawn) == {(label,): per_label for label in range(5)}
    assert [SAMPLES.index(s) for s in drawn] == sorted(SAMPLES.index(s) for s in drawn)


def test_the_seed_decides_which() -> None:
    first, again, other = (draw_few_shot(SAMPLES, 3, seed=seed) for seed in (1, 1, 2))

    assert first == again != other


def test_a_label_with_fewer_videos_gives_all_of_them(caplog: pytest.LogCaptureFixture) -> None:
    samples = [*SAMPLES, Sample(Path("rare.mp4"), (7,))]

    with caplog.at_level(logging.WARNING):
        drawn = draw_few_shot(samples, 2, seed=0)

    assert samples[-1] in drawn
    assert len(drawn) == 11
    assert "fewer than 2 videos of 1 label, the first of them label 7 with 1" in caplog.text


def test_a_video_with_several_labels_counts_for_each() -> None:
    samples = [Sample(Path(f"{n}.mp4"), (n % 3, 3)) for n in range(30)]

    drawn = draw_few_shot(samples, 2, seed=0)

    assert Counter(s.label_ids[0] for s in drawn) == {0: 2, 1: 2, 2: 2}


@pytest.fixture
def samples(rendered_video: Path, tmp_path: Path) -> tuple[Sample, ...]:
    """Good, missing, good but for its part, broken, too short by its list, missing again."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(rendered_video.read_bytes()[:200])
    folder = tmp_path / "frames"
    folder.mkdir()
    missing = tmp_path / "missing.mp4"
    return (
        Sample(rendered_video, (0,)),
        Sample(missing, (0,)),
        Sample(rendered_video, (1,), start_seconds=3.0, end_seconds=3.25),
        Sample(broken, (0,)),
        Sample(folder, (0,), num_frames=3, image_template="img_{:05d}.jpg"),
        Sample(missing, (1,)),
    )


def test_each_kind_of_bad_video_is_found_and_listed_once(samples: tuple[Sample, ...]) -> None:
    screening = screen_samples(samples, min_frames=4, open_videos=True)

    assert screening.samples == samples[:1]
    assert [(bad.path.name, bad.problem) for bad in screening.bad] == [
        ("missing.mp4", "missing"),
        ("square.mp4", "too short"),
        ("broken.mp4", "unreadable"),
        ("frames", "too short"),
    ]


def test_without_opening_videos_only_what_is_cheap_is_found(samples: tuple[Sample, ...]) -> None:
    screening = screen_samples(samples, min_frames=4)

    assert [bad.problem for bad in screening.bad] == ["missing", "too short"]
    assert screening.samples == (samples[0], samples[2], samples[3])


def test_a_summary_counts_and_names_them_in_one_warning(
    samples: tuple[Sample, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        screen_samples(samples, min_frames=4, open_videos=True)

    (record,) = caplog.records
    assert "4 videos cannot be used (1 missing, 2 too short, 1 unreadable)" in record.message
    assert "missing.mp4 (missing)" in record.message


def test_good_samples_give_no_warning(
    samples: tuple[Sample, ...], caplog: pytest.LogCaptureFixture
) -> None:
    screening = screen_samples(samples[:1], open_videos=True)

    assert screening.samples == samples[:1]
    assert screening.bad == ()
    assert not caplog.records


def test_videos_of_more_pixels_than_are_allowed_are_bad(samples: tuple[Sample, ...]) -> None:
    with pytest.raises(VideoError, match=r"1 videos cannot be used \(1 unreadable\)"):
        screen_samples(samples[:1], open_videos=True, max_pixels=100)
    clips = VideoClips(samples[:1], num_frames=2, input_size=32, bad_videos="fail", max_pixels=100)
    with pytest.raises(VideoError, match="they may have 100 pixels"):
        clips[SampleKey(0, 0)]


def test_bad_videos_may_be_fatal(samples: tuple[Sample, ...]) -> None:
    with pytest.raises(VideoError, match=r"1 videos cannot be used \(1 missing\): .*missing\.mp4"):
        screen_samples(samples, bad_videos="fail")


def test_samples_of_which_none_is_left_are_refused(samples: tuple[Sample, ...]) -> None:
    with pytest.raises(VideoError, match="correct the list or the folder"):
        screen_samples([samples[1], samples[5]])


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    missing = [Sample(tmp_path / f"{number}.mp4", (0,)) for number in range(14)]

    with pytest.raises(VideoError, match=r"14 videos .* and 4 more; correct"):
        screen_samples(missing)


def test_odd_entries_of_a_list_are_told_and_the_rest_go_on(
    tmp_path: Path, rendered_video: Path
) -> None:
    pipe, folder, long = tmp_path / "pipe.mp4", tmp_path / "a.mp4", tmp_path / ("x" * 300 + ".mp4")
    os.mkfifo(pipe)
    folder.mkdir()
    samples = [Sample(path, (0,)) for path in (pipe, folder, long, rendered_video)]

    found = screen_samples(samples)

    assert [sample.path for sample in found.samples] == [rendered_video]
    assert [(bad.path, bad.problem) for bad in found.bad] == [
        (path, "unreadable") for path in (pipe, folder, long)
    ]


@pytest.mark.parametrize(
    ("table", "expected"),
    [("0,c001 0 1;c000 1 2\n2,c000 0 1\n", "independent"), ("0,c001 0 1\n2,c000 0 1\n", None)],
)
def test_validation_is_scored_as_evaluate_scores_the_list(
    folder: Path, table: str, expected: str | None
) -> None:
    path = folder / "val.csv"
    path.write_text(f"id,actions\n{table}")

    data = open_training_data(
        _config(folder, annotations=str(path), validation=str(path), format="multi-label")
    )

    assert data.scores == expected
    assert score_method_of(read_annotations(path, data.labels)) == expected


def test_folders_of_videos_are_lists_and_labels_in_one(
    tmp_path: Path, rendered_video: Path
) -> None:
    for name in ("train/moving_left/a", "train/moving right/b", "val/moving right/c"):
        path = tmp_path / f"{name}.mp4"
        path.parent.mkdir(parents=True)
        path.write_bytes(rendered_video.read_bytes())
    folders = {"annotations": str(tmp_path / "train"), "validation": str(tmp_path / "val")}
    data = open_training_data(_config(tmp_path, **folders, labels=None))
    assert data.labels == ("moving left", "moving right")
    # The samples are in the order of the folders' names, and a blank is before an underscore.
    assert [data.training[SampleKey(i, 0)].label_ids for i in range(2)] == [(1,), (0,)]
    assert data.validation is not None
    assert data.validation[SampleKey(0, 0)].label_ids == (1,)
    (tmp_path / "val" / "moving right").rename(tmp_path / "val" / "moving up")
    with pytest.raises(LabelError, match="'moving up', which is not among the 2 labels"):
        open_training_data(_config(tmp_path, **folders, labels=None))


def test_a_list_needs_a_label_file(folder: Path) -> None:
    with pytest.raises(LabelError, match=r"data\.labels is missing, and .*train\.txt is not"):
        open_training_data(_config(folder, labels=None))
