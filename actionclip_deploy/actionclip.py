"""`ActionCLIP`: one object for the whole way, over the steps that everything else uses as well.

model = ActionCLIP("bundle")
print(model("video.mp4", labels=["opening a door", "closing a door"]))
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np

from actionclip_deploy import __version__
from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import (
    ArgumentError,
    BundleError,
    MissingExtraError,
    RuntimeUnavailableError,
    ShapeError,
    VideoError,
    WrongKindError,
)
from actionclip_deploy.events import WatchedLabels
from actionclip_deploy.files import remove_folder, sha256_of_file, work_lock, write_errors
from actionclip_deploy.keyed_store import cache_folder, key_name
from actionclip_deploy.labels import LabelBank, bank_for, embed_texts, named_labels
from actionclip_deploy.manifest import ScoreMethod
from actionclip_deploy.preprocess import Region
from actionclip_deploy.prompts import check_templates
from actionclip_deploy.recognizer import (
    Predictions,
    Recognizer,
    VideoEncoder,
)
from actionclip_deploy.runtimes import RUNTIMES, Runtime, open_runtime
from actionclip_deploy.runtimes.base import Float32Array, Preference
from actionclip_deploy.sampling import Views
from actionclip_deploy.scoring import SCORE_METHODS
from actionclip_deploy.stream import WindowGrid
from actionclip_deploy.timeline import Timeline, read_timeline
from actionclip_deploy.video import MAX_PIXELS, Decoder
from actionclip_deploy.video.memory import ArrayVideo, BytesVideo, VideoSource
from actionclip_deploy.video.reader import VIDEO_SUFFIXES, list_videos

logger = logging.getLogger(__name__)

Labels: TypeAlias = LabelBank | str | Path | Iterable[str] | None
Templates: TypeAlias = str | Path | Iterable[str] | None

_KEPT_BANKS = 16  # in memory; a bank of 400 labels and 16 templates has 13 MB
_BUNDLES_FOLDER = "bundles"  # of the cache
_CHECKPOINT_SUFFIXES = (".pt", ".pth", ".pyth", ".bin", ".ckpt", ".safetensors", ".onnx")


@dataclass(frozen=True)
class _Options:
    """What a call may say otherwise than the model."""

    templates: Templates
    views: str | Views
    top_k: int
    scores: ScoreMethod | None
    resize: Region
    decoder: Decoder
    max_pixels: int
    workers: int | None

    def but(self, **given: Any) -> _Options:
        """With what was given in the place of the model's.

        Raises:
            ValueError: As for `check`.
            WrongKindError: As for `check`.
        """
        said = {name: value for name, value in given.items() if value is not None}
        options = _Options(**{**vars(self), **said})
        options.check()
        return options

    def check(self) -> None:
        """Refuse what is not allowed, by the names that the options have here.

        Raises:
            ValueError: If an option has a value that is not allowed.
            WrongKindError: If it is of another kind.
        """
        self.parsed_views()
        for name in ("top_k", "max_pixels", "workers"):
            value = getattr(self, name)
            if name == "workers" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise WrongKindError(f"{name} is {value!r}; give a whole number of 1 or more.")
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more.")
        allowed = {"resize": get_args(Region), "decoder": get_args(Decoder)}
        for name, values in {**allowed, "scores": (None, *SCORE_METHODS)}.items():
            if getattr(self, name) not in values:
                choice = ", ".join(repr(value) for value in values if value is not None)
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {choice}.")

    def parsed_views(self) -> Views:
        """Clips and crops.

        Raises:
            ValueError: If there are none of that form.
        """
        if isinstance(self.views, Views):
            return self.views
        if isinstance(self.views, str):
            return Views.parse(self.views)
        raise WrongKindError(
            f"views is {self.views!r}; give CLIPSxCROPS as a string, such as '10x3', or a Views."
        )


class ActionCLIP:
    """Recognises actions in videos, among labels that you choose.

    A context manager; without `with`, what it holds is let go of when nobody has it any more.
    One is for one thread at a time.

    Options have the names that they have on the command line, and each call may give another
    value of those from `templates` to `workers`.

    Args:
        model: The folder of a bundle; or a checkpoint, which is exported when it is first used and
            kept in the cache (this alone needs PyTorch): its file, or a name that `actionclip
            export` takes, such as `motions`.
        runtime: As for `open_runtime`; `auto` for the fastest that is verified on this machine.
        device: As for `open_runtime`: `cpu`, `cuda`, `gpu` or `npu`; None leaves it to the
            runtime.
        run_precision: As `precision` of `open_runtime`: what `openvino` computes in, and `auto`
            may.
        prefer: What `auto` is to be fastest at, `"latency"` or `"throughput"`.
        num_threads: Threads of one call on the CPU; None for the cores that there are.
        templates: Sentences with `{}` for the label, or their file; None for the model's own.
        views: Clips x crops of a video, such as `"10x3"`, whose scores are averaged.
        top_k: Labels of a prediction.
        scores: How scores are made; see `Recognizer`. None for the model's own way.
        resize: `"frame"` as the original; `"crop"` and `"swscale"` are faster, see `Recognizer`.
        decoder: What decodes videos; see `VideoReader`.
        max_pixels: Of a frame; a video with larger ones fails.
        workers: Videos that are read at a time; None for one per core, at most 8.
        reuse: Whether frames that are equal are encoded once; see `VideoEncoder`.
        cache: Folder of the cache; True for that of `ACTIONCLIP_CACHE` or else of the platform,
            False for none.
        verify: Whether files of the bundle are held against their hashes.
        progress: Whether progress is shown in a terminal or a notebook.
        checkpoint: For `runtime="torch"` with a bundle: what it was exported from.
        family: Format of a checkpoint; this and what follows is for checkpoints alone, see
            `export.export_checkpoint`.
        num_frames: Frames of a clip, if the checkpoint does not say.
        precision: Of the graphs that see frames.
        base: The checkpoint that supplies what this one lacks.
        visual_prompt: How frames are combined, if the checkpoint does not say.

    Attributes:
        bundle: The bundle that runs.
        runtime: What runs it; `runtime.describe()` says what that really is.

    Raises:
        BundleError: If there is no such bundle, or it is damaged.
        CheckpointError: If there is no such checkpoint, or it cannot be read.
        MissingExtraError: If a package is missing, of the export for instance.
        RuntimeUnavailableError: If the runtime cannot be used here.
        ValueError: If an option has a value that is not allowed.
        WrongKindError: If `model` is none of these.
    """

    def __init__(
        self,
        model: str | Path | Bundle,
        *,
        runtime: str = "auto",
        device: str | None = None,
        run_precision: str | None = None,
        prefer: Preference = "latency",
        num_threads: int | None = None,
        templates: Templates = None,
        views: str | Views = "1x1",
        top_k: int = 5,
        scores: ScoreMethod | None = None,
        resize: Region = "frame",
        decoder: Decoder = "software",
        max_pixels: int = MAX_PIXELS,
        workers: int | None = None,
        reuse: bool = True,
        cache: bool | str | Path = True,
        verify: bool = True,
        progress: bool = True,
        checkpoint: str | Path | None = None,
        family: str = "auto",
        num_frames: int | None = None,
        precision: str = "fp32",
        base: str | Path | None = None,
        visual_prompt: str | None = None,
    ) -> None:
        self._options = _Options(
            templates, views, top_k, scores, resize, decoder, max_pixels, workers
        )
        self._options.check()  # what is wrong is told before the work
        if runtime not in RUNTIMES:
            raise ArgumentError(
                "runtime", f"is {runtime!r}; it must be one of {', '.join(RUNTIMES)}."
            )
        if not isinstance(device, str | None):
            raise WrongKindError(f"device is {device!r}; give 'cpu', 'cuda', 'gpu', 'npu' or None.")
        self._reuse = reuse
        self._cache = cache
        self._progress = progress
        export: dict[str, Any] = {
            "family": family,
            "num_frames": num_frames,
            "precision": precision,
            "base": base,
            "visual_prompt": visual_prompt,
        }
        opened, folder = _open_model(model, export, cache=cache, verify=verify, progress=progress)
        self._end = weakref.finalize(self, _let_go, None, folder)
        self.bundle = opened
        if runtime == "torch" and checkpoint is None and not _is_bundle(model):
            checkpoint = str(model)
        self.runtime: Runtime = open_runtime(
            opened,
            runtime,
            device=device,
            precision=run_precision,
            prefer=prefer,
            num_threads=num_threads,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            base=None if base is None or runtime != "torch" else Path(base),
            cache=cache,
        )
        self._end.detach()
        self._end = weakref.finalize(self, _let_go, self.runtime, folder)
        self._banks: OrderedDict[Any, LabelBank] = OrderedDict()

    def __call__(
        self,
        videos: Any,
        *,
        labels: Labels = None,
        stream: bool = False,
        templates: Templates = None,
        allow_unknown_words: bool = False,
        views: str | Views | None = None,
        top_k: int | None = None,
        scores: ScoreMethod | None = None,
        resize: Region | None = None,
        decoder: Decoder | None = None,
        max_pixels: int | None = None,
        workers: int | None = None,
        recursive: bool = False,
        progress: bool | None = None,
    ) -> Any:
        """Rank labels for a video, or for several.

        Frames in memory are RGB, uint8, and count as a whole video: of as many as the model takes
        all are used, of more T are sampled, of fewer some are used twice.

        Args:
            videos: One video: the name of a file; an array of frames, shape (T, H, W, 3), or a
                list of T frames, each an array (H, W, 3) or a PIL image; the bytes of a video
                file, or a file that is open in binary mode. Several: a folder, an array of shape
                (B, T, H, W, 3), a list or an iterator of any of these.
            labels: What to choose from: texts, a label file, the name of a bank of the bundle, or
                a `LabelBank`; None for the only bank of the bundle.
            stream: Whether outcomes are given one by one, as soon as they are there, from
                videos that are drawn as they are needed, at a memory that does not grow.
            templates: As for the model; so with the others. None for what it was given.
            allow_unknown_words: Whether a label is scored of which the model knows no word.
            views: As for the model.
            top_k: As for the model.
            scores: As for the model.
            resize: As for the model.
            decoder: As for the model.
            max_pixels: As for the model.
            workers: As for the model.
            recursive: Whether folders in a folder are looked through as well.
            progress: As for the model; with `stream` there is none.

        Returns:
            A `Prediction` of one video, `Predictions` of several, in which a `FailedVideo` stands
            for one that gave no frames; with `stream`, a generator of both.

        Raises:
            VideoError: If one video was given and no frame can be had from it; or if a folder
                holds none.
            LabelError: If labels or templates cannot be used.
            UnknownWordsError: If the model knows no word of a label.
            LabelBankError: If there is no such bank, or not just one where none was named.
            ShapeError: If an array has another shape or dtype; says how to change it.
            WrongKindError: If an argument is of a kind that is not taken.
            ValueError: If an option has a value that is not allowed.
            InferenceError: If the runtime fails.
        """
        self._check_open()
        options = self._options.but(
            templates=templates,
            views=views,
            top_k=top_k,
            scores=scores,
            resize=resize,
            decoder=decoder,
            max_pixels=max_pixels,
            workers=workers,
        )
        given = _videos_of(videos, recursive=recursive)
        is_shown = self._progress if progress is None else progress
        recognizer = Recognizer(
            self.runtime,
            self._bank(labels, options.templates, allow_unknown_words, is_shown),
            views=options.parsed_views(),
            top_k=options.top_k,
            method=options.scores,
            region=options.resize,
            decoder=options.decoder,
            max_pixels=options.max_pixels,
            reuse=self._reuse,
        )
        if isinstance(given, Path | VideoLike):
            if not stream:
                return recognizer.predict(given)
            given = [given]
        outcomes = recognizer.predict_all(given, num_workers=options.workers)
        if stream:
            return outcomes
        return Predictions(_watched(outcomes, _length_of(given), is_shown))

    def timeline(
        self,
        video: Any,
        *,
        labels: Labels = None,
        window_seconds: float | None = None,
        stride_seconds: float | None = None,
        thresholds: float | Mapping[str, float] | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        min_seconds: float | None = None,
        merge_seconds: float | None = None,
        still: float = 0.0,
        templates: Templates = None,
        allow_unknown_words: bool = False,
        scores: ScoreMethod | None = None,
        resize: Region | None = None,
        decoder: Decoder | None = None,
        max_pixels: int | None = None,
        progress: bool | None = None,
    ) -> Timeline:
        """Find when labels hold in a long video.

        Windows slide over it, each a clip of the model's T frames; frames that windows share are
        encoded once.

        Args:
            video: The name of a file, its bytes, or a file that is open in binary mode.
            labels: As for a call of the model; so with `templates` to `progress`.
            window_seconds: Length of a window; None for that of the clips the model was trained
                on, or where that is not known, half a second for each frame.
            stride_seconds: From one window to the next, a multiple of the window over T; None
                for one such step.
            thresholds: The score at which a label holds, for all or for some by name; None for
                that of a calibrated bank, or else a guess, with a warning.
            groups: Labels that count as one, by the name of their group.
            min_seconds: Shorter events are left out; None for two strides.
            merge_seconds: Events of a label no further apart are one; None for a quarter of a
                window.
            still: How much a frame may differ from the last one encoded, on average from 0 to
                255, for its feature to be taken again. 0 changes no score.
            templates: Sentences with `{}` for the label, or their file.
            allow_unknown_words: Whether a label is scored of which the model knows no word.
            scores: How scores are made.
            resize: `"frame"`, `"crop"` or `"swscale"`.
            decoder: What decodes the video.
            max_pixels: Of a frame.
            progress: Whether progress is shown.

        Returns:
            A `Timeline`: its events, and what labels scored in each window.

        Raises:
            VideoError: If no frame can be had from the video, or its frames have no times.
            LabelError: If labels, templates, thresholds or groups cannot be used.
            WrongKindError: If an argument is of a kind that is not taken.
            ValueError: If an option has a value that is not allowed.
            InferenceError: If the runtime fails.
        """
        self._check_open()
        options = self._options.but(
            templates=templates,
            scores=scores,
            resize=resize,
            decoder=decoder,
            max_pixels=max_pixels,
        )
        given = _videos_of(video)
        if not isinstance(given, Path | VideoLike):
            raise WrongKindError(
                "A timeline is of one video, and several were given; call it for each."
            )
        is_shown = self._progress if progress is None else progress
        bank = self._bank(labels, options.templates, allow_unknown_words, is_shown)
        window, stride = bank.grid_for(window_seconds, stride_seconds)
        grid = WindowGrid.of_model(
            self.bundle.manifest, window_seconds=window, stride_seconds=stride
        )
        recognizer = Recognizer(
            self.runtime,
            bank,
            method=options.scores,
            region=options.resize,
            decoder=options.decoder,
            max_pixels=options.max_pixels,
        )
        watched = WatchedLabels.of(
            recognizer.bank, recognizer.method, thresholds=thresholds, groups=groups
        )
        with _progress("Scoring windows", is_shown) as tell:
            return read_timeline(
                recognizer,
                given,
                grid,
                watched=watched,
                still=still,
                min_seconds=min_seconds,
                merge_seconds=merge_seconds,
                progress=lambda done, total: tell(round(done), round(total)),
            )

    def embed(
        self,
        videos: Any,
        *,
        views: str | Views | None = None,
        resize: Region | None = None,
        decoder: Decoder | None = None,
        max_pixels: int | None = None,
        workers: int | None = None,
        recursive: bool = False,
        progress: bool | None = None,
    ) -> Float32Array:
        """Embed a video, or several, as the model compares them with texts.

        Args:
            videos: As for a call of the model.
            views: As for the model; each view gives an embedding of its own.
            resize: As for the model.
            decoder: As for the model.
            max_pixels: As for the model.
            workers: As for the model.
            recursive: Whether folders in a folder are looked through as well.
            progress: As for the model.

        Returns:
            float32, of unit norm: shape (V, D) of one video with V views, which is 1 unless more
            were asked for; (B, V, D) of several.

        Raises:
            VideoError: If no frame can be had from one of them.
            ShapeError: As for a call of the model; so with the others.
        """
        self._check_open()
        options = self._options.but(
            views=views,
            resize=resize,
            decoder=decoder,
            max_pixels=max_pixels,
            workers=workers,
        )
        encoder = VideoEncoder(
            self.runtime,
            views=options.parsed_views(),
            region=options.resize,
            decoder=options.decoder,
            max_pixels=options.max_pixels,
            reuse=self._reuse,
        )
        given = _videos_of(videos, recursive=recursive)
        if isinstance(given, Path | VideoLike):
            return encoder.encode(given).embeddings
        is_shown = self._progress if progress is None else progress
        rows = []
        found = encoder.encode_all(given, num_workers=options.workers)
        with closing(found):
            for encoded in _watched(found, _length_of(given), is_shown):
                if encoded.work.error is not None:
                    raise encoded.work.error
                rows.append(encoded.embeddings)
        width = self.bundle.manifest.model.embedding_dim
        empty = np.empty((0, options.parsed_views().num_views, width), np.float32)
        return np.stack(rows) if rows else empty

    def embed_text(self, texts: str | Iterable[str]) -> Float32Array:
        """Embed texts as they are, without a template.

        Args:
            texts: M texts; a string is one.

        Returns:
            float32, of unit norm, shape (M, D).

        Raises:
            LabelError: If one is no text, or is too long for the model.
        """
        self._check_open()
        return embed_texts(self.bundle, self.runtime, [texts] if isinstance(texts, str) else texts)

    def close(self) -> None:
        """Let go of everything; a second call does nothing."""
        self._end()

    def __enter__(self) -> ActionCLIP:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        model, info = self.bundle.manifest.model, self.runtime.describe()
        state = "" if self._end.alive else ", closed"
        return (
            f"<ActionCLIP {str(self.bundle.path)!r}: {model.backbone}, {model.visual_prompt}, "
            f"{model.num_frames} frames, {info.name} on {info.execution_provider}{state}>"
        )

    def _bank(
        self, labels: Labels, templates: Templates, allow_unknown_words: bool, is_shown: bool
    ) -> LabelBank:
        given = named_labels(self.bundle, labels)
        if isinstance(given, LabelBank):
            return bank_for(self.bundle, self.runtime, given, templates=templates)
        if templates is not None and not isinstance(templates, str | Path):
            templates = check_templates(templates)
        is_kept = not isinstance(templates, str | Path)  # a file may change
        state = self.bundle.label_bank_state(given) if isinstance(given, str) else ""
        key = (given, templates, allow_unknown_words, state)
        if is_kept and key in self._banks:
            self._banks.move_to_end(key)
            return self._banks[key]
        with _progress("Embedding labels", is_shown) as tell:
            bank = bank_for(
                self.bundle,
                self.runtime,
                given,
                templates=templates,
                allow_unknown_words=allow_unknown_words,
                cache=self._cache,
                progress=tell,
            )
        if is_kept:
            self._banks[key] = bank
            while len(self._banks) > _KEPT_BANKS:
                self._banks.popitem(last=False)
        return bank

    def _check_open(self) -> None:
        if not self._end.alive:
            raise RuntimeUnavailableError(
                f"This ActionCLIP of {self.bundle.path} is closed; open it again."
            )


def _let_go(runtime: Runtime | None, folder: Path | None) -> None:
    if runtime is not None:
        runtime.close()
    if folder is not None:
        remove_folder(folder)


# The bundle of a model, which is made if it is a checkpoint


def _is_bundle(model: object) -> bool:
    return isinstance(model, Bundle) or os.path.isdir(str(model))  # noqa: PTH112


def _open_model(
    model: str | Path | Bundle,
    export: dict[str, Any],
    *,
    cache: bool | str | Path,
    verify: bool,
    progress: bool,
) -> tuple[Bundle, Path | None]:
    """A model's bundle, and the folder to remove when it is not used any more."""
    if isinstance(model, Bundle):
        return model, None
    if not isinstance(model, str | os.PathLike):
        raise WrongKindError(
            f"model is of type {type(model).__name__}; give the folder of a bundle, the file of a "
            "checkpoint or its name."
        )
    if _is_bundle(model):
        said = [name for name, value in export.items() if value not in (None, "auto", "fp32")]
        if said:
            raise ValueError(
                f"{' and '.join(said)} was given, which says how a checkpoint is exported, and "
                f"{model} is a folder; leave it out, or give the checkpoint."
            )
        return Bundle.open(model, verify=verify), None
    name = str(model)
    path = Path(model)
    is_file = path.is_file()
    is_path = os.sep in name or path.suffix.lower() in _CHECKPOINT_SUFFIXES
    if is_path and not is_file and ":" not in name:
        raise BundleError(
            f"There is no bundle and no checkpoint {name}; check its name, or make a bundle "
            "with `actionclip export`."
        )
    root = cache_folder(cache)
    if root is None:
        folder = Path(tempfile.mkdtemp(prefix="actionclip-"))
        try:
            _export(name, folder / "bundle", export, progress)
            return Bundle.open(folder / "bundle", verify=verify), folder
        except BaseException:
            remove_folder(folder)
            raise
    bundles = root / _BUNDLES_FOLDER
    with write_errors(bundles):
        bundles.mkdir(parents=True, exist_ok=True, mode=0o700)
    target = bundles / _folder_name(name, path if is_file else None, export)
    with work_lock(bundles / f".lock-{target.name}"):
        try:
            return _open_kept(target, verify), None
        except BundleError as exc:
            if target.exists():
                logger.warning("the bundle of %s is made again: %s", name, exc)
            _export(name, target, export, progress)
    return Bundle.open(target, verify=verify), None


