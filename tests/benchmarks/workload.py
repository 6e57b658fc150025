"""A random BART whose outputs end by themselves at ragged lengths that the source decides, alike in every
implementation.

One channel of the decoder carries the position, one of the encoder the row's wanted length, coded in the vocabulary
group that the row's tokens come from. No layer writes to either but the last cross-attention, which subtracts the
second from the first; the end token's output row reads the difference. Everything else is random, so speed is that of a
real model.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GROUPS = 64
_FIRST_TOKEN = 4
_POSITION_GAIN = 3.0
_END_GAIN = 30.0
_EMBEDDING_SPREAD = 0.07  # of a token's and a position's embedding together, which the first norm brings to 1
_DAMPING = 1.2  # shared by the layers: of what each block adds, so that the two channels reach the last layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the model; the vocabulary is cut into GROUPS groups."""

    d_model: int
    layers: int
    decoder_layers: int
    ffn_dim: int
    heads: int
    vocab_size: int
    max_length: int


SHAPES = {
    "tiny": Shape(d_model=64, layers=2, decoder_layers=2, ffn_dim=128, heads=4, vocab_size=2_000, max_length=320),
    "marian": Shape(d_model=512, layers=6, decoder_layers=6, ffn_dim=2048, heads=8, vocab_size=58_101, max_length=512),
    "bart-base": Shape(
        d_model=768, layers=6, decoder_layers=6, ffn_dim=3072, heads=12, vocab_size=50_265, max_length=1024
    ),
    "bart-large": Shape(
        d_model=1024, layers=12, decoder_layers=12, ffn_dim=4096, heads=16, vocab_size=50_264, max_length=1024
    ),
    "distilbart": Shape(
        d_model=1024, layers=12, decoder_layers=6, ffn_dim=4096, heads=16, vocab_size=50_264, max_length=1024
    ),
}


def make_model(shape: Shape, seed: int = 0) -> Any:
    """A transformers BartForConditionalGeneration with length-controlled random weights."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=shape.vocab_size,
        d_model=shape.d_model,
        encoder_layers=shape.layers,
        decoder_layers=shape.decoder_layers,
        encoder_ffn_dim=shape.ffn_dim,
        decoder_ffn_dim=shape.ffn_dim,
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        max_position_embeddings=shape.max_length,
        decoder_start_token_id=0,
        forced_eos_token_id=None,
        init_std=0.05,
    )
    torch.manual_seed(seed)
    model = BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        _control(model, shape)
    return model


def _control(model: Any, shape: Shape) -> None:
    position, length = 0, 1  # the two channels
    encoder, decoder = model.model.encoder, model.model.decoder
    embedding = model.model.shared.weight
    embedding[:, position] = 0.0
    embedding[:, length] = _EMBEDDING_SPREAD * _length_codes(shape)
    encoder.embed_positions.weight[:, length] = 0.0
    steps = torch.arange(decoder.embed_positions.weight.shape[0]) - 2.0
    decoder.embed_positions.weight[:, position] = _EMBEDDING_SPREAD * _position_code(steps)
    for layer in encoder.layers:
        _silence((layer.self_attn.out_proj, layer.fc2), length, _DAMPING / shape.layers)
    for layer in decoder.layers:
        blocks = (layer.self_attn.out_proj, layer.encoder_attn.out_proj, layer.fc2)
        _silence(blocks, position, _DAMPING / shape.decoder_layers)
    last = decoder.layers[-1].encoder_attn
    last.v_proj.weight[0] = 0.0
    last.v_proj.weight[0, length] = 1.0
    last.v_proj.bias[0] = 0.0
    last.out_proj.weight[:, 0] = 0.0
    last.out_proj.weight[position, 0] = -1.0
    embedding[2, position] = _END_GAIN
    model.final_logits_bias[0, 2] = 4.0


def _silence(layers: tuple[Any, ...], channel: int, damping: float) -> None:
    for layer in layers:
        layer.weight *= damping
        layer.weight[channel] = 0.0
        layer.bias[channel] = 0.0


def _position_code(steps: Tensor) -> Tensor:
    return _POSITION_GAIN * (steps / 150).clamp(0, 1)


def _length_codes(shape: Shape) -> Tensor:
    group = torch.arange(shape.vocab_size) % GROUPS
    codes = _POSITION_GAIN * group / GROUPS
    codes[:_FIRST_TOKEN] = 0.0
    return codes


def make_rows(
    shape: Shape,
    count: int,
    *,
    shortest: int,
    longest: int,
    mean_source: int,
    mean_output: int,
    uniform: bool = False,
    seed: int = 1,
) -> list[list[int]]:
    """Sources and outputs with log-normal lengths, as texts have them: about `mean_source`, cut to `shortest` and
    `longest` (or uniform between the two), and about `mean_output` tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = _log_normal(mean_source, 0.9, count, generator).clamp(shortest, longest)
    if uniform:
        drawn = torch.randint(shortest, longest + 1, (count,), generator=generator)
    lengths = drawn.long().sub(2).tolist()
    wanted = _log_normal(mean_output, 0.6, count, generator)
    groups = (wanted / 150 * GROUPS).clamp(1, GROUPS - 1).long().tolist()
    per_group = (shape.vocab_size - _FIRST_TOKEN) // GROUPS - 1
    rows = []
    for length, group in zip(lengths, groups, strict=True):
        members = torch.randint(1, per_group, (length,), generator=generator) * GROUPS + group
        rows.append([0, *members.tolist(), 2])
    return rows


def _log_normal(mean: float, spread: float, count: int, generator: torch.Generator) -> Tensor:
    return torch.exp(torch.randn(count, generator=generator) * spread + math.log(mean) - spread**2 / 2)
