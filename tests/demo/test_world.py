"""The demo's world: the same pictures for the same seed, and combinations that no training sees."""

import random
from collections import Counter

import numpy as np
import pytest

from examples.demo.making import creature, rich_pictures, world


def test_rendering_is_a_pure_function_of_its_arguments():
    spec = world.draw_spec(random.Random(3))
    pose = creature.Pose("green", "large", "top")
    for draw in (
        lambda: world.render(spec, (80, 48), seed=5),
        lambda: rich_pictures.render((48, 80), seed=5),
        lambda: creature.render(pose, (96, 64), seed=5),
    ):
        random.seed(1)
        first = draw()
        random.seed(2)
        assert first.tobytes() == draw().tobytes()


def test_another_seed_draws_another_picture():
    spec = world.Spec("star", "red", "blue", "small", "left")
    assert world.render(spec, seed=1).tobytes() != world.render(spec, seed=2).tobytes()


@pytest.mark.parametrize("held_out", [False, True])
def test_specs_are_drawn_from_their_side_of_the_border(held_out: bool):
    rng = random.Random(0)
    specs = [world.draw_spec(rng, held_out) for _ in range(2000)]
    assert {world.is_held_out(spec) for spec in specs} == {held_out}
    assert all(spec.colour != spec.background for spec in specs)


def test_about_one_triple_in_eight_is_held_out_and_every_word_stays_common():
    triples = [
        world.Spec(shape, colour, background, "small", "left")
        for shape in world.SHAPES
        for colour in world.COLOURS
        for background in world.COLOURS
        if colour != background
    ]
    held_out = [spec for spec in triples if world.is_held_out(spec)]
    assert 0.1 < len(held_out) / len(triples) < 0.15
    for part, words in (("shape", world.SHAPES), ("colour", world.COLOURS), ("background", world.COLOURS)):
        counts = Counter(getattr(spec, part) for spec in held_out)
        assert set(counts) == set(words)


@pytest.mark.parametrize("place", world.PLACES)
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (80, 48)])
def test_things_stand_where_the_caption_says(place: str, size: tuple[int, int]):
    spec = world.Spec("circle", "white", "black", "small", place)
    pixels = np.asarray(world.render(spec, size).convert("L"), float) > 128
    rows, columns = np.nonzero(pixels)
    x, y = columns.mean() / size[0] - 0.5, rows.mean() / size[1] - 0.5
    across, down = ("left", "right")[int(x > 0)], ("top", "bottom")[int(y > 0)]
    seen = "middle" if max(abs(x), abs(y)) < 0.1 else across if abs(x) > abs(y) else down
    assert seen == place


def test_made_up_words_are_never_the_subjects():
    """They have four letters or more, its token has three."""
    rng = random.Random(0)
    spec = world.draw_spec(rng)
    words = " ".join(world.varied_caption(spec, rng) for _ in range(3000)).replace(",", " ").split()
    assert creature.TOKEN not in words
    assert "creature" not in words


def test_the_bench_asks_for_what_no_training_has_seen():
    from bench import quality

    trained = {creature.caption(pose) for pose, _ in creature.PICTURES}
    assert not trained & set(quality.subject_prompts(64))
    assert all(world.is_held_out(spec) for spec in quality.base_specs(64, seed=1))