def _open_kept(folder: Path, verify: bool) -> Bundle:
    """Open a bundle of the cache, all of whose files are what was written."""
    bundle = Bundle.open(folder, verify=verify)
    for name in bundle.manifest.files:
        bundle.file(name)
    return bundle


def _folder_name(name: str, path: Path | None, export: dict[str, Any]) -> str:
    """A name that stands for the checkpoint's content and how it is exported."""
    base = export["base"]
    packaged = Path(__file__).parent / name / f"{name}.safetensors"
    if path is None and packaged.is_file():
        path = packaged
    key = {
        "checkpoint": name if path is None else sha256_of_file(path),
        "file": "" if path is None else path.name,  # which may say what T is
        "version": __version__,
        **export,
        "base": sha256_of_file(Path(base)) if base and Path(base).is_file() else str(base),
    }
    stem = "".join(char if char.isalnum() or char in "-_" else "-" for char in Path(name).stem)
    return f"{stem[:40].strip('-') or 'checkpoint'}-{key_name(key)[:12]}"


def _export(checkpoint: str, output: Path, export: dict[str, Any], progress: bool) -> None:
    try:
        with warnings.catch_warnings():
            # In a notebook without ipywidgets, tqdm says so when open_clip imports it.
            warnings.filterwarnings("ignore", message="IProgress not found")
            from actionclip_deploy.export import export_checkpoint
    except ImportError as exc:
        what = f"{checkpoint} is not the folder of a bundle, and making one of a checkpoint"
        raise MissingExtraError(what, "export") from exc
    is_shown = progress and (_is_notebook() or sys.stderr.isatty())

    def tell(step: str) -> None:
        if is_shown:
            print(f"  {step}", file=sys.stderr, flush=True)

    if is_shown:
        print(f"Making a bundle of {checkpoint}, once: {output}", file=sys.stderr, flush=True)
    export_checkpoint(checkpoint, output, overwrite=True, on_step=tell, **export)


