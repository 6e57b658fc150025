"""A tiny BART in both libraries and a few text pairs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from s2s_ray import Seq2SeqLM


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only get in each other's way on models of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def task(tiny_bart_dir: Path) -> Seq2SeqLM:
    """A fresh tiny task, which the test may train."""
    return Seq2SeqLM.from_preset(tiny_bart_dir)


@pytest.fixture(scope="session")
def pairs(english_text: list[str]) -> dict[str, list[str]]:
    """48 pairs of ragged lengths: a paragraph and its first words."""
    texts = english_text[:48]
    return {"encoder_text": texts, "decoder_text": [" ".join(t.split()[: 2 + i % 5]) for i, t in enumerate(texts)]}
