"""What `actionclip evaluate` writes and prints."""

from __future__ import annotations

import json
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from actionclip_deploy.cli.output import print_json, results
from actionclip_deploy.evaluate.evaluate import Evaluation

_LISTED_LABELS = 10


def report_evaluation(
    evaluation: Evaluation,
    asked: dict[str, str],
    *,
    plot: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Write and print what was measured.

    Args:
        evaluation: The measurements.
        asked: What was asked for, as JSON.
        plot: Picture of the confusion matrix to write, or None.
        output: JSON file of everything to write, or None.
        as_json: Whether JSON is printed instead of tables.
    """
    if output is not None:
        text = json.dumps({**asked, **evaluation.to_dict()}, ensure_ascii=False, allow_nan=False)
        output.write_text(text + "\n", encoding="utf-8")
    confusion = evaluation.metrics.confusion
    if plot is not None and confusion is not None:
        from actionclip_deploy.cli.plot import plot_confusion

        plot_confusion(confusion, evaluation.labels, plot)
    if as_json:
        print_json({**asked, **evaluation.summary()})
    else:
        results.print(_summary_table(evaluation))
        results.print(_label_table(evaluation))


def _summary_table(evaluation: Evaluation) -> Table:
    metrics, info = evaluation.metrics, evaluation.settings["runtime"]
    low, high = metrics.top1_interval
    table = Table(
        title=f"{info['name']} ({info['execution_provider']}, {info['precision']}), "
        f"{evaluation.settings['views']} views, {evaluation.settings['scores']}",
        title_justify="left",
        show_header=False,
    )
    table.add_row("top-1", f"{metrics.top1:.2%} ({low:.2%} to {high:.2%} with 95% confidence)")
    table.add_row("top-5", f"{metrics.top5:.2%}")
    table.add_row("mean of labels", f"{metrics.mean_class_accuracy:.2%}")
    table.add_row("mAP", f"{metrics.mean_average_precision:.2%}")
    table.add_row("videos", f"{metrics.num_videos:,}")
    table.add_row("failed", f"{len(evaluation.failed):,}")
    table.add_row("labels", f"{len(evaluation.labels):,}")
    return table


def _label_table(evaluation: Evaluation) -> Table:
    """The labels that were recognised least, worst first."""
    rows = [row for row in evaluation.metrics.per_class(evaluation.labels) if row["num_videos"]]
    rows.sort(key=lambda row: row["accuracy"])
    table = Table(title=f"Labels by accuracy, lowest first, of {len(rows)}", title_justify="left")
    for heading in ("label", "videos", "accuracy", "AP"):
        table.add_column(heading, justify="left" if heading == "label" else "right")
    for row in rows[:_LISTED_LABELS]:
        table.add_row(
            escape(row["label"]),
            str(row["num_videos"]),
            f"{row['accuracy']:.1%}",
            f"{row['average_precision']:.1%}",
        )
    return table
