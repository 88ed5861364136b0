"""Every name that the code takes from TensorRT is in every version that is supported."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from trt_names import (
    NEWER_NAMES,
    RTX_NAMES,
    NameTable,
    attributes_taken,
    names_of_fake,
    names_taken,
)

import actionclip_deploy
from actionclip_deploy.runtimes.trt.plan import RTX_TARGETS

SOURCES = sorted((Path(actionclip_deploy.__file__).parent / "runtimes" / "trt").glob("*.py"))
FAKE = Path(__file__).resolve().parents[3] / "fake_tensorrt.py"
SCRIPT = Path(__file__).resolve().parents[4] / "scripts" / "tensorrt_names.py"

# What holds an object of TensorRT wherever it occurs in a module, and that object's class.
OBJECTS = {
    "plan.py": {
        "builder": "Builder",
        "config": "IBuilderConfig",
        "parser": "OnnxParser",
        "shapes": "IOptimizationProfile",
        "cache": "ITimingCache",
        "runtime": "Runtime",
        "refitter": "Refitter",
        "filler": "OnnxParserRefitter",
        "engine": "ICudaEngine",
        "serialization": "ISerializationConfig",
    },
    "engine.py": {
        "engine": "ICudaEngine",
        "self._engine": "ICudaEngine",
        "self._runtime": "Runtime",
        "inspector": "EngineInspector",
        "context": "IExecutionContext",
        "self.settings": "IRuntimeConfig",
        "self._cache": "IRuntimeCache",
    },
    "faults.py": {"context": "IExecutionContext", "runtime": "Runtime"},
}


@pytest.fixture(scope="module")
def table() -> NameTable:
    return NameTable.read()


def problems_of(names: set[str], table: NameTable) -> list[str]:
    """What is wrong with names that code takes, one sentence each."""
    found = []
    for name in sorted(names):
        if lacking := table.lacking(name, rtx=True):
            found.append(f"{name} is not in {', '.join(lacking)}")
        elif name in RTX_NAMES or name.partition(".")[0] in RTX_NAMES:
            continue
        if lacking := table.lacking(name, rtx=False):
            first = table.first_version(name)
            if first is None:
                found.append(f"{name} is not in {', '.join(lacking)}")
            elif NEWER_NAMES.get(name) != first:
                found.append(f"{name} is in every version only since {first}; guard it")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_name_in_the_code_is_in_every_version_or_guarded(
    path: Path, table: NameTable
) -> None:
    assert not problems_of(names_taken(path.read_text(encoding="utf-8")), table)


@pytest.mark.parametrize("module", sorted(OBJECTS))
def test_every_attribute_of_an_object_in_the_code_is_in_every_version(
    module: str, table: NameTable
) -> None:
    source = next(path for path in SOURCES if path.name == module).read_text(encoding="utf-8")
    taken = set()
    for variable, class_name in OBJECTS[module].items():
        attributes = attributes_taken(source, variable)
        assert attributes, f"{module} has no {variable} any more; change OBJECTS"
        taken |= {f"{class_name}.{attribute}" for attribute in attributes}
    assert not problems_of(taken, table)


def test_the_guarded_names_are_newer_and_the_names_of_rtx_are_its_own(table: NameTable) -> None:
    for name, first in NEWER_NAMES.items():
        assert table.first_version(name) == first
        assert table.lacking(name, rtx=False)
    for name in RTX_NAMES:
        assert not table.lacking(name, rtx=True), name
        assert table.lacking(name, rtx=False), f"{name} is in all; it needs no exception"


def test_every_target_of_rtx_is_a_compute_capability_that_it_knows(table: NameTable) -> None:
    for target in RTX_TARGETS:
        assert not table.lacking(f"ComputeCapability.{target.upper()}", rtx=True)


def test_what_the_migration_guide_says_of_version_11_is_in_the_table(table: NameTable) -> None:
    # docs.nvidia.com, TensorRT 11.0.0, "Migrating from TensorRT 10.x to 11.x", Python.
    assert table.versions[0].startswith("10.3")
    assert table.lacking("BuilderFlag.FP16", rtx=False) == ["11.4.0.106"]
    assert table.lacking("IInt8EntropyCalibrator2", rtx=False) == ["11.4.0.106"]
    assert not table.lacking("BuilderFlag.REFIT", rtx=False)
    assert table.first_version("IStreamReaderV2") == "10.7.0"
    assert table.first_version("BuilderFlag.FP16") is None


def test_an_invented_name_is_found_however_the_code_takes_it(table: NameTable) -> None:
    taken = names_taken(
        "def build(api, trt):\n"
        "    level = api.trt.Logger.LOUD\n"
        "    self._trt.Builder(api.trt.Loggerr(level)).create_network(0)\n"
        "    getattr(trt.BuilderFlag, 'FASTER', None)\n"
        "    hasattr(api.trt, 'Stapler')\n"
        "    other.attribute.trtless.Nothing\n"
    )
    assert taken == {"Logger.LOUD", "Builder", "Loggerr", "BuilderFlag.FASTER", "Stapler"} | {
        "BuilderFlag"
    }
    sentences = "; ".join(problems_of(taken, table))
    for name in ("Logger.LOUD", "Loggerr", "BuilderFlag.FASTER", "Stapler"):
        assert f"{name} is not in" in sentences
    assert "Builder is not in" not in sentences


def test_a_name_of_newer_versions_alone_has_to_be_guarded(table: NameTable) -> None:
    assert problems_of({"IStreamReaderV2"}, table) == [
        "IStreamReaderV2 is in every version only since 10.7.0; guard it"
    ]


def test_every_name_of_the_fake_tensorrt_is_a_real_one(table: NameTable) -> None:
    names = names_of_fake(FAKE.read_text(encoding="utf-8"))
    assert {"Builder", "Builder.create_network", "BuilderFlag.TF32"} <= names
    assert not problems_of(names, table)


def test_an_attribute_that_a_fake_invents_is_found(table: NameTable) -> None:
    source = (
        "class Builder:\n"
        "    limit = 1\n"
        "    def __init__(self):\n"
        "        self.speed, self._level = 1, 2\n"
        "    def create_network(self, flags): ...\n"
        "    def build_everything(self): ...\n"
        "    def _helper(self): ...\n"
        "class ILogger:\n"
        "    class Severity:\n"
        "        ERROR = 1\n"
        "        DISASTER = 2\n"
        "class _Private:\n"
        "    anything = 1\n"
    )
    found = {sentence.partition(" ")[0] for sentence in problems_of(names_of_fake(source), table)}
    assert found == {f"Builder.{name}" for name in ("build_everything", "limit", "speed")} | {
        "ILogger.Severity.DISASTER"
    }


@pytest.mark.slow
@pytest.mark.skipif(
    (sys.version_info[:2], platform.system(), platform.machine(), bool(shutil.which("cc")))
    != ((3, 11), "Linux", "x86_64", True),
    reason="the wheels are CPython 3.11's for Linux on x86-64, and the stubs need a compiler",
)
def test_the_recorded_names_are_those_of_the_bindings(table: NameTable, tmp_path: Path) -> None:
    script = load_script()
    version = "10.3.0"
    place = table.versions.index(version)
    recorded = sorted(name for name, places in table.places.items() if place in places)
    assert script.names_of_wheel(version, tmp_path / version) == recorded


@pytest.mark.slow
def test_the_recorded_names_are_those_of_the_installed_rtx(table: NameTable) -> None:
    pytest.importorskip("tensorrt_rtx")
    script = load_script()
    place = next(i for i, v in enumerate(table.versions) if v.startswith("rtx-"))
    recorded = sorted(name for name, places in table.places.items() if place in places)
    assert script.names_of_module("tensorrt_rtx") == recorded


def test_the_file_of_names_is_written_as_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    names = {"10.3.0": ["A", "A.old"], "11.4.0": ["A", "A.new"], "rtx-1.7": ["A", "A.new"]}
    path.write_text(load_script().compact_json(names), encoding="utf-8")
    read = NameTable.read(path)
    assert read.versions == ("10.3.0", "11.4.0", "rtx-1.7")
    assert not read.lacking("A", rtx=False)
    assert read.lacking("A.old", rtx=False) == ["11.4.0"]
    assert read.first_version("A.new") == "11.4.0"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tensorrt_names", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
