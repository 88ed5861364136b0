"""`actionclip search`: moments of an archive, by words or by another moment."""

from __future__ import annotations

import csv
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from actionclip_deploy.calibration import DEFAULT_QUERY_Z
from actionclip_deploy.cli.options import (
    RESULTS,
    SCORES,
    JsonOption,
    LabelOnlyOption,
    TemplateOption,
    TemplatesOption,
    UnknownWordsOption,
    given_templates,
)
from actionclip_deploy.cli.output import (
    notes,
    print_json,
    print_warning,
    results,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.command_records import MomentRecord, SavedQueryRecord, SearchRecord
from actionclip_deploy.errors import VideoError
from actionclip_deploy.moments import Moment, Moments
from actionclip_deploy.records import clock_text, counted, file_text, printable
from actionclip_deploy.search import Archive, write_page

_WHERE = "Where it looks"
_SAVED = "Saved queries"
_ANY_WIDTH = 10_000  # of characters, in which a table is as wide as it likes


def search(
    archive: Annotated[
        Path, typer.Argument(metavar="ARCHIVE", help="Folder that `actionclip index` made.")
    ],
    text: Annotated[
        str | None,
        typer.Argument(metavar="TEXT", help="What is looked for, as one would write a label."),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            "--not",
            metavar="TEXT",
            help="What moments must not show: they are nearer to TEXT than to this; repeatable.",
        ),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            "--like",
            metavar="VIDEO@SECONDS",
            help="In the place of a text, a moment of a video of the archive.",
        ),
    ] = None,
    saved: Annotated[
        str | None,
        typer.Option(
            "--saved",
            metavar="NAME",
            help="In the place of a text, a query that was saved.",
            rich_help_panel=_SAVED,
        ),
    ] = None,
    save: Annotated[
        str | None,
        typer.Option(
            "--save",
            metavar="NAME",
            help="Save the query as a label bank of the archive's bundle, for --saved and for "
            "`actionclip watch --labels NAME`.",
            rich_help_panel=_SAVED,
        ),
    ] = None,
    accepted: Annotated[
        list[str] | None,
        typer.Option(
            "--accept",
            metavar="RANK|VIDEO@SECONDS",
            help="A moment that shows what is meant, by which --save chooses the threshold; "
            "repeatable. Ranks before the last accepted one that are not given count as wrong.",
            rich_help_panel=_SAVED,
        ),
    ] = None,
    threshold_z: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            metavar="Z",
            help="From which z on a query that is saved is told of, in the place of --accept.",
            rich_help_panel=_SAVED,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace the saved query, or label bank, of this name.",
            rich_help_panel=_SAVED,
        ),
    ] = False,
    list_saved: Annotated[
        bool,
        typer.Option(
            "--list-saved", help="List the queries that were saved.", rich_help_panel=_SAVED
        ),
    ] = False,
    top: Annotated[int, typer.Option("--top", min=1, metavar="N", help="Moments at most.")] = 20,
    cameras: Annotated[
        list[str] | None,
        typer.Option(
            "--camera",
            metavar="NAME",
            help="Name of a folder of videos, such as a camera's; repeatable.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    videos: Annotated[
        list[str] | None,
        typer.Option(
            "--video",
            metavar="NAME",
            help="Path of a video, or its end; repeatable.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    begin: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="TIME",
            help="What was recorded from then on, such as 2026-11-30 or 2026-11-30T18:15.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    end: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="TIME",
            help="What was recorded until then; a date alone is meant to its end.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    as_json: JsonOption = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print a table of CSV.", rich_help_panel=RESULTS)
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE.html",
            help="Write a page with pictures and players.",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    play: Annotated[
        int | None,
        typer.Option(
            "--play",
            min=1,
            metavar="RANK",
            help="Play the moment of this rank, such as 1, in mpv, vlc or ffplay, or else on a "
            "page.",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle",
            metavar="BUNDLE",
            help="The archive's bundle, if it is not where it was.",
            rich_help_panel=SCORES,
        ),
    ] = None,
    approximate: Annotated[
        bool | None,
        typer.Option(
            "--approximate/--exact",
            help="Score the windows that an index finds, or all; by default all of less than 2 "
            "million.",
            rich_help_panel=SCORES,
        ),
    ] = None,
    templates: TemplatesOption = None,
    template: TemplateOption = None,
    label_only: LabelOnlyOption = False,
    allow_unknown_words: UnknownWordsOption = False,
) -> None:
    """Find the moments of an archive that show what a text says.

    They are ranked by z: how far a moment stands above all windows of the archive, in standard
    deviations. What is not in an archive has its best moments as well, so look at them: z ranks
    the moments of one query, and does not tell whether the archive shows it at all.

    A query that is saved is a label bank: `actionclip watch BUNDLE SOURCE --labels NAME` tells of
    it as it happens, and `actionclip labels` lists, renames and removes it.

    Example:
        actionclip search archive "a person falls" --not "a person sits down"
        actionclip search archive --like door.mp4@12.5 --html found.html
        actionclip search archive "a person falls" --save falls --accept 1
        actionclip search archive --saved falls --from 2026-11-30
    """
    if as_json and as_csv:
        raise usage_error("--json and --csv were given; give one of them.")
    given = {"TEXT": text, "--like": like, "--saved": saved}
    queries = [name for name, value in given.items() if value is not None]
    if list_saved:
        if queries:
            raise usage_error(f"--list-saved stands alone; leave {queries[0]} out.")
        with Archive.open(archive, bundle=bundle) as opened:
            _print_saved(archive, opened.saved_queries(), as_json=as_json)
        return
    if len(queries) != 1:
        raise usage_error(
            "Give a TEXT to look for, or --like VIDEO@SECONDS, or --saved NAME, one of them."
        )
    if save is None and (accepted or threshold_z is not None or overwrite):
        what = "--threshold" if threshold_z is not None else "--overwrite"
        what = "--accept" if accepted else what
        raise usage_error(f"{what} goes with --save NAME; add it, or leave {what} out.")
    if save is not None and text is None:
        raise usage_error("--save is for a TEXT, which label banks are of; give one.")
    if accepted and threshold_z is not None:
        raise usage_error("--accept and --threshold were given; give one of them.")
    if html is not None and html.suffix.lower() not in (".html", ".htm"):
        raise usage_error(f"--html is {html}; give a file that ends in .html.")
    from_seconds = None if begin is None else _seconds_of("--from", begin)
    to_seconds = None if end is None else _seconds_of("--to", end, is_end=True)
    # The end of a date is the begin of the next one; an instant is a time to look at.
    if (
        from_seconds is not None
        and to_seconds is not None
        and to_seconds <= from_seconds
        and begin != end
    ):
        raise usage_error(
            f"--from is {begin}, which is later than --to, {end}; give the earlier time first."
        )
    chosen = given_templates(templates, template, label_only)
    if play is not None and play > top:
        raise usage_error(
            f"--play is {play}, and --top lets {counted(top, 'moment')} be found; give a rank of "
            "these, or a larger --top."
        )
    player = None if play is None else _player()
    with Archive.open(archive, bundle=bundle) as opened:
        if approximate and (cameras or videos or begin or end):
            notes.print(
                "All windows are scored, and no index is used, since it is said where to look.",
                highlight=False,
            )
        elif approximate:
            opened.prepare_approximate(_tell_building)
        with wrong_arguments_are_usage_errors():
            where: dict[str, Any] = {
                "cameras": cameras or (),
                "videos": videos or (),
                "from_seconds": from_seconds,
                "to_seconds": to_seconds,
                "top": top,
                "approximate": approximate,
            }
            moments = opened.search(
                text,
                without=without or (),
                like=None if like is None else _moment_of("--like", like),
                saved=saved,
                templates=chosen,
                allow_unknown_words=allow_unknown_words,
                **where,
            )
            if save is not None and text is not None:
                right, wrong = _looked_at(moments, accepted or ())
                query = opened.save_query(
                    save,
                    text,
                    without=without or (),
                    accepted=right,
                    rejected=wrong,
                    threshold_z=threshold_z,
                    templates=chosen,
                    allow_unknown_words=allow_unknown_words,
                    overwrite=overwrite,
                )
                _warn_of_told(moments, wrong, query)
                moments = opened.search(saved=save, **where)
        if html is not None:
            write_page(html, opened, moments)
        record = moments.record()
        if record.num_undated:
            print_warning(
                f"{counted(record.num_undated, 'video')} left out, for want of a time of recording "
                "in the name."
            )
        if as_json:
            print_json(record)
        elif as_csv:
            _print_csv(record)
        else:
            _print(record, moments.num_shown, html)
        if save is not None and not as_json:
            _print_how_to_watch(opened, save)
        if player is not None and play is not None:
            if play > len(moments):
                raise usage_error(
                    f"--play is {play}, and {_were_found(moments)}; give a rank of these."
                )
            player(opened, moments, moments[play - 1], html)


def _were_found(moments: Moments) -> str:
    return f"{counted(len(moments), 'moment')} {'was' if len(moments) == 1 else 'were'} found"


def _tell_building(num_windows: int) -> None:
    notes.print(
        f"Building the index of {num_windows:,} windows, once; of millions it takes minutes.",
        highlight=False,
    )


# A saved query


def _looked_at(
    moments: Moments, accept: Sequence[str]
) -> tuple[list[Moment | tuple[str, float]], list[Moment | tuple[str, float]]]:
    """The moments that were accepted, and those that were passed over on the way to them."""
    accepted: list[Moment | tuple[str, float]] = []
    ranks: set[int] = set()
    for text in accept:
        if not text.isdecimal():
            accepted.append(_moment_of("--accept", text, "a rank such as 1, or "))
            continue
        rank = int(text)
        if not 1 <= rank <= len(moments):
            raise usage_error(
                f"--accept is {rank}, and {_were_found(moments)}; give a rank of these."
            )
        if rank not in ranks:
            accepted.append(moments[rank - 1])
        ranks.add(rank)
    passed = [rank for rank in range(1, max(ranks, default=0)) if rank not in ranks]
    return accepted, [moments[rank - 1] for rank in passed]


def _warn_of_told(
    moments: Moments, wrong: Sequence[Moment | tuple[str, float]], query: SavedQueryRecord
) -> None:
    """Say which moments that were not accepted the query tells of all the same."""
    told = [
        str(rank)
        for rank, moment in enumerate(moments, start=1)
        if moment in wrong and moment.z >= query.threshold_z
    ]
    if told:
        ranks = f"rank{'' if len(told) == 1 else 's'} {', '.join(told)}"
        print_warning(
            f"{query.name} also tells of {counted(len(told), 'moment')} that ranked before an "
            f"accepted one and {'was' if len(told) == 1 else 'were'} not accepted ({ranks}): no "
            "threshold lies between. Say with --not what they show, or look in other words."
        )


def _print_saved(archive: Path, queries: Iterable[SavedQueryRecord], *, as_json: bool) -> None:
    found = list(queries)
    if as_json:
        print_json(found)
        return
    if not found:
        notes.print(
            f"No query of {archive} was saved; save one with `actionclip search ARCHIVE TEXT "
            "--save NAME`.",
            highlight=False,
            markup=False,
        )
        return
    table = Table()
    for heading in ("name", "text", "not"):
        table.add_column(heading, overflow="fold")
    for heading in ("from z", "accepted"):
        table.add_column(heading, justify="right")
    for each in found:
        texts = (each.name, each.text, "; ".join(each.without))
        table.add_row(
            *(escape(printable(text, kept="")) for text in texts),
            f"{each.threshold_z:.1f}",
            str(each.num_accepted) if each.num_accepted else "",
        )
    results.print(table)


def _print_how_to_watch(archive: Archive, name: str) -> None:
    bundle = archive.bundle.path
    notes.print(
        f"Saved {name}; `actionclip watch {bundle} SOURCE --labels {name}` tells of it as it "
        "happens.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


# Players: each plays a file from a time on, in seconds.

_PLAYERS: dict[str, Callable[[str, str], list[str]]] = {
    "mpv": lambda video, start: [f"--start={start}", "--", video],
    "vlc": lambda video, start: [f"--start-time={start}", "--play-and-exit", video],
    "ffplay": lambda video, start: ["-loglevel", "error", "-ss", start, "-autoexit", video],
}
_OPENERS = ("xdg-open", "open")  # which open a page in the browser; of Linux, and of macOS


def _player() -> Callable[[Archive, Moments, Moment, Path | None], None]:
    """What plays moments here, found before there is something to play.

    Raises:
        VideoError: If nothing does.
    """
    has_display = sys.platform == "darwin" or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    if not has_display:
        raise VideoError(
            "There is no display to play on (neither DISPLAY nor WAYLAND_DISPLAY is set); write a "
            "page with --html FILE.html, and open it where there is one."
        )
    for name, arguments in _PLAYERS.items():
        program = shutil.which(name)
        if program is not None:
            return lambda _, __, moment, ___: _play_in(program, arguments, moment)
    opener = next((found for name in _OPENERS if (found := shutil.which(name))), None)
    if opener is None:
        raise VideoError(
            "There is nothing here that plays videos: none of mpv, vlc and ffplay is on the PATH, "
            "nor xdg-open; install one, or write a page with --html FILE.html."
        )
    return lambda archive, moments, moment, page: _open_page(opener, archive, moments, moment, page)


def _play_in(program: str, arguments: Callable[[str, str], list[str]], moment: Moment) -> None:
    if not Path(moment.video).is_file():
        raise VideoError(
            f"{moment.video} is not there any more; bring the archive up to date with `actionclip "
            "index`."
        )
    _run([program, *arguments(moment.video, f"{moment.start_seconds:.2f}")], moment.video)


def _open_page(
    opener: str, archive: Archive, moments: Moments, moment: Moment, page: Path | None
) -> None:
    """Show a page of one moment in the browser; it stays, since the browser reads it later."""
    if page is None:
        handle, name = tempfile.mkstemp(prefix="actionclip-", suffix=".html")
        os.close(handle)
        page = Path(name)
        write_page(page, archive, replace(moments, found=(moment,)))
    _run([opener, str(page)], str(page))


def _run(command: list[str], what: str) -> None:
    try:
        # Standard output holds the results alone. The player's keys are those of its window.
        quiet = subprocess.DEVNULL
        done = subprocess.run(command, stdin=quiet, stdout=quiet, check=False)
    except OSError as exc:
        raise VideoError(f"{command[0]} cannot be started ({exc.strerror}).") from exc
    if done.returncode:
        raise VideoError(
            f"{Path(command[0]).name} could not show {what} (exit code {done.returncode})."
        )


def _moment_of(option: str, text: str, also: str = "") -> tuple[str, float]:
    video, _, given = text.rpartition("@")
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not (video and math.isfinite(seconds)):
        raise usage_error(f"{option} is {text}; give {also}VIDEO@SECONDS, such as door.mp4@12.5.")
    return video, seconds


def _seconds_of(option: str, text: str, *, is_end: bool = False) -> float:
    """A time in seconds since 1970; of a date alone, when that day begins, or when it ends."""
    try:
        try:
            day = date.fromisoformat(text)
        except ValueError:
            return datetime.fromisoformat(text).timestamp()
        # The next midnight, since not each day has 24 hours.
        return datetime.combine(day + timedelta(days=is_end), time()).timestamp()
    except (ValueError, OverflowError) as exc:
        raise usage_error(
            f"{option} is {text}; give a date such as 2026-11-30, or a time such as "
            "2026-11-30T18:15."
        ) from exc


def _print_csv(record: SearchRecord) -> None:
    columns = [name for name in MomentRecord.model_fields if name != "video_bytes"]
    writer = csv.DictWriter(sys.stdout, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for moment in record.moments:
        texts = {"video": file_text(moment.video), "folder": file_text(moment.folder)}
        writer.writerow(moment.to_dict() | texts)


def _print(record: SearchRecord, num_shown: int | None, html: Path | None) -> None:
    table = Table()
    for heading in ("", "z"):
        table.add_column(heading, justify="right")
    lines: list[str] = []
    is_dated = any(moment.recorded_seconds is not None for moment in record.moments)
    for heading in ("from", "to", *(["recorded"] if is_dated else []), "video"):
        table.add_column(heading, no_wrap=True)
    for moment in record.moments:
        recorded = moment.recorded_seconds
        when = "" if recorded is None else f"{datetime.fromtimestamp(recorded):%Y-%m-%d %H:%M:%S}"
        start, end = clock_text(moment.start_seconds), clock_text(moment.end_seconds)
        is_last_shown = moment.rank == num_shown
        table.add_row(
            str(moment.rank),
            f"{moment.z:.1f}",
            *(start, end, *([when] if is_dated else [])),
            escape(moment.video),
            end_section=is_last_shown,
        )
        lines.append(f"{moment.rank:>3}  z {moment.z:.1f}  {start} - {end}  {when}".rstrip())
        lines.append(f"     {moment.video}")
        lines += ["     " + "─" * 20] if is_last_shown else []
    wide = results.options.update(max_width=_ANY_WIDTH)
    if record.moments and Measurement.get(results, wide, table).maximum <= results.width:
        results.print(table)
    elif record.moments:  # a path that is broken in two cannot be copied
        results.print("\n".join(lines), highlight=False, markup=False)
    among = (
        counted(record.num_windows, "window")
        if record.num_searched == record.num_windows
        else f"{record.num_searched:,} of {counted(record.num_windows, 'window')}"
    )
    count = len(record.moments)
    among += " (approximate)" if record.is_approximate else ""
    where = "" if html is None else f"; the page is {escape(str(html))}"
    found = counted(count, "moment") if count else "No moments"
    results.print(f"{found} among {among}{where}.", highlight=False)
    if record.saved is not None:
        z = (record.saved.threshold_cosine - record.mean_cosine) / (record.std_cosine or 1.0)
        results.print(
            f"{num_shown or 'None'} of them {'reach' if num_shown != 1 else 'reaches'} the "
            f"threshold of {escape(record.saved.name)}, z {z:.1f}{_because(record.saved)}.",
            highlight=False,
        )


def _because(saved: SavedQueryRecord) -> str:
    if not saved.num_accepted:
        return "" if saved.threshold_z != DEFAULT_QUERY_Z else ", a guess: --accept some moments"
    passed = f" and {saved.num_rejected} that were passed over" if saved.num_rejected else ""
    return f", chosen by {counted(saved.num_accepted, 'accepted moment')}{passed}"