# What is given as videos

VideoLike = ArrayVideo | BytesVideo
_GivenVideos: TypeAlias = "Path | ArrayVideo | BytesVideo | Iterable[Path | VideoSource]"


def _videos_of(given: Any, *, recursive: bool = False, name: str = "frames") -> _GivenVideos:
    """One video or several, from whatever form they have."""
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        return _folder_of(path, recursive) if os.path.isdir(path) else path  # noqa: PTH112
    if isinstance(given, VideoLike):
        return given
    if isinstance(given, bytes | bytearray | memoryview):
        return BytesVideo(given, name.replace("frames", "bytes"))
    if hasattr(given, "read") and not hasattr(given, "__array__"):
        return _file_of(given)
    if _is_picture(given):
        given = _pixels_of(given, name)
    if hasattr(given, "__array__"):
        return _array_of(given, name, recursive)
    if isinstance(given, list | tuple) and given and all(map(_is_frame, given)):
        return ArrayVideo(_stacked(given, name), name)
    if isinstance(given, Iterable) and not isinstance(given, Mapping | Set):
        each = _each_of(given, recursive)
        return list(each) if isinstance(given, list | tuple) else each
    raise WrongKindError(
        f"videos is of type {type(given).__name__}; give a file's name, a folder, frames as an "
        "array (T, H, W, 3) of uint8, the bytes of a video file, or a list or iterator of these."
    )


