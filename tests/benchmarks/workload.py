"""What is generated in the benchmarks: a random BART whose outputs end by themselves at ragged lengths that the source
decides, alike in every implementation; a random T5; and the workloads by name.

One channel of the decoder carries the position, one of the encoder the row's wanted length, coded in the vocabulary
group that the row's tokens come from. No layer writes to either but the last cross-attention, which subtracts the
second from the first; the end token's output row reads the difference. Everything else is random, so speed is that of a
real model. T5 has no positions to count with, so a T5 here never ends: every output has the length asked for.
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
_END_BIAS = 4.0  # of the end token's score, by way of the last norm: not every peer has a bias of the logits
_NEVER = -60.0
_EMBEDDING_SPREAD = 0.07  # of a token's and a position's embedding together, which the first norm brings to 1
_DAMPING = 1.2  # shared by the layers: of what each block adds, so that the two channels reach the last layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the model; the vocabulary is cut into GROUPS groups."""

    family: str = "bart"
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
    "t5-large": Shape(
        family="t5",
        d_model=1024,
        layers=24,
        decoder_layers=24,
        ffn_dim=2816,
        heads=16,
        vocab_size=32_128,
        max_length=1024,
    ),
    "tiny-t5": Shape(
        family="t5", d_model=64, layers=2, decoder_layers=2, ffn_dim=128, heads=4, vocab_size=2_048, max_length=320
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A shape and the lengths of sources and outputs, in tokens.

    Sources are log-normal (uniform between the ends with `uniform_sources`). Outputs too, about 15 longer than
    `mean_output` and at most `max_output`; with `fixed_output` every output has exactly so many tokens.
    """

    shape: str = "marian"
    rows: int = 256
    shortest: int = 5
    longest: int = 300
    mean_source: int = 80
    mean_output: int = 45
    max_output: int = 142
    uniform_sources: bool = False
    fixed_output: int | None = None


WORKLOADS = {
    "default": Workload(),
    "translation": Workload(shortest=3, longest=128, mean_source=30, mean_output=18, max_output=128),
    "summarisation": Workload(
        shape="bart-large", rows=2048, shortest=256, longest=1024, uniform_sources=True, fixed_output=64
    ),
    "summarisation-ragged": Workload(
        shape="bart-large", rows=2048, shortest=256, longest=1024, uniform_sources=True, mean_output=45
    ),
    "distilbart": Workload(shape="distilbart", rows=64, shortest=64, longest=1024, mean_source=400),
    "bart-base": Workload(shape="bart-base", rows=64, shortest=16, longest=512, mean_source=128),
    "t5-large": Workload(
        shape="t5-large", rows=1024, shortest=256, longest=1024, uniform_sources=True, fixed_output=64
    ),
}


@dataclass(frozen=True, slots=True)
class Special:
    """Special token ids of a model. `bos` opens each source, where there is one."""

    start: int
    end: int
    pad: int
    bos: int | None


def special(shape: Shape) -> Special:
    """The special tokens of a shape's model. CTranslate2 wants a start token other than the end token."""
    return Special(start=0, end=1, pad=0, bos=None) if shape.family == "t5" else Special(start=0, end=2, pad=1, bos=0)


def make_model(shape: Shape, seed: int = 0, *, ends: bool = True) -> Any:
    """The transformers model of a shape with random weights, length-controlled; ends=False: no output ever ends."""
    torch.manual_seed(seed)
    return _t5(shape) if shape.family == "t5" else _bart(shape, ends)


def _t5(shape: Shape) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=shape.vocab_size,
        d_model=shape.d_model,
        d_kv=shape.d_model // shape.heads,
        d_ff=shape.ffn_dim,
        num_layers=shape.layers,
        num_decoder_layers=shape.decoder_layers,
        num_heads=shape.heads,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.shared.weight[1] = 0.0  # the end token's score is 0, far below the best of the others
    return model


def _bart(shape: Shape, ends: bool) -> Any:
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
    model = BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        _control(model, shape, _END_BIAS if ends else _NEVER)
    return model


def _control(model: Any, shape: Shape, end_bias: float) -> None:
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
    decoder.layers[-1].final_layer_norm.bias[position] = end_bias / _END_GAIN


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


def make_rows(shape: Shape, work: Workload, seed: int = 1) -> list[list[int]]:
    """The sources of a workload, special tokens included."""
    generator = torch.Generator().manual_seed(seed)
    drawn = _log_normal(work.mean_source, 0.9, work.rows, generator).clamp(work.shortest, work.longest)
    if work.uniform_sources:
        drawn = torch.randint(work.shortest, work.longest + 1, (work.rows,), generator=generator)
    ids = special(shape)
    begin = [] if ids.bos is None else [ids.bos]
    lengths = drawn.long().sub(1 + len(begin)).tolist()
    wanted = _log_normal(work.mean_output, 0.6, work.rows, generator)
    groups = (wanted / 150 * GROUPS).clamp(1, GROUPS - 1).long().tolist()
    per_group = (shape.vocab_size - _FIRST_TOKEN) // GROUPS - 1
    rows = []
    for length, group in zip(lengths, groups, strict=True):
        members = torch.randint(1, per_group, (length,), generator=generator) * GROUPS + group
        rows.append([*begin, *members.tolist(), ids.end])
    return rows


def _log_normal(mean: float, spread: float, count: int, generator: torch.Generator) -> Tensor:
    return torch.exp(torch.randn(count, generator=generator) * spread + math.log(mean) - spread**2 / 2)
