"""What a person sees: a bar on a terminal, lines elsewhere, all on stderr."""

from __future__ import annotations

import io

import pytest

from everydream.data.plan import Plan
from everydream.training import console as console_module
from everydream.training.clock import Clock
from everydream.training.console import Console, fit
from everydream.training.progress import Progress, duration

VALUES = {
    "epoch": 1,
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
    line.update(4, {"epoch": 1}, now=104.0)
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


@pytest.mark.parametrize(
    ("pictures", "batch_size", "per_update", "shown"),
    [
        (4, 4, 1, [1, 2, 3, 4, 5]),
        (8, 4, 1, [1, 1, 2, 2, 3]),
        (1, 4, 1, [1, 8, 12, 16, 20]),  # a micro-batch of four epochs; of the first one its first picture
        (8, 2, 2, [1, 1, 2, 2, 3]),
    ],
)
def test_the_epoch_shown_is_that_of_the_update(
    pictures: int, batch_size: int, per_update: int, shown: list[int]
) -> None:
    plan = Plan({(64, 64): [f"subject/{i}" for i in range(pictures)]}, batch_size, 1)
    clock, line, found = Clock(plan, per_update, 5), Progress(0, 5), []
    for step in range(1, 6):
        line.update(step, {"epoch": clock.epoch(step)}, float(step))
        line.update(step, {"epoch": clock.epoch(step), "loss": 1.0}, float(step))  # its metrics
        found.append(next(field for field in line.fields() if field.startswith("epoch")))
    assert found == [f"epoch {number}" for number in shown]


def test_the_last_epoch_is_shown_at_the_end_and_none_where_it_is_not_known() -> None:
    line = Progress(98, 100, max_epochs=4)
    line.update(99, {"epoch": 2}, 1.0)
    assert line.fields() == ["step 99/100"], "the checkpoint's epoch is not told"
    line.update(100, {"epoch": 4}, 2.0)
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
    console.update(5, {"loss": 0.5, "epoch": 0})
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
