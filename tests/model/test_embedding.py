"""Asset rows beside a frozen embedding table."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import CLIPTextModel

from mifo.model.base import BaseModel
from mifo.model.embedding import AssetEmbedding, initial_vectors, use_assets

WORDS, WIDTH = 12, 8
#: two sentences with the assets 12 and 13 among words; the end of the text is 11
IDS = torch.tensor([[0, 3, 12, 5, 13, 11], [0, 13, 13, 2, 11, 11]])


@pytest.fixture
def table() -> nn.Embedding:
    torch.manual_seed(3)
    return nn.Embedding(WORDS, WIDTH)


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.arange(2 * WIDTH).view(2, WIDTH) / 16 - 0.5


@pytest.fixture
def half_encoder(toybox_random_base: BaseModel) -> Iterator[CLIPTextModel]:
    """The text encoder in half precision, as it is trained on a GPU."""
    encoder = toybox_random_base.text_encoder
    kept = {name: value.clone() for name, value in encoder.state_dict().items()}
    yield encoder.half()
    encoder.float().load_state_dict(kept)


def test_words_come_from_the_table_and_assets_from_the_rows(table: nn.Embedding, rows: torch.Tensor) -> None:
    found = AssetEmbedding(table, [12, 13], rows)(IDS)
    for sentence, ids in enumerate(IDS.tolist()):
        for position, token_id in enumerate(ids):
            expected = table.weight[token_id] if token_id < WORDS else rows[token_id - WORDS]
            assert torch.equal(found[sentence, position], expected)


def test_without_assets_in_the_text_nothing_changes(table: nn.Embedding, rows: torch.Tensor) -> None:
    ids = IDS.clamp(max=WORDS - 1)
    assert torch.equal(AssetEmbedding(table, [12, 13], rows)(ids), table(ids))


def test_gradients_reach_only_the_rows_that_were_read(table: nn.Embedding, rows: torch.Tensor) -> None:
    embedding = AssetEmbedding(table, [12, 13], rows)
    assert [name for name, p in embedding.named_parameters() if p.requires_grad] == ["vectors"]
    embedding(IDS[1:]).sum().backward()  # only asset 13 stands there, twice
    assert table.weight.grad is None
    assert embedding.vectors.grad is not None
    assert embedding.vectors.grad.tolist() == [[0.0] * WIDTH, [2.0] * WIDTH]


def test_the_rows_are_a_copy(table: nn.Embedding, rows: torch.Tensor) -> None:
    embedding = AssetEmbedding(table, [12, 13], rows)
    with torch.no_grad():
        embedding.vectors.zero_()
    assert rows.abs().sum() > 0


def test_ids_with_a_gap_find_their_rows(table: nn.Embedding, rows: torch.Tensor) -> None:
    found = AssetEmbedding(table, [15, 12], rows)(torch.tensor([[3, 12, 15]]))
    assert torch.equal(found[0], torch.stack([table.weight[3], rows[1], rows[0]]))


def test_each_row_needs_an_id_of_its_own(table: nn.Embedding, rows: torch.Tensor) -> None:
    for ids in ([12, 12], [12], [12, 13, 14]):
        with pytest.raises(ValueError, match="a token id of its own"):
            AssetEmbedding(table, ids, rows)


def test_rows_stay_fp32_beside_a_half_precision_table(table: nn.Embedding, rows: torch.Tensor) -> None:
    embedding = AssetEmbedding(table.half(), [12, 13], rows.half())
    assert embedding.vectors.dtype == torch.float32
    assert embedding(IDS).dtype == embedding.weight.dtype == torch.float16


def test_a_scaled_half_precision_step_moves_the_rows_and_no_byte_of_the_table(half_encoder: CLIPTextModel) -> None:
    try:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    except (RuntimeError, ValueError, TypeError) as error:
        pytest.skip(f"this torch has no gradient scaler for the CPU: {error}")
    table = half_encoder.get_input_embeddings()
    before = table.weight.detach().clone()
    first = len(before)
    ids = torch.tensor([[0, 3, first, 5, first + 1, 11]])
    start = 0.02 * torch.ones(2, table.embedding_dim)
    with use_assets([half_encoder], [first, first + 1], start) as embedding:
        trained = [p for p in half_encoder.parameters() if p.requires_grad]
        assert len(trained) == 1 and trained[0] is embedding.vectors
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=1e-2)
        for _ in range(2):
            loss = half_encoder(ids)[0].float()[:, -1, :16].pow(2).mean()  # the last place reads all before it
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)  # raises on half-precision gradients, which is why the rows are fp32
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        # Adam moves each number by about its rate, in each of the two steps
        assert scaler.get_scale() == 1024.0, "a step was skipped for a gradient that was not finite"
        assert (embedding.vectors - start).abs().median(1).values.min() > 1e-3
        assert embedding.vectors.isfinite().all()
    assert table.weight.detach().numpy().tobytes() == before.numpy().tobytes()


def test_the_encoder_reads_assets_inside_the_block_and_is_as_before_after_it(toybox_random_base: BaseModel) -> None:
    encoder, table = toybox_random_base.text_encoder, toybox_random_base.text_encoder.get_input_embeddings()
    first = table.num_embeddings
    plain, with_asset = torch.tensor([[0, 3, 4, 5]]), torch.tensor([[0, 3, first, 5]])
    modules = dict(encoder.named_modules())
    before = toybox_random_base.encode_prompt(plain).states
    # a row equal to the word 4 must read as the word 4 does
    with use_assets([encoder], [first], table.weight[4:5]):
        torch.testing.assert_close(toybox_random_base.encode_prompt(with_asset).states, before)
    with pytest.raises(InterruptedError), use_assets([encoder], [first], torch.zeros(1, table.embedding_dim)):
        assert not torch.equal(toybox_random_base.encode_prompt(with_asset).states, before)
        raise InterruptedError
    assert encoder.get_input_embeddings() is table
    assert dict(encoder.named_modules()) == modules
    assert torch.equal(toybox_random_base.encode_prompt(plain).states, before)


def test_assets_are_not_lent_twice(toybox_random_base: BaseModel) -> None:
    encoder = toybox_random_base.text_encoder
    table = encoder.get_input_embeddings()
    rows = torch.zeros(1, table.embedding_dim)
    with use_assets([encoder], [table.num_embeddings], rows):  # noqa: SIM117
        with pytest.raises(AssertionError, match="already carries assets"), use_assets([encoder], [table.num_embeddings], rows):
            pass
    assert encoder.get_input_embeddings() is table


def test_initial_rows_start_at_their_words_or_at_the_middle(toybox_random_base: BaseModel) -> None:
    table, tokenizer = toybox_random_base.text_encoder.get_input_embeddings(), toybox_random_base.tokenizer
    weight = table.weight
    rows = initial_vectors([toybox_random_base.text_encoder], tokenizer, ["red", "small red", None, None])
    red, small = (weight[tokenizer.convert_tokens_to_ids(word)] for word in ("red</w>", "small</w>"))
    expected = torch.stack([red, (small + red) / 2, weight.mean(0), weight.mean(0)])
    # each is 5 % of a typical row's length away, in a direction of its own
    distance = 0.05 * float(weight.norm(dim=1).median())
    torch.testing.assert_close((rows - expected).norm(dim=1), torch.full((4,), distance))
    assert not torch.allclose(rows[2], rows[3]), "two assets without words would stay the same for ever"
    assert torch.equal(initial_vectors([toybox_random_base.text_encoder], tokenizer, ["red", "small red", None, None]), rows)
