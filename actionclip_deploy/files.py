"""Files and folders that appear whole or not at all, their hashes, and a store of keyed entries.

Everything is written under another name in the same folder and then renamed, so whatever moment
a program is killed at, a reader finds what was there before or all of what is new. What a killed
program leaves is removed by the next that writes there.
"""

# Libraries that were tried. platformdirs says where a cache lies. filelock, which tokenizers brings
# along, takes longer to import than all of this and leaves its lock files behind. atomicwrites is
# no longer maintained, and diskcache keeps its entries in SQLite and pickles.

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from actionclip_deploy.errors import DamagedFileError, FileWriteError

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "ACTIONCLIP_CACHE"
ENTRY_RECORD = "entry.json"
UNFINISHED = ".new-"  # begins the name of what a store is still writing or removing

_LOCK = ".lock-"
_STAGED = ".staged"  # ends the name of a folder that another one is being replaced from
_NAME_LENGTH = 24  # hexadecimal digits of the name of an entry
_ABANDONED_SECONDS = 3600.0  # writing an entry takes seconds
_LOCK_SECONDS, _LOCK_STEP_SECONDS = 120.0, 0.02
_MAX_READS = 5
_FOLDER_LOCK_SECONDS = 10.0  # replacing a folder takes milliseconds
_READ_TRIES, _READ_STEP_SECONDS = 100, 0.005


# Hashes


