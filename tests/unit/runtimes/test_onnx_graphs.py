from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from small_graphs import export_small, inputs_of, run_onnx

from actionclip_deploy.runtimes.onnx_graphs import (
    GraphEditor,
    read_model,
    takes_bf16,
    tensor_types,
    write_model,
)


def test_a_graph_comes_back_as_it_was_written(tmp_path: Path) -> None:
    model = export_small("meanp", "temporal")
    write_model(model, tmp_path / "graph.onnx")
    assert read_model(tmp_path / "graph.onnx") == model
    assert [path.name for path in tmp_path.iterdir()] == ["graph.onnx"]


def test_weights_that_one_file_cannot_hold_lie_beside_it(tmp_path: Path) -> None:
    model = export_small("meanp", "visual")
    wanted = run_onnx(model, inputs_of(model, 2))
    path = tmp_path / "graph.onnx"
    sizes = []
    for _ in range(2):  # the second time there is a file of weights already
        copy = onnx.load_from_string(model.SerializeToString())
        write_model(copy, path, max_embedded_bytes=100)
        sizes.append((tmp_path / "graph.onnx.data").stat().st_size)
    assert sizes[0] == sizes[1]
    onnx.checker.check_model(str(path), full_check=True)
    np.testing.assert_array_equal(run_onnx(read_model(path), inputs_of(model, 2)), wanted)


def test_types_are_known_without_the_values_of_weights() -> None:
    model = export_small("meanp", "textual")
    for tensor in model.graph.initializer:
        if len(tensor.dims) > 1:
            tensor.ClearField("raw_data")
    model.graph.ClearField("value_info")
    (softmax, *_) = (node for node in model.graph.node if node.op_type == "Softmax")
    scores = tensor_types(model)[softmax.input[0]]
    assert scores.elem_type == TensorProto.FLOAT
    assert [d.dim_value for d in scores.shape.dim] == [0, 2, 0, 0]  # two heads, the rest is free


def add_one() -> onnx.ModelProto:
    """Adds one, and has a node and a weight beside it that lead nowhere."""
    one = numpy_helper.from_array(np.float32([1]), "one")
    unused = numpy_helper.from_array(np.float32([2]), "unused")
    nodes = [
        helper.make_node("Mul", ["x", "unused"], ["nowhere"]),
        helper.make_node("Add", ["x", "one"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N"]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [one, unused])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_an_editor_that_changed_nothing_gives_nothing() -> None:
    assert GraphEditor(add_one()).finish() is None


def test_what_nothing_uses_is_left_out_and_names_stay_apart() -> None:
    editor = GraphEditor(add_one())
    add = editor.nodes[1]
    assert editor.fresh("one") == "one_2"
    editor.set_input(add, 1, editor.add_constant("one", np.float32([5])))
    model = editor.finish()
    assert [node.op_type for node in model.graph.node] == ["Add"]
    assert [tensor.name for tensor in model.graph.initializer] == ["one_3"]
    assert run_onnx(model, {"x": np.float32([1, 2])}).tolist() == [6, 7]


def test_nodes_come_before_and_behind_another() -> None:
    editor = GraphEditor(add_one())
    add = editor.nodes[1]
    editor.set_input(add, 0, editor.add_before(add, "Neg", ["x"], "negative"))
    two = editor.add_constant("two", np.float32(2))
    assert editor.add_after(add, "Pow", two, hint="sum") == "sum"
    model = editor.finish()
    assert [node.op_type for node in model.graph.node] == ["Neg", "Add", "Pow"]
    assert run_onnx(model, {"x": np.float32([3, 5])}).tolist() == [4, 16]


def test_convolutions_take_bf16_from_opset_22_on() -> None:
    assert takes_bf16("Gemm", 18)
    assert not takes_bf16("Conv", 18)
    assert takes_bf16("Conv", 22)
