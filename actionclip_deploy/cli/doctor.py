"""`actionclip doctor`: what this machine has and what works on it."""

from __future__ import annotations

from typing import Any

from actionclip_deploy.cli.output import JsonOption, print_json, print_sections


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
    print_sections(report)
