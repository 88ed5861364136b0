"""Files and folders that appear whole or not at all, their hashes, and texts that people wrote.

Everything is written under another name in the same folder and then renamed, so whatever moment
a program is killed at, a reader finds what was there before or all of what is new. What a killed
program leaves is removed by the next that writes there.
"""

# Libraries that were tried: filelock, which tokenizers brings along, takes longer to import than
# all of this and leaves its lock files behind; atomicwrites is no longer maintained.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from actionclip_deploy.errors import FileWriteError

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)


LOCK_PREFIX = ".lock-"
_STAGED = ".staged"  # ends the name of a folder that another one is being replaced from
_ABANDONED_SECONDS = 3600.0  # writing an entry takes seconds
_LOCK_SECONDS, LOCK_STEP_SECONDS = 120.0, 0.02
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
    try:
        if not path.is_file():
            return "is missing"
        found = path.stat().st_size
        if found != size_bytes:
            return f"has {found} bytes instead of {size_bytes}"
        if check_hash and sha256_of_file(path) != sha256:
            return "does not have the sha256 that it was written with"
    except FileNotFoundError:  # it went between two looks
        return "is missing"
    return None


# Texts that people wrote


def read_text(
    path: Path, what: str, error: Callable[[str], Exception], *, max_bytes: int = 16 << 20
) -> str:
    """Read a text file of a user, whatever program it was saved with.

    A pipe may stand in the place of a file where it is one of this process's own, such as
    `/dev/stdin` or what a shell makes of `<(command)`; to open another could wait for ever.

    Args:
        path: The file.
        what: What it should be, a noun for messages, such as "label file".
        error: Makes the exception of a sentence.
        max_bytes: The largest such file that makes sense.

    Returns:
        Its text, with a line feed alone at the end of each line, and without byte order marks.

    Raises:
        Exception: What `error` makes, if it cannot be read, or is no UTF-8; names the line.
    """
    try:
        waits, data = opening_may_wait(path), b""
        if not waits:
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)
    except (OSError, ValueError) as exc:  # ValueError for a zero byte in the name
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise error(
            f"The {what} {path} cannot be read ({reason}); check the path and its permissions."
        ) from exc
    if waits:
        raise error(
            f"The {what} {path} is not a file but a pipe, a socket or a device; give a file."
        )
    if len(data) > max_bytes:
        raise error(f"{path} has more than {max_bytes} bytes, and so many has no {what}.")
    return _decode(data, path, error)


def opening_may_wait(path: Path) -> bool:
    """Whether opening a path, or reading it, may wait for ever: a pipe, a socket or a device.

    Not those that a program was started with, such as `/dev/stdin`.

    Raises:
        OSError: If there is nothing under the path, or it may not be known.
    """
    mode = path.stat().st_mode
    # Not resolved: /dev/fd/63 is a link to /proc/PID/fd/pipe:[1234], which is no path.
    is_own = str(path) == "/dev/stdin" or str(path.parent) in ("/dev/fd", "/proc/self/fd")
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or is_own)


def _decode(data: bytes, path: Path, error: Callable[[str], Exception]) -> str:
    other = _other_encoding(data)
    if other is not None:
        raise error(
            f"{path} is {other}, and not UTF-8; save it as UTF-8, for example with "
            f"`iconv -f {other} -t UTF-8 OLD > NEW`."
        )
    try:
        text = data.decode()
    except UnicodeDecodeError as exc:
        line = _line_of(data, exc.start)
        raise error(
            f"{path} line {line} is not UTF-8 (byte {data[exc.start]:#04x}); "
            "save the file as UTF-8."
        ) from exc
    if (place := data.find(0)) >= 0:
        line = _line_of(data, place)
        raise error(f"{path} line {line} holds a zero byte; give a file of plain text.")
    # Files that were joined have byte order marks in the middle, which nobody sees.
    return text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")


def _line_of(data: bytes, place: int) -> int:
    """Number of the line that a byte is in; a line ends with LF, CR LF or, of old, CR alone."""
    before = data[:place].replace(b"\r\n", b"\n")
    return before.count(b"\n") + before.count(b"\r") + 1


_MARKS = (
    (b"\xff\xfe\0\0", "UTF-32LE"),
    (b"\0\0\xfe\xff", "UTF-32BE"),
    (b"\xff\xfe", "UTF-16LE"),
    (b"\xfe\xff", "UTF-16BE"),
)


def _other_encoding(data: bytes) -> str | None:
    """The wide encoding that a text is in, by its mark, or by the zeros of letters without one."""
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name
    for width, place, name in ((4, 0, "UTF-32LE"), (4, 3, "UTF-32BE"), (2, 0, "UTF-16LE")):
        if _has_letters_at(data, width, place):
            return name
    return "UTF-16BE" if _has_letters_at(data, 2, 1) else None


