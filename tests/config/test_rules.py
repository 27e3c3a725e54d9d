"""Contradictions end the run and name both settings; settings without effect are said; paths must be there."""

from __future__ import annotations

import json
from typing import Any

import pytest

from everydream.config.parts import KEYS
from everydream.config.rules import CONTRADICTIONS, DEMANDS, PART_WITHOUT_EFFECT, WITHOUT_EFFECT
from everydream.optim.table import ROWS
from tests.config.conftest import Desk

# The two settings of a contradiction → train.json that has it (and nothing else wrong), environment
CONTRADICTING: dict[tuple[str, str], tuple[dict[str, Any], dict[str, str]]] = {
    ("disable_unet_training", "disable_textenc_training"):
        ({"disable_unet_training": True, "disable_textenc_training": True}, {}),
    ("cache_latents", "crop_jitter"): ({"cache_latents": True, "crop_jitter": 0.1}, {}),
    ("num_class_images", "class_prompt"): ({"num_class_images": 9, "class_data_root": "class"}, {}),
    ("num_class_images", "class_data_root"): ({"num_class_images": 9, "class_prompt": "a dog"}, {}),
    ("timestep_start", "timestep_end"): ({"timestep_start": 500, "timestep_end": 500}, {}),
    ("enable_zero_terminal_snr", "prediction_type"):
        ({"enable_zero_terminal_snr": True, "prediction_type": "epsilon"}, {}),
    ("global_batch_size", "batch_size"): ({"global_batch_size": 12, "batch_size": 4}, {"WORLD_SIZE": "2"}),
    ("fused_backward", "grad_accum"): ({"fused_backward": True, "grad_accum": 2}, {}),
    ("fused_backward", "global_batch_size"): ({"fused_backward": True, "global_batch_size": 8}, {}),
    ("fused_backward", "clip_grad_norm"): ({"fused_backward": True, "clip_grad_norm": 1.0}, {}),
    ("fused_backward", "mixed_precision"): ({"fused_backward": True}, {"ACCELERATE_MIXED_PRECISION": "fp16"}),
    ("fused_backward", "class_data_root"): (
        {"fused_backward": True, "class_data_root": "class", "class_prompt": "a dog", "num_class_images": 9}, {}),
    ("fused_backward", "compile"): ({"fused_backward": True, "compile": True}, {}),
    ("fused_backward", "processes"): ({"fused_backward": True}, {"WORLD_SIZE": "2"}),
    ("weights_dtype", "mixed_precision"): ({"weights_dtype": "bfloat16", "mixed_precision": "fp16"}, {}),
    ("quiet", "verbose"): ({"quiet": True, "verbose": True}, {}),
    ("validation.val_split_mode", "validation.manual_data_root"):
        ({"validation_config": {"val_split_mode": "manual"}}, {}),
}  # fmt: skip


@pytest.mark.parametrize("keys", [keys for keys, _, _ in CONTRADICTIONS], ids="-".join)
def test_each_contradiction_names_both_settings_and_what_to_do(desk: Desk, keys: tuple[str, str]) -> None:
    settings, environ = CONTRADICTING[keys]
    if "validation_config" in settings:
        desk.write("validation.json", settings["validation_config"])
        settings = {"validation_config": "validation.json"}
    (problem,) = desk.problems(environ=environ, **settings)
    first, second = (key.removeprefix("validation.") for key in keys)
    assert f"{first} " in problem
    assert f"{second} " in problem
    assert " contradict: " in problem
    assert problem.split(":")[0] in ("train.json", "validation.json")
    assert problem.split(":")[1].isdigit()


def test_a_contradiction_stands_at_the_first_setting_that_somebody_stated(desk: Desk) -> None:
    assert desk.problems("--crop_jitter", "0.1", cache_latents=True) == (
        "train.json:4: cache_latents true and crop_jitter 0.1 (command line) contradict: "
        "crops that move cannot be cached. Set crop_jitter 0, or cache_latents false.",
    )


