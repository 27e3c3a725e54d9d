"""A model's facts come from its small files alone, and whatever is wrong with them is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from everydream.errors import ConfigError
from everydream.models.family import FAMILIES, load, read_facts, tokenizer_for
from everydream.models.sources import read_header
from tests.tiny import make_tiny_model

Break = Callable[[Path], Any]


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_facts_of_a_folder(tiny_model: Path) -> None:
    facts = read_facts(str(tiny_model))
    assert (facts.family, facts.resolution, facts.vae_factor, facts.unet_factor) == ("stable_diffusion", 64, 4, 2)
    assert (facts.latent_channels, facts.num_train_timesteps, facts.prediction_type) == (4, 1000, "epsilon")
    assert (facts.max_tokens, facts.text_width, facts.text_layers) == (77, 16, 3)
    assert {part: len(shapes) for part, shapes in facts.shapes.items()} == {"unet": 208, "vae": 152, "text_encoder": 52}
    assert facts.shapes["unet"]["conv_in.weight"] == (8, 4, 3, 3)
    assert tokenizer_for(facts)(["the red"]).shape == (1, 1, 77)


def test_every_family_names_a_module_that_loads(tiny_model: Path) -> None:
    pipelines = {"stable_diffusion": "StableDiffusionPipeline"}
    assert {name: row.pipeline for name, row in FAMILIES.items()} == pipelines
    assert type(load(read_facts(str(tiny_model)))).__name__ == "StableDiffusion"


def test_facts_need_no_torch(tiny_model: Path) -> None:
    code = (
        "import sys; from everydream.models.family import read_facts, tokenizer_for\n"
        f"tokenizer_for(read_facts({str(tiny_model)!r}))(['the red'])\n"
        "assert not {'torch', 'transformers', 'diffusers', 'safetensors'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_loading_needs_no_diffusers(tiny_model: Path) -> None:
    code = (
        "import sys; from everydream.models.family import read_facts, load\n"
        f"load(read_facts({str(tiny_model)!r}))\n"
        "assert not {'transformers', 'diffusers', 'torch._dynamo'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_prediction_type_comes_from_the_scheduler_unless_the_settings_say_it(tmp_path: Path) -> None:
    folder = str(make_tiny_model(tmp_path, prediction_type="v_prediction"))
    assert read_facts(folder).prediction_type == "v_prediction"
    facts = read_facts(folder, prediction_type="epsilon")
    assert facts.prediction_type == facts.scheduler_config["prediction_type"] == "epsilon"


BROKEN: dict[str, tuple[Break, str]] = {
    "no index": (lambda m: (m / "model_index.json").unlink(), "has no model_index.json"),
    "other pipeline": (
        lambda m: edit(m / "model_index.json", _class_name="FluxPipeline"),
        "is a FluxPipeline; this version trains StableDiffusionPipeline",
    ),
    "other text encoder": (
        lambda m: edit(m / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
        "its text_encoder is a T5EncoderModel, not a CLIPTextModel",
    ),
    "inpainting": (lambda m: edit(m / "unet" / "config.json", in_channels=9), "inpainting"),
    "no config": (lambda m: (m / "unet" / "config.json").unlink(), "unet/config.json is missing"),
    "config cut short": (lambda m: (m / "vae" / "config.json").write_text('{"a": '), "vae/config.json cannot be read"),
    "config no object": (lambda m: (m / "vae" / "config.json").write_text("[]"), "is not a JSON object"),
    "a list for a number": (
        lambda m: edit(m / "unet" / "config.json", layers_per_block=[1, 2]),
        r"unet/config.json: layers_per_block should be int, and is \[1, 2\]",
    ),
    "a key missing": (
        lambda m: (m / "vae" / "config.json").write_text("{}"),
        "vae/config.json: block_out_channels should be list, and is None",
    ),
    "no weights": (
        lambda m: (m / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
        r"has no diffusion_pytorch_model.safetensors \(there: config.json\)",
    ),
    "no part": (lambda m: shutil.rmtree(m / "vae"), "vae/config.json is missing"),
    "no scheduler": (lambda m: shutil.rmtree(m / "scheduler"), "scheduler_config.json is missing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_named(model: Path, case: str) -> None:
    break_it, message = BROKEN[case]
    break_it(model)
    with pytest.raises(ConfigError, match=message):
        read_facts(str(model))


def test_a_run_or_checkpoint_folder_is_told_where_its_model_is(model: Path) -> None:
    with pytest.raises(ConfigError, match=f"give {model}"):
        read_facts(str(model.parent))


def test_what_is_no_path_and_no_hub_id_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; give a diffusers folder"):
        read_facts(str(tmp_path / "nothing"))


def test_a_revision_of_a_local_folder_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="base_model_revision: 'main'"):
        read_facts(str(tiny_model), revision="main")


def test_a_hub_id_that_cannot_be_had_is_said_offline() -> None:
    with pytest.raises(ConfigError, match="could not be fetched from the hub, nor found in its cache"):
        read_facts("nobody/nothing-of-this-name")


def test_a_hub_id_is_found_in_the_cache_and_half_precision_is_second_choice(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's client is asked for plain weights first, and for others only where a part has none."""
    unet = model / "unet" / "diffusion_pytorch_model.safetensors"
    hidden = unet.rename(unet.with_name("diffusion_pytorch_model.fp16.safetensors")).rename(model / "later")
    asked = []

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        if "unet/*.safetensors" in allow_patterns:
            hidden.rename(unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    facts = read_facts("someone/some-model", revision="v1")
    assert facts.weights["unet"].header.path.name == "diffusion_pytorch_model.fp16.safetensors"
    assert [(name, revision) for name, revision, _ in asked] == [("someone/some-model", "v1")] * 2
    assert not any(".bin" in pattern for *_, patterns in asked for pattern in patterns)


def test_what_transformers_leaves_out_of_a_config_is_its_default(model: Path) -> None:
    path = model / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    config.pop("hidden_act")
    path.write_text(json.dumps(config))
    assert read_facts(str(model)).configs["text_encoder"]["hidden_act"] == "quick_gelu"


def test_what_is_read_otherwise_than_expected_is_noted(model: Path) -> None:
    (model / UNET).rename((model / UNET).with_name("diffusion_pytorch_model.fp16.safetensors"))
    edit(model / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    half, checker = read_facts(str(model)).notes
    assert "unet is read from diffusion_pytorch_model.fp16.safetensors" in half
    assert "safety checker" in checker


UNET = Path("unet") / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 1000, 20_000, 100_000, -1000, -1])
def test_a_weight_file_cut_short_is_found_in_its_header(model: Path, length: int) -> None:
    content = (model / UNET).read_bytes()
    (model / UNET).write_bytes(content[:length])
    with pytest.raises(ConfigError, match=r"unet/diffusion_pytorch_model.safetensors is damaged .*fetch it again"):
        read_facts(str(model))


