"""Which names of TensorRT a piece of code takes, and which versions have them.

Tests import it by name: `from trt_names import NameTable, names_taken`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

RECORDED = Path(__file__).parent / "data" / "tensorrt_names.json"

# Variables and attributes of these names hold the module `tensorrt` or `tensorrt_rtx`.
_HOLDERS = ("trt", "_trt", "tensorrt", "tensorrt_rtx")

# Names that our code takes and that not every supported TensorRT has, with the first version that
# does; each is asked for with `hasattr` before it is used.
NEWER_NAMES: dict[str, str] = {}
# Names that TensorRT for RTX alone has.
RTX_NAMES = frozenset(
    (
        "ComputeCapability",
        "CudaGraphStrategy",
        "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
        "IBuilderConfig.num_compute_capabilities",
        "IBuilderConfig.set_compute_capability",
        "ICudaEngine.create_runtime_config",
        "IRuntimeCache",
        "IRuntimeCache.deserialize",
        "IRuntimeCache.serialize",
        "IRuntimeConfig",
        "IRuntimeConfig.create_runtime_cache",
        "IRuntimeConfig.cuda_graph_strategy",
        "IRuntimeConfig.set_runtime_cache",
    )
)


@dataclass(frozen=True)
class NameTable:
    """Names of TensorRT's Python API by version (tests/data/README.md).

    Attributes:
        versions: As they are numbered, oldest first; those of TensorRT for RTX begin with `rtx-`.
        places: For each name the versions that have it, as places in `versions`.
    """

    versions: tuple[str, ...]
    places: Mapping[str, tuple[int, ...]]

    @classmethod
    def read(cls, path: Path = RECORDED) -> NameTable:
        """Read what scripts/tensorrt_names.py wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        everywhere = tuple(range(len(content["versions"])))
        places = dict.fromkeys(content["in_all"], everywhere)
        places |= {name: tuple(found) for name, found in content["in_some"].items()}
        return cls(tuple(content["versions"]), places)

    def lacking(self, name: str, *, rtx: bool) -> list[str]:
        """The versions of one flavour, with or without RTX, that do not have a name."""
        found = self.places.get(name, ())
        return [
            version
            for place, version in enumerate(self.versions)
            if version.startswith("rtx-") == rtx and place not in found
        ]

    def first_version(self, name: str) -> str | None:
        """The version from which on every one has a name, without RTX; None if none does."""
        lacking = self.lacking(name, rtx=False)
        plain = [version for version in self.versions if not version.startswith("rtx-")]
        later = plain[plain.index(lacking[-1]) + 1 :] if lacking else plain
        return later[0] if later else None


def names_taken(source: str) -> set[str]:
    """Names that source code takes from the module, as `BuilderFlag.REFIT`.

    Both `api.trt.BuilderFlag.REFIT` and `getattr(trt.BuilderFlag, "REFIT", None)` take one; of
    `trt.Logger(level).log` it is `Logger`, since what a call gives is not looked into.
    """
    found: set[str] = set()
    inner: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        # From the outside inwards: of `trt.A.B` the part `trt.A` is no name of its own.
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            inner |= {id(part) for part in _chain(node.value)}
            found |= set(_after_holder(node))
        elif isinstance(node, ast.Call) and _is_getattr(node):
            owner, name = node.args[:2]
            assert isinstance(name, ast.Constant)
            if _is_holder(owner):
                found.add(str(name.value))
            else:
                found |= {f"{prefix}.{name.value}" for prefix in _after_holder(owner)}
    return {name for name in found if "__" not in name}


def attributes_taken(source: str, variable: str) -> set[str]:
    """Names of the attributes that source code takes from, or sets of, a variable.

    Args:
        source: The code.
        variable: As it is written there, such as `config` or `self._engine`.
    """
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == variable
    }


def names_of_fake(source: str) -> set[str]:
    """Public names of a stand-in for TensorRT: its classes, with all that is an attribute of one.

    That is methods, members and properties, and what an object sets of itself.
    """
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found |= set(_names_of_class(node, ""))
    return found


def _names_of_class(node: ast.ClassDef, prefix: str) -> Iterator[str]:
    own = f"{prefix}{node.name}"
    yield own
    names = _attributes_set(node)
    for part in node.body:
        if isinstance(part, ast.ClassDef):
            yield from _names_of_class(part, f"{own}.")
        elif isinstance(part, ast.FunctionDef):
            names.add(part.name)
        else:
            stored = (n for n in ast.walk(part) if isinstance(n, ast.Name))
            names |= {name.id for name in stored if isinstance(name.ctx, ast.Store)}
    yield from (f"{own}.{name}" for name in names if not name.startswith("_"))


def _attributes_set(node: ast.AST) -> set[str]:
    """Names of the attributes that code sets of `self`."""
    return {
        part.attr
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute)
        and isinstance(part.ctx, ast.Store)
        and isinstance(part.value, ast.Name)
        and part.value.id == "self"
    }


def _chain(node: ast.expr) -> Iterator[ast.expr]:
    yield node
    while isinstance(node, ast.Attribute):
        node = node.value
        yield node


def _after_holder(node: ast.expr) -> Iterator[str]:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        if _is_holder(node):
            break
        parts.append(node.attr)
        node = node.value
    if parts and _is_holder(node):
        yield ".".join(reversed(parts))


def _is_holder(node: ast.expr) -> bool:
    name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", None)
    return name in _HOLDERS


def _is_getattr(node: ast.Call) -> bool:
    return (
        isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr")
        and len(node.args) >= 2
        and isinstance(node.args[1], ast.Constant)
    )