DEMANDED: dict[str, dict[str, Any]] = {
    "clip_grad_norm": {"clip_grad_norm": 1.0},
    "fused_backward": {"fused_backward": True},
    "weights_dtype": {"weights_dtype": "bfloat16"},
    "lr_scheduler": {"lr_scheduler": "cosine"},
}


@pytest.mark.parametrize("name", [*ROWS, "my.package.Optimizer"])
@pytest.mark.parametrize(("key", "reason"), [(key, reason) for key, _, reason in DEMANDS])
def test_what_an_optimizer_cannot_is_refused_with_its_reason(desk: Desk, name: str, key: str, reason: str) -> None:
    desk.write("optimizer.json", {"optimizer": name})
    settings = {"optimizer_config": "optimizer.json", **DEMANDED[key]}
    against = getattr(ROWS[name], reason) if name in ROWS else reason in ("cannot_fuse", "cannot_round")
    if not against:
        assert desk.resolve(**settings).optimizers["unet"].optimizer == name
        return
    problems = desk.problems(**settings)
    assert all(f'optimizer "{name}"' in problem and key in problem for problem in problems)


def test_a_part_that_is_not_trained_is_asked_for_nothing(desk: Desk) -> None:
    desk.write("optimizer.json", {"base": {}, "text_encoder_overrides": {"optimizer": "prodigy", "lr": 1}})
    settings = {"optimizer_config": "optimizer.json", "weights_dtype": "bfloat16"}
    assert "text_encoder_overrides.optimizer" in desk.problems(**settings)[0]
    assert desk.resolve(disable_textenc_training=True, **settings)


def test_the_number_of_betas_is_the_optimizers(desk: Desk) -> None:
    desk.write("optimizer.json", '{"optimizer": "ademamix8bit",\n "betas": [0.9, 0.999]}')
    problems = desk.problems(optimizer_config="optimizer.json")
    assert problems[0] == "optimizer.json:2: betas is [0.9, 0.999], but ademamix8bit takes 3"


# A setting without effect → train.json where it has none
WITHOUT: dict[str, dict[str, Any]] = {
    "base_model_revision": {"base_model_revision": "main"},
    "grad_accum": {"grad_accum": 2, "global_batch_size": 8},
    "class_prompt": {"class_prompt": "a dog"},
    "prior_loss_weight": {"prior_loss_weight": 0.5},
    "class_data_root": {"class_data_root": "class", "prior_loss_weight": 0},
    "huber_delta": {"huber_delta": 0.1},
    "ema_update_interval": {"ema_update_interval": 5},
    "ema_device": {"ema_device": "cpu"},
    "ema_use": {"ema_use": ["previews"]},
    "save_ckpt_dir": {"save_ckpt_dir": "out", "save_single_file": False},
    "save_dtype": {"save_dtype": "float32", "save_single_file": False},
    "resume_changed": {"resume_changed": True},
    "accept_data_changes": {"accept_data_changes": True},
    "process_timeout_minutes": {"process_timeout_minutes": 5},
    "optimizer.text_encoder_lr_scale":
        {"disable_textenc_training": True, "optimizer_config": {"text_encoder_lr_scale": 0.5}},
    "sample_steps": {"sample_steps": 9},
    "sample_prompts": {"sample_prompts": "train.json", "sample_steps": 0},
    "validate_every_n_steps": {"validate_every_n_steps": 9},
    "validation.manual_data_root": {"validation_config": {"manual_data_root": "class"}},
    "validation.auto_split_proportion": {"validation_config": {"val_split_mode": "none", "auto_split_proportion": 0.5}},
    "validation.stabilize_split_proportion": {"validation_config": {"stabilize_split_proportion": 0.5}},
    **{f"optimizer.text_encoder_freezing.{key}":
       {"disable_textenc_training": True, "optimizer_config": {"text_encoder_freezing": {key: value}}}
       for key, value in (("unfreeze_last_n_layers", 2), ("freeze_embeddings", True),
                          ("freeze_final_layer_norm", True))},
}  # fmt: skip


