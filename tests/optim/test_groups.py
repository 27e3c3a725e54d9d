"""Each trainable parameter is in exactly one group; what is frozen is in none; the same from shapes alone."""

from __future__ import annotations

import pytest
import torch

from everydream.errors import ConfigError
from everydream.optim import groups
from tests.optim.problem import Net

LAYERS = 3
ENCODER = [
    "text_model.embeddings.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight",
    *(
        f"text_model.encoder.layers.{i}.{leaf}"
        for i in range(LAYERS)
        for leaf in ("mlp.fc1.weight", "layer_norm1.bias")
    ),
    "text_model.final_layer_norm.weight",
    "text_model.final_layer_norm.bias",
]
EMBEDDINGS, NORM = set(ENCODER[:2]), set(ENCODER[-2:])


def layers(*numbers: int) -> set[str]:
    return {name for name in ENCODER if name.startswith(tuple(f"text_model.encoder.layers.{i}." for i in numbers))}


def test_one_group_by_default_in_the_order_given() -> None:
    net = Net()
    (group,) = groups.split(net.named_parameters(), "unet", 0.01, lr=1e-6)
    assert group.names == tuple(name for name, _ in net.named_parameters())
    assert (group.tensors, group.parameters) == (8, sum(p.numel() for p in net.parameters()))
    groups.guard([group], {"unet": dict(net.named_parameters())})


def test_norms_and_biases_are_apart_and_do_not_decay() -> None:
    norms, rest = groups.split(Net().named_parameters(), "unet", 0.01, no_decay_on_norms=True)
    assert (norms.weight_decay, rest.weight_decay) == (0.0, 0.01)
    assert set(norms.names) == {"conv.bias", "norm.weight", "norm.bias", "wide.bias", "narrow.bias"}
    assert set(rest.names) == {"conv.weight", "wide.weight", "narrow.weight"}


def test_shapes_alone_give_the_same_groups_and_the_same_table() -> None:
    named = dict(Net().named_parameters())
    shapes = {name: tuple(p.shape) for name, p in named.items()}
    for no_decay in (False, True):
        real = groups.split(named.items(), "unet", 0.01, no_decay, lr=1e-6)
        bare = groups.split(shapes.items(), "unet", 0.01, no_decay, lr=1e-6)
        assert [g.names for g in real] == [g.names for g in bare]
        assert [g.shapes for g in real] == [g.shapes for g in bare]
        assert groups.table_lines(real) == groups.table_lines(bare)


def test_the_table_names_part_group_counts_lr_and_decay() -> None:
    lines = groups.table_lines(
        groups.split({"a.weight": (10, 300), "a.bias": (10,)}.items(), "unet", 0.01, True, lr=1e-6)
    )
    assert lines[0].split() == ["part", "group", "tensors", "parameters", "lr", "weight", "decay"]
    assert lines[1].split() == ["unet", "norms", "and", "biases", "1", "10", "1e-06", "0"]
    assert lines[2].split() == ["unet", "weights", "1", "3,000", "1e-06", "0.01"]


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no_decay_on_norms"):
        groups.split({"a.weight": (10, 10)}.items(), "unet", 0.01, no_decay_on_norms=True)


def test_nothing_left_to_train_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no parameter is left"):
        groups.split({"a.weight": (10, 10)}.items(), "unet", frozen={"a.weight"})


def test_guards_catch_a_parameter_in_two_groups_in_none_or_frozen() -> None:
    net = Net()
    named = dict(net.named_parameters())
    (group,) = groups.split(named.items(), "unet")
    with pytest.raises(AssertionError, match="in two groups"):
        groups.guard([group, group], {"unet": named})
    (fewer,) = groups.split(named.items(), "unet", frozen={"wide.weight"})
    with pytest.raises(AssertionError, match=r"wide\.weight is trainable but in no group"):
        groups.guard([fewer], {"unet": named})
    groups.freeze(named, {"wide.weight"})
    groups.guard([fewer], {"unet": named})
    with pytest.raises(AssertionError, match="in a group but frozen"):
        groups.guard([group], {"unet": named})


def test_freezing_turns_gradients_off_and_on() -> None:
    named = dict(Net().named_parameters())
    groups.freeze(named, {"wide.weight"})
    assert {name for name, p in named.items() if not p.requires_grad} == {"wide.weight"}
    groups.freeze(named, set())
    assert all(p.requires_grad for p in named.values())


@pytest.mark.parametrize(
    "options, frozen",
    [
        ({}, set()),
        ({"unfreeze_last_n_layers": 1}, EMBEDDINGS | layers(0, 1)),
        ({"unfreeze_last_n_layers": 3}, EMBEDDINGS),
        ({"unfreeze_last_n_layers": 0}, EMBEDDINGS | layers(0, 1, 2)),
        ({"freeze_embeddings": True}, EMBEDDINGS),
        ({"freeze_final_layer_norm": True}, NORM),
        ({"unused_layers": 1}, layers(2)),
        ({"unused_layers": 1, "unfreeze_last_n_layers": 1}, EMBEDDINGS | layers(0, 2)),
        ({"unfreeze_last_n_layers": 0, "freeze_final_layer_norm": True}, set(ENCODER)),
    ],
)
def test_text_encoder_freezing(options: dict[str, int], frozen: set[str]) -> None:
    assert groups.freeze_text_encoder(ENCODER, layers=LAYERS, **options) == frozen  # type: ignore[arg-type]


def test_more_layers_than_there_are_is_an_error_with_the_range() -> None:
    with pytest.raises(ConfigError, match="0 to 2"):
        groups.freeze_text_encoder(ENCODER, layers=LAYERS, unused_layers=1, unfreeze_last_n_layers=3)


def test_unknown_names_are_our_bug() -> None:
    with pytest.raises(AssertionError, match="no parameter is named"):
        groups.freeze_text_encoder(["model.layers.0.weight"], layers=1, freeze_embeddings=True)


def test_a_frozen_parameter_gets_no_gradient_and_does_not_move() -> None:
    net = Net()
    named = dict(net.named_parameters())
    groups.freeze(named, {"conv.weight"})
    net(torch.ones(1, 4, 8, 8)).sum().backward()
    assert named["conv.weight"].grad is None
