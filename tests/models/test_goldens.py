"""What transformers 4.57 saved loads here and gives what it gave there; saved again, it does so in today's."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from s2s_ray import models
from s2s_ray.generation.engine import Engine
from s2s_ray.models.loading import save_weights
from s2s_ray.text.tokenizer import read_json_object
from tests.models.contract import load_directory, our_tokens, padded, reference_logits
from tests.models.make_goldens import DIRECTORY, GOLDENS


@pytest.mark.parametrize("name", GOLDENS)
def test_a_checkpoint_of_4_57_gives_its_outputs(name: str, tmp_path: Path) -> None:
    directory = DIRECTORY / "4.57" / name
    made = json.loads((directory / "outputs.json").read_text("utf-8"))
    logits = load_file(directory / "logits.safetensors")["logits"]
    ours = load_directory(directory)
    ids, mask = padded(made["sources"], ours.config["pad_token_id"])
    targets = torch.tensor(made["targets"])
    batch = {"encoder_token_ids": ids, "encoder_padding_mask": mask, "decoder_token_ids": targets}
    with torch.no_grad():
        assert (ours(batch) - logits).abs().max() <= 1e-4
    task = models.task_class(ours.model_type)(
        ours, generation_config=read_json_object(directory / "generation_config.json")
    )
    for answer in made["answers"]:
        settings = task.generation_settings.replace(**answer["settings"])
        tokens = our_tokens(Engine(ours), made["sources"], settings)
        assert [row[0] for row in tokens] == answer["tokens"], answer["settings"]
    save_weights(ours, tmp_path)
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert (reference_logits(again, batch) - logits * GOLDENS[name].rescaled).abs().max() <= 1e-4


def test_every_golden_has_its_files() -> None:
    assert {path.name for path in (DIRECTORY / "4.57").iterdir()} == set(GOLDENS)
