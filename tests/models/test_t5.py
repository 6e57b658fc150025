from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, T5Config

from s2s_ray.errors import PresetError, PresetIntegrityError, UnsupportedModelError
from s2s_ray.models.backbone import Backbone
from s2s_ray.models.loading import build_backbone
from s2s_ray.models.t5 import T5Backbone
from s2s_ray.text.tokenizer import read_json_object
from tests.models.contract import check_family, check_files, reference_model

# Buckets this few and near reach the last one within the contract's lengths.
SIZES = {
    "vocab_size": 211,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
    "bos_token_id": None,
}
T5_1_1 = {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}


def config(**changes: Any) -> T5Config:
    return T5Config(**(SIZES | changes))


def lively(model: Any) -> None:
    """A random T5 repeats its last token, as its embeddings outweigh what the layers add, and its norms are alike: make
    position, attention and norms count.
    """
    with torch.no_grad():
        model.shared.weight *= 0.1
        for name, parameter in model.named_parameters():
            if name.endswith(("relative_attention_bias.weight", "Attention.q.weight")):
                parameter *= 6
            if parameter.ndim == 1:
                parameter.normal_(mean=1, std=0.3)


def with_own_head(model: Any) -> None:
    """`lively`, and with the head that released models have; transformers 5 makes none without a file."""
    lively(model)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))


@pytest.mark.parametrize(
    ("changes", "stop_bias"),
    [
        pytest.param({}, 0.0, id="t5-1.0"),
        pytest.param(T5_1_1, 2.0, id="t5-1.1"),
        pytest.param({**T5_1_1, "vocab_size": 384, "num_layers": 3, "num_decoder_layers": 1}, 3.0, id="byt5"),
        pytest.param({**T5_1_1, "pad_token_id": 1, "eos_token_id": 2}, 2.0, id="madlad-start-is-not-pad"),
    ],
)
def test_t5_is_transformers_t5(changes: dict[str, Any], stop_bias: float, tmp_path: Path) -> None:
    adjust = with_own_head if T5_1_1.items() <= changes.items() else lively
    check_family(config(**changes), tmp_path, stop_bias=stop_bias, adjust=adjust)


@pytest.mark.parametrize(("changes", "adjust"), [({}, lively), (T5_1_1, with_own_head)], ids=["tied", "own-head"])
def test_every_tensor_of_a_file_counts(changes: dict[str, Any], adjust: Callable[[Any], None], tmp_path: Path) -> None:
    check_files(config(**changes, num_layers=1), tmp_path, adjust=adjust)


@pytest.mark.parametrize(
    ("written", "activation", "gated"),
    [
        ("relu", "relu", False),
        ("gelu", "gelu", False),
        ("gated-gelu", "gelu_tanh", True),  # what transformers makes of this one name
        ("gated-silu", "silu", True),
    ],
)
def test_feed_forward_forms(written: str, activation: str, gated: bool) -> None:
    block = T5Backbone(config(feed_forward_proj=written).to_dict()).get_submodule("decoder_layers.1.feedforward")
    assert (block.activation, block.gate is not None) == (activation, gated)


Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T5 1.1 with a head that differs from the embedding."""
    directory = tmp_path_factory.mktemp("t5")
    reference_model(config(**T5_1_1), adjust=with_own_head).save_pretrained(directory)
    return directory


def rewritten(preset: Path, tmp_path: Path, change: Callable[[Tensors], Any], **config: Any) -> Backbone:
    """The preset with its tensors changed, loaded by us."""
    tensors = load_file(preset / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return build_backbone(T5Backbone, read_json_object(preset / "config.json") | config, tmp_path).eval()


def batch(vocabulary: int = 211) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "encoder_token_ids": torch.randint(2, vocabulary, (3, 40), generator=generator),
        "encoder_padding_mask": torch.arange(40) < torch.tensor([40, 21, 3])[:, None],
        "decoder_token_ids": torch.randint(2, vocabulary, (3, 30), generator=generator),
    }


@torch.no_grad()
def theirs(directory: Path, x: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    model = AutoModelForSeq2SeqLM.from_pretrained(directory, **options).eval()
    return model(
        input_ids=x["encoder_token_ids"],
        attention_mask=x["encoder_padding_mask"],
        decoder_input_ids=x["decoder_token_ids"],
    ).logits


@torch.no_grad()
def test_a_head_of_its_own(preset: Path, tmp_path: Path) -> None:
    """Both ways of saying it: transformers 4's flag, and what transformers 5 writes for the same model."""
    x = batch()
    expected = theirs(preset, x)
    for flag, scale in ((False, None), (True, False)):
        written = {"tie_word_embeddings": flag, "scale_decoder_outputs": scale}
        ours = rewritten(preset, tmp_path, lambda tensors: None, **written)
        assert (ours(x) - expected).abs().max() <= 1e-4
        assert ours.config["tie_word_embeddings"] is False  # how transformers 4 must be told
        assert ours.config["scale_decoder_outputs"] is False


