"""Exactly-once, resumable batch generation and fine-tuning of encoder-decoder models on Ray.

Importing this package loads neither torch nor ray; each name below does so when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2s_ray.generation import samplers
    from s2s_ray.presets import PresetStore
    from s2s_ray.seq2seq_lm import GeneratedText, Seq2SeqLM
    from s2s_ray.text.preprocessor import Seq2SeqLMPreprocessor

__version__ = "0.1.0"
__all__ = ["GeneratedText", "PresetStore", "Seq2SeqLM", "Seq2SeqLMPreprocessor", "samplers"]

_HOMES = {
    "Seq2SeqLM": "s2s_ray.seq2seq_lm",
    "GeneratedText": "s2s_ray.seq2seq_lm",
    "Seq2SeqLMPreprocessor": "s2s_ray.text.preprocessor",
    "PresetStore": "s2s_ray.presets",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "samplers":
        return importlib.import_module("s2s_ray.generation.samplers")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
