"""LoRA beside PEFT: the same files, the same numbers, in training and merged."""

import json
from pathlib import Path

import peft
import pytest
import torch

from s2s_ray import Seq2SeqLM
from s2s_ray.errors import PresetIntegrityError, SettingsError, UnsupportedModelError
from s2s_ray.nn.lora import LoraSettings, add_lora, load_adapter, lora_layers, merge_lora, save_adapter

SETTINGS = LoraSettings(rank=3, alpha=5.0, targets=("q_proj", "value", "up"))


@pytest.fixture
def task(tiny_bart_dir: Path) -> Seq2SeqLM:
    return Seq2SeqLM.from_preset(tiny_bart_dir)


def randomised(task: Seq2SeqLM) -> Seq2SeqLM:
    add_lora(task.backbone, SETTINGS)
    torch.manual_seed(0)
    for layer in lora_layers(task.backbone).values():
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    return task


def logits(task: Seq2SeqLM, texts: list[str]) -> torch.Tensor:
    task.backbone.eval()
    return task(task.preprocessor({"encoder_text": texts, "decoder_text": texts})[0])


def test_only_lora_trains_and_it_starts_where_the_model_was(task: Seq2SeqLM, english_text: list[str]) -> None:
    before = logits(task, english_text[:3])
    add_lora(task.backbone, SETTINGS)
    torch.testing.assert_close(logits(task, english_text[:3]), before)
    layers = lora_layers(task.backbone)
    assert len(layers) == 2 * 3 + 2 * 5  # 2 encoder and 2 decoder layers: query, value and up; twice query and value
    named = {name.rpartition(".")[2] for name, p in task.backbone.named_parameters() if p.requires_grad}
    assert named == {"lora_a", "lora_b"}
    with pytest.raises(SettingsError, match="must be of down, fc2, k_proj"):
        add_lora(task.backbone, LoraSettings(targets=("x",)))


def test_peft_reads_what_we_write(
    tiny_bart_dir: Path, task: Seq2SeqLM, english_text: list[str], tmp_path: Path
) -> None:
    from transformers import BartForConditionalGeneration

    save_adapter(randomised(task).backbone, SETTINGS, tmp_path)
    model = peft.PeftModel.from_pretrained(BartForConditionalGeneration.from_pretrained(tiny_bart_dir), tmp_path).eval()
    batch, _, _ = task.preprocessor({"encoder_text": english_text[:3], "decoder_text": english_text[3:6]})
    tensors = {name: torch.as_tensor(value).long() for name, value in batch.items()}
    theirs = model(
        input_ids=tensors["encoder_token_ids"],
        attention_mask=tensors["encoder_padding_mask"],
        decoder_input_ids=tensors["decoder_token_ids"],
    ).logits
    task.backbone.eval()
    torch.testing.assert_close(task(batch), theirs, atol=1e-4, rtol=1e-4)


def test_we_read_what_peft_writes(
    tiny_bart_dir: Path, task: Seq2SeqLM, english_text: list[str], tmp_path: Path
) -> None:
    from transformers import BartForConditionalGeneration

    config = peft.LoraConfig(
        r=4, lora_alpha=9, lora_dropout=0.1, target_modules=["k_proj", "fc2"], task_type="SEQ_2_SEQ_LM"
    )
    model = peft.get_peft_model(BartForConditionalGeneration.from_pretrained(tiny_bart_dir), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    settings = load_adapter(task.backbone, tmp_path)
    assert (settings.rank, settings.alpha, settings.dropout) == (4, 9.0, 0.1)
    batch, _, _ = task.preprocessor({"encoder_text": english_text[:3], "decoder_text": english_text[3:6]})
    tensors = {name: torch.as_tensor(value).long() for name, value in batch.items()}
    theirs = model.eval()(
        input_ids=tensors["encoder_token_ids"],
        attention_mask=tensors["encoder_padding_mask"],
        decoder_input_ids=tensors["decoder_token_ids"],
    ).logits
    task.backbone.eval()
    torch.testing.assert_close(task(batch), theirs, atol=1e-4, rtol=1e-4)


def test_generation_and_merging_follow_the_adapter(
    tiny_bart_dir: Path, task: Seq2SeqLM, english_text: list[str]
) -> None:
    plain = task.generate(english_text[:8], max_new_tokens=8)
    with_lora = randomised(task).generate(english_text[:8], max_new_tokens=8)
    assert with_lora != plain
    before = logits(task, english_text[:3])
    merge_lora(task.backbone)
    assert not lora_layers(task.backbone) and all(p.requires_grad for p in task.backbone.parameters())
    torch.testing.assert_close(logits(task, english_text[:3]), before, atol=1e-5, rtol=1e-5)
    assert task.generate(english_text[:8], max_new_tokens=8) == with_lora
    names = set(Seq2SeqLM.from_preset(tiny_bart_dir).backbone.state_dict())
    assert set(task.backbone.state_dict()) == names


def test_other_adapters_are_refused(task: Seq2SeqLM, tiny_bart_dir: Path, tmp_path: Path) -> None:
    save_adapter(randomised(task).backbone, SETTINGS, tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for change in ({"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"}, {"target_modules": "all-linear"}):
        path.write_text(json.dumps(config | change))
        with pytest.raises(UnsupportedModelError):
            load_adapter(Seq2SeqLM.from_preset(tiny_bart_dir).backbone, tmp_path)
    path.write_text(json.dumps(config | {"r": 2}))
    with pytest.raises(PresetIntegrityError, match="another shape"):
        load_adapter(Seq2SeqLM.from_preset(tiny_bart_dir).backbone, tmp_path)
