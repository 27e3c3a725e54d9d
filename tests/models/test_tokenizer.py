"""Tokens are transformers' own, and captions longer than one chunk go on in the next."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from everydream.errors import ConfigError
from everydream.models.tokenizer import Tokenize, clip_tokenizer, read_tokenizer
from tests.tiny import make_tiny_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

CAPTIONS = [
    "",
    "the red star on a sks",
    "A Photo,  of\tTHE\n\nRed star's 1234 (best quality:1.2), …",
    "naïve café, ÅNGSTRÖM, ﬁne, e\u0301clair",
    "猫と犬 🐈‍⬛ emoji",
    "don't we're I'll x_y-z <|endoftext|> after",
    "word " * 200,
]


@pytest.fixture(scope="module", params=["tiny", "tiny openclip", "CLIP", "CLIP padded as Stable Diffusion 2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    if request.param.startswith("tiny"):
        return make_tiny_model(path, openclip="openclip" in request.param) / "tokenizer"
    files = clip_tokenizer("!" if "2" in request.param else "<|endoftext|>")
    for name, content in files.files.items():
        (path / name).write_bytes(content)
    return path


def test_tokens_are_transformers_own(folder: Path) -> None:
    theirs = CLIPTokenizer.from_pretrained(folder)
    ours = Tokenize(read_tokenizer(folder))
    expected = theirs(CAPTIONS, padding="max_length", truncation=True, max_length=77, return_tensors="np").input_ids
    tokens = ours(CAPTIONS)
    assert tokens.shape == (len(CAPTIONS), 1, 77) and tokens.dtype == np.int64
    np.testing.assert_array_equal(tokens[:, 0], expected)


def test_count_is_of_tokens_without_the_marks(folder: Path) -> None:
    theirs = CLIPTokenizer.from_pretrained(folder)
    ours = Tokenize(read_tokenizer(folder))
    assert [ours.count(c) for c in CAPTIONS] == [len(theirs(c, add_special_tokens=False).input_ids) for c in CAPTIONS]


def test_clips_vocabulary_is_the_published_one() -> None:
    vocabulary = clip_tokenizer().vocabulary
    known = {"!": 0, "a</w>": 320, "of</w>": 539, "photo</w>": 1125, "dog</w>": 1929, "cat</w>": 2368}
    assert {word: vocabulary[word] for word in known} == known
    assert len(vocabulary) == 49408
    assert vocabulary["<|startoftext|>"] == 49406 and vocabulary["<|endoftext|>"] == 49407


def test_long_captions_fill_chunks_with_marks_of_their_own(folder: Path) -> None:
    ours = Tokenize(read_tokenizer(folder))
    caption = "the red star on a sks " * 20
    count = ours.count(caption)
    assert 75 < count < 150
    tokens = ours([caption, "the red"], chunks=3)
    start, end = ours([""])[0, 0, :2]
    assert (tokens[:, :, 0] == start).all()
    whole = [token for chunk in tokens[0] for token in chunk[1 : 1 + 75]]
    assert whole[:count] == ours._ids(caption)
    assert tokens[0, 0, 76] == end and tokens[0, 2, 1] == end and tokens[1, 1, 1] == end
    np.testing.assert_array_equal(tokens[1, 1], ours([""])[0, 0])


def test_what_does_not_fit_is_cut_off(folder: Path) -> None:
    ours = Tokenize(read_tokenizer(folder))
    assert ours(["red " * 500], chunks=2).shape == (1, 2, 77)


def test_data_workers_get_the_same_tokenizer(folder: Path) -> None:
    ours = Tokenize(read_tokenizer(folder))
    again = pickle.loads(pickle.dumps(ours))
    np.testing.assert_array_equal(again(CAPTIONS, 2), ours(CAPTIONS, 2))


@pytest.mark.filterwarnings("ignore")
def test_the_form_that_transformers_5_writes_is_read_alike(folder: Path, tmp_path: Path) -> None:
    CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists(), "transformers writes the published form again: this test can go"
    assert read_tokenizer(tmp_path) == read_tokenizer(folder)


def test_files_are_the_published_four_and_read_back_alike(folder: Path, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(folder)
    files = tokenizer.files
    assert set(files) == {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert read_tokenizer(tmp_path) == tokenizer


def test_added_words_keep_their_numbers(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    number = len(read_tokenizer(folder).vocabulary)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<creature>": number}), encoding="utf-8")
    tokenizer = read_tokenizer(tmp_path)
    ours, theirs = Tokenize(tokenizer), CLIPTokenizer.from_pretrained(tmp_path)
    assert ours(["a <creature> there"])[0, 0].tolist().count(number) == 1
    np.testing.assert_array_equal(
        ours(["a <creature> there"])[0, 0], theirs("a <creature> there", padding="max_length", max_length=77).input_ids
    )
    assert json.loads(tokenizer.files["added_tokens.json"]) == {"<creature>": number}


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "vocab.json").unlink(), "neither vocab.json and merges.txt nor tokenizer.json"),
        (lambda folder: (folder / "vocab.json").write_text('{"a": 0}'), r"has no <\|startoftext\|>"),
        (lambda folder: (folder / "vocab.json").write_text("{"), "vocab.json cannot be read"),
        (lambda folder: (folder / "merges.txt").write_text("#version\nnotapair\n"), "merges.txt"),
        (lambda folder: (folder / "special_tokens_map.json").write_text('{"pad_token": "zzz"}'), "pads with 'zzz'"),
    ],
)
def test_a_broken_tokenizer_is_named(tmp_path: Path, break_it: object, message: str) -> None:
    folder = make_tiny_model(tmp_path) / "tokenizer"
    break_it(folder)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=message):
        Tokenize(read_tokenizer(folder))
