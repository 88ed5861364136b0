"""What MkDocs runs while it builds the documentation (mkdocs.yml, `hooks`)."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

COMMANDS_MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the commands' own documentation where a page asks for it."""
    if COMMANDS_MARK not in markdown:
        return markdown
    command = ["typer", "actionclip_deploy.cli", "utils", "docs", "--name", "actionclip"]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "TERMINAL_WIDTH": "100", "NO_COLOR": "1"},
    )
    # Its first line is the title of a page, and this page has one.
    return markdown.replace(COMMANDS_MARK, done.stdout.partition("\n")[2])
