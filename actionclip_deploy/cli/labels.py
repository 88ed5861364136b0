"""`actionclip labels`: build, list, compare and calibrate label banks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from errno import EACCES, EPERM, EROFS
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from actionclip_deploy.bundle import BANK_RECORD_NAME, Bundle, check_replaceable
from actionclip_deploy.calibration import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    UNKNOWN,
    Calibration,
    calibrate,
)
from actionclip_deploy.cli.evaluate import evaluate_with_progress
from actionclip_deploy.cli.options import (
    RUNNING,
    SCORES,
    AnnotationOptions,
    BundlePath,
    DeviceOptions,
    JsonOption,
    LabelOptions,
    MaxPixelsOption,
    MethodOption,
    OverwriteOption,
    RunOptions,
    ViewsOption,
    use_device,
)
from actionclip_deploy.cli.output import (
    EXIT_SOME_FAILED,
    notes,
    print_json,
    print_sections,
    print_warning,
    progress_bar,
    results,
    tells_when_interrupted,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.cli.verb import VerbApp
from actionclip_deploy.command_records import (
    BuiltBankRecord,
    CalibratedBankRecord,
    CalibrationRecord,
    LabelBankDescription,
)
from actionclip_deploy.errors import FileWriteError, LabelBankError
from actionclip_deploy.evaluate.annotations import Sample
from actionclip_deploy.evaluate.evaluate import Evaluation
from actionclip_deploy.known_words import describe_unknown_words
from actionclip_deploy.labels import (
    LabelBank,
    describe_query,
    diff_label_banks,
    labels_among,
    list_label_banks,
    read_bank_record,
    remove_label_bank,
    rename_label_bank,
)
from actionclip_deploy.prompts import match_texts, split_labels
from actionclip_deploy.recognizer import Recognizer
from actionclip_deploy.records import counted, printable
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.sampling import Views
from actionclip_deploy.video import MAX_PIXELS

labels_app = VerbApp(
    help="""Label banks: build, list, show, diff, calibrate, rename, remove.

Example:
    actionclip labels build bundle --labels labels.csv --name mine
"""
)

_PLAIN: dict[str, Any] = {"highlight": False, "markup": False}

# Of fewer, one video moves the share that is kept by more than a point.
_FEW_VIDEOS = 100
_TEXT_RUNTIMES = ("onnxruntime", "openvino")


@labels_app.command()
def build(
    bundle: BundlePath,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Name of the new bank.")],
    labels: LabelOptions,
    where: DeviceOptions,
    runtime_name: Annotated[
        str,
        typer.Option(
            "--runtime",
            metavar="NAME",
            help="What runs the text encoder: onnxruntime or openvino. Not auto, since a bank "
            "serves all runtimes.",
            rich_help_panel=RUNNING,
        ),
    ] = "onnxruntime",
    split: Annotated[
        bool,
        typer.Option(
            "--split-labels",
            help="Read ApplyEyeMakeup as 'apply eye makeup'; published scores are without it.",
            rich_help_panel=SCORES,
        ),
    ] = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Embed a set of labels and store it in the bundle under a name.

    A bank serves every runtime, so that it is made in fp32 on any of them, by default on ONNX
    Runtime. Labels of which a model of a small vocabulary knows no word are refused.

    Example:
        actionclip labels build bundle --labels labels.csv --name mine
    """
    if runtime_name not in _TEXT_RUNTIMES:
        raise usage_error(
            f"--runtime is {runtime_name!r}; banks are made by {' or '.join(_TEXT_RUNTIMES)}."
        )
    opened = Bundle.open(bundle)
    names = _given_names(opened, labels)
    if split:
        names = split_labels(names)
    chosen = labels.sentences()
    with wrong_arguments_are_usage_errors():
        target = opened.label_bank_path(name)
        before = opened.label_bank_state(name)
        check_replaceable(target, overwrite=overwrite, marker=BANK_RECORD_NAME)
    num_done, num_prompts = 0, len(names) * len(chosen or opened.manifest.templates)

    def tell() -> str:
        if opened.label_bank_state(name) != before:
            return f"the bank is whole, in {target}; `actionclip labels show` has what it holds."
        return (
            f"{num_done} of {num_prompts} prompts were embedded and the bundle is as it was; "
            "repeat the command, with --device cuda if there is a GPU."
        )

    with tells_when_interrupted(tell):
        with wrong_arguments_are_usage_errors():
            runtime = open_runtime(
                opened,
                runtime_name,
                device=use_device(where.device),
                execution_provider=where.execution_provider,
                num_threads=where.num_threads,
            )
        with runtime, progress_bar(quiet=as_json) as bar:
            task = bar.add_task("Embedding prompts", total=num_prompts)

            def on_progress(done: int, _: int) -> None:
                nonlocal num_done
                num_done = done
                bar.update(task, completed=done)

            bank = LabelBank.build(
                opened,
                runtime,
                names,
                name=name,
                templates=chosen,
                progress=on_progress,
                allow_unknown_words=labels.allow_unknown_words,
            )
        bank.save(opened, overwrite=overwrite, expected=before)
    words = bank.unknown_words
    if words:
        print_warning(describe_unknown_words(words))
    if as_json:
        said: dict[str, Any] = {} if words is None else {"unknown_words": words}
        print_json(
            BuiltBankRecord(
                name=name,
                path=str(target),
                num_labels=len(bank.labels),
                num_templates=len(bank.templates),
                **said,
            )
        )
        return
    results.print(
        f"Built {name}: {counted(len(bank.labels), 'label')} x "
        f"{counted(len(bank.templates), 'template')}, {target}",
        highlight=False,
    )


