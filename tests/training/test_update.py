"""What an update leaves to the card and what it leaves behind; its sums are held by the laws and the accumulation."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from everydream.training.profile import NoProfile
from everydream.training.update import Update
from tests.tiny import make_pictures
from tests.training.runs import assert_same_tensors, lines, only_run, options, start, tensors

if TYPE_CHECKING:
    from everydream.training.turns import Trainer

CPU = torch.device("cpu")


def test_the_norms_are_under_way_before_the_flags_are_copied_to_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    update = object.__new__(Update)
    update.accelerator = SimpleNamespace(scaler=None)  # type: ignore[assignment]
    update.ranks = SimpleNamespace(device=CPU, sum=lambda values: values)  # type: ignore[assignment]
    update.stop, update.profile = SimpleNamespace(signum=15), NoProfile()  # type: ignore[assignment]
    update._abandoned, update._sums = False, torch.tensor([2.0, 3.0], dtype=torch.float64)
    update.parameters = {"unet": [], "text_encoder": []}
    update.flags = lambda: order.append("flags") or (True, 2)
    monkeypatch.setattr(update, "norms", lambda: order.append("norms") or torch.tensor([4.0, 5.0]))
    verdict = update.agree()
    assert order == ["norms", "flags"]
    assert (verdict.loss_sum, verdict.prior_sum, verdict.norms) == (2.0, 3.0, {"unet": 4.0, "text_encoder": 5.0})
    assert (verdict.stop_signal, verdict.save_is_due, verdict.failed_saves) == (15, True, 2)


class Spoiler:
    """Makes the second update's gradients NaN, and counts those that are left after each."""

    def after_build(self, trainer: Trainer) -> None:
        weight = next(trainer.denoiser.parameters())
        spoil = lambda gradient: gradient * float("nan") if trainer.state.step == 1 else gradient  # noqa: E731
        weight.register_hook(spoil)

    def after_step(self, trainer: Trainer) -> None:
        left = [p for p in trainer.denoiser.parameters() if p.grad is not None and p.grad.any()]
        kept = sum(p.grad is not None for p in trainer.denoiser.parameters())
        trainer.log.event("left", "", "debug", nonzero=len(left), kept=kept)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_no_gradient_outlives_its_update_made_or_left_out(optimizer: str, tiny_model: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", 4, captions="a thing")
    (tmp_path / "optimizer.json").write_text(f'{{"optimizer": "{optimizer}"}}')
    words = options(tiny_model, tmp_path / "pictures", tmp_path, optimizer_config=tmp_path / "optimizer.json",
                    max_steps=3, plugins="tests.training.test_update.Spoiler")  # fmt: skip
    assert start(*words) == 0
    events = lines(only_run(tmp_path) / "events.jsonl")
    assert [event["step"] for event in events if event["kind"] == "skipped"] == [2]
    left = [event for event in events if event["kind"] == "left"]
    assert [event["nonzero"] for event in left] == [0, 0, 0]
    if optimizer == "adamw8bit":  # adamw's lie in a flat buffer, which stays
        assert [event["kept"] for event in left] == [0, 0, 0]


class LossScale:
    """What fp16 brings along on a card, on a CPU."""

    def after_build(self, trainer: Trainer) -> None:
        trainer.update.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)


def test_the_search_for_a_loss_scale_blames_no_picture(tiny_model: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", 4, captions="a thing")
    (tmp_path / "optimizer.json").write_text('{"optimizer": "adamw"}')
    here = "tests.training.test_update"
    plugins = {"plain": ["Spoiler"], "scaled": ["Spoiler", "LossScale"]}
    for name, chosen in plugins.items():
        (tmp_path / name).mkdir()
        words = options(tiny_model, tmp_path / "pictures", tmp_path / name, max_steps=3,
                        optimizer_config=tmp_path / "optimizer.json",
                        plugins=json.dumps([f"{here}.{one}" for one in chosen]))  # fmt: skip
        assert start(*words) == 0
    skipped = [lines(only_run(tmp_path / name) / "events.jsonl") for name in plugins]
    plain, scaled = ([event for event in events if event["kind"] == "skipped"] for events in skipped)
    assert [(event["step"], event["level"], event["samples"]) for event in plain] == [
        (2, "warning", scaled[0]["samples"])
    ]
    assert [(event["step"], event["level"]) for event in scaled] == [(2, "info")]
    assert "Pictures" in plain[0]["message"] and "loss scale lowered" in scaled[0]["message"]
    weights = [tensors(only_run(tmp_path / name) / "checkpoints" / "step-0000000003") for name in plugins]
    assert_same_tensors(*weights)  # a scale that is a power of two changes no digit
