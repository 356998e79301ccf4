"""Radius schedules: values by formula, state, and the learning rate they may follow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gam_fast
from gam_fast.schedules import ConstantRadius, CosineRadius, LinearRadius, ProportionalRadius, RadiusSchedule


def optimizer(base=torch.optim.SGD, **options):
    groups = [{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))], "rho": 0.4}]
    return gam_fast.GAM(groups, base, lr=0.1, rho=0.2, **options)


def run(schedule, steps, key="rho"):
    values = [[group[key] for group in schedule.optimizer.param_groups]]
    for _ in range(steps):
        schedule.step()
        values.append([group[key] for group in schedule.optimizer.param_groups])
    assert schedule.get_last_value() == values[-1]
    return values


def test_constant():
    assert run(ConstantRadius(optimizer()), 3) == [[0.2, 0.4]] * 4


def test_linear():
    values = run(LinearRadius(optimizer(), total_steps=4, end=0.0), 6)
    expected = [[rho * (1 - min(t, 4) / 4) for rho in (0.2, 0.4)] for t in range(7)]
    assert values == [pytest.approx(row) for row in expected]
    warm = run(LinearRadius(optimizer(), total_steps=2, start=0.0, end=0.5), 3)
    assert warm == [pytest.approx(row) for row in ([0.0, 0.0], [0.25, 0.25], [0.5, 0.5], [0.5, 0.5])]


def test_cosine():
    values = run(CosineRadius(optimizer(), total_steps=3, end=0.1), 4)
    expected = [
        [0.1 + (rho - 0.1) * (1 + math.cos(math.pi * min(t, 3) / 3)) / 2 for rho in (0.2, 0.4)] for t in range(5)
    ]
    assert values == [pytest.approx(row) for row in expected]


def test_proportional_follows_the_learning_rate():
    target = optimizer()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(target, 0.5)
    schedule = ProportionalRadius(target, min_value=0.1, min_lr=0.02)
    closure = lambda: sum(p.sum() ** 2 for g in target.param_groups for p in g["params"]).backward()  # noqa: E731
    for t in range(1, 3):
        target.step(closure)
        scheduler.step()
        schedule.step()
        part = (0.1 * 0.5**t - 0.02) / 0.08
        assert schedule.get_last_value() == pytest.approx([0.1 + part * 0.1, 0.1 + part * 0.3])


CYCLES = {
    "one": lambda o, rates: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=rates, total_steps=24, pct_start=0.25),
    "cyclic": lambda o, rates: torch.optim.lr_scheduler.CyclicLR(o, base_lr=0.001, max_lr=rates, step_size_up=5),
    "in a sequence": lambda o, rates: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.CyclicLR(o, base_lr=0.001, max_lr=rates, step_size_up=5)], []
    ),
}


@pytest.mark.parametrize("lr", [0.001, 0.1, 3.0])
@pytest.mark.parametrize("cycle", CYCLES)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_proportional_is_right_before_and_after_a_cycle_of_the_learning_rate(base, cycle, lr):
    """ρ is the constructor's where the rate is largest, whatever the optimizer was constructed with."""
    rates = [0.1, 0.4]

    def run_of(first):
        target = optimizer(base, **({"momentum": 0.9} if base is torch.optim.SGD else {}))
        for group in target.param_groups:
            group["lr"] = lr
        if first == "radius":
            schedule = ProportionalRadius(target, min_value=0.05)
            scheduler = CYCLES[cycle](target, rates)
        else:
            scheduler = CYCLES[cycle](target, rates)
            schedule = ProportionalRadius(target, min_value=0.05)
        for _ in range(11):
            target.step(lambda: sum(p.sum() ** 2 for g in target.param_groups for p in g["params"]).backward())
            scheduler.step()
            schedule.step()
            for group, rate, value, rho in zip(
                target.param_groups, rates, schedule.get_last_value(), (0.2, 0.4), strict=True
            ):
                assert value == pytest.approx(0.05 + (rho - 0.05) * group["lr"] / rate)
            yield schedule.get_last_value()

    values = list(run_of("radius"))
    assert values == list(run_of("lr"))
    assert [max(column) for column in zip(*values, strict=True)] == pytest.approx([0.2, 0.4])


