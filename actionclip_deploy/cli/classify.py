"""`actionclip classify`: rank labels for videos by a server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import Annotated, Any

import typer

from actionclip_deploy.cli.options import (
    API_KEY_VARIABLE,
    SCORES,
    ApiKeysOption,
    JsonOption,
    LabelOptions,
    RecursiveOption,
    TopKOption,
    ViewsOption,
)
from actionclip_deploy.cli.output import (
    EXIT_SOME_FAILED,
    find_videos,
    report_videos,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.client import Client
from actionclip_deploy.errors import RequestRefusedError, VideoError
from actionclip_deploy.files import read_text
from actionclip_deploy.labels import LabelBank, labels_among
from actionclip_deploy.records import ErrorRecord, RefusedVideo, VideoRecord
from actionclip_deploy.sampling import Views
from actionclip_deploy.views import work_ahead

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
    labels: LabelOptions,
    top_k: TopKOption = 5,
    views: ViewsOption = "1x1",
    multi_label: Annotated[
        bool,
        typer.Option("--multi-label", help="Score each label by itself.", rich_help_panel=SCORES),
    ] = False,
    api_keys: ApiKeysOption = None,
    timeout_seconds: Annotated[
        float,
        typer.Option(
            "--timeout",
            min=0.1,
            metavar="SECONDS",
            help="For one video, further attempts too.",
            rich_help_panel="The server",
        ),
    ] = 120.0,
    recursive: RecursiveOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score videos by a server of `actionclip serve`; no model and no runtime is needed here.

    A name that is both a bank's of the server and a file's is the bank's; ./NAME is the file's.

    A server that is full is asked again after the time that it says. A video that fails is
    reported in its place and the others go on; the exit code is then 3. With --json, one object
    per video is printed, each on a line of its own.

    Example:
        actionclip classify video.mp4 --url http://127.0.0.1:8000 --labels mine
    """
    found = find_videos(videos, recursive=recursive)
    labels.check()
    templates = labels.sentences()
    asked = str(Views.parse(views))
    with wrong_arguments_are_usage_errors():
        client = Client(url, api_key=read_api_key(api_keys), timeout_seconds=timeout_seconds)
    with client:
        wanted = labels_of_server(client, labels)

        def classify_one(video: Path, _: Event) -> VideoRecord:
            return _record(
                client,
                video,
                wanted,
                top_k=top_k,
                views=asked,
                templates=templates,
                multi_label=multi_label,
                allow_unknown_words=labels.allow_unknown_words,
            )

        records = work_ahead(found, classify_one, num_workers=_AT_A_TIME, max_ahead=2 * _AT_A_TIME)
        with closing(records):
            num_failed = report_videos(
                records,
                num_videos=len(found),
                as_json=as_json,
                tell=lambda num: (
                    f"{num} of {len(found)} videos were answered; give the others alone to go on."
                ),
            )
    if num_failed:
        raise typer.Exit(EXIT_SOME_FAILED)


def read_api_key(path: Path | None) -> str | None:
    """The first key of a file, or the one of the environment; None where there is neither.

    Raises:
        typer.BadParameter: If the file holds no key.
    """
    keys = read_api_keys(path)
    return keys[0] if keys else os.environ.get(API_KEY_VARIABLE) or None


def read_api_keys(path: Path | None) -> tuple[str, ...]:
    """The keys of a file, one a line; none without a file.

    Raises:
        typer.BadParameter: If the file holds no key.
    """
    if path is None:
        return ()
    lines = read_text(path, "file of keys", usage_error).split("\n")
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise usage_error(f"{path} holds no key; write one on each line.")
    return keys


def labels_of_server(client: Client, options: LabelOptions) -> str | tuple[str, ...]:
    """The name of a server's label bank, or the labels that requests bring along.

    Raises:
        LabelChoiceError: If there is no such bank, or not just one where none was named.
        LabelError: If a file of labels cannot be used.
    """
    texts = options.texts()
    if texts is not None:
        return texts
    names = [bank.name for bank in client.list_banks() if bank.active is not None]
    found = labels_among(names, options.labels, owner="the server")
    assert not isinstance(found, LabelBank)
    return found


def _record(
    client: Client, video: Path, labels: str | Sequence[str], **options: Any
) -> VideoRecord:
    """What the server says of one video, or why it says nothing."""
    path = str(video)
    try:
        (outcome,) = client.classify(video, labels, **options)
    except VideoError as exc:
        error = ErrorRecord(status=None, code="no_file", message=str(exc))
        return VideoRecord(video=path, name=video.name, error=error)
    except RequestRefusedError as exc:
        if exc.code not in _ABOUT_ONE_VIDEO:
            raise
        outcome = RefusedVideo(video.name, exc)
    if isinstance(outcome, RefusedVideo):
        told = outcome.error
        error = ErrorRecord(status=told.status, code=told.code, message=str(told))
        return VideoRecord(video=path, name=video.name, error=error, request_id=told.request_id)
    return outcome.model_copy(update={"video": path})
