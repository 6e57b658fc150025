from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from s2s_ray import models
from s2s_ray.errors import PresetError, PresetIntegrityError, SettingsError, UnsupportedModelError
from s2s_ray.models.backbone import Backbone
from s2s_ray.models.bart import BartBackbone
from s2s_ray.models.loading import build_backbone, resolve_dtype, save_weights
from tests.models.contract import load_ours, reference_model
from tests.models.test_bart import config


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bart")
    reference_model(config()).save_pretrained(directory)
    return directory


def rewritten(preset: Path, tmp_path: Path, change: Any) -> Backbone:
    tensors = load_file(preset / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return build_backbone(BartBackbone, config().to_dict(), tmp_path)


def test_a_missing_parameter_is_named(preset: Path, tmp_path: Path) -> None:
    with pytest.raises(PresetIntegrityError, match=r"model\.decoder\.layers\.0\.fc1\.weight; it is missing"):
        rewritten(preset, tmp_path, lambda tensors: tensors.pop("model.decoder.layers.0.fc1.weight"))


def test_a_left_over_tensor_is_named(preset: Path, tmp_path: Path) -> None:
    with pytest.raises(PresetIntegrityError, match=r"nothing in the model takes model\.stranger"):
        rewritten(preset, tmp_path, lambda tensors: tensors.update({"model.stranger": torch.zeros(2)}))


def test_what_old_checkpoints_hold_besides_is_ignored(preset: Path, tmp_path: Path) -> None:
    rewritten(preset, tmp_path, lambda tensors: tensors.update({"model.encoder.version": torch.zeros(1)}))


def test_a_wrong_shape_is_named(preset: Path, tmp_path: Path) -> None:
    with pytest.raises(PresetIntegrityError, match=r"must have shape \[64, 32\]. Received: \[3, 32\]"):
        rewritten(preset, tmp_path, lambda t: t.update({"model.encoder.layers.0.fc1.weight": torch.zeros(3, 32)}))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_weights_are_floating_point(preset: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    name = "model.encoder.layers.0.fc1.weight"
    with pytest.raises(PresetIntegrityError, match=rf"{name} must have one of the dtypes F64, F32, F16, BF16\. Rec"):
        rewritten(preset, tmp_path, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))


def test_a_config_cannot_ask_for_more_layers_than_there_are_tensors(preset: Path) -> None:
    hostile = config().to_dict() | {"decoder_layers": 2**24}
    with pytest.raises(PresetIntegrityError, match="decoder_layers is 16777216, but the weights hold"):
        build_backbone(BartBackbone, hostile, preset)


def test_nothing_is_allocated_for_a_config_that_the_weights_do_not_fit(preset: Path) -> None:
    hostile = config().to_dict() | {"vocab_size": 2**24, "d_model": 2**20}  # 64 TiB
    with pytest.raises(PresetIntegrityError, match="must have shape"):
        build_backbone(BartBackbone, hostile, preset)


def test_a_missing_logits_bias_is_zero(preset: Path, tmp_path: Path) -> None:
    ours = rewritten(preset, tmp_path, lambda tensors: tensors.pop("final_logits_bias"))
    assert torch.equal(ours.state_dict()["logits_bias"], torch.zeros(1, 211))


def test_names_without_their_first_part_are_known(preset: Path, tmp_path: Path) -> None:
    def bare(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors.pop("final_logits_bias", None)

    ours = rewritten(preset, tmp_path, bare)
    assert torch.equal(
        ours.state_dict()["token_embedding.weight"], load_file(preset / "model.safetensors")["model.shared.weight"]
    )

    def differing(tensors: dict[str, torch.Tensor]) -> None:
        bare(tensors)
        tensors["decoder.embed_tokens.weight"] = tensors["shared.weight"] + 1

    with pytest.raises(PresetIntegrityError, match=r"ties shared\.weight and decoder\.embed_tokens\.weight"):
        rewritten(preset, tmp_path, differing)


def test_repeated_embeddings_are_taken_as_one(preset: Path, tmp_path: Path) -> None:
    def repeat(tensors: dict[str, torch.Tensor]) -> None:
        shared = tensors.pop("model.shared.weight")
        for name in ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = shared.clone()

    ours = rewritten(preset, tmp_path, repeat)
    assert torch.equal(
        ours.state_dict()["token_embedding.weight"], load_file(preset / "model.safetensors")["model.shared.weight"]
    )


def test_dtype_and_random_initialisation() -> None:
    ours = build_backbone(BartBackbone, config().to_dict(), None, dtype="bfloat16")
    weight = ours.state_dict()["encoder_layers.0.feedforward.up.weight"]
    assert weight.dtype == torch.bfloat16
    assert 0.2 < weight.float().std() < 0.4  # init_std 0.3
    with pytest.raises(SettingsError, match="dtype must be one of float32, bfloat16, float16"):
        resolve_dtype("float8")


def test_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedModelError, match=r"model_type must be one of bart.*Received: 'whisper'"):
        models.task_class("whisper")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": "32"}, "d_model must be a whole number"),
        ({"vocab_size": 0}, "vocab_size must be a whole number"),
        ({"encoder_layers": True}, "encoder_layers must be a whole number"),
        ({"activation_function": "mish"}, "activation_function must be one of"),
        ({"dropout": "0.1"}, "dropout must be a number"),
    ],
)
def test_config_values_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PresetError, match=message):
        build_backbone(BartBackbone, config().to_dict() | change, None)


def test_packed_weights_follow_training(tmp_path: Path) -> None:
    ours = load_ours(reference_model(config()), tmp_path)
    batch = {
        "encoder_token_ids": torch.tensor([[0, 5, 6, 2]]),
        "encoder_padding_mask": torch.ones(1, 4, dtype=torch.bool),
        "decoder_token_ids": torch.tensor([[2, 7]]),
    }
    ours.pack()
    before = ours(batch)
    ours.train()
    with torch.no_grad():
        ours.state_dict()["encoder_layers.0.feedforward.up.weight"].mul_(2)
    ours.pack()
    assert not torch.allclose(ours(batch), before)


def test_shards_load_as_one_file_does(preset: Path, tmp_path: Path) -> None:
    whole = build_backbone(BartBackbone, config().to_dict(), preset)
    save_weights(whole, tmp_path, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    sharded = build_backbone(BartBackbone, config().to_dict(), tmp_path)
    assert all(torch.equal(tensor, sharded.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_tied_tensors_that_differ_are_refused(preset: Path, tmp_path: Path) -> None:
    with pytest.raises(
        PresetIntegrityError, match=r"ties model\.shared\.weight and lm_head\.weight, but the two differ"
    ):
        rewritten(preset, tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.ones(211, 32)}))
