"""What holds for the package as a whole, whatever its modules do."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import structure

import actionclip_deploy

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "actionclip_deploy"

# Modules that one neighbour alone imports, and why they stand by themselves all the same.
SINGLE_IMPORTER_REASONS = {
    "benchmarks.power": "the files and sensors that energy is read from",
    "benchmarks.torch_peers": "owns the import of torch, and a process of its own",
    "cli.timeline": "a command of its own, though an option of predict asks for it",
    "embeddings": "owns a file format, which embedded videos will share with label banks",
    "export.onnx_files": "owns the writing of files of any size, with torch's exporter",
    "model.zoo": "owns the format of the packaged model, and the names of published ones",
    "runtimes.ort_cuda": "owns the CUDA runtime's page-locked memory and recorded calls",
    "runtimes.trt.audit": "owns the format of TensorRT's engine inspector",
    "runtimes.trt.engine": "owns the life of one plan on the GPU",
    "serve.batcher": "owns the queue and its thread, and knows nothing of videos",
    "serve.rpc.wire": "owns the protobuf form of a protocol",
    "serve.v1": "owns a protocol",
    "train.augmentation": "owns the arithmetic of pictures in training, with torchvision",
    "train.learner": "owns the step: optimiser, precision, running mean",
    "train.loss": "owns the loss across processes",
    "video.bitstream": "owns formats: the headers of pictures of H.264, HEVC, MPEG, VP8, VP9, AV1",
    "video.decoding": "owns the decoder's state, with PyAV",
}

LONG_MODULE_REASONS = {
    "actionclip_deploy.client": "one client, method by method, and its blocking face",
    "actionclip_deploy.labels": "label banks: made, kept, checked when they are loaded, chosen",
    "actionclip_deploy.recognizer": "from videos to labels: encoder, recognizer, what they give",
    "actionclip_deploy.records": "one schema, of all JSON that leaves the program",
    "actionclip_deploy.search": "from words to moments: scores, moments, saved queries, the page",
    "actionclip_deploy.video.bitstream": "the headers of eight formats, by what these share",
}

# Everything from outside the standard library that `import actionclip_deploy` may load. PyAV,
# Pillow and ftfy are dependencies of every installation too, and wait until they are used.
LIGHT_IMPORTS = {
    "actionclip_deploy",
    "annotated_types",
    "numpy",
    "pydantic",
    "pydantic_core",
    "safetensors",
    "tokenizers",
    "typing_extensions",
    "typing_inspection",
}

LIST_IMPORTS = """
import json, sys
before = set(sys.modules)
import actionclip_deploy
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps(sorted(loaded - set(sys.stdlib_module_names))))
"""


def test_public_names_are_sorted_and_exist() -> None:
    names = actionclip_deploy.__all__
    # Constants, then classes, then functions, as ruff sorts them.
    assert names == sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))
    for name in names:
        assert hasattr(actionclip_deploy, name), name


def test_all_names_every_public_name_of_the_package() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imported = [
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("actionclip_deploy")
        for alias in node.names
    ]
    assert sorted(actionclip_deploy.__all__) == sorted(imported)


def test_every_public_name_has_a_docstring() -> None:
    for name in actionclip_deploy.__all__:
        value = getattr(actionclip_deploy, name)
        if callable(value):
            assert (value.__doc__ or "").strip(), name


def test_importing_the_package_loads_nothing_heavy() -> None:
    # In a fresh interpreter, because this one has loaded everything already.
    output = subprocess.run(
        [sys.executable, "-W", "error", "-c", LIST_IMPORTS],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stdout
    # Compiled extensions may register private helpers of their own (cython_runtime and such).
    loaded = {name for name in json.loads(output) if not name.startswith(("_", "cython"))}
    assert loaded <= LIGHT_IMPORTS


RULES = {
    "single importers": lambda package: structure.single_importers(
        package, SINGLE_IMPORTER_REASONS if package == PACKAGE else {}
    ),
    "repeated file names": structure.repeated_file_names,
    "repeated class names": structure.repeated_class_names,
    "crowded folders": structure.crowded_folders,
    "legends": structure.legends,
    "long modules": lambda package: structure.long_modules(
        package, LONG_MODULE_REASONS if package == PACKAGE else ()
    ),
    "forbidden names": structure.forbidden_names,
}

# For each rule a package that breaks it, as texts by path, and what is said of it.
OFFENDERS: dict[str, tuple[dict[str, str], str]] = {
    "single importers": (
        {"a/part.py": "", "a/whole.py": "def f():\n    from house.a.part import x\n"},
        "a.part: only house.a.whole imports it; make it a part of that module, or give the reason",
    ),
    "repeated file names": (
        {"a/rooms.py": "", "b/rooms.py": ""},
        "a/rooms.py, b/rooms.py: one name",
    ),
    "repeated class names": (
        {"a/door.py": "class Key: ...", "b/lock.py": "class Key: ..."},
        "Key: a class in house.a.door, house.b.lock",
    ),
    "crowded folders": (
        {f"a/room{n}.py": "" for n in range(16)},
        "house/a: 16 modules, at most 15",
    ),
    "legends": (
        {"a/__init__.py": '"""A.\n\nb  c\nd  e\nf  g\nh  i\n"""'},
        "house.a: a docstring of 6",
    ),
    "long modules": ({"a/tower.py": "x = 1\n" * 901}, "house.a.tower: 902 lines"),
    "forbidden names": ({"a/utils.py": ""}, "house.a.utils"),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_tree_keeps_its_rules(rule: str) -> None:
    assert RULES[rule](PACKAGE) == []


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_names_its_offender(rule: str, tmp_path: Path) -> None:
    files, complaint = OFFENDERS[rule]
    package = tmp_path / "house"
    for name, text in {
        "__init__.py": "",
        "a/__init__.py": "",
        "b/__init__.py": "",
        **files,
    }.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if text.startswith('"""') else f'"""A room."""\n{text}')
    broken = RULES[rule](package)
    assert len(broken) == 1
    assert complaint in broken[0]


