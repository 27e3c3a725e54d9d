"""Captions are read strictly, and changed only where that was asked for."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everydream.data.captions import (
    FOLDER_FILES,
    KINDS,
    Values,
    _from_yaml,
    caption_from_name,
    is_camera_name,
    parse_value,
    read_folder_file,
    read_manifest,
    read_sidecar,
    shuffle_tags,
)
from everydream.data.problems import Unfit
from everydream.draws import generator
from tests.data.pictures import write


@pytest.mark.parametrize(
    "content, caption",
    [
        (b"a red star", "a red star"),
        (b"\xef\xbb\xbfa red star", "a red star"),  # byte order mark
        (b"  a red star \r\n", "a red star"),
        (b"a red star,\r\n  on blue\r\n", "a red star, on blue"),
        ("café".encode(), "café"),
        ("cafe\u0301".encode(), "café"),  # NFD
        (b"a, a,, a ,b", "a, a,, a ,b"),  # commas and repeats are the author's
        (b"", ""),
        (b"\n\n", ""),
    ],
)
def test_a_text_sidecar_is_one_clean_line(tmp_path: Path, content: bytes, caption: str) -> None:
    assert read_sidecar(write(tmp_path, "a.txt", content)) == Values(caption=caption)


@pytest.mark.parametrize(
    "content, reason",
    [
        ("café".encode("latin-1"), "not UTF-8 at byte 3 (0xe9)"),
        ("café".encode("utf-16"), "UTF-16"),
        ("cafe".encode("utf-16-be"), "NUL"),
        (b"a\0b", "NUL character at character 1"),
        (b"word " * 200_000, "over 64 KiB"),
        (b"\xff\xd8\xff\xe0 a JPEG", "not UTF-8 at byte 0"),
        (b"\xef\xbb\xbfcaf\xe9", "not UTF-8 at byte 6 (0xe9)"),  # counted in the file, byte order mark and all
        (b"\xff\xfe in Latin-1", "not UTF-8 at byte 0 (0xff)"),
    ],
)
def test_what_is_no_plain_text_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(Unfit) as caught:
        read_sidecar(write(tmp_path, "a.txt", content))
    assert reason in caught.value.reason and caught.value.advice


def test_a_pipe_is_never_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(Unfit, match="regular"):
        read_sidecar(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "content, values",
    [
        ("just a caption", Values(caption="just a caption")),
        ("caption: a cat\nmultiply: 2\nshuffle_tags: yes", Values("a cat", multiply=2.0, shuffle_tags=True)),
        ("main_prompt: a cat\ntags: [tree, {tag: sky, weight: 2}, 1990]", Values("a cat, tree, sky, 1990")),
        ("tags:\n- one\n- two", Values("one, two")),
        ("loss_scale: 0.5", Values(loss_scale=0.5)),
        ("", Values("")),
        ("caption: 2024-02-30", Values("2024-02-30")),  # dates are text
        ("2024-99-01", Values("2024-99-01")),
        ("tags: [2024-01-31, a]", Values("2024-01-31, a")),
        ("!!timestamp foo", Values("foo")),
        ("tags: []\nmultiply: 2", Values(multiply=2.0)),  # which say nothing, so that the next source counts
        ("{caption: a, tags: ['', ' ']}", Values("a")),
        ("{caption: '', tags: [a]}", Values("a")),
        (r'"\ud83d\ude00"', Values("😀")),
    ],
)
def test_a_yaml_sidecar_may_hold_values(tmp_path: Path, content: str, values: Values) -> None:
    assert read_sidecar(write(tmp_path, "a.yaml", content)) == values


@pytest.mark.parametrize(
    "content, words",
    [
        ("captoin: a cat", "did you mean 'caption'"),
        ("flip_p: 2", "flip_p is 2: a number from 0 to 1"),
        ("cond_dropout: true", "cond_dropout is True"),
        ("caption: 5", "its caption is 5"),
        ("- a\n- b", "neither a text"),
        ("a: [", "not YAML in line"),
        ("tags: {a: b}", "tags are not a list"),
        ("multiply: 1" + 400 * "0", "no usable int"),
        ("multiply: 0x" + 5000 * "f", "no usable int"),
        ("multiply: " + 5000 * "1", "no usable int"),
        ("!!int foo", "not YAML in line 1 (what stands there is no usable int)"),
        ("caption: a\nmultiply: !!float foo", "not YAML in line 2 (what stands there is no usable float)"),
        ("!!bool foo", "no usable bool"),
        ("!!binary é", "not YAML in line 1"),
        (600 * "[", "nested too deeply"),
        (r'"\ud83d"', "half a surrogate pair in its caption"),
        (r'tags: ["\udc00"]', "half a surrogate pair in its tag"),
        (r'"a\0b"', "a NUL character in its caption"),
        ("caption: a\nflip_p: 0\ncaption: b", "not YAML in line 3 ('caption' stands twice)"),
        ("caption: a\nmain_prompt: b", "its caption stands there twice"),
        ("a: &a [x, x]\nb: [*a, *a]", "not YAML in line 2 (an alias"),
        ("caption: [" + 300 * "[x, x], " + "]", "its caption is [["),
    ],
)
def test_a_wrong_yaml_sidecar_is_refused(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(Unfit) as caught:
        read_sidecar(write(tmp_path, "a.yml", content))
    assert words in str(caught.value)


PIECES = (
    """caption tags - [ { } ] &a *a << !!set !!int !!omap !!binary !x ? 2024-13-01 0x1 1:6 " %Y \\ud83d ~ .inf = # |"""
)


