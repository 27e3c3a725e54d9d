"""Command line > train.json > optimizer.json > launcher > default, for every key, with null and --key null."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everydream.config.resolve import resolve
from everydream.config.schema import Settings
from tests.config.conftest import Desk

UNSET = "command line (unset)"

# Settings that neither others nor the schema's defaults depend on → values, and their default
PLAIN: dict[str, tuple[list[Any], Any]] = {
    "batch_size": ([1, 2, 7], 4),
    "grad_accum": ([1, 3], 1),
    "cond_dropout": ([0, 0.1, 1], 0.04),
    "seed": ([0, 1, 99], 555),
    "shuffle_tags": ([True, False], False),
    "tensorboard": ([True, False], True),
    "loss_type": (["mse", "huber", "mse_huber"], "mse"),
    "min_snr_gamma": ([1, 5.5], None),
    "cache_latents": ([True, False], None),
    "instance_prompt": (["a sks dog", "null and void", "0"], None),
    "plugins": ([["a.B"], ["a.B", "c.d.E"]], []),
    "compile": ([True, False, "max"], False),
    "keep_last": ([1, 2], None),
    "max_steps": ([10, 20], None),
}
LR: dict[str, list[Any]] = {
    "lr": [0, 1e-6, 2e-6, 1],
    "lr_scheduler": ["constant", "cosine", "linear"],
    "lr_warmup_steps": [0, 5, 10],
    "lr_decay_steps": [100, 200],
}
LR_DEFAULTS = {"lr": 1e-6, "lr_scheduler": "constant", "lr_warmup_steps": 0, "lr_decay_steps": None}
PRECISION = ["no", "fp16", "bf16"]
ABSENT = object()


def stated(options: dict[str, list[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Any of the keys, each with null or one of its values."""
    return st.fixed_dictionaries({}, optional={key: st.sampled_from([None, *one]) for key, one in options.items()})


TOP = (
    {key: values for key, (values, _) in PLAIN.items()}
    | LR
    | {"text_encoder_lr": LR["lr"], "mixed_precision": PRECISION}
)
PART = {**LR, "weight_decay": [0, 0.1]}


