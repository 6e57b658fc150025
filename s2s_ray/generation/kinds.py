"""Which search a row needs, and how it is made."""

from collections.abc import Sequence

import torch

from s2s_ray.generation.beams import BeamSearch
from s2s_ray.generation.contrastive import ContrastiveSearch
from s2s_ray.generation.requests import Request
from s2s_ray.generation.samplers import Sampler
from s2s_ray.generation.sampling import SampleSearch
from s2s_ray.generation.search import Search


def make_search(
    kind: str,
    requests: Sequence[Request],
    limits: Sequence[int],
    width: int,
    device: torch.device,
    sampler: Sampler | None,
    hidden_dim: int,
) -> Search:
    """The search of a kind, "beam", "contrastive" or "sample"; hidden_dim: the decoder's width."""
    if kind == "beam":
        return BeamSearch(requests, limits, width, device)
    if kind == "contrastive":
        return ContrastiveSearch(requests, limits, width, device, hidden_dim)
    return SampleSearch(requests, limits, width, device, sampler)


def search_kind(request: Request) -> tuple[str, int]:
    """The kind of search a request needs and its width."""
    settings = request.settings
    if settings.num_beams > 1:
        return "beam", settings.num_beams
    if settings.penalty_alpha:
        return "contrastive", settings.top_k
    return "sample", settings.num_return_sequences
