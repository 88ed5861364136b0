"""Searching archives: exact scores, what is looked among, and moments of the windows."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actionclip_deploy import search as module
from actionclip_deploy.archive import ArchivedVideo, ArchiveModel, ArchiveWriter
from actionclip_deploy.errors import (
    ArchiveChoiceError,
    ArchiveError,
    ArgumentError,
    MissingExtraError,
    UnknownVideoError,
    WrongKindError,
)
from actionclip_deploy.moments import score_windows
from actionclip_deploy.search import Archive, write_page

DIM = 64
MODEL = ArchiveModel("gone", "v" * 64, "t" * 64, DIM, 4.0, 0.5, "onnxruntime", 2.0)
QUERY, OTHER = np.eye(DIM, dtype=np.float32)[:2]
HOUR = 3600.0
MIDNIGHT = 1_700_000_000.0


def noise(seed: int, count: int) -> np.ndarray:
    """Rows that have nothing of the two queries."""
    made = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    made[:, :2] = 0
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def mixed(rows: np.ndarray, wanted: np.ndarray, share: np.ndarray | float) -> np.ndarray:
    """Rows whose cosine with a query is `share`."""
    share = np.broadcast_to(share, len(rows))[:, np.newaxis].astype(np.float32)
    return share * wanted + np.sqrt(1 - share**2) * rows


def spans(count: int) -> np.ndarray:
    starts = 0.5 * np.arange(count)
    return np.stack([starts, starts + 4], axis=1)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Four videos: one shows the query from 20 to 30 s, one a mixture, the others nothing."""
    folder = tmp_path_factory.mktemp("archives") / "a"
    with ArchiveWriter.open(folder, MODEL) as writer:
        for number, camera in enumerate(("yard", "door", "yard", "hall")):
            rows = noise(number, 200)
            if number == 0:
                overlap = np.clip(
                    np.minimum(spans(200)[:, 1], 30) - np.maximum(spans(200)[:, 0], 20), 0, 4
                )
                rows = mixed(rows, QUERY, 0.8 * overlap / 4)
            if number == 1:
                rows[100] = (QUERY + 1.2 * OTHER) / math.hypot(1, 1.2)
            recorded = None if number == 3 else MIDNIGHT + number * HOUR
            video = ArchivedVideo(f"/{camera}/{number}.mp4", camera, 1, 1, recorded, 103.5)
            writer.put(video, spans(200), rows, [(40, b"jpeg of 40")] if number == 0 else [])
    with Archive.open(folder) as opened:
        yield opened


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("sizes", [[1], [700, 3, 1025], [5, 512]])
def test_scores_are_the_products_of_the_stored_rows(sizes: list[int], num_threads: int) -> None:
    generator = np.random.default_rng(1)
    shards = [noise(n, size).astype(np.float16) for n, size in enumerate(sizes)]
    # Numbers that float16 has in all its forms: subnormal, zero of either sign, the largest.
    shards[0][0, :6] = [6e-8, -6e-8, 0.0, -0.0, 65504, -1.5e-5]
    wanted = generator.standard_normal((3, DIM)).astype(np.float32)
    expected = wanted.astype(np.float64) @ np.concatenate(shards).astype(np.float64).T
    found = score_windows(shards, wanted, num_threads=num_threads)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_the_moment_is_found_with_its_start_and_end(archive: Archive) -> None:
    moments = archive.search(like=QUERY, top=3)
    best = moments[0]
    assert (best.video, best.folder) == ("/yard/0.mp4", "yard")
    assert abs(best.start_seconds - 20) <= 1
    assert abs(best.end_seconds - 30) <= 1
    assert best.start_seconds < best.peak_seconds < best.end_seconds
    assert best.cosine == pytest.approx(0.8, abs=1e-3)
    assert best.recorded_seconds == MIDNIGHT + best.start_seconds
    # z by its definition, of all windows.
    table = np.concatenate([np.asarray(each) for each in archive._reader.snapshot().shards])
    cosines = table.astype(np.float64) @ QUERY
    assert best.z == pytest.approx((best.cosine - cosines.mean()) / cosines.std(), rel=1e-3)
    assert moments.mean == pytest.approx(cosines.mean(), abs=1e-6)
    assert [moment.z for moment in moments] == sorted([m.z for m in moments], reverse=True)


