"""Measure how well an archive of long videos of `motions` is searched, and write the tables.

    python train/search_tables.py BUNDLE [--hours 22] [--tune-hours 4] [--folder FOLDER]

BUNDLE is the model's. Two archives are made of videos that are rendered for them: on `tune`, what a
search takes for granted is looked at (how far a moment goes on, from where on windows are the same,
the length of windows), and all numbers are of `test`, of other labels and other videos. Some labels
of each are held out of the training, some are each other played backwards, and what is asked for
that is not in the archive is, in part, another motion of an object that is. Beside the search
stands the ordinary way with the same embeddings: one bank of all 896 labels, their softmax in each
window, and the events of the timeline. Videos are removed once they are in the archive; the
archives stay in FOLDER, and are taken as they are where they are there. The tables go into
docs/motions.md, all numbers into train/results/motions-search.json.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from actionclip_deploy import Archive, Bundle, LabelBank, Recognizer, moments, open_runtime
from actionclip_deploy.archive import ArchiveReader, ArchiveWriter
from actionclip_deploy.errors import ActionClipError, VideoError
from actionclip_deploy.evaluate.intervals import AnnotatedVideo, read_intervals
from actionclip_deploy.evaluate.timelines import found_by, interpolated_precision
from actionclip_deploy.events import Event, find_events
from actionclip_deploy.files import write_json, write_text
from actionclip_deploy.indexing import STATIC_COSINE, archive_model, index_videos
from actionclip_deploy.motions import (
    COLOURS,
    MOTIONS,
    ORDER_PAIRS,
    SHAPES,
    MotionLabel,
    all_labels,
    labels,
    write_long_videos,
)
from actionclip_deploy.recognizer import VideoEncoder
from actionclip_deploy.scoring import score
from actionclip_deploy.stream import Window, WindowGrid
from actionclip_deploy.timeline import mean_over_windows

RESULTS = Path("train/results/motions-search.json")
PAGE = Path("docs/motions.md")
MARKS = ("<!-- searches -->", "<!-- /searches -->")

SECONDS = 300.0
SIZE = 48  # pixels: the model's input is cut out of 45
GAP_SECONDS = (2.0, 60.0)  # most of the time nothing happens, as before real cameras
SEEDS = {"tune": 11, "test": 12}
HOURS_AT_A_TIME = 2.0  # of rendered files that are there at the same time

NUM_ABSENT = 60  # queries for what is not there, of each kind
TIOU, STRICT_TIOU = 0.5, 0.7
RANKS = (1, 5, 10)
MIN_TOP = 60  # moments of each query, and four times as many as there are to be found
EXTENTS = (0.3, 0.4, 0.5, 0.6, 0.7)
STATICS = (0.98, 0.99, 0.995, 0.999, 2.0)
LEVELS = (0.01, 0.03, 0.06, 0.1, 0.2)  # at which events of the ordinary way open
SHARES_FOUND = (0.5, 0.8, 0.9)

console = Console(stderr=True)


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(description="Measure the search of archives.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--hours", type=float, default=22.0)
    parser.add_argument("--tune-hours", type=float, default=4.0)
    parser.add_argument("--window", type=float, help="Seconds; as long as the clips of training.")
    parser.add_argument("--folder", type=Path, default=Path("data/motions/archives"))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    before, start, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (start and end):
        sys.exit(f"{PAGE} has no place for the tables; put {' and '.join(MARKS)} into it.")
    bundle = Bundle.open(given.bundle)
    with open_runtime(bundle) as runtime:
        bank = LabelBank.build(bundle, runtime, list(map(str, all_labels())), name="motions")
        place = Workplace(bundle, Recognizer(runtime, bank), given.folder.absolute(), given.workers)
        grid = WindowGrid.of_model(bundle.manifest, window_seconds=given.window)
        tuned = tune(place, grid, given.tune_hours)
        found = {"tune": tuned, "test": report(place, grid, given.hours, tuned)}
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, found)
    write_text(PAGE, f"{before}{start}\n\n{format_tables(found)}\n{end}{after}")
    console.print(f"Wrote {RESULTS} and the tables in {PAGE}.", highlight=False)


# What archives show, and what is asked.


@dataclass(frozen=True)
class Contents:
    """The labels that the videos of an archive show, and some that they do not."""

    shown: tuple[MotionLabel, ...]
    near: tuple[MotionLabel, ...]  # not shown, of objects that show another motion
    far: tuple[MotionLabel, ...]  # of objects that are not to be seen at all

    @classmethod
    def drawn(cls, seed: int, num_shown: int) -> Contents:
        """Draw a third of the labels from those that are held out, and 2/9 of all as pairs.

        A pair is an object that shows a motion, and the same backwards.
        """
        rng = np.random.default_rng(seed)
        objects = [(shape, colour) for shape in SHAPES for colour in COLOURS]
        objects = [objects[place] for place in rng.permutation(len(objects))]
        hidden = set(objects[: len(objects) // 8])
        pool = [each for each in all_labels() if (each.shape, each.colour) not in hidden]
        pool = [pool[place] for place in rng.permutation(len(pool))]
        heldout = set(labels("heldout"))
        room = {True: num_shown // 3, False: num_shown - num_shown // 3}
        backwards = dict(ORDER_PAIRS)
        shown: dict[MotionLabel, None] = {}
        pairs = [
            (each, each._replace(motion=backwards[each.motion]))
            for each in pool
            if each.motion in backwards
        ]
        for group in (*pairs[: num_shown // 9], *((each,) for each in pool)):
            of_group = [each for each in group if each not in shown]
            num_new = sum(each in heldout for each in of_group)
            taken = {True: num_new, False: len(of_group) - num_new}
            if all(taken[is_new] <= room[is_new] for is_new in room):
                shown.update(dict.fromkeys(of_group))
                room = {is_new: room[is_new] - taken[is_new] for is_new in room}
        rest = [each for each in pool if each not in shown]
        new, known = ([e for e in rest if (e in heldout) == is_new] for is_new in (True, False))
        half = min(NUM_ABSENT // 2, len(new))
        far = [each for each in all_labels() if (each.shape, each.colour) in hidden]
        far = [far[place] for place in rng.permutation(len(far))[:NUM_ABSENT]]
        return cls(tuple(shown), (*new[:half], *known[:half]), tuple(far))


@dataclass(frozen=True)
class Query:
    """What is asked.

    Attributes:
        kind: One of `KINDS`.
        text: What is looked for: a label, or the end of one.
        without: What moments must not show.
    """

    kind: str
    text: str
    without: tuple[str, ...] = ()

    def spans(self, video: AnnotatedVideo) -> NDArray[np.float64]:
        """When a video shows what is looked for, shape (n, 2)."""
        found = [
            (each.start_seconds, each.end_seconds)
            for each in video.intervals
            if each.label.endswith(self.text)
        ]
        return np.array(found, np.float64).reshape(-1, 2)


KINDS = {
    "seen": "labels of the training",
    "heldout": "held-out labels",
    "motion": "a motion, of whatever object",
    "plain": "labels that are there backwards, too",
    "not": "the same, `--not` the other",
    "near": "nothing: the object shows other motions",
    "far": "nothing: there is no such object",
}
# What moments could be told by, and the ordinary way's; `rise` is how far a cosine has come on its
# way from the mean of all windows to 1.
SCORES = {
    "z": "z",
    "cosine": "the cosine itself",
    "rise": "the cosine's way from the mean to 1",
    "score": "the bank's score",
}
SEARCH_SCORES = ("z", "cosine", "rise")
FOUND_KINDS = ("seen", "heldout", "motion", "plain", "not")
LABEL_KINDS = ("seen", "heldout")  # of which thresholds are told
ABSENT_KINDS = ("near", "far")


def queries_of(contents: Contents) -> list[Query]:
    """Everything that is asked of an archive."""
    heldout, shown = set(labels("heldout")), set(contents.shown)
    queries = [
        Query("heldout" if label in heldout else "seen", str(label)) for label in contents.shown
    ]
    queries += [Query("motion", motion) for motion in MOTIONS]
    backwards = {**dict(ORDER_PAIRS), **{second: first for first, second in ORDER_PAIRS}}
    for label in contents.shown:
        other = label._replace(motion=backwards.get(label.motion, ""))
        if other in shown:
            queries.append(Query("plain", str(label)))
            queries.append(Query("not", str(label), (str(other),)))
    queries += [Query("near", str(label)) for label in contents.near]
    return queries + [Query("far", str(label)) for label in contents.far]


# Making archives.


@dataclass(frozen=True)
class Workplace:
    """What archives are made with, and where."""

    bundle: Bundle
    recognizer: Recognizer  # of a bank of all labels
    folder: Path
    workers: int

    def archives(
        self, split: str, hours: float, grid: WindowGrid, static_cosines: Sequence[float]
    ) -> tuple[list[Path], Contents, list[AnnotatedVideo]]:
        """Archives of a split, one for each cosine; those that are not there are made.

        Returns:
            Their folders, what they show, and when each video shows what.
        """
        contents = Contents.drawn(SEEDS[split], num_shown=max(18, min(180, round(12 * hours))))
        lists = self.folder / f"{split}-{hours:g}h"
        folders = [
            self.folder / f"{split}-{hours:g}h-{grid.window_seconds:g}s-{cosine:g}"
            for cosine in static_cosines
        ]
        unfinished = {
            folder: (folder.with_name(f"{folder.name}.part"), cosine)
            for folder, cosine in zip(folders, static_cosines, strict=True)
            if not folder.exists()
        }
        seconds = min(SECONDS, 3600 * hours)
        num_videos = max(1, round(hours * 3600 / SECONDS))
        at_a_time = max(1, round(HOURS_AT_A_TIME * 3600 / SECONDS))
        videos: list[AnnotatedVideo] = []
        for number, first in enumerate(range(0, num_videos, at_a_time)):
            part = lists / f"{number:03d}"
            table = part / f"{split}.csv"
            if unfinished:
                # The same videos whenever they are rendered: a seed decides all.
                write_long_videos(
                    part,
                    split,
                    min(at_a_time, num_videos - first),
                    1000 * SEEDS[split] + number,
                    seconds=seconds,
                    shown=contents.shown,
                    gap_seconds=GAP_SECONDS,
                    size=SIZE,
                    workers=self.workers,
                )
                for archive, cosine in unfinished.values():
                    self._index(archive, part, grid, cosine)
                shutil.rmtree(part / split)
            videos += read_intervals(table, self.recognizer.bank.labels)
            console.print(f"{split}: {len(videos)} of {num_videos} videos", highlight=False)
        for folder, (archive, _) in unfinished.items():
            archive.rename(folder)
        return folders, contents, videos

    def _index(self, archive: Path, videos: Path, grid: WindowGrid, static_cosine: float) -> None:
        encoder = VideoEncoder(self.recognizer.runtime)
        runtime = encoder.runtime.describe().title
        model = archive_model(self.bundle, runtime, grid, static_cosine=static_cosine)
        with ArchiveWriter.open(archive, model) as writer:
            files = sorted(videos.rglob("*.mp4"))
            for each in index_videos(encoder, writer, files, grid, num_workers=self.workers):
                if each.video.error is not None:
                    raise VideoError(each.video.error)


# What is found, and what it is worth.


@dataclass(frozen=True, eq=False)
class Answer:
    """What was found for a query, the best first.

    Attributes:
        query: What was asked.
        num_true: How often the archive shows it.
        hits: Of R moments, which find one of these times first, with `TIOU` or more; shape (R,).
        strict_hits: The same with `STRICT_TIOU`.
        scores: Of them by their name, each of shape (R,).
    """

    query: Query
    num_true: int
    hits: NDArray[np.bool_]
    strict_hits: NDArray[np.bool_]
    scores: dict[str, NDArray[np.float64]]


def ask(
    archive: Archive, videos: Sequence[AnnotatedVideo], queries: Iterable[Query]
) -> list[Answer]:
    """Search an archive, as a user does."""
    number_of = {str(video.path): number for number, video in enumerate(videos)}
    answers = []
    for query in queries:
        spans = [query.spans(video) for video in videos]
        num_true = sum(map(len, spans))
        top = max(MIN_TOP, 4 * num_true)
        moments = archive.search(query.text, without=query.without, top=top)
        ranked = [(number_of[each.video], each) for each in moments]
        hits = found_by(spans, ranked, [TIOU, STRICT_TIOU])
        z, cosine = (np.array([getattr(m, name) for m in moments]) for name in ("z", "cosine"))
        rise = (cosine - moments.mean) / (1 - moments.mean)
        scores = {"z": z, "cosine": cosine, "rise": rise}
        answers.append(Answer(query, num_true, hits[0], hits[1], scores))
    return answers


def look_up(
    events: Sequence[Sequence[Event]], videos: Sequence[AnnotatedVideo], queries: Iterable[Query]
) -> list[Answer]:
    """The answers of the ordinary way to the same queries: its events, ranked by their score."""
    by_label: dict[str, list[tuple[int, Event]]] = {}
    for number, of_video in enumerate(events):
        for event in of_video:
            by_label.setdefault(event.label, []).append((number, event))
    answers = []
    for query in queries:
        spans = [query.spans(video) for video in videos]
        ranked = sorted(by_label.get(query.text, []), key=lambda each: -each[1].score)
        hits = found_by(spans, ranked, [TIOU, STRICT_TIOU])
        scores = {"score": np.array([event.score for _, event in ranked])}
        answers.append(Answer(query, sum(map(len, spans)), hits[0], hits[1], scores))
    return answers


def find_in_windows(
    recognizer: Recognizer,
    archive: Path,
    videos: Sequence[AnnotatedVideo],
    grid: WindowGrid,
    levels: Sequence[float],
) -> list[list[list[Event]]]:
    """Events of all labels and motions by the ordinary way, from the windows of an archive.

    Returns:
        For each level at which events open, for each video.
    """
    bank, scale = recognizer.bank, recognizer.ranker.scale
    names = (*bank.labels, *MOTIONS)
    members = np.stack([[label.endswith(motion) for label in bank.labels] for motion in MOTIONS])
    found: list[list[list[Event]]] = [[[] for _ in videos] for _ in levels]
    with ArchiveReader.open(archive) as reader:
        snapshot = reader.snapshot()
        table = np.concatenate([np.asarray(shard, np.float32) for shard in snapshot.shards])
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    number_of = {str(video.path): number for number, video in enumerate(videos)}
    for path, first, count in zip(snapshot.paths, snapshot.first, snapshot.count, strict=True):
        rows = slice(int(first), int(first + count))
        windows, places = all_windows(snapshot.intervals[rows], grid)
        scores = score(recognizer.method, table[rows], bank.embeddings, scale=scale)
        # Motions exclude each other, so one is as likely as all labels that show it.
        scores = np.concatenate([scores, scores @ members.T.astype(np.float32)], axis=1)[places]
        starts, steps = mean_over_windows(windows, scores, grid)
        for level, of_level in zip(levels, found, strict=True):
            of_level[number_of[path]] = find_events(
                steps,
                names,
                starts_seconds=starts,
                step_seconds=grid.step_seconds,
                thresholds=level,
                min_seconds=2 * grid.stride_seconds,
                merge_seconds=grid.window_seconds / 4,
            )
    return found


def all_windows(
    intervals: NDArray[np.float64], grid: WindowGrid
) -> tuple[tuple[Window, ...], NDArray[np.int64]]:
    """The windows of a video, and in which stored one each is; static ones are stored as one."""
    windows: list[Window] = []
    places: list[int] = []
    for place, (start, end) in enumerate(intervals.tolist()):
        for number in range(1 + round((end - start - grid.window_seconds) / grid.stride_seconds)):
            begin = start + number * grid.stride_seconds
            windows.append(Window(0, len(windows), begin, begin + grid.window_seconds))
            places.append(place)
    return tuple(windows), np.array(places, np.int64)


def _mean_precision(rankings: Iterable[tuple[NDArray[np.bool_], int]]) -> float:
    """Mean average precision; what there is nothing of counts for nothing."""
    return float(np.mean([interpolated_precision(hits, num) for hits, num in rankings if num]))


def worth(answers: Sequence[Answer]) -> dict[str, float]:
    """Means over queries: average precision, and recall and precision of the first moments.

    Queries for what is not there are left out.
    """
    answers = [answer for answer in answers if answer.num_true]
    found: dict[str, float] = {
        "queries": len(answers),
        "true": sum(answer.num_true for answer in answers),
        "ap": _mean_precision([(each.hits, each.num_true) for each in answers]),
        "strict_ap": _mean_precision([(each.strict_hits, each.num_true) for each in answers]),
    }
    for rank in (*RANKS, None):
        name = "n" if rank is None else str(rank)
        counts = np.array([answer.num_true for answer in answers])
        firsts = np.array([a.hits[: rank or a.num_true].sum() for a in answers])
        found[f"recall@{name}"] = float((firsts / counts).mean())
        found[f"precision@{name}"] = float((firsts / (rank or counts)).mean())
    return found


def threshold_for(answers: Sequence[Answer], name: str, share: float) -> float | None:
    """The score from which on so large a share of all there is to be found is found."""
    right = np.concatenate([answer.scores[name][answer.hits] for answer in answers])
    wanted = math.ceil(share * sum(answer.num_true for answer in answers) - 1e-9)
    return None if wanted > len(right) else float(np.sort(right)[::-1][wanted - 1])


def told_at(
    threshold: float, name: str, present: Sequence[Answer], absent: Sequence[Answer]
) -> dict[str, float]:
    """What is found and what is told wrongly from a score on."""
    at = [answer.scores[name] >= threshold for answer in present]
    num_found = sum(int(a.hits[t].sum()) for a, t in zip(present, at, strict=True))
    num_told = sum(int(t.sum()) for t in at)
    empty = [int((answer.scores[name] >= threshold).sum()) for answer in absent]
    return {
        "threshold": threshold,
        "recall": num_found / sum(answer.num_true for answer in present),
        "precision": num_found / num_told if num_told else 1.0,
        "queries_with_false": float(np.mean([number > 0 for number in empty])),
        "false_per_query": float(np.mean(empty)),
    }


def f_measures(answers: Sequence[Answer], name: str, threshold: float) -> NDArray[np.float64]:
    """Of each query that has an answer, the harmonic mean of precision and recall from a score."""
    values = []
    for answer in answers:
        if not answer.num_true:
            continue
        told = answer.scores[name] >= threshold
        values.append(2 * answer.hits[told].sum() / (told.sum() + answer.num_true))
    return np.array(values)


def best_threshold(answers: Sequence[Answer], name: str) -> float:
    """The score with the highest mean of `f_measures`, one for all queries."""
    tried = np.unique(np.concatenate([answer.scores[name][answer.hits] for answer in answers]))
    tried = tried[:: max(1, len(tried) // 400)]
    return float(max(tried, key=lambda each: f_measures(answers, name, each).mean()))


def own_f_measures(answers: Sequence[Answer]) -> NDArray[np.float64]:
    """Of each query that has an answer, the best that a threshold of its own reaches."""
    best = []
    for answer in answers:
        if not answer.num_true:
            continue
        found = np.cumsum(answer.hits)
        told = np.arange(1, len(found) + 1)
        best.append(float((2 * found / (told + answer.num_true)).max(initial=0.0)))
    return np.array(best)


# The two splits.


def of_kinds(answers: Iterable[Answer], kinds: Sequence[str]) -> list[Answer]:
    """Those to queries of some kinds."""
    return [answer for answer in answers if answer.query.kind in kinds]


def tune(place: Workplace, grid: WindowGrid, hours: float) -> dict[str, Any]:
    """What the numbers that a search takes for granted are chosen by, and thresholds."""
    folders, contents, videos = place.archives("tune", hours, grid, STATICS)
    asked = [each for each in queries_of(contents) if each.kind in LABEL_KINDS]
    statics = []
    for cosine, folder in zip(STATICS, folders, strict=True):
        with Archive.open(folder, bundle=place.bundle.path) as archive:
            row = worth(ask(archive, videos, asked))
            statics.append({"static": cosine, "windows": archive.num_windows, **row})
    folder = folders[STATICS.index(STATIC_COSINE)]
    extents, used = [], moments.EXTENT
    with Archive.open(folder, bundle=place.bundle.path) as archive:
        answers = ask(archive, videos, asked)
        for extent in EXTENTS:
            moments.EXTENT = extent
            extents.append({"extent": extent, **worth(ask(archive, videos, asked))})
        moments.EXTENT = used
    levels = []
    of_levels = find_in_windows(place.recognizer, folder, videos, grid, LEVELS)
    for level, events in zip(LEVELS, of_levels, strict=True):
        levels.append({"level": level, **worth(look_up(events, videos, asked))})
    return {
        "hours": hours,
        "statics": statics,
        "extents": extents,
        "levels": levels,
        "thresholds": {name: best_threshold(answers, name) for name in SEARCH_SCORES},
    }


def report(
    place: Workplace, grid: WindowGrid, hours: float, tuned: dict[str, Any]
) -> dict[str, Any]:
    """All that is said of searching, with what was chosen before."""
    (folder,), contents, videos = place.archives("test", hours, grid, [STATIC_COSINE])
    queries = queries_of(contents)
    with Archive.open(folder, bundle=place.bundle.path) as archive:
        answers = ask(archive, videos, queries)
        num_windows = archive.num_windows
        seconds = sum(video.duration_seconds for video in archive.videos().values())
    level = max(tuned["levels"], key=lambda row: row["ap"])["level"]
    (events,) = find_in_windows(place.recognizer, folder, videos, grid, [level])
    ordinary = look_up(events, videos, [each for each in queries if not each.without])
    rows = {
        kind: {
            "search": worth(of_kinds(answers, [kind])),
            "ordinary": worth(of_kinds(ordinary, ["plain" if kind == "not" else kind])),
        }
        for kind in FOUND_KINDS
        if any(answer.num_true for answer in of_kinds(answers, [kind]))
    }
    ways = {**dict.fromkeys(SEARCH_SCORES, answers), "score": ordinary}
    shares = []
    for share in SHARES_FOUND:
        for name, of_way in ways.items():
            present = of_kinds(of_way, LABEL_KINDS)
            threshold = threshold_for(present, name, share)
            if threshold is None:
                continue
            for kind in ABSENT_KINDS:
                told = told_at(threshold, name, present, of_kinds(of_way, [kind]))
                shares.append({"share": share, "by": name, "absent": kind, **told})
    present = of_kinds(answers, LABEL_KINDS)
    single = {
        name: float(f_measures(present, name, threshold).mean())
        for name, threshold in tuned["thresholds"].items()
    }
    return {
        "hours": seconds / 3600,
        "videos": len(videos),
        "motions_shown": sum(len(video.intervals) for video in videos),
        "labels_shown": len(contents.shown),
        "windows": num_windows,
        "window_seconds": grid.window_seconds,
        "level": level,
        "kinds": rows,
        "shares": shares,
        "f_measures": {**single, "own": float(own_f_measures(present).mean())},
    }


# The tables.


def format_tables(found: dict[str, Any]) -> str:
    """The tables as Markdown."""
    test, tuned = found["test"], found["tune"]
    lines = [
        f"{test['hours']:.0f} h in {test['videos']} videos, in which {test['labels_shown']} labels "
        f"are shown {test['motions_shown']:,} times, stored as {test['windows']:,} windows of "
        f"{test['window_seconds']:g} s. In per cent, the search / the ordinary way, means over "
        f"queries; n is how often a query is shown, and a moment is right at a tIoU of {TIOU:g}:",
        "",
        "| what is asked for | queries | n, mean | average precision | recall of the first 1 | 5 "
        "| 10 | n | precision of the first 1 | 5 | 10 |",
        "|---" * 11 + "|",
    ]
    columns = ["ap", *(f"recall@{k}" for k in (*RANKS, "n")), *(f"precision@{k}" for k in RANKS)]
    for kind, row in test["kinds"].items():
        asked, ordinary = row["search"], row["ordinary"]
        cells = [f"{100 * asked[name]:.0f} / {100 * ordinary[name]:.0f}" for name in columns]
        count = f"{asked['queries']} | {asked['true'] / asked['queries']:.1f}"
        lines.append(f"| {KINDS[kind]} | {count} | {' | '.join(cells)} |")
    lines += [
        "",
        "If moments are told from one score on, the same for all queries, which finds so much of "
        "what labels are shown: the precision, and of the queries for what is not in the archive "
        "those of which something is told, and how many moments:",
        "",
        "| found | by | precision | told, of another motion of the object | told, of an object "
        "that is not there |",
        "|---|---|---|---|---|",
    ]
    for share in SHARES_FOUND:
        for name, text in SCORES.items():
            near, far = (
                next(
                    (
                        row
                        for row in test["shares"]
                        if (row["share"], row["by"], row["absent"]) == (share, name, kind)
                    ),
                    None,
                )
                for kind in ABSENT_KINDS
            )
            if near is None or far is None:
                lines.append(f"| {share:.0%} | {text} | never reached | | |")
                continue
            told = [
                f"{row['queries_with_false']:.0%} ({row['false_per_query']:.1f})"
                for row in (near, far)
            ]
            lines.append(f"| {share:.0%} | {text} | {near['precision']:.0%} | {' | '.join(told)} |")
    single = ", ".join(
        f"{100 * test['f_measures'][name]:.0f} by {SCORES[name]}" for name in SEARCH_SCORES
    )
    lines += [
        "",
        "F-measure of a query, mean, with one threshold for all that was chosen on `tune`: "
        f"{single}; with the best threshold of each query's own: "
        f"{100 * test['f_measures']['own']:.0f}.",
        "",
        f"What was chosen on `tune`, {tuned['hours']:g} h of other labels, average precision of "
        f"labels at a tIoU of {TIOU:g} / {STRICT_TIOU:g}:",
        "",
        "| a moment goes on above, of the way up to its best | "
        + " | ".join(f"{row['extent']:g}" for row in tuned["extents"])
        + " |",
        "|---" * (1 + len(tuned["extents"])) + "|",
        "| average precision | "
        + " | ".join(
            f"{100 * row['ap']:.1f} / {100 * row['strict_ap']:.1f}" for row in tuned["extents"]
        )
        + " |",
        "",
        "| windows are one from a cosine of | "
        + " | ".join(
            "none" if row["static"] > 1 else f"{row['static']:g}" for row in tuned["statics"]
        )
        + " |",
        "|---" * (1 + len(tuned["statics"])) + "|",
        "| windows stored | "
        + " | ".join(f"{row['windows']:,}" for row in tuned["statics"])
        + " |",
        "| average precision | "
        + " | ".join(
            f"{100 * row['ap']:.1f} / {100 * row['strict_ap']:.1f}" for row in tuned["statics"]
        )
        + " |",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        main()
    except (ActionClipError, OSError, ValueError) as exc:
        sys.exit(f"error: {exc}")
