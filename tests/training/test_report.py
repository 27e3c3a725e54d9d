"""The report holds all it shows, escapes what it is told, and is a function of the run folder."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from everydream.training import grids, report
from everydream.training.charts import Line, chart, number, smoothed, thinned, ticks
from everydream.training.report import spread, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def event(kind: str, step: int, **fields: Any) -> dict[str, Any]:
    return {"time": f"2026-01-01T00:{step:02d}:00.000Z", "step": step, "kind": kind, "level": "info", **fields}


def make_run(folder: Path, *, steps: int = 50, previews: tuple[int, ...] = (0, 25, 50), is_over: bool = True) -> Path:
    (folder / "samples").mkdir(parents=True)
    settings = {
        "lr": {"value": 1e-6, "origin": "optimizer.json:4"},
        "project_name": {"value": "<b>bold</b>", "origin": "command line"},
        "seed": {"value": 555, "origin": "default"},
    }
    (folder / "config.json").write_text(json.dumps({"format": "everydream-config-1", "settings": settings}))
    events = [
        event("training", 0, max_steps=steps, max_epochs=None),
        event("plan", 0, sections={"Pictures": ["8 pictures in 2 buckets", "<script>alert(1)</script>"], "Empty": []}),
        event("skipped", 7, level="warning", message="step 7: not finite. Pictures: <img src=x>", todo="Look at them."),
        event("saved", 50, of_step=50, path="/runs/x/checkpoints/step-0000000050", seconds=1.25),
        *([event("end", 50, code=0, reason="finished")] if is_over else []),
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            values: dict[str, Any] = {"step": step, "epoch": step // 10, "images_seen": 4 * step, "loss": 1 / step}
            values |= {"lr_unet": 1e-6, "images_per_s": 12.0, "memory_bytes": 2_500_000_000, "grad_norm_unet": None}
            file.write(json.dumps(values) + "\n")
            if step % 10 == 0:
                file.write(json.dumps({"step": step, "loss_val": 1 + (step - 20) ** 2, "loss_train_fixed": 1.0}) + "\n")
    for step in previews:
        image, facts = grids.draw([grids.Cell(Image.new("RGB", (64, 64), "red"), "a prompt", "", {"n": 1})], f"{step}")
        (folder / "samples" / f"step-{step:010d}.png").write_bytes(grids.png(image, {"step": step, "cells": facts}))
    return folder


class Page(HTMLParser):
    """Tags in pairs, what is loaded from elsewhere, and the text."""

    VOID = ("meta", "img", "input", "br", "line", "circle", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data + " "


def test_the_report_needs_nothing_beside_itself(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path / "run")).read_text()
    page = Page(text)
    assert page.loads
    assert all(load.startswith("data:image/webp;base64,") for load in page.loads)
    assert not re.search(r"https?://|@import|url\(", text)


def test_the_report_shows_the_run(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "my-run")).read_text())
    for shown in (
        "my-run", "finished", "50", "of 50", "Training loss", "Validation loss", "held-out pictures", "Learning rate",
        "Speed", "Memory", "2.50", "Previews", "8 pictures in 2 buckets", "not finite", "Look at them.",
        "optimizer.json:4",
        "command line", "1 defaults", "step-0000000050", "step 20",
    ):  # fmt: skip
        assert shown in page.text, shown
    assert "Gradient norm" not in page.text, "a curve without points"
    assert "step 7 step 7" not in page.text


def test_what_people_write_is_text_and_no_markup(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run")).read_text())
    assert "<b>bold</b>" in page.text
    assert "<script>alert(1)</script>" in page.text
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert [tag for tag, _ in page.tags].count("img") == 3


def test_a_run_with_a_name_has_it_in_its_report(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "config.json").write_text('{"settings": {"run_name": {"value": "With hats", "origin": "train.json"}}}')
    assert "With hats" in Page(write_report(folder).read_text()).text


def test_the_newest_preview_is_shown_first(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run")).read_text())
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [(i["data-step"], "hidden" in i) for i in images] == [("0", True), ("25", True), ("50", False)]


@pytest.mark.parametrize(("code", "shown"), [(0, "finished"), (143, "ended with code 143"), (None, "running")])
def test_the_report_says_how_the_run_stands(tmp_path: Path, code: int | None, shown: str) -> None:
    folder = make_run(tmp_path / "run", is_over=False)
    if code is not None:
        with open(folder / "events.jsonl", "a") as file:
            file.write(json.dumps(event("end", 50, code=code, reason="why <it> ended")) + "\n")
    page = Page(write_report(folder).read_text())
    assert shown in page.text
    assert ("why <it> ended" in page.text) == bool(code)


def test_a_resumed_run_is_running_again(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with open(folder / "events.jsonl", "a") as file:
        file.write(json.dumps(event("training", 50, max_steps=90)) + "\n")
    page = Page(write_report(folder).read_text())
    assert "running" in page.text
    assert "of 90" in page.text


def test_an_empty_or_torn_folder_still_gives_a_report(tmp_path: Path) -> None:
    (tmp_path / "run" / "samples").mkdir(parents=True)
    Page(write_report(tmp_path / "run").read_text())
    (tmp_path / "run" / "config.json").write_text('{"settings": 3')
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    (tmp_path / "run" / "samples" / "step-0000000001.png").write_bytes(b"no picture")
    page = Page(write_report(tmp_path / "run").read_text())
    assert "Training loss" in page.text
    assert "img" not in [tag for tag, _ in page.tags]


def test_a_refresh_replaces_the_file_at_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    first = write_report(folder)
    inode = first.stat().st_ino
    assert write_report(folder).stat().st_ino != inode, "written over, a reader could see half of it"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_many_previews_are_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_PREVIEWS", 3)
    page = Page(write_report(make_run(tmp_path / "run", previews=tuple(range(0, 50, 10)))).read_text())
    assert [a["data-step"] for tag, a in page.tags if tag == "img"] == ["0", "20", "40"]
    assert "3 of 5 are here" in page.text


def test_spread_keeps_the_ends() -> None:
    assert spread(list(range(100)), 5) == [0, 25, 50, 74, 99]
    assert spread([1, 2], 5) == [1, 2]


def test_a_table_of_the_plan_stays_aligned(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with open(folder / "events.jsonl", "a") as file:
        lines = ["part   tensors", "unet       208"]
        file.write(json.dumps(event("plan", 0, sections={"Trained": lines, "Notes": ["one\n  of two lines"]})) + "\n")
    text = write_report(folder).read_text()
    assert "<pre>part   tensors\nunet       208</pre>" in text
    assert "<li>one\n  of two lines</li>" in text
    assert ".plan li { white-space: pre-wrap; }" in text, "else a browser drops the second line's indentation"


# --- charts


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0, 2e-6, 4) == [0, 5e-7, 1e-6, 1.5e-6, 2e-6]
    assert ticks(3, 397, 6) == [100, 200, 300]
    assert ticks(5, 5, 3) == [5]
    for low, high in ((0.0123, 0.0456), (-3, 700), (1e8, 3e9)):
        found = ticks(low, high, 5)
        assert 3 <= len(found) <= 10
        assert low <= found[0] < found[-1] <= high


def test_numbers_of_an_axis_are_short_and_differ() -> None:
    assert [number(v) for v in (0, 5e-7, 1e-6, 1.5e-6, 0.05, 1200, 2.5e6, 3e9)] == [
        "0", "5e-7", "1e-6", "1.5e-6", "0.05", "1200", "2.5M", "3G",
    ]  # fmt: skip


def test_thinning_keeps_the_mean_and_the_end() -> None:
    points = [(float(i), float(i % 7)) for i in range(10_000)]
    thin = thinned(points, 100)
    assert len(thin) <= 100
    assert thin[-1] == points[-1]
    assert sum(y for _, y in thin) / len(thin) == pytest.approx(3.0, abs=0.1)
    assert thinned(points[:50], 100) == points[:50]


def test_smoothing_has_no_bias_to_the_start() -> None:
    assert [y for _, y in smoothed([(i, 2.0) for i in range(20)], 10)] == pytest.approx([2.0] * 20)
    assert smoothed([], 10) == []


def points_of(svg: str) -> list[tuple[float, float]]:
    drawn = re.search(r'points="([^"]*)"', svg)
    assert drawn
    return [tuple(map(float, pair.split(","))) for pair in drawn[1].split()]  # type: ignore[misc]


def test_lines_stay_inside_the_chart() -> None:
    values = [(float(i), math.sin(i) * 3) for i in range(200)] + [(200.0, 1e9)]
    for x, y in points_of(chart("t", [Line("a", values)])):
        assert 58 <= x <= 548
        assert 12 <= y <= 202


def test_one_outlier_does_not_flatten_the_rest() -> None:
    svg = chart("t", [Line("a", [(float(i), 1.0 + i % 2) for i in range(300)] + [(300.0, 1e6)])])
    heights = [y for _, y in points_of(svg)]
    assert max(heights) - min(heights[:-1]) > 50


@pytest.mark.parametrize("points", [[(1, 0.5)], [(1, 0.0), (2, 0.0)], [(3, -1.0), (3, -1.0)]])
def test_flat_lines_and_single_points_are_drawn(points: list[tuple[float, float]]) -> None:
    svg = chart("t", [Line("a", points)])
    Page(svg)
    assert all(map(math.isfinite, [c for point in points_of(svg) for c in point]))


def test_a_chart_without_points_is_nothing() -> None:
    assert chart("t", [Line("a", [])]) == ""


# --- a real browser


def chromium(folder: Path) -> list[str]:
    return [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}", "--window-size=1200,1800",
        "--enable-logging=stderr", "--v=0",
    ]  # fmt: skip


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium")
def test_nothing_is_cut_off_on_a_telephone(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run", previews=(0, 25, 123450)))
    script = """<style>body { width: 390px; }</style><script>
        const ends = [...document.querySelectorAll("main *")].map(e => e.getBoundingClientRect().right);
        document.body.dataset.end = Math.max(...ends);
        </script></body>"""
    path.write_text(path.read_text().replace("</body>", script))
    command = [*chromium(tmp_path), "--dump-dom", path.as_uri()]
    page = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    end = re.search(r'data-end="([\d.]+)"', page.stdout)
    assert end
    assert float(end[1]) <= 390


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium")
def test_a_browser_draws_it_and_its_slider_moves(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = write_report(folder)
    path.write_text(
        path.read_text().replace(
            "</body>",
            # What a person does: one preview back, then over the first chart.
            """<script>
            document.getElementById("back").click();
            const svg = document.querySelector("[data-chart] svg"), box = svg.getBoundingClientRect();
            const middle = {clientX: box.left + box.width / 2, clientY: box.top + 9};
            svg.dispatchEvent(new PointerEvent("pointermove", middle));
            </script></body>""",
        )
    )
    arguments = chromium(tmp_path)
    url = path.as_uri()
    page = subprocess.run([*arguments, "--dump-dom", url], capture_output=True, text=True, timeout=300, check=True)
    assert "Uncaught" not in page.stderr
    assert re.search(r'<output id="step">step 25</output>', page.stdout)
    shown = re.findall(r'<img data-step="(\d+)"[^>]*>', re.sub(r'src="[^"]*"', "", page.stdout))
    hidden = re.findall(r'<img data-step="(\d+)"[^>]* hidden="">', re.sub(r'src="[^"]*"', "", page.stdout))
    assert (shown, hidden) == (["0", "25", "50"], ["0", "50"])
    assert 'style="visibility: visible;"' in page.stdout
    values = re.findall(r'<b data-line="0">([^<]+)</b>', page.stdout)
    assert values
    assert 0.02 < float(values[0]) < 0.3, "the loss in the middle of the run, not at its end"
    screenshot = tmp_path / "page.png"
    subprocess.run([*arguments, f"--screenshot={screenshot}", url], capture_output=True, timeout=300, check=True)
    with Image.open(screenshot) as image:
        colours = image.convert("RGB").getcolors(1 << 24) or []
    assert len(colours) > 100, "an empty page"
    assert sum(count for count, (r, g, b) in colours if r > 250 and g < 10 and b < 10) > 5000, (
        "the preview is not shown"
    )
