"""The loaded family: what the trainer asks of it, and the folder that it writes."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from everydream.errors import ConfigError
from everydream.models.family import Family, load, read_facts
from everydream.models.files import CopyOf, FileContent, TensorFile, Unchanged
from everydream.models.writing import single_file
from tests.tiny import make_tiny_model


@pytest.fixture(scope="module")
def family(tiny_model: Path) -> Family:
    """Not to be changed."""
    return load(read_facts(str(tiny_model)))


def inputs(family: Family) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    tokens = torch.from_numpy(family.tokenize(["the red star", "sks"], 2))
    return torch.randn(2, 4, 8, 16), torch.tensor([1, 900]), tokens


def write(files: dict[str, FileContent], folder: Path) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, TensorFile):
            tensors = {n: t.detach().contiguous() for n, t in content.tensors.items()}
            save_file(tensors, path, dict(content.metadata))
        elif isinstance(content, Unchanged):
            save_file(dict(content.read()), path, {"format": "pt"})
        else:
            path.write_bytes(Path(content.file.name).read_bytes() if isinstance(content, CopyOf) else content)
    return folder


def snapshot(family: Family, *parts: str) -> dict[str, dict[str, torch.Tensor]]:
    return {part: {n: p.detach().clone() for n, p in family.parameters_of(part).items()} for part in parts}


def test_tokens_and_their_embeddings_give_the_same_prediction(family: Family) -> None:
    noisy, t, tokens = inputs(family)
    with torch.no_grad():
        from_tokens = family.denoiser(noisy, t, tokens)
        text = family.encode_text(tokens)
        assert text.shape == (2, 154, 16) and text.dtype == torch.float32
        assert torch.equal(family.denoiser(noisy, t, text), from_tokens)


def test_perturbation_is_added_to_the_embeddings(family: Family) -> None:
    noisy, t, tokens = inputs(family)
    text = family.encode_text(tokens)
    shift = torch.randn_like(text)
    with torch.no_grad():
        assert torch.equal(family.denoiser(noisy, t, tokens, shift), family.denoiser(noisy, t, text + shift))


def test_pixels_become_raw_latents_and_scaling_stands_in_one_place(family: Family) -> None:
    pixels = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8)
    mean, std = family.encode_pixels(pixels)
    assert mean.shape == std.shape == (2, 4, 8, 16) and mean.dtype == std.dtype == torch.float32
    black, white = (family.encode_pixels(torch.full_like(pixels, value))[0] for value in (0, 255))
    assert family.vae is not None
    assert torch.equal(black, family.vae.encode(torch.full((2, 3, 32, 64), -1.0))[0])
    assert torch.equal(white, family.vae.encode(torch.full((2, 3, 32, 64), 1.0))[0])
    noise = torch.randn_like(mean)
    torch.testing.assert_close(family.latents(mean, std, noise), (mean + std * noise) * 0.18215)


def test_parameters_have_the_published_names(family: Family, tiny_model: Path) -> None:
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        assert family.parameters_of(part).keys() == load_file(tiny_model / part / f"{name}.safetensors").keys()


def test_only_parts_in_training_have_gradients(tiny_model: Path) -> None:
    family = load(read_facts(str(tiny_model)), train=["text_encoder"])
    noisy, t, tokens = inputs(family)
    family.denoiser(noisy, t, tokens).mean().backward()
    assert all(p.grad is None for p in family.parameters_of("unet").values())
    assert all(p.grad is not None for p in family.parameters_of("text_encoder").values())


def test_layers_that_clip_skip_leaves_out_are_frozen_and_all_others_get_gradients(tiny_model: Path) -> None:
    family = load(read_facts(str(tiny_model)), clip_skip=1)
    noisy, t, tokens = inputs(family)
    family.denoiser(noisy, t, tokens).mean().backward()
    named = family.parameters_of("text_encoder")
    assert {name for name, p in named.items() if p.grad is None} == family.unused_parameters("text_encoder")
    assert {name for name, p in named.items() if not p.requires_grad} == family.unused_parameters("text_encoder")
    assert all(name.startswith("text_model.encoder.layers.2.") for name in family.unused_parameters("text_encoder"))


def test_bfloat16_weights_predict_in_float32(tiny_model: Path) -> None:
    family = load(read_facts(str(tiny_model)), weights_dtype=torch.bfloat16)
    noisy, t, tokens = inputs(family)
    prediction = family.denoiser(noisy, t, tokens)
    assert prediction.dtype == torch.float32
    assert {p.dtype for p in family.parameters_of("unet").values()} == {torch.bfloat16}


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"attn_type": "slice"}, {"channels_last": True}])
def test_speed_and_memory_options_keep_predictions_and_gradients(tiny_model: Path, options: dict[str, object]) -> None:
    results = []
    for chosen in ({}, options):
        family = load(read_facts(str(tiny_model)))
        family.enable(**chosen)  # type: ignore[arg-type]
        prediction = family.denoiser(*inputs(family))
        prediction.square().mean().backward()
        named = {**family.parameters_of("unet"), **family.parameters_of("text_encoder")}
        results.append((prediction.detach(), {n: p.grad for n, p in named.items()}))
    (plain, plain_gradients), (with_option, gradients) = results
    torch.testing.assert_close(with_option, plain, rtol=1e-4, atol=1e-5)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_folder_written_is_the_folder_read(family: Family, tiny_model: Path, tmp_path: Path) -> None:
    written = write(family.files(snapshot(family, "unet", "text_encoder")), tmp_path)
    names = {str(p.relative_to(written)) for p in written.rglob("*") if p.is_file()}
    assert names == {str(p.relative_to(tiny_model)) for p in tiny_model.rglob("*") if p.is_file()}
    for name in names:
        if name.endswith(".json"):
            assert json.loads((written / name).read_text()) == json.loads((tiny_model / name).read_text()), name
        elif name.endswith(".safetensors"):
            ours, theirs = load_file(written / name), load_file(tiny_model / name)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs), name
            with safe_open(written / name, framework="pt") as file:
                assert file.metadata()["format"] == "pt"  # transformers refuses files without it
    assert read_facts(str(written)).tokenizer == family.facts.tokenizer


@pytest.mark.filterwarnings("ignore")  # diffusers and transformers deprecate their own defaults
def test_diffusers_loads_the_folder_with_every_tensor_equal(family: Family, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    written = write(family.files(snapshot(family, "unet", "text_encoder")), tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(written)
    for part in ("unet", "text_encoder", "vae"):
        ours = dict(family.part(part).named_parameters())
        theirs = dict(getattr(pipeline, part).named_parameters())
        assert len(theirs) == len(ours)
        for name, tensor in theirs.items():
            published = name if name in ours else f"text_model.{name}"
            assert torch.equal(tensor, ours[published]), f"{part} {name}"


def test_frozen_parts_are_copied_byte_for_byte_even_after_their_folder_is_gone(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    family = load(read_facts(str(base)), train=["unet"])
    shutil.rmtree(base)
    written = write(family.files(snapshot(family, "unet")), tmp_path / "written")
    for name in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (written / name).read_bytes() == (tiny_model / name).read_bytes()
    family.drop_vae()
    assert sum(1 for _ in family.part("vae").parameters()) == 152


def test_a_digest_is_of_the_numbers_not_of_the_file_they_are_in(tmp_path: Path) -> None:
    def digests(base: Path) -> dict[str, str]:
        family = load(read_facts(str(base)), train=["unet"])
        found = {part: family.digest(part) for part in ("vae", "text_encoder")}
        assert family.vae is None and "text_encoder" not in dict(family.denoiser.named_children()), "none is needed"
        return found

    half = make_tiny_model(tmp_path / "half", openclip=True, dtype="float16")
    found = digests(half)
    facts = read_facts(str(half))
    written = write(load(facts, train=["unet"]).files({}), tmp_path / "written")
    assert digests(written) == found
    for name, dtype in (("half", None), ("full", torch.float32)):
        made = single_file(facts, dtype=dtype, title=name, date="2026-11-22T00:00:00Z")
        save_file(dict(made.tensors), tmp_path / f"{name}.safetensors", dict(made.metadata))
        assert digests(tmp_path / f"{name}.safetensors") == found
    assert digests(make_tiny_model(tmp_path / "full", openclip=True))["vae"] != found["vae"], "float16 has rounded"
    config = json.loads((half / "vae" / "config.json").read_text())
    (half / "vae" / "config.json").write_text(json.dumps({**config, "norm_num_groups": 2}))
    assert digests(half) == {**found, "vae": digests(half)["vae"]}
    assert digests(half)["vae"] != found["vae"]


def test_a_frozen_part_in_another_form_is_written_in_the_published_one(tmp_path: Path) -> None:
    """As transformers 5 writes text encoders: without the text_model level, which transformers 4 cannot load."""
    folder = make_tiny_model(tmp_path / "base", position_ids=True)
    file = folder / "text_encoder" / "model.safetensors"
    plain = load_file(file)
    save_file({name.removeprefix("text_model."): t for name, t in plain.items()}, file, {"format": "pt"})
    family = load(read_facts(str(folder)), train=["unet"])
    written = write(family.files(snapshot(family, "unet")), tmp_path / "written")
    names = load_file(written / "text_encoder" / "model.safetensors").keys()
    assert names == plain.keys() - {"text_model.embeddings.position_ids"}


def test_zero_terminal_snr_is_told_to_samplers(tiny_model: Path, tmp_path: Path) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    family = load(read_facts(str(tiny_model)))
    family.set_sampling(prediction_type="v_prediction", zero_terminal_snr=True)
    written = write(family.files(snapshot(family, "unet", "text_encoder")), tmp_path)
    scheduler = DDIMScheduler.from_pretrained(written / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.timestep_spacing == "trailing"
    assert scheduler.alphas_cumprod[-1] < 1e-6
    assert json.loads((written / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]
    facts = read_facts(str(written))
    assert facts.prediction_type == "v_prediction" and facts.scheduler_config["rescale_betas_zero_snr"] is True


def test_the_vae_is_never_trained(tiny_model: Path) -> None:
    with pytest.raises(AssertionError):
        load(read_facts(str(tiny_model)), train=["vae"])


def test_clip_skip_is_checked_against_the_layers(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="clip_skip: 3 leaves none of the 3 layers"):
        load(read_facts(str(tiny_model)), clip_skip=3)


@pytest.mark.parametrize("is_trained", [False, True])
def test_the_text_is_cast_once_unless_a_gradient_is_to_be_added_up(tiny_model: Path, is_trained: bool) -> None:
    family = load(read_facts(str(tiny_model)), train=("unet", "text_encoder") if is_trained else ("unet",))
    noisy, t, tokens = inputs(family)
    family.hold("text_encoder")
    seen: list[torch.dtype] = []
    family.denoiser.unet.register_forward_pre_hook(lambda module, given: seen.append(given[2].dtype))  # type: ignore[union-attr]
    family.denoiser(noisy, t, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        family.denoiser(noisy, t, tokens)
    assert seen == [torch.float32, torch.float32 if is_trained else torch.bfloat16]


@pytest.mark.parametrize(("setting", "one_backward", "mode"), [
    (True, True, None), ("max", True, "max-autotune"), ("max", False, "max-autotune-no-cudagraphs"),
])  # fmt: skip
def test_cuda_graphs_own_the_gradients_so_they_are_for_one_backward_an_update(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, setting: bool | str, one_backward: bool, mode: str | None
) -> None:
    modes = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: modes.append(options["mode"]))
    load(read_facts(str(tiny_model))).enable(compile=setting, one_backward=one_backward)
    assert modes == [mode]
    if mode is not None:
        from torch._inductor import list_mode_options

        assert list_mode_options(mode).get("triton.cudagraphs", False) == one_backward


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # torch's compiler looks at .grad of inner tensors, and warns itself
def test_compiled_predictions_are_those_of_the_plain_network_at_every_shape(tiny_model: Path) -> None:
    plain, compiled = load(read_facts(str(tiny_model))), load(read_facts(str(tiny_model)))
    compiled.enable(compile=True)
    for height, width in ((16, 16), (8, 16)):
        torch.manual_seed(0)
        noisy, t = torch.randn(1, 4, height, width), torch.tensor([500])
        tokens = torch.from_numpy(plain.tokenize(["the red"]))
        expected = plain.denoiser(noisy, t, tokens)
        prediction = compiled.denoiser(noisy, t, tokens)
        torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-5)
        for module, output in ((plain, expected), (compiled, prediction)):
            module.denoiser.zero_grad()
            output.square().mean().backward()
        for part in ("unet", "text_encoder"):
            named = plain.parameters_of(part)
            for name, parameter in compiled.parameters_of(part).items():
                torch.testing.assert_close(parameter.grad, named[name].grad, rtol=1e-3, atol=1e-5)
    assert compiled.parameters_of("unet").keys() == plain.parameters_of("unet").keys()
