"""From the windows of an archive and what is looked for to moments.

    found = find(snapshot, vectors, among, windows=layout, query="a person falls", top=20, ...)

All windows are scored, a block at a time, from memory maps. Moments grow from the best ones, by the
mean over the windows over each time, and are told by how far that lies above the mean of all
windows, in standard deviations (`z`).

Letters: M vectors, N windows, D the embedding width.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.archive import ArchiveModel, Snapshot, read_rows
from actionclip_deploy.command_records import MomentRecord, SavedQueryRecord, SearchRecord
from actionclip_deploy.errors import MissingExtraError
from actionclip_deploy.records import json_text
from actionclip_deploy.runtimes.base import Float32Array

if TYPE_CHECKING:
    from actionclip_deploy.nearest import NearestWindows

# Rows that are scored at a time: their float32 copy, 1 MB at D = 512, stays in a core's cache.
_BLOCK_ROWS = 512
# Moments are grown from the best windows; more of these than moments, since windows overlap.
_WINDOWS_PER_MOMENT = 200
# They are ranked by the mean over windows, and so many of them are grown for each that is told.
_CANDIDATES_PER_MOMENT = 2
# Rows by which the mean cosine of all time is told where not all are scored.
_SAMPLE_ROWS = 2**15
# A moment goes on while the mean of the windows over it is so far up from the mean of all time to
# its peak. Half-way is where half of a window shows it; on 4 hours of `motions` it was the best of
# 0.3 to 0.7 at a tIoU of 0.7, and within 0.2 points of that at 0.5 (train/search_tables.py).
EXTENT = 0.5
# A window that shares more of its length than this with a better moment begins none of its own: it
# shows the edge of that one. More than none, since a static window is as long as nothing moves.
_OVERLAP = 0.1
# Windows on either side of a candidate that are scored with it, since moments are grown from it.
_NEIGHBOURS = 2048


@dataclass(frozen=True)
class Moment:
    """A part of a video that was found.

    Attributes:
        video: Path of the video.
        folder: Name of its folder, such as that of a camera.
        start_seconds: From the start of the video.
        end_seconds: From the start of the video.
        peak_seconds: The middle of the window that is nearest to the query.
        z: How near it comes: at its best, by how many standard deviations the mean cosine of the
            windows that overlap there lies above the mean of all windows of the archive.
        cosine: Of its nearest window and the query, -1 to 1.
        recorded_seconds: When the moment began, in seconds since 1970; None where that is not
            known.
        window: Number of that window in its video, for `Archive.thumbnail`.
        video_id: Of the video in the archive; a video that changes gets another one.
    """

    video: str
    folder: str
    start_seconds: float
    end_seconds: float
    peak_seconds: float
    z: float
    cosine: float
    recorded_seconds: float | None
    window: int
    video_id: int


@dataclass(frozen=True)
class Moments(Sequence[Moment]):
    """What a search found, the best first. It prints as a list.

    Attributes:
        query: What was looked for, in words.
        found: The moments.
        num_windows: Windows of the archive, all of which were scored.
        num_searched: Those among which was looked.
        mean: Of the cosines of all windows.
        std: Their standard deviation.
        num_undated: Videos that a search by time left out, since nothing says when they were
            recorded.
        saved: What is known of the query, if it is a saved one.
        is_approximate: Whether some windows alone were scored. `mean` and `std`, and so z, are of
            all windows all the same.
    """

    query: str
    found: tuple[Moment, ...]
    num_windows: int
    num_searched: int
    mean: float
    std: float
    num_undated: int = 0
    saved: SavedQueryRecord | None = None
    is_approximate: bool = False

    @property
    def num_shown(self) -> int | None:
        """Moments that reach the threshold of a saved query; None for a query that is not."""
        if self.saved is None:
            return None
        threshold_z = (self.saved.threshold_cosine - self.mean) / (self.std or 1.0)
        return sum(moment.z >= threshold_z for moment in self.found)

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: Any) -> Any:
        return self.found[index]

    def record(self) -> SearchRecord:
        """As it leaves the program."""
        return SearchRecord(
            query=self.query,
            moments=tuple(
                MomentRecord(rank=rank, **vars(moment))
                for rank, moment in enumerate(self.found, start=1)
            ),
            num_windows=self.num_windows,
            num_searched=self.num_searched,
            num_undated=self.num_undated,
            mean_cosine=self.mean,
            std_cosine=self.std,
            saved=self.saved,
            is_approximate=self.is_approximate,
        )

    def to_dict(self) -> dict[str, Any]:
        """The record that `actionclip search --json` prints, as plain JSON values."""
        return self.record().to_dict()

    def to_json(self) -> str:
        """The record that `actionclip search --json` prints."""
        return json_text(self.to_dict())

    def to_dataframe(self) -> Any:
        """A pandas table with a row for each moment, the best first.

        Its columns are those of `MomentRecord`.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as exc:
            raise MissingExtraError("to_dataframe", "dataframe") from exc
        rows = [moment.to_dict() for moment in self.record().moments]
        columns = [name for name in MomentRecord.model_fields if name != "video_bytes"]
        table = pd.DataFrame(rows, columns=columns)
        return table.astype({"recorded_seconds": "float64"})

    def __str__(self) -> str:
        return str(self.record())


