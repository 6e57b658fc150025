"""Debian package descriptions as summarisation pairs: the long description in, the maintainer's one-line synopsis out.

    python tools/builtin_preset/data.py                    # -> .data/descriptions/{train,validation,test}.parquet
    python tools/builtin_preset/data.py --suites bookworm  # one release only

Needs a Debian or Ubuntu machine (apt-get, apt-helper, the Debian archive keyring) and about 60 MB of
downloads; no root.
The files of one download always give the same splits: every decision below is a function of the text itself.
"""

import argparse
import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MIRROR = "http://deb.debian.org/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
SUITES = ("bookworm", "trixie", "bullseye")  # the first one a description occurs in counts as its origin
HELD_OUT_ROWS = {"test": 2500, "validation": 2300}
NUM_HASHES, BANDS, SHINGLE_WORDS = 64, 16, 4  # 16 bands of 4 rows: pairs above a Jaccard of about 0.5 meet
OPENING_CHARACTERS = 100
# A text opening or a band shared by more sources than this is a template (Haskell, R, GNOME ...), not a near-duplicate.
TEMPLATE_SOURCES = 40

BULLET = re.compile(r"^(?:[-*+o•·]|\d{1,2}[.)])\s+")
NAME_PARTS = re.compile(
    r"^(?:lib|python3?-|golang-|node-|ruby-|r-cran-|r-bioc-|elpa-|php-)"
    r"|-(?:dev|dbg|docs?|common|data|bin|utils|tools|perl|java|gir\S*|el|examples|tests?|static|cil|ocaml|source)$"
)


@dataclass(slots=True)
class Pair:
    """One package's description. `source` is the Debian source package it is built from."""

    package: str
    source: str
    description: str
    reference: str
    md5: str
    suite: str


def fetch(suite: str, folder: Path, languages: Sequence[str] = ("en",)) -> tuple[Path, dict[str, Path]]:
    """Download one suite's package index and descriptions; returns the index and a text file per language."""
    lists = folder / "lists" / suite
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    sources = folder / f"{suite}.list"
    sources.write_text(f"deb [signed-by={KEYRING} arch=amd64] {MIRROR} {suite} main\n")
    options = {
        "Dir::State::lists": lists.resolve(),
        "Dir::Etc::SourceList": sources.resolve(),
        "Dir::Etc::SourceParts": "-",
        "Acquire::Languages": ",".join(languages),
        "APT::Sandbox::User": "root",
        "APT::Architectures": "amd64",
    }
    subprocess.run(["apt-get", "update", "-q", *(f"-o{k}={v}" for k, v in options.items())], check=True)
    translations = {language: _unpack(lists, f"*_i18n_Translation-{language}*") for language in languages}
    return _unpack(lists, "*_binary-amd64_Packages*"), translations


def _unpack(lists: Path, pattern: str) -> Path:
    """apt keeps its lists as .lz4 on some machines and as plain text on others; apt-helper reads both."""
    found = [p for p in sorted(lists.glob(pattern)) if p.suffix != ".txt"]
    if len(found) != 1:
        sys.exit(f"expected one file {pattern} in {lists}, found {len(found)}; delete the folder and try again")
    files = subprocess.run(["dpkg", "-L", "apt"], check=True, capture_output=True, text=True).stdout.split()
    helper = next(f for f in files if f.endswith("/apt-helper"))
    target = lists / (found[0].name + ".txt")
    with target.open("wb") as out:
        subprocess.run([helper, "cat-file", str(found[0])], check=True, stdout=out)
    return target


def stanzas(path: Path) -> Iterator[dict[str, str]]:
    """Deb822 paragraphs as dictionaries; continuation lines keep their indentation."""
    fields: dict[str, str] = {}
    key = ""
    for line in path.read_text(encoding="utf-8", errors="strict").split("\n"):
        if not line.strip(" \t"):  # a line with only a no-break space, as French translators write, separates nothing
            if fields:
                yield fields
            fields, key = {}, ""
        elif line[0] in " \t":
            fields[key] += "\n" + line
        else:
            key, _, value = line.partition(":")
            fields[key] = value.strip()
    if fields:
        yield fields


