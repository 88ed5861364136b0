"""What to use on a machine, and what is known to go wrong on it.

A recipe names the runtime, the precision and the environment for a machine. `known_bad.toml` lists
the combinations of TensorRT, GPU and precision that others have reported. Neither decides anything:
an engine serves after it has been verified on its own device.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints, model_validator

from actionclip_deploy.installation import install_command
from actionclip_deploy.runtimes.machine import (
    BF16_FLAGS,
    Gpu,
    Gpus,
    Jetson,
    TensorRT,
    version_numbers,
)
from actionclip_deploy.runtimes.trt.api import EngineRuntime

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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
    """What a recipe is chosen by."""

    cpu_flags: tuple[str, ...] = ()  # instruction sets, as `describe_machine` gives them
    gpus: Gpus = field(default_factory=Gpus)  # what the CUDA driver gives
    jetson: Jetson | None = None  # None elsewhere
    tensorrt: TensorRT = field(default_factory=TensorRT)
    # What is installed of TensorRT for RTX.
    tensorrt_rtx: TensorRT = field(default_factory=TensorRT)
    openvino: tuple[str, ...] = ()  # devices that OpenVINO finds, by its names


@dataclass(frozen=True)
class Recipe:
    """What to use on a machine."""

    runtime: str  # as `--runtime` takes it
    execution_provider: str | None  # as `--execution-provider` takes it; None where there is none
    precision: str  # of the bundle
    environment: str  # folder of the checkout that says how to set it up
    why: str  # one to three sentences
    # What to run; those that start with `actionclip export` on any machine.
    commands: tuple[str, ...]


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
    is_rtx = re.search(r"\b(RTX|GeForce)\b", gpu.name) or facts.tensorrt_rtx.module
    if is_rtx and gpu.compute_capability in _RTX_CAPABILITIES:
        return _for_rtx(facts, gpu)
    if version_numbers(gpu.compute_capability) >= (7, 5):
        why = (
            f"{gpu.name} is a GPU for TensorRT, which is not installed: its libraries lie on "
            "NVIDIA's own index, so a container of NVIDIA's is the shortest way to it."
        )
        install = (
            "docker build -f runtimes/tensorrt/Dockerfile -t actionclip-tensorrt .",
            "docker run --rm -it --gpus all -v $PWD:/data actionclip-tensorrt",
        )
        return _tensorrt("runtimes/tensorrt", why, *install)
    why = (
        f"{gpu.name} has compute capability {gpu.compute_capability}, below the 7.5 that NVIDIA's "
        "present containers ask for; ONNX Runtime's CUDA provider may run, in a version for its "
        "driver."
    )
    return _onnxruntime("cuda", "fp32", why)


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
        f"JetPack {jetson.jetpack or '6 or later'} comes with TensorRT, and this Python does not "
        "see it: use the container, or an environment made with --system-site-packages."
    )
    return _tensorrt(folder, why, *container)


def _for_intel_gpu(name: str) -> Recipe:
    device = name.lower().replace(".", ":")
    why = (
        f"OpenVINO finds Intel's GPU {name}, and fp16 is what such a GPU is fast in. No GPU of "
        "Intel's has been at hand here: compare with the CPU by `actionclip benchmark`."
    )
    options = f"--runtime openvino --device {device}"
    commands = (_EXPORT.format("fp16"), f"actionclip verify bundle {options}")
    return Recipe("openvino", None, "fp16", "runtimes/openvino", why, commands)


def _for_cpu(facts: Facts) -> Recipe:
    for name in facts.openvino:
        if name.startswith("GPU"):
            return _for_intel_gpu(name)
    precision = _int8_or_fp32(facts)
    because = facts.gpus.missing_because or "no GPU was found"
    if precision == "int8":
        why = (
            f"There is no GPU to use ({because}). This CPU adds int8 products without saturation, "
            "and int8 is faster on it than fp32; run `actionclip evaluate` before you ship it."
        )
    else:
        why = (
            f"There is no GPU to use ({because}). This CPU has no VNNI: int8 is faster here as "
            "well, with weights of 7 bits, but run `actionclip evaluate` first."
        )
    if BF16_FLAGS.intersection(facts.cpu_flags):
        why += (
            " It multiplies bf16: `--runtime openvino --precision bf16` doubles the rate of fp32."
        )
    return _onnxruntime("cpu", precision, why)


def _for_rtx(facts: Facts, gpu: Gpu) -> Recipe:
    have = facts.tensorrt_rtx.module
    why = (
        f"TensorRT for RTX {f'{have} is installed' if have else 'installs with pip'} and builds "
        f"for this {gpu.name} (compute capability {gpu.compute_capability}), ahead of time on any "
        "machine as well."
    )
    install = () if have else (install_command("rtx"),)
    # For RTX 20 it has no fp32 matrix products, which the text encoder otherwise consists of.
    export = "fp16 --text-precision fp16" if gpu.compute_capability == "7.5" else "fp16"
    return _tensorrt("runtimes/tensorrt-rtx", why, *install, runtime="tensorrt-rtx", export=export)


def _tensorrt(
    environment: str,
    why: str,
    *install: str,
    runtime: EngineRuntime = "tensorrt",
    export: str = "fp16",
) -> Recipe:
    commands = (_EXPORT.format(export), *install, _BUILD.format(runtime), _VERIFY.format(runtime))
    return Recipe(runtime, None, "fp16", environment, why, commands)


def _onnxruntime(provider: str, precision: str, why: str) -> Recipe:
    extra = "onnxruntime-gpu" if provider == "cuda" else "onnxruntime"
    options = {"cpu": "", "cuda": " --device cuda"}
    option = options.get(provider, f" --execution-provider {provider}")
    commands = (
        _EXPORT.format(precision),
        install_command(extra),
        f"actionclip verify bundle{option}",
    )
    return Recipe("onnxruntime", provider, precision, "runtimes/onnxruntime", why, commands)


def _is_usable(tensorrt: TensorRT) -> bool:
    if tensorrt.module is None:
        return False
    return _OLDEST_TENSORRT <= version_numbers(tensorrt.module) < _AFTER_TENSORRT


def _int8_or_fp32(facts: Facts) -> str:
    return "int8" if _INT8_FLAGS.intersection(facts.cpu_flags) else "fp32"


# What is known to go wrong

_Version = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)*$")]
_Text = Annotated[str, StringConstraints(min_length=1, pattern=r"^\S(.*\S)?$")]
_Link = Annotated[str, StringConstraints(pattern=r"^https://\S+$")]


class KnownBad(BaseModel):
    """One row of `known_bad.toml`, which says what each field means."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: _Text
    runtime: EngineRuntime
    first: _Version
    before: _Version | None = None
    compute_capabilities: list[_Version] | None = None
    precisions: list[_Text] | None = None
    before_jetpack: _Version | None = None
    what: _Text
    remedy: _Text
    links: list[_Link] = []

    @model_validator(mode="after")
    def _check_versions(self) -> KnownBad:
        if self.before and version_numbers(self.first) >= version_numbers(self.before):
            raise ValueError(
                f"{self.id} begins at {self.first} and ends before {self.before}; the second must "
                "be the later version."
            )
        return self

    @property
    def text(self) -> str:
        """One sentence."""
        where = f" ({', '.join(self.links)})" if self.links else ""
        return f"{self.what}{where}; {self.remedy}."


