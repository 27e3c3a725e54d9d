"""config.json repeats the run; what a resume may change is decided for every setting."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everydream.config.compare import DERIVED, FIXED, SAFE, changes
from everydream.config.resolve import NOT_RECORDED, OPTIMIZER_KEYS, Resolved
from everydream.config.schema import Settings, ValidationSettings
from tests.config.conftest import Desk

OPTIMIZER = {
    "base": {"optimizer": "adamw", "lr": 3e-6, "args": {"amsgrad": True, "list": [1, 2]}, "lr_scheduler": "cosine"},
    "text_encoder_overrides": {"optimizer": "lion", "weight_decay": 0.5},
    "text_encoder_lr_scale": 0.25,
    "text_encoder_freezing": {"unfreeze_last_n_layers": 3},
}


def again(desk: Desk, resolved: Resolved, *argv: str) -> Resolved:
    desk.write("run/config.json", resolved.record())
    return desk.resolve("--config", "run/config.json", *argv)


def values(resolved: Resolved) -> dict[str, Any]:
    return {key: one.value for key, one in resolved.entries.items() if key not in NOT_RECORDED}


def same(one: Resolved, other: Resolved) -> bool:
    return values(one) == values(other) and (one.optimizers, one.freezing, one.validation) == (
        other.optimizers, other.freezing, other.validation,
    )  # fmt: skip


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries({}, optional={
        "seed": st.sampled_from([-1, 3]), "max_steps": st.just(9), "max_epochs": st.just(2),
        "lr": st.sampled_from([0, 1e-5]), "text_encoder_lr": st.just(2e-7), "lr_scheduler": st.just("linear"),
        "optimizer_config": st.just("optimizer.json"), "validation_config": st.just("validation.json"),
        "validate_every_n_steps": st.just(7), "compile": st.sampled_from([True, "max"]),
        "plugins": st.just(["a.B"]), "data_root": st.just(["pictures", "more"]), "resume": st.just("latest"),
        "base_model": st.just("owner/name"),
    })
)  # fmt: skip
def test_config_json_repeats_the_run(desk: Desk, train: dict[str, Any]) -> None:
    (desk.folder / "more").mkdir(exist_ok=True)
    desk.write("optimizer.json", OPTIMIZER)
    desk.write("validation.json", {"seed": 4, "extra_manual_datasets": {"faces": "more"}})
    first = desk.resolve(**train)
    assert json.loads(json.dumps(first.record())) == first.record()
    second = again(desk, first)
    assert same(first, second)
    assert second.record()["settings"].keys() == first.record()["settings"].keys()
    assert same(second, again(desk, second))


def test_the_record_is_plain_and_its_paths_are_absolute(desk: Desk) -> None:
    record = desk.resolve(logdir="logs").record()
    assert record["format"] == "everydream-config-1"
    assert record["settings"]["data_root"] == {"value": [str(desk.folder / "pictures")], "origin": "train.json"}
    assert record["settings"]["logdir"]["value"] == str(desk.folder / "logs")
    assert record["settings"]["batch_size"] == {"value": 4, "origin": "default"}


def test_what_belongs_to_one_start_is_not_recorded(desk: Desk) -> None:
    record = desk.resolve("--resume", "latest", "--resume_changed", "--accept_data_changes", "--dry_run").record()
    assert not {"resume", "resume_changed", "accept_data_changes", "dry_run"} & set(record["settings"])


def test_the_command_line_wins_over_config_json(desk: Desk) -> None:
    desk.write("optimizer.json", {"lr": 3e-6, "text_encoder_lr_scale": 0.5})
    first = desk.resolve(optimizer_config="optimizer.json", batch_size=2)
    second = again(desk, first, "--lr", "1e-5", "--batch_size", "3")
    assert second.settings.batch_size == 3
    assert second.entries["optimizer.base.lr"].as_json() == {
        "value": 1e-5, "origin": "command line", "overrides": [{"origin": "config.json", "value": 3e-6}],
    }  # fmt: skip
    assert second.optimizers["text_encoder"].lr == 5e-6, "what was inherited is inherited again"


def test_an_optimizer_file_beside_config_json_replaces_all_of_its_optimizer(desk: Desk) -> None:
    desk.write("optimizer.json", OPTIMIZER)
    first = desk.resolve("--lr", "7e-6", optimizer_config="optimizer.json")
    desk.write("other.json", {"optimizer": "sgd"})
    second = again(desk, first, "--optimizer_config", "other.json")
    assert second.optimizers["unet"] == second.optimizers["text_encoder"]
    assert (second.optimizers["unet"].optimizer, second.optimizers["unet"].lr) == ("sgd", 1e-3)
    assert second.freezing.unfreeze_last_n_layers is None
    third = again(desk, first, "--optimizer_config", "null")
    assert third.optimizers["unet"].optimizer == "adamw8bit"


def test_what_validate_every_n_steps_stood_over_is_there_again_without_it(desk: Desk) -> None:
    desk.write("val.json", {"every_n_steps": 7})
    first = desk.resolve(validation_config="val.json", validate_every_n_steps=1)
    assert first.validation is not None
    assert first.validation.every_n_steps == 1
    assert first.entries["validation.every_n_steps"].as_json() == {
        "value": 1, "origin": "train.json", "overrides": [{"origin": "val.json", "value": 7}],
    }  # fmt: skip
    second, third = again(desk, first), again(desk, first, "--validate_every_n_steps", "null")
    assert second.validation == first.validation
    assert third.validation is not None
    assert third.validation.every_n_steps == 7
    desk.write("val.json", {})
    entry = desk.resolve(validation_config="val.json", validate_every_n_steps=1).entries["validation.every_n_steps"]
    assert entry.overrides == (), "nobody stated another"


def test_other_things_in_config_json_are_left_alone(desk: Desk) -> None:
    desk.write("run/config.json", desk.resolve().record() | {"run": {"counter": 3}})
    assert desk.resolve("--config", "run/config.json").settings.batch_size == 4


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format": "everydream-config-9"}, 'config.json:2: format is "everydream-config-9", but this program reads'),
        ({"settings": 3}, "config.json:4: settings is 3, but must be an object"),
        ({"settings": {"batch_sise": {"value": 1, "origin": "x"}}}, "config.json:5: batch_sise is not a setting. Did"),
        ({"settings": {"optimizer.base.lrr": {"value": 1}}}, "config.json:5: optimizer.base.lrr is not a setting."),
        ({"settings": {"batch_size": 4}}, "config.json:5: batch_size is 4, but must be"),
        ({"settings": {"optimizer.base.lr": {"value": "x"}}}, 'config.json:5: optimizer.base.lr is "x", but must be'),
    ],
)
def test_a_record_edited_wrongly_is_refused(desk: Desk, change: dict[str, Any], problem: str) -> None:
    desk.write("config.json", {"format": "everydream-config-1", "processes": 1, "settings": {}} | change)
    assert any(one.startswith(problem) for one in desk.problems("--config", "config.json"))


def test_every_setting_is_safe_or_fixed_on_resume() -> None:
    recorded = set(Settings.model_fields) - set(OPTIMIZER_KEYS) - set(NOT_RECORDED)
    recorded |= {f"validation.{key}" for key in ValidationSettings.model_fields}
    assert set(SAFE | FIXED | DERIVED) == recorded
    assert len(SAFE) + len(FIXED) + len(DERIVED) == len(recorded)


def test_nothing_changed_is_nothing_said(desk: Desk) -> None:
    assert changes(desk.resolve().record(), desk.resolve("--resume", "latest").record()) == ([], [])


@pytest.mark.parametrize(
    ("words", "safe", "refused"),
    [
        (["--max_steps", "900", "--max_epochs", "100"], ["max_steps: null → 900"], []),
        (["--num_workers", "2", "--keep_last", "5"], ["num_workers: null → 2", "keep_last: null → 5"], []),
        (["--seed", "1"], [], ["seed: 555 → 1"]),
        (["--seed", "-1"], [], []),
        (["--lr", "2e-6"], [], ["optimizer.base.lr: 1e-06 → 2e-06", "optimizer.text_encoder.lr: 1e-06 → 2e-06"]),
        (["--batch_size", "8"], [], ["batch_size: 4 → 8"]),
        (["--grad_accum", "2"], [], ["grad_accum: 1 → 2"]),
        (["--loss_type", "huber", "--log_step", "1"], ["log_step: 25 → 1"], ['loss_type: "mse" → "huber"']),
        (["--validation_config", "v.json"], None, ["pictures held out for validation: null → [0.15, 555]"]),
    ],
)  # fmt: skip
def test_changes_on_resume(desk: Desk, words: list[str], safe: list[str] | None, refused: list[str]) -> None:
    desk.write("v.json", {})
    found = changes(desk.resolve().record(), desk.resolve(*words).record())
    assert found[1] == refused
    assert safe is None or found[0] == safe


def test_other_processes_with_the_same_updates_are_safe(desk: Desk) -> None:
    one = desk.resolve(global_batch_size=8).record()
    two = desk.resolve(global_batch_size=8, environ={"WORLD_SIZE": "2"}).record()
    assert changes(one, two) == (["processes: 1 → 2"], [])
    alone = desk.resolve(grad_accum=2).record()
    both = desk.resolve(environ={"WORLD_SIZE": "2"}).record()
    assert changes(alone, both) == (["grad_accum: 2 → 1", "processes: 1 → 2"], [])
    assert changes(desk.resolve().record(), both) == ([], ["processes: 1 → 2"])
