"""Names of the original single file (CompVis ldm, Stability's SD2) ↔ those of the published diffusers folder.

Each part has one table of prefixes, published → original, made from its config.json, so that any number of blocks and
layers is covered; both directions read the same table. Two kinds of tensor also change shape: the VAE's attention
(1×1 convolutions in the original, linear in the folder) and OpenCLIP's (query, key and value stacked in one tensor in
the original, three in the folder). Names and shapes only: no torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
Shape = tuple[int, ...]

UNET_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
UNET_OUTSIDE = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
VAE_RESNET = {"norm1.": "norm1.", "conv1.": "conv1.", "norm2.": "norm2.", "conv2.": "conv2."} | {
    "conv_shortcut.": "nin_shortcut."
}
VAE_ATTENTION = {"group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out."}
OPENCLIP_OUTSIDE = {
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
}
OPENCLIP_LAYER = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "self_attn.q_proj.": "attn.in_proj_",
    "self_attn.k_proj.": "attn.in_proj_",
    "self_attn.v_proj.": "attn.in_proj_",
    "self_attn.out_proj.": "attn.out_proj.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
# Some Stable Diffusion 1 files were written without the text_model level.
OLD_CLIP = ("embeddings.", "encoder.", "final_layer_norm.")
# Names inside the folder's VAE attention before diffusers 0.18: Stable Diffusion 1.5 was published with them.
OLD_VAE_ATTENTION = {"query.": "to_q.", "key.": "to_k.", "value.": "to_v.", "proj_attn.": "to_out.0."}
# Tensors of published files that are no weights of the parts: derived numbers, and CLIP's head for pictures.
NOT_WEIGHTS = ("position_ids", "text_projection", "text_projection.weight", "logit_scale")


@dataclass(frozen=True)
class Move:
    """One tensor of the original file = one of the folder, or several of the folder stacked by rows."""

    original: str
    published: tuple[str, ...]
    is_convolution: bool = False  # [out, in, 1, 1] in the original, [out, in] in the folder

    def published_shape(self, original: Shape) -> Shape:
        shape = original[:2] if self.is_convolution else original
        return (shape[0] // len(self.published), *shape[1:])


def is_openclip(text_config: Config) -> bool:
    """Stable Diffusion 2's text encoder is OpenCLIP's, told by its plain GELU; OpenAI's CLIP has a quick one."""
    return text_config.get("hidden_act", "quick_gelu") == "gelu"


def published_name(part: str, name: str) -> str:
    """The published name of a tensor in a diffusers folder, whatever version of the libraries wrote it."""
    if part == "text_encoder" and not name.startswith("text_model."):
        return f"text_model.{name}"  # transformers 5 writes without that level
    if part == "vae" and ".attentions." in name:
        head, inside = name.split(".attentions.0.")
        old = next((o for o in OLD_VAE_ATTENTION if inside.startswith(o)), "")
        return f"{head}.attentions.0.{OLD_VAE_ATTENTION.get(old, '')}{inside[len(old) :]}"
    return name


def to_original(part: str, config: Config, published: Iterable[str]) -> list[Move]:
    """How the original layout holds these tensors. Raises KeyError for a name that it has no place for."""
    table = _table(part, config)
    stacked: dict[str, list[str]] = {}
    for name in published:
        prefix = next((p for p in table if name.startswith(p)), None)
        if prefix is None:
            raise KeyError(name)
        stacked.setdefault(table[prefix] + name[len(prefix) :], []).append(name)
    order = {prefix: i for i, prefix in enumerate(table)}
    return [_move(part, original, sorted(names, key=lambda n: _rank(n, order))) for original, names in stacked.items()]


def to_published(part: str, config: Config, originals: Iterable[str]) -> list[Move]:
    """Where these tensors of an original file belong; those of other parts, and NOT_WEIGHTS, are passed over.

    Raises KeyError for a tensor of this part that the model described by config has no place for.
    """
    table = _table(part, config)
    sources: dict[str, list[str]] = {}
    for published, original in table.items():
        sources.setdefault(original, []).append(published)
    if part == "text_encoder" and not is_openclip(config):
        sources |= {root(part, config) + old: [f"text_model.{old}"] for old in OLD_CLIP}
    moves = []
    for name in originals:
        if (
            not name.startswith(root(part, config))
            or name.endswith(NOT_WEIGHTS)
            or _is_unused_layer(part, config, name)
        ):
            continue
        prefix = next((p for p in sources if name.startswith(p)), None)
        if prefix is None:
            raise KeyError(name)
        moves.append(_move(part, name, [p + name[len(prefix) :] for p in sources[prefix]]))
    return moves


def _is_unused_layer(part: str, config: Config, name: str) -> bool:
    """Stable Diffusion 2 reads the text encoder before its last layer: the file has that layer, the folder has not."""
    inside = name.removeprefix(root(part, config) + "transformer.resblocks.")
    return part == "text_encoder" and inside != name and int(inside.split(".")[0]) >= config["num_hidden_layers"]


