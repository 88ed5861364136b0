"""PyTorch: the reference that every other runtime is compared with.

It executes the model and not the exported graphs: pixels are normalised here in float32, and
nothing is folded, left out or lowered in precision.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import (
    ArgumentError,
    BundleError,
    InferenceError,
    MissingExtraError,
    RuntimeUnavailableError,
)
from actionclip_deploy.files import sha256_of_file
from actionclip_deploy.manifest import GraphName, Manifest
from actionclip_deploy.published import local_checkpoint
from actionclip_deploy.runtimes.base import Array, Float32Array, Runtime, RuntimeInfo
from actionclip_deploy.runtimes.machine import check_num_threads

try:
    import torch
except ModuleNotFoundError as exc:
    raise MissingExtraError("The torch runtime", "torch") from exc

from actionclip_deploy.model import ActionClipNetwork, load_checkpoint

if TYPE_CHECKING:
    from typing_extensions import Self

DEVICES = ("cpu", "cuda")


class TorchRuntime(Runtime):
    """Executes a model in PyTorch, in float32.

    Calls may come from several threads at a time.

    Args:
        manifest: Of the bundle that the model belongs to.
        model: The model; it is moved to the device and put into eval mode.
        device: `cpu` or `cuda`.
        num_threads: Threads of one call on the CPU. PyTorch keeps this number for the whole
            process, so None leaves it as it is, and closing does not put it back.

    Raises:
        ValueError: If the device or the number of threads is not allowed.
        RuntimeUnavailableError: If there is no such device.
    """

    def __init__(
        self,
        manifest: Manifest,
        model: ActionClipNetwork,
        *,
        device: str = "cpu",
        num_threads: int | None = None,
    ) -> None:
        super().__init__(manifest)
        if device not in DEVICES:
            raise ArgumentError(
                "device",
                f"is {device!r}; for the torch runtime it must be one of {', '.join(DEVICES)}.",
            )
        if num_threads is not None:
            check_num_threads("num_threads", num_threads)
            if device != "cpu":
                raise ValueError(
                    f"num_threads is {num_threads} and execution_provider is {device!r}; threads "
                    "are of use to cpu alone: leave num_threads out, or ask for cpu."
                )
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeUnavailableError(
                f"torch {torch.__version__} finds no CUDA device; ask for cpu, or install a build "
                "of torch for the driver of this machine."
            )
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._device = torch.device(device)
        self._model: ActionClipNetwork | None = model.to(self._device).eval()
        self._mean = torch.tensor(manifest.preprocessing.pixel_mean, device=self._device)
        self._std = torch.tensor(manifest.preprocessing.pixel_std, device=self._device)

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle,
        checkpoint: Path,
        base: Path | None = None,
        *,
        device: str = "cpu",
        num_threads: int | None = None,
    ) -> Self:
        """Load the checkpoint that a bundle was exported from.

        Args:
            bundle: The bundle; its manifest says how the checkpoint is read.
            checkpoint: The very file, by its sha256, whatever its name.
            base: The file that supplied a tower, where there was one.
            device: As in the class.
            num_threads: As in the class.

        Raises:
            BundleError: If a file is not the one that the manifest names.
            CheckpointError: If it cannot be read.
        """
        source, model = bundle.manifest.source, bundle.manifest.model
        if base is not None and source.base_sha256 is None:
            raise BundleError(
                f"The base {base} was given and the bundle was exported without one; leave it out."
            )
        if base is None and source.base_sha256 is not None:
            raise BundleError(
                f"The bundle was exported with the base {source.base_file} and none was given; "
                "give that file."
            )
        checkpoint = local_checkpoint(checkpoint)
        base = None if base is None else local_checkpoint(base)
        _check_file("checkpoint", checkpoint, source.file, source.sha256)
        if base is not None:
            _check_file("base", base, source.base_file, source.base_sha256)
        loaded = load_checkpoint(
            checkpoint,
            family=source.family,
            num_frames=model.num_frames,
            base=base,
            visual_prompt=model.visual_prompt,
        )
        if loaded.sha256 != source.sha256:  # weights that open_clip fetched by their tag
            raise BundleError(
                f"{checkpoint} gives weights of sha256 {loaded.sha256} and the bundle was exported "
                f"from {source.file}, {source.sha256}; give that file."
            )
        return cls(bundle.manifest, loaded.model, device=device, num_threads=num_threads)

    def describe(self) -> RuntimeInfo:
        """What really runs."""
        on_cpu = self._device.type == "cpu"
        return RuntimeInfo(
            name="torch",
            execution_provider="cpu" if on_cpu else torch.cuda.get_device_name(self._device),
            precision="fp32",
            num_threads=torch.get_num_threads() if on_cpu else None,
            versions={"torch": str(torch.__version__)},
        )

    @property
    def has_device(self) -> bool:
        """Whether frames have to be copied to a GPU."""
        return self._device.type != "cpu"

    def copy_to_device(self, array: Array) -> None:
        """Copy an array to the GPU and wait for it."""
        torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
        torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """Let go of the model."""
        self._model = None

    def _run(self, graph: GraphName, array: Array) -> Float32Array:
        model = self._model
        if model is None:
            raise InferenceError(
                f"The torch runtime was closed before its {graph} graph was run; "
                "open it again with open_runtime."
            )
        try:
            with torch.inference_mode():
                values = torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
                output = self._compute(model, graph, values)
                return np.ascontiguousarray(output.float().cpu().numpy())
        except (RuntimeError, IndexError) as exc:  # IndexError: a token outside of the vocabulary
            raise InferenceError(
                f"The {graph} part of the model failed in torch on {self._device} with an input of "
                f"shape {array.shape}: {exc}; give smaller batches if memory ran out."
            ) from exc

    def _compute(
        self, model: ActionClipNetwork, graph: GraphName, values: torch.Tensor
    ) -> torch.Tensor:
        if graph == "temporal":
            return model.encode_clips(values)
        if graph == "textual":
            return model.encode_text(values)
        pixels = (values.float() / 255 - self._mean) / self._std
        pixels = pixels.movedim(-1, -3)  # (..., S, S, 3) -> (..., 3, S, S)
        return model.encode_frames(pixels) if graph == "visual" else model.encode_video(pixels)


def _check_file(what: str, path: Path, name: str | None, sha256: str | None) -> None:
    """Compare a file with what the manifest says about it, before it is read as a checkpoint."""
    if path.is_file() and sha256_of_file(path) != sha256:
        raise BundleError(
            f"The {what} {path} is not the file that the bundle was exported from ({name}, sha256 "
            f"{sha256}); give that file, or export this one into a bundle of its own."
        )
