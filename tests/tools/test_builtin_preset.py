"""The built-in preset as shipped, its sample, and the pieces of the scripts that made them."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from s2s_ray import Seq2SeqLM
from s2s_ray.metrics import rouge_rows

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "s2s_ray" / "samples" / "package_descriptions"
sys.path.insert(0, str(ROOT / "tools" / "builtin_preset"))

import data  # noqa: E402
import noised  # noqa: E402


@pytest.fixture(scope="module")
def sample() -> dict[str, list[str]]:
    return ds.dataset(SAMPLE, format="parquet", exclude_invalid_files=True).to_table().to_pydict()


def test_the_sample_is_real_rows_in_unequal_files(sample):
    sizes = [pq.read_metadata(path).num_rows for path in sorted(SAMPLE.glob("*.parquet"))]
    assert len(sizes) > 2
    assert len(set(sizes)) == len(sizes)
    assert sum(sizes) >= 2000
    assert set(sample) == {"package", "description", "reference"}
    assert all(text.strip() for column in sample.values() for text in column)
    assert len(set(sample["description"])) > 0.99 * sum(sizes)


def test_the_shipped_preset_is_small_and_beats_the_first_words(sample):
    preset = ROOT / "s2s_ray" / "presets" / "builtin" / "debian_summarizer_en"
    assert (preset / "model.safetensors").stat().st_size <= 16_000_000
    rows = range(0, 2500, 50)
    texts, references = ([sample[name][i] for i in rows] for name in ("description", "reference"))
    summaries = Seq2SeqLM.from_preset("debian_summarizer_en").generate(texts, num_beams=1)
    ours = rouge_rows(summaries, references, types=["rougeL"])["rougeL"].mean()
    lead = rouge_rows([" ".join(t.split()[:10]) for t in texts], references, types=["rougeL"])["rougeL"].mean()
    assert ours > lead + 0.03


def test_the_shipped_tokenizer_is_the_same_in_transformers(sample):
    from transformers import AutoTokenizer

    preset = ROOT / "s2s_ray" / "presets" / "builtin" / "debian_summarizer_en"
    theirs = AutoTokenizer.from_pretrained(preset)
    ours = Seq2SeqLM.from_preset("debian_summarizer_en").preprocessor
    texts = sample["description"][:200]
    assert ours.encode_sources(texts)[0] == theirs(texts, truncation=True, max_length=512)["input_ids"]


def test_extended_descriptions_become_paragraphs_and_lists():
    extended = "\n".join(
        [
            " A tool of",
            " two lines:",
            "  * first point,",
            "    continued",
            "  * second  point",
            "  verbatim line",
            " .",
            " The end.",
        ]
    )
    assert data.readable(extended) == (
        "A tool of two lines:\n* first point, continued\n* second point\nverbatim line\n\nThe end."
    )


def test_stanzas_keep_continuation_lines(tmp_path):
    (tmp_path / "list").write_text("Package: a\nDescription-en: short\n long\n .\n more\n\nPackage: b\nSource: s (1)\n")
    first, second = data.stanzas(tmp_path / "list")
    assert first == {"Package": "a", "Description-en": "short\n long\n .\n more"}
    assert second["Source"] == "s (1)"


def pair(number: int, source: str, description: str) -> data.Pair:
    return data.Pair(f"pkg-{source}-{number}", source, description, f"synopsis {number}", f"{number:032x}", "x")


def test_related_packages_never_straddle_the_splits(monkeypatch):
    monkeypatch.setattr(data, "HELD_OUT_ROWS", {"test": 25, "validation": 20})
    words = [f"{a}{b}{c}" for a in "bcdfgklm" for b in "aeiou" for c in "nrst"]
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(words, 40)) for _ in range(100)]
    pairs = [pair(i, f"source{chr(97 + i // 10)}{chr(97 + i % 10)}", text) for i, text in enumerate(texts)]
    pairs += [pair(100 + i, "other", texts[i] + " with one more sentence") for i in range(3)]  # near-identical texts
    pairs += [pair(200 + i, "sourceaa", f"a text of its own kind number {i} of this source") for i in range(3)]
    groups = data.group_near_duplicates(pairs)
    assert len({groups[0], groups[1], groups[2], *groups[100:106]}) == 1
    splits = data.split(pairs, groups)
    side = {row.md5: name for name, rows in splits.items() for row in rows}
    number = {p.md5: g for p, g in zip(pairs, groups, strict=True)}
    sides = {}
    for md5, name in side.items():
        sides.setdefault(number[md5], set()).add(name)
    assert all(len(names) == 1 for names in sides.values())
    assert min(len(rows) for rows in splits.values()) >= 20
    again = data.split(list(pairs), data.group_near_duplicates(pairs))
    assert {n: [r.md5 for r in rows] for n, rows in again.items()} == {
        n: [r.md5 for r in rows] for n, rows in splits.items()
    }


@pytest.mark.parametrize(
    ("package", "stem"),
    [
        ("libfoo2-dev", "foo"),
        ("python3-foo", "foo"),
        ("foo-doc", "foo"),
        ("libfoo-perl", "foo"),
        ("gcc-12-base", "gcc--base"),
    ],
)
def test_name_stems(package, stem):
    assert data.name_stem(package) == stem


def test_infilling_hides_about_its_share_and_keeps_the_order():
    ids = np.arange(10, 310)
    hide = noised.infill(4, share=0.3)
    generator = np.random.default_rng(0)
    shares, masks = [], []
    for _ in range(50):
        found = hide(ids, generator)
        kept = found[found != 4]
        assert np.all(np.diff(kept) > 0)
        shares.append(1 - len(kept) / len(ids))
        masks.append(int((found == 4).sum()))
    assert 0.2 < np.mean(shares) < 0.3  # spans overlap
    assert 20 < np.mean(masks) < 31


def test_noised_copies_differ_and_repeat_with_the_seed(tmp_path: Path) -> None:
    preset = ROOT / "s2s_ray" / "presets" / "builtin" / "debian_summarizer_en"
    texts = [f"This is package number {i}, which contains the library and its documentation." for i in range(20)]
    table = pa.table({"text": texts, "summary": [f"library {i}" for i in range(20)], "kind": ["a", "b"] * 10})
    pq.write_table(table, tmp_path / "in.parquet")

    def run(name: str, noise: str, *more: str) -> dict[str, list[dict[str, str]]]:
        places = ["--preset", str(preset), "--input", str(tmp_path / "in.parquet"), "--output", str(tmp_path / name)]
        noised.main([noise, *places, "--copies", "2", "--share", "0.3", *more])
        return {path.name: pq.read_table(path).to_pylist() for path in sorted((tmp_path / name).iterdir())}

    masked = run("masked", "mask", "--split-by", "kind")
    assert (
        masked
        == run("again", "mask", "--split-by", "kind")
        != run("other", "mask", "--split-by", "kind", "--seed", "1")
    )
    assert list(masked) == ["a.parquet", "b.parquet"]
    first, second = masked["a.parquet"][:10], masked["a.parquet"][10:]
    assert [row["target"] for row in first] == [row["target"] for row in second] == table["summary"].to_pylist()[::2]
    assert [row["source"] for row in first] != [row["source"] for row in second]
    task = Seq2SeqLM.from_preset(preset)
    ids = task.preprocessor.encode_sources([row["source"] for row in first])[0]  # type: ignore[union-attr]
    assert 0.1 < np.mean([token == 4 for row in ids for token in row]) < 0.4  # <mask> is read as one token
    infilled = run("infilled", "infill")["train.parquet"]
    assert [row["target"] for row in infilled] == texts * 2
    assert all("<mask>" in row["source"] for row in infilled)
