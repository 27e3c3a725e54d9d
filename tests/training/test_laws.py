"""The laws of a run, on a tiny model in this process: 6 steps = 3 + resume + 3, and what must change nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from everydream.optim.table import ROWS
from tests.tiny import make_pictures
from tests.training.runs import assert_same_tensors, lines, metrics, only_run, options, start, tensors


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder, 7, captions=[f"a thing, number {i}, red" for i in range(7)])
    return folder


def straight_and_broken(model: Path, pictures: Path, folder: Path, **settings: Any) -> tuple[Path, Path]:
    """6 steps in one go; and 6 of which a run of 3 was resumed."""
    straight = options(model, pictures, folder / "straight", max_steps=6, lr_decay_steps=None, **settings)
    assert start(*straight) == 0
    broken = options(model, pictures, folder / "broken", max_steps=6, save_every_n_steps=3, **settings)
    assert start(*broken) == 0
    run = only_run(folder / "broken")
    shutil.rmtree(run / "checkpoints" / "step-0000000006")
    assert start(*broken, "--resume", "latest") == 0
    return only_run(folder / "straight"), run


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion"])
def test_six_steps_are_three_and_resume_and_three(
    optimizer: str, tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    file = tmp_path / "optimizer.json"
    file.write_text(f'{{"optimizer": "{optimizer}"}}')
    settings = {"optimizer_config": file, "ema_decay_rate": 0.9, "grad_accum": 2, "flip_p": 0.5, "shuffle_tags": True,
                "clip_grad_norm": 1.0, "write_schedule": True}  # fmt: skip
    straight, broken = straight_and_broken(tiny_model, pictures, tmp_path, **settings)
    name = "checkpoints/step-0000000006"
    assert_same_tensors(tensors(straight / name), tensors(broken / name))
    assert metrics(straight) == metrics(broken)
    assert lines(straight / "schedule.jsonl") == lines(broken / "schedule.jsonl")


def test_the_mission_rows_are_in_the_table() -> None:
    assert {"adamw", "adamw8bit", "lion"} <= set(ROWS)
