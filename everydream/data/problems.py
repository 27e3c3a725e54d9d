"""What the gate reports: each problem with its path, the reason and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


def shown(path: Path | str) -> str:
    """A path on one printable line: control characters and bytes that are no UTF-8 appear as escapes."""
    escaped = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in escaped)


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding. A skippable one concerns one picture, which `bad_images: skip` may leave out."""

    path: Path
    reason: str
    advice: str
    skippable: bool = True

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.reason}: {self.advice}"


class Unfit(Exception):
    """A file cannot be used: (reason, advice), turned into a Problem by whoever knows its path and place."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}: {advice}")
        self.reason, self.advice = reason, advice


def listed(title: str, items: Sequence[str], limit: int = 20) -> str:
    """`title` and the items under it, the first `limit` of them, as one note."""
    lines = [title, *(f"  {item}" for item in items[:limit])]
    if len(items) > limit:
        lines.append(f"  and {len(items) - limit} more")
    return "\n".join(lines)
