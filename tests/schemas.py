"""What leaves as JSON, held against the schema of its record: `check_json(ParityRecord, data)`."""

from __future__ import annotations

from typing import Any

import jsonschema_rs
from pydantic import BaseModel


def strict_schema(record: type[BaseModel]) -> dict[str, Any]:
    """The schema of a record, closed: a key that it does not name is an error.

    A record that passes on what older versions wrote says so itself, and stays open.
    """

    def closed(node: Any) -> Any:
        if isinstance(node, list):
            return [closed(each) for each in node]
        if not isinstance(node, dict):
            return node
        more = {"additionalProperties": False} if "properties" in node else {}
        return {**more, **{key: closed(value) for key, value in node.items()}}

    schema: dict[str, Any] = closed(record.model_json_schema(mode="serialization"))
    return schema


def check_json(record: type[BaseModel], data: Any) -> None:
    """Check what was printed against the schema of a record, closed."""
    jsonschema_rs.validator_for(strict_schema(record)).validate(data)