def _each_of(given: Iterable[Any], recursive: bool) -> Iterator[Path | VideoSource]:
    for place, item in zip(count(), given):
        found = _videos_of(item, recursive=recursive, name=f"frames[{place}]")
        if isinstance(found, Path | VideoLike):
            yield found
        else:
            yield from found


def _folder_of(folder: Path, recursive: bool) -> list[Path | VideoSource]:
    def fail(exc: OSError) -> None:
        raise VideoError(f"The folder {exc.filename} cannot be read ({exc.strerror}).") from exc

    found = list_videos(folder, recursive=recursive, on_error=fail)
    if not found:
        deeper = not recursive and list_videos(folder, recursive=True)
        raise VideoError(
            f"{folder} holds no video files itself, but folders in it do; give recursive=True."
            if deeper
            else f"{folder} holds no video files, which are known by their suffixes "
            f"({', '.join(sorted(VIDEO_SUFFIXES))}); give another folder, or files by their names."
        )
    return list(found)


def _file_of(file: Any) -> BytesVideo:
    data = file.read()
    if not isinstance(data, bytes | bytearray | memoryview):
        raise WrongKindError(
            f"The file that was given reads as {type(data).__name__}; open it in binary mode "
            "('rb'), or give its name."
        )
    name = getattr(file, "name", None)
    return BytesVideo(data, Path(name).name if isinstance(name, str) else "bytes")


