"""The steps of a run over many videos, with real decoding processes and a runtime in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeRuntime, fake_manifest, write_fake_bundle
from rendering import render

from actionclip_deploy.errors import ArgumentError
from actionclip_deploy.preprocess import Region
from actionclip_deploy.recognizer import VideoEncoder
from actionclip_deploy.sampling import Views
from actionclip_deploy.scale.batch import BatchReader, BatchSettings, Scorer, score_here
from actionclip_deploy.scale.storage import ListedVideo
from actionclip_deploy.scale.video_list import list_videos_of, videos_in


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number in range(5):
        render(folder / f"{number}.mp4", num_frames=10 + 3 * number, size=(64, 48))
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "large.mp4").write_bytes((folder / "0.mp4").read_bytes())
    return folder


def rows(folder: Path, tmp_path: Path, *more: ListedVideo, **settings: Any) -> list[dict[str, Any]]:
    bundle = write_fake_bundle(tmp_path / "bundle")
    chosen = BatchSettings(**{"embeddings": True, "num_workers": 1, **settings})
    scorer = Scorer(FakeRuntime(bundle.manifest), chosen, chosen.run(bundle, None), None)
    listed = [*videos_in(list_videos_of([str(folder)])), *more]
    with BatchReader(bundle.manifest, chosen) as reader:
        return [row for t in score_here(listed, reader, scorer) for row in t.to_pylist()]


@pytest.mark.parametrize("region", ["crop", "swscale"])
def test_rows_have_the_embeddings_of_each_video_read_alone(
    videos: Path, tmp_path: Path, region: Region
) -> None:
    sampled = Views(2, 3)
    encoder = VideoEncoder(FakeRuntime(fake_manifest()), views=sampled, region=region)
    found = rows(videos, tmp_path, views=sampled, region=region)
    assert [Path(row["uri"]).name for row in found] == sorted(p.name for p in videos.iterdir())
    for row in found:
        if row["status"] == "ok":
            expected = encoder.encode(row["uri"]).embeddings
            np.testing.assert_allclose(np.array(row["embeddings"]), expected, atol=1e-6)
            assert row["seconds"]["decode"] > 0
            assert row["runtime"] == "fake (numpy, fp32)"
    (failed,) = (row for row in found if row["status"] != "ok")
    assert failed["error_class"] == "video_unreadable"
    assert "broken.mp4 is not a video" in failed["error"]
    assert failed["embeddings"] is None


def test_what_a_video_may_not_take_is_told_by_its_class(videos: Path, tmp_path: Path) -> None:
    gone = ListedVideo(str(videos / "gone.mp4"))
    found = rows(videos, tmp_path, gone, max_pixels=64 * 48 - 1)
    classes = {Path(row["uri"]).name: row["error_class"] for row in found}
    assert classes["0.mp4"] == "video_too_large"
    assert classes["broken.mp4"] == classes["gone.mp4"] == "video_unreadable"
    (large, *_) = found
    assert large["error"].endswith("raise --max-pixels, or make it smaller.")


def test_a_video_that_takes_too_long_ends_its_process_alone(videos: Path, tmp_path: Path) -> None:
    found = rows(videos, tmp_path, decode_seconds=0.0005)
    assert {row["error_class"] for row in found} <= {"timed_out", "video_unreadable"}
    (first, *_) = found
    assert "took more than 0.0005 seconds" in first["error"]
    assert "raise it (--decode-seconds)" in first["error"]


@pytest.mark.parametrize("name", ["decode_seconds", "decode_memory_bytes", "fetch_bytes"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"{name} is 0; it must be a positive number"):
        BatchSettings(**{name: 0})
