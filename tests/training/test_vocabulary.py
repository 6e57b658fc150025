"""New tokens: one id each, everything that was there as it was, ties kept, and a directory that transformers loads."""

from pathlib import Path

import pytest
import torch

from s2s_ray import Seq2SeqLM
from s2s_ray.errors import SettingsError
from s2s_ray.training.vocabulary import extend_vocabulary


def test_new_tokens_leave_the_rest_as_it_was(tiny_bart_dir: Path, tmp_path: Path, english_text: list[str]) -> None:
    from transformers import BartForConditionalGeneration

    before = Seq2SeqLM.from_preset(tiny_bart_dir)
    size = before.backbone.vocabulary_size
    assert extend_vocabulary(tiny_bart_dir, ["<de>", "<fr>"], tmp_path / "grown") == [size, size + 1]
    after = Seq2SeqLM.from_preset(tmp_path / "grown")
    assert after.backbone.vocabulary_size == size + 2
    encoded = after.preprocessor.encode_sources(["<de>word"])[0][0]
    assert encoded.count(size) == 1 and after.preprocessor.decode([encoded]) == ["word"]
    batch, _, _ = before.preprocessor({"encoder_text": english_text[:3], "decoder_text": english_text[3:6]})
    logits = [task.backbone.eval()({k: torch.as_tensor(v) for k, v in batch.items()}) for task in (before, after)]
    torch.testing.assert_close(logits[1][..., :size], logits[0])
    table = after.backbone.state_dict()["token_embedding.weight"]
    torch.testing.assert_close(table[size], table[:size].mean(0))
    model = BartForConditionalGeneration.from_pretrained(tmp_path / "grown")
    assert model.lm_head.weight is model.model.shared.weight or torch.equal(model.lm_head.weight, table)
    assert model.final_logits_bias.shape == (1, size + 2)
    with pytest.raises(SettingsError, match="<de>"):
        extend_vocabulary(tmp_path / "grown", ["<de>"], tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_token_in_the_form_of_a_language_is_one(tiny_bart_dir: Path, tmp_path: Path) -> None:
    extend_vocabulary(tiny_bart_dir, [">>gl<<", ">>de<<", "<new>"], tmp_path / "two")
    first = Seq2SeqLM.from_preset(tmp_path / "two").preprocessor
    assert set(first.languages.tokens) == {"gl", "de"}
    first.save(tmp_path / "two")  # now the file lists them
    (tmp_path / "two" / "manifest.json").unlink()
    extend_vocabulary(tmp_path / "two", [">>fr<<"], tmp_path / "three")
    languages = Seq2SeqLM.from_preset(tmp_path / "three").preprocessor.languages
    assert dict(languages.tokens) == {"gl": ">>gl<<", "de": ">>de<<", "fr": ">>fr<<"}
