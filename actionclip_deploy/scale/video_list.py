"""Which videos are to be scored, as one Arrow table: from folders, prefixes, wildcards and lists.

A list is a Parquet or CSV file with a column `uri` (or `video`), or a text file with one video a
line. Its columns `etag` and `size` spare a question to the storage for each video; all others are
kept in the result.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from actionclip_deploy.errors import MissingExtraError, VideoListError
from actionclip_deploy.scale.storage import (
    ADDRESS,
    ListedVideo,
    describe_all,
    is_address,
    list_in_storage,
    open_remote,
    suffix_of,
)

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv
    import pyarrow.parquet
except ImportError as exc:
    raise MissingExtraError("A table of results", "parquet") from exc

LIST_SUFFIXES = (".csv", ".parquet", ".txt")
# Of every list, first and in this order.
LIST_SCHEMA = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("size", pa.int64())])

_UNKNOWN_SIZE = 2**62  # may be large
_URI_NAMES = ("uri", "video")


def list_videos_of(given: Sequence[str], *, recursive: bool = False) -> pa.Table:
    """The videos of what was given, each once: `uri`, `etag`, `size`, and the columns of lists.

    Args:
        given: Folders, files, wildcards, prefixes, addresses and lists.
        recursive: Whether folders in folders are looked through as well.

    Raises:
        VideoListError: If there is no video, or a list cannot be read.
        MissingExtraError: If a storage needs a package that is not installed.
    """
    tables = [
        _read_list(text)
        if suffix_of(text) in LIST_SUFFIXES
        else table_of(list_in_storage([text], recursive=recursive))
        for text in given
    ]
    try:
        table = pa.concat_tables(tables, promote_options="default")
    except pa.ArrowInvalid as exc:
        raise VideoListError(
            f"The lists have columns of one name and different types ({exc}); make them alike."
        ) from exc
    return _each_once(table)


def table_of(videos: Sequence[ListedVideo]) -> pa.Table:
    """A list of videos without further columns."""
    columns = [
        [video.uri for video in videos],
        [video.etag for video in videos],
        [video.size_bytes for video in videos],
    ]
    arrays = [pa.array(c, field.type) for c, field in zip(columns, LIST_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=LIST_SCHEMA)


def videos_in(table: pa.Table) -> Iterator[ListedVideo]:
    """The rows of such a table."""
    more = [name for name in table.column_names if name not in LIST_SCHEMA.names]
    for batch in table.to_batches(max_chunksize=1000):
        for row in batch.to_pylist():
            columns = {name: row[name] for name in more}
            yield ListedVideo(row["uri"], row["etag"] or "", row["size"], columns)


def largest_first(table: pa.Table) -> pa.Table:
    """The same videos, large ones first, so that none of them is begun at the very end."""
    sizes = pc.fill_null(table["size"], _UNKNOWN_SIZE)
    sized = pa.table({"size": sizes, "uri": table["uri"]})
    order = [("size", "descending"), ("uri", "ascending")]
    return table.take(pc.sort_indices(sized, sort_keys=order))


def _each_once(table: pa.Table) -> pa.Table:
    numbered = pa.table({"uri": table["uri"], "row": pa.array(np.arange(len(table)))})
    first = numbered.group_by("uri").aggregate([("row", "min")])["row_min"]
    if len(first) == len(table):
        return table
    return table.take(pc.take(first, pc.sort_indices(first)))


def _read_list(name: str) -> pa.Table:
    try:
        with _open_list(name) as file:
            table = _parse(name, file)
    except OSError as exc:
        raise VideoListError(
            f"The list {name} cannot be read ({exc.strerror or exc}); give another one."
        ) from exc
    except (pa.ArrowException, UnicodeDecodeError) as exc:
        raise VideoListError(
            f"{name} is not a list that can be read ({exc}); give CSV with a header, Parquet, or "
            "text with one video a line."
        ) from exc
    column = next((each for each in _URI_NAMES if each in table.column_names), None)
    if column is None:
        raise VideoListError(
            f"{name} has the columns {', '.join(table.column_names) or 'of none'}; it needs one "
            f"that is called {_URI_NAMES[0]}."
        )
    if column != _URI_NAMES[0] and _URI_NAMES[0] in table.column_names:
        column = _URI_NAMES[0]
    uris = table[column].cast(pa.string())
    if uris.null_count or not len(uris):
        where = "an empty list" if not len(uris) else "without an address in some rows"
        raise VideoListError(f"{name} is {where}; give each video in its column {column}.")
    if not pc.all(pc.match_substring_regex(uris, ADDRESS)).as_py():
        uris = pa.chunked_array([[_whole_uri(name, each) for each in uris.to_pylist()]])
    return _with_tags(name, table, column, uris)


def _open_list(name: str) -> AbstractContextManager[Any]:
    return open_remote(name) if is_address(name) else nullcontext(name)


def _parse(name: str, file: Any) -> pa.Table:
    suffix = suffix_of(name)
    if suffix == ".parquet":
        return pa.parquet.read_table(file)
    if suffix == ".csv":
        # As text: a number that begins with 0 is a name, as a rule.
        with pa.csv.open_csv(file) as reader:
            names = reader.schema.names
        if hasattr(file, "seek"):
            file.seek(0)
        types = dict.fromkeys(names, pa.string())
        convert = pa.csv.ConvertOptions(column_types=types, strings_can_be_null=True)
        return pa.csv.read_csv(file, convert_options=convert)
    data = Path(file).read_bytes() if isinstance(file, str) else file.read()
    lines = [line.strip() for line in data.decode("utf-8").splitlines()]
    return pa.table({"uri": pa.array([line for line in lines if line], pa.string())})


def _whole_uri(name: str, uri: str) -> str:
    """An address as it is; a path from the folder of its list."""
    if is_address(uri):
        return uri
    if is_address(name):
        return f"{name.rpartition('/')[0]}/{uri}"
    return os.path.abspath(Path(name).parent / uri)  # noqa: PTH100 - links in it stay


def _with_tags(name: str, table: pa.Table, column: str, uris: pa.ChunkedArray) -> pa.Table:
    given = set(table.column_names)
    if {"etag", "size"} <= given:
        try:
            etags = pc.fill_null(table["etag"].cast(pa.string()), "")
            sizes = table["size"].cast(pa.int64())
        except pa.ArrowInvalid as exc:
            raise VideoListError(
                f"The column size of {name} holds what is no number of bytes ({exc}); correct it."
            ) from exc
        listed = pa.Table.from_arrays([uris, etags, sizes], schema=LIST_SCHEMA)
    else:
        listed = table_of(list(describe_all(uris.to_pylist())))
    for more in table.column_names:
        if more not in (column, *LIST_SCHEMA.names):
            listed = listed.append_column(more, table[more])
    return listed
