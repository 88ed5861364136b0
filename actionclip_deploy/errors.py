"""The errors that this package raises.

Every message has three parts in one or two sentences: what was given, what was expected, and
what to do now. A wrong argument of a function is a `ValueError`: an `ArgumentError` where it is
about one argument alone, so that the command line can speak of the option instead.

    ActionClipError
    ├── ShapeError (ValueError)         an array of a wrong shape or dtype
    ├── WrongKindError (TypeError)      an argument of a kind that is not taken
    ├── VideoError                      a video that gives no frames
    │   ├── FramesChangedError          frames that turned out to be others than was thought
    │   ├── FrameSizeError              frames of more pixels than is allowed
    │   └── VideoMemoryError            a video for which this machine had no memory left
    ├── LabelError (ValueError)         a label or annotation file, or a prompt, that cannot be used
    │   ├── SearchTextError             what is looked for is no text, or is to be left out too
    │   └── UnknownWordsError           labels in words that the model was never trained on
    ├── CheckpointError                 a checkpoint that cannot be read, or not as what it claims
    ├── BundleError                     a bundle that cannot be opened
    │   ├── IntegrityError              a file of it that is missing, altered or outside of it
    │   └── LabelBankError              a label bank that is missing, altered or of other weights
    │       └── LabelChoiceError        labels that are neither a bank, a file nor a list
    ├── ArchiveError                    an archive that cannot be read, or is of another model
    │   └── ArchiveChoiceError          a camera or a time of a video that it does not have
    │       └── UnknownVideoError       a name that none of its videos has, or several
    ├── TrainingError                   a training run that cannot start or go on as asked
    ├── ExportError                     a model that cannot be exported
    ├── ParityError                     outputs that disagree with the reference; holds the report
    ├── DecoderUnavailableError         a decoder of videos that cannot be used here
    ├── RuntimeUnavailableError         a runtime or execution provider that cannot be used here
    ├── EngineError                     an engine that cannot be built, or is not to be trusted
    ├── InferenceError                  a runtime that failed while it ran
    ├── FileWriteError (OSError)        a file or folder that cannot be written
    ├── DamagedFileError                a file of ours that is missing or not what was written
    ├── ResultFileError                 a file of results that cannot be written or gone on with
    ├── ClusterError                    a cluster that cannot be reached, or fails again and again
    ├── VideoListError                  a list, folder or storage that gives no videos
    ├── RequestRefusedError             a request that a server does not do, with its status
    ├── SinkError                       an event that cannot be delivered
    ├── BenchmarkError                  a benchmark that cannot be run, a report that cannot be read
    └── MissingExtraError (ImportError) an optional dependency that is not installed

A video that is damaged but gives some frames is no error: it gives a `VideoWarning`. A label of
which the model knows some words, or a bank of a version that did not look whether the text encoder
was altered, gives a `LabelWarning`, events of labels whose thresholds are guesses a
`ThresholdWarning`, and what is left out of a folder of annotated videos an `AnnotationWarning`.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from actionclip_deploy.installation import install_command

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any


class ActionClipError(Exception):
    """Base of every error that this package raises on purpose."""


class ArgumentError(ValueError):
    """An argument has a value that is not allowed.

    Args:
        argument: Its name in Python, with which the message begins.
        problem: The rest of the message, such as "is 0; it must be 1 or more."

    Attributes:
        argument: As given.
        problem: As given.
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(argument, problem)
        self.argument = argument
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.argument} {self.problem}"


class ShapeError(ActionClipError, ValueError):
    """An array has a shape or dtype other than the one that was asked for."""


class WrongKindError(ActionClipError, TypeError):
    """An argument is of a kind that is not taken; the message says what to pass."""


class VideoError(ActionClipError):
    """No frame can be had from a file: missing, empty, not a video, or damaged beyond use."""


class FramesChangedError(VideoError):
    """Damage was found while frames were given one by one; those given are not to be relied on."""


class FrameSizeError(VideoError):
    """The frames of a video have more pixels than the reader may decode."""


class VideoMemoryError(VideoError):
    """Memory ran out while a video was decoded; another try may succeed."""

    @classmethod
    def of(cls, path: Path | str) -> VideoMemoryError:
        """The error of a file, or of a source by what may be shown of its address."""
        return cls(
            f"Memory ran out while {path} was decoded, which says nothing about the file; free "
            "some, or decode fewer videos at a time."
        )


class VideoWarning(UserWarning):
    """A video is damaged; the frames that could be decoded were used."""


