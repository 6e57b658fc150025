"""Several languages: what the network sees is what transformers' own tokenizers and shifts make of the same pairs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from s2s_ray import Seq2SeqLM
from s2s_ray.errors import InputError, LanguageError
from s2s_ray.text.fairseq import NLLB_LANGUAGES
from s2s_ray.text.preprocessor import Seq2SeqLMPreprocessor
from s2s_ray.training.inputs import DataSettings, open_data
from tests.models.contract import reference_model
from tests.models.test_marian import SIZES
from tests.text.family_presets import make

SCRIPTS = (Path(__file__).parents[1] / "text" / "scripts.txt").read_text(encoding="utf-8").splitlines()
SOURCES = ["All human beings are born free.", "They have reason", "Act in a spirit of brotherhood, all."]
TARGETS = ["Alle Menschen sind frei geboren.", "Tous sont libres et", "Todos los seres humanos nacen libres"]
# Without a tokenizer.json transformers 5 has to be told NLLB's languages, and orders its tokens otherwise than the
# released files; and it puts no "\u2581" before a language token of MADLAD's, as SentencePiece does. So we too read the
# file that it writes, as with the released presets.
WRITTEN = {"nllb": {"extra_special_tokens": NLLB_LANGUAGES}, "madlad": {}}

# family in tests/text/family_presets.py, transformers' class, further settings, the languages of SOURCES and of TARGETS
CASES = [
    pytest.param("mbart", "MBartTokenizer", {}, ["en_XX"] * 3, ["de_DE", "fr_XX", "es_XX"], id="mbart-25"),
    pytest.param(
        "mbart", "MBart50Tokenizer", {}, ["en_XX", "pl_PL", "en_XX"], ["de_DE", "fr_XX", "es_XX"], id="mbart-50"
    ),
    pytest.param("m2m100", "M2M100Tokenizer", {}, ["en", "sv", "en"], ["de", "fr", "es"], id="m2m100"),
    pytest.param("nllb", "NllbTokenizer", {}, ["eng_Latn"] * 3, ["deu_Latn", "fra_Latn", "spa_Latn"], id="nllb"),
    pytest.param(
        "nllb",
        "NllbTokenizer",
        {"legacy_behaviour": True},
        ["eng_Latn", "swe_Latn", "eng_Latn"],
        ["deu_Latn", "fra_Latn", "spa_Latn"],
        id="nllb-legacy",
    ),
    pytest.param("marian", "MarianTokenizer", {}, [None] * 3, ["deu", "fra", "deu"], id="marian"),
    pytest.param("madlad", "T5Tokenizer", {}, [None] * 3, ["de", "fr", "de"], id="madlad"),
]


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, dict[str, Any]], Path]:
    """A tokenizer directory of a family's variant; the model of a family is trained once."""
    root, made = tmp_path_factory.mktemp("families"), dict[str, Path]()

    def get(family: str, tokenizer_class: str, settings: dict[str, Any]) -> Path:
        if family not in made:
            made[family] = make(root, family, SCRIPTS * 20, 1200).directory
        directory = Path(
            shutil.copytree(made[family], root / f"{family}-{tokenizer_class}-{len(list(root.iterdir()))}")
        )
        path = directory / "tokenizer_config.json"
        known = json.loads(path.read_text()) | {"tokenizer_class": tokenizer_class} | settings
        path.write_text(json.dumps(known))
        if family in WRITTEN:
            of_class = getattr(transformers, tokenizer_class)
            of_class.from_pretrained(directory, **WRITTEN[family]).save_pretrained(directory)
        return directory

    return get


def expected(
    oracle: Any, family: str, row: int, source: str | None, target: str
) -> tuple[list[int], list[int], list[int]]:
    """(source ids, labels, decoder's ids) of a pair: transformers' tokenizer, and its models' way to shift."""
    text = SOURCES[row]
    if family in ("marian", "madlad"):
        text = (f">>{target}<<" if family == "marian" else f"<2{target}> ") + text
    else:
        oracle.src_lang, oracle.tgt_lang = source, target
    ids = oracle(text)["input_ids"]
    labels = oracle(text_target=TARGETS[row])["input_ids"]
    start = {"m2m100": 2, "nllb": 2, "marian": oracle.pad_token_id, "madlad": 0}.get(family)
    if start is None:  # mBART's shift rotates: the last token of the labels stands first
        return ids, labels, [labels[-1], *labels[:-1]]
    return ids, labels, [start, *labels[:-1]]


