"""Single files: names are the published ones, and diffusers reads back every tensor."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from everydream.draws import torch_generator
from everydream.errors import ConfigError
from everydream.models.autoencoder import Autoencoder
from everydream.models.clip import TextEncoder
from everydream.models.family import Facts, load, read_facts
from everydream.models.original import CONFIG_KEY, PUBLISHED
from everydream.models.tensors import NoInit, PartReader
from everydream.models.tokenizer import clip_tokenizer
from everydream.models.unet import UNet
from everydream.models.weights import NOT_WEIGHTS, to_original, to_published
from everydream.models.writing import content_hash, single_file
from tests.tiny import make_tiny_model

MODULES = {"unet": UNet, "vae": Autoencoder, "text_encoder": TextEncoder}
VERSIONS = ("stable_diffusion_1", "stable_diffusion_2")
# Names and shapes of the state that CompVis' and Stability's own code builds from v1-inference.yaml and
# v2-inference-v.yaml (ldm, open_clip), as published in v1-5-pruned-emaonly and v2-1_768-ema-pruned.
ORIGINAL: dict[str, dict[str, list[int]]] = json.loads(
    gzip.decompress(Path(__file__).with_name("original_keys.json.gz").read_bytes())
)


def published_configs(version: str) -> dict[str, Any]:
    return json.loads((PUBLISHED / f"{version}.json").read_text())


def shapes_of(part: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with NoInit(), torch.device("meta"):
        module = MODULES[part](config)
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def write_folder(folder: Path, configs: dict[str, Any], pad: str, dtype: torch.dtype = torch.float32) -> Path:
    """A diffusers folder of this configuration with random weights and CLIP's tokenizer."""
    for part in MODULES:
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(configs[part]))
        draws = torch_generator(0, "weights", part)
        tensors = {n: torch.randn(s, generator=draws).to(dtype) for n, s in shapes_of(part, configs[part]).items()}
        save_file(tensors, folder / part / f"{stem}.safetensors", {"format": "pt"})
        del tensors
    (folder / "model_index.json").write_text(json.dumps(configs["model_index"]))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(configs["scheduler"]))
    (folder / "tokenizer").mkdir()
    for name, content in clip_tokenizer(pad).files.items():
        (folder / "tokenizer" / name).write_bytes(content)
    return folder


def narrow(version: str) -> dict[str, Any]:
    """The published structure, every name the same, at a tenth of the width."""
    configs = published_configs(version)
    heads = 2 if version == "stable_diffusion_1" else [1, 2, 4, 4]
    configs["unet"] |= {
        "block_out_channels": [32, 64, 128, 128],
        "cross_attention_dim": 64,
        "attention_head_dim": heads,
    }
    configs["vae"] |= {"block_out_channels": [32, 64, 128, 128]}
    configs["text_encoder"] |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    return configs


def export(facts: Facts, path: Path, dtype: torch.dtype | None = None, **options: Any) -> Path:
    made = single_file(facts, dtype=dtype, title="a title", date="2026-01-02T03:04:05Z", **options)
    save_file({name: t.contiguous() for name, t in made.tensors.items()}, path, dict(made.metadata))
    return path


def tensors(facts: Facts) -> dict[str, torch.Tensor]:
    return {f"{part}.{n}": t for part, w in facts.weights.items() for n, t in PartReader(w).read().items()}


def assert_diffusers_reads_all(path: Path, facts: Facts) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_single_file(str(path), config=str(facts.path), local_files_only=True)
    for part, weights in facts.weights.items():
        ours = PartReader(weights).read()
        theirs = dict(getattr(pipeline, part).named_parameters())
        assert len(theirs) == len(ours)
        for name, tensor in theirs.items():
            published = name if name in ours else f"text_model.{name}"
            assert torch.equal(tensor.float(), ours[published].float()), f"{part} {name}"


@pytest.mark.parametrize("part", MODULES)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_published_name_and_shape_has_its_place(version: str, part: str) -> None:
    config, original = published_configs(version)[part], ORIGINAL[version]
    wanted = shapes_of(part, config)
    moves = to_published(part, config, original)
    assert {n: m.published_shape(tuple(original[m.original])) for m in moves for n in m.published} == wanted
    assert {move.original: move for move in to_original(part, config, wanted)} == {m.original: m for m in moves}


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_published_is_left_over(version: str) -> None:
    configs = published_configs(version)
    taken = {m.original for part in MODULES for m in to_published(part, configs[part], ORIGINAL[version])}
    left = {name for name in ORIGINAL[version].keys() - taken if not name.endswith(NOT_WEIGHTS)}
    last_layer = "cond_stage_model.model.transformer.resblocks.23."
    assert all(name.startswith(last_layer) for name in left) and len(left) == (12 if version[-1] == "2" else 0)


