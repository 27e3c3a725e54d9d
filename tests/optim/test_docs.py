"""docs/optimizers.md says of each row what the table says."""

from __future__ import annotations

from pathlib import Path

import pytest

from everydream.optim.table import ROWS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "optimizers.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ROWS)
def test_the_page_has_each_row_as_it_is(name: str) -> None:
    row = ROWS[name]
    betas = ", ".join(map(str, row.defaults["betas"])) if "betas" in row.defaults else "-"
    epsilon, decay = (row.defaults.get(key, "-") for key in ("epsilon", "weight_decay"))
    cells = (f"`{name}`", row.summary, f"`{row.cls}`", row.defaults["lr"], betas, epsilon, decay)
    assert f"| {' | '.join(map(str, cells))} |\n" in PAGE


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.extra])
def test_the_page_says_what_to_install(name: str) -> None:
    assert f"pip install 'everydream[{ROWS[name].extra}]'" in PAGE


def test_the_page_says_which_rows_cannot() -> None:
    for reason in ("cannot_round", "cannot_fuse"):
        assert {name for name, row in ROWS.items() if getattr(row, reason)} == {"prodigy", "schedulefree_adamw"}
    assert PAGE.count("All rows can, but prodigy") == 2
