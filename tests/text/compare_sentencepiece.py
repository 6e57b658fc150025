"""Compare our tokenizers of every family with `sentencepiece`, line by line, on real text in many scripts.

    python -m tests.text.compare_sentencepiece                       # the gettext catalogues of this machine
    python -m tests.text.compare_sentencepiece --lines 120000 a.txt b.txt      # and text files, one text a line

Trains a small model of each kind on a sample, writes it out as its family's files, and compares ids and decoded text.
Prints a table, then one JSON line. Ends with 1 if anything differs.
"""

import argparse
import gettext
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.text.family_presets import MODELS, make

CATALOGUES = Path("/usr/share/locale")
CHUNK = 5000


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


def lines_of(files: list[str], limit: int) -> tuple[list[str], int]:
    """(distinct texts, as evenly over the sources as they allow; the number of sources)."""
    sources: dict[str, set[str]] = {}
    for language, message in catalogue_lines():
        sources.setdefault(language, set()).add(message)
    for name in files:
        sources[name] = set(Path(name).read_text(encoding="utf-8").splitlines())
    rng = random.Random(0)
    queues = [rng.sample(sorted(texts), len(texts)) for texts in sources.values()]
    chosen: dict[str, None] = {}
    while len(chosen) < limit and any(queues):
        for queue in queues:
            if queue:
                chosen[queue.pop()] = None
    return [text for text in chosen if text][:limit], len(sources)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="text files, one text a line")
    parser.add_argument("--lines", type=int, default=100_000, help="how many lines to compare (default 100,000)")
    parser.add_argument("--vocab-size", type=int, default=8000, help="pieces of each trained model (default 8,000)")
    parser.add_argument("--families", default=",".join(MODELS), help="which of them (default all)")
    arguments = parser.parse_args()
    lines, sources = lines_of(arguments.files, arguments.lines)
    print(f"{len(lines)} lines of {sources} languages and files", flush=True)
    print(
        f"{'family':12} {'side':6} {'lines':>8} {'tokens':>9} {'ids equal':>9} {'text equal':>10} {'us/line':>8}",
        flush=True,
    )
    results = []
    with tempfile.TemporaryDirectory() as directory:
        for family in arguments.families.split(","):
            preset = make(Path(directory), family, lines[: len(lines) // 4], arguments.vocab_size)
            for side, tokenizer in enumerate(preset.sides()):
                ids_equal = text_equal = tokens = 0
                seconds = 0.0
                for start in range(0, len(lines), CHUNK):
                    texts = lines[start : start + CHUNK]
                    # Special tokens inside a text are the family's business; without them ours is sentencepiece's.
                    expected, decoded = preset.reference(side, texts)
                    began = time.process_time()
                    got = tokenizer.encode_batch(texts, add_special_tokens=False)
                    seconds += time.process_time() - began
                    ids_equal += sum(a == b for a, b in zip(got, expected, strict=True))
                    known = [[i for i in row if i != preset.unknown] for row in expected]
                    text_equal += sum(a == b for a, b in zip(tokenizer.decode_batch(known), decoded, strict=True))
                    tokens += sum(map(len, expected))
                result = {
                    "family": family,
                    "side": ("source", "target")[side],
                    "lines": len(lines),
                    "tokens": tokens,
                    "ids_equal": ids_equal,
                    "text_equal": text_equal,
                    "us_per_line": round(seconds / len(lines) * 1e6),
                }
                results.append(result)
                widths = (12, 6, 8, 9, 9, 10, 8)
                print(" ".join(f"{v:{w}}" for v, w in zip(result.values(), widths, strict=True)), flush=True)
    print(json.dumps({"sources": sources, "results": results}))
    return any(r["ids_equal"] != r["lines"] or r["text_equal"] != r["lines"] for r in results)


if __name__ == "__main__":
    sys.exit(main())
