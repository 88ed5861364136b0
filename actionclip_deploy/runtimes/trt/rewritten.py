"""The graph that an engine is built from: the bundle's own, or a rewrite of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import EngineError
from actionclip_deploy.manifest import GraphName


def rewritten_model(bundle: Bundle, graph: GraphName, rewrite: str | None) -> Any:
    """A rewrite of a graph, an `onnx.ModelProto`; None where there is none to be made.

    Args:
        bundle: The bundle.
        graph: One of its graphs.
        rewrite: A name of `REWRITES`; None for the graph itself.

    Returns:
        None without a name, and where the rewrite changes nothing.

    Raises:
        EngineError: If there is no such rewrite.
    """
    if rewrite is None:
        return None
    from actionclip_deploy.runtimes.onnx_graphs import read_model
    from actionclip_deploy.runtimes.trt.rewrites import REWRITES

    if rewrite not in REWRITES:
        raise EngineError(
            f"{rewrite!r} is no rewrite of a graph; it must be one of {', '.join(REWRITES)}."
        )
    return REWRITES[rewrite].apply(read_model(bundle.graph_path(graph)))


@contextmanager
def graph_file(bundle: Bundle, graph: GraphName, rewrite: str | None) -> Iterator[Path]:
    """Path of the ONNX file to build from; a rewritten one is there for the block only.

    Raises:
        EngineError: If the rewrite does not change the graph.
    """
    if rewrite is None:
        yield bundle.graph_path(graph)
        return
    from actionclip_deploy.runtimes.onnx_graphs import write_model

    model = rewritten_model(bundle, graph, rewrite)
    if model is None:
        raise EngineError(f"The rewrite {rewrite} changes nothing in the {graph} graph.")
    with TemporaryDirectory(prefix="actionclip-") as folder:
        path = Path(folder) / bundle.manifest.graphs[graph].file
        write_model(model, path)
        yield path
