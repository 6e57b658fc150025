"""Make bart.zip, t5.zip and t5_1.1.zip: tiny presets saved by keras-hub, and what keras-hub computes with them.

    pip install keras-hub==0.32.0 tensorflow-text torch sentencepiece tokenizers
    KERAS_BACKEND=torch python tests/presets/keras_hub/make.py

Each archive holds the directory `preset` as `save_to_preset` wrote it, and expected.npz: a ragged batch with its
logits, token ids of texts, and greedy generation. Beside them the same weights, BART's as shards, T5 1.1's in bfloat16.
"""

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import keras_hub
import numpy as np
import sentencepiece
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
SOURCES = ["The quick brown fox jumped.", "A lazy dog", "Foxes and dogs: 12 of them, größer! \u00e9t\u00e9"]
TARGETS = ["A fox jumps over", "dogs", "Twelve of the quick foxes"]
PROMPTS = ["A fox", "", "Twelve of"]
CORPUS = [*SOURCES, *TARGETS, "the dog and the fox are quick and lazy", "brown dogs jump over the foxes"] * 8
MAX_LENGTH = 24
STEPS = 60


def bart() -> Any:
    """Byte-level BPE, two layers, learned positions."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = {**model["vocab"], "<mask>": len(model["vocab"])}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    backbone = keras_hub.models.BartBackbone(
        vocabulary_size=len(vocabulary),
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        max_sequence_length=40,
    )
    preprocessor = keras_hub.models.BartSeq2SeqLMPreprocessor(
        keras_hub.models.BartTokenizer(vocabulary, merges), encoder_sequence_length=32, decoder_sequence_length=28
    )
    return keras_hub.models.BartSeq2SeqLM(backbone, preprocessor)


def t5(**settings: Any) -> Any:
    """SentencePiece, two layers, a padded vocabulary, heads that are not hidden_dim / num_heads wide."""
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=proto,
        vocab_size=57,
        bos_id=-1,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    backbone = keras_hub.models.T5Backbone(
        vocabulary_size=60,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        key_value_dim=3,
        **settings,
    )
    preprocessor = keras_hub.models.T5Seq2SeqLMPreprocessor(
        keras_hub.models.T5Tokenizer(proto.getvalue()), encoder_sequence_length=32, decoder_sequence_length=28
    )
    return keras_hub.models.T5Seq2SeqLM(backbone, preprocessor)


def train(task: Any) -> None:
    """From weights of which none is zero or one, to texts that vary and end: so a mistaken weight shows in both."""
    rng = np.random.default_rng(7)
    for variable in task.backbone.variables:
        variable.assign(rng.normal(1.0 if variable.name in ("gamma", "weight") else 0.0, 0.3, variable.shape))
    x, y, weight = task.preprocessor({"encoder_text": SOURCES, "decoder_text": TARGETS})
    x = {name: keras.ops.convert_to_tensor(value) for name, value in x.items()}
    labels, keep = torch.as_tensor(np.asarray(y)).long(), torch.as_tensor(np.asarray(weight)).bool()
    optimizer = torch.optim.Adam([v.value for v in task.trainable_variables], lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(task(x, training=False)[keep], labels[keep]).backward()
        optimizer.step()


def expected(task: Any) -> dict[str, np.ndarray]:
    task.compile(sampler="greedy")
    x, _, _ = task.preprocessor({"encoder_text": SOURCES, "decoder_text": TARGETS})
    x = {name: keras.ops.convert_to_numpy(value) for name, value in x.items()}
    logits = keras.ops.convert_to_numpy(keras.ops.stop_gradient(task(x, training=False)))
    width = int(x["decoder_padding_mask"].sum(1).max())
    ids = [list(map(int, task.preprocessor.tokenizer(text))) for text in SOURCES]
    return {
        **x,
        "logits": logits[:, :width],
        "token_ids": np.array([json.dumps(row) for row in ids]),
        "sources": np.array(SOURCES),
        "prompts": np.array(PROMPTS),
        "generated": np.array(task.generate(SOURCES, max_length=MAX_LENGTH)),
        "continued": np.array(task.generate({"encoder_text": SOURCES, "decoder_text": PROMPTS}, max_length=MAX_LENGTH)),
        "unstopped": keras.ops.convert_to_numpy(
            task.generate_step(task.preprocessor.generate_preprocess(SOURCES, sequence_length=MAX_LENGTH))[
                "decoder_token_ids"
            ]
        ),
        "max_length": np.array(MAX_LENGTH),
        "keras_hub": np.array(keras_hub.__version__),
    }


def make(name: str, build: Callable[[], Any], *, sharded: bool = False, bfloat16: bool = False) -> None:
    task = build()
    train(task)
    with tempfile.TemporaryDirectory() as root:
        directory = Path(root)
        task.save_to_preset(str(directory / "preset"))
        if sharded:
            (directory / "sharded").mkdir()
            task.backbone.save_weights(directory / "sharded" / "model.weights.json", max_shard_size=1.1e-5)
        if bfloat16:
            lower = type(task.backbone).from_config({**task.backbone.get_config(), "dtype": "bfloat16"})
            lower.set_weights(task.backbone.get_weights())
            (directory / "bfloat16").mkdir()
            lower.save_weights(directory / "bfloat16" / "model.weights.h5")
        np.savez(directory / "expected.npz", **expected(task))
        with zipfile.ZipFile(HERE / f"{name}.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for path in sorted(directory.rglob("*")):
                archive.write(path, path.relative_to(directory))


if __name__ == "__main__":
    make("bart", bart, sharded=True)
    make("t5", partial(t5, activation="relu", use_gated_activation=False, tie_embedding_weights=True))
    gated = partial(t5, activation="gelu", use_gated_activation=True, tie_embedding_weights=False)
    make("t5_1.1", gated, bfloat16=True)
