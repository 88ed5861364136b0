"""What a user gets who calls torch.onnx.export on the model as it is.

    python -m actionclip_deploy.benchmarks.plain_export BUNDLE CHECKPOINT BASE FOLDER

BASE is an empty word where there is none. Nothing is rewritten: the graphs take raw frames,
normalise them, and run every token through every block.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import cast

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import RuntimeUnavailableError
from actionclip_deploy.manifest import GraphName, Manifest

_OPSET = 18  # the bundle's, so that the operators are the same


def export_plain_in_a_process(
    bundle: Path, checkpoint: Path, base: Path | None, folder: Path
) -> dict[GraphName, Path]:
    """Export the plain graphs of a checkpoint into a folder.

    Raises:
        RuntimeUnavailableError: If torch cannot export them.
    """
    words = [str(bundle), str(checkpoint), str(base or ""), str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "actionclip_deploy.benchmarks.plain_export", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeUnavailableError(
            f"torch.onnx.export of the model as it is failed ({last}); leave the onnxruntime-plain "
            "row out."
        )
    return {cast("GraphName", path.stem): path for path in folder.glob("*.onnx")}


def export_plain(bundle: Bundle, checkpoint: Path, base: Path | None, folder: Path) -> None:
    """Write `visual.onnx` and `temporal.onnx`, or `video.onnx` where frames are mixed."""
    import torch

    from actionclip_deploy.benchmarks.torch_peers import PlainTorchRuntime

    manifest = bundle.manifest
    runtime = PlainTorchRuntime.from_bundle(bundle, checkpoint, base)
    with runtime:
        for graph, spec in manifest.graphs.items():
            if graph == "textual":
                continue
            dtype = getattr(torch, spec.input.dtype)
            example = torch.zeros(_example_shape(manifest, graph), dtype=dtype)
            batch = torch.export.Dim("batch", min=1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch about itself
                torch.onnx.export(
                    runtime.graph_module(graph),
                    (example,),
                    str(folder / f"{graph}.onnx"),
                    dynamic_shapes=({0: batch},),
                    opset_version=_OPSET,
                    dynamo=True,
                    external_data=False,
                    verbose=False,
                )


def _example_shape(manifest: Manifest, graph: GraphName) -> list[int]:
    letters = {"N": 2, "B": 2, "T": manifest.model.num_frames}
    shape = manifest.graphs[graph].input.shape
    return [size if isinstance(size, int) else letters[size] for size in shape]


def main(words: list[str]) -> None:
    """Export as the arguments say."""
    bundle, checkpoint, base, folder = words
    export_plain(
        Bundle.open(Path(bundle)), Path(checkpoint), Path(base) if base else None, Path(folder)
    )


if __name__ == "__main__":
    main(sys.argv[1:])
