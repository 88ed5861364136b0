"""A file of results, one JSON object a line, that a run can be resumed from.

Each line is written by one call and names the run that it belongs to: the bundle, the labels and
every option that changes a result. A run that was killed leaves at most one line without its end.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from actionclip_deploy.cli.output import usage_error
from actionclip_deploy.errors import ResultFileError

# What every line starts with; a last line without its end that does not is none of ours.
_START = b'{"video": '


class ResultFile:
    """Appends results to a file; a context manager.

    Args:
        path: The file.
        run: What a result depends on but for its video, as plain JSON values.
        resume: Go on with a file that is there.
        overwrite: Replace one.

    Attributes:
        done: Results that the file already had, by video, each with whether it failed.

    Raises:
        typer.BadParameter: If the file is there and neither was asked for, or both were; or
            if it cannot be made.
        ResultFileError: If it is not a file of results, is another run's, or is being written.
    """

    def __init__(
        self, path: Path, run: dict[str, Any], *, resume: bool = False, overwrite: bool = False
    ) -> None:
        if resume and overwrite:
            raise usage_error("--resume and --overwrite were both given; choose one.")
        if path.is_dir():
            raise usage_error(f"{path} is a folder; give the name of a file in it.")
        self.path = path
        self.done: dict[str, bool] = {}
        self._run = run
        self._is_locked = False
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        if not (resume or overwrite):
            flags |= os.O_EXCL
        try:
            self._file = os.open(path, flags, 0o666)
        except FileExistsError as exc:
            raise usage_error(
                f"{path} exists; add --resume to go on with it, or --overwrite to replace it."
            ) from exc
        except OSError as exc:
            raise usage_error(
                f"{path} cannot be written ({exc.strerror}); give another name."
            ) from exc
        try:
            self._lock()
            if overwrite:
                os.ftruncate(self._file, 0)
            self._read_done()
        except BaseException:
            self.close()
            raise

    def add(self, result: dict[str, Any]) -> None:
        """Append a result, all of it or nothing.

        Args:
            result: Starts with the key `video`; an `error` says that the video failed.

        Raises:
            ResultFileError: If it cannot be written.
        """
        line = json.dumps({**result, "run": self._run}, ensure_ascii=False, allow_nan=False)
        content = line.encode("utf-8", errors="surrogateescape") + b"\n"
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, content)
            if written < len(content):
                os.write(self._file, content[written:])  # says why it stopped
        except OSError as exc:
            os.ftruncate(self._file, size)
            raise ResultFileError(
                f"{self.path} cannot be written any more ({exc.strerror}); make room, then repeat "
                "the command with --resume."
            ) from exc
        self.done[str(result["video"])] = "error" in result

    def num_failed(self, videos: Iterable[Path]) -> int:
        """How many of some videos are in the file as failed."""
        return sum(self.done.get(str(video), False) for video in videos)

    def close(self) -> None:
        """Let go of the file, and remove an empty one; a second call does nothing."""
        if self._file >= 0:
            if self._is_locked and not os.fstat(self._file).st_size:
                self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._is_locked = True
        except BlockingIOError as exc:
            raise ResultFileError(
                f"{self.path} is being written by another run; wait for it, or give another file."
            ) from exc

    def _read_done(self) -> None:
        """Read what is there; drops a last line that was never finished."""
        size = 0
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    if not line.startswith(_START) and not _START.startswith(line):
                        raise self._not_results(number)
                    break
                self._read_line(number, line)
                size += len(line)
        os.ftruncate(self._file, size)

    def _read_line(self, number: int, line: bytes) -> None:
        try:
            result = json.loads(line.decode("utf-8", errors="surrogateescape"))
            video, run = result["video"], result["run"]
        except (ValueError, KeyError, TypeError) as exc:
            raise self._not_results(number) from exc
        if not isinstance(video, str) or not isinstance(run, dict):
            raise self._not_results(number)
        if run != self._run:
            raise ResultFileError(
                f"{self.path} was written by another run: line {number} has "
                f"{_first_difference(run, self._run)}; repeat the command as it was, or give "
                "another file."
            )
        self.done[video] = "error" in result

    def _not_results(self, number: int) -> ResultFileError:
        return ResultFileError(
            f"Line {number} of {self.path} is no result of `actionclip predict --output`; give "
            "the file of an interrupted run, or another name."
        )


def _first_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    for key in sorted({*theirs, *ours}):
        if theirs.get(key) != ours.get(key):
            return f"{key} {theirs.get(key)!r} and this run has {ours.get(key)!r}"
    return "other options"
