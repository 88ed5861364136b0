"""`actionclip engines`: what TensorRT engines there are, and removing them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from actionclip_deploy.cli.options import JsonOption
from actionclip_deploy.cli.output import notes, print_json, results
from actionclip_deploy.cli.verb import VerbApp
from actionclip_deploy.command_records import StoredEngineRecord
from actionclip_deploy.errors import ActionClipError

if TYPE_CHECKING:
    from actionclip_deploy.runtimes.trt.store import Entry, Place

engines_app = VerbApp(
    help="""List and remove the TensorRT engines in the cache.

Example:
    actionclip engines list
"""
)


@engines_app.command("list")
def list_engines(as_json: JsonOption = False) -> None:
    """List the engines in the cache, the newest first.

    Example:
        actionclip engines list
    """
    from actionclip_deploy.runtimes.trt.store import open_store

    store = open_store()
    entries = store.entries()
    if as_json:
        print_json(
            [
                StoredEngineRecord(
                    **entry.record,
                    name=entry.name,
                    folder=str(entry.folder),
                    size_bytes=entry.size_bytes,
                )
                for entry in entries
            ]
        )
        return
    if not entries:
        notes.print(
            f"There are no engines in {store.folder}; run: actionclip build BUNDLE",
            highlight=False,
            markup=False,
        )
        return
    table = Table(title=f"engines in {store.folder}", title_justify="left")
    headings = ("name", "bundle", "runtime", "for", "precision", "profiles", "size", "verified")
    for heading in headings:
        table.add_column(heading, justify="right" if heading == "size" else "left", overflow="fold")
    for entry in entries:
        table.add_row(*_row(entry))
    results.print(table)


@engines_app.command("remove")
def remove_engines(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="As `list` prints it, or how it begins.")
    ],
) -> None:
    """Remove engines from the cache.

    Example:
        actionclip engines remove 3f2a
    """
    from actionclip_deploy.runtimes.trt.store import open_store

    store = open_store()
    for name in names:
        results.print(f"Removed {store.remove(name).folder}", highlight=False, markup=False)


@engines_app.command("prune")
def prune_engines() -> None:
    """Remove engines that are damaged, or for another GPU, driver or version than are here.

    Example:
        actionclip engines prune
    """
    from actionclip_deploy.runtimes.trt.store import open_store

    store = open_store()
    places = _places()
    for runtime, place in places.items():
        if isinstance(place, str):
            words = f"Undamaged {runtime} engines are kept: {place}"
            notes.print(words, highlight=False, markup=False)

    def is_usable(entry: Entry) -> bool:
        place = places.get(entry.key["place"]["runtime"])
        return place is None or isinstance(place, str) or not place.differences(entry)

    removed = store.prune(is_usable)
    for folder in removed:
        results.print(f"Removed {folder}", highlight=False, markup=False)
    results.print(
        f"{len(removed)} engines were removed, {len(store.entries())} are left.",
        highlight=False,
        markup=False,
    )


def _places() -> dict[str, Place | str]:
    """By runtime, this place, or why it is not known which engines are for it."""
    from actionclip_deploy.runtimes.trt.api import ENGINE_RUNTIMES
    from actionclip_deploy.runtimes.trt.runtime import open_place

    places: dict[str, Place | str] = {}
    for name in ENGINE_RUNTIMES:
        try:
            _, _, places[name] = open_place(name)
        except ActionClipError as exc:
            places[name] = str(exc)
    return places


def _row(entry: Entry) -> tuple[str, ...]:
    place, record = entry.key["place"], entry.record
    options = entry.key["options"]
    shapes = entry.shapes("visual" if "visual" in entry.key["shapes"] else "video")
    profiles = [f"{s.min[0]} {s.opt[0]} {s.max[0]}" for s in shapes]
    passed = [card["passed"] for card in record["verified"].values()]
    words = {True: "yes", False: "[red]failed[/]"}
    return (
        entry.name,
        str(record.get("bundle", "")) + (" (no weights)" if options.get("strip") else ""),
        f"{place['runtime']} {place['version']}",
        place.get("gpu") or ", ".join(options.get("targets", [])),
        entry.key["precision"] + "".join(f", {r}" for r in sorted(set(entry.rewrites.values()))),
        "; ".join(profiles),
        f"{entry.size_bytes / 1e6:.1f} MB",
        words[passed[-1]] if passed else "no",
    )
