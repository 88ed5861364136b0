"""Searching an archive: from words, or from a moment, to moments.

    with Archive.open("archive") as archive:
        print(archive.search("a person falls", top=20))

All windows are scored, a block at a time, from memory maps: the search is exact, and a score, which
means little by itself, is told as its distance from the mean of all windows in standard deviations
(`z`). Windows that overlap and stand out become one moment. Of millions of windows, `nearest` may
say which ones to score.

A query that is saved is a label bank of the archive's bundle, so `watch` tells of it as well:

    archive.save_query("falls", "a person falls", accepted=moments[:3])
    archive.search(saved="falls")

Letters: N windows, D the embedding width, K templates, M texts.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from html import escape
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.archive import ArchivedVideo, ArchiveReader, Snapshot
from actionclip_deploy.bundle import BANK_RECORD_NAME, Bundle, check_replaceable
from actionclip_deploy.calibration import DEFAULT_QUERY_Z, SavedQuery, query_threshold
from actionclip_deploy.command_records import MomentRecord, SavedQueryRecord, SearchRecord
from actionclip_deploy.errors import (
    ArchiveError,
    ArgumentError,
    LabelBankError,
    MissingExtraError,
    UnknownVideoError,
)
from actionclip_deploy.files import write_text
from actionclip_deploy.labels import (
    LabelBank,
    bank_for,
    describe_query,
    list_label_banks,
    read_bank_record,
)
from actionclip_deploy.records import json_text, printable
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.runtimes.base import Float32Array, Runtime
from actionclip_deploy.runtimes.machine import num_available_cores
from actionclip_deploy.scoring import mean_embedding
from actionclip_deploy.timeline import clock_text

if TYPE_CHECKING:
    from actionclip_deploy.nearest import NearestWindows

# Rows that are scored at a time: their float32 copy, 1 MB at D = 512, stays in a core's cache.
_BLOCK_ROWS = 512
# Moments are grown from the best windows; more of these than moments, since windows overlap.
_WINDOWS_PER_MOMENT = 200
# A moment goes on as long as the mean of the windows over it is this share of its peak's z.
EXTENT = 0.6
# A window that shares more of its length than this with a better moment begins none of its own: it
# shows the edge of that one. More than none, since a static window is as long as nothing moves.
_OVERLAP = 0.1
MAX_TOP = 10_000
# From so many windows on a search is approximate, where the archive has an index for it.
APPROXIMATE_WINDOWS = 2_000_000
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
        z: Of that window: by how many standard deviations its cosine lies above the mean of all
            windows of the archive.
        cosine: Of that window and the query, -1 to 1.
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
        return sum(moment.cosine >= self.saved.threshold_cosine for moment in self.found)

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
        table = pd.DataFrame(rows, columns=list(MomentRecord.model_fields))
        return table.astype({"recorded_seconds": "float64"})

    def __str__(self) -> str:
        lines = [
            f"{rank:>3}  z {moment.z:5.1f}  {clock_text(moment.start_seconds)} - "
            f"{clock_text(moment.end_seconds)}  {printable(moment.video, kept='')}"
            for rank, moment in enumerate(self.found, start=1)
        ]
        return "\n".join(lines or [f"nothing was found for {self.query!r}"])


class Archive:
    """An archive that is searched; a context manager. Videos that are added meanwhile are seen.

    Calls may come from several threads at a time.

    Attributes:
        folder: Where it is.
        model: What its windows were made with.
    """

    def __init__(self, reader: ArchiveReader, bundle: Path | None) -> None:
        self.folder = reader.folder
        self.model = reader.model
        self._reader = reader
        self._bundle_path = bundle
        self._lock = Lock()
        self._bundle: Bundle | None = None
        self._runtime: Runtime | None = None
        self._index: tuple[Snapshot, NearestWindows | None] | None = None

    @classmethod
    def open(cls, folder: str | Path, *, bundle: str | Path | None = None) -> Archive:
        """Open an archive that `actionclip index` made.

        Args:
            folder: The archive.
            bundle: That it was made with, whose text encoder embeds words; it is opened when
                words are searched. None for where it was when the archive was made.

        Raises:
            ArchiveError: If it is none, or of another version of the format.
        """
        return cls(ArchiveReader.open(folder), None if bundle is None else Path(bundle))

    @property
    def bundle(self) -> Bundle:
        """The bundle that the archive was made with, which has its saved queries.

        Raises:
            ArchiveError: If it is not there any more, or another one is.
        """
        return self._find_bundle()

    @property
    def num_windows(self) -> int:
        """Windows that are stored."""
        return self._reader.snapshot().num_windows

    def videos(self) -> dict[str, ArchivedVideo]:
        """All videos, those that failed among them, by their paths."""
        return self._reader.videos()

    def video(self, video_id: int) -> ArchivedVideo | None:
        """The video of an id; None where it is gone, or was replaced by a changed one."""
        return self._reader.video(video_id)

    def snapshot(self) -> Snapshot:
        """The newest state of the archive; of what was seen before nothing is read again."""
        return self._reader.snapshot()

    def thumbnail(self, video: str | int, window: int) -> bytes | None:
        """The picture of a window, or of the nearest before it, as JPEG; None without one.

        Args:
            video: Its path or its id.
            window: Number of the window in the video.
        """
        return self._reader.thumbnail(video, window)

    def check_bundle(self, bundle: Bundle) -> None:
        """Refuse a bundle whose texts cannot be compared with the windows.

        Raises:
            ArchiveError: If it has another text encoder, or embeddings of another width.
        """
        width = bundle.manifest.model.embedding_dim
        if bundle.textual_sha256 != self.model.textual_sha256:
            what = "another text encoder than the one that goes with"
        elif width != self.model.embedding_dim:
            what = f"embeddings of {width} values, where {self.model.embedding_dim} have those of"
        else:
            return
        raise ArchiveError(
            f"The bundle {bundle.path} has {what} the windows of {self.folder}; give the bundle "
            "that it was made with, or make the archive anew with this one."
        )

    def search(
        self,
        text: str | None = None,
        *,
        without: str | Sequence[str] = (),
        like: tuple[str | int, float] | NDArray[np.float32] | None = None,
        saved: str | None = None,
        folders: Sequence[str] = (),
        videos: Sequence[str] = (),
        from_seconds: float | None = None,
        to_seconds: float | None = None,
        top: int = 20,
        templates: str | Path | Iterable[str] | None = None,
        allow_unknown_words: bool = False,
        embeddings: NDArray[np.float32] | None = None,
        approximate: bool | None = None,
        num_threads: int | None = None,
    ) -> Moments:
        """Find the moments that show what a text says, or that are like another one.

        Args:
            text: What is looked for; it stands in templates, as labels do, whose embeddings are
                averaged.
            without: What moments must not show: a window that is nearer to one of these texts
                than to `text` is left out.
            like: In the place of a text, a video of the archive (its path, the end of that, or its
                id) and a time in it, in seconds; or an embedding, shape (D,), as
                `ActionCLIP.embed` gives them.
            saved: In the place of a text, and of what moments must not show, the name of a saved
                query.
            folders: Names of folders, such as of cameras, that are looked in; empty for all.
            videos: Paths of videos, or their last parts, that are looked in; empty for all.
            from_seconds: What was recorded from this time on, in seconds since 1970.
            to_seconds: What was recorded until this time.
            top: Moments at most.
            templates: K templates, or their file; None for the bundle's.
            allow_unknown_words: Whether to look for a text of which the model knows no word.
            embeddings: Of `text`, if there is one, and of `without`, shape (M, D), where they are
                known already, as `scoring.mean_embedding` gives them; then no bundle is opened.
            approximate: Whether to score those windows alone that an index finds, which is built
                if it is not there (`prepare_approximate`); None for archives of 2 million windows
                or more that have one. All are scored in any case where folders, videos or times
                are given, or not as many moments are found as were asked for.
            num_threads: That score; None for the cores that there are.

        Raises:
            ArchiveError: If the bundle is not there or has another text encoder.
            UnknownVideoError: If there is no such video.
            MissingExtraError: If an approximate search is asked for and faiss is not installed.
            LabelError: If a text cannot be used.
            LabelBankError: If there is no such saved query.
            ValueError: If not just one of `text`, `like` and `saved` is given, or what does not go
                with it is, or `top` is not allowed.
        """
        if sum(given is not None for given in (text, like, saved)) != 1:
            raise ArgumentError("text", "or like or saved must be given, one of them.")
        if not 1 <= top <= MAX_TOP:
            raise ArgumentError("top", f"is {top}; it must be 1 or more and {MAX_TOP} at most.")
        excluded = [without] if isinstance(without, str) else list(without)
        known: SavedQueryRecord | None = None
        if saved is not None:
            if excluded or templates is not None:
                raise ArgumentError(
                    "saved",
                    f"is {saved!r}, which has its own texts and templates; leave others out, or "
                    "save another query.",
                )
            bank = self._saved_bank(saved)
            vectors, known = mean_embedding(bank.embeddings)[0], describe_query(bank)
            text, excluded = bank.labels[0], list(bank.labels[1:])
        elif embeddings is not None:
            vectors = embeddings
        else:
            texts = [*([] if text is None else [text]), *excluded]
            vectors = self._embed(texts, templates, allow_unknown_words)
        if like is not None:
            vectors = np.concatenate([self._embedding_of(like)[np.newaxis], vectors])
        words = [repr(text) if text is not None else _name_of(like)]
        words += [f"not {each!r}" for each in excluded]
        snapshot = self._reader.snapshot()
        among = _Filter(folders, videos, from_seconds, to_seconds)
        settings: dict[str, Any] = {
            "query": ", ".join(words),
            "top": top,
            "num_threads": num_threads or num_available_cores(),
        }
        found: Moments | None = None
        if among.is_empty and approximate is not False:
            index = self._nearest(snapshot, is_asked=bool(approximate))
            if index is not None:
                found = _find_near(snapshot, vectors, index, **settings)
        if found is None:
            found = _find(snapshot, vectors, among, **settings)
        return replace(found, saved=known)

    def prepare_approximate(self, on_build: Callable[[int], None] = lambda _: None) -> None:
        """Bring the index of approximate search up to date; it lies in the archive's folder.

        Args:
            on_build: Called with the number of windows before the index is built, which takes
                minutes for millions.

        Raises:
            ArchiveError: If the archive has no windows.
            FileWriteError: If the index cannot be written.
            MissingExtraError: If faiss is not installed.
        """
        from actionclip_deploy.nearest import NearestWindows

        snapshot = self._reader.snapshot()
        if not snapshot.num_windows:
            raise ArchiveError(
                f"The archive {self.folder} has no windows yet; add videos with `actionclip index`."
            )
        with self._lock:
            index = NearestWindows.prepare(self.folder, snapshot, on_build=on_build)
            self._index = (snapshot, index)

    def _nearest(self, snapshot: Snapshot, *, is_asked: bool) -> NearestWindows | None:
        """The index of approximate search; None where there is none, or none is wanted."""
        if is_asked and snapshot.num_windows:
            if self._index is None or self._index[0] is not snapshot:
                self.prepare_approximate()
        elif snapshot.num_windows < APPROXIMATE_WINDOWS:
            return None
        elif self._index is None or self._index[0] is not snapshot:
            try:
                from actionclip_deploy.nearest import NearestWindows
            except MissingExtraError:
                return None
            with self._lock:
                self._index = (snapshot, NearestWindows.open(self.folder, snapshot))
        return None if self._index is None or self._index[0] is not snapshot else self._index[1]

    def save_query(
        self,
        name: str,
        text: str,
        *,
        without: str | Sequence[str] = (),
        accepted: Iterable[Moment | tuple[str, float]] = (),
        rejected: Iterable[Moment | tuple[str, float]] = (),
        threshold_z: float | None = None,
        templates: str | Path | Iterable[str] | None = None,
        allow_unknown_words: bool = False,
        overwrite: bool = False,
        num_threads: int | None = None,
    ) -> SavedQueryRecord:
        """Save a query as a label bank of the archive's bundle, by which `watch` tells of it.

        It is told of from a threshold on: what is given, or what `calibration.query_threshold`
        finds between the accepted moments and the rest of the archive, or a guess of z 4.

        Args:
            name: Of the bank.
            text: As for `search`, and likewise the other texts and templates.
            without: What is not told of.
            accepted: Moments of this archive that show what is meant, as a search gave them or as
                a video and a time in it, in seconds.
            rejected: Moments that do not.
            threshold_z: From which z on it is told of; then moments are of no use.
            templates: K templates, or their file; None for the bundle's.
            allow_unknown_words: Whether to take a text of which the model knows no word.
            overwrite: Whether a bank of this name may be replaced.
            num_threads: That score; None for the cores that there are.

        Raises:
            ArchiveError: If the bundle is not there or is another one, or the archive has no
                windows to compare with, or no such video.
            BundleError: If there is a bank of this name that may not be replaced, or the bundle
                cannot be written.
            LabelError: If a text cannot be used.
            ValueError: If the name or the threshold is not allowed, or a moment that was accepted
                does not stand out.
        """
        bundle, runtime = self._open_bundle()
        target = bundle.label_bank_path(name)
        before = bundle.label_bank_state(name)
        check_replaceable(target, overwrite=overwrite, marker=BANK_RECORD_NAME)
        if bundle.visual_sha256 != self.model.visual_sha256:
            raise ArchiveError(
                f"The bundle {bundle.path} has other visual weights, or another precision, than "
                f"the one that made the windows of {self.folder}, so a threshold found on them "
                "would mean nothing to it; give the bundle that it was made with (--bundle)."
            )
        excluded = [without] if isinstance(without, str) else list(without)
        bank = bank_for(
            bundle,
            runtime,
            [text, *excluded],
            templates=templates,
            allow_unknown_words=allow_unknown_words,
        )
        snapshot = self._reader.snapshot()
        vectors = mean_embedding(bank.embeddings)[0]
        cosines = score_windows(
            snapshot.shards, vectors, num_threads=num_threads or num_available_cores()
        )
        is_live = snapshot.video_of_row >= 0
        live = cosines[0][is_live]
        mean, std = (float(live.mean()), float(live.std())) if len(live) else (0.0, 0.0)
        if not std > 0:
            raise ArchiveError(
                f"The archive {self.folder} has too few windows to say what stands out; add videos "
                "with `actionclip index`, then save the query."
            )
        z = (cosines[0] - mean) / std
        if excluded:  # what is nearer to them is never told of
            is_live = is_live & (cosines[0] > cosines[1:].max(axis=0))
        looked_at = [
            [self._best_row(snapshot, each, z) for each in given] for given in (accepted, rejected)
        ]
        chosen = threshold_z
        if chosen is None:
            chosen = _threshold_of(snapshot, z, is_live, *looked_at)
        query = SavedQuery(
            mean=mean,
            std=std,
            threshold_z=chosen,
            num_accepted=len(looked_at[0]),
            num_rejected=len(looked_at[1]),
            num_windows=len(live),
            window_seconds=self.model.window_seconds,
            stride_seconds=self.model.stride_seconds,
            visual_sha256=self.model.visual_sha256,
        )
        saved = replace(bank, name=name, query=query)
        saved.save(bundle, overwrite=overwrite, expected=before)
        return describe_query(saved)

    def saved_queries(self) -> tuple[SavedQueryRecord, ...]:
        """The queries that were saved in the archive's bundle, by name."""
        bundle = self._find_bundle()
        names = [info.name for info in list_label_banks(bundle) if info.is_saved_query]
        return tuple(describe_query(read_bank_record(bundle, name)) for name in names)

    def embedding_at(self, video: str | int, seconds: float) -> Float32Array:
        """The embedding of the window of a video whose middle is nearest to a time, shape (D,).

        Args:
            video: Its path, the end of that, or its id.
            seconds: From the start of the video.

        Raises:
            UnknownVideoError: If the video is not in the archive, or has no windows.
        """
        snapshot = self._reader.snapshot()
        first, stop = self._rows_of(snapshot, video)
        middles = snapshot.intervals[first:stop].mean(axis=1)
        row = first + int(np.abs(middles - seconds).argmin())
        for shard in snapshot.shards:
            if row < len(shard):
                stored = shard[row].astype(np.float32)
                found: Float32Array = stored / np.linalg.norm(stored)
                return found
            row -= len(shard)
        raise AssertionError("rows of videos lie in shards")

    def close(self) -> None:
        """Close it; it cannot be searched afterwards."""
        self._reader.close()
        if self._runtime is not None:
            self._runtime.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Archive {self.folder}: {self.num_windows} windows>"

    def _rows_of(self, snapshot: Snapshot, video: str | int) -> tuple[int, int]:
        if isinstance(video, int):
            matches = np.flatnonzero(snapshot.ids == video).tolist()
        else:
            matches = [n for n, path in enumerate(snapshot.paths) if _is_named(path, video)]
        if len(matches) != 1:
            what = "no video with windows" if not matches else f"{len(matches)} videos"
            raise UnknownVideoError(
                f"The archive {self.folder} has {what} called {video}; give its path as "
                "`actionclip search --json` prints it."
            )
        first = int(snapshot.first[matches[0]])
        return first, first + int(snapshot.count[matches[0]])

    def _best_row(
        self, snapshot: Snapshot, given: Moment | tuple[str, float], z: NDArray[np.floating[Any]]
    ) -> int:
        """The window of a moment, or the best of those over a time."""
        if isinstance(given, Moment):
            first, stop = self._rows_of(snapshot, given.video)
            if first + given.window >= stop:
                raise ArchiveError(
                    f"The video {given.video} has changed since it was searched; search again."
                )
            return first + given.window
        video, seconds = given
        first, stop = self._rows_of(snapshot, video)
        spans = snapshot.intervals[first:stop]
        over = np.flatnonzero((spans[:, 0] <= seconds) & (seconds < spans[:, 1]))
        if not len(over):
            raise ArchiveError(
                f"The video {video} has no window at {seconds:g} s; give a time within "
                f"{spans[0, 0]:g} and {spans[-1, 1]:g} s."
            )
        return first + int(over[z[first + over].argmax()])

    def _saved_bank(self, name: str) -> LabelBank:
        bundle = self._find_bundle()
        bank = LabelBank.load(bundle, name)
        if bank.query is None:
            there = ", ".join(each.name for each in self.saved_queries()) or "none"
            raise LabelBankError(
                f"The label bank {name!r} of {bundle.path} is no saved query (there is: {there}); "
                "save one with `actionclip search ARCHIVE TEXT --save NAME`."
            )
        return bank

    def _embedding_of(self, like: tuple[str | int, float] | NDArray[np.float32]) -> Float32Array:
        if isinstance(like, tuple):
            return self.embedding_at(*like)
        vector = np.asarray(like, np.float32).reshape(-1)
        if len(vector) != self.model.embedding_dim:
            raise ArgumentError(
                "like",
                f"has {len(vector)} values, and the archive's embeddings have "
                f"{self.model.embedding_dim}; give one that this model made.",
            )
        norm = float(np.linalg.norm(vector))
        if not np.isfinite(norm) or not norm:
            raise ArgumentError("like", "has no direction: its values are zero or not finite.")
        scaled: Float32Array = vector / np.float32(norm)
        return scaled

    def _embed(
        self,
        texts: Sequence[str],
        templates: str | Path | Iterable[str] | None,
        allow_unknown_words: bool,
    ) -> Float32Array:
        """The embeddings of texts, each the mean over its templates, shape (M, D)."""
        if not texts:
            return np.empty((0, self.model.embedding_dim), np.float32)
        bundle, runtime = self._open_bundle()
        bank = bank_for(
            bundle, runtime, texts, templates=templates, allow_unknown_words=allow_unknown_words
        )
        found: Float32Array = mean_embedding(bank.embeddings)[0]
        return found

    def _open_bundle(self) -> tuple[Bundle, Runtime]:
        bundle = self._find_bundle()
        with self._lock:
            if self._runtime is None:
                # Its texts alone; `auto` would measure how fast frames are.
                self._runtime = open_runtime(bundle, "onnxruntime")
            return bundle, self._runtime

    def _find_bundle(self) -> Bundle:
        with self._lock:
            if self._bundle is None:
                path = self._bundle_path or Path(self.model.bundle)
                if self._bundle_path is None and not path.exists():
                    raise ArchiveError(
                        f"The bundle {path}, which the archive {self.folder} was made with, is "
                        "not there any more; give the bundle where it is now (--bundle)."
                    )
                bundle = Bundle.open(path)
                self.check_bundle(bundle)
                self._bundle = bundle
            return self._bundle


