"""Write docs/cli.md from the code: every verb of the command line with its options.

python scripts/cli_page.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from actionclip_deploy.cli import app
from actionclip_deploy.cli.verb import Described, arguments, options, paragraphs, usage

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "cli.md"

HEAD = """# Command line

Made by `python scripts/cli_page.py`. Each verb has the same with `--help`. Exit codes are listed in
[Errors and exit codes](howto/errors.md).
"""


def page() -> str:
    """The page as it is read in the repository and on the web site."""
    command: Any = get_command(app)
    context = typer.Context(command, info_name="actionclip")
    parts = [HEAD]
    rows = command.describe_verbs(context)
    for panel in dict.fromkeys(row.panel for row in rows):
        parts.append(f"**{panel}**\n")
        parts.append(_table([row for row in rows if row.panel == panel], link=True))
    for row in rows:
        parts += _verb(command.get_command(context, row.name), f"actionclip {row.name}", "##")
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _verb(verb: Any, path: str, heading: str) -> list[str]:
    parts = [f"{heading} {path}\n"]
    parts += [f"{_text(each)}\n" for each in paragraphs(verb.help or "")]
    parts.append(f"```text\n{usage(verb, path)}\n```\n")
    if verb.example:
        parts.append(f"```sh\n{verb.example}\n```\n")
    rows = [row for row in [*arguments(verb), *options(verb)] if row.name != "-h, --help"]
    for panel in dict.fromkeys(row.panel for row in rows):
        shown = [row for row in rows if row.panel == panel]
        parts.append(f"| {panel} | |\n|---|---|\n" + _rows(shown) + "\n")
    for name, inner in sorted(getattr(verb, "commands", {}).items()):
        parts += _verb(inner, f"{path} {name}", "###")
    return parts


def _table(rows: list[Described], *, link: bool) -> str:
    return "| | |\n|---|---|\n" + _rows(rows, link=link) + "\n"


def _rows(rows: list[Described], *, link: bool = False) -> str:
    lines = []
    for row in rows:
        notes = "".join(f" [{note}]" for note in row.notes)
        name = f"[`{row.name}`](#actionclip-{row.name})" if link else f"`{_cell(row.name)}`"
        lines.append(f"| {name} | {_cell(_text(row.text + notes))} |\n")
    return "".join(lines)


def _text(words: str) -> str:
    return words.replace("<", "&lt;").replace("*", "\\*")


def _cell(words: str) -> str:
    return words.replace("|", "\\|")


if __name__ == "__main__":
    text = page()
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"{PAGE} is not what the code says; run: python scripts/cli_page.py")
    else:
        PAGE.write_text(text, encoding="utf-8")
