"""scripts/convert.py, as a person runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from everydream.models.family import read_facts
from everydream.training.checkpoint import commit
from everydream.training.storage import Copy
from tests.tiny import make_tiny_model

ROOT = Path(__file__).parents[2]


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/convert.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.launch
def test_a_folder_becomes_a_single_file_and_a_folder_again(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    file, folder = tmp_path / "one.safetensors", tmp_path / "new" / "again"
    for arguments in ((model, file), (file, folder)):
        done = convert(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{arguments[1]}\n", "")
    names = {p.relative_to(model) for p in model.rglob("*") if p.is_file()}
    assert names == {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    for name in names:
        if name.suffix == ".safetensors":
            before, after = load_file(model / name), load_file(folder / name)
            assert before.keys() == after.keys() and all(torch.equal(after[n], t) for n, t in before.items())
    assert read_facts(str(folder)).tokenizer == read_facts(str(model)).tokenizer


@pytest.mark.launch
def test_a_checkpoint_is_converted_with_its_average_and_in_the_dtype_asked_for(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "step-1" / "model")
    save_file({"unet.conv_in.bias": torch.full((8,), 0.1)}, tmp_path / "step-1" / "ema.safetensors")
    done = convert(tmp_path / "step-1", tmp_path / "x.safetensors", "--average", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    stored = load_file(tmp_path / "x.safetensors")["model.diffusion_model.input_blocks.0.0.bias"]
    assert torch.equal(stored, torch.full((8,), 0.1, dtype=torch.bfloat16))


@pytest.mark.launch
def test_a_runs_folder_is_its_newest_checkpoint(tmp_path: Path, tiny_model: Path) -> None:
    files = {f"model/{p.relative_to(tiny_model)}": Copy(p) for p in tiny_model.rglob("*") if p.is_file()}
    commit(tmp_path / "run" / "checkpoints", 3, files)
    done = convert(tmp_path / "run", tmp_path / "x.safetensors")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'x.safetensors'}\n"), done.stderr


@pytest.mark.launch
def test_errors_say_what_to_do_and_leave_nothing(tmp_path: Path, tiny_model: Path) -> None:
    there = tmp_path / "there.safetensors"
    there.write_text("x")
    cases = {
        (tiny_model, there): "exists: give a name that is free",
        (tmp_path / "nothing", tmp_path / "new"): "does not exist",
        (tiny_model, tmp_path / "new", "--average"): "only checkpoints of runs with ema_decay_rate have one",
    }
    for arguments, message in cases.items():
        done = convert(*arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert message in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["there.safetensors"] and there.read_text() == "x"
