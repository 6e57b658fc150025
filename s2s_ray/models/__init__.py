"""Model families, one module each, named after Hugging Face's `model_type`. Nothing is registered: the file is the
entry.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from s2s_ray.errors import UnsupportedModelError

if TYPE_CHECKING:
    from s2s_ray.seq2seq_lm import Seq2SeqLM

_SHARED = {"backbone", "bart_like", "config", "loading"}


def families() -> list[str]:
    """The model types that can be loaded, sorted."""
    return sorted(name for _, name, _ in pkgutil.iter_modules(__path__) if name not in _SHARED)


def task_class(model_type: Any) -> "type[Seq2SeqLM]":
    """The Seq2SeqLM subclass of a `model_type`. Raises UnsupportedModelError, listing the known ones."""
    if model_type not in families():
        raise UnsupportedModelError(
            f"config.json: model_type must be one of {', '.join(families())}. Received: {model_type!r}"
        )
    module = importlib.import_module(f"{__name__}.{model_type}")
    return next(
        member
        for member in vars(module).values()
        if isinstance(member, type) and member.__module__ == module.__name__ and hasattr(member, "backbone_cls")
    )
