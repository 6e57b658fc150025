"""Tokenising a unit: what the workers then map into memory is what the preprocessor makes of each pair, by language."""

import dataclasses
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s2s_ray import Seq2SeqLM, presets
from s2s_ray.errors import InfrastructureError, InputError
from s2s_ray.pipelines.finetune import validation_sample
from s2s_ray.pipelines.finetune_settings import FinetuneSettings
from s2s_ray.pipelines.inputs import find_files
from s2s_ray.pipelines.tokens import TokenJob, cut_inputs, tokenise_unit
from s2s_ray.storage import Location
from s2s_ray.training.shards import open_shards

ROWS = [
    ("good morning", "a greeting", "en", "de"),
    (None, "no source", "en", "de"),
    ("to all of you", "whom", "de", "en"),
    ("  ", "blank", "en", "de"),
    ("of no such language", "what", "en", "xx"),
    ("many words " * 40, "long", "en", "en"),
    ("to nobody", "null", "en", None),
    ("from nowhere", "empty", "", "de"),
]


@pytest.fixture
def preset(tiny_bart_dir: Path, tmp_path: Path) -> Path:
    """The tiny BART with two languages, whose tokens start the decoder and end the source (as mBART-25's)."""
    directory = tmp_path / "preset"
    shutil.copytree(tiny_bart_dir, directory)
    languages = {"convention": "start_token", "tokens": {"en": "<mask>", "de": "<unk>"}}
    (directory / "preprocessor.json").write_text(json.dumps({"languages": languages}))
    return directory


@pytest.fixture
def settings(preset: Path, tmp_path: Path) -> FinetuneSettings:
    path = tmp_path / "pairs.parquet"
    columns = [list(column) for column in zip(*ROWS, strict=True)]
    pq.write_table(pa.table(columns, names=["text", "summary", "from", "to"]), path, row_group_size=4)
    return FinetuneSettings(
        input=(str(path),),
        output=str(tmp_path / "out"),
        preset=str(preset),
        source_lang_column="from",
        target_lang_column="to",
        max_source_length=32,
    )


def test_pairs_are_tokenised_by_language_and_bad_ones_counted(settings: FinetuneSettings, preset: Path) -> None:
    files = find_files(settings.input, Location.parse(settings.output))
    units, counts = cut_inputs([files], settings, "--input")
    assert counts == [len(units)] == [1]
    job = TokenJob(settings, presets.resolve(preset).digest, Location.parse(f"{settings.output}/tokens"))
    result = json.loads(tokenise_unit({"descriptor": units[0].encode()}, "train", job)["result"])
    assert result["pairs"] == 3 and result["truncated"] == [1, 0]
    assert result["skipped"] == {"NULL_TEXT": 1, "EMPTY": 1, "UNKNOWN_LANGUAGE": 3}
    path = Path(settings.output) / "tokens" / "train-u00000000.arrow"
    examples = open_shards([path], pad=1)
    preprocessor = Seq2SeqLM.from_preset(preset).preprocessor
    good = [ROWS[0], ROWS[2]]
    x, y, _ = preprocessor(
        {
            "encoder_text": [row[0] for row in good],
            "decoder_text": [row[1] for row in good],
            "source_lang": [row[2] for row in good],
            "target_lang": [row[3] for row in good],
        }
    )
    batch = examples.collate([0, 1])
    assert batch.labels.tolist() == y.tolist()
    for name in ("encoder_token_ids", "encoder_padding_mask", "decoder_token_ids"):
        assert batch.inputs[name].tolist() == x[name].tolist(), name
    assert len({row[0] for row in batch.inputs["decoder_token_ids"].tolist()}) == 2  # each language starts its own way

    defaulted = dataclasses.replace(job, settings=dataclasses.replace(settings, source_lang="en", target_lang="de"))
    assert json.loads(tokenise_unit({"descriptor": units[0].encode()}, "defaults", defaulted)["result"])["pairs"] == 5

    sources, _, _, targets = validation_sample(units, job)
    assert sources == ["good morning", "to all of you", ROWS[5][0]] and targets == ["de", "en", "en"]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InfrastructureError, match="Delete it, and run again"):
        open_shards([path], pad=1)


def test_a_missing_language_column_is_named(settings: FinetuneSettings) -> None:
    wrong = dataclasses.replace(settings, source_lang_column="language")
    files = find_files(wrong.input, Location.parse(wrong.output))
    with pytest.raises(InputError, match=r"--source-lang-column must name one text column .*'language'"):
        cut_inputs([files], wrong, "--input")
