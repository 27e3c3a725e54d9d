"""Write what follows from the schema: python -m everydream.config.generate [--check]

schemas/*.schema.json (editors complete and check the JSON files by them), docs/settings.md, docs/from_everydream2.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everydream.config.legacy import (
    ALIASES,
    RETIRED,
    RETIRED_FREEZING,
    RETIRED_OPTIMIZER,
    VALIDATION_ALIASES,
    VALIDATION_COMMENTS,
    Alias,
    Retired,
)
from everydream.config.pages import everydream2_page, settings_page
from everydream.config.schema import (
    OptimizerFile,
    PartFile,
    Settings,
    TextEncoderFreezing,
    Tree,
    ValidationSettings,
)
from everydream.optim.table import ROWS

ROOT = Path(__file__).resolve().parents[2]
COMMENTS = {"^[_-]": {"description": "A comment."}}


def files() -> dict[str, str]:
    """Path from the repository's root → content."""
    return {
        "schemas/train.schema.json": _json(_schema(Settings, ALIASES, RETIRED)),
        "schemas/optimizer.schema.json": _json(_optimizer_schema()),
        "schemas/validation.schema.json": _json(
            _schema(ValidationSettings, VALIDATION_ALIASES, comments=VALIDATION_COMMENTS)
        ),
        "docs/settings.md": settings_page(),
        "docs/from_everydream2.md": everydream2_page(),
    }


def stale() -> list[str]:
    """The generated files that are not what the schema says."""
    return [path for path, text in files().items() if not _same(ROOT / path, text)]


def _same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def _json(schema: Mapping[str, Any]) -> str:
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps({**head, **schema}, indent=2, ensure_ascii=False) + "\n"


def _schema(
    model: type[Tree],
    aliases: Mapping[str, Alias] = {},
    retired: Mapping[str, Retired] = {},
    comments: tuple[str, ...] = (),
) -> dict[str, Any]:
    """A model as JSON schema: every key may be null, comments are allowed, old names are marked deprecated."""
    raw = model.model_json_schema(mode="validation")
    definitions = raw.get("$defs", {})
    properties = {key: _nullable(_resolved(one, definitions)) for key, one in raw["properties"].items()}
    for key, alias in aliases.items():
        target = {"type": "boolean"} if alias.values else dict(properties[alias.key])
        properties[key] = {**_nullable(target), "deprecated": True, "description": f"Now {alias.key}."}
    for key, old in retired.items():
        properties[key] = {"deprecated": True, "description": f"No setting any more: {old.instead}."}
    properties |= {key: {"description": "A comment."} for key in ("$schema", "doc", *comments)}
    return {"type": "object", "properties": properties, "patternProperties": COMMENTS, "additionalProperties": False}


def _resolved(one: Any, definitions: Mapping[str, Any]) -> Any:
    """Without titles and references: an editor shows the description alone."""
    if isinstance(one, list):
        return [_resolved(item, definitions) for item in one]
    if not isinstance(one, dict):
        return one
    if "$ref" in one:
        return _resolved(definitions[one["$ref"].rsplit("/", 1)[1]], definitions) | {
            key: value for key, value in one.items() if key != "$ref"
        }
    drop: tuple[str, ...] = ("title", "format") if "type" in one or "anyOf" in one or "enum" in one else ()
    return {key: _resolved(value, definitions) for key, value in one.items() if key not in drop}


def _nullable(one: dict[str, Any]) -> dict[str, Any]:
    outside: dict[str, Any] = {key: one[key] for key in ("description", "default", "deprecated") if key in one}
    inside = {key: value for key, value in one.items() if key not in outside}
    options = inside["anyOf"] if list(inside) == ["anyOf"] else [inside]
    if {"type": "array", "items": {"type": "string"}, "minItems": 1} in options:
        options = [*options, {"type": "string"}]  # data_root: one folder, or several
    return {"anyOf": [*(item for item in options if item != {"type": "null"}), {"type": "null"}], **outside}


def _optimizer_schema() -> dict[str, Any]:
    """Flat and nested: both at once would be refused on reading, which a schema says less clearly."""
    part = _schema(PartFile)
    part["properties"]["optimizer"]["anyOf"] = [
        {"enum": list(ROWS)},
        {"type": "string", "pattern": r"\."},
        {"type": "null"},
    ]
    blocks = {
        "base": part,
        "text_encoder_overrides": part,
        "text_encoder_freezing": _schema(TextEncoderFreezing, retired=RETIRED_FREEZING),
    }
    top = _schema(OptimizerFile, retired=RETIRED_OPTIMIZER)
    for key, block in blocks.items():
        described = {"description": top["properties"][key].get("description", "")}
        top["properties"][key] = {"anyOf": [block, {"type": "null"}], **described}
    top["properties"] |= part["properties"]
    return top


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        print(*stale(), sep="\n")
        return 1 if stale() else 0
    for path, text in files().items():
        (ROOT / path).parent.mkdir(exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
