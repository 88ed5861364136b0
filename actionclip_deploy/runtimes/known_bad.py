"""Combinations of TensorRT, GPU and precision that are known to go wrong, and what to do.

The table is what others have reported, with the issues to read; not every report was confirmed by
NVIDIA, and what is not in it may be wrong as well. So nothing is decided by it: an engine serves
after it has been verified on its own device, whatever stands here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from actionclip_deploy.runtimes.trt.api import EngineRuntime
from actionclip_deploy.runtimes.versions import version_numbers

_TENSORRT = "https://github.com/NVIDIA/TensorRT/issues/"
_EDGE_LLM = "https://github.com/NVIDIA/TensorRT-Edge-LLM/issues/"
_RERUN = "https://github.com/rerun-io/examples-monorepo/pull/"

_VERIFY = "run `actionclip verify` on the device before the engine is used"


@dataclass(frozen=True)
class KnownBad:
    """One row: where it happens, what happens, and what to do.

    Attributes:
        name: A short one, for `--json` and for logs.
        first: First version of TensorRT that has the fault.
        before: First version that has it no more; None where none is known.
        what: What goes wrong, as a clause.
        advice: What to do, as a clause.
        issues: Links to the reports; none where NVIDIA documents it or the compiler says it.
        runtime: Which of the two TensorRTs.
        compute_capabilities: Of the GPUs that are concerned; None for every one.
        precisions: Of the graphs that are concerned; None for every one.
        before_jetpack: On a Jetson alone, with a JetPack below this one; None for everywhere.
    """

    name: str
    first: str
    before: str | None
    what: str
    advice: str
    issues: tuple[str, ...] = ()
    runtime: EngineRuntime = "tensorrt"
    compute_capabilities: tuple[str, ...] | None = None
    precisions: tuple[str, ...] | None = None
    before_jetpack: str | None = None

    @property
    def text(self) -> str:
        """One sentence."""
        where = f" ({', '.join(self.issues)})" if self.issues else ""
        return f"{self.what}{where}; {self.advice}."

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


KNOWN_BAD: tuple[KnownBad, ...] = (
    KnownBad(
        name="10.3-fp16-vit",
        first="10.3",
        before="10.5",
        precisions=("fp16",),
        what="TensorRT 10.3, which JetPack 6.1 and 6.2 ship, builds fp16 engines of vision "
        "transformers that are wrong",
        advice="take a container with TensorRT 10.7 or later, or run `actionclip verify`, and "
        "where it fails `actionclip build --repair`, or an fp32 bundle",
        issues=(f"{_TENSORRT}4723",),
    ),
    KnownBad(
        name="10.3-dynamic-transformer",
        first="10.3",
        before="10.5",
        what="TensorRT below 10.5 builds transformers with dynamic shapes that are wrong",
        advice=f"take TensorRT 10.5 or later, or {_VERIFY}",
        issues=(f"{_TENSORRT}4419",),
    ),
    KnownBad(
        name="10.4-vit",
        first="10.4",
        before="10.5",
        what="TensorRT 10.4 miscompiles a vision transformer in fp32 as well (cosine 0.018), and "
        "gives NaN in fp16",
        advice="take another version",
        issues=(f"{_TENSORRT}4742",),
    ),
    KnownBad(
        name="10.7-fused-attention",
        first="10.7",
        before="10.8",
        what="TensorRT 10.7 computes the fused attention of open_clip wrong, in fp32 as well",
        advice="bundles hold the explicit form, which the reports give as the cure; for graphs of "
        f"other tools {_VERIFY}",
        issues=(f"{_TENSORRT}4328", f"{_TENSORRT}4333"),
    ),
    KnownBad(
        name="10.11-batch",
        first="10.11",
        before="10.12",
        what="TensorRT 10.11 gives wrong results for batches above 1, in fp32 as well",
        advice="take another version, or build with --profile latency alone",
        issues=(f"{_TENSORRT}4853",),
    ),
    KnownBad(
        name="10.13.3-thor-qkv",
        first="10.13.3",
        before="10.14",
        compute_capabilities=("11.0",),
        what="TensorRT 10.13.3, which JetPack 7.0 and 7.1 ship, fuses the products of query, key "
        "and value wrongly on Thor where the largest batch is 1",
        advice="take a container with TensorRT 10.16, or build with --profile throughput alone, "
        "or with --repair, which splits that product",
        issues=(f"{_EDGE_LLM}105", f"{_EDGE_LLM}151"),
    ),
    KnownBad(
        name="sm120-fused-attention",
        first="10.0",
        before="10.17",
        compute_capabilities=("12.0",),
        precisions=("fp16", "bf16"),
        what="fused attention gives silently wrong fp16 and bf16 results on GeForce RTX 50 up to "
        "TensorRT 10.16, while fp32 is exact",
        advice="build with --repair, which breaks the fusion where verification fails, or take an "
        "fp32 bundle",
        issues=(f"{_TENSORRT}4837",),
    ),
    KnownBad(
        name="11.1-batch",
        first="11.1",
        before="11.2",
        what="TensorRT 11.1 gives wrong results for batches above 1, in fp32 as well",
        advice="take another version, or build with --profile latency alone",
        issues=(f"{_TENSORRT}4853",),
    ),
    KnownBad(
        name="11.1-rows",
        first="11.1",
        before="11.2",
        what="TensorRT 11.1 gives different outputs for identical rows, and its accuracy changes "
        "with the width of a profile",
        advice="take another version, or build narrow profiles",
        issues=(f"{_TENSORRT}4813",),
    ),
    KnownBad(
        name="11.2-fusion",
        first="11.2",
        before="11.3",
        what="TensorRT 11.2 miscompiles a fusion without a word",
        advice=_VERIFY,
        issues=(f"{_RERUN}87",),
    ),
    KnownBad(
        name="jetpack-11",
        first="11.0",
        before="11.4.1",
        before_jetpack="8",
        what="TensorRT 11.0 to 11.4.0 do not support JetPack",
        advice="stay on the TensorRT 10 of this JetPack, or take TensorRT 11.4.1 with JetPack "
        "7.2.2 or later",
    ),
    KnownBad(
        name="jetpack-11.4.1",
        first="11.4.1",
        before=None,
        before_jetpack="7.2.2",
        what="TensorRT 11.4.1 supports JetPack from 7.2.2 on",
        advice="stay on the TensorRT 10 of this JetPack, or update JetPack",
    ),
    KnownBad(
        name="rtx-turing-fp32",
        runtime="tensorrt-rtx",
        first="1.0",
        before=None,
        compute_capabilities=("7.5",),
        precisions=("fp32",),
        what="TensorRT for RTX has no fp32 matrix product for Turing (RTX 20)",
        advice="take a bundle that was exported with --precision fp16 --text-precision fp16",
    ),
    KnownBad(
        name="rtx-fp8",
        runtime="tensorrt-rtx",
        first="1.0",
        before=None,
        compute_capabilities=("7.5", "8.0", "8.6"),
        precisions=("fp8",),
        what="TensorRT for RTX has fp8 from compute capability 8.9 (RTX 40) on",
        advice="take an fp16 or int8 bundle",
    ),
)


def find_known_bad(
    version: str,
    compute_capability: str | None = None,
    *,
    precision: str | None = None,
    runtime: EngineRuntime = "tensorrt",
    jetpack: str | None = None,
    table: Sequence[KnownBad] = KNOWN_BAD,
) -> tuple[KnownBad, ...]:
    """The rows that concern a machine, in the order of the table.

    Args:
        version: Of TensorRT, such as `10.3.0` or `11.4.0.106`.
        compute_capability: Of the GPU, such as `8.7`; None finds the rows of every GPU alone.
        precision: Of the graphs; None finds the rows of all of them.
        runtime: Which of the two TensorRTs the version is of.
        jetpack: Version of JetPack; None where this is no Jetson.
        table: Another table in tests.

    Raises:
        ValueError: If the version has no number.
    """
    number = version_numbers(version)
    if not number:
        raise ValueError(f"version is {version!r}; it must begin with a number, as 10.3.0 does.")
    return tuple(
        row
        for row in table
        if row.runtime == runtime
        and version_numbers(row.first) <= number
        and (row.before is None or number < version_numbers(row.before))
        and (row.compute_capabilities is None or compute_capability in row.compute_capabilities)
        and (row.precisions is None or precision is None or precision in row.precisions)
        and (row.before_jetpack is None or _is_below(jetpack, row.before_jetpack))
    )


def _is_below(jetpack: str | None, limit: str) -> bool:
    return bool(jetpack) and version_numbers(jetpack or "") < version_numbers(limit)
