"""Which runtime, precision and environment to use on a machine, from the facts about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from actionclip_deploy.runtimes.machine import Gpu, Gpus, Jetson, TensorRT, version_numbers
from actionclip_deploy.runtimes.trt.api import EngineRuntime

# Combinations of TensorRT, GPU and precision that are known to go wrong, and what to do.
#
# The table is what others have reported, with the issues to read; not every report was confirmed by
# NVIDIA, and what is not in it may be wrong as well. So nothing is decided by it: an engine serves
# after it has been verified on its own device, whatever stands here.


_TENSORRT = "https://github.com/NVIDIA/TensorRT/issues/"
_EDGE_LLM = "https://github.com/NVIDIA/TensorRT-Edge-LLM/issues/"
_RERUN = "https://github.com/rerun-io/examples-monorepo/pull/"

_KNOWN_BAD_VERIFY = "run `actionclip verify` on the device before the engine is used"


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
        advice=f"take TensorRT 10.5 or later, or {_KNOWN_BAD_VERIFY}",
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
        f"other tools {_KNOWN_BAD_VERIFY}",
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
        advice=_KNOWN_BAD_VERIFY,
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


# Strongly typed networks as they are built here; source: the bindings of each version.
_OLDEST_TENSORRT, _AFTER_TENSORRT = (10, 3), (12,)
# TensorRT for RTX lists these and no others. Source: its support matrix.
_RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
# int8 products that add in 32 bits at once: without them, sums saturate and weights lose a bit.
_INT8_FLAGS = frozenset(("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"))

_EXPORT = "actionclip export CHECKPOINT --output bundle --precision {}"
_BUILD = "actionclip build bundle --runtime {}"
_VERIFY = "actionclip verify bundle --runtime {}"


@dataclass(frozen=True)
class Facts:
    """What a recipe is chosen by.

    Attributes:
        cpu_flags: Instruction sets, as `describe_machine` gives them.
        gpus: What the CUDA driver gives.
        jetson: None elsewhere.
        tensorrt: What is installed of it.
        tensorrt_rtx: What is installed of TensorRT for RTX.
    """

    cpu_flags: tuple[str, ...] = ()
    gpus: Gpus = field(default_factory=Gpus)
    jetson: Jetson | None = None
    tensorrt: TensorRT = field(default_factory=TensorRT)
    tensorrt_rtx: TensorRT = field(default_factory=TensorRT)


@dataclass(frozen=True)
class Recipe:
    """What to use on a machine.

    Attributes:
        runtime: As `--runtime` takes it.
        execution_provider: As `--execution-provider` takes it; None where there is none.
        precision: Of the bundle.
        environment: Folder of the checkout that says how to set it up.
        why: One to three sentences.
        commands: What to run; those that start with `actionclip export` on any machine.
    """

    runtime: str
    execution_provider: str | None
    precision: str
    environment: str
    why: str
    commands: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def recommend(facts: Facts) -> Recipe:
    """The recipe for a machine; a proposal, which verification on the machine may overrule."""
    if facts.jetson is not None:
        return _for_jetson(facts, facts.jetson)
    if not facts.gpus.found:
        return _for_cpu(facts)
    gpu = facts.gpus.found[0]
    if _is_usable(facts.tensorrt):
        why = (
            f"TensorRT {facts.tensorrt.module} is installed and builds engines for this "
            f"{gpu.name}. An engine is used after it has been verified here."
        )
        return _tensorrt("runtimes/tensorrt", why)
    if gpu.compute_capability in _RTX_CAPABILITIES and (_is_rtx(gpu) or facts.tensorrt_rtx.module):
        return _rtx(facts, gpu)
    if _capability(gpu) >= (7, 5):
        why = (
            f"{gpu.name} is a GPU for TensorRT, which is not installed: its libraries lie on "
            "NVIDIA's own index, so a container of NVIDIA's is the shortest way."
        )
        install = (
            "docker build -f runtimes/tensorrt/Dockerfile -t actionclip-tensorrt .",
            "docker run --rm -it --gpus all -v $PWD:/data actionclip-tensorrt",
        )
        return _tensorrt("runtimes/tensorrt", why, *install)
    return _for_old_gpu(gpu)


def _for_jetson(facts: Facts, jetson: Jetson) -> Recipe:
    major = jetson.jetpack_major
    if major is not None and major < 6:
        why = (
            f"JetPack {jetson.jetpack} has a TensorRT below 10.3, which is too old; update to "
            "JetPack 6 if this board can. Until then ONNX Runtime runs on the CPU."
        )
        return _onnxruntime("cpu", _int8_or_fp32(facts), why)
    folder = "runtimes/tensorrt"
    file = "Dockerfile.jetpack7" if major and major > 6 else "Dockerfile.jetpack6"
    container = (
        f"docker build -f {folder}/{file} -t actionclip-tensorrt .",
        "docker run --rm -it --runtime nvidia -v $PWD:/data actionclip-tensorrt",
    )
    if _is_usable(facts.tensorrt):
        version = facts.tensorrt.module or ""
        why = f"TensorRT {version} of this JetPack builds fp16 engines"
        if version_numbers(version) < (10, 7):
            why += (
                ", and is known to build some wrongly. Verification says whether yours is; a "
                "container with TensorRT 10.7 or later is the surer way"
            )
        elif version_numbers(version)[:2] == (10, 13):
            why += (
                ", and is known to fuse wrongly on Thor where the largest batch is 1. "
                "Verification says whether yours is; the container has a later TensorRT"
            )
        return _tensorrt(folder, f"{why}.", *(f"{line}  # the container" for line in container))
    why = (
        f"JetPack {jetson.jetpack or '6 or later'} brings TensorRT along, and this Python does "
        "not see it: use the container, or an environment made with --system-site-packages."
    )
    return _tensorrt(folder, why, *container)


def _for_cpu(facts: Facts) -> Recipe:
    precision = _int8_or_fp32(facts)
    because = facts.gpus.missing_because or "no GPU was found"
    if precision == "int8":
        why = (
            f"There is no GPU to use ({because}). This CPU adds int8 products without saturation, "
            "and int8 is quicker on it than fp32; look at `actionclip evaluate` before you ship it."
        )
    else:
        why = (
            f"There is no GPU to use ({because}). This CPU has no VNNI: int8 is quicker here as "
            "well, with weights of 7 bits, and needs a look at `actionclip evaluate` first."
        )
    return _onnxruntime("cpu", precision, why)


def _for_old_gpu(gpu: Gpu) -> Recipe:
    why = (
        f"{gpu.name} has compute capability {gpu.compute_capability}, below the 7.5 that "
        "NVIDIA's present containers ask for; ONNX Runtime's CUDA provider may run, in a version "
        "for its driver."
    )
    return _onnxruntime("cuda", "fp32", why)


def _rtx(facts: Facts, gpu: Gpu) -> Recipe:
    have = facts.tensorrt_rtx.module
    why = (
        f"TensorRT for RTX {f'{have} is installed' if have else 'installs with pip'} and builds "
        f"for this {gpu.name} (compute capability {gpu.compute_capability}), ahead of time on any "
        "machine as well."
    )
    install = () if have else ('pip install "actionclip-deploy[rtx]"',)
    # For RTX 20 it has no fp32 matrix products, which the text encoder otherwise consists of.
    export = "fp16 --text-precision fp16" if gpu.compute_capability == "7.5" else "fp16"
    return _recipe("tensorrt-rtx", "runtimes/tensorrt-rtx", why, install, export)


def _tensorrt(environment: str, why: str, *install: str) -> Recipe:
    return _recipe("tensorrt", environment, why, install)


def _recipe(
    runtime: str, environment: str, why: str, install: tuple[str, ...], export: str = "fp16"
) -> Recipe:
    commands = (_EXPORT.format(export), *install, _BUILD.format(runtime), _VERIFY.format(runtime))
    return Recipe(runtime, None, "fp16", environment, why, commands)


def _onnxruntime(provider: str, precision: str, why: str) -> Recipe:
    extra = "onnxruntime-gpu" if provider == "cuda" else "onnxruntime"
    option = "" if provider == "cpu" else f" --execution-provider {provider}"
    commands = (
        _EXPORT.format(precision),
        f'pip install "actionclip-deploy[{extra}]"',
        f"actionclip verify bundle{option}",
    )
    return Recipe("onnxruntime", provider, precision, "runtimes/onnxruntime", why, commands)


def _is_usable(tensorrt: TensorRT) -> bool:
    if tensorrt.module is None:
        return False
    return _OLDEST_TENSORRT <= version_numbers(tensorrt.module) < _AFTER_TENSORRT


def _is_rtx(gpu: Gpu) -> bool:
    return bool(re.search(r"\b(RTX|GeForce)\b", gpu.name))


def _int8_or_fp32(facts: Facts) -> str:
    return "int8" if _INT8_FLAGS.intersection(facts.cpu_flags) else "fp32"


def _capability(gpu: Gpu) -> tuple[int, ...]:
    return version_numbers(gpu.compute_capability)


def find_problems(facts: Facts) -> tuple[KnownBad, ...]:
    """The rows of the table of known faults that concern what is installed on a machine."""
    jetpack = facts.jetson.jetpack if facts.jetson else None
    rows: dict[str, KnownBad] = {}
    installed: tuple[tuple[EngineRuntime, str | None], ...] = (
        ("tensorrt", facts.tensorrt.version),
        ("tensorrt-rtx", facts.tensorrt_rtx.version),
    )
    for runtime, version in installed:
        if version is None:
            continue
        for gpu in facts.gpus.found:
            problems = find_known_bad(
                version, gpu.compute_capability, runtime=runtime, jetpack=jetpack
            )
            rows |= {row.name: row for row in problems}
    return tuple(rows.values())