def test_a_name_without_a_place_is_told() -> None:
    config = published_configs("stable_diffusion_1")["unet"]
    with pytest.raises(KeyError, match=r"input_blocks.12.0"):
        to_published("unet", config, ["model.diffusion_model.input_blocks.12.0.in_layers.0.weight"])
    with pytest.raises(KeyError, match="add_embedding"):
        to_original("unet", config, ["add_embedding.linear_1.weight"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", VERSIONS)
def test_diffusers_reads_every_tensor_of_the_published_structure(version: str, tmp_path: Path) -> None:
    pad = "!" if version == "stable_diffusion_2" else "<|endoftext|>"
    facts = read_facts(str(write_folder(tmp_path / "model", narrow(version), pad)))
    path = export(facts, tmp_path / "x.safetensors")
    assert_diffusers_reads_all(path, facts)
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    unused = {name for name in ORIGINAL[version] if "resblocks.23." in name or name.endswith(NOT_WEIGHTS[1:])}
    assert names == ORIGINAL[version].keys() - unused


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", VERSIONS)
def test_diffusers_reads_every_tensor_at_full_size(version: str, tmp_path: Path) -> None:
    pad = "!" if version == "stable_diffusion_2" else "<|endoftext|>"
    folder = write_folder(tmp_path / "model", published_configs(version), pad, torch.float16)
    facts = read_facts(str(folder))
    path = export(facts, tmp_path / "x.safetensors")
    header = read_facts(str(path)).weights["unet"].header.shapes
    assert {n: s for n, s in header.items() if n in ORIGINAL[version]} == {
        n: tuple(s) for n, s in ORIGINAL[version].items() if n in header
    }
    assert_diffusers_reads_all(path, facts)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("openclip", [False, True])
def test_any_block_structure_goes_there_and_back(tmp_path: Path, openclip: bool) -> None:
    folder = make_tiny_model(tmp_path / "model", openclip=openclip, prediction_type="v_prediction", position_ids=True)
    facts = read_facts(str(folder))
    path = export(facts, tmp_path / "x.safetensors")
    assert_diffusers_reads_all(path, facts)
    again = read_facts(str(path))
    assert again.shapes == facts.shapes and again.tokenizer == facts.tokenizer
    assert again.prediction_type == "v_prediction" and again.resolution == 64
    before, after = tensors(facts), tensors(again)
    assert before.keys() == after.keys() and all(torch.equal(after[n], t) for n, t in before.items())
    assert sum(1 for _ in load(again).denoiser.parameters()) == 208 + 52


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_files_dtype_is_the_one_asked_for(tiny_model: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    facts = read_facts(str(tiny_model))
    stored = load_file(export(facts, tmp_path / "x.safetensors", dtype))
    assert {t.dtype for name, t in stored.items() if not name.endswith("position_ids")} == {dtype}
    weight = stored["model.diffusion_model.input_blocks.0.0.weight"]
    assert torch.equal(weight, tensors(facts)["unet.conv_in.weight"].to(dtype))


def test_metadata_is_model_spec_with_the_hash_of_the_bytes_and_the_recipe(tmp_path: Path) -> None:
    facts = read_facts(str(make_tiny_model(tmp_path / "model", openclip=True, prediction_type="v_prediction")))
    path = export(facts, tmp_path / "x.safetensors", torch.float16, metadata={"everydream.recipe": '{"lr": 1}'})
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8:start])["__metadata__"]
    assert metadata.pop(CONFIG_KEY)
    assert metadata == {
        "everydream.recipe": '{"lr": 1}',
        "format": "pt",
        "modelspec.architecture": "stable-diffusion-v2-768-v",
        "modelspec.date": "2026-01-02T03:04:05Z",
        "modelspec.hash_sha256": "0x" + hashlib.sha256(content[start:]).hexdigest(),
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.prediction_type": "v",
        "modelspec.resolution": "64x64",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": "a title",
    }


def test_the_hash_is_of_the_bytes_that_the_trainers_own_writer_makes(tiny_model: Path, tmp_path: Path) -> None:
    from everydream.training.storage import write_atomically
    from everydream.training.tensorfile import Tensors

    made = single_file(read_facts(str(tiny_model)), dtype=torch.float16, title="t", date="2026-01-02")
    write_atomically(tmp_path / "x.safetensors", Tensors(made.tensors, made.metadata))
    content = (tmp_path / "x.safetensors").read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert made.metadata["modelspec.hash_sha256"] == f"0x{digest}" and content_hash(made.tensors) == digest


def test_averaged_weights_take_the_place_of_the_trained_ones(tiny_model: Path, tmp_path: Path) -> None:
    facts = read_facts(str(tiny_model))
    average = {"unet.conv_in.bias": torch.full((8,), 7.0)}
    stored = load_file(export(facts, tmp_path / "x.safetensors", replaced=average))
    assert torch.equal(stored["model.diffusion_model.input_blocks.0.0.bias"], average["unet.conv_in.bias"])
    assert torch.equal(stored["model.diffusion_model.out.2.bias"], tensors(facts)["unet.conv_out.bias"])


# --- files of others -------------------------------------------------------------------------------------------------


Shapes = dict[str, list[int]]


def fake(path: Path, shapes: Shapes, **metadata: str) -> Path:
    """A file with this header and a hole for the weights."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    start = 0
    for name, shape in shapes.items():
        end = start + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)
    return path


def test_a_published_stable_diffusion_1_file_is_recognised(tmp_path: Path) -> None:
    facts = read_facts(str(fake(tmp_path / "v1.safetensors", ORIGINAL["stable_diffusion_1"])))
    assert (facts.resolution, facts.prediction_type, facts.text_width, facts.vae_factor) == (512, "epsilon", 768, 8)
    assert facts.shapes == {p: shapes_of(p, published_configs("stable_diffusion_1")[p]) for p in MODULES}
    assert facts.tokenizer == clip_tokenizer()


@pytest.mark.parametrize(
    ("metadata", "setting", "prediction", "resolution"),
    [
        ({}, "v_prediction", "v_prediction", 768),
        ({}, "epsilon", "epsilon", 512),
        ({"modelspec.prediction_type": "v"}, None, "v_prediction", 768),
        ({"modelspec.prediction_type": "epsilon", "modelspec.resolution": "640x640"}, None, "epsilon", 640),
    ],
)
def test_a_published_stable_diffusion_2_file_says_or_is_told_what_it_predicts(
    tmp_path: Path, metadata: dict[str, str], setting: str | None, prediction: str, resolution: int
) -> None:
    path = fake(tmp_path / "v2.safetensors", ORIGINAL["stable_diffusion_2"], **metadata)
    facts = read_facts(str(path), prediction_type=setting)
    assert (facts.prediction_type, facts.resolution, facts.text_layers) == (prediction, resolution, 23)
    assert facts.shapes == {p: shapes_of(p, published_configs("stable_diffusion_2")[p]) for p in MODULES}
    assert facts.tokenizer.pad == "!"


def test_a_silent_stable_diffusion_2_file_asks_for_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='set prediction_type to "v_prediction"'):
        read_facts(str(fake(tmp_path / "v2.safetensors", ORIGINAL["stable_diffusion_2"])))


def renamed(old: str, new: str) -> Shapes:
    shapes = ORIGINAL["stable_diffusion_1"]
    return {name.replace(old, new, 1) if name.startswith(old) else name: shape for name, shape in shapes.items()}


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
OTHER: dict[str, tuple[Shapes, str]] = {
    "xl": (renamed("cond_stage_model.", "conditioner.embedders.0."), "is Stable Diffusion XL"),
    "lora": (renamed("", "lora_unet_"), "is a LoRA"),
    "unet alone": (renamed("cond_stage_model.", "something."), "is no Stable Diffusion 1 or 2 model"),
    "no autoencoder": (renamed("first_stage_model.", "something."), r"has no vae \(no first_stage_model"),
    "inpainting": (ORIGINAL["stable_diffusion_1"] | {FIRST: [320, 9, 3, 3]}, "takes 9 channels .* inpainting"),
    "another structure": (
        renamed("model.diffusion_model.input_blocks.1.0.", "model.diffusion_model.input_blocks.77.0."),
        "input_blocks.77.0.* has no place in the unet",
    ),
}


@pytest.mark.parametrize("case", OTHER)
def test_a_file_that_cannot_be_trained_is_named_for_what_it_is(tmp_path: Path, case: str) -> None:
    shapes, message = OTHER[case]
    with pytest.raises(ConfigError, match=message):
        read_facts(str(fake(tmp_path / "x.safetensors", shapes)))


def test_old_files_without_the_text_model_level_are_read(tmp_path: Path) -> None:
    shapes = renamed("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")
    facts = read_facts(str(fake(tmp_path / "x.safetensors", shapes)))
    config = published_configs("stable_diffusion_1")["text_encoder"]
    assert facts.shapes["text_encoder"] == shapes_of("text_encoder", config)


def test_a_ckpt_is_read_with_the_setting_alone(tiny_model: Path, tmp_path: Path) -> None:
    """Another program's export: torch's format with the weights under state_dict, and our configs are not in it."""
    facts = read_facts(str(tiny_model))
    made = single_file(facts, dtype=None, title="t", date="2026-01-02")
    torch.save({"state_dict": dict(made.tensors), "global_step": 3}, tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match="set allow_pickle to true"):
        read_facts(str(tmp_path / "x.ckpt"))
    # The tiny model's structure is not the published one, which is all that a .ckpt can be.
    with pytest.raises(ConfigError, match="has no place"):
        read_facts(str(tmp_path / "x.ckpt"), allow_pickle=True)


@pytest.mark.parametrize("value", ["{", "[]", '{"unet": {}}'])
def test_damaged_metadata_of_ours_is_named(tiny_model: Path, tmp_path: Path, value: str) -> None:
    path = export(read_facts(str(tiny_model)), tmp_path / "x.safetensors", metadata={CONFIG_KEY: value})
    with pytest.raises(ConfigError, match=r"everydream\.model"):
        read_facts(str(path))
