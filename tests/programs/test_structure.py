"""What holds for the package as a whole, whatever its modules do."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import actionclip_deploy

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "actionclip_deploy"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Their names hide a dependency or the standard library, or say nothing about what is inside.
FORBIDDEN_FILE_NAMES = {
    "onnx.py",
    "tensorrt.py",
    "torch.py",
    "clip.py",
    "types.py",
    "utils.py",
    "common.py",
    "helpers.py",
}

MAX_MODULE_LINES = 1500

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
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
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


def test_modules_have_names_that_say_something() -> None:
    assert {path.name for path in MODULES} & FORBIDDEN_FILE_NAMES == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    assert ast.get_docstring(ast.parse(text)), "a module begins with a docstring"


def test_imports_go_downwards_only() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
