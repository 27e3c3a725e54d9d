"""Strict JSON: what the standard allows is read as json reads it; everything else is refused with its place."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everydream.config.strict_json import MAX_DEPTH, parse, read
from everydream.errors import ConfigError

KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
LEAVES = (
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False) | KEYS
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4))


def listed(value: object) -> object:
    """Arrays are read as tuples."""
    if isinstance(value, tuple):
        return [listed(item) for item in value]
    return {key: listed(item) for key, item in value.items()} if isinstance(value, dict) else value


@settings(deadline=None)
@given(VALUES, st.sampled_from([None, 0, 3]), st.booleans())
def test_valid_json_is_read_as_the_standard_library_reads_it(
    value: object, indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert listed(parse(text, "f.json").value) == json.loads(text)


@settings(deadline=None)
@given(st.text(st.sampled_from('{}[]":,0123456789.eE+-truefalsn/ \n\\u'), max_size=12))
def test_what_the_standard_library_refuses_is_refused(text: str) -> None:
    try:
        json.loads(text, parse_constant=lambda name: pytest.fail(name))
    except ValueError:
        with pytest.raises(ConfigError, match=r"^f\.json:\d+:\d+: "):
            parse(text, "f.json")


def test_every_key_knows_its_line() -> None:
    text = '{"a": 1,\n "b": {"c": [\n  {"d": 2}\n], "e": 3},\n\n "f": 4}'
    lines = {("a",): 1, ("b",): 2, ("b", "c"): 2, ("b", "c", "0", "d"): 3, ("b", "e"): 4, ("f",): 6}
    assert parse(text, "f.json").lines == lines


REFUSED = {
    '{"a": 1, "a": 2}': (1, 10, "a second time (first in line 1)"),
    '{"a": {"b": 1,\n "b": 2}}': (2, 2, "a second time (first in line 1)"),
    '{"a": 1,}': (1, 8, "a comma before '}'"),
    '{"a": [1, 2,\n]}': (1, 12, "a comma before ']'"),
    '{"a": NaN}': (1, 7, "NaN is not a number"),
    '{"a": -Infinity}': (1, 7, "-Infinity is not a number"),
    '{"a": 1e400}': (1, 7, "1e400 is too large"),
    '{"a": 1} // end': (1, 10, "the file should end here"),
    '// start\n{"a": 1}': (1, 1, "JSON has no comments"),
    '{"a": 1, # why\n "b": 2}': (1, 10, "JSON has no comments"),
    '{"a": /* why */ 1}': (1, 7, "JSON has no comments"),
    "{'a': 1}": (1, 2, "double quotes"),
    "{a: 1}": (1, 2, "a key in double quotes"),
    '{"a": True}': (1, 7, "write true"),
    '{"a": None}': (1, 7, "write null"),
    '{"a" 1}': (1, 6, "':'"),
    '{"a": 1 "b": 2}': (1, 9, "','"),
    '{"a": 01}': (1, 7, "not a number as JSON writes it"),
    '{"a": .5}': (1, 7, "a value"),
    '{"a": +1}': (1, 7, "not a number as JSON writes it"),
    '{"a": 0x10}': (1, 7, "not a number as JSON writes it"),
    '{"a": "b': (1, 7, "unterminated string"),
    '{"a": "b\nc"}': (1, 9, "line break"),
    '{"a": "\\q"}': (1, 8, "escape"),
    '{"a": "\\ud800"}': (1, 7, "surrogate"),
    '{"a": 1': (1, 8, "the file ends"),
    "": (1, 1, "the file ends"),
    '{"a": 1}}': (1, 9, "the file should end here"),
    '{"a": ' + "9" * 400 + "}": (1, 7, "too large"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_errors_name_line_and_column_and_point_there(text: str) -> None:
    line, column, what = REFUSED[text]
    with pytest.raises(ConfigError) as caught:
        parse(text, "f.json")
    first, excerpt, caret = str(caught.value).split("\n")
    assert first.startswith(f"f.json:{line}:{column}: ")
    assert what in first
    if column < 60:
        assert caret.index("^") == 4 + column - 1
        assert excerpt[4:].rstrip() == text.split("\n")[line - 1][:120].rstrip()


def test_a_long_line_is_shown_around_the_caret() -> None:
    with pytest.raises(ConfigError) as caught:
        parse('{"a": "' + "x" * 5000 + '", oops}', "f.json")
    _, excerpt, caret = str(caught.value).split("\n")
    assert len(excerpt) < 140
    assert excerpt[caret.index("^")] == "o"


def test_deep_nesting_is_an_error_not_a_crash() -> None:
    with pytest.raises(ConfigError, match="nested deeper"):
        parse("[" * 100_000, "f.json")
    assert parse("[" * MAX_DEPTH + "]" * MAX_DEPTH, "f.json")


def test_notepads_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read(tmp_path / "f.json", "f.json").value == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}'.encode("utf-16"), "f.json:1:1: begins with a byte order mark"),
        (b'{\n"a": "caf\xe9"}', "f.json:2: byte 11 is not UTF-8"),
    ],
)
def test_files_of_another_encoding_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "f.json", "f.json")
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^f\.json: there is no such file$"):
        read(tmp_path / "f.json", "f.json")
    with pytest.raises(ConfigError, match=r"^f\.json: cannot be read: Is a directory$"):
        read(tmp_path, "f.json")


def test_numbers_keep_their_type() -> None:
    whole, real, exponent = parse("[1, 1.0, 1e2]", "f.json").value
    assert (type(whole), type(real), type(exponent)) == (int, float, float)
    assert math.isclose(exponent, 100.0)
