"""A working folder with a base model and pictures, and short ways to write files and resolve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from everydream.config.resolve import Resolved, resolve
from everydream.errors import ConfigError

REQUIRED = {"base_model": "model", "data_root": "pictures"}


class Desk:
    """The working folder: `write` files, `resolve` command lines, look at `problems`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, content: Any) -> Path:
        text = content if isinstance(content, str) else json.dumps(content, indent=2)
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text, encoding="utf-8")
        return self.folder / name

    def train(self, **settings: Any) -> list[str]:
        """train.json with the required settings and these; the arguments that name it."""
        self.write("train.json", REQUIRED | settings)
        return ["--config", "train.json"]

    def resolve(self, *argv: str, environ: dict[str, str] | None = None, **settings: Any) -> Resolved:
        """With a train.json of these settings, unless the arguments name a file of their own."""
        config = [] if "--config" in argv else self.train(**settings)
        return resolve([*config, *argv], environ or {})

    def problems(self, *argv: str, environ: dict[str, str] | None = None, **settings: Any) -> tuple[str, ...]:
        with pytest.raises(ConfigError) as caught:
            self.resolve(*argv, environ=environ, **settings)
        return caught.value.problems


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "pictures").mkdir()
    return Desk(tmp_path)
