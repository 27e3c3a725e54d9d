"""CLIP's tokenizer from its published files, without transformers: data workers start in milliseconds.

Captions → tokens_BKL: each caption is K chunks of L tokens, each with its own start and end mark; L is 77 for CLIP.
Byte-pair encoding as in Radford et al. 2021, https://github.com/openai/CLIP (simple_tokenizer.py).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everydream.errors import ConfigError
from everydream.models.json_files import read_json

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
# Words of CLIP: contractions, runs of letters, single digits, runs of anything else that is not blank.
PATTERN = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


@dataclass(frozen=True)
class TokenizerFiles:
    """The published form: vocabulary, merges in order of rank, the padding token, and words added later."""

    vocabulary: Mapping[str, int]
    merges: tuple[str, ...]
    pad: str = END
    added: Mapping[str, int] | None = None
    length: int = 77

    @cached_property  # fifty thousand words: 35 ms, which each save would cost
    def files(self) -> dict[str, bytes]:
        """File name → content, as Stable Diffusion 1.5 was published; every version of transformers reads these."""
        mark = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        start, end = ({"content": content, **mark} for content in (START, END))
        special = {"bos_token": start, "eos_token": end, "pad_token": self.pad, "unk_token": end}
        config = {
            "add_prefix_space": False,
            "bos_token": {"__type": "AddedToken", **start},
            "do_lower_case": True,
            "eos_token": {"__type": "AddedToken", **end},
            "errors": "replace",
            "model_max_length": self.length,
            "pad_token": self.pad,
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": {"__type": "AddedToken", **end},
        }
        contents: dict[str, Any] = {
            "vocab.json": dict(self.vocabulary),
            "special_tokens_map.json": special,
            "tokenizer_config.json": config,
        }
        if self.added:
            contents["added_tokens.json"] = dict(self.added)
        files = {name: json.dumps(c, ensure_ascii=False, indent=2).encode() + b"\n" for name, c in contents.items()}
        files["merges.txt"] = "\n".join(["#version: 0.2", *self.merges, ""]).encode()
        return files


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """From vocab.json and merges.txt, or from the tokenizer.json that transformers 5 writes instead."""
    added: dict[str, int] = {}
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocabulary = read_json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        if (folder / "added_tokens.json").is_file():
            added = read_json(folder / "added_tokens.json")
    elif (folder / "tokenizer.json").is_file():
        content = read_json(folder / "tokenizer.json")
        model = content.get("model") or {}
        if model.get("type", "BPE") != "BPE" or "vocab" not in model or "merges" not in model:
            raise ConfigError(
                f"base_model: {folder / 'tokenizer.json'} is not a byte-pair encoding with vocab and merges"
            )
        vocabulary = model["vocab"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    else:
        raise ConfigError(f"base_model: {folder} has neither vocab.json and merges.txt nor tokenizer.json")
    for mark in (START, END):
        if mark not in vocabulary:
            raise ConfigError(f"base_model: the vocabulary in {folder} has no {mark}: it is not CLIP's kind")
    added = {word: index for word, index in added.items() if word not in vocabulary}
    return TokenizerFiles(vocabulary, tuple(merges), _pad_token(folder), added or None, _length(folder))


def clip_tokenizer(pad: str = END) -> TokenizerFiles:
    """OpenAI's own, which every published Stable Diffusion 1 and 2 has: its vocabulary follows from its merges."""
    packed = Path(__file__).with_name("published") / "clip_merges.txt.gz"
    merges = gzip.decompress(packed.read_bytes()).decode().splitlines()
    # Byte-level encoding writes the printable bytes as themselves and the others as characters from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    return TokenizerFiles({token: i for i, token in enumerate([*tokens, START, END])}, tuple(merges), pad)


def _pad_token(folder: Path) -> str:
    # Stable Diffusion 2 pads with "!": only special_tokens_map.json says so there, and it wins.
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            pad = read_json(folder / name).get("pad_token")
            if pad is not None:
                return pad["content"] if isinstance(pad, dict) else pad
    return END


def _length(folder: Path) -> int:
    config = folder / "tokenizer_config.json"
    length = read_json(config).get("model_max_length", 77) if config.is_file() else 77
    return length if isinstance(length, int) and 2 < length < 100_000 else 77


class Tokenize:
    """Captions → int64 [B, chunks, length]. Picklable, so that data workers may be started by spawning."""

    def __init__(self, files: TokenizerFiles) -> None:
        self.length = files.length
        self._start, self._end = files.vocabulary[START], files.vocabulary[END]
        known = {**files.vocabulary, **(files.added or {})}
        if files.pad not in known:
            raise ConfigError(f"base_model: the tokenizer pads with {files.pad!r}, which its vocabulary does not have")
        self._pad = known[files.pad]
        self._tokenizer = _build(files)

    def count(self, caption: str) -> int:
        """Tokens of a caption, without the marks; a chunk takes `length - 2`."""
        return len(self._ids(caption))

    def __call__(self, captions: Sequence[str], chunks: int = 1) -> np.ndarray:
        """What does not fit into the chunks is cut off. Unused chunks hold an empty caption."""
        import numpy as np

        room = self.length - 2
        tokens = np.full((len(captions), chunks, self.length), self._pad, dtype=np.int64)
        tokens[:, :, 0] = self._start
        for row, caption in zip(tokens, captions, strict=True):
            ids = self._ids(caption)
            for k, chunk in enumerate(row):
                part = ids[k * room : (k + 1) * room]
                chunk[1 : 1 + len(part)] = part
                chunk[1 + len(part)] = self._end
        return tokens

    def _ids(self, caption: str) -> list[int]:
        return self._tokenizer.encode(caption, add_special_tokens=False).ids


def _build(files: TokenizerFiles) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    try:
        pairs = [(first, second) for first, second in (merge.split(" ") for merge in files.merges)]
        model = models.BPE(
            vocab=dict(files.vocabulary), merges=pairs, end_of_word_suffix="</w>", continuing_subword_prefix="",
            fuse_unk=False, unk_token=END,
        )  # fmt: skip
    except Exception as error:  # the library raises bare ones
        raise ConfigError(f"base_model: the tokenizer's merges.txt and vocab.json do not fit ({error})") from None
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(mark, normalized=True) for mark in (START, END)])
    for word, index in sorted((files.added or {}).items(), key=lambda item: item[1]):
        tokenizer.add_tokens([AddedToken(word)])
        if tokenizer.token_to_id(word) != index:
            raise ConfigError(f"base_model: added token {word!r} should be {index}, not {tokenizer.token_to_id(word)}")
    return tokenizer