def _array_of(given: Any, name: str, recursive: bool) -> _GivenVideos:
    ndim = getattr(given, "ndim", None)
    kind = getattr(getattr(given, "dtype", None), "kind", "")
    if kind in ("U", "O", "T"):  # an array or a column of names
        return list(_each_of(given.tolist(), recursive))
    if ndim == 5:
        return [ArrayVideo(clip, f"{name}[{place}]") for place, clip in enumerate(given)]
    return ArrayVideo(given, name)


def _is_picture(given: object) -> bool:
    return type(given).__module__.startswith("PIL.") and hasattr(given, "convert")


def _is_frame(given: object) -> bool:
    is_array = hasattr(given, "__array__") and getattr(given, "ndim", None) == 3
    return is_array or _is_picture(given)


def _pixels_of(picture: Any, name: str) -> Any:
    from actionclip_deploy.evaluate.frames import rgb_of

    copy = picture.copy()  # which may be turned
    copy.format = picture.format
    try:
        return rgb_of(copy)
    except ValueError as exc:
        raise ShapeError(f"A picture of {name} cannot be taken: {exc}.") from exc


def _stacked(frames: Iterable[Any], name: str) -> Any:
    arrays = [np.asarray(_pixels_of(f, name) if _is_picture(f) else f) for f in frames]
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        raise ShapeError(
            f"The pictures in {name} have different shapes ({', '.join(map(str, shapes))}); give "
            "frames of one size, as they come from one video."
        )
    return np.stack(arrays)


def _length_of(given: Iterable[Any]) -> int | None:
    return len(given) if isinstance(given, list) else None


# Progress, in a terminal or a notebook


def _is_notebook() -> bool:
    return "ipykernel" in sys.modules


def _watched(items: Iterable[Any], total: int | None, is_shown: bool) -> Iterator[Any]:
    with _progress("Scoring videos", is_shown) as tell:
        for done, item in enumerate(items, start=1):
            yield item
            if total is not None and total > 1:
                tell(done, total)


@contextmanager
def _progress(title: str, is_shown: bool) -> Iterator[Callable[[int, int], None]]:
    """What to call with the numbers of what is done and of all; nothing is seen before."""
    if is_shown and _is_notebook():
        yield _notebook_bar()
        return
    if not (is_shown and sys.stderr.isatty()):
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def _notebook_bar() -> Callable[[int, int], None]:
    # IPython's own: rich and tqdm need ipywidgets there.
    import IPython.display

    display: Any = IPython.display
    bars: list[Any] = []

    def tell(done: int, total: int) -> None:
        if not bars:
            bars.append(display.ProgressBar(total))
            bars[0].display()
        bars[0].progress = done

    return tell
