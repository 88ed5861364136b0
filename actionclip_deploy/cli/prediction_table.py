"""How `predict` and `classify` show what was recognised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from actionclip_deploy.calibration import Answer
from actionclip_deploy.recognizer import LabelScore


def prediction_table() -> Table:
    """A table without rows."""
    table = Table()
    for heading in ("video", "label", "score"):
        table.add_column(heading, justify="right" if heading == "score" else "left")
    return table


def add_failed(table: Table, name: str) -> None:
    """A row for a video that gave nothing; why is told elsewhere."""
    table.add_row(escape(name), "[red]failed[/]", "", end_section=True)


def add_predictions(
    table: Table, name: str, predictions: Sequence[LabelScore], answer: Answer | None
) -> None:
    """Rows for the best labels of a video, best first."""
    shown = escape(name)
    if answer is not None and answer.is_unknown:
        table.add_row(shown, "[yellow]unknown[/], none of these:", "")
        shown = ""
    for rank, best in enumerate(predictions):
        table.add_row(
            shown if rank == 0 else "",
            escape(best.label),
            f"{best.score:.4f}",
            end_section=rank == len(predictions) - 1,
        )


def answer_fields(answer: Answer | None) -> dict[str, Any]:
    """For JSON: nothing where the label bank was not calibrated."""
    if answer is None:
        return {}
    return {"answer": {**asdict(answer), "is_unknown": answer.is_unknown}}