@pytest.mark.parametrize("key", [key for key, _, _ in WITHOUT_EFFECT])
def test_each_setting_without_effect_is_said_once_and_refused_never(desk: Desk, key: str) -> None:
    (desk.folder / "class").mkdir()
    settings = dict(WITHOUT[key])
    for name, value in list(settings.items()):
        if isinstance(value, dict):
            desk.write(f"{name}.json", value)
            settings[name] = f"{name}.json"
    notes = [note for note in desk.resolve(**settings).notes if "without effect" in note]
    assert len(notes) == 1
    assert notes[0].split(" ")[0].split(".")[-1] == key.split(".")[-1]


PART = {"lr_warmup_steps": 9, "lr_decay_steps": 9, "no_decay_on_norms": True}
USED = {"lr_warmup_steps": {"lr_scheduler": "cosine"}, "lr_decay_steps": {"lr_scheduler": "cosine"},
        "no_decay_on_norms": {"weight_decay": 0.5}}  # fmt: skip


@pytest.mark.parametrize("key", [key for key, _, _ in PART_WITHOUT_EFFECT])
def test_a_key_of_a_part_is_without_effect_only_where_no_part_uses_it(desk: Desk, key: str) -> None:
    def notes(base: dict[str, Any], text: dict[str, Any]) -> list[str]:
        desk.write("optimizer.json", {"base": base, "text_encoder_overrides": text})
        said = desk.resolve(optimizer_config="optimizer.json").notes
        return [note for note in said if "without effect" in note]

    idle: dict[str, Any] = {"weight_decay": 0}
    said = {key: PART[key]}
    assert [note.split(" ")[0] for note in notes({**idle, **said}, {})] == [key]
    assert [note.split(" ")[0] for note in notes(idle, said)] == [f"text_encoder_overrides.{key}"]
    assert notes({**idle, **said}, USED[key]) == [], "the text encoder inherits it, and uses it"
    assert notes({**idle, **said, **USED[key]}, {}) == []
    assert len(notes({**idle, **said}, {**USED[key], **said})) == 1, "the text encoder has its own"


STATED = {"optimizer": "adamw8bit", "lr": 1e-6, "lr_scheduler": "cosine", "lr_warmup_steps": 3, "lr_decay_steps": 9,
          "betas": [0.9, 0.999], "epsilon": 1e-8, "weight_decay": 0.01, "args": {"amsgrad": False},
          "no_decay_on_norms": True}  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_what_is_stated_of_a_part_that_is_not_trained_is_said_defaults_too(desk: Desk, key: str) -> None:
    def notes(content: dict[str, Any], frozen: str) -> list[str]:
        desk.write("optimizer.json", content)
        return list(desk.resolve(optimizer_config="optimizer.json", **{frozen: True}).notes)

    said = {key: STATED[key]}
    (note,) = notes({"text_encoder_overrides": said}, "disable_textenc_training")
    assert note.startswith(f"text_encoder_overrides.{key} ")
    assert note.endswith("is without effect: the text encoder is not trained")
    own = {"lr_scheduler": "linear", "weight_decay": 0.5} | said
    (note,) = [one for one in notes({"base": said, "text_encoder_overrides": own}, "disable_unet_training")
               if one.startswith(f"{key} ")]  # fmt: skip
    assert note.endswith("is without effect: the UNet is not trained, and the text encoder has its own")


def test_the_lr_of_a_frozen_text_encoder_is_named_as_it_was_written(desk: Desk) -> None:
    assert desk.resolve("--text_encoder_lr", "1e-6", disable_textenc_training=True).notes == (
        "text_encoder_lr 1e-06 from command line is without effect: the text encoder is not trained",
    )


