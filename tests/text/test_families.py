"""SentencePiece and byte tokenizers of every family: ids equal to sentencepiece's and transformers', hostile files."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2s_ray.errors import PresetError, S2SRayError
from s2s_ray.text.charsmap import read_charsmap
from s2s_ray.text.preprocessor import Seq2SeqLMPreprocessor
from s2s_ray.text.spm import SentencePieceModel
from s2s_ray.text.tokenizer import Tokenizer
from tests.text.family_presets import MODELS, Preset, make

SCRIPTS = (Path(__file__).parent / "scripts.txt").read_text(encoding="utf-8").splitlines()
HARD = [
    *("", " ", "  \t\n ", "a", "▁", "▁▁a▁", " leading and trailing  ", "a\r\nb\n\n\nc\td", "\x00\x01\x7f", "\x1f"),
    *("a\u00a0b\u3000c\u2009d", "a\u200bb\ufeffc\u00add", "ﬁ ﬀ ½ ² ™️ © ㌔ ㈱ ﷺ ｱﾞ ﾊﾟ Ａ１！", "가\u1100\u1161\u11a8 각"),
    *("e\u0301 o\u0308\u0301 n\u0303o \u0301x ﬁ\u0301 ½\u0327", "अनु\u0928\u093c क़", "\U0010ffff \ufffd \ue000"),
    *("🙂👩‍👩‍👧‍👦🏳️‍🌈 𝒳𝟙𝔘", "1234567890 3.14 10000000 0x3fffffff", "XIII .... ,,,, \\u.... ''\"\"", "«»„“ ‘’ – — …"),
    *("in http://in.http/ <2de>Hallo <2fr>", "a" * 70, "<0x41><0xFF>"),
]


@pytest.fixture(scope="module")
def presets(english_text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Preset]:
    """The preset of a family, with models trained on 20 languages."""
    root, made = tmp_path_factory.mktemp("families"), dict[str, Preset]()
    texts = [*english_text[:1500], *SCRIPTS * 20]

    def get(family: str) -> Preset:
        if family not in made:
            made[family] = make(root, family, texts, 1200)
        return made[family]

    return get


@pytest.mark.parametrize("family", MODELS)
def test_equal_to_sentencepiece(presets: Callable[[str], Preset], english_text: list[str], family: str) -> None:
    preset = presets(family)
    texts = [*SCRIPTS, *HARD, *english_text[1500:1700], " ".join(SCRIPTS), "word " * 3000]
    for side, tokenizer in enumerate(preset.sides()):
        ids, decoded = preset.reference(side, texts)
        assert tokenizer.encode_batch(texts, add_special_tokens=False) == ids
        assert tokenizer.encode_batch(texts, add_special_tokens=False) == ids  # words are known by now
        known = [[i for i in row if i != preset.unknown] for row in ids]
        assert tokenizer.decode_batch(known) == decoded


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
@pytest.mark.parametrize("family", ["t5", "m2m100", "madlad", "bpe_symbols"])
def test_any_text_equals_sentencepiece(presets: Callable[[str], Preset], family: str, text: str) -> None:
    preset = presets(family)
    if "<" not in text and "_" not in text:  # special tokens are the family's business, not sentencepiece's
        assert preset.tokenizer.encode_batch([text], add_special_tokens=False) == preset.reference(0, [text])[0]


@pytest.mark.parametrize("family", MODELS)
def test_saved_and_loaded(presets: Callable[[str], Preset], tmp_path: Path, family: str) -> None:
    original = presets(family).tokenizer
    original.save(tmp_path)
    (tmp_path / "config.json").write_bytes((presets(family).directory / "config.json").read_bytes())
    loaded = Tokenizer.from_directory(tmp_path)
    for first, second in ((original, loaded), (original.target, loaded.target)):
        assert first.encode_batch(SCRIPTS) == second.encode_batch(SCRIPTS)
        assert first.vocabulary() == second.vocabulary()


SPECIAL_TEXTS = [
    "one</s>two",
    "<pad> <unk>three<s>",
    "a <extra_id_0> b<extra_id_1>",
    "__de__ Hallo __fr__",
    ">>deu<< Hallo",
    ">>xx<<",
    ">>de",
]


@pytest.mark.parametrize("family", ["m2m100", "marian"])
def test_equal_to_transformers_own_tokenizers(presets: Callable[[str], Preset], family: str) -> None:
    """The two families whose tokenizers transformers runs on sentencepiece itself."""
    from transformers import M2M100Tokenizer, MarianTokenizer

    directory = presets(family).directory
    tokenizer = Tokenizer.from_directory(directory)
    if family == "marian":
        oracle = MarianTokenizer.from_pretrained(directory)
    else:
        oracle = M2M100Tokenizer.from_pretrained(directory, src_lang="en", tgt_lang="de")
    texts = [*SCRIPTS, *SPECIAL_TEXTS, *(text for text in HARD if "<" not in text)]
    assert tokenizer.encode_batch(texts) == oracle(texts)["input_ids"]
    labels = oracle(text_target=texts)["input_ids"]
    preprocessor = Seq2SeqLMPreprocessor(tokenizer, decoder_start_token_id=0)
    if family == "m2m100":
        (directory / "generation_config.json").write_text("{}")
        preprocessor = Seq2SeqLMPreprocessor.from_directory(directory, source_lang="fr", target_lang="de")
        oracle.src_lang = "fr"
        assert preprocessor.encode_sources(texts)[0] == oracle(texts)["input_ids"]
    assert preprocessor.encode_targets(texts) == labels
    assert preprocessor.decode(labels) == oracle.batch_decode(labels, skip_special_tokens=True)


def test_marian_with_separate_vocabularies(presets: Callable[[str], Preset], tmp_path: Path) -> None:
    from transformers import MarianTokenizer

    source = presets("marian").directory
    for name in ("source.spm", "target.spm", "config.json", "vocab.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    pieces = [piece for piece in vocabulary if piece not in ("</s>", "<unk>", "<pad>")]
    other = {"</s>": 0, "<unk>": 1} | {piece: i + 2 for i, piece in enumerate(reversed(pieces))}
    other["<pad>"] = len(other)
    (tmp_path / "target_vocab.json").write_text(json.dumps(other))
    names = {"tokenizer_class": "MarianTokenizer", "separate_vocabs": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    oracle, tokenizer = MarianTokenizer.from_pretrained(tmp_path), Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode_batch(SCRIPTS) == oracle(SCRIPTS)["input_ids"]
    labels = oracle(text_target=SCRIPTS)["input_ids"]
    assert tokenizer.target.encode_batch(SCRIPTS) == labels != oracle(SCRIPTS)["input_ids"]
    assert tokenizer.target.decode_batch(labels) == oracle.batch_decode(labels, skip_special_tokens=True)


def test_byt5_needs_no_file(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    oracle = ByT5Tokenizer()
    oracle.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 384}))
    tokenizer = Tokenizer.from_directory(tmp_path)
    texts = [*SCRIPTS, *HARD, *SPECIAL_TEXTS, " </s> <extra_id_3> x <pad>"]
    rows = oracle(texts)["input_ids"]
    assert [tokenizer.encode_batch([text]) for text in texts[:-1]] == [[row] for row in rows[:-1]]
    assert tokenizer.decode_batch([*rows, [227, 1]]) == [*oracle.batch_decode(rows, skip_special_tokens=True), ""]
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.from_directory(tmp_path / "saved").encode_batch(texts) == tokenizer.encode_batch(texts)


def test_layouts_of_ids(presets: Callable[[str], Preset]) -> None:
    """Ids of special tokens as the released checkpoints have them, counted from the size of the model."""
    sizes = {
        family: presets(family).processors[0].get_piece_size()
        for family in ("t5", "pegasus", "mbart", "nllb", "m2m100")
    }
    expected = {
        "t5": {"<pad>": 0, "</s>": 1, "<unk>": 2, "<extra_id_99>": sizes["t5"], "<extra_id_0>": sizes["t5"] + 99},
        "pegasus": {"<pad>": 0, "</s>": 1, "<mask_1>": 2, "<mask_2>": 3, "<unk_2>": 4, "<unk_102>": 104, "<unk>": 105},
        "mbart": {"<s>": 0, "</s>": 2, "<unk>": 3, "ar_AR": sizes["mbart"] + 1, "sl_SI": sizes["mbart"] + 52},
        "nllb": {"ace_Arab": sizes["nllb"] + 1, "zul_Latn": sizes["nllb"] + 202, "<mask>": sizes["nllb"] + 203},
    }  # fmt: skip
    for family, tokens in expected.items():
        tokenizer = presets(family).tokenizer
        assert {token: tokenizer.token_to_id(token) for token in tokens} == tokens
    wraps = {family: presets(family).tokenizer for family in ("mbart", "nllb", "m2m100", "t5")}
    assert {f: [t.id_to_token(i) for i in (*t.prefix_ids, *t.suffix_ids)] for f, t in wraps.items()} == {
        "mbart": ["en_XX", "</s>"],
        "nllb": ["eng_Latn", "</s>"],
        "m2m100": ["__en__", "</s>"],
        "t5": ["</s>"],
    }


def test_a_cut_or_changed_model_is_refused(presets: Callable[[str], Preset]) -> None:
    """Any prefix of a model file, and any of 3,000 changed bytes, is a model or a typed error, never a crash."""
    data = (presets("t5").directory / "spiece.model").read_bytes()
    assert len(SentencePieceModel(data).pieces) > 300
    errors = 0
    for cut in range(0, len(data), len(data) // 60):
        try:
            SentencePieceModel(data[:cut])
        except S2SRayError:
            errors += 1
    for place in range(0, 6000, 25):
        for value in (0x00, 0xFF):
            try:
                SentencePieceModel(data[:place] + bytes([value]) + data[place + 1 : 12_000]).encode("a b")
            except S2SRayError:
                errors += 1
    assert errors > 200


_ENDLESS = b"".join(struct.pack("<I", label | (label << 10)) for label in range(256))  # every node is its own parent


@pytest.mark.parametrize(
    "blob", [b"\0", struct.pack("<I", 2**31) + b"\0" * 8, b"\x08\0\0\0" + b"\0" * 4, struct.pack("<I", 1024) + _ENDLESS]
)
def test_a_hostile_charsmap_is_refused(blob: bytes) -> None:
    with pytest.raises(PresetError, match="charsmap"):
        read_charsmap(blob)


@pytest.mark.parametrize("content", ["[]", '{"a": "b"}', '{"<unk>": 0, "a": 0}', '{"<unk>": -1}', '{"a": 1}'])
def test_a_hostile_vocabulary_is_refused(presets: Callable[[str], Preset], tmp_path: Path, content: str) -> None:
    for file in presets("m2m100").directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(PresetError):
        Tokenizer.from_directory(tmp_path)
