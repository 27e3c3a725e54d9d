"""Captions and the values that may stand beside a picture, in its folder, or in a manifest. Strict: a file that cannot
be understood is an error, never a guess."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from everydream.data.problems import Unfit

MAX_TEXT_BYTES = 64 * 1024
SIDECARS = (".txt", ".caption", ".yaml", ".yml")  # first found wins


@dataclass(frozen=True, slots=True)
class Values:
    """What a sidecar, a manifest entry or a folder file says. None: nothing, so the next source counts."""

    caption: str | None = None
    multiply: float | None = None
    cond_dropout: float | None = None
    flip_p: float | None = None
    loss_scale: float | None = None
    shuffle_tags: bool | None = None

    def over(self, other: Values) -> Values:
        """These values; where they say nothing, those of `other`."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return Values(**{name: getattr(other, name) if value is None else value for name, value in own.items()})


# --- text files ---


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The file as text. Raises Unfit: too large, not UTF-8 (with the byte's place), NUL characters."""
    if not path.is_file():
        raise Unfit("not a regular file", "replace it with a text file or remove it")
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise Unfit(f"over {max_bytes // 1024} KiB", "a caption is a few words: shorten or remove it")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise Unfit("it is UTF-16", "save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unfit(
            f"not UTF-8 at byte {error.start} ({data[error.start]:#04x})", "save it as UTF-8 (often it is Latin-1)"
        ) from None
    if "\0" in text:
        raise Unfit(f"a NUL character at character {text.index(chr(0))}", "save it as plain UTF-8 text")
    return text


def clean(caption: str) -> str:
    """NFC, one line, no space around; commas and repeats stay."""
    return unicodedata.normalize("NFC", " ".join(part.strip() for part in caption.splitlines()).strip())


# --- one value ---


def _number(low: float, high: float) -> Callable[[Any], float]:
    def parse(value: Any) -> float:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
        if not math.isfinite(number) or not low <= number <= high:
            raise ValueError
        return number

    return parse


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    return {"": True, "true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
        str(value).strip().lower()
    ]


@dataclass(frozen=True, slots=True)
class _Kind:
    parse: Callable[[Any], Any]
    expected: str


KINDS: dict[str, _Kind] = {
    "multiply": _Kind(_number(0.0, 10_000.0), "a number from 0 to 10000"),
    "cond_dropout": _Kind(_number(0.0, 1.0), "a number from 0 to 1"),
    "flip_p": _Kind(_number(0.0, 1.0), "a number from 0 to 1"),
    "loss_scale": _Kind(_number(-1000.0, 1000.0), "a number"),
    "shuffle_tags": _Kind(_boolean, "true or false"),
}
FOLDER_FILES = {f"{name}.txt": name for name in KINDS}


def parse_value(name: str, value: Any) -> Any:
    """One of KINDS. Raises Unfit."""
    kind = KINDS[name]
    try:
        return kind.parse(value)
    except (ValueError, TypeError, KeyError):
        raise Unfit(f"{name} is {value!r}", f"{kind.expected} is expected") from None


def read_folder_file(path: Path) -> Any:
    """The value in multiply.txt and its like."""
    return parse_value(FOLDER_FILES[path.name.lower()], read_text(path).strip())


# --- sidecars and manifest entries ---


def read_sidecar(path: Path) -> Values:
    """A caption file: plain text, or YAML. Raises Unfit."""
    text = read_text(path)
    return _from_yaml(text) if path.suffix.lower() in (".yaml", ".yml") else Values(caption=clean(text))


def _from_yaml(text: str) -> Values:
    import yaml  # only where a folder has YAML sidecars

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        raise Unfit(f"not YAML{place}", "write caption: … and values such as multiply: 2, or use a .txt file") from None
    if content is None:
        return Values(caption="")
    if isinstance(content, str):
        return Values(caption=clean(content))
    if not isinstance(content, dict):
        raise Unfit(
            "neither a text nor keys with values", "write caption: … and values such as multiply: 2, or use a .txt file"
        )
    content = dict(content)
    caption = content.pop("caption", content.pop("main_prompt", None))
    tags = content.pop("tags", None)
    if tags is not None:
        caption = ", ".join([*([] if caption is None else [str(caption)]), *_tags(tags)])
    return from_mapping({**content, "caption": caption})


def _tags(tags: Any) -> list[str]:
    if isinstance(tags, str):
        return [tags]
    if isinstance(tags, list):
        names = [tag.get("tag") if isinstance(tag, dict) else tag for tag in tags]
        if all(isinstance(name, str | int | float) and not isinstance(name, bool) for name in names):
            return [str(name) for name in names]
    raise Unfit("its tags are not a list of texts", "write them as a list, one tag an entry")


def from_mapping(content: Mapping[str, Any]) -> Values:
    """Values from a YAML sidecar or a manifest entry. Raises Unfit on unknown keys and wrong values."""
    known = {"caption", *KINDS}
    for key in content:
        if key not in known:
            near = get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
            raise Unfit(f"{str(key)!r} is not a key", hint)
    caption = content.get("caption")
    if caption is not None and not isinstance(caption, str):
        raise Unfit(f"its caption is {caption!r}", "a text is expected")
    if caption is not None and "\0" in caption:
        raise Unfit("a NUL character in its caption", "remove it")
    parsed = {name: parse_value(name, content[name]) for name in KINDS if content.get(name) is not None}
    return Values(caption=None if caption is None else clean(caption), **parsed)


_ALIASES = {"file_name": "image", "text": "caption"}  # Hugging Face's metadata.jsonl


def read_manifest(path: Path) -> dict[str, Values]:
    """Image path as written (NFC, POSIX) → values, from JSON (a list) or JSONL (one object a line). Raises Unfit."""
    text = read_text(path, max_bytes=1 << 30)
    entries: dict[str, Values] = {}
    for place, entry in _manifest_rows(text, path.suffix.lower() == ".jsonl"):
        if not isinstance(entry, dict):
            raise Unfit(f"{place} is not an object", 'write {"image": "…", "caption": "…"}')
        entry = {_ALIASES.get(key, key): value for key, value in entry.items()}
        image = entry.pop("image", None)
        if not isinstance(image, str) or not image:
            raise Unfit(f"{place} has no image", 'write {"image": "…", "caption": "…"}')
        image = unicodedata.normalize("NFC", image.replace("\\", "/"))
        if image in entries:
            raise Unfit(f"{place} names {image!r} again", "keep one entry a picture")
        try:
            entries[image] = from_mapping(entry)
        except Unfit as error:
            raise Unfit(f"{place}: {error.reason}", error.advice) from None
    return entries


def _manifest_rows(text: str, lines: bool) -> list[tuple[str, Any]]:
    try:
        if lines:
            numbered = enumerate(text.split("\n"), 1)
            rows = []
            for number, line in numbered:
                if line.strip():
                    rows.append((f"line {number}", json.loads(line)))
            return rows
        content = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {number}" if lines else f"line {error.lineno}"
        raise Unfit(f"not JSON in {place}, column {error.colno} ({error.msg})", "mend the file") from None
    if not isinstance(content, list):
        raise Unfit("not a list", 'write [{"image": "…", "caption": "…"}, …]')
    return [(f"entry {number}", entry) for number, entry in enumerate(content, 1)]


# --- file names, tags ---

_CAMERA = re.compile(
    r"^_?(?:img|imag|dsc[fn]?|mg|pxl|mvi|gopr|dji|sam|cimg|pict|p|wp|screenshot|scan|photo|image|picture|"
    r"untitled|download|whatsapp image)?[-_ ]?\(?\d{3,}",
    re.IGNORECASE,
)
_HEX_NAME = re.compile(r"^[0-9a-f]{8,}(?:-[0-9a-f]{4,}){0,4}$", re.IGNORECASE)


def caption_from_name(stem: str) -> str:
    """A file name up to its first underscore."""
    return clean(stem.split("_", 1)[0])


def is_camera_name(stem: str) -> bool:
    """IMG_1234, DSC00017, 20240131_101500, 4f2a9c71: names that describe nothing."""
    return bool(_CAMERA.match(stem) or _HEX_NAME.match(stem))


def shuffle_tags(caption: str, keep: int, rng: np.random.Generator) -> str:
    """The comma-separated tags after the first `keep` in a drawn order; commas, spaces and repeats stay in place."""
    parts = caption.split(",")
    words = [part.strip() for part in parts]
    order = [*range(min(keep, len(parts))), *(rng.permutation(max(0, len(parts) - keep)) + keep)]
    return ",".join(
        part.replace(words[at], words[source], 1) if words[at] else part + words[source]
        for at, (part, source) in enumerate(zip(parts, order, strict=True))
    )
