"""The embedded base model: the published form, small, whole, and able to say and show what it was taught."""

import json
import random
from pathlib import Path

import pytest
from safetensors import safe_open

from examples.demo.making import creature, folder, world

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
MODEL = DEMO / "base_model"
SIZE_LIMIT = 10 * 2**20


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(MODEL / "tokenizer")


def test_it_is_small():
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) <= SIZE_LIMIT


def test_it_has_the_published_files():
    found = {file.relative_to(MODEL).as_posix() for file in MODEL.rglob("*") if file.is_file()}
    assert found == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_it_has_the_published_key_names():
    keys = {part: read_keys(part) for part in ("text_encoder", "unet", "vae")}
    assert all(key.startswith("text_model.") for key in keys["text_encoder"])
    assert "text_model.embeddings.token_embedding.weight" in keys["text_encoder"]
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight" in keys["unet"]
    assert "encoder.mid_block.attentions.0.to_q.weight" in keys["vae"]
    assert {dtype for part in keys.values() for dtype in part.values()} == {"F16"}


def read_keys(part: str) -> dict[str, str]:
    (file,) = (MODEL / part).glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        return {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118


def test_the_scheduler_is_stable_diffusion_1s():
    assert json.loads((MODEL / "scheduler" / "scheduler_config.json").read_text()) == folder.SCHEDULER


def test_every_caption_fits_and_known_words_are_one_token(tokenizer):
    rng = random.Random(0)
    captions = [world.varied_caption(world.draw_spec(rng), rng) for _ in range(500)]
    captions += [path.read_text() for path in DEMO.glob("*/*.txt")]
    assert max(len(ids) for ids in tokenizer(captions).input_ids) <= tokenizer.model_max_length == 77
    for word in (*world.SHAPES, *world.COLOURS, *world.SIZES, *world.PLACES, "background"):
        assert len(tokenizer(word).input_ids) == 3, word


@pytest.mark.parametrize("text", [creature.caption(creature.PICTURES[0][0]), "Ünï 漢字 🦊 #1", "zxqj"])
def test_any_text_has_tokens_of_its_own(tokenizer, text: str):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids[1:-1]


def test_every_picture_has_a_caption():
    for name, count in (("subject", len(creature.PICTURES)), ("class", 960)):
        pictures = sorted((DEMO / name).glob("*.png"))
        assert len(pictures) == count
        assert all(picture.with_suffix(".txt").read_text().strip() for picture in pictures)


def test_subject_captions_have_the_token_and_class_captions_have_not():
    assert all(f" {creature.TOKEN} " in path.read_text() for path in (DEMO / "subject").glob("*.txt"))
    assert not any(creature.TOKEN in path.read_text() for path in (DEMO / "class").glob("*.txt"))
