"""The instructions in a language that others read: JSON Schema 2020-12, made of the fields' own words."""

from __future__ import annotations

import dataclasses
from typing import Any

from stemloop.core.instruction import KINDS, MAX_POSITIONS, PATHS, VERSION

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def _number(law: Any) -> dict[str, Any]:
    return {"type": "number"} if law.get("above") is None else {"type": "number", "exclusiveMinimum": law["above"]}


def _form(law: Any, prefix: str) -> dict[str, Any]:
    """The schema of one field's value."""
    size = {"type": "integer", "minimum": 1}
    pair = {"type": "array", "prefixItems": [{"type": "number"}] * 2, "minItems": 2, "maxItems": 2, "items": False}
    listed = {"type": "array", "items": pair, "minItems": 1}
    word = {"type": "string", "minLength": 1, "maxLength": 100}
    forms: dict[str, dict[str, Any]] = {
        "number": _number(law),
        "pair": {**pair, "prefixItems": [_number(law)] * 2},
        "sizes": {**pair, "prefixItems": [size] * 2},
        "count": {**size, "maximum": MAX_POSITIONS - 1},
        "flag": {"type": "boolean"},
        "word": {"enum": list(law["choices"])} if law.get("choices") else word,
        "positions": {"anyOf": [listed, *({"$ref": f"{prefix}{path}"} for path in PATHS)]},
    }
    return forms[law["form"]]


def _field(field: dataclasses.Field[Any], prefix: str) -> dict[str, Any]:
    law = field.metadata
    schema = _form(law, prefix)
    if field.default is None:
        schema = {"anyOf": [schema, {"type": "null"}]}
    if field.default is not dataclasses.MISSING:
        schema = {**schema, "default": field.default}
    unit = f" [{law['unit']}]" if law["unit"] else ""
    return {"description": law["what"] + unit, **schema}


def _object(cls: Any, head: dict[str, Any], prefix: str) -> dict[str, Any]:
    fields = dataclasses.fields(cls)
    required = [f.name for f in fields if f.default is dataclasses.MISSING]
    return {
        "type": "object",
        "description": " ".join((cls.__doc__ or "").split(">>>")[0].split()),
        "properties": {**head, **{f.name: _field(f, prefix) for f in fields}},
        "required": [*head, *required],
        "additionalProperties": False,
    }


def definitions(prefix: str = "#/$defs/") -> dict[str, Any]:
    """The schema of every path and instruction by name, which refer to each other as ``prefix`` + name."""
    paths = {name: _object(cls, {"path": {"const": name}}, prefix) for name, cls in PATHS.items()}
    kinds = {
        kind: _object(cls, {"kind": {"const": kind}, "version": {"const": VERSION}}, prefix)
        for kind, cls in KINDS.items()
    }
    return {**paths, **kinds}


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of the wire form of an instruction."""
    return {
        "$schema": DIALECT,
        "title": "stemloop instruction",
        "description": f"What may be asked of a microscope, version {VERSION}. SI units; angles in radians.",
        "oneOf": [{"$ref": f"#/$defs/{kind}"} for kind in KINDS],
        "$defs": definitions(),
    }
