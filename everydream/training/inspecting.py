"""What scripts/show.py prints of runs and checkpoints: lines of text, made from the files alone, without torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from everydream.training.checkpoint import folders, read_manifest, step_of, verify
from everydream.training.rawtensors import RawTensor, read_header
from everydream.training.retention import KEEP, SUPERSEDED
from everydream.training.runfolder import Run, runs

WEIGHT_FILES = {
    "unet": "model/unet/diffusion_pytorch_model.safetensors",
    "text_encoder": "model/text_encoder/model.safetensors",
    "vae": "model/vae/diffusion_pytorch_model.safetensors",
    "ema": "ema.safetensors",
}
TIME = "%Y-%m-%d %H:%M:%S"
Tensors = Mapping[str, RawTensor]


# A folder of runs, a run


def show_runs(logdir: Path) -> Iterator[str]:
    """Newest first."""
    rows = [("run", "folder", "project", "begun (UTC)", "checkpoints", "newest step")]
    for run in runs(logdir):
        found = folders(run.checkpoints)
        newest = str(step_of(found[0])) if found else "-"
        about = run.about
        rows.append((str(run.counter), run.folder.name, about.get("project_name", "?"), _begun(about), str(len(found)),
                     newest))  # fmt: skip
    yield from table(rows)


def check(paths: Iterable[Path], *, quick: bool) -> dict[Path, list[str]]:
    """What is wrong with each; `quick` looks at names and sizes only."""
    return {path: verify(path, hashes=not quick) for path in paths}


def show_run(run: Run, checked: Mapping[Path, list[str]], *, quick: bool) -> Iterator[str]:
    """Its recipe, and its checkpoints with what `check` found."""
    about = run.about
    yield f"run {about.get('counter', '?')} of {about.get('project_name', '?')}, begun {_begun(about)} UTC"
    yield from ("", "recipe (what is not a default)", *_recipe(run.config))
    yield from ("", "checkpoints")
    rows = [("step", "bytes", "saved (UTC)", "", "")]
    for path, problems in checked.items():
        keep = KEEP if (path / KEEP).exists() else ""
        rows.append((str(step_of(path)), *_size_and_time(path), keep, verdict(problems, quick)))
    yield from table(rows) if len(rows) > 1 else ["  none"]
    if run.checkpoints.is_dir():
        others = sorted(path.name for path in run.checkpoints.iterdir() if step_of(path) is None)
        yield from (f"  {name}  {_what_it_is(name)}" for name in others)


def _recipe(config: Path) -> Iterator[str]:
    try:
        settings = json.loads(config.read_bytes())["settings"]
    except (OSError, ValueError, KeyError):
        yield f"  {config} cannot be read"
        return
    chosen = {key: entry for key, entry in settings.items() if entry["origin"] != "default"}
    yield from table(
        [(key, json.dumps(one["value"], ensure_ascii=False), one["origin"]) for key, one in chosen.items()]
    )


def _size_and_time(path: Path) -> tuple[str, str]:
    saved = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
    return f"{sum(file.stat().st_size for file in path.rglob('*') if file.is_file()):,}", f"{saved:{TIME}}"


def _begun(about: Mapping[str, Any]) -> str:
    try:
        return f"{datetime.fromisoformat(about['created']).astimezone(timezone.utc):{TIME}}"
    except (KeyError, TypeError, ValueError):
        return "?"


def verdict(problems: Sequence[str], quick: bool) -> str:
    return "; ".join(problems) if problems else "names and sizes agree" if quick else "verified"


def _what_it_is(name: str) -> str:
    if name.startswith(SUPERSEDED):
        return "set aside when the run went on from an earlier step; delete it if you do not want it"
    return "left by a save or a deletion under way; the next start removes it" if name.startswith(".") else ""


# A checkpoint


def show_checkpoint(path: Path) -> Iterator[str]:
    """Its state, files, groups and weights, of one that was checked."""
    state = json.loads((path / "state.json").read_bytes())
    parts = {part: tensors for part, tensors, _ in _weights(path)}
    optimizers = state.pop("optimizers", {})
    yield from ("state", *table([(key, json.dumps(value)) for key, value in state.items()]))
    files = read_manifest(path)["files"]
    yield from (
        "",
        "files",
        *table([(name, f"{file['bytes']:,}", file["sha256"][:12]) for name, file in files.items()]),
    )
    yield from ("", "groups", *table(list(_groups(optimizers, parts))))
    for part, tensors, where in _weights(path):
        yield from ("", f"{part} ({where})", *table(list(_norms(tensors))))


def _weights(path: Path) -> Iterator[tuple[str, Tensors, str]]:
    for part, name in WEIGHT_FILES.items():
        if (path / name).is_file():
            yield part, read_header(path / name)[0], name


def _groups(optimizers: Mapping[str, Any], parts: Mapping[str, Tensors]) -> Iterator[Sequence[str]]:
    yield "part", "optimizer", "tensors", "parameters", "lr", "weight decay"
    for part, saved in optimizers.items():
        for leaf in saved["leaves"]:
            for group in leaf["groups"]:
                names, values = group["parameters"], group["values"]
                known = parts.get(part, {})
                count = sum(known[name].size for name in names if name in known)
                shown = (str(values.get(key, "-")) for key in ("lr", "weight_decay"))
                yield part, f"{leaf['class']} ({leaf['library']})", str(len(names)), f"{count:,}", *shown


def _norms(tensors: Tensors) -> Iterator[Sequence[str]]:
    yield "block", "tensors", "parameters", "type", "norm", "root mean square", "not finite"
    for block, names in _blocks(tensors):
        squares, size, bad = 0.0, 0, 0
        for name in names:
            values = tensors[name].values()
            finite = np.isfinite(values)
            squares += float(np.square(values[finite]).sum())
            size, bad = size + values.size, bad + int((~finite).sum())
        types = "/".join(sorted({tensors[name].dtype for name in names}))
        mean = (squares / max(size, 1)) ** 0.5
        yield block, str(len(names)), f"{size:,}", types, f"{squares**0.5:.6g}", f"{mean:.4g}", str(bad or "")


def _blocks(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """`down_blocks.0`, `encoder.layers.3`, `conv_in`: as deep as the first number, or one word."""

    def block(name: str) -> str:
        words = name.removeprefix("text_model.").split(".")
        number = next((n for n, word in enumerate(words) if word.isdigit()), 0)
        return ".".join(words[: number + 1])

    ordered = sorted(names, key=lambda name: (block(name), name))
    return [(key, list(some)) for key, some in groupby(ordered, block)] + [("all", ordered)]


# Two checkpoints


def show_difference(a: Path, b: Path) -> Iterator[str]:
    """How far each block went from `a` to `b`, and what else differs."""
    states = [json.loads((path / "state.json").read_bytes()) for path in (a, b)]
    rows = [(key, json.dumps(states[0].get(key)), json.dumps(value)) for key, value in states[1].items()
            if key != "optimizers" and states[0].get(key) != value]  # fmt: skip
    yield from ("", "state", *table(rows))
    files = [read_manifest(path)["files"] for path in (a, b)]
    same = [name for name in files[0] if files[1].get(name) == files[0][name]]
    yield from ("", f"equal files: {', '.join(same) or 'none'}")
    before, after = ({part: (tensors, name) for part, tensors, name in _weights(path)} for path in (a, b))
    for part in before.keys() & after.keys():
        if before[part][1] not in same:
            yield from ("", part, *table(list(_distances(before[part][0], after[part][0]))))


def _distances(before: Tensors, after: Tensors) -> Iterator[Sequence[str]]:
    yield "block", "norm before", "distance", "relative", "changed tensors", "most changed"
    common = [name for name in before if name in after and before[name].shape == after[name].shape]
    for block, names in _blocks(common):
        norms, moves = [], []
        for name in names:
            old, new = before[name].values(), after[name].values()
            norms.append(float(np.square(old).sum()))
            moves.append(float(np.square(new - old).sum()))
        norm, move = sum(norms) ** 0.5, sum(moves) ** 0.5
        most = names[int(np.argmax(moves))] if move else ""
        changed = f"{sum(m > 0 for m in moves)} of {len(names)}"
        yield block, f"{norm:.6g}", f"{move:.4g}", f"{move / norm:.2e}" if norm else "-", changed, most
    for name in sorted(before.keys() ^ after.keys()):
        yield name, "only before" if name in before else "only after", "", "", "", ""


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Aligned columns; those of numbers, below a header of any kind, to the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(not cell or cell[0].isdigit() for cell in column[1:]) for column in columns]
    for row in rows:
        cells = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)]
        yield ("  " + "  ".join(cells)).rstrip()
