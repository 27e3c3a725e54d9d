"""Whole runs on the tiny model: what validation, EMA and class pictures change, and what they leave to the bit."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.tiny import make_pictures

pytestmark = pytest.mark.launch

# One process for all runs: most of a run's time would go into imports.
CODE = """
import json, sys
from everydream.config.resolve import resolve
from everydream.training.build import run
sys.exit(max(run(resolve(argv, {})) for argv in json.loads(sys.argv[1])))
"""
EVERYTHING = (
    "--loss_type mse_huber --huber_delta 0.5 --min_snr_gamma 5 --zero_frequency_noise_ratio 0.05 "
    "--pyramid_noise_discount 0.5 --timestep_start 10 --timestep_end 900 --embedding_perturbation 1"
)


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders by name, each of four updates of two pictures."""
    folder = tmp_path_factory.mktemp("runs")
    make_pictures(folder / "subject", 6, captions="sks star {i}")
    make_pictures(folder / "class", 2, captions="red star", seed=1)
    make_pictures(folder / "extra", 3, captions="star {i}", seed=2)
    (folder / "optimizer.json").write_text('{"optimizer": "adamw", "lr": 1e-3}')
    validation = {"val_split_mode": "none", "extra_manual_datasets": {"other": "extra"}, "every_n_steps": 2}
    (folder / "validation.json").write_text(json.dumps({**validation, "stabilize_training_loss": True}))
    prior = f"--class_data_root {folder}/class --class_prompt star --num_class_images 4"
    options = {
        "plain": "",
        "validated": f"--validation_config {folder}/validation.json --ema_decay_rate 0.9",
        "prior_0": f"{prior} --prior_loss_weight 0",
        "prior_half": f"{prior} --prior_loss_weight 0.5",
        "everything": EVERYTHING,
    }
    common = (
        f"--base_model {tiny_model} --data_root {folder}/subject --resolution 64 --batch_size 2 --max_steps 4 "
        f"--logdir {folder}/logs --cache_dir {folder}/cache --optimizer_config {folder}/optimizer.json --log_step 1 "
        "--no_tensorboard --no_save_single_file --quiet --project_name"
    ).split()
    argvs = [[*common, name, *more.split()] for name, more in options.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", CODE, json.dumps(argvs)], check=True, env=environment)
    return {name: next((folder / "logs").glob(f"{name}-*")) for name in options}


def weights(run: Path) -> dict[str, bytes]:
    (checkpoint,) = (run / "checkpoints").iterdir()
    names = ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
    return {name: (checkpoint / "model" / name).read_bytes() for name in names}


def metrics(run: Path, key: str) -> dict[int, Any]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[key] for line in lines if key in line}


def test_validation_and_ema_leave_the_training_to_the_bit(runs: dict[str, Path]) -> None:
    assert weights(runs["validated"]) == weights(runs["plain"])
    for key in ("loss", "grad_norm_unet", "grad_norm_text_encoder"):
        assert metrics(runs["validated"], key) == metrics(runs["plain"], key)
        assert sorted(metrics(runs["plain"], key)) == [1, 2, 3, 4]


def test_validation_is_measured_at_the_start_when_due_and_at_the_end(runs: dict[str, Path]) -> None:
    for key in ("loss_val_other", "loss_train_fixed"):
        values = metrics(runs["validated"], key)
        assert {0, 2, 4} <= values.keys()
        assert all(map(math.isfinite, values.values())) and values[4] < values[0]
    assert metrics(runs["validated"], "loss_val") == metrics(runs["plain"], "loss_val_other") == {}


def test_the_average_is_saved_as_float32_and_lags_behind_the_weights(runs: dict[str, Path], tiny_model: Path) -> None:
    (checkpoint,) = (runs["validated"] / "checkpoints").iterdir()
    average = load_file(checkpoint / "ema.safetensors")
    part, file = "unet", "unet/diffusion_pytorch_model.safetensors"
    end, start = load_file(checkpoint / "model" / file), load_file(tiny_model / file)
    moved = {n: (v - start[n]).norm() for n, v in end.items() if (v - start[n]).norm() > 1e-3}
    assert len(moved) > 100
    lags = [(average[f"{part}.{n}"] - start[n]).norm() / distance for n, distance in moved.items()]
    assert all(str(value.dtype) == "torch.float32" for value in average.values())
    assert all(0 < lag < 1 for lag in lags)


def test_class_pictures_of_weight_0_leave_the_training_to_the_bit(runs: dict[str, Path]) -> None:
    assert weights(runs["prior_0"]) == weights(runs["plain"])
    assert metrics(runs["prior_0"], "loss") == metrics(runs["plain"], "loss")
    assert metrics(runs["prior_0"], "loss_prior") == {}


def test_class_pictures_are_made_where_missing_and_weigh(runs: dict[str, Path]) -> None:
    pictures = sorted(path.name for path in (runs["plain"].parent.parent / "class").glob("*.png"))
    assert pictures == [*(f"class-00000{i}-seed-555.png" for i in range(2)), "picture_000.png", "picture_001.png"]
    assert sorted(metrics(runs["prior_half"], "loss_prior")) == [1, 2, 3, 4]
    assert metrics(runs["prior_half"], "class_images_seen") == {1: 2, 2: 4, 3: 6, 4: 8}
    assert metrics(runs["prior_half"], "images_seen") == metrics(runs["plain"], "images_seen")
    assert metrics(runs["prior_half"], "loss")[1] == metrics(runs["plain"], "loss")[1], "the same subject pictures"
    assert weights(runs["prior_half"]) != weights(runs["plain"])


def test_all_options_of_the_objective_work_together(runs: dict[str, Path]) -> None:
    values = metrics(runs["everything"], "loss")
    assert sorted(values) == [1, 2, 3, 4] and all(map(math.isfinite, values.values()))
    assert weights(runs["everything"]) != weights(runs["plain"])
