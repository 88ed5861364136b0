"""Measure the default model on long videos of `motions`, and write the tables into its page.

    python train/timeline_tables.py BUNDLE [--data data/motions/long] [--clips FOLDER]

BUNDLE is the model's; the videos come from `render_motions.py --only long`. For each length of
window, the threshold of events and their shortest length are chosen on the videos of `tune`, and
all numbers are of those of `test`. FOLDER holds videos that show none of the labels: what is told
of them are false alarms. The tables go into docs/motions.md, all numbers into
train/results/motions-timelines.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from actionclip_deploy import Bundle, LabelBank, Recognizer, open_runtime
from actionclip_deploy.errors import ActionClipError, VideoError
from actionclip_deploy.evaluate.intervals import AnnotatedVideo, read_intervals
from actionclip_deploy.evaluate.timelines import (
    ACTIVITYNET_TIOUS,
    THUMOS_TIOUS,
    EventCounts,
    MeasuredVideo,
    count_events,
    live_events,
    measure_events,
    measured_video,
)
from actionclip_deploy.events import SOFTMAX_THRESHOLD, Event, WatchedLabels, find_events
from actionclip_deploy.files import write_json, write_text
from actionclip_deploy.prompts import read_labels
from actionclip_deploy.records import LiveEvent
from actionclip_deploy.stream import WindowGrid
from actionclip_deploy.timeline import Timeline, read_timeline
from actionclip_deploy.video.reader import list_videos

RESULTS = Path("train/results/motions-timelines.json")
PAGE = Path("docs/motions.md")
MARKS = ("<!-- timelines -->", "<!-- /timelines -->")

WINDOWS = (2.0, 3.0, 4.0)
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MIN_STRIDES = (2, 4, 6, 8, 10, 12)
UNTUNED = (SOFTMAX_THRESHOLD, 2)
RANKING_SCORE = 0.06  # from which windows by themselves are ranked, as those of timelines are

console = Console(stderr=True)

Found = list[tuple[AnnotatedVideo, Timeline]]


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(description="Measure the default model on long videos.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data/motions/long"))
    parser.add_argument("--clips", type=Path, help="Folder of videos that show no label.")
    arguments = parser.parse_args()
    before, start, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (start and end):
        sys.exit(f"{PAGE} has no place for the tables; put {' and '.join(MARKS)} into it.")
    labels = read_labels(arguments.data / "labels.csv")
    videos = {
        split: read_intervals(arguments.data / f"{split}.csv", labels) for split in ("tune", "test")
    }
    bundle = Bundle.open(arguments.bundle)
    with open_runtime(bundle) as runtime:
        bank = LabelBank.build(bundle, runtime, labels, name="motions")
        recognizer = Recognizer(runtime, bank)
        rows = [
            measure_window(recognizer, seconds, videos["tune"], videos["test"], arguments.clips)
            for seconds in WINDOWS
        ]
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, rows)
    write_text(PAGE, f"{before}{start}\n\n{format_tables(rows)}\n{end}{after}")
    console.print(f"Wrote {RESULTS} and the tables in {PAGE}.", highlight=False)


def measure_window(
    recognizer: Recognizer,
    seconds: float,
    tune: Sequence[AnnotatedVideo],
    test: Sequence[AnnotatedVideo],
    clips: Path | None,
) -> dict[str, Any]:
    """Everything about one length of window."""
    console.print(f"windows of {seconds:g} s: tune", highlight=False)
    found = read(recognizer, tune, seconds)
    best = max(product(THRESHOLDS, MIN_STRIDES), key=lambda settings: f_measure(found, *settings))
    console.print(f"windows of {seconds:g} s: test", highlight=False)
    found = read(recognizer, test, seconds)
    untuned, tuned = told(found, *UNTUNED), told(found, *best)
    return {
        "window_seconds": seconds,
        "videos": len(found),
        "hours": untuned["hours"],
        "intervals": untuned["num_intervals"],
        "single": rank(found, [single_windows(timeline) for _, timeline in found]),
        "joined": rank(found, [joined_windows(timeline) for _, timeline in found]),
        "timeline": {key: untuned[key] for key in ("thumos_map", "activitynet_map", "frame_map")},
        "untuned": untuned,
        "tuned": tuned,
        "clips": None if clips is None else on_clips(recognizer, clips, seconds, [UNTUNED, best]),
    }


def watch(recognizer: Recognizer, threshold: float) -> WatchedLabels:
    """All labels at one threshold."""
    return WatchedLabels.of(recognizer.bank, recognizer.method, thresholds=threshold)


def read(recognizer: Recognizer, videos: Sequence[AnnotatedVideo], seconds: float) -> Found:
    """The timelines of videos."""
    grid = WindowGrid.of_model(recognizer.runtime.manifest, window_seconds=seconds)
    watched = watch(recognizer, UNTUNED[0])
    return [
        (video, read_timeline(recognizer, video.path, grid, watched=watched)) for video in videos
    ]


def live_of(found: Found, threshold: float, min_strides: int) -> list[list[LiveEvent]]:
    """What a stream of each video tells at these settings."""
    told = []
    for _, timeline in found:
        thresholds = np.full_like(timeline.watched.thresholds, threshold)
        at = replace(timeline, watched=replace(timeline.watched, thresholds=thresholds))
        told.append(live_events(at, min_seconds=min_strides * timeline.grid.stride_seconds))
    return told


def f_measure(found: Found, threshold: float, min_strides: int) -> float:
    """Harmonic mean of the share of intervals that are found and of events that find one."""
    counts: dict[str, EventCounts] = {}
    for (video, _), live in zip(found, live_of(found, threshold, min_strides), strict=True):
        count_events(video.intervals, live, counts)
    total = sum(counts.values(), EventCounts())
    num_found = total.num_intervals - total.num_missed
    return 2 * num_found / (total.num_intervals + total.num_events)


def told(found: Found, threshold: float, min_strides: int) -> dict[str, Any]:
    """What live events at these settings are worth, and what the false alarms are of."""
    measured: list[MeasuredVideo] = []
    of_object = 0
    for (video, timeline), live in zip(found, live_of(found, threshold, min_strides), strict=True):
        measured.append(measured_video(video.intervals, timeline, live))
        for event in live:
            there = [
                each.label
                for each in video.intervals
                if each.start_seconds < event.end_seconds and each.end_seconds > event.start_seconds
            ]
            if event.label in there:
                continue
            # "a red star moving left": which object, and then its motion.
            of_object += event.label.split()[1:3] in [label.split()[1:3] for label in there]
    metrics = measure_events(measured, found[0][1].watched.names)
    return {
        "threshold": threshold,
        "min_strides": min_strides,
        "min_seconds": min_strides * found[0][1].grid.stride_seconds,
        **metrics.summary(),
        "num_false_of_object": of_object,
    }


def rank(found: Found, events: Sequence[Sequence[Event]]) -> dict[str, float]:
    """Average precision of other events than those of the timelines."""
    measured = [
        replace(measured_video(video.intervals, timeline, ()), ranked=of_video)
        for (video, timeline), of_video in zip(found, events, strict=True)
    ]
    metrics = measure_events(measured, found[0][1].watched.names)
    return {
        "thumos_map": metrics.mean_average_precision(THUMOS_TIOUS),
        "activitynet_map": metrics.mean_average_precision(ACTIVITYNET_TIOUS),
    }


def apart(timeline: Timeline) -> list[int]:
    """Places of windows that do not overlap, as one would cut a video into clips."""
    grid = timeline.grid
    strides = -(-grid.num_frames // grid.stride_steps)
    return [place for place, each in enumerate(timeline.windows) if each.number % strides == 0]


def single_windows(timeline: Timeline) -> list[Event]:
    """Each window by itself: an event for each label that it scores."""
    events = []
    for place in apart(timeline):
        window, scores = timeline.windows[place], timeline.scores[place]
        span = window.start_seconds, window.end_seconds
        for column in np.flatnonzero(scores >= RANKING_SCORE):
            score = float(scores[column])
            events.append(Event(timeline.labels[column], *span, score, score, score))
    return events


def joined_windows(timeline: Timeline) -> list[Event]:
    """Such windows, with neighbours that score the same label as one event."""
    places = apart(timeline)
    return find_events(
        timeline.scores[places],
        timeline.labels,
        starts_seconds=timeline.starts_seconds[places],
        step_seconds=timeline.grid.window_seconds,
        thresholds=RANKING_SCORE,
    )


def on_clips(
    recognizer: Recognizer, folder: Path, seconds: float, settings: Sequence[tuple[float, int]]
) -> dict[str, Any]:
    """What is told of videos that show none of the labels."""
    grid = WindowGrid.of_model(recognizer.runtime.manifest, window_seconds=seconds)
    num_told = [0] * len(settings)
    num_videos, total = 0, 0.0
    for path in list_videos(folder, recursive=True):
        try:
            timeline = read_timeline(recognizer, path, grid, watched=watch(recognizer, UNTUNED[0]))
        except VideoError as exc:
            console.print(f"left out: {exc}", highlight=False)
            continue
        num_videos, total = num_videos + 1, total + timeline.duration_seconds
        for place, (threshold, min_strides) in enumerate(settings):
            at = replace(timeline, watched=watch(recognizer, threshold))
            min_seconds = min_strides * timeline.grid.stride_seconds
            num_told[place] += len(live_events(at, min_seconds=min_seconds))
    return {
        "videos": num_videos,
        "minutes": total / 60,
        "false_alarms": num_told,
        "per_hour": [number / total * 3600 for number in num_told],
    }


def format_tables(rows: Sequence[dict[str, Any]]) -> str:
    """The tables as Markdown."""
    lines = [
        f"{rows[0]['videos']} videos of `test`, {rows[0]['hours']:.1f} h, {rows[0]['intervals']} "
        "intervals. Average precision in per cent, at tIoU 0.3 to 0.7 / 0.5 to 0.95:",
        "",
        "| window | windows one after the other, each an event | neighbours of one label joined "
        "| timeline | steps of the timeline |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{100 * row[kind]['thumos_map']:.1f} / {100 * row[kind]['activitynet_map']:.1f}"
            for kind in ("single", "joined", "timeline")
        ]
        lines.append(
            f"| {row['window_seconds']:g} s | {' | '.join(cells)} "
            f"| {100 * row['timeline']['frame_map']:.1f} |"
        )
    lines += [
        "",
        "What a stream tells, with and without the settings that were chosen on `tune`:",
        "",
        "| window | threshold | shortest event | false alarms an hour | of these, of the object "
        "that is there | missed | events per interval found "
        "| delay, median | delay, 95 % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for kind in ("untuned", "tuned"):
            told_ = row[kind]
            share = told_["num_false_of_object"] / max(told_["num_false"], 1)
            lines.append(
                f"| {row['window_seconds']:g} s | {told_['threshold']:g}"
                f"{', not tuned' if kind == 'untuned' else ''} | {told_['min_seconds']:g} s "
                f"| {told_['false_alarms_per_hour']:.0f} | {share:.0%} "
                f"| {told_['miss_rate']:.0%} | {told_['events_per_found']:.2f} "
                f"| {told_['delay_p50_seconds']:.1f} s | {told_['delay_p95_seconds']:.1f} s |"
            )
    if rows[0]["clips"]:
        clips = rows[0]["clips"]
        lines += [
            "",
            f"On {clips['videos']} real clips, {clips['minutes']:.1f} minutes in all, which show "
            "none of the labels, false alarms an hour:",
            "",
            "| window | not tuned | tuned |",
            "|---|---|---|",
        ]
        for row in rows:
            untuned, tuned = (
                f"{rate:.0f} ({number})"
                for rate, number in zip(
                    row["clips"]["per_hour"], row["clips"]["false_alarms"], strict=True
                )
            )
            lines.append(f"| {row['window_seconds']:g} s | {untuned} | {tuned} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        main()
    except (ActionClipError, OSError, ValueError) as exc:
        sys.exit(f"error: {exc}")
