"""The optimizer of each part, from all sources: precedence, inheritance and each optimizer's own defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from everydream.config.entries import Entry, Override, choose, default_entry, say_overrides
from everydream.config.files import SCALE, OptimizerSource
from everydream.config.schema import TextEncoderFreezing
from everydream.config.sources import DEFAULT, UNSET, Report, Source, show
from everydream.optim.table import HYPERPARAMETERS, Row, row_of, unknown

DEFAULT_OPTIMIZER = "adamw8bit"
BASE, TEXT_ENCODER, FREEZING = "optimizer.base.", "optimizer.text_encoder.", "optimizer.text_encoder_freezing."
PREFIXES = {"unet": BASE, "text_encoder": TEXT_ENCODER}
SCHEDULE_KEYS = ("lr_scheduler", "lr_warmup_steps", "lr_decay_steps")  # also in train.json and on the command line
CONSTANT = ("constant", "constant_with_warmup")
COMMON_DEFAULTS = {
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "lr_decay_steps": None,
    "args": {},
    "no_decay_on_norms": False,
}


@dataclass(frozen=True)
class PartOptimizer:
    """What one part is trained with. None: the optimizer has no such hyperparameter, or its class decides."""

    optimizer: str
    lr: float
    lr_scheduler: str
    lr_warmup_steps: int
    lr_decay_steps: int | None
    betas: tuple[float, ...] | None
    epsilon: float | None
    weight_decay: float | None
    args: Mapping[str, Any] = field(default_factory=dict)
    no_decay_on_norms: bool = False


KEYS = tuple(one.name for one in fields(PartOptimizer))


def resolve_parts(line: Source, train: Source, file: OptimizerSource, report: Report) -> dict[str, Entry]:
    """Entries `optimizer.base.*`, `optimizer.text_encoder.*`, `optimizer.text_encoder_…`."""
    _drop_unknown(file.base, report)
    _drop_unknown(file.text_encoder, report)
    base_sources = [line, train, file.base]
    base_row = _row(choose("optimizer", base_sources, default_entry(DEFAULT_OPTIMIZER)))
    base = {key: choose(key, base_sources, _default(base_row, key)) for key in KEYS}
    _say_unused(base, base_row, report)

    scale = choose(SCALE, [file.other], default_entry(1.0))
    text_sources = [_text_encoder_lr(line), _text_encoder_lr(train), file.text_encoder]
    inherited = {key: replace(entry, overrides=(), inherited=True) for key, entry in base.items()}
    if scale.value != 1:
        inherited["lr"] = _scaled(base["lr"], scale)
    text_row = _row(choose("optimizer", text_sources, inherited["optimizer"]))
    if text_row.cls != base_row.cls:  # a row and its class by its dotted name are the same
        inherited |= {key: _default(text_row, key) for key in (*HYPERPARAMETERS, "args")}
    text = {key: choose(key, text_sources, inherited[key]) for key in KEYS}
    _say_unused(text, text_row, report)
    _say_lr(text["lr"], scale, base_row, text_row, report)

    entries = {BASE + key: entry for key, entry in base.items()}
    entries |= {TEXT_ENCODER + key: entry for key, entry in text.items()}
    entries[f"optimizer.{SCALE}"] = scale
    for key, one in TextEncoderFreezing.model_fields.items():
        entries[FREEZING + key] = choose(key, [file.freezing], default_entry(one.default))
    return entries


def part_optimizer(part: str, entries: Mapping[str, Entry]) -> PartOptimizer:
    """The part's entries as the trainer takes them: `constant` has no warm-up, `constant_with_warmup` is constant."""
    values = {key: entries[PREFIXES[part] + key].value for key in KEYS}
    if values["lr_scheduler"] == "constant":
        values |= {"lr_warmup_steps": 0, "lr_decay_steps": None}
    elif values["lr_scheduler"] == "constant_with_warmup":
        values |= {"lr_scheduler": "constant", "lr_decay_steps": None}
    return PartOptimizer(**values)


def _drop_unknown(source: Source, report: Report) -> None:
    stated = source.values.get("optimizer")
    if stated and row_of(stated.value) is None:
        report.problem(stated.place, f"{stated.name}: {unknown(stated.value)}")
        source.wrong.add("optimizer")
        del source.values["optimizer"]


def _row(entry: Entry) -> Row:
    row = row_of(entry.value)
    assert row is not None
    return row


def _default(row: Row, key: str) -> Entry:
    if key == "optimizer":
        return default_entry(DEFAULT_OPTIMIZER)
    return default_entry(COMMON_DEFAULTS[key] if key in COMMON_DEFAULTS else row.defaults.get(key))


def _text_encoder_lr(source: Source) -> Source:
    """The source's `text_encoder_lr` under the name it has for the text encoder's part."""

    def renamed(stated: Mapping[str, Any]) -> dict[str, Any]:
        return {"lr": stated["text_encoder_lr"]} if "text_encoder_lr" in stated else {}

    return Source(source.origin, renamed(source.values), renamed(source.unset))


def _scaled(lr: Entry, scale: Entry) -> Entry:
    """The share of base's lr is the scale's doing; base's own lr is what it overrides, where somebody stated that."""
    hidden = () if lr.origin == DEFAULT else (Override(lr.origin, lr.value),)
    return replace(scale, value=lr.value * scale.value, overrides=hidden, default=lr.default, inherited=True)


def _say_unused(entries: dict[str, Entry], row: Row, report: Report) -> None:
    for key in HYPERPARAMETERS:
        entry = entries[key]
        if key in row.hyperparameters or entry.value is None:
            continue
        report.note(f"{entry.name} {show(entry.value)} from {entry.origin} is unused: {row.name} has no {key}")
        entries[key] = Entry(None, DEFAULT, (Override(entry.origin, entry.value), *entry.overrides))


def _say_lr(lr: Entry, scale: Entry, base: Row, text: Row, report: Report) -> None:
    if not lr.inherited and scale.value != 1:
        report.note(f"{SCALE} {show(scale.value)} from {scale.origin} is without effect: the text encoder's lr "
                    f"{show(lr.value)} comes from {lr.origin}")  # fmt: skip
    if lr.inherited and text != base and text.defaults["lr"] != base.defaults["lr"]:
        report.note(f"the text encoder's lr {show(lr.value)} is inherited from {base.name}; {text.name} usually takes "
                    f"{text.defaults['lr']}: set text_encoder_lr")  # fmt: skip


def say_part_overrides(entries: Mapping[str, Entry], report: Report) -> None:
    names = {BASE + "lr": "lr", TEXT_ENCODER + "lr": "text_encoder_lr"}
    names |= {BASE + key: key for key in SCHEDULE_KEYS}
    for key, entry in entries.items():
        # What is inherited is the base's word; but null on the command line hides the part's own, too.
        if key.startswith("optimizer.") and entry.value is not None and (not entry.inherited or entry.origin == UNSET):
            say_overrides(names.get(key, key.removeprefix("optimizer.")), entry, report)
