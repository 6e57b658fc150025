"""The forms in which texts and languages may come to a preprocessor."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s2s_ray.errors import InputError, SettingsError

LANGUAGE_KEYS = ("source_lang", "target_lang")
Lang = str | Sequence[str | None] | None  # one language for all rows, or one per row


def read_texts(x: Mapping[str, Any], need_decoder: bool = False) -> tuple[list[Any], list[Any], bool]:
    """(encoder texts, decoder texts, whether they came as a batch)."""
    needed = {"encoder_text", "decoder_text"} if need_decoder else {"encoder_text"}
    if not needed <= set(x) <= {"encoder_text", "decoder_text", *LANGUAGE_KEYS}:
        raise InputError(f"x must have the keys {', '.join(sorted(needed))}. Received: {', '.join(map(str, x))}")
    sources, batched = as_list(x["encoder_text"])
    targets, _ = as_list(x["decoder_text"]) if x.get("decoder_text") is not None else ([""] * len(sources), batched)
    if len(sources) != len(targets):
        raise InputError(f"encoder_text and decoder_text must pair up. Received: {len(sources)} and {len(targets)}")
    return sources, targets, batched


def languages(x: Mapping[str, Any]) -> dict[str, Any]:
    """The language arguments in `x`: strings as they are, columns as lists."""
    given = {name: x.get(name) for name in LANGUAGE_KEYS}
    return {name: as_list(value)[0] if is_column(value) else value for name, value in given.items()}


def is_column(lang: Any) -> bool:
    return lang is not None and not isinstance(lang, str)


def language_pairs(rows: int, source_lang: Lang, target_lang: Lang) -> list[tuple[str | None, str | None]]:
    """(source, target) of each row."""
    columns = []
    for name, value in (("source_lang", source_lang), ("target_lang", target_lang)):
        column = [value] * rows if value is None or isinstance(value, str) else list(value)
        if len(column) != rows:
            raise SettingsError(f"{name} must have one value per row. Received: {len(column)} for {rows} rows")
        columns.append(column)
    return list(zip(*columns, strict=True))


def as_list(texts: Any) -> tuple[list[Any], bool]:
    """Lists, tuples, iterators, numpy and pandas (tolist) and Arrow (to_pylist) columns; a lone string is no batch."""
    if texts is None or isinstance(texts, (str, bytes)):
        return [texts], False
    for method in ("to_pylist", "tolist"):
        if hasattr(texts, method):
            values = getattr(texts, method)()
            return (values, True) if isinstance(values, list) else ([values], False)
    return list(texts), True


def to_array(value: Any) -> NDArray[Any]:
    return np.asarray(value.cpu() if hasattr(value, "cpu") else value)
