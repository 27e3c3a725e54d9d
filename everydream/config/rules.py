"""Settings that contradict each other or have no effect: tables, which checks.py walks.

A contradiction ends the run and says which two and what to do. A setting without effect is only said, so that files
with leftovers still load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from everydream.config.files import SCALE
from everydream.config.parts import BASE, CONSTANT, FREEZING, TEXT_ENCODER

Values = Mapping[str, Any]
# No settings, but part of some rules: what the launcher says, and the keys whose value follows from another's
PROCESSES, INHERITED = "processes", "inherited"

# Two settings → when they contradict → why, and what to do
CONTRADICTIONS: tuple[tuple[tuple[str, str], Callable[[Values], bool], str], ...] = (
    (("disable_unet_training", "disable_textenc_training"),
     lambda v: v["disable_unet_training"] and v["disable_textenc_training"],
     "nothing is left to train. Set one of them false"),
    (("cache_latents", "crop_jitter"),
     lambda v: v["cache_latents"] is True and v["crop_jitter"] > 0,
     "crops that move cannot be cached. Set crop_jitter 0, or cache_latents false"),
    (("num_class_images", "class_prompt"),
     lambda v: v["num_class_images"] is not None and v["class_prompt"] is None,
     "class pictures are made from a prompt. Set class_prompt, or leave num_class_images out"),
    (("num_class_images", "class_data_root"),
     lambda v: v["num_class_images"] is not None and v["class_data_root"] is None,
     "class pictures need a folder. Set class_data_root, or leave num_class_images out"),
    (("timestep_start", "timestep_end"),
     lambda v: v["timestep_start"] >= v["timestep_end"],
     "no timestep is left to train. Set timestep_start below timestep_end"),
    (("enable_zero_terminal_snr", "prediction_type"),
     lambda v: v["enable_zero_terminal_snr"] and v["prediction_type"] == "epsilon",
     "at the last timestep there is nothing but noise to predict. Use a v_prediction model, or leave it out"),
    (("global_batch_size", "batch_size"),
     lambda v: v["global_batch_size"] is not None and v["global_batch_size"] % (v["batch_size"] * v[PROCESSES]) != 0,
     "global_batch_size must be a multiple of batch_size × processes. Change one of them"),
    (("fused_backward", "grad_accum"),
     lambda v: v["fused_backward"] and v["global_batch_size"] is None and v["grad_accum"] > 1,
     "a gradient that is used at once cannot be accumulated. Set grad_accum 1, or fused_backward false"),
    (("fused_backward", "global_batch_size"),
     lambda v: v["fused_backward"] and (v["global_batch_size"] or 0) > v["batch_size"],
     "a gradient that is used at once cannot be accumulated. Leave global_batch_size out, or fused_backward"),
    (("fused_backward", "clip_grad_norm"),
     lambda v: v["fused_backward"] and v["clip_grad_norm"] is not None,
     "the norm is known only when every gradient is. Leave one of them out"),
    (("fused_backward", "mixed_precision"),
     lambda v: v["fused_backward"] and v["mixed_precision"] == "fp16",
     "fp16's loss scale needs all gradients at once. Use bf16, or fused_backward false"),
    (("fused_backward", "class_data_root"),
     lambda v: v["fused_backward"] and v["class_data_root"] is not None and v["prior_loss_weight"] > 0,
     "class pictures have a backward of their own: it would be a second update. Leave one of them out"),
    (("fused_backward", "compile"),
     lambda v: v["fused_backward"] and v["compile"],
     "a compiled backward gives all gradients at once, so that nothing would be saved. Leave one of them out"),
    (("fused_backward", PROCESSES),
     lambda v: v["fused_backward"] and v[PROCESSES] > 1,
     "gradients are averaged over the processes before they are used. Start one process, or leave fused_backward out"),
    (("weights_dtype", "mixed_precision"),
     lambda v: v["weights_dtype"] == "bfloat16" and v["mixed_precision"] == "fp16",
     "bfloat16 weights do not fit into fp16. Use mixed_precision bf16, or weights_dtype float32"),
    (("quiet", "verbose"), lambda v: v["quiet"] and v["verbose"],
     "one asks for fewer lines, the other for more. Leave one of them out"),
    (("validation.val_split_mode", "validation.manual_data_root"),
     lambda v: v.get("validation.val_split_mode") == "manual" and v["validation.manual_data_root"] is None,
     "manual takes its pictures from a folder. Set manual_data_root"),
)  # fmt: skip


_NO_CLASS = "without class_data_root there is no prior preservation"
_NO_EMA = "without ema_decay_rate no average is kept"
_FROZEN = "the text encoder is not trained"
_NO_RESUME = "nothing is resumed"

# A setting → when it has no effect → why. Looked at only where it is stated and is not the default.
WITHOUT_EFFECT: tuple[tuple[str, Callable[[Values], bool], str], ...] = (
    ("base_model_revision", lambda v: Path(v["base_model"]).is_absolute(), "base_model is not from a hub"),
    ("grad_accum", lambda v: v["global_batch_size"] is not None, "it follows from global_batch_size"),
    ("class_prompt", lambda v: v["class_data_root"] is None, _NO_CLASS),
    ("prior_loss_weight", lambda v: v["class_data_root"] is None, _NO_CLASS),
    ("class_data_root", lambda v: v["prior_loss_weight"] == 0, "prior_loss_weight is 0"),
    ("huber_delta", lambda v: v["loss_type"] == "mse", "loss_type is mse"),
    ("ema_update_interval", lambda v: v["ema_decay_rate"] is None, _NO_EMA),
    ("ema_use", lambda v: v["ema_decay_rate"] is None, _NO_EMA),
    ("ema_device", lambda v: v["ema_decay_rate"] is None, _NO_EMA),
    ("save_ckpt_dir", lambda v: not v["save_single_file"], "save_single_file is false"),
    ("save_dtype", lambda v: not v["save_single_file"], "save_single_file is false"),
    ("resume_changed", lambda v: v["resume"] is None, _NO_RESUME),
    ("accept_data_changes", lambda v: v["resume"] is None, _NO_RESUME),
    ("process_timeout_minutes", lambda v: v[PROCESSES] == 1, "there is one process"),
    ("sample_steps", lambda v: v["sample_prompts"] is None and v["sample_steps"] != 0,
     "without sample_prompts there are no previews"),
    ("sample_prompts", lambda v: v["sample_steps"] == 0, "sample_steps is 0: there are no previews"),
    ("validate_every_n_steps", lambda v: v["validation_config"] is None, "there is no validation_config"),
    ("validation.manual_data_root", lambda v: v["validation.val_split_mode"] != "manual",
     "val_split_mode is not manual"),
    ("validation.auto_split_proportion", lambda v: v["validation.val_split_mode"] != "automatic",
     "val_split_mode is not automatic"),
    ("validation.stabilize_split_proportion", lambda v: not v["validation.stabilize_training_loss"],
     "stabilize_training_loss is false"),
    # beside an lr of the text encoder's own: parts.py
    (f"optimizer.{SCALE}", lambda v: v["disable_textenc_training"] and TEXT_ENCODER + "lr" in v[INHERITED], _FROZEN),
    *((FREEZING + key, lambda v: v["disable_textenc_training"], _FROZEN)
      for key in ("unfreeze_last_n_layers", "freeze_embeddings", "freeze_final_layer_norm")),
)  # fmt: skip

# A key of a part's optimizer → when it has no effect, from the part's values → why. A key of base's is without effect
# only where the text encoder does not inherit it, or has no use for it either.
PART_WITHOUT_EFFECT: tuple[tuple[str, Callable[[Values], bool], str], ...] = (
    ("lr_warmup_steps", lambda p: p["lr_scheduler"] == "constant",
     "lr_scheduler is constant (constant_with_warmup has a warm-up)"),
    ("lr_decay_steps", lambda p: p["lr_scheduler"] in CONSTANT, "lr_scheduler is constant"),
    ("no_decay_on_norms", lambda p: p["weight_decay"] == 0, "weight_decay is 0"),
)  # fmt: skip
NOT_TRAINED = {BASE: "the UNet is not trained, and the text encoder has its own", TEXT_ENCODER: _FROZEN}

# What is asked of a part's optimizer → the setting that asks → the table's reason against it
DEMANDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("clip_grad_norm", lambda value: value is not None, "cannot_clip"),
    ("fused_backward", lambda value: value, "cannot_fuse"),
    ("weights_dtype", lambda value: value == "bfloat16", "cannot_round"),
    ("lr_scheduler", lambda value: value not in CONSTANT, "cannot_schedule"),
)
