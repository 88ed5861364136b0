"""`actionclip predict`: rank labels for videos."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli.options import (
    READING,
    RESULTS,
    SCORES,
    BundlePath,
    JsonOption,
    LabelOptions,
    MethodOption,
    NoVerifyOption,
    OverwriteOption,
    PlotOption,
    RecursiveOption,
    RunOptions,
    TopKOption,
    ViewsOption,
    WorkersOption,
)
from actionclip_deploy.cli.output import (
    EXIT_SOME_FAILED,
    check_suffix,
    find_videos,
    report_videos,
    results,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.errors import ResultFileError, VideoWarning
from actionclip_deploy.files import sha256_of, try_lock
from actionclip_deploy.preprocess import Region
from actionclip_deploy.recognizer import Prediction, Recognizer
from actionclip_deploy.records import RECORD_SCHEMA_VERSION, RunRecord, VideoRecord, json_text
from actionclip_deploy.runtimes.machine import check_num_threads
from actionclip_deploy.sampling import Views
from actionclip_deploy.video import MAX_PIXELS, Decoder

# What every line starts with; a last line without its end that does not is not ours.
_START = b'{"video": '


def predict(
    bundle: BundlePath,
    videos: Annotated[
        list[Path],
        typer.Argument(metavar="VIDEO...", help="Video files, and folders of video files."),
    ],
    labels: LabelOptions,
    running: RunOptions,
    top_k: TopKOption = 5,
    views: ViewsOption = "1x1",
    method: MethodOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.jsonl",
            help="Append each video's result to a file, a line each, that a run can resume from.",
        ),
    ] = None,
    as_json: JsonOption = False,
    region: Annotated[
        Region,
        typer.Option(
            "--resize",
            metavar="frame|crop",
            help="frame (exact), or crop: resize only what the crop keeps.",
            rich_help_panel=SCORES,
        ),
    ] = "frame",
    decoder: Annotated[
        Decoder,
        typer.Option(
            "--decoder",
            metavar="NAME",
            help="What decodes: software, or nvdec of an NVIDIA GPU.",
            rich_help_panel=READING,
        ),
    ] = "software",
    max_pixels: Annotated[
        int,
        typer.Option(
            "--max-pixels",
            min=1,
            metavar="N",
            help="Most pixels of a frame; a video with more fails.",
            rich_help_panel=READING,
        ),
    ] = MAX_PIXELS,
    workers: WorkersOption = None,
    recursive: RecursiveOption = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with --output where a run was interrupted.",
            rich_help_panel=RESULTS,
        ),
    ] = False,
    overwrite: OverwriteOption = False,
    plot: PlotOption = None,
    no_verify: NoVerifyOption = False,
) -> None:
    """Rank labels for videos: those of a label bank, of a file, or given one by one.

    Labels that are not in a bank are embedded once and kept in the cache. A name that is both a
    bank's and a file's is the bank's; ./NAME is the file's.

    A video that fails is reported in its place and the others go on; the exit code is then 3.
    With --json, one object per video is printed, each on a line of its own. Of a folder, the
    files with the suffix of a video are scored, sorted by name.

    Example:
        actionclip predict bundle video.mp4 --label "archery" --label "bowling"
        actionclip predict bundle videos/ --labels labels.csv -o results.jsonl
    """
    if output is None and (resume or overwrite):
        raise usage_error("--resume and --overwrite are about --output, which was not given.")
    if plot is not None:
        # Before the work, so that a missing package or folder is not found out after it.
        from actionclip_deploy.cli.plot import check_plot_path

        check_plot_path(plot)
    check_suffix("--output", output, ".jsonl", ".ndjson", ".json")
    opened = Bundle.open(bundle, verify=not no_verify)
    labels.sentences()  # what is wrong with them is told before a model is loaded
    chosen = labels.choose(opened)
    found = find_videos(videos, recursive=recursive)
    check_num_threads("workers", workers)
    asked = Views.parse(views)
    drawn: list[Prediction] | None = None if plot is None else []
    with running.open(opened) as runtime:
        bank = labels.bank(opened, runtime, chosen, quiet=as_json)
        with wrong_arguments_are_usage_errors():
            recognizer = Recognizer(
                runtime,
                bank,
                views=asked,
                top_k=top_k,
                method=method,
                region=region,
                decoder=decoder,
                max_pixels=max_pixels,
            )
        if output is None:
            records = _predict_all(recognizer, found, workers, drawn)
            with closing(records):
                num_failed = report_videos(
                    records,
                    num_videos=len(found),
                    as_json=as_json,
                    tell=lambda num: (
                        f"{num} of {len(found)} videos were scored; with --output "
                        "FILE.jsonl results are kept, and --resume goes on."
                    ),
                )
        else:
            run = _describe_run(opened, recognizer)
            with ResultFile(output, run, resume=resume, overwrite=overwrite) as file:
                todo = [video for video in found if str(video) not in file.done]
                records = _predict_all(recognizer, todo, workers, drawn)
                with closing(records):
                    num_done = len(found) - len(todo)
                    report_videos(
                        map(file.add, records),
                        num_videos=len(found),
                        num_done=num_done,
                        as_json=as_json,
                        shows_table=False,
                        tell=lambda _: _tell_kept(
                            sum(str(video) in file.done for video in found),
                            len(found),
                            output,
                            overwrite=overwrite,
                        ),
                    )
                num_failed = file.num_failed(found)
            if not as_json:
                results.print(
                    f"{len(found) - num_failed} of {len(found)} videos scored, {num_failed} failed "
                    f"({num_done} were done before); results are in {escape(str(output))}."
                )
    if plot is not None and drawn:
        from actionclip_deploy.cli.plot import plot_predictions

        plot_predictions(drawn, plot)
    if num_failed:
        raise typer.Exit(EXIT_SOME_FAILED)


def _tell_kept(num_kept: int, num_videos: int, output: Path, *, overwrite: bool) -> str:
    if not num_kept:
        return "no video was done yet; repeat the command."
    how = "--resume in the place of --overwrite" if overwrite else "--resume"
    return (
        f"{num_kept} of {num_videos} videos are done, with their results in {output}; the same "
        f"command with {how} goes on."
    )


def _predict_all(
    recognizer: Recognizer,
    videos: Sequence[Path],
    num_workers: int | None,
    drawn: list[Prediction] | None,
) -> Generator[VideoRecord, None, None]:
    """Score videos; warnings about one are in its record. Keeps predictions that are drawn."""
    with closing(recognizer.predict_all(videos, num_workers=num_workers)) as outcomes:
        while True:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", VideoWarning)
                outcome = next(outcomes, None)
            if outcome is None:
                return
            if drawn is not None and isinstance(outcome, Prediction):
                drawn.append(outcome)
            damage = [str(warning.message) for warning in caught]
            yield recognizer.record(outcome, damage=damage)


def _describe_run(bundle: Bundle, recognizer: Recognizer) -> RunRecord:
    """All that a result depends on but for its video and the versions of libraries."""
    bank, info = recognizer.bank, recognizer.runtime.describe()
    manifest = (bundle.path / "manifest.json").read_bytes()
    return RunRecord(
        bundle_sha256=sha256_of(manifest),
        bank=None if bank.is_adhoc else bank.name,
        bank_sha256=bank.sha256,
        views=str(recognizer.views),
        scores=recognizer.method,
        resize=recognizer.region,
        top_k=recognizer.top_k,
        decoder=recognizer.decoder,
        runtime=info.name,
        execution_provider=info.execution_provider,
        precision=info.precision,
    )


# A file of results, one JSON object a line, that a run can be resumed from.
#
# Each line is written by one call and names the run that it belongs to: the bundle, the labels and
# every option that changes a result. A run that was killed leaves at most one line without its end.


class ResultFile:
    """Appends results to a file; a context manager.

    Args:
        path: The file.
        run: What a result depends on but for its video.
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
        self, path: Path, run: RunRecord, *, resume: bool = False, overwrite: bool = False
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

    def add(self, record: VideoRecord) -> VideoRecord:
        """Append a record, all of it or nothing, and give it back.

        Raises:
            ResultFileError: If it cannot be written.
        """
        result = record.model_copy(update={"run": self._run}).to_dict()
        content = json_text(result).encode() + b"\n"
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
        self.done[record.video] = record.error is not None
        return record

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

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        self._is_locked = try_lock(self._file)
        if not self._is_locked:
            raise ResultFileError(
                f"{self.path} is being written by another run; wait for it, or give another file."
            )

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
            # Older versions wrote the bytes of a name as they are.
            result = json.loads(line.decode("utf-8", errors="surrogateescape"))
            video, run = result["video"], result["run"]
        except (ValueError, KeyError, TypeError) as exc:
            raise self._not_results(number) from exc
        if not isinstance(video, str) or not isinstance(run, dict):
            raise self._not_results(number)
        if result.get("schema_version") != RECORD_SCHEMA_VERSION:
            raise ResultFileError(
                f"{self.path} was written by another version of actionclip-deploy: the record in "
                f"line {number} has another form. Finish the run with that version, or give "
                "another file."
            )
        if run != self._run.to_dict():
            raise ResultFileError(
                f"{self.path} was written by another run: line {number} has "
                f"{_first_difference(run, self._run.to_dict())}; repeat the command as it was, or "
                "give another file."
            )
        self.done[video] = result.get("error") is not None

    def _not_results(self, number: int) -> ResultFileError:
        return ResultFileError(
            f"Line {number} of {self.path} is not a result of `actionclip predict --output`; give "
            "the file of an interrupted run, or another name."
        )


def _first_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    for key in sorted({*theirs, *ours}):
        if theirs.get(key) != ours.get(key):
            return f"{key} {theirs.get(key)!r} and this run has {ours.get(key)!r}"
    return "other options"
