"""Shared fixtures. One thread a process: the suite runs side by side on few cores, and sums stay the same."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the process's first product on a card

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 1-format folder with a tiny random-weight UNet; never written to."""
    from tests.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        return
    import torch

    from everydream.optim.table import ROWS

    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True  # what is compared bit for bit may not train with whatever is fastest
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA card"))
    for item in items:  # a machine with a card may have no network to get the optional ones from
        of = getattr(item, "callspec", None)
        for name in of.params.values() if of and item.get_closest_marker("gpu") else ():
            package = ROWS[name].cls.split(".")[0] if isinstance(name, str) and name in ROWS else "torch"
            if importlib.util.find_spec(package) is None:
                item.add_marker(pytest.mark.skip(reason=f"{package} is not there"))
