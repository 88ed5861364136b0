"""Which part of which graph an engine computes wrongly; what `actionclip verify --bisect` tells.

Each part is built and run by itself, on what the reference gives it, so that the error of one part
is not carried into the next. What is wrong only in company is found by growing the graph from its
beginning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.command_records import ComparisonRecord, FaultRecord
from actionclip_deploy.errors import EngineError, InferenceError, RuntimeUnavailableError
from actionclip_deploy.installation import install_command
from actionclip_deploy.manifest import GraphName
from actionclip_deploy.runtimes.base import Array, Float32Array
from actionclip_deploy.runtimes.onnx_graphs import (
    FP32,
    GraphEditor,
    declare,
    make_node,
    rebuild,
    write_model,
)
from actionclip_deploy.runtimes.parity import Comparison, Golden, Tolerance, compare, tolerance_of
from actionclip_deploy.runtimes.trt.api import MessageLog
from actionclip_deploy.runtimes.trt.driver import DeviceMemory, HostMemory
from actionclip_deploy.runtimes.trt.plan import BuildOptions, ShapeRange, build_plan, narrowest
from actionclip_deploy.runtimes.trt.rewrites import rewritten_model
from actionclip_deploy.runtimes.trt.runtime import Examined


@dataclass(frozen=True)
class Fault:
    """What was found in one graph."""

    graph: str
    rows: int  # of the batch that was examined: the smallest that is wrong
    finding: Finding

    def in_words(self) -> str:
        """The finding as a sentence or two."""
        return f"{self.graph}, {self.rows} rows: {self.finding.in_words()}"

    def record(self) -> FaultRecord:
        """As it leaves the program."""
        finding = self.finding
        return FaultRecord(
            graph=self.graph,
            rows=self.rows,
            first_bad=finding.first_bad,
            needs_company=finding.needs_company,
            parts=tuple(map(ComparisonRecord.model_validate, finding.parts)),
            heads=tuple(map(ComparisonRecord.model_validate, finding.heads)),
        )


def find_faults(bundle: Bundle, examined: Examined) -> list[Fault]:
    """Look in each graph that disagrees for the first part that does.

    Args:
        bundle: The bundle.
        examined: Engines of it that were verified.

    Raises:
        EngineError: If a part cannot be built, or there is no reference.
    """
    golden, entry = Golden.load(bundle), examined.entry
    faults = []
    for graph, spec in bundle.manifest.graphs.items():
        wrong = [
            c.batch_size
            for c in examined.report.comparisons
            if not c.passed and c.what.partition(",")[0] == graph
        ]
        if not wrong:
            continue
        shapes = entry.shapes(graph)
        rows = min(*wrong, shapes[-1].max[0])
        inputs = _golden_inputs(golden, graph)
        # As the engine was built, but whole and for this GPU.
        built = entry.key["options"]
        options = BuildOptions(
            workspace_bytes=built["workspace_bytes"], opt_level=built["opt_level"]
        )
        finding = find_first_bad_part(
            rewritten_model(bundle, graph, entry.rewrites.get(graph)),
            run_on_cpu,
            _Trial(examined, options, shapes[narrowest(shapes, rows)], rows).run,
            {spec.input.name: inputs[np.arange(rows) % len(inputs)]},
            tolerance=tolerance_of(bundle.manifest, graph),
        )
        faults.append(Fault(graph, rows, finding))
    return faults


def _golden_inputs(golden: Golden, graph: GraphName) -> Array:
    if graph == "textual":
        return golden.tokens
    if graph == "temporal":
        assert golden.frame_features is not None
        return golden.frame_features
    frames = golden.frames
    return frames if graph == "video" else frames.reshape(-1, *frames.shape[2:])


RunGraph = Callable[[Any, Mapping[str, NDArray[Any]]], NDArray[Any]]


@dataclass(frozen=True)
class Finding:
    """What a bisection found."""

    # Each part by itself beside the reference, in their order, to the first bad one; differences
    # are relative to the largest absolute value of the reference.
    parts: tuple[Comparison, ...]
    # Likewise the graph from its beginning to the end of each part, to the first bad one; empty
    # where a part by itself is bad.
    heads: tuple[Comparison, ...]

    @property
    def first_bad(self) -> str | None:
        """Name of the first part that is bad, alone or with those before it; None for none."""
        last = (self.heads or self.parts)[-1]
        return None if last.passed else last.what

    @property
    def needs_company(self) -> bool:
        """Whether every part is right by itself and the graph from its beginning is not."""
        return bool(self.heads) and not self.heads[-1].passed

    def in_words(self) -> str:
        """The finding as one or two sentences."""
        if self.first_bad is None:
            return (
                f"Each of the {len(self.parts)} parts of the graph is right by itself, and so is "
                "the graph as it grows from its beginning, on these inputs."
            )
        if self.needs_company:
            return (
                f"Each of the {len(self.parts)} parts of the graph is right by itself; the graph "
                f"from its beginning to {self.first_bad} is not: {self.heads[-1].in_words()}. The "
                "fault needs several parts together."
            )
        return f"The first bad part is {self.first_bad}: {self.parts[-1].in_words()}."


def find_first_bad_part(
    model: Any,
    run_reference: RunGraph,
    run_candidate: RunGraph,
    inputs: Mapping[str, NDArray[Any]],
    *,
    tolerance: Tolerance,
    on_result: Callable[[Comparison], object] = lambda _: None,
) -> Finding:
    """Compare the parts of a graph in their order, and name the first that is bad.

    Args:
        model: The graph that the engine was built from, an `onnx.ModelProto` with its weights.
        run_reference: Computes a graph, an `onnx.ModelProto`, from its inputs by name, where it is
            trusted: in ONNX Runtime on the CPU.
        run_candidate: Likewise, as it is to be tried: by an engine built from it.
        inputs: Inputs of the graph by name.
        tolerance: How far two results may be apart; its `difference` relative to the largest
            absolute value, its `min_cosine` between two rows of the first dimension.
        on_result: Called with each comparison.

    Returns:
        The parts, and where all of them are right the growing graph.

    Raises:
        EngineError: If the reference gives values that are not finite.
    """

    def judge(graph: Any, boundary: Boundary, feeds: Mapping[str, Any], wanted: Any) -> Comparison:
        # Relative to the largest value of the reference, a row for each of the first dimension.
        scale = np.float32(np.abs(wanted).max(initial=0.0) or 1.0)
        given, wanted = (
            (values.astype(np.float32) / scale).reshape(len(values), -1)
            for values in (run_candidate(graph, feeds), wanted)
        )
        limits = (tolerance.difference, tolerance.min_cosine)
        result = compare(boundary.part, given, wanted, *limits)
        on_result(result)
        return result

    parts: list[Comparison] = []
    references: list[NDArray[Any]] = []
    before: Boundary | None = None
    boundaries = find_boundaries(model)
    for boundary in boundaries:
        graph = part_between(model, before, boundary)
        known = dict(inputs)
        if before is not None:
            known[input_name(before)] = references[-1]
        feeds = _inputs_of(graph, known)
        references.append(run_reference(graph, feeds))
        if not np.isfinite(references[-1]).all():
            raise EngineError(
                f"{boundary.part} gives values that are NaN or infinite in ONNX Runtime as well, "
                "so the graph is wrong and not an engine; export the bundle again with --precision "
                "fp32."
            )
        parts.append(judge(graph, boundary, feeds, references[-1]))
        if not parts[-1].passed:
            return Finding(tuple(parts), ())
        before = boundary
    heads: list[Comparison] = []
    # The first part by itself is the first head.
    for boundary, wanted in zip(boundaries[1:], references[1:], strict=True):
        graph = part_between(model, None, boundary)
        heads.append(judge(graph, boundary, _inputs_of(graph, inputs), wanted))
        if not heads[-1].passed:
            break
    return Finding(tuple(parts), tuple(heads))


def _inputs_of(graph: Any, known: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {value.name: known[value.name] for value in graph.graph.input}


# Where a graph of a bundle can be cut in two: after its embedding and after each block. The parts
# are known by the names of the weights that they multiply with, and the cuts from the structure: a
# value through which all goes that the part gives.

# Blocks of a ViT, of a text encoder and of `transf`; layers of `transf_cls`; stages of a ResNet.
_BLOCK = re.compile(r"(?:^|\.)((?:blocks|layers|body)\.\d+|last_block|last_layer)\.")

# Operators that multiply with a weight, and which of their inputs it is.
_WEIGHT_SLOTS = {
    "MatMul": 1,
    "Gemm": 1,
    "Conv": 1,
    "MatMulInteger": 1,
    "LSTM": 1,
    "Gather": 0,  # rows of a table
}


@dataclass(frozen=True)
class Boundary:
    """The end of one part of a graph."""

    # Its name: `patch_embedding` or `token_embedding`, each block as its weights have it
    # (`blocks.0`, `last_block`), and `projection`, or `head` in a temporal graph, for what comes
    # after the last block.
    part: str
    value: str  # what the part gives, a value of the graph


class _Product(NamedTuple):
    place: int
    node: Any
    block: str | None


def find_boundaries(model: Any) -> tuple[Boundary, ...]:
    """Cut a graph into its parts.

    Args:
        model: A graph of a bundle or a rewrite of it, an `onnx.ModelProto`.

    Returns:
        The end of each part, in the order in which they are computed; the last is the end of the
        graph. A graph without blocks is one part.

    Raises:
        EngineError: If a block gives more than one value, as none of our exporter does.
    """
    graph = GraphEditor(model)
    parts = _parts(graph)
    boundaries = [
        Boundary(_name_of(part), _end_of(graph, part, following))
        for part, following in pairwise(parts)
    ]
    last = "head" if model.graph.input[0].name == "frame_features" else "projection"
    return (*boundaries, Boundary(last, model.graph.output[0].name))


def part_between(model: Any, before: Boundary | None, after: Boundary) -> Any:
    """The parts between two boundaries by themselves.

    Args:
        model: The graph, an `onnx.ModelProto` with its weights.
        before: Where they begin, one of `find_boundaries`; None for the beginning of the graph.
        after: Where they end, a later one.

    Returns:
        A new one. Its first input is the value at `before` in fp32, named `input_name(before)`;
        further ones are the inputs of the graph, of those that the parts look at: the text's
        tokens for its length, its mask and its end, clips for T. Its output is the value at
        `after`, in fp32.
    """
    graph = GraphEditor(model)
    nodes, inputs = list(graph.nodes), list(model.graph.input)
    if before is not None:
        name, value = input_name(before), before.value
        inputs.insert(0, declare(name, FP32, graph.shape(value)))
        nodes = [node for node in nodes if value not in node.output]
        nodes.insert(0, make_node("Cast", [name], [value], to=graph.element_type(value) or FP32))
    if graph.is_output(after.value):
        return rebuild(model, nodes, graph.weights, inputs=inputs)
    name = f"{after.value}.out"
    nodes.append(make_node("Cast", [after.value], [name], to=FP32))
    outputs = [declare(name, FP32, graph.shape(after.value))]
    return rebuild(model, nodes, graph.weights, inputs=inputs, outputs=outputs)


def input_name(before: Boundary) -> str:
    """Name of the input of `part_between` for the value at a boundary."""
    return f"{before.value}.in"


def _parts(graph: GraphEditor) -> list[list[_Product]]:
    """Products with weights in groups: what is before the blocks, each block, the rest.

    The rest may hold no product, and without blocks it is all there is.
    """
    products = [
        _Product(place, node, _block_of(weight))
        for place, node in enumerate(graph.nodes)
        if (weight := _weight_of(graph, node)) is not None
    ]
    names = list(dict.fromkeys(p.block for p in products if p.block is not None))
    if not names:
        return [products]
    blocks = [[p for p in products if p.block == name] for name in names]
    first, last = blocks[0][0].place, blocks[-1][-1].place
    others = [p for p in products if p.block is None]
    embedding = [p for p in others if p.place < first]
    rest = [p for p in others if p.place > last]
    return [*([embedding] if embedding else []), *blocks, rest]


def _weight_of(graph: GraphEditor, node: Any) -> str | None:
    """Name of the weight that a node multiplies with; None where there is none."""
    slot = _WEIGHT_SLOTS.get(node.op_type)
    if slot is None:
        return None
    name = str(node.input[slot])
    source = graph.producer(name)
    while source is not None and source.op_type in ("Cast", "DequantizeLinear"):
        name = str(source.input[0])
        source = graph.producer(name)
    tensor = graph.weights.get(name)
    return name if tensor is not None and len(tensor.dims) > 1 else None


def _block_of(name: str) -> str | None:
    found = _BLOCK.search(name)
    return found[1] if found else None


def _name_of(products: Sequence[_Product]) -> str:
    if products[0].block is not None:
        return products[0].block
    return "token_embedding" if products[0].node.op_type == "Gather" else "patch_embedding"


def _end_of(graph: GraphEditor, part: Sequence[_Product], following: Sequence[_Product]) -> str:
    """The value after the last product of a part through which all goes that it gives."""
    last = part[-1]
    end = following[0].place if following else len(graph.nodes)
    narrow = _narrow_values(graph, last.place, end)
    if not narrow:
        raise EngineError(
            f"{_name_of(part)} of this graph gives more than one value, so the graph cannot be cut "
            "after it; export the bundle again with this version."
        )
    own = [node.op_type in ("Add", "Relu") or _is_norm_of(node, last.block) for node in narrow]
    if last.block is None:
        # Positions are added to an embedding, which a norm may follow.
        place = max((place for place, mine in enumerate(own) if mine), default=len(narrow) - 1)
        return str(narrow[place].output[0])
    sums = (place for place, node in enumerate(narrow) if _is_residual_sum(graph, node))
    place = next(sums, own.index(True) if True in own else 0)
    # A ReLU or the norm of a post-norm layer follows at once.
    while place + 1 < len(narrow) and narrow[place + 1].op_type != "Add" and own[place + 1]:
        place += 1
    return str(narrow[place].output[0])


def _narrow_values(graph: GraphEditor, start: int, end: int) -> list[Any]:
    """Nodes from `start` to before `end` whose result is all that is left of the first one's.

    Going through the nodes in their order, such a result is the only one that is still to be used.
    """
    still_used: dict[str, int] = {}
    narrow = []
    for place in range(start, end):
        node = graph.nodes[place]
        taken = [value for value in dict.fromkeys(node.input) if value in still_used]
        if not taken and place != start:
            continue  # has nothing of the first node in it
        for value in taken:
            still_used[value] -= 1
            if not still_used[value]:
                del still_used[value]
        for value in node.output:
            uses = len(graph.consumers(value)) + graph.is_output(value)
            if uses:
                still_used[value] = uses
        if list(still_used) == [node.output[0]]:
            narrow.append(node)
    return narrow


def _is_residual_sum(graph: GraphEditor, node: Any) -> bool:
    """Whether a node adds two values, of which neither is a weight such as a bias."""
    return node.op_type == "Add" and not any(value in graph.weights for value in node.input)


def _is_norm_of(node: Any, block: str | None) -> bool:
    """Whether a node is a LayerNorm that belongs to a block, or to none."""
    if node.op_type != "LayerNormalization":
        return False
    # Weights that are equal, as the ones of a new model, have the name of the first of them.
    blocks = {_block_of(name) for name in node.input[1:]}
    return block in blocks if block is not None else blocks == {None}


# Running a graph once, where it is trusted and where it is not.


def run_on_cpu(model: Any, inputs: Mapping[str, Array]) -> Float32Array:
    """Execute a graph with ONNX Runtime on the CPU, the reference of a search for a fault.

    Args:
        model: An `onnx.ModelProto` with one output.
        inputs: By name.

    Raises:
        EngineError: If ONNX Runtime is not installed, or has no kernels for the graph.
    """
    try:
        from actionclip_deploy.runtimes.ort import open_session
    except ImportError as exc:
        raise EngineError(
            "Finding the part that is wrong needs ONNX Runtime as its reference; run: "
            f"{install_command('onnxruntime')}"
        ) from exc
    try:
        session = open_session(model.SerializeToString())
    except RuntimeUnavailableError as exc:
        raise EngineError(
            "ONNX Runtime, the reference of the search, cannot compute this form of the graph on "
            f"the CPU ({exc.__cause__}); remove these engines with `actionclip engines remove` and "
            "search those of the bundle's own graphs."
        ) from exc
    output: Float32Array = session.run(None, dict(inputs))[0]
    return output.astype(np.float32)


class _Trial:
    """Builds parts of a graph as an engine of the whole was built, and executes each once.

    Args:
        examined: The engine, with the TensorRT and the GPU that ran it.
        options: How it was built.
        shapes: Of the whole graph's input, in the profile to examine.
        rows: Rows of the whole graph's input; a part whose input has more gets a profile as many
            times as wide.
    """

    def __init__(
        self, examined: Examined, options: BuildOptions, shapes: ShapeRange, rows: int
    ) -> None:
        self._api, self._cuda, self._options = examined.api, examined.cuda, options
        self._shapes, self._rows = shapes, rows

    def run(self, model: Any, inputs: Mapping[str, Array]) -> Float32Array:
        """Build a graph, an `onnx.ModelProto` with one output, and execute it."""
        ranges = {name: [self._range(array)] for name, array in inputs.items()}
        with TemporaryDirectory(prefix="actionclip-") as folder:
            path = Path(folder) / "part.onnx"
            write_model(model, path)
            plan = build_plan(self._api, path, ranges, self._options)
        log = MessageLog(self._api.trt)
        runtime = self._api.trt.Runtime(log.logger)
        engine = runtime.deserialize_cuda_engine(plan)
        context = engine.create_execution_context() if engine is not None else None
        if context is None:
            raise EngineError(f"A part of the graph cannot be loaded: {log.text()}.")
        for name, array in inputs.items():
            if not context.set_input_shape(name, array.shape):
                raise InferenceError(
                    f"A part of the graph does not take {array.shape}: {log.text()}."
                )
        context.infer_shapes()
        return self._execute(context, log, inputs, model.graph.output[0].name)

    def _range(self, array: Array) -> ShapeRange:
        times = max(1, len(array) // self._rows)
        low, opt, high = (
            shape[0] * times for shape in (self._shapes.min, self._shapes.opt, self._shapes.max)
        )
        rest = array.shape[1:]
        low, high = min(low, len(array)), max(high, len(array))
        return ShapeRange((low, *rest), (opt, *rest), (high, *rest))

    def _execute(
        self, context: Any, log: MessageLog, inputs: Mapping[str, Array], output: str
    ) -> Float32Array:
        cuda = self._cuda
        result = np.empty(tuple(context.get_tensor_shape(output)), np.float32)
        stream = cuda.new_stream()
        memories: list[HostMemory | DeviceMemory] = []

        def make(name: str, num_bytes: int) -> tuple[HostMemory, DeviceMemory]:
            host, device = HostMemory(cuda, num_bytes), DeviceMemory(cuda, num_bytes)
            memories.extend((host, device))
            context.set_tensor_address(name, device.address)
            return host, device

        try:
            for name, array in inputs.items():
                host, device = make(name, array.nbytes)
                host.bytes[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                cuda.copy_in(device.address, host.bytes, array.nbytes, stream)
            host, device = make(output, result.nbytes)
            if not context.execute_async_v3(stream):
                raise InferenceError(f"A part of the graph failed: {log.text()}.")
            cuda.copy_out(host.bytes, device.address, result.nbytes, stream)
            cuda.wait(stream)
            result[:] = host.bytes.view(np.float32).reshape(result.shape)
            return result
        finally:
            for memory in memories:
                memory.close()
            cuda.call("cudaStreamDestroy", stream)
