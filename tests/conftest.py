"""Shared fixtures: real files, a real S3 server on a loopback port, tiny models written by transformers."""

import json
import os
import pydoc_data.topics
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: tests share their cores with Ray's processes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the long fault tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="long: needs --full"))


@pytest.fixture(scope="session")
def english_text() -> list[str]:
    """Real English prose, 40 to 400 characters a paragraph: the language reference that ships inside Python."""
    paragraphs = (p for topic in pydoc_data.topics.topics.values() for p in topic.split("\n\n"))
    cleaned = (" ".join(p.split()) for p in paragraphs)
    return [p for p in cleaned if 40 <= len(p) <= 400]


@pytest.fixture(scope="session")
def trained_bpe(english_text: list[str]) -> dict[str, Any]:
    """A byte-level BPE trained on `english_text` (BART's special ids): {"vocab": {token: id}, "merges": [[a, b]]}."""
    from tokenizers import ByteLevelBPETokenizer

    trainer = ByteLevelBPETokenizer()
    special_tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer.train_from_iterator(english_text, vocab_size=600, special_tokens=special_tokens, show_progress=False)
    model = json.loads(trainer._tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": model["merges"]}


@pytest.fixture(scope="session")
def tiny_bart_dir(tmp_path_factory: pytest.TempPathFactory, trained_bpe: dict[str, Any]) -> Path:
    """A Hugging Face directory: a random 2+2 layer BART (d 32, 128 positions) and its tokenizer. Do not write to it.

    The weights are drawn wider than BART's default, so that different inputs give different outputs.
    """
    import torch
    from transformers import BartConfig, BartForConditionalGeneration, BartTokenizerFast

    directory = tmp_path_factory.mktemp("presets") / "tiny_bart"
    merges = [tuple(pair) for pair in trained_bpe["merges"]]
    BartTokenizerFast(vocab=trained_bpe["vocab"], merges=merges).save_pretrained(directory)
    config = BartConfig(
        vocab_size=len(trained_bpe["vocab"]),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=128,
        init_std=0.2,
    )
    torch.manual_seed(0)
    BartForConditionalGeneration(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A moto S3 server on a loopback port, found through the AWS variables; yields the URL of an empty bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        boto3.client("s3").create_bucket(Bucket=bucket)
        yield f"s3://{bucket}"
    server.stop()
