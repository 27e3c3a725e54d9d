"""Our networks are diffusers' and transformers' own: outputs and gradients to the last bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from everydream.draws import torch_generator
from everydream.errors import ConfigError
from everydream.models.autoencoder import Autoencoder
from everydream.models.clip import TextEncoder
from everydream.models.family import Facts, load, read_facts
from everydream.models.layers import ATTENTION, GroupNorm, LayerNorm
from everydream.models.tensors import PartReader
from everydream.models.unet import UNet
from tests.models.pipeline import pipeline_of
from tests.tiny import make_tiny_model

with warnings.catch_warnings():  # their imports warn about each other
    warnings.simplefilter("ignore")
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel


@pytest.fixture(scope="module", params=["clip", "openclip"])
def facts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    is_openclip = request.param == "openclip"
    folder = make_tiny_model(
        tmp_path_factory.mktemp("tiny"), openclip=is_openclip, vae_factor=8 if is_openclip else 4, position_ids=True
    )
    return read_facts(str(folder))


@pytest.fixture(autouse=True)
def draws() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def tensors(facts: Facts, part: str) -> dict[str, torch.Tensor]:
    return PartReader(facts.weights[part]).read()


def unets(facts: Facts) -> tuple[UNet, Any]:
    ours, theirs = UNet(facts.configs["unet"]), UNet2DConditionModel.from_config(facts.configs["unet"])
    for module in (ours, theirs):
        module.load_state_dict(tensors(facts, "unet"))
    return ours, theirs


def unet_inputs(height: int = 16, width: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, height, width), torch.tensor([3, 999]), torch.randn(2, 154, 16)


def gradients(module: torch.nn.Module, output: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(module.named_parameters())
    return dict(zip(named, torch.autograd.grad(output.square().mean(), list(named.values())), strict=True))


def test_unet_is_diffusers_own_in_outputs_and_gradients(facts: Facts) -> None:
    ours, theirs = unets(facts)
    inputs = unet_inputs()
    output, reference = ours(*inputs), theirs(*inputs).sample
    assert torch.equal(output, reference)
    expected = gradients(theirs, reference)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(ours, output).items())


def test_gradient_checkpointing_changes_no_bit(facts: Facts) -> None:
    ours, _ = unets(facts)
    inputs = unet_inputs()
    plain = gradients(ours, ours(*inputs))
    ours.save_memory()
    saving = gradients(ours, ours(*inputs))
    assert all(torch.equal(plain[name], saving[name]) for name in plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ours", [GroupNorm(4, 8), LayerNorm(8)], ids=lambda norm: type(norm).__name__)
def test_norms_are_torchs_own_and_under_autocast_in_their_inputs_dtype(ours: Any, dtype: torch.dtype) -> None:
    x = torch.randn(2, 8, 8, 8) + 1
    torch.nn.init.normal_(ours.weight)
    theirs: Any = type(ours).__base__.forward
    assert torch.equal(ours(x), theirs(ours, x))
    with torch.autocast("cpu", dtype):
        assert torch.equal(ours(x), theirs(ours, x)), "a float32 input is not rounded"
        assert torch.equal(ours(x.to(dtype)), theirs(ours, x.to(dtype)).to(dtype))


def test_autocast_costs_a_prediction_what_its_dtype_does(facts: Facts) -> None:
    ours, _ = unets(facts)
    inputs = unet_inputs()
    exact = ours(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = ours(*inputs)
    assert prediction.dtype == torch.bfloat16, "nothing on the way is float32"
    assert (prediction - exact).norm() < 0.03 * exact.norm()  # bf16 has 8 bits: 0.004 a layer


def test_under_autocast_the_network_is_one_graph(facts: Facts) -> None:
    ours, _ = unets(facts)
    inputs = unet_inputs()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(*inputs), ours(*inputs))


def test_sliced_attention_is_the_same_attention(facts: Facts) -> None:
    ours, _ = unets(facts)
    inputs = unet_inputs()
    plain = ours(*inputs)
    ours.set_attention(ATTENTION["slice"]())
    torch.testing.assert_close(ours(*inputs), plain, rtol=1e-5, atol=1e-6)


def test_xformers_without_its_package_names_the_setting() -> None:
    with pytest.raises(ConfigError, match="attn_type: xformers"):
        ATTENTION["xformers"]()


def test_autoencoder_is_diffusers_own(facts: Facts) -> None:
    ours, theirs = Autoencoder(facts.configs["vae"]), AutoencoderKL.from_config(facts.configs["vae"])
    for module in (ours, theirs):
        module.load_state_dict(tensors(facts, "vae"))
    with torch.no_grad():
        pixels = torch.rand(2, 3, 64, 32) * 2 - 1
        mean, std = ours.encode(pixels)
        posterior = theirs.encode(pixels).latent_dist
        assert torch.equal(mean, posterior.mean) and torch.equal(std, posterior.std)
        # The decoder's attention lays its result out differently in memory, and the next kernel sums in another order.
        torch.testing.assert_close(ours.decode(mean), theirs.decode(mean).sample, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_text_encoder_is_transformers_own_with_clip_skip_as_in_diffusers(facts: Facts, clip_skip: int) -> None:
    config = facts.configs["text_encoder"]
    ours, theirs = TextEncoder(config, clip_skip), CLIPTextModel(CLIPTextConfig(**config))
    named = tensors(facts, "text_encoder")
    ours.load_state_dict(named)
    has_level = any(name.startswith("text_model.") for name in theirs.state_dict())  # until transformers 5.5
    theirs.load_state_dict(
        {n if has_level else n.removeprefix("text_model."): t for n, t in named.items()}, strict=False
    )
    tokens = torch.randint(0, config["vocab_size"], (2, 77))
    with torch.no_grad():
        # diffusers 0.42, encode_prompt: hidden_states[-(clip_skip + 1)], then the final norm.
        before_norm = _hidden_before_norm(theirs, tokens, config["num_hidden_layers"] - clip_skip)
        norm = getattr(theirs, "text_model", theirs).final_layer_norm
        assert torch.equal(ours(tokens[:, None]), norm(before_norm))


def _hidden_before_norm(model: Any, tokens: torch.Tensor, layers: int) -> torch.Tensor:
    """What the given number of layers make of the tokens, without the final norm."""
    kept: list[torch.Tensor] = []
    inner = getattr(model, "text_model", model)
    hook = inner.encoder.layers[layers - 1].register_forward_hook(
        lambda module, inputs, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    model(tokens)
    hook.remove()
    return kept[0]


def test_chunks_are_encoded_by_themselves_and_joined(facts: Facts) -> None:
    encoder = TextEncoder(facts.configs["text_encoder"])
    tokens = torch.randint(0, 500, (2, 3, 77))
    with torch.no_grad():
        joined = encoder(tokens)
        apart = torch.cat([encoder(tokens[:, k : k + 1]) for k in range(3)], dim=1)
    assert joined.shape == (2, 3 * 77, 16)
    torch.testing.assert_close(joined, apart)


def test_clip_skip_beyond_the_layers_is_refused(facts: Facts) -> None:
    with pytest.raises(ConfigError, match="clip_skip: 3"):
        TextEncoder(facts.configs["text_encoder"], clip_skip=3)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
        ("unet", {"down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]}, "SimpleCrossAttnDownBlock2D"),
        ("vae", {"use_quant_conv": False}, "use_quant_conv False"),
        ("text_encoder", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    ],
)
def test_another_network_is_refused_by_name(facts: Facts, part: str, change: dict[str, Any], message: str) -> None:
    build = {"unet": UNet, "vae": Autoencoder, "text_encoder": TextEncoder}[part]
    with pytest.raises(ConfigError, match=message):
        build({**facts.configs[part], **change})


@pytest.mark.filterwarnings("ignore")  # diffusers and transformers deprecate their own defaults
def test_pipeline_shares_the_weights_and_makes_the_published_folders_pictures(facts: Facts) -> None:
    family = load(facts)
    pipeline = pipeline_of(family)
    trained = [p.requires_grad for p in family.denoiser.parameters()]
    assert all(trained) and len(trained) > 100
    theirs = {id(p) for part in (pipeline.unet, pipeline.text_encoder) for p in part.parameters()}
    assert theirs == {id(p) for p in family.denoiser.parameters()}

    reference = StableDiffusionPipeline.from_pretrained(facts.path)
    images = []
    for pipe in (pipeline, reference):
        pipe.set_progress_bar_config(disable=True)
        images.append(
            pipe(
                "the red star",
                num_inference_steps=3,
                generator=torch_generator(1, "preview"),
                output_type="np",
            ).images
        )
    assert abs(images[0] - images[1]).max() == 0
    assert images[0].std() > 0.05, "a flat picture proves nothing"


def test_dropped_parts_come_back_for_pictures(facts: Facts, tmp_path: Path) -> None:
    family = load(facts, train=["unet"])
    before = {n: p.clone() for n, p in family.part("vae").named_parameters()}
    family.drop_vae()
    family.drop_text_encoder()
    assert family.vae is None and "text_encoder" not in dict(family.denoiser.named_children())
    again = dict(family.part("vae").named_parameters())
    assert all(torch.equal(again[n], t) for n, t in before.items())