def test_moments_of_a_video_do_not_overlap(archive: Archive) -> None:
    moments = archive.search(like=QUERY, top=60)
    assert len(moments) > 10
    for video in {moment.video for moment in moments}:
        found = sorted(
            (m.start_seconds, m.end_seconds, m.peak_seconds) for m in moments if m.video == video
        )
        for (_, end, _), (start, _, _) in itertools.pairwise(found):
            assert start >= end or math.isclose(start, end)


def test_windows_that_are_nearer_to_what_is_not_meant_are_left_out(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert archive.search(like=QUERY, top=2)[1].video == "/door/1.mp4"
    monkeypatch.setattr(archive, "_embed", lambda *_: OTHER[np.newaxis])
    without = archive.search(like=QUERY, without="a dog", top=2)
    assert without[0].video == "/yard/0.mp4"
    assert all(m.video != "/door/1.mp4" or m.cosine < 0.5 for m in without)
    assert without.query == "an embedding, not a dog"


def test_the_edge_of_a_moment_is_not_another_one(archive: Archive) -> None:
    """Windows of 4 s that share more than a tenth of it with the moment are a part of it."""
    moments = archive.search(like=QUERY, top=60, videos=["0.mp4"])
    best, *others = moments
    for other in others:
        begin, end = other.peak_seconds - 2, other.peak_seconds + 2
        assert min(end, best.end_seconds) - max(begin, best.start_seconds) <= 0.4
    assert others


@pytest.mark.parametrize(
    ("where", "videos", "num_searched", "num_undated"),
    [
        ({"cameras": ["yard"]}, {"/yard/0.mp4", "/yard/2.mp4"}, 400, 0),
        ({"videos": ["1.mp4"]}, {"/door/1.mp4"}, 200, 0),
        ({"from_seconds": MIDNIGHT + HOUR}, {"/door/1.mp4", "/yard/2.mp4"}, 400, 1),
        ({"to_seconds": MIDNIGHT + 10}, {"/yard/0.mp4"}, 20, 1),
        (
            {"from_seconds": MIDNIGHT + 50, "to_seconds": MIDNIGHT + 60},
            {"/yard/0.mp4"},
            27,
            1,
        ),
        ({"cameras": ["hall"], "from_seconds": 0.0}, set(), 0, 1),
    ],
)
def test_only_what_was_asked_for_is_looked_among(
    archive: Archive, where: dict[str, Any], videos: set[str], num_searched: int, num_undated: int
) -> None:
    moments = archive.search(like=OTHER, top=1000, **where)
    assert {moment.video for moment in moments} == videos
    assert (moments.num_searched, moments.num_undated) == (num_searched, num_undated)
    assert moments.num_windows == 800


def test_a_moment_is_looked_for_by_another(archive: Archive) -> None:
    by_video = archive.search(like=("0.mp4", 25.0), top=1)
    assert by_video[0].video == "/yard/0.mp4"
    assert by_video[0].peak_seconds == 25.0
    assert by_video[0].cosine == pytest.approx(1, abs=1e-3)
    assert by_video.query == "0.mp4@25"
    by_id = archive.search(like=(by_video[0].video_id, 25.0), top=1)
    assert by_id.found == by_video.found
    for unknown in ("none.mp4", 77):
        with pytest.raises(UnknownVideoError, match=f"no video with windows called {unknown}"):
            archive.search(like=(unknown, 1.0))


@pytest.mark.parametrize("seconds", [9999.0, -1.0, 103.6, float("nan")])
def test_a_time_that_a_video_does_not_have_is_told(archive: Archive, seconds: float) -> None:
    for ask in (
        lambda: archive.search(like=("0.mp4", seconds)),
        lambda: archive.embedding_at("0.mp4", seconds),
    ):
        with pytest.raises(
            ArchiveChoiceError,
            match=rf"0\.mp4 has no window at {seconds:g} s; give a time within "
            r"0 and 103\.5 s",
        ):
            ask()


def test_the_ends_of_a_video_are_times_of_it(archive: Archive) -> None:
    for seconds, middle in ((0.0, 2.0), (103.5, 101.5)):
        best = archive.search(like=("0.mp4", seconds), top=1)[0]
        assert (best.video, best.peak_seconds) == ("/yard/0.mp4", middle)


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        (
            {"cameras": ["yard", "nosuch"]},
            ArchiveChoiceError,
            r"cameras names 'nosuch', which is no camera of .*\(it has: door, hall, yard\)",
        ),
        (
            {"videos": ["nosuch.mp4"]},
            UnknownVideoError,
            r"videos names 'nosuch\.mp4', and the archive .* has no video with windows called so",
        ),
        ({"videos": ["ard/2.mp4"]}, UnknownVideoError, "called so"),  # no name of a folder
        (
            {"from_seconds": MIDNIGHT + 60, "to_seconds": MIDNIGHT},
            ArgumentError,
            r"from_seconds is 1700000060, which is later than to_seconds, 1700000000",
        ),
    ],
)
def test_where_nothing_can_be_is_told(
    archive: Archive, where: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        archive.search(like=QUERY, **where)


def test_of_many_cameras_a_few_are_told(tmp_path: Path) -> None:
    with ArchiveWriter.open(tmp_path / "a", MODEL) as writer:
        for number in range(11):
            video = ArchivedVideo(f"/{number:02}/a.mp4", f"{number:02}", 1, 1, None, 103.5)
            writer.put(video, spans(2), noise(number, 2))
    with (
        Archive.open(tmp_path / "a") as opened,
        pytest.raises(ArchiveChoiceError, match=r"06, 07 and 3 others\)"),
    ):
        opened.search(like=QUERY, cameras=["x"])


def test_a_window_that_is_not_there_has_no_picture(archive: Archive) -> None:
    assert archive.thumbnail("/yard/0.mp4", 199) == b"jpeg of 40"
    assert archive.thumbnail("/yard/0.mp4", 200) is None


def test_texts_that_were_embedded_before_need_no_bundle(archive: Archive) -> None:
    found = archive.search("a dog", embeddings=QUERY[np.newaxis], top=3)
    assert found.query == "a dog"
    assert found.found == archive.search(like=QUERY, top=3).found
    both = archive.search("a dog", without="a cat", embeddings=np.stack([QUERY, OTHER]), top=60)
    assert "/door/1.mp4" not in {m.video for m in both if m.cosine > 0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "text or like or saved must be given, and none of them was; give one"),
        ({"text": "a", "like": QUERY}, "must be given, and text and like were given; give one"),
        ({"text": " "}, "text is ' '; give what can be seen in words"),
        ({"text": "a", "without": ["b", ""]}, "without is ''; give what can be seen in words"),
        ({"text": "A dog", "without": "a  dog"}, "without is 'a  dog', which is what is looked"),
        ({"text": 5}, "text is 5; give a text"),
        ({"like": QUERY, "top": 0}, "top is 0"),
        ({"like": QUERY[:5]}, "like has 5 values, and the archive's embeddings have 64"),
        ({"like": 0 * QUERY}, "like has no direction"),
    ],
)
def test_wrong_arguments_are_told(
    archive: Archive, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        archive.search(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"like": QUERY, "top": "x"}, "top is 'x'; give a whole number"),
        ({"like": "nope"}, r"like is 'nope'; give a video and a time in it in seconds, such as"),
        ({"like": ("a.mp4", 1.0, 2.0)}, "give a video and a time in it"),
    ],
)
def test_arguments_of_another_kind_are_told(
    archive: Archive, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(WrongKindError, match=message):
        archive.search(**arguments)


def test_a_bundle_that_has_moved_is_told(archive: Archive) -> None:
    with pytest.raises(
        ArchiveError, match=r"The bundle gone, .* is not there any more; .*--bundle"
    ):
        archive.search("a dog")


def test_without_faiss_all_windows_are_scored_unless_it_is_asked_for(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.delitem(sys.modules, "actionclip_deploy.nearest", raising=False)
    monkeypatch.setattr(module, "APPROXIMATE_WINDOWS", 1)
    assert not archive.search(like=QUERY, top=1).is_approximate
    with pytest.raises(MissingExtraError, match=r"Approximate search needs .*faiss"):
        archive.search(like=QUERY, top=1, approximate=True)


def test_an_empty_archive_has_no_moments(tmp_path: Path) -> None:
    ArchiveWriter.open(tmp_path / "a", MODEL).close()
    with Archive.open(tmp_path / "a") as archive:
        moments = archive.search(like=QUERY)
    assert list(moments) == []
    assert str(moments) == "nothing was found for 'an embedding'"
    assert moments.to_dict()["num_windows"] == 0


def test_results_as_records_tables_and_a_page(archive: Archive, tmp_path: Path) -> None:
    moments = archive.search(like=QUERY, top=2)
    record = moments.to_dict()
    assert [each["rank"] for each in record["moments"]] == [1, 2]
    assert record["moments"][0]["video"] == "/yard/0.mp4"
    table = moments.to_dataframe()
    assert table["z"].tolist() == [moment.z for moment in moments]
    assert str(moments).splitlines()[0].endswith("/yard/0.mp4")
    write_page(tmp_path / "found.html", archive, moments)
    page = (tmp_path / "found.html").read_text("utf-8")
    assert page.count("<video") == 2
    assert "2 moments among 800 windows;" in page
    assert f'src="file:///yard/0.mp4#t={moments[0].start_seconds:.2f}"' in page
    assert page.count("data:image/jpeg;base64,anBlZyBvZiA0MA==") == 1
    assert page.count("No picture was kept.") == 1
    assert page.count("This browser cannot play the file") == 2
    assert "<title>an embedding</title>" in page
    assert "http://" not in page
    assert "https://" not in page


def archive_of(folder: Path, videos: list[tuple[np.ndarray, np.ndarray]]) -> Archive:
    """Videos of windows of 2 s, one each second: their spans, and cosines with the two queries."""
    model = replace(MODEL, window_seconds=2.0, stride_seconds=1.0)
    with ArchiveWriter.open(folder, model) as writer:
        for number, (places, cosines) in enumerate(videos):
            left = np.sqrt(1 - (cosines**2).sum(axis=1, keepdims=True))
            rows = cosines @ np.stack([QUERY, OTHER]) + left * np.eye(DIM)[2]
            writer.put(ArchivedVideo(f"/{number}.mp4", "", 1, 1), places, rows)
    return Archive.open(folder)


def each_second(cosines: np.ndarray | list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Windows whose cosine with the first query is given, and 0 with the other."""
    starts = np.arange(len(cosines), dtype=float)
    both = np.stack([np.asarray(cosines, float), np.zeros(len(cosines))], axis=1)
    return np.stack([starts, starts + 2], axis=1), both


def test_a_moment_goes_half_way_down_to_the_mean(tmp_path: Path) -> None:
    cosines = np.zeros(200)
    cosines[:10] = [0, 0, 0.1, 0.4, 0.5, 0.4, 0.1, 0, 0, 0]
    # Means of the windows over each second: 0 0 .05 .25 .45 .45 .25 .05 0 0; the mean is .0075.
    with archive_of(tmp_path / "a", [each_second(cosines)]) as archive:
        (best,) = archive.search(like=QUERY, top=1)
    assert (best.start_seconds, best.end_seconds, best.peak_seconds) == (3.0, 7.0, 5.0)
    assert best.z == pytest.approx((0.45 - cosines.mean()) / cosines.std(), rel=2e-3)
    assert best.cosine == pytest.approx(0.5, abs=1e-3)


def test_moments_are_the_same_where_static_windows_are_stored_as_one(tmp_path: Path) -> None:
    cosines = np.repeat([0.0, 0.2, 0.6, 0.2, 0.0], [300, 1, 10, 1, 300])
    spans, both = each_second(cosines)
    # The mean of all time is .0105. Seconds 300 to 312 have .1 .4 .6 ... .6 .4 .1.
    first = np.array([0, 300, 301, 311, 312])
    merged = np.stack([spans[first, 0], spans[np.array([299, 300, 310, 311, 611]), 1]], axis=1)
    for name, stored in (("all", (spans, both)), ("merged", (merged, both[first]))):
        with archive_of(tmp_path / name, [stored]) as archive:
            (best,) = archive.search(like=QUERY, top=1)
        assert (best.start_seconds, best.end_seconds) == (301.0, 312.0), name


def test_what_is_not_meant_is_left_out_by_whole_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, other = each_second(np.zeros(60)), each_second(np.zeros(60))
    wanted[1][20:40] = [0.7, 0.5]
    wanted[1][29:31] = [0.6, 0.7]  # for a moment it looks like the other
    other[1][20:40] = [0.6, 0.7]
    other[1][29:31] = [0.7, 0.5]  # and here it is the other way round
    with archive_of(tmp_path / "a", [wanted, other]) as archive:
        assert {each.video for each in archive.search(like=QUERY, top=2)} == {"/0.mp4", "/1.mp4"}
        monkeypatch.setattr(archive, "_embed", lambda *_: OTHER[np.newaxis])
        (best,) = archive.search(like=QUERY, without="a dog", top=5)
    assert (best.video, best.start_seconds, best.end_seconds) == ("/0.mp4", 21.0, 40.0)
