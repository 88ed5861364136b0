"""The matrix-product rate of this machine: what a runtime could reach at best."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from actionclip_deploy.errors import MissingExtraError

try:
    from threadpoolctl import threadpool_limits
except ImportError as exc:
    raise MissingExtraError("actionclip benchmark", "benchmark") from exc

_CPU_SIZE, _GPU_SIZE = 1536, 8192
_REPEATS = 5


@dataclass(frozen=True)
class MatmulSample:
    """One sample of the rate.

    Attributes:
        flops_per_second: Of the fastest of some products of square matrices.
        precision: Of the matrices: fp32 on a CPU, bf16 on a GPU.
        library: What computed them.
    """

    flops_per_second: float
    precision: str
    library: str


def matmul_rate(num_threads: int, *, torch: Any = None) -> MatmulSample:
    """Multiply large square matrices and say how fast that was.

    Args:
        num_threads: Threads on the CPU.
        torch: The module, where it is loaded already; it is used then, on its GPU if it has one,
            and otherwise numpy.
    """
    if torch is None:
        return _numpy_rate(num_threads)
    if torch.cuda.is_available():
        matrix = torch.randn(_GPU_SIZE, _GPU_SIZE, device="cuda", dtype=torch.bfloat16)

        def multiply() -> None:
            torch.mm(matrix, matrix)
            torch.cuda.synchronize()

        return MatmulSample(_best_rate(multiply, _GPU_SIZE), "bf16", f"torch {torch.__version__}")
    matrix = torch.randn(_CPU_SIZE, _CPU_SIZE)
    result = torch.empty_like(matrix)
    rate = _best_rate(lambda: torch.mm(matrix, matrix, out=result), _CPU_SIZE)
    return MatmulSample(rate, "fp32", f"torch {torch.__version__}")


def _numpy_rate(num_threads: int) -> MatmulSample:
    matrix = np.random.default_rng(0).standard_normal((_CPU_SIZE, _CPU_SIZE), dtype=np.float32)
    result = np.empty_like(matrix)
    with threadpool_limits(num_threads):
        rate = _best_rate(lambda: np.matmul(matrix, matrix, out=result), _CPU_SIZE)
    return MatmulSample(rate, "fp32", f"numpy {np.__version__}")


def _best_rate(multiply: Any, size: int) -> float:
    multiply()  # the first one allocates and picks a kernel
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds)
