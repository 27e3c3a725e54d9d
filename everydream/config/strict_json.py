"""JSON as the standard has it, with the line of every key: duplicate keys, comments, trailing commas, NaN and
numbers beyond a float are errors with file, line, column, the line itself and a caret.

The standard library's reader keeps neither lines nor duplicates, and takes NaN and Infinity.
"""

from __future__ import annotations

import json
import re
from json.decoder import JSONDecodeError, scanstring  # type: ignore[attr-defined]
from math import isinf
from pathlib import Path
from typing import Any, NoReturn

from everydream.errors import ConfigError

Address = tuple[str, ...]  # the keys from the top to a value: ("base", "lr")
MAX_DEPTH = 50  # settings need four; the limit keeps a file of brackets from ending in a RecursionError

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORD = re.compile(r"[+-]?[A-Za-z0-9_.+-]+")
_CONSTANTS = {"true": True, "false": False, "null": None}
_HINTS = {
    "/": "JSON has no comments: use a key that starts with '_', such as \"_note\"",
    "#": "JSON has no comments: use a key that starts with '_', such as \"_note\"",
    "'": "JSON strings stand in double quotes",
    "True": "write true",
    "False": "write false",
    "None": "write null",
}


class Document:
    """A file's value (arrays as tuples) and the line of each key in it."""

    def __init__(self, value: Any, lines: dict[Address, int]) -> None:
        self.value = value
        self.lines = lines


def read(path: Path, shown: str) -> Document:
    """The file's content; `shown` is how messages name the file. Raises ConfigError with one problem."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{shown}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read: {error.strerror}") from None
    raw = raw.removeprefix(b"\xef\xbb\xbf")  # Notepad's byte order mark
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{shown}:1:1: begins with a byte order mark of UTF-16: save it as UTF-8")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(f"{shown}:{line}: byte {error.start} is not UTF-8: save the file as UTF-8") from None
    return parse(text, shown)


def parse(text: str, shown: str) -> Document:
    """The value of JSON text. Raises ConfigError."""
    reader = _Reader(text, shown)
    value, end = reader.value(reader.skip(0), ())
    end = reader.skip(end)
    if end != len(text):
        reader.fail(end, "the file should end here")
    return Document(value, reader.lines)


class _Reader:
    def __init__(self, text: str, shown: str) -> None:
        self.text, self.shown = text, shown
        self.lines: dict[Address, int] = {}

    def line(self, at: int) -> int:
        return self.text.count("\n", 0, at) + 1

    def fail(self, at: int, what: str) -> NoReturn:
        start = self.text.rfind("\n", 0, at) + 1
        end = self.text.find("\n", start)
        excerpt = self.text[start : end if end >= 0 else len(self.text)].rstrip("\r")
        column = at - start + 1
        first = max(0, column - 80)  # a file of one endless line is shown around the caret only
        shown = excerpt[first : first + 120].replace("\t", " ")
        caret = " " * (column - 1 - first) + "^"
        raise ConfigError(f"{self.shown}:{self.line(at)}:{column}: {what}\n    {shown}\n    {caret}")

    def skip(self, at: int) -> int:
        match = _SPACE.match(self.text, at)
        assert match
        return match.end()

    def unexpected(self, at: int, wanted: str) -> NoReturn:
        if at >= len(self.text):
            self.fail(at, f"the file ends where {wanted} should stand")
        word = _WORD.match(self.text, at)
        found = word.group() if word else self.text[at]
        hint = _HINTS.get(found)
        self.fail(at, f"{found!r} stands where {wanted} should" + (f"; {hint}" if hint else ""))

    def value(self, at: int, address: Address) -> tuple[Any, int]:
        if len(address) > MAX_DEPTH:
            self.fail(at, f"is nested deeper than {MAX_DEPTH}")
        first = self.text[at : at + 1]
        if first == "{":
            return self.object(at, address)
        if first == "[":
            return self.array(at, address)
        if first == '"':
            return self.string(at)
        word = _WORD.match(self.text, at)
        if word and word.group() in _CONSTANTS:
            return _CONSTANTS[word.group()], word.end()
        return self.number(at)

    def string(self, at: int) -> tuple[str, int]:
        try:
            value, end = scanstring(self.text, at + 1, True)
        except JSONDecodeError as error:
            what = error.msg[:1].lower() + error.msg[1:]
            if "control character" in what:
                what = "a string may not hold a line break or tab: write \\n or \\t"
            self.fail(min(error.pos, len(self.text)), what)
        if any("\ud800" <= character <= "\udfff" for character in value):
            self.fail(at, "the string holds half of a surrogate pair")
        return value, end

    def number(self, at: int) -> tuple[int | float, int]:
        word = _WORD.match(self.text, at)
        match = _NUMBER.match(self.text, at)
        if match is None or word is None or match.end() != word.end():
            if word and word.group().lstrip("+-").lower() in ("nan", "inf", "infinity"):
                self.fail(at, f"{word.group()} is not a number that JSON or a setting can hold")
            if word and word.group().lstrip("+-")[:1].isdigit():
                self.fail(at, f"{word.group()} is not a number as JSON writes it")
            self.unexpected(at, "a value")
        digits = match.group()
        if match.group(1) is None and match.group(2) is None:
            if len(digits) > 300:
                self.fail(at, f"a number of {len(digits)} digits is too large")
            return int(digits), match.end()
        if isinf(float(digits)):
            self.fail(at, f"{digits} is too large")
        return float(digits), match.end()

    def array(self, at: int, address: Address) -> tuple[tuple[Any, ...], int]:
        items: list[Any] = []
        at = self.skip(at + 1)
        if self.text[at : at + 1] == "]":
            return (), at + 1
        while True:
            item, at = self.value(at, (*address, str(len(items))))
            items.append(item)
            at, done = self.separator(at, "]")
            if done:
                return tuple(items), at

    def object(self, at: int, address: Address) -> tuple[dict[str, Any], int]:
        members: dict[str, Any] = {}
        at = self.skip(at + 1)
        if self.text[at : at + 1] == "}":
            return members, at + 1
        while True:
            if self.text[at : at + 1] != '"':
                self.unexpected(at, "a key in double quotes")
            key, end = self.string(at)
            inner = (*address, key)
            if key in members:
                name = key if key.isidentifier() else json.dumps(key, ensure_ascii=False)
                self.fail(at, f"{name} stands here a second time (first in line {self.lines[inner]})")
            self.lines[inner] = self.line(at)
            at = self.skip(end)
            if self.text[at : at + 1] != ":":
                self.unexpected(at, "':'")
            members[key], at = self.value(self.skip(at + 1), inner)
            at, done = self.separator(at, "}")
            if done:
                return members, at

    def separator(self, at: int, closing: str) -> tuple[int, bool]:
        """After a value: past the comma to the next one, or past the closing bracket."""
        at = self.skip(at)
        mark = self.text[at : at + 1]
        if mark == closing:
            return at + 1, True
        if mark != ",":
            self.unexpected(at, f"',' or '{closing}'")
        following = self.skip(at + 1)
        if self.text[following : following + 1] == closing:
            self.fail(at, f"a comma before '{closing}': remove it")
        return following, False