@torch.no_grad()
def test_an_unscaled_head_that_the_file_lacks_is_the_embedding(preset: Path, tmp_path: Path) -> None:
    ours = rewritten(preset, tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    weights = ours.state_dict()
    assert torch.equal(weights["lm_head.weight"], weights["token_embedding.weight"])


@torch.no_grad()
def test_decoder_embeddings_in_place_of_shared_ones(preset: Path, tmp_path: Path) -> None:
    """MADLAD-400's layout."""
    x = batch()

    def moved(tensors: Tensors) -> None:
        tensors["decoder.embed_tokens.weight"] = tensors.pop("shared.weight")

    assert (rewritten(preset, tmp_path, moved)(x) - theirs(preset, x)).abs().max() <= 1e-4


def test_the_unused_bias_of_old_files_is_ignored(preset: Path, tmp_path: Path) -> None:
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    rewritten(preset, tmp_path, lambda tensors: tensors.update({name: torch.zeros(8, 4)}))


@pytest.mark.parametrize(
    "name",
    ["decoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight", "encoder.block.0.layer.1.stranger"],
)
def test_an_extra_tensor_is_named(name: str, preset: Path, tmp_path: Path) -> None:
    with pytest.raises(PresetIntegrityError, match=f"nothing in the model takes {name}"):
        rewritten(preset, tmp_path, lambda tensors: tensors.update({name: torch.zeros(8, 4)}))


@pytest.mark.parametrize(
    "name",
    [
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "encoder.block.1.layer.1.DenseReluDense.wi_0.weight",
        "decoder.block.1.layer.2.DenseReluDense.wi_1.weight",
        "decoder.block.0.layer.1.layer_norm.weight",
        "decoder.final_layer_norm.weight",
    ],
)
def test_a_missing_tensor_is_named(name: str, preset: Path, tmp_path: Path) -> None:
    with pytest.raises(PresetIntegrityError, match=f"must hold {name}; it is missing"):
        rewritten(preset, tmp_path, lambda tensors: tensors.pop(name))


def test_a_tied_head_that_differs_is_refused(preset: Path, tmp_path: Path) -> None:
    with pytest.raises(PresetIntegrityError, match=r"ties shared\.weight and lm_head\.weight, but the two differ"):
        rewritten(preset, tmp_path, lambda tensors: None, tie_word_embeddings=True, scale_decoder_outputs=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"d_kv": 0}, PresetError, "d_kv must be a whole number"),
        ({"num_decoder_layers": 1.5}, PresetError, "num_decoder_layers must be a whole number"),
        ({"feed_forward_proj": "glued-gelu"}, PresetError, 'an activation or "gated-" and one'),
        ({"feed_forward_proj": "gated-mish"}, UnsupportedModelError, "feed_forward_proj must be one of"),
        ({"relative_attention_max_distance": 4}, PresetError, "relative_attention_num_buckets must be at least 4"),
    ],
)
def test_config_values_are_checked(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_backbone(T5Backbone, config().to_dict() | change, None)
