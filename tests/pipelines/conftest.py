"""One Ray for all tests that run the pipeline in this process; starting one costs more than most runs."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "chaos"))  # for checker.py


@pytest.fixture(scope="session")
def local_ray(s3_server: str) -> Iterator[None]:
    """A local Ray with more logical CPUs than cores; it starts after `s3_server`, so workers find S3 too."""
    import ray

    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def translator(tiny_bart_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BART with language tokens, as the built-in translator has them."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    directory = tmp_path_factory.mktemp("presets") / "tiny_translator"
    shutil.copytree(tiny_bart_dir, directory)
    content = json.loads((directory / "tokenizer.json").read_text())
    config = json.loads((directory / "config.json").read_text())
    for language in ("de", "fr"):
        token = {"id": config["vocab_size"], "content": f">>{language}<<", "special": True, "normalized": False}
        content["added_tokens"].append(token | {"single_word": False, "lstrip": False, "rstrip": False})
        config["vocab_size"] += 1
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "config.json").write_text(json.dumps(config))
    languages = {"tokens": {"de": ">>de<<", "fr": ">>fr<<"}, "sources": ["en"]}
    (directory / "preprocessor.json").write_text(json.dumps({"languages": languages}))
    torch.manual_seed(0)
    BartForConditionalGeneration(BartConfig.from_pretrained(directory)).save_pretrained(directory)
    return directory