def readable(extended: str) -> str:
    """The extended description as a person reads it (Debian policy 5.6.13).

    One space of indent is running text, its lines are joined; more is a verbatim line, kept, unless it continues a
    bullet; " ." separates paragraphs.
    """
    paragraphs: list[list[str]] = [[]]
    bullet_indent: int | None = None
    flowing = False
    for raw in extended.split("\n"):
        line = raw[1:].expandtabs().rstrip()
        text = line.strip()
        if text in ("", "."):
            paragraphs.append([])
            bullet_indent, flowing = None, False
            continue
        indent = len(line) - len(line.lstrip())
        is_bullet = bool(BULLET.match(text))
        continues = bullet_indent is not None and indent > bullet_indent and not is_bullet
        if paragraphs[-1] and (continues or (flowing and indent == 0 and not is_bullet)):
            paragraphs[-1][-1] += " " + text
            continue
        paragraphs[-1].append(text)
        flowing = indent == 0 and not is_bullet
        bullet_indent = indent if is_bullet else None
    joined = "\n\n".join("\n".join(p) for p in paragraphs if p)
    return re.sub(r"[ \xa0]{2,}", " ", joined).strip()


def read_pairs(suites: Iterable[str], folder: Path, languages: Sequence[str] = ("en",)) -> list[Pair]:
    """Unique English (description, reference) pairs over all suites, ordered by Description-md5.

    The descriptions in other `languages` are downloaded along with them.
    """
    unique: dict[tuple[str, str], Pair] = {}
    for suite in suites:
        packages, translations = fetch(suite, folder, languages)
        sources = {f["Package"]: f.get("Source", f["Package"]).split()[0] for f in stanzas(packages)}
        for fields in stanzas(translations["en"]):
            synopsis, _, extended = fields.get("Description-en", "").partition("\n")
            name = fields["Package"]
            reference = " ".join(synopsis.split())
            description = readable(extended)
            if len(description.split()) < 3 or not reference:
                continue
            pair = Pair(name, sources.get(name, name), description, reference, fields["Description-md5"], suite)
            unique.setdefault((description, reference), pair)
    return sorted(unique.values(), key=lambda p: (p.md5, p.package))


class Groups:
    """Union-find over row numbers."""

    def __init__(self, size: int) -> None:
        self.parent = list(range(size))

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def join(self, rows: list[int]) -> None:
        for row in rows[1:]:
            self.parent[self.find(row)] = self.find(rows[0])


def name_stem(package: str) -> str:
    """The package name without prefixes, suffixes and version digits that only tell siblings apart."""
    stem, previous = re.sub(r"[\d.+]+", "", package), ""
    while stem != previous:
        previous, stem = stem, NAME_PARTS.sub("", stem).strip("-")
    return stem or package


def _normalised(text: str) -> str:
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def minhash_bands(texts: list[str]) -> np.ndarray:
    """[rows, BANDS] keys; two rows that share one have very likely near-identical text (Broder 1997, banded)."""
    generator = np.random.default_rng(7)
    mixers = generator.integers(1, 2**63, size=NUM_HASHES, dtype=np.uint64) | np.uint64(1)
    bands = np.empty((len(texts), BANDS), dtype=np.uint64)
    rows_per_band = NUM_HASHES // BANDS
    for row, text in enumerate(texts):
        words = _normalised(text).split()
        shingles = {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}
        digests = b"".join(hashlib.blake2b(s.encode(), digest_size=8).digest() for s in shingles)
        hashed = np.frombuffer(digests, dtype=np.uint64)[:, None] * mixers[None, :]
        minima = (hashed ^ (hashed >> np.uint64(29))).min(axis=0).reshape(BANDS, rows_per_band)
        bands[row] = [int.from_bytes(hashlib.blake2b(b.tobytes(), digest_size=8).digest(), "big") for b in minima]
    return bands


