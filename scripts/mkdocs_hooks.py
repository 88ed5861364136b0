"""What MkDocs runs while it builds the documentation (mkdocs.yml, `hooks`)."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from actionclip_deploy.benchmarks.report import BenchmarkReport

REPORT_MARK = "<!-- report fields -->"
API_PROGRAM = Path(__file__).with_name("api_page.py")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what the code tells about itself where a page asks for it."""
    if f"Made by `python scripts/{API_PROGRAM.name}`" in markdown:
        markdown = runpy.run_path(str(API_PROGRAM))["directives"]()
    if REPORT_MARK in markdown:
        markdown = markdown.replace(REPORT_MARK, report_fields(BenchmarkReport.model_json_schema()))
    return markdown


def report_fields(schema: dict[str, Any]) -> str:
    """A table for each record of a schema: its fields, their types, and what they mean."""
    parts = []
    for name, record in {schema["title"]: schema, **schema["$defs"]}.items():
        rows = [
            f"| `{field}` | {_type_words(spec)} | {spec.get('description', '')} |"
            for field, spec in record["properties"].items()
        ]
        head = "| field | type | meaning |\n|---|---|---|\n"
        parts.append(f"### {name}\n\n{record['description']}\n\n{head}" + "\n".join(rows))
    return "\n\n".join(parts)


def _type_words(spec: dict[str, Any]) -> str:
    if "anyOf" in spec:
        return " or ".join(_type_words(option) for option in spec["anyOf"])
    if "$ref" in spec:
        return spec["$ref"].rpartition("/")[2]
    if spec.get("type") == "array":
        return f"list of {_type_words(spec['items'])}"
    if isinstance(spec.get("additionalProperties"), dict):
        return f"object of {_type_words(spec['additionalProperties'])}"
    return str(spec.get("const", spec.get("type", "any")))
