"""The ready files of examples/optimizers are settings that resolve without a word, and optimizers that can be built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everydream.config.resolve import resolve
from everydream.optim import factory
from everydream.optim.table import ROWS

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "examples" / "optimizers").glob("*.json"))
NO_FILE = {"sgd", "paged_adamw8bit"}


@pytest.fixture
def required(tmp_path: Path) -> list[str]:
    (tmp_path / "model").mkdir()
    (tmp_path / "pictures").mkdir()
    return ["--base_model", str(tmp_path / "model"), "--data_root", str(tmp_path / "pictures"), "--max_steps", "9"]


def test_every_row_has_a_file_but_these() -> None:
    used = {json.loads(file.read_text()).get("optimizer") for file in FILES} - {None}
    assert used == set(ROWS) - NO_FILE


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_resolves_without_a_note_and_can_be_built(file: Path, required: list[str]) -> None:
    resolved = resolve([*required, "--optimizer_config", str(file)], {})
    assert [note for note in resolved.notes if "optimizer" in note or "lr" in note] == []
    for part in resolved.optimizers.values():
        settings = {"lr": part.lr, "betas": part.betas, "epsilon": part.epsilon, "weight_decay": part.weight_decay}
        assert factory.check(part.optimizer, part.args, device="cuda", **settings) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_says_what_it_is_for_and_which_schema_it_follows(file: Path) -> None:
    content = json.loads(file.read_text())
    assert (file.parent / content["$schema"]).is_file()
    assert len(content["doc"]) > 40
