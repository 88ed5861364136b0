"""What was tried for int8 on CPUs: attention's products in int8, and sensitivity by both runtimes.

    python benchmarks/bench_int8_trials.py --work FOLDER --backbone ViT-B-32

Attention: of the static graph, the products without weights get int8 inputs too, with scales of
the golden frames. Ratios are medians of rounds in turns, by the CPU time of one thread, to the
static graph in the same runtime: above 1 takes longer. The cosine is that to the fp32 graph.

Sensitivity: each block alone in int8, executed by ONNX Runtime and by OpenVINO. An export measures
it by the first; what counts is whether the order of the blocks is the same.

--work is where bench_int8.py keeps its bundles, which are exported where they are missing.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
from bench_int8 import WANTED, export_bundles
from onnx import TensorProto, helper, numpy_helper
from workbench import make_parser, write_report

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.export import Int8Options
from actionclip_deploy.export.quantization import QuantizedWriter, measure_thresholds
from actionclip_deploy.runtimes.parity import Golden

_CORE = openvino.Core()  # one for good, see runtimes/ov.py
Encode = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--backbone", default="ViT-B-32", choices=list(WANTED))
    options = parser.parse_args()
    folder = options.work / options.backbone
    folder.mkdir(parents=True, exist_ok=True)
    _, bundles = export_bundles(options.backbone, folder)
    fp32, static = bundles["onnxruntime fp32"], bundles["onnxruntime int8 static"]
    golden = Golden.load(fp32)
    frames = golden.frames[0]
    with tempfile.TemporaryDirectory() as scratch:
        tried = Path(scratch) / "visual.onnx"
        write_with_attention(static.graph_path("visual"), tried, frames)
        found = {
            "attention": time_attention(fp32, static, tried, frames, options.rounds),
            "sensitivity": sensitivities(fp32, golden.frames[:2], Path(scratch)),
        }
    write_report({"backbone": options.backbone, **found}, options.output)


def write_with_attention(source: Path, target: Path, frames: np.ndarray) -> None:
    """Write a static graph of which the products of two activations are in int8 as well."""
    model = onnx.load(str(source))
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}

    def is_weight(name: str) -> bool:
        maker = makers.get(name)
        return name in weights or (
            maker is not None and maker.input[:1] and maker.input[0] in weights
        )

    products = [
        node
        for node in graph.node
        if node.op_type == "MatMul" and not any(map(is_weight, node.input))
    ]
    inputs = sorted({name for node in products for name in node.input})
    values = _values_of(model, inputs, frames, target.with_name("values.onnx"))
    added: dict[str, list[Any]] = {}
    for name in inputs:
        scale = np.float32(max(float(np.abs(values[name]).max()), 1e-6) / 127)
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}/scale"))
        graph.initializer.append(numpy_helper.from_array(np.int8(0), f"{name}/zero"))
        added[name] = [
            helper.make_node(kind, [given, f"{name}/scale", f"{name}/zero"], [made])
            for kind, given, made in (
                ("QuantizeLinear", name, f"{name}/int8"),
                ("DequantizeLinear", f"{name}/int8", f"{name}/again"),
            )
        ]
    nodes: list[Any] = []
    for node in graph.node:
        if node in products:
            for place, name in enumerate(node.input):
                nodes += added.pop(name, [])
                node.input[place] = f"{name}/again"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, str(target))


def _values_of(model: Any, names: list[str], frames: np.ndarray, path: Path) -> dict[str, Any]:
    told = onnx.ModelProto()
    told.CopyFrom(model)
    for name in names:
        told.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    onnx.save(told, str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    values = session.run(names, {session.get_inputs()[0].name: frames})
    path.unlink()
    return dict(zip(names, values, strict=True))


def by_onnxruntime(path: Path) -> Encode:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda frames: session.run(None, {name: frames})[0]  # type: ignore[no-any-return]


def by_openvino(path: Path) -> Encode:
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    compiled = _CORE.compile_model(str(path), "CPU", config)
    request = compiled.create_infer_request()
    return lambda frames: np.array(request.infer([frames])[compiled.output(0)])


def time_attention(
    fp32: Bundle, static: Bundle, tried: Path, frames: np.ndarray, rounds: int
) -> dict[str, Any]:
    """Both graphs in both runtimes, in turns."""
    wanted = by_onnxruntime(fp32.graph_path("visual"))(frames)
    paths = {"static": static.graph_path("visual"), "with attention": tried}
    found: dict[str, Any] = {}
    for runtime, opener in {"onnxruntime": by_onnxruntime, "openvino": by_openvino}.items():
        encoders = {name: opener(path) for name, path in paths.items()}
        given = encoders["with attention"](frames)
        norms = np.linalg.norm(given, axis=1) * np.linalg.norm(wanted, axis=1)
        ratios = []
        for turn in range(rounds):
            seconds = {}
            for name in list(encoders) if turn % 2 else reversed(list(encoders)):
                began = time.process_time()
                encoders[name](frames)
                seconds[name] = time.process_time() - began
            ratios.append(seconds["with attention"] / seconds["static"])
        found[runtime] = {
            "takes, of static": round(statistics.median(ratios), 3),
            "cosine": float(((given * wanted).sum(axis=1) / norms).min()),
        }
    return found


class _ByOpenVino(QuantizedWriter):
    def _features(self, path: Path) -> np.ndarray:
        encode = by_openvino(path)
        clips = self._probe if self._by_frame else self._probe[:, np.newaxis]
        return np.concatenate([encode(clip) for clip in clips])


def sensitivities(bundle: Bundle, clips: np.ndarray, scratch: Path) -> dict[str, Any]:
    """Decibels of each block in both runtimes, and how their orders agree."""
    source, options = bundle.graph_path("visual"), Int8Options(calibration=(scratch,))
    for path in source.parent.glob("visual*"):  # a file is written beside the graph
        (scratch / path.name).write_bytes(path.read_bytes())
    thresholds = measure_thresholds(scratch / source.name, clips, by_frame=True)
    found: dict[str, list[float]] = {}
    for name, kind in {"onnxruntime": QuantizedWriter, "openvino": _ByOpenVino}.items():
        writer = kind(source, clips, by_frame=True, options=options, thresholds=thresholds)
        rows = writer.sensitivities(scratch)
        found[name] = [row.error.sqnr_db for row in rows]
    apart = np.abs(np.subtract(*found.values()))
    orders = [np.argsort(values).tolist() for values in found.values()]
    return {
        "sqnr_db": {name: [round(v, 2) for v in values] for name, values in found.items()},
        "largest_difference_db": round(float(apart.max()), 3),
        "orders": orders,
        "same_order": orders[0] == orders[1],
    }


if __name__ == "__main__":
    main()
