"""The documentation's commands, run as they stand: every fenced `bash` block, a page in one folder, in order."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end import launching

pytestmark = [pytest.mark.long, pytest.mark.launch]

BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = sorted([launching.ROOT / "README.md", *(launching.ROOT / "docs").glob("*.md")])
NOT_HERE = "#SBATCH"  # a job script, for a cluster


def blocks(page: Path) -> list[str]:
    return [block for block in BLOCK.findall(page.read_text()) if NOT_HERE not in block]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_commands_run_as_they_stand(page: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(launching.ROOT, clone, ignore=shutil.ignore_patterns(".venv", "logs", ".git", "__pycache__"))
    (clone / ".venv").symlink_to(launching.ROOT / ".venv")
    environment = launching.environment(XDG_CACHE_HOME=str(tmp_path / "cache"), PATH=os.environ["PATH"])
    for block in blocks(page):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=clone, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
