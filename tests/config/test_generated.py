"""What is generated from the schema is up to date, and the JSON files that are shipped are right."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from everydream.config.files import File, optimizer_source
from everydream.config.generate import ROOT, files, stale
from everydream.config.resolve import resolve
from everydream.config.schema import Settings
from everydream.config.sources import Report

OWN = ("base_model", "data_root", "optimizer_config", "lr")
TRAIN_FILES = sorted([ROOT / "train.json", *ROOT.glob("examples/**/train*.json")])
OPTIMIZER_FILES = sorted([ROOT / "optimizer.json", *ROOT.glob("examples/optimizers/*.json"),
                          *ROOT.glob("examples/demo/optimizer*.json")])  # fmt: skip


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_nothing_generated_is_stale() -> None:
    assert stale() == [], "run: python -m everydream.config.generate"


@pytest.mark.parametrize("path", [path for path in files() if path.endswith(".json")])
def test_the_schemas_are_json_schemas(path: str) -> None:
    jsonschema.Draft202012Validator.check_schema(json.loads((ROOT / path).read_text()))


def valid(path: Path, schema: str) -> list[str]:
    rules = jsonschema.Draft202012Validator(json.loads((ROOT / "schemas" / schema).read_text()))
    return [error.message for error in rules.iter_errors(json.loads(path.read_text()))]


@pytest.mark.parametrize("path", TRAIN_FILES, ids=relative)
def test_shipped_train_files_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert valid(path, "train.schema.json") == []
    resolved = resolve(["--config", str(path), "--print_config"], {})
    assert not [note for note in resolved.notes if "not a setting" in note or "unused" in note]
    assert (path.parent / json.loads(path.read_text())["$schema"]).resolve() == ROOT / "schemas/train.schema.json"


@pytest.mark.parametrize("path", OPTIMIZER_FILES, ids=relative)
def test_shipped_optimizer_files_load(path: Path) -> None:
    report = Report()
    optimizer_source(File(path, report))
    assert (report.problems, report.notes) == ([], [])
    assert valid(path, "optimizer.schema.json") == []
    assert (path.parent / json.loads(path.read_text())["$schema"]).resolve() == ROOT / "schemas/optimizer.schema.json"


def test_the_root_files_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    keys = [key for key in json.loads((ROOT / "train.json").read_text()) if key != "$schema"]
    assert keys == list(Settings.model_fields)
    told = resolve(["--config", "train.json", "--print_config"], {})
    bare = resolve(["--base_model", "a/b", "--data_root", "x", "--print_config"], {})
    assert {key: entry.value for key, entry in told.entries.items() if key not in OWN} == {
        key: entry.value for key, entry in bare.entries.items() if key not in OWN
    }
    assert json.loads((ROOT / "train.json").read_text())["lr"] is None
    assert told.optimizers == bare.optimizers


@pytest.mark.parametrize(
    "content",
    [{"batch_sise": 1}, {"batch_size": "4"}, {"batch_size": 0}, {"loss_type": "mes"}, {"wandb": 1}, {"compile": "x"}],
)
def test_an_editor_sees_what_the_program_refuses(content: dict[str, object]) -> None:
    rules = jsonschema.Draft202012Validator(json.loads((ROOT / "schemas/train.schema.json").read_text()))
    assert not rules.is_valid(content)
    assert rules.is_valid(
        {"batch_size": 4, "lr": None, "_note": "x", "data_root": ["a"], "resume_ckpt": "b", "gpuid": 0}
    )
