"""Options that mean the same in every verb that has them, and what they choose."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_args

import typer

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli.output import (
    find_videos,
    given_options,
    notes,
    print_json,
    print_warning,
    progress_bar,
    usage_error,
    wrong_arguments_are_usage_errors,
)
from actionclip_deploy.cli.verb import OptionGroup
from actionclip_deploy.errors import ArgumentError, LabelChoiceError, LabelError
from actionclip_deploy.evaluate.annotations import FORMATS, Sample, Subset, read_annotations
from actionclip_deploy.evaluate.intervals import INTERVAL_FORMATS
from actionclip_deploy.labels import LabelBank, bank_for, labels_among, named_labels
from actionclip_deploy.manifest import Manifest, ScoreMethod
from actionclip_deploy.preprocess import Region
from actionclip_deploy.prompts import LABEL_ONLY, check_labels, check_templates, read_templates
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.runtimes.base import Preference, Runtime
from actionclip_deploy.runtimes.machine import check_num_threads
from actionclip_deploy.sampling import Views
from actionclip_deploy.stream import WindowGrid
from actionclip_deploy.video import MAX_PIXELS, Decoder

if TYPE_CHECKING:
    from actionclip_deploy.scale.batch import BatchSettings

# Panels of the help. What stands in none comes first: the few options that most people need.
SCORES = "Labels and scores"
ANNOTATIONS = "Annotations"
READING = "Reading of videos"
RUNNING = "Where and how it runs"
WINDOWS = "Windows and events"
CHECKPOINT = "Reading of a checkpoint"
RESULTS = "Results"
FOLDERS = "Many videos, into a folder"

BundlePath: TypeAlias = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Folder that `actionclip export` wrote.")
]
JsonOption: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print JSON on standard output and nothing else there.")
]
LabelsOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--labels",
        metavar="NAME|FILE",
        help="A label bank's name, or a file of labels (CSV id,name; text; JSON); by default the "
        "only bank.",
    ),
]
LabelOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="TEXT", help="A label to choose from; repeatable."),
]
TemplatesOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--templates",
        metavar="FILE",
        help="Sentences with {} for the label, one a line; by default the model's own.",
        rich_help_panel=SCORES,
    ),
]
TemplateOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--template", metavar="TEXT", help="Such a sentence; repeatable.", rich_help_panel=SCORES
    ),
]
LabelOnlyOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--label-only",
        help="Use the bare label as the only template.",
        rich_help_panel=SCORES,
    ),
]
UnknownWordsOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--allow-unknown-words",
        help="Score labels of which the model knows no word, too.",
        rich_help_panel=SCORES,
    ),
]
TopKOption: TypeAlias = Annotated[
    int, typer.Option("--top-k", min=1, metavar="N", help="Labels per video.")
]
ViewsOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--views",
        metavar="CLIPSxCROPS",
        help="Clips x crops per video; the paper's best is 10x3.",
        rich_help_panel=SCORES,
    ),
]
MethodOption: TypeAlias = Annotated[
    ScoreMethod | None,
    typer.Option(
        "--scores",
        metavar="METHOD",
        help="The original's template-softmax, mean-embedding, or independent (several labels a "
        "video); by default as the model says.",
        rich_help_panel=SCORES,
    ),
]
DeviceOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="cpu|cuda|gpu|npu",
        help="Where it runs; cuda:1 is the second GPU; gpu and npu are Intel's. By default, where "
        "it is fastest.",
    ),
]
ProviderOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--execution-provider",
        metavar="NAME",
        help="ONNX Runtime's execution provider, in the place of --device.",
        rich_help_panel=RUNNING,
    ),
]
PrecisionOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="fp32|fp16|bf16",
        help="What openvino computes in, and auto may; by default, the precision of the graphs.",
        rich_help_panel=RUNNING,
    ),
]
PreferOption: TypeAlias = Annotated[
    Preference | None,
    typer.Option(
        "--prefer",
        metavar="latency|throughput",
        help="What --runtime auto is to be fastest at; by default, as the verb needs it.",
        rich_help_panel=RUNNING,
    ),
]
ThreadsOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        metavar="N",
        help="Threads of one call on the CPU; by default, the cores there are.",
        rich_help_panel=RUNNING,
    ),
]
RuntimeOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--runtime",
        metavar="NAME",
        help="What executes the graphs: onnxruntime, openvino, tensorrt, tensorrt-rtx, torch, or "
        "auto for the fastest that is verified here.",
        rich_help_panel=RUNNING,
    ),
]
CheckpointOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        metavar="FILE",
        help="The bundle's checkpoint; needed by the runtime torch.",
        rich_help_panel=RUNNING,
    ),
]
BaseOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--base",
        metavar="FILE",
        help="Checkpoint that supplies the tower that the other one lacks.",
        rich_help_panel=RUNNING,
    ),
]
NoVerifyOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--no-verify",
        help="Use the bundle's files without holding them against their sha256. All other checks "
        "stay.",
        rich_help_panel=RUNNING,
    ),
]
RecursiveOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--recursive",
        help="Look through the folders in a folder as well.",
        rich_help_panel=READING,
    ),
]
NumFramesOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--num-frames",
        min=1,
        metavar="T",
        help="Frames of a clip; by default as the checkpoint or its file name says.",
        rich_help_panel=CHECKPOINT,
    ),
]
OtherNumFramesOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--num-frames",
        min=1,
        metavar="T",
        help="Frames of a clip; by default the model's own.",
        rich_help_panel=RUNNING,
    ),
]
FamilyOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--family",
        metavar="NAME",
        help="Format of the checkpoint; auto finds it out by the keys.",
        rich_help_panel=CHECKPOINT,
    ),
]
ResumeOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with --output where a run was interrupted.",
        rich_help_panel=RESULTS,
    ),
]
PlotOption: TypeAlias = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE.png", help="Draw the result.", rich_help_panel=RESULTS),
]
OverwriteOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace what is there under this name.", rich_help_panel=RESULTS
    ),
]

MaxPixelsOption: TypeAlias = Annotated[
    int,
    typer.Option(
        "--max-pixels",
        min=1,
        metavar="N",
        help="Most pixels of a frame; a video with more fails.",
        rich_help_panel=READING,
    ),
]
StillOption: TypeAlias = Annotated[
    float,
    typer.Option(
        "--still",
        min=0.0,
        max=255.0,
        metavar="DIFFERENCE",
        help="Mean difference to the last encoded frame, 0 to 255, up to which a frame is not "
        "encoded; 0 changes no score.",
        rich_help_panel=WINDOWS,
    ),
]

API_KEY_VARIABLE = "ACTIONCLIP_API_KEY"

ApiKeysOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--api-keys",
        metavar="FILE",
        help="File of the server's keys, one a line, of which the first is sent; otherwise the "
        f"environment's {API_KEY_VARIABLE}.",
        rich_help_panel="The server",
    ),
]


def schema_option(report: Callable[[], Any]) -> Any:
    """The option `--schema`, given what imports a report's class."""

    def show(wanted: bool) -> None:
        if wanted:
            print_json(report().model_json_schema())
            raise typer.Exit

    return typer.Option(
        "--schema",
        callback=show,
        is_eager=True,
        help="Print the JSON schema of a report.",
        rich_help_panel=RESULTS,
    )


