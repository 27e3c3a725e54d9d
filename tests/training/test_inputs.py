"""What a run loads: with warm caches no network but the one that it trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from everydream.models import sd
from everydream.training.update import Update
from tests.tiny import make_pictures
from tests.training.runs import assert_same_tensors, metrics, only_run, options, start, tensors


def test_a_warm_run_loads_only_what_it_trains_and_is_the_cold_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pictures(tmp_path / "pictures", 5, captions="a thing, number {i}")
    build, built = sd._build, list[str]()
    monkeypatch.setattr(sd, "_build", lambda part, *rest: (built.append(part), build(part, *rest))[1])

    def run(name: str) -> Path:
        built.clear()
        settings = {"cache_dir": tmp_path / "cache", "disable_textenc_training": True, "max_steps": 2,
                    "flip_p": 0.5, "class_data_root": tmp_path / "class", "class_prompt": "a",
                    "num_class_images": 1}  # fmt: skip
        assert start(*options(tiny_model, tmp_path / "pictures", tmp_path / name, **settings)) == 0
        return only_run(tmp_path / name)

    cold = run("cold")
    assert set(built) == {"unet", "vae", "text_encoder"}
    warm = run("warm")
    assert built == ["unet"]
    assert metrics(warm) == metrics(cold)
    name = "checkpoints/step-0000000002"
    assert_same_tensors(tensors(warm / name), tensors(cold / name))


def test_what_is_not_cached_is_loaded_before_the_first_step(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a damaged file ends the run before it has begun."""
    make_pictures(tmp_path / "pictures", 3, captions="a thing, red")
    found = list[bool]()

    class Seen(Update):
        def begin(self, step: int) -> None:
            found.append(self.family.vae is not None and self.family.denoiser.text_encoder is not None)
            super().begin(step)

    monkeypatch.setattr("everydream.training.build.Update", Seen)
    settings = {"crop_jitter": 0.1, "shuffle_tags": True, "disable_textenc_training": True, "max_steps": 1}
    assert start(*options(tiny_model, tmp_path / "pictures", tmp_path, **settings)) == 0
    assert found == [True]
