"""A resume sees what changed in the data, and what about it."""

from __future__ import annotations

import json
from pathlib import Path

from everydream.data.fingerprint import changes, fingerprint
from everydream.data.folders import Root
from everydream.data.scan import scan
from tests.data.pictures import png, write
from tests.data.sets import make_set


def taken(folder: Path) -> dict[str, str]:
    return fingerprint(scan([Root("subject", folder)]).samples)


def test_changes_are_listed_with_what_changed(tmp_path: Path) -> None:
    before = json.loads(json.dumps(taken(make_set(tmp_path, 6))))
    assert not changes(before, taken(tmp_path))
    write(tmp_path, "00.png", png(40, 30, seed=99))
    write(tmp_path, "01.txt", "another caption")
    write(tmp_path, "02.txt", "b")
    write(tmp_path, "02.png", png(16, 16))
    (tmp_path / "03.png").unlink()
    (tmp_path / "03.txt").unlink()
    write(tmp_path, "new.png", png())
    found = changes(before, taken(tmp_path))
    assert found.added == ("subject/new.png",) and found.removed == ("subject/03.png",)
    assert found.changed == (
        ("subject/00.png", "picture"),
        ("subject/01.png", "caption"),
        ("subject/02.png", "picture, caption"),
    )
    text = "\n".join(found.lines())
    assert "subject/01.png (caption)" in text and "1 added" in text and "1 removed" in text
    write(tmp_path, "multiply.txt", "2")
    assert {what.split(", ")[-1] for _, what in changes(before, taken(tmp_path)).changed} == {"values beside it"}


def test_long_lists_are_cut(tmp_path: Path) -> None:
    found = changes({}, {f"subject/{number:03}": "a:b:c" for number in range(50)})
    (text,) = found.lines(limit=5)
    assert text.count("\n") == 6 and text.endswith("and 45 more")
