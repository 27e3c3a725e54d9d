"""What the settings say together: contradictions, optimizers that cannot, no effect, folders in each other, paths."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from everydream.config.entries import Entry
from everydream.config.parts import BASE, PREFIXES, TEXT_ENCODER
from everydream.config.rules import CONTRADICTIONS, DEMANDS, PROCESSES, WITHOUT_EFFECT, Values
from everydream.config.schema import WEIGHT_FILES
from everydream.config.sources import DEFAULT, LAUNCHER, Report, show
from everydream.optim.table import ROWS, row_of


def check(entries: Mapping[str, Entry], wrong: set[str], processes: int, strict: bool, report: Report) -> None:
    """Problems and notes about what the entries say together; rules about a key in `wrong` stay silent.

    `strict` false (--print_config): a missing path is a note, for settings are looked at on other machines, too.
    """
    known = {**entries, PROCESSES: Entry(processes, LAUNCHER, place=LAUNCHER)}
    rules = _Rules({key: entry for key, entry in known.items() if key not in wrong}, report)
    rules.contradictions()
    rules.optimizers()
    rules.without_effect()
    rules.folders()
    rules.missing_paths(strict)


# os.path's, not pathlib's: an impossible name (too long, NUL) is not there, instead of an OSError
EXISTS: Mapping[str, Callable[[Path], bool]] = {
    "folder": os.path.isdir,
    "file": os.path.isfile,
    "folder or file": os.path.exists,
}


class _Rules:
    def __init__(self, entries: Mapping[str, Entry], report: Report) -> None:
        self.entries, self.report = entries, report
        self.values = {key: entry.value for key, entry in entries.items()}

    def _problem(self, keys: tuple[str, str], why: str) -> None:
        """At the first of the two that somebody stated."""
        stated = [key for key in keys if self.entries[key].place] or list(keys)
        first, *_ = stated
        second = keys[1] if first == keys[0] else keys[0]
        both = f"{self._say(first)} and {self._say(second, first)}"
        self.report.problem(self.entries[first].place or DEFAULT, f"{both} contradict: {why}.")

    def _say(self, key: str, first: str | None = None) -> str:
        entry = self.entries[key]
        place = entry.place or entry.origin
        other = "" if first is None or place == self.entries[first].place else f" ({place})"
        return f"{self._name(key)} {show(entry.value)}{other}"

    def _name(self, key: str) -> str:
        """Of the base where the text encoder only inherits, so that one mistake is said once."""
        return _short(key.replace(TEXT_ENCODER, BASE) if self.entries[key].inherited else key)

    def contradictions(self) -> None:
        for keys, when, why in CONTRADICTIONS:
            if all(key in self.entries for key in keys) and _holds(when, self.values):
                self._problem(keys, why)

    def _trained(self) -> Iterator[str]:
        for part, switch in (("unet", "disable_unet_training"), ("text_encoder", "disable_textenc_training")):
            if not self.values.get(switch):
                yield PREFIXES[part]

    def optimizers(self) -> None:
        for prefix in self._trained():
            if prefix + "optimizer" not in self.entries:
                continue
            name, betas = self.entries[prefix + "optimizer"], self.entries.get(prefix + "betas")
            row = row_of(name.value)
            assert row is not None
            for key, asks, reason in DEMANDS:
                asking = prefix + key if prefix + key in self.entries else key
                against = getattr(row, reason)
                if asking in self.entries and asks(self.values[asking]) and against:
                    why = f"{against}. Choose another optimizer, or leave {key} out"
                    self._problem((asking, prefix + "optimizer"), why)
            count = len(row.defaults.get("betas", ()))
            if betas and name.value in ROWS and count and len(betas.value) != count:
                stated = f"{self._name(prefix + 'betas')} is {show(betas.value)}"
                self.report.problem(betas.place, f"{stated}, but {name.value} takes {count}")

    def without_effect(self) -> None:
        for key, when, why in WITHOUT_EFFECT:
            entry = self.entries.get(key)
            if entry is None or not entry.place or entry.inherited or entry.value == entry.default:
                continue
            if _holds(when, self.values):
                self.report.note(f"{self._say(key)} from {entry.origin} is without effect: {why}")

    def folders(self) -> None:
        """Pictures are searched for in sub-folders, so that one folder in another would be read twice."""
        roots = self.values.get("data_root", ())
        for index, root in enumerate(roots):
            place = self.entries["data_root"].place
            if root in roots[:index]:
                self.report.problem(place, f"data_root names {root} twice")
            for other in roots:
                if root != other and root.is_relative_to(other):
                    self.report.problem(place, f"data_root: {root} lies in {other} and would be read twice")
        for key in ("class_data_root", "logdir", "validation.manual_data_root"):
            folder = self.values.get(key)
            if folder is not None and any(folder.is_relative_to(root) for root in roots):
                why = f"pictures in {_short(key)} would be trained on as the subject's. Choose another folder"
                self._problem((key, "data_root"), why)

    def missing_paths(self, strict: bool) -> None:
        for key, path, wanted in self._paths():
            if EXISTS[wanted](path):
                continue
            entry = self.entries[key]
            kind = f"{wanted} (it is something else)" if os.path.exists(path) else wanted
            say = self.report.problem if strict else self.report.note_at
            say(entry.place or entry.origin, f"{_short(key)}: there is no {kind} {path}")

    def _paths(self) -> Iterator[tuple[str, Path, str]]:
        """Paths that must be there: setting, path, "folder", "file" or "folder or file"."""
        v = self.values
        model = v.get("base_model")
        if model is not None and (os.path.isabs(model) or not _is_hub_id(model)):
            yield "base_model", Path(model), "folder or file"
        yield from (("data_root", root, "folder") for root in v.get("data_root", ()))
        if v.get("class_data_root") is not None and v.get("num_class_images") is None:
            yield "class_data_root", v["class_data_root"], "folder"
        if v.get("sample_prompts") is not None:
            yield "sample_prompts", v["sample_prompts"], "file"
        if isinstance(v.get("resume"), Path):
            yield "resume", v["resume"], "folder"
        if v.get("validation.manual_data_root") is not None:
            yield "validation.manual_data_root", v["validation.manual_data_root"], "folder"
        for folder in (v.get("validation.extra_manual_datasets") or {}).values():
            yield "validation.extra_manual_datasets", folder, "folder"


def _holds(when: Callable[[Values], bool], values: Values) -> bool:
    try:
        return bool(when(values))
    except KeyError:  # a setting that was refused, or validation's without its file
        return False


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(part and part.replace("-", "").replace(".", "").replace("_", "").isalnum()
                                   for part in parts) and not name.endswith(WEIGHT_FILES)  # fmt: skip


def _short(key: str) -> str:
    """`optimizer.base.lr` → `lr`: as files and people name it."""
    for prefix in (BASE, "optimizer.", "validation."):
        key = key.removeprefix(prefix)
    return key