def root(part: str, config: Config) -> str:
    if part == "text_encoder":
        return "cond_stage_model.model." if is_openclip(config) else "cond_stage_model.transformer."
    return {"unet": "model.diffusion_model.", "vae": "first_stage_model."}[part]


def _move(part: str, original: str, published: list[str]) -> Move:
    convolution = part == "vae" and ".attentions." in published[0] and "norm" not in published[0]
    return Move(original, tuple(published), convolution and original.endswith(".weight"))


def _rank(name: str, order: Mapping[str, int]) -> int:
    return next(i for prefix, i in order.items() if name.startswith(prefix))


def _table(part: str, config: Config) -> dict[str, str]:
    table = {"unet": _unet_table, "vae": _vae_table, "text_encoder": _text_table}[part](config)
    return {published: root(part, config) + original for published, original in table.items()}


def _join(published: str, original: str, inside: Mapping[str, str]) -> dict[str, str]:
    return {published + a: original + b for a, b in inside.items()}


def _unet_table(config: Config) -> dict[str, str]:
    table = dict(UNET_OUTSIDE)
    down_types, up_types, layers = config["down_block_types"], config["up_block_types"], config["layers_per_block"]
    n = 1
    for b, kind in enumerate(down_types):
        for layer in range(layers):
            table |= _join(f"down_blocks.{b}.resnets.{layer}.", f"input_blocks.{n}.0.", UNET_RESNET)
            if "CrossAttn" in kind:
                table[f"down_blocks.{b}.attentions.{layer}."] = f"input_blocks.{n}.1."
            n += 1
        if b + 1 < len(down_types):
            table[f"down_blocks.{b}.downsamplers.0.conv."] = f"input_blocks.{n}.0.op."
            n += 1
    table |= _join("mid_block.resnets.0.", "middle_block.0.", UNET_RESNET)
    table["mid_block.attentions.0."] = "middle_block.1."
    table |= _join("mid_block.resnets.1.", "middle_block.2.", UNET_RESNET)
    n = 0
    for b, kind in enumerate(up_types):
        for layer in range(layers + 1):
            table |= _join(f"up_blocks.{b}.resnets.{layer}.", f"output_blocks.{n}.0.", UNET_RESNET)
            if "CrossAttn" in kind:
                table[f"up_blocks.{b}.attentions.{layer}."] = f"output_blocks.{n}.1."
            n += 1
        if b + 1 < len(up_types):  # in the block's last entry, after the attention where there is one
            after = 2 if "CrossAttn" in kind else 1
            table[f"up_blocks.{b}.upsamplers.0.conv."] = f"output_blocks.{n - 1}.{after}.conv."
    return table


def _vae_table(config: Config) -> dict[str, str]:
    blocks, layers = len(config["block_out_channels"]), config["layers_per_block"]
    table = {"quant_conv.": "quant_conv.", "post_quant_conv.": "post_quant_conv."}
    for side in ("encoder", "decoder"):
        table |= _join(f"{side}.", f"{side}.", {"conv_in.": "conv_in.", "conv_out.": "conv_out."})
        table[f"{side}.conv_norm_out."] = f"{side}.norm_out."
        table |= _join(f"{side}.mid_block.resnets.0.", f"{side}.mid.block_1.", VAE_RESNET)
        table |= _join(f"{side}.mid_block.attentions.0.", f"{side}.mid.attn_1.", VAE_ATTENTION)
        table |= _join(f"{side}.mid_block.resnets.1.", f"{side}.mid.block_2.", VAE_RESNET)
    for b in range(blocks):
        for layer in range(layers):
            table |= _join(f"encoder.down_blocks.{b}.resnets.{layer}.", f"encoder.down.{b}.block.{layer}.", VAE_RESNET)
        table[f"encoder.down_blocks.{b}.downsamplers.0.conv."] = f"encoder.down.{b}.downsample.conv."
        up = blocks - 1 - b  # the original counts the decoder's blocks from the picture's side
        for layer in range(layers + 1):
            table |= _join(f"decoder.up_blocks.{b}.resnets.{layer}.", f"decoder.up.{up}.block.{layer}.", VAE_RESNET)
        table[f"decoder.up_blocks.{b}.upsamplers.0.conv."] = f"decoder.up.{up}.upsample.conv."
    return table


def _text_table(config: Config) -> dict[str, str]:
    if not is_openclip(config):
        return {"text_model.": "text_model."}
    table = dict(OPENCLIP_OUTSIDE)
    for layer in range(config["num_hidden_layers"]):
        inside = (f"text_model.encoder.layers.{layer}.", f"transformer.resblocks.{layer}.")
        table |= _join(*inside, OPENCLIP_LAYER)
    return table
