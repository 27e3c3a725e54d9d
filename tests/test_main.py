"""A Python without the packages of setup.cfg is the user's to mend: one line, no traceback, and no bug is hidden."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

from everydream.__main__ import PACKAGES, named_if_missing

ROOT = Path(__file__).resolve().parent.parent
IMPORTED_AS = {"pillow": "PIL", "PyYAML": "yaml"}


def test_the_packages_are_those_that_are_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    names = re.findall(r"^[\w-]+", setup["options"]["install_requires"], re.MULTILINE)
    assert {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names} == PACKAGES


@pytest.mark.parametrize("script", ["train.py", "cache.py", "sample.py", "convert.py", "show.py"])
def test_a_python_without_the_packages_is_told_in_one_line(script: str) -> None:
    model = str(ROOT / "examples" / "demo" / "base_model")
    arguments = {"sample.py": [model, "a prompt"], "convert.py": [model, "target"], "show.py": ["logs"]}
    command = [sys.executable, "-S", str(ROOT / "scripts" / script), *arguments.get(script, [])]  # -S: no site-packages
    ended = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin"}, cwd="/")
    assert ended.returncode == 2, ended.stderr
    [line] = ended.stderr.splitlines()
    assert re.fullmatch(rf"\w+ is not installed in {re.escape(sys.executable)}: use .venv/bin/python .*", line)


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("", name="somebodys_plugin"),
        ModuleNotFoundError("", name="everydream.no_such_module"),
        ModuleNotFoundError("", name="torch.no_such_module"),  # torch is there: it is another version's
        ImportError("", name="torch"),
    ],
)
def test_other_import_errors_keep_their_traceback(error: ImportError) -> None:
    with pytest.raises(type(error)) as raised, named_if_missing():
        raise error
    assert raised.value is error
