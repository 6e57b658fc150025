"""Debian's translated package descriptions as translation pairs, English to German, French and Spanish.

    python tools/builtin_preset/translation_data.py     # -> .data/translation/{train,validation,test,documents}.parquet

Needs what data.py needs, and about 120 MB of downloads. A translation is matched to the English text by
Description-md5, and a description is on the side where data.py's split for the summariser puts it: the test split is
again the sample that ships. Pairs are the synopsis, each paragraph, and each sentence of a paragraph, where both
languages have equally many; training has messages of programs' gettext catalogues besides.
"""

import argparse
import io
import itertools
import json
import re
import struct
import subprocess
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import data
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from data import Pair

from s2s_ray.text.segment import LETTER, segment

LANGUAGES = ("de", "fr", "es")
# Programs with long messages in all three languages; from the first suite.
CATALOGUES = [
    "aptitude-common",
    "bash",
    "binutils-common",
    "coreutils",
    "evolution-common",
    "gimp-data",
    "git",
    "gnome-control-center-data",
    "gnucash-common",
    "gnupg-l10n",
    "libc-l10n",
    "nautilus-data",
    "util-linux-locales",
]
SHORTEST_MESSAGE = 3  # words
SAMPLE_ROWS = 200
MNEMONIC = re.compile(r"(?<!\w)[_&~]\w|\w[_&~](?!\w)|<[^>]+>|\x04|\\[nt]")  # of menus; and markup


class Row(NamedTuple):
    language: str
    source: str
    target: str
    kind: str  # synopsis, sentence, paragraph or message
    package: str


class Document(NamedTuple):
    """One description in English, with all its translations."""

    pair: Pair
    translations: dict[str, tuple[str, str]]  # language -> (synopsis, description)


def read_documents(suites: Iterable[str], folder: Path) -> dict[str, list[Document]]:
    """The translated descriptions per split. The newest suite named last wins where a translation was changed."""
    pairs = data.read_pairs(suites, folder, ("en", *LANGUAGES))
    splits = data.split(pairs, data.group_near_duplicates(pairs))
    side = {(p.description, p.reference): (name, p) for name, rows in splits.items() for p in rows}
    texts: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    english: dict[str, tuple[str, str]] = {}
    for suite in suites:
        for language, path in data.fetch(suite, folder, ("en", *LANGUAGES))[1].items():
            for fields in data.stanzas(path):
                synopsis, _, extended = fields.get(f"Description-{language}", "").partition("\n")
                text = (" ".join(synopsis.split()), data.readable(extended))
                if all(text):
                    (english if language == "en" else texts[language])[fields["Description-md5"]] = text
    documents: dict[tuple[str, str], Document] = {}
    for md5, (synopsis, description) in sorted(english.items()):
        name, pair = side.get((description, synopsis), ("", None))
        translations = {language: texts[language][md5] for language in LANGUAGES if md5 in texts[language]}
        if pair is not None and translations:
            known = documents.setdefault((name, pair.md5), Document(pair, {}))
            known.translations.update(translations)
    result: dict[str, list[Document]] = {name: [] for name in splits}
    for (name, _), document in sorted(documents.items()):
        result[name].append(document)
    return result


def aligned(source: str, target: str, language: str) -> Iterator[tuple[str, str, str]]:
    """(kind, source, target) of a description's paragraphs and their sentences, where they are equally many."""
    paragraphs = [text.split("\n\n") for text in (source, target)]
    if len(paragraphs[0]) != len(paragraphs[1]):
        return
    for english, translated in zip(*paragraphs, strict=True):
        lines = [text.split("\n") for text in (english, translated)]
        if len(lines[0]) != len(lines[1]):
            continue
        for one, other in zip(*lines, strict=True):
            ours, theirs = segment(one), segment(other, language)
            if len(ours.sentences) == len(theirs.sentences):
                yield from (("sentence", *both) for both in zip(ours.sentences, theirs.sentences, strict=True))
            if len(ours.sentences) > 1 and ours.gaps[0] == theirs.gaps[0] == "":
                yield "paragraph", one, other


def rows_of(documents: Iterable[Document]) -> Iterator[Row]:
    for document in documents:
        pair = document.pair
        for language, (synopsis, description) in document.translations.items():
            found = [("synopsis", pair.reference, synopsis), *aligned(pair.description, description, language)]
            for kind, source, target in found:
                yield Row(language, " ".join(source.split()), " ".join(target.split()), kind, pair.package)


def plausible(row: Row) -> bool:
    """Not a leftover of an unfinished translation, and not two texts that only stand at the same place."""
    if row.source == row.target and len(row.source.split()) > 2:
        return False
    ratio = (len(row.target) + 10) / (len(row.source) + 10)
    return bool(LETTER.search(row.source) and LETTER.search(row.target)) and 0.5 < ratio < 2.2


