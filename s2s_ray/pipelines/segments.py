"""Rows cut into the lines that the model reads, and the answers to a row's lines put together again.

A line is one request: a whole text, or with `--segment sentence` one of its sentences. No torch, no Ray.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from s2s_ray.errors import RowErrorReason
from s2s_ray.pipelines.settings import GenerateSettings
from s2s_ray.text.languages import Route
from s2s_ray.text.preprocessor import EncodedSource, Seq2SeqLMPreprocessor
from s2s_ray.text.segment import halve, segment

EMPTY = "empty"  # finish_reason of a line without text, for which the model is not needed
FINISH_REASONS = (EMPTY, "stop", "length")  # of a row: the last of these that one of its lines has
DONE_SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("num_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("truncated", pa.bool_()),
        ("score", pa.float32()),
        ("reason", pa.string()),
        ("message", pa.string()),
    ]
)


@dataclass(slots=True)
class Line:
    """`before + text + after` is the line's part of its row's text; `before` is None where rows are not cut.

    A text of bytes is one that the preprocessor has to judge.
    """

    row: int
    text: str | bytes | None
    before: str | None = None
    after: str | None = None
    source: EncodedSource = None  # type: ignore[assignment]  # filled in by `encode`


def lines_of(
    texts: Sequence[bytes | None],
    routes: Sequence[Route],
    languages: Sequence[str],
    preprocessor: Seq2SeqLMPreprocessor,
    settings: GenerateSettings,
) -> list[Line]:
    """The lines of these texts, encoded, in order; every text has one at least.

    languages: of the sources, for the rules of their sentences.
    """
    if settings.segment == "none":
        lines = [Line(row, text) for row, text in enumerate(texts)]
    else:
        sources = zip(texts, routes, languages, strict=True)
        lines = [
            line
            for row, (text, route, language) in enumerate(sources)
            for line in _cut(row, text, route, language, preprocessor.max_text_bytes)
        ]
    _encode(lines, routes, preprocessor, settings)
    while settings.on_long == "split" and any(map(_can_be_halved, lines)):
        lines = [part for line in lines for part in (_halves(line) if _can_be_halved(line) else (line,))]
        _encode([line for line in lines if line.source is None], routes, preprocessor, settings)
    return lines


def _cut(row: int, text: bytes | None, route: Route, language: str, max_bytes: int) -> Iterator[Line]:
    try:
        decoded = text.decode() if text is not None and len(text) <= max_bytes and not route.error else None
    except UnicodeError:
        decoded = None
    if decoded is None:
        yield Line(row, text)
        return
    parts = segment(decoded, language)
    if not parts.sentences:
        yield Line(row, "", decoded, "")
    for index, (sentence, gap) in enumerate(zip(parts.sentences, parts.gaps, strict=False)):
        after = parts.gaps[-1] if index == len(parts.sentences) - 1 else ""
        yield Line(row, sentence, gap, after)


def _encode(
    lines: Sequence[Line], routes: Sequence[Route], preprocessor: Seq2SeqLMPreprocessor, settings: GenerateSettings
) -> None:
    texts = [_on_one_line(line.text) if line.before is not None else line.text for line in lines]
    limit = settings.max_source_length
    sources = preprocessor.try_encode_sources(texts, limit, [routes[line.row] for line in lines])
    for line, source in zip(lines, sources, strict=True):
        line.source = source
        if source.error is None and line.text is not None and not line.text.strip():
            source.token_ids = []
        if source.truncated and settings.on_long == "error":
            source.error = RowErrorReason.TOO_LONG
            limit = limit or preprocessor.encoder_sequence_length
            source.message = f"{source.num_tokens_full} tokens; --max-source-length is {limit}"


def _on_one_line(text: str | bytes | None) -> str:
    """A sentence as models are trained on it: its line breaks are spaces."""
    assert isinstance(text, str)
    return " ".join(text.split())


def _can_be_halved(line: Line) -> bool:
    return line.source.truncated and line.before is not None and len(line.text or "") > 1


def _halves(line: Line) -> tuple[Line, Line]:
    assert isinstance(line.text, str)
    left, gap, right = halve(line.text)
    return Line(line.row, left, line.before, ""), Line(line.row, right, gap, line.after)


def numbered(lines: Iterable[Line]) -> list[int]:
    """The number of each line within its row."""
    numbers: list[int] = []
    previous = -1
    for line in lines:
        numbers.append(numbers[-1] + 1 if line.row == previous else 0)
        previous = line.row
    return numbers


def join(work: pa.Table, done: pa.Table) -> pa.Table:
    """One row for each row's lines (DONE_SCHEMA), which `work` lists as rows.py's WORK_SCHEMA says.

    Tokens and scores are summed; a row is truncated if a line is, and has the reason and message of its first line that
    has one.
    """
    before = work.column("before")
    if before.null_count == len(before):
        return done
    starts = row_starts(work)
    ends = np.append(starts[1:], work.num_rows)
    texts = _joined_texts(work, done, starts)
    ranks = [FINISH_REASONS.index(reason or EMPTY) for reason in done.column("finish_reason").to_pylist()]
    scores = done.column("score").to_numpy().astype(np.float64)
    scored = np.logical_or.reduceat(~np.isnan(scores), starts)
    totals = np.add.reduceat(np.nan_to_num(scores), starts)
    reasons, messages = _first_errors(done, starts, ends)
    columns = [
        texts,
        np.add.reduceat(done.column("num_tokens").to_numpy(), starts),
        [FINISH_REASONS[rank] for rank in np.maximum.reduceat(ranks, starts)],
        np.logical_or.reduceat(done.column("truncated").to_numpy(), starts),
        pa.array(totals.astype(np.float32), mask=~scored),
        reasons,
        messages,
    ]
    return pa.table(columns, schema=DONE_SCHEMA)


def row_starts(work: pa.Table) -> np.ndarray:
    """The position of each row's first line."""
    return np.flatnonzero(work.column("segment").to_numpy() == 0)


def _joined_texts(work: pa.Table, done: pa.Table, starts: np.ndarray) -> list[str]:
    parts = [
        f"{before}{text.strip()}{after}" if before is not None else text
        for before, text, after in zip(
            work.column("before").to_pylist(),
            done.column("text").to_pylist(),
            work.column("after").to_pylist(),
            strict=True,
        )
    ]
    ends = [*starts[1:].tolist(), len(parts)]
    return ["".join(parts[start:end]) for start, end in zip(starts.tolist(), ends, strict=True)]


def _first_errors(done: pa.Table, starts: np.ndarray, ends: np.ndarray) -> tuple[list[str | None], list[str | None]]:
    reasons: list[str | None] = [None] * len(starts)
    messages = list(reasons)
    given = done.column("reason")
    for line in reversed(np.flatnonzero(given.is_valid().to_numpy()).tolist()):
        row = int(np.searchsorted(starts, line, side="right")) - 1
        reasons[row], messages[row] = given[line].as_py(), done.column("message")[line].as_py()
        if ends[row] - starts[row] > 1:
            messages[row] = f"sentence {line - starts[row] + 1} of {ends[row] - starts[row]}: {messages[row]}"
    return reasons, messages
