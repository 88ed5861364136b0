"""Which runtime, precision and environment to use on a machine, from the facts about it."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from actionclip_deploy.runtimes.gpus import Gpu, Gpus
from actionclip_deploy.runtimes.jetson import Jetson
from actionclip_deploy.runtimes.known_bad import KnownBad, find_known_bad
from actionclip_deploy.runtimes.nvidia_libraries import TensorRT
from actionclip_deploy.runtimes.trt.api import EngineRuntime
from actionclip_deploy.runtimes.versions import version_numbers

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
