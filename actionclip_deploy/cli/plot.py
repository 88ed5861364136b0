"""The pictures that `--plot` asks for."""

from __future__ import annotations

import os
from pathlib import Path

from actionclip_deploy.cli.output import usage_error
from actionclip_deploy.errors import MissingExtraError

try:
    from actionclip_deploy.plot import SUFFIXES, plot_confusion, plot_predictions
except MissingExtraError as exc:
    raise MissingExtraError("--plot", "plot") from exc

__all__ = ["check_plot_path", "plot_confusion", "plot_predictions"]


def check_plot_path(path: Path) -> None:
    """Refuse now, by a usage error, a file that could not be written after the work."""
    if path.suffix.lower() not in SUFFIXES:
        raise usage_error(f"--plot is {path}; give a file that ends in {', '.join(SUFFIXES)}.")
    if path.is_dir() or (path.parent.is_dir() and not os.access(path.parent, os.W_OK)):
        raise usage_error(f"--plot is {path}, which cannot be written; choose another place.")
    if not path.parent.is_dir():
        raise usage_error(f"--plot is {path}, but {path.parent} is not a folder; make it first.")
