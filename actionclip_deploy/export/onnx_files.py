"""ONNX files from PyTorch modules: traced, stripped, written, and checked against their plan."""

from __future__ import annotations

import gc
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import onnx
import torch

from actionclip_deploy.errors import ExportError
from actionclip_deploy.runtimes.onnx_graphs import MAX_EMBEDDED_BYTES, read_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn
    from torch.onnx import ONNXProgram

    from actionclip_deploy.export.graphs import GraphPlan
    from actionclip_deploy.manifest import TensorSpec

OPSET = 18

# Examples of free dimensions. Torch takes 0 and 1 for constants, so each is larger, and each is
# different so that none is mistaken for another.
_EXAMPLE_SIZES = {"N": 2, "B": 3, "T": 4, "M": 5, "L": 6}
_LARGE = 2**26  # bytes of weights: of small graphs the memory is not worth a look at all objects
_DTYPES = {"uint8": torch.uint8, "int32": torch.int32, "float32": torch.float32}


def write_graph(
    plan: GraphPlan, path: Path, *, max_embedded_bytes: int = MAX_EMBEDDED_BYTES
) -> None:
    """Write one graph as an ONNX file and check it; the same plan gives the same bytes.

    Args:
        plan: The graph.
        path: The file to write; ends in `.onnx`.
        max_embedded_bytes: Up to this many bytes of weights lie in the file itself. More go to a
            file beside it, of its name with `.data` at the end.

    Raises:
        ExportError: If torch cannot export the module, or the file does not have the inputs and
            outputs of the plan.
    """
    module = plan.build().eval().requires_grad_(False)
    program = _exported(plan, module)
    _strip(program)
    weights = program.model.graph.initializers
    tensors = [value.const_value for value in weights.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    program.save(path, external_data=size > max_embedded_bytes)
    # onnxscript 0.7 holds the last graph that it rewrote until it gets the next: without weights.
    for value in weights.values():
        value.const_value = None
    del module, program, weights, tensors
    if size > _LARGE:  # the exporter's objects hold each other, and the check reads a file as large
        gc.collect()
    check_graph(plan, path)


def check_graph(plan: GraphPlan, path: Path) -> None:
    """Check a written file against ONNX's rules and against its plan.

    Raises:
        ExportError: If it is not a valid model, or an input or output differs from the plan in
            name, dtype, size, or in which dimensions are free.
    """
    try:
        # By its path: from memory, files above 2 GB and external data cannot be checked.
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise ExportError(
            f"The {plan.name} graph is not valid ONNX ({str(exc).strip().splitlines()[0]}); "
            "please report this with the versions of torch and onnx."
        ) from exc
    graph = read_model(path, weights=False).graph
    _check_tensors(plan, "inputs", graph.input, plan.input)
    _check_tensors(plan, "outputs", graph.output, plan.output)


def _exported(plan: GraphPlan, module: nn.Module) -> ONNXProgram:
    example = _example(plan.input, plan.limits)
    dimensions = {
        place: torch.export.Dim(name, min=1, max=plan.limits.get(name))
        for place, name in enumerate(plan.input.shape)
        if isinstance(name, str)
    }
    try:
        with _without_torch_deprecations():
            program = torch.onnx.export(
                module,
                (example,),
                input_names=[plan.input.name],
                output_names=[plan.output.name],
                dynamic_shapes=(dimensions,),
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as exc:
        raise ExportError(
            f"torch {torch.__version__} cannot export the {plan.name} graph "
            f"({str(exc).strip().splitlines()[0]}); try the versions that the README names."
        ) from exc
    assert program is not None  # what dynamo=True returns
    return program


def _example(spec: TensorSpec, limits: dict[str, int]) -> Tensor:
    shape = [
        size if isinstance(size, int) else min(_EXAMPLE_SIZES[size], limits.get(size, 2**31))
        for size in spec.shape
    ]
    return torch.zeros(shape, dtype=_DTYPES[spec.dtype])


@contextmanager
def _without_torch_deprecations() -> Iterator[None]:
    """Hide what torch says to itself about its own future while it traces a module.

    torch 2.15 warns on every free dimension that its own `_check_is_size` will go.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _strip(program: ONNXProgram) -> None:
    """Remove what tells about the machine of the export and nothing about the graph.

    Torch notes on each node the lines of source that made it, with the paths of their files.
    """
    model, graph = program.model, program.model.graph
    values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    for node in graph.all_nodes():
        values += node.outputs
        node.doc_string = None
        node.metadata_props.clear()
    for value in values:
        value.doc_string = None
        value.metadata_props.clear()
    model.doc_string = graph.doc_string = None
    model.metadata_props.clear()
    graph.metadata_props.clear()


def _check_tensors(plan: GraphPlan, what: str, values: Any, spec: TensorSpec) -> None:
    found = [_describe(value) for value in values]
    wanted = (spec.name, spec.dtype, list(spec.shape))
    if found != [wanted]:
        raise ExportError(
            f"The {plan.name} graph came out with the {what} {found} and should have {[wanted]}; "
            "please report this with the versions of torch and onnxscript."
        )


def _describe(value: Any) -> tuple[str, str, list[int | str]]:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    shape = [d.dim_param if d.HasField("dim_param") else d.dim_value for d in tensor.shape.dim]
    return value.name, dtype, shape
