"""EveryDream2's files load as they are: each of its keys is a setting, another name for one, or retired."""

from __future__ import annotations

import json
from typing import Any

import pytest

from everydream.config.legacy import ALIASES, RETIRED
from everydream.config.pages import SAME_NAME
from everydream.config.schema import Settings
from tests.config.conftest import Desk

# Its train.json with every key, each with a value that it takes
TRAIN: dict[str, Any] = {
    "doc": {"batch_size": "comment"}, "amp": True, "attn_type": "sdp", "batch_size": 10, "ckpt_every_n_minutes": None,
    "clip_grad_norm": None, "clip_skip": 0, "cond_dropout": 0.04, "data_root": "pictures", "disable_amp": False,
    "disable_textenc_training": False, "disable_unet_training": False, "disable_xformers": False, "ed1_mode": False,
    "ema_decay_rate": None, "ema_device": "cpu", "ema_resume_model": None, "ema_sample_ema_model": False,
    "ema_sample_nonema_model": False, "ema_strength_target": None, "ema_update_interval": None,
    "embedding_perturbation": 0.0, "enable_zero_terminal_snr": False, "flip_p": 0.0, "gpuid": 0, "grad_accum": 1,
    "gradient_checkpointing": True, "hf_repo_subfolder": None, "keep_tags": 0, "load_settings_every_epoch": False,
    "log_step": 25, "logdir": "logs", "loss_type": "mse_huber", "lowvram": False, "lr": 1.5e-06, "lr_decay_steps": 0,
    "lr_scheduler": "constant", "lr_warmup_steps": None, "max_epochs": 30, "min_snr_gamma": None,
    "mixed_precision": "fp16", "no_prepend_last": False, "no_save_ckpt": False, "notebook": False,
    "optimizer_config": "optimizer.json", "plugins": None, "project_name": "project_abc",
    "pyramid_noise_discount": None, "rated_dataset": False, "rated_dataset_target_dropout_percent": 50,
    "rated_dataset_target_dropout_rate": 0.5,
    "resolution": 512, "resume_ckpt": "model", "run_name": None, "sample_prompts": "sample_prompts.txt",
    "sample_steps": 300, "save_ckpt_dir": None, "save_ckpts_from_n_epochs": 0, "save_every_n_epochs": 20,
    "save_full_precision": False, "save_optimizer": False, "scale_lr": False, "seed": 555, "shuffle_tags": False,
    "timestep_end": 1000, "timestep_start": 0, "train_sampler": "ddpm", "useadam8bit": None,
    "validation_config": "validation_default.json", "wandb": False, "write_schedule": False,
    "zero_frequency_noise_ratio": 0.02,
}  # fmt: skip
NESTED: dict[str, Any] = {
    "doc": {"base": "comment"},
    "base": {"optimizer": "adamw8bit", "lr": 1e-6, "lr_scheduler": "constant", "lr_decay_steps": None,
             "lr_warmup_steps": None, "betas": [0.9, 0.999], "epsilon": 1e-8, "weight_decay": 0.01},
    "text_encoder_overrides": {"optimizer": None, "lr": 5e-7, "lr_scheduler": "cosine", "lr_decay_steps": None,
                               "lr_warmup_steps": None, "betas": None, "epsilon": None, "weight_decay": None},
    "text_encoder_lr_scale": 1.0,
    "text_encoder_freezing": {"unfreeze_last_n_layers": None},
    "apply_grad_scaler_step_tweaks": True,
}  # fmt: skip
VALIDATION: dict[str, Any] = {
    "documentation": {"val_split_mode": "comment"}, "val_split_mode": "automatic", "auto_split_proportion": 0.15,
    "validate_training": True, "val_data_root": None,
    "stabilize_training_loss": False, "stabilize_split_proportion": 0.15, "every_n_epochs": 1,
    "seed": 555,
}  # fmt: skip


@pytest.fixture
def theirs(desk: Desk) -> Desk:
    desk.write("optimizer.json", NESTED)
    desk.write("validation_default.json", VALIDATION)
    desk.write("sample_prompts.txt", "a photo\n")
    return desk


def load(desk: Desk, *argv: str, **changed: Any) -> Any:
    desk.write("train.json", TRAIN | changed)
    return desk.resolve("--config", "train.json", *argv)


