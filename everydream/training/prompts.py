"""What previews show: a prompts file, read into pictures to make.

`.txt`: one prompt a line; empty lines and lines that start with # are passed over.
`.json`: a list of prompts, each a string or an object; or an object with "prompts" and defaults for all of them:

    {"steps": 30, "guidance": [1, 7.5], "prompts": ["a sks dog", {"prompt": "a cat", "seed": 7, "size": [512, 768]}]}
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from everydream.errors import ConfigError, did_you_mean

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {  # name → class in diffusers, what it needs beside the model's own
    # Both clip by default, which is for pixels, not for latents.
    "ddim": ("DDIMScheduler", {"clip_sample": False}),  # our own, in fact: diffusion/ddim.py
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "heun": ("HeunDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
ALIASES = {  # EveryDream2's names
    "samples": "prompts",
    "cfgs": "guidance",
    "cfg": "guidance",
    "num_inference_steps": "steps",
}
IGNORED = {"show_progress_bars", "batch_size", "generate_pretrain_samples", "generate_samples_every_n_steps"}


@dataclass(frozen=True)
class Sampling:
    """How one prompt is made into pictures, one for each guidance. Sizes in pixels; seed −1: another one each time.

    size_step: what the model's sizes must divide by; 64 for Stable Diffusion 1 and 2.
    """

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 555
    width: int = 512
    height: int = 512
    guidance: tuple[float, ...] = (7.5,)
    steps: int = 30
    scheduler: str = "ddim"
    size_step: int = 64


@dataclass(frozen=True)
class Picture:
    """One picture to make."""

    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    guidance: float
    steps: int
    scheduler: str

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def read(path: Path, defaults: Sampling, captions: Sequence[str] = ()) -> list[Picture]:
    """The pictures that a prompts file asks for. Raises ConfigError with every problem.

    captions: of the training pictures, for entries with "random_caption": true; the same ones each time.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"sample_prompts: {path} cannot be read ({error})") from error
    entries: Any = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if path.suffix.lower() == ".json":
        try:
            entries = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"sample_prompts: {path} is not JSON: {error}") from error
    return parse(entries, defaults, captions, where=f"sample_prompts: {path}")


def parse(entries: Any, defaults: Sampling, captions: Sequence[str] = (), *, where: str) -> list[Picture]:
    """As `read`, from what a JSON file holds. `where` starts each problem."""
    problems: list[str] = []
    samplings = _samplings(entries, defaults, captions, problems.append)
    if not samplings and not problems:
        problems.append("has no prompts. Write one a line (.txt), or a list of them (.json)")
    if problems:
        raise ConfigError(f"{where}: {problem}" for problem in problems)
    return pictures(samplings)


def settled(entry: Mapping[str, Any], defaults: Sampling, *, where: str) -> Sampling:
    """`defaults` with what the entry says. Raises ConfigError with every problem."""
    problems: list[str] = []
    sampling = _sampling(entry, defaults, problems.append)
    if problems:
        raise ConfigError(f"{where}: {problem}" for problem in problems)
    return sampling


def pictures(samplings: Iterable[Sampling]) -> list[Picture]:
    made = []
    for sampling in samplings:
        seed = secrets.randbelow(2**31) if sampling.seed < 0 else sampling.seed
        common = {k: v for k, v in asdict(sampling).items() if k != "size_step"} | {"seed": seed}
        made += [Picture(**{**common, "guidance": guidance}) for guidance in sampling.guidance]
    return made


Report = Callable[[str], object]


def _samplings(entries: Any, defaults: Sampling, captions: Sequence[str], report: Report) -> list[Sampling]:
    if isinstance(entries, dict):
        entries = _renamed(entries)
        common = {key: value for key, value in entries.items() if key != "prompts"}
        defaults = _sampling(common, defaults, partial(_report_at, report, "for all prompts"))
        entries = entries.get("prompts", [])
    if not isinstance(entries, list):
        report('must be a list of prompts, or an object with "prompts"')
        return []
    found = []
    for i, entry in enumerate(entries):
        where = f"prompt {i + 1}"
        if isinstance(entry, str):
            found.append(replace(defaults, prompt=entry.strip()))
            continue
        if not isinstance(entry, dict):
            report(f"{where}: must be a string or an object, not {json.dumps(entry)}")
            continue
        entry = _renamed(entry)
        if entry.pop("random_caption", False) and captions:
            from everydream.draws import generator  # numpy, which `sample.py --help` does without

            entry["prompt"] = captions[int(generator(defaults.seed, "random caption", i).integers(len(captions)))]
        if not isinstance(entry.get("prompt", defaults.prompt or None), str):
            report(f'{where}: needs a "prompt"')
        found.append(_sampling(entry, defaults, partial(_report_at, report, where)))
    return found