VideosArgument: TypeAlias = Annotated[
    list[str],
    typer.Argument(
        metavar="VIDEO...",
        help="Video files, and folders of video files. Into a folder of results also wildcards, "
        "lists (CSV, Parquet, text), and addresses of files or of what they begin with: s3://, "
        "gs://, az://, https://.",
    ),
]


@dataclass(frozen=True)
class LabelOptions(OptionGroup):
    """The labels to choose from, and the sentences that they stand in."""

    labels: LabelsOption = None
    label: LabelOption = None
    templates: TemplatesOption = None
    template: TemplateOption = None
    label_only: LabelOnlyOption = False
    allow_unknown_words: UnknownWordsOption = False

    def texts(self) -> tuple[str, ...] | None:
        """The labels of --label; None where there are none.

        Raises:
            typer.BadParameter: If --labels was given too, or the text encoder reads two alike.
        """
        return given_texts(self.labels, self.label)

    def sentences(self) -> tuple[str, ...] | None:
        """The templates; None for those of the model, or of a bank.

        Raises:
            typer.BadParameter: If they were given in two ways, or cannot be used.
        """
        return given_templates(self.templates, self.template, self.label_only)

    def check(self) -> None:
        """Refuse what is wrong whatever banks there are, before anybody is asked for them.

        Raises:
            typer.BadParameter: If labels or templates were given in two ways.
            LabelChoiceError: If the labels are neither a file nor the name of a bank.
            LabelError: If templates cannot be used.
        """
        self.texts()
        self.sentences()
        name = self.labels or ""
        if ("/" in name or Path(name).suffix in (".csv", ".txt", ".json")) and not Path(
            name
        ).exists():
            raise LabelChoiceError(
                "labels", f"is {name!r}, which is not a file; give a file or a bank's name."
            )

    def choose(self, bundle: Bundle) -> LabelBank | tuple[str, ...]:
        """What was given, found out before anything is opened: a bank of a bundle, or labels."""
        texts = self.texts()
        found = named_labels(bundle, self.labels if texts is None else texts)
        return LabelBank.load(bundle, found) if isinstance(found, str) else found

    def without_banks(self, owner: str) -> tuple[str, ...]:
        """The labels of a file, or those given one by one, where there are no banks."""
        texts = self.texts()
        found = labels_among((), self.labels if texts is None else texts, owner=owner)
        assert isinstance(found, tuple)
        return found

    def bank(
        self,
        bundle: Bundle,
        runtime: Runtime,
        chosen: LabelBank | tuple[str, ...],
        *,
        quiet: bool,
    ) -> LabelBank:
        """The bank of what was chosen; labels are embedded once and kept in the cache."""
        with progress_bar(quiet=quiet) as bar:
            task = bar.add_task("Embedding labels", total=None, visible=False)
            return bank_for(
                bundle,
                runtime,
                chosen,
                templates=self.sentences(),
                allow_unknown_words=self.allow_unknown_words,
                progress=lambda done, total: bar.update(
                    task, completed=done, total=total, visible=True
                ),
            )