def _has_letters_at(data: bytes, width: int, place: int) -> bool:
    """Whether most units of so many bytes hold one letter of ASCII, at a place, and zeros."""
    units = len(data) // width
    columns = [data[start : units * width : width] for start in range(width)]
    letters = columns.pop(place)
    zeros = min((column.count(0) for column in columns), default=0)
    return units > 0 and letters.count(0) == 0 and zeros > units // 2


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
    with write_errors(path):
        if target.exists() and not target.is_file():
            yield target
            return
        _remove_abandoned_files(target)
    staged = target.with_name(f".{_short(target.name)}-{unique_name()}{target.suffix[:16]}")
    with write_errors(path, staged=staged):
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


def unique_name() -> str:
    """A name that no other process or thread gives."""
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
def write_errors(
    path: str | Path, *, full_disk_only: bool = False, staged: Path | None = None
) -> Iterator[None]:
    """Raise the system's errors in the block as ours, of the path that whoever called us knows.

    Args:
        path: What is being written.
        full_disk_only: Whether to leave other errors than those of a full disk as they are.
        staged: Where it lies until it is whole, under a name that tells nobody anything and is
            gone when the error is read. Errors of files in there are errors of `path`.
    """
    try:
        yield
    except FileWriteError as exc:
        if staged is None or not Path(str(exc.filename)).is_relative_to(staged):
            raise
        raise FileWriteError(exc.errno, exc.strerror, str(path)) from exc
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
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        workspace, claim = _make_workspace(target)
    try:
        # mkdtemp makes a private folder; the one inside gets the permissions of the umask.
        staging = workspace / "new"
        with write_errors(target):
            staging.mkdir()
        with write_errors(target, full_disk_only=True, staged=workspace):
            yield staging
        if durable:
            with write_errors(target):
                for path in [*staging.rglob("*"), staging]:
                    _sync(path)
        with folder_lock(target.parent):
            check()
            with write_errors(target):
                _replace_folder(staging, target, workspace / "old")
        if durable:
            with write_errors(target):
                _sync(target.parent)
    finally:
        # What was replaced is kept where nothing stands in its place.
        if target.exists() or not (workspace / "old" / target.name).exists():
            shutil.rmtree(workspace, ignore_errors=True)
        if claim is not None:
            os.close(claim)


def _make_workspace(target: Path) -> tuple[Path, int | None]:
    """A private folder next to `target`, and the lock that says that this process lives."""
    with folder_lock(target.parent) as alone:
        sweep_workspaces(target.parent, alone=alone)
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


def workspaces_in(folder: Path) -> list[Path]:
    """Workspaces of replacements in a folder, of living owners and dead ones."""
    return entries_of(folder, f".*{_STAGED}")


def entries_of(folder: Path, pattern: str) -> list[Path]:
    """What a folder holds under a pattern: nothing, if it is removed at this moment.

    `Path.glob` itself raises in that case before Python 3.13.
    """
    try:
        return list(folder.glob(pattern))
    except FileNotFoundError:
        return []


def sweep_workspaces(folder: Path, *, alone: bool) -> None:
    """Finish the replacements that killed programs have left in a folder, and remove the rest.

    Args:
        folder: Where folders are replaced.
        alone: Whether this process holds the folder's lock. A workspace without a lock of its own
            is then not one that is just being made.
    """
    if sys.platform == "win32":
        return  # there are no locks that would tell who lives
    for workspace in workspaces_in(folder):
        with suppress(OSError):  # another user's, or one that is removed at this moment
            age = time.time() - workspace.stat().st_mtime
            if not (alone or (workspace / "lock").exists() or age > _ABANDONED_SECONDS):
                continue
            claim = _claim(workspace)
            if claim is None:
                continue
            try:
                for old in entries_of(workspace / "old", "*"):
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
    if swap_folders(staging, target):
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


def swap_folders(one: Path, other: Path) -> bool:
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
    if any((workspace / "old").exists() for workspace in workspaces_in(folder)):
        with folder_lock(folder, seconds=0) as alone:
            sweep_workspaces(folder, alone=alone)


def names_moved_aside(folder: Path) -> set[str]:
    """Names in a folder that are missing for a moment, because what they stand for is replaced."""
    return {old.name for space in workspaces_in(folder) for old in entries_of(space / "old", "*")}


def _is_coming_back(folder: Path) -> bool:
    """Whether a folder is missing because it is being replaced."""
    finish_replacements(folder.parent)
    # `Path.exists` raises of a name that is too long.
    return os.path.exists(folder) or folder.name in names_moved_aside(folder.parent)  # noqa: PTH110


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
def work_lock(path: Path) -> Iterator[None]:
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
                time.sleep(LOCK_STEP_SECONDS)
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
def folder_lock(folder: Path, *, seconds: float = _FOLDER_LOCK_SECONDS) -> Iterator[bool]:
    """Hold a folder itself for a block, which leaves nothing behind; gives whether it is held.

    Where the lock cannot be had, the block runs without.
    """
    handle, is_held = None, False
    deadline = time.monotonic() + seconds
    try:
        handle = os.open(folder, os.O_RDONLY)
        while not (is_held := try_lock(handle)) and time.monotonic() < deadline:
            time.sleep(LOCK_STEP_SECONDS / 10)
    except OSError as exc:  # a network's file system, or Windows
        logger.debug("%s is not locked: %s", folder, exc)
    try:
        yield is_held
    finally:
        if handle is not None:
            os.close(handle)
