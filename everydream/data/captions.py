"""Captions and the values that may stand beside a picture, in its folder, or in a manifest. Strict: a file that cannot
be understood is an error, never a guess."""

from __future__ import annotations

import json
import math
import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from reprlib import repr as told  # shortened: what a message shows may be of any length
from typing import Any, NoReturn

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

    def contradicts(self, other: Values) -> bool:
        """Both say something of one value, and not the same."""
        return self.over(other) != other.over(self)


# --- text files ---


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The file as text. Raises Unfit: too large, not UTF-8 (with the byte's place), NUL characters."""
    if not path.is_file():
        raise Unfit("not a regular file", "replace it with a text file or remove it")
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise Unfit(f"over {max_bytes // 1024} KiB", "a caption is a few words: shorten or remove it")
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")  # utf-8-sig would count bytes from behind the mark
    except UnicodeDecodeError as error:
        guess = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "Latin-1"
        place = f"byte {error.start} ({data[error.start]:#04x})"
        raise Unfit(f"not UTF-8 at {place}, perhaps {guess}", "save it as UTF-8") from None
    if "\0" in text:
        raise Unfit(f"a NUL character at character {text.index(chr(0))}", "save it as plain UTF-8 text")
    return text


def clean(caption: str) -> str:
    """NFC, one line, no space around; commas and repeats stay."""
    return unicodedata.normalize("NFC", " ".join(part.strip() for part in caption.splitlines()).strip())


def _text(name: str, value: Any) -> str:
    """What stands in quotes may hold any character, also ones that no text file can. Raises Unfit."""
    if not isinstance(value, str):
        raise Unfit(f"its {name} is {told(value)}", "a text is expected")
    try:
        text = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")  # joins the halves of surrogate pairs
    except UnicodeDecodeError:
        raise Unfit(f"half a surrogate pair in its {name} {told(value)}", "write the character itself") from None
    if "\0" in text:
        raise Unfit(f"a NUL character in its {name}", "remove it")
    return text


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


def _times(value: Any) -> float:
    """Less than once in a thousand epochs is never: the plan's fractions have denominators up to 1000."""
    number = _number(0.0, 10_000.0)(value)
    return _number(0.001, 10_000.0)(number) if number else 0.0


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
    "multiply": _Kind(_times, "a number from 0.001 to 10000, or 0,"),
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
    except (ValueError, TypeError, KeyError, OverflowError):
        raise Unfit(f"{name} is {told(value)}", f"{kind.expected} is expected") from None


def read_folder_file(path: Path) -> Any:
    """The value in multiply.txt and its like."""
    return parse_value(FOLDER_FILES[path.name.lower()], read_text(path).strip())


# --- sidecars and manifest entries ---


def read_sidecar(path: Path) -> Values:
    """A caption file: plain text, or YAML. Raises Unfit."""
    text = read_text(path)
    return _from_yaml(text) if path.suffix.lower() in (".yaml", ".yml") else Values(caption=clean(text))


def _from_yaml(text: str) -> Values:
    from everydream.data import strict_yaml  # only where a folder has YAML sidecars

    content = strict_yaml.load(text)
    if content is None:
        return Values(caption="")
    if isinstance(content, str):
        return from_pairs([("caption", content)])
    if not isinstance(content, dict):
        raise Unfit("neither a text nor keys with values", strict_yaml.ADVICE)
    pairs = [(key, value) for key, value in content.items() if key != "tags"]
    return _with_tags(from_pairs(pairs, {"main_prompt": "caption"}), _tags(content.get("tags")))


def _tags(tags: Any) -> list[str]:
    if tags is None:
        return []
    listed = [tags] if isinstance(tags, str) else tags
    if isinstance(listed, list):
        names = [tag.get("tag") if isinstance(tag, dict) else tag for tag in listed]
        if all(isinstance(name, str | int | float) and not isinstance(name, bool) for name in names):
            return [name for name in (clean(_text("tag", str(name))) for name in names) if name]
    raise Unfit("its tags are not a list of texts", "write them as a list, one tag an entry")


def _with_tags(values: Values, tags: list[str]) -> Values:
    """The tags join the caption; none of them say nothing."""
    caption = ", ".join([*([values.caption] if values.caption else []), *tags])
    return Values(caption=caption).over(values) if tags else values


def from_pairs(pairs: Iterable[tuple[Any, Any]], aliases: Mapping[str, str] | None = None) -> Values:
    """Values from a YAML sidecar or a manifest entry. Raises Unfit on unknown or repeated keys and wrong values."""
    known = {"caption", *KINDS}
    content: dict[str, Any] = {}
    for written, value in pairs:
        key = (aliases or {}).get(written, written) if isinstance(written, str) else written
        if key not in known:
            near = get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
            raise Unfit(f"{told(key)} is not a key", hint)
        if key in content:
            raise Unfit(f"its {key} stands there twice", "keep one")
        content[key] = value
    parsed = {name: parse_value(name, content[name]) for name in KINDS if content.get(name) is not None}
    caption = content.get("caption")
    return Values(caption=None if caption is None else clean(_text("caption", caption)), **parsed)


# --- manifests ---

_IMAGE = ("image", "file_name")  # the second, and text, are those of Hugging Face's metadata.jsonl
_ALIASES = {"text": "caption"}
_EXAMPLE = 'write {"image": "…", "caption": "…"}'


def _stop(problem: Unfit) -> NoReturn:
    raise problem


def read_manifest(path: Path, report: Callable[[Unfit], object] = _stop) -> dict[str, Values]:
    """Image path relative to the manifest's folder (NFC, POSIX, without detours) → values, from JSON (a list) or JSONL
    (one object a line). `report` gets what is wrong with an entry, and the next one is read. Raises Unfit."""
    text = read_text(path, max_bytes=1 << 30)
    entries: dict[str, Values] = {}
    rows = _lines(text, report) if path.suffix.lower() == ".jsonl" else _list(text)

    def read(row: Any) -> None:
        image, values = _entry(row, path.parent)
        if image in entries:
            raise Unfit(f"it names {image!r} again", "keep one entry a picture")
        entries[image] = values

    for place, row in rows:
        try:
            read(row)
        except Unfit as error:  # noqa: PERF203 — each entry's is reported
            report(Unfit(f"{place}: {error.reason}", error.advice))
    return entries


def _entry(row: Any, folder: Path) -> tuple[str, Values]:
    if not isinstance(row, tuple):
        raise Unfit("it is not an object", _EXAMPLE)
    images = [value for key, value in row if key in _IMAGE]
    if len(images) != 1 or not isinstance(images[0], str) or not images[0]:
        raise Unfit("it has several images" if len(images) > 1 else "it has no image", _EXAMPLE)
    image = _relative(_text("image", images[0]), folder)
    return image, from_pairs((pair for pair in row if pair[0] not in _IMAGE), _ALIASES)


def _relative(image: str, folder: Path) -> str:
    image = image.replace("\\", "/")
    if os.path.isabs(image):
        relative = _from(os.path.abspath(folder), image)
        if relative.startswith("../"):  # perhaps only because one of the two goes through a link
            place, name = os.path.split(image)
            relative = _from(os.path.realpath(folder), os.path.join(os.path.realpath(place), name))
        image = relative
    return unicodedata.normalize("NFC", posixpath.normpath(image))


def _from(folder: str, path: str) -> str:
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        raise Unfit(f"{path} is on another drive", "put the manifest on the pictures' drive") from None


def _lines(text: str, report: Callable[[Unfit], object]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", _from_json(line, number)
            except Unfit as error:
                report(error)


def _list(text: str) -> Iterator[tuple[str, Any]]:
    content = _from_json(text, 1)
    if not isinstance(content, list):
        raise Unfit("not a list", f"{_EXAMPLE} in [ ], or one a line in a .jsonl file")
    yield from ((f"entry {number}", entry) for number, entry in enumerate(content, 1))


def _from_json(text: str, first_line: int) -> Any:
    """Objects become tuples of pairs, so that a repeated key shows. Raises Unfit."""
    try:
        return json.loads(text, object_pairs_hook=tuple)
    except json.JSONDecodeError as error:
        reason = f"not JSON in line {first_line + error.lineno - 1}, column {error.colno} ({error.msg})"
    except RecursionError:
        reason = f"not JSON that can be read, from line {first_line} (nested too deeply)"
    except ValueError:  # Python reads no more digits
        reason = f"not JSON that can be read, from line {first_line} (a number of thousands of digits)"
    raise Unfit(reason, "mend the file")


# --- file names, tags ---

_CAMERA = re.compile(
    r"^_?(?:img|imag|imgp|img_e|dsc[fn]?|mg|pxl|mvi|mvimg|vid|gopr|dji|sam|sdc|crw|cimg|hpim|pict|p|g|r|wp|screenshot|"
    r"scan|photo|image|picture|untitled|download|whatsapp image)?[-_ ]?\(?\d{3,}|^\d+$",
    re.IGNORECASE,
)
_HEX_NAME = re.compile(r"^[0-9a-f]{8,}(?:-[0-9a-f]{4,}){0,4}$", re.IGNORECASE)


def caption_from_name(stem: str) -> str:
    """A file name up to its first underscore."""
    return clean(stem.split("_", 1)[0])


def is_camera_name(stem: str) -> bool:
    """IMG_1234, DSC00017, 20240131_101500, 4f2a9c71, 12: names that describe nothing."""
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
