"""Records which names each version of TensorRT's Python API has, without TensorRT or a GPU.

    python scripts/tensorrt_names.py [--wheels FOLDER] [--output tests/data/tensorrt_names.json]

The wheels of the bindings (a few MB each) import as soon as there are libraries with nine symbols,
so libraries without any code stand in for TensorRT: names, enums and signatures are all there,
and no object can be made. TensorRT for RTX is imported as it is installed.

Needs Linux on x86-64, `cc`, pip, and CPython 3.11 (the wheels' own version).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

# Of JetPack 6.1 and 6.2, of JetPack 7.0 and 7.2, one in between, and the newest of all.
WHEELS = {
    "10.3.0": "tensorrt-cu12-bindings",
    "10.7.0": "tensorrt-cu12-bindings",
    "10.13.3.9": "tensorrt-cu12-bindings",
    "10.16.1.11": "tensorrt-cu12-bindings",
    "11.4.0.106": "tensorrt-cu13-bindings",
}
RTX = "tensorrt_rtx"
OUTPUT = Path(__file__).resolve().parents[1] / "tests" / "data" / "tensorrt_names.json"

# What the bindings call in the libraries that they are linked with.
_SYMBOLS = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL"),
    *("createInferRuntime_INTERNAL", "createNvOnnxParser_INTERNAL"),
    *("createNvOnnxParserRefitter_INTERNAL", "getBuilderPluginRegistry"),
    *("getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins"),
)
_LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")

# Runs in a process of its own: two versions do not go into one.
_LIST_NAMES = """
import importlib, inspect, json, sys, warnings
warnings.simplefilter("ignore")
module = importlib.import_module(sys.argv[1])
found = set()
def walk(prefix, owner, depth):
    for name in dir(owner):
        if name.startswith("_"):
            continue
        value = inspect.getattr_static(owner, name, None)
        # Modules are what the package itself imports.
        if inspect.ismodule(value):
            continue
        found.add(prefix + name)
        if inspect.isclass(value) and depth and "tensorrt" in (value.__module__ or ""):
            walk(prefix + name + ".", value, depth - 1)
walk("", module, 2)
print(json.dumps(sorted(found)))
"""


def main(arguments: list[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wheels", type=Path, help="folder of wheels; what lacks is downloaded")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="tensorrt-names-") as folder:
        by_version = {
            version: names_of_wheel(version, Path(folder) / version, given.wheels)
            for version in WHEELS
        }
    by_version[f"rtx-{metadata.version(RTX)}"] = names_of_module(RTX)
    given.output.write_text(compact_json(by_version), encoding="utf-8")
    print(f"{given.output}: {', '.join(f'{v} {len(n)}' for v, n in by_version.items())} names")


def names_of_wheel(version: str, folder: Path, wheels: Path | None = None) -> list[str]:
    """Public names of one version's bindings, as `Class.attribute` where they are nested.

    Args:
        version: One of `WHEELS`.
        folder: A new folder to work in.
        wheels: Where the wheel may lie already; it is downloaded if it does not.
    """
    folder.mkdir(parents=True)
    wheel = _find_wheel(version, wheels) or _download(version, folder)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
    stubs = folder / "stubs"
    _compile_stubs(stubs, major=version.partition(".")[0])
    paths = {"PYTHONPATH": str(folder / "wheel"), "LD_LIBRARY_PATH": str(stubs)}
    return names_of_module("tensorrt_bindings", paths)


def names_of_module(module: str, environment: dict[str, str] | None = None) -> list[str]:
    """Public names of a module that a new process imports."""
    done = subprocess.run(
        [sys.executable, "-c", _LIST_NAMES, module],
        env={**os.environ, **(environment or {})},
        check=True,
        capture_output=True,
        text=True,
    )
    names: list[str] = json.loads(done.stdout)
    return names


def compact_json(by_version: dict[str, list[str]]) -> str:
    """One entry per name: in which versions it is, as their places in `versions`."""
    versions = list(by_version)
    names: dict[str, Any] = {}
    for place, version in enumerate(versions):
        for name in by_version[version]:
            names.setdefault(name, []).append(place)
    everywhere = list(range(len(versions)))
    # Most names are everywhere, and need no list.
    common = sorted(name for name, places in names.items() if places == everywhere)
    others = {name: places for name, places in sorted(names.items()) if places != everywhere}
    lines = ",\n  ".join(
        f"{json.dumps(name)}: {json.dumps(places)}" for name, places in others.items()
    )
    wrapped = ",\n  ".join(json.dumps(name) for name in common)
    return (
        f'{{\n "versions": {json.dumps(versions)},\n'
        f' "in_all": [\n  {wrapped}\n ],\n "in_some": {{\n  {lines}\n }}\n}}\n'
    )


def _find_wheel(version: str, folder: Path | None) -> Path | None:
    found = sorted(folder.glob(f"*bindings-{version}-cp311-*.whl")) if folder else []
    return found[0] if found else None


def _download(version: str, folder: Path) -> Path:
    options = ("--no-deps", "--only-binary=:all:", "--python-version=3.11", "--quiet")
    pip = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    subprocess.run([*pip, f"{WHEELS[version]}=={version}"], check=True)
    found = _find_wheel(version, folder)
    assert found is not None
    return found


def _compile_stubs(folder: Path, *, major: str) -> None:
    folder.mkdir()
    source = folder / "stubs.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in _SYMBOLS))
    for library in _LIBRARIES:
        name = f"lib{library}.so.{major}"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run([*command, str(source)], check=True)


if __name__ == "__main__":
    main()
