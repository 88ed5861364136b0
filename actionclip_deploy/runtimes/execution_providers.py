"""ONNX Runtime's execution providers: their names, their options here, what each one needs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Collection

_TRIAL_TIMEOUT_SECONDS = 120

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

# Short names, as --execution-provider takes them.
NAMES = {
    "cpu": CPU,
    "cuda": CUDA,
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "qnn": "QNNExecutionProvider",
}

# Options of every session. The precision is the graph's: CUDA would run fp32 matrix products in
# TF32, which keeps 10 bits of the mantissa and misses the tolerances of fp32 by far.
_OPTIONS = {CUDA: {"use_tf32": "0"}}

_GPU = (
    'run: pip install "actionclip-deploy[onnxruntime-gpu]" after uninstalling onnxruntime (the two '
    "overwrite each other), with the CUDA and cuDNN libraries that its version names; on a Jetson "
    "install the onnxruntime-gpu wheel made for its JetPack"
)
_NEEDS = {
    "CUDAExecutionProvider": _GPU,
    "TensorrtExecutionProvider": (
        f"{_GPU}, and the TensorRT libraries that it links: run "
        "`actionclip doctor`, which names their version"
    ),
    "OpenVINOExecutionProvider": (
        "run: pip install onnxruntime-openvino in the place of onnxruntime"
    ),
    "CoreMLExecutionProvider": "it is part of onnxruntime on macOS alone",
    "DmlExecutionProvider": (
        "on Windows run: pip install onnxruntime-directml in the place of onnxruntime"
    ),
}

# Work of which the time grows with the input; the rest is arithmetic on shapes, which ONNX
# Runtime keeps on the CPU on purpose.
_HEAVY = frozenset(
    (
        *("Attention", "BiasGelu", "Conv", "ConvInteger", "DynamicQuantizeMatMul", "FastGelu"),
        *(
            "DequantizeLinear",
            "DynamicQuantizeLinear",
            "QuantizeLinear",
            "FusedConv",
            "FusedGemm",
            "FusedMatMul",
            "Gelu",
            "Gemm",
        ),
        *("GroupNorm", "LSTM", "LayerNormalization", "MatMul", "MatMulInteger", "MatMulNBits"),
        *("MultiHeadAttention", "QGemm", "QLinearConv", "QLinearMatMul", "QuickGelu"),
        *("SkipLayerNormalization", "Softmax"),
    )
)


def full_name(name: str, known: Collection[str]) -> str:
    """ONNX Runtime's name of an execution provider, given that name or a short one.

    Args:
        name: For example `cuda` or `CUDAExecutionProvider`.
        known: The names that the installed ONNX Runtime knows, whether built in or not.

    Raises:
        ValueError: If there is no such execution provider.
    """
    if name in known:
        return name
    if name.lower() in NAMES:
        return NAMES[name.lower()]
    raise ValueError(
        f"execution_provider is {name!r}; it must be one of {', '.join(NAMES)}, or a name of "
        "ONNX Runtime's such as CUDAExecutionProvider."
    )


def provider_options(provider: str, *, cuda_graphs: bool = False) -> dict[str, str]:
    """Options of a session on an execution provider.

    Args:
        provider: ONNX Runtime's name of it.
        cuda_graphs: Whether CUDA shall record its work and replay it.
    """
    options = dict(_OPTIONS.get(provider, {}))
    if cuda_graphs:
        options["enable_cuda_graph"] = "1"
    return options


def what_it_needs(provider: str) -> str:
    """What a user has to install or do to get this execution provider."""
    return _NEEDS.get(provider, "install a build of ONNX Runtime that has it")


def heavy_ops(ops: Collection[str]) -> list[str]:
    """Those of the given ONNX operators that should not fall back to the CPU, sorted."""
    return sorted(_HEAVY.intersection(ops))


def why_unavailable(provider: str) -> str | None:
    """Try an execution provider in a process of its own, which it may bring down.

    Args:
        provider: ONNX Runtime's name of it.

    Returns:
        None if it executed a graph of one node, otherwise the reason why it did not.
    """
    program = "import sys; from actionclip_deploy.runtimes import ort; ort.probe(sys.argv[1])"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, provider],
            capture_output=True,
            text=True,
            timeout=_TRIAL_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return f"trying it failed ({exc})"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"trying it ended Python with signal {-done.returncode}"
    # The message that names the missing library is printed and not part of the exception.
    found = re.search(r"Failed to load library \S+ with error: (.+)", done.stderr)
    lines = done.stderr.strip().splitlines() or ["no reason given"]
    return found[1] if found else re.sub(r"^[\w.]+(?:Error|Exception|Fail): ", "", lines[-1])