# Finding


@dataclass(frozen=True)
class WindowFilter:
    """Which windows are looked among."""

    cameras: Sequence[str]
    videos: Sequence[str]
    from_seconds: float | None
    to_seconds: float | None

    @property
    def is_empty(self) -> bool:
        """Whether all windows are looked among."""
        return not (self.cameras or self.videos) and (self.from_seconds, self.to_seconds) == (
            None,
            None,
        )

    def rows(self, snapshot: Snapshot) -> tuple[NDArray[np.bool_], int]:
        """Which rows pass, and how many videos are left out for want of a date."""
        kept = np.ones(len(snapshot.paths), bool)
        if self.cameras:
            wanted = set(self.cameras)
            kept &= np.array([folder in wanted for folder in snapshot.folders], bool)
        if self.videos:
            kept &= np.array(
                [any(is_named(path, name) for name in self.videos) for path in snapshot.paths],
                bool,
            )
        is_timed = self.from_seconds is not None or self.to_seconds is not None
        is_undated = kept & np.isnan(snapshot.recorded) if is_timed else np.zeros(len(kept), bool)
        of_row = snapshot.video_of_row
        rows = (of_row >= 0) & np.append(kept & ~is_undated, False)[of_row]
        if is_timed:
            spans = snapshot.intervals + np.append(snapshot.recorded, np.nan)[of_row, np.newaxis]
            if self.from_seconds is not None:
                rows &= spans[:, 1] > self.from_seconds
            if self.to_seconds is not None:
                rows &= spans[:, 0] < self.to_seconds
        return rows, int(is_undated.sum())


