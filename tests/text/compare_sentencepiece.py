"""Compare our tokenizers of every family with `sentencepiece`, line by line, on real text in many scripts.

    python -m tests.text.compare_sentencepiece                  # the samples, and this machine's gettext catalogues
    python -m tests.text.compare_sentencepiece --lines 105000 a.txt b.parquet      # and files: a text a line or cell

A Debian image without locales has no catalogues. `python tools/builtin_preset/translation_data.py` fetches text in four
languages, `.data/translation/*.parquet`; any text file does. Trains a small model of each kind on a sample of the
lines, writes it out as its family's files, and compares ids and decoded text with `sentencepiece`. Prints a table by
family, one by script, then one JSON line. Ends with 1 if anything differs.

A text with `<pad>` or another special token of a family in it is left out there, and counted: sentencepiece takes it as
plain text, the family's tokenizer in transformers as the token (tests/text/test_families.py).
"""

import argparse
import functools
import gettext
import json
import random
import re
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from s2s_ray.text.tokenizer import Tokenizer
from tests.text.family_presets import MODELS, Preset, make

CATALOGUES = Path("/usr/share/locale")
SAMPLES = Path(__file__).parents[2] / "s2s_ray" / "samples"
CHUNK = 5000


@dataclass
class Result:
    """Counts of one tokenizer: how many lines have sentencepiece's ids, and decode to its text."""

    family: str
    side: str
    lines: int = 0
    tokens: int = 0
    ids_equal: int = 0
    text_equal: int = 0
    special: int = 0  # lines left out
    seconds: float = 0.0
    differing: Counter[str] = field(default_factory=Counter)  # lines by script

    def __str__(self) -> str:
        microseconds = round(self.seconds / self.lines * 1e6)
        counts = (
            f"{self.lines:8} {self.special:7} {self.tokens:9} {self.ids_equal:9} {self.text_equal:10} {microseconds:8}"
        )
        return f"{self.family:12} {self.side:6} {counts}"


def catalogue_lines() -> Iterator[tuple[str, str]]:
    """(language, message) of every gettext catalogue."""
    for path in sorted(CATALOGUES.glob("*/LC_MESSAGES/*.mo")):
        try:
            with path.open("rb") as file:
                catalogue = gettext.GNUTranslations(file)
        except (OSError, ValueError, LookupError):  # a few catalogues are malformed
            continue
        messages = catalogue._catalog  # type: ignore[attr-defined]
        yield from ((path.parts[-3], message) for message in messages.values() if isinstance(message, str))


def texts_of(path: Path) -> set[str]:
    """The cells of a Parquet file's string columns, or the lines of a text file."""
    if path.suffix != ".parquet":
        return set(path.read_text(encoding="utf-8").splitlines())
    columns = [column for column in pq.read_table(path).columns if pa.types.is_string(column.type)]
    return {text for column in columns for text in column.to_pylist() if text}


def lines_of(files: Sequence[Path], limit: int) -> tuple[list[str], int]:
    """(distinct texts, as evenly over the sources as they allow; the number of sources)."""
    sources: dict[str, set[str]] = {}
    for language, message in catalogue_lines():
        sources.setdefault(language, set()).add(message)
    for path in files:
        sources[str(path)] = texts_of(path)
    rng = random.Random(0)
    queues = [rng.sample(sorted(texts), len(texts)) for texts in sources.values()]
    chosen: dict[str, None] = {}
    while len(chosen) < limit and any(queues):
        for queue in queues:
            if queue:
                chosen[queue.pop()] = None
    return [text for text in chosen if text][:limit], len(sources)


def script(text: str) -> str:
    """The script of most of a text's letters, as Unicode names them."""
    return (
        Counter(map(_script_of, filter(str.isalpha, text))).most_common(1)[0][0] if any(map(str.isalpha, text)) else "-"
    )


@functools.cache
def _script_of(letter: str) -> str:
    return unicodedata.name(letter, "OTHER").split()[0].split("-")[0]


def compare(preset: Preset, side: int, tokenizer: Tokenizer, lines: Sequence[str], result: Result) -> None:
    """Count into `result`."""
    special = re.compile("|".join(re.escape(tokenizer.id_to_token(i)) for i in tokenizer.special_token_ids))
    for start in range(0, len(lines), CHUNK):
        texts = [text for text in lines[start : start + CHUNK] if not special.search(text)]
        expected, decoded = preset.reference(side, texts)
        began = time.process_time()
        ids = tokenizer.encode_batch(texts, add_special_tokens=False)
        result.seconds += time.process_time() - began
        known = [[i for i in row if i != preset.unknown] for row in expected]
        same_ids = [a == b for a, b in zip(ids, expected, strict=True)]
        same_text = [a == b for a, b in zip(tokenizer.decode_batch(known), decoded, strict=True)]
        result.lines += len(texts)
        result.special += min(CHUNK, len(lines) - start) - len(texts)
        result.tokens += sum(map(len, expected))
        result.ids_equal += sum(same_ids)
        result.text_equal += sum(same_text)
        both = zip(texts, same_ids, same_text, strict=True)
        differing = [text for text, *same in both if not all(same)]
        result.differing.update(map(script, differing))
        for text in differing[:3]:
            print(f"differs: {text!r}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="text files, one text a line, and Parquet files")
    parser.add_argument("--lines", type=int, default=100_000, help="how many lines to compare (default 100,000)")
    parser.add_argument("--vocab-size", type=int, default=8000, help="pieces of each trained model (default 8,000)")
    parser.add_argument("--families", default=",".join(MODELS), help="which of them (default all)")
    arguments = parser.parse_args()
    lines, sources = lines_of([*sorted(SAMPLES.glob("*/*.parquet")), *arguments.files], arguments.lines)
    print(f"{len(lines)} lines of {sources} languages and files")
    if len(lines) < arguments.lines:
        print(f"These are fewer than {arguments.lines}: give files with more text (--help says where there is some)")
    columns = f"{'lines':>8} {'special':>7} {'tokens':>9} {'ids equal':>9} {'text equal':>10} {'us/line':>8}"
    print(f"{'family':12} {'side':6} {columns}", flush=True)
    results = []
    with tempfile.TemporaryDirectory() as directory:
        for family in arguments.families.split(","):
            preset = make(Path(directory), family, lines[: len(lines) // 4], arguments.vocab_size)
            for side, tokenizer in enumerate(preset.sides()):
                results.append(Result(family, ("source", "target")[side]))
                compare(preset, side, tokenizer, lines, results[-1])
                print(results[-1], flush=True)
    scripts, differing = Counter(map(script, lines)), sum((r.differing for r in results), Counter[str]())
    print(f"\n{'script':12} {'lines':>8} {'compared':>9} {'differing':>9}")
    for name, count in scripts.most_common():
        print(f"{name:12} {count:8} {count * len(results):9} {differing[name]:9}")
    print(json.dumps({"sources": sources, "scripts": scripts, "results": [asdict(r) for r in results]}))
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