@settings(max_examples=80, deadline=None)
@given(
    text=st.text(max_size=40)
    | st.lists(st.sampled_from([*PIECES.split(), ": ", ", ", "\n", " "]), max_size=12).map(" ".join)
)
def test_any_yaml_is_values_or_one_refusal(text: str) -> None:
    try:
        values = _from_yaml(text)
    except Unfit as error:
        assert error.reason and error.advice and len(error.reason) < 300
    else:
        assert values.caption is None or values.caption.encode("utf-8") is not None


VALUES = {  # name: (text that is right, its value, text that is wrong)
    "multiply": ("1.5\n", 1.5, "-1"),
    "cond_dropout": ("0", 0.0, "1.1"),
    "flip_p": ("1", 1.0, "half"),
    "loss_scale": (" 0.25 ", 0.25, "nan"),
    "shuffle_tags": ("", True, "perhaps"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_folder_file_is_parsed_and_checked(tmp_path: Path, name: str) -> None:
    right, value, wrong = VALUES[name]
    assert FOLDER_FILES[f"{name}.txt"] == name
    assert read_folder_file(write(tmp_path, f"{name}.txt", right)) == value
    with pytest.raises(Unfit, match=f"{name} is"):
        read_folder_file(write(tmp_path, f"{name}.txt", wrong))


@pytest.mark.parametrize("value", [0.0009, 1e-300, 10**400, -0.5, 10_001, float("nan"), True, [], "one"])
def test_a_multiply_that_cannot_be_kept_is_refused(value: object) -> None:
    with pytest.raises(Unfit, match=r"multiply is .*: a number from 0\.001 to 10000, or 0, is expected"):
        parse_value("multiply", value)


def test_zero_and_false_are_values() -> None:
    assert Values(multiply=0.0, shuffle_tags=False).over(Values("a", 2.0, shuffle_tags=True)) == Values(
        "a", 0.0, shuffle_tags=False
    )
    assert parse_value("shuffle_tags", "False") is False


def test_manifests_are_lists_or_lines(tmp_path: Path) -> None:
    expected = {"a.png": Values("one"), "deep/b.png": Values("two", multiply=2.0)}
    rows = '{"image": "a.png", "caption": "one"}', '{"image": "deep\\\\b.png", "caption": "two", "multiply": 2}'
    assert read_manifest(write(tmp_path, "m.json", f"[{rows[0]},\n{rows[1]}]")) == expected
    assert read_manifest(write(tmp_path, "m.jsonl", f"{rows[0]}\n\n{rows[1]}\n")) == expected
    assert read_manifest(write(tmp_path, "m.JSONL", "\n".join(rows))) == expected
    assert read_manifest(write(tmp_path, "n.jsonl", '{"file_name": "a.png", "text": "one"}')) == {
        "a.png": Values("one")
    }


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("m.json", '[{"image": "a.png",}]', "not JSON in line 1"),
        ("m.jsonl", '{"image": "a.png"}\n{oops}', "not JSON in line 2"),
        ("m.json", '{"image": "a.png"}', "not a list"),
        ("m.jsonl", '{"caption": "a"}', "line 1: it has no image"),
        ("m.jsonl", '{"image": "a.png"}\n{"image": "a.png"}', "line 2: it names 'a.png' again"),
        ("m.jsonl", '{"image": "a.png", "cap": "a"}', "did you mean 'caption'"),
        ("m.jsonl", "7", "line 1: it is not an object"),
        ("m.jsonl", '{"image": "a.png"}\n{"image": "./a.png"}', "line 2: it names 'a.png' again"),
        ("m.jsonl", '{"image": "a.png", "file_name": "b.png"}', "line 1: it has several images"),
        ("m.jsonl", '{"image": "a.png", "caption": "a", "caption": "b"}', "line 1: its caption stands there twice"),
        ("m.jsonl", '{"image": "a.png", "caption": "a", "text": "b"}', "line 1: its caption stands there twice"),
        ("m.jsonl", r'{"image": "a.png", "caption": "\ud83d"}', "line 1: half a surrogate pair in its caption"),
        ("m.jsonl", r'{"image": "\ud83d.png"}', "line 1: half a surrogate pair in its image"),
        ("m.jsonl", r'{"image": "a\u0000.png"}', "line 1: a NUL character in its image"),
        ("m.json", '[{"image": "a.png", "multiply": 1%s}]' % (400 * "0"), "entry 1: multiply is 1000"),
        ("m.json", "[1" + 5000 * "0" + "]", "a number of thousands of digits"),
        ("m.json", 200_000 * "[", "nested too deeply"),
        ("m.jsonl", "\n" + 200_000 * "[", "from line 2 (nested too deeply)"),
    ],
)
def test_a_wrong_manifest_is_refused_with_its_line(tmp_path: Path, name: str, content: str, words: str) -> None:
    with pytest.raises(Unfit) as caught:
        read_manifest(write(tmp_path, name, content))
    assert words in str(caught.value)


