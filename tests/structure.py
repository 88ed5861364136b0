"""Rules of the tree, as functions from a package's folder to what breaks them, one line each."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

MAX_MODULES_IN_A_FOLDER = 15
MAX_DOCSTRING_LINES_OF_A_FOLDER = 5
MAX_MODULE_LINES = 900

# Their names hide a dependency or the standard library, or could stand over anything.
FORBIDDEN_FILE_NAMES = frozenset(
    """
    onnx tensorrt torch openvino ray clip types utils common helpers
    words rows measured places lanes trials products messages texts answers forms checks units
    result sections running
    """.split()  # noqa: SIM905 - a list of 27 strings is harder to read
)


def modules(package: Path) -> dict[str, Path]:
    """The modules of a package by their dotted name, the package's own first."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def importers(package: Path) -> dict[str, set[str]]:
    """For each module those that import it, imports inside functions included."""
    known = modules(package)
    found: dict[str, set[str]] = defaultdict(set)
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = []
            if isinstance(node, ast.ImportFrom) and node.module:
                wanted = [f"{node.module}.{alias.name}" for alias in node.names]
                imported = [each if each in known else node.module for each in wanted]
            elif isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            for each in imported:
                if each in known and each != name:
                    found[each].add(name)
    return found


def single_importers(package: Path, reasons: dict[str, str]) -> list[str]:
    """Modules whose only importer stands next to them, and reasons that nothing needs any more."""
    found = importers(package)
    lonely = {
        name
        for name, path in modules(package).items()
        if path.name not in ("__init__.py", "__main__.py")
        and len(found[name]) == 1
        and next(iter(found[name])).rpartition(".")[0] == name.rpartition(".")[0]
        and not _is_verb(path)
    }
    short = {name.partition(".")[2]: next(iter(found[name])) for name in lonely}
    return [
        f"{name}: only {importer} imports it; make it a part of that module, or give the reason"
        for name, importer in sorted(short.items())
        if not reasons.get(name)
    ] + [f"{name}: has a reason and needs none" for name in sorted(reasons) if name not in short]


def _is_verb(path: Path) -> bool:
    """Whether the command line imports a module by the name of its verb, which no import shows."""
    names = {path.stem, f"{path.stem}_app"}
    return path.parent.name == "cli" and any(
        (isinstance(node, ast.FunctionDef) and node.name in names)
        or (
            isinstance(node, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id in names for target in node.targets)
        )
        for node in ast.parse(path.read_text(encoding="utf-8")).body
    )


def repeated_file_names(package: Path) -> list[str]:
    """Names that two files bear; a verb of the command line is called as what it drives."""
    paths = defaultdict(list)
    for path in modules(package).values():
        inner = path.relative_to(package)
        if path.name != "__init__.py" and inner.parts[0] != "cli":
            paths[path.name].append(inner.as_posix())
    return [f"{', '.join(each)}: one name for two files" for each in paths.values() if each[1:]]


def repeated_class_names(package: Path) -> list[str]:
    """Public classes of one name in two modules."""
    places = defaultdict(list)
    for name, path in modules(package).items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name)
    return [f"{name}: a class in {', '.join(each)}" for name, each in places.items() if each[1:]]


def crowded_folders(package: Path) -> list[str]:
    """Folders with more modules than a reader takes in; the command line has one for each verb."""
    sizes: dict[Path, int] = defaultdict(int)
    for path in modules(package).values():
        sizes[path.parent] += path.name not in ("__init__.py", "__main__.py")
    return [
        f"{folder.relative_to(package.parent)}: {size} modules, at most {MAX_MODULES_IN_A_FOLDER}"
        for folder, size in sizes.items()
        if size > MAX_MODULES_IN_A_FOLDER and folder not in (package, package / "cli")
    ]


def legends(package: Path) -> list[str]:
    """Folders whose docstring has to explain them, and modules without a docstring."""
    found = []
    for name, path in modules(package).items():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if not docstring:
            found.append(f"{name}: has no docstring")
        elif path.name == "__init__.py":
            lines = len(docstring.splitlines())
            # The package's own docstring is what help() shows to a user.
            if lines > MAX_DOCSTRING_LINES_OF_A_FOLDER and path.parent != package:
                found.append(f"{name}: a docstring of {lines} lines")
    return found


def long_modules(package: Path, reasons: Collection[str] = ()) -> list[str]:
    """Modules that are so long that somebody should look whether they are two subjects.

    Args:
        package: Its folder.
        reasons: Those that somebody looked at, and that are one.
    """
    lines = {
        name: len(path.read_text(encoding="utf-8").splitlines())
        for name, path in modules(package).items()
    }
    return [
        f"{name}: {count} lines"
        for name, count in lines.items()
        if count > MAX_MODULE_LINES and name not in reasons
    ]


def forbidden_names(package: Path) -> list[str]:
    """Modules whose name says nothing about what is inside."""
    return [name for name, path in modules(package).items() if path.stem in FORBIDDEN_FILE_NAMES]
