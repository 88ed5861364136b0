"""A bundle as a model repository of Triton: graphs, whole clips, label banks, and their configs.

    write_repository(bundle, Path("repository"), RepositoryOptions())

Models are `visual`, `temporal`, `textual`, `clip` for whole clips, and `scores_NAME` for each label
bank, with the names of tensors that our own server has. Configs are made of Triton's own protobuf,
so none has a field that Triton does not know.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from actionclip_deploy import __version__
from actionclip_deploy.bundle import MANIFEST_NAME, Bundle, new_folder
from actionclip_deploy.errors import (
    ArgumentError,
    BundleError,
    EngineError,
    MissingExtraError,
    ParityError,
)
from actionclip_deploy.files import sha256_of_file, write_bytes, write_json, write_text
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.manifest import GraphName, GraphOrClip, Manifest, TensorSpec
from actionclip_deploy.runtimes.base import Array, Float32Array
from actionclip_deploy.runtimes.call_sizes import SERVER_CLIPS_PER_CALL, CallSizes
from actionclip_deploy.runtimes.onnx_graphs import (
    check_model,
    join_graphs,
    read_model,
    scoring_graph,
    write_model,
)
from actionclip_deploy.runtimes.parity import Golden
from actionclip_deploy.scoring import mean_embedding, score

try:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2
except ModuleNotFoundError as exc:
    raise MissingExtraError("actionclip triton", "triton") from exc

RepositoryRuntime = Literal["onnxruntime", "openvino", "tensorrt", "python"]
RECORD_NAME = "actionclip.json"
GOLDEN_TOLERANCE = 1e-6  # of a clip by one graph, against the same graphs one after the other
# Of a label's score: cosines are float32 here and float64 there, and the scale is 100.
SCORE_TOLERANCE = 1e-5
_MODEL_FILE = "model.onnx"
_MICROSECONDS = 1_000_000
_KINDS = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "cuda": "KIND_GPU"}
_TYPES = {"uint8": "TYPE_UINT8", "int32": "TYPE_INT32", "float32": "TYPE_FP32"}
_PROVENANCE = "actionclip_"


@dataclass(frozen=True)
class RepositoryOptions:
    """How Triton is to run a bundle.

    Attributes:
        runtime: The backend of the graphs.
        max_batch: Clips in a call; the T frames of a clip count as one.
        max_delay_ms: How long a request may wait for others to share a call with.
        queue: Requests of a model that may wait; more are refused.
        queue_seconds: How long they may wait before they are refused.
        instances: Of each graph, on each device.
        device: `auto` leaves it to Triton, which takes all GPUs that it finds.
        prefix: What the names of the models begin with, where a server has several bundles.
        labels: Names of the label banks that get a model; None for all.
        plans: For `tensorrt`, the plan of each graph, by the compute capability that they are for,
            such as 8.7; empty for those that fit every GPU.
    """

    runtime: RepositoryRuntime = "onnxruntime"
    max_batch: int = SERVER_CLIPS_PER_CALL
    max_delay_ms: float = 2.0
    queue: int = 256
    queue_seconds: float = 60.0
    instances: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    prefix: str = ""
    labels: tuple[str, ...] | None = None
    plans: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.runtime not in get_args(RepositoryRuntime):
            raise ArgumentError(
                "runtime",
                f"is {self.runtime!r}; it must be one of {', '.join(get_args(RepositoryRuntime))}.",
            )
        if self.device not in _KINDS:
            raise ArgumentError(
                "device", f"is {self.device!r}; it must be one of {', '.join(_KINDS)}."
            )
        for name in ("max_batch", "queue", "queue_seconds", "instances"):
            number = getattr(self, name)
            if not (math.isfinite(number) and number > 0):
                raise ArgumentError(name, f"is {number}; it must be a positive number.")
        if not (math.isfinite(self.max_delay_ms) and self.max_delay_ms >= 0):
            raise ArgumentError("max_delay_ms", f"is {self.max_delay_ms}; it must be 0 or more.")
        if self.prefix and not self.prefix.replace("_", "").replace("-", "").isalnum():
            raise ArgumentError(
                "prefix", f"is {self.prefix!r}; it may have letters, digits, - and _ alone."
            )
        if (self.runtime == "tensorrt") != bool(self.plans):
            raise EngineError(
                "There are no engines of this bundle to put into the repository; build them with "
                "`actionclip build` on each kind of GPU, with one cache, and write it there."
            )


def write_repository(
    bundle: Bundle,
    target: Path,
    options: RepositoryOptions,
    *,
    adds_version: bool = False,
) -> dict[str, int]:
    """Write a model repository, whole or not at all.

    Args:
        bundle: Whose graphs it has; its files are held against their hashes.
        target: The new folder.
        options: How Triton is to run it.
        adds_version: Whether a repository that is there gets this bundle as its next version, which
            Triton then serves; older versions stay for a way back.

    Returns:
        The version of each model, by name.

    Raises:
        BundleError: If the target exists, or is a repository of other models.
        ParityError: If the graph of whole clips does not give what the golden data say.
    """
    golden = Golden.load(bundle)
    before = _read_record(target) if adds_version else None
    bundle_sha256 = sha256_of_file(bundle.path / MANIFEST_NAME)
    with new_folder(target, overwrite=adds_version, marker=RECORD_NAME) as folder:
        if before is not None:
            shutil.copytree(target, folder, dirs_exist_ok=True)
        writer = _Writer(bundle, folder, options, bundle_sha256, before or {})
        writer.write(golden)
        write_json(folder / RECORD_NAME, writer.record())
    return writer.versions


def _read_record(target: Path) -> dict[str, Any] | None:
    """What a repository says of itself; None where there is none yet."""
    path = target / RECORD_NAME
    if not target.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record
    except (OSError, ValueError) as exc:
        raise BundleError(
            f"{target} is no repository that this program wrote ({exc}); choose another name."
        ) from exc


class _Writer:
    """Writes the models of one bundle into a folder."""

    def __init__(
        self,
        bundle: Bundle,
        folder: Path,
        options: RepositoryOptions,
        bundle_sha256: str,
        before: Mapping[str, Any],
    ) -> None:
        self._bundle, self._folder, self._options = bundle, folder, options
        self._manifest: Manifest = bundle.manifest
        self._bundle_sha256 = bundle_sha256
        self._history: dict[str, list[str]] = {
            name: list(hashes) for name, hashes in before.get("versions", {}).items()
        }
        sizes = CallSizes.of_server(self._manifest.model, options.max_batch)
        self._rows: dict[str, int] = {
            "visual": sizes.visual,
            "temporal": sizes.temporal,
            "textual": sizes.textual,
            "clip": options.max_batch,
        }
        self.versions: dict[str, int] = {}

    def record(self) -> dict[str, Any]:
        """What the repository says of itself: which version of a model is of which bundle."""
        return {
            "format": 1,
            "program": f"actionclip-deploy {__version__}",
            "versions": self._history,
        }

    def write(self, golden: Golden) -> None:
        """Write all models."""
        for graph in self._manifest.graphs:
            self._write_graph("clip" if graph == "video" else graph, graph)
        if "video" not in self._manifest.graphs:
            self._write_clip(golden)
        for name in self._bank_names():
            self._write_bank(LabelBank.load(self._bundle, name, calibrated=False))

    def _bank_names(self) -> Sequence[str]:
        names = self._options.labels
        return self._bundle.label_bank_names() if names is None else names

    def _write_graph(self, name: GraphOrClip, graph: GraphName) -> None:
        folder = self._version_folder(name)
        config = self._graph_config(name)
        if self._options.runtime == "tensorrt":
            for capability, plans in self._options.plans.items():
                if not capability:
                    write_bytes(folder / "model.plan", plans[graph])
                    continue
                file = f"model_{capability.replace('.', '_')}.plan"
                write_bytes(folder / file, plans[graph])
                config.cc_model_filenames[capability] = file
        else:
            self._copy_graph(graph, folder)
        self._provenance(config, graph=graph)
        self._finish(name, config)

    def _copy_graph(self, graph: GraphName, folder: Path) -> None:
        """The file of a graph, with the weights that lie beside it, which it names."""
        path = self._bundle.graph_path(graph)
        beside = [
            self._bundle.file(name)
            for name in self._manifest.files
            if name != path.name and name.startswith(f"{path.name}.")
        ]
        shutil.copyfile(path, folder / _MODEL_FILE)
        for each in beside:
            shutil.copyfile(each, folder / each.name)
        self._add_program(folder)

    def _write_clip(self, golden: Golden) -> None:
        """Whole clips: one graph, or for plans a program that asks the two models."""
        folder, config = self._version_folder("clip"), self._graph_config("clip")
        if self._options.runtime == "tensorrt":
            config.backend = "python"
            config.default_model_filename = ""
            self._add_file(folder, "triton_clip.py")
            for key, value in {
                "visual_model": self._options.prefix + "visual",
                "temporal_model": self._options.prefix + "temporal",
                "visual_rows": str(self._rows["visual"]),
            }.items():
                config.parameters[key].string_value = value
            del config.model_warmup[:]  # which would ask models that are not loaded yet
            config.dynamic_batching.Clear()
            config.ClearField("dynamic_batching")
            _set_instances(config, self._options.instances, "KIND_CPU")
        else:
            model = self._manifest.model
            joined = join_graphs(
                read_model(self._bundle.graph_path("visual")),
                read_model(self._bundle.graph_path("temporal")),
                num_frames=model.num_frames if model.fixed_num_frames else "T",
                input_size=model.input_size,
            )
            path = folder / _MODEL_FILE
            write_model(joined, path)
            check_model(path)
            self._check_clip(path, golden)
            self._add_program(folder)
        self._provenance(config)
        self._finish("clip", config)

    def _check_clip(self, path: Path, golden: Golden) -> None:
        """Compare the graph of whole clips with the two that it is made of."""
        from actionclip_deploy.runtimes.ort import GraphSession

        def run(path: Path, array: Array) -> Float32Array:
            (output,) = GraphSession(path, num_threads=1).run(array)
            return np.asarray(output, np.float32)

        frames = golden.frames
        features = run(self._bundle.graph_path("visual"), frames.reshape(-1, *frames.shape[2:]))
        expected = run(self._bundle.graph_path("temporal"), features.reshape(*frames.shape[:2], -1))
        difference = float(np.abs(run(path, frames) - expected).max())
        if not difference <= GOLDEN_TOLERANCE:
            raise ParityError(
                f"The graph of whole clips differs by {difference:.1e} from the two that it is "
                f"made of, and may by {GOLDEN_TOLERANCE:.0e}; report it with the bundle's manifest."
            )

    def _write_bank(self, bank: LabelBank) -> None:
        name = f"scores_{bank.name}"
        folder, spec = self._version_folder(name), self._manifest.scores
        is_mean = spec.method == "mean-embedding"
        embeddings = mean_embedding(bank.embeddings) if is_mean else bank.embeddings
        path = folder / _MODEL_FILE
        write_model(scoring_graph(embeddings, method=spec.method, scale=spec.scale), path)
        check_model(path)
        self._check_bank(path, bank)
        self._add_program(folder)
        config = self._config(name, rows=self._rows["clip"])
        if self._options.runtime in ("tensorrt", "openvino"):  # neither computes in float64
            config.backend, config.default_model_filename = "onnxruntime", _MODEL_FILE
        _set_instances(config, self._options.instances, "KIND_CPU")
        width, num_labels = self._manifest.model.embedding_dim, len(bank.labels)
        config.input.add(name="video_embedding", data_type="TYPE_FP32", dims=[width])
        config.output.add(
            name="scores", data_type="TYPE_FP32", dims=[num_labels], label_filename="labels.txt"
        )
        _warm_up(config, {"video_embedding": ("TYPE_FP32", [width])})
        write_text(
            self._model_folder(name) / "labels.txt",
            "".join(f"{' '.join(label.split())}\n" for label in bank.labels),
        )
        self._provenance(config)
        config.parameters[f"{_PROVENANCE}bank_sha256"].string_value = bank.sha256
        config.parameters[f"{_PROVENANCE}score_method"].string_value = spec.method
        self._finish(name, config)

    def _check_bank(self, path: Path, bank: LabelBank) -> None:
        from actionclip_deploy.runtimes.ort import GraphSession

        spec, embeddings = self._manifest.scores, Golden.load(self._bundle).video_embeddings
        (given,) = GraphSession(path, num_threads=1).run(embeddings)
        expected = score(spec.method, embeddings, bank.embeddings, scale=spec.scale)
        difference = float(np.abs(given - expected).max())
        if not difference <= SCORE_TOLERANCE:
            raise ParityError(
                f"The scores of the label bank {bank.name} differ by {difference:.1e} as a graph; "
                "report it with the bank's bank.json."
            )

    # Folders and files

    def _model_folder(self, name: str) -> Path:
        return self._folder / (self._options.prefix + name)

    def _version_folder(self, name: str) -> Path:
        """The folder of this bundle's version: the number of its hash, as they came."""
        known = self._history.setdefault(self._options.prefix + name, [])
        if self._bundle_sha256 not in known:
            known.append(self._bundle_sha256)
        version = known.index(self._bundle_sha256) + 1
        self.versions[self._options.prefix + name] = version
        folder = self._model_folder(name) / str(version)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        return folder

    def _add_program(self, folder: Path) -> None:
        if self._options.runtime == "python":
            self._add_file(folder, "triton_model.py")

    def _add_file(self, folder: Path, name: str) -> None:
        text = resources.files("actionclip_deploy.scale").joinpath(name).read_text("utf-8")
        write_text(folder / "model.py", text)

    # Configs

    def _config(self, name: str, *, rows: int) -> Any:
        """What all configs have: backend, batching, queue policy, instances."""
        options = self._options
        config = model_config_pb2.ModelConfig(name=options.prefix + name, max_batch_size=rows)
        config.backend = options.runtime
        if options.runtime in ("onnxruntime", "openvino"):
            config.default_model_filename = _MODEL_FILE
        config.version_policy.latest.num_versions = 1
        if rows > 0:
            batching = config.dynamic_batching
            batching.max_queue_delay_microseconds = round(options.max_delay_ms * 1000)
            policy = batching.default_queue_policy
            policy.timeout_action = model_config_pb2.ModelQueuePolicy.REJECT
            policy.default_timeout_microseconds = round(options.queue_seconds * _MICROSECONDS)
            policy.allow_timeout_override = True
            policy.max_queue_size = options.queue
        kind = _KINDS[options.device]
        if options.runtime == "openvino" and options.device == "auto":
            kind = "KIND_CPU"
        _set_instances(config, options.instances, kind)
        return config

    def _graph_config(self, name: GraphOrClip) -> Any:
        manifest = self._manifest
        graph: GraphName = "video" if name == "clip" and "video" in manifest.graphs else "visual"
        if name in ("temporal", "textual"):
            graph = name
        rows = self._rows[name]
        quantization = manifest.quantization
        # Its activations are scaled by all that is in a call: a request has a call for itself.
        if (
            quantization is not None
            and quantization.recipe == "dynamic"
            and manifest.graphs[graph].precision in ("int8", "fp8")
        ):
            rows = 0
        given, output = manifest.input_spec(name), manifest.output_spec(name)
        config = self._config(name, rows=rows)
        config.input.add(
            name=given.name, data_type=_TYPES[given.dtype], dims=_dims(given, batched=rows > 0)
        )
        config.output.add(
            name=output.name, data_type=_TYPES[output.dtype], dims=_dims(output, batched=rows > 0)
        )
        sizes = {"T": manifest.model.num_frames, "L": 8}
        shape = [
            size if isinstance(size, int) else sizes.get(size, 1)
            for size in (given.shape[1:] if rows > 0 else given.shape)
        ]
        _warm_up(config, {given.name: (_TYPES[given.dtype], shape)})
        return config

    def _provenance(self, config: Any, *, graph: GraphName | None = None) -> None:
        manifest = self._manifest
        facts = {
            "bundle_sha256": self._bundle_sha256,
            "checkpoint_sha256": manifest.source.sha256,
            "precision": manifest.precision(),
            "program": f"actionclip-deploy {__version__}",
            "num_frames": str(manifest.model.num_frames),
            "input_size": str(manifest.model.input_size),
        }
        if graph is not None:
            facts["graph_sha256"] = manifest.files[manifest.graphs[graph].file].sha256
        if manifest.licence is not None:
            facts["licence"] = manifest.licence
        for key, value in facts.items():
            config.parameters[f"{_PROVENANCE}{key}"].string_value = value

    def _finish(self, name: str, config: Any) -> None:
        path = self._model_folder(name) / "config.pbtxt"
        text = text_format.MessageToString(config, as_utf8=True)
        if path.exists():
            old = text_format.Parse(path.read_text("utf-8"), model_config_pb2.ModelConfig())
            for side in ("input", "output"):
                if name.startswith("scores_") and side == "output":
                    continue  # a bank may have got other labels
                if list(getattr(old, side)) != list(getattr(config, side)):
                    raise BundleError(
                        f"The model {config.name} of the repository has another {side} than this "
                        "bundle; write it to another repository, or with another --prefix."
                    )
        write_text(path, text)


def _dims(spec: TensorSpec, *, batched: bool) -> list[int]:
    """A shape in Triton's form, in which the size of the batch is left out where there is one."""
    sizes = spec.shape[1:] if batched else spec.shape
    return [size if isinstance(size, int) else -1 for size in sizes]


def _set_instances(config: Any, count: int, kind: str) -> None:
    del config.instance_group[:]
    config.instance_group.add(count=count, kind=kind)


def _warm_up(config: Any, inputs: Mapping[str, tuple[str, Sequence[int]]]) -> None:
    """A first request, so that no client waits for what is done once."""
    sample = config.model_warmup.add(name="first", batch_size=1 if config.max_batch_size else 0)
    for name, (kind, shape) in inputs.items():
        given = sample.inputs[name]
        given.data_type = model_config_pb2.DataType.Value(kind)
        given.dims.extend(shape)
        if kind == "TYPE_INT32":
            given.zero_data = True  # tokens have to be of the vocabulary
        else:
            given.random_data = True