def test_a_reason_that_nothing_needs_is_an_offender(tmp_path: Path) -> None:
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "door.py").write_text("")
    (found,) = structure.single_importers(tmp_path / "house", {"door": "owns a key"})
    assert found == "door: has a reason and needs none"


def test_imports_go_downwards_only() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_circle_of_siblings_breaks_the_contract(tmp_path: Path) -> None:
    package = tmp_path / "house"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "door.py").write_text("from house import wall\n")
    (package / "wall.py").write_text("def f():\n    from house.door import f\n")
    contract = re.search(
        r"\[\[tool.importlinter.contracts\]\]\nname = \"No circles.*?(?=\n\[|\Z)",
        (ROOT / "pyproject.toml").read_text(),
        re.DOTALL,
    )
    assert contract, "pyproject.toml has a contract against circles"
    text = '[tool.importlinter]\nroot_package = "house"\n\n' + contract[0]
    (tmp_path / "pyproject.toml").write_text(text.replace("actionclip_deploy", "house"))
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "No circles" in done.stdout
    assert "house.door" in done.stdout or ".door" in done.stdout, done.stdout


def test_what_surrounds_a_run_of_the_tests_does_not_reach_them(tmp_path: Path) -> None:
    around = {"CI": "true", "COLUMNS": "60", "TERM": "dumb", "NO_COLOR": "1", "FORCE_COLOR": "1"}
    around |= {"LANG": "C", "LC_ALL": "C", "PYTHONWARNINGS": "error", "GITHUB_ACTIONS": "true"}
    around |= {"MAKEFLAGS": "w", "MAKELEVEL": "1", "GIT_DIR": "elsewhere", "ACTIONCLIP_CACHE": "/"}
    kept = {"ACTIONCLIP_CACHE": "off", "LANG": "C.UTF-8"}  # which the tests set themselves
    (tmp_path / "test_it.py").write_text(
        f"import os\n"
        f"def test_it():\n"
        f"    names = set(os.environ).intersection({sorted(around)})\n"
        f"    assert {{name: os.environ[name] for name in names}} == {kept}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "--rootdir", tmp_path, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env={
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            **around,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # of what pytest has in it, which takes long
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
