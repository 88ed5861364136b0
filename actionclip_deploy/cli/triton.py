"""`actionclip triton`: a bundle as a model repository of Triton, and proof that a server has it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli.classify import read_api_key
from actionclip_deploy.cli.options import RESULTS, ApiKeysOption, BundlePath, JsonOption
from actionclip_deploy.cli.output import (
    notes,
    print_json,
    results,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.cli.verify import print_report
from actionclip_deploy.command_records import RemoteParityRecord, RepositoryRecord

if TYPE_CHECKING:
    from actionclip_deploy.runtimes.parity import ParityReport

_CALLS = "How Triton runs it"
_SERVER = "A running server"


def triton(
    bundle: BundlePath,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="REPOSITORY",
            help="The folder to make; it appears whole or not at all.",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    add: Annotated[
        bool,
        typer.Option(
            "--add",
            help="Put the bundle into a repository that is there, as the next version of its "
            "models.",
            rich_help_panel=RESULTS,
        ),
    ] = False,
    runtime: Annotated[
        str,
        typer.Option(
            "--runtime",
            metavar="NAME",
            help="Triton's backend: onnxruntime, openvino, tensorrt (engines of this bundle that "
            "`actionclip build` made) or python. Not auto: it runs elsewhere.",
            rich_help_panel=_CALLS,
        ),
    ] = "onnxruntime",
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="auto|cpu|cuda",
            help="Where instances are; auto takes all GPUs that Triton finds.",
            rich_help_panel=_CALLS,
        ),
    ] = "auto",
    instances: Annotated[
        int,
        typer.Option(
            "--instances",
            min=1,
            metavar="N",
            help="Instances of each model, on each device.",
            rich_help_panel=_CALLS,
        ),
    ] = 1,
    max_batch: Annotated[
        int,
        typer.Option(
            "--max-batch",
            min=1,
            metavar="N",
            help="Clips in one call of the runtime.",
            rich_help_panel=_CALLS,
        ),
    ] = 16,
    max_delay_ms: Annotated[
        float,
        typer.Option(
            "--max-delay-ms",
            min=0,
            metavar="MS",
            help="How long a request may wait to fill a call.",
            rich_help_panel=_CALLS,
        ),
    ] = 2.0,
    queue: Annotated[
        int,
        typer.Option(
            "--queue",
            min=1,
            metavar="N",
            help="Requests of a model that may wait.",
            rich_help_panel=_CALLS,
        ),
    ] = 256,
    prefix: Annotated[
        str,
        typer.Option(
            "--prefix",
            metavar="TEXT",
            help="What the names of the models begin with, where a server has several bundles.",
            rich_help_panel=_CALLS,
        ),
    ] = "",
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--labels",
            metavar="NAME",
            help="A label bank that gets a model of its own; repeatable. By default, all of them.",
            rich_help_panel=_CALLS,
        ),
    ] = None,
    verify: Annotated[
        list[str] | None,
        typer.Option(
            "--verify",
            metavar="URL",
            help="Compare a running server with the bundle's golden data: http://HOST:PORT or "
            "grpc://HOST:PORT of Triton, KServe or `actionclip serve`; repeatable.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    api_keys: ApiKeysOption = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print every comparison, not a line for each graph.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a bundle as a model repository of Triton, or compare a running server with it.

    The repository has the models visual, temporal, textual, clip for whole clips, and scores_NAME
    for each label bank. With --verify nothing is written: a server that runs is asked, and the exit
    code is 4 if it disagrees with PyTorch.

    Example:
        actionclip triton bundle --output repository
        actionclip triton bundle --verify grpc://127.0.0.1:8001
    """
    if (output is None) == (not verify):
        raise usage_error("Give either --output REPOSITORY or --verify URL.")
    opened = Bundle.open(bundle, check_hashes=True)
    if verify:
        _verify(
            opened,
            verify,
            prefix=prefix,
            api_key=read_api_key(api_keys),
            verbose=verbose,
            as_json=as_json,
        )
        return
    assert output is not None
    from actionclip_deploy.scale.triton_repository import RepositoryOptions, write_repository

    with wrong_arguments_are_usage_errors():
        given: dict[str, Any] = {"runtime": runtime, "device": device}
        options = RepositoryOptions(
            **given,
            max_batch=max_batch,
            max_delay_ms=max_delay_ms,
            queue=queue,
            instances=instances,
            prefix=prefix,
            labels=None if labels is None else tuple(labels),
            plans=_plans(opened) if runtime == "tensorrt" else {},
        )
    with notes.status("Writing and checking the models"):
        versions = write_repository(opened, output, options, adds_version=add)
    if as_json:
        print_json(RepositoryRecord(repository=str(output), runtime=runtime, versions=versions))
        return
    for name, version in versions.items():
        results.print(f"{output}/{name}/{version}", highlight=False, markup=False)
    results.print(
        f"Start Triton with --model-repository={output}, then compare it with PyTorch: "
        f"actionclip triton {bundle} --verify http://HOST:8000",
        highlight=False,
        markup=False,
    )


def _plans(bundle: Bundle) -> dict[str, dict[str, bytes]]:
    """The newest engines of a bundle for each compute capability."""
    from actionclip_deploy.runtimes.trt.store import open_store

    found: dict[str, dict[str, bytes]] = {}
    for entry in open_store().of_bundle(bundle, "tensorrt"):
        capability = str(entry.key["place"].get("compute_capability", ""))
        if not re.fullmatch(r"\d+\.\d+", capability):  # of engines that fit several
            capability = ""
        if capability not in found:
            found[capability] = {graph: entry.plan(graph) for graph in bundle.manifest.graphs}
    return found


def _verify(
    bundle: Bundle,
    urls: list[str],
    *,
    prefix: str,
    api_key: str | None,
    verbose: bool,
    as_json: bool,
) -> None:
    from actionclip_deploy.runtimes.parity import verify_bundle
    from actionclip_deploy.scale.remote_runtime import RemoteRuntime

    reports: list[ParityReport] = []
    for url in urls:
        with (
            wrong_arguments_are_usage_errors(),
            RemoteRuntime(bundle.manifest, url, prefix=prefix, api_key=api_key) as runtime,
            notes.status(f"Comparing {url} with the golden outputs"),
        ):
            reports.append(verify_bundle(bundle, runtime))
    if as_json:
        print_json(
            [
                RemoteParityRecord(**dict(report.record()), url=url)
                for url, report in zip(urls, reports, strict=True)
            ]
        )
    for url, report in zip(urls, reports, strict=True):
        if not as_json:
            name = report.runtime.name
            print_report(report, title=f"{name} at {url} against PyTorch", verbose=verbose)
    for url, report in zip(urls, reports, strict=True):
        report.check()
        if not as_json:
            results.print(f"{url} computes what PyTorch computed.", highlight=False, markup=False)