def test_proportional_resumes_within_a_cycle():
    def build():
        target = optimizer(momentum=0.9)
        return target, CYCLES["cyclic"](target, [0.1, 0.4]), ProportionalRadius(target)

    first = build()
    second = build()
    for target, scheduler, schedule in (first, second):
        for _ in range(3 if target is first[0] else 0):
            target.step(lambda t=target: sum(p.sum() for g in t.param_groups for p in g["params"]).backward())
            scheduler.step()
            schedule.step()
    for ours, theirs in zip(second, first, strict=True):
        ours.load_state_dict(theirs.state_dict())
    assert second[2].get_last_value() == first[2].get_last_value()
    assert second[2].initial_lr == first[2].initial_lr == [0.1, 0.4]


def test_any_hyper_parameter_and_one_under_another_key():
    target = optimizer(torch.optim.RMSprop)
    LinearRadius(target, "alpha", total_steps=1, end=0.5).step()
    assert [group["gam_alpha"] for group in target.param_groups] == [0.5, 0.5]
    assert [group["alpha"] for group in target.param_groups] == [0.99, 0.99]
    LinearRadius(target, "rho_prime", total_steps=1, end=0.5).step()
    assert target.param_groups[0]["rho_prime"] == 0.5


@pytest.mark.parametrize(
    "build",
    [
        ConstantRadius,
        lambda o: LinearRadius(o, total_steps=5, end=0.0),
        lambda o: CosineRadius(o, total_steps=5),
        lambda o: ProportionalRadius(o, min_value=0.05),
    ],
)
def test_state_dict_resumes(build, tmp_path):
    first = optimizer()
    schedule = build(first)
    for _ in range(2):
        first.param_groups[0]["lr"] *= 0.5
        schedule.step()
    torch.save((schedule.state_dict(), first.state_dict()), tmp_path / "state.pt")
    state, groups = torch.load(tmp_path / "state.pt", weights_only=True)
    assert "optimizer" not in state
    second = optimizer()
    resumed = build(second)
    second.load_state_dict(groups)
    resumed.load_state_dict(state)
    assert resumed.get_last_value() == schedule.get_last_value()
    schedule.step()
    resumed.step()
    assert resumed.get_last_value() == schedule.get_last_value()


@pytest.mark.parametrize("build", [lambda o: LinearRadius(o, total_steps=4, end=0.0), ProportionalRadius])
def test_a_group_added_later_starts_from_its_own_value(build):
    target = optimizer()
    schedule = build(target)
    target.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": 1.0})
    schedule.step()
    assert len(schedule.get_last_value()) == 3
    assert schedule.initial == [0.2, 0.4, 1.0]


def test_a_schedule_in_the_body_is_an_error():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1, rho=0.2)
    schedule = gam_fast.schedules.LinearRadius(optimizer, total_steps=4, end=0.0)

    def closure():
        weight.square().sum().backward()
        schedule.step()

    with pytest.raises(RuntimeError, match="step.. of a LinearRadius in a pass of SAM: .*behind the loop"):
        optimizer.step(closure)
    assert torch.equal(weight, torch.ones(3))
    assert schedule.count == 0
    schedule.step()
    assert optimizer.param_groups[0]["rho"] == pytest.approx(0.15)


def test_errors():
    with pytest.raises(TypeError, match="optimizer must be one of gam_fast, got SGD"):
        ConstantRadius(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    with pytest.raises(ValueError, match="GAM has no hyper-parameter 'radius'; it has rho"):
        ConstantRadius(optimizer(), "radius")
    with pytest.raises(ValueError, match="total_steps must be a positive integer, got 0"):
        CosineRadius(optimizer(), total_steps=0)
    with pytest.raises(ValueError, match="end must be finite and not negative, got -1"):
        LinearRadius(optimizer(), total_steps=1, end=-1.0)
    with pytest.raises(ValueError, match="min_lr must be below the learning rate 0.1, got 0.1"):
        ProportionalRadius(optimizer(), min_lr=0.1)
    with pytest.raises(TypeError, match="RadiusSchedule is the base of the schedules"):
        RadiusSchedule(optimizer())