def _given_names(bundle: Bundle, options: LabelOptions) -> Sequence[str]:
    """The labels for a new bank: of a file, of another bank, or those given one by one."""
    texts = options.texts()
    if texts is not None:
        return texts
    if options.labels is None:
        raise usage_error("Give the labels of the new bank, with --labels or --label.")
    names = bundle.label_bank_names()
    found = labels_among(names, options.labels, owner=str(bundle.path))
    if isinstance(found, str):
        found = LabelBank.load(bundle, found, calibrated=False)
    return found.labels if isinstance(found, LabelBank) else found


@labels_app.command("list")
def list_(bundle: BundlePath, as_json: JsonOption = False) -> None:
    """List the label banks of a bundle.

    Example:
        actionclip labels list bundle
    """
    banks = list_label_banks(Bundle.open(bundle))
    if as_json:
        print_json(list(banks))
        return
    if not banks:
        notes.print(
            f"{bundle} has no label bank; build one with `actionclip labels build`.",
            highlight=False,
        )
        return
    table = Table()
    for heading in ("name", "labels", "templates", "kind", "problem"):
        table.add_column(heading)
    for bank in banks:
        counts = ("" if n is None else str(n) for n in (bank.num_labels, bank.num_templates))
        kind = "calibrated" if bank.is_calibrated else "labels"
        kind = "saved query" if bank.is_saved_query else kind
        table.add_row(
            bank.name, *counts, kind if bank.num_labels else "", escape(bank.problem or "")
        )
    results.print(table)


@labels_app.command()
def diff(
    bundle: BundlePath,
    old: Annotated[str, typer.Argument(metavar="OLD", help="Name of a label bank.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Name of another one.")],
    as_json: JsonOption = False,
) -> None:
    """Show which labels and templates only one of two banks has.

    Example:
        actionclip labels diff bundle old new
    """
    opened = Bundle.open(bundle)
    difference = diff_label_banks(LabelBank.load(opened, old), LabelBank.load(opened, new))
    if as_json:
        print_json(difference)
        return
    data = difference.to_dict()
    if not any(data.values()):
        results.print(f"{old} and {new} hold the same labels and templates.", **_PLAIN)
        return
    added, removed, moved, new_templates, old_templates = map(len, data.values())
    results.print(
        f"Labels: {added} added, {removed} removed, {moved} moved. "
        f"Templates: {new_templates} added, {old_templates} removed.",
        **_PLAIN,
    )
    for what, values in data.items():
        for value in values:
            results.print(f"{what.replace('_', ' ')}: {_change(value)}", **_PLAIN)