_KNOWN_BAD_FILE = Path(__file__).with_name("known_bad.toml")


@cache
def read_known_bad(path: Path = _KNOWN_BAD_FILE) -> tuple[KnownBad, ...]:
    """All rows of the table.

    Raises:
        ValueError: If a row is not well-formed, or two have the same id.
    """
    with path.open("rb") as file:
        rows = tuple(KnownBad.model_validate(row) for row in tomllib.load(file)["known_bad"])
    ids = [row.id for row in rows]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{path} has two rows with one id; give each its own: {', '.join(ids)}.")
    return rows


def find_known_bad(
    version: str,
    compute_capability: str | None = None,
    *,
    precision: str | None = None,
    runtime: EngineRuntime = "tensorrt",
    jetpack: str | None = None,
) -> tuple[KnownBad, ...]:
    """The rows that concern a machine, in the order of the table.

    Args:
        version: Of TensorRT, such as `10.3.0` or `11.4.0.106`.
        compute_capability: Of the GPU, such as `8.7`; None finds only the rows of every GPU.
        precision: Of the graphs; None finds the rows of all of them.
        runtime: Which of the two TensorRTs the version is of.
        jetpack: Version of JetPack; None where this is no Jetson.

    Raises:
        ValueError: If the version has no number.
    """
    number = version_numbers(version)
    if not number:
        raise ValueError(f"version is {version!r}; it must begin with a number, as 10.3.0 does.")

    def concerns(row: KnownBad) -> bool:
        if row.before_jetpack is not None and not (
            jetpack and version_numbers(jetpack) < version_numbers(row.before_jetpack)
        ):
            return False
        return (
            row.runtime == runtime
            and version_numbers(row.first) <= number
            and (row.before is None or number < version_numbers(row.before))
            and (row.compute_capabilities is None or compute_capability in row.compute_capabilities)
            and (row.precisions is None or precision is None or precision in row.precisions)
        )

    return tuple(row for row in read_known_bad() if concerns(row))


def find_problems(facts: Facts) -> tuple[KnownBad, ...]:
    """The rows that concern what is installed on a machine."""
    jetpack = facts.jetson.jetpack if facts.jetson else None
    installed: tuple[tuple[EngineRuntime, str | None], ...] = (
        ("tensorrt", facts.tensorrt.version),
        ("tensorrt-rtx", facts.tensorrt_rtx.version),
    )
    rows: dict[str, KnownBad] = {}
    for runtime, version in installed:
        if version is None:
            continue
        for gpu in facts.gpus.found:
            capability = gpu.compute_capability
            found = find_known_bad(version, capability, runtime=runtime, jetpack=jetpack)
            rows |= {row.id: row for row in found}
    return tuple(rows.values())
