"""Draws: in range, reproducible, uniform, and a function of their words alone."""

import torch
from torch import Tensor

from s2s_ray.generation.random import uniform

BINS = 64
# The 1e-4 and 1 - 1e-4 quantiles of chi-square with 63 degrees of freedom; the seeds are fixed, so this cannot flake.
CHI_SQUARE_LOW, CHI_SQUARE_HIGH = 28.1, 115.0


def words(*values: int) -> list[Tensor]:
    return [torch.tensor(value) for value in values]


def chi_square(draws: Tensor) -> float:
    counts = torch.histc(draws, bins=BINS, min=0.0, max=1.0)
    expected = draws.numel() / BINS
    return float(((counts - expected) ** 2 / expected).sum())


def test_draws_are_float64_in_the_half_open_unit_interval() -> None:
    draws = uniform(torch.tensor(7), torch.arange(200_000))
    assert draws.dtype == torch.float64
    assert draws.shape == (200_000,)
    assert draws.min() >= 0.0
    assert draws.max() < 1.0


def test_draws_use_all_of_53_bits() -> None:
    draws = uniform(torch.tensor(1), torch.arange(100_000))
    assert draws.unique().numel() == draws.numel()
    assert ((draws * 2**53) % 2 == 1).double().mean() > 0.45


def reference(*values: int) -> float:
    """SplitMix64's finaliser in whole numbers, after Steele, Lea and Flood 2014, figure 16."""
    mask, state = 2**64 - 1, 0
    for value in values:
        state = ((state ^ (value & mask)) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return (state >> 11) * 2.0**-53


def test_known_values() -> None:
    """Pinned: another value here changes every sampled output that was ever given for a seed."""
    for values in ((0, 0, 0, 0), (42, 7, 3, 0), (-1, 2**62, 500, 4), (2**63 - 1, -(2**63), 0, 1)):
        assert float(uniform(*words(*values))) == reference(*values)
    assert float(uniform(*words(42, 7, 3, 0))) == 0.046034960523885116


def test_each_word_alone_gives_uniform_draws() -> None:
    """Seeds, row ids, steps and lanes are small neighbouring numbers; each of them must mix fully."""
    count = 50_000
    for place in range(4):
        varied: list[Tensor] = [torch.tensor(3) for _ in range(4)]
        varied[place] = torch.arange(count)
        assert CHI_SQUARE_LOW < chi_square(uniform(*varied)) < CHI_SQUARE_HIGH, f"word {place}"


def test_neighbours_are_not_correlated() -> None:
    rows, steps = torch.arange(300)[:, None], torch.arange(300)[None]
    draws = uniform(torch.tensor(0), rows, steps) - 0.5
    bound = 5 / (12 * draws.numel() ** 0.5)  # five standard deviations of the mean of a product of two uniforms
    assert abs(float((draws[1:] * draws[:-1]).mean())) < bound
    assert abs(float((draws[:, 1:] * draws[:, :-1]).mean())) < bound
    pairs = (draws[:, 1:] + 0.5) // 0.125 * 8 + (draws[:, :-1] + 0.5) // 0.125
    counts = torch.bincount(pairs.flatten().long(), minlength=BINS).double()
    expected = pairs.numel() / BINS
    assert CHI_SQUARE_LOW < float(((counts - expected) ** 2 / expected).sum()) < CHI_SQUARE_HIGH


def test_a_draw_does_not_depend_on_its_place_in_the_batch() -> None:
    seeds = torch.tensor([5, -9, 2**40, 5])
    rows = torch.tensor([11, 0, -(2**63), 12])
    steps = torch.tensor([0, 3, 1, 0])
    together = uniform(seeds[:, None], rows[:, None], steps[:, None], torch.arange(3)[None])
    order = torch.tensor([2, 0, 3, 1])
    shuffled = uniform(seeds[order, None], rows[order, None], steps[order, None], torch.arange(3)[None])
    assert torch.equal(shuffled, together[order])
    for row in range(4):
        for lane in range(3):
            alone = uniform(seeds[row], rows[row], steps[row], torch.tensor(lane))
            assert alone == together[row, lane]


def test_words_are_not_interchangeable() -> None:
    assert uniform(*words(1, 2)) != uniform(*words(2, 1))
    assert uniform(*words(1, 2, 0)) != uniform(*words(1, 2))


def test_narrower_integers_give_the_same_draw() -> None:
    assert uniform(torch.tensor(-3, dtype=torch.int32)) == uniform(torch.tensor(-3))
