"""The task API: every form of input, saving and loading, KerasHub's signatures."""

import inspect
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

import s2s_ray
from s2s_ray import GeneratedText, Seq2SeqLM, samplers
from s2s_ray.errors import InputError, PresetError, PresetIntegrityError, SettingsError
from s2s_ray.models.bart import BartSeq2SeqLM

TEXTS = ["A house is a building.", "", "The quick brown fox jumps over the lazy dog.", "Python is a language."]


@pytest.fixture(scope="module")
def task(tiny_bart_dir: Path) -> Seq2SeqLM:
    return Seq2SeqLM.from_preset(tiny_bart_dir, decoder_sequence_length=16)


@pytest.fixture(scope="module")
def expected(task: Seq2SeqLM) -> list[str]:
    texts = [task.generate(text) for text in TEXTS]
    assert len(set(texts)) == len(TEXTS)
    return texts


def test_base_class_finds_the_subclass(task: Seq2SeqLM, tiny_bart_dir: Path) -> None:
    assert type(task) is BartSeq2SeqLM
    assert type(BartSeq2SeqLM.from_preset(str(tiny_bart_dir))) is BartSeq2SeqLM
    assert task.preprocessor is not None and task.backbone.vocabulary_size == 600


def test_generate_equals_transformers(task: Seq2SeqLM, tiny_bart_dir: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model, tokenizer = (c.from_pretrained(tiny_bart_dir) for c in (AutoModelForSeq2SeqLM, AutoTokenizer))
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    for settings in ({"num_beams": 1}, {"num_beams": 3, "length_penalty": 2.0}):
        ids = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_length=16,
            do_sample=False,
            **settings,
        )
        assert task.generate(TEXTS, max_length=16, **settings) == tokenizer.batch_decode(ids, skip_special_tokens=True)


FORMS: list[Any] = [
    TEXTS,
    tuple(TEXTS),
    np.array(TEXTS),
    np.array(TEXTS, dtype=object),
    pa.array(TEXTS),
    pa.chunked_array([TEXTS[:1], TEXTS[1:]]),
    {"encoder_text": TEXTS},
    {"encoder_text": np.array(TEXTS), "decoder_text": None},
    {"encoder_text": TEXTS, "decoder_text": [""] * 4},
    pa.table({"encoder_text": TEXTS}),
    [TEXTS[:2], TEXTS[2:]],
    [{"encoder_text": TEXTS[:3]}, {"encoder_text": TEXTS[3]}],
]


@pytest.mark.parametrize("inputs", FORMS, ids=lambda form: type(form).__name__)
def test_every_form_of_many_texts_gives_the_same_list(task: Seq2SeqLM, expected: list[str], inputs: Any) -> None:
    before = json.dumps(inputs) if isinstance(inputs, dict) and isinstance(inputs["encoder_text"], list) else None
    assert task.generate(inputs) == expected
    if before:
        assert json.dumps(inputs) == before, "the caller's dictionary changed"


def test_iterators_and_data_loaders(task: Seq2SeqLM, expected: list[str]) -> None:
    assert task.generate(iter(TEXTS)) == expected
    assert task.generate({"encoder_text": [text]} for text in TEXTS) == expected
    assert task.generate(torch.utils.data.DataLoader(TEXTS, batch_size=3)) == expected
    assert task.generate(t for t in np.array(TEXTS)) == expected


def test_one_text_gives_one_text(task: Seq2SeqLM, expected: list[str]) -> None:
    assert task.generate(np.str_(TEXTS[0])) == expected[0]
    assert task.generate({"encoder_text": TEXTS[0]}) == expected[0]
    assert task.generate({"encoder_text": TEXTS[0], "decoder_text": ""}) == expected[0]


@pytest.mark.parametrize(
    "empty", [[], (), np.array([], dtype=str), pa.array([], pa.string()), {"encoder_text": []}, iter(())]
)
def test_nothing_gives_nothing(task: Seq2SeqLM, empty: Any) -> None:
    assert task.generate(empty) == []


