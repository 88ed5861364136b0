"""`actionclip classify`: rank labels for videos by a server."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import Annotated, Any, TypeAlias

import typer
from rich.table import Table

from actionclip_deploy.cli.output import (
    EXIT_SOME_FAILED,
    JsonOption,
    add_failed,
    add_predictions,
    answer_fields,
    find_videos,
    prediction_table,
    print_error,
    print_json_line,
    print_warning,
    progress_bar,
    results,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.client import Client, RefusedVideo, ServerPrediction
from actionclip_deploy.errors import ActionClipError, RequestRefusedError, VideoError
from actionclip_deploy.prompts import read_labels
from actionclip_deploy.sampling import Views
from actionclip_deploy.views import work_ahead

API_KEY_VARIABLE = "ACTIONCLIP_API_KEY"

ApiKeyFileOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        metavar="FILE",
        help=f"File with the server's key; otherwise the environment's {API_KEY_VARIABLE}.",
    ),
]

# Enough for a server to fill its calls, and few enough that others get their turn.
_AT_A_TIME = 4
# Refusals that are about one video; any other would meet the next video as well.
_ABOUT_ONE_VIDEO = frozenset(
    {
        *("video_unreadable", "video_too_large", "body_too_large", "slow_body"),
        *("bad_tensor", "deadline", "queue_full", "failed"),
    }
)


def classify(
    videos: Annotated[
        list[Path],
        typer.Argument(
            metavar="VIDEO...",
            help="Video files, folders of them, and .npy files of frames or embeddings.",
        ),
    ],
    url: Annotated[
        str, typer.Option("--url", help="Address of the server, such as http://127.0.0.1:8000.")
    ],
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            metavar="NAME|FILE",
            help="A label bank of the server, or a file of labels; by default the only bank.",
        ),
    ] = None,
    own_labels: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="TEXT", help="A label to choose from; repeatable."),
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Labels per video.")] = 5,
    views: Annotated[
        str, typer.Option("--views", help="Clips x crops per video; the paper's best is 10x3.")
    ] = "1x1",
    templates: Annotated[
        list[str] | None,
        typer.Option(
            "--template", metavar="TEXT", help="A sentence with {} for the label; repeatable."
        ),
    ] = None,
    multi_label: Annotated[
        bool, typer.Option("--multi-label", help="Score each label by itself.")
    ] = False,
    api_key_file: ApiKeyFileOption = None,
    timeout: Annotated[
        float,
        typer.Option("--timeout", min=0.1, help="Seconds for one video, further attempts too."),
    ] = 120.0,
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Look through the folders in a folder as well.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Score videos by a server of `actionclip serve`; no model and no runtime is needed here.

    A server that is full is asked again after the time that it says. A video that fails is
    reported in its place and the others go on; the exit code is then 3. With --json, one object
    per video is printed, each on a line of its own.
    """
    found = find_videos(videos, recursive=recursive)
    chosen = given_labels(labels, own_labels)
    with wrong_arguments_are_usage_errors():
        asked = str(Views.parse(views))
        client = Client(url, api_key=read_api_key(api_key_file), timeout_seconds=timeout)
    with client:
        wanted = chosen or only_bank(client)

        def classify_one(video: Path, _: Event) -> ServerPrediction | RefusedVideo:
            return _classify(
                client,
                video,
                labels=wanted,
                top_k=top_k,
                views=asked,
                templates=templates or None,
                multi_label=multi_label,
            )

        outcomes = work_ahead(found, classify_one, num_workers=_AT_A_TIME, max_ahead=2 * _AT_A_TIME)
        with closing(outcomes):
            num_failed = _report(found, outcomes, as_json)
    if num_failed:
        raise typer.Exit(EXIT_SOME_FAILED)


def read_api_key(path: Path | None) -> str | None:
    """The key of a file, or of the environment; None where there is neither.

    Raises:
        typer.BadParameter: If the file holds no key, or more than one.
    """
    if path is None:
        return os.environ.get(API_KEY_VARIABLE) or None
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as exc:
        raise usage_error(f"{path} cannot be read as text ({exc}); give a file of a key.") from exc
    if len(words) != 1:
        raise usage_error(f"{path} holds {len(words)} keys; give a file of one.")
    return words[0]


