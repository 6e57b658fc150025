"""Languages by name: every family's convention, and a model that is told them row by row."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from s2s_ray import Seq2SeqLM
from s2s_ray.errors import InputError, LanguageError, PresetError, RowErrorReason, SettingsError
from s2s_ray.text.languages import Languages, Route, resolve
from s2s_ray.text.preprocessor import Seq2SeqLMPreprocessor
from s2s_ray.text.tokenizer import TokenizationError

NLLB = ["eng_Latn", "deu_Latn", "zho_Hans", "zho_Hant", "arb_Arab", "swh_Latn", "nob_Latn"]
MBART = ["en_XX", "de_DE", "fr_XX"]


@pytest.fixture(scope="module")
def bart_with_languages(tiny_bart_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BART with the tokens `>>de<<` and `>>fr<<`, as transformers adds them."""
    from transformers import AutoTokenizer, BartForConditionalGeneration

    directory = tmp_path_factory.mktemp("presets") / "bart_with_languages"
    tokenizer = AutoTokenizer.from_pretrained(tiny_bart_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": [">>de<<", ">>fr<<"]})
    model = BartForConditionalGeneration.from_pretrained(tiny_bart_dir)
    model.resize_token_embeddings(len(tokenizer))
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    return directory


def preset(
    directory: Path,
    model_type: str,
    tokens: list[str],
    config: dict[str, Any] | None = None,
    tokenizer_config: dict[str, Any] | None = None,
) -> Seq2SeqLMPreprocessor:
    """A word-level tokenizer with `tokens` as special ones and text </s>, in a directory as the family has it."""
    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", "a", "B", "1", ".", *tokens])}
    backend = Backend(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ["<pad>", "</s>", "<unk>", *tokens]])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    base = {"model_type": model_type, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    (directory / "config.json").write_text(json.dumps(base | {"vocab_size": len(words)} | (config or {})))
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config or {}))
    return Seq2SeqLMPreprocessor.from_directory(directory)


def ids(preprocessor: Seq2SeqLMPreprocessor, *tokens: str) -> list[int]:
    return [preprocessor.tokenizer.token_to_id(token) for token in tokens]


FAMILIES: list[tuple[str, list[str], dict[str, Any], list[str], list[str], dict[str, str]]] = [
    ("m2m_100", ["__en__", "__de__"], {}, ["__en__", "a", "</s>"], ["__de__", "B", "</s>"], {"forced_bos": "__de__"}),
    ("m2m_100", NLLB, {}, ["eng_Latn", "a", "</s>"], ["deu_Latn", "B", "</s>"], {"forced_bos": "deu_Latn"}),
    (
        "m2m_100",
        NLLB,
        {"legacy_behaviour": True},
        ["a", "</s>", "eng_Latn"],
        ["B", "</s>", "deu_Latn"],
        {"forced_bos": "deu_Latn"},
    ),
    ("mbart", MBART, {}, ["a", "</s>", "en_XX"], ["B", "</s>", "de_DE"], {"decoder_start": "de_DE"}),
    (
        "mbart",
        MBART,
        {"tokenizer_class": "MBart50Tokenizer"},
        ["en_XX", "a", "</s>"],
        ["de_DE", "B", "</s>"],
        {"forced_bos": "de_DE"},
    ),
    ("marian", [">>deu<<", ">>fra<<"], {}, [">>deu<<", "a", "</s>"], ["B", "</s>"], {}),
    ("bart", [">>de<<", ">>fr<<"], {}, [">>de<<", "a", "</s>"], ["B", "</s>"], {}),
    ("t5", ["<2de>", "<2fr>"], {}, ["<2de>", "a", "</s>"], ["B", "</s>"], {}),
]


