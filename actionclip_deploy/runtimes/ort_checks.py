"""What a session of ONNX Runtime is held to before it is used, and a graph to try one with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from actionclip_deploy.errors import BundleError, RuntimeUnavailableError
from actionclip_deploy.manifest import GraphName, TensorSpec
from actionclip_deploy.runtimes.execution_providers import CPU, heavy_ops, what_it_needs

logger = logging.getLogger(__name__)

# An ONNX model of one node, y = Add(x, x), float32 of shape (1,), written as the fields of its
# protocol buffer (a tag, a length, content), because devices have no onnx package.
_TYPE = b"\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01"  # tensor, float32, dims [1]
_GRAPH = (
    b"\x0a\x0e\x0a\x01x\x0a\x01x\x12\x01y\x22\x03Add"  # node
    b"\x12\x05trial"  # name
    b"\x5a\x0f\x0a\x01x" + _TYPE + b"\x62\x0f\x0a\x01y" + _TYPE  # input, output
)
# IR version 7, the graph, opset 13.
TRIAL_MODEL = b"\x08\x07\x3a" + bytes([len(_GRAPH)]) + _GRAPH + b"\x42\x04\x0a\x00\x10\x0d"


def not_built_in(
    provider: str, available: Sequence[str], version: str, because: str | None = None
) -> RuntimeUnavailableError:
    """The error of a build of ONNX Runtime that lacks an execution provider.

    Args:
        provider: What was asked for.
        available: What it has.
        version: Of ONNX Runtime.
        because: What is known of this very build; None for what the provider needs in general.
    """
    because = because or f"to get it, {what_it_needs(provider)}"
    return RuntimeUnavailableError(
        f"onnxruntime {version} was built without {provider}; it has {', '.join(available)}: "
        f"{because}."
    )


def does_not_work(provider: str, reason: str, version: str) -> RuntimeUnavailableError:
    """The error of an execution provider that is listed and executes nothing here."""
    return RuntimeUnavailableError(
        f"onnxruntime {version} lists {provider}, which does not work on this machine: {reason}. "
        f"To get it, {what_it_needs(provider)}; or ask for cpu."
    )


def check_placement(session: Any, provider: str, what: str) -> None:
    """Refuse a session of which the work is done on another execution provider.

    Args:
        session: A session of ONNX Runtime.
        provider: What it was asked for.
        what: What it runs, for messages.

    Raises:
        RuntimeUnavailableError: If it runs elsewhere, or leaves matrix products to the CPU.

    Not done with ONNX Runtime's `session.disable_cpu_ep_fallback`, which also refuses the
    arithmetic on shapes that CUDA sessions keep on the CPU on purpose.
    """
    if session.get_providers()[0] != provider:
        raise RuntimeUnavailableError(
            f"{provider} was asked for and ONNX Runtime runs {what} on "
            f"{session.get_providers()[0]} instead; install what {provider} needs or ask for cpu."
        )
    if provider == CPU:
        return
    if not hasattr(session, "get_provider_graph_assignment_info"):
        logger.warning(
            "this onnxruntime cannot tell which nodes of %s run on %s; 1.24 and later can.",
            *(what, provider),
        )
        return
    ops: dict[bool, list[str]] = {True: [], False: []}
    for part in session.get_provider_graph_assignment_info():
        ops[part.ep_name == provider] += [node.op_type for node in part.get_nodes()]
    left = heavy_ops(ops[False])
    if left or not ops[True]:
        raise RuntimeUnavailableError(
            f"{provider} was asked for and leaves {', '.join(left) or 'every node'} of {what} to "
            "the CPU; ask for cpu, or use a bundle of a precision that it has kernels for."
        )


def check_tensor(graph: GraphName, tensors: Any, spec: TensorSpec) -> None:
    """Compare the one input or output of a session with the manifest.

    Raises:
        BundleError: If they differ.
    """
    given = [(tensor.name, tensor.type, tensor.shape) for tensor in tensors]
    types = {"uint8": "tensor(uint8)", "int32": "tensor(int32)", "float32": "tensor(float)"}
    fits = len(given) == 1 and given[0][:2] == (spec.name, types[spec.dtype])
    if not fits or [_free(size) for size in given[0][2]] != [_free(size) for size in spec.shape]:
        raise BundleError(
            f"The {graph} graph has {given} where the manifest says {spec.name} of type "
            f"{spec.dtype} and shape {spec.shape}; the two are of different bundles: export again."
        )


def _free(size: int | str | None) -> int | None:
    """A dimension's number, None where it is free whatever its letter."""
    return size if isinstance(size, int) else None


def first_line(exc: Exception) -> str:
    """The first line of what a native error says; its name where it says nothing."""
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]
