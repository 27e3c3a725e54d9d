"""The disk is full, really, in each file of a save: the save fails, the older checkpoint stays, nothing else does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.conftest import Inject

ROOT = Path(__file__).parents[2]
NAMES = ["model/model_index.json", "model/unet/weights.safetensors", "optimizer.safetensors", "state.json"]

# RLIMIT_FSIZE makes the system refuse a file that grows past the limit, at the write that would cross it.
CODE = """
import json, os, resource, sys
from pathlib import Path
from everydream.errors import SaveError
from everydream.training import checkpoint
from everydream.training.saver import Saver
from everydream.training.storage import Bytes

def fill(folder, background):
    saver = Saver(folder, background=background, keep_last=1)
    saver.save(1, small)
    saver.require()
    results = []
    for step, name in enumerate(names, 2):
        resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 10, resource.RLIM_INFINITY))
        saver.save(step, {**small, name: Bytes(b"x" * (64 << 10))})
        saver.join()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        results.append([saver.failures, sorted(os.listdir(folder)), checkpoint.verify(folder / "step-0000000001")])
    errors = [str(saved.error) for saved in saver.outcomes()[1:]]
    saver.save(9, small)
    saver.require()
    return results, errors, os.listdir(folder)

names = sys.argv[2:]
small = {name: Bytes(b"x" * 100) for name in names}
print(json.dumps([fill(Path(sys.argv[1]) / str(background), background) for background in (True, False)]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit there")
def test_a_full_disk_in_each_file_costs_that_save_only(tmp_path: Path, injected: Inject) -> None:
    command = [sys.executable, "-c", CODE, str(tmp_path), *NAMES]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    for results, errors, at_last in json.loads(done.stdout):
        assert results == [[n, ["step-0000000001"], []] for n in range(1, len(NAMES) + 1)]
        assert all("cannot save" in error and "File too large" in error for error in errors)
        assert at_last == ["step-0000000009"]  # room again: saved, and only now the old one goes
    injected("disk full in each file of a save", 2 * len(NAMES))
