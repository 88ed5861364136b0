"""Lists of videos: what they may be, and what is kept of them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actionclip_deploy.errors import VideoListError
from actionclip_deploy.scale.video_list import largest_first, list_videos_of, videos_in


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in {"a.mp4": 10, "b.mp4": 30, "c.mp4": 20}.items():
        (tmp_path / name).write_bytes(b"0" * size)
    return tmp_path


def uris(table: pa.Table) -> list[str]:
    return [Path(uri).name for uri in table["uri"].to_pylist()]


def test_large_videos_come_first(folder: Path) -> None:
    videos = largest_first(list_videos_of([str(folder), str(folder / "not there.mp4")]))
    assert uris(videos) == ["not there.mp4", "b.mp4", "c.mp4", "a.mp4"]
    assert videos["size"].to_pylist() == [None, 30, 20, 10]


def test_a_csv_list_keeps_its_columns_as_text(folder: Path) -> None:
    list_ = folder / "list.csv"
    list_.write_text("uri,camera\na.mp4,007\nb.mp4,\n")
    videos = list_videos_of([str(list_)])
    assert videos.column_names == ["uri", "etag", "size", "camera"]
    assert videos["uri"].to_pylist() == [str(folder / "a.mp4"), str(folder / "b.mp4")]
    assert videos["camera"].to_pylist() == ["007", None]
    assert videos["size"].to_pylist() == [10, 30]


def test_a_parquet_list_is_believed_and_keeps_its_types(folder: Path) -> None:
    given = pa.table(
        {
            "video": ["s3://bucket/a.mp4", "s3://bucket/b.mp4"],
            "size": [7, 8],
            "etag": ["x", "y"],
            "when": pa.array([1, 2], pa.timestamp("ms")),
        }
    )
    pq.write_table(given, folder / "list.parquet")
    videos = list_videos_of([str(folder / "list.parquet")])  # nothing asks the storage
    assert videos["uri"].to_pylist() == given["video"].to_pylist()
    assert videos["when"].type == pa.timestamp("ms")
    (first, _) = videos_in(videos)
    assert (first.uri, first.etag, first.size_bytes) == ("s3://bucket/a.mp4", "x", 7)


def test_a_text_list_has_a_video_a_line(folder: Path) -> None:
    (folder / "list.txt").write_text("c.mp4\n\n  a.mp4 \n")
    assert uris(list_videos_of([str(folder / "list.txt")])) == ["c.mp4", "a.mp4"]


def test_a_video_that_is_listed_twice_is_there_once(folder: Path) -> None:
    (folder / "list.txt").write_text("c.mp4\nc.mp4\na.mp4\n")
    assert uris(list_videos_of([str(folder / "list.txt"), str(folder)])) == [
        "c.mp4",
        "a.mp4",
        "b.mp4",
    ]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("list.csv", b"path,label\na.mp4,1\n", "has the columns path, label; it needs one"),
        ("list.csv", b"uri,size\n,1\n", "without an address in some rows"),
        ("list.csv", b"uri,etag,size\na.mp4,x,many\n", "holds what is no number of bytes"),
        ("list.parquet", b"no table", "is not a list that can be read"),
        ("list.txt", b"\xff\xfe\n", "is not a list that can be read"),
        ("list.txt", b"\n", "is an empty list"),
    ],
)
def test_a_list_that_cannot_be_used_is_told(
    tmp_path: Path, name: str, content: bytes, what: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VideoListError, match=what):
        list_videos_of([str(tmp_path / name)])


def test_a_list_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(VideoListError, match="cannot be read"):
        list_videos_of([str(tmp_path / "list.csv")])
