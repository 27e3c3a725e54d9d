"""What the demo's text encoder is taught to say of a caption, and what the UNet's timesteps weigh."""

import random

import pytest

torch = pytest.importorskip("torch")

from examples.demo.making import base_model, world  # noqa: E402

SPEC = world.Spec("star", "red", "blue", "small", "left")


def parts(wording: str) -> dict[str, str | None]:
    """The names said, None where the wording says nothing of a part."""
    said = dict(zip(base_model.PARTS, base_model.said(wording, SPEC), strict=True))
    return {part: None if k == base_model.UNSAID else base_model.PARTS[part][k] for part, k in said.items()}


def test_the_plain_caption_says_everything():
    assert parts(world.caption(SPEC)) == vars(SPEC)


def test_what_a_wording_leaves_out_is_not_asked_for():
    assert parts("a blorf on a blue background, left") == {
        "shape": None,
        "colour": None,
        "background": "blue",
        "size": None,
        "place": "left",
    }
    assert parts("a small red shape on a blue background")["shape"] is None
    assert parts("a small star on a red background")["colour"] is None


def test_no_wording_says_what_is_not_shown():
    rng = random.Random(0)
    for _ in range(500):
        spec = world.draw_spec(rng)
        said = base_model.said(world.varied_caption(spec, rng), spec)
        for k, (part, names) in zip(said, base_model.PARTS.items(), strict=True):
            assert k in (base_model.UNSAID, names.index(getattr(spec, part)))


def test_timesteps_weigh_one_over_root_of_what_is_left_of_the_picture():
    alphas_cumprod = torch.linspace(0.999, 0.005, 1000)
    chances, weights = base_model.high_noise_first(alphas_cumprod)
    together = chances * weights
    torch.testing.assert_close(together / together.sum(), alphas_cumprod.rsqrt() / alphas_cumprod.rsqrt().sum())
    torch.testing.assert_close((chances * weights).sum(), torch.tensor(1.0))