@dataclass(frozen=True)
class WindowLayout:
    """How windows lay before static ones were stored as one."""

    window_seconds: float
    stride_seconds: float

    @classmethod
    def of(cls, model: ArchiveModel) -> WindowLayout:
        """Those of an archive."""
        return cls(model.window_seconds, model.stride_seconds)

    def usual(self, spans: NDArray[np.float64], cosines: NDArray[np.floating[Any]]) -> float:
        """The mean cosine of all time: static windows count as often as they were there."""
        return float(np.average(cosines, weights=self.count(spans))) if len(spans) else 0.0

    def count(self, spans: NDArray[np.float64]) -> NDArray[np.int64]:
        """How many each stored one stands for, shape (N,)."""
        longer = spans[:, 1] - spans[:, 0] - self.window_seconds
        more: NDArray[np.int64] = np.rint(longer / self.stride_seconds).astype(np.int64)
        return 1 + np.maximum(more, 0)

    def apart(self, spans: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The windows that stored ones stand for, and in which each is.

        Of one that stands for many, those at its begin and its end: between, all are alike.
        """
        count = self.count(spans)
        reach = 1 + int(np.ceil(self.window_seconds / self.stride_seconds))
        kept = np.minimum(count, 2 * reach)
        of_row = np.repeat(np.arange(len(spans)), kept)
        number = np.arange(len(of_row)) - np.repeat(np.cumsum(kept) - kept, kept)
        left_out = (count - kept)[of_row]
        starts = spans[of_row, 0] + self.stride_seconds * (
            number + np.where(number < reach, 0, left_out)
        )
        ends = starts + self.window_seconds
        is_last_of_begin = (number == reach - 1) & (left_out > 0)
        ends += np.where(is_last_of_begin, self.stride_seconds * left_out, 0)
        ends = np.where(number == kept[of_row] - 1, spans[of_row, 1], ends)
        # Sums of strides differ in the last bits, and no time lies between such times.
        return np.round(np.stack([starts, ends], axis=1), 6), of_row


def find(
    snapshot: Snapshot,
    vectors: Float32Array,
    among: WindowFilter,
    *,
    windows: WindowLayout,
    query: str,
    top: int,
    num_threads: int,
) -> Moments:
    """Find moments of the first vector, without windows that are nearer to another."""
    cosines = score_windows(snapshot.shards, vectors, num_threads=num_threads)
    is_live = snapshot.video_of_row >= 0
    live = cosines[0][is_live]
    mean, std = (float(live.mean()), float(live.std())) if len(live) else (0.0, 0.0)
    looked_at, num_undated = among.rows(snapshot)
    usual = windows.usual(snapshot.intervals[is_live], live)
    moments = _best_moments(snapshot, cosines, looked_at, (mean, std, usual), windows, top)
    num_searched = int(looked_at.sum())
    return Moments(query, moments, snapshot.num_windows, num_searched, mean, std, num_undated)


def find_near(
    snapshot: Snapshot,
    vectors: Float32Array,
    index: NearestWindows,
    *,
    windows: WindowLayout,
    query: str,
    top: int,
    num_threads: int,
) -> Moments | None:
    """As `find` among all windows, of which those are scored that an index finds.

    The windows around the best candidates are scored too, so that a moment has the extent that it
    has in an exact search. None where there are fewer moments than were asked for.
    """
    is_live = snapshot.video_of_row >= 0
    cosines = np.full((len(vectors), len(is_live)), -np.inf, np.float32)
    later = slice(index.num_rows, None)
    cosines[:, later] = score_windows(
        _rows_from(snapshot.shards, index.num_rows), vectors, num_threads=num_threads
    )
    mean, std = index.mean_and_std(vectors[0], cosines[0, later][is_live[later]])
    near = index.find(vectors[0], top * _WINDOWS_PER_MOMENT)
    cosines[:, near] = score_windows([read_rows(snapshot.shards, near)], vectors, num_threads=1)

    def allowed() -> Any:
        is_scored = is_live & np.isfinite(cosines[0])
        return (
            is_scored if len(cosines) == 1 else is_scored & (cosines[0] > cosines[1:].max(axis=0))
        )

    candidates = np.flatnonzero(allowed())
    candidates = candidates[np.argsort(-cosines[0, candidates], kind="stable")]
    is_whole = np.zeros(len(is_live), bool)
    num_places = 0
    for row in candidates.tolist():
        if is_whole[row]:
            continue
        video = int(snapshot.video_of_row[row])
        first, stop = int(snapshot.first[video]), int(snapshot.first[video] + snapshot.count[video])
        first, stop = max(first, row - _NEIGHBOURS), min(stop, row + _NEIGHBOURS)
        part = read_rows(snapshot.shards, np.arange(first, stop))
        cosines[:, first:stop] = score_windows([part], vectors, num_threads=num_threads)
        is_whole[first:stop] = True
        num_places += 1
        # Most have a moment of their own, but the best windows are not quite those of the best.
        if num_places == _CANDIDATES_PER_MOMENT * top:
            break
    sample = np.flatnonzero(is_live)
    sample = sample[:: 1 + len(sample) // _SAMPLE_ROWS]
    (of_sample,) = score_windows([read_rows(snapshot.shards, sample)], vectors[:1], num_threads=1)
    usual = windows.usual(snapshot.intervals[sample], of_sample)
    looked_at = is_live & is_whole
    moments = _best_moments(snapshot, cosines, looked_at, (mean, std, usual), windows, top)
    if len(moments) < top:
        return None
    count = snapshot.num_windows
    return Moments(query, moments, count, count, mean, std, is_approximate=True)


def _rows_from(shards: Sequence[NDArray[np.float16]], first: int) -> list[NDArray[np.float16]]:
    """The files of vectors without the rows before a number."""
    found = []
    for shard in shards:
        if first < len(shard):
            found.append(shard[max(first, 0) :])
        first -= len(shard)
    return found


def _best_moments(
    snapshot: Snapshot,
    cosines: Float32Array,
    looked_at: NDArray[np.bool_],
    spread: tuple[float, float, float],
    windows: WindowLayout,
    top: int,
) -> tuple[Moment, ...]:
    """Moments of the first query, but those that are nearer to another, the best first.

    Args:
        cosines: Of M queries and all rows, shape (M, N).
        looked_at: Which rows are looked among.
        spread: Mean and standard deviation of the first query's, and their mean over all time.
        windows: How windows lay.
        top: Moments at most.
    """
    mean, std, usual = spread[0], spread[1] or 1.0, spread[2]
    z = np.where(looked_at, (cosines[0] - mean) / std, -np.inf)
    candidates, ahead = z, None
    if len(cosines) > 1:
        others = cosines[1:].max(axis=0)
        ahead = np.subtract(cosines[0], others, where=looked_at, out=np.zeros_like(others))
        candidates = np.where(ahead > 0, z, -np.inf)
    profiles = Profiles(snapshot, z, ahead, windows, (usual - mean) / std)
    found = _moments(snapshot, candidates, cosines[0], top, profiles)
    return tuple(sorted(found, key=lambda each: -each.z)[:top])


def _moments(
    snapshot: Snapshot,
    z: NDArray[np.floating[Any]],
    cosines: Float32Array,
    top: int,
    profiles: Profiles,
) -> Iterable[Moment]:
    """Moments in the order of their nearest windows, among them the `top` best."""
    count = min(len(z), top * _WINDOWS_PER_MOMENT)
    best = np.argpartition(-z, count - 1)[:count] if count else np.zeros(0, np.int64)
    best = best[np.lexsort((best, -z[best]))]  # of equal windows, the first
    taken: dict[int, list[tuple[float, float]]] = {}
    found: list[float] = []  # the `top` highest z, the lowest of them first
    num_found = 0
    for row in best.tolist():
        # No moment has a higher z than its nearest window; nor is the order of the two so different
        # that many more than those would have to be looked at.
        if not np.isfinite(z[row]) or (len(found) == top and z[row] <= found[0]):
            return
        if num_found == _CANDIDATES_PER_MOMENT * top:
            return
        video = int(snapshot.video_of_row[row])
        begin, stop_seconds = snapshot.intervals[row].tolist()
        others = taken.setdefault(video, [])
        least = _OVERLAP * (stop_seconds - begin)
        if any(min(end, stop_seconds) - max(start, begin) > least for start, end in others):
            continue
        part = profiles.of(video).take(begin, stop_seconds, others)
        if part is None:
            continue
        start, end, height = part
        others.append((start, end))
        num_found += 1
        heapq.heappush(found, height)
        if len(found) > top:
            heapq.heappop(found)
        recorded = float(snapshot.recorded[video])
        yield Moment(
            video=snapshot.paths[video],
            folder=snapshot.folders[video],
            start_seconds=start,
            end_seconds=end,
            peak_seconds=(begin + stop_seconds) / 2,
            z=height,
            cosine=float(cosines[row]),
            recorded_seconds=None if np.isnan(recorded) else recorded + start,
            window=row - int(snapshot.first[video]),
            video_id=int(snapshot.ids[video]),
        )


class Profiles:
    """Over each part of a video, the mean z of the windows over it; made where it is asked for.

    Args:
        z: Of each row; minus infinity for those that are not looked at.
        ahead: By how much each is nearer to what is looked for than to what is not meant.
        windows: How windows lay.
        usual: The mean z of all time.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        z: NDArray[np.floating[Any]],
        ahead: NDArray[np.floating[Any]] | None,
        windows: WindowLayout,
        usual: float,
    ) -> None:
        self._snapshot = snapshot
        self._z = z
        self._ahead = ahead
        self._windows = windows
        self._usual = usual
        self._made: dict[int, _Profile] = {}

    def of(self, video: int) -> _Profile:
        """That of a video, of which moments that were found have been taken."""
        if video not in self._made:
            first = int(self._snapshot.first[video])
            rows = slice(first, first + int(self._snapshot.count[video]))
            spans, of_row = self._windows.apart(self._snapshot.intervals[rows])
            z = self._z[rows][of_row]
            ahead = None if self._ahead is None else self._ahead[rows][of_row]
            self._made[video] = _Profile(spans, z, ahead, self._usual)
        return self._made[video]


