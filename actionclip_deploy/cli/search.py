"""`actionclip search`: moments of an archive, by words or by another moment."""

from __future__ import annotations

import csv
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

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
    print_json,
    print_warning,
    results,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.command_records import MomentRecord, SearchRecord
from actionclip_deploy.search import Archive, write_page
from actionclip_deploy.timeline import clock_text

_WHERE = "Where is looked"


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
            "--to", metavar="TIME", help="What was recorded until then.", rich_help_panel=_WHERE
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
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle",
            metavar="BUNDLE",
            help="The archive's bundle, if it is not where it was.",
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
    deviations. What is not in an archive has its best moments as well, with a lower z than what
    is.

    Example:
        actionclip search archive "a person falls" --not "a person sits down"
        actionclip search archive --like door.mp4@12.5 --html found.html
    """
    if as_json and as_csv:
        raise usage_error("--json and --csv were given; give one of them.")
    if (text is None) == (like is None):
        raise usage_error("Give a TEXT to look for, or --like VIDEO@SECONDS, one of them.")
    if html is not None and html.suffix.lower() not in (".html", ".htm"):
        raise usage_error(f"--html is {html}; give a file that ends in .html.")
    chosen = given_templates(templates, template, label_only)
    with Archive.open(archive, bundle=bundle) as opened:
        with wrong_arguments_are_usage_errors():
            moments = opened.search(
                text,
                without=without or (),
                like=None if like is None else _moment_of(like),
                folders=cameras or (),
                videos=videos or (),
                from_seconds=None if begin is None else _seconds_of("--from", begin),
                to_seconds=None if end is None else _seconds_of("--to", end),
                top=top,
                templates=chosen,
                allow_unknown_words=allow_unknown_words,
            )
        if html is not None:
            write_page(html, opened, moments)
    record = moments.record()
    if record.num_undated:
        print_warning(
            f"{record.num_undated} videos are left out, since nothing in their names says when "
            "they were recorded."
        )
    if as_json:
        print_json(record)
    elif as_csv:
        _print_csv(record)
    else:
        _print(record, html)


def _moment_of(text: str) -> tuple[str, float]:
    video, sign, seconds = text.rpartition("@")
    try:
        return (video, float(seconds)) if sign and video else (text, _no_time(text))
    except ValueError as exc:
        raise usage_error(f"--like is {text}; give VIDEO@SECONDS, such as door.mp4@12.5.") from exc


def _no_time(text: str) -> float:
    raise ValueError(text)


def _seconds_of(option: str, text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError as exc:
        raise usage_error(
            f"{option} is {text}; give a date such as 2026-11-30, or a time such as "
            "2026-11-30T18:15."
        ) from exc


def _print_csv(record: SearchRecord) -> None:
    columns = list(MomentRecord.model_fields)
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(moment.to_dict() for moment in record.moments)


def _print(record: SearchRecord, html: Path | None) -> None:
    table = Table()
    for heading in ("", "z"):
        table.add_column(heading, justify="right")
    for heading in ("from", "to", "recorded", "video"):
        table.add_column(heading, overflow="fold")
    for moment in record.moments:
        recorded = moment.recorded_seconds
        when = "" if recorded is None else f"{datetime.fromtimestamp(recorded):%Y-%m-%d %H:%M:%S}"
        table.add_row(
            str(moment.rank),
            f"{moment.z:.1f}",
            clock_text(moment.start_seconds),
            clock_text(moment.end_seconds),
            when,
            escape(moment.video),
        )
    if record.moments:
        results.print(table)
    among = (
        f"{record.num_windows:,} windows"
        if record.num_searched == record.num_windows
        else f"{record.num_searched:,} of {record.num_windows:,} windows"
    )
    where = "" if html is None else f"; the page is {escape(str(html))}"
    results.print(f"{len(record.moments) or 'No'} moments among {among}{where}.", highlight=False)
