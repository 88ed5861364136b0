"""`actionclip embed`: the embeddings of videos, for search, clustering or a classifier."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli.options import (
    BundlePath,
    FolderOptions,
    JsonOption,
    NoVerifyOption,
    OverwriteOption,
    ReadingOptions,
    ResumeOption,
    RunOptions,
    VideosArgument,
    ViewsOption,
)
from actionclip_deploy.cli.output import (
    EXIT_SOME_FAILED,
    either,
    report_videos,
    results,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.cli.result_files import (
    ARRAY_SUFFIXES,
    check_result_path,
    embeddings_file,
    is_result_folder,
    open_result_file,
)
from actionclip_deploy.files import sha256_of
from actionclip_deploy.recognizer import VideoEncoder
from actionclip_deploy.records import EmbeddedVideoRecord, EmbeddingsRecord, EmbedRunRecord
from actionclip_deploy.sampling import Views


def embed(
    context: typer.Context,
    bundle: BundlePath,
    videos: VideosArgument,
    running: RunOptions,
    views: ViewsOption = "1x1",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE|FOLDER",
            help="File to write: .npz, .parquet or .safetensors; or a folder, a name without a "
            "suffix, of Parquet files with a row for each of many videos.",
        ),
    ] = None,
    as_json: JsonOption = False,
    reading: ReadingOptions = ReadingOptions(),  # noqa: B008 - only its fields are used
    many: FolderOptions = FolderOptions(),  # noqa: B008 - only its fields are used
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    no_verify: NoVerifyOption = False,
) -> None:
    """Write the embeddings of videos, as the model compares them with texts.

    They have unit norm. A video that fails is reported, the others go on, and the exit code is
    then 3; a .npz or .safetensors file has no row for it and names it in its metadata. With
    --json, one object per video is printed, with its embeddings, each on a line of its own.
    Each of several views has its own embedding.

    Example:
        actionclip embed bundle videos/ --output embeddings.npz
    """
    if output is None and (resume or overwrite):
        raise usage_error("--resume and --overwrite are about --output, which was not given.")
    if output is None and not as_json:
        raise usage_error(
            f"--output is missing; give a file that ends in {either(ARRAY_SUFFIXES)}, or "
            "--json to print the embeddings."
        )
    in_folder = is_result_folder(output)
    many.check(context, in_folder=in_folder)
    if output is not None and not output.suffix and not in_folder:
        raise usage_error(
            f"--output is {output}; give a file that ends in {either(ARRAY_SUFFIXES)}."
        )
    if not in_folder:
        check_result_path(output, ARRAY_SUFFIXES)
    opened = Bundle.open(bundle, verify=not no_verify)
    asked = Views.parse(views)
    if in_folder:
        assert output is not None
        settings = many.settings(reading, asked, embeddings=True)
        from actionclip_deploy.cli.video_runs import run_into_folder

        summary = run_into_folder(
            opened,
            videos,
            settings,
            running,
            None,
            engine=many,
            rows_per_file=many.rows_per_file,
            output=output,
            recursive=reading.recursive,
            resume=resume,
            overwrite=overwrite,
            as_json=as_json,
        )
        if summary.num_failed:
            raise typer.Exit(EXIT_SOME_FAILED)
        return
    found = reading.find_local(videos)
    with running.open(opened, prefer="throughput") as runtime:
        with wrong_arguments_are_usage_errors():
            encoder = VideoEncoder(
                runtime,
                views=asked,
                region=reading.region,
                decoder=reading.decoder,
                max_pixels=reading.max_pixels,
                reuse=reading.reuse,
            )
        if output is None:
            with closing(_embed_all(encoder, found, reading.workers)) as records:
                num_failed = _report(
                    records,
                    len(found),
                    as_json=True,
                    tell=lambda num: (
                        f"{num} of {len(found)} videos were printed; with --output FILE embeddings "
                        "are kept, and --resume goes on."
                    ),
                )
        else:
            num_failed = _write(
                opened, encoder, found, reading.workers, output, resume, overwrite, as_json
            )
    if num_failed:
        raise typer.Exit(EXIT_SOME_FAILED)


def _write(
    bundle: Bundle,
    encoder: VideoEncoder,
    videos: Sequence[Path],
    num_workers: int | None,
    output: Path,
    resume: bool,
    overwrite: bool,
    as_json: bool,
) -> int:
    """Embed videos into a file; gives how many failed."""
    about = _describe(bundle, encoder)
    run = EmbedRunRecord(
        bundle_sha256=about.bundle_sha256,
        views=about.views,
        resize=about.resize,
        decoder=about.decoder,
        runtime=about.runtime.name,
        execution_provider=about.runtime.execution_provider,
        precision=about.runtime.precision,
    )
    finish = embeddings_file(output, about)
    with open_result_file(output, run, resume=resume, overwrite=overwrite, finish=finish) as file:
        todo = [video for video in videos if str(video) not in file.done]
        num_done = len(videos) - len(todo)
        with closing(_embed_all(encoder, todo, num_workers)) as records:
            _report(
                map(file.add, records),
                len(videos),
                as_json=as_json,
                num_done=num_done,
                tell=lambda _: file.tell(videos, output, overwrite=overwrite),
            )
        num_failed, num_written = file.num_failed(videos), len(file.done)
    if not as_json:
        num_ok = len(videos) - num_failed
        shape = f"{about.num_views} x {about.embedding_dim}"
        more = f", and {num_written - len(videos)} before" if num_written > len(videos) else ""
        results.print(
            f"{num_ok} of {len(videos)} videos embedded ({shape} each{more}), {num_failed} failed; "
            f"the embeddings are in {escape(str(output))}.",
            highlight=False,
        )
    return num_failed


def _report(
    records: Iterable[EmbeddedVideoRecord],
    num_videos: int,
    *,
    as_json: bool,
    num_done: int = 0,
    tell: Callable[[int], str],
) -> int:
    return report_videos(
        records,
        num_videos=num_videos,
        num_done=num_done,
        as_json=as_json,
        shows_table=False,
        title="Embedding videos",
        tell=tell,
    )


def _embed_all(
    encoder: VideoEncoder, videos: Sequence[Path], num_workers: int | None
) -> Generator[EmbeddedVideoRecord, None, None]:
    with closing(encoder.encode_all(videos, num_workers=num_workers)) as found:
        for encoded in found:
            yield encoder.record(encoded)


def _describe(bundle: Bundle, encoder: VideoEncoder) -> EmbeddingsRecord:
    manifest = bundle.manifest
    return EmbeddingsRecord(
        bundle=str(bundle.path),
        bundle_sha256=sha256_of((bundle.path / "manifest.json").read_bytes()),
        visual_sha256=bundle.visual_sha256,
        textual_sha256=bundle.textual_sha256,
        model=manifest.model,
        sampling=manifest.sampling,
        views=str(encoder.views),
        resize=encoder.region,
        decoder=encoder.decoder,
        runtime=encoder.runtime.describe(),
        embedding_dim=manifest.model.embedding_dim,
        num_views=encoder.views.num_views,
    )
