"""New tokens, such as languages or markers, for a preset that is to be fine-tuned with them."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from torch import Tensor

from s2s_ray.errors import SettingsError, UnsupportedModelError
from s2s_ray.models.backbone import Backbone
from s2s_ray.presets.saving import new_preset
from s2s_ray.seq2seq_lm import Seq2SeqLM


def extend_vocabulary(
    preset: str | os.PathLike[str], tokens: Sequence[str], target: str | os.PathLike[str], *, special: bool = True
) -> list[int]:
    """Write the preset with `tokens` added to `target`; returns their ids.

    Each is then one token wherever it stands in a text; `special` ones are left out of decoded text. Rows of embedding
    and head that are new start as the mean of all others (Hewitt 2021), biases at zero; what was tied stays tied.
    Raises SettingsError for tokens that are there, UnsupportedModelError for models with two vocabularies.
    """
    task = Seq2SeqLM.from_preset(preset)
    if task.backbone.config.get("share_encoder_decoder_embeddings") is False:
        raise UnsupportedModelError("tokens cannot be added to a model with a vocabulary for each side")
    with new_preset(Path(target)) as directory:
        task.write_files(directory)
        path = directory / "tokenizer.json"
        backend = Backend.from_file(str(path))
        known = [token for token in tokens if backend.token_to_id(token) is not None]
        if known or not tokens or len(set(tokens)) != len(tokens):
            raise SettingsError(f"tokens must be new and named once. Received: {', '.join(known or tokens) or 'none'}")
        backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens])
        backend.save(str(path))
        ids = [backend.get_vocab()[token] for token in tokens]
        if max(ids) >= task.backbone.vocabulary_size:  # else the table has rows to spare
            task.backbone = resized(task.backbone, max(ids) + 1)
        task.preprocessor = None  # its files are written
        task.write_files(directory)
    return ids


@torch.no_grad()
def resized(backbone: Backbone, vocabulary_size: int) -> Backbone:
    """A copy of the backbone with more rows for tokens."""
    grown = type(backbone)(backbone.config | {"vocab_size": vocabulary_size})
    old = backbone.state_dict()
    grown.load_state_dict({name: _grow(old[name], tensor.shape) for name, tensor in grown.state_dict().items()})
    return grown.eval()


def _grow(tensor: Tensor, shape: torch.Size) -> Tensor:
    if tensor.shape == shape:
        return tensor
    if tensor.shape[0] != shape[0]:  # [V, D]: a row per token
        return torch.cat([tensor, tensor.mean(0, keepdim=True).expand(shape[0] - tensor.shape[0], -1)])
    return torch.cat([tensor, tensor.new_zeros(*shape[:-1], shape[-1] - tensor.shape[-1])], dim=-1)  # [1, V]: biases