def test_no_previews_asked_for_twice_is_not_worth_a_word(desk: Desk) -> None:
    assert desk.resolve(sample_steps=0).notes == ()


def test_a_stated_default_without_effect_is_not_worth_a_word(desk: Desk) -> None:
    assert desk.resolve(huber_delta=1.0, sample_steps=300, ema_update_interval=1, save_dtype="float16").notes == ()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"base_model": "./gone"}, "train.json:2: base_model: there is no folder or file {}/gone"),
        ({"base_model": "gone"}, "train.json:2: base_model: there is no folder or file {}/gone"),
        (
            {"base_model": "gone.safetensors"},
            "train.json:2: base_model: there is no folder or file {}/gone.safetensors",
        ),
        ({"data_root": ["pictures", "gone"]}, "train.json:3: data_root: there is no folder {}/gone"),
        (
            {"data_root": "file"},
            "train.json:3: data_root: there is no folder or manifest (.json, .jsonl) (it is something else) {}/file",
        ),
        (
            {"base_model": "file"},
            "train.json:2: base_model: there is no file of weights (.safetensors) (it is something else) {}/file",
        ),
        *(
            ({key: path}, "train.json:4: " + key + ": {}/file is not a folder")
            for key in ("logdir", "cache_dir", "save_ckpt_dir")
            for path in ("file", "file/in/it")
        ),
        (
            {"class_data_root": "file", "num_class_images": 3, "class_prompt": "a"},
            "train.json:4: class_data_root: {}/file is not a folder",
        ),
        ({"class_data_root": "gone"}, "train.json:4: class_data_root: there is no folder {}/gone"),
        ({"sample_prompts": "gone"}, "train.json:4: sample_prompts: there is no file {}/gone"),
        ({"resume": "gone"}, "train.json:4: resume: there is no folder {}/gone"),
        ({"optimizer_config": "gone.json"}, "gone.json: there is no such file"),
        ({"validation_config": "gone.json"}, "gone.json: there is no such file"),
    ],
)
def test_missing_paths_are_problems(desk: Desk, settings: dict[str, Any], problem: str) -> None:
    desk.write("file", "")
    assert desk.problems(**settings) == (problem.format(desk.folder),)


def test_print_config_looks_at_settings_whose_paths_are_elsewhere(desk: Desk) -> None:
    resolved = desk.resolve("--print_config", data_root="/gone/pictures")
    assert resolved.notes == ("train.json:3: data_root: there is no folder /gone/pictures",)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data_root": ["pictures", "pictures"]}, "data_root names {}/pictures twice"),
        ({"data_root": ["pictures", "pictures/in"]}, "{}/pictures/in lies in {}/pictures and would be read twice"),
        ({"data_root": ["pictures", "link"]}, "{}/pictures is the same folder as {}/link"),
        ({"class_data_root": "pictures/in"}, "class_data_root lies in data_root"),
        ({"class_data_root": ".", "logdir": "../logs"}, "data_root lies in class_data_root"),
        ({"class_data_root": "link"}, "they are the same folder"),
        ({"class_data_root": "link/in"}, "class_data_root lies in data_root"),
        ({"logdir": "pictures/logs"}, 'logdir "{}/pictures/logs" and data_root'),
        ({"logdir": "link/logs"}, 'logdir "{}/link/logs" and data_root'),
        ({"cache_dir": "pictures/cache"}, 'cache_dir "{}/pictures/cache" and data_root'),
        ({"class_data_root": "class", "save_ckpt_dir": "class"}, 'save_ckpt_dir "{}/class"'),
        ({"validation_config": "inside.json"}, "manual_data_root lies in data_root"),
        ({"validation_config": "same.json", "class_data_root": "class"}, "they are the same folder"),
    ],
)
def test_a_folder_of_pictures_is_read_for_one_purpose(desk: Desk, settings: dict[str, Any], words: str) -> None:
    (desk.folder / "pictures/in").mkdir()
    (desk.folder / "class").mkdir()
    (desk.folder / "link").symlink_to("pictures")
    desk.write("inside.json", {"val_split_mode": "manual", "manual_data_root": "link/in"})
    desk.write("same.json", {"val_split_mode": "manual", "manual_data_root": "class"})
    (problem,) = desk.problems(**settings)
    assert words.replace("{}", str(desk.folder)) in problem


