"""`actionclip doctor`: what this machine has, what works on it, and what to use."""

from __future__ import annotations

from typing import Any

from actionclip_deploy.cli.output import JsonOption, print_json, print_sections


def doctor(as_json: JsonOption = False) -> None:
    """Report this machine, what really loads and runs on it, and which runtime to use."""
    report = _examine()
    if as_json:
        print_json(report)
        return
    print_sections({title: _rows(title, part) for title, part in report.items()})


def _examine() -> dict[str, Any]:
    from actionclip_deploy.runtimes.advice import Facts, find_problems, recommend
    from actionclip_deploy.runtimes.machine import (
        describe_machine,
        find_gpus,
        find_tensorrt,
        installed_versions,
        linked_by_onnxruntime,
        onnxruntime_providers,
        read_jetson,
        why_provider_lacks_tensorrt,
    )

    machine = describe_machine()
    facts = Facts(
        cpu_flags=tuple(machine["cpu_flags"]),
        gpus=find_gpus(),
        jetson=read_jetson(),
        tensorrt=find_tensorrt("tensorrt"),
        tensorrt_rtx=find_tensorrt("tensorrt_rtx"),
    )
    providers = onnxruntime_providers()
    linked = linked_by_onnxruntime()
    # A provider that is listed and does not load says which file it misses; this says why.
    if providers.get("TensorrtExecutionProvider", "works") != "works":
        because = why_provider_lacks_tensorrt(linked, facts.tensorrt)
        providers["TensorrtExecutionProvider"] = because or providers["TensorrtExecutionProvider"]
    return {
        "machine": machine,
        "versions": installed_versions(),
        "nvidia": {
            **facts.gpus.to_dict(),
            "driver": machine["nvidia_driver"],
            "jetson": facts.jetson.to_dict() if facts.jetson else None,
            "tensorrt": facts.tensorrt.to_dict(),
            "tensorrt_rtx": facts.tensorrt_rtx.to_dict(),
            "tensorrt_of_onnxruntime": linked,
        },
        "execution_providers": providers,
        "known_problems": {row.id: row.text for row in find_problems(facts)},
        "recommended": recommend(facts).to_dict(),
    }


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
    rows["TensorRT of ONNX Runtime"] = part["tensorrt_of_onnxruntime"] or "it has no such provider"
    return rows