def group_near_duplicates(pairs: list[Pair]) -> list[int]:
    """A group number per row. Rows of one group go to one split.

    Joined are rows of one source package, of one name stem, with the same opening, and with near-identical text.
    """
    groups = Groups(len(pairs))
    keys: dict[tuple[str, object], list[int]] = defaultdict(list)
    bands = minhash_bands([p.description for p in pairs])
    openings = _openings(pairs)
    for row, pair in enumerate(pairs):
        keys["source", pair.source].append(row)
        keys["stem", name_stem(pair.package)].append(row)
        keys["opening", openings[row]].append(row)
        for band, value in enumerate(bands[row].tolist()):
            keys["band", (band, value)].append(row)
    for (kind, _), rows in keys.items():
        if kind in ("source", "stem") or len({pairs[r].source for r in rows}) <= TEMPLATE_SOURCES:
            groups.join(rows)
    return [groups.find(row) for row in range(len(pairs))]


def _openings(pairs: list[Pair]) -> list[str]:
    return [_normalised(p.description)[:OPENING_CHARACTERS] for p in pairs]


def split(pairs: list[Pair], groups: list[int]) -> dict[str, list[Pair]]:
    """Whole groups, in the order of a hash of their smallest md5, to test, then validation, then train.

    A held-out group gives one pair per distinct description, at most four, so that no family dominates the scores; its
    other rows, and those that open with a template seen in training, are dropped rather than trained on.
    """
    sources: dict[str, set[str]] = defaultdict(set)
    openings = _openings(pairs)
    for pair, opening in zip(pairs, openings, strict=True):
        sources[opening].add(pair.source)
    is_template = {
        p.md5 for p, opening in zip(pairs, openings, strict=True) if len(sources[opening]) > TEMPLATE_SOURCES
    }
    members: dict[int, list[Pair]] = defaultdict(list)
    for pair, group in zip(pairs, groups, strict=True):
        members[group].append(pair)
    ordered = sorted(members.values(), key=lambda rows: hashlib.sha256(rows[0].md5.encode()).hexdigest())
    splits: dict[str, list[Pair]] = {"test": [], "validation": [], "train": []}
    for rows in ordered:
        name = next((n for n, size in HELD_OUT_ROWS.items() if len(splits[n]) < size and len(rows) <= 40), "train")
        if name != "train":
            rows = list({row.description: row for row in reversed(rows) if row.md5 not in is_template}.values())[-4:]
        splits[name].extend(rows)
    return splits


def to_table(pairs: list[Pair]) -> pa.Table:
    names = ("package", "source", "description", "reference", "md5", "suite")
    return pa.table({name: pa.array([getattr(p, name) for p in pairs], pa.string()) for name in names})


def write_sample(pairs: list[Pair], folder: Path) -> None:
    """The sample that ships: all of the test split, in files of unequal size, in the order of the package names."""
    table = to_table(sorted(pairs, key=lambda p: (p.package, p.md5))).select(["package", "description", "reference"])
    folder.mkdir(parents=True, exist_ok=True)
    cuts = [0, 411, 1207, 1310, len(table)]
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        part = table.slice(start, stop - start)
        pq.write_table(part, folder / f"part-{number:05d}.parquet", compression="zstd", compression_level=19)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", default=list(SUITES))
    parser.add_argument("--output", type=Path, default=Path(".data/descriptions"))
    parser.add_argument(
        "--sample", type=Path, help="also write the test split as the sample that ships, into this folder"
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    pairs = read_pairs(args.suites, args.output)
    groups = group_near_duplicates(pairs)
    splits = split(pairs, groups)
    for name, rows in splits.items():
        pq.write_table(to_table(rows), args.output / f"{name}.parquet", compression="zstd")
    if args.sample:
        write_sample(splits["test"], args.sample)
    words = np.array([len(p.description.split()) for p in pairs])
    sizes = np.bincount(np.unique(groups, return_inverse=True)[1])
    report = {
        "unique_pairs": len(pairs),
        "groups": len(sizes),
        "largest_groups": sorted(sizes.tolist(), reverse=True)[:8],
        "words_p50_p90_max": [int(np.percentile(words, 50)), int(np.percentile(words, 90)), int(words.max())],
        **{name: len(rows) for name, rows in splits.items()},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