def test_prompts_begin_the_output_unless_stripped(task: Seq2SeqLM) -> None:
    inputs = {"encoder_text": TEXTS[0], "decoder_text": "The"}
    whole, rest = task.generate(inputs), task.generate(inputs, strip_prompt=True)
    assert whole.startswith("The") and whole == "The" + rest
    many = task.generate({"encoder_text": TEXTS, "decoder_text": ["The", "", "An", ""]})
    assert many[0] == whole and many[1] == task.generate(TEXTS[1])


def test_stop_token_ids(task: Seq2SeqLM) -> None:
    running = task.generate(TEXTS[0], stop_token_ids=None, return_details=True)
    assert running.num_tokens == 15 and running.finish_reason == "length"
    ids = task(_batch(task, TEXTS[0]))[0, -1].topk(1).indices.tolist()
    for stop in (ids[0], ids, tuple(ids), np.int64(ids[0])):
        assert task.generate(TEXTS[0], stop_token_ids=stop, return_details=True).num_tokens == 1
    assert task.generate(TEXTS[0], stop_token_ids=[], return_details=True) == running
    per_row = task.generate([TEXTS[0]] * 2, stop_token_ids=[None, ids], return_details=True)
    assert [row.num_tokens for row in per_row] == [15, 1]
    for bad in ("auto!", 1.5, [1.5], True):
        with pytest.raises(SettingsError, match="stop_token_ids must be"):
            task.generate(TEXTS[0], stop_token_ids=bad)


def _batch(task: Seq2SeqLM, text: str) -> dict[str, Any]:
    assert task.preprocessor is not None
    return task.preprocessor.generate_preprocess([text])


def test_lengths_count_the_start_token(task: Seq2SeqLM) -> None:
    assert task.generate(TEXTS[0], max_length=5, stop_token_ids=None, return_details=True).num_tokens == 4
    assert task.generate(TEXTS[0], max_new_tokens=5, stop_token_ids=None, return_details=True).num_tokens == 5
    rows = task.generate(TEXTS, max_length=[4, 5, 6, 7], stop_token_ids=None, return_details=True)
    assert [row.num_tokens for row in rows] == [3, 4, 5, 6]
    with pytest.raises(SettingsError, match="max_length must have one value per row"):
        task.generate(TEXTS, max_length=[4, 5])
    with pytest.raises(SettingsError, match="max_length must have one value per row"):
        task.generate(TEXTS[:1], max_length=[4, 5])


def test_settings_per_row_equal_the_rows_alone(task: Seq2SeqLM) -> None:
    beams, penalties = [1, 3, 2, 4], [1.0, 1.3, 2.0, 1.0]
    together = task.generate(TEXTS, num_beams=beams, repetition_penalty=penalties)
    alone = [
        task.generate(t, num_beams=b, repetition_penalty=p) for t, b, p in zip(TEXTS, beams, penalties, strict=True)
    ]
    assert together == alone


def test_n_best_scores_and_details(task: Seq2SeqLM) -> None:
    outputs, scores = task.generate(TEXTS, num_beams=3, num_return_sequences=2, return_scores=True)
    assert all(len(row) == 2 for row in outputs) and all(row == sorted(row, reverse=True) for row in scores)
    text, score = task.generate(TEXTS[0], return_scores=True)
    assert isinstance(text, str) and score < 0
    detail = task.generate(TEXTS[0], return_details=True)
    assert isinstance(detail, GeneratedText) and detail.text == text and detail.score == pytest.approx(score)


def test_sampling_depends_on_seed_and_row(task: Seq2SeqLM) -> None:
    first = task.generate(TEXTS, sampler="random", seed=7)
    assert first == task.generate(TEXTS, sampler="random", seed=7)
    assert first != task.generate(TEXTS, sampler="random", seed=8)
    assert task.generate(TEXTS[2], sampler="random", seed=7, row_ids=[2]) == first[2]
    assert task.generate(TEXTS[::-1], sampler="random", seed=7, row_ids=[3, 2, 1, 0]) == first[::-1]


