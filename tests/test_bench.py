"""The card's bench in turns, without a card: what is measured is kept, and what fails costs nothing else."""

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

    def child(what: list[str], words: Any = ()) -> dict[str, Any]:
        if what == ["card"]:
            return {"card": "a card", "bf16_tflops": 100.0}
        kind, batch = what[0], int(what[-1])
        calls.append((kind, batch))
        if (kind, batch) == ("usual", 4):
            raise gpu.Failed("torch.OutOfMemoryError: CUDA out of memory")
        return {"images_per_s": float(batch), "peak_bytes": 1e9}

    def trainer(model: Path, resolution: int, folder: Path, batch: int, *others: Any) -> dict[str, float]:
        calls.append(("trainer", batch))
        return {"images_per_s": float(batch), "peak_bytes": 2e9}

    fakes = {"child": child, "trainer": trainer, "model_of": lambda size, folder: (folder, 512)}
    for name, fake in fakes.items():
        monkeypatch.setattr(gpu, name, fake)
    return calls


def start(monkeypatch: pytest.MonkeyPatch, path: Path, *words: str) -> list[dict[str, Any]]:
    """The table's rows."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json", str(path), "--size", "sd15", "--rounds", "2", *words])
    gpu.main()
    return gpu.rows_of(json.loads(path.read_text()))


def test_another_call_goes_on_where_one_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    first = start(monkeypatch, tmp_path / "gpu.json", "--batch", "4")
    assert asked.count(("bare", 4)) == 2 and asked.count(("usual", 4)) == 1
    assert {row["loop"]: row.get("images_per_s") for row in first} == {
        "bare": 4, "usual": None, "trainer": 4, "8 bit": 4,
    }  # fmt: skip
    assert "| sd15 | 4 | usual | false | torch.OutOfMemoryError: CUDA out of memory | | |" in capsys.readouterr().out
    asked.clear()
    both = start(monkeypatch, tmp_path / "gpu.json", "--batch", "4", "16")
    assert both[:4] == first and {row["batch"] for row in both[4:]} == {16}
    assert {batch for _, batch in asked} == {16}
    asked.clear()
    assert start(monkeypatch, tmp_path / "gpu.json", "--batch", "32", "--minutes", "0") == both and not asked
    compiled = start(monkeypatch, tmp_path / "gpu.json", "--batch", "16", "--compile")
    assert compiled[: len(both)] == both, "other --compile, other rows"
    assert [(row["loop"], row["compile"]) for row in compiled[len(both) :]] == [
        ("bare", "true"), ("trainer", "true"), ("8 bit", "true"),
    ]  # fmt: skip


def test_what_went_wrong_is_its_last_line() -> None:
    said = "Traceback\n  a line\ntorch.OutOfMemoryError: CUDA out of memory\nsome warning at the end"
    assert gpu.last_line(said) == "torch.OutOfMemoryError: CUDA out of memory"
    assert gpu.last_line("") == "no word"
