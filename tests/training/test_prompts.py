"""A prompts file says which pictures are made, or all that is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from everydream.errors import ConfigError
from everydream.training.prompts import READERS, SCHEDULERS, Picture, Sampling, pictures, read

DEFAULTS = Sampling(seed=5, width=512, height=512, guidance=(7.5,), steps=20, scheduler="ddim")


def written(folder: Path, content: Any, name: str = "prompts.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_text_file_is_a_prompt_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, "\ufeffa cat\n\n# not this\n  a dog \r\n", "prompts.txt")
    made = read(path, DEFAULTS)
    assert [p.prompt for p in made] == ["a cat", "a dog"]
    assert made[0] == Picture("a cat", "", 5, 512, 512, 7.5, 20, "ddim")


def test_an_entry_wins_over_the_file_and_the_file_over_the_run(tmp_path: Path) -> None:
    content = {
        "steps": 30,
        "seed": 9,
        "negative_prompt": "blurry",
        "prompts": [
            "a cat",
            {"prompt": "a dog", "seed": 7, "size": [512, 768], "guidance": [1, 4], "scheduler": "euler"},
        ],
    }
    assert read(written(tmp_path, content), DEFAULTS) == [
        Picture("a cat", "blurry", 9, 512, 512, 7.5, 30, "ddim"),
        Picture("a dog", "blurry", 7, 512, 768, 1.0, 30, "euler"),
        Picture("a dog", "blurry", 7, 512, 768, 4.0, 30, "euler"),
    ]


@pytest.mark.parametrize(
    ("entry", "width", "height"),
    [
        ({"size": 256}, 256, 256),
        ({"size": [256, 512]}, 256, 512),
        ({"size": "256x512"}, 256, 512),
        ({"width": 256}, 256, 512),
        ({"aspect_ratio": 2.0}, 704, 384),
    ],
)
def test_sizes(tmp_path: Path, entry: dict[str, Any], width: int, height: int) -> None:
    (made,) = read(written(tmp_path, [{"prompt": "x", **entry}]), DEFAULTS)
    assert (made.width, made.height) == (width, height)


def test_everydream2_names_are_understood(tmp_path: Path) -> None:
    content = {
        "batch_size": 3, "seed": 1, "cfgs": [7, 4], "scheduler": "dpm++", "num_inference_steps": 15,
        "show_progress_bars": True, "samples": [{"prompt": "x", "size": [640, 384]}, {"random_caption": True}],
    }  # fmt: skip
    made = read(written(tmp_path, content), DEFAULTS, captions=["one caption"])
    assert [(p.prompt, p.guidance, p.scheduler, p.steps) for p in made] == [
        ("x", 7.0, "dpm++", 15),
        ("x", 4.0, "dpm++", 15),
        ("one caption", 7.0, "dpm++", 15),
        ("one caption", 4.0, "dpm++", 15),
    ]


def test_random_captions_are_the_same_ones_each_time(tmp_path: Path) -> None:
    path = written(tmp_path, [{"random_caption": True}] * 5)
    captions = [f"caption {i}" for i in range(50)]
    first = [p.prompt for p in read(path, DEFAULTS, captions)]
    assert first == [p.prompt for p in read(path, DEFAULTS, captions)]
    assert len(set(first)) > 1


def test_seed_minus_one_is_another_one_each_time() -> None:
    made = pictures([Sampling("x", seed=-1, guidance=(1.0, 2.0)), Sampling("x", seed=-1)])
    assert made[0].seed == made[1].seed >= 0, "pictures of one prompt differ in guidance alone"
    assert made[0].seed != made[2].seed


def test_every_problem_is_told_with_its_place(tmp_path: Path) -> None:
    path = written(
        tmp_path, {"steps": 0, "colour": 1, "prompts": ["ok", {"promt": "x"}, 3, {"prompt": "x", "size": 100}]}
    )
    with pytest.raises(ConfigError) as caught:
        read(path, DEFAULTS)
    assert [problem.removeprefix(f"sample_prompts: {path}: ") for problem in caught.value.problems] == [
        "for all prompts: steps: 0: must be a whole number from 1",
        f"for all prompts: colour is not known. Known: {', '.join(READERS)}",
        'prompt 2: needs a "prompt"',
        f"prompt 2: promt is not known. Did you mean 'prompt'? Known: {', '.join(READERS)}",
        "prompt 3: must be a string or an object, not 3",
        "prompt 4: size: 100: must be a whole number from 64, a multiple of 64",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompt", 3), ("negative_prompt", None), ("seed", -2), ("seed", True), ("size", [1, 2, 3]), ("size", "axb"),
        ("width", 65), ("height", "64"), ("aspect_ratio", 0), ("aspect_ratio", "wide"), ("guidance", []),
        ("guidance", [-1]), ("guidance", "7"), ("steps", 1.5), ("scheduler", "ddimm"), ("scheduler", ["ddim"]),
    ],
)  # fmt: skip
def test_a_wrong_value_is_a_problem(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"prompt 1.*{key}"):
        read(written(tmp_path, [{"prompt": "x", key: value}]), DEFAULTS)


def test_every_key_has_a_wrong_value_above() -> None:
    marks = test_a_wrong_value_is_a_problem.pytestmark  # type: ignore[attr-defined]
    assert {key for key, _ in marks[0].args[1]} == set(READERS)


@pytest.mark.parametrize(
    ("content", "name", "told"),
    [
        ("", "p.txt", "has no prompts"),
        ("[", "p.json", "is not JSON"),
        ("3", "p.json", "must be a list of prompts"),
        ('{"steps": 3}', "p.json", "has no prompts"),
    ],
)
def test_a_broken_file_is_told(tmp_path: Path, content: str, name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read(written(tmp_path, content, name), DEFAULTS)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "nothing.txt", DEFAULTS)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "latin.txt", DEFAULTS)


def test_ddim_is_a_scheduler() -> None:
    assert DEFAULTS.scheduler in SCHEDULERS
