"""Weight names as models on the hub have them.

CLIPTextModel's weights are published as `text_model.encoder...`. Newer transformers read that and save `encoder...`, which older
ones take for other weights: they start the encoder at random.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

PREFIX = "text_model."


def use_hub_names(text_encoder: Path) -> None:
    """Renames the weights in the folder of a saved CLIPTextModel, for every version of transformers to read."""
    path = text_encoder / "model.safetensors"
    weights = {PREFIX + name.removeprefix(PREFIX): weight for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