def test_the_samplers_that_are_more_than_a_choice_of_token(tiny_bart_dir: Path) -> None:
    task = Seq2SeqLM.from_preset(tiny_bart_dir)
    texts = ["a cat sat on the mat", "dogs"]
    greedy = task.generate(texts, sampler="greedy", max_new_tokens=12)
    assert task.generate(texts, sampler="speculative", max_new_tokens=12) == greedy
    for draft in (tiny_bart_dir, task):
        task.compile(sampler=samplers.SpeculativeSampler(3, draft))
        assert task.generate(texts, max_new_tokens=12) == greedy
    assert task.engine() is task.engine()
    contrastive = task.generate(texts, sampler="contrastive", max_new_tokens=12)
    assert contrastive == task.generate(texts, sampler="greedy", max_new_tokens=12, top_k=5, penalty_alpha=0.6)
    assert contrastive != greedy
    with pytest.raises(SettingsError, match="num_beams must be 1 for speculative decoding"):
        task.generate(texts, num_beams=2, max_new_tokens=5)


def test_compile_sets_kerashub_defaults(tiny_bart_dir: Path) -> None:
    task = Seq2SeqLM.from_preset(tiny_bart_dir, decoder_sequence_length=10)
    assert task.sampler is None
    task.compile()
    assert isinstance(task.sampler, samplers.TopKSampler) and task.sampler.k == 5
    assert task.generate(TEXTS) != task.generate(TEXTS, sampler="greedy")
    with pytest.raises(SettingsError, match="sampler must be one of beam, contrastive, greedy"):
        task.compile(sampler="top-k")
    with pytest.raises(SettingsError, match="optimizer"):
        task.compile(optimizer="adamm")
    with pytest.raises(SettingsError, match="loss"):
        task.compile(loss="mse")
    parameters = inspect.signature(Seq2SeqLM.compile).parameters
    assert list(parameters)[1:] == ["optimizer", "loss", "weighted_metrics", "sampler"]
    assert list(inspect.signature(Seq2SeqLM.generate).parameters)[1:5] == [
        "inputs",
        "max_length",
        "stop_token_ids",
        "strip_prompt",
    ]


def test_a_sampler_of_ones_own(task: Seq2SeqLM) -> None:
    class Never(samplers.Sampler):
        def __init__(self, token: int) -> None:
            super().__init__()
            self.token = token

        def get_next_token(self, probabilities: Tensor) -> Tensor:
            return probabilities.index_fill(1, torch.tensor([self.token]), 0.0).argmax(dim=-1)

    assert task.preprocessor is not None
    greedy = task.generate(TEXTS[0], sampler="greedy", max_new_tokens=8, stop_token_ids=None)
    banned = task.preprocessor.tokenizer(greedy)[-1]
    out = task.generate(TEXTS[0], sampler=Never(banned), max_new_tokens=8, stop_token_ids=None)
    assert out != greedy and task.preprocessor.tokenizer.id_to_token(banned) not in out


