"""New tokens, such as languages or markers, for a preset that is to be fine-tuned with them."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from torch import Tensor

from s2s_ray.errors import SettingsError, UnsupportedModelError
from s2s_ray.jsonio import canonical_json
from s2s_ray.models.backbone import Backbone
from s2s_ray.presets.saving import new_preset
from s2s_ray.seq2seq_lm import Seq2SeqLM
from s2s_ray.text.languages import language_code
from s2s_ray.text.preprocessor import PREPROCESSOR_FILE
from s2s_ray.text.tokenizer import read_json_object


def extend_vocabulary(
    preset: str | os.PathLike[str], tokens: Sequence[str], target: str | os.PathLike[str], *, special: bool = True
) -> list[int]:
    """Write the preset with `tokens` added to `target`; returns their ids.

    Each is then one token wherever it stands in a text; `special` ones are left out of decoded text. One in the form
    of a language's token (">>gl<<", "__gl__", "gl_ES", "<2gl>") is a language from then on. Rows of embedding and head
    that are new start as the mean of all others (Hewitt 2021), biases at zero; what was tied stays tied. Raises
    SettingsError for tokens that are there, UnsupportedModelError for models with two vocabularies.
    """
    with new_preset(Path(target)) as directory:
        return write_extended(preset, tokens, directory, special=special)


def write_extended(
    preset: str | os.PathLike[str], tokens: Sequence[str], directory: Path, *, special: bool = True
) -> list[int]:
    """As `extend_vocabulary`, into an existing directory; the caller seals it."""
    task = Seq2SeqLM.from_preset(preset)
    if task.backbone.config.get("share_encoder_decoder_embeddings") is False:
        raise UnsupportedModelError("tokens cannot be added to a model with a vocabulary for each side")
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
    _declare_languages(directory / PREPROCESSOR_FILE, tokens)
    return ids


def _declare_languages(path: Path, tokens: Sequence[str]) -> None:
    """Add language tokens to those that the preset's file lists; where it lists none, they are found by their form."""
    saved = read_json_object(path)
    if "languages" in saved:
        codes = {token: language_code(token) for token in tokens}
        saved["languages"]["tokens"] |= {code: token for token, code in codes.items() if code is not None}
        path.write_bytes(canonical_json(saved))


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
