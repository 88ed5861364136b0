"""`actionclip build`: engines of a bundle for this device, verified before they serve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli.options import (
    BundlePath,
    DeviceOption,
    JsonOption,
    OtherNumFramesOption,
    use_device,
)
from actionclip_deploy.cli.output import (
    notes,
    print_json,
    print_warning,
    results,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.command_records import BuiltEngineRecord, EngineRecord

if TYPE_CHECKING:
    from actionclip_deploy.runtimes.trt.build import BuildResult, EngineBuilder, Repair

_GIB = 2**30
_MAX_WORKSPACE_GIB = 1024  # more than any GPU has

_KERNELS = "How engines are built"
_MACHINES = "For other machines"


def build(
    bundle: BundlePath,
    runtime: Annotated[
        str,
        typer.Option(
            "--runtime",
            metavar="NAME",
            help="tensorrt, for the GPU of this machine; or tensorrt-rtx, for RTX cards. Not auto: "
            "the others have no engines.",
        ),
    ] = "tensorrt",
    device: DeviceOption = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            metavar="NAME",
            help="The precision that the bundle must have: fp32, fp16, int8 or fp8. An engine has "
            "the precision of its graph; nothing is lowered here.",
        ),
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            "--profile",
            metavar="NAME",
            help="Batch sizes in clips: latency (1), throughput (2 to 8) or MIN,OPT,MAX; "
            "repeatable. Both names by default.",
        ),
    ] = None,
    num_frames: OtherNumFramesOption = None,
    workspace: Annotated[
        float | None,
        typer.Option(
            "--workspace",
            metavar="GiB",
            help="Scratch memory that a kernel may use; by default as much as leaves room for the "
            "rest (1 GiB at most on a Jetson).",
            rich_help_panel=_KERNELS,
        ),
    ] = None,
    opt_level: Annotated[
        int,
        typer.Option(
            "--opt-level",
            min=0,
            max=5,
            metavar="N",
            help="How long to look for faster kernels, 0 to 5; 2 takes less memory.",
            rich_help_panel=_KERNELS,
        ),
    ] = 3,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            "--timing-cache",
            metavar="FILE",
            help="File of kernel timings, read and updated.",
            rich_help_panel=_KERNELS,
        ),
    ] = None,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible",
            help="Let later versions of TensorRT load the engines.",
            rich_help_panel=_MACHINES,
        ),
    ] = False,
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible",
            help="Let other GPUs, from Ampere on, run the engines; slower.",
            rich_help_panel=_MACHINES,
        ),
    ] = False,
    strip: Annotated[
        bool,
        typer.Option(
            "--strip",
            help="Build once per architecture, without weights, and fill in those of a fine-tune "
            "within seconds.",
            rich_help_panel=_MACHINES,
        ),
    ] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="NAME",
            help="For tensorrt-rtx, a GPU to compile for: sm75, sm80, sm86, sm89, sm120, sm121; "
            "repeatable.",
            rich_help_panel=_MACHINES,
        ),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="If the engines are wrong on this device, try other forms of the graphs and keep "
            "the fastest that passes.",
            rich_help_panel=_KERNELS,
        ),
    ] = False,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="Build again what is there already.",
            rich_help_panel=_KERNELS,
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Build TensorRT engines of a bundle for this device, audit and verify them.

    They are kept outside the bundle, under a key of everything that they depend on; see
    `actionclip engines`. Engines that disagree with PyTorch, or compute in another precision than
    their graph, are kept for inspection and never serve. The exit code is 4 if they disagree.

    Example:
        actionclip build bundle --profile latency
    """
    from actionclip_deploy.runtimes.trt.build import (
        BuildRequest,
        EngineBuilder,
        check_precision,
        repair_engines,
    )
    from actionclip_deploy.runtimes.trt.plan import BuildOptions, parse_profiles

    if workspace is not None and not 0 < workspace <= _MAX_WORKSPACE_GIB:
        raise usage_error(
            f"--workspace is {workspace}; it must be a number of GiB above 0, and "
            f"{_MAX_WORKSPACE_GIB:,} at most."
        )
    if use_device(device) not in (None, "cuda"):
        raise usage_error(
            f"--device is {device}, and TensorRT's engines run on NVIDIA's GPUs; leave it out."
        )
    with wrong_arguments_are_usage_errors():
        request = BuildRequest(
            parse_profiles(profile or []),
            num_frames,
            BuildOptions(
                workspace_bytes=None if workspace is None else int(workspace * _GIB),
                opt_level=opt_level,
                timing_cache=timing_cache,
                version_compatible=version_compatible,
                hardware_compatible=hardware_compatible,
                strip=strip,
                targets=tuple(target or ()),
            ),
        )
    opened = Bundle.open(bundle, check_hashes=True)
    check_precision(opened, precision)
    with _Shown() as shown:
        builder = EngineBuilder(
            opened, engine_runtime(runtime), tell=shown.tell, on_phase=shown.phase
        )
        _warn_of_known_bad(builder)
        result = builder.build(request, rebuild=rebuild)
        repaired = None
        if repair and (why := result.why_wrong()):
            print_warning(f"The engines do not pass: {why}")
            repaired = repair_engines(builder, request, result)
    _print(result, repaired, as_json=as_json)
    if repaired is None and result.examined is not None:
        result.examined.check()
    if not as_json:
        _print_end(bundle, runtime, result, repaired)


