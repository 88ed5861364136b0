"""Configuration files: YAML in, nested dictionaries out, with `key=value` on top."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from actionclip_deploy.errors import TrainingError


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """PyYAML's safe loader, which by itself lets the last of two equal keys win in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", node.start_mark
                )
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        TrainingError: If the file cannot be read, is no YAML, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise TrainingError(
            f"The configuration {path} cannot be read ({exc}); give the path of a YAML file."
        ) from exc
    data = _parse(text, str(path))
    if not isinstance(data, dict):
        raise TrainingError(
            f"{path} holds {type(data).__name__} and no mapping; give a YAML file with sections "
            "such as model, data and run."
        )
    return data


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set dotted keys to values.

    Args:
        data: Nested mappings, which stay as they are.
        overrides: Such as "run.seed=3", with values in YAML; later ones win.

    Raises:
        TrainingError: If one is not of this form, or its key passes through a plain value.
    """
    result = copy.deepcopy(dict(data))
    for override in overrides:
        key, equals, value = override.partition("=")
        *sections, name = key.split(".")
        if not equals or not all((*sections, name)):
            raise TrainingError(
                f"{override!r} sets nothing; write a key of the configuration, '=' and a value, "
                "such as run.seed=3."
            )
        target = result
        for depth, section in enumerate(sections, start=1):
            inner = target.get(section)
            if inner is None:
                inner = target[section] = {}
            if not isinstance(inner, dict):
                raise TrainingError(
                    f"{override!r} does not fit: {'.'.join(sections[:depth])} is {inner!r} and "
                    "has no keys; check the key."
                )
            target = inner
        target[name] = _parse(value, repr(override))
    return result


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as exc:
        detail = " ".join(str(exc).split())
        raise TrainingError(f"{source} is no YAML ({detail}); correct it.") from exc