def test_folders_that_are_not_read_may_be_anywhere(desk: Desk) -> None:
    desk.write("validation.json", {"val_split_mode": "none", "manual_data_root": "pictures/gone"})
    assert any("without effect" in note for note in desk.resolve(validation_config="validation.json").notes)
    assert desk.resolve(class_data_root="gone", prior_loss_weight=0).notes == (
        f'class_data_root "{desk.folder}/gone" from train.json is without effect: prior_loss_weight is 0',
    )


def test_a_loss_over_pictures_that_are_trained_on_is_said(desk: Desk) -> None:
    (desk.folder / "pictures/in").mkdir()
    desk.write("validation.json", {"extra_manual_datasets": {"faces": "pictures/in"}})
    (note,) = desk.resolve(validation_config="validation.json").notes
    assert note.startswith("validation.json:2: extra_manual_datasets: faces shares pictures with data_root")


def test_pictures_may_be_named_by_a_manifest(desk: Desk) -> None:
    for name in ("captions.json", "captions.JSONL"):
        path = desk.write(f"pictures/{name}", "")
        assert desk.resolve(data_root=f"pictures/{name}", logdir="pictures/logs").settings.data_root == (path,)
    assert "lies in" in desk.problems(data_root=["pictures", "pictures/captions.json"])[0]


def test_rules_stay_silent_about_settings_that_are_wrong_themselves(desk: Desk) -> None:
    assert desk.problems(cache_latents=True, crop_jitter="wild") == (
        'train.json:5: crop_jitter is "wild", but must be a number ≥ 0 and ≤ 0.5.',
    )


def test_a_file_that_cannot_be_read_is_the_only_thing_said_about_what_it_holds(desk: Desk) -> None:
    desk.write("train.json", '{"base_model": }')
    assert len(desk.problems("--config", "train.json", "--cache_latents", "--crop_jitter", "0.1")) == 1
    desk.write("optimizer.json", "{,}")
    assert len(desk.problems("--fused_backward", optimizer_config="optimizer.json")) == 1


@pytest.mark.parametrize("told", ["abc", "0", "-1", "1.0", "9" * 300])
def test_a_number_of_processes_that_is_none_is_the_launchers_mistake(desk: Desk, told: str) -> None:
    (problem,) = desk.problems(environ={"WORLD_SIZE": told}, global_batch_size=8)
    assert problem.startswith(f'launcher: WORLD_SIZE is "{told[:9]}')
    assert desk.resolve(environ={"WORLD_SIZE": ""}).processes == 1


def test_all_sources_report_at_once(desk: Desk) -> None:
    desk.write("optimizer.json", {"optimizer": "lionn", "lr": "fast"})
    desk.write("validation.json", json.dumps({"seed": True}, indent=1))
    problems = desk.problems(
        "--batch_size", "none", environ={"ACCELERATE_MIXED_PRECISION": "fp8"},
        seed=1.5, wandb=1, optimizer_config="optimizer.json", validation_config="validation.json", data_root="gone",
    )  # fmt: skip
    places = sorted(":".join(problem.split(":")[:-1]) for problem in problems)
    assert len(problems) == 8
    assert [place.split(": ")[0] for place in places] == sorted(
        ["command line", "launcher", "optimizer.json:2", "optimizer.json:3", "train.json:3", "train.json:4",
         "train.json:5", "validation.json:2"]
    )  # fmt: skip