class _Profile:
    def __init__(
        self,
        spans: NDArray[np.float64],
        z: NDArray[np.floating[Any]],
        ahead: NDArray[np.floating[Any]] | None,
        usual: float,
    ) -> None:
        counted = np.isfinite(z)
        spans = spans[counted]
        # Between the starts and ends of windows, the mean of those that are there is constant.
        self._edges = np.unique(spans)
        self._begins, self._ends = (np.searchsorted(self._edges, spans[:, n]) for n in (0, 1))
        number = self._sums(np.ones(len(spans)))
        is_seen = number > 0.5
        self._means = np.where(is_seen, self._sums(z[counted]) / np.maximum(number, 1), -np.inf)
        self._ahead = None if ahead is None else self._sums(ahead[counted]) / np.maximum(number, 1)
        self._usual = usual

    def _sums(self, values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Of the values of the windows over each part."""
        total = np.zeros(len(self._edges))
        np.add.at(total, self._begins, values)
        np.add.at(total, self._ends, -values)
        return np.cumsum(total)[:-1]

    def take(
        self, start: float, end: float, taken: Sequence[tuple[float, float]]
    ) -> tuple[float, float, float] | None:
        """From where to where a moment goes whose best window lies there, and how high it is.

        From the highest mean in the window it goes on in both directions while the mean is at least
        `EXTENT` of the way up to that, up to what other moments have taken. None where nothing is
        left, or where what is not meant is nearer on the whole.
        """
        edges, means = self._edges, self._means
        first, last = np.searchsorted(edges, np.round([start, end], 6))
        at = int(first + means[first:last].argmax()) if first < last else 0
        height = float(means[at]) if first < last else -np.inf
        if not np.isfinite(height):
            return None
        if height <= self._usual:  # nothing that stands out: the window, as far as it is free
            middle = (start + end) / 2
            start = max([start, *(end for _, end in taken if end <= middle)])
            end = min([end, *(start for start, _ in taken if start > middle)])
            left, right = (int(n) for n in np.searchsorted(edges, np.round([start, end], 6)))
            return self._taken(left, right, (start, end, height))
        limit = self._usual + EXTENT * (height - self._usual)
        left, right = at, at + 1
        while left > 0 and means[left - 1] >= limit:
            left -= 1
        while right < len(means) and means[right] >= limit:
            right += 1
        height = float(means[left:right].max())
        return self._taken(left, right, (float(edges[left]), float(edges[right]), height))

    def _taken(
        self, left: int, right: int, part: tuple[float, float, float]
    ) -> tuple[float, float, float] | None:
        self._means[left:right] = -np.inf
        if self._ahead is None:
            return part
        lengths = np.diff(self._edges[left : right + 1])
        return part if float(lengths @ self._ahead[left:right]) > 0 else None


def is_named(path: str, name: str) -> bool:
    """Whether a video is meant by a name: its path, or the end of it."""
    return path == name or path.endswith("/" + name.lstrip("/"))


# Scoring


def score_windows(
    shards: Sequence[NDArray[np.float16]], wanted: Float32Array, *, num_threads: int
) -> Float32Array:
    """Products of the rows of an archive with some vectors.

    Args:
        shards: Rows, float16, each of shape (n, D).
        wanted: Vectors, shape (M, D).
        num_threads: That compute.

    Returns:
        float32, shape (M, N).
    """
    total = sum(map(len, shards))
    scores = np.empty((len(wanted), total), np.float32)
    parts: list[tuple[NDArray[np.float16], NDArray[np.float32]]] = []
    begin = 0
    for shard in shards:
        # Several parts for each thread, so that one that is held up does not hold up all.
        size = max(_BLOCK_ROWS, -(-len(shard) // (4 * num_threads)))
        for first in range(0, len(shard), size):
            rows = shard[first : first + size]
            parts.append((rows, scores[:, begin + first : begin + first + len(rows)]))
        begin += len(shard)

    def score_part(part: tuple[NDArray[np.float16], NDArray[np.float32]]) -> None:
        _score_rows(part[0], wanted, part[1])

    if num_threads == 1 or len(parts) < 2:
        for part in parts:
            score_part(part)
    else:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(score_part, parts))
    return scores


# NumPy turns float16 into float32 one number at a time, 0.9 s for a million rows of 512. The bits
# of the one are those of the other, shifted, for an exponent that is 112 less: so they are shifted,
# 0.1 s, and 2^112 is put into the vector that rows are multiplied by. A power of two changes no bit
# of a product; embeddings are finite.
_SIGN_AND_VALUE = np.int32(-0x70000001)  # 0x8FFFFFFF: without the sign's copies
_MISSING_EXPONENT = np.float32(2.0**112)


def _score_rows(
    rows: NDArray[np.float16], wanted: NDArray[np.float32], out: NDArray[np.float32]
) -> None:
    """Products of rows (N, D) with vectors (M, D), into (M, N)."""
    scaled = np.ascontiguousarray(wanted.T * _MISSING_EXPONENT)
    bits = rows.view(np.int16)
    buffer = np.empty((_BLOCK_ROWS, rows.shape[1]), np.int32)
    for first in range(0, len(rows), _BLOCK_ROWS):
        part = bits[first : first + _BLOCK_ROWS]
        block = buffer[: len(part)]
        np.copyto(block, part)
        np.left_shift(block, 13, out=block)
        np.bitwise_and(block, _SIGN_AND_VALUE, out=block)
        out[:, first : first + len(part)] = (block.view(np.float32) @ scaled).T