def test_its_keys_are_all_known() -> None:
    for key in set(TRAIN) - {"doc"}:
        assert (key in Settings.model_fields) + (key in ALIASES) + (key in RETIRED) == 1, key
    assert set(SAME_NAME) <= set(Settings.model_fields)
    assert set(TRAIN) - {"doc"} == {*SAME_NAME, *ALIASES, *RETIRED} - {"sample_every_n_steps", "log_every_n_steps"}


def test_its_files_load_and_say_what_they_ask_for(theirs: Desk) -> None:
    resolved = load(theirs)
    settings = resolved.settings
    assert settings.base_model == str(theirs.folder / "model")
    assert (settings.batch_size, settings.loss_type, settings.max_epochs) == (10, "mse_huber", 30)
    assert (settings.save_single_file, settings.save_dtype) == (True, "float16")
    assert resolved.optimizers["unet"].lr == 1.5e-6
    assert (resolved.optimizers["text_encoder"].lr, resolved.optimizers["text_encoder"].lr_scheduler) == (
        5e-7,
        "cosine",
    )
    assert resolved.validation is not None
    assert resolved.validation.auto_split_proportion == 0.15


def test_each_retired_key_is_said_in_one_line_with_its_place(theirs: Desk) -> None:
    lines = json.dumps(TRAIN, indent=2).split("\n")
    notes = load(theirs).notes
    for key in RETIRED:
        said = [note for note in notes if f" {key} is not a setting any more: " in note]
        if TRAIN[key] is None:
            assert not said
        else:
            (note,) = said
            number = next(i for i, line in enumerate(lines, 1) if line.startswith(f'  "{key}"'))
            assert note.startswith(f"train.json:{number}: ")
            assert "\n" not in note


def test_validation_that_was_turned_off_is_not_turned_on(theirs: Desk) -> None:
    assert any("validate_training is not a setting any more" in note for note in load(theirs).notes)
    older = {key: value for key, value in VALIDATION.items() if key != "auto_split_proportion"}
    theirs.write("validation_default.json", older | {"val_split_proportion": 0.25})
    assert load(theirs).validation.auto_split_proportion == 0.25
    theirs.write("validation_default.json", VALIDATION | {"validate_training": False})
    (problem,) = theirs.problems("--config", "train.json")
    assert problem.startswith("validation_default.json:") and "leave validation_config out" in problem


def test_a_decay_of_zero_steps_is_null_and_said(theirs: Desk) -> None:
    resolved = load(theirs, lr_scheduler="cosine")
    assert resolved.optimizers["unet"].lr_decay_steps is None
    assert any(note.endswith("lr_decay_steps 0 is taken as null") for note in resolved.notes)


def test_find_last_names_resume(theirs: Desk) -> None:
    theirs.write("train.json", json.dumps(TRAIN | {"resume_ckpt": "findlast"}, indent=1))
    (problem,) = theirs.problems("--config", "train.json")
    assert problem.startswith("train.json:")
    assert "--resume latest" in problem


def test_a_key_and_its_other_name_are_the_same_setting_twice(theirs: Desk) -> None:
    theirs.write("train.json", TRAIN | {"base_model": "model"})
    (problem,) = theirs.problems("--config", "train.json")
    assert problem.endswith("base_model stands beside resume_ckpt (base_model): they are the same setting")


def test_switches_become_values(theirs: Desk) -> None:
    settings = load(theirs, no_save_ckpt=True).settings
    assert settings.save_single_file is False
    assert load(theirs, save_full_precision=True).settings.save_dtype == "float32"


def test_retired_keys_on_the_command_line_are_said_too(theirs: Desk) -> None:
    notes = load(theirs, "--gpuid", "1", "--scale_lr").notes
    for key in ("gpuid", "scale_lr"):
        assert f"command line: {RETIRED[key].say('--' + key)}" in notes


def test_its_flat_optimizer_file_loads(theirs: Desk) -> None:
    theirs.write("optimizer.json", {"doc": {}, **NESTED["base"], "optimizer": "lion", "betas": [0.9, 0.99]})
    resolved = load(theirs, lr=None)
    assert resolved.optimizers["unet"].optimizer == "lion"
    assert "epsilon 1e-08 from optimizer.json is unused: lion has no epsilon" in resolved.notes