def warn_of_one_label(bank: LabelBank, method: str) -> None:
    """Say that a share among one label is no answer."""
    if len(bank.labels) == 1 and method != "independent":
        print_warning(
            "There is one label, and scores are shares among the labels: it has 1.0, whatever a "
            "video shows. Give more labels, or --scores independent."
        )


def given_texts(labels: object, own: Sequence[str] | None) -> tuple[str, ...] | None:
    """The labels of --label; None where there are none.

    Raises:
        typer.BadParameter: If --labels was given too, or the text encoder reads two alike.
    """
    if not own:
        return None
    if labels is not None:
        raise usage_error("--labels and --label were given; give one of them.")
    try:
        return check_labels(own)
    except LabelError as exc:
        raise usage_error(f"--label: {exc}") from exc


def given_templates(
    file: Path | None, own: Sequence[str] | None, label_only: bool
) -> tuple[str, ...] | None:
    """Templates of a file, those given one by one, or the bare label; None for none of these.

    Raises:
        typer.BadParameter: If they were given in two ways, or those given one by one are no use.
        LabelError: If the file cannot be used.
    """
    given = {"--templates": file is not None, "--template": bool(own), "--label-only": label_only}
    names = [name for name, is_given in given.items() if is_given]
    if len(names) > 1:
        raise usage_error(f"{' and '.join(names)} exclude each other; give one of them.")
    if label_only:
        return LABEL_ONLY
    if own:
        try:
            return check_templates(own)
        except LabelError as exc:
            raise usage_error(f"--template: {exc}") from exc
    return None if file is None else read_templates(file)


@dataclass(frozen=True)
class DeviceOptions(OptionGroup):
    """Where ONNX Runtime or OpenVINO runs."""

    device: DeviceOption = None
    execution_provider: ProviderOption = None
    num_threads: ThreadsOption = None


