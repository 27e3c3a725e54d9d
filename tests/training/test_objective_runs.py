"""A whole run on the tiny model with every option of the objective, EMA, and validation on three sets."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.tiny import make_pictures
from tests.training.runs import lines, only_run, options, start

OPTIONS = {
    "loss_type": "mse_huber",
    "huber_delta": 0.5,
    "min_snr_gamma": 5,
    "zero_frequency_noise_ratio": 0.05,
    "pyramid_noise_discount": 0.5,
    "timestep_start": 10,
    "timestep_end": 900,
    "embedding_perturbation": 1,
    "ema_decay_rate": 0.9,
    "max_steps": 4,
    "write_schedule": True,
}


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objective")
    make_pictures(folder / "subject", 8, captions="sks star {i}")
    make_pictures(folder / "extra", 3, captions="star {i}", seed=2)
    validation = {"auto_split_proportion": 0.25, "extra_manual_datasets": {"other": "extra"}, "every_n_epochs": 0}
    file = folder / "validation.json"
    file.write_text(json.dumps({**validation, "every_n_steps": 3, "stabilize_training_loss": True}))
    assert start(*options(tiny_model, folder / "subject", folder, validation_config=file, **OPTIONS)) == 0
    return only_run(folder)


def test_all_options_of_the_objective_work_together(run: Path) -> None:
    losses = {line["step"]: line["loss"] for line in lines(run / "metrics.jsonl") if "loss" in line}
    assert sorted(losses) == [1, 2, 3, 4] and all(map(math.isfinite, losses.values()))
    times = [t for line in lines(run / "schedule.jsonl") for t in line["timesteps"]]
    assert len(times) == 8 and all(10 <= t < 900 for t in times)


def test_held_out_pictures_are_never_trained(run: Path) -> None:
    trained = {name for line in lines(run / "schedule.jsonl") for name in line["samples"]}
    assert len(trained) == 6  # of eight, in four updates of two: every one that was not held out


@pytest.mark.parametrize("name", ["loss_val", "loss_val_other", "loss_train_fixed"])
def test_validation_is_measured_at_the_start_when_due_and_at_the_end(run: Path, name: str) -> None:
    values = {line["step"]: line[name] for line in lines(run / "metrics.jsonl") if name in line}
    assert sorted(values) == [0, 3, 4]
    assert all(map(math.isfinite, values.values())) and values[4] < values[0]


def test_the_average_is_saved_as_float32_and_lags_behind_the_weights(run: Path, tiny_model: Path) -> None:
    (checkpoint,) = (run / "checkpoints").iterdir()
    average = load_file(checkpoint / "ema.safetensors")
    file = "unet/diffusion_pytorch_model.safetensors"
    end, start = load_file(checkpoint / "model" / file), load_file(tiny_model / file)
    moved = {name: distance for name, v in end.items() if (distance := (v - start[name]).norm()) > 1e-3}
    assert len(moved) > 100
    assert all(str(value.dtype) == "torch.float32" for value in average.values())
    assert all(0 < (average[f"unet.{name}"] - start[name]).norm() < distance for name, distance in moved.items())
