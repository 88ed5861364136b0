"""Checkpoints that others have published: names, addresses, and the copies in the cache.

What stands in `checkpoints.json` are facts as the authors' pages state them.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from actionclip_deploy.errors import CheckpointError, DamagedFileError
from actionclip_deploy.files import sha256_of
from actionclip_deploy.keyed_store import CACHE_VARIABLE, cache_folder
from actionclip_deploy.published.download import Download, OnBytes, is_reachable, mirrored

_ADDRESS = re.compile(r"(https?|hf):/+(.+)", re.IGNORECASE | re.DOTALL)
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([^/@]+))?/([^@]+?)(?:@([^@]+))?")
_SHA256 = re.compile(r"[0-9a-f]{8,64}")


# By the labels of the training. Source: arXiv 1705.06950 section 2, "around 10s".
_CLIP_SECONDS = {"kinetics-400": 10.0}


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A checkpoint that can be fetched by its name.

    Attributes:
        name: What to give in the place of a file.
        backbone: Such as "ViT-B/32".
        num_frames: T.
        labels: The name of the labels that it was trained on; see `published_labels`.
        trained_by: Who trained it.
        top1: In percent, by `protocol`.
        top5: In percent, by `protocol`.
        protocol: Whose videos and views the accuracy was measured on.
        address: Where the file is.
        sha256_prefix: The beginning of its sha256; None where nobody states it.
        licence: Of the code that made the weights, as its repository states it; of the weights
            themselves nobody states one.
        top1_authors: In percent, as the authors state it on theirs; None where they do not.
        top5_authors: Likewise.
    """

    name: str
    backbone: str
    num_frames: int
    labels: str
    trained_by: str
    top1: float
    top5: float
    protocol: str
    address: str
    sha256_prefix: str | None
    licence: str
    top1_authors: float | None = None
    top5_authors: float | None = None

    @property
    def clip_seconds(self) -> float | None:
        """How long the clips of its training were: about 10 seconds those of Kinetics."""
        return _CLIP_SECONDS.get(self.labels)

    @property
    def download(self) -> Download:
        """The file and its copy in the cache.

        Raises:
            CheckpointError: If there is no cache.
        """
        folder = _checkpoints_folder(self.name, self.address) / self.name
        return Download(mirrored(self.address), folder, self.sha256_prefix)


@cache
def published_checkpoints() -> dict[str, PublishedCheckpoint]:
    """All published checkpoints by name."""
    rows = [PublishedCheckpoint(**row) for row in _data("checkpoints")["checkpoints"]]
    return {row.name: row for row in rows}


@cache
def published_labels(name: str) -> tuple[str, ...]:
    """The labels of a data set, "kinetics-400", in the order of its class ids."""
    return tuple(_data(name)["labels"])


def _data(name: str) -> dict[str, Any]:
    path = files("actionclip_deploy") / "published" / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def find_published(checkpoint: str | Path) -> PublishedCheckpoint | None:
    """The published checkpoint of a name; None for another name, or where a file has it."""
    found = published_checkpoints().get(str(checkpoint))
    return None if found is None or Path(checkpoint).is_file() else found


def published_with(sha256: str) -> PublishedCheckpoint | None:
    """The published checkpoint of a file, whatever its name; None of any other.

    It is known by its hash: as its publisher states it, or as it was at the first download.
    """
    for checkpoint in published_checkpoints().values():
        known = checkpoint.sha256_prefix
        if known is None:
            with suppress(CheckpointError, DamagedFileError):  # no cache, or a file in it
                known = checkpoint.download.learnt_sha256()
        if known is not None and sha256.startswith(known):
            return checkpoint
    return None


# Names and addresses to files

_show: Callable[[str], AbstractContextManager[OnBytes]] = lambda _: nullcontext(lambda *_: None)  # noqa: E731


def show_downloads(show: Callable[[str], AbstractContextManager[OnBytes]]) -> None:
    """Set how the progress of downloads is shown, in this process from now on.

    Args:
        show: From a file's name to a context that gives a function, which is called with the
            bytes that are there and those that there will be, None where nobody knows.
    """
    global _show  # noqa: PLW0603 - the command line sets it once
    _show = show


def is_address(checkpoint: str | Path) -> bool:
    """Whether a checkpoint is given as an address: https, http, or hf for Hugging Face."""
    return _ADDRESS.fullmatch(str(checkpoint)) is not None


