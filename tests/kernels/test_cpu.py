"""The compiled CPU kernels against plain torch: every edge of their blocks, rows that stand alone, bad values.

Where there is no C compiler (or no int8 instruction) torch is compared with itself, and `test_it_was_built` says so.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from s2s_ray.errors import SettingsError
from s2s_ray.generation.cache import Cohort, DecoderCache
from s2s_ray.kernels import cpu
from s2s_ray.nn.linear import ACTIVATIONS, pack_weight

ROWS = (1, 2, 13, 14, 15, 29, 141, 256, 257, 500)  # tiles of 14 rows, turns of 140 or 256, other shares from 257 on


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """int8 by its definition, in double precision."""
    scales = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12 / 127)
    row_scales = x.abs().amax(dim=1, keepdim=True) / 127
    codes = (x * torch.where(row_scales > 0, torch.tensor(127.0) / (row_scales * 127), 0.0)).round()
    y = (codes.double() @ (weight / scales[:, None]).round().double().t()) * row_scales * scales
    return ACTIVATIONS[activation](y + (0 if bias is None else bias)).float()


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize(("inputs", "outputs"), [(5, 33), (64, 32), (130, 31), (2100, 97)])
def test_int8_is_its_definition_and_row_by_row(
    inputs: int, outputs: int, activation: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(cpu, "_has_int8", lambda: False)
    torch.manual_seed(inputs)
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
    projection = pack_weight(weight, bias, activation=activation, quantization="int8")
    x = torch.randn(max(ROWS), inputs) * torch.logspace(-3, 3, max(ROWS))[:, None]
    x[7] = 0.0
    alone = torch.cat([projection(row[None]) for row in x])
    for count in ROWS:
        if compiled and cpu._has_int8():
            assert torch.equal(projection(x[:count]), alone[:count])
        else:  # torch's exp of a row's last values is another than that of its first
            torch.testing.assert_close(projection(x[:count]), alone[:count], rtol=1e-6, atol=1e-6)
    expected = exact(x, weight, bias, activation)
    # A code may fall on the other side of a tie; half a step of one input is what that can cost.
    step = x.abs().amax(dim=1, keepdim=True) / 127 * weight.abs().max()
    assert ((alone - expected).abs() <= 1e-4 * expected.abs().clamp(min=1) + step).all()
    assert ((alone - expected).abs() > 1e-4 * expected.abs().clamp(min=1)).float().mean() < 0.01


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize(("inputs", "outputs"), [(5, 33), (512, 32), (513, 31), (1100, 97)])
def test_products_are_torchs_and_row_by_row(inputs: int, outputs: int, activation: str) -> None:
    if not cpu.has_float():
        pytest.skip("no C compiler or no AVX-512")
    torch.manual_seed(inputs)
    weight, bias, x = torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(max(ROWS), inputs)
    projection = pack_weight(weight, bias, activation=activation)
    alone = torch.cat([projection(row[None]) for row in x])
    for count in ROWS:
        assert torch.equal(projection(x[:count]), alone[:count])
    expected = ACTIVATIONS[activation](nn.functional.linear(x.double(), weight.double(), bias.double()))
    torch.testing.assert_close(alone, expected.float(), rtol=1e-4, atol=1e-4)
    x[3, inputs - 1] = float("nan")
    assert projection(x).isnan().any(dim=1).nonzero().tolist() == [[3]]


@pytest.mark.parametrize(("inputs", "quantization"), [(2500, None), (8500, "int8")])
def test_wide_rows_go_through_groups_of_panels_pass_by_pass(inputs: int, quantization: str | None) -> None:
    if not cpu.has_float():
        pytest.skip("no C compiler or no AVX-512")
    torch.manual_seed(inputs)
    weight, bias, x = torch.randn(1100, inputs) / inputs**0.5, torch.randn(1100), torch.randn(max(ROWS), inputs)
    projection = pack_weight(weight, bias, quantization=quantization)
    everything = projection(x)
    for count in (1, 14, 141, 257):
        assert torch.equal(projection(x[:count]), everything[:count])
    expected = exact(x, weight, bias, "none") if quantization else nn.functional.linear(x.double(), weight.double())
    expected = expected if quantization else (expected + bias).float()
    torch.testing.assert_close(everything, expected, rtol=1e-4, atol=1e-3 if quantization else 1e-5)


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize(
    ("inputs", "outputs", "count"),
    [(24, 31, 1), (24, 33, 40), (24, 2048, 9), (24, 5000, 1), (24, 5000, 8), (2500, 5000, 8)],
)
def test_the_best_outputs_are_those_of_the_product(
    inputs: int, outputs: int, count: int, quantization: str | None
) -> None:
    torch.manual_seed(outputs)
    bias = torch.randn(outputs)
    bias[:32] = float("-inf") if outputs > 100 else 0.0
    head = pack_weight(torch.randn(outputs, inputs) / inputs**0.5, bias, quantization=quantization)
    if not isinstance(head, cpu.Product):
        pytest.skip("no C compiler or no AVX-512")
    x = torch.randn(300, inputs)  # 300: more than one block
    x[5] = 0.0 if outputs <= 100 else x[5]  # all outputs but the biases are equal
    logits = head(x)
    values, tokens, normaliser = head.best(x, count, normaliser=True)
    expected, order = logits.sort(dim=1, descending=True, stable=True)  # of equals the first
    assert torch.equal(values, expected[:, :count]) and torch.equal(tokens, order[:, :count])
    assert normaliser is not None
    torch.testing.assert_close(normaliser, logits.logsumexp(dim=1), rtol=1e-6, atol=1e-5)
    alone = [head.best(row[None], count, normaliser=True)[2] for row in x[:20]]
    threads = torch.get_num_threads()
    cpu.use_threads(1)
    one = head.best(x, count, normaliser=True)[2]
    cpu.use_threads(threads)
    assert torch.equal(normaliser, one) and torch.equal(normaliser[:20], torch.cat(alone))  # type: ignore[arg-type]
    x[7, 3] = float("nan")
    assert (head.best(x, count, normaliser=False)[0][:, 0] == float("inf")).nonzero().tolist() == [[7]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_int8_hides_no_bad_value(value: float) -> None:
    projection = pack_weight(torch.randn(40, 16), None, quantization="int8")
    x = torch.randn(3, 16)
    x[1, 5] = value
    y = projection(x)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_int8_reads_slices_and_keeps_leading_dimensions() -> None:
    projection = pack_weight(torch.randn(40, 16), torch.randn(40), quantization="int8")
    wide = torch.randn(2, 3, 48)
    x = wide[..., 16:32]
    assert torch.equal(projection(x), projection(x.contiguous()))
    assert projection(x).shape == (2, 3, 40)
    assert projection(torch.empty(0, 16)).shape == (0, 40)


def test_int8_is_refused_where_it_is_not() -> None:
    with pytest.raises(SettingsError, match="float32 weights on a CPU"):
        pack_weight(torch.randn(4, 4).bfloat16(), None, quantization="int8")


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("size", [8, 16, 40, 64, 128])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_attention_over_cohorts_is_torchs(width: int, size: int, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, layers = 3, 2
    torch.manual_seed(size)
    lengths = [[1, 17, 33], [16, 5]]
    tables = torch.randn(1, heads, 4) if biased else None
    cross = [
        [(torch.randn(len(n), max(n), heads * size), torch.randn(len(n), max(n), heads * size)) for _ in range(layers)]
        for n in lengths
    ]
    inputs = torch.randn(20, layers, 5 * width, 3 * heads * size)
    parents = [torch.randint(0, width, (20, len(n), width)) for n in lengths]

    def run() -> list[Tensor]:
        cohorts = []
        for n, kv in zip(lengths, cross, strict=True):
            mask = torch.arange(max(n)) < torch.tensor(n)[:, None]
            cohorts.append(Cohort(kv, mask, width=width, num_heads=heads, scale=0.3, position_tables=tables))
        cache, found = DecoderCache(cohorts), []
        for step in range(20):
            if step == 12:  # the first row of the first cohort leaves, its last takes the place
                cohorts[0].keep([2, 1])
                cache = DecoderCache(cohorts)
            cache.begin_step()
            count = sum(c.num_sequences for c in cohorts)
            for layer in range(layers):
                query, key, value = inputs[step, layer, :count].chunk(3, dim=-1)
                found += [cache.attend_self(layer, query, key, value), cache.attend_cross(layer, query.contiguous())]
            cache.end_step()
            for cohort, moves in zip(cohorts, parents, strict=True):
                cohort.reorder(moves[step, : cohort.num_rows])
        return found

    compiled = run()
    monkeypatch.setattr(cpu, "library", lambda: None)
    for ours, torchs in zip(compiled, run(), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [1, 15, 16, 37, 512])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_add_norm_is_torchs(rows: int, width: int) -> None:
    if cpu.library() is None:
        pytest.skip("no C compiler")
    torch.manual_seed(rows)
    x, y, norm = 50 + torch.randn(rows, width), torch.randn(rows, width), nn.LayerNorm(width)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    expected = norm.double()((x + y).double()).float()
    torch.testing.assert_close(cpu.add_norm(x, y, norm.float()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler")
def test_it_was_built() -> None:
    assert cpu.library() is not None


def test_without_a_compiler_torch_does_it_and_says_so(tmp_path: Path) -> None:
    code = "from s2s_ray.kernels import cpu; print(cpu.library())"
    broken = {"CC": str(tmp_path / "no-such-compiler"), "XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=broken, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
    assert "generation runs on plain torch" in done.stderr