def _change(value: Any) -> str:
    if isinstance(value, str):
        return value
    label, old_id, new_id = value
    return f"{label}, from {old_id} to {new_id}"


@labels_app.command()
def show(
    bundle: BundlePath,
    name: Annotated[str, typer.Argument(metavar="BANK", help="Name of the label bank.")],
    as_json: JsonOption = False,
) -> None:
    """Show a label bank: labels with their ids, templates, hashes, calibration, warnings.

    Example:
        actionclip labels show bundle mine
    """
    found = _describe(Bundle.open(bundle), name)
    if as_json:
        print_json(found)
        return
    for warning in found.warnings:
        print_warning(warning)
    print_sections({f"label bank {found.name}": _facts(found)})
    for title, texts in (("templates", found.templates), ("labels", found.labels)):
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column(justify="right")
        table.add_column(overflow="fold")
        for number, text in enumerate(texts):
            table.add_row(str(number), escape(printable(text, kept="")))
        results.print(table)


def _describe(bundle: Bundle, name: str) -> LabelBankDescription:
    record = read_bank_record(bundle, name)
    warnings, sha256, words = [], None, None
    try:
        bank = LabelBank.load(bundle, name)
    except LabelBankError as exc:
        warnings.append(str(exc))
    else:
        sha256, words = bank.sha256, bank.unknown_words
        if words:
            warnings.append(describe_unknown_words(words))
    said: dict[str, Any] = {} if words is None else {"unknown_words": words}
    fitted = record.calibration
    return LabelBankDescription(
        name=name,
        path=str(bundle.label_bank_path(name)),
        num_labels=len(record.labels),
        num_templates=len(record.templates),
        sha256=sha256,
        textual_sha256=record.textual_sha256,
        calibration=None if fitted is None else CalibrationRecord.model_validate(fitted),
        query=None if record.query is None else describe_query(record),
        labels=record.labels,
        templates=record.templates,
        warnings=tuple(warnings),
        **said,
    )


def _were(number: int, noun: str) -> str:
    return f"{counted(number, noun)} {'was' if number == 1 else 'were'}"


def _facts(found: LabelBankDescription) -> dict[str, Any]:
    """What stands in the first table."""
    fitted = found.calibration
    calibration = "none: a video is never unknown"
    if found.query is not None:
        calibration = "none needed: a video is unknown below the query's threshold, a score of 0.5"
    if fitted is not None:
        calibration = (
            f"temperature {fitted.temperature:.4f}, unknown below {fitted.threshold:.4f}; for "
            f"{fitted.method}, fitted with {fitted.views} views on {fitted.num_known} known and "
            f"{counted(fitted.num_unknown, 'unknown video')}"
        )
    saved: dict[str, Any] = {}
    if found.query is not None:
        saved["saved query"] = (
            f"{found.query.text!r} is told of from z {found.query.threshold_z:.2f} on (cosine "
            f"{found.query.threshold_cosine:.4f}), of "
            f"{counted(found.query.num_windows, 'window')}; "
            f"{_were(found.query.num_accepted, 'moment')} accepted"
        )
    return {
        **saved,
        "labels": found.num_labels,
        "templates": found.num_templates,
        "folder": found.path,
        "sha256": found.sha256 or "none: it is refused",
        "sha256 of its text encoder": found.textual_sha256,
        "calibration": calibration,
    }


