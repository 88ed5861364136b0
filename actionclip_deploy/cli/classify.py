"""`actionclip classify`: rank labels for videos by a server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import Annotated, Any, TypeAlias

import typer

from actionclip_deploy.cli.output import (
    EXIT_SOME_FAILED,
    JsonOption,
    LabelOption,
    UnknownWordsOption,
    find_videos,
    given_texts,
    report_videos,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.client import Client
from actionclip_deploy.errors import RequestRefusedError, VideoError
from actionclip_deploy.files import read_text
from actionclip_deploy.prompts import read_labels
from actionclip_deploy.records import ErrorRecord, RefusedVideo, VideoRecord
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
    own_labels: LabelOption = None,
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
    allow_unknown_words: UnknownWordsOption = False,
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

        def classify_one(video: Path, _: Event) -> VideoRecord:
            return _record(
                client,
                video,
                wanted,
                top_k=top_k,
                views=asked,
                templates=templates or None,
                multi_label=multi_label,
                allow_unknown_words=allow_unknown_words,
            )

        records = work_ahead(found, classify_one, num_workers=_AT_A_TIME, max_ahead=2 * _AT_A_TIME)
        with closing(records):
            num_failed = report_videos(records, num_videos=len(found), as_json=as_json)
    if num_failed:
        raise typer.Exit(EXIT_SOME_FAILED)


def read_api_key(path: Path | None) -> str | None:
    """The key of a file, or of the environment; None where there is neither.

    Raises:
        typer.BadParameter: If the file holds no key, or more than one.
    """
    if path is None:
        return os.environ.get(API_KEY_VARIABLE) or None
    words = read_text(path, "file of a key", usage_error).split()
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
        typer.BadParameter: If both were given, a file is not there, or the text encoder reads
            two labels alike.
    """
    texts = given_texts(labels, own)
    if texts is not None or labels is None:
        return texts
    path = Path(labels)
    if path.is_file():
        return read_labels(path)
    if path.name != labels or path.suffix.lower() in (".csv", ".txt", ".json"):
        raise usage_error(
            f"--labels is {labels}, which is not a file; give a file or a bank's name."
        )
    return labels


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