@pytest.mark.parametrize(("family", "tokens", "tokenizer_config", "source", "target", "first"), FAMILIES)
def test_each_family_says_it_its_own_way(
    tmp_path: Path,
    family: str,
    tokens: list[str],
    tokenizer_config: dict[str, Any],
    source: list[str],
    target: list[str],
    first: dict[str, str],
) -> None:
    made = preset(tmp_path, family, tokens, tokenizer_config=tokenizer_config)
    routes = made.routes(1, "en", "de")
    assert made.encode_sources(["a"], routes=routes)[0] == [ids(made, *source)]
    assert made.encode_targets(["B"], routes=routes) == [ids(made, *target)]
    expected = {f"{name}_token_id": made.tokenizer.token_to_id(token) for name, token in first.items()}
    assert routes[0].generation_changes() == expected
    # The same names, declared by preprocessor.json, are read back, and so are defaults.
    made.source_lang, made.target_lang = "en", "de"
    made.save(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
    again = Seq2SeqLMPreprocessor.from_directory(tmp_path / "saved")
    assert again.encode_sources(["a"])[0] == [ids(made, *source)]
    assert (again.route(), again.languages is not None) == (routes[0], True)
    x, y, _ = again({"encoder_text": "a", "decoder_text": "B"})
    start = expected.get("decoder_start_token_id", 0)
    assert (y.tolist(), x["decoder_token_ids"].tolist()) == (ids(made, *target), [start, *ids(made, *target)[:-1]])
    generation = again.generate_preprocess("a")
    forced = [expected["forced_bos_token_id"]] if "forced_bos_token_id" in expected else []
    assert generation["decoder_token_ids"].tolist() == [start, *forced]


T5_TASKS = {
    "summarization": {"prefix": "summarize: "},
    "translation_en_to_de": {"prefix": "translate English to German: "},
    "translation_en_to_ro": {"prefix": "translate English to Romanian: "},
}


def test_t5_is_told_in_words(tmp_path: Path) -> None:
    t5 = preset(tmp_path, "t5", [], config={"task_specific_params": T5_TASKS})
    assert t5.route("en", "ro").text_prefix == "translate English to Romanian: "
    assert t5.route("German", "en").text_prefix == "translate German to English: "
    with pytest.raises(LanguageError, match=r"source_lang must be given too.*Known: de, en, ro"):
        t5.route(None, "de")
    t5.source_prefix = "summarize: "
    both = t5.encode_sources(["a", "a"], routes=[Route(), t5.route("en", "ro")])[0]
    assert [len(row) for row in both] == [
        len(t5.tokenizer("summarize: a")) + 1,
        len(t5.tokenizer("translate English to Romanian: a")) + 1,
    ]


def test_unknown_and_ambiguous_codes_list_the_known_ones(tmp_path: Path) -> None:
    nllb = preset(tmp_path / "nllb", "m2m_100", NLLB)
    for code, native in {
        "de": "deu_Latn",
        "deu": "deu_Latn",
        "ar": "arb_Arab",
        "sw": "swh_Latn",
        "no": "nob_Latn",
    }.items():
        assert nllb.route(None, code) == nllb.route(None, native)
    with pytest.raises(LanguageError, match=r"target_lang 'zh' fits several.*zho_Hans, zho_Hant"):
        nllb.route("en", "zh")
    for wrong in ("xx", "de_DE", "", 3, "Latn"):
        with pytest.raises(LanguageError, match=r"source_lang must be a language of this preset.*arb_Arab, deu_Latn"):
            nllb.route(wrong or "??", "de")  # type: ignore[arg-type]
    plain = preset(tmp_path / "plain", "bart", [])
    with pytest.raises(LanguageError, match="this preset has no languages"):
        plain.route("en", "de")
    with pytest.raises(LanguageError, match="no languages"):
        Seq2SeqLMPreprocessor.from_directory(tmp_path / "plain", target_lang="de")
    pair = {"source_lang": "eng", "target_lang": "deu"}
    marian = preset(tmp_path / "marian", "marian", [], tokenizer_config=pair)
    assert marian.route("en", "de") == Route()
    with pytest.raises(LanguageError, match=r"target_lang must be.*Received: 'fr'. Known: deu"):
        marian.route("en", "fr")


def test_a_row_with_an_unknown_language_is_an_error_row(tmp_path: Path) -> None:
    m2m = preset(tmp_path, "m2m_100", ["__en__", "__de__"])
    m2m.target_lang = "de"
    routes = m2m.try_routes(4, "en", ["de", None, "xx", "en"])
    encoded = m2m.try_encode_sources(["a", "a", "a", None], routes=routes)
    assert [source.error for source in encoded] == [
        None,
        None,
        RowErrorReason.UNKNOWN_LANGUAGE,
        RowErrorReason.NULL_TEXT,
    ]
    assert "Received: 'xx'. Known: de, en" in encoded[2].message and encoded[0].token_ids == encoded[1].token_ids
    german = m2m.tokenizer.token_to_id("__de__")
    assert [route.forced_bos_token_id for route in routes[:2]] == [german, german]
    with pytest.raises(LanguageError, match="row 2"):
        m2m.routes(4, "en", ["de", None, "xx", "en"])
    with pytest.raises(TokenizationError):
        m2m.encode_sources(["a"] * 4, routes=routes)
    with pytest.raises(SettingsError, match="target_lang must have one value per row"):
        m2m.routes(2, "en", ["de"])
    with pytest.raises(SettingsError, match="more than the 2 special tokens"):
        m2m.encode_sources(["a"], 2, m2m.routes(1, "en", "de"))


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({}, "must hold tokens"),
        ({"tokens": {"de": ">>de<<"}, "extra": 1}, "must hold tokens"),
        ({"tokens": {}}, "must map codes to tokens"),
        ({"tokens": {"de": 3}}, "must map codes to tokens"),
        ({"tokens": {"de": ">>xx<<"}}, "must hold every language token. Missing: >>xx<<"),
        ({"tokens": {"de": ">>de<<"}, "convention": "other"}, "convention must be one of"),
        ({"tokens": {"de": ">>de<<"}, "template": "{target} "}, "template belongs"),
        ({"tokens": {"de": "German"}, "convention": "template"}, "template belongs"),
        ({"tokens": {"de": ">>de<<"}, "sources": [3]}, "sources must be a list"),
    ],
)
def test_a_declaration_is_checked(tmp_path: Path, declared: dict[str, Any], message: str) -> None:
    preset(tmp_path, "bart", [">>de<<"])
    (tmp_path / "preprocessor.json").write_text(json.dumps({"languages": declared}))
    with pytest.raises(PresetError, match=message):
        Seq2SeqLMPreprocessor.from_directory(tmp_path)