def local_checkpoint(checkpoint: str | Path) -> Path:
    """The file of a checkpoint, fetched where it is given by a published name or an address.

    `hf://USER/REPO[@REVISION]/FILE` is fetched by huggingface_hub into its own cache. An https
    address may end in `#sha256=` and the hash, or its beginning; without one, the hash of the first
    download is kept, and later ones are held to it. A path is given back as it is.

    Raises:
        CheckpointError: If it cannot be fetched, or is not the file that it has to be.
        FileWriteError: If it cannot be written.
    """
    known = find_published(checkpoint)
    if known is not None:
        return _fetch(known.download)
    # A path turns two slashes into one.
    match = _ADDRESS.fullmatch(str(checkpoint))
    if match is None:
        return Path(checkpoint)
    scheme, rest = match[1].lower(), match[2]
    if scheme == "hf":
        return _from_hub(f"hf://{rest}", rest)
    return _fetch(_download_of(f"{scheme}://{rest}"))


def _download_of(given: str) -> Download:
    address, _, fragment = given.partition("#")
    pinned = None
    if fragment:
        pinned = fragment.removeprefix("sha256=").lower()
        if not fragment.startswith("sha256=") or not _SHA256.fullmatch(pinned):
            raise CheckpointError(
                f"{given} ends in #{fragment}; write #sha256= and 8 to 64 hexadecimal digits"
            )
    folder = _checkpoints_folder(address, address) / f"address-{sha256_of(address)[:16]}"
    return Download(address, folder, pinned)


def _fetch(download: Download) -> Path:
    return download.fetch(_show)


def _checkpoints_folder(name: str, address: str) -> Path:
    folder = cache_folder()
    if folder is None:
        raise CheckpointError(
            f"{name} is kept in the cache, which is off; set {CACHE_VARIABLE} to a folder, or "
            f"download {address} and give the file"
        )
    return folder / "checkpoints"


def _from_hub(given: str, rest: str) -> Path:
    match = _HUB_FILE.fullmatch(rest)
    if match is None or (match[2] and match[4]):
        raise CheckpointError(
            f"{given} names no file; write hf://USER/REPO/FILE, or hf://USER/REPO@REVISION/FILE"
        )
    try:
        from huggingface_hub import constants, hf_hub_download
    except ImportError as exc:
        raise CheckpointError(
            f"{given} needs huggingface_hub, which is not installed; install actionclip-deploy "
            "with the extra export, or download the file and give its path"
        ) from exc
    repository, file, revision = match[1], match[3], match[2] or match[4]
    address = f"{constants.ENDPOINT}/{repository}/resolve/{revision or 'main'}/{file}"
    # The hub's own tries to connect take half a minute; its cache is used without a network.
    offline = not is_reachable(constants.ENDPOINT)
    try:
        found = hf_hub_download(repository, file, revision=revision, local_files_only=offline)
        return Path(found)
    except (OSError, ValueError, RuntimeError) as exc:
        if offline:
            raise CheckpointError(
                f"{given} could not be fetched (no connection to {constants.ENDPOINT}); give the "
                f"file of {address}"
            ) from exc
        why = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise CheckpointError(
            f"{given} could not be fetched ({type(exc).__name__}: {why}); check user, repository "
            f"and file, or give the file of {address}"
        ) from exc


def require_checkpoint(checkpoint: str | Path) -> None:
    """Refuse a checkpoint that leads nowhere; for what would import PyTorch before it looked.

    A name that is known and an address are taken as they are.

    Raises:
        CheckpointError: If it is a path, and nothing is there.
    """
    is_name = str(checkpoint) == "motions" or str(checkpoint).startswith("open_clip:")
    if is_name or is_address(checkpoint) or find_published(checkpoint) is not None:
        return
    if not Path(checkpoint).exists():
        raise missing_checkpoint(checkpoint)


def missing_checkpoint(checkpoint: str | Path) -> CheckpointError:
    """The error of a file that is not there, with the names that come close."""
    names = [*published_checkpoints(), "motions"]
    close = difflib.get_close_matches(str(checkpoint).lower(), names, n=3, cutoff=0.6)
    meant = f"; did you mean {' or '.join(close)}?" if close else "; check the path."
    return CheckpointError(
        f"{checkpoint} does not exist: there is no such file and no checkpoint of that name{meant} "
        "`actionclip models` lists those that are known by name"
    )
