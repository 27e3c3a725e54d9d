"""scripts/sample.py makes the previews' pictures from whatever holds a model."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from everydream.models.family import load, read_facts
from everydream.training.prompts import Picture
from everydream.training.sampling import Parts, sample

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "sample.py"
Runner = Callable[..., tuple[int, list[Path], str]]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sample_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Runner:
    """Runs the script in an empty folder; exit code, pictures written, what was told."""

    def start(*words: object) -> tuple[int, list[Path], str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words), "--steps", "2"])
        monkeypatch.setattr(script, "quiet_libraries", lambda: None)
        code = script.main()
        out = capsys.readouterr()
        return code, [tmp_path / line for line in out.out.splitlines()], out.err

    return start


def expected(model: Path, prompt: str, **options: int) -> bytes:
    family = load(read_facts(str(model)), train=(), **options)
    picture = Picture(prompt, "", 555, 64, 64, 7.5, 2, "ddim")
    return sample(Parts.of(family), [picture])[0].tobytes()


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_a_prompt_is_a_picture_that_says_how_it_was_made(run: Runner, tiny_model: Path) -> None:
    code, (path,), _ = run(tiny_model, "a red star!")
    assert code == 0
    assert path.name == "0001-a-red-star.png"
    assert pixels(path) == expected(tiny_model, "a red star!")
    with Image.open(path) as image:
        about = json.loads(image.text["everydream"])  # type: ignore[attr-defined]
    assert (about["prompt"], about["seed"], about["steps"], about["model"]) == ("a red star!", 555, 2, str(tiny_model))


def test_several_pictures_come_with_a_grid_and_overwrite_nothing(run: Runner, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text('[{"prompt": "third", "size": 128}]')
    words = ("--guidance", 1, 4, "--size", "64x64", "--prompts_file", tmp_path / "prompts.json")
    _, first, _ = run(tiny_model, "one", "two", *words)
    assert [path.name.split("-")[1] for path in first] == [
        "one.png", "one.png", "two.png", "two.png", "third.png", "third.png", "grid.png",
    ]  # fmt: skip
    _, second, _ = run(tiny_model, "one")
    assert second[0].name == "0008-one.png"


def test_a_run_and_its_checkpoint_are_models_with_their_recipe(run: Runner, tiny_model: Path, tmp_path: Path) -> None:
    from everydream.training.checkpoint import commit
    from everydream.training.storage import Copy

    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    then, now = ({"clip_skip": {"value": value}, "seed": {"value": 5}} for value in (1, 0))
    config = {"settings": now, "run": {"earlier": [{"until_step": 3, "settings": then}]}}  # changed since
    (folder / "config.json").write_text(json.dumps(config))
    files = {f"model/{p.relative_to(tiny_model)}": Copy(p) for p in tiny_model.rglob("*") if p.is_file()}
    checkpoint = commit(folder / "checkpoints", 3, files)
    wanted = expected(tiny_model, "the star", clip_skip=1)
    assert wanted != expected(tiny_model, "the star")
    for model in (folder, checkpoint, checkpoint / "model"):
        code, (path,), _ = run(model, "the star")
        assert code == 0
        assert pixels(path) == wanted
    _, (path,), _ = run(folder, "the star", "--clip_skip", 0)
    assert pixels(path) == expected(tiny_model, "the star")
    _, paths, _ = run(folder, "a", "b")
    with Image.open(paths[-1]) as grid:
        assert json.loads(grid.text["everydream"])["model"] == str(checkpoint / "model")  # type: ignore[attr-defined]
    (checkpoint / "model" / "model_index.json").write_text("{}")
    code, _, told = run(folder, "the star")
    assert code == 4
    assert "no valid checkpoint" in told


def test_the_average_takes_the_weights_place(run: Runner, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "step" / "model")
    name, weight = next(iter(load(read_facts(str(tiny_model)), train=()).parameters_of("unet").items()))
    code, _, told = run(tmp_path / "step", "x", "--average")
    assert code == 2
    assert "ema_decay_rate" in told
    save_file({f"unet.{name}": torch.zeros_like(weight)}, tmp_path / "step" / "ema.safetensors")
    _, (path,), _ = run(tmp_path / "step", "x", "--average")
    assert pixels(path) != expected(tiny_model, "x")
    _, (path,), _ = run(tmp_path / "step", "x")
    assert pixels(path) == expected(tiny_model, "x")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("x", "--size", "65"), "command line: size"),
        (("x", "--seed", "-5"), "command line: seed"),
        (("x", "--batch_size", "0"), "--batch_size"),
        ((), "give a PROMPT"),
        (("--prompts_file", "nothing.txt"), "nothing.txt cannot be read"),
    ],
)
def test_what_is_wrong_is_told_without_loading(
    run: Runner, tiny_model: Path, words: tuple[str, ...], told: str
) -> None:
    code, paths, error = run(tiny_model, *words)
    assert (code, paths) == (2, [])
    assert told in error


def test_a_folder_that_cannot_be_written_is_told(run: Runner, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, told = run(tiny_model, "x", "--out", tmp_path / "file")
    assert code == 5
    assert "--out" in told


HELP = f"""
import runpy, sys
sys.argv = ["sample.py", "--help"]
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
except SystemExit:
    assert not {{"torch", "PIL", "numpy"}} & set(sys.modules)
else:
    assert False
"""


def test_help_needs_no_torch() -> None:
    subprocess.run([sys.executable, "-c", HELP], check=True, capture_output=True)
