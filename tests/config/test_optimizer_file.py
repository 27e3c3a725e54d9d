"""optimizer.json: flat and nested, inheritance, hyperparameters an optimizer does not have, freezing."""

from __future__ import annotations

from typing import Any

import pytest

from everydream.config.parts import KEYS
from everydream.config.resolve import Resolved
from everydream.optim.table import ROWS
from tests.config.conftest import Desk


def with_file(desk: Desk, content: dict[str, Any], *argv: str, **train: Any) -> Resolved:
    desk.write("optimizer.json", content)
    return desk.resolve(*argv, optimizer_config="optimizer.json", **train)


def test_without_a_file_the_documented_defaults_hold(desk: Desk) -> None:
    for part in desk.resolve().optimizers.values():
        assert (part.optimizer, part.lr, part.betas, part.epsilon, part.weight_decay) == (
            "adamw8bit", 1e-6, (0.9, 0.999), 1e-8, 0.01,
        )  # fmt: skip
        assert (part.lr_scheduler, part.lr_warmup_steps, part.lr_decay_steps) == ("constant", 0, None)
        assert (part.args, part.no_decay_on_norms) == ({}, False)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_without_more_has_its_own_defaults(desk: Desk, name: str) -> None:
    row = ROWS[name]
    for part in with_file(desk, {"optimizer": name}).optimizers.values():
        assert {key: getattr(part, key) for key in ("lr", "betas", "epsilon", "weight_decay")} == {
            key: row.defaults.get(key) for key in ("lr", "betas", "epsilon", "weight_decay")
        }


def test_flat_and_nested_say_the_same(desk: Desk) -> None:
    part = {"optimizer": "adamw", "lr": 3e-6, "betas": [0.8, 0.9], "epsilon": 0, "args": {"amsgrad": True}}
    flat = with_file(desk, {"doc": {"lr": "comment"}, "-lr": 1, "_x": 2, **part})
    nested = with_file(desk, {"base": part})
    assert flat.optimizers == nested.optimizers
    assert flat.optimizers["unet"].betas == (0.8, 0.9)
    assert flat.optimizers["unet"].epsilon == 0
    assert flat.optimizers["text_encoder"].args == {"amsgrad": True}


def test_null_inherits_and_zero_does_not(desk: Desk) -> None:
    content = {
        "base": {"lr": 1e-4, "weight_decay": 0.1, "lr_warmup_steps": 5, "lr_scheduler": "cosine"},
        "text_encoder_overrides": {"lr": 0, "weight_decay": 0, "lr_warmup_steps": 0, "lr_scheduler": None},
    }
    text = with_file(desk, content).optimizers["text_encoder"]
    assert (text.lr, text.weight_decay, text.lr_warmup_steps, text.lr_scheduler) == (0, 0, 0, "cosine")


def test_the_scale_follows_the_base_lr_wherever_it_comes_from(desk: Desk) -> None:
    content = {"lr": 1e-6, "text_encoder_lr_scale": 0.5}
    assert with_file(desk, content).optimizers["text_encoder"].lr == 5e-7
    resolved = with_file(desk, content, "--lr", "4e-6")
    assert resolved.optimizers["text_encoder"].lr == 2e-6
    assert resolved.entries["optimizer.text_encoder.lr"].as_json() == {
        "value": 2e-6, "origin": "optimizer.json", "overrides": [{"origin": "command line", "value": 4e-6}],
    }  # fmt: skip
    alone = with_file(desk, {"text_encoder_lr_scale": 0.5}).entries["optimizer.text_encoder.lr"].as_json()
    assert alone == {"value": 5e-7, "origin": "optimizer.json", "overrides": []}


@pytest.mark.parametrize("where", ["optimizer.json", "train.json", "command line"])
def test_a_scale_beside_an_explicit_lr_is_without_effect(desk: Desk, where: str) -> None:
    content: dict[str, Any] = {"base": {"lr": 1e-6}, "text_encoder_lr_scale": 0.5}
    if where == "optimizer.json":
        content["text_encoder_overrides"] = {"lr": 3e-7}
    argv = ["--text_encoder_lr", "3e-7"] if where == "command line" else []
    resolved = with_file(desk, content, *argv, **({"text_encoder_lr": 3e-7} if where == "train.json" else {}))
    assert resolved.optimizers["text_encoder"].lr == 3e-7
    assert resolved.notes == (
        "text_encoder_lr_scale 0.5 from optimizer.json is without effect: "
        f"the text encoder's lr 3e-07 comes from {where}",
    )


