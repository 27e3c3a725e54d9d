"""What a person sees: messages and one progress bar, all on stderr. A bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from everydream.training.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import ConsoleOptions, RenderResult
    from rich.live import Live

LEVELS = ("debug", "info", "warning", "error")
SHOWN_FROM = {"quiet": "warning", "normal": "info", "verbose": "debug"}
PREFIX = {"debug": "", "info": "", "warning": "warning: ", "error": "error: "}
STYLE = {"debug": "dim", "info": "", "warning": "yellow", "error": "bold red"}
BAR_SECONDS = 0.5  # between two pictures of the bar: 2 ms each, on the training thread
LINE_SECONDS = 10.0  # between two plain lines: a log file is read later, by a person

Advance = Callable[[int], None]


class Display(Protocol):
    """One way to show things. `done` of a task and of the run is shown at once, whatever the clock says."""

    def say(self, text: str, level: str) -> None: ...
    def progress(self, progress: Progress, done: bool) -> None: ...
    def begin_task(self) -> None: ...
    def task(self, title: str, count: int, total: int, done: bool) -> None: ...
    def close(self) -> None: ...


class Console:
    """`level`: quiet (warnings, errors), normal, verbose. A broken stderr (closed pipe) never ends a run."""

    def __init__(self, level: str = "normal", stream: TextIO | None = None) -> None:
        self.lowest = LEVELS.index(SHOWN_FROM[level])
        stream = stream or sys.stderr or io.StringIO()  # a process may be started without
        make = Silent if level == "quiet" else Bar if stream.isatty() else Lines
        self._display: Display = make(stream)
        self._progress: Progress | None = None

    def say(self, text: str, level: str = "info") -> None:
        if LEVELS.index(level) >= self.lowest:
            with _ignore_broken_stream():
                self._display.say(PREFIX[level] + text, level)

    def start(self, progress: Progress) -> None:
        self._progress = progress
        progress.begin(time.monotonic())

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Once an update; costs a few µs unless it is time to draw."""
        if self._progress is None:
            return
        self._progress.update(step, values, time.monotonic())
        with _ignore_broken_stream():
            self._display.progress(self._progress, done=step >= self._progress.max_steps)

    @contextlib.contextmanager
    def task(self, title: str, total: int) -> Iterator[Advance]:
        """A bar of its own for other work: `with console.task("caching latents", 64) as advance: advance(4)`."""
        count = 0

        def advance(n: int = 1) -> None:
            nonlocal count
            count += n
            with _ignore_broken_stream():
                self._display.task(title, count, total, done=False)

        self._display.begin_task()
        advance(0)
        try:
            yield advance
        finally:
            with _ignore_broken_stream():
                self._display.task(title, count, total, done=True)

    def close(self) -> None:
        with _ignore_broken_stream():
            self._display.close()


@contextlib.contextmanager
def _ignore_broken_stream() -> Iterator[None]:
    with contextlib.suppress(OSError, ValueError):  # a pipe that was closed; a file object that was
        yield


class Silent:
    """No progress; messages of the levels that get here. Also the base of the others."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def say(self, text: str, level: str) -> None:
        print(text, file=self.stream, flush=True)

    def progress(self, progress: Progress, done: bool) -> None: ...

    def begin_task(self) -> None: ...

    def task(self, title: str, count: int, total: int, done: bool) -> None: ...

    def close(self) -> None: ...


class Lines(Silent):
    """Not a terminal: a line now and then, the first and the last one always."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._due = {"progress": 0.0, "task": 0.0}  # seconds, monotonic
        self._told = -1

    def _is_due(self, kind: str, done: bool) -> bool:
        now = time.monotonic()
        if not done and now < self._due[kind]:
            return False
        self._due[kind] = now + LINE_SECONDS
        return True

    def progress(self, progress: Progress, done: bool) -> None:
        # Without a loss there is nothing to tell yet; and the last step comes twice, with its metrics and without.
        if progress.smoothed_loss is None or progress.step == self._told:
            return
        if self._is_due("progress", done):
            self._told = progress.step
            self.say("  ".join(progress.fields()), "info")

    def begin_task(self) -> None:
        self._due["task"] = time.monotonic() + LINE_SECONDS  # one line at its end where it is quick

    def task(self, title: str, count: int, total: int, done: bool) -> None:
        if self._is_due("task", done):
            self.say(f"{title}: {count}/{total}", "info")


class Bar(Silent):
    """A terminal: the run's bar, and under it that of what else goes on. Messages scroll above them."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._console: RichConsole | None = None
        self._live: Live | None = None
        self._line: Progress | None = None
        self._task: tuple[str, int, int] | None = None
        self._due = 0.0

    @property
    def console(self) -> RichConsole:
        if self._console is None:  # rich costs 0.2 s: only once there is something to show
            from rich.console import Console as RichConsole

            self._console = RichConsole(file=self.stream, highlight=False)
        return self._console

    def say(self, text: str, level: str) -> None:
        self.console.print(text, style=STYLE[level], markup=False, soft_wrap=True)

    def progress(self, progress: Progress, done: bool) -> None:
        self._line = progress
        self._draw(done)

    def task(self, title: str, count: int, total: int, done: bool) -> None:
        self._task = None if done and self._line is not None else (title, count, total)
        self._draw(done)
        if done and self._line is None:  # before the run's own bar: the finished bar stays as a line
            self.close()
            self._task = None

    def _draw(self, now: bool) -> None:
        if not now and time.monotonic() < self._due:
            return
        if self._live is None:
            from rich.live import Live

            # No thread of its own that would take the interpreter from the training. What is printed by others goes
            # above the bar, except to a stdout that is a file.
            aside = sys.stdout.isatty()
            self._live = Live(self, console=self.console, auto_refresh=False, redirect_stdout=aside)
            self._live.start()
        self._live.refresh()
        self._due = time.monotonic() + BAR_SECONDS

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        if self._line is not None:
            yield bar_line(self._line.step, self._line.max_steps, self._line.fields(), options.max_width)
        if self._task is not None:
            title, count, total = self._task
            yield bar_line(count, total, [f"{title} {count}/{total}"], options.max_width)

    def close(self) -> None:
        if self._live is not None:
            self._live.refresh()
            self._live.stop()
            self._live = None


def bar_line(count: int, total: int, fields: list[str], width: int) -> Any:
    """A bar with the fields behind it; those that do not fit go on a second line."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    bar_width = max(8, min(24, width // 6))
    first, rest = fit(fields, width - bar_width - 7)
    line = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=max(1, total), completed=count, width=bar_width)
    line.add_row(bar, f"{count / max(1, total):4.0%}", Text("  ".join(first), no_wrap=True, overflow="ellipsis"))
    second, _ = fit(rest, width - bar_width - 7)
    return Group(line, Text(" " * (bar_width + 6) + "  ".join(second), style="dim")) if second else line


def fit(fields: list[str], width: int) -> tuple[list[str], list[str]]:
    """As many of the first fields as fit into `width` with two spaces between them; the rest."""
    used = 0
    for i, text in enumerate(fields):
        used += len(text) + 2 * (i > 0)
        if used > width:
            return fields[:i], fields[i:]
    return fields, []
