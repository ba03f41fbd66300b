"""The assets' token embeddings: a frozen table and N trainable vectors beside it.

The table is never resized, copied or trained. With two text encoders (SDXL) a vector has the first one's numbers and then the
second one's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class AssetEmbedding(nn.Module):
    """Looks `token_ids[i]` up in `vectors[i]`, and every other id in the frozen `table`.

    `vectors` (N, D) stays fp32 whatever the table's dtype: the optimizer and the gradient scaler need it so. Of wider ones this
    table's part begins at `first`.
    """

    token_ids: torch.Tensor
    vectors: nn.Parameter

    def __init__(self, table: nn.Embedding, token_ids: Sequence[int], vectors: torch.Tensor, first: int = 0):
        """A parameter is shared, anything else copied."""
        super().__init__()
        if len(token_ids) != len(vectors) or len(set(token_ids)) != len(vectors):
            raise ValueError(f"each vector needs a token id of its own, got {list(token_ids)} for {len(vectors)} rows")
        self.vectors = vectors if isinstance(vectors, nn.Parameter) else nn.Parameter(vectors.detach().float().clone())
        self.own = slice(first, first + table.embedding_dim)
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
        own = self.vectors[:, self.own][matches.int().argmax(-1)].to(words.dtype)
        return torch.where(is_asset[..., None], own, words)


@contextmanager
def use_assets(text_encoders: Sequence[Any], token_ids: Sequence[int], vectors: torch.Tensor) -> Iterator[AssetEmbedding]:
    """Within the block the text encoders know the asset tokens, each its part of `vectors` (N, sum of widths); afterwards they
    are as they were. Yields the first one's embedding, whose vectors are everyone's."""
    tables = [encoder.get_input_embeddings() for encoder in text_encoders]
    assert all(isinstance(table, nn.Embedding) for table in tables), "the text encoder already carries assets"
    embeddings, shared, first = [], vectors.to(tables[0].weight.device), 0
    for table in tables:
        embeddings.append(AssetEmbedding(table, token_ids, shared, first))
        shared, first = embeddings[0].vectors, first + table.embedding_dim
    for encoder, embedding in zip(text_encoders, embeddings, strict=True):
        encoder.set_input_embeddings(embedding)
    try:
        yield embeddings[0]
    finally:
        for encoder, table in zip(text_encoders, tables, strict=True):
            encoder.set_input_embeddings(table)


def initial_vectors(text_encoders: Sequence[Any], tokenizer: Any, words: Sequence[str | None],
                    noise: float = 0.05) -> torch.Tensor:  # fmt: skip
    """(N, sum of widths) starting vectors: the mean of an asset's words where given, else the mean of the vocabulary.

    The vocabulary's mean is the most neutral start: it stands for no thing in particular. Each gets a little noise of
    its own, `noise` times the table's typical length, so that assets which start from the same words do not stay the same.
    """
    return torch.cat([_starts(encoder.get_input_embeddings(), tokenizer, words, noise) for encoder in text_encoders], dim=1)


def _starts(table: nn.Embedding, tokenizer: Any, words: Sequence[str | None], share: float) -> torch.Tensor:
    weight = table.weight.detach().float()
    mean = weight.mean(0)
    typical_length = weight.norm(dim=1).median()
    vectors = []
    for index, phrase in enumerate(words):
        ids = tokenizer(phrase, add_special_tokens=False).input_ids if phrase else []
        vector = weight[ids].mean(0) if ids else mean
        generator = torch.Generator().manual_seed(index)
        noise = torch.randn(vector.shape, generator=generator).to(vector)
        vector = vector + share * typical_length * noise / noise.norm()
        vectors.append(vector)
    return torch.stack(vectors)
