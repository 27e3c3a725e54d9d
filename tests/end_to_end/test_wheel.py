"""A wheel installed in a fresh environment trains: nothing of the clone is needed but a model and pictures."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.end_to_end import launching
from tests.tiny import make_pictures
from tests.training.runs import lines, only_run, options

pytestmark = [pytest.mark.long, pytest.mark.launch]


@pytest.fixture(scope="module")
def fresh_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(launching.ROOT)]
    subprocess.run(command, check=True, cwd=folder)
    (wheel,) = folder.glob("everydream-*.whl")
    # The libraries are those of this environment, the package is the wheel's.
    venv.EnvBuilder(with_pip=True, system_site_packages=False).create(folder / "env")
    python = folder / "env" / "bin" / "python"
    constraints = launching.ROOT / "constraints.txt"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(constraints)]
    subprocess.run([*install, "torch==2.13.0"], check=True)
    subprocess.run([*install, str(wheel)], check=True)
    return python


def test_the_installed_package_trains(fresh_python: Path, tiny_model: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", 4, captions="a thing")
    words = options(tiny_model, tmp_path / "pictures", tmp_path, max_steps=3, save_single_file=True)
    command = [
        str(fresh_python),
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "-q",
        "-m",
        "everydream",
        *words,
    ]
    done = launching.run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path)
    assert lines(run / "events.jsonl")[-1]["code"] == 0
    assert list((run / "exports").glob("*.safetensors"))


def test_type_hints_and_data_files_are_in_the_wheel(fresh_python: Path) -> None:
    listed = subprocess.run(
        [str(fresh_python), "-m", "pip", "show", "--files", "everydream"], capture_output=True, text=True, check=True
    ).stdout
    for name in ("everydream/py.typed", "everydream/models/published/"):
        assert name in listed
