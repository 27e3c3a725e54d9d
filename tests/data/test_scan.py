"""Folders → samples: identities, captions and values from the right place, all problems in one report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from everydream.data import gate, verify
from everydream.data.folders import Root, roots_of
from everydream.data.scan import Scan, scan
from everydream.errors import DataError
from tests.data.pictures import encoded, jpeg, picture, png, write


def scanned(folder: Path, default: str | None = None, **options) -> Scan:
    return scan([Root("subject", folder, default)], workers=2, **options)


def captions(found: Scan) -> dict[str, str]:
    return {sample.identity.removeprefix("subject/"): sample.caption for sample in found.samples}


def problems(found: Scan) -> str:
    return "\n".join(map(str, found.problems))


# --- identities ---


def test_identity_is_root_and_nfc_posix_path_sorted(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.png", "a/cafe\u0301.png", "A.png"):
        write(tmp_path, name, png())
    names = [sample.identity for sample in scanned(tmp_path).samples]
    assert names == ["subject/A.png", "subject/a/café.png", "subject/a/z.png", "subject/b.png"]


def test_two_spellings_of_one_name_are_an_error(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        write(tmp_path, unicodedata.normalize(form, "café.png"), png())
    found = scanned(tmp_path)
    assert problems(found).count("Unicode is normalised") == 2
    with pytest.raises(DataError):
        found.usable("skip")


def test_several_roots_are_told_apart_by_their_index(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        write(tmp_path, f"{folder}/a.png", png())
    found = scan(roots_of("subject", (tmp_path / "x", tmp_path / "y")))
    assert [sample.identity for sample in found.samples] == ["subject-0/a.png", "subject-1/a.png"]


# --- captions ---


def test_captions_come_from_manifest_then_sidecar_then_prompt_then_name(tmp_path: Path) -> None:
    for stem in ("one_1", "two_1", "three_1", "four_1"):
        write(tmp_path, f"{stem}.png", png())
    assert captions(scanned(tmp_path))["four_1.png"] == "four"
    write(tmp_path, "one_1.txt", "one's sidecar")
    write(tmp_path, "two_1.caption", "two's sidecar")
    write(tmp_path, "three_1.yaml", "multiply: 3")
    write(tmp_path, "manifest.json", '[{"image": "one_1.png", "caption": "one of the manifest"}]')
    found = scanned(tmp_path, default="prompt")
    assert captions(found) == {
        "one_1.png": "one of the manifest",
        "two_1.png": "two's sidecar",
        "three_1.png": "prompt",
        "four_1.png": "prompt",
    }
    assert {sample.identity[8:]: sample.multiply for sample in found.samples}["three_1.png"] == 3.0


def test_a_sidecar_is_found_whatever_the_spelling_of_its_name(tmp_path: Path) -> None:
    write(tmp_path, "cafe\u0301.png", png())
    write(tmp_path, "caf\u00e9.TXT", "a place")
    assert captions(scanned(tmp_path)) == {"café.png": "a place"}


def test_the_prompt_beside_captions_for_all_is_without_effect(tmp_path: Path) -> None:
    write(tmp_path, "a.png", png())
    write(tmp_path, "a.txt", "a caption")
    assert any("instance_prompt is without effect" in note for note in scanned(tmp_path, "prompt").notes)
    write(tmp_path, "b.png", png())
    assert not any("without effect" in note for note in scanned(tmp_path, "prompt").notes)


def test_a_prompt_that_one_root_uses_has_an_effect(tmp_path: Path) -> None:
    for name in ("x/a.png", "y/b.png"):
        write(tmp_path, name, png())
    write(tmp_path, "x/a.txt", "a caption")
    roots = roots_of("subject", (tmp_path / "x", tmp_path / "y"), "prompt")
    assert not any("without effect" in note for note in scan(roots).notes)
    write(tmp_path, "y/b.yaml", "caption: another")
    assert sum("instance_prompt is without effect" in note for note in scan(roots).notes) == 1


def test_tags_that_say_nothing_leave_the_caption_to_the_prompt(tmp_path: Path) -> None:
    write(tmp_path, "a.png", png())
    write(tmp_path, "a.yaml", "tags: []")
    assert captions(scanned(tmp_path, "prompt")) == {"a.png": "prompt"}
    assert captions(scanned(tmp_path)) == {"a.png": "a"}


def test_a_second_sidecar_adds_what_the_first_does_not_say(tmp_path: Path) -> None:
    for stem in ("a", "b"):
        write(tmp_path, f"{stem}.png", png(seed=ord(stem)))
        write(tmp_path, f"{stem}.txt", f"{stem}'s text")
    write(tmp_path, "a.yaml", "multiply: 4")
    found = scanned(tmp_path)
    assert captions(found) == {"a.png": "a's text", "b.png": "b's text"}
    assert found.samples[0].multiply == 4.0 and found.notes == ()
    write(tmp_path, "b.yaml", "{caption: b's yaml, multiply: 3}")
    found = scanned(tmp_path)
    assert found.samples[1].caption == "b's text" and found.samples[1].multiply == 3.0
    (note,) = found.notes
    assert note.startswith("second caption files") and "b.yaml" in note and "a.yaml" not in note


@pytest.mark.parametrize(
    "names", [("a.txt", "a.TXT"), ("caf\u00e9.txt", "cafe\u0301.txt"), ("a.mask.png", "a.MASK.PNG")]
)
def test_files_beside_a_picture_with_one_name_are_said(tmp_path: Path, names: tuple[str, str]) -> None:
    stem = unicodedata.normalize("NFC", names[0].partition(".")[0])
    for number, name in enumerate((f"{stem}.png", *names)):
        write(tmp_path, name, png() if name.lower().endswith("png") else f"caption {number}")
    (note,) = (note for note in scanned(tmp_path, masked_loss=True).notes if note.startswith("second"))
    assert max(names) in note and min(names) not in note


def test_two_folder_files_of_one_name_are_an_error(tmp_path: Path) -> None:
    write(tmp_path, "a.png", png())
    for name in ("multiply.txt", "Multiply.TXT"):
        write(tmp_path, name, "2")
    with pytest.raises(DataError, match=r"multiply\.txt: another file has the same name but for its case"):
        scanned(tmp_path).usable("skip")


def test_files_that_are_not_read_are_counted(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpe"):
        write(tmp_path, name, png() if name == "a.png" else jpeg())
    for name in ("a.txt", "multiply.txt", "metadata.jsonl", "Thumbs.db", "desktop.ini", ".DS_Store"):
        write(tmp_path, name, "1" if name == "multiply.txt" else "")
    assert len(scanned(tmp_path).samples) == 2
    assert not any("not read" in note for note in scanned(tmp_path).notes)
    for name in ("x.npz", "deep/y.NPZ", "clip.mp4", "LICENSE"):
        write(tmp_path, name, "")
    assert "files that are not read: 1 .mp4, 2 .npz, 1 without ending" in scanned(tmp_path).notes


@pytest.mark.parametrize("name", ["a.tga", "a.PPM", "a.cr3", "a.dng", "a.exr"])
def test_pictures_that_cannot_be_read_are_problems(tmp_path: Path, name: str) -> None:
    write(tmp_path, name, "pixels")
    assert f"{name}: {name[1:]} pictures cannot be read" in problems(scanned(tmp_path))


def test_camera_names_as_captions_are_said(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path, f"IMG_{number:04}.jpg", jpeg())
    assert any("a camera's" in note for note in scanned(tmp_path).notes)
    assert not any("a camera's" in note for note in scanned(tmp_path, "a dog").notes)


def test_what_surprises_is_said(tmp_path: Path) -> None:
    for seed, stem in enumerate(("a", "b", "c")):
        write(tmp_path, f"{stem}.png", png(seed=seed // 2))
    write(tmp_path, "a.txt", "")
    write(tmp_path, "a.caption", "second")
    write(tmp_path, "b.txt", "b")
    write(tmp_path, "nobody.txt", "whose?")
    write(tmp_path, "b.mask.png", png())
    notes = "\n".join(scanned(tmp_path).notes)
    for words in (
        "1 captions are empty",
        "more than once, byte for byte",
        "without a picture\n",
        "nobody.txt",
        "second caption files",
        "1 of 3 pictures have no caption",
        "masked_loss is off",
    ):
        assert words in notes, notes


def test_every_bad_caption_is_reported_and_may_be_skipped(tmp_path: Path) -> None:
    for stem in ("good", "latin", "nul"):
        write(tmp_path, f"{stem}.png", png())
    write(tmp_path, "latin.txt", "café".encode("latin-1"))
    write(tmp_path, "nul.txt", b"\0")
    found = scanned(tmp_path)
    assert len(found.problems) == 2 and "latin.txt: not UTF-8 at byte 3" in problems(found)
    with pytest.raises(DataError) as caught:
        found.usable("error")
    assert len(caught.value.problems) == 3
    assert [sample.identity for sample in found.usable("skip")] == ["subject/good.png"]


# --- folder files and manifests ---


def test_folder_files_hold_for_their_own_folder_and_sidecars_win(tmp_path: Path) -> None:
    for name in ("x/a.png", "x/b.png", "x/deep/c.png"):
        write(tmp_path, name, png())
    for name, value in [("multiply", "0"), ("cond_dropout", "0.5"), ("flip_p", "1"), ("loss_scale", "2")]:
        write(tmp_path, f"x/{name}.txt", value)
    write(tmp_path, "x/shuffle_tags.txt", "")
    write(tmp_path, "x/b.yaml", "{caption: b, multiply: 4, shuffle_tags: false}")
    a, b, deep = scanned(tmp_path).samples
    assert (a.multiply, a.cond_dropout, a.flip_p, a.loss_scale, a.shuffle_tags) == (0.0, 0.5, 1.0, 2.0, True)
    assert (b.multiply, b.cond_dropout, b.shuffle_tags) == (4.0, 0.5, False)
    assert (deep.multiply, deep.cond_dropout, deep.flip_p, deep.shuffle_tags) == (1.0, None, None, None)


def test_a_wrong_folder_file_stops_also_where_bad_pictures_are_skipped(tmp_path: Path) -> None:
    write(tmp_path, "a.png", png())
    write(tmp_path, "multiply.txt", "twice")
    with pytest.raises(DataError, match=r"multiply.txt: multiply is 'twice': a number"):
        scanned(tmp_path).usable("skip")


def test_a_manifest_alone_names_all_pictures(tmp_path: Path) -> None:
    for name in ("pictures/a.png", "pictures/b.png", "pictures/unnamed.png"):
        write(tmp_path, name, png())
    write(tmp_path, "pictures/b.txt", "b's sidecar")
    rows = '{"image": "pictures/a.png", "caption": "a", "loss_scale": 0.5}\n{"image": "pictures/b.png"}\n'
    path = write(tmp_path, "list.jsonl", rows)
    found = scan([Root("subject", path, None)])
    assert captions(found) == {"pictures/a.png": "a", "pictures/b.png": "b's sidecar"}
    assert found.samples[0].loss_scale == 0.5 and not found.problems
    write(tmp_path, "list.jsonl", rows + '{"image": "pictures/gone.png"}')
    assert "gone.png: named in the manifest, but not there" in problems(scan([Root("subject", path, None)]))


def test_manifests_of_folders_below_count(tmp_path: Path) -> None:
    for name in ("a.png", "train/b.png", "train/deep/c.png"):
        write(tmp_path, name, png())
    write(tmp_path, "Manifest.JSON", f'[{{"image": "{tmp_path}/a.png", "caption": "one"}}]')
    write(tmp_path, "train/metadata.jsonl", '{"file_name": "./b.png", "text": "two"}\n{"file_name": "deep/c.png"}')
    found = scanned(tmp_path)
    assert captions(found) == {"a.png": "one", "train/b.png": "two", "train/deep/c.png": "c"} and not found.problems
    write(tmp_path, "manifest.jsonl", "")
    assert any(note.startswith("second manifests") and "manifest.jsonl" in note for note in scanned(tmp_path).notes)
    write(tmp_path, "train/deep/metadata.jsonl", '{"image": "c.png"}\n{"image": "../b.png"}\n{"image": "gone.png"}')
    write(tmp_path, "train/deep/text.txt", "no picture")
    with pytest.raises(DataError) as caught:
        scanned(tmp_path).usable("skip")
    assert "deep/metadata.jsonl: it names 'c.png', as a manifest above it does" in str(caught.value)
    assert "deep/metadata.jsonl: it names '../b.png', outside of its folder" in str(caught.value)
    assert "gone.png: named in the manifest, but not there" in problems(scanned(tmp_path))


def test_all_that_is_wrong_with_a_manifest_is_reported(tmp_path: Path) -> None:
    for name in ("a.png", "notes.md"):
        write(tmp_path, name, png())
    write(tmp_path, "a.txt", b"\xff")
    rows = '{"image": "a.png", "flip_p": 2}\n{"image": "notes.md"}\n{"image": "a.png"}\n7\n'
    path = write(tmp_path, "metadata.jsonl", rows)
    for root in (tmp_path, path):
        assert [str(problem).partition(": ")[2] for problem in scanned(root).problems] == [
            "not UTF-8 at byte 0 (0xff), perhaps Latin-1: save it as UTF-8",
            "line 1: flip_p is 2: a number from 0 to 1 is expected",
            'line 4: it is not an object: write {"image": "…", "caption": "…"}',
            "named in the manifest, but not a picture that is read: mend the manifest or add the picture",
        ]


def test_a_pipe_in_a_manifest_s_place_is_a_problem(tmp_path: Path) -> None:
    write(tmp_path, "a.png", png())
    os.mkfifo(tmp_path / "manifest.json")
    assert "manifest.json: not a regular file" in problems(scanned(tmp_path))


def test_a_manifest_alone_may_name_pictures_anywhere(tmp_path: Path) -> None:
    decomposed = "cafe\u0301.png"
    for name in ("lists/a.png", "lists/other.yaml", f"pictures/{decomposed}", "pictures/b.png"):
        write(tmp_path, name, png())
    images = ["./a.png", "../pictures/café.png", f"{tmp_path}/pictures/b.png"]
    path = write(tmp_path, "lists/all.json", json.dumps([{"image": image, "caption": image[-5:]} for image in images]))
    found = scanned(path)
    assert not found.problems and not found.notes[1:]
    assert captions(found) == {"a.png": "a.png", "../pictures/café.png": "é.png", "../pictures/b.png": "b.png"}


def test_pictures_in_a_folder_s_manifest_must_be_there(tmp_path: Path) -> None:
    write(tmp_path, "a.png", png())
    write(tmp_path, "metadata.jsonl", '{"file_name": "b.png", "text": "b"}')
    assert "b.png: named in the manifest, but not there" in problems(scanned(tmp_path))


# --- the gate ---


def test_all_problems_are_in_one_report(tmp_path: Path) -> None:
    write(tmp_path, "good.png", png())
    write(tmp_path, "cut.jpg", jpeg()[:-30])
    write(tmp_path, "page.jpg", "<html>")
    write(tmp_path, "empty.webp", b"")
    write(tmp_path, "phone.heic", b"....ftypheic")
    write(tmp_path, "line\nbreak.png", b"x")
    (tmp_path / os.fsdecode(b"latin\xe9.png")).write_bytes(png())
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    os.mkfifo(tmp_path / "pipe.png")
    long = "n" * 251 + ".png"
    write(tmp_path, long, b"\x89PNG")
    found = scanned(tmp_path)
    lines = problems(found).split("\n")
    assert len(lines) == len(found.problems) == 10, lines  # one line each, also for the name with a line break
    for name in ("cut.jpg", "page.jpg", "empty.webp", "phone.heic", "line\\nbreak.png", "latin\\xe9.png", "gone.png",
                 "self.png", "pipe.png", long):  # fmt: skip
        assert sum(f"{name}: " in line for line in lines) == 1, (name, lines)
    assert [sample.identity for sample in found.usable("skip")] == ["subject/good.png"]


def test_a_link_in_a_circle_ends(tmp_path: Path) -> None:
    write(tmp_path, "a/b.png", png())
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    found = scanned(tmp_path)
    assert "a/up: a link to a folder that it lies in" in problems(found)
    assert len(found.samples) == 1


def test_a_folder_that_cannot_be_opened_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.png", png())
    write(tmp_path, "closed/b.png", png())
    scandir = os.scandir

    def refusing(folder):
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr("everydream.data.folders.os.scandir", refusing)
    found = scanned(tmp_path)
    assert "closed: cannot be opened (Permission denied)" in problems(found)
    with pytest.raises(DataError):
        found.usable("skip")


@pytest.mark.parametrize("there", ["nothing", "empty", "file"])
def test_a_root_without_pictures_is_an_error(tmp_path: Path, there: str) -> None:
    if there != "nothing":
        write(tmp_path, "root/readme.md" if there == "empty" else "root", "no picture")
    with pytest.raises(DataError, match="root"):
        scanned(tmp_path / "root").usable("skip")


def test_hidden_files_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, "a.png", png())
    write(tmp_path, "._a.png", b"a Mac's resource fork")
    write(tmp_path, ".trash/b.png", b"x")
    assert len(scanned(tmp_path).samples) == 1 and not scanned(tmp_path).problems


def test_the_scan_writes_nothing_beside_the_pictures(tmp_path: Path) -> None:
    write(tmp_path, "data/a.png", png())
    before = sorted(tmp_path.rglob("*"))
    scanned(tmp_path / "data")
    assert sorted(tmp_path.rglob("*")) == before


# --- masks ---


def test_masks_belong_to_their_pictures(tmp_path: Path) -> None:
    for stem in ("a", "b", "c", "d"):
        write(tmp_path, f"{stem}.png", png())
    white = Image.new("L", (20, 15), 255)
    write(tmp_path, "a.mask.png", encoded(white, "PNG"))
    write(tmp_path, "b.mask.png", encoded(Image.new("L", (40, 30)), "PNG"))
    write(tmp_path, "c.mask.png", encoded(white.resize((30, 30)), "PNG"))
    found = scanned(tmp_path, masked_loss=True)
    assert [sample.identity for sample in found.samples] == ["subject/a.png", "subject/d.png"]
    a, d = found.samples
    assert a.mask_path == tmp_path / "a.mask.png" and a.mask_content and d.mask_path is None
    assert "b.mask.png: the mask is black everywhere" in problems(found)
    assert "c.mask.png: the mask is 30×30, its picture 40×30" in problems(found)
    assert len(scanned(tmp_path).samples) == 4 and scanned(tmp_path).samples[0].mask_path is None


# --- what is remembered ---


def test_a_second_scan_decodes_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "deep/b.png"):
        write(tmp_path, f"data/{name}", png())
    write(tmp_path, "data/bad.png", b"x")
    decoded = []

    def counted(path, limit):
        decoded.append(path.name)
        return verify.verify(path, limit)

    monkeypatch.setattr(gate, "verify", counted)
    options = {"cache_dir": tmp_path / "cache"}
    first = scanned(tmp_path / "data", **options)
    assert sorted(decoded) == ["a.png", "b.png", "bad.png"]
    decoded.clear()
    assert scanned(tmp_path / "data", **options) == first
    assert decoded == ["bad.png"]  # bad ones are looked at again
    decoded.clear()
    write(tmp_path, "data/a.png", png(50, 40))
    write(tmp_path, "data/bad.png", png())
    second = scanned(tmp_path / "data", **options)
    assert sorted(decoded) == ["a.png", "bad.png"] and second.samples[0].width == 50
    assert "over 0.001 megapixels" in problems(scanned(tmp_path / "data", max_image_megapixels=0.001, **options))


def test_an_interrupted_scan_keeps_what_it_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        write(tmp_path, f"data/{number}.png", png())

    def stop(done: int, total: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scanned(tmp_path / "data", cache_dir=tmp_path / "cache", progress=stop)
    calls = []
    scanned(tmp_path / "data", cache_dir=tmp_path / "cache", progress=lambda done, total: calls.append((done, total)))
    assert calls[0] == (6, 12) and calls[-1] == (12, 12)


def test_a_broken_memory_is_ignored(tmp_path: Path) -> None:
    write(tmp_path, "data/a.png", png())
    first = scanned(tmp_path / "data", cache_dir=tmp_path / "cache")
    (memory,) = (tmp_path / "cache" / "scan").glob("*.json")
    for content in ("{", "[]", '{"a.png": 5}', '{"a.png": [1, 2]}'):
        memory.write_text(content)
        assert scanned(tmp_path / "data", cache_dir=tmp_path / "cache") == first
    (row,) = json.loads(memory.read_text()).values()
    for width in ("x", 0, None):
        memory.write_text(json.dumps({"a.png": [*row[:2], width, *row[3:]]}))
        assert scanned(tmp_path / "data", cache_dir=tmp_path / "cache") == first
    shutil.rmtree(memory.parent)
    memory.parent.write_text("a file in the folder's place")
    assert scanned(tmp_path / "data", cache_dir=tmp_path / "cache") == first


def test_the_scan_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    for number in range(20):
        write(tmp_path, f"{number}.png", png(seed=number) if number % 5 else b"bad")
    one, many = (scan([Root("subject", tmp_path)], workers=workers) for workers in (1, 5))
    assert one == many and len(one.problems) == 4


def test_warnings_of_pillow_do_not_reach_the_user(tmp_path: Path) -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03"
    write(tmp_path, "a.jpg", encoded(picture(), "JPEG", exif=exif))
    code = (
        "from everydream.data.scan import *; import sys; print(len(scan([Root('subject', Path(sys.argv[1]))]).samples))"
    )
    done = subprocess.run([sys.executable, "-W", "always", "-c", code, tmp_path], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_a_large_flat_picture_is_no_problem(tmp_path: Path) -> None:
    write(tmp_path, "a.png", encoded(Image.fromarray(np.zeros((9000, 9000), dtype=np.uint8)), "PNG", compress_level=1))
    assert scanned(tmp_path).samples[0].width == 9000
