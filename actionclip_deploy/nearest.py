"""Approximate search: the windows of a large archive that are near to a vector, by faiss.

    index = NearestWindows.prepare("archive", snapshot)
    rows = index.find(vector, 4000)
    mean, std = index.mean_and_std(vector)

It gives candidates, whose scores a search takes from the stored rows. How the cosines of *all*
windows are spread, by which z is told, needs no look at them either: with the sum of the windows
and the sum of their outer products, which are kept, it is two small products, and exact.

An archive has, beside its vectors:

    nearest/windows.faiss         an inverted file over 8-bit values
    nearest/about.safetensors     of which rows, and their sums

Rows that came later are for the search to look at, and what went is left out, until both together
are a tenth; then it is built anew. usearch was measured too: of 100,000 windows its graph took
twice as long to build as such a file. LanceDB's index took longer still.

Letters: N windows, D the embedding width.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from actionclip_deploy.archive import Snapshot, read_rows
from actionclip_deploy.errors import ArchiveError, FileWriteError, MissingExtraError
from actionclip_deploy.files import read_replaceable, sha256_of, staged_folder
from actionclip_deploy.runtimes.base import Float32Array

try:
    import faiss
except ImportError as exc:
    raise MissingExtraError("Approximate search", "faiss") from exc

logger = logging.getLogger(__name__)

Float64Array = NDArray[np.float64]

FOLDER_NAME = "nearest"
_INDEX_NAME, _ABOUT_NAME = "windows.faiss", "about.safetensors"
_FORMAT = "1"
# Rows that came or went since, as a share of those of the index, from which it is built anew.
_STALE_SHARE = 0.1
# Twice the square root of N lists, of which one in so many is looked through. Fewer lists or more
# looks cost time, the opposite recall: `benchmarks/bench_archive.py` tells both.
_LISTS_PER_PROBE = 32
_MIN_PROBES = 16
_TRAINING_ROWS_PER_LIST = 64  # faiss asks for 39 at least
_BLOCK_ROWS = 8192
_FINGERPRINT_ROWS = 256


@dataclass(frozen=True, eq=False)
class _About:
    """What an index is of."""

    shards: NDArray[np.int64]  # number and rows of each file of vectors, shape (S, 2)
    is_live: NDArray[np.bool_]  # which of the rows belonged to a video
    total: Float64Array  # sum of these rows, shape (D,)
    products: Float64Array  # sum of their outer products, shape (D, D)
    fingerprint: str

    @property
    def num_rows(self) -> int:
        """All rows that were there, whether or not they belonged to a video."""
        return len(self.is_live)


class NearestWindows:
    """An index of an archive's windows, as one snapshot of it is seen through it.

    Use `open` or `prepare`.

    Attributes:
        num_rows: Rows that it knows; those from there on came later.
    """

    def __init__(self, index: Any, about: _About, snapshot: Snapshot) -> None:
        self.num_rows = about.num_rows
        self._index = index
        self._index.nprobe = max(_MIN_PROBES, index.nlist // _LISTS_PER_PROBE)
        self._about = about
        is_live = snapshot.video_of_row[: self.num_rows] >= 0
        self._gone = read_rows(snapshot.shards, np.flatnonzero(about.is_live & ~is_live))

    @classmethod
    def open(cls, folder: Path, snapshot: Snapshot) -> NearestWindows | None:
        """Open the index of an archive; None where there is none that fits the snapshot."""
        place = folder / FOLDER_NAME
        if not place.is_dir():
            return None

        def read() -> tuple[Any, _About]:
            about = _read_about(place / _ABOUT_NAME)
            try:
                # The lists stay on the disk, and of them the pages that are looked through.
                return faiss.read_index(str(place / _INDEX_NAME), faiss.IO_FLAG_MMAP), about
            except RuntimeError as exc:
                raise ArchiveError(f"{place / _INDEX_NAME} cannot be read ({exc})") from exc

        try:
            index, about = read_replaceable(place, read, ArchiveError)
        except ArchiveError as exc:
            logger.warning("the index for approximate search is not used: %s", exc)
            return None
        if not _fits(about, snapshot) or index.ntotal != int(about.is_live.sum()):
            return None
        return cls(index, about, snapshot)

    @classmethod
    def prepare(
        cls,
        folder: Path,
        snapshot: Snapshot,
        *,
        on_build: Callable[[int], None] = lambda _: None,
    ) -> NearestWindows:
        """Open the index of an archive, which is built first if there is none that fits.

        Args:
            folder: The archive.
            snapshot: Of it; one window at least.
            on_build: Called before it is built, which takes minutes for millions of windows, with
                their number.

        Raises:
            FileWriteError: If it cannot be written.
        """
        found = cls.open(folder, snapshot)
        if found is not None:
            return found
        on_build(snapshot.num_windows)
        index, about = _build(snapshot)
        with staged_folder(folder / FOLDER_NAME) as new:
            try:
                faiss.write_index(index, str(new / _INDEX_NAME))
            except RuntimeError as exc:  # faiss names no cause; the disk is most often full
                raise FileWriteError(
                    errno.EIO, f"faiss could not write it: {exc}", str(folder)
                ) from exc
            _write_about(new / _ABOUT_NAME, about)
        return cls(index, about, snapshot)

    def find(self, vector: Float32Array, count: int) -> NDArray[np.int64]:
        """The rows that seem nearest to a vector, at most so many and the nearest first.

        Rows that no longer belong to a video may be among them.
        """
        wanted = np.ascontiguousarray(vector, np.float32)[np.newaxis]
        _, rows = self._index.search(wanted, min(count, self._index.ntotal))
        found: NDArray[np.int64] = rows[0][rows[0] >= 0]
        return found

    def mean_and_std(
        self, vector: Float32Array, later: NDArray[np.floating[Any]]
    ) -> tuple[float, float]:
        """Mean and standard deviation of the products of all windows with a vector, exactly.

        Args:
            vector: Shape (D,).
            later: Products with the windows that came later.
        """
        wanted = vector.astype(np.float64)
        new = later.astype(np.float64)
        gone = self._gone.astype(np.float64) @ wanted
        count = int(self._about.is_live.sum()) + len(new) - len(gone)
        total = self._about.total @ wanted + new.sum() - gone.sum()
        squares = wanted @ self._about.products @ wanted + new @ new - gone @ gone
        mean = float(total) / max(count, 1)
        return mean, max(float(squares) / max(count, 1) - mean**2, 0.0) ** 0.5


def _build(snapshot: Snapshot) -> tuple[Any, _About]:
    is_live = snapshot.video_of_row >= 0
    rows = np.flatnonzero(is_live)
    width = snapshot.shards[0].shape[1]
    num_lists = max(1, min(round(2 * len(rows) ** 0.5), len(rows) // 40))
    quantizer = faiss.IndexFlatIP(width)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, width, num_lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    # The same sample whoever builds it, in the order of the disk.
    count = min(len(rows), _TRAINING_ROWS_PER_LIST * num_lists)
    sample = np.sort(np.random.default_rng(0).choice(rows, count, replace=False))
    index.train(read_rows(snapshot.shards, sample).astype(np.float32))
    total, products = np.zeros(width), np.zeros((width, width))
    for first in range(0, len(rows), _BLOCK_ROWS):
        part = rows[first : first + _BLOCK_ROWS]
        block = read_rows(snapshot.shards, part).astype(np.float32)
        index.add_with_ids(block, part)
        total += block.sum(axis=0, dtype=np.float64)
        products += block.T @ block
    shards = _numbers_of(snapshot)
    return index, _About(shards, is_live, total, products, _fingerprint(snapshot, len(is_live)))


def _numbers_of(snapshot: Snapshot) -> NDArray[np.int64]:
    """Number and rows of the files of a snapshot, shape (S, 2)."""
    pairs = [(int(Path(shard.filename).stem), len(shard)) for shard in snapshot.shards]  # type: ignore[attr-defined]
    return np.array(pairs, np.int64).reshape(-1, 2)


def _fits(about: _About, snapshot: Snapshot) -> bool:
    """Whether an index is of rows that are still there, and of most of what is there now."""
    known, found = about.shards, _numbers_of(snapshot)
    if not len(known) or len(known) > len(found):
        return False
    # Rows are appended to the last file alone, so that the others have to be as they were.
    before, after = known.copy(), found[: len(known)].copy()
    if after[-1, 1] < before[-1, 1]:
        return False
    after[-1, 1] = before[-1, 1]
    if (before != after).any() or about.total.shape[0] != snapshot.shards[0].shape[1]:
        return False
    is_live = snapshot.video_of_row >= 0
    num_later = int(is_live[about.num_rows :].sum())
    num_gone = int((about.is_live & ~is_live[: about.num_rows]).sum())
    if num_later + num_gone > _STALE_SHARE * max(1, int(about.is_live.sum())):
        return False
    # An archive that was made anew may have files of the same numbers and sizes.
    return about.fingerprint == _fingerprint(snapshot, about.num_rows)


def _fingerprint(snapshot: Snapshot, num_rows: int) -> str:
    places = np.unique(np.linspace(0, num_rows - 1, _FINGERPRINT_ROWS).astype(np.int64))
    return sha256_of(read_rows(snapshot.shards, places).tobytes())


def _write_about(path: Path, about: _About) -> None:
    save_file(
        {
            "shards": about.shards,
            "is_live": np.packbits(about.is_live),
            "total": about.total,
            "products": about.products,
        },
        path,
        {"format": _FORMAT, "fingerprint": about.fingerprint},
    )


def _read_about(path: Path) -> _About:
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ArchiveError(f"{path} is of another version")
            shards: NDArray[np.int64] = file.get_tensor("shards")
            packed = file.get_tensor("is_live")
            return _About(
                shards=shards,
                is_live=np.unpackbits(packed, count=int(shards[:, 1].sum())).astype(bool),
                total=file.get_tensor("total"),
                products=file.get_tensor("products"),
                fingerprint=metadata["fingerprint"],
            )
    except (OSError, SafetensorError, KeyError, ValueError) as exc:
        raise ArchiveError(f"{path} cannot be read ({exc})") from exc
