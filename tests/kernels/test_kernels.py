"""The Triton kernels against their plain torch twins: on a GPU where there is one, else through Triton's interpreter
(`TRITON_INTERPRET=1`), where Triton is installed.
"""

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton")

from s2s_ray.kernels import activations, attention, norms, reference, sampling, selection
from s2s_ray.nn.linear import ACTIVATIONS
from s2s_ray.nn.norms import RMSNorm
from s2s_ray.nn.ragged import RaggedRows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS = 4
DTYPES = [torch.float32, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize(("width", "size"), [(1, 64), (3, 8)])
def test_self_attention_of_one_step(width: int, size: int, biased: bool, dtype: torch.dtype) -> None:
    rows, positions, inner = 5, 40, HEADS * size
    product = normal(rows * width, 3 * inner, dtype=dtype)
    held = normal(rows, positions, width, 2 * inner, dtype=dtype)
    ages = torch.randint(0, positions - 1, (rows,), device=DEVICE)
    done = torch.zeros(rows, dtype=torch.bool, device=DEVICE)
    done[3] = True
    ancestry = None
    if width > 1:
        ancestry = torch.randint(0, width, (rows, width, positions), device=DEVICE).to(torch.int8)
        lanes = torch.arange(width, device=DEVICE, dtype=torch.int8)[None, :, None].expand(rows, -1, 1)
        ancestry.scatter_(2, ages[:, None, None].expand(-1, width, 1), lanes)
    table = normal(HEADS, 20) if biased else None
    stored, outputs = [], []
    for kernels in (reference, attention):
        stored.append(held.clone())
        outputs.append(
            kernels.decode_self(
                product[:, :inner],
                product[:, inner:],
                stored[-1],
                ages,
                done,
                ancestry,
                table,
                heads=HEADS,
                width=width,
                scale=0.3,
            )
        )
    assert torch.equal(stored[1], stored[0])
    assert not torch.equal(stored[0], held)
    close(outputs[1], outputs[0], dtype)
    assert not outputs[1].view(rows, -1)[3].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "size"), [(1, 64), (3, 8)])
@pytest.mark.parametrize("brief", [False, True], ids=["long", "brief"])
def test_cross_attention_over_pages(brief: bool, width: int, size: int, dtype: torch.dtype) -> None:
    rows, inner, page = 5, HEADS * size, 32
    held = normal(40 * page, 2 * inner, dtype=dtype)
    pages = torch.stack([torch.randperm(40, device=DEVICE)[:5] for _ in range(rows)]).int()
    lengths = torch.tensor([1, 160, 33, 64, 97], dtype=torch.int32, device=DEVICE)
    done = torch.tensor([False, False, True, False, False], device=DEVICE)
    query = normal(rows * width, inner, dtype=dtype)
    expected, found = (
        kernels.decode_cross(
            query, held, pages, lengths, done, heads=HEADS, width=width, scale=0.3, page=page, brief=brief
        )
        for kernels in (reference, attention)
    )
    close(found, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_attention_within_ragged_rows(biased: bool, dtype: torch.dtype) -> None:
    lengths = [130, 7, 65, 64, 1]
    rows = RaggedRows(lengths, DEVICE)
    qkv = normal(sum(lengths), 3 * HEADS * 8, dtype=dtype)
    table = normal(HEADS, 41) if biased else None
    expected, found = (
        kernels.ragged(qkv, rows.starts, rows.blocks, table, heads=HEADS, scale=0.1)
        for kernels in (reference, attention)
    )
    close(found, expected, dtype)


@pytest.mark.parametrize("vocabulary", [50, 5_001])
@pytest.mark.parametrize("count", [1, 6])
def test_the_best_tokens(vocabulary: int, count: int) -> None:
    scores = normal(9, vocabulary)
    scores[1, 3:] = float("-inf")  # three tokens are left
    scores[2] = float("-inf")
    scores[2, vocabulary - 2] = 0.0
    scores[3, 1] = float("nan")
    scores[4, 1] = float("inf")
    values, tokens, normaliser = selection.best(scores, count)
    expected = scores.topk(count, dim=-1).values
    good = torch.tensor([0, 1, 2, 5, 6, 7, 8], device=DEVICE)
    assert torch.equal(values[good], expected[good])
    assert torch.equal(scores.gather(1, tokens)[good], expected[good])
    assert all(len(set(row)) == count for row in tokens[good].tolist())
    torch.testing.assert_close(normaliser[good], scores.logsumexp(dim=-1)[good])
    assert values[3:5].isnan().all()


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(50, torch.float32), (2_100, torch.float16), (60, torch.bfloat16)], ids=str
)
def test_sampling_by_mass(vocabulary: int, dtype: torch.dtype) -> None:
    """As over the sorted tokens, those of one score by their ids; in half precision many have the same."""
    rows = 6
    scores = (3 * normal(rows, vocabulary)).to(dtype)
    scores[1, 3:] = float("-inf")
    scores[2] = float("-inf")
    scores[2, vocabulary - 2] = 0.0
    temperatures = torch.tensor([0.7, 1.0, 1.5, 1.0, 1.0, 2.0], device=DEVICE)
    nuclei = torch.tensor([1.0, 0.9, 0.5, 1.0, 0.1, 0.8], device=DEVICE)
    draws = torch.linspace(0, 1, rows + 1, dtype=torch.float64, device=DEVICE)[torch.randperm(rows)]
    found = sampling.sample(scores, temperatures, nuclei, draws)
    ordered, ids = scores.float().sort(dim=1, descending=True, stable=True)
    mass = (ordered.double() / temperatures[:, None]).softmax(dim=1)
    mass = mass.masked_fill(mass.cumsum(dim=1) - mass >= nuclei[:, None], 0.0)
    cumulative = mass.cumsum(dim=1)
    place = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)
    assert found.tolist() == ids.gather(1, place).squeeze(1).tolist()


