"""Keyed entries in folders: made once, kept under the hash of their key, checked when read.

Graphs, engines, frames and choices are kept so, each kind in a store of its own below one cache
folder; so are the hashes of large files that were compared before.

platformdirs says where the cache lies. diskcache was tried, and keeps its entries in SQLite and
pickles.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from actionclip_deploy.errors import DamagedFileError, FileWriteError
from actionclip_deploy.files import (
    _ABANDONED_SECONDS,
    LOCK_PREFIX,
    LOCK_STEP_SECONDS,
    entries_of,
    folder_lock,
    remove_folder,
    sha256_of,
    sha256_of_file,
    sha256_of_json,
    swap_folders,
    sweep_workspaces,
    unique_name,
    why_altered,
    work_lock,
    workspaces_in,
    write_errors,
    write_text,
)

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "ACTIONCLIP_CACHE"
ENTRY_RECORD = "entry.json"
UNFINISHED = ".new-"  # begins the name of what a store is still writing or removing
_NAME_LENGTH = 24  # hexadecimal digits of the name of an entry
_MAX_READS = 5


# The folder of everything that is cached


def cache_folder(cache: bool | str | Path = True) -> Path | None:
    """Where everything that is cached lies, by the caller's wish or the environment.

    Args:
        cache: A folder; True for that of `ACTIONCLIP_CACHE` or else of the platform; False for
            none, which `ACTIONCLIP_CACHE=off` means too.

    Returns:
        The folder, which need not exist; None for none.
    """
    setting = os.environ.get(CACHE_VARIABLE, "").strip()
    if cache is False or (cache is True and setting.lower() in ("off", "0")):
        return None
    try:
        folder = Path(cache) if cache is not True else Path(setting or _platform_cache())
        return folder.expanduser()
    except RuntimeError as exc:  # there is no home
        logger.warning("nothing is cached: %s; name a folder with %s", exc, CACHE_VARIABLE)
        return None


def _platform_cache() -> str:
    # Needed only where a cache is opened, and a twentieth of the package's import.
    import platformdirs

    folder = platformdirs.user_cache_dir("actionclip-deploy", appauthor=False)
    # Some versions take a relative XDG_CACHE_HOME, which the specification says to ignore.
    return folder if Path(folder).is_absolute() else "~/.cache/actionclip-deploy"


# Keyed entries


@dataclass(frozen=True)
class StoredEntry:
    """A folder of files under the hash of their key.

    Attributes:
        folder: Of the files; its name is the hash.
        record: What `entry.json` holds: `key`, `files` (the size, hash and signature of each), and
            what the writer added.
    """

    folder: Path
    record: dict[str, Any]

    @property
    def name(self) -> str:
        """The hash of the key."""
        return self.folder.name

    @property
    def key(self) -> Any:
        """Everything that the files depend on, as JSON."""
        return self.record["key"]

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def check_files(self) -> None:
        """Compare the files with the record.

        A file is read only where its times or its inode are not those that it had when it was last
        read, so that a start of a program does not read gigabytes for nothing.

        Raises:
            DamagedFileError: If one is missing or altered; says how.
        """
        changed = False
        for name, given in self.record["files"].items():
            path = self.folder / name
            size, sha256 = given["size"], given["sha256"]
            try:
                signature = file_signature(path) if path.is_file() else None
                known = signature is not None and signature == given.get("signature")
                why = why_altered(path, size_bytes=size, sha256=sha256, check_hash=not known)
            except OSError as exc:
                why = f"cannot be read ({exc.strerror})"
            if why is not None:
                raise DamagedFileError(f"{path} {why}")
            if not known:
                given["signature"] = signature
                changed = True
        if changed:
            with suppress(OSError):  # a cache that is read-only is read
                self.save()

    def read(self, name: str) -> bytes:
        """Read a file and compare what was read with the record.

        Raises:
            DamagedFileError: If it is missing or altered.
        """
        path, given = self.folder / name, self.record["files"].get(name)
        try:
            data = path.read_bytes()
        except OSError as exc:
            raise DamagedFileError(f"{path} cannot be read ({exc.strerror})") from exc
        if given is None or sha256_of(data) != given["sha256"]:
            raise DamagedFileError(f"{path} has {len(data)} bytes that are not those written")
        return data

    def save(self: EntryT, **changes: Any) -> EntryT:
        """Write the record with some of its fields replaced.

        Raises:
            FileWriteError: If it cannot be written.
        """
        entry = type(self)(self.folder, {**self.record, **changes})
        write_text(self.folder / ENTRY_RECORD, json.dumps(entry.record, indent=2))
        return entry


EntryT = TypeVar("EntryT", bound=StoredEntry)


def file_signature(path: Path) -> str:
    """What changes when a file is written to, and is quick to find out."""
    status = path.stat()
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    return f"{status.st_size} {times} {status.st_ino} {status.st_dev}"


def key_name(key: Any) -> str:
    """The name of the entry of a key."""
    return sha256_of_json(key)[:_NAME_LENGTH]


class Store:
    """A folder of entries, each under the hash of a key of everything that it depends on.

    An entry that is damaged is refused, so that it can be made again. None is waited for until it
    is on the disk: after a power cut its files do not have the hashes of the record.

    Args:
        folder: Where; made when it is first written to.
        limit_bytes: What all entries may take together; the least recently used go first.
        private: Whether the folder is for this user alone, and is not trusted where others may
            write to it.
        upgrade: Brings a record that an earlier version wrote up to date.
    """

    def __init__(
        self,
        folder: Path,
        *,
        limit_bytes: int | None = None,
        private: bool = True,
        upgrade: Callable[[dict[str, Any]], dict[str, Any]] = lambda record: record,
    ) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._mode = 0o700 if private else 0o777
        self._private = private
        self._upgrade = upgrade

    def find(self, key: Any) -> StoredEntry | None:
        """The entry of a key, which counts as used now; None if there is none.

        Raises:
            DamagedFileError: If it is not what was written.
            FileWriteError: If others may write to a private folder.
        """
        folder = self.folder / key_name(key)
        if not folder.is_dir():
            return None
        self._check_trusted()
        entry = self.read(folder)
        entry.check_files()
        with suppress(OSError):
            os.utime(folder / ENTRY_RECORD)
        return entry

    def read(self, folder: Path) -> StoredEntry:
        """Read the record of an entry; its files are not looked at.

        Raises:
            DamagedFileError: If it cannot be read, or is not the record of this entry.
        """
        path = folder / ENTRY_RECORD
        try:
            record = self._upgrade(json.loads(path.read_text(encoding="utf-8")))
            name = key_name(record["key"])
            are_files = all(
                Path(file).name == file and isinstance(given["size"], int) and given["sha256"]
                for file, given in record["files"].items()
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as exc:
            why = exc.strerror if isinstance(exc, OSError) else f"{type(exc).__name__}: {exc}"
            raise DamagedFileError(f"{path} cannot be read ({why})") from exc
        if name != folder.name or not are_files:
            raise DamagedFileError(f"{path} is not what was written: its key gives another name")
        return StoredEntry(folder, record)

    def add(
        self,
        key: Any,
        write: Callable[[Path], Mapping[str, Any] | None],
        *,
        replace: bool = False,
    ) -> StoredEntry:
        """Write an entry; of two programs that write the same one, the first one's stays.

        Args:
            key: Everything that the entry depends on, as JSON.
            write: Writes the files into a folder; gives what the record is to say besides.
            replace: Whether an entry that is there and whole is replaced.

        Raises:
            FileWriteError: If it cannot be written, or others may write to a private folder.
        """
        entry = self.folder / key_name(key)
        new = self.folder / f"{UNFINISHED}{entry.name}-{unique_name()}"
        try:
            with write_errors(entry):
                self._make_folder()
                new.mkdir(mode=self._mode)
            with write_errors(entry, full_disk_only=True, staged=new):
                details = write(new) or {}
            with write_errors(entry):
                files = {path.name: self._describe(path) for path in sorted(new.iterdir())}
                text = json.dumps({"key": key, "files": files, **details}, indent=2)
                (new / ENTRY_RECORD).write_text(text, encoding="utf-8")
                if replace or not self.is_whole(entry):
                    _put_in_place(new, entry)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        self.prune(keep=entry)
        # For an instant there is none, where another program puts its own in the place of this one.
        for _ in range(_MAX_READS - 1):
            with suppress(DamagedFileError):
                return self.read(entry)
            time.sleep(LOCK_STEP_SECONDS)
        return self.read(entry)

    def find_or_add(
        self,
        key: Any,
        write: Callable[[Path], Mapping[str, Any] | None],
        *,
        check: Callable[[StoredEntry], object] = lambda _: None,
    ) -> StoredEntry:
        """The entry of a key, made if it is not there or damaged.

        Where another program is making it at this moment, that one's is waited for and used.

        Args:
            key: As for `add`.
            write: As for `add`.
            check: What an entry that is there is held to besides; raises `DamagedFileError`.

        Raises:
            FileWriteError: If it has to be made and cannot be written, or others may write to a
                private folder.
        """

        def find(level: int) -> StoredEntry | None:
            try:
                entry = self.find(key)
                if entry is not None:
                    check(entry)
                return entry
            except DamagedFileError as exc:
                logger.log(level, "the entry %s is made again: %s", folder, exc)
                return None

        folder = self.folder / key_name(key)
        entry = find(logging.DEBUG)
        if entry is None:
            with write_errors(folder):
                self._make_folder()
            with work_lock(self.folder / f"{LOCK_PREFIX}{folder.name}"):
                entry = find(logging.WARNING) or self.add(key, write, replace=True)
        return entry

    def is_whole(self, folder: Path) -> bool:
        """Whether an entry is there, and its record and files are what was written."""
        try:
            self.read(folder).check_files()
        except DamagedFileError:
            return False
        return True

    def check_writable(self) -> None:
        """Make the folder and write to it, so that no long work ends in nothing.

        Raises:
            FileWriteError: If it cannot be written to, or others may write to a private folder.
        """
        with write_errors(self.folder):
            self._make_folder()
            with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=self.folder):
                pass

    def folders(self) -> list[Path]:
        """The folders of all entries, whole or not, by name."""
        if not self.folder.is_dir():
            return []
        found = (path for path in entries_of(self.folder, "*") if not path.name.startswith("."))
        return sorted(path for path in found if path.is_dir())

    def prune(self, *, keep: Path | None = None) -> list[Path]:
        """Remove what crashes left, and the least recently used entries beyond the limit.

        Args:
            keep: The folder of an entry that stays, whatever it takes.

        Returns:
            The folders that were removed.
        """
        removed = []
        if workspaces_in(self.folder):
            with folder_lock(self.folder) as alone:
                sweep_workspaces(self.folder, alone=alone)
        for path in entries_of(self.folder, ".*"):
            if path.name.startswith((UNFINISHED, LOCK_PREFIX)):
                with suppress(OSError):  # another process may remove it at the same time
                    if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                        remove_folder(path) if path.is_dir() else path.unlink()
                        removed.append(path)
        if self.limit_bytes is None:
            return removed
        entries = []
        for path in self.folders():
            with suppress(OSError):
                size = sum(file.stat().st_size for file in path.iterdir())
                entries.append(((path / ENTRY_RECORD).stat().st_mtime, size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total > self.limit_bytes and path != keep:
                logger.info("%s is removed to stay below the limit of the cache", path)
                with suppress(OSError):
                    remove_folder(path)
                removed.append(path)
                total -= size
        return removed

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=self._mode)
        self._check_trusted()

    def _check_trusted(self) -> None:
        if not self._private or sys.platform == "win32":
            return
        status = self.folder.stat()
        if status.st_uid not in (os.getuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            why = "other users may write to it; run chmod go-w on it"
            raise FileWriteError(errno.EPERM, why, str(self.folder))

    def _describe(self, path: Path) -> dict[str, Any]:
        if not self._private:
            # safetensors makes files for their owner alone; the folder has what the umask allows.
            path.chmod(path.parent.stat().st_mode & 0o666)
        size = path.stat().st_size
        return {"size": size, "sha256": sha256_of_file(path), "signature": file_signature(path)}


def _put_in_place(new: Path, entry: Path) -> None:
    with suppress(OSError):
        new.rename(entry)
        return
    # What stands there is damaged, to be replaced, or another program's of a moment ago.
    with suppress(OSError):
        if swap_folders(new, entry):
            return
    with suppress(FileNotFoundError):
        remove_folder(entry)
    with suppress(OSError):
        new.rename(entry)
    if not (entry / ENTRY_RECORD).is_file():
        raise PermissionError("what stands there cannot be replaced")


# Hashes of large files, compared once

_MIN_KNOWN_BYTES = 2**20  # a smaller file is read within a few milliseconds
_SETTLED_SECONDS = 2.0  # file systems count time in steps of up to two seconds
_MAX_SIGNATURES = 16  # copies of one file that are known
_known_signatures: dict[str, set[str]] = {}  # of this process, by sha256


def is_settled(*paths: Path) -> bool:
    """Whether a write to the files from now on is sure to change their signatures."""
    found = [path.stat() for path in paths]
    newest = max(max(status.st_mtime, status.st_ctime) for status in found)
    return time.time() - newest > _SETTLED_SECONDS


def why_altered_since(
    path: Path, *, size_bytes: int, sha256: str, read_again: bool = False
) -> str | None:
    """As `why_altered`, but a large file that had its hash before is not read at every start.

    What is known of it lies in the cache, and holds for the same size, times and inode. Of a file
    that was written just now nothing is kept: another write could leave its times as they are.

    Args:
        path: As for `why_altered`.
        size_bytes: As for `why_altered`.
        sha256: As for `why_altered`.
        read_again: Whether the file is read whatever is known, since a disk can alter a file
            without its times.
    """
    unread = why_altered(path, size_bytes=size_bytes, sha256=sha256, check_hash=False)
    if unread is not None or size_bytes < _MIN_KNOWN_BYTES:
        return unread or why_altered(path, size_bytes=size_bytes, sha256=sha256)
    signature, settled = file_signature(path), is_settled(path)
    if not read_again and signature in _signatures_of(sha256):
        return None
    why = why_altered(path, size_bytes=size_bytes, sha256=sha256)
    if why is None and settled and file_signature(path) == signature:
        _add_signature(sha256, signature)
    return why


def _hash_store() -> Store | None:
    folder = cache_folder()
    return None if folder is None else Store(folder / "hashes", limit_bytes=2**20)


def _signatures_of(sha256: str) -> set[str]:
    known, store = _known_signatures.setdefault(sha256, set()), _hash_store()
    if store is not None:
        with suppress(OSError, DamagedFileError, LookupError, TypeError):
            entry = store.find({"sha256": sha256})
            return known if entry is None else known.union(entry.record["signatures"])
    return known


def _add_signature(sha256: str, signature: str) -> None:
    others = _signatures_of(sha256) - {signature}
    _known_signatures[sha256].add(signature)
    store = _hash_store()
    if store is not None:
        kept = [*sorted(others)[: _MAX_SIGNATURES - 1], signature]
        try:
            store.add({"sha256": sha256}, lambda _: {"signatures": kept}, replace=True)
        except (OSError, DamagedFileError) as exc:  # the next start reads the file again
            logger.debug("the hash of a file is not kept: %s", exc)
