"""`actionclip doctor`: what this machine has, what works on it, and what to use."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from actionclip_deploy.cli.options import JsonOption
from actionclip_deploy.cli.output import print_json, print_sections, sections_of
from actionclip_deploy.command_records import (
    DoctorRecord,
    MachineRecord,
    NvidiaRecord,
    RecipeRecord,
)
from actionclip_deploy.errors import ActionClipError


def doctor(as_json: JsonOption = False) -> None:
    """Report this machine, what really loads and runs on it, and which runtime to use.

    Example:
        actionclip doctor
    """
    report = _examine()
    if as_json:
        print_json(report)
        return
    print_sections({title: _rows(title, part) for title, part in sections_of(report).items()})


def _examine() -> DoctorRecord:
    from actionclip_deploy.runtimes.advice import Facts, find_problems, recommend
    from actionclip_deploy.runtimes.machine import (
        describe_machine,
        find_gpus,
        find_tensorrt,
        installed_versions,
        read_jetson,
    )

    machine = describe_machine()
    openvino = _openvino_devices()
    facts = Facts(
        cpu_flags=tuple(machine["cpu_flags"]),
        gpus=find_gpus(),
        jetson=read_jetson(),
        tensorrt=find_tensorrt("tensorrt"),
        tensorrt_rtx=find_tensorrt("tensorrt_rtx"),
        openvino=tuple(openvino),
    )
    return DoctorRecord(
        machine=MachineRecord(**machine),
        versions=installed_versions(),
        nvidia=NvidiaRecord.model_validate(
            {
                **asdict(facts.gpus),
                "driver": machine["nvidia_driver"],
                "jetson": facts.jetson,
                "tensorrt": facts.tensorrt,
                "tensorrt_rtx": facts.tensorrt_rtx,
            }
        ),
        execution_providers=_execution_providers(),
        openvino=openvino or {"none": "it finds no device"},
        known_problems={row.id: row.text for row in find_problems(facts)},
        recommended=RecipeRecord.model_validate(recommend(facts)),
    )


def _execution_providers() -> dict[str, str]:
    """Execution providers that the installed ONNX Runtime lists, each with `works` or why not.

    The list alone says little: the GPU build lists CUDA and TensorRT on every machine. So each
    one is tried, in a process of its own.
    """
    try:
        from actionclip_deploy.runtimes.ort import available_providers, why_unavailable
    except ActionClipError as exc:
        return {"none": str(exc)}
    return {provider: why_unavailable(provider) or "works" for provider in available_providers()}


def _openvino_devices() -> dict[str, str]:
    """What OpenVINO finds, by its names; under `none`, why it is not there."""
    try:
        from actionclip_deploy.runtimes.ov import devices

        return devices()
    except ActionClipError as exc:
        return {"none": str(exc)}


def _rows(title: str, part: dict[str, Any]) -> dict[str, Any]:
    """A part of the report with every entry in words."""
    if title == "known_problems" and not part:
        return {"none": "that is known for what is installed here; verify all the same"}
    if title != "nvidia":
        return part
    rows = {
        "gpus": [
            f"{gpu['name']}, compute capability {gpu['compute_capability']}, "
            f"{gpu['memory_bytes'] / 2**30:.1f} GiB"
            for gpu in part["found"]
        ]
        or part["missing_because"],
        "driver": part["driver"],
        "CUDA of the driver": part["cuda"],
    }
    if part["jetson"]:
        rows |= {f"Jetson {name}": value for name, value in part["jetson"].items()}
    for name, words in (("tensorrt", "TensorRT"), ("tensorrt_rtx", "TensorRT for RTX")):
        found = part[name]
        rows[f"{words} in Python"] = found["module"] or found["missing_because"]
        libraries = [f"{version} ({file})" for file, version in found["libraries"].items()]
        rows[f"{words} library"] = libraries or "none that can be loaded"
    return rows