def sha256_of_file(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sha256_of(data: bytes | str) -> str:
    """Hexadecimal sha256 of bytes, or of a text in UTF-8."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hexadecimal sha256 of a value as JSON, whatever the order of its keys."""
    return sha256_of(json.dumps(value, sort_keys=True))


def why_altered(path: Path, *, size_bytes: int, sha256: str, check_hash: bool = True) -> str | None:
    """Say how a file differs from what was written; None if it does not.

    Args:
        path: The file.
        size_bytes: What was written.
        sha256: Of what was written.
        check_hash: Whether to read the file; without it only presence and size are checked.

    Returns:
        The end of a sentence that begins with the name of the file.

    Raises:
        OSError: If the file is there and cannot be read.
    """
    if not path.is_file():
        return "is missing"
    found = path.stat().st_size
    if found != size_bytes:
        return f"has {found} bytes instead of {size_bytes}"
    if check_hash and sha256_of_file(path) != sha256:
        return "does not have the sha256 that it was written with"
    return None


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


# Single files


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file, or leave what was there.

    Raises:
        FileWriteError: If it cannot be written, for example because the disk is full.
    """
    with staged_file(path) as staged:
        staged.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write a file of UTF-8; as `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON; as `write_bytes`.

    Raises:
        ValueError: If there is a number in it that is not finite, which JSON has no form for.
        FileWriteError: If it cannot be written.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def staged_file(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Give the name of a temporary file that takes the place of `path` if the block succeeds.

    For libraries that write files themselves; the name keeps its suffix. The new file has the
    permissions of the one that it replaces, or else those of the umask. Links are followed, and
    what is not a regular file, such as `/dev/stdout`, is written to as it is.

    Args:
        path: The file.
        durable: Whether to wait until the new file is on the disk before it gets its name.

    Raises:
        FileWriteError: If it cannot be written.
    """
    target = Path(os.path.realpath(path))
    with _write_errors(path):
        if target.exists() and not target.is_file():
            yield target
            return
        _remove_abandoned_files(target)
        staged = target.with_name(f".{_short(target.name)}-{_unique()}{target.suffix[:16]}")
        handle = None
        try:
            # Made here first: safetensors would make it for its owner alone.
            handle = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            with suppress(OSError):  # a file system without locks
                try_lock(handle)
            mode = stat.S_IMODE((target if target.exists() else staged).stat().st_mode)
            yield staged
            staged.chmod(mode)
            if durable:
                _sync(staged)
            staged.replace(target)
        finally:
            with suppress(OSError):
                staged.unlink()
            if handle is not None:
                os.close(handle)


def _unique() -> str:
    return f"{os.getpid()}-{os.urandom(4).hex()}"


def _short(name: str) -> str:
    """The beginning of a name, so that there is room for more: names end at 255 bytes."""
    return os.fsdecode(os.fsencode(name)[:64])


def _remove_abandoned_files(target: Path) -> None:
    """Remove what killed programs have left of a file: those of dead processes, not locked."""
    if sys.platform == "win32":
        return
    begin, end = re.escape(f".{_short(target.name)}-"), re.escape(target.suffix[:16])
    pattern = re.compile(rf"{begin}([0-9]+)-[0-9a-f]{{8}}{end}")
    with suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            match = pattern.fullmatch(entry.name)
            if match and not _is_alive(int(match[1])):
                handle = os.open(entry, os.O_RDONLY)
                try:
                    if try_lock(handle):  # and no process of another container's has it
                        Path(entry).unlink()
                finally:
                    os.close(handle)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk.

    Without it, a power cut may leave a file that has its new name and no content.
    """
    if path.is_dir() and sys.platform == "win32":
        return  # there a folder cannot be opened
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full_disk(exc: BaseException) -> bool:
    """Whether an error, or one that it came from, says that there is no room to write."""
    return _full_disk_code(exc) is not None


def _full_disk_code(exc: BaseException | None) -> int | None:
    # safetensors and onnx tell of a full disk in the text of errors of their own, and torch raises
    # one without a word of it while it handles the system's.
    while exc is not None:
        if isinstance(exc, OSError) and exc.errno in _FULL:
            return exc.errno
        code = next((code for code in _FULL if os.strerror(code) in str(exc)), None)
        if code is not None:
            return code
        exc = exc.__cause__ or exc.__context__
    return None


@contextmanager
def _write_errors(path: str | Path, *, full_disk_only: bool = False) -> Iterator[None]:
    """Raise the system's errors in the block as ours: all of them, or those of a full disk."""
    try:
        yield
    except FileWriteError:
        raise
    except OSError as exc:
        if full_disk_only and exc.errno not in _FULL:
            raise
        raise FileWriteError(exc.errno, exc.strerror or str(exc), str(path)) from exc
    except Exception as exc:
        code = _full_disk_code(exc)
        if code is None:
            raise
        raise FileWriteError(code, os.strerror(code), str(path)) from exc


# Folders
#
# A folder is written as `new` in a workspace next to it, `.NAME-XXXXXXXX.staged`, and then swapped
# with the old one, which is removed with the workspace. Where the system cannot swap, the old one
# is moved to `old/NAME` of the workspace first; whoever finds a workspace whose owner is dead and
# nothing under NAME moves it back. `lock` is locked by the owner for as long as it lives.


@contextmanager
def staged_folder(
    target: Path, *, check: Callable[[], None] = lambda: None, durable: bool = False
) -> Iterator[Path]:
    """Give a temporary folder that takes the place of `target` if the block succeeds.

    A reader sees the old folder or the new one, never a half-written one; a block that raises
    leaves nothing behind. Where the system cannot swap two folders, a reader may see none for an
    instant; `read_replaceable` waits for it.

    Args:
        target: The folder to make; one that is there is replaced.
        check: Raises where the target must not be replaced. Called before the block and again
            after it, since another program may have written the target while the block ran; from
            the second call to the replacement no other program replaces a folder there.
        durable: Whether to wait until everything is on the disk before the new folder appears.

    Raises:
        FileWriteError: If the folder cannot be written, or the block fills the disk.
    """
    check()
    with _write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        workspace, claim = _make_workspace(target)
    try:
        # mkdtemp makes a private folder; the one inside gets the permissions of the umask.
        staging = workspace / "new"
        with _write_errors(target):
            staging.mkdir()
        with _write_errors(target, full_disk_only=True):
            yield staging
        if durable:
            with _write_errors(target):
                for path in [*staging.rglob("*"), staging]:
                    _sync(path)
        with _folder_lock(target.parent):
            check()
            with _write_errors(target):
                _replace_folder(staging, target, workspace / "old")
        if durable:
            with _write_errors(target):
                _sync(target.parent)
    finally:
        # What was replaced is kept where nothing stands in its place.
        if target.exists() or not (workspace / "old" / target.name).exists():
            shutil.rmtree(workspace, ignore_errors=True)
        if claim is not None:
            os.close(claim)


def _make_workspace(target: Path) -> tuple[Path, int | None]:
    """A private folder next to `target`, and the lock that says that this process lives."""
    with _folder_lock(target.parent) as alone:
        _tidy(target.parent, alone=alone)
        prefix = f".{_short(target.name)}-"
        workspace = Path(tempfile.mkdtemp(prefix=prefix, suffix=_STAGED, dir=target.parent))
        return workspace, _claim(workspace)


def _claim(workspace: Path) -> int | None:
    """Lock a workspace; None where its owner lives, or the file system has no locks."""
    handle = None
    try:
        handle = os.open(workspace / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        if try_lock(handle):
            return handle
    except OSError as exc:
        logger.debug("%s is not locked: %s", workspace, exc)
    if handle is not None:
        os.close(handle)
    return None


def _workspaces(folder: Path) -> list[Path]:
    return list(folder.glob(f".*{_STAGED}"))


def _tidy(folder: Path, *, alone: bool) -> None:
    """Finish the replacements that killed programs have left in a folder, and remove the rest.

    Args:
        folder: Where folders are replaced.
        alone: Whether this process holds the folder's lock. A workspace without a lock of its own
            is then not one that is just being made.
    """
    if sys.platform == "win32":
        return  # there are no locks that would tell who lives
    for workspace in _workspaces(folder):
        with suppress(OSError):  # another user's, or one that is removed at this moment
            age = time.time() - workspace.stat().st_mtime
            if not (alone or (workspace / "lock").exists() or age > _ABANDONED_SECONDS):
                continue
            claim = _claim(workspace)
            if claim is None:
                continue
            try:
                for old in (workspace / "old").glob("*"):
                    if not os.path.lexists(folder / old.name):
                        logger.warning("%s is put back: its replacement was killed", old.name)
                        old.rename(folder / old.name)
                shutil.rmtree(workspace, ignore_errors=True)
            finally:
                os.close(claim)


def _replace_folder(staging: Path, target: Path, aside: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    if _exchange(staging, target):
        return
    aside.mkdir(exist_ok=True)
    old = aside / target.name
    target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        # Where this fails too, another program has put its own folder there.
        with suppress(OSError):
            old.rename(target)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Swap what two names stand for, in one step; False where that cannot be done here."""
    import ctypes  # only where a folder is replaced

    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":  # by its documentation; not yet run there
            call, arguments = libc.renamex_np, (os.fsencode(one), os.fsencode(other), 2)
        else:
            # The number of no folder (AT_FDCWD) in the place of two, then RENAME_EXCHANGE.
            here = ctypes.c_int(-100)
            call, arguments = libc.renameat2, (here, os.fsencode(one), here, os.fsencode(other), 2)
    except (AttributeError, OSError, TypeError):  # another system, or an old C library
        return False
    if call(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False  # an old kernel, a file system that cannot, or a sandbox
    raise OSError(code, os.strerror(code), str(other))


def remove_folder(folder: Path) -> None:
    """Remove a folder so that nobody finds half of it under its name.

    Raises:
        OSError: If it cannot be removed.
    """
    workspace, claim = _make_workspace(folder)
    try:
        folder.rename(workspace / "gone")
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
        if claim is not None:
            os.close(claim)


ReadT = TypeVar("ReadT")


def read_replaceable(folder: Path, read: Callable[[], ReadT], errors: type[Exception]) -> ReadT:
    """Read a folder that another program may replace, again where a replacement came between.

    Args:
        folder: What `staged_folder` replaces.
        read: Reads it.
        errors: What `read` raises where files are missing or do not fit each other. It is passed
            on once it was raised twice of one and the same folder.
    """
    seen = None
    for _ in range(_READ_TRIES):
        before = _identity(folder)
        try:
            return read()
        except errors:
            after = _identity(folder)
            if before == after is None:
                if not _is_coming_back(folder):
                    raise
                time.sleep(_READ_STEP_SECONDS)
            elif before == after == seen:
                raise
            seen = before
    return read()


def _identity(folder: Path) -> tuple[int, ...] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    # The number alone may be that of a folder that was removed.
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def finish_replacements(folder: Path) -> None:
    """Put back the folders that killed programs had moved aside, where the system cannot swap."""
    if any((workspace / "old").exists() for workspace in _workspaces(folder)):
        with _folder_lock(folder, seconds=0) as alone:
            _tidy(folder, alone=alone)


def _is_coming_back(folder: Path) -> bool:
    """Whether a folder is missing because it is being replaced."""
    finish_replacements(folder.parent)
    spaces = _workspaces(folder.parent)
    return folder.exists() or any((each / "old" / folder.name).exists() for each in spaces)


# Locks between processes


def try_lock(handle: int) -> bool:
    """Lock an open file for this process, or say that another one has it.

    The lock ends when the file is closed, however the process ends.
    """
    if sys.platform == "win32":
        return True  # two writers both do the work, and one of the results stays
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _work_lock(path: Path) -> Iterator[None]:
    """Hold a lock file for a block, so that what two want to make is made once.

    Nothing depends on it but time: where the lock cannot be had, the block runs without.
    """
    handle = None
    deadline = time.monotonic() + _LOCK_SECONDS
    try:
        while handle is None and time.monotonic() < deadline:
            opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            # The one before may have removed the file between the two calls.
            if (
                try_lock(opened)
                and path.exists()
                and os.path.samestat(os.fstat(opened), path.stat())
            ):
                handle = opened
            else:
                os.close(opened)
                time.sleep(_LOCK_STEP_SECONDS)
    except OSError as exc:  # a file system without locks, or one that is read-only
        logger.debug("%s is not locked: %s", path, exc)
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                path.unlink()
            os.close(handle)


@contextmanager
def _folder_lock(folder: Path, *, seconds: float = _FOLDER_LOCK_SECONDS) -> Iterator[bool]:
    """Hold a folder itself for a block, which leaves nothing behind; gives whether it is held.

    Where the lock cannot be had, the block runs without.
    """
    handle, is_held = None, False
    deadline = time.monotonic() + seconds
    try:
        handle = os.open(folder, os.O_RDONLY)
        while not (is_held := try_lock(handle)) and time.monotonic() < deadline:
            time.sleep(_LOCK_STEP_SECONDS / 10)
    except OSError as exc:  # a network's file system, or Windows
        logger.debug("%s is not locked: %s", folder, exc)
    try:
        yield is_held
    finally:
        if handle is not None:
            os.close(handle)


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
        new = self.folder / f"{UNFINISHED}{entry.name}-{_unique()}"
        try:
            with _write_errors(entry):
                self._make_folder()
                new.mkdir(mode=self._mode)
            with _write_errors(entry, full_disk_only=True):
                details = write(new) or {}
            with _write_errors(entry):
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
            time.sleep(_LOCK_STEP_SECONDS)
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
            with _write_errors(folder):
                self._make_folder()
            with _work_lock(self.folder / f"{_LOCK}{folder.name}"):
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
        with _write_errors(self.folder):
            self._make_folder()
            with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=self.folder):
                pass

    def folders(self) -> list[Path]:
        """The folders of all entries, whole or not, by name."""
        if not self.folder.is_dir():
            return []
        found = (path for path in self.folder.iterdir() if not path.name.startswith("."))
        return sorted(path for path in found if path.is_dir())

    def prune(self, *, keep: Path | None = None) -> list[Path]:
        """Remove what crashes left, and the least recently used entries beyond the limit.

        Args:
            keep: The folder of an entry that stays, whatever it takes.

        Returns:
            The folders that were removed.
        """
        removed = []
        if _workspaces(self.folder):
            with _folder_lock(self.folder) as alone:
                _tidy(self.folder, alone=alone)
        for path in self.folder.glob(".*"):
            if path.name.startswith((UNFINISHED, _LOCK)):
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
        if _exchange(new, entry):
            return
    with suppress(FileNotFoundError):
        remove_folder(entry)
    with suppress(OSError):
        new.rename(entry)
    if not (entry / ENTRY_RECORD).is_file():
        raise PermissionError("what stands there cannot be replaced")
