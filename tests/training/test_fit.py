"""`fit` from every form of data, its validation, history, callbacks, determinism and errors."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from s2s_ray import Seq2SeqLM
from s2s_ray.errors import InputError, SettingsError
from s2s_ray.training.callbacks import Callback, EarlyStopping, WeightAverage
from s2s_ray.training.fit import evaluate
from s2s_ray.training.optimizers import OptimizerSettings

FAST = OptimizerSettings(name="adamw", learning_rate=3e-3)


def fitted(directory, x, y=None, **options):
    task = Seq2SeqLM.from_preset(directory)
    task.compile(optimizer=FAST)
    return task, task.fit(x, y, verbose=0, **options).history


def weights_of(task) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in task.backbone.parameters()])


@pytest.fixture(scope="module")
def table(pairs) -> pa.Table:
    return pa.table({"document": pairs["encoder_text"], "summary": pairs["decoder_text"], "extra": list(range(48))})


def test_all_forms_of_data_train_alike(tiny_bart_dir, pairs, table, tmp_path, task):
    options = {"batch_size": 16, "shuffle": False, "seed": 5}
    _, expected = fitted(tiny_bart_dir, pairs, **options)
    names = {"text_column": "document", "summary_column": "summary"}
    pq.write_table(table.slice(0, 20), tmp_path / "a.parquet")
    pq.write_table(table.slice(20), tmp_path / "b.parquet")
    batches = [{k: v[i : i + 16] for k, v in pairs.items()} for i in range(0, 48, 16)]
    rows = [{"encoder_text": s, "decoder_text": t} for s, t in zip(*pairs.values(), strict=True)]
    arrays = {k: np.array(v, dtype=object) for k, v in pairs.items()}
    forms = {
        "numpy": (arrays, {}),
        "table": (table, names),
        "parquet folder": (tmp_path, names),
        "parquet files": ([tmp_path / "a.parquet", str(tmp_path / "b.parquet")], names),
        "batches of text": (batches, {}),
        "rows of text": (iter(rows), {}),
        "record batches": (table.to_batches(16), names),
        "preprocessed batches": ([task.preprocessor(batch) for batch in batches], {}),
        "loader": (DataLoader(rows, batch_size=16, generator=torch.Generator()), {}),
    }
    for name, (x, extra) in forms.items():
        _, history = fitted(tiny_bart_dir, x, **options, **extra)
        assert history["loss"] == pytest.approx(expected["loss"], rel=1e-6), name


def test_preprocessed_arrays_need_no_preprocessor(tiny_bart_dir, pairs, task):
    x, y, weight = task.preprocessor(pairs)
    bare = Seq2SeqLM.from_preset(tiny_bart_dir)
    bare.preprocessor = None
    history = bare.fit(x, y, sample_weight=weight, batch_size=48, shuffle=False, verbose=0).history
    _, expected = fitted(tiny_bart_dir, pairs, batch_size=48, shuffle=False)
    assert history["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    with pytest.raises(InputError, match="needs a preprocessor"):
        bare.fit(pairs)


def test_training_learns_and_generate_follows_the_new_weights(tiny_bart_dir, tmp_path):
    words = ["alpha", "index", "string", "module"]
    x = {"encoder_text": [f"say {w}" for w in words] * 4, "decoder_text": words * 4}
    task = Seq2SeqLM.from_preset(tiny_bart_dir)
    before = task.generate(x["encoder_text"][:4], num_beams=1, max_length=12)
    task.compile(optimizer=OptimizerSettings(learning_rate=1e-2), sampler=None)
    history = task.fit(x, epochs=40, batch_size=16, verbose=0).history
    assert history["loss"][-1] < 0.2 < 2 < history["loss"][0]
    after = task.generate(x["encoder_text"][:4], num_beams=1, max_length=12)
    assert before != words
    assert after == words
    task.save_to_preset(tmp_path / "saved")
    assert (
        Seq2SeqLM.from_preset(tmp_path / "saved").generate(x["encoder_text"][:4], num_beams=1, max_length=12) == words
    )


def test_equal_seeds_train_equally_and_others_do_not(tiny_bart_dir, pairs):
    torch.manual_seed(123)
    runs = [fitted(tiny_bart_dir, pairs, batch_tokens=600, epochs=2, seed=seed) for seed in (7, 7, 8)]
    assert torch.equal(weights_of(runs[0][0]), weights_of(runs[1][0]))
    assert runs[0][1]["loss"] == runs[1][1]["loss"]
    assert not torch.equal(weights_of(runs[0][0]), weights_of(runs[2][0]))
    drawn = torch.rand(1)
    torch.manual_seed(123)
    assert torch.equal(drawn, torch.rand(1))  # the caller's random state is left alone


def test_history_holds_validation_and_token_figures(tiny_bart_dir, pairs):
    task = Seq2SeqLM.from_preset(tiny_bart_dir)
    task.compile(optimizer=FAST, weighted_metrics=["accuracy", "perplexity"])
    history = task.fit(pairs, batch_tokens=800, epochs=2, validation_split=0.25, verbose=0)
    assert set(history.history) == {
        "loss", "sparse_categorical_accuracy", "perplexity", "val_loss", "val_sparse_categorical_accuracy",
        "val_perplexity", "learning_rate", "tokens_per_second", "padding_share",
    }  # fmt: skip
    assert history.epoch == [0, 1]
    assert 0 < history.history["padding_share"][0] < 0.5
    held_out = {k: v[36:] for k, v in pairs.items()}
    result = evaluate(task, held_out, batch_size=5)
    assert result["loss"] == pytest.approx(history.history["val_loss"][-1], rel=1e-5)
    assert result["perplexity"] == pytest.approx(np.exp(result["loss"]), rel=1e-5)


def test_the_split_is_the_last_rows_and_equals_validation_data(tiny_bart_dir, pairs):
    first, last = ({k: v[part] for k, v in pairs.items()} for part in (slice(0, 40), slice(40, None)))
    _, split = fitted(tiny_bart_dir, pairs, batch_size=8, validation_split=1 / 6)
    _, given = fitted(tiny_bart_dir, first, batch_size=8, validation_data=last)
    assert split["loss"] == given["loss"]
    assert split["val_loss"] == pytest.approx(given["val_loss"], rel=1e-6)  # its rows come in another order


def test_accumulation_equals_the_big_batch(tiny_bart_dir, pairs):
    def run(**options) -> torch.Tensor:
        task = Seq2SeqLM.from_preset(tiny_bart_dir)
        for module in task.backbone.modules():
            module.dropout = 0.0  # its draws would differ
        task.compile(optimizer=OptimizerSettings(name="sgd", learning_rate=0.1))
        task.fit(pairs, shuffle=False, verbose=0, **options)
        return weights_of(task)

    torch.testing.assert_close(run(batch_size=6, accumulation_steps=4), run(batch_size=24), atol=1e-6, rtol=1e-5)


def test_the_keras_loss_depends_on_padding_and_the_default_does_not(tiny_bart_dir, pairs):
    losses = {}
    for loss in ("auto", "keras"):
        for padding in ("longest", "max_length"):
            task = Seq2SeqLM.from_preset(tiny_bart_dir, decoder_sequence_length=64)
            task.preprocessor.padding = padding
            task.compile(loss=loss)
            losses[loss, padding] = evaluate(task, pairs, batch_size=48)["loss"]
    assert losses["auto", "longest"] == pytest.approx(losses["auto", "max_length"], rel=1e-5)
    labels = Seq2SeqLM.from_preset(tiny_bart_dir).preprocessor.encode_targets(pairs["decoder_text"])
    share = sum(map(len, labels)) / (48 * 64)
    assert losses["keras", "max_length"] == pytest.approx(losses["auto", "longest"] * share, rel=1e-5)
    assert losses["keras", "longest"] > losses["keras", "max_length"]


def test_steps_per_epoch_cuts_a_stream_into_epochs(tiny_bart_dir, pairs):
    seen = []

    class Count(Callback):
        def on_train_batch_end(self, step: int) -> None:
            seen.append(step)

    class Endless:
        def __iter__(self):
            while True:
                yield {k: v[:4] for k, v in pairs.items()}

    _, history = fitted(tiny_bart_dir, Endless(), epochs=3, steps_per_epoch=2, callbacks=[Count()])
    assert seen == [1, 2, 3, 4, 5, 6]
    assert len(history["loss"]) == 3


def test_early_stopping_restores_the_best_weights(tiny_bart_dir, pairs):
    task = Seq2SeqLM.from_preset(tiny_bart_dir)
    task.compile(optimizer=OptimizerSettings(name="sgd", learning_rate=30.0, clip_norm=5.0))
    held_out = {k: v[40:] for k, v in pairs.items()}
    start = evaluate(task, held_out)["loss"]
    stopping = EarlyStopping(patience=1)
    history = task.fit(pairs, epochs=9, validation_data=held_out, callbacks=[stopping], verbose=0)
    assert len(history.epoch) < 9
    assert history.history["val_loss"][stopping.best_epoch] == min(history.history["val_loss"])
    assert evaluate(task, held_out)["loss"] == pytest.approx(min(history.history["val_loss"]), rel=1e-5)
    assert start != pytest.approx(min(history.history["val_loss"]), rel=1e-3)


def test_weight_average_is_what_is_validated_and_kept(tiny_bart_dir, pairs):
    held_out = {k: v[40:] for k, v in pairs.items()}
    options = {"batch_size": 8, "validation_data": held_out, "epochs": 2}
    _plain, history = fitted(tiny_bart_dir, pairs, **options)
    averaged, smooth = fitted(tiny_bart_dir, pairs, callbacks=[WeightAverage(0.9)], **options)
    assert smooth["loss"] == history["loss"]  # the weights in training are not touched
    assert smooth["val_loss"] != history["val_loss"]
    assert evaluate(averaged, held_out)["loss"] == pytest.approx(smooth["val_loss"][-1], rel=1e-5)


def test_lines_instead_of_a_bar_when_there_is_no_terminal(tiny_bart_dir, pairs, capfd):
    task = Seq2SeqLM.from_preset(tiny_bart_dir)
    task.fit(pairs, epochs=2, verbose=2)
    lines = capfd.readouterr().err.strip().splitlines()
    assert [line[:9] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert "padding_share" in lines[0]


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        ({"encoder_text": ["a"]}, {}, InputError, "encoder_text and decoder_text"),
        ({"encoder_text": ["a"], "decoder_text": []}, {}, InputError, "pair up"),
        ({"encoder_text": ["a", None], "decoder_text": ["a", "b"]}, {}, InputError, "training row 1"),
        ({"encoder_text": [], "decoder_text": []}, {}, InputError, "at least one pair"),
        (pa.table({"a": ["x"]}), {}, InputError, "text_column"),
        (7, {}, InputError, "x must be"),
        ([7], {}, InputError, "an item of the data"),
        (iter([]), {}, InputError, "gave no batch"),
        (iter([]), {"batch_tokens": 9}, SettingsError, "known length"),
        (iter([]), {"validation_split": 0.5}, SettingsError, "known length"),
        ({"encoder_text": ["a"], "decoder_text": ["b"]}, {"epochs": 0}, SettingsError, "epochs"),
        ({"encoder_text": ["a"], "decoder_text": ["b"]}, {"validation_split": 0.5}, SettingsError, "one side empty"),
        ({"encoder_text": ["a"], "decoder_text": ["b"]}, {"precision": "fp8"}, SettingsError, "precision"),
        ({"encoder_text": ["a"], "decoder_text": ["b"]}, {"y": [1]}, InputError, "belong to preprocessed x"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(task, x, options, error, message):
    with pytest.raises(error, match=message):
        task.fit(x, verbose=0, **options)


def test_files_that_cannot_be_read_are_named(task, tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(InputError, match=r"x\.parquet"):
        task.fit(tmp_path / "x.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no Parquet file"):
        task.fit(tmp_path / "empty")
    pq.write_table(pa.table({"encoder_text": ["a"]}), tmp_path / "y.parquet")
    with pytest.raises(InputError, match="decoder_text"):
        task.fit(tmp_path / "y.parquet")


def test_a_source_that_raises_is_not_swallowed(task, pairs):
    def broken():
        yield {k: v[:4] for k, v in pairs.items()}
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        task.fit(broken(), verbose=0)
    assert not task.backbone.training