def arguments(said: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for key, value in said.items():
        items = value if isinstance(value, list) else [value]
        words += [f"--{key}", *("null" if item is None else str(item) for item in items)]
    return words


def oracle_plain(key: str, line: dict[str, Any], train: dict[str, Any], default: Any) -> tuple[Any, str]:
    """(value, origin), written without the resolver's words: look at each source in turn."""
    if key in line:
        return (default, UNSET) if line[key] is None else (line[key], "command line")
    if train.get(key) is not None:
        return train[key], "train.json"
    return default, "default"


def oracle_base(key: str, line: dict[str, Any], train: dict[str, Any], part: dict[str, Any]) -> tuple[Any, str]:
    value, origin = oracle_plain(key, line, train, LR_DEFAULTS[key])
    if origin == "default" and part.get(key) is not None:
        return part[key], "optimizer.json"
    return value, origin


def oracle_text_encoder(
    key: str, base: tuple[Any, str], line: dict[str, Any], train: dict[str, Any], part: dict[str, Any], scale: float
) -> tuple[Any, str]:
    own = part.get(key)
    if key != "lr":
        return base if own is None else (own, "optimizer.json")
    inherited = base[0] * scale
    origin = base[1] if scale == 1 else "optimizer.json"
    if "text_encoder_lr" in line:
        said = line["text_encoder_lr"]
        return (inherited, UNSET) if said is None else (said, "command line")
    if train.get("text_encoder_lr") is not None:
        return train["text_encoder_lr"], "train.json"
    return (inherited, origin) if own is None else (own, "optimizer.json")


@settings(deadline=None, max_examples=100)
@given(
    line=stated(TOP), train=stated(TOP), base=stated(PART), text=stated(PART),
    scale=st.sampled_from([None, 0, 0.5, 1]), nested=st.booleans(), named_by=st.sampled_from(["line", "train", "none"]),
    launcher=st.sampled_from([None, *PRECISION]),
)  # fmt: skip
def test_value_and_origin_are_the_oracles(
    line: dict[str, Any], train: dict[str, Any], base: dict[str, Any], text: dict[str, Any], scale: float | None,
    nested: bool, named_by: str, launcher: str | None,
) -> None:  # fmt: skip
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            desk = Desk(Path(folder))
            (desk.folder / "model").mkdir()
            (desk.folder / "pictures").mkdir()
            content = {"base": base} if nested else dict(base)
            content |= {"text_encoder_overrides": text, "text_encoder_lr_scale": scale, "doc": {"any": "thing"}}
            desk.write("optimizer.json", content)
            argv = desk.train(**train, optimizer_config="optimizer.json" if named_by == "train" else None)
            argv += arguments(line) + (["--optimizer_config", "optimizer.json"] if named_by == "line" else [])
            environ = {} if launcher is None else {"ACCELERATE_MIXED_PRECISION": launcher}
            resolved = resolve(argv, environ)
        finally:
            os.chdir(before)
    if named_by == "none":
        base, text, scale = {}, {}, None
    expected = {key: oracle_plain(key, line, train, default) for key, (_, default) in PLAIN.items()}
    expected["mixed_precision"] = oracle_precision(line, train, launcher)
    expected["max_epochs"] = (None if expected["max_steps"][0] else 100, "default")
    for key in LR:
        expected[f"optimizer.base.{key}"] = oracle_base(key, line, train, base)
        expected[f"optimizer.text_encoder.{key}"] = oracle_text_encoder(
            key, expected[f"optimizer.base.{key}"], line, train, text, 1 if scale is None else scale
        )
    shown = {key: resolved.entries[key].as_json() for key in expected}
    assert {key: (one["value"], one["origin"]) for key, one in shown.items()} == expected
    for key in PLAIN:
        assert getattr(resolved.settings, key) == (tuple(expected[key][0]) if key == "plugins" else expected[key][0])
    assert resolved.settings.lr == resolved.optimizers["unet"].lr == expected["optimizer.base.lr"][0]
    assert resolved.settings.text_encoder_lr == resolved.optimizers["text_encoder"].lr


def oracle_precision(line: dict[str, Any], train: dict[str, Any], launcher: str | None) -> tuple[Any, str]:
    value, origin = oracle_plain("mixed_precision", line, train, "no")
    return (launcher, "launcher") if origin == "default" and launcher else (value, origin)


def test_what_is_hidden_is_recorded_in_order(desk: Desk) -> None:
    desk.write("optimizer.json", {"lr": 1e-6})
    resolved = desk.resolve("--lr", "3e-6", lr=2e-6, optimizer_config="optimizer.json")
    assert resolved.entries["optimizer.base.lr"].as_json() == {
        "value": 3e-6,
        "origin": "command line",
        "overrides": [{"origin": "train.json", "value": 2e-6}, {"origin": "optimizer.json", "value": 1e-6}],
    }


def test_what_is_hidden_is_said(desk: Desk) -> None:
    desk.write("optimizer.json", {"lr": 1e-6})
    resolved = desk.resolve(lr=2e-6, optimizer_config="optimizer.json")
    assert resolved.notes == ("lr 2e-06 from train.json overrides 1e-06 from optimizer.json",)


def test_the_same_value_twice_is_not_worth_a_word(desk: Desk) -> None:
    assert desk.resolve("--batch_size", "2", batch_size=2).notes == ()


def test_null_on_the_command_line_hides_every_file(desk: Desk) -> None:
    desk.write("optimizer.json", {"lr": 1e-4})
    entry = desk.resolve("--lr", "null", lr=2e-6, optimizer_config="optimizer.json").entries["optimizer.base.lr"]
    assert entry.as_json() == {
        "value": 1e-6,
        "origin": UNSET,
        "overrides": [{"origin": "train.json", "value": 2e-6}, {"origin": "optimizer.json", "value": 1e-4}],
    }


def test_null_on_the_command_line_hides_the_launchers_word_too(desk: Desk) -> None:
    resolved = desk.resolve(
        "--mixed_precision", "null", environ={"ACCELERATE_MIXED_PRECISION": "bf16"}, mixed_precision="fp16"
    )
    assert (resolved.settings.mixed_precision, resolved.entries["mixed_precision"].origin) == ("no", UNSET)
    assert resolved.notes == (
        'mixed_precision "no": null on the command line hides "fp16" from train.json and "bf16" from launcher',
    )


def test_an_unset_optimizer_config_reads_no_file(desk: Desk) -> None:
    desk.write("optimizer.json", {"lr": 1e-4, "optimizer": "lion"})
    assert desk.resolve().optimizers["unet"].optimizer == "adamw8bit"
    unset = desk.resolve("--optimizer_config", "null", optimizer_config="optimizer.json")
    assert unset.optimizers["unet"].lr == 1e-6


def test_zero_and_false_are_values(desk: Desk) -> None:
    resolved = desk.resolve(cond_dropout=0, tensorboard=False, lr=0)
    assert (resolved.settings.cond_dropout, resolved.settings.tensorboard, resolved.settings.lr) == (0.0, False, 0.0)


def test_an_epoch_limit_of_nobody_does_not_cut_the_steps_somebody_asked_for(desk: Desk) -> None:
    assert desk.resolve().settings.max_epochs == 100
    assert desk.resolve(max_steps=10_000).settings.max_epochs is None
    assert desk.resolve("--max_epochs", "null", max_steps=10_000, max_epochs=3).settings.max_epochs is None
    assert desk.resolve(max_steps=10_000, max_epochs=3).settings.max_epochs == 3


def test_paths_are_relative_to_where_they_stand(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.write("sub/train.json", {"base_model": "model", "data_root": ["a", "../pictures"], "logdir": "logs"})
    desk.write("sub/prompts.txt", "one\n")
    desk.write("prompts.txt", "one\n")
    (desk.folder / "sub/model").mkdir()
    (desk.folder / "sub/a").mkdir()
    argv = ["--config", "sub/train.json"]
    told = resolve(argv, {}).settings
    assert told.base_model == str(desk.folder / "sub/model")
    assert told.data_root == (desk.folder / "sub/a", desk.folder / "pictures")
    assert told.logdir == desk.folder / "sub/logs"
    assert (
        resolve([*argv, "--sample_prompts", "prompts.txt"], {}).settings.sample_prompts == desk.folder / "prompts.txt"
    )
    monkeypatch.setenv("HOME", str(desk.folder / "sub"))
    assert resolve([*argv, "--sample_prompts", "~/prompts.txt"], {}).settings.sample_prompts == (
        desk.folder / "sub/prompts.txt"
    )


def test_a_base_model_that_is_not_there_may_be_a_hub_id(desk: Desk) -> None:
    assert desk.resolve(base_model="owner/name").settings.base_model == "owner/name"


def test_a_drawn_seed_is_recorded_and_said(desk: Desk) -> None:
    resolved = desk.resolve(seed=-1)
    seed = resolved.settings.seed
    assert seed >= 0
    assert resolved.notes == (f"seed {seed} was drawn",)
    assert resolved.entries["seed"].as_json() == {
        "value": seed,
        "origin": "drawn",
        "overrides": [{"origin": "train.json", "value": -1}],
    }
    assert {desk.resolve(seed=-1).settings.seed for _ in range(3)} != {seed}
    assert resolved.with_seed(7).settings.seed == resolved.with_seed(7).entries["seed"].value == 7


def test_settings_are_frozen(desk: Desk) -> None:
    resolved = desk.resolve()
    with pytest.raises(ValueError, match="frozen"):
        resolved.settings.batch_size = 3  # type: ignore[misc]


def test_every_setting_has_an_entry_and_every_entry_an_origin(desk: Desk) -> None:
    resolved = desk.resolve()
    elsewhere = {"lr", "text_encoder_lr", "lr_scheduler", "lr_warmup_steps", "lr_decay_steps"}
    assert set(Settings.model_fields) - elsewhere <= set(resolved.entries)
    assert not elsewhere & set(resolved.entries)
    assert all(entry.origin for entry in resolved.entries.values())
