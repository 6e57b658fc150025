"""Optimizers by name, and schedules against transformers'."""

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from s2s_ray.errors import SettingsError
from s2s_ray.training.optimizers import OptimizerSettings, build_optimizer, check_optimizer


@pytest.fixture
def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))


def rates(optimizer, scheduler, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)],
)
def test_schedules_equal_transformers_shifted_by_its_zero_first_step(model, schedule, reference):
    settings = OptimizerSettings(learning_rate=0.5, schedule=schedule, warmup_steps=4, total_steps=20)
    ours = rates(*build_optimizer(settings, model, None), 20)
    plain = torch.optim.Adam(model.parameters(), lr=0.5)
    theirs = rates(plain, reference(plain, 4, 20), 21)
    assert ours[:4] == pytest.approx(theirs[1:5])  # transformers wastes its first step at rate 0
    assert ours[4:] == pytest.approx(theirs[4:20])


def test_auto_is_kerashubs_adam(model):
    optimizer, scheduler = build_optimizer(check_optimizer("auto"), model, None)
    assert type(optimizer) is torch.optim.Adam
    assert (optimizer.defaults["lr"], optimizer.defaults["eps"], scheduler) == (2e-5, 1e-7, None)


def test_final_rate_is_reached_and_kept(model):
    settings = OptimizerSettings(learning_rate=1.0, schedule="cosine", final_learning_rate=0.1)
    seen = rates(*build_optimizer(settings, model, 10), 15)
    assert seen[0] == 1.0
    assert seen[10:] == pytest.approx([0.1] * 5)


def test_adamw_decays_matrices_only(model):
    optimizer, _ = build_optimizer(check_optimizer("adamw"), model, None)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    assert decayed == {id(model[0].weight)}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 4


@pytest.mark.parametrize("name", ["adam", "adamw", "adafactor", "sgd"])
def test_every_name_steps(model, name):
    optimizer, _ = build_optimizer(check_optimizer(name), model, None)
    before = model[0].weight.clone()
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)


def test_torch_optimizers_and_factories_are_taken_as_they_are(model):
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    assert build_optimizer(check_optimizer(own), model, None) == (own, None)
    made, _ = build_optimizer(check_optimizer(lambda p: torch.optim.RMSprop(p)), model, None)
    assert isinstance(made, torch.optim.RMSprop)


def test_what_cannot_work_is_refused(model):
    with pytest.raises(SettingsError, match="holds none"):
        build_optimizer(torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1), model, None)
    with pytest.raises(SettingsError, match="must return a torch Optimizer"):
        build_optimizer(lambda parameters: None, model, None)
    with pytest.raises(SettingsError, match="must know its end"):
        build_optimizer(OptimizerSettings(schedule="linear"), model, None)
    for bad in ({"name": "lion"}, {"learning_rate": 0}, {"schedule": "poly"}, {"betas": (1, 2)}, {"clip_norm": -1}):
        with pytest.raises(SettingsError, match="Received"):
            OptimizerSettings(**bad)
