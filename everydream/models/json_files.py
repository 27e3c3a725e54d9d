"""JSON files of a base model, with errors that name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from everydream.errors import ConfigError


def read_json(path: Path, what: str = "base_model") -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{what}: {path} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{what}: {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{what}: {path} is not a JSON object")
    return content