@dataclass(frozen=True)
class RunOptions(DeviceOptions):
    """What runs the graphs of a bundle, and where."""

    runtime: RuntimeOption = "auto"
    precision: PrecisionOption = None
    prefer: PreferOption = None
    checkpoint: CheckpointOption = None
    base: BaseOption = None

    def asked(self, prefer: Preference) -> dict[str, Any]:
        """What `open_runtime` is to be called with.

        Args:
            prefer: What matters to the verb, where the command line does not say.
        """
        if self.prefer is not None and self.runtime != "auto":
            raise usage_error(
                f"--prefer is about --runtime auto, and the runtime is {self.runtime}; leave it "
                "out."
            )
        # An execution provider is ONNX Runtime's, so that it need not be asked for as well.
        is_ort = self.runtime == "auto" and self.execution_provider is not None
        return {
            "name": "onnxruntime" if is_ort else self.runtime,
            "device": use_device(self.device),
            "execution_provider": self.execution_provider,
            "precision": self.precision,
            "prefer": self.prefer or prefer,
            "num_threads": self.num_threads,
            "checkpoint": self.checkpoint,
            "base": self.base,
        }

    def open(self, bundle: Bundle, *, prefer: Preference = "latency") -> Runtime:
        """Open a bundle in the runtime that was asked for.

        Args:
            bundle: The bundle.
            prefer: What matters to the verb, where the command line does not say.
        """
        with wrong_arguments_are_usage_errors(), _choices_are_told():
            try:
                return open_runtime(bundle, **self.asked(prefer))
            except ArgumentError as exc:
                if exc.argument != "name":
                    raise
                raise ArgumentError("runtime", exc.problem) from exc


@contextmanager
def _choices_are_told() -> Iterator[None]:
    """Print in one line what `auto` chose; not what it chose before, which is told in logs."""

    class Teller(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if logging.getLogger().handlers:
                return  # the server's log has it
            if record.levelno >= logging.WARNING:
                print_warning(record.getMessage())
            elif record.getMessage().startswith("auto chose "):
                notes.print(record.getMessage(), markup=False, highlight=False, soft_wrap=True)

    logger, teller = logging.getLogger("actionclip_deploy.runtimes.auto"), Teller()
    level = logger.level
    logger.addHandler(teller)
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(teller)
        logger.setLevel(level)


def use_device(device: str | None) -> str | None:
    """A device of `open_runtime` or None.

    Of several GPUs of NVIDIA, this process sees from now on the one that is asked for.

    Raises:
        typer.BadParameter: If it is not the name of a device.
    """
    if device is None:
        return None
    found = re.fullmatch(r"(cpu|npu|cuda|gpu)(?::(\d+))?", device)
    if found is None or (found[1] in ("cpu", "npu") and found[2]):
        raise usage_error(
            f"--device is {device!r}; give cpu, cuda, or cuda:1 for the second GPU; of Intel gpu, "
            "gpu:1 or npu."
        )
    if found[1] == "gpu":
        return device
    if found[2] is not None:
        # Every library that runs graphs obeys this, as long as none has opened a GPU.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = None if visible is None else [name for name in visible.split(",") if name.strip()]
        index = int(found[2])
        if names is not None and index >= len(names):
            raise usage_error(
                f"--device is {device}, and CUDA_VISIBLE_DEVICES shows {len(names)} GPUs; give "
                "a lower number, or change the variable."
            )
        os.environ["CUDA_VISIBLE_DEVICES"] = str(index) if names is None else names[index].strip()
    return found[1]


ReuseOption = Annotated[
    bool,
    typer.Option(
        "--reuse/--no-reuse",
        help="Encode frames that are equal once, whatever their videos.",
        rich_help_panel=READING,
    ),
]


ResizeOption = Annotated[
    Region,
    typer.Option(
        "--resize",
        metavar="|".join(get_args(Region)),
        help="frame (exact), crop (what it keeps), or swscale (fastest).",
        rich_help_panel=READING,
    ),
]


@dataclass(frozen=True)
class ReadingOptions(OptionGroup):
    """How videos are read, and which there are in folders."""

    region: ResizeOption = "frame"
    decoder: Annotated[
        Decoder,
        typer.Option(
            "--decoder",
            metavar="NAME",
            help="What decodes: software, or nvdec of an NVIDIA GPU.",
            rich_help_panel=READING,
        ),
    ] = "software"
    max_pixels: MaxPixelsOption = MAX_PIXELS
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            metavar="N",
            help="Videos read at a time; by default, one per core.",
            rich_help_panel=READING,
        ),
    ] = None
    recursive: RecursiveOption = False
    reuse: ReuseOption = True

    def find(self, paths: Sequence[Path]) -> list[Path]:
        """The videos of files and folders."""
        check_num_threads("workers", self.workers)
        return find_videos(paths, recursive=self.recursive)

    def find_local(self, given: Sequence[str]) -> list[Path]:
        """As `find`, of what may be an address or a list, which only a folder of results takes."""
        for text in given:
            is_list = text.lower().endswith((".csv", ".parquet", ".txt"))
            if "://" in text or is_list:
                what = "a list of videos" if is_list else "an address"
                raise usage_error(
                    f"{text} is {what}, which goes into a folder of results; add --output FOLDER."
                )
        return self.find([Path(text) for text in given])


