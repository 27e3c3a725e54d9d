"""Which settings a resume may change: each is SAFE, FIXED or DERIVED, and a test holds the lists complete.

FIXED settings decide what is trained on what, and how; all of optimizer.* is. SAFE ones say how long, how fast, and
what is written down. The paths optimizer_config and validation_config are SAFE: what counts is in the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everydream.config.sources import DRAWN, show

Values = Mapping[str, Any]

_SAFE = """
project_name run_name logdir max_epochs max_steps process_timeout_minutes allow_pickle num_workers scan_workers
cache_latents cache_dir bad_images max_image_megapixels optimizer_config gradient_checkpointing attn_type compile
allow_tf32 deterministic fused_backward ema_use ema_device save_every_n_epochs save_every_n_steps ckpt_every_n_minutes
keep_last save_ckpt_dir save_single_file save_dtype background_save sample_prompts sample_steps validation_config
validate_every_n_steps log_step tensorboard wandb write_schedule profile_steps plugins quiet verbose
validation.extra_manual_datasets validation.manual_data_root validation.stabilize_training_loss
validation.stabilize_split_proportion validation.every_n_epochs validation.every_n_steps validation.batch_size
"""
_FIXED = """
seed base_model base_model_revision data_root resolution batch_size cond_dropout flip_p crop_jitter shuffle_tags
keep_tags alpha_color masked_loss max_caption_chunks instance_prompt class_data_root class_prompt num_class_images
prior_loss_weight disable_unet_training disable_textenc_training clip_skip clip_grad_norm loss_type huber_delta
min_snr_gamma zero_frequency_noise_ratio pyramid_noise_discount enable_zero_terminal_snr timestep_start timestep_end
embedding_perturbation prediction_type mixed_precision weights_dtype ema_decay_rate ema_update_interval
"""
# compared as what they come to: _micro_batches, _held_out
_DERIVED = """
grad_accum global_batch_size validation.val_split_mode validation.auto_split_proportion validation.seed
"""
SAFE, FIXED, DERIVED = (frozenset(names.split()) for names in (_SAFE, _FIXED, _DERIVED))


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Between two records (`Resolved.record()`): lines for the safe changes, and for those that a resume refuses.

    Settings that one of the two does not know (another version's) do not count.
    """
    was, now = _values(old), _values(new)
    safe: list[str] = []
    refused: list[str] = []
    for key, value in now.items():
        drawn = key == "seed" and new["settings"]["seed"]["origin"] == DRAWN  # the run keeps the one it drew first
        # A folder that is gone may look like a hub's name; a resume does not need it.
        gone = key == "base_model" and str(was.get(key)).endswith(f"/{value}")
        if key in was and was[key] != value and key not in DERIVED and not drawn and not gone:
            (safe if key in SAFE else refused).append(_line(key, was[key], value))
    batch = [_line(key, one, two) for key, one, two in _batch(old, was, new, now) if one != two]
    (safe if _micro_batches(old, was) == _micro_batches(new, now) else refused).extend(batch)
    if _held_out(was) != _held_out(now):
        refused.append(_line("pictures held out for validation", _held_out(was), _held_out(now)))
    return safe, refused


def _values(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entry["value"] for key, entry in record["settings"].items()}


def _line(key: str, before: Any, after: Any) -> str:
    return f"{key}: {show(before)} → {show(after)}"


def _batch(old: Mapping[str, Any], was: Values, new: Mapping[str, Any], now: Values) -> list[tuple[str, Any, Any]]:
    settings = [(key, was.get(key), now.get(key)) for key in ("grad_accum", "global_batch_size")]
    return [*settings, ("processes", old.get("processes", 1), new.get("processes", 1))]


def _micro_batches(record: Mapping[str, Any], values: Values) -> int:
    """In one update, over all processes: the same number means the same updates."""
    if values.get("global_batch_size"):
        return int(values["global_batch_size"]) // int(values["batch_size"])
    return int(values["grad_accum"]) * int(record.get("processes", 1))


def _held_out(values: Values) -> list[Any] | None:
    """What decides which pictures are kept from training: their share and the seed of the draw."""
    if values.get("validation.val_split_mode") != "automatic":
        return None
    return [values["validation.auto_split_proportion"], values["validation.seed"]]