@labels_app.command()
def remove(
    bundle: BundlePath,
    name: Annotated[str, typer.Argument(metavar="BANK", help="Name of the label bank.")],
) -> None:
    """Remove a label bank from its bundle.

    Example:
        actionclip labels remove bundle mine
    """
    opened = Bundle.open(bundle)
    if name not in opened.label_bank_names():
        there = ", ".join(opened.label_bank_names()) or "none"
        raise LabelBankError(
            f"{bundle} has no label bank {name!r} (it has: {there}), so nothing was removed."
        )
    with _told_if_read_only(bundle):
        remove_label_bank(opened, name)
    results.print(f"Removed the label bank {name} from {bundle}.", **_PLAIN)


@labels_app.command()
def rename(
    bundle: BundlePath,
    old: Annotated[str, typer.Argument(metavar="OLD", help="Name of the label bank.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Its new name.")],
    overwrite: OverwriteOption = False,
) -> None:
    """Give a label bank another name; its labels, embeddings and calibration stay.

    Example:
        actionclip labels rename bundle mine doors
    """
    opened = Bundle.open(bundle)
    is_replaced = new in opened.label_bank_names()
    with wrong_arguments_are_usage_errors(), _told_if_read_only(bundle):
        rename_label_bank(opened, old, new, overwrite=overwrite)
    what = f", and replaced the one that was {new}" if is_replaced else ""
    results.print(f"Renamed the label bank {old} of {bundle} to {new}{what}.", **_PLAIN)


@contextmanager
def _told_if_read_only(bundle: Path) -> Iterator[None]:
    """Say what helps where a folder of the bundle cannot be changed: not another place."""
    try:
        yield
    except (FileWriteError, LabelBankError) as exc:
        cause = exc if isinstance(exc, FileWriteError) else exc.__cause__
        if isinstance(cause, FileWriteError) and cause.errno in (EACCES, EPERM, EROFS):
            raise LabelBankError(
                f"{bundle} cannot be changed ({cause.strerror}), so nothing was done; change its "
                "permissions, or work on a copy of the bundle."
            ) from exc
        raise


@labels_app.command("calibrate")
def calibrate_bank(
    bundle: BundlePath,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Name of the label bank.")],
    annotations: Annotated[
        Path,
        typer.Option(
            "--annotations",
            metavar="LIST",
            help="Videos that the model was not trained on: a list, or the folder of a split.",
        ),
    ],
    running: RunOptions,
    annotated: AnnotationOptions,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            metavar="NAME|FILE",
            help="Labels of the list, if other than the bank's: another bank's name, or a file; "
            "those that the bank lacks are unknown.",
        ),
    ] = None,
    target_kept: Annotated[
        float,
        typer.Option("--keep", metavar="SHARE", help="Share of the known videos to keep."),
    ] = 0.95,
    views: ViewsOption = "1x1",
    method: MethodOption = None,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    as_json: JsonOption = False,
) -> None:
    """Learn when a video shows none of a bank's labels, and store that with the bank.

    This fits a temperature, so that scores say how often they are right, and a threshold below
    which a video is "unknown". Videos that fail are left out; the exit code is then 3.

    Example:
        actionclip labels calibrate bundle --name mine --annotations held-out.txt
    """
    opened = Bundle.open(bundle)
    with wrong_arguments_are_usage_errors():
        before = opened.label_bank_state(name)
        bank = LabelBank.load(opened, name, calibrated=False)
        if read_bank_record(opened, name).query is not None:
            raise usage_error(
                f"The label bank {name!r} is a saved query, whose threshold `actionclip search "
                "ARCHIVE TEXT --save NAME --accept RANK` chooses; calibrate another bank."
            )
        parsed_views = Views.parse(views)
        names = bank.labels if labels is None else _given_names(opened, LabelOptions(labels))
        samples = annotated.read(annotations, names)
        _check_samples(samples, names, bank, target_kept)
        chosen = method or opened.manifest.scores.method
        if chosen == "independent":
            raise usage_error(
                "Scores that are independent cannot be calibrated; choose --scores "
                "template-softmax or mean-embedding."
            )
    # A sample whose label the bank lacks has none.
    ids = match_texts(names, bank.labels)
    found = [ids[sample.label_ids[0]] for sample in samples]
    known = [
        replace(sample, label_ids=() if label_id is None else (label_id,))
        for sample, label_id in zip(samples, found, strict=True)
    ]
    with running.open(opened) as runtime:
        recognizer = Recognizer(
            runtime,
            bank,
            views=parsed_views,
            top_k=1,
            method=chosen,
            max_pixels=max_pixels,
        )
        evaluation = evaluate_with_progress(recognizer, known, quiet=as_json)
    with wrong_arguments_are_usage_errors():
        calibration = calibrate(
            evaluation.scores,
            _label_ids(evaluation),
            method=chosen,
            views=str(parsed_views),
            visual_sha256=opened.visual_sha256,
            target_kept=target_kept,
        )
    calibrated = replace(bank, calibration=calibration)
    calibrated.save(opened, overwrite=True, expected=before)
    _report(evaluation, calibrated, calibration, as_json=as_json)
    if evaluation.failed:
        raise typer.Exit(EXIT_SOME_FAILED)


