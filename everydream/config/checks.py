"""What the settings say together: contradictions, optimizers that cannot, no effect, folders in each other, paths."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import combinations, product
from pathlib import Path

from everydream.config.entries import Entry
from everydream.config.parts import BASE, KEYS, PREFIXES, TEXT_ENCODER
from everydream.config.rules import (
    CONTRADICTIONS,
    DEMANDS,
    INHERITED,
    NOT_TRAINED,
    PART_WITHOUT_EFFECT,
    PROCESSES,
    WITHOUT_EFFECT,
    Values,
)
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
    rules.parts_without_effect()
    rules.folders()
    rules.missing_paths(strict)


# os.path's, not pathlib's: an impossible name (too long, NUL) is not there, instead of an OSError
EXISTS: Mapping[str, Callable[[Path], bool]] = {
    "folder": os.path.isdir,
    "file": os.path.isfile,
    "folder or file": os.path.exists,
    "folder or manifest (.json, .jsonl)": lambda path: os.path.isdir(path) or _is_file(path, (".json", ".jsonl")),
    "file of weights (.safetensors)": lambda path: _is_file(path, WEIGHT_FILES),
}
MADE = ("logdir", "cache_dir", "save_ckpt_dir")  # where they are missing, with their parents


class _Rules:
    def __init__(self, entries: Mapping[str, Entry], report: Report) -> None:
        self.entries, self.report = entries, report
        self.values = {key: entry.value for key, entry in entries.items()}
        self.values[INHERITED] = {key for key, entry in entries.items() if entry.inherited}

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
        """Of the base where the text encoder only inherits, so that one mistake is said once; else as it is written."""
        entry = self.entries[key]
        if key.startswith(TEXT_ENCODER) and not entry.inherited and entry.name:
            return entry.name.removeprefix("--")
        return _short(key.replace(TEXT_ENCODER, BASE) if entry.inherited else key)

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

    def parts_without_effect(self) -> None:
        """A default that is stated for a part that is not trained is said, too: nobody has to state it."""
        trained = list(self._trained())
        for prefix in PREFIXES.values():
            for key in KEYS:
                entry = self.entries.get(prefix + key)
                if entry is None or not entry.place or entry.inherited:
                    continue
                users = [one for one in trained if one == prefix or one + key in self.values[INHERITED]]
                why = self._no_use(key, users) if users and entry.value != entry.default else ""
                why = f"the text encoder's {why}" if why and prefix == TEXT_ENCODER else why
                if why or not users:
                    said = f"{self._say(prefix + key)} from {entry.origin} is without effect"
                    self.report.note(f"{said}: {why or NOT_TRAINED[prefix]}")

    def _no_use(self, key: str, users: Iterable[str]) -> str:
        """Why none of these parts uses the key, or nothing."""
        parts = [self._part(user) for user in users]
        reasons = (
            why for name, when, why in PART_WITHOUT_EFFECT if name == key and all(_holds(when, p) for p in parts)
        )
        return next(reasons, "")

    def _part(self, prefix: str) -> Values:
        return {key: self.values[prefix + key] for key in KEYS if prefix + key in self.values}

    def folders(self) -> None:
        """Pictures are searched for in sub-folders, so that what one folder has in another would be read twice."""
        for (key, root), (other_key, other) in combinations(self._pictures(), 2):
            if _lies_in(root, other):
                self._read_twice(key, root, other_key, other)
            elif _lies_in(other, root):
                self._read_twice(other_key, other, key, root)
        for (key, root), written in product(self._pictures(), ("logdir", "save_ckpt_dir", "cache_dir")):
            folder = self.values.get(written)
            if folder is not None and _lies_in(folder, root):
                self._problem((written, key), "nothing is written among pictures. Choose another folder")
        roots = self.values.get("data_root", ())
        for name, extra in (self.values.get("validation.extra_manual_datasets") or {}).items():
            if any(_lies_in(extra, root) or _lies_in(root, extra) for root in roots):
                text = f"{name} shares pictures with data_root: its loss says little about others"
                place = self.entries["validation.extra_manual_datasets"].place
                self.report.note_at(place, f"extra_manual_datasets: {text}")

    def _pictures(self) -> Iterator[tuple[str, Path]]:
        """Where pictures are read from, each for one purpose."""
        v = self.values
        yield from (("data_root", root) for root in v.get("data_root", ()))
        if v.get("class_data_root") is not None and v.get("prior_loss_weight") != 0:
            yield "class_data_root", v["class_data_root"]
        if v.get("validation.val_split_mode") == "manual" and v.get("validation.manual_data_root") is not None:
            yield "validation.manual_data_root", v["validation.manual_data_root"]

    def _read_twice(self, key: str, inner: Path, outer_key: str, outer: Path) -> None:
        same = _lies_in(outer, inner)
        if key != outer_key:
            how = "they are the same folder" if same else f"{_short(key)} lies in {_short(outer_key)}"
            why = f"{how}, and its pictures would be used for both. Choose another folder"
            self._problem((key, outer_key) if outer_key == "data_root" else (outer_key, key), why)
        elif inner == outer:
            self.report.problem(self.entries[key].place, f"data_root names {inner} twice")
        else:
            how = "is the same folder as" if same else "lies in"
            self.report.problem(self.entries[key].place, f"data_root: {inner} {how} {outer} and would be read twice")

    def missing_paths(self, strict: bool) -> None:
        for key, path, wanted in self._paths():
            if EXISTS[wanted](path):
                continue
            kind = f"{wanted} (it is something else)" if os.path.exists(path) else wanted
            self._say_path(key, f"there is no {kind} {path}", strict)
        for key, path in self._made():
            there = next(one for one in (path, *path.parents) if os.path.lexists(one))
            if not os.path.isdir(there):
                self._say_path(key, f"{there} is not a folder", strict)

    def _say_path(self, key: str, text: str, strict: bool) -> None:
        entry = self.entries[key]
        say = self.report.problem if strict else self.report.note_at
        say(entry.place or entry.origin, f"{_short(key)}: {text}")

    def _made(self) -> Iterator[tuple[str, Path]]:
        keys = MADE if self.values.get("num_class_images") is None else (*MADE, "class_data_root")
        yield from ((key, self.values[key]) for key in keys if self.values.get(key) is not None)

    def _paths(self) -> Iterator[tuple[str, Path, str]]:
        """Paths that must be there: setting, path, "folder", "file" or "folder or file"."""
        v = self.values
        model = v.get("base_model")
        is_read = v.get("resume") is None  # a checkpoint has all parts; without one the run says what is missing
        if model is not None and is_read and (os.path.isabs(model) or not _is_hub_id(model)):
            is_plain = os.path.isfile(model) and not v.get("allow_pickle")
            yield "base_model", Path(model), "file of weights (.safetensors)" if is_plain else "folder or file"
        for root in v.get("data_root", ()):
            yield "data_root", root, "folder or manifest (.json, .jsonl)" if os.path.isfile(root) else "folder"
        is_used = v.get("class_data_root") is not None and v.get("prior_loss_weight") != 0
        if is_used and v.get("num_class_images") is None:
            yield "class_data_root", v["class_data_root"], "folder"
        if v.get("sample_prompts") is not None:
            yield "sample_prompts", v["sample_prompts"], "file"
        if isinstance(v.get("resume"), Path):
            yield "resume", v["resume"], "folder"
        if v.get("validation.val_split_mode") == "manual" and v.get("validation.manual_data_root") is not None:
            yield "validation.manual_data_root", v["validation.manual_data_root"], "folder"
        for folder in (v.get("validation.extra_manual_datasets") or {}).values():
            yield "validation.extra_manual_datasets", folder, "folder"


def _holds(when: Callable[[Values], bool], values: Values) -> bool:
    try:
        return bool(when(values))
    except KeyError:  # a setting that was refused, or validation's without its file
        return False


def _lies_in(inner: Path, outer: Path) -> bool:
    """Or is the same, through whatever links."""
    return Path(os.path.realpath(inner)).is_relative_to(os.path.realpath(outer))


def _is_file(path: Path, endings: tuple[str, ...]) -> bool:
    return os.path.isfile(path) and path.name.lower().endswith(endings)


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(part and part.replace("-", "").replace(".", "").replace("_", "").isalnum()
                                   for part in parts) and not name.endswith(WEIGHT_FILES)  # fmt: skip


def _short(key: str) -> str:
    """`optimizer.base.lr` → `lr`: as files and people name it."""
    for prefix in (BASE, "optimizer.", "validation."):
        key = key.removeprefix(prefix)
    return key
