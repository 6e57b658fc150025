"""The translate job in this process on a real local Ray: what the task gives sentence by sentence, in its places."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checker import check

from s2s_ray.errors import FingerprintError
from s2s_ray.pipelines.command import translate_defaults
from s2s_ray.pipelines.generate import run
from s2s_ray.pipelines.publish import verify
from s2s_ray.pipelines.settings import parse
from s2s_ray.seq2seq_lm import Seq2SeqLM
from s2s_ray.storage import Location
from s2s_ray.text.segment import segment


def test_sentences_and_languages_by_row(
    translator: Path, english_text: list[str], tmp_path: Path, local_ray: None
) -> None:
    texts: list[str | None] = [
        f"{one}\n\n * {two}\n" for one, two in zip(english_text[:40], english_text[40:80], strict=True)
    ]
    languages = ["de", "fr"] * 20
    texts[5], languages[9] = None, "xx"
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"id": range(40), "text": texts, "to": languages}), path, row_group_size=16)
    flags = ["--input", str(path), "--output", str(tmp_path / "out"), "--preset", str(translator)]
    flags += ["--target-lang-column", "to", "--max-target-length", "8", "--num-beams", "2", "--rows-per-unit", "16"]
    settings = parse(flags, "", translate_defaults(flags))
    report = run(settings)
    assert (report.rows, report.error_rows, report.exit_code) == (38, 2, 3)
    assert report.reasons == {"NULL_TEXT": 1, "UNKNOWN_LANGUAGE": 1}
    verify(Location.parse(report.output))
    verdict = check([str(path)], report.output)
    assert (verdict.lost, verdict.doubled, verdict.problems) == ([], [], [])

    task = Seq2SeqLM.from_preset(translator)
    answers = {row["id"]: row for row in verdict.table.to_pylist()}
    assert sorted(answers) == [row for row in range(40) if row not in (5, 9)]
    for row in (0, 1, 38, 39):
        cut = segment(texts[row] or "")
        sentences = [" ".join(sentence.split()) for sentence in cut.sentences]
        translated = task.generate(sentences, target_lang=languages[row], max_new_tokens=8, num_beams=2)
        assert answers[row]["translation"] == cut.join([text.strip() for text in translated])
        assert answers[row]["finish_reason"] == "length"
        assert len(sentences) > 1
        assert answers[row]["num_tokens"] > 8

    again = run(parse([*flags, "--num-replicas", "2"], "", translate_defaults(flags)))
    assert again.rows_generated == 0
    with pytest.raises(FingerprintError, match="segment was 'sentence', now 'none'"):
        run(parse([*flags, "--segment", "none"], "", translate_defaults(flags)))
