"""Presets of every family that has a SentencePiece model, in the families' own layouts, with models trained here.

`reference` gives what `sentencepiece` says of a text, brought to the family's ids by the family's rule alone.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece

from s2s_ray.text.fairseq import M2M100_LANGUAGES
from s2s_ray.text.tokenizer import Tokenizer

T5_IDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
MODELS: dict[str, dict[str, Any]] = {  # how each kind of model is trained
    "t5": {"model_type": "unigram", **T5_IDS},
    "mt5": {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "nfkc", **T5_IDS},
    "madlad": {
        "model_type": "unigram",
        "normalization_rule_name": "identity",
        "user_defined_symbols": ["<2de>", "<2fr>", "http"],
        "byte_fallback": True,
    },
    "pegasus": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc_cf", **T5_IDS},
    "mbart": {"model_type": "unigram"},
    "nllb": {"model_type": "bpe"},
    "m2m100": {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False},
    "marian": {"model_type": "unigram", "normalization_rule_name": "nfkc"},
    "bpe_symbols": {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "user_defined_symbols": ["<2de>", "http", "in"],
        "add_dummy_prefix": False,
        **T5_IDS,
    },
}


@dataclass
class Preset:
    """A directory, and sentencepiece's processors with their pieces' ids in the family: source side, target side."""

    directory: Path
    processors: list[sentencepiece.SentencePieceProcessor]
    ids: list[dict[str, int]]
    unknown: int
    strips: bool = False
    _tokenizer: Tokenizer | None = field(default=None)

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_directory(self.directory)
        return self._tokenizer

    def sides(self) -> list[Tokenizer]:
        return [self.tokenizer, self.tokenizer.target][: len(self.processors)]

    def reference(self, side: int, texts: Sequence[str]) -> tuple[list[list[int]], list[str]]:
        """(ids without special tokens, the text those that are not unknown decode to)."""
        processor, ids = self.processors[side], self.ids[side]
        pieces = processor.encode(list(texts), out_type=str)
        rows = [[ids.get(piece, self.unknown) for piece in row] for row in pieces]
        known = [[piece for piece in row if ids.get(piece, self.unknown) != self.unknown] for row in pieces]
        texts = [processor.decode(row) for row in known]
        return rows, [text.strip() if self.strips else text for text in texts]


def train(directory: Path, kind: str, texts: Sequence[str], vocab_size: int) -> bytes:
    """The bytes of a model of one of `MODELS`."""
    directory.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.replace("\n", " ") for text in texts),
        model_prefix=str(directory / f"trained_{kind}"),
        vocab_size=vocab_size,
        character_coverage=0.995,
        hard_vocab_limit=False,
        num_threads=2,
        minloglevel=2,
        **MODELS[kind],
    )
    return (directory / f"trained_{kind}.model").read_bytes()


def make(root: Path, family: str, texts: Sequence[str], vocab_size: int) -> Preset:
    """A preset of one family; for Marian, source and target models are trained on halves of the texts."""
    directory, models = root / family, [train(root / "trained", family, texts, vocab_size)]
    directory.mkdir(parents=True)
    if family == "marian":
        models = [train(root / "trained", family, half, vocab_size) for half in (texts[::2], texts[1::2])]
    processors = [sentencepiece.SentencePieceProcessor(model_proto=model) for model in models]
    lists = [[p.id_to_piece(i) for i in range(p.get_piece_size())] for p in processors]
    pieces, size = lists[0], len(lists[0])
    config: dict[str, Any] = {"model_type": "t5", "decoder_start_token_id": 0}
    settings: dict[str, Any] = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    ids = [{piece: i for i, piece in enumerate(pieces)}]
    unknown, strips = processors[0].unk_id(), False
    if family in ("t5", "mt5", "madlad", "bpe_symbols"):
        (directory / "spiece.model").write_bytes(models[0])
        settings |= {"tokenizer_class": "T5Tokenizer", "extra_ids": 100 if family == "t5" else 0}
        if family == "madlad":
            settings["pad_token"] = "<s>"
    elif family == "pegasus":
        config["model_type"] = "pegasus"
        settings["tokenizer_class"] = "PegasusTokenizer"
        (directory / "spiece.model").write_bytes(models[0])
        ids, unknown = [{piece: i + 103 for i, piece in enumerate(pieces)}], 105
    elif family in ("mbart", "nllb"):
        config["model_type"] = "mbart" if family == "mbart" else "m2m_100"
        settings["tokenizer_class"] = "MBart50Tokenizer" if family == "mbart" else "NllbTokenizer"
        (directory / "sentencepiece.bpe.model").write_bytes(models[0])
        ids, unknown = [{piece: i + 1 for i, piece in enumerate(pieces) if i >= 3}], 3
    elif family == "m2m100":
        config["model_type"] = "m2m_100"
        settings["tokenizer_class"] = "M2M100Tokenizer"
        (directory / "sentencepiece.bpe.model").write_bytes(models[0])
        vocabulary = _shuffled(["<s>", "<pad>", "</s>", "<unk>"], pieces)
        settings["additional_special_tokens"] = [f"__{code}__" for code in M2M100_LANGUAGES]
        (directory / "vocab.json").write_text(json.dumps(vocabulary))
        ids, unknown, strips = [vocabulary], 3, True
    else:
        config["model_type"] = "marian"
        settings["tokenizer_class"] = "MarianTokenizer"
        for side, model in zip(("source", "target"), models, strict=True):
            (directory / f"{side}.spm").write_bytes(model)
        # As in Opus-MT some pieces of the models have no place in the vocabulary, which both sides share.
        shared = [piece for n, piece in enumerate(sorted({*lists[0], *lists[1]})) if n % 50]
        vocabulary = _shuffled(["</s>", "<unk>"], [*shared, ">>deu<<", ">>fra<<"])
        vocabulary["<pad>"] = len(vocabulary)
        (directory / "vocab.json").write_text(json.dumps(vocabulary))
        ids, unknown, strips = [vocabulary, vocabulary], 1, True
    assert size > 300, "a model that was trained"
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return Preset(directory, processors, ids, unknown, strips)


def _shuffled(first: list[str], pieces: Sequence[str]) -> dict[str, int]:
    rest = [piece for piece in pieces if piece not in first]
    random.Random(0).shuffle(rest)
    return {token: i for i, token in enumerate([*first, *rest])}