def engine_runtime(name: str) -> Any:
    """The name of a runtime that has engines.

    Raises:
        typer.BadParameter: If it has none.
    """
    from actionclip_deploy.runtimes.trt.api import ENGINE_RUNTIMES

    if name not in ENGINE_RUNTIMES:
        raise usage_error(f"--runtime is {name!r}; it must be {' or '.join(ENGINE_RUNTIMES)}.")
    return name


def _warn_of_known_bad(builder: EngineBuilder) -> None:
    from actionclip_deploy.runtimes.advice import find_known_bad
    from actionclip_deploy.runtimes.machine import read_jetson

    jetson = read_jetson()
    device = builder.cuda.device if builder.cuda else None
    for known in find_known_bad(
        builder.api.version,
        device.compute_capability if device else None,
        precision=builder.bundle.manifest.precision(),
        runtime=builder.api.name,
        jetpack=jetson.jetpack if jetson else None,
    ):
        print_warning(f"{builder.api.title}: {known.text}")


class _Shown:
    """Progress on standard error: the graph, the phase of its build, and how far that is."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=notes,
            transient=True,
            disable=not notes.is_terminal,
        )
        self._task = self._progress.add_task("Reading the bundle", total=None)

    def __enter__(self) -> _Shown:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tell(self, text: str) -> None:
        if not notes.is_terminal:
            notes.print(text, highlight=False, markup=False)
        self._progress.update(self._task, description=text, total=None, completed=0)

    def phase(self, graph: str, phase: str, done: int, steps: int) -> None:
        words = f"Building the {graph} engine: {phase}"
        self._progress.update(self._task, description=words, total=steps or None, completed=done)


def _print(result: BuildResult, repaired: Repair | None, *, as_json: bool) -> None:
    entry = repaired.entry if repaired is not None else result.entry
    if as_json:
        print_json(
            BuiltEngineRecord(
                engine=entry.name,
                folder=str(entry.folder),
                is_new=result.is_new,
                why_not_found=result.why,
                verified=None if result.examined is None else entry.record["verified"],
                record=EngineRecord(**{k: v for k, v in entry.record.items() if k != "verified"}),
            )
        )
        return
    if result.why is not None:
        notes.print(f"Built again: {result.why}", highlight=False, markup=False)
    results.print(_table(result))
    if repaired is not None:
        results.print(_attempts_table(repaired))


def _table(result: BuildResult) -> Table:
    record = result.entry.record
    table = Table(title=f"engine {result.entry.name}", title_justify="left")
    for heading in ("graph", "precision", "arithmetic", "profiles (rows)", "size", "built in"):
        table.add_column(heading, justify="right" if heading in ("size", "built in") else "left")
    for graph, plan in record["plans"].items():
        computed = "not examined"
        if result.examined is not None:
            shares = result.examined.audits[graph].computed().items()
            computed = ", ".join(f"{share:.0%} {kind}" for kind, share in shares) or "unknown"
        rows = [f"{s.min[0]} {s.opt[0]} {s.max[0]}" for s in result.entry.shapes(graph)]
        seconds = {**record.get("build_seconds", {}), **record.get("refit_seconds", {})}.get(graph)
        table.add_row(
            graph,
            record.get("precisions", {}).get(graph, ""),
            computed,
            "; ".join(rows),
            f"{plan['size'] / 1e6:.1f} MB",
            "" if seconds is None else f"{seconds:.1f} s",
        )
    return table


def _attempts_table(repaired: Repair) -> Table:
    table = Table(title="repair", title_justify="left")
    for heading in ("attempt", "", "outcome"):
        table.add_column(heading, overflow="fold")
    for attempt in repaired.attempts:
        mark = "[green]passes[/]" if attempt.passed else "[red]fails[/]"
        kept = " (kept)" if attempt.name == repaired.entry.record["repair"]["kept"] else ""
        table.add_row(attempt.name + kept, mark, attempt.outcome)
    return table


def _print_end(bundle: Path, runtime: str, result: BuildResult, repaired: Repair | None) -> None:
    entry = repaired.entry if repaired is not None else result.entry
    if result.examined is None:
        targets = ", ".join(entry.key["options"]["targets"])
        results.print(
            f"{entry.folder} is compiled for {targets} and has not run anywhere yet. On a machine "
            f"with such a card, with this folder in its cache, run: actionclip verify {bundle} "
            f"--runtime {runtime}",
            highlight=False,
            markup=False,
        )
        return
    what = "Found" if not result.is_new and repaired is None else "Wrote"
    results.print(f"{what} {entry.folder}, verified on this device.", highlight=False, markup=False)
