"""Tiny models as another transformers saves them, and what it computed with them: `tests/models/goldens/`.

Today's transformers is compared with live; this is for what older ones wrote, since 5.0 changed which tensors are tied
and which of them are saved. In an environment with that transformers (4.57.6 made what is there):

    PYTHONPATH=. python -m tests.models.make_goldens              # all of GOLDENS
    PYTHONPATH=. python -m tests.models.make_goldens marian       # some of them

A family joins with one entry in GOLDENS. Each directory holds `config.json`, `generation_config.json` and
`model.safetensors` as transformers saved them, `outputs.json` (sources, targets, and per settings the tokens) and
`logits.safetensors` (teacher-forced, fp32 `[rows, T, V]`).
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from tests.models.contract import reference_logits, reference_model, reference_tokens, sources, teacher_forced
from tests.models.test_t5 import lively

DIRECTORY = Path(__file__).parent / "goldens"
ROWS = 6

# Beside what generation_config.json holds. Random models repeat themselves: hence the ban.
CALLS: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 2, "num_beams": 4},
    {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
]


@dataclass(frozen=True)
class Golden:
    """A family's config, `stop_bias` and `adjust` (see contract.py) and what its generation_config.json says.

    rescaled: what today's transformers multiplies the logits of such a file with, unlike the one that wrote it.
    """

    model_type: str
    config: dict[str, Any]
    stop_bias: float
    generation: dict[str, Any] = field(default_factory=dict)
    adjust: Callable[[Any], None] | None = None
    rescaled: float = 1.0


BART_LIKE = {
    "vocab_size": 61,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 48,
    "init_std": 0.3,
}
MARIAN = BART_LIKE | {
    "activation_function": "swish",
    "scale_embedding": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "forced_eos_token_id": 0,
    "pad_token_id": 52,
    "decoder_start_token_id": 52,
}
MBART = BART_LIKE | {"scale_embedding": True}
PEGASUS = BART_LIKE | {"activation_function": "relu", "scale_embedding": True}
T5 = {
    "vocab_size": 61,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
    "initializer_factor": 3.0,
}
GATED = T5 | {"feed_forward_proj": "gated-gelu"}
# Sizes of a head that are not the width's share.
T5_WIDE = T5 | {
    "d_kv": 6,
    "num_heads": 3,
    "num_decoder_layers": 2,
    "relative_attention_max_distance": 12,
    "initializer_factor": 1.0,
}
LONG_T5 = GATED | {"local_radius": 3, "global_block_size": 4, "initializer_factor": 1.0}
GOLDENS = {
    "bart": Golden("bart", BART_LIKE, 3.0, {"forced_bos_token_id": 0}),
    "bart-untied": Golden("bart", BART_LIKE | {"tie_word_embeddings": False}, 1.5),
    "marian": Golden("marian", MARIAN, 1.0, {"bad_words_ids": [[52]]}),
    # 4.57 makes both of one size, whatever decoder_vocab_size says.
    "marian-two-vocabularies": Golden(
        "marian", MARIAN | {"share_encoder_decoder_embeddings": False}, 2.5, {"bad_words_ids": [[52]]}
    ),
    "mbart": Golden("mbart", MBART, 1.0, {"forced_bos_token_id": 57, "decoder_start_token_id": 2}),
    "mbart-untied": Golden("mbart", MBART | {"tie_word_embeddings": False}, -0.5, {"decoder_start_token_id": 55}),
    "pegasus": Golden("pegasus", PEGASUS, 1.25),
    "m2m_100": Golden("m2m_100", BART_LIKE, 5.0, {"forced_bos_token_id": 57}),
    "m2m_100-untied": Golden("m2m_100", BART_LIKE | {"tie_word_embeddings": False, "scale_embedding": False}, 1.5),
    "t5": Golden("t5", T5, -4.0),
    "t5-own-head": Golden("t5", GATED | {"tie_word_embeddings": False}, 3.0),
    "mt5": Golden("mt5", GATED | {"tie_word_embeddings": False}, 3.0),
    "mt5-tied": Golden("mt5", T5_WIDE | {"tie_word_embeddings": True}, 3.0, adjust=lively, rescaled=16**0.5),
    "umt5": Golden("umt5", GATED, 3.0),
    "umt5-untied": Golden(
        "umt5",
        T5_WIDE | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        2.0,
        adjust=lively,
        rescaled=16**-0.5,
    ),
    "longt5": Golden("longt5", LONG_T5 | {"encoder_attention_type": "transient-global"}, 3.0, adjust=lively),
    "longt5-own-head": Golden("longt5", LONG_T5 | {"tie_word_embeddings": False}, 3.0, adjust=lively),
}


def make(name: str, golden: Golden) -> None:
    """Write one directory. Raises AssertionError when all outputs have one length: choose another stop_bias."""
    version = ".".join(transformers.__version__.split(".")[:2])
    directory = DIRECTORY / version / name
    shutil.rmtree(directory, ignore_errors=True)
    config = transformers.AutoConfig.for_model(golden.model_type, **golden.config)
    model = reference_model(config, stop_bias=golden.stop_bias, adjust=golden.adjust)
    model.generation_config.update(**{"max_length": 24, **golden.generation})
    model.save_pretrained(directory)
    rows = sources(config, ROWS, longest=20)
    batch = teacher_forced(config, rows, length=7)
    forced = {"forced_eos_token_id": model.generation_config.forced_eos_token_id}
    answers = [
        {"settings": call, "tokens": [row[0] for row in reference_tokens(model, rows, **forced, **call)]}
        for call in CALLS
    ]
    assert len({len(row) for row in answers[0]["tokens"]}) > 1, [len(row) for row in answers[0]["tokens"]]
    made = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "sources": rows,
        "targets": batch["decoder_token_ids"].tolist(),
        "answers": answers,
    }
    (directory / "outputs.json").write_text(json.dumps(made) + "\n", encoding="utf-8")
    save_file({"logits": reference_logits(model, batch)}, directory / "logits.safetensors")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or GOLDENS:
        make(chosen, GOLDENS[chosen])
        print(chosen)
