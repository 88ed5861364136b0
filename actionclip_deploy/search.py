"""Searching an archive: from words, or from a moment, to moments.

    with Archive.open("archive") as archive:
        print(archive.search("a person falls", top=20))

All windows are scored, a block at a time, from memory maps: the search is exact, and a score, which
means little by itself, is told as its distance from the mean of all windows in standard deviations
(`z`). Windows that overlap and stand out become one moment. How well all of this finds what is
there was measured on rendered videos (docs/motions.md). Of millions of windows, `nearest` may say
which ones to score.

A query that is saved is a label bank of the archive's bundle, so `watch` tells of it as well:

    archive.save_query("falls", "a person falls", accepted=moments[:3])
    archive.search(saved="falls")

Letters: N windows, D the embedding width, K templates, M texts.
"""

from __future__ import annotations

import base64
import heapq
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

from actionclip_deploy.archive import (
    ArchivedVideo,
    ArchiveModel,
    ArchiveReader,
    Snapshot,
    read_rows,
)
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
            without: What moments must not show: one that is nearer to one of these texts than to
                `text`, on the mean of its time, is left out.
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
            "windows": _Windows.of(self.model),
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
        is_any = is_live
        if excluded:  # what is nearer to them is never told of
            is_live = is_live & (cosines[0] > cosines[1:].max(axis=0))
        looked_at = [
            [self._best_row(snapshot, each, z) for each in given] for given in (accepted, rejected)
        ]
        chosen = threshold_z
        if chosen is None:
            windows = _Windows.of(self.model)
            usual = (windows.usual(snapshot.intervals[is_any], live) - mean) / std
            seen = np.where(is_live, z, -np.inf)
            profiles = _Profiles(snapshot, seen, None, windows, usual)
            chosen = _threshold_of(snapshot, z, is_live, profiles, *looked_at)
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
    profiles: _Profiles,
    accepted: Sequence[int],
    rejected: Sequence[int],
) -> float:
    """From which z on a saved query is told of; by the rows of moments that somebody looked at."""
    if not accepted:
        return DEFAULT_QUERY_Z
    is_other = is_allowed.copy()
    heights: list[float] = []
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
        start, end = spans[row - first].tolist()
        moment = profiles.of(video).take(start, end, ())
        if moment is not None:  # else the moment of another that was accepted
            is_other[first:stop] &= (spans[:, 1] <= moment[0]) | (spans[:, 0] >= moment[1])
            heights.append(moment[2])
        is_other[row] = False
    passed = []
    for row in rejected:
        start, end = snapshot.intervals[row].tolist()
        moment = profiles.of(int(snapshot.video_of_row[row])).take(start, end, ())
        passed += [] if moment is None else [moment[2]]
    return query_threshold(np.array(heights), np.array(passed), z[is_other])


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


@dataclass(frozen=True)
class _Windows:
    """How windows lay before static ones were stored as one."""

    window_seconds: float
    stride_seconds: float

    @classmethod
    def of(cls, model: ArchiveModel) -> _Windows:
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


def _find(
    snapshot: Snapshot,
    vectors: Float32Array,
    among: _Filter,
    *,
    windows: _Windows,
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


def _find_near(
    snapshot: Snapshot,
    vectors: Float32Array,
    index: NearestWindows,
    *,
    windows: _Windows,
    query: str,
    top: int,
    num_threads: int,
) -> Moments | None:
    """As `_find` among all windows, of which those are scored that an index finds.

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
    windows: _Windows,
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
    profiles = _Profiles(snapshot, z, ahead, windows, (usual - mean) / std)
    found = _moments(snapshot, candidates, cosines[0], top, profiles)
    return tuple(sorted(found, key=lambda each: -each.z)[:top])


def _moments(
    snapshot: Snapshot,
    z: NDArray[np.floating[Any]],
    cosines: Float32Array,
    top: int,
    profiles: _Profiles,
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


class _Profiles:
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
        windows: _Windows,
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


def _name_of(like: object) -> str:
    return f"{like[0]}@{like[1]:g}" if isinstance(like, tuple) else "an embedding"


def _is_named(path: str, name: str) -> bool:
    """Whether a video is meant by a name: its path, or the end of it."""
    return path == name or path.endswith("/" + name.lstrip("/"))


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