def test_hyperparameters_are_inherited_only_by_the_same_optimizer(desk: Desk) -> None:
    base = {"optimizer": "adamw", "betas": [0.5, 0.6], "weight_decay": 0.3, "args": {"amsgrad": True}}
    same = with_file(desk, {"base": base, "text_encoder_overrides": {"epsilon": 1e-6}}).optimizers["text_encoder"]
    assert (same.betas, same.weight_decay, same.epsilon, same.args) == ((0.5, 0.6), 0.3, 1e-6, {"amsgrad": True})
    other = with_file(desk, {"base": base, "text_encoder_overrides": {"optimizer": "lion"}}).optimizers["text_encoder"]
    assert (other.betas, other.weight_decay, other.epsilon, other.args) == ((0.9, 0.99), 0.0, None, {})


def test_a_row_and_its_class_are_the_same_optimizer(desk: Desk) -> None:
    base = {"optimizer": "torch.optim.AdamW", "betas": [0.5, 0.6], "weight_decay": 0.3}
    text = with_file(desk, {"base": base, "text_encoder_overrides": {"optimizer": "adamw"}}).optimizers["text_encoder"]
    assert (text.betas, text.weight_decay) == ((0.5, 0.6), 0.3)


def test_what_is_unused_is_named_as_its_part_names_it(desk: Desk) -> None:
    overrides = {"optimizer": "lion", "epsilon": 1e-6}
    notes = with_file(desk, {"base": {"optimizer": "adamw"}, "text_encoder_overrides": overrides}).notes
    assert "text_encoder_overrides.epsilon 1e-06 from optimizer.json is unused: lion has no epsilon" in notes
    betas = with_file(desk, {"optimizer": "sgd", "betas": [0.5, 0.6]}).notes
    assert betas == ("betas [0.5, 0.6] from optimizer.json is unused: sgd has no betas",)


def test_an_inherited_lr_of_another_optimizer_is_said(desk: Desk) -> None:
    resolved = with_file(desk, {"lr": 1e-6, "text_encoder_overrides": {"optimizer": "prodigy"}})
    assert resolved.optimizers["text_encoder"].lr == 1e-6
    assert resolved.notes == (
        "the text encoder's lr 1e-06 is inherited from adamw8bit; prodigy usually takes 1.0: set text_encoder_lr",
    )


def test_what_an_optimizer_does_not_have_is_said_once(desk: Desk) -> None:
    resolved = with_file(desk, {"optimizer": "lion", "lr": 1e-7, "epsilon": 1e-8, "betas": [0.9, 0.99]})
    assert resolved.notes == ("epsilon 1e-08 from optimizer.json is unused: lion has no epsilon",)
    assert {part.epsilon for part in resolved.optimizers.values()} == {None}
    assert resolved.entries["optimizer.base.epsilon"].as_json() == {
        "value": None, "origin": "default", "overrides": [{"origin": "optimizer.json", "value": 1e-8}],
    }  # fmt: skip


def test_a_class_of_your_own_takes_what_is_stated_and_no_more(desk: Desk) -> None:
    part = with_file(desk, {"optimizer": "my.package.Optimizer", "lr": 1e-3, "betas": [0.9]}).optimizers["unet"]
    assert (part.optimizer, part.betas, part.epsilon, part.weight_decay) == ("my.package.Optimizer", (0.9,), None, None)


def test_constant_has_no_warm_up_and_constant_with_warmup_has(desk: Desk) -> None:
    constant = with_file(desk, {"lr_scheduler": "constant", "lr_warmup_steps": 9, "lr_decay_steps": 50})
    assert constant.notes == (
        "lr_warmup_steps 9 from optimizer.json is without effect: "
        "lr_scheduler is constant (constant_with_warmup has a warm-up)",
        "lr_decay_steps 50 from optimizer.json is without effect: lr_scheduler is constant",
    )
    part = constant.optimizers["unet"]
    assert (part.lr_scheduler, part.lr_warmup_steps, part.lr_decay_steps) == ("constant", 0, None)
    warm = with_file(desk, {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 9})
    assert (warm.notes, warm.optimizers["unet"].lr_scheduler, warm.optimizers["unet"].lr_warmup_steps) == (
        (),
        "constant",
        9,
    )


def test_freezing_is_read(desk: Desk) -> None:
    freezing = {"unfreeze_last_n_layers": 0, "freeze_embeddings": True, "freeze_final_layer_norm": None}
    resolved = with_file(desk, {"base": {}, "text_encoder_freezing": freezing})
    assert resolved.freezing.unfreeze_last_n_layers == 0
    assert resolved.freezing.freeze_embeddings is True
    assert resolved.freezing.freeze_final_layer_norm is False


def test_parts_are_shown_key_by_key_and_only_there(desk: Desk) -> None:
    entries = desk.resolve("--lr", "1e-5").entries
    for key in KEYS:
        assert f"optimizer.base.{key}" in entries
        assert f"optimizer.text_encoder.{key}" in entries
    assert "lr" not in entries
