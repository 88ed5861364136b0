"""Write docs/api.md from the code: signatures and first sentences of every public name.

    python scripts/api_page.py [--check]

The web site shows the whole docstrings in their place (mkdocs_hooks.py). Signatures are taken from
the sources, so that the page is the same with every Python.
"""

from __future__ import annotations

import ast
import inspect
import sys
from importlib import import_module
from pathlib import Path

import actionclip_deploy

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"

HEAD = """# Python API

Made by `python scripts/api_page.py`. Names are imported from `actionclip_deploy`, but for
those of the last sections. None of them imports PyTorch, and a runtime is imported when it is
opened.
"""

# What is not at the top, because it needs an extra: heading, sentence, module, names.
BELOW = [
    (
        "Export",
        "With the extra `export`.",
        "actionclip_deploy.export",
        ["export_checkpoint", "ExportResult"],
    ),
    (
        "Training",
        "The sections of a configuration ([how to train](howto/train.md)), with the extra `train`.",
        "actionclip_deploy.train.run_config",
        [
            "ModelSection",
            "Sizes",
            "DataSection",
            "AugmentationSection",
            "LossSection",
            "OptimiserSection",
            "ScheduleSection",
            "RunSection",
        ],
    ),
    (
        "Many videos on a Ray cluster",
        "With the extra `ray` ([how](howto/batches.md)).",
        "actionclip_deploy.scale",
        ["score"],
    ),
    (
        "Settings of such a run",
        "With the extra `parquet`.",
        "actionclip_deploy.scale.batch",
        ["BatchSettings"],
    ),
    (
        "Benchmark",
        "With the extra `benchmark`. [How to benchmark](howto/benchmark.md) describes the report.",
        "actionclip_deploy.benchmarks",
        [
            "run_benchmark",
            "RowSpec",
            "BenchmarkReport",
            "read_report",
            "write_report",
            "compare_reports",
        ],
    ),
]


def sections() -> list[tuple[str, str, str, list[str]]]:
    """Heading, sentence, package that gives the names, and names: by module, errors after them."""
    homes: dict[str, list[str]] = {}
    for name in actionclip_deploy.__all__:
        homes.setdefault(_home(name), []).append(name)
    order = [module for module in actionclip_deploy._MODULES if module in homes]
    order += [*sorted(set(homes) - {*order, "errors"}), "errors"]
    found: list[tuple[str, str, str, list[str]]] = []
    for module in order:
        names = homes[module]
        if module in actionclip_deploy._MODULES:  # classes and functions as they stand there
            listed = actionclip_deploy._MODULES[module].split()
            names = sorted(names, key=listed.index)
        lines = (import_module(f"actionclip_deploy.{module}").__doc__ or "").splitlines()
        found.append((f"`{module}`", lines[0], "actionclip_deploy", names))
    return found + BELOW


def _home(name: str) -> str:
    for module, names in actionclip_deploy._MODULES.items():
        if name in names.split():
            return module
    module = getattr(actionclip_deploy, name).__module__
    return str(module).removeprefix("actionclip_deploy.")


def page() -> str:
    """The page as it is read in the repository."""
    parts = [HEAD]
    for heading, sentence, package, names in sections():
        parts.append(f"## {heading}\n\n{sentence}\n")
        if heading == "`errors`":
            parts.append(_errors(names))
        else:
            parts += [_entry(package, name) for name in names]
    return "\n".join(parts)


def directives() -> str:
    """The page for mkdocstrings, with whole docstrings."""
    parts = [HEAD.partition("\n")[0], HEAD.partition("\n\n")[2]]
    for heading, sentence, package, names in sections():
        parts.append(f"## {heading}\n\n{sentence}\n")
        for name in names:
            options = "\n    options:\n      show_bases: false" if name == "Manifest" else ""
            parts.append(f"::: {package}.{name}{options}\n")
    return "\n".join(parts)


def _errors(names: list[str]) -> str:
    rows = ["| | is | means |", "|---|---|---|"]
    for name in names:
        node, text = _definition(getattr(actionclip_deploy, name), name) or (None, "")
        assert isinstance(node, ast.ClassDef)
        bases = ", ".join(f"`{_source(base, text)}`" for base in node.bases)
        rows.append(f"| `{name}` | {bases} | {_first_sentence(node)} |")
    return "\n".join(rows) + "\n"


