"""What TensorRT's engine inspector would tell of an engine, in its two forms.

One layer for each product, as Myelin names them, with the node that it came from in its metadata.
"""

from __future__ import annotations

import json
from typing import Any

import onnx

_WORDS = {  # by ONNX's element type: of version 10, of version 11, in the names of kernels
    onnx.TensorProto.FLOAT: ("Float", "FP32", "f32f32_f32f32_f32"),
    onnx.TensorProto.FLOAT16: ("Half", "FP16", "f16f16_f16f32_f16"),
    onnx.TensorProto.BFLOAT16: ("BFloat16", "BF16", "bf16bf16_bf16f32_bf16"),
    onnx.TensorProto.INT8: ("Int8", "INT8", "i8i8_i8i32_f32"),
    onnx.TensorProto.FLOAT8E4M3FN: ("FP8", "FP8", "e4m3e4m3_e4m3f32_f32"),
}


def engine_information(model: onnx.ModelProto, lowered: bool, *, form: int) -> str:
    """JSON of an engine that was built from a model.

    Args:
        model: The graph.
        lowered: Whether products are computed in the type that the graph has for them; otherwise
            in fp32.
        form: 10 or 11, the version whose form it has.
    """
    inferred = onnx.shape_inference.infer_shapes(model)
    graph = inferred.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    layers = []
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            kind = _operand_type(node.input[0], types, producers)
            layers.append(_layer(node, kind if lowered else onnx.TensorProto.FLOAT, form))
    tensors = [tensor.name for tensor in (*graph.input, *graph.output)]
    return json.dumps({"Layers": layers, "Bindings" if form == 10 else "I/O Tensors": tensors})


def _operand_type(name: str, types: dict[str, int], producers: dict[str, Any]) -> int:
    node = producers.get(name)
    if node is not None and node.op_type == "DequantizeLinear":
        return types.get(node.input[2], onnx.TensorProto.INT8)
    return types.get(name, onnx.TensorProto.FLOAT)


def _layer(node: Any, kind: int, form: int) -> dict[str, Any]:
    old, new, kernel = _WORDS[kind]
    tensor: dict[str, Any] = {"Name": node.input[0], "Dimensions": [1, 8]}
    if form == 10:
        tensor["Format/Datatype"] = old
    else:
        tensor |= {"Format": "Row major linear", "DataType": new}
    return {
        "Name": f"{node.name}_myl0_1",
        "LayerType": "gemm",
        "Inputs": [tensor],
        "Outputs": [tensor],
        "TacticName": f"sm80_xmma_gemm_{kernel}_tn_n_tilesize128x128x32",
        "Metadata": f"[ONNX Layer: {node.name}]",
    }