@pytest.mark.parametrize(("family", "tokenizer_class", "settings", "from_", "to"), CASES)
def test_pairs_are_written_as_transformers_writes_them(
    preset: Callable[..., Path],
    tmp_path: Path,
    family: str,
    tokenizer_class: str,
    settings: dict[str, Any],
    from_: list[str | None],
    to: list[str],
) -> None:
    directory = preset(family, tokenizer_class, settings)
    oracle = getattr(transformers, tokenizer_class).from_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config["decoder_start_token_id"] = {"madlad": 0, "marian": oracle.pad_token_id}.get(family, 2)
    (directory / "config.json").write_text(json.dumps(config))
    preprocessor = Seq2SeqLMPreprocessor.from_directory(directory)
    told = {"source_lang": from_, "target_lang": to}
    table = pa.table({"encoder_text": SOURCES, "decoder_text": TARGETS, "from": pa.array(from_, pa.string()), "to": to})
    pq.write_table(table, tmp_path / "pairs.parquet")
    columns = DataSettings(shuffle=False, source_lang_column="from", target_lang_column="to")
    by_key = {"encoder_text": SOURCES, "decoder_text": TARGETS, **told}
    rows = [dict(zip(by_key, row, strict=True)) for row in zip(*by_key.values(), strict=True)]
    forms = [(by_key, DataSettings(shuffle=False)), (iter(rows), DataSettings()), (tmp_path / "pairs.parquet", columns)]
    for x, read in forms:
        (batch,) = open_data(x, None, None, preprocessor, read).batches(0)
        for row in range(3):
            source, labels, decoder = expected(oracle, family, row, from_[row], to[row])
            inputs = {name: values[row].tolist() for name, values in batch.inputs.items()}
            assert inputs["encoder_token_ids"][: len(source)] == source
            assert sum(inputs["encoder_padding_mask"]) == len(source)
            assert batch.labels[row, : len(labels)].tolist() == labels
            assert batch.weights[row].sum() == sum(inputs["decoder_padding_mask"]) == len(labels)
            assert inputs["decoder_token_ids"][: len(labels)] == decoder


@pytest.mark.parametrize(
    ("family", "tokenizer_class", "settings", "from_", "to"),
    [case for case in CASES if case.id not in ("marian", "madlad")],
)
def test_rows_are_generated_as_transformers_generates_them(
    preset: Callable[..., Path],
    family: str,
    tokenizer_class: str,
    settings: dict[str, Any],
    from_: list[str],
    to: list[str],
) -> None:
    """In one batch here, row by row there, with the token of the language that its documentation says to give."""
    directory = preset(family, tokenizer_class, settings)
    oracle = getattr(transformers, tokenizer_class).from_pretrained(directory)
    kind = transformers.MBartConfig if family == "mbart" else transformers.M2M100Config
    sizes = SIZES | {"vocab_size": len(oracle), "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    model = reference_model(kind(**sizes, decoder_start_token_id=2, forced_eos_token_id=2))
    model.save_pretrained(directory)
    task = Seq2SeqLM.from_preset(directory)
    limit: dict[str, Any] = {"max_new_tokens": 10, "no_repeat_ngram_size": 2}
    told = {"source_lang": from_, "target_lang": to}
    answers = task.generate({"encoder_text": SOURCES, **told}, **limit)
    assert answers == task.generate(SOURCES, **told, **limit)
    for row, text in enumerate(SOURCES):
        oracle.src_lang = from_[row]
        token = oracle.convert_tokens_to_ids(f"__{to[row]}__" if family == "m2m100" else to[row])
        first = "decoder_start_token_id" if tokenizer_class == "MBartTokenizer" else "forced_bos_token_id"
        ids = model.generate(**oracle(text, return_tensors="pt"), do_sample=False, **limit, **{first: token})
        assert answers[row] == oracle.batch_decode(ids, skip_special_tokens=True)[0]
        assert token in ids[0, :2]


def test_what_fit_refuses(preset: Callable[..., Path]) -> None:
    preprocessor = Seq2SeqLMPreprocessor.from_directory(preset("m2m100", "M2M100Tokenizer", {}), target_lang="de")
    pairs: dict[str, Any] = {"encoder_text": SOURCES, "decoder_text": TARGETS}

    def examples(settings: DataSettings | None = None, **languages: Any) -> torch.Tensor:
        (batch,) = open_data(pairs | languages, None, None, preprocessor, settings or DataSettings()).batches(0)
        return batch.labels

    assert torch.equal(examples(target_lang=None), examples(target_lang=["de", None, "de"]))  # None: the default
    assert torch.equal(examples(), examples(target_lang="deu"))
    assert not torch.equal(examples(), examples(target_lang="fr"))
    with pytest.raises(LanguageError, match=r"training row 1: target_lang must be a language .*'xx'"):
        examples(target_lang=["de", "xx", "de"])
    with pytest.raises(InputError, match=r"must pair up\. Received: 3 encoder_text, 3 decoder_text, 2 source_lang"):
        examples(source_lang=["en", "en"])
    with pytest.raises(InputError, match=r"may have source_lang and target_lang\. Received: .*language"):
        examples(language="de")
    with pytest.raises(InputError, match=r"must have the columns encoder_text, decoder_text, to \(text_column"):
        open_data(pa.table(pairs), None, None, preprocessor, DataSettings(target_lang_column="to"))
