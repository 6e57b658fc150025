"""Metrics against the packages they wrap, and the model's own scores."""

import sys

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from s2s_ray import Seq2SeqLM
from s2s_ray.errors import InputError, SettingsError
from s2s_ray.metrics import bleu, bootstrap, chrf, perplexity, rouge, rouge_rows

PREDICTIONS = ["a small library to parse files", "development files", "the quick fox", "nothing alike"]
REFERENCES = ["library for parsing files", "development files", "a quick brown fox", "other words here"]


def test_rouge_is_the_mean_of_rouge_score():
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    rows = [scorer.score(r, p) for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    scores = rouge(PREDICTIONS, REFERENCES)
    for name, score in scores.items():
        assert score.value == pytest.approx(np.mean([row[name].fmeasure for row in rows]))
        assert score.low <= score.value <= score.high
        assert "rouge-score:" in score.signature
    assert rouge(REFERENCES, REFERENCES, types=["rougeL"])["rougeL"].low == 1.0


def test_bootstrap_is_repeatable_and_covers_the_mean():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        score = bootstrap(generator.normal(2.0, 1.0, 60), resamples=200)
        covered += score.low <= 2.0 <= score.high
    assert 85 <= covered <= 100
    values = generator.random(30)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)


def test_bleu_and_chrf_are_sacrebleus_with_their_signatures():
    ours = bleu(PREDICTIONS, REFERENCES)
    assert ours.value == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score)
    assert "tok:13a" in ours.signature
    assert ours.low <= ours.high
    assert chrf(PREDICTIONS, REFERENCES).value == pytest.approx(sacrebleu.corpus_chrf(PREDICTIONS, [REFERENCES]).score)


def test_perplexity_follows_from_the_scores(tiny_bart_dir, english_text):
    task = Seq2SeqLM.from_preset(tiny_bart_dir)
    x = {"encoder_text": english_text[:6], "decoder_text": [t[:30] for t in english_text[:6]]}
    tokens = sum(map(len, task.preprocessor.encode_targets(x["decoder_text"])))
    expected = np.exp(-task.score(x).sum() / tokens)
    assert perplexity(task, x, batch_size=4) == pytest.approx(expected, rel=1e-4)
    assert task.weighted_metrics == "auto"


def test_what_does_not_pair_up_is_refused():
    for predictions, references in ((["a"], []), ("a", "a"), ([], [])):
        with pytest.raises(InputError):
            rouge(predictions, references)
    with pytest.raises(SettingsError, match="rouge1"):
        rouge_rows(["a"], ["a"], types=["rougeX"])


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(SettingsError, match=r"s2s_ray\[eval\]"):
        rouge(["a"], ["a"])
