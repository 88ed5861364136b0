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
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from html import escape
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.archive import (
    ArchivedVideo,
    ArchiveReader,
    Snapshot,
)
from actionclip_deploy.bundle import BANK_RECORD_NAME, Bundle, check_replaceable
from actionclip_deploy.calibration import DEFAULT_QUERY_Z, SavedQuery, query_threshold
from actionclip_deploy.command_records import ArchiveAnswer, ArchiveCamera, SavedQueryRecord
from actionclip_deploy.errors import (
    ArchiveChoiceError,
    ArchiveError,
    ArgumentError,
    LabelBankError,
    MissingExtraError,
    SearchTextError,
    UnknownVideoError,
    WrongKindError,
)
from actionclip_deploy.files import write_text
from actionclip_deploy.labels import (
    LabelBank,
    bank_for,
    check_search_words,
    describe_query,
    list_label_banks,
    read_bank_record,
)
from actionclip_deploy.moments import (
    Moment,
    Moments,
    Profiles,
    WindowFilter,
    WindowLayout,
    find,
    find_near,
    is_named,
    score_windows,
)
from actionclip_deploy.prompts import match_texts
from actionclip_deploy.records import clock_text, counted, printable
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.runtimes.base import Float32Array, Runtime
from actionclip_deploy.runtimes.machine import num_available_cores
from actionclip_deploy.scoring import mean_embedding

if TYPE_CHECKING:
    from actionclip_deploy.nearest import NearestWindows