def _threshold_of(
    snapshot: Snapshot,
    z: NDArray[np.floating[Any]],
    is_allowed: NDArray[np.bool_],
    accepted: Sequence[int],
    rejected: Sequence[int],
) -> float:
    """From which z on a saved query is told of; by the rows of moments that somebody looked at."""
    if not accepted:
        return DEFAULT_QUERY_Z
    is_other = is_allowed.copy()
    for row in accepted:
        video = int(snapshot.video_of_row[row])
        if not is_allowed[row]:
            raise ArgumentError(
                "accepted",
                f"holds a moment of {snapshot.paths[video]} that is nearer to what must not be "
                "shown; leave one of the two out.",
            )
        first, stop = int(snapshot.first[video]), int(snapshot.first[video] + snapshot.count[video])
        spans = snapshot.intervals[first:stop]
        seen = np.where(is_allowed[first:stop], z[first:stop], -np.inf)
        start, end = _extent(spans, seen, row - first, ())
        is_other[first:stop] &= (spans[:, 1] <= start) | (spans[:, 0] >= end)
    return query_threshold(z[list(accepted)], z[list(rejected)], z[is_other])


# Scoring


@dataclass(frozen=True)
class _Filter:
    """Which windows are looked among."""

    folders: Sequence[str]
    videos: Sequence[str]
    from_seconds: float | None
    to_seconds: float | None

    @property
    def is_empty(self) -> bool:
        """Whether all windows are looked among."""
        return not (self.folders or self.videos) and (self.from_seconds, self.to_seconds) == (
            None,
            None,
        )

    def rows(self, snapshot: Snapshot) -> tuple[NDArray[np.bool_], int]:
        """Which rows pass, and how many videos are left out for want of a date."""
        kept = np.ones(len(snapshot.paths), bool)
        if self.folders:
            wanted = set(self.folders)
            kept &= np.array([folder in wanted for folder in snapshot.folders], bool)
        if self.videos:
            kept &= np.array(
                [any(_is_named(path, name) for name in self.videos) for path in snapshot.paths],
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


def _find(
    snapshot: Snapshot,
    vectors: Float32Array,
    among: _Filter,
    *,
    query: str,
    top: int,
    num_threads: int,
) -> Moments:
    """Find moments of the first vector, without windows that are nearer to another."""
    cosines = score_windows(snapshot.shards, vectors, num_threads=num_threads)
    is_live = snapshot.video_of_row >= 0
    live = cosines[0][is_live]
    mean, std = (float(live.mean()), float(live.std())) if len(live) else (0.0, 0.0)
    allowed, num_undated = among.rows(snapshot)
    num_searched = int(allowed.sum())
    if len(cosines) > 1:
        allowed &= cosines[0] > cosines[1:].max(axis=0)
    z = np.where(allowed, (cosines[0] - mean) / (std or 1.0), -np.inf)
    moments = tuple(_moments(snapshot, z, cosines[0], top))
    return Moments(query, moments, snapshot.num_windows, num_searched, mean, std, num_undated)


def _find_near(
    snapshot: Snapshot,
    vectors: Float32Array,
    index: NearestWindows,
    *,
    query: str,
    top: int,
    num_threads: int,
) -> Moments | None:
    """As `_find` among all windows, of which those are scored that an index finds.

    The windows around the best candidates are scored too, so that a moment has the extent that it
    has in an exact search. None where there are fewer moments than were asked for.
    """
    from actionclip_deploy.nearest import rows_of

    is_live = snapshot.video_of_row >= 0
    cosines = np.full((len(vectors), len(is_live)), -np.inf, np.float32)
    later = slice(index.num_rows, None)
    cosines[:, later] = score_windows(
        _rows_from(snapshot.shards, index.num_rows), vectors, num_threads=num_threads
    )
    mean, std = index.mean_and_std(vectors[0], cosines[0, later][is_live[later]])
    near = index.find(vectors[0], top * _WINDOWS_PER_MOMENT)
    cosines[:, near] = score_windows([rows_of(snapshot.shards, near)], vectors, num_threads=1)

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
        part = rows_of(snapshot.shards, np.arange(first, stop))
        cosines[:, first:stop] = score_windows([part], vectors, num_threads=num_threads)
        is_whole[first:stop] = True
        num_places += 1
        if num_places == top:  # each has a moment of its own
            break
    z = np.where(allowed(), (cosines[0] - mean) / (std or 1.0), -np.inf)
    moments = tuple(_moments(snapshot, z, cosines[0], top))
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


def _moments(
    snapshot: Snapshot, z: NDArray[np.floating[Any]], cosines: Float32Array, top: int
) -> Iterable[Moment]:
    count = min(len(z), top * _WINDOWS_PER_MOMENT)
    best = np.argpartition(-z, count - 1)[:count] if count else np.zeros(0, np.int64)
    best = best[np.lexsort((best, -z[best]))]  # of equal windows, the first
    taken: dict[int, list[tuple[float, float]]] = {}
    num_found = 0
    for row in best.tolist():
        if num_found == top or not np.isfinite(z[row]):
            return
        video = int(snapshot.video_of_row[row])
        first, stop = int(snapshot.first[video]), int(snapshot.first[video] + snapshot.count[video])
        spans = snapshot.intervals[first:stop]
        begin, stop_seconds = spans[row - first].tolist()
        others = taken.setdefault(video, [])
        least = _OVERLAP * (stop_seconds - begin)
        if any(min(end, stop_seconds) - max(start, begin) > least for start, end in others):
            continue
        start, end = _extent(spans, z[first:stop], row - first, others)
        others.append((start, end))
        recorded = float(snapshot.recorded[video])
        num_found += 1
        yield Moment(
            video=snapshot.paths[video],
            folder=snapshot.folders[video],
            start_seconds=start,
            end_seconds=end,
            peak_seconds=(begin + stop_seconds) / 2,
            z=float(z[row]),
            cosine=float(cosines[row]),
            recorded_seconds=None if np.isnan(recorded) else recorded + start,
            window=row - first,
            video_id=int(snapshot.ids[video]),
        )


def _name_of(like: object) -> str:
    return f"{like[0]}@{like[1]:g}" if isinstance(like, tuple) else "an embedding"


def _is_named(path: str, name: str) -> bool:
    """Whether a video is meant by a name: its path, or the end of it."""
    return path == name or path.endswith("/" + name.lstrip("/"))


def _extent(
    spans: NDArray[np.float64],
    z: NDArray[np.floating[Any]],
    peak: int,
    taken: Sequence[tuple[float, float]],
) -> tuple[float, float]:
    """From where to where a moment goes that has its peak in a window.

    Between the starts and ends of windows, the mean z of the windows over it is constant. From the
    largest in the peak's window, a moment goes on in both directions while that is at least
    `EXTENT` of it, up to what other moments have taken.

    Args:
        spans: Start and end of the windows of a video, shape (N, 2).
        z: Of each; minus infinity for those that are left out.
        peak: Number of the window.
        taken: Where other moments lie.
    """
    counted = np.isfinite(z)
    edges = np.unique(spans[counted])
    begins = np.searchsorted(edges, spans[counted, 0])
    ends = np.searchsorted(edges, spans[counted, 1])
    total, number = np.zeros(len(edges)), np.zeros(len(edges))
    np.add.at(total, begins, z[counted])
    np.add.at(total, ends, -z[counted])
    np.add.at(number, begins, 1)
    np.add.at(number, ends, -1)
    over = np.cumsum(number)[:-1]
    means = np.where(over > 0.5, np.cumsum(total)[:-1] / np.maximum(over, 1), -np.inf)
    for start, end in taken:
        means[np.searchsorted(edges, start) : np.searchsorted(edges, end)] = -np.inf
    first, last = np.searchsorted(edges, spans[peak])
    at = int(first + means[first:last].argmax())
    limit = EXTENT * means[at]
    if not limit > 0:  # nothing that stands out: the window, as far as it is free
        left_of, right_of = float(spans[peak, 0]), float(spans[peak, 1])
        middle = (left_of + right_of) / 2
        left_of = max([left_of, *(end for _, end in taken if end <= middle)])
        right_of = min([right_of, *(start for start, _ in taken if start > middle)])
        return left_of, right_of
    left = right = at
    while left > 0 and means[left - 1] >= limit:
        left -= 1
    while right + 1 < len(means) and means[right + 1] >= limit:
        right += 1
    return float(edges[left]), float(edges[right + 1])


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


# The page


def write_page(path: str | Path, archive: Archive, moments: Moments) -> None:
    """Write moments as a page of HTML: pictures, players that begin at the moment, and links.

    The page holds its pictures and styles; videos are played from where they are.

    Args:
        path: A file to write.
        archive: That was searched, for the pictures.
        moments: What was found.

    Raises:
        FileWriteError: If it cannot be written.
    """
    tiles = "\n".join(
        _tile(rank, moment, archive.thumbnail(moment.video, moment.window))
        for rank, moment in enumerate(moments, start=1)
    )
    title = escape(moments.query)
    count, shown = moments.num_windows, moments.num_shown
    among = f"{count:,} windows"
    if moments.num_searched != count:
        among = f"{moments.num_searched:,} of {among}"
    reach = ""
    if moments.saved is not None:
        name = escape(moments.saved.name)
        reach = (
            f" {shown or 'None'} of them reach{'' if shown != 1 else 'es'} the threshold of {name}."
        )
    head = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style>"
    )
    body = (
        f"<h1>{title}</h1><p>{len(moments)} moments among {among}; z says how many standard "
        f"deviations a moment lies above the mean of all windows.{reach}</p>"
    )
    write_text(path, f"{head}<main>{body}<ol>{tiles or '<li>Nothing was found.'}</ol></main>\n")


_STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 76rem; margin: auto; padding: 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
ol { list-style: none; padding: 0; display: grid; gap: 1rem;
     grid-template-columns: repeat(auto-fill, minmax(min(16rem, 100%), 1fr)); }
li { border: 1px solid var(--line); border-radius: .5rem; overflow: hidden; }
video { width: 100%; aspect-ratio: 16 / 9; background: #000; display: block; }
p.about { margin: .5rem .75rem; overflow-wrap: anywhere; }
"""


def _tile(rank: int, moment: Moment, picture: bytes | None) -> str:
    address = f"{Path(moment.video).absolute().as_uri()}#t={moment.start_seconds:.2f}"
    poster = ""
    if picture is not None:
        poster = f' poster="data:image/jpeg;base64,{base64.b64encode(picture).decode()}"'
    preload = "none" if poster else "metadata"
    name = escape(printable(moment.video, kept=""))
    span = f"{clock_text(moment.start_seconds)} – {clock_text(moment.end_seconds)}"
    recorded = ""
    if moment.recorded_seconds is not None:
        recorded = f"<br>{datetime.fromtimestamp(moment.recorded_seconds):%Y-%m-%d %H:%M:%S}"
    return (
        f'<li><video controls muted preload="{preload}" src="{escape(address)}"{poster}'
        f' aria-label="Moment {rank}"></video><p class="about"><b>{rank}.</b> {span}, '
        f"z {moment.z:.1f}{recorded}<br>{name}</p>"
    )
