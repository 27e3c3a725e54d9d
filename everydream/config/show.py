"""Settings as text: `--print_config`, the table of what differs from the defaults, `--help`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from textwrap import fill

from everydream.config.entries import Entry
from everydream.config.kinds import kinds
from everydream.config.redact import clean
from everydream.config.resolve import Resolved
from everydream.config.schema import SECTIONS, Settings
from everydream.config.sources import UNSET, show

USAGE = """\
Fine-tune Stable Diffusion on your own pictures.

  accelerate launch -q scripts/train.py --config train.json [--key value …]

Command line > train.json > optimizer.json > accelerate launch > default. A setting is given as --key value;
yes or no as --key, --no_key or --key false; a list as several values. --key null gives the default.

  --config PATH           a train.json, or a run's config.json to repeat the run
  --print_config [json]   print every setting with its value and origin, and end
  --dry_run               check settings and pictures, print the plan, and end without training
  --help                  this text
"""


def config_json(resolved: Resolved) -> str:
    """For programs: ASCII, so that no terminal's encoding changes it, and cleaned before it is text."""
    return json.dumps(clean({key: entry.as_json() for key, entry in resolved.entries.items()}), indent=2)


def config_table(resolved: Resolved) -> str:
    """Every setting."""
    return clean("\n".join(_rows(resolved.entries)))


def differences(resolved: Resolved) -> str:
    """The settings whose value is not the default, or was unset: what a run says of itself at its start."""
    entries = resolved.entries.items()
    differ = {key: one for key, one in entries if one.value != one.default or (one.overrides and one.origin == UNSET)}
    differ = {key: one for key, one in differ.items() if not one.inherited}
    return "\n".join(_rows(differ))


def _rows(entries: Mapping[str, Entry]) -> Iterable[str]:
    rows = [(key, show(entry.value), entry.place or entry.origin, _overridden(entry)) for key, entry in entries.items()]
    # One long path must not push every row over a terminal's edge.
    widths = [min(24 if column else 40, max((len(row[column]) for row in rows), default=0)) for column in range(3)]
    for row in rows:
        yield "  ".join([text.ljust(width) for text, width in zip(row, widths, strict=False)] + [row[3]]).rstrip()


def _overridden(entry: Entry) -> str:
    return ", ".join(f"(overrides {show(one.value)} from {one.origin})" for one in entry.overrides)


def help_text() -> str:
    """All settings in sections, each with type, default and meaning."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    lines, types = [USAGE], kinds(Settings)
    for key, one in Settings.model_fields.items():
        if key in SECTIONS:
            lines.append(f"{SECTIONS[key]}\n")
        default = ", required" if one.is_required() else f", default {show(one.default)}"
        lines.append(f"  --{key}  ({types[key].phrase()}{default})")
        lines.append(fill(one.description or "", width, initial_indent=" " * 6, subsequent_indent=" " * 6) + "\n")
    return "\n".join(lines).rstrip()
