"""T5 as a task: text in and out, training, saving, and half precision, each beside transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import SentencePieceUnigramTokenizer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Tokenizer

from s2s_ray import Seq2SeqLM
from s2s_ray.models.t5 import T5Seq2SeqLM
from s2s_ray.training.batches import Examples, Ragged
from s2s_ray.training.optimizers import OptimizerSettings
from s2s_ray.training.step import Totals, TrainStep
from tests.models.contract import reference_logits, reference_model
from tests.models.test_t5 import T5_1_1, batch, config, with_own_head

WORDS = ["alpha", "index", "string", "module"]
PAIRS = {"encoder_text": [f"say {word}" for word in WORDS] * 4, "decoder_text": WORDS * 4}


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory, english_text: list[str]) -> Path:
    """A Hugging Face directory of a random T5 1.1 whose embedding has more rows than its tokenizer has tokens."""
    directory = tmp_path_factory.mktemp("t5") / "preset"
    trainer = SentencePieceUnigramTokenizer()
    special = ["<pad>", "</s>", "<unk>"]
    trainer.train_from_iterator(
        english_text[:60], vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    pieces = [trainer.id_to_token(i) for i in range(trainer.get_vocab_size())]
    T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=4).save_pretrained(directory)
    sizes = {**T5_1_1, "vocab_size": 224, "num_decoder_layers": 1}
    reference_model(config(**sizes), stop_bias=2.0, adjust=with_own_head).save_pretrained(directory)
    return directory


def test_text_as_transformers_generates_it(preset: Path, english_text: list[str]) -> None:
    texts = english_text[:6]
    task = Seq2SeqLM.from_preset(preset)
    assert isinstance(task, T5Seq2SeqLM)
    tokenizer, model = AutoTokenizer.from_pretrained(preset), AutoModelForSeq2SeqLM.from_pretrained(preset).eval()
    ids = model.generate(**tokenizer(texts, return_tensors="pt", padding=True), max_length=20, do_sample=False)
    assert task.generate(texts, max_length=20) == tokenizer.batch_decode(ids, skip_special_tokens=True)


def test_saved_and_loaded_by_transformers(preset: Path, tmp_path: Path) -> None:
    task = Seq2SeqLM.from_preset(preset)
    task.save_to_preset(tmp_path / "saved")
    ours, theirs = (AutoModelForSeq2SeqLM.from_pretrained(p).eval() for p in (tmp_path / "saved", preset))
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert torch.equal(reference_logits(ours, batch()), reference_logits(theirs, batch()))
    again = Seq2SeqLM.from_preset(tmp_path / "saved").backbone.eval()
    assert torch.equal(again(batch()), task.backbone.eval()(batch()))


def test_loss_and_gradients_equal_transformers(preset: Path, english_text: list[str]) -> None:
    task = Seq2SeqLM.from_preset(preset)
    assert task.preprocessor is not None
    sources, _ = task.preprocessor.encode_sources(english_text[:8])
    labels = task.preprocessor.encode_targets([text[:20] for text in english_text[8:16]])
    examples = Examples(Ragged.from_rows(sources), Ragged.from_rows(labels), 0, 0)
    data = examples.collate(range(8))
    before = {name: p.detach().clone() for name, p in task.backbone.named_parameters()}
    task.backbone.eval()  # no dropout
    totals = Totals()
    TrainStep(task.backbone, torch.optim.SGD(task.backbone.parameters(), lr=1.0))([data], totals)
    model = AutoModelForSeq2SeqLM.from_pretrained(preset).eval()
    output = model(
        input_ids=data.inputs["encoder_token_ids"],
        attention_mask=data.inputs["encoder_padding_mask"],
        labels=data.labels.masked_fill(data.weights == 0, -100),
    )
    output.loss.backward()
    assert totals.results()["loss"] == pytest.approx(output.loss.item(), rel=1e-6)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    after = dict(task.backbone.named_parameters())
    assert len(before) == len(gradients)
    for name, weight in before.items():
        expected = gradients[task.backbone.checkpoint_name(name)]
        torch.testing.assert_close(weight - after[name], expected, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fit_with_dropout_learns(preset: Path, precision: str) -> None:
    task = Seq2SeqLM.from_preset(preset)
    task.compile(optimizer=OptimizerSettings(learning_rate=1e-2), sampler=None)
    before = task.evaluate(PAIRS)["loss"]
    history = task.fit(PAIRS, epochs=50, batch_size=16, precision=precision, verbose=0).history
    assert history["loss"][-1] < 1 < 3 < before
    assert task.evaluate(PAIRS)["loss"] < 0.6
    assert "alpha" in task.generate(PAIRS["encoder_text"][:4], max_length=12)


def test_dropout_is_where_transformers_has_it(preset: Path) -> None:
    """From one seed both draw the same masks, as they draw them in the same order for the same shapes."""
    ours = Seq2SeqLM.from_preset(preset).backbone.train()
    theirs = AutoModelForSeq2SeqLM.from_pretrained(preset).train()
    torch.manual_seed(0)
    expected = reference_logits(theirs, batch())
    torch.manual_seed(0)
    found = ours(batch())
    assert (found - expected).abs().max() <= 1e-4
    assert (ours(batch()) - expected).abs().max() > 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_transformers(preset: Path, dtype: str) -> None:
    task = Seq2SeqLM.from_preset(preset, dtype=dtype)
    theirs: Any = AutoModelForSeq2SeqLM.from_pretrained(preset, dtype=dtype).eval()
    kept = {name for name, p in theirs.named_parameters() if p.dtype == torch.float32}
    ours = {
        task.backbone.checkpoint_name(name) for name, p in task.backbone.named_parameters() if p.dtype == torch.float32
    }
    assert ours == kept
    assert bool(kept) is (dtype == "float16")
    x = batch()
    expected = reference_logits(theirs, x).float()
    exact = Seq2SeqLM.from_preset(preset).backbone.eval()(x)
    rounding = (expected - exact).abs().mean()
    for packed in (False, True):
        if packed:
            task.backbone.pack()
        found = task.backbone.eval()(x).float()
        assert (found - expected).abs().mean() < 0.5 * rounding
    _, score = task.generate("say alpha", max_length=8, num_beams=3, return_scores=True)
    assert np.isfinite(score)
