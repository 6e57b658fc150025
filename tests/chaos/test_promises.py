"""Promises that need no Ray: odd rows, schema drift, a lost device, NaN, wrong tokenizers, changed settings."""

import asyncio
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from job_helpers import write_input
from row_helpers import prepare, process

from s2s_ray.errors import FingerprintError, InputError, PresetError, S2SRayError
from s2s_ray.pipelines import generate
from s2s_ray.pipelines import plan as planning
from s2s_ray.pipelines.engine_thread import CUDA_EXIT_CODE
from s2s_ray.pipelines.inputs import InputFile, find_files, output_schema, read_footers
from s2s_ray.pipelines.replica import Replica
from s2s_ray.pipelines.rows import Job, read_unit
from s2s_ray.pipelines.settings import GenerateSettings
from s2s_ray.presets.manifest import seal
from s2s_ray.storage import Location

pytestmark = pytest.mark.timeout(1800)  # with --full, on a busy machine
Record = Callable[..., None]
MIB = 2**20

# What a text may hold, and the reason that its row ends with; "" is an answer.
ODD: dict[bytes | None, str] = {
    None: "NULL_TEXT",
    b"caf\xe9 in Latin-1": "INVALID_UTF8",
    b"lone high \xed\xa0\x80": "INVALID_UTF8",
    b"lone low \xed\xb0\x80": "INVALID_UTF8",
    b"a pair of surrogates \xed\xa0\xbd\xed\xb8\x80": "INVALID_UTF8",
    b"overlong slash \xc0\xaf": "INVALID_UTF8",
    b"overlong NUL \xc0\x80": "INVALID_UTF8",
    b"five bytes \xf8\x88\x80\x80\x80": "INVALID_UTF8",
    b"cut after one of two \xc3": "INVALID_UTF8",
    b"cut after two of three \xe2\x82": "INVALID_UTF8",
    b"cut after three of four \xf0\x9f\x8e": "INVALID_UTF8",
    b"\x80 a continuation": "INVALID_UTF8",
    b"beyond the last character \xf4\x90\x80\x80": "INVALID_UTF8",
    "UTF-16".encode("utf-16"): "INVALID_UTF8",
    b"x" * (MIB + 1): "TOO_LONG",
    b"line\n" * (MIB // 5 + 1): "TOO_LONG",
    b"words " * (MIB // 6): "",  # a line of just under 1 MiB
    b"": "",
    b" \t\r\n ": "",
    b"\0": "",
    b"NUL \0 inside": "",
    bytes(range(1, 32)): "",
    **dict.fromkeys(
        map(
            str.encode,
            (
                "\u00a0\u2003",
                "\u200b",
                "\ufeffbyte order mark",
                "🎉🏳️‍🌈👩‍👩‍👧",
                "🇩🇪🇫🇷",
                "e" + "\u0301" * 300,
                "\u202eright to left\u202c",
                "\uffff and \U0010ffff",
                "\ue000 private",
                "\ufffd\ufffd",
                "<s></s><pad> <mask> <unk>",
                '{"json": [1, null]}',
                "'; DROP TABLE rows; --",
                "Donaudampfschifffahrt" * 250,
                "\n" * 500 + "end",
                "ภาษาไทยไม่มีช่องว่าง",
                "𝒜𝓁𝓅𝒽𝒶 ﬁne ıI",
                "漢字とかなと한글",
                "line\u2028separator\u2029\x85",
            ),
        ),
        "",
    ),
}


def answered(replica: Replica, job: Job, units: list[Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(output rows, error rows) of these units, through the stages of a job in this process."""
    pairs = [process(job, unit, asyncio.run(replica.answer(read_unit(unit, job)[0]))) for unit in units]
    return [row for data, _ in pairs for row in data.to_pylist()], [row for _, bad in pairs for row in bad.to_pylist()]


def test_odd_rows_end_with_a_reason_or_an_answer_and_their_neighbours_are_unchanged(
    tiny_bart_dir: Path, tmp_path: Path, english_text: list[str], pytestconfig: pytest.Config, record: Record
) -> None:
    """P10: 41 kinds of text at 25 positions, two without --full."""
    assert len(ODD) >= 40
    blocks = 25 if pytestconfig.getoption("--full") else 2
    good = [text[: 30 + row % 70].encode() for row, text in enumerate(english_text[: 4 * blocks])]
    rows: list[bytes | None] = []
    for block in range(blocks):
        rows += [*good[4 * block : 4 * block + 4], *ODD]
    column = pa.array(rows, pa.binary()).view(pa.string())  # as a writer that does not check UTF-8 leaves it
    settings = {"max_target_length": 6, "rows_per_unit": 30, "columns": ("id",)}
    for name in ("odd", "clean"):
        (tmp_path / name).mkdir()
    odd = prepare(tiny_bart_dir, pa.table({"id": range(len(rows)), "text": column}), tmp_path / "odd", **settings)
    table = pa.table({"id": range(len(good)), "text": pa.array(good, pa.binary())})
    clean = prepare(tiny_bart_dir, table, tmp_path / "clean", **settings)
    replica = Replica(odd[0], 1)
    (found, errors), (expected, none) = answered(replica, *odd), answered(replica, *clean)

    reasons = {error["row"]: error["reason"] for error in errors}
    summaries = {row["id"]: row["summary"] for row in found}
    doubled = reasons.keys() & summaries.keys()
    lost = set(range(len(rows))) - reasons.keys() - summaries.keys()
    injected = blocks * len(ODD)
    record("odd text, 41 kinds", injected=injected, rows=len(rows), lost=len(lost), doubled=len(doubled))
    assert not none and not lost and not doubled and len(found) + len(errors) == len(rows)
    neighbours = [row for row in range(len(rows)) if row % (4 + len(ODD)) < 4]
    assert [summaries[row] for row in neighbours] == [row["summary"] for row in expected]
    for kind, reason in enumerate(ODD.values()):
        places = range(4 + kind, len(rows), 4 + len(ODD))
        assert {reasons.get(place, "") for place in places} == {reason}, list(ODD)[kind]
        assert reason or len({summaries[place] for place in places}) == 1, list(ODD)[kind]


TEXT = pa.field("text", pa.string())
DRIFTS: list[tuple[list[pa.Field], list[pa.Field], str]] = [
    *(([TEXT], [pa.field("text", kind)], message) for kind, message in (
        (pa.int64(), "text column must be string"),
        (pa.float32(), "text column must be string"),
        (pa.bool_(), "text column must be string"),
        (pa.null(), "text column must be string"),
        (pa.timestamp("us"), "text column must be string"),
        (pa.decimal128(9, 2), "text column must be string"),
        (pa.list_(pa.string()), "text column must be string"),
        (pa.struct([TEXT]), "text column must be string"),
        (pa.dictionary(pa.int32(), pa.int64()), "text column must be string"),
        (pa.binary(), "must agree"),
        (pa.large_string(), "must agree"),
        (pa.dictionary(pa.int32(), pa.string()), "must agree"),
    )),
    ([TEXT], [pa.field("Text", pa.string())], "--text-column must name a column"),
    ([TEXT], [pa.field("body", pa.string())], "--text-column must name a column"),
    ([TEXT], [], "--text-column must name a column"),
    ([TEXT], [TEXT, pa.field("more", pa.int8())], "also has 'more'"),
    ([TEXT, pa.field("id", pa.int64())], [TEXT], "--columns must name a column"),
    ([TEXT, pa.field("id", pa.int64())], [TEXT, pa.field("id", pa.int32())], "must agree"),
    ([TEXT, pa.field("x", pa.list_(pa.int8()))], [TEXT, pa.field("x", pa.list_(pa.int16()))], "must agree"),
    ([TEXT, pa.field("when", pa.timestamp("us"))], [TEXT, pa.field("when", pa.timestamp("us", "UTC"))], "must agree"),
]  # fmt: skip


@pytest.mark.parametrize("first,second,message", DRIFTS, ids=[str(number) for number in range(len(DRIFTS))])
def test_schema_drift_is_refused(tmp_path: Path, first: list[pa.Field], second: list[pa.Field], message: str) -> None:
    """P12: twenty pairs of files; the second is the one that is named. Footers are all that is read."""
    for name, fields in (("a", first), ("b", second)):
        pq.write_table(pa.Table.from_pylist([], schema=pa.schema(fields)), tmp_path / f"{name}.parquet")
    settings = GenerateSettings(input=(str(tmp_path),), output=str(tmp_path / "out"), preset="none")
    footers, _ = read_footers(find_files(settings.input, Location.parse(settings.output)), skip_bad=False)
    with pytest.raises(InputError, match=message) as caught:
        output_schema(footers, settings)
    assert "b.parquet" in str(caught.value) and caught.value.exit_code == 2


def test_rows_whose_scores_are_no_numbers(
    tiny_bart_dir: Path, tmp_path: Path, english_text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """P15: a network that gives NaN for seven rows costs exactly these seven."""
    rows, bad = 60, {0, 1, 17, 30, 31, 44, 59}
    table = pa.table({"id": range(rows), "text": [text[:60] for text in english_text[:rows]]})
    job, units = prepare(tiny_bart_dir, table, tmp_path, max_target_length=8, rows_per_unit=20, columns=("id",))
    replica = Replica(job, 1)
    expected, none = answered(replica, job, units)
    works = [read_unit(unit, job)[0].to_pylist() for unit in units]
    marked = {tuple(row["token_ids"]) for work in works for row in work if row["row"] in bad}
    backbone = replica.engine._make_engine(None).backbone
    embed = backbone.embed_source

    def embed_some(token_ids: Any, padding_mask: Any) -> Any:
        hit = [tuple(row[mask].tolist()) in marked for row, mask in zip(token_ids, padding_mask, strict=True)]
        states = embed(token_ids, padding_mask).clone()
        states[hit] = float("nan")
        return states

    monkeypatch.setattr(backbone, "embed_source", embed_some)
    found, errors = answered(replica, job, units)
    assert not none and {row["row"]: row["reason"] for row in errors} == dict.fromkeys(sorted(bad), "NONFINITE")
    assert found == [row for row in expected if row["id"] not in bad]


@pytest.mark.parametrize(
    "error", ["RuntimeError('CUDA error: an illegal memory access')", "type('AcceleratorError', (Exception,), {})()"]
)
def test_a_lost_device_ends_the_process(error: str) -> None:
    """P14: no row is blamed, no future is answered: the process exits, which Ray takes for a dead actor."""
    program = (
        "from s2s_ray.generation.settings import GenerationSettings\n"
        "from s2s_ray.pipelines.engine_thread import EngineThread\n"
        "class Engine:\n"
        "    has_work, max_slots = True, 8\n"
        "    def add(self, requests): pass\n"
        f"    def step(self): raise {error}\n"
        "future = EngineThread(lambda slots: Engine(), None).submit([(0, [1], GenerationSettings())])\n"
        "print(future.exception(60))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (CUDA_EXIT_CODE, ""), done.stderr


def other_tokenizers(directory: Path, trained_bpe: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """Six ways to end up with the tokenizer of another model; each changes files of a copied preset."""
    tokenizer = directory / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocabulary: dict[str, int] = content["model"]["vocab"]

    def write(**model: Any) -> None:
        tokenizer.write_text(json.dumps(content | {"model": content["model"] | model}))

    def with_config(**changes: Any) -> Callable[[], None]:
        def change() -> None:
            for path in (directory / "config.json", directory / "generation_config.json"):
                path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return change

    size = len(vocabulary)
    return {
        "of a larger model": lambda: write(vocab=vocabulary | {f"token{n}": size + n for n in range(50)}),
        "ids one further": lambda: write(vocab={token: number + 1 for token, number in vocabulary.items()}),
        "ids far beyond": lambda: write(vocab=vocabulary | {"Ġthe": 30_000}),
        "another end token": with_config(eos_token_id=7),
        "another padding token": with_config(pad_token_id=0),
        "a start beyond the model": with_config(decoder_start_token_id=50_000),
    }


def test_the_tokenizer_of_another_model_is_refused(
    tiny_bart_dir: Path, trained_bpe: dict[str, Any], tmp_path: Path
) -> None:
    """P17: before anything is written; with a manifest by its sums (7), without one by ids that do not fit."""
    (path,) = write_input(tmp_path / "in", ["one", "two"])
    for number, name in enumerate(other_tokenizers(tiny_bart_dir, trained_bpe)):
        for sealed in (True, False):
            preset = Path(shutil.copytree(tiny_bart_dir, tmp_path / f"preset-{number}-{sealed}"))
            if sealed:
                seal(preset)
            other_tokenizers(preset, trained_bpe)[name]()
            settings = GenerateSettings(input=(path,), output=str(tmp_path / "out"), preset=str(preset))
            with pytest.raises(PresetError) as caught:
                generate.prepare(settings)
                pytest.fail(f"accepted: a tokenizer with {name}, sealed: {sealed}")
            assert caught.value.exit_code == 7, f"{name}, sealed: {sealed}: {caught.value}"
    assert not (tmp_path / "out").exists()


CHANGED: dict[str, Any] = {
    "text_column": "t", "summary_column": "s", "columns": ("id",), "score": True, "source_prefix": "x: ",
    "source_lang": "en", "target_lang": "de", "source_lang_column": "from", "target_lang_column": "to",
    "segment": "sentence", "max_source_length": 7, "max_target_length": 7, "min_length": 3, "num_beams": 3,
    "sampler": "top_k", "temperature": 0.5, "top_k": 3, "top_p": 0.5, "length_penalty": 2.0,
    "no_repeat_ngram_size": 2, "repetition_penalty": 1.5, "seed": 1, "dtype": "bfloat16", "on_long": "error",
    "skip_bad_files": True, "rows_per_unit": 9, "quantization": "int8", "penalty_alpha": 0.5,
}  # fmt: skip
NEEDS: dict[str, dict[str, Any]] = {
    "temperature": {"sampler": "random"}, "top_k": {"sampler": "top_k"}, "top_p": {"sampler": "top_p"},
    "length_penalty": {"num_beams": 3}, "penalty_alpha": {"sampler": "contrastive"},
}  # fmt: skip


def test_every_setting_of_the_fingerprint_is_named_when_it_changes() -> None:
    """P24: and the settings that are not in it change nothing."""
    fields = {field.name: field for field in dataclasses.fields(GenerateSettings)}
    files = [InputFile("/in/a", "1-1")]
    covered = {name for name, field in fields.items() if field.metadata["identity"]} - {"input", "output", "preset"}
    assert covered == CHANGED.keys()
    places = {"input": ("in",), "output": "out", "preset": "p"}
    for name, value in CHANGED.items():
        before = GenerateSettings(**places, **NEEDS.get(name, {}))
        stored = planning.document(before, files, "digest")
        ours = planning.document(dataclasses.replace(before, **{name: value}), files, "digest")
        with pytest.raises(FingerprintError, match=rf"settings: {name} was .*, now ") as caught:
            planning.check_same(stored, ours, Location.parse("/out"))
        assert caught.value.exit_code == 5 and planning.fingerprint(stored) != planning.fingerprint(ours)


def test_exit_codes_are_those_of_the_page() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "reliability.md").read_text()

    def below(kind: type[S2SRayError]) -> set[int]:
        return {kind.exit_code}.union(*(below(child) for child in kind.__subclasses__()))

    for code in below(S2SRayError):
        assert f"\n| {code} | " in page, f"docs/reliability.md must say what exit code {code} means"