def only_bank(client: Client) -> str:
    """The name of the server's label bank, if there is one alone.

    Raises:
        typer.BadParameter: If there is none, or several.
    """
    names = [bank.name for bank in client.list_banks() if bank.active is not None]
    if len(names) == 1:
        return names[0]
    if not names:
        raise usage_error("The server has no label bank; give labels, with --labels or --label.")
    raise usage_error(f"The server has the label banks {', '.join(names)}; choose with --labels.")


def given_labels(labels: str | None, own: Sequence[str] | None) -> str | tuple[str, ...] | None:
    """A bank's name, labels of a file, or those that were given one by one; None for nothing.

    Raises:
        LabelError: If a file of labels cannot be used.
        typer.BadParameter: If both were given, or a file is not there.
    """
    if labels is not None and own:
        raise usage_error("--labels and --label were given; give one of them.")
    if labels is None:
        return tuple(own) if own else None
    path = Path(labels)
    if path.is_file():
        return read_labels(path)
    if path.name != labels or path.suffix.lower() in (".csv", ".txt", ".json"):
        raise usage_error(f"--labels is {labels}, which is no file; give a file or a bank's name.")
    return labels


def _classify(client: Client, video: Path, **options: Any) -> ServerPrediction | RefusedVideo:
    try:
        (outcome,) = client.classify(video, options.pop("labels"), **options)
    except VideoError as exc:
        return RefusedVideo(video.name, RequestRefusedError(str(exc), status=0, code="no_file"))
    except RequestRefusedError as exc:
        if exc.code not in _ABOUT_ONE_VIDEO:
            raise
        return RefusedVideo(video.name, exc)
    return outcome


def _report(
    videos: Sequence[Path], outcomes: Iterator[ServerPrediction | RefusedVideo], as_json: bool
) -> int:
    """Print what comes; gives how many failed."""
    table = prediction_table()
    num_failed = 0
    with progress_bar(quiet=as_json or len(videos) == 1) as bar:
        task = bar.add_task("Scoring videos", total=len(videos))
        for video, outcome in zip(videos, outcomes, strict=True):
            if isinstance(outcome, RefusedVideo):
                num_failed += 1
                print_error(_named(video, outcome.error))
            else:
                for warning in outcome.warnings:
                    print_warning(warning)
            if as_json:
                print_json_line(_to_dict(video, outcome))
            else:
                _add_row(table, video.name, outcome)
            bar.advance(task)
    if not as_json:
        results.print(table)
    return num_failed


def _named(video: Path, error: RequestRefusedError) -> ActionClipError:
    """The error with its video in it, which the server's sentence may not name."""
    text = str(error)
    return error if video.name in text else ActionClipError(f"{video}: {text}")


def _add_row(table: Table, name: str, outcome: ServerPrediction | RefusedVideo) -> None:
    if isinstance(outcome, RefusedVideo):
        add_failed(table, name)
    else:
        add_predictions(table, name, outcome.predictions, outcome.answer)


def _to_dict(video: Path, outcome: ServerPrediction | RefusedVideo) -> dict[str, Any]:
    if isinstance(outcome, RefusedVideo):
        error = outcome.error
        told = {"status": error.status or None, "code": error.code, "request_id": error.request_id}
        return {"video": str(video), "error": str(error), **told}
    frames, times = outcome.frame_indices, outcome.pts_seconds
    return {
        "video": str(video),
        "predictions": [asdict(each) for each in outcome.predictions],
        **answer_fields(outcome.answer),
        **({"warnings": list(outcome.warnings)} if outcome.warnings else {}),
        "frames": None
        if frames is None
        else {
            "num_clips": len(frames),
            "indices": frames.ravel().tolist(),
            "pts_seconds": None if times is None else times.ravel().round(6).tolist(),
        },
        "method": outcome.method,
        "runtime": asdict(outcome.runtime),
        "bank": asdict(outcome.bank),
        "timings_ms": outcome.timings_ms,
        "request_id": outcome.request_id,
    }