class LabelError(ActionClipError, ValueError):
    """A file of labels, templates or annotations, or a prompt, cannot be used; names the line."""


class UnknownWordsError(LabelError):
    """A model of a small vocabulary knows no word of a label, or none that tells two apart."""


class LabelWarning(UserWarning):
    """Labels to be careful with: of words that the model does not know, or of an old bank."""


class ThresholdWarning(UserWarning):
    """Events open at a score that nobody has found on labelled videos."""


class AnnotationWarning(UserWarning):
    """Something in a folder of annotated videos is no video of a label, and is left out."""


class SearchTextError(LabelError, ArgumentError):
    """What is looked for, or what must not be shown, is no text, or the two are the same."""


class CheckpointError(ActionClipError):
    """A checkpoint cannot be read, or its tensors are not those of the model it claims to be."""


class BundleError(ActionClipError):
    """A bundle cannot be opened or written."""


class IntegrityError(BundleError):
    """A file of a bundle is missing, altered, or lies outside of the bundle."""


class LabelBankError(BundleError):
    """A label bank is missing, altered, or was made by other weights than the bundle's."""


class LabelChoiceError(LabelBankError, ArgumentError):
    """What was given as labels is neither a bank, a file nor a list, or nothing was and it must."""


class ArchiveError(ActionClipError):
    """An archive cannot be read, is being written by another, or is of another model."""


class ArchiveChoiceError(ArchiveError, ArgumentError):
    """An argument names what an archive does not have, such as a camera or a time of a video."""


class UnknownVideoError(ArchiveChoiceError):
    """An archive has no video of a name, or several."""


class TrainingError(ActionClipError):
    """A training run cannot start or go on as it was asked."""


class ExportError(ActionClipError):
    """A model cannot be exported as it was asked."""


class ParityError(ActionClipError):
    """Outputs disagree with the reference by more than the tolerance.

    Attributes:
        report: The measurements, as `actionclip_deploy.runtimes.parity.ParityReport`.
    """

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class DecoderUnavailableError(ActionClipError):
    """A decoder of videos, such as a GPU's, cannot be used on this machine."""


class RuntimeUnavailableError(ActionClipError):
    """A runtime or execution provider cannot be used on this machine."""


class EngineError(ActionClipError):
    """An engine cannot be built, is missing, or is not what was asked for."""


class InferenceError(ActionClipError):
    """A runtime failed while it executed a graph."""


class FileWriteError(ActionClipError, OSError):
    """A file or folder cannot be written; what was there before is there still.

    Made and pickled as an `OSError`: of its number, its reason and the path.
    """

    def __str__(self) -> str:
        full = self.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "make room there or choose another place" if full else "choose another place"
        return f"{self.filename} cannot be written ({self.strerror}); {advice}."


class DamagedFileError(ActionClipError):
    """A file that we wrote is missing, or is not what was written."""


class ResultFileError(ActionClipError):
    """A file of results cannot be written, or a run cannot go on with it."""


class ClusterError(ActionClipError):
    """A cluster of machines cannot be reached, or fails again and again."""


class VideoListError(ActionClipError):
    """A list of videos, a folder or a place in storage gives no videos, or cannot be read."""


class RequestRefusedError(ActionClipError):
    """A server does not do a request; raised in the server and again by its client.

    Attributes:
        status: Of HTTP.
        code: A word for programs, such as `queue_full`.
        retry_after_seconds: When to try again; None where that is of no use.
        request_id: Under which the server's log has it; None in the server.
        limit: Of a video that decoding gave up: `time`, `memory`, or `crash` where the process
            ended; None otherwise. Not told to clients.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str,
        retry_after_seconds: float | None = None,
        request_id: str | None = None,
        limit: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_seconds = retry_after_seconds
        self.request_id = request_id
        self.limit = limit


class SinkError(ActionClipError):
    """An event cannot be delivered.

    Attributes:
        is_final: Whether another try would be of no use.
        retry_after_seconds: When to try again, where the receiver says it.
    """

    def __init__(
        self,
        message: str,
        *,
        is_final: bool = False,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.is_final = is_final
        self.retry_after_seconds = retry_after_seconds


class BenchmarkError(ActionClipError):
    """A benchmark cannot be run as asked, or a report of one cannot be read or written."""


class MissingExtraError(ActionClipError, ImportError):
    """An optional dependency is not installed.

    Args:
        what: What was asked for, as a noun phrase.
        extra: The extra of this package that brings the dependency.
    """

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs packages that are not installed; run: {install_command(extra)}"
        )
        self.extra = extra
