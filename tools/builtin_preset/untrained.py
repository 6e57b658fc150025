"""A built-in preset before training: a tokenizer made from the training split, its shape, and random weights.

    python tools/builtin_preset/untrained.py summarizer --output .data/untrained_summarizer
    python tools/builtin_preset/untrained.py translator --output .data/untrained_translator

docs/fine-tuning.md has the commands that train both from here, with jobs/finetune.py.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from s2s_ray import Seq2SeqLM

SPECIAL_TOKENS = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}  # ids 0 to 4
LANGUAGES = ("de", "fr", "es")
SUMMARIZER: dict[str, Any] = {
    "vocab_size": 8192,
    "encoder_layers": 4,
    "encoder_ffn_dim": 1024,
    "max_position_embeddings": 512,
}
TRANSLATOR: dict[str, Any] = {  # a sentence rarely has more than 80 tokens
    "vocab_size": 9216,
    "encoder_layers": 6,
    "encoder_ffn_dim": 512,
    "max_position_embeddings": 256,
}


def train_tokenizer(texts: Sequence[str], size: int, positions: int, more: Sequence[str], directory: Path) -> None:
    """A byte-level BPE with BART's special tokens and template, as tokenizer.json and tokenizer_config.json.

    `more` are special tokens of the model's own, from id 5 on.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*SPECIAL_TOKENS.values(), *more],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {**SPECIAL_TOKENS, "cls": "<s>", "sep": "</s>"}
    config: dict[str, Any] = {f"{role}_token": token for role, token in names.items()}
    config |= {"tokenizer_class": "BartTokenizer", "model_max_length": positions, "add_prefix_space": False}
    if more:
        config["additional_special_tokens"] = list(more)
    _write(directory / "tokenizer_config.json", config)


def write_configs(shape: Mapping[str, Any], target_length: int, generation: Mapping[str, Any], directory: Path) -> None:
    """config.json, generation_config.json and preprocessor.json of a BART of this shape; lengths in tokens."""
    ids = {
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }
    config = {
        "architectures": ["BartForConditionalGeneration"],
        "model_type": "bart",
        "is_encoder_decoder": True,
        "d_model": 256,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 1024,
        "activation_function": "gelu",
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "init_std": 0.05,  # with BART's 0.02 a model this narrow took long to learn to copy
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        **shape,
        **ids,
    }
    lengths = {
        "encoder_sequence_length": shape["max_position_embeddings"],
        "decoder_sequence_length": target_length,
        "decoder_start_token_id": 2,
    }
    _write(directory / "config.json", config)
    _write(directory / "generation_config.json", {**ids, **generation})
    _write(directory / "preprocessor.json", lengths)


def summarizer(data: Path, directory: Path) -> Seq2SeqLM:
    table = pq.read_table(data, columns=["description", "reference"])
    texts = table.column("description").to_pylist() + 3 * table.column("reference").to_pylist()
    positions = SUMMARIZER["max_position_embeddings"]
    train_tokenizer(texts, SUMMARIZER["vocab_size"], positions, (), directory)
    beams = {"num_beams": 4, "max_length": 40, "no_repeat_ngram_size": 3, "early_stopping": True}
    write_configs(SUMMARIZER, 64, beams, directory)
    return Seq2SeqLM.from_preset(directory, load_weights=False)


def translator(data: Path, directory: Path) -> Seq2SeqLM:
    """English to German unless told otherwise; the target language is a token before the source."""
    table = pq.read_table(data, columns=["source", "target"])
    texts = pc.unique(table.column("source")).to_pylist() + table.column("target").to_pylist()
    positions = TRANSLATOR["max_position_embeddings"]
    tokens = [f">>{language}<<" for language in LANGUAGES]
    train_tokenizer(texts, TRANSLATOR["vocab_size"], positions, tokens, directory)
    beams = {"num_beams": 4, "max_length": positions, "early_stopping": True}
    write_configs(TRANSLATOR, positions, beams, directory)
    task = Seq2SeqLM.from_preset(directory, load_weights=False)
    assert task.preprocessor is not None and task.preprocessor.languages is not None
    task.preprocessor.languages.sources = ["en"]
    task.preprocessor.source_lang, task.preprocessor.target_lang = "en", "de"
    return task


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


PRESETS = {
    "summarizer": (summarizer, Path(".data/descriptions/train.parquet")),
    "translator": (translator, Path(".data/translation/train.parquet")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--data", type=Path, help="the training split, as the script of the data writes it")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make, data = PRESETS[args.preset]
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as directory:
        task = make(args.data or data, Path(directory))
        task.save_to_preset(args.output)
    print(f"{args.output}: {sum(p.numel() for p in task.backbone.parameters())} parameters")


if __name__ == "__main__":
    main()
