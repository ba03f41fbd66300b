"""The assets' token embeddings: a frozen table and N trainable vectors beside it.

The table is never resized, copied or trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextModel


class AssetEmbedding(nn.Module):
    """Looks `token_ids[i]` up in `vectors[i]`, and every other id in the frozen `table`.

    `vectors` (N, D) stays fp32 whatever the table's dtype: the optimizer and the gradient scaler need it so.
    """

    token_ids: torch.Tensor
    vectors: nn.Parameter

    def __init__(self, table: nn.Embedding, token_ids: Sequence[int], vectors: torch.Tensor):
        super().__init__()
        if len(token_ids) != len(vectors) or len(set(token_ids)) != len(vectors):
            raise ValueError(f"each vector needs a token id of its own, got {list(token_ids)} for {len(vectors)} rows")
        self.vectors = nn.Parameter(vectors.detach().float().clone())
        self.table = table.requires_grad_(False)
        self.register_buffer("token_ids", torch.tensor(list(token_ids), device=vectors.device), persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """The frozen table's weight (V, D), where other code looks for a dtype or a device."""
        return self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, L) -> (B, L, D) in the table's dtype."""
        matches = ids[..., None] == self.token_ids  # (B, L, N)
        is_asset = matches.any(-1)
        words = self.table(ids.masked_fill(is_asset, 0))
        own = self.vectors[matches.int().argmax(-1)].to(words.dtype)
        return torch.where(is_asset[..., None], own, words)


@contextmanager
def use_assets(text_encoder: CLIPTextModel, token_ids: Sequence[int], vectors: torch.Tensor) -> Iterator[AssetEmbedding]:
    """Within the block the text encoder knows the asset tokens; afterwards it is as it was."""
    table = text_encoder.get_input_embeddings()
    assert isinstance(table, nn.Embedding), "the text encoder already carries assets"
    embedding = AssetEmbedding(table, token_ids, vectors.to(table.weight.device))
    text_encoder.set_input_embeddings(embedding)
    try:
        yield embedding
    finally:
        text_encoder.set_input_embeddings(table)


def initial_vectors(table: nn.Embedding, tokenizer: Any, words: Sequence[str | None]) -> torch.Tensor:
    """(N, D) starting vectors: the mean of an asset's words where given, else the mean of the vocabulary.

    The vocabulary's mean is the most neutral start: it stands for no thing in particular. Each gets a little noise of
    its own, 5 % of the table's typical length, so that assets which start from the same words do not stay the same.
    """
    weight = table.weight.detach().float()
    mean = weight.mean(0)
    typical_length = weight.norm(dim=1).median()
    vectors = []
    for index, phrase in enumerate(words):
        ids = tokenizer(phrase, add_special_tokens=False).input_ids if phrase else []
        vector = weight[ids].mean(0) if ids else mean
        generator = torch.Generator().manual_seed(index)
        noise = torch.randn(vector.shape, generator=generator).to(vector)
        vector = vector + 0.05 * typical_length * noise / noise.norm()
        vectors.append(vector)
    return torch.stack(vectors)