def _report_at(report: Report, where: str, problem: str) -> None:
    report(f"{where}: {problem}")


def _renamed(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {ALIASES.get(key, key): value for key, value in entry.items() if key not in IGNORED}


def _sampling(entry: Mapping[str, Any], defaults: Sampling, report: Report) -> Sampling:
    """`defaults` with what the entry says. Each value goes through its row of READERS."""
    values: dict[str, Any] = {}
    for key, value in entry.items():
        if key not in READERS:
            report(f"{key} is not known.{did_you_mean(key, READERS)} Known: {', '.join(READERS)}")
            continue
        try:
            values |= READERS[key](value, defaults)
        except (TypeError, ValueError) as error:
            report(f"{key}: {json.dumps(value)}: {error}")
    return replace(defaults, **values)


def _text(key: str) -> Callable[[Any, Sampling], dict[str, Any]]:
    def read(value: Any, defaults: Sampling) -> dict[str, Any]:
        if not isinstance(value, str):
            raise ValueError("must be a string")
        return {key: value}

    return read


def _whole(key: str, low: int) -> Callable[[Any, Sampling], dict[str, Any]]:
    def read(value: Any, defaults: Sampling) -> dict[str, Any]:
        return {key: _whole_number(value, low)}

    return read


def _side(key: str) -> Callable[[Any, Sampling], dict[str, Any]]:
    def read(value: Any, defaults: Sampling) -> dict[str, Any]:
        return {key: _whole_number(value, defaults.size_step, defaults.size_step)}

    return read


def _whole_number(value: Any, low: int, step: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or value % step:
        raise ValueError(f"must be a whole number from {low}" + (f", a multiple of {step}" if step > 1 else ""))
    return value


def _size(value: Any, defaults: Sampling) -> dict[str, Any]:
    """512, [512, 768] or "512x768": width, height."""
    if isinstance(value, str):
        value = [int(part) for part in value.lower().split("x")]
        value = value if len(value) > 1 else value[0]
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2:
        raise ValueError("must be one side, or [width, height]")
    width, height = (_whole_number(side, defaults.size_step, defaults.size_step) for side in sides)
    return {"width": width, "height": height}


def _aspect_ratio(value: Any, defaults: Sampling) -> dict[str, Any]:
    """Width by height, at the area that is set otherwise."""
    root = math.sqrt(float(value))
    if not 0.1 <= root <= 10:
        raise ValueError("must be between 0.01 and 100")
    side = math.sqrt(defaults.width * defaults.height)
    step = defaults.size_step
    width, height = (max(1, round(s / step)) * step for s in (side * root, side / root))
    return {"width": width, "height": height}


def _guidance(value: Any, defaults: Sampling) -> dict[str, Any]:
    numbers = value if isinstance(value, list) else [value]
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int | float) or n < 0 for n in numbers):
        raise ValueError("must be a number from 0, or a list of them")
    return {"guidance": tuple(float(n) for n in numbers)}


def _scheduler(value: Any, defaults: Sampling) -> dict[str, Any]:
    if value not in SCHEDULERS:
        raise ValueError(f"is none of {', '.join(SCHEDULERS)}")
    return {"scheduler": value}


READERS: dict[str, Callable[[Any, Sampling], dict[str, Any]]] = {
    "prompt": _text("prompt"),
    "negative_prompt": _text("negative_prompt"),
    "seed": _whole("seed", -1),
    "size": _size,
    "width": _side("width"),
    "height": _side("height"),
    "aspect_ratio": _aspect_ratio,
    "guidance": _guidance,
    "steps": _whole("steps", 1),
    "scheduler": _scheduler,
}
