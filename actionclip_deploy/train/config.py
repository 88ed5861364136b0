"""The configuration of a training run: a YAML file, and `key=value` on top of it.

    model      what is trained and from where it starts
    data       which videos, labels and templates, and how frames are drawn and changed
    loss       what is minimised
    optimiser  learning rates and decay
    schedule   how long, and how the learning rate goes
    run        batch, precision, seed, output, checkpoints

Every key that is not known is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, Field, ValidationError

from actionclip_deploy.errors import TrainingError
from actionclip_deploy.train.config_files import apply_overrides, read_yaml
from actionclip_deploy.train.run_config import (
    DataSection,
    LossSection,
    ModelSection,
    OptimiserSection,
    RunSection,
    ScheduleSection,
    Section,
)

# What may differ between a run and its continuation: nothing of it changes a weight.
FREE_KEYS = frozenset(
    {"data.root", "data.workers", "run.output", "run.checkpoint_every", "run.keep_last"}
    | {"run.log_every", "run.validate_every"}
)


class TrainConfig(Section):
    """The whole configuration; see the sections."""

    model: ModelSection
    data: DataSection
    loss: LossSection = Field(default_factory=LossSection)
    optimiser: OptimiserSection = Field(default_factory=OptimiserSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    run: RunSection

    def differences(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Keys of which the two have other values, apart from those that change no weight."""
        own, others = (
            _flatten(self.model_dump(mode="json")),
            _flatten(other.model_dump(mode="json")),
        )
        return {
            key: (own.get(key), others.get(key))
            for key in sorted(own.keys() | others.keys())
            if key not in FREE_KEYS and own.get(key) != others.get(key)
        }


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a configuration.

    Args:
        path: The YAML file.
        overrides: Such as "optimiser.lr=1e-5", with values in YAML; later ones win.

    Raises:
        TrainingError: If the file cannot be read, or a key or value is not allowed.
    """
    path = Path(path)
    return parse_config(apply_overrides(read_yaml(path), overrides), source=str(path))


def parse_config(data: Mapping[str, Any], *, source: str = "the configuration") -> TrainConfig:
    """Check a configuration that is given as nested mappings.

    Args:
        data: Sections by name.
        source: Where it came from, for messages.

    Raises:
        TrainingError: If a key or value is not allowed.
    """
    try:
        return TrainConfig.model_validate(data)
    except ValidationError as exc:
        raise TrainingError(f"{source}: {_describe(exc)}") from exc


def _describe(exc: ValidationError) -> str:
    first = exc.errors(include_url=False)[0]
    location = tuple(str(part) for part in first["loc"])
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        section = ".".join(location[:-1]) or "the file"
        allowed = ", ".join(_fields(location[:-1]))
        return f"the key {key!r} is unknown; the keys of {section} are {allowed}"
    if first["type"] == "missing":
        return f"the key {key!r} is missing; give it in the file or as {key}=VALUE"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key}: {message}"
    return f"{key} is {first['input']!r}: {message[0].lower()}{message[1:]}; correct it"


def _fields(location: tuple[str, ...]) -> list[str]:
    section: type[BaseModel] = TrainConfig
    for name in location:
        annotation = section.model_fields[name].annotation
        candidates = (annotation, *get_args(annotation))
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)


def _flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
