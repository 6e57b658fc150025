"""The count of operations against a count that is written down from the shapes alone, and against torch's own."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from s2s_ray.models.bart import BartBackbone
from s2s_ray.training.arithmetic import Arithmetic, matrix_rate
from s2s_ray.training.batches import Examples, Ragged
from s2s_ray.training.loss import CrossEntropy
from s2s_ray.training.step import Forward, Totals
from tests.benchmarks.train import make_config, operations


def test_operations_are_those_of_the_shapes_and_of_torch() -> None:
    rows = Examples(Ragged.from_rows([[5] * 40] * 3), Ragged.from_rows([[6] * 12] * 3), 2, 1)
    backbone = BartBackbone(make_config("tiny")).eval()
    ours = Arithmetic.of(backbone)
    s, t = rows.sources.lengths, rows.labels.lengths
    assert ours.operations(s, t) == pytest.approx(operations("tiny", rows, np.arange(3)))
    with FlopCounterMode(display=False) as counter:
        Forward(backbone, CrossEntropy())(rows.collate(range(3)).packed(), Totals()).backward()
    linear = ours.per_source * s.sum() + ours.per_target * t.sum()  # torch does not count attention on a CPU
    assert linear == pytest.approx(counter.get_total_flops())
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)
    frozen = Arithmetic.of(backbone)
    assert frozen.per_source == pytest.approx(Arithmetic.of(BartBackbone(make_config("tiny"))).per_source * 4 / 6)


def test_a_matrix_product_has_a_rate() -> None:
    assert matrix_rate(torch.device("cpu"), "fp32") > 1e8