# From so many windows on a search is approximate, where the archive has an index for it.
APPROXIMATE_WINDOWS = 2_000_000
MAX_TOP = 10_000


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

    def describe(self, snapshot: Snapshot | None = None) -> ArchiveAnswer:
        """What there is to be searched; by default, now."""
        if snapshot is None:
            snapshot = self.snapshot()
        videos, windows = Counter(snapshot.folders), Counter[str]()
        for folder, number in zip(snapshot.folders, snapshot.count.tolist(), strict=True):
            windows[folder] += number
        is_dated = ~np.isnan(snapshot.recorded)
        begins = snapshot.recorded[is_dated]
        ends = begins + snapshot.durations[is_dated]
        return ArchiveAnswer(
            name=self.folder.resolve().name,
            num_videos=len(snapshot.paths),
            num_windows=snapshot.num_windows,
            hours=float(snapshot.durations.sum()) / 3600,
            cameras=tuple(
                ArchiveCamera(name=name, num_videos=videos[name], num_windows=windows[name])
                for name in sorted(videos)
            ),
            first_seconds=float(begins.min()) if len(begins) else None,
            last_seconds=float(ends.max()) if len(begins) else None,
            window_seconds=self.model.window_seconds,
            stride_seconds=self.model.stride_seconds,
        )

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
        cameras: Sequence[str] = (),
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
            cameras: Names of folders that are looked in, such as of cameras; empty for all.
            videos: Paths of videos, or their last parts, that are looked in; empty for all.
            from_seconds: What was recorded from this time on, in seconds since 1970.
            to_seconds: What was recorded until this time.
            top: Moments at most, 10,000 or fewer.
            templates: K templates, or their file; None for the bundle's.
            allow_unknown_words: Whether to look for a text of which the model knows no word.
            embeddings: Of `text`, if there is one, and of `without`, shape (M, D), where they are
                known already, as `scoring.mean_embedding` gives them; then no bundle is opened.
            approximate: Whether to score those windows alone that an index finds, which is built
                if it is not there (`prepare_approximate`); None for archives of 2 million windows
                or more that have one. All are scored in any case where cameras, videos or times
                are given, or not as many moments are found as were asked for.
            num_threads: That score; None for the cores that there are.

        Raises:
            ArchiveError: If the bundle is not there or has another text encoder.
            ArchiveChoiceError: If there is no such camera, or no such time in a video.
            UnknownVideoError: If there is no such video.
            MissingExtraError: If an approximate search is asked for and faiss is not installed.
            LabelError: If a text cannot be used.
            LabelBankError: If there is no such saved query.
            WrongKindError: If `top` is no whole number, or `like` neither a time nor an embedding.
            ValueError: If not just one of `text`, `like` and `saved` is given, or what does not go
                with it is, or `top` is not allowed.
        """
        if sum(given is not None for given in (text, like, saved)) != 1:
            given = [
                name
                for name, value in {"text": text, "like": like, "saved": saved}.items()
                if value is not None
            ]
            what = f"{' and '.join(given)} were given" if given else "none of them was"
            raise ArgumentError("text", f"or like or saved must be given, and {what}; give one.")
        if not isinstance(top, int | np.integer):
            raise WrongKindError(f"top is {top!r}; give a whole number, such as 20.")
        if not 1 <= top <= MAX_TOP:
            raise ArgumentError("top", f"is {top}; it must be 1 or more and {MAX_TOP} at most.")
        if from_seconds is not None and to_seconds is not None and from_seconds > to_seconds:
            raise ArgumentError(
                "from_seconds",
                f"is {from_seconds:.0f}, which is later than to_seconds, {to_seconds:.0f}; give "
                "the earlier time first.",
            )
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
            check_search_texts(text, excluded)
            texts = [*([] if text is None else [text]), *excluded]
            vectors = self._embed(texts, templates, allow_unknown_words)
        if like is not None:
            vectors = np.concatenate([self._embedding_of(like)[np.newaxis], vectors])
        words = [text if text is not None else _name_of(like)]
        words += [f"not {each}" for each in excluded]
        snapshot = self._reader.snapshot()
        among = WindowFilter(cameras, videos, from_seconds, to_seconds)
        self._check_among(snapshot, among)
        settings: dict[str, Any] = {
            "windows": WindowLayout.of(self.model),
            "query": ", ".join(words),
            "top": top,
            "num_threads": num_threads or num_available_cores(),
        }
        found: Moments | None = None
        if among.is_empty and approximate is not False:
            index = self._nearest(snapshot, is_asked=bool(approximate))
            if index is not None:
                found = find_near(snapshot, vectors, index, **settings)
        if found is None:
            found = find(snapshot, vectors, among, **settings)
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
        check_search_texts(text, excluded)
        if not allow_unknown_words:
            check_search_words(bundle, [text, *excluded])
        bank = bank_for(
            bundle, runtime, [text, *excluded], templates=templates, allow_unknown_words=True
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
            [(self._best_row(snapshot, each, z), each) for each in given]
            for given in (accepted, rejected)
        ]
        chosen = threshold_z
        if chosen is None:
            windows = WindowLayout.of(self.model)
            usual = (windows.usual(snapshot.intervals[is_any], live) - mean) / std
            seen = np.where(is_live, z, -np.inf)
            profiles = Profiles(snapshot, seen, None, windows, usual)
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
            ArchiveChoiceError: If the video has no such time.
            UnknownVideoError: If the video is not in the archive, or has no windows.
        """
        return self._embedding_at("video", video, seconds)

    def _embedding_at(self, argument: str, video: str | int, seconds: float) -> Float32Array:
        snapshot = self._reader.snapshot()
        first, spans = self._spans_at(snapshot, argument, video, seconds)
        row = first + int(np.abs(spans.mean(axis=1) - seconds).argmin())
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
        return f"<Archive {self.folder}: {counted(self.num_windows, 'window')}>"

    def _check_among(self, snapshot: Snapshot, among: WindowFilter) -> None:
        """Refuse names of cameras and videos that the archive does not have, if it has any."""
        there = sorted(set(snapshot.folders))
        for name in among.cameras:
            if there and name not in there:
                raise ArchiveChoiceError(
                    "cameras",
                    f"names {name!r}, which is no camera of the archive {self.folder} (it has: "
                    f"{_few(there)}); give one of these, which are the names of folders.",
                )
        for name in among.videos:
            if there and not any(is_named(path, name) for path in snapshot.paths):
                raise UnknownVideoError(
                    "videos",
                    f"names {name!r}, and the archive {self.folder} has no video with windows "
                    "called so; give its path, or the end of it, as `actionclip search --json` "
                    "prints it.",
                )

    def _spans_at(
        self, snapshot: Snapshot, argument: str, video: str | int, seconds: float
    ) -> tuple[int, NDArray[np.float64]]:
        """The first row of a video and when its windows begin and end, if it has such a time."""
        first, stop = self._rows_of(snapshot, video, argument)
        spans = snapshot.intervals[first:stop]
        begin, end = float(spans[0, 0]), float(spans[:, 1].max())
        if not begin <= seconds <= end:  # written so that NaN fails
            raise ArchiveChoiceError(
                argument,
                f"is beyond the video: {video} has no window at {seconds:g} s; give a time within "
                f"{begin:g} and {end:g} s.",
            )
        return first, spans

    def _rows_of(
        self, snapshot: Snapshot, video: str | int, argument: str = "video"
    ) -> tuple[int, int]:
        if not isinstance(video, str):
            matches = np.flatnonzero(snapshot.ids == video).tolist()
        else:
            matches = [n for n, path in enumerate(snapshot.paths) if is_named(path, video)]
        if len(matches) != 1:
            what = "no video with windows" if not matches else f"{len(matches)} videos"
            raise UnknownVideoError(
                argument,
                f"cannot be found: the archive {self.folder} has {what} called {video}; give its "
                "path as `actionclip search --json` prints it.",
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
        first, spans = self._spans_at(snapshot, "accepted", video, seconds)
        over = np.flatnonzero((spans[:, 0] <= seconds) & (seconds < spans[:, 1]))
        if not len(over):  # the very end, or a gap of windows that do not overlap
            over = np.abs(spans.mean(axis=1) - seconds).argmin(keepdims=True)
        return first + int(over[z[first + over].argmax()])

    def _saved_bank(self, name: str) -> LabelBank:
        bundle = self._find_bundle()
        if name in bundle.label_bank_names():
            bank = LabelBank.load(bundle, name)
            if bank.query is not None:
                return bank
            what = f"The label bank {name!r} of {bundle.path} is no saved query"
        else:
            what = f"The bundle {bundle.path} has no saved query {name!r}"
        there = ", ".join(each.name for each in self.saved_queries()) or "none"
        raise LabelBankError(
            f"{what} (there is: {there}); save one with `actionclip search ARCHIVE TEXT --save "
            "NAME`."
        )

    def _embedding_of(self, like: Any) -> Float32Array:
        if isinstance(like, tuple) and len(like) == 2:
            video, seconds = like
            is_time = isinstance(seconds, int | float | np.number)
            if isinstance(video, str | int | np.integer) and is_time:
                named = video if isinstance(video, str) else int(video)
                return self._embedding_at("like", named, float(seconds))
        try:
            vector = np.asarray(like, np.float32).reshape(-1)
        except (TypeError, ValueError) as exc:
            raise WrongKindError(
                f"like is {like!r}; give a video and a time in it in seconds, such as "
                '("door.mp4", 12.5), or an embedding.'
            ) from exc
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
        if not allow_unknown_words:
            check_search_words(bundle, texts)
        bank = bank_for(bundle, runtime, texts, templates=templates, allow_unknown_words=True)
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


# The best row of a moment, and the moment as it was given.
_LookedAt: TypeAlias = tuple[int, Moment | tuple[str, float]]


def _threshold_of(
    snapshot: Snapshot,
    z: NDArray[np.floating[Any]],
    is_allowed: NDArray[np.bool_],
    profiles: Profiles,
    accepted: Sequence[_LookedAt],
    rejected: Sequence[_LookedAt],
) -> float:
    """From which z on a saved query is told of; by moments that somebody looked at.

    One that a search found is as high as it was there; beside a stronger one, what its windows show
    would be the edge of that.
    """

    def part_of(looked_at: _LookedAt) -> tuple[float, float, float] | None:
        row, given = looked_at
        if isinstance(given, Moment):
            return given.start_seconds, given.end_seconds, given.z
        start, end = snapshot.intervals[row].tolist()
        return profiles.of(int(snapshot.video_of_row[row])).take(start, end, ())

    if not accepted:
        return DEFAULT_QUERY_Z
    is_other = is_allowed.copy()
    heights: list[float] = []
    for row, given in accepted:
        video = int(snapshot.video_of_row[row])
        if not is_allowed[row]:
            raise ArgumentError(
                "accepted",
                f"holds a moment of {snapshot.paths[video]} that is nearer to what must not be "
                "shown; leave one of the two out.",
            )
        first, stop = int(snapshot.first[video]), int(snapshot.first[video] + snapshot.count[video])
        spans = snapshot.intervals[first:stop]
        part = part_of((row, given))
        if part is not None:  # else the moment of another that was accepted
            is_other[first:stop] &= (spans[:, 1] <= part[0]) | (spans[:, 0] >= part[1])
            heights.append(part[2])
        is_other[row] = False
    passed = [part[2] for each in rejected if (part := part_of(each)) is not None]
    return query_threshold(np.array(heights), np.array(passed), z[is_other])


def check_search_texts(text: str | None, without: Sequence[str]) -> None:
    """Refuse what is looked for, or must not be shown, if it is no text or the two are the same.

    Raises:
        SearchTextError: If it is; names the argument.
    """
    given = [("text", text)] if text is not None else []
    for name, each in [*given, *(("without", each) for each in without)]:
        if not isinstance(each, str):
            raise SearchTextError(name, f"is {each!r}; give a text.")
        if not each.strip():
            raise SearchTextError(
                name, f'is {each!r}; give what can be seen in words, such as "a person falls".'
            )
        if name == "without" and text is not None and match_texts([each], [text]) == [0]:
            raise SearchTextError(
                name, f"is {each!r}, which is what is looked for; give what that is taken for."
            )


_FEW = 8  # names in a sentence


def _few(names: Sequence[str]) -> str:
    shown = [printable(name, kept="") or "''" for name in names[:_FEW]]
    if len(names) > _FEW:
        return f"{', '.join(shown)} and {counted(len(names) - _FEW, 'other')}"
    return ", ".join(shown)


def _name_of(like: object) -> str:
    return f"{like[0]}@{like[1]:g}" if isinstance(like, tuple) else "an embedding"


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
    title = escape(printable(moments.query, kept=""))
    count, shown = moments.num_windows, moments.num_shown
    among = counted(count, "window")
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
        f"<h1>{title}</h1><p>{counted(len(moments), 'moment')} among {among}; z says how many "
        f"standard deviations a moment lies above the mean of all windows.{reach}</p>"
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
p.trouble { display: none; margin: .5rem .75rem 0; color: #c33; }
.failed p.trouble { display: block; }
p.about { margin: .5rem .75rem; overflow-wrap: anywhere; }
"""


def _tile(rank: int, moment: Moment, picture: bytes | None) -> str:
    address = f"{Path(moment.video).absolute().as_uri()}#t={moment.start_seconds:.2f}"
    poster = ""
    if picture is not None:
        poster = f' poster="data:image/jpeg;base64,{base64.b64encode(picture).decode()}"'
    preload = "none" if poster else "metadata"
    without = "" if poster else "<br>No picture was kept."
    name = escape(printable(moment.video, kept=""))
    span = f"{clock_text(moment.start_seconds)} – {clock_text(moment.end_seconds)}"
    recorded = ""
    if moment.recorded_seconds is not None:
        recorded = f"<br>{datetime.fromtimestamp(moment.recorded_seconds):%Y-%m-%d %H:%M:%S}"
    return (
        f'<li><video controls muted preload="{preload}" src="{escape(address)}"{poster}'
        f' aria-label="Moment {rank}" onerror="this.parentNode.className = \'failed\'"></video>'
        '<p class="trouble">This browser cannot play the file, or it is not there.</p>'
        f'<p class="about"><b>{rank}.</b> {span}, '
        f"z {moment.z:.1f}{recorded}<br>{name}{without}</p>"
    )
