"""Makes the demo's tokenizer in the form of CLIP's: vocab.json and merges.txt, byte-level, so that any text has tokens.

The first 512 tokens are every byte, inside a word and at its end; then come the merges, then start and end of text.
"""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from examples.demo.making import world

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
MAX_LENGTH = 77
# Words people put in prompts, so that the demo's vocabulary does not fall apart at the first of them.
PLAIN_WORDS = """a an and animal art at background big by creature dark drawing for from in is it large light little of
on one painting person photo picture shape sketch small style that the thing things this to toy two under with"""


def write(folder: Path, seed: int) -> None:
    """The four files that Stable Diffusion 1's tokenizer folder has, whatever library version reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = train_merges(seed)
    alphabet = byte_alphabet()
    tokens = alphabet + [byte + WORD_END for byte in alphabet] + ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    assert len(vocabulary) == len(tokens), "a token stands twice in the vocabulary"
    write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    write_json(
        folder / "special_tokens_map.json",
        {
            "bos_token": {"content": START, **special},
            "eos_token": {"content": END, **special},
            "pad_token": END,
            "unk_token": {"content": END, **special},
        },
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "bos_token": START,
            "do_lower_case": True,
            "eos_token": END,
            "errors": "replace",
            "model_max_length": MAX_LENGTH,
            "pad_token": END,
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": END,
        },
    )


def train_merges(seed: int, vocabulary_size: int = 800) -> list[tuple[str, str]]:
    """Byte pairs merged in order of frequency in the world's captions and some plain words."""
    rng = random.Random(f"tokenizer {seed}")
    captions = [world.caption(world.draw_spec(rng)) for _ in range(2000)]
    tokenizer = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix=WORD_END))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, initial_alphabet=byte_alphabet(), end_of_word_suffix=WORD_END, show_progress=False
    )
    tokenizer.train_from_iterator(captions + PLAIN_WORDS.split() * 5, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in merges]


def byte_alphabet() -> list[str]:
    """The 256 letters that byte-level BPE writes bytes with, in one fixed order."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