def _check_samples(
    samples: Sequence[Sample], names: Sequence[str], bank: LabelBank, target_kept: float
) -> None:
    """What `calibrate` would refuse is refused before the videos are decoded."""
    if not 0.0 < target_kept <= 1.0:
        raise usage_error(f"--keep is {target_kept}; it must be above 0 and at most 1.")
    if any(len(sample.label_ids) != 1 for sample in samples):
        raise usage_error(
            "Some videos of the list have several labels or none; give videos of one label each."
        )
    ids = match_texts(names, bank.labels)
    if all(ids[sample.label_ids[0]] is None for sample in samples):
        raise usage_error(
            f"None of the videos shows a label of the bank {bank.name!r}; give some that do."
        )


def _label_ids(evaluation: Evaluation) -> Any:
    ids = (sample.label_ids[0] if sample.label_ids else UNKNOWN for sample in evaluation.samples)
    return np.fromiter(ids, np.int64, len(evaluation.samples))


def _report(
    evaluation: Evaluation, bank: LabelBank, calibration: Calibration, *, as_json: bool
) -> None:
    if calibration.num_known < _FEW_VIDEOS:
        print_warning(
            f"{calibration.num_known} known videos are few: other videos will be kept in other "
            f"shares; give {_FEW_VIDEOS} or more."
        )
    if calibration.temperature in (MIN_TEMPERATURE, MAX_TEMPERATURE):
        print_warning(
            f"The temperature is at its bound, {calibration.temperature:g}: the videos are too "
            "few, too easy or not those of the labels."
        )
    if as_json:
        print_json(
            CalibratedBankRecord(
                bank=bank.name,
                bank_sha256=bank.sha256,
                **asdict(calibration),
                top1=evaluation.metrics.top1,
                failed=evaluation.summary().failed,
            )
        )
        return
    table = Table(title=f"Calibration of {bank.name}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in _rows(calibration, evaluation.metrics.top1):
        table.add_row(*row)
    results.print(table)


def _rows(calibration: Calibration, top1: float) -> list[tuple[str, str]]:
    known = f"of {calibration.num_known}"
    rejected = calibration.rejected_unknown
    unknown = "no such videos"
    if rejected is not None:
        unknown = f"{rejected:.1%} of {calibration.num_unknown}"
    return [
        ("known videos kept", f"{calibration.kept_known:.1%} {known}"),
        ("unknown videos rejected", unknown),
        ("known videos right (top-1)", f"{top1:.1%} {known}"),
        ("calibration error before", f"{calibration.error_before:.4f}"),
        ("calibration error after", f"{calibration.error_after:.4f}"),
        ("temperature", f"{calibration.temperature:.4f}"),
        ("threshold", f"{calibration.threshold:.4f}"),
    ]
