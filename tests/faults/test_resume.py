"""A run interrupted at any step and resumed is the run that was not interrupted, bit for bit.

Weights, average, optimizer, state, every line of metrics.jsonl and schedule.jsonl but the times.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everydream.optim import table
from tests.faults.conftest import Inject
from tests.faults.running import World, assert_same_run, lines, newest_run, stop

Interrupted = Callable[..., Path]
LR = {"sgd": 0.1, "prodigy": 1.0, "adafactor": 3e-2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def interrupted(world: World, injected: Inject) -> Callable[..., Path]:
    def run(name: str, stops: list[int], **settings: Any) -> Path:
        folder = assert_interruption_leaves_no_trace(world, name, stops, **settings)
        injected("stop and resume, bit for bit", len(stops))
        return folder

    return run


def assert_interruption_leaves_no_trace(world: World, name: str, stops: list[int], **settings: Any) -> Path:
    """Once without a stop, once with a signal after each of `stops`; returns the interrupted run's folder."""
    straight, stopped = (world.settings(f"{name}-{kind}", **settings) for kind in ("straight", "stopped"))
    assert world.train(straight) == 0
    for n, step in enumerate(stops):
        assert world.train(stopped, *(["--resume", "latest"] if n else []), at={step: stop()}) == 143
    assert world.train(stopped, "--resume", "latest") == 0
    folder = newest_run(world.logdir(stopped))
    assert_same_run(newest_run(world.logdir(straight)), folder)
    return folder


@pytest.mark.parametrize("name", table.ROWS)
def test_every_optimizer_resumes_bit_for_bit(interrupted: Interrupted, name: str) -> None:
    """Stopped where the other run does not save, in the middle of an epoch and of the warm-up."""
    optimizer = {"optimizer": name, "lr": LR.get(name, 1e-3), "lr_warmup_steps": 5}
    optimizer["lr_scheduler"] = "constant_with_warmup"
    interrupted(name, [3], optimizer=optimizer, max_steps=5, save_every_n_steps=4)


EVERYTHING: dict[str, Any] = {
    "grad_accum": 2, "cond_dropout": 0.3, "shuffle_tags": True, "flip_p": 0.5, "crop_jitter": 0.1,
    "class_data_root": "class", "class_prompt": "a star", "prior_loss_weight": 0.5, "min_snr_gamma": 5.0,
    "ema_decay_rate": 0.9, "clip_grad_norm": 1.0, "write_schedule": True, "log_step": 2,
    "sample_prompts": "prompts.json", "sample_steps": 3, "max_steps": 7, "save_every_n_steps": None,
}  # fmt: skip


def test_everything_at_once_resumes_bit_for_bit(world: World, interrupted: Interrupted) -> None:
    """Accumulation, class pictures, augmentation, average, previews, validation; one stop where a preview is due."""
    validation = world.folder / "validation.json"
    validation.write_text('{"every_n_epochs": 0, "every_n_steps": 2, "stabilize_training_loss": true}')
    optimizer = {"optimizer": "adamw", "lr": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 2}
    validating = {"optimizer": optimizer, "validation_config": str(validation)}
    folder = interrupted("everything", [1, 3], **validating, **EVERYTHING)
    kinds = [event["kind"] for event in lines(folder / "events.jsonl")]
    assert kinds.count("resume") == 2
    assert [line["step"] for line in lines(folder / "metrics.jsonl") if "loss" in line] == [2, 4, 6]


def test_caches_leave_no_trace(interrupted: Interrupted) -> None:
    settings = {"cache_latents": True, "disable_textenc_training": True, "flip_p": 0.5}
    interrupted("caches", [3], **settings)


def test_bfloat16_weights_resume_bit_for_bit(interrupted: Interrupted) -> None:
    interrupted("bfloat16", [3], weights_dtype="bfloat16", mixed_precision="bf16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_backward_resumes_bit_for_bit(interrupted: Interrupted, dtype: str) -> None:
    interrupted(f"fused-{dtype}", [3], fused_backward=True, weights_dtype=dtype)


def test_lines_after_the_checkpoint_are_superseded_not_doubled(world: World) -> None:
    """Killed after steps that no checkpoint has: they come again, once."""
    config = world.settings("superseded", max_steps=6, save_every_n_steps=4)

    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    with pytest.raises(Killed):
        world.train(config, at={6: kill})
    folder = newest_run(world.logdir(config))
    with open(folder / "events.jsonl", "ab") as events:
        events.write(b'{"step": 5, "kind": "gone"}\n{"torn')
    assert world.train(config, "--resume", "latest") == 0
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert "gone" not in [event["kind"] for event in lines(folder / "events.jsonl")]