def test_ids_in_ids_out_without_preprocessor(task: Seq2SeqLM, expected: list[str]) -> None:
    assert task.preprocessor is not None
    bare = BartSeq2SeqLM(task.backbone, generation_settings=task.generation_settings)
    inputs = task.preprocessor.generate_preprocess(TEXTS, sequence_length=16)
    out = bare.generate(inputs, max_length=16)
    assert out["decoder_token_ids"].dtype == np.int32 and out["decoder_padding_mask"].dtype == bool
    assert task.preprocessor.generate_postprocess(out) == expected
    only = {"encoder_token_ids": inputs["encoder_token_ids"], "encoder_padding_mask": inputs["encoder_padding_mask"]}
    assert task.preprocessor.generate_postprocess(bare.generate(only, max_length=16)) == expected
    padded = dict(inputs)
    padded["decoder_token_ids"] = np.pad(inputs["decoder_token_ids"], ((0, 0), (0, 8)))
    padded["decoder_padding_mask"] = np.pad(inputs["decoder_padding_mask"], ((0, 0), (0, 8)))
    assert bare.generate(padded)["decoder_token_ids"].shape == (4, 9)  # KerasHub: the padded width is the limit
    with pytest.raises(InputError, match="without preprocessor"):
        bare.generate("text")
    with pytest.raises(SettingsError, match="score needs a preprocessor"):
        bare.score("a", "b")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (5, "generate takes a string"),
        (None, "generate takes a string"),
        ([1, 2], "every text must be a string. Received: int at 0"),
        (["a", None], "every text must be a string. Received: NoneType at 1"),
        ({"text": "a"}, "must hold encoder_text"),
        ({"encoder_text": ["a"], "decoder_text": ["a", "b"]}, "decoder_text must be as many"),
        ({"encoder_token_ids": [[0.5]]}, "encoder_token_ids must be whole numbers"),
        (
            {"encoder_token_ids": [[5, 2]], "decoder_token_ids": [[2]], "decoder_padding_mask": [[0]]},
            "at least the start",
        ),
    ],
    ids=str,
)
def test_inputs_of_no_known_form_are_refused(task: Seq2SeqLM, inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        task.generate(inputs)


def test_unreadable_text_is_refused_with_its_row(task: Seq2SeqLM) -> None:
    with pytest.raises(ValueError, match=r"1.*surrogate"):
        task.generate(["fine", "broken \ud800"])


def test_unknown_settings_are_refused(task: Seq2SeqLM, tiny_bart_dir: Path) -> None:
    with pytest.raises(TypeError, match="'num_beam'"):
        task.generate("a", num_beam=3)
    with pytest.raises(TypeError, match="encoder_sequence_len"):
        Seq2SeqLM.from_preset(tiny_bart_dir, encoder_sequence_len=3)  # type: ignore[call-arg]
    with pytest.raises(SettingsError, match="num_beams must be"):
        task.generate("a", num_beams=0)
    with pytest.raises(SettingsError, match="dtype must be one of"):
        Seq2SeqLM.from_preset(tiny_bart_dir, dtype="int4")
    with pytest.raises(SettingsError, match="quantization"):
        Seq2SeqLM.from_preset(tiny_bart_dir, quantization="int4")


def test_truncation_is_said(tiny_bart_dir: Path) -> None:
    task = Seq2SeqLM.from_preset(tiny_bart_dir, encoder_sequence_length=6, decoder_sequence_length=5)
    with pytest.warns(UserWarning, match="1 sources were cut to 6 tokens"):
        task.generate(["a", TEXTS[2]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task.generate("a")


def test_score_is_the_log_probability_of_the_target(task: Seq2SeqLM, tiny_bart_dir: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model, tokenizer = (c.from_pretrained(tiny_bart_dir) for c in (AutoModelForSeq2SeqLM, AutoTokenizer))
    targets = ["A house.", "Nothing", "A fox and a dog", ""]
    scores = task.score(TEXTS, targets)
    for index, (source, target) in enumerate(zip(TEXTS, targets, strict=True)):
        labels = tokenizer(target, return_tensors="pt").input_ids
        with torch.no_grad():
            loss = model(**_inputs(tokenizer(source, return_tensors="pt")), labels=labels).loss.item()
        assert scores[index] == pytest.approx(-loss * labels.shape[1], abs=1e-3)
    assert task.score(TEXTS[0], targets[0]) == pytest.approx(scores[0], abs=1e-4)
    tokens = task.score({"encoder_text": TEXTS, "decoder_text": targets}, per_token=True)
    assert [row.sum() for row in tokens] == pytest.approx(scores, abs=1e-4)


def _inputs(batch: Any) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def test_random_initialisation(tiny_bart_dir: Path) -> None:
    fresh = Seq2SeqLM.from_preset(tiny_bart_dir, load_weights=False)
    loaded = Seq2SeqLM.from_preset(tiny_bart_dir)
    a, b = (t.backbone.state_dict()["token_embedding.weight"] for t in (fresh, loaded))
    assert a.shape == b.shape and not torch.equal(a, b)


def test_saved_presets_load_here_and_in_transformers(task: Seq2SeqLM, tmp_path: Path, expected: list[str]) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    target = tmp_path / "saved"
    task.save_to_preset(target)
    task.save_to_preset(str(target))  # over itself
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]
    again = Seq2SeqLM.from_preset(target)
    assert again.preprocessor is not None and again.preprocessor.decoder_sequence_length == 16
    assert again.generation_settings == task.generation_settings
    assert again.generate(TEXTS) == expected
    model, info = AutoModelForSeq2SeqLM.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs = model.state_dict()
    for name, tensor in task.backbone.state_dict().items():
        assert torch.equal(theirs[task.backbone.checkpoint_name(name)], tensor)
    batch = AutoTokenizer.from_pretrained(target)(TEXTS[:1], return_tensors="pt")
    assert batch["input_ids"].tolist() == [again.preprocessor.encode_sources(TEXTS[:1])[0][0]]
    ids = model.generate(input_ids=batch["input_ids"], max_length=16)
    assert AutoTokenizer.from_pretrained(target).decode(ids[0], skip_special_tokens=True) == expected[0]


def test_a_changed_file_of_a_saved_preset_is_refused(task: Seq2SeqLM, tmp_path: Path) -> None:
    task.save_to_preset(tmp_path / "saved")
    weights = tmp_path / "saved" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(PresetIntegrityError):
        Seq2SeqLM.from_preset(tmp_path / "saved")


def test_saving_over_anything_else_is_refused(task: Seq2SeqLM, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(PresetError, match="Received"):
        task.save_to_preset(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_bfloat16_runs_and_is_kept(tiny_bart_dir: Path, tmp_path: Path) -> None:
    task = Seq2SeqLM.from_preset(tiny_bart_dir, dtype="bfloat16", decoder_sequence_length=12)
    assert len(task.generate(TEXTS)) == 4 and len(task.generate(TEXTS, num_beams=3)) == 4
    task.save_to_preset(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"


def test_generate_after_fit_uses_the_new_weights(tiny_bart_dir: Path) -> None:
    task = Seq2SeqLM.from_preset(tiny_bart_dir, decoder_sequence_length=8)
    before = task.generate("The cat", sampler="greedy")
    task.compile(optimizer=torch.optim.SGD(task.backbone.parameters(), lr=0.5), sampler="greedy")
    task.fit({"encoder_text": ["The cat"] * 4, "decoder_text": ["A dog"] * 4}, epochs=5, batch_size=4, verbose=0)
    after = task.generate("The cat", sampler="greedy")
    plain = task.backbone.train().eval()
    assert after != before
    ids = plain(_tensors(task, "The cat"))[0, -1].argmax().item()
    assert task.preprocessor is not None
    first = task.generate("The cat", sampler="greedy", max_new_tokens=1, stop_token_ids=None)
    assert first == task.preprocessor.decode([[ids]])[0]


def _tensors(task: Seq2SeqLM, text: str) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value) for name, value in _batch(task, text).items()}


def test_presets_are_listed_on_every_class() -> None:
    assert {"bart_base_en", "bart_large_en", "bart_large_en_cnn"} <= set(Seq2SeqLM.presets.keys())
    assert set(BartSeq2SeqLM.presets.keys()) <= set(Seq2SeqLM.presets.keys())
    assert "Seq2SeqLM" in dir(s2s_ray) and s2s_ray.Seq2SeqLM is Seq2SeqLM


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*max_length.*")
        yield
