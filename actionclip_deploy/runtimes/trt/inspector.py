"""What TensorRT's engine inspector tells about the layers of an engine, in both of its forms.

Up to version 10 a tensor has one field for format and type ("Half", or in words as "Row major
linear FP16 format") and the engine a list `Bindings`; since version 11 there are `Format` and
`DataType` apart, and `I/O Tensors`. Layers are objects only in an engine that was built with
detailed profiling verbosity; they are names otherwise.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from actionclip_deploy.errors import EngineError
from actionclip_deploy.runtimes.trt.products import ProductPrecision

# The separators between entries are control characters that need no telling apart.
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")

# In the words of both forms; what is an index or a condition says nothing about a product.
_TYPES: tuple[tuple[str, ProductPrecision], ...] = (
    (r"bf16|bfloat16", "bf16"),
    (r"fp8|e4m3|e5m2|float8", "fp8"),
    (r"(?<!u)int8", "int8"),
    (r"fp16|half|float16", "fp16"),
    (r"fp32|float", "fp32"),
)

# Of kernels by NVIDIA's matrix generator: types of the operands, type that is multiplied in and
# type that is summed up in, type of the result; as in `f16f16_f16f32_f16`.
_TYPE = r"(?:bf16|tf32|f16|f32|i8|u8|i32|e4m3|e5m2)"
_XMMA = re.compile(rf"_{_TYPE}{_TYPE}_({_TYPE}){_TYPE}_{_TYPE}(?:_|$)")
_XMMA_PRECISIONS: dict[str, ProductPrecision] = {
    **{"f32": "fp32", "tf32": "tf32", "f16": "fp16", "bf16": "bf16"},
    **{"i8": "int8", "u8": "int8", "e4m3": "fp8", "e5m2": "fp8"},
}
# Of other libraries, the first that fits: in `ampere_fp16_s1688gemm_fp16` the `s` is the type of
# the sum, and without a type beside it the tensor cores round fp32 to TF32.
_KERNELS: tuple[tuple[str, ProductPrecision], ...] = (
    (r"fp8|e4m3|e5m2|qgmma", "fp8"),
    (r"int8|imma|i8816|i16832", "int8"),
    (r"bf16", "bf16"),
    (r"fp16|(?<!t)f16|hgemm|hcudnn|h884|h1688|h16816|hmma", "fp16"),
    (r"tf32|s1688", "tf32"),
    (r"sgemm|scudnn|ffma|simt_s|f32f32", "fp32"),
)
# A hash in a name may spell a type by chance: bf16 is a hexadecimal number.
_HASH = re.compile(r"0x[0-9a-f]+")


@dataclass(frozen=True)
class Layer:
    """One layer of an engine.

    Attributes:
        name: Its name: nodes of the graph that are joined by `+`, or one made up.
        kind: TensorRT's type of layer; empty where only the name is told.
        tactic: Name of the kernel; empty where it is not told.
        nodes: Nodes of the graph that it was made of, where it tells them.
        input_types: Of those inputs that have a type that is computed in.
        output_types: Likewise of its outputs.
    """

    name: str
    kind: str
    tactic: str
    nodes: frozenset[str]
    input_types: tuple[ProductPrecision, ...]
    output_types: tuple[ProductPrecision, ...]

    @property
    def kernel_precision(self) -> ProductPrecision | None:
        """What the kernel computes in, from its name; None where that does not say."""
        return kernel_precision(self.tactic)


def read_layers(inspector_json: str) -> tuple[Layer, ...]:
    """Read the layers of an engine.

    Args:
        inspector_json: What `EngineInspector.get_engine_information` gives as JSON.

    Raises:
        EngineError: If it is no such thing.
    """
    try:
        layers = json.loads(inspector_json)["Layers"]
        return tuple(_layer(layer) for layer in layers)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise EngineError(
            f"TensorRT's engine inspector gave no list of layers ({type(exc).__name__}: {exc}), so "
            "the engine cannot be audited; use another version of TensorRT."
        ) from exc


def kernel_precision(tactic: str) -> ProductPrecision | None:
    """The type that a kernel multiplies in, from its name; None where the name does not tell."""
    name = _HASH.sub("", tactic.lower())
    if found := _XMMA.search(name):
        return _XMMA_PRECISIONS.get(found[1])
    return next((kind for pattern, kind in _KERNELS if re.search(pattern, name)), None)


def _layer(layer: Any) -> Layer:
    if isinstance(layer, str):
        return Layer(layer, "", "", frozenset(_ONNX_NODE.findall(layer)), (), ())
    return Layer(
        name=layer["Name"],
        kind=layer.get("LayerType", ""),
        tactic=layer.get("TacticName", ""),
        nodes=frozenset(_ONNX_NODE.findall(layer.get("Metadata", ""))),
        input_types=_types(layer.get("Inputs", [])),
        output_types=_types(layer.get("Outputs", [])),
    )


def _types(tensors: list[dict[str, Any]]) -> tuple[ProductPrecision, ...]:
    found = []
    for tensor in tensors:
        fields = {key.lower(): str(value).lower() for key, value in tensor.items()}
        words = fields.get("datatype") or fields.get("format/datatype", "")
        kind = next((kind for pattern, kind in _TYPES if re.search(pattern, words)), None)
        found += [] if kind is None else [kind]
    return tuple(found)