def test_sources_may_be_listed(tmp_path: Path) -> None:
    made = preset(tmp_path, "bart", [">>de<<"])
    assert made.languages is not None
    assert made.route("sv", "de") == made.route(None, "de")
    listed = Languages(made.tokenizer, "target_token", made.languages.tokens, sources=["en"])
    assert listed.route("eng", "de") == made.route("en", "de")
    with pytest.raises(LanguageError, match=r"source_lang must be.*Known: en"):
        listed.route("sv", "de")
    assert listed.to_config()["sources"] == ["en"]


def test_resolve_prefers_the_exact_code() -> None:
    known = {"fr": ">>fr<<", "fr_BE": ">>fr_BE<<", "cmn_Hans": ">>cmn_Hans<<"}
    assert [resolve("x", code, known) for code in ("fr", "fr_BE", ">>fr_BE<<", "zh")] == [
        "fr",
        "fr_BE",
        "fr_BE",
        "cmn_Hans",
    ]


def test_generate_row_by_row(bart_with_languages: Path, english_text: list[str]) -> None:
    task = Seq2SeqLM.from_preset(bart_with_languages)
    texts = english_text[:4]
    languages = ["de", "fr", None, "de"]
    together = task.generate(texts, target_lang=languages, max_new_tokens=12)
    alone = [task.generate(t, target_lang=lang, max_new_tokens=12) for t, lang in zip(texts, languages, strict=True)]
    typed = [
        task.generate(t if lang is None else f">>{lang}<<{t}", max_new_tokens=12)
        for t, lang in zip(texts, languages, strict=True)
    ]
    assert together == alone == typed and together[0] != task.generate(texts[0], max_new_tokens=12)
    batches = task.generate(iter([texts[:1], texts[1:]]), target_lang=languages, max_new_tokens=12)
    assert batches == together
    default = Seq2SeqLM.from_preset(bart_with_languages, target_lang="de")
    assert default.generate(texts[0], max_new_tokens=12) == together[0]
    scores = task.score(texts[:2], texts[2:], target_lang=["de", "fr"])
    assert scores[1] == pytest.approx(task.score(texts[1], texts[3], target_lang="fr"), abs=1e-3)
    assert scores[1] != pytest.approx(task.score(texts[1], texts[3]), abs=1e-3)
    with pytest.raises(InputError, match="go with text"):
        task.generate({"encoder_token_ids": [[5]]}, target_lang="de")
    with pytest.raises(LanguageError, match=r"row 1.*Known: de, fr"):
        task.generate(texts[:2], target_lang=["de", "xx"])


def test_a_languages_first_token_reaches_the_decoder(bart_with_languages: Path, tmp_path: Path) -> None:
    """The same weights, declared as a family that forces the target's token or starts from it."""
    for convention in ("source_first", "start_token"):
        directory = tmp_path / convention
        shutil.copytree(bart_with_languages, directory)
        declared = {"convention": convention, "tokens": {"de": ">>de<<", "fr": ">>fr<<"}}
        (directory / "preprocessor.json").write_text(json.dumps({"languages": declared}))
        task = Seq2SeqLM.from_preset(directory, source_lang="fr")
        assert task.preprocessor is not None
        answers, _ = task.generate(
            ["The fox.", "The fox."], target_lang=["de", "fr"], max_new_tokens=6, return_scores=True
        )
        german = task.preprocessor.route(target_lang="de")
        source = task.preprocessor.encode_sources(["The fox."], routes=[german])[0]
        start = german.decoder_start_token_id or 2
        forced = [] if german.forced_bos_token_id is None else [german.forced_bos_token_id]
        by_ids = task.generate(
            {"encoder_token_ids": source, "decoder_token_ids": [[start, *forced]]}, max_new_tokens=6 - len(forced)
        )
        assert task.preprocessor.decode(by_ids["decoder_token_ids"].tolist()) == answers[:1]
        assert start == german.decoder_start_token_id or forced
