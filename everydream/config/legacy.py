"""EveryDream2's keys that are no settings here: another name for one (ALIASES), or retired with what to use instead.

docs/from_everydream2.md lists them all, and is generated from these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from everydream.config.sources import Report, show

REFUSED = object()


@dataclass(frozen=True)
class Alias:
    """`values`: what true and false become, of an old key that is a switch. Others are taken as they are."""

    key: str
    values: Mapping[bool, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Retired:
    """`instead` completes "lowvram is no setting any more: …"."""

    instead: str

    def say(self, key: str) -> str:
        return f"{key} is not a setting any more: {self.instead}"


ALIASES = {
    "resume_ckpt": Alias("base_model"),
    "sample_every_n_steps": Alias("sample_steps"),
    "log_every_n_steps": Alias("log_step"),
    "no_save_ckpt": Alias("save_single_file", {True: False, False: True}),
    "save_full_precision": Alias("save_dtype", {True: "float32", False: "float16"}),
}

RETIRED = {
    "amp": Retired("mixed_precision says which precision (no, fp16, bf16)"),
    "disable_amp": Retired("mixed_precision no has this effect"),
    "disable_xformers": Retired("attn_type says which attention; sdp needs no package"),
    "ed1_mode": Retired("Stable Diffusion 1 and 2 are told apart by the model's own files"),
    "ema_resume_model": Retired("resume restores the average of the weights with everything else"),
    "ema_sample_ema_model": Retired("ema_use says whether previews show the average of the weights"),
    "ema_sample_nonema_model": Retired("ema_use says whether previews show the average of the weights"),
    "ema_strength_target": Retired("set ema_decay_rate"),
    "gpuid": Retired("choose the GPU with accelerate launch --gpu_ids, or CUDA_VISIBLE_DEVICES"),
    "hf_repo_subfolder": Retired("download the folder and name it in base_model"),
    "load_settings_every_epoch": Retired("stop the run, change the settings and continue with --resume latest"),
    "lowvram": Retired("use gradient_checkpointing, weights_dtype bfloat16 and fused_backward"),
    "no_prepend_last": Retired("names of files never change: --resume latest finds the newest checkpoint"),
    "notebook": Retired("progress is shown as suits the terminal"),
    "rated_dataset": Retired("weigh pictures with multiply.txt in their folder"),
    "rated_dataset_target_dropout_percent": Retired("weigh pictures with multiply.txt in their folder"),
    "rated_dataset_target_dropout_rate": Retired("weigh pictures with multiply.txt in their folder"),
    "save_ckpts_from_n_epochs": Retired(
        "save_every_n_epochs counts from the start; keep_last limits how many are kept"
    ),
    "save_optimizer": Retired("each checkpoint holds the optimizer's state"),
    "scale_lr": Retired("set lr itself"),
    "train_sampler": Retired(
        "the noise of training is the model's own; previews name their scheduler in sample_prompts"
    ),
    "useadam8bit": Retired("the optimizer file names the optimizer; adamw8bit is the default"),
}

# Keys of EveryDream2's optimizer.json
RETIRED_OPTIMIZER = {
    "apply_grad_scaler_step_tweaks": Retired("the loss scale of fp16 needs no tuning"),
}
RETIRED_FREEZING = {
    "freeze_front_n_layers": Retired("unfreeze_last_n_layers counts from the other end"),
}

# A value that EveryDream2 used where null is meant here
MEANS_NULL = {"lr_decay_steps": 0}

# Of EveryDream2's validation file
VALIDATION_ALIASES = {
    "val_data_root": Alias("manual_data_root"),
    "val_split_proportion": Alias("auto_split_proportion"),
}
RETIRED_VALIDATION = {
    "validate_training": Retired('val_split_mode says what is held out ("none" for nothing), every_n_epochs how often'),
}
VALIDATION_COMMENTS = ("documentation",)


def translate(key: str, value: Any, name: str, place: str, report: Report) -> Any:
    """An alias's value as its setting has it, REFUSED after a problem; `name` as messages write the key."""
    alias = ALIASES[key]
    if key == "resume_ckpt" and value == "findlast":
        report.problem(place, 'resume_ckpt "findlast" is now --resume latest; base_model names the model to start from')
        return REFUSED
    if alias.values and not isinstance(value, bool):
        report.problem(place, f"{name} is {show(value)}, but must be true or false.")
        return REFUSED
    return alias.values[value] if alias.values else value


def means_null(key: str, value: Any, name: str, place: str, report: Report) -> bool:
    if type(value) is not int or key not in MEANS_NULL or value != MEANS_NULL[key]:
        return False
    report.note_at(place, f"{name} {value} is taken as null")
    return True
