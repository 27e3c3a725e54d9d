"""Whole runs on a card: 4 updates are 2 + resume + 2, to the bit with `deterministic`.

Each law is run on the CPU too, for a part of the rows: the tests themselves are known to be right without a card.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import make_pictures
from tests.training.runs import assert_same_tensors, lines, metrics, only_run, options, start, tensors

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
STEPS = 4

# The settings, and whether the CPU runs them: compiling takes it a minute, fp16 it has not.
EXACT: dict[str, tuple[dict[str, Any], bool]] = {
    "adamw": ({"optimizer": "adamw"}, True),
    "adamw8bit": ({"optimizer": "adamw8bit"}, True),
    "muon": ({"optimizer": "muon"}, True),  # its check multiplies matrices
    "adamw, bf16 autocast": ({"optimizer": "adamw", "mixed_precision": "bf16"}, True),
    "adamw8bit, bf16 weights": ({"optimizer": "adamw8bit", "weights_dtype": "bfloat16"}, True),
    "fused backward": ({"optimizer": "adamw", "fused_backward": True, "clip_grad_norm": None}, True),
    "checkpointing, average": ({"gradient_checkpointing": True, "ema_decay_rate": 0.9}, True),
    "fp16": ({"optimizer": "adamw", "mixed_precision": "fp16"}, False),
    "compile": ({"optimizer": "adamw", "compile": True}, False),
}


def cases(rows: dict[str, tuple[dict[str, Any], bool]]) -> list[Any]:
    on_card = [pytest.param("cuda", name, marks=pytest.mark.gpu) for name in rows]
    return [("cpu", name) for name, (_, on_cpu) in rows.items() if on_cpu] + on_card


@pytest.fixture(autouse=True)
def device_is(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run takes the card where there is one: hide it from the CPU's half."""
    if request.node.callspec.params["device"] == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    make_pictures(tmp_path / "pictures", 5, captions="a thing, number {i}")
    return tmp_path / "pictures"


def words(model: Path, pictures: Path, folder: Path, *, optimizer: str = "adamw", **settings: Any) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "optimizer.json").write_text(f'{{"optimizer": "{optimizer}"}}')
    chosen = {"optimizer_config": folder / "optimizer.json", "max_steps": STEPS, "clip_grad_norm": 1.0, **settings}
    return options(model, pictures, folder, **chosen)


def end_of(folder: Path) -> Path:
    return only_run(folder) / "checkpoints" / f"step-{STEPS:010d}"


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(only_run(folder)) if "loss" in line]


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns itself
@pytest.mark.parametrize(("device", "name"), cases(EXACT))
def test_four_updates_are_two_and_resume_and_two(
    device: str, name: str, tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    settings = {**EXACT[name][0], "deterministic": True}
    assert start(*words(tiny_model, pictures, tmp_path / "straight", **settings)) == 0
    broken = words(tiny_model, pictures, tmp_path / "broken", save_every_n_steps=2, **settings)
    assert start(*broken) == 0
    shutil.rmtree(end_of(tmp_path / "broken"))
    assert start(*broken, "--resume", "latest") == 0
    assert_same_tensors(tensors(end_of(tmp_path / "straight")), tensors(end_of(tmp_path / "broken")))
    assert metrics(only_run(tmp_path / "straight")) == metrics(only_run(tmp_path / "broken"))
    state = json.loads((end_of(tmp_path / "straight") / "state.json").read_bytes())
    assert len(state["skipped_steps"]) < STEPS, "fp16 that only looks for its scale has trained nothing"


# Two micro-batches an update, whose gradients a CUDA graph may not keep; and one, where it does.
MAX = {"class pictures": {"class_prompt": "a thing"}, "accumulation": {"grad_accum": 2}, "one backward": {}}


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns itself
@pytest.mark.parametrize("name", MAX)
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.long), DEVICES[1]])
def test_compiled_to_the_utmost_it_learns_as_uncompiled(
    device: str, name: str, tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    settings = dict(MAX[name])
    if "class_prompt" in settings:
        make_pictures(tmp_path / "class", 3, seed=9)
        settings |= {"class_data_root": tmp_path / "class"}
    settings |= {"optimizer": "sgd", "lr": 1e-2, "allow_tf32": False, "max_steps": 8}
    assert start(*words(tiny_model, pictures, tmp_path / "plain", **settings)) == 0
    assert start(*words(tiny_model, pictures, tmp_path / "max", compile="max", **settings)) == 0
    assert losses(tmp_path / "max") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)
    if (device, name) == ("cuda", "one backward"):  # inductor leaves graphs out without a word
        assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_background_save_is_the_waiting_one_while_training_goes_on(
    device: str, tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    for way in (True, False):
        words_ = words(tiny_model, pictures, tmp_path / str(way), save_every_n_steps=1, ema_decay_rate=0.9,
                       background_save=way, deterministic=True, optimizer="adamw8bit")  # fmt: skip
        assert start(*words_) == 0
    for step in range(1, STEPS + 1):
        name = f"checkpoints/step-{step:010d}"
        assert_same_tensors(tensors(only_run(tmp_path / "True") / name), tensors(only_run(tmp_path / "False") / name))
    saved = [line for line in lines(only_run(tmp_path / "True") / "events.jsonl") if line["kind"] == "saved"]
    assert len(saved) == STEPS
