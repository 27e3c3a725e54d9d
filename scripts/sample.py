"""Sample: python scripts/sample.py MODEL "a prompt" "another" [--guidance 4 7.5] [--steps 30] [--out samples]

MODEL is a run's folder (its newest checkpoint that is whole), a checkpoint, a diffusers folder, an original single file
or a hub id. The same sampler, options and seeds as the previews of a training: the same pictures.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone runs without being installed

from everydream.__main__ import named_if_missing

with named_if_missing():
    from everydream.errors import CheckpointError, ConfigError, EveryDreamError, SaveError
    from everydream.models.family import Family, load, read_facts
    from everydream.training import prompts
    from everydream.training.checkpoint import step_of
    from everydream.training.console import Console
    from everydream.training.prompts import SCHEDULERS, Picture, Sampling
    from everydream.training.quiet import quiet_libraries
    from everydream.training.runfolder import Run, model_in, require_average, title_of

if TYPE_CHECKING:
    from PIL.Image import Image


def main() -> int:
    options = parser().parse_intermixed_args()
    console = Console("quiet" if options.quiet else "normal")
    quiet_libraries()
    try:
        for path in sample(options, console):
            print(path)
    except EveryDreamError as error:
        console.say(str(error), "error")
        return error.exit_code
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("model", metavar="MODEL")
    made.add_argument("prompts", nargs="*", metavar="PROMPT")
    made.add_argument("--prompts_file", type=Path, help="a file as for sample_prompts, besides or instead of PROMPT")
    made.add_argument("--negative_prompt")
    made.add_argument("--seed", type=int, help="-1: another one each time (default: 555)")
    made.add_argument("--size", help="512 or 512x768: width x height (default: the model's own)")
    made.add_argument("--guidance", type=float, nargs="+", help="one picture each (default: 7.5)")
    made.add_argument("--steps", type=int, help="(default: 30)")
    made.add_argument("--scheduler", choices=SCHEDULERS, help="(default: ddim)")
    made.add_argument("--batch_size", type=int, default=4, help="pictures at a time (default: 4)")
    made.add_argument("--average", action="store_true", help="of a checkpoint: its averaged weights (ema_decay_rate)")
    made.add_argument("--clip_skip", type=int, help="(default: as the run was trained, else 0)")
    made.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a card if there is one)")
    made.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="(default: float16 on a card)")
    made.add_argument("--out", type=Path, default=Path("samples"), help="folder for the pictures (default: samples)")
    made.add_argument("--revision", help="of a hub id")
    made.add_argument("--allow_pickle", action="store_true", help="read .ckpt and .bin; only tensors are loaded")
    made.add_argument("--prediction_type", choices=("epsilon", "v_prediction", "sample"), help="if MODEL does not say")
    made.add_argument("--quiet", action="store_true")
    return made


def sample(options: argparse.Namespace, console: Console) -> list[Path]:
    """Paths of the pictures, and last that of the grid if there is more than one. Raises EveryDreamError."""
    model, average_file = model_in(options.model)
    average = require_average(average_file) if options.average else None
    facts = read_facts(model, options.revision, options.allow_pickle, options.prediction_type)
    side = facts.resolution
    wanted = read_wanted(options, Sampling(width=side, height=side, size_step=facts.vae_factor * facts.unet_factor))
    trained = recipe(model)

    import torch  # only once the arguments are right

    from everydream.training.sampling import Parts, batches
    from everydream.training.sampling import sample as make

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype or ("float16" if device.startswith("cuda") else "float32"))
    clip_skip = trained.get("clip_skip", 0) if options.clip_skip is None else options.clip_skip
    family = load(facts, train=(), frozen_dtype=dtype, device=device, clip_skip=clip_skip)
    if average is not None:
        put_average(family, average)
    parts = Parts.of(family, trained.get("max_caption_chunks", 1))
    for text in dict.fromkeys(picture.prompt for picture in wanted if parts.is_too_long(picture.prompt)):
        console.say(f"{text[:60]!r}… has more tokens than the model reads: only its start is used", "warning")
    made: dict[int, Image] = {}
    with console.task("sampling", len(wanted)) as advance:
        for batch in batches(wanted, options.batch_size):
            made |= dict(zip(batch, make(parts, [wanted[i] for i in batch]), strict=True))
            advance(len(batch))
    try:
        return write(options.out, wanted, [made[i] for i in range(len(wanted))], model)
    except OSError as error:
        raise SaveError(f"--out {options.out} cannot be written: {error.strerror or error}") from None


def recipe(model: str) -> dict[str, Any]:
    """Name → value of the settings of the run that made a checkpoint; empty for any other model."""
    checkpoint = Path(model).absolute().parent  # <run>/checkpoints/step-…/model
    step = step_of(checkpoint)
    if step is None:
        return {}
    try:
        settings = Run(checkpoint.parents[1]).record_at(step)["settings"]
        return {name: entry["value"] for name, entry in settings.items()}
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return {}


def read_wanted(options: argparse.Namespace, model: Sampling) -> list[Picture]:
    keys = ("negative_prompt", "seed", "size", "guidance", "steps", "scheduler")
    given = {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    if options.batch_size < 1:
        raise ConfigError(f"--batch_size: {options.batch_size}: must be a whole number from 1")
    if not options.prompts and options.prompts_file is None:
        raise ConfigError("give a PROMPT, or --prompts_file")
    defaults = prompts.settled(given, model, where="command line")
    wanted = prompts.parse(options.prompts, defaults, where="command line") if options.prompts else []
    return wanted + (prompts.read(options.prompts_file, defaults) if options.prompts_file else [])


def put_average(family: Family, path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    parameters = {f"{part}.{n}": p for part in ("unet", "text_encoder") for n, p in family.parameters_of(part).items()}
    with torch.no_grad():
        for name, tensor in load_file(path).items():
            parameters[name].copy_(tensor)


def write(folder: Path, wanted: Sequence[Picture], images: Sequence[Image], model: str) -> list[Path]:
    """Numbered on from what is in the folder; nothing is overwritten."""
    from everydream.training import grids
    from everydream.training.previews import guidance_columns

    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(found[1]) for path in folder.iterdir() if (found := re.match(r"(\d+)-", path.name))]
    number, paths, cells = max(taken, default=0) + 1, [], []
    for i, (picture, image) in enumerate(zip(wanted, images, strict=True)):
        words = re.sub(r"[^\w]+", "-", picture.prompt)[:40].strip("-") or "empty"
        paths.append(folder / f"{number + i:04d}-{words}.png")
        paths[-1].write_bytes(grids.png(image, {**picture.facts(), "model": model}))
        note = f"guidance {picture.guidance:g} · seed {picture.seed}"
        cells.append(grids.Cell(image, picture.prompt, note, picture.facts()))
    if len(images) > 1:
        grid, facts = grids.draw(cells, title_of(model), guidance_columns(wanted))
        paths.append(folder / f"{number + len(images):04d}-grid.png")
        paths[-1].write_bytes(grids.png(grid, {"model": model, "cells": facts}))
    return paths


if __name__ == "__main__":
    with named_if_missing():
        sys.exit(main())