@dataclass(frozen=True)
class EngineOptions(OptionGroup):
    """Which machines score many videos."""

    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="local|ray",
            help="Who shares out the work: this program, on this machine; or Ray, on a cluster.",
            rich_help_panel=FOLDERS,
        ),
    ] = "local"
    address: Annotated[
        str,
        typer.Option(
            "--address",
            metavar="auto|local|HOST:PORT",
            help="The Ray cluster: that of RAY_ADDRESS or of this machine, one of this machine "
            "alone that ends with the run, or that of a head.",
            rich_help_panel=FOLDERS,
        ),
    ] = "auto"
    actors: Annotated[
        int | None,
        typer.Option(
            "--actors",
            min=1,
            metavar="N",
            help="Most processes of a Ray cluster that encode; by default as many as it has room "
            "for at the start.",
            rich_help_panel=FOLDERS,
        ),
    ] = None

    @property
    def is_ray(self) -> bool:
        """Whether Ray does the work."""
        return self.engine == "ray"

    def check_engine(self, context: typer.Context) -> None:
        """Refuse an engine that there is not, and what only the other one has.

        Raises:
            typer.BadParameter: If one of them was given.
        """
        if self.engine not in ("local", "ray"):
            raise usage_error(f"--engine is {self.engine!r}; it must be local or ray.")
        given = given_options(context)
        for name in ("address", "actors"):
            if name in given and not self.is_ray:
                raise usage_error(f"{given[name]} goes with --engine ray; add it, or leave it out.")


@dataclass(frozen=True)
class FolderOptions(EngineOptions):
    """How a run over many videos, into a folder of results, reads them, and where."""

    decode_seconds: Annotated[
        float,
        typer.Option(
            "--decode-seconds",
            min=0.1,
            metavar="SECONDS",
            help="Longest that decoding one video may take; the process is ended then.",
            rich_help_panel=FOLDERS,
        ),
    ] = 120.0
    decode_mib: Annotated[
        int,
        typer.Option(
            "--decode-mib",
            min=64,
            metavar="MIB",
            help="Most memory that decoding one video may take.",
            rich_help_panel=FOLDERS,
        ),
    ] = 2048
    fetch_mib: Annotated[
        int,
        typer.Option(
            "--fetch-mib",
            min=1,
            metavar="MIB",
            help="Most bytes of fetched videos that lie on a machine at a time.",
            rich_help_panel=FOLDERS,
        ),
    ] = 8192
    rows_per_file: Annotated[
        int,
        typer.Option(
            "--rows-per-file",
            min=1,
            metavar="N",
            help="Most rows of a Parquet file; a minute's rows are a file in any case.",
            rich_help_panel=FOLDERS,
        ),
    ] = 10_000

    def check(self, context: typer.Context, *, in_folder: bool) -> None:
        """Refuse what goes with a folder of results alone, and what does not go with one.

        Raises:
            typer.BadParameter: If one of them was given.
        """
        self.check_engine(context)
        given = given_options(context)
        if {"resume", "overwrite"} <= given.keys():
            raise usage_error("--resume and --overwrite were both given; choose one.")
        names = [each.name for each in fields(self)] + ["embeddings"]
        wrong = [each for each in given if each in (_NOT_IN_FOLDER if in_folder else names)]
        if wrong:
            how = "does not go with" if in_folder else "goes with"
            raise usage_error(
                f"{given[wrong[0]]} {how} a folder of results (--output FOLDER, a name without a "
                f"suffix); {'leave it out' if in_folder else 'give one, or leave it out'}."
            )

    def settings(self, reading: ReadingOptions, views: Views, **more: Any) -> BatchSettings:
        """How such a run reads and scores.

        Raises:
            typer.BadParameter: If a value does not go with it.
            MissingExtraError: If pyarrow is not installed.
        """
        from actionclip_deploy.scale.batch import BatchSettings

        check_num_threads("workers", reading.workers)
        if reading.decoder != "software":
            raise usage_error(
                f"--decoder is {reading.decoder}, and videos of such a run are decoded in "
                "processes of the CPU; leave it out."
            )
        return BatchSettings(
            views=views,
            region=reading.region,
            max_pixels=reading.max_pixels,
            decode_seconds=self.decode_seconds,
            decode_memory_bytes=self.decode_mib * 2**20,
            fetch_bytes=self.fetch_mib * 2**20,
            num_workers=reading.workers,
            **more,
        )


