"""The tokenizer against transformers on the same directory, and against files made to hurt."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from s2s_ray.errors import InputError, PresetError, PresetIntegrityError
from s2s_ray.text.tokenizer import MAX_TOKENIZER_BYTES, TokenizationError, Tokenizer

TEXTS = [
    "",
    " ",
    "a",
    "Hello, world!  Two spaces, a tab\tand\r\n line ends.",
    "don't you've WE'LL it's 'quoted'",
    "0123456789 3.14 1e-9 $5 50%",
    "Größe, façade, naïve, e\u0301 and \u00e9, \ufb01ligature, \u212b",
    "Съешь ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "いろはにほへと ちりぬるを 色は匂へど",
    "敏捷的棕色狐狸跳过了懒狗。",
    "다람쥐 헌 쳇바퀴에 타고파",
    "נתון חריף צף ביונה مرحبا بالعالم",
    "ऋषियों को सताने वाले ไทยภาษา",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 \U0001f1e9\U0001f1ea",
    "\x00 NUL \x00\x01\x1f\x7f\u200b\ufeff\u2028\ufffd\U0010ffff",
    "<s> not </s> special <pad> text <mask> here <unk>",
    "</s></s>",
    "x" * 3000,
    "-" * 300 + "\n" * 300,
]


def oracle(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def bart_copy(tiny_bart_dir: Path, tmp_path: Path) -> Path:
    """A copy without weights that a test may change."""
    return Path(shutil.copytree(tiny_bart_dir, tmp_path / "bart", ignore=shutil.ignore_patterns("*.safetensors")))


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(value | changes))


def test_ids_and_text_equal_transformers(tiny_bart_dir: Path, english_text: list[str]) -> None:
    tokenizer, reference = Tokenizer.from_directory(tiny_bart_dir), oracle(tiny_bart_dir)
    texts = TEXTS + english_text[:2000]
    ids = reference(texts)["input_ids"]
    assert tokenizer.encode_batch(texts) == ids
    assert tokenizer(texts) == reference(texts, add_special_tokens=False)["input_ids"]
    assert tokenizer(texts[3]) == tokenizer(texts)[3]
    assert tokenizer.decode_batch(ids) == reference.batch_decode(ids, skip_special_tokens=True)


def test_vocab_and_merges_alone_equal_transformers(
    tiny_bart_dir: Path, trained_bpe: dict[str, Any], english_text: list[str], tmp_path: Path
) -> None:
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in trained_bpe["merges"]), ""])
    (tmp_path / "vocab.json").write_text(json.dumps(trained_bpe["vocab"]))
    (tmp_path / "merges.txt").write_text(merges)
    shutil.copy(tiny_bart_dir / "config.json", tmp_path)
    tokenizer, reference = Tokenizer.from_directory(tmp_path), oracle(tmp_path)
    texts = [t for t in TEXTS if "<mask>" not in t] + english_text[:500]
    assert tokenizer.encode_batch(texts) == reference(texts)["input_ids"]
    assert tokenizer.encode_batch(texts) == Tokenizer.from_directory(tiny_bart_dir).encode_batch(texts)


def test_bart_special_ids(tiny_bart_dir: Path) -> None:
    tokenizer = Tokenizer.from_directory(tiny_bart_dir)
    assert (tokenizer.start_token_id, tokenizer.pad_token_id, tokenizer.end_token_id) == (0, 1, 2)
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ([0], [2])
    assert tokenizer.special_token_ids == [0, 1, 2, 3, 4]
    assert tokenizer.vocabulary_size() == 600
    assert tokenizer.id_to_token(tokenizer.token_to_id("</s>")) == "</s>"
    assert tokenizer.detokenize(tokenizer("Hello 😀\0")) == "Hello 😀\0"
    assert tokenizer.detokenize([[0, 2, 1, 10**9, -100], tokenizer("é")]) == ["", "é"]
    with pytest.raises(InputError, match="zzz"):
        tokenizer.token_to_id("zzz-no-token")
    with pytest.raises(InputError, match="600"):
        tokenizer.id_to_token(600)


def unigram_directory(path: Path, texts: list[str], template: str, special: list[str], config: dict[str, Any]) -> Path:
    """A trained Unigram tokenizer with a post-processor as T5's ("$A </s>") or NLLB's ("eng_Latn $A </s>")."""
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(texts, trainer)
    used = [(token, backend.token_to_id(token)) for token in template.split() if token != "$A"]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_family_without_a_start_token(english_text: list[str], tmp_path: Path) -> None:
    config = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "vocab_size": 256, "model_type": "t5"}
    directory = unigram_directory(tmp_path / "t5", english_text[:300], "$A </s>", ["<pad>", "</s>", "<unk>"], config)
    tokenizer = Tokenizer.from_directory(directory)
    assert (tokenizer.start_token_id, tokenizer.prefix_ids, tokenizer.suffix_ids) == (None, [], [1])
    assert tokenizer.encode_batch(["a word"])[0][-1] == 1


def test_a_language_token_before_the_text(english_text: list[str], tmp_path: Path) -> None:
    config = {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0, "vocab_size": 256}
    special = ["<s>", "<pad>", "</s>", "<unk>", "eng_Latn"]
    directory = unigram_directory(tmp_path / "nllb", english_text[:300], "eng_Latn $A </s>", special, config)
    tokenizer = Tokenizer.from_directory(directory)
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ([4], [2])


def test_save_keeps_ids_and_roles_and_transformers_reads_it(tiny_bart_dir: Path, tmp_path: Path) -> None:
    original = Tokenizer.from_directory(tiny_bart_dir)
    original.save(tmp_path)
    loaded = Tokenizer.from_directory(tmp_path)  # no config.json here: the roles come from the token names
    assert (loaded.start_token_id, loaded.pad_token_id, loaded.end_token_id) == (0, 1, 2)
    assert loaded.encode_batch(TEXTS) == original.encode_batch(TEXTS)
    shutil.copy(tiny_bart_dir / "config.json", tmp_path)
    assert oracle(tmp_path)(TEXTS)["input_ids"] == original.encode_batch(TEXTS)


def test_padding_and_truncation_of_the_file_are_ignored(bart_copy: Path) -> None:
    before = Tokenizer.from_directory(bart_copy).encode_batch(TEXTS)
    padding = {"strategy": {"Fixed": 500}, "direction": "Left", "pad_to_multiple_of": None}
    edit(
        bart_copy / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5},
        padding=padding | {"pad_id": 7, "pad_type_id": 0, "pad_token": "x"},
    )
    assert Tokenizer.from_directory(bart_copy).encode_batch(TEXTS) == before


def test_a_token_without_embedding_becomes_unknown(bart_copy: Path) -> None:
    """As facebook/bart-large-cnn: 50,264 rows, and <mask> has id 50,264."""
    backend = json.loads((bart_copy / "tokenizer.json").read_text())
    entry = next(t for t in backend["added_tokens"] if t["content"] == "<mask>")
    entry["id"] = backend["model"]["vocab"]["<mask>"] = 600
    (bart_copy / "tokenizer.json").write_text(json.dumps(backend))
    tokenizer = Tokenizer.from_directory(bart_copy)
    assert tokenizer.encode_batch(["<mask>"]) == [[0, 3, 2]]
    assert max(max(row) for row in tokenizer.encode_batch(TEXTS)) < 600


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 599},
        {"eos_token_id": 3},
        {"pad_token_id": 0},
        {"pad_token_id": 600, "vocab_size": 700},
        {"eos_token_id": 1, "pad_token_id": 2},
        {"bos_token_id": 9999},
    ],
)
def test_another_models_tokenizer_is_refused(bart_copy: Path, change: dict[str, int]) -> None:
    edit(bart_copy / "config.json", **change)
    with pytest.raises(PresetIntegrityError):
        Tokenizer.from_directory(bart_copy)


def hostile_files(good: dict[str, Any]) -> dict[str, bytes]:
    """Files that a tokenizer.json might be, by what is wrong with them."""
    nothing = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
    unnamed = nothing | {
        "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    }
    flood = nothing | {
        "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"x": {"id": "x", "ids": [0] * 100_000, "tokens": ["<s>"] * 100_000}},
    }
    changes: dict[str, dict[str, Any]] = {
        "panics in the post-processor": {"post_processor": unnamed},
        "floods every text": {"post_processor": flood},
        "drops the text": {"post_processor": nothing},
        "panics while read": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        "panics on any text": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        "bad regex": {
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed", "invert": False}
        },
        "unknown model": {"model": {"type": "Pickle"}},
        "negative ids": {"model": good["model"] | {"vocab": {"a": -1}}},
        "merges of nothing": {"model": good["model"] | {"merges": [["no", "such"]]}},
        "no model": {"model": None},
        "list of versions": {"version": []},
    }
    text = json.dumps(good)
    return {name: json.dumps(good | change).encode() for name, change in changes.items()} | {
        "empty": b"",
        "null": b"null",
        "array": b"[]",
        "deep": b'{"model":' * 100_000,
        "truncated": text[: len(text) // 2].encode(),
        "invalid UTF-8": b'{"version": "\xff\xfe"}',
        "NUL": b"\0" * 1000,
        "too long": b" " * (MAX_TOKENIZER_BYTES + 1),
        "duplicate keys": b'{"version":"1.0","version":"1.0"}',
    }


def test_hostile_files_are_refused(bart_copy: Path) -> None:
    good = json.loads((bart_copy / "tokenizer.json").read_text())
    for name, data in hostile_files(good).items():
        (bart_copy / "tokenizer.json").write_bytes(data)
        with pytest.raises(PresetError):
            Tokenizer.from_directory(bart_copy)
            pytest.fail(f"accepted: {name}")


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"eos_token_id": NaN}', b'{"eos_token_id": "2"}', b'{"a":1,"a":2}'])
def test_hostile_config_is_refused(bart_copy: Path, data: bytes) -> None:
    (bart_copy / "config.json").write_bytes(data)
    with pytest.raises(PresetError):
        Tokenizer.from_directory(bart_copy)


def test_no_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PresetError, match="save_pretrained"):
        Tokenizer.from_directory(tmp_path)


def test_a_panic_is_typed_and_an_interrupt_is_not_swallowed(
    tiny_bart_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.from_directory(tiny_bart_dir)
    tokenizer._backend.library.pre_tokenizer = pre_tokenizers.FixedLength(length=0)  # chunks(0) panics in Rust
    with pytest.raises(TokenizationError):
        tokenizer(["text"])

    class Interrupted:
        def encode(self, *args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "_backend", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tokenizer(["text"])