def test_forced_tokens() -> None:
    scores = normal(5, 5_001)
    expected = scores.clone()
    expected[1], expected[4] = float("-inf"), float("-inf")
    expected[1, 7] = expected[4, 5_000] = 0.0
    now = torch.tensor([False, True, False, False, True], device=DEVICE)
    selection.force(scores, now, torch.tensor([3, 7, 0, 0, 5_000], device=DEVICE))
    assert torch.equal(scores, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_addition_and_norm(dtype: torch.dtype) -> None:
    norm = torch.nn.LayerNorm(100, device=DEVICE, dtype=dtype)
    norm.weight.uniform_()
    norm.bias.uniform_()
    x, y = normal(7, 100, dtype=dtype), normal(7, 100, dtype=dtype)
    close(norms.add_norm(x, y, norm), norm(x + y), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_root_mean_square_norm(dtype: torch.dtype) -> None:
    norm = RMSNorm(100, 1e-6).to(DEVICE, dtype)
    norm.weight.data.uniform_()
    x = normal(7, 100, dtype=dtype)
    close(
        norms.rms_norm(x, norm.weight.data, norm.eps), norm(x).detach(), dtype
    )  # a gradient is asked for: plain torch


def test_an_overflow_is_brought_back_and_a_nan_stays() -> None:
    norm = torch.nn.LayerNorm(100, device=DEVICE, dtype=torch.float16)
    norm.bias.data[:3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    x = normal(7, 100, dtype=torch.float16)
    found = norms.add_norm(x, x, norm)[:, :3]
    limit = torch.finfo(torch.float16).max - 1000
    assert torch.equal(found[:, :2], torch.tensor([limit, -limit], device=DEVICE).half().expand(7, 2))
    assert found[:, 2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation(activation: str, dtype: torch.dtype) -> None:
    gate, up = normal(5, 1_100, dtype=dtype), normal(5, 1_100, dtype=dtype)
    expected = ACTIVATIONS[activation](gate) * up
    torch.testing.assert_close(
        activations.gated(torch.cat((gate, up), dim=1), activation), expected, rtol=TOLERANCE[dtype], atol=1e-5
    )


def test_rows_are_scattered() -> None:
    source, index = normal(6, 96), torch.tensor([4, 1, 9, 0, 3, 7], device=DEVICE)
    expected, found = torch.zeros(10, 96, device=DEVICE), torch.zeros(10, 96, device=DEVICE)
    reference.scatter(source, index, expected)
    attention.scatter(source, index, found)
    assert torch.equal(found, expected)
