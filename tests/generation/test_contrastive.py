"""Contrastive search against the paper's formula, computed slowly by transformers' model without a cache."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import T5Config
from transformers.modeling_outputs import BaseModelOutput

from s2s_ray import samplers
from s2s_ray.errors import SettingsError
from s2s_ray.generation.engine import Engine
from s2s_ray.generation.requests import Request
from s2s_ray.models.backbone import Backbone
from tests.models import test_bart
from tests.models.contract import load_ours, our_tokens, reference_model, run, settings_of, sources

BART = test_bart.config(encoder_layers=1, vocab_size=97)
T5 = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
LIMIT = 14


@pytest.fixture(scope="module", params=[BART, T5], ids=["bart", "t5"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Backbone]:
    model = reference_model(request.param, stop_bias=3.0)
    return model, load_ours(model, tmp_path_factory.mktemp("preset"))


@torch.no_grad()
def by_formula(model: Any, source: list[int], k: int, alpha: float) -> list[int]:
    """argmax over the k likeliest v: (1 - alpha) p(v | x) - alpha max_j cos(h_v, h_j), equation 5 of the paper."""
    config = model.config
    memory = model.get_encoder()(torch.tensor([source])).last_hidden_state

    def decoded(texts: list[list[int]]) -> tuple[Tensor, Tensor]:
        many = BaseModelOutput(last_hidden_state=memory.expand(len(texts), -1, -1))
        out = model(encoder_outputs=many, decoder_input_ids=torch.tensor(texts), output_hidden_states=True)
        return out.logits[:, -1], F.normalize(out.decoder_hidden_states[-1], dim=-1)

    text = [config.decoder_start_token_id]
    logits = decoded([text])[0][0]
    while len(text) < LIMIT and (len(text) == 1 or text[-1] != config.eos_token_id):
        probable = logits.softmax(dim=-1).topk(k)
        after, states = decoded([[*text, token] for token in probable.indices.tolist()])
        likeness = (states[:, :-1] @ states[:, -1:].mT).amax(dim=(1, 2))
        best = int(((1 - alpha) * probable.values - alpha * likeness).argmax())
        text.append(int(probable.indices[best]))
        logits = after[best]
    return text[1:]


@pytest.mark.parametrize("k,alpha", [(5, 0.6), (2, 0.9)])
def test_tokens_are_those_of_the_formula(pair: tuple[Any, Backbone], k: int, alpha: float) -> None:
    model, backbone = pair
    rows = sources(model.config, 7)
    settings = settings_of(model.config, max_length=LIMIT, top_k=k, penalty_alpha=alpha)
    expected = [[by_formula(model, row, k, alpha)] for row in rows]
    for decoding in ("cohorts", "slots"):
        engine = Engine(backbone, max_slots=4 * k, decoding=decoding)  # type: ignore[arg-type]
        assert our_tokens(engine, rows, settings) == expected
    assert our_tokens(Engine(backbone), rows, settings.replace(penalty_alpha=0.0)) != expected


def test_a_token_that_is_ruled_out_is_never_chosen(pair: tuple[Any, Backbone]) -> None:
    model, backbone = pair
    rows = sources(model.config, 6)
    banned = tuple(range(8, 97))  # leaves fewer likely tokens than there are candidates
    settings = settings_of(model.config, max_length=LIMIT, top_k=9, penalty_alpha=1.0, suppress_tokens=banned)
    answers = our_tokens(Engine(backbone), rows, settings)
    assert not {token for row in answers for token in row[0]} & set(banned)
    forced = settings.replace(suppress_tokens=(), forced_eos_token_id=settings.eos_token_id[0])
    for (row,) in our_tokens(Engine(backbone), rows, forced):
        assert len(row) < LIMIT and row[-1] == settings.eos_token_id[0]


def test_rows_of_every_kind_side_by_side_continue_their_prompts(pair: tuple[Any, Backbone]) -> None:
    model, backbone = pair
    each: list[dict[str, Any]] = [
        {"top_k": 4, "penalty_alpha": 0.6},
        {},
        {"top_k": 4, "penalty_alpha": 0.3, "no_repeat_ngram_size": 2, "output_scores": True},
        {"num_beams": 4},
    ]
    requests = [
        Request(i, row, settings_of(model.config, max_length=LIMIT, **each[i % 4]), [9, 11][: i % 3], i)
        for i, row in enumerate(sources(model.config, 12))
    ]
    alone = [next(Engine(backbone).generate([request])).sequences[0] for request in requests]
    together = {answer.request.key: answer for answer in Engine(backbone, max_slots=16).generate(requests)}
    for request, expected in zip(requests, alone, strict=True):
        found = together[request.key].sequences[0]
        assert (found.token_ids, found.finish_reason) == (expected.token_ids, expected.finish_reason)
        assert found.score == (None if expected.score is None else pytest.approx(expected.score, abs=1e-4))


def test_the_score_is_the_models_own(pair: tuple[Any, Backbone]) -> None:
    model, backbone = pair
    (row,) = sources(model.config, 1)
    settings = settings_of(model.config, max_length=LIMIT, top_k=5, penalty_alpha=0.6, output_scores=True)
    ((found,),) = [answer.sequences for answer in run(Engine(backbone), [row], settings)]
    text = torch.tensor([[model.config.decoder_start_token_id, *found.token_ids]])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row]), decoder_input_ids=text[:, :-1]).logits[0].log_softmax(dim=-1)
    assert found.score == pytest.approx(float(logits.gather(1, text[0, 1:, None]).sum()), abs=1e-3)


def test_the_sampler_and_what_it_refuses() -> None:
    sampler = samplers.get("contrastive")
    assert sampler.settings() | {"top_k": 5, "penalty_alpha": 0.6, "num_beams": 1} == sampler.settings()
    assert samplers.get({"class_name": "contrastive", "config": {"k": 3, "alpha": 0.1}}).get_config()["k"] == 3
    for wrong in ({"k": 1}, {"alpha": 1.5}):
        with pytest.raises(SettingsError, match="penalty_alpha must be"):
            samplers.ContrastiveSampler(**wrong)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="one beam, one sequence and no sampling"):
        settings_of(BART, top_k=4, penalty_alpha=0.5, num_beams=2)
