"""Whatever stands in the sources: settings, or a ConfigError; never another exception."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everydream.config.legacy import ALIASES, RETIRED
from everydream.config.resolve import resolve
from everydream.config.schema import OptimizerFile, PartFile, Settings, TextEncoderFreezing, ValidationSettings
from everydream.errors import ConfigError
from tests.config.conftest import REQUIRED, Desk

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.sampled_from(["null", "lion", "cosine", "a.B"])
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3))
QUIET = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


def of(*models: Any, more: tuple[str, ...] = ()) -> st.SearchStrategy[dict[str, Any]]:
    keys = [key for model in models for key in model.model_fields] + list(more)
    return st.dictionaries(st.sampled_from(keys) | WORDS, VALUES, max_size=6)


@QUIET
@given(
    train=of(Settings, more=(*ALIASES, *RETIRED, "format", "settings")),
    optimizer=of(PartFile, OptimizerFile),
    blocks=st.dictionaries(st.sampled_from(list(OptimizerFile.model_fields)), of(PartFile, TextEncoderFreezing)),
    validation=of(ValidationSettings),
)
def test_any_values_in_files(
    desk: Desk, train: dict[str, Any], optimizer: dict[str, Any], blocks: dict[str, Any], validation: dict[str, Any]
) -> None:
    desk.write("train.json", json.dumps(REQUIRED | train))
    desk.write("optimizer.json", json.dumps(optimizer | blocks))
    desk.write("validation.json", json.dumps(validation))
    named = ["--optimizer_config", "optimizer.json", "--validation_config", "validation.json"]
    for argv in (["--config", "train.json"], ["--config", "train.json", *named]):
        with suppress(ConfigError):
            resolve(argv, {}).record()


@QUIET
@given(
    entries=st.dictionaries(st.sampled_from([*Settings.model_fields, "optimizer.base.lr", "validation.seed"]), VALUES)
)
def test_any_values_in_config_json(desk: Desk, entries: dict[str, Any]) -> None:
    wrapped = {key: {"value": value, "origin": "x"} if len(key) % 2 else value for key, value in entries.items()}
    desk.write("config.json", json.dumps({"format": "everydream-config-1", "settings": wrapped}))
    with suppress(ConfigError):
        resolve(["--config", "config.json"], {}).record()


OPTIONS = st.sampled_from([*Settings.model_fields, *ALIASES, *RETIRED, "no_wandb", "config", "dry_run", "print_config"])


@QUIET
@given(st.lists(OPTIONS.map("--{}".format) | WORDS | st.sampled_from(["null", "true", "1", "1e400", "[1", "-1", "--"])))
def test_any_words_on_the_command_line(desk: Desk, argv: list[str]) -> None:
    with suppress(ConfigError):
        resolve([*argv, "--base_model", "model"], {}).record()


@QUIET
@given(st.binary(max_size=60))
def test_any_bytes_in_a_file(desk: Desk, content: bytes) -> None:
    (desk.folder / "train.json").write_bytes(content)
    with suppress(ConfigError):
        resolve(["--config", "train.json"], {})