_NOT_IN_FOLDER = ("plot", "timeline", "reuse")


@dataclass(frozen=True)
class GridOptions(OptionGroup):
    """The windows that a long video or a live source is seen through."""

    window_seconds: Annotated[
        float | None,
        typer.Option(
            "--window",
            metavar="SECONDS",
            help="Length of a window; by default that of the training clips, if known, or half a "
            "second for each frame.",
            rich_help_panel=WINDOWS,
        ),
    ] = None
    stride_seconds: Annotated[
        float | None,
        typer.Option(
            "--stride",
            metavar="SECONDS",
            help="From one window to the next; by default window / frames.",
            rich_help_panel=WINDOWS,
        ),
    ] = None

    def grid(self, manifest: Manifest) -> WindowGrid:
        """Where the windows of a model lie.

        Raises:
            ValueError: If one of the two is not allowed.
        """
        return WindowGrid.of_model(
            manifest, window_seconds=self.window_seconds, stride_seconds=self.stride_seconds
        )


@dataclass(frozen=True)
class WindowOptions(GridOptions):
    """The windows, and when what they show is an event."""

    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            metavar="SCORE",
            help="Score at which an event opens; by default the label bank's where it is "
            "calibrated, else 0.6, or 0.5 for independent scores.",
            rich_help_panel=WINDOWS,
        ),
    ] = None


@dataclass(frozen=True)
class AnnotationOptions(OptionGroup):
    """How annotated videos are read."""

    annotation_format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help=f"Of the annotations: {', '.join(FORMATS)}; of intervals (evaluate --timeline): "
            f"{', '.join(INTERVAL_FORMATS)}.",
            rich_help_panel=ANNOTATIONS,
        ),
    ] = "auto"
    root: Annotated[
        Path | None,
        typer.Option(
            "--root",
            metavar="DIR",
            help="Folder that the videos' paths start from.",
            rich_help_panel=ANNOTATIONS,
        ),
    ] = None
    subset: Annotated[
        Subset,
        typer.Option(
            "--subset",
            metavar="train|test",
            help="Of annotations that have both.",
            rich_help_panel=ANNOTATIONS,
        ),
    ] = "test"
    split: Annotated[
        int,
        typer.Option(
            "--split",
            min=1,
            metavar="N",
            help="Of annotations that have several.",
            rich_help_panel=ANNOTATIONS,
        ),
    ] = 1

    def read(self, path: Path, labels: Sequence[str], **more: Any) -> list[Sample]:
        """The annotated videos of a list or a folder."""
        return list(
            read_annotations(
                path,
                labels,
                format=self.annotation_format,
                root=self.root,
                subset=self.subset,
                split=self.split,
                **more,
            )
        )
