"""What `actionclip benchmark` prints: a report's tables, or two reports beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from actionclip_deploy.cli.output import print_json, print_warning, results

if TYPE_CHECKING:
    from actionclip_deploy.benchmarks.comparison import Comparison
    from actionclip_deploy.benchmarks.report import BenchmarkReport
    from actionclip_deploy.benchmarks.show import WordTable

# As wide as its tables need: a number that is cut to the terminal's width is another number.
_wide_results = Console(width=200)


def print_report(report: BenchmarkReport) -> None:
    """Print the context, the tables in brief, and what is wrong with the numbers."""
    from actionclip_deploy.benchmarks.show import context, remarks, tables

    facts = Table(show_header=False, box=None)
    for name, value in context(report):
        facts.add_row(f"[bold]{name}[/]", escape(value))
    results.print(facts)
    for words in tables(report, brief=True):
        _wide_results.print(_rich_table(words))
    for remark in remarks(report):
        print_warning(remark)


def _rich_table(words: WordTable) -> Table:
    table = Table(title=words.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, heading in enumerate(words.headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for row in words.rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def print_comparison(first: Path, second: Path, *, as_json: bool) -> None:
    """Print what changed from the first report to the second."""
    from dataclasses import asdict

    from actionclip_deploy.benchmarks import compare_reports, read_report

    comparison = compare_reports(read_report(first), read_report(second))
    if as_json:
        changes = [
            {**vars(change), "speedup": change.speedup.model_dump()}
            for change in comparison.changes
        ]
        rest = {k: list(v) for k, v in asdict(comparison).items() if k != "changes"}
        print_json(json.loads(json.dumps({"changes": changes, **rest})))
        return
    _print_changes(comparison)


def _print_changes(comparison: Comparison) -> None:
    colours = {"faster": "green", "slower": "red"}
    title = "From the first report to the second"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("row", "batch", "before ms", "after ms", "times as fast", ""):
        justify: Literal["left", "right"] = "left" if heading in ("row", "") else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    for change in comparison.changes:
        ratio = change.speedup
        colour = colours.get(change.verdict, "dim")
        table.add_row(
            escape(change.row),
            str(change.batch_size),
            f"{change.before_ms:.2f}",
            f"{change.after_ms:.2f}",
            f"{ratio.value:.3f} {escape(f'[{ratio.low:.3f}, {ratio.high:.3f}]')}",
            f"[{colour}]{escape(change.verdict)}[/]",
        )
    _wide_results.print(table)
    for what, names in (("first", comparison.only_before), ("second", comparison.only_after)):
        if names:
            results.print(f"Only in the {what}: {', '.join(names)}.", highlight=False, markup=False)
    for difference in comparison.differences:
        results.print(f"differs: {difference}", highlight=False, markup=False)
