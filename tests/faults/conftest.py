"""Counts the faults that the tests inject, for docs/reliability.md: a table at the end of `make test-faults`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

Inject = Callable[[str, int], None]


@pytest.fixture
def injected(record_property: Callable[[str, object], None]) -> Inject:
    """`injected(kind, count)`: this test has injected so many faults of this kind."""

    def note(kind: str, count: int) -> None:
        record_property("fault", f"{count} {kind}")

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: dict[str, Counter[str]] = {outcome: Counter() for outcome in ("passed", "failed")}
    for outcome, counter in counts.items():
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in report.user_properties:
                if name == "fault":
                    count, kind = str(value).split(" ", 1)
                    counter[kind] += int(count)
    kinds = counts["passed"] | counts["failed"]
    if kinds:
        terminalreporter.section("faults injected, survived, lost")
        for kind in kinds:
            survived, lost = counts["passed"][kind], counts["failed"][kind]
            terminalreporter.write_line(f"{survived + lost:6} {survived:6} {lost:4}  {kind}")
