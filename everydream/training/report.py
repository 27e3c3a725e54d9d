"""report.html in the run folder: one static file that holds everything it shows. A pure function of the run folder.

python -m everydream.training.report RUN_FOLDER
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from everydream.training import jsonl
from everydream.training.charts import Line, chart, smoothed
from everydream.training.log import utc_now
from everydream.training.page import PAGE
from everydream.training.progress import duration
from everydream.training.records import EVENTS, METRICS, grid_files
from everydream.training.storage import Bytes, write_atomically

REPORT = "report.html"
MAX_PREVIEWS = 40  # embedded; of more, evenly chosen ones, the first and the last among them
PREVIEW_WIDTH = 1600  # px
Points = list[tuple[float, float]]
Escaped = str  # HTML


@dataclass
class Told:
    """What a run folder says."""

    folder: Path
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Points] = field(default_factory=dict)

    @classmethod
    def by(cls, folder: Path) -> Told:
        told = cls(folder, _settings(folder), list(jsonl.read(folder / EVENTS)))
        for record in jsonl.read(folder / METRICS):
            for name, value in record.items():
                if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                    told.metrics.setdefault(name, []).append((record.get("step", 0), value))
        return told

    def last(self, name: str) -> float | None:
        return self.metrics[name][-1][1] if name in self.metrics else None

    def newest(self, kind: str) -> dict[str, Any]:
        """The fields of the newest event of this kind; empty where there is none."""
        return next((event for event in reversed(self.events) if event.get("kind") == kind), {})

    @property
    def name(self) -> str:
        return str(self.settings.get("run_name", {}).get("value") or self.folder.name)

    @property
    def step(self) -> int:
        steps = [points[-1][0] for points in self.metrics.values()]
        return int(max([event.get("step") or 0 for event in self.events] + steps, default=0))


def write_report(folder: Path) -> Path:
    """Raises OSError where it cannot be written."""
    path = folder / REPORT
    write_atomically(path, Bytes(render(Told.by(folder)).encode()))
    return path


def render(told: Told) -> str:
    sections = {
        "title": html.escape(told.name),
        "header": _header(told),
        "figures": _figures(told),
        "previews": _previews(told),
        "charts": _charts(told),
        "warnings": _warnings(told),
        "plan": _plan(told),
        "settings": _settings_table(told),
        "checkpoints": _checkpoints(told),
    }
    return PAGE.substitute(sections)


def _settings(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    try:
        settings = json.loads((folder / "config.json").read_bytes())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _header(told: Told) -> Escaped:
    end, started = told.newest("end"), told.newest("training")
    is_over = bool(end) and told.events.index(end) > (told.events.index(started) if started else -1)
    state, words = ("running", "running")
    if is_over:
        state = "done" if end.get("code") == 0 else "failed"
        words = "finished" if end.get("code") == 0 else f"ended with code {end.get('code')}"
    total = started.get("max_steps")
    share = told.step / total if total else 0.0
    reason = f"<p>{html.escape(str(end.get('reason', '')))}</p>" if is_over and end.get("code") else ""
    return (
        f'<p class="state {state}">{words}</p><h1>{html.escape(told.name)}</h1>'
        f'<div class="bar" title="{share:.0%}"><i style="width:{share:.1%}"></i></div>'
        f'{reason}<p class="faint">{_times(told)}</p>'
    )


def _times(told: Told) -> Escaped:
    stamps = [stamp for event in told.events if (stamp := _time(event.get("time"))) is not None]
    if not stamps:
        return f"written {utc_now()}"
    took = duration((stamps[-1] - stamps[0]).total_seconds())
    first, last = (stamp.strftime("%Y-%m-%d %H:%M") for stamp in (stamps[0], stamps[-1]))
    return f"from {first} to {last} UTC ({took})"


def _time(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return None


def _figures(told: Told) -> Escaped:
    total, epoch, loss = told.newest("training").get("max_steps"), told.last("epoch"), told.metrics.get("loss", [])
    best = min(told.metrics.get("loss_val", []), key=lambda point: point[1], default=None)
    memory = max((value for _, value in told.metrics.get("memory_bytes", [])), default=None)
    speed = [value for _, value in told.metrics.get("images_per_s", [])]
    shown = {
        "step": f"{told.step:,}" + (f" <small>of {total:,}</small>" if total else ""),
        "epochs done": None if epoch is None else f"{int(epoch):,}",
        "pictures seen": None if told.last("images_seen") is None else f"{int(told.last('images_seen') or 0):,}",
        "loss, smoothed": f"{smoothed(loss, _over(loss))[-1][1]:.4f}" if loss else None,
        "best validation": f"{best[1]:.4f} <small>step {int(best[0]):,}</small>" if best else None,
        "images a second": f"{sorted(speed)[len(speed) // 2]:.3g} <small>median</small>" if speed else None,
        "memory, highest": f"{memory / 1e9:.2f} <small>GB</small>" if memory else None,
    }
    return "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in shown.items() if text is not None)


def _over(points: Sequence[Any]) -> int:
    return max(1, min(50, len(points) // 10))


def _previews(told: Told) -> Escaped:
    grids = grid_files(told.folder)
    steps = spread(sorted(grids), MAX_PREVIEWS)
    images = [(step, source) for step in steps if (source := _embedded(grids[step])) is not None]
    if not images:
        return ""
    last = len(images) - 1
    shown = "".join(
        f'<img data-step="{step}" src="{source}" alt="preview at step {step}"{"" if i == last else " hidden"}>'
        for i, (step, source) in enumerate(images)
    )
    of = f" ({len(images)} of {len(grids)} are here; all are in samples/)" if len(images) < len(grids) else ""
    slider = (
        f'<div class="slider"><button id="back" aria-label="earlier">‹</button>'
        f'<input id="slider" type="range" min="0" max="{last}" value="{last}" aria-label="step of the preview">'
        f'<button id="on" aria-label="later">›</button><output id="step">step {images[-1][0]}</output>'
        '<button id="first" title="hold to see the first preview">hold: before</button></div>'
        if last
        else ""
    )
    return f'<section><h2>Previews<small>{of}</small></h2>{slider}<div id="previews">{shown}</div></section>'


def spread(steps: Sequence[int], limit: int) -> list[int]:
    """At most `limit` of them, evenly, with the first and the last."""
    if len(steps) <= limit:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (limit - 1))] for i in range(limit)]


def _embedded(path: Path) -> str | None:
    try:
        return _data_uri(path, path.stat().st_mtime_ns)
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=MAX_PREVIEWS * 2)
def _data_uri(path: Path, mtime_ns: int) -> str:
    """As WebP: a tenth of the PNG. Kept, so that a refresh encodes new ones only."""
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((PREVIEW_WIDTH, 10 * PREVIEW_WIDTH))
        buffer = io.BytesIO()
        small.save(buffer, format="WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _charts(told: Told) -> Escaped:
    m = told.metrics
    loss, prior = m.get("loss", []), m.get("loss_prior", [])
    validation = [name for name in m if name.startswith(("loss_val", "loss_train"))]
    drawn = [
        chart(
            "Training loss",
            [
                Line("each line", loss, "faint"),
                Line("smoothed", smoothed(loss, _over(loss))),
                Line("each line", prior, "faint"),
                Line("class pictures, smoothed", smoothed(prior, _over(prior))),
            ],
        ),
        chart("Validation loss", [Line(NAMES.get(n, n), m[n]) for n in sorted(validation)], from_zero=False),
        chart("Learning rate", [Line(name, m.get(f"lr_{part}", [])) for part, name in PARTS.items()]),
        chart("Gradient norm", [Line(name, m.get(f"grad_norm_{part}", [])) for part, name in PARTS.items()]),
        chart("Speed", [Line("images a second", m.get("images_per_s", []))], unit="images/s"),
        chart("Memory", [Line("used", [(s, v / 1e9) for s, v in m.get("memory_bytes", [])])], unit="GB"),
    ]
    return "".join(drawn) or '<p class="faint">No metrics yet.</p>'


PARTS = {"unet": "UNet", "text_encoder": "text encoder"}
NAMES = {"loss_val": "held-out pictures", "loss_train_fixed": "training pictures"}


def _warnings(told: Told) -> Escaped:
    shown = [event for event in told.events if event.get("level") in ("warning", "error")]
    rows = [
        f"<li><b>step {event.get('step')}</b> {html.escape(_without_step(str(event.get('message', ''))))}"
        f"<p>{html.escape(str(event.get('todo', '')))}</p></li>"
        for event in shown
    ]
    return f'<section><h2>Warnings</h2><ul class="warnings">{"".join(rows)}</ul></section>' if rows else ""


def _without_step(message: str) -> str:
    """Messages for the console name their step; the list does so itself."""
    return re.sub(r"^step \d+: ", "", message)


def _plan(told: Told) -> Escaped:
    """The event "plan": sections of lines, as --dry_run prints them."""
    sections = told.newest("plan").get("sections")
    if not isinstance(sections, dict):
        return ""
    drawn = []
    for title, lines in sections.items():
        texts = [html.escape(str(line)) for line in lines]
        # What is aligned in columns stays aligned.
        is_table = any("  " in line.strip() for text in texts for line in text.splitlines())
        items = "<pre>{}</pre>".format("\n".join(texts)) if is_table else f"<ul><li>{'</li><li>'.join(texts)}</li></ul>"
        wide = ' class="wide"' if is_table else ""
        drawn.append(f"<div{wide}><h3>{html.escape(title)}</h3>{items}</div>" if texts else "")
    return f'<section><h2>Data and plan</h2><div class="plan">{"".join(drawn)}</div></section>'


def _settings_table(told: Told) -> Escaped:
    if not told.settings:
        return ""
    chosen = {name: entry for name, entry in told.settings.items() if entry.get("origin") != "default"}
    others = {name: entry for name, entry in told.settings.items() if name not in chosen}
    return (
        f"<section><h2>Settings</h2>{_rows(chosen)}"
        f"<details><summary>{len(others)} defaults</summary>{_rows(others)}</details></section>"
    )


def _rows(entries: Mapping[str, Mapping[str, Any]]) -> Escaped:
    rows = [
        (
            code(name),
            code(json.dumps(entry.get("value"), ensure_ascii=False)),
            html.escape(str(entry.get("origin", ""))),
        )
        for name, entry in entries.items()
    ]
    return table(("setting", "value", "from"), rows)


def _checkpoints(told: Told) -> Escaped:
    rows = [
        (str(event.get("of_step")), code(str(event.get("path"))), f"{event.get('seconds') or 0:.1f} s")
        for event in told.events
        if event.get("kind") == "saved"
    ]
    drawn = table(("step", "folder, as it was written", "took"), rows)
    return f"<section><h2>Checkpoints</h2>{drawn}</section>" if rows else ""


def code(text: str) -> Escaped:
    return f"<code>{html.escape(text)}</code>"


def table(head: Sequence[Escaped], rows: Sequence[Sequence[Escaped]]) -> Escaped:
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr></thead><tbody>{body}</tbody></table>"


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(f"{__doc__}\nRUN_FOLDER is a folder in logs/")
    print(write_report(Path(sys.argv[1])))