def fetch_messages(suite: str, folder: Path) -> Iterator[Row]:
    """The messages of CATALOGUES: `apt-get download`, and the .mo files inside; nothing is installed."""
    packages = folder / "packages"
    packages.mkdir(exist_ok=True)
    state = {
        "Dir::State::lists": folder / "lists" / suite,
        "Dir::Etc::SourceList": folder / f"{suite}.list",
        "Dir::Etc::SourceParts": "-",
        "APT::Sandbox::User": "root",
        "APT::Architectures": "amd64",
    }
    options = [f"-o{k}={v.resolve() if isinstance(v, Path) else v}" for k, v in state.items()]
    subprocess.run(["apt-get", "download", "-q", *options, *CATALOGUES], check=True, cwd=packages)
    for archive in sorted(packages.glob("*.deb")):
        listing = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], check=True, stdout=subprocess.PIPE)
        with tarfile.open(fileobj=io.BytesIO(listing.stdout)) as members:
            for member in members:
                parts = Path(member.name).parts
                if member.isfile() and member.name.endswith(".mo") and len(parts) > 3 and parts[-3] in LANGUAGES:
                    content = members.extractfile(member)
                    assert content is not None
                    yield from messages(content.read(), parts[-3], archive.name.partition("_")[0])


def messages(catalogue: bytes, language: str, package: str) -> Iterator[Row]:
    """The translated messages of a .mo file (GNU gettext's manual, 10.3) that read as text."""
    magic, _, count, originals, translations = struct.unpack("<5I", catalogue[:20])
    assert magic == 0x950412DE, "a little-endian .mo file"
    for index in range(1, count):  # the first is the header
        texts = []
        for table in (originals, translations):
            length, start = struct.unpack_from("<2I", catalogue, table + 8 * index)
            texts.append(" ".join(catalogue[start : start + length].partition(b"\0")[0].decode().split()))
        words = [word for word in texts[0].split() if word.isalpha()]
        if len(words) >= SHORTEST_MESSAGE and len(texts[0]) < 600 and not any(MNEMONIC.search(t) for t in texts):
            yield Row(language, texts[0], texts[1], "message", package)


def normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def one_target(rows: Iterable[Row]) -> list[Row]:
    """One row per language and source, with the target that occurs most often."""
    targets: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    first: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if plausible(row):
            targets[row.language, row.source][row.target] += 1
            first.setdefault(row[:3], row)
    return [first[(*key, counts.most_common(1)[0][0])] for key, counts in targets.items()]


def to_table(rows: list[Row]) -> pa.Table:
    return pa.table({name: pa.array([getattr(row, name) for row in rows], pa.string()) for name in Row._fields})


def documents_table(documents: list[Document]) -> pa.Table:
    """Whole descriptions with a column per language, null where there is no translation."""
    ordered = sorted(documents, key=lambda d: (d.pair.package, d.pair.md5))
    columns: dict[str, list[str | None]] = {
        "package": [d.pair.package for d in ordered],
        "description": [d.pair.description for d in ordered],
    }
    for language in LANGUAGES:
        columns[language] = [d.translations[language][1] if language in d.translations else None for d in ordered]
    return pa.table(columns, schema=pa.schema([(name, pa.string()) for name in columns]))


def write_sample(documents: pa.Table, folder: Path) -> None:
    """The sample that ships: SAMPLE_ROWS test descriptions with a German translation, those in all languages first."""
    translated = documents.filter(documents.column("de").is_valid())
    order = np.argsort([sum(row[name] is None for name in LANGUAGES) for row in translated.to_pylist()], kind="stable")
    table = translated.take(np.sort(order[:SAMPLE_ROWS]))
    folder.mkdir(parents=True, exist_ok=True)
    cuts = [0, SAMPLE_ROWS // 2, SAMPLE_ROWS // 2 + 7, len(table)]
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        part = table.slice(start, stop - start)
        pq.write_table(part, folder / f"part-{number:05d}.parquet", compression="zstd", compression_level=19)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", default=list(data.SUITES))
    parser.add_argument("--output", type=Path, default=Path(".data/translation"))
    parser.add_argument("--sample", type=Path, help="also write the sample that ships, into this folder")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    documents = read_documents(args.suites, args.output)
    splits = {name: one_target(rows_of(part)) for name, part in documents.items()}
    held_out = {normalised(row.source) for name in ("test", "validation") for row in splits[name]}
    extra = one_target(fetch_messages(args.suites[0], args.output))
    splits["train"] += [row for row in extra if normalised(row.source) not in held_out]
    known = {normalised(row.source) for row in splits["train"]}
    report: dict[str, object] = {}
    for name, rows in splits.items():
        if name != "train":  # sentences that every second description has are learned by heart: they test nothing
            rows = [row for row in rows if normalised(row.source) not in known]
        pq.write_table(to_table(rows), args.output / f"{name}.parquet", compression="zstd")
        report[name] = dict(sorted(Counter(f"{row.language} {row.kind}" for row in rows).items()))
        report[f"{name} descriptions"] = Counter(k for d in documents[name] for k in d.translations)
    whole = documents_table(documents["test"])
    pq.write_table(whole, args.output / "documents.parquet", compression="zstd")
    if args.sample:
        write_sample(whole, args.sample)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
