"""From a fine-tuned ActionCLIP checkpoint to a verified ONNX bundle that scores videos.

    model = ActionCLIP("bundle")
    print(model("video.mp4", labels=["opening a door", "closing a door"]))

The steps behind it are `Bundle`, `open_runtime`, `LabelBank` and `Recognizer`.

Importing this package imports neither torch nor a runtime; making a bundle is
`actionclip_deploy.export.export_checkpoint`, which needs the extra `export`.
"""

TYPE_CHECKING = False  # of `typing`, which would have to be imported first
if TYPE_CHECKING:
    from actionclip_deploy.actionclip import ActionCLIP
    from actionclip_deploy.bundle import Bundle
    from actionclip_deploy.client import AsyncClient, Client
    from actionclip_deploy.errors import (
        ActionClipError,
        AnnotationWarning,
        ArchiveError,
        ArgumentError,
        BenchmarkError,
        BundleError,
        CheckpointError,
        ClusterError,
        DamagedFileError,
        DecoderUnavailableError,
        EngineError,
        ExportError,
        FileWriteError,
        InferenceError,
        IntegrityError,
        LabelBankError,
        LabelChoiceError,
        LabelError,
        LabelWarning,
        MissingExtraError,
        ParityError,
        RequestRefusedError,
        ResultFileError,
        RuntimeUnavailableError,
        ShapeError,
        SinkError,
        ThresholdWarning,
        TrainingError,
        UnknownWordsError,
        VideoError,
        VideoListError,
        VideoWarning,
        WrongKindError,
    )
    from actionclip_deploy.labels import LabelBank
    from actionclip_deploy.manifest import Manifest
    from actionclip_deploy.moments import Moment, Moments
    from actionclip_deploy.prompts import LABEL_ONLY, TEMPLATES, read_labels, read_templates
    from actionclip_deploy.recognizer import (
        FailedVideo,
        LabelScore,
        Prediction,
        Predictions,
        Recognizer,
    )
    from actionclip_deploy.runtimes import Runtime, RuntimeInfo, open_runtime
    from actionclip_deploy.runtimes.parity import ParityReport, verify_bundle
    from actionclip_deploy.sampling import Views
    from actionclip_deploy.scoring import score_clips, top_k
    from actionclip_deploy.search import Archive
    from actionclip_deploy.timeline import Timeline
    from actionclip_deploy.video import Clip, VideoReader, read_clip

__version__ = "0.1.0"

__all__ = [
    "LABEL_ONLY",
    "TEMPLATES",
    "ActionCLIP",
    "ActionClipError",
    "AnnotationWarning",
    "Archive",
    "ArchiveError",
    "ArgumentError",
    "AsyncClient",
    "BenchmarkError",
    "Bundle",
    "BundleError",
    "CheckpointError",
    "Client",
    "Clip",
    "ClusterError",
    "DamagedFileError",
    "DecoderUnavailableError",
    "EngineError",
    "ExportError",
    "FailedVideo",
    "FileWriteError",
    "InferenceError",
    "IntegrityError",
    "LabelBank",
    "LabelBankError",
    "LabelChoiceError",
    "LabelError",
    "LabelScore",
    "LabelWarning",
    "Manifest",
    "MissingExtraError",
    "Moment",
    "Moments",
    "ParityError",
    "ParityReport",
    "Prediction",
    "Predictions",
    "Recognizer",
    "RequestRefusedError",
    "ResultFileError",
    "Runtime",
    "RuntimeInfo",
    "RuntimeUnavailableError",
    "ShapeError",
    "SinkError",
    "ThresholdWarning",
    "Timeline",
    "TrainingError",
    "UnknownWordsError",
    "VideoError",
    "VideoListError",
    "VideoReader",
    "VideoWarning",
    "Views",
    "WrongKindError",
    "open_runtime",
    "read_clip",
    "read_labels",
    "read_templates",
    "score_clips",
    "top_k",
    "verify_bundle",
]

# Where the names are. They are imported when they are first asked for: the command line and each
# of its helpers import this package, and should begin without numpy, pydantic and PyAV.
_MODULES = {
    "actionclip": "ActionCLIP",
    "bundle": "Bundle",
    "client": "AsyncClient Client",
    "labels": "LabelBank",
    "manifest": "Manifest",
    "moments": "Moment Moments",
    "prompts": "LABEL_ONLY TEMPLATES read_labels read_templates",
    "recognizer": "FailedVideo LabelScore Prediction Predictions Recognizer",
    "runtimes": "Runtime RuntimeInfo open_runtime",
    "runtimes.parity": "ParityReport verify_bundle",
    "sampling": "Views",
    "scoring": "score_clips top_k",
    "search": "Archive",
    "timeline": "Timeline",
    "video": "Clip VideoReader read_clip",
}


def __getattr__(name: str) -> object:
    """Import a public name, or a module of the package, when it is first used."""
    from importlib import import_module

    is_error = name.endswith(("Error", "Warning")) and name in __all__
    home = "errors" if is_error else None
    home = next((module for module, names in _MODULES.items() if name in names.split()), home)
    if home is not None:
        value: object = getattr(import_module(f"{__name__}.{home}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as exc:
            if exc.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
