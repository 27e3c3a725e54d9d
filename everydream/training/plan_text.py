"""`--dry_run`: what a run would do, in words, from checked settings and pictures; no weights are read."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator
from textwrap import indent
from typing import TYPE_CHECKING

from everydream.data.summary import bucket_lines
from everydream.errors import ConfigError
from everydream.optim.groups import table_lines
from everydream.optim.memory import state_bytes
from everydream.training.prompts import read as read_prompts

if TYPE_CHECKING:
    from everydream.training.prepare import Prepared

BYTES = {"float32": 4, "bfloat16": 2}
SHOWN_STEPS = 8
SHOWN_CAPTIONS = 3


def plan_text(prepared: Prepared) -> str:
    return "\n\n".join(
        "\n".join([title, *(indent(line, "  ") for line in lines)])
        for title, lines in plan_sections(prepared).items()
        if lines
    )


def plan_sections(prepared: Prepared) -> dict[str, list[str]]:
    """Title → lines; also what the report says of the data."""
    return {
        "Pictures": list(_pictures(prepared)),
        "Steps": list(_steps(prepared)),
        "Trained": table_lines([group for groups in prepared.groups.values() for group in groups]),
        "Memory": list(_memory(prepared)),
        "Notes": list(dict.fromkeys((*prepared.warnings, *prepared.notes))),
    }


def _pictures(prepared: Prepared) -> Iterator[str]:
    plan = prepared.subject.plan
    yield f"samples: {len(prepared.subject.samples)}, in the first epoch {plan.draws_in(0)}"
    for sample in prepared.subject.samples[:SHOWN_CAPTIONS]:
        yield f"caption of {sample.identity}: {sample.caption}"
    yield from (f"bucket {line}" for line in bucket_lines(plan))
    for name, samples in prepared.validation_sets.items():
        yield f"{name}: {len(samples)} pictures"
    if prepared.has_class:
        there = len(prepared.scanned.get("class", ()))
        missing = max(0, (prepared.settings.num_class_images or 0) - there)
        yield f"class pictures: {there} there" + (f", {missing} to be made" if missing else "")


def _steps(prepared: Prepared) -> Iterator[str]:
    settings, clock, plan = prepared.settings, prepared.clock, prepared.subject.plan
    total = clock.total_steps
    epochs = clock.epochs_ended(total)
    first = plan.micro_batches(plan.start[1] + 1) - plan.start[0]
    yield f"micro-batches of {settings.batch_size}: {first} in the first epoch; what fills none waits for the next"
    yield (
        f"an update: {settings.batch_size} × {prepared.accumulation} accumulated × {prepared.ranks.count} processes = "
        f"{settings.batch_size * prepared.per_update} pictures"
    )
    yield f"steps an epoch: {plan.draws_in(plan.start[1]) / (settings.batch_size * prepared.per_update):.4g}"
    yield f"total steps: {total}, epochs: {epochs}"
    yield f"saves after step: {_listed(_saves(prepared), total)}"
    if settings.sample_prompts is not None and settings.sample_steps:
        yield f"previews at step: {_listed(range(0, total, settings.sample_steps), total)}"
        yield from _prompts(prepared)
    yield from prepared.rests()


def _prompts(prepared: Prepared) -> Iterator[str]:
    """The prompts file may be mended until its next preview: what is wrong with it ends no run."""
    captions = [sample.caption for sample in prepared.subject.samples]
    try:
        yield f"pictures a preview: {len(read_prompts(prepared.settings.sample_prompts, prepared.sampling, captions))}"
    except ConfigError as error:
        yield from (f"no previews: {problem}" for problem in error.problems)


def _saves(prepared: Prepared) -> Iterator[int]:
    """The steps before the last one, in order; some twice."""
    settings, clock = prepared.settings, prepared.clock
    every = settings.save_every_n_steps
    by_steps = range(every, clock.total_steps, every) if every else range(0)
    by_epochs = clock.steps_of_epoch_ends(settings.save_every_n_epochs) if settings.save_every_n_epochs else ()
    return heapq.merge(by_steps, by_epochs)


def _listed(steps: Iterable[int], last: int) -> str:
    """The first ones and the last one; a run may have any number of them."""
    several = (step for step, _ in itertools.groupby(steps) if step < last)
    first = list(itertools.islice(several, SHOWN_STEPS))
    if len(first) < SHOWN_STEPS:
        return ", ".join(map(str, [*first, last]))
    return ", ".join(map(str, first[:-1])) + f", … {last}"


def _memory(prepared: Prepared) -> Iterator[str]:
    """Weights, gradients and state are counted; activations are a rough estimate from measurements."""
    parts, total = counted_bytes(prepared), 0
    for part, rows in parts.items():
        known = {name: count for name, count in rows.items() if count is not None}
        total += sum(known.values())
        told = [f"{name} {size(count)}" for name, count in known.items() if count]
        yield f"{part}: " + ", ".join(told + [f"{name} unknown" for name in rows.keys() - known.keys()])
    yield f"together: {size(total)}, and activations of some {size(activation_bytes(prepared))} (an estimate)"


def counted_bytes(prepared: Prepared) -> dict[str, dict[str, int | None]]:
    """Part → what → bytes; None for a state that the table does not know. The UNet is there, trained or not."""
    settings, counts = prepared.settings, {}
    for part in {"unet", *prepared.parts}:
        counts[part] = sum(math.prod(shape) for shape in prepared.facts.shapes[part].values())
    width = BYTES[settings.weights_dtype]
    result: dict[str, dict[str, int | None]] = {}
    if "unet" not in prepared.parts:
        result["unet"] = {"weights": BYTES["float32"] * counts["unet"]}
    for part, groups in prepared.groups.items():
        trained = sum(group.parameters for group in groups)
        optimizer = prepared.resolved.optimizers[part]
        shapes = [shape for group in groups for shape in group.shapes]
        result[part] = {
            "weights": width * counts[part],
            "gradients": 0 if settings.fused_backward else width * trained,
            "optimizer state": state_bytes(optimizer.optimizer, shapes, optimizer.args),
            "average": 4 * trained if settings.ema_decay_rate else 0,
        }
    return result


def activation_bytes(prepared: Prepared) -> int:
    """What backward keeps of the UNet: 1.9 GB a picture for Stable Diffusion 1 at 512² in float32, 1.1 GB in bfloat16,
    growing with the latents' area, the channels and the layers; a quarter of it with checkpointing. Autocast keeps a
    copy of each trained weight besides."""
    settings, config = prepared.settings, prepared.facts.configs["unet"]
    is_autocast = settings.mixed_precision not in (None, "no")
    is_float32 = settings.weights_dtype == "float32"
    bytes_a_cell = 4 * 80 if is_float32 and not is_autocast else 2 * 90
    copies = 2 * sum(group.parameters for groups in prepared.groups.values() for group in groups)
    latent = (prepared.resolution / prepared.facts.vae_factor) ** 2
    layers = config.get("layers_per_block", 2) + 0.5
    cells = sum(
        channels * latent / 4**level * layers for level, channels in enumerate(config.get("block_out_channels", []))
    )
    share = 0.25 if settings.gradient_checkpointing else 1.0
    return int(settings.batch_size * cells * bytes_a_cell * share) + (copies if is_autocast and is_float32 else 0)


def size(count: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"
