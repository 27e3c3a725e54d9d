"""Settings that contradict each other, have no effect, or name what is not there."""

from __future__ import annotations

from collections.abc import Mapping

from everydream.config.entries import Entry
from everydream.config.sources import Report


def check(entries: Mapping[str, Entry], environ: Mapping[str, str], action: str, report: Report) -> None:
    """Adds problems and notes to the report."""
