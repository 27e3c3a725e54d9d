"""The card's bench in turns, without a card: what is measured is kept, and what does not fit costs nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import gpu


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(loop, batch) of each measurement; the usual loop does not fit at batch 4."""
    calls: list[tuple[str, int]] = []

    def child(
        kind: str, model: Path, resolution: int, batch: int, steps: int, compiled: str
    ) -> dict[str, float] | None:
        calls.append((kind, batch))
        return None if (kind, batch) == ("usual", 4) else {"images_per_s": float(batch), "peak_bytes": 1e9}

    def trainer(model: Path, resolution: int, logs: Path, batch: int, *others: Any) -> dict[str, float]:
        calls.append(("trainer", batch))
        return {"images_per_s": float(batch), "peak_bytes": 2e9}

    fakes = {"child": child, "trainer": trainer, "matmul_peak": lambda: 100.0, "card": str}
    for name, fake in (fakes | {"model_of": lambda size, folder: (folder, 512)}).items():
        monkeypatch.setattr(gpu, name, fake)
    return calls


def start(monkeypatch: pytest.MonkeyPatch, path: Path, *words: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json", str(path), "--size", "sd15", "--rounds", "2", *words])
    gpu.main()
    return json.loads(path.read_text())["rows"]


def test_another_call_goes_on_where_one_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, int]]
) -> None:
    first = start(monkeypatch, tmp_path / "gpu.json", "--batch", "4")
    assert asked.count(("bare", 4)) == 2 and asked.count(("usual", 4)) == 1
    assert {row["loop"]: row["images_per_s"] for row in first} == {"bare": 4, "usual": None, "trainer": 4, "8 bit": 4}
    asked.clear()
    both = start(monkeypatch, tmp_path / "gpu.json", "--batch", "4", "16")
    assert both[:4] == first and {row["batch"] for row in both[4:]} == {16}
    assert {batch for _, batch in asked} == {16}
    asked.clear()
    assert start(monkeypatch, tmp_path / "gpu.json", "--batch", "32", "--minutes", "0") == both and not asked
