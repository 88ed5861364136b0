"""ONNX graphs: read, written, looked up by value and changed; for exporting and for engines alike.

onnx-ir 1.1 was looked at in place of `GraphEditor`, and not ported to: it imports sympy, 85 MB
that the environment of a Jetson, which builds engines, does without, and it takes 0.6 s to import
where onnx takes 0.15 s. It stays where torch's exporter brings it along, in `export/onnx_files.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.errors import BundleError, EngineError, MissingExtraError
from actionclip_deploy.files import staged_file

try:
    import onnx
    from google.protobuf.message import DecodeError  # comes with onnx
    from onnx import helper, numpy_helper
except ModuleNotFoundError as exc:
    raise MissingExtraError("Building and examining engines", "cuda") from exc

# Weights of a file, above which they lie beside it. protobuf could hold up to 2 GiB, but takes
# twice the size of a file in memory to write it, where weights beside it go out one by one.
MAX_EMBEDDED_BYTES = 2**28

# Element types as a graph numbers them.
FP32 = int(onnx.TensorProto.FLOAT)
FP16 = int(onnx.TensorProto.FLOAT16)
BF16 = int(onnx.TensorProto.BFLOAT16)
HALF_TYPES = frozenset({FP16, BF16})

# Shapes and indices are this small; shape inference needs their values, and no others.
_MAX_SHAPE_VALUES = 64
# Smaller tensors hold colours and scales, by whose values an engine is built.
_MIN_WEIGHT_SIZE = 16


def read_model(path: Path, *, weights: bool = True) -> Any:
    """Read a graph, an `onnx.ModelProto`.

    Args:
        path: The file.
        weights: Whether to read the weights that lie beside it as well.

    Raises:
        BundleError: If the file cannot be read.
    """
    try:
        return onnx.load(str(path), load_external_data=weights)
    except (OSError, ValueError, DecodeError) as exc:
        raise BundleError(f"{path} cannot be read ({exc}); export the bundle again.") from exc


def write_model(model: Any, path: Path, *, max_embedded_bytes: int = MAX_EMBEDDED_BYTES) -> None:
    """Write a graph; the same graph gives the same bytes.

    Args:
        model: An `onnx.ModelProto`. Weights that go beside the file leave it.
        path: The file.
        max_embedded_bytes: Up to this many bytes of weights lie in the file itself. More go to
            `NAME.onnx.data` beside it, one after the other.
    """
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size <= max_embedded_bytes:
        with staged_file(path, durable=False) as staged:
            staged.write_bytes(model.SerializeToString(deterministic=True))
        return
    beside = f"{path.name}.data"
    path.unlink(missing_ok=True)  # so that no old graph is ever found with new weights
    path.with_name(beside).unlink(missing_ok=True)  # onnx appends to a file that is there
    with staged_file(path, durable=False) as staged:
        onnx.save_model(model, str(staged), save_as_external_data=True, location=beside)


def add_outputs(path: Path, target: Path, values: Mapping[str, int]) -> None:
    """Write a graph once more, with inner values as further outputs.

    Args:
        path: The graph.
        target: The new file, in the same folder: weights beside the graph are not copied.
        values: Names of values, with the element type of each.
    """
    model = read_model(path, weights=False)
    model.graph.output.extend(declare(name, kind) for name, kind in values.items())
    with staged_file(target, durable=False) as staged:
        staged.write_bytes(model.SerializeToString(deterministic=True))


def structure_hash(path: Path) -> str:
    """What a graph computes, whatever its weights: one hash for all fine-tunes of a model.

    Tensors with fewer values than any bias has, and those of integers, count with their values:
    an engine is built by them.

    Raises:
        BundleError: If the file cannot be read.
    """
    model = read_model(path, weights=False)
    for tensor in model.graph.initializer:
        is_float = tensor.data_type in (FP32, *HALF_TYPES)
        if is_float and math.prod(tensor.dims) >= _MIN_WEIGHT_SIZE:
            for name in ("raw_data", "float_data", "external_data", "int32_data"):
                tensor.ClearField(name)
            tensor.data_location = onnx.TensorProto.DEFAULT
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def opset_of(model: Any) -> int:
    """Version of ONNX's own operators in a graph."""
    return next(int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx"))


def takes_bf16(op_type: str, opset: int) -> bool:
    """Whether the operands of an operator that may be fp16 may be bf16 too, in an opset."""
    schema = onnx.defs.get_schema(op_type, opset)
    allowed = [set(constraint.allowed_type_strs) for constraint in schema.type_constraints]
    return all("tensor(bfloat16)" in types for types in allowed if "tensor(float16)" in types)


def numpy_dtype(element_type: int) -> np.dtype[Any]:
    """The dtype of arrays of an element type; bf16 and fp8 have those of the package ml_dtypes."""
    return helper.tensor_dtype_to_np_dtype(element_type)


def attributes_of(node: Any) -> dict[str, Any]:
    """The attributes of a node, as `make_node` takes them."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def make_node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> Any:
    """A node, named after its operator and its first output."""
    return helper.make_node(op, inputs, outputs, name=f"{op}:{outputs[0]}", **attributes)


def array_of(tensor: Any) -> NDArray[Any]:
    """The values of a weight."""
    return numpy_helper.to_array(tensor)


def make_tensor(name: str, values: NDArray[Any]) -> Any:
    """A weight."""
    return numpy_helper.from_array(np.asarray(values, order="C"), name)


def declare(name: str, element_type: int, shape: Sequence[int | str | None] | None = None) -> Any:
    """An input or output; a letter is a free dimension, None one without a name."""
    return helper.make_tensor_value_info(name, element_type, shape)


def tensor_types(model: Any, input_shape: Sequence[int] | None = None) -> dict[str, Any]:
    """Element type and shape of every value of a graph, by its name.

    Weights are declared and not copied, so that graphs above 2 GB can be inferred as well.

    Args:
        model: An `onnx.ModelProto`.
        input_shape: A size for every dimension of the only input; None leaves free ones free.

    Returns:
        `onnx.TypeProto.Tensor` by name; dimensions that are free have no value.

    Raises:
        EngineError: If the graph has several inputs, or one with another number of dimensions.
    """
    graph = model.graph
    inputs, outputs = list(graph.input), list(graph.output)
    if input_shape is not None:
        given = inputs[0].type.tensor_type
        if len(inputs) != 1 or len(given.shape.dim) != len(input_shape):
            raise EngineError(
                f"The graph has {len(inputs)} inputs, the first of {len(given.shape.dim)} "
                f"dimensions, and the shape {tuple(input_shape)} was given for one; export the "
                "bundle again."
            )
        inputs = [declare(inputs[0].name, given.elem_type, input_shape)]
        outputs = [declare(o.name, o.type.tensor_type.elem_type) for o in outputs]
    small: list[Any] = []
    large: list[Any] = []
    for tensor in graph.initializer:
        (small if math.prod(tensor.dims) <= _MAX_SHAPE_VALUES else large).append(tensor)
    inputs += [declare(t.name, t.data_type, t.dims) for t in large]
    light = helper.make_graph(graph.node, graph.name, inputs, outputs, small)
    bare = helper.make_model(light, opset_imports=model.opset_import, ir_version=model.ir_version)
    inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    indices = [declare(t.name, t.data_type, t.dims) for t in small]
    values = (*inferred.value_info, *inferred.input, *inferred.output, *indices)
    return {value.name: value.type.tensor_type for value in values}


def rebuild(
    model: Any,
    nodes: Sequence[Any],
    weights: Mapping[str, Any],
    *,
    inputs: Sequence[Any] | None = None,
    outputs: Sequence[Any] | None = None,
    least_opset: int = 0,
) -> Any:
    """Make a model of nodes, with what of them and of the weights leads to its outputs.

    Args:
        model: Where all that is not given is from: inputs, outputs, opset, versions.
        nodes: In an order in which they can be computed.
        weights: `onnx.TensorProto` by name.
        inputs: `onnx.ValueInfoProto` of each; those that no node takes are left out.
        outputs: Likewise.
        least_opset: The opset of the model is raised to this one.

    Returns:
        A new `onnx.ModelProto`.
    """
    outputs = model.graph.output if outputs is None else outputs
    needed = {value.name for value in outputs}
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    graph = helper.make_graph(
        kept[::-1],
        model.graph.name,
        model.graph.input if inputs is None else [v for v in inputs if v.name in needed],
        outputs,
        [tensor for name, tensor in weights.items() if name in needed],
    )
    opsets = [
        helper.make_opsetid(o.domain, o.version if o.domain else max(o.version, least_opset))
        for o in model.opset_import
    ]
    return helper.make_model(
        graph,
        opset_imports=opsets,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
    )


def join_graphs(visual: Any, temporal: Any, *, num_frames: int | str, input_size: int) -> Any:
    """One graph of whole clips, from the one of frames and the one that fuses their features.

    The frames of all clips are one batch in between: a Reshape before, and one after.

    Args:
        visual: frames uint8 (N, S, S, 3) -> features (N, D), an `onnx.ModelProto` with weights.
        temporal: features (B, T, D) -> embeddings (B, D), likewise.
        num_frames: T; a letter where it is free.
        input_size: S.

    Returns:
        frames uint8 (B, T, S, S, 3) -> embeddings (B, D).

    Raises:
        BundleError: If the two are of different versions of ONNX.
    """
    opsets = [{o.domain: o.version for o in model.opset_import} for model in (visual, temporal)]
    if any(opsets[0].get(domain, version) != version for domain, version in opsets[1].items()):
        raise BundleError(
            f"The visual graph is of the opsets {opsets[0]} and the temporal one of {opsets[1]}, "
            "so they cannot be one graph; export the bundle again."
        )
    first, second = (
        onnx.compose.add_prefix(model, f"{name}/")
        for name, model in (("visual", visual), ("temporal", temporal))
    )
    (frames,), (features,) = first.graph.input, first.graph.output
    (fused,), (embeddings,) = second.graph.input, second.graph.output
    name = visual.graph.input[0].name, temporal.graph.output[0].name
    weights = {
        each.name: each
        for each in (
            *(*first.graph.initializer, *second.graph.initializer),
            make_tensor("one_batch", np.array([-1, input_size, input_size, 3])),
            make_tensor("width", np.array([-1])),
            make_tensor("from_first", np.array([0])),
            make_tensor("to_third", np.array([2])),
        )
    }
    nodes = [
        make_node("Reshape", [name[0], "one_batch"], [frames.name]),
        *first.graph.node,
        make_node("Shape", [name[0]], ["shape"]),
        make_node("Slice", ["shape", "from_first", "to_third"], ["clips_and_frames"]),
        make_node("Concat", ["clips_and_frames", "width"], ["of_clips"], axis=0),
        make_node("Reshape", [features.name, "of_clips"], [fused.name]),
        *second.graph.node,
        make_node("Identity", [embeddings.name], [name[1]]),
    ]
    given = declare(
        name[0],
        frames.type.tensor_type.elem_type,
        ["B", num_frames, input_size, input_size, 3],
    )
    width = embeddings.type.tensor_type.shape.dim[1].dim_value
    result = declare(name[1], embeddings.type.tensor_type.elem_type, ["B", width])
    joined = rebuild(visual, nodes, weights, inputs=[given], outputs=[result])
    for domain, version in opsets[1].items():
        if domain not in opsets[0]:
            joined.opset_import.append(helper.make_opsetid(domain, version))
    return joined


def scoring_graph(label_embeddings: NDArray[np.float32], *, method: str, scale: float) -> Any:
    """Scores of labels as a graph: embeddings (B, D) -> scores (B, C), both float32.

    It computes in float64, as `scoring.score` does, and differs from that by rounding alone.

    Args:
        label_embeddings: Of K templates and C labels, float32, shape (K, C, D); for
            `mean-embedding`, K is 1.
        method: One of `scoring.SCORE_METHODS`.
        scale: Multiplier of the cosine.
    """
    num_templates, num_labels, width = label_embeddings.shape
    double = int(onnx.TensorProto.DOUBLE)
    weights = [
        make_tensor("labels", label_embeddings.reshape(-1, width).T),
        make_tensor("by_template", np.array([-1, num_templates, num_labels])),
        make_tensor("templates", np.array([1])),
        make_tensor("zero", np.float64(0)),
        make_tensor("half", np.float64(0.5)),
        make_tensor("one", np.float64(1)),
        make_tensor("scale", np.float64(scale)),
    ]
    nodes = [
        make_node("Cast", ["video_embedding"], ["embeddings64"], to=double),
        make_node("Cast", ["labels"], ["labels64"], to=double),
        make_node("MatMul", ["embeddings64", "labels64"], ["products"]),
        make_node("Reshape", ["products", "by_template"], ["cosines"]),
    ]
    if method == "independent":
        nodes += [
            make_node("ReduceMean", ["cosines", "templates"], ["mean"], keepdims=0),
            make_node("Add", ["mean", "one"], ["shifted"]),
            make_node("Mul", ["shifted", "half"], ["unclipped"]),
            make_node("Clip", ["unclipped", "zero", "one"], ["scores64"]),
        ]
    else:
        nodes += [
            make_node("Mul", ["cosines", "scale"], ["logits"]),
            make_node("Softmax", ["logits"], ["shares"], axis=-1),
            make_node("ReduceMean", ["shares", "templates"], ["scores64"], keepdims=0),
        ]
    nodes.append(make_node("Cast", ["scores64"], ["scores"], to=FP32))
    taken = {value for node in nodes for value in node.input}
    graph = helper.make_graph(
        nodes,
        "scores",
        [declare("video_embedding", FP32, ["B", width])],
        [declare("scores", FP32, ["B", num_labels])],
        [each for each in weights if each.name in taken],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def check_model(path: Path) -> None:
    """Let onnx check a file, by its path since it may be larger than 2 GB.

    Raises:
        BundleError: If it is not a valid graph.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise BundleError(
            f"{path.name} is not valid ONNX ({exc}); export the bundle again."
        ) from exc


class GraphEditor:
    """Changes a copy of a graph; the graph itself stays as it is.

    Nodes and weights that nothing uses any more are left out when it is finished. What it tells of
    values (`producer`, `consumers`, `element_type`, `shape`) is as it was before any change.

    Args:
        model: An `onnx.ModelProto` with its weights.

    Attributes:
        nodes: The nodes of the graph, copies; `set_input` changes what they take.
        weights: `onnx.TensorProto` by name.
        opset: Version of ONNX's operators.
        changed: Whether anything has been changed.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._types = tensor_types(model)
        self.opset = opset_of(model)
        self.nodes: list[Any] = []
        for node in model.graph.node:
            self.nodes.append(type(node)())
            self.nodes[-1].CopyFrom(node)
        self._producers = {value: node for node in self.nodes for value in node.output}
        self._consumers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.input):
                self._consumers.setdefault(value, []).append(node)
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._outputs = {value.name for value in model.graph.output}
        self._before: dict[str, list[Any]] = {}
        self._after: dict[str, list[Any]] = {}
        self._names = set(self._types)
        self.changed = False

    def producer(self, value: str) -> Any:
        """The node that computes a value; None for inputs and weights."""
        return self._producers.get(value)

    def consumers(self, value: str) -> list[Any]:
        """The nodes that take a value."""
        return self._consumers.get(value, [])

    def is_output(self, value: str) -> bool:
        """Whether the graph gives a value."""
        return value in self._outputs

    def element_type(self, value: str) -> int | None:
        """Element type of a value; None where it is not known."""
        return int(self._types[value].elem_type) if value in self._types else None

    def is_half(self, value: str) -> bool:
        """Whether a value is fp16 or bf16."""
        return self.element_type(value) in HALF_TYPES

    def shape(self, value: str) -> list[int | None]:
        """Shape of a value; None for each dimension that is free."""
        dimensions = self._types[value].shape.dim
        return [int(d.dim_value) if d.HasField("dim_value") else None for d in dimensions]

    def fresh(self, hint: str) -> str:
        """A name that nothing in the graph has."""
        name, count = hint, 1
        while name in self._names:
            count += 1
            name = f"{hint}_{count}"
        self._names.add(name)
        return name

    def add_constant(self, hint: str, values: Any) -> str:
        """Add a weight; gives its name."""
        name = self.fresh(hint)
        self.set_weight(name, values)
        return name

    def set_weight(self, name: str, values: Any) -> None:
        """Give a weight other values."""
        self.weights[name] = make_tensor(name, values)
        self.changed = True

    def set_input(self, node: Any, slot: int, value: str) -> None:
        """Let a node take another value."""
        node.input[slot] = value
        self.changed = True

    def replace_uses(self, old: str, new: str) -> None:
        """Let every node that took a value take another in its place."""
        for node in self.consumers(old):
            for slot, value in enumerate(node.input):
                if value == old:
                    self.set_input(node, slot, new)

    def add_before(
        self, place: Any, op: str, inputs: Sequence[str], hint: str, **attributes: Any
    ) -> str:
        """Add a node of one output in front of another; gives the name of its output."""
        output = self.fresh(hint)
        node = make_node(op, inputs, [output], **attributes)
        self._before.setdefault(place.output[0], []).append(node)
        self.changed = True
        return output

    def add_after(self, place: Any, op: str, *others: str, hint: str, **attributes: Any) -> str:
        """Add a node that takes what another gives, and gives it on under the same name.

        Args:
            place: The other node; its first output gets a new name.
            op: Operator of the new node.
            others: What the new node takes besides.
            hint: What the new name should be.
            attributes: Of the new node.

        Returns:
            The new name.
        """
        old, new = place.output[0], self.fresh(hint)
        self._before[new] = self._before.pop(old, [])
        self._after[new] = [
            make_node(op, [new, *others], [old], **attributes),
            *self._after.pop(old, []),
        ]
        place.output[0] = new
        self.changed = True
        return new

    def finish(self) -> Any:
        """The new graph, an `onnx.ModelProto`; None where nothing was changed."""
        if not self.changed:
            return None
        nodes = [
            part
            for node in self.nodes
            for key in (node.output[0],)
            for part in (*self._before.get(key, ()), node, *self._after.get(key, ()))
        ]
        return rebuild(self._model, nodes, self.weights)