def _entry(package: str, name: str) -> str:
    value = getattr(import_module(package), name)
    found = _definition(value, name)
    if found is None:  # a constant
        kind = type(value).__name__
        number = f" of {len(value)}" if isinstance(value, tuple) else ""
        return f"### {name}\n\nA {kind}{number}: `{value[0]}`, ...\n"
    node, text = found
    signature = _signature(node, text)
    lines = [f"### {name}", "", "```text", signature, "```", "", _first_sentence(node), ""]
    if isinstance(node, ast.ClassDef):
        members = [each for each in node.body if _is_public_method(each)]
        if members:
            lines += ["| | |", "|---|---|"]
            for each in members:
                assert isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
                told = _first_sentence(each).replace("|", "\\|")
                lines.append(f"| `{_member(each)}` | {told} |".replace("\n", " "))
            lines.append("")
    return "\n".join(lines)


def _definition(value: object, name: str) -> tuple[ast.ClassDef | ast.FunctionDef, str] | None:
    """Where a class or function is defined, and the text around it; None for a constant."""
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return None
    text = Path(inspect.getfile(value)).read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node, text
    raise LookupError(f"{name} is not defined at the top of {inspect.getfile(value)}")


def _is_public_method(node: ast.stmt) -> bool:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    is_called = node.name == "__call__"
    return (not node.name.startswith("_") or is_called) and ast.get_docstring(node) is not None


def _first_sentence(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())


def _signature(node: ast.ClassDef | ast.FunctionDef, text: str) -> str:
    if isinstance(node, ast.FunctionDef):
        return _call(node.name, node, text)
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            return _call(node.name, each, text).removesuffix(" -> None")
    fields = [
        f"{each.target.id}: {_source(each.annotation, text)}"
        for each in node.body
        if isinstance(each, ast.AnnAssign)
        and isinstance(each.target, ast.Name)
        and not each.target.id.startswith("_")
    ]
    if fields:
        return _folded(node.name, fields, "")
    bases = ", ".join(_source(base, text) for base in node.bases)
    return f"class {node.name}({bases})" if bases else f"class {node.name}"


def _call(name: str, node: ast.FunctionDef, text: str) -> str:
    given = node.args
    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + list(given.defaults)
    parts = [
        _argument(argument, default, text)
        for argument, default in zip(plain, defaults, strict=True)
        if argument.arg not in ("self", "cls")
    ]
    if given.vararg:
        parts.append("*" + _argument(given.vararg, None, text))
    elif given.kwonlyargs:
        parts.append("*")
    for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        parts.append(_argument(argument, default, text))
    if given.kwarg:
        parts.append("**" + _argument(given.kwarg, None, text))
    return _folded(name, parts, f" -> {_source(node.returns, text)}" if node.returns else "")


def _argument(argument: ast.arg, default: ast.expr | None, text: str) -> str:
    annotation = f": {_source(argument.annotation, text)}" if argument.annotation else ""
    return f"{argument.arg}{annotation}" + (f" = {_source(default, text)}" if default else "")


def _source(node: ast.expr, text: str) -> str:
    return " ".join((ast.get_source_segment(text, node) or "").split())


def _member(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """A method by the names of its arguments; types are in the editor and on the web site."""
    decorators = [getattr(each, "attr", getattr(each, "id", "")) for each in node.decorator_list]
    if any(each.endswith("property") for each in decorators):
        return node.name
    given = [arg.arg for arg in node.args.posonlyargs + node.args.args]
    given = [each for each in given if each not in ("self", "cls")]
    if node.args.vararg:
        given.append(f"*{node.args.vararg.arg}")
    elif node.args.kwonlyargs:
        given.append("*")
    given += [f"{arg.arg}=" for arg in node.args.kwonlyargs]
    return f"{'' if node.name == '__call__' else node.name}({', '.join(given)})"


def _folded(name: str, parts: list[str], end: str) -> str:
    line = f"{name}({', '.join(parts)}){end}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){end}"


if __name__ == "__main__":
    text = page()
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"{PAGE} is not what the code says; run: python scripts/api_page.py")
    else:
        PAGE.write_text(text, encoding="utf-8")
