"""Every wrong input is refused at its place, without anything heavy imported and without a file made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.config.bad_inputs import CASES, Case

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.config.bad_inputs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_there_are_many_and_they_are_told_apart() -> None:
    assert len(CASES) >= 80
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
def test_a_wrong_input_is_refused_at_its_place(result: dict[str, Any], index: int) -> None:
    case: Case = CASES[index]
    problems = result["said"][index]
    assert problems is not None, "accepted"
    assert len(problems) == len(case.problems), problems
    for place, words in case.problems:
        assert any(problem.startswith(place) and words in problem for problem in problems), (place, words, problems)


def test_nothing_heavy_is_imported_and_nothing_is_made(result: dict[str, Any]) -> None:
    assert result["imported"] == []
    assert result["made"] == []