def test_a_weight_file_that_is_something_else_is_refused(model: Path) -> None:
    (model / UNET).write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 30)
    with pytest.raises(ConfigError, match="is damaged or not a safetensors file"):
        read_facts(str(model))


def test_headers_in_any_order_are_read(tmp_path: Path) -> None:
    header = {"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}} | {
        "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
    }
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert read_header(tmp_path / "x.safetensors", allow_pickle=False).shapes == {"b": (1,), "a": ()}


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


WRONG: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop("conv_in.bias"), "lacks 1 tensor: conv_in.bias"),
    "unknown": (lambda t: t.update(extra=torch.zeros(1)), "has unknown 1 tensor: extra"),
    "shape": (lambda t: t.update({"conv_in.bias": torch.zeros(3)}), r"conv_in.bias is \[3\], its config.json makes it"),
    "not a number": (lambda t: t["conv_in.bias"].fill_(float("nan")), "conv_in.bias holds NaN"),
    "infinite": (lambda t: t["conv_out.bias"].fill_(float("inf")), "conv_out.bias holds NaN or infinite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors_are_named_when_loading(model: Path, case: str) -> None:
    change, message = WRONG[case]
    change_weights(model / UNET, change)
    facts = read_facts(str(model))
    with pytest.raises(ConfigError, match=message):
        load(facts)


def test_a_file_cut_short_between_facts_and_loading_is_a_clean_error(model: Path) -> None:
    facts = read_facts(str(model))
    (model / UNET).write_bytes((model / UNET).read_bytes()[:-4])
    with pytest.raises(ConfigError, match="cannot be read"):
        load(facts)


def pickled(model: Path) -> Path:
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = model / part / f"{name}.safetensors"
        torch.save(load_file(file), file.with_name("pytorch_model.bin" if name == "model" else f"{name}.bin"))
        file.unlink()
    return model


def test_pickled_weights_need_the_setting(model: Path) -> None:
    with pytest.raises(ConfigError, match="allow_pickle"):
        read_facts(str(pickled(model)))


def test_pickled_weights_are_read_as_tensors_alone(model: Path, tiny_model: Path) -> None:
    facts = read_facts(str(pickled(model)), allow_pickle=True)
    assert facts.shapes == read_facts(str(tiny_model)).shapes
    ours, plain = load(facts).parameters_of("unet"), load(read_facts(str(tiny_model))).parameters_of("unet")
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run while loading",))


def test_a_pickle_that_would_run_code_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = pickled(model) / "unet" / "diffusion_pytorch_model.bin"
    torch.save({"weights": Evil()}, file)
    with pytest.raises(ConfigError, match="holds more than tensors"):
        read_facts(str(model), allow_pickle=True)
    assert "run while loading" not in capsys.readouterr().out


def test_half_precision_files_are_trained_in_float32_and_frozen_parts_as_told(tmp_path: Path) -> None:
    facts = read_facts(str(make_tiny_model(tmp_path, dtype="float16")))
    family = load(facts, train=["unet"], frozen_dtype=torch.bfloat16)
    dtypes = {part: {p.dtype for p in family.part(part).parameters()} for part in ("unet", "text_encoder", "vae")}
    assert dtypes == {"unet": {torch.float32}, "text_encoder": {torch.bfloat16}, "vae": {torch.float32}}
    stored = load_file(tmp_path / UNET)
    assert all(torch.equal(p, stored[name].float()) for name, p in family.parameters_of("unet").items())


def test_the_autoencoders_old_names_are_those_of_stable_diffusion_15(model: Path, tiny_model: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".attentions." in name and "norm" not in name]:
            new = next(name.replace(n, o) for n, o in old.items() if n in name)
            tensors[new] = tensors.pop(name)

    change_weights(model / "vae" / "diffusion_pytorch_model.safetensors", rename)
    facts = read_facts(str(model))
    assert not facts.weights["vae"].can_be_copied
    ours, plain = (load(read_facts(str(path))).part("vae").state_dict() for path in (model, tiny_model))
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
