"""What is sent between the machines of a Ray cluster, and how a cluster is shared out."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fakes import write_fake_bundle
from rendering import render

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs the extra `ray`", allow_module_level=True)

from actionclip_deploy.errors import ArgumentError, ClusterError
from actionclip_deploy.sampling import Views
from actionclip_deploy.scale import ray_data
from actionclip_deploy.scale.batch import BatchReader, BatchSettings
from actionclip_deploy.scale.ray_data import Layout, RayPlan
from actionclip_deploy.scale.storage import ListedVideo
from actionclip_deploy.scale.video_list import table_of


@pytest.mark.parametrize("cpus", [[1.0], [1.0, 1.0], [2.0], [4.0, 16.0], [0.0, 8.0], [64.0] * 20])
@pytest.mark.parametrize("num_gpus", [0.0, 4.0])
def test_actors_leave_room_for_tasks_wherever_they_are_put(
    cpus: list[float], num_gpus: float
) -> None:
    layout = Layout.of(cpus, num_gpus)
    if layout.actor_gpus:
        assert layout.num_actors * layout.actor_gpus == num_gpus
        return
    # The worst that Ray may do: fill one machine after the other.
    left, num_free = layout.num_actors, 0
    for cores in cpus:
        count = min(left, int(cores / layout.actor_cpus)) if layout.actor_cpus else left
        left -= count
        # Whole ones: those that read a user's list ask for no less.
        num_free += int(cores - count * layout.actor_cpus)
    assert left == 0
    assert num_free >= 1


def test_a_cluster_without_a_core_is_told() -> None:
    with pytest.raises(ClusterError, match="has no machine with a core"):
        Layout.of([0.0], 0.0)


def test_the_driver_holds_a_bounded_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_data, "_MAX_BLOCKS", 10)
    videos = table_of([ListedVideo(str(number)) for number in range(1001)])
    blocks = ray_data._blocks(videos, Layout(4, 1.0, 0.0))
    assert len(blocks) <= 10
    assert pa.concat_tables(blocks) == videos


def test_frames_arrive_as_they_were_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_fake_bundle(tmp_path / "bundle")
    settings = BatchSettings(views=Views(2, 3), num_workers=1)
    plan = RayPlan(
        bundle.manifest.model_dump_json(),
        settings,
        settings.run(bundle, None),
        None,
        {},
        "shelf",
        Layout(1, 0.5, 0.0),
    )
    paths = [render(tmp_path / f"{n}.mp4", num_frames=9 + n, size=(64, 48)) for n in range(3)]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    names = [*map(str, paths), str(tmp_path / "broken.mp4")]
    block = pa.table({"uri": names, "camera": [1, 2, 3, 4]})
    with BatchReader(bundle.manifest, settings) as reader:
        monkeypatch.setattr(ray_data, "_reader", lambda _: reader)
        monkeypatch.setattr(ray_data, "_BLOCK_BYTES", 1)  # a table for each video
        tables = list(ray_data._read_block(block, plan))
        assert [len(table) for table in tables] == [1] * 3 + [1]
        found = list(ray_data._reads_of(pa.concat_tables(tables)))
        for name, camera, other in zip(names, (1, 2, 3, 4), found, strict=True):
            (expected,) = reader.read_all([ListedVideo(name)])
            assert (other.video.uri, other.video.columns) == (name, {"camera": camera})
            assert other.video.etag
            np.testing.assert_array_equal(other.pixels, expected.pixels)
            np.testing.assert_array_equal(other.views, expected.views)
            assert other.failure == expected.failure
            assert other.warnings == expected.warnings


def test_a_dataset_without_a_column_of_videos_is_told() -> None:
    block = pa.table({"path": ["a.mp4"], "camera": [1]})
    with pytest.raises(ArgumentError, match=r"has the columns path, camera; .* `uri`"):
        ray_data._with_list_columns(block)


class Remote:
    """What Ray makes of an object: its methods give what `get` is asked for."""

    def __init__(self, instance: Any) -> None:
        self._instance = instance

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._instance, name)
        return type("Method", (), {"remote": staticmethod(method)})


def test_a_bundle_reaches_a_machine_once_and_is_held_to_its_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_fake_bundle(tmp_path / "bundle")
    settings = BatchSettings()
    sha256 = settings.run(bundle, None).bundle_sha256
    asked: list[str] = []

    def get_actor(name: str) -> Remote:
        asked.append(name)
        return Remote(ray_data._Shelf(str(bundle.path)))

    monkeypatch.setattr(ray_data.ray, "get_actor", get_actor)
    monkeypatch.setattr(ray_data.ray, "get", lambda value: value)
    monkeypatch.setattr(ray_data, "_CHUNK_BYTES", 100)
    monkeypatch.setattr(ray_data.tempfile, "gettempdir", lambda: str(tmp_path))
    for _ in range(2):
        here = ray_data._bundle_here("shelf", sha256)
    assert asked == ["shelf"]
    assert here.path != bundle.path
    for path in bundle.path.rglob("*"):
        if path.is_file():
            copied = here.path / path.relative_to(bundle.path)
            assert copied.read_bytes() == path.read_bytes()
    graph = here.path / "visual.onnx"
    graph.write_bytes(graph.read_bytes()[::-1] + b"x")
    with pytest.raises(ray_data.ActionClipError, match=r"visual.onnx"):
        ray_data._bundle_here("shelf", sha256)
