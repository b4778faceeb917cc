"""As much of JSON Schema as docs/schema uses; a word that is not understood is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs/schema"
_KNOWN = {
    *("$schema", "title", "description", "type", "properties", "required", "items"),
    *("additionalProperties", "enum", "const", "oneOf"),
}
_TYPES = {
    "string": str,
    "integer": int,
    "number": int | float,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


def of(name: str) -> dict[str, Any]:
    """Return a published schema."""
    schema: dict[str, Any] = json.loads((DOCS / f"{name}.json").read_text())
    return schema


def complaints(value: Any, schema: dict[str, Any], where: str = "$") -> list[str]:
    """Return what a value has against the schema."""
    assert schema.keys() <= _KNOWN, schema.keys() - _KNOWN
    found = []
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        return [f"{where}: {value!r} is none of {kinds}"]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where}: {value!r} is none of {schema['enum']}")
    if "const" in schema and value != schema["const"]:
        found.append(f"{where}: {value!r} is not {schema['const']!r}")
    if "oneOf" in schema:
        choices = [complaints(value, each, where) for each in schema["oneOf"]]
        if [] not in choices:
            found += [each for choice in choices for each in choice]
    if isinstance(value, dict) and "properties" in schema:
        for key in schema.get("required", []):
            found += [f"{where}.{key}: is missing"] if key not in value else []
        for key, each in value.items():
            if key in schema["properties"]:
                found += complaints(each, schema["properties"][key], f"{where}.{key}")
            elif not schema["additionalProperties"]:
                found.append(f"{where}.{key}: is not in the schema")
    if isinstance(value, list) and "items" in schema:
        for number, each in enumerate(value):
            found += complaints(each, schema["items"], f"{where}[{number}]")
    return found


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES[kind])