def test_every_wrong_entry_of_a_manifest_is_reported_and_the_others_are_read(tmp_path: Path) -> None:
    rows = [
        '{"image": "a.png"}',
        '{"image": "b.png", "flip_p": 2}',
        "{oops",
        '{"image": "a.png"}',
        '{"image": "c.png"}',
    ]
    found: list[Unfit] = []
    entries = read_manifest(write(tmp_path, "m.jsonl", "\n".join(rows)), found.append)
    assert list(entries) == ["a.png", "c.png"]
    assert [problem.reason.partition(":")[0] for problem in found] == [
        "line 2", "not JSON in line 3, column 2 (Expecting property name enclosed in double quotes)", "line 4"
    ]  # fmt: skip


def test_a_manifest_s_images_are_named_by_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "deep" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "real", target_is_directory=True)
    images = ["s/../s/a.png", "./b.png", f"{tmp_path}/deep/real/c.png", f"{tmp_path}/link/s/d.png",
              "../e.png", "s//f.png"]  # fmt: skip
    path = write(tmp_path / "link", "m.json", json.dumps([{"image": image} for image in images]))
    assert list(read_manifest(path)) == ["s/a.png", "b.png", "c.png", "s/d.png", "../e.png", "s/f.png"]


def test_a_file_name_is_a_caption_up_to_its_first_underscore() -> None:
    assert caption_from_name("a red star, on blue_0001_b") == "a red star, on blue"
    assert caption_from_name("_MG_1234") == ""


@pytest.mark.parametrize(
    "stem", ["IMG_1234", "_MG_1234", "DSC00017", "DSCF0042", "20240131_101500", "PXL_2024", "4f2a9c71", "P1020304",
             "Screenshot 2024-01-01", "00001", "WhatsApp Image 2023", "image (123)", "IMG_E1234", "IMGP0001",
             "VID_20240131", "MVIMG_2019", "SDC10001", "CRW_1234", "HPIM1234", "G0010001", "R0001234", "1", "12"]
)  # fmt: skip
def test_camera_names_are_known(stem: str) -> None:
    assert is_camera_name(stem)


@pytest.mark.parametrize(
    "stem",
    [
        "a red star_001",
        "dog_0001",
        "portrait",
        "cafe",
        "p",
        "scandinavia_1",
        "sks dog 12",
        "r2d2",
        "7 dwarfs",
        "g",
        "video",
    ],
)
def test_other_names_are_not_a_camera_s(stem: str) -> None:
    assert not is_camera_name(stem)


def test_shuffled_tags_are_the_same_tags_with_commas_and_spaces_in_place() -> None:
    caption = "sks,  red ,b,b,, c d"
    orders = {shuffle_tags(caption, 1, generator(0, "tags", at)) for at in range(300)}
    assert len(orders) > 20
    for order in orders:
        parts = order.split(",")
        assert parts[0] == "sks"
        assert Counter(part.strip() for part in parts) == Counter(["sks", "red", "b", "b", "", "c d"])
        assert [len(part) - len(part.strip()) for part in parts] == [0, 3, 0, 0, 0, 1]


@pytest.mark.parametrize("keep", [0, 1, 2, 9])
def test_kept_tags_stay_in_front(keep: int) -> None:
    for at in range(20):
        shuffled = shuffle_tags("a, b, c, d", keep, generator(0, "tags", at))
        assert shuffled.split(", ")[:keep] == ["a", "b", "c", "d"][:keep]
        assert sorted(shuffled.split(", ")) == ["a", "b", "c", "d"]
    assert shuffle_tags("no tags", 0, generator(0, "tags")) == "no tags"


def test_every_order_of_tags_is_equally_likely() -> None:
    counts = Counter(shuffle_tags("a,b,c", 0, generator(5, "tags", at)) for at in range(6000))
    assert len(counts) == 6
    assert all(abs(count - 1000) < 4 * (1000 * 5 / 6) ** 0.5 for count in counts.values())
