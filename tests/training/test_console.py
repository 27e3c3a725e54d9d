"""What a person sees: a bar on a terminal, lines elsewhere, all on stderr."""

from __future__ import annotations

import io
import sys

import pytest

from everydream.training import console as console_module
from everydream.training.console import Console, fit
from everydream.training.progress import Progress, duration

VALUES = {
    "trained_epoch": 1,
    "loss": 0.25,
    "lr_unet": 1e-4,
    "lr_text_encoder": 5e-5,
    "images_per_s": 12.5,
    "data_wait_s": 0.5,
    "memory_bytes": 2e9,
}


def progress() -> Progress:
    made = Progress(0, 100, max_epochs=4, memory_total_bytes=8_000_000_000)
    made.begin(100.0)
    return made


def test_the_line_tells_all_that_a_person_needs() -> None:
    line = progress()
    line.update(4, {"trained_epoch": 1}, now=104.0)
    line.update(10, VALUES, now=110.0)
    assert line.fields() == [
        "step 10/100",
        "epoch 2/4",
        "loss 0.2500",
        "1:30 left",
        "12.5 images/s",
        "lr unet 0.0001 text 5e-05",
        "memory 2.0/8.0 GB",
        "data wait 5%",
    ]


def test_what_is_not_known_is_left_out() -> None:
    line = Progress(5, 10)
    line.begin(0.0)
    assert line.fields() == ["step 5/10"]


def test_the_loss_shown_is_smoothed_and_counts_a_step_once() -> None:
    line = progress()
    line.update(1, {"loss": 1.0}, 101.0)
    line.update(2, {"loss": 0.0}, 102.0)
    line.update(2, {"loss": 0.0}, 102.0)
    assert line.smoothed_loss == pytest.approx(0.98)
    line.update(3, {"loss": float("nan")}, 103.0)
    assert line.smoothed_loss == pytest.approx(0.98)


def test_the_epoch_shown_is_that_of_the_update() -> None:
    line = Progress(98, 100, max_epochs=4)
    assert line.fields() == ["step 98/100"], "the checkpoint's is not told"
    line.update(99, {"trained_epoch": 2}, 1.0)
    line.update(99, {"epoch": 3, "loss": 1.0}, 1.0)  # metrics tell the next update's
    assert "epoch 3/4" in line.fields()
    line.update(100, {"trained_epoch": 3}, 2.0)
    assert "epoch 4/4" in line.fields()


def test_no_time_left_is_guessed_from_the_first_updates() -> None:
    line = Progress(0, 900)
    line.begin(0.0)
    for step in range(1, 8):
        line.update(step, {}, 20.0 + step)  # the first took 21 s
        assert len(line.fields()) == (2 if step >= 6 else 1), step
    assert line.fields() == ["step 7/900", "14:53 left"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (185, "3:05"), (3723, "1:02:03"), (2 * 86400 + 3 * 3600, "2 d 3 h")],
)
def test_durations_read_easily(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_plain_lines_come_now_and_then_and_at_the_end() -> None:
    stream = io.StringIO()
    console = Console("normal", stream)
    console.start(Progress(0, 50))
    for step in range(1, 51):
        console.update(step, {"loss": 1.0})
        console.update(step, {})
    console.close()
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == ["step 1/50", "step 50/50"]


def test_a_short_task_is_one_plain_line() -> None:
    stream = io.StringIO()
    with Console("normal", stream).task("caching latents", 3) as advance:
        for _ in range(3):
            advance(1)
    assert stream.getvalue() == "caching latents: 3/3\n"


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("quiet", "warning: w\nerror: e\n"),
        ("normal", "i\nwarning: w\nerror: e\n"),
        ("verbose", "d\ni\nwarning: w\nerror: e\n"),
    ],
)
def test_quiet_and_verbose(level: str, shown: str) -> None:
    stream = io.StringIO()
    console = Console(level, stream)
    for kind in ("debug", "info", "warning", "error"):
        console.say(kind[0], kind)
    console.start(Progress(0, 1))
    if level == "quiet":
        console.update(1, {"loss": 1.0})
        with console.task("work", 1) as advance:
            advance(1)
    assert stream.getvalue() == shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_messages_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(console_module, "BAR_SECONDS", 0.0)
    stream = Terminal()
    console = Console("normal", stream)
    console.start(Progress(0, 10))
    console.update(5, {"loss": 0.5, "trained_epoch": 0})
    console.say("[half] way", "warning")
    with console.task("preview", 4) as advance:
        advance(2)
    console.update(10, {"loss": 0.5})
    console.close()
    shown = stream.getvalue()
    assert "step 5/10" in shown
    assert "loss 0.5000" in shown
    assert "warning: [half] way" in shown, "a message is not markup"
    assert "preview 2/4" in shown
    assert shown.rstrip().endswith("\x1b[?25h"), "the cursor is shown again"


def test_a_narrow_terminal_wraps_whole_fields() -> None:
    assert fit(["aaaa", "bbbb", "cccc"], 10) == (["aaaa", "bbbb"], ["cccc"])
    assert fit(["aaaa", "bbbb"], 99) == (["aaaa", "bbbb"], [])
    assert fit(["aaaa"], 2) == ([], ["aaaa"])


def test_a_process_without_stderr_trains_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    console = Console()
    console.say("hello")
    console.close()
