"""The command line's own grammar."""

from __future__ import annotations

import pytest

from everydream.config.schema import Settings
from tests.config.conftest import Desk


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--batch_size", "3"], "batch_size", 3),
        (["--batch_size=3"], "batch_size", 3),
        (["--lr", "2e-6"], "lr", 2e-6),
        (["--lr=1"], "lr", 1.0),
        (["--seed", "7"], "seed", 7),
        (["--wandb"], "wandb", True),
        (["--wandb", "true"], "wandb", True),
        (["--wandb=False"], "wandb", False),
        (["--no_wandb"], "wandb", False),
        (["--tensorboard", "false"], "tensorboard", False),
        (["--no_tensorboard"], "tensorboard", False),
        (["--compile"], "compile", True),
        (["--compile", "max"], "compile", "max"),
        (["--no_compile"], "compile", False),
        (["--cache_latents", "false"], "cache_latents", False),
        (["--cache_latents", "null"], "cache_latents", None),
        (["--instance_prompt", "a sks dog, standing"], "instance_prompt", "a sks dog, standing"),
        (["--instance_prompt=--odd"], "instance_prompt", "--odd"),
        (["--instance_prompt", "12"], "instance_prompt", "12"),
        (["--instance_prompt", "true"], "instance_prompt", "true"),
        (["--plugins", "a.B", "c.D"], "plugins", ("a.B", "c.D")),
        (["--plugins", "a.B", "--plugins", "c.D"], "plugins", ("a.B", "c.D")),
        (["--plugins", '["a.B", "c.D"]'], "plugins", ("a.B", "c.D")),
        (["--plugins", "[]"], "plugins", ()),
        (["--sample_every_n_steps", "9"], "sample_steps", 9),
        (["--log_every_n_steps", "9"], "log_step", 9),
        (["--no_save_ckpt"], "save_single_file", False),
        (["--no_save_ckpt", "false"], "save_single_file", True),
        (["--no_no_save_ckpt"], "save_single_file", True),
        (["--save_full_precision"], "save_dtype", "float32"),
        (["--no_save_full_precision"], "save_dtype", "float16"),
        (["--resume", "latest"], "resume", "latest"),
        (["--mixed_precision", "no"], "mixed_precision", "no"),
    ],
)
def test_forms(desk: Desk, words: list[str], key: str, value: object) -> None:
    settings = desk.resolve(*words).settings
    assert getattr(settings, key) == value
    assert type(getattr(settings, key)) is type(value)


def test_an_old_switch_says_what_it_says_over_train_json(desk: Desk) -> None:
    assert desk.resolve("--no_save_ckpt", "false", save_single_file=False).settings.save_single_file is True
    assert desk.resolve("--no_save_full_precision", save_dtype="float32").settings.save_dtype == "float16"


def test_data_roots_may_be_many(desk: Desk) -> None:
    for name in ("one", "two"):
        (desk.folder / name).mkdir()
    expected = (desk.folder / "one", desk.folder / "two")
    for words in (["--data_root", "one", "two"], ["--data_root", "one", "--data_root", "two"]):
        assert desk.resolve(*words).settings.data_root == expected


def test_no_abbreviations_and_no_dashes_for_underscores(desk: Desk) -> None:
    assert desk.problems("--batch", "3") == ("command line: --batch is not a setting. Did you mean '--batch_size'?",)
    assert desk.problems("--batch-size", "3") == (
        "command line: --batch-size is not a setting. Did you mean '--batch_size'?",
    )


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["loose"], "--config train.json loose: write --config PATH"),
        (["--batch_size"], "--batch_size needs a value: a whole number ≥ 1 and ≤ 10^6"),
        (["--batch_size", "1", "2"], "--batch_size is [\"1\", \"2\"], but must be a whole number ≥ 1 and ≤ 10^6."),
        (["--batch_size", "1", "--batch_size", "2"], "--batch_size is given twice"),
        (["--wandb", "--no_wandb"], "--no_wandb is given twice"),
        (["--save_dtype", "float32", "--save_full_precision"], "--save_full_precision is given twice"),
        (["--lr", "null", "--lr", "1"], "--lr is given twice"),
        (["--no_wandb", "true"], "--no_wandb takes no value"),
        (["--no_batch_size"], "--no_batch_size is not a setting. Did you mean '--batch_size'?"),
        (["--wandb", "1"], '--wandb is "1", but must be true or false.'),
        (["--wandb", "yes"], '--wandb is "yes", but must be true or false.'),
        (["--batch_size", "4.0"], '--batch_size is "4.0", but must be a whole number ≥ 1 and ≤ 10^6.'),
        (["--batch_size", "1_000"], '--batch_size is "1_000", but must be a whole number ≥ 1 and ≤ 10^6.'),
        (["--lr", "nan"], '--lr is "nan", but must be a number ≥ 0.'),
        (["--lr", "inf"], '--lr is "inf", but must be a number ≥ 0.'),
        (["--lr", "1e400"], '--lr is "1e400", but must be a number ≥ 0.'),
        (["--optimizer", "lion"],
         "--optimizer is not a setting. It belongs into optimizer.json, the file that optimizer_config names."),
        (["--data_root", "a", "--data_root", "null"], "--data_root is given twice"),
        (["--save_full_precision", "float16"], '--save_full_precision is "float16", but must be true or false.'),
        (["--config"], "--config: write --config PATH"),
        (["--config="], '--config "": write --config PATH'),
        (["--dry_run", "yes"], "--dry_run yes: write --dry_run alone"),
        (["--print_config", "yaml"], "--print_config yaml: write --print_config or --print_config json"),
    ],
)  # fmt: skip
def test_mistakes(desk: Desk, words: list[str], problem: str) -> None:
    desk.train()
    argv = words if words[0].startswith("--config") else ["--config", "train.json", *words]
    assert f"command line: {problem}" in desk.problems(*argv)


def test_a_word_before_every_option_is_refused(desk: Desk) -> None:
    desk.train()
    assert desk.problems("train.json", "--config", "train.json") == (
        "command line: 'train.json' belongs to no option: write --key value",
    )


def test_actions(desk: Desk) -> None:
    actions = {
        (): "train",
        ("--dry_run",): "dry_run",
        ("--print_config",): "print_config",
        ("--print_config", "json"): "print_config_json",
        ("--print_config", "--dry_run"): "print_config",
        ("--dry_run", "--print_config", "json"): "print_config_json",
    }
    for words, action in actions.items():
        assert desk.resolve(*words).action == action


def test_every_setting_can_be_given_on_the_command_line(desk: Desk) -> None:
    for key in Settings.model_fields:
        problems: tuple[str, ...] = ()
        if key not in ("base_model", "data_root"):
            desk.resolve(f"--{key}", "null")
        else:
            problems = desk.problems(f"--{key}", "null")
            assert problems[0].startswith(f"command line: --{key} null: {key} must be given")


def test_without_config_no_file_is_read_and_the_error_names_the_one_that_is_there(desk: Desk) -> None:
    from everydream.config.resolve import resolve
    from everydream.errors import ConfigError

    with pytest.raises(ConfigError) as caught:
        resolve([], {})
    assert not any("train.json" in problem for problem in caught.value.problems)
    desk.train(batch_size=17)
    with pytest.raises(ConfigError, match=r"\./train\.json is there, but was not read: add --config train\.json"):
        resolve([], {})
    assert resolve(["--base_model", "model", "--data_root", "pictures"], {}).settings.batch_size == 4
