"""`actionclip doctor`: what this machine has and what works on it."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from actionclip_deploy.cli.output import JsonOption, print_json, results


def doctor(as_json: JsonOption = False) -> None:
    """Report this machine, the installed libraries, and which execution providers really load."""
    from actionclip_deploy.runtimes.machine import (
        describe_machine,
        installed_versions,
        onnxruntime_providers,
    )

    report: dict[str, Any] = {
        "machine": describe_machine(),
        "versions": installed_versions(),
        "execution_providers": onnxruntime_providers(),
    }
    if as_json:
        print_json(report)
        return
    for title, rows in report.items():
        table = Table(title=title.replace("_", " "), title_justify="left", show_header=False)
        for key, value in rows.items():
            table.add_row(key.replace("_", " "), _in_words(value))
        results.print(table)


def _in_words(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(_in_words(item) for item in value) or "none"
    return str(value)
