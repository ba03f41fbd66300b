"""The embedded model in Stable Diffusion XL's layout, as a folder that --model-path accepts.

    python -m scripts.toybox.make_toybox_xl /tmp/toybox-xl

Two text encoders, of whose last but one layer the UNet reads both outputs side by side; a pooled text and the picture's size; two
tokenizers. Nothing is trained: the weights are the embedded model's, arranged so that it draws what the
embedded model draws, which makes XL's whole path visible. What it cannot show: the pooled text and the size reach the UNet
through a layer of zeros, so they change nothing.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mifo.io.files import check_writable, write_folder
from mifo.model.load_base import TOYBOX_FOLDER, load_base_model
from scripts.hub_names import use_hub_names

POOLED, TIME = 64, 32
#: By how much what the encoder computes is smaller than the embedded model's, and so than what the UNet reads beside it. Token
#: embeddings are smaller by as much, and so should their learning rate be.
QUIET = 1 / 32


def write_toybox_xl(folder: Path, overwrite: bool = False) -> Path:
    """Whole or absent; `overwrite` replaces an earlier one. 16-bit weights, as the embedded model has them."""
    base = load_base_model("toybox")
    words = base.tokenizer.init_kwargs.get("vocab_file") or TOYBOX_FOLDER / "tokenizer" / "vocab.json"
    second = CLIPTokenizer(str(words), str(Path(words).with_name("merges.txt")), pad_token="<|endoftext|>",
                           model_max_length=base.tokenizer.model_max_length)  # fmt: skip
    encoder = text_encoder(base.text_encoder)
    torch.manual_seed(0)  # of the projections, which are new
    projected = CLIPTextModelWithProjection(encoder.config)
    projected.load_state_dict({f"text_model.{k.removeprefix('text_model.')}": v for k, v in encoder.state_dict().items()},
                              strict=False)  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        vae=base.vae, text_encoder=encoder, text_encoder_2=projected, tokenizer=base.tokenizer, tokenizer_2=second,
        unet=unet(base.unet), scheduler=DDIMScheduler.from_config(base.own_scheduler.config), add_watermarker=False,
        force_zeros_for_empty_prompt=False,
    )  # fmt: skip
    with write_folder(folder, "random model", overwrite) as temporary:
        pipeline.to(torch.float16).save_pretrained(temporary)
        use_hub_names(temporary / "text_encoder")
    return folder


def text_encoder(own: CLIPTextModel) -> CLIPTextModel:
    """Twice as wide and two layers deeper. The first half of a hidden state is what the embedded model's encoder computes, QUIET
    times as large and with mean 0, which its norms do not see. The last but one layer writes the final norm of it into the second
    half, where the UNet reads it: gelu(x) - gelu(-x) = x. The last layer does nothing."""
    width = own.config.hidden_size
    config = CLIPTextConfig(**{**own.config.to_dict(), "hidden_size": 2 * width, "projection_dim": POOLED,
                               "num_attention_heads": 2 * own.config.num_attention_heads,
                               "num_hidden_layers": own.config.num_hidden_layers + 2,
                               "layer_norm_eps": own.config.layer_norm_eps * QUIET**2 / 2})  # fmt: skip
    found = CLIPTextModel(config)
    for name, weight in found.named_parameters():
        weight.data.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    old, new = _inner(own), _inner(found)
    for table in ("token_embedding", "position_embedding"):
        rows = getattr(old.embeddings, table).weight.data
        getattr(new.embeddings, table).weight.data[:, :width] = QUIET * (rows - rows.mean(1, keepdim=True))
    for layer, wide in zip(old.encoder.layers, new.encoder.layers, strict=False):
        for norm in ("layer_norm1", "layer_norm2"):
            _widen_norm(getattr(layer, norm), getattr(wide, norm))
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"):
            source, target = layer.get_submodule(name), wide.get_submodule(name)
            rows, columns = source.weight.shape
            weight, bias = source.weight.data, source.bias.data
            if name in ("self_attn.out_proj", "mlp.fc2"):  # what is added to the hidden state
                weight, bias = (QUIET * (value - value.mean(0, keepdim=True)) for value in (weight, bias))
            target.weight.data[:rows, :columns] = weight
            target.bias.data[:rows] = bias
    writing = new.encoder.layers[-2]
    _widen_norm(old.final_layer_norm, writing.layer_norm2)
    identity = torch.eye(width)
    writing.mlp.fc1.weight.data[: 2 * width, :width] = torch.cat([identity, -identity])
    writing.mlp.fc2.weight.data[width:, : 2 * width] = torch.cat([identity, -identity], 1)
    return found


def _widen_norm(own: torch.nn.LayerNorm, wide: torch.nn.LayerNorm) -> None:
    """Over twice as many numbers, half of them 0, the deviation is smaller by the root of 2. Nothing of the other half passes."""
    width = len(own.weight)
    wide.weight.data[:width] = own.weight.data / math.sqrt(2)
    wide.bias.data[:width] = own.bias.data
    wide.weight.data[width:] = 0


def _inner(model: CLIPTextModel) -> Any:
    """Where the layers are, in this and earlier versions of transformers."""
    return getattr(model, "text_model", model)


def unet(own: UNet2DConditionModel) -> UNet2DConditionModel:
    """Keys and values read the second half of each text encoder's states, weighed half; what is added for XL starts at zero."""
    width = own.config["cross_attention_dim"]
    config = {**own.config, "cross_attention_dim": 4 * width, "use_linear_projection": True, "addition_embed_type": "text_time",
              "addition_time_embed_dim": TIME, "projection_class_embeddings_input_dim": POOLED + 6 * TIME}  # fmt: skip
    found = UNet2DConditionModel(**{k: v for k, v in config.items() if not k.startswith("_")})
    weights = copy.deepcopy(own.state_dict())
    for name, weight in weights.items():
        if ".attn2.to_k." in name or ".attn2.to_v." in name:
            weights[name] = torch.cat([0 * weight, weight / 2], 1).repeat(1, 2)
        elif ".proj_in.weight" in name or ".proj_out.weight" in name:
            weights[name] = weight.flatten(1)  # a convolution over single pixels is a linear layer
    missing = found.load_state_dict(weights, strict=False).missing_keys
    assert all(name.startswith("add_embedding.") for name in missing), missing
    found.add_embedding.linear_2.weight.data.zero_()
    found.add_embedding.linear_2.bias.data.zero_()
    return found


def main(
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier one there.")] = False,
) -> None:
    check_writable(output.parent)
    write_toybox_xl(output, overwrite)
    size = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
    print(f"{output}: the embedded model in Stable Diffusion XL's layout, {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    typer.run(main)
