"""Radius schedules: values by formula, state, and the learning rate they may follow."""

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, SequentialLR

import gam_fast
from gam_fast.schedules import ConstantRadius, CosineRadius, LinearRadius, ProportionalRadius, RadiusSchedule


def optimizer(base=torch.optim.SGD, **options):
    groups = [{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))], "rho": 0.4}]
    return gam_fast.GAM(groups, base, lr=0.1, rho=0.2, **options)


def train(target):
    target.step(lambda: sum(p.sum() ** 2 for group in target.param_groups for p in group["params"]).backward())


def cosine(rho, t):
    return 0.1 + (rho - 0.1) * (1 + math.cos(math.pi * min(t, 3) / 3)) / 2


def to_a_least_rate(rho, t):
    return 0.1 + (rho - 0.1) * (0.1 * 0.5**t - 0.02) / 0.08


SCHEDULES = {
    "constant": (ConstantRadius, lambda rho, t: rho),
    "linear": (lambda o: LinearRadius(o, total_steps=4, end=0.0), lambda rho, t: rho * (1 - min(t, 4) / 4)),
    "warm-up": (lambda o: LinearRadius(o, total_steps=4, start=0.0), lambda rho, t: rho * min(t, 4) / 4),
    "from a start": (lambda o: LinearRadius(o, total_steps=2, start=0.0, end=0.5), lambda rho, t: min(t, 2) / 4),
    "cosine": (lambda o: CosineRadius(o, total_steps=3, end=0.1), cosine),
    "proportional": (lambda o: ProportionalRadius(o, min_value=0.05), lambda rho, t: 0.05 + (rho - 0.05) * 0.5**t),
    "to a least rate": (lambda o: ProportionalRadius(o, min_value=0.1, min_lr=0.02), to_a_least_rate),
}


@pytest.mark.parametrize(("build", "value"), SCHEDULES.values(), ids=SCHEDULES)
def test_values_are_those_of_the_formula_and_resume(build, value, tmp_path):
    target = optimizer()
    schedule = build(target)
    for t in range(6):
        expected = [value(rho, t) for rho in (0.2, 0.4)]
        assert schedule.get_last_value() == pytest.approx(expected)
        assert [group["rho"] for group in target.param_groups] == schedule.get_last_value()
        if t == 2:
            torch.save((schedule.state_dict(), target.state_dict()), tmp_path / "state.pt")
            state, groups = torch.load(tmp_path / "state.pt", weights_only=True)
            assert "optimizer" not in state
            target = optimizer()
            schedule = build(target)
            target.load_state_dict(groups)
            schedule.load_state_dict(state)
            assert schedule.get_last_value() == pytest.approx(expected)
        for group in target.param_groups:
            group["lr"] *= 0.5
        schedule.step()


def cyclic(target, rates):
    return CyclicLR(target, base_lr=0.001, max_lr=rates, step_size_up=5)


CYCLES = {
    "one": lambda target, rates: OneCycleLR(target, max_lr=rates, total_steps=24, pct_start=0.25),
    "cyclic": cyclic,
    "in a sequence": lambda target, rates: SequentialLR(target, [cyclic(target, rates)], []),
}


@pytest.mark.parametrize(
    ("cycle", "lr", "base"),
    [
        ("one", 0.001, torch.optim.AdamW),
        ("one", 3.0, torch.optim.SGD),
        ("cyclic", 0.1, torch.optim.SGD),
        ("cyclic", 3.0, torch.optim.AdamW),
        ("in a sequence", 0.1, torch.optim.AdamW),
        ("in a sequence", 0.001, torch.optim.SGD),
    ],
)
def test_proportional_is_right_before_and_after_a_cycle_of_the_learning_rate(cycle, lr, base):
    """ρ is the constructor's where the rate is largest, whatever the optimizer was constructed with."""
    rates = [0.1, 0.4]

    def run_of(*order):
        target = optimizer(base, **({"momentum": 0.9} if base is torch.optim.SGD else {}))
        for group in target.param_groups:
            group["lr"] = lr
        made = {}
        for name in order:
            made[name] = (
                ProportionalRadius(target, min_value=0.05) if name == "radius" else CYCLES[cycle](target, rates)
            )
        for _ in range(11):
            train(target)
            made["lr"].step()
            made["radius"].step()
            values = made["radius"].get_last_value()
            for group, rate, value, rho in zip(target.param_groups, rates, values, (0.2, 0.4), strict=True):
                assert value == pytest.approx(0.05 + (rho - 0.05) * group["lr"] / rate)
            yield values

    values = list(run_of("radius", "lr"))
    assert values == list(run_of("lr", "radius"))
    assert [max(column) for column in zip(*values, strict=True)] == pytest.approx([0.2, 0.4])


def test_any_hyper_parameter_and_one_under_another_key():
    target = optimizer(torch.optim.RMSprop)
    LinearRadius(target, "alpha", total_steps=1, end=0.5).step()
    assert [group["gam_alpha"] for group in target.param_groups] == [0.5, 0.5]
    assert [group["alpha"] for group in target.param_groups] == [0.99, 0.99]
    LinearRadius(target, "rho_prime", total_steps=1, end=0.5).step()
    assert target.param_groups[0]["rho_prime"] == 0.5


@pytest.mark.parametrize("build", [lambda o: LinearRadius(o, total_steps=4, end=0.0), ProportionalRadius])
def test_a_group_added_later_starts_from_its_own_value(build):
    target = optimizer()
    schedule = build(target)
    target.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": 1.0})
    schedule.step()
    assert len(schedule.get_last_value()) == 3
    assert schedule.initial == [0.2, 0.4, 1.0]


def test_a_schedule_in_the_body_is_an_error():
    target = optimizer()
    schedule = LinearRadius(target, total_steps=4, end=0.0)
    with pytest.raises(RuntimeError, match="step.. of a LinearRadius in a pass of GAM: .*after the loop"):
        target.step(schedule.step)
    assert schedule.count == 0
    schedule.step()
    assert schedule.get_last_value() == pytest.approx([0.15, 0.3])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: ConstantRadius(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)),
            TypeError,
            "optimizer must be one of gam_fast, got SGD",
        ),
        (lambda: ConstantRadius(optimizer(), "radius"), ValueError, "no hyper-parameter 'radius'; it has rho"),
        (lambda: CosineRadius(optimizer(), total_steps=0), ValueError, "total_steps must be a positive integer, got 0"),
        (lambda: LinearRadius(optimizer(), total_steps=1), ValueError, "needs start= or end="),
        (lambda: LinearRadius(optimizer(), total_steps=1, end=-1.0), ValueError, "finite and not negative, got -1"),
        (lambda: ProportionalRadius(optimizer(), min_lr=0.1), ValueError, "min_lr must be below the learning rate 0.1"),
        (lambda: RadiusSchedule(optimizer()), TypeError, "RadiusSchedule is the base of the schedules"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
