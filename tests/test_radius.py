"""rho_prime="auto": near the best radius of the difference, kept between steps, and what it refuses."""

import copy
import math
from types import SimpleNamespace

import pytest
import reference
import torch
from cases import BASES, METHODS, loss_of, make, pairwise, setting
from snapshots import assert_close
from test_active import data, train
from torch import nn

import gam_fast
from gam_fast import radius

SMOOTH = ["mlp", "batchnorm_cnn", "tied_transformer"]


def errors_of(model, x, y, radii):
    """For each radius, ‖(g1 − g0)/ρ' − Hĝ‖/‖Hĝ‖ of this model in its dtype, H in fp64 at the same weights."""
    exact = copy.deepcopy(model).double()
    wide = x.double() if x.is_floating_point() else x
    weights = list(exact.parameters())
    g = torch.autograd.grad(loss_of(exact, wide, y), weights, create_graph=True)
    length = reference.norm([p.detach() for p in g])
    product = torch.autograd.grad(g, weights, [p.detach() / length for p in g])
    moved = copy.deepcopy(model)
    params, theta = list(moved.parameters()), [p.detach().clone() for p in model.parameters()]

    def gradient():
        return [p.double() for p in torch.autograd.grad(loss_of(moved, x, y), params)]

    g0 = gradient()
    found = []
    for r in radii:
        with torch.no_grad():
            for p, value in zip(params, reference.climb([t.double() for t in theta], g0, r), strict=True):
                p.copy_(value)
        difference = reference.combine((1 / r, gradient()), (-1 / r, g0))
        with torch.no_grad():
            for p, value in zip(params, theta, strict=True):
                p.copy_(value)
        wrong = reference.combine((1.0, difference), (-1.0, [h.detach() for h in product]))
        found.append(float(reference.norm(wrong) / reference.norm([h.detach() for h in product])))
    return found


@pytest.mark.parametrize(
    ("model_name", "dtype", "steps"), pairwise(SMOOTH, [torch.float64, torch.float32, torch.bfloat16], [1, 12])
)
def test_it_is_near_the_radius_of_least_error(model_name, dtype, steps):
    model, optimizer, batches = setting("gam", torch.optim.SGD, model_name, dtype, lr=0.05, rho_prime="auto")
    train(model, optimizer, data(batches, steps))
    group = optimizer.param_groups[0]
    chosen = radius.radius(group["flat_length"], radius.norm_of(list(model.parameters())), torch.finfo(dtype).eps)
    around = [chosen * 10 ** (k / 4) for k in range(-12, 13)]
    at_chosen, *others = errors_of(model, *batches[steps % len(batches)], [chosen, *around])
    assert at_chosen < 3.0 * min(others)
    # where the best is not a matter of chance, and a wrong power of ε would be seen: far off it is far worse
    assert min(others[0], others[-1]) > (5 if dtype == torch.bfloat16 else 30) * min(others)


def test_its_formula():
    eps = 2.0**-23
    assert radius.radius(0.5, 20.0, eps) == 0.5 * math.sqrt(2 * eps)
    assert radius.radius(1e9, 20.0, eps) == 20.0 * math.sqrt(2 * eps)
    assert radius.radius(1e-9, 20.0, eps) == 10.0 * eps
    assert radius.radius(0.25, 0.01, eps) == 0.25 * math.sqrt(2 * eps)  # parameters that begin at zero
    assert radius.next_length(0.0, 5.0, 20.0) == 5.0
    assert radius.next_length(2.0, 8.0, 20.0) == pytest.approx(2.0**0.9 * 8.0**0.1)
    assert radius.next_length(2.0, math.inf, 20.0) == pytest.approx(2.0**0.9 * 20.0**0.1)
    assert radius.next_length(0.0, math.inf, 0.5) == 1.0
    for nothing in (0.0, -1.0, math.nan):
        assert radius.next_length(2.0, nothing, 20.0) == 2.0
        assert radius.next_length(0.0, nothing, 20.0) == 0.0


@pytest.mark.parametrize(("method_name", "share"), [("gam", 1.0), ("fad", 0.5)])
def test_steps_are_those_with_the_numbers_it_chooses(method_name, share):
    method = METHODS[method_name]
    (ours, batches), (theirs, _) = make("mlp"), make("mlp")
    hyper = {**method.hyper, "ascent_share": share}
    optimizer = method.optimizer(ours.parameters(), BASES["adamw"], **{**hyper, "rho_prime": "auto"})
    plain = method.optimizer(theirs.parameters(), BASES["adamw"], **hyper)
    length, eps = 0.0, torch.finfo(torch.float64).eps
    for x, y in batches:
        size = float(reference.norm([p.detach() for p in theirs.parameters()]))
        chosen = max(math.sqrt(2 * eps) * min(length or 0.1 * size, size), eps * size / 2)
        plain.param_groups[0]["rho_prime"] = chosen
        g0: list[torch.Tensor] = []
        for turn in plain.passes():
            turn.backward(loss_of(theirs, *turn.rows(x, y)))
            if turn.index < 2:
                g0.append(nn.utils.parameters_to_vector([p.grad for p in theirs.parameters()]).clone())
        measured = chosen * float(g0[0].norm() / (g0[1] - g0[0]).norm())
        length = length**0.9 * measured**0.1 if length else measured
        train(ours, optimizer, [(x, y)])
        assert optimizer.param_groups[0]["flat_length"] == pytest.approx(length, rel=1e-6)
        assert optimizer.param_groups[0]["rho_prime"] == "auto"
    assert_close(ours, theirs, 1e-6, 1e-6)


def test_a_gradient_that_does_not_change():
    weight = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    slope = torch.tensor([0.25, -0.5], dtype=torch.float64)
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.125, rho_prime="auto")
    for k in range(3):
        before = weight.detach().clone()
        for _ in optimizer.passes():
            (slope * weight).sum().backward()
        assert torch.equal(weight.detach(), before - 0.125 * slope), k
        assert optimizer.param_groups[0]["flat_length"] == pytest.approx(5.0, rel=0.1)  # the bound, ‖θ‖


def test_parameters_that_begin_at_zero():
    layer = nn.Linear(4, 3).double()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)
    optimizer = gam_fast.GAM(layer.parameters(), torch.optim.SGD, lr=0.1, rho_prime="auto")
    apart = []
    for _ in range(3):
        start = layer.weight.detach().clone()
        for turn in optimizer.passes():
            if turn.index == 1:
                apart.append(float((layer.weight.detach() - start).norm()))
            (layer(x) - y).square().mean().backward()
    assert min(apart) > 1e-10
    assert 0.1 < optimizer.param_groups[0]["flat_length"] <= 1.0


def test_frozen_parameters_do_not_count():
    frozen, head = nn.Parameter(1e3 * torch.ones(50, dtype=torch.bfloat16), requires_grad=False), nn.Linear(3, 2)
    optimizer = gam_fast.GAM([frozen, *head.parameters()], torch.optim.SGD, lr=0.1, rho_prime="auto")
    start, x = [p.detach().clone() for p in head.parameters()], torch.randn(5, 3)
    for turn in optimizer.passes():
        if turn.index == 1:
            moved = reference.norm([p.detach() - s for p, s in zip(head.parameters(), start, strict=True)])
        head(x).square().sum().backward()
    assert float(moved) == pytest.approx(0.1 * math.sqrt(2 * 2.0**-23), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_norm_of_the_parameters(dtype):
    params = [torch.full((3, 4), 200.0, dtype=dtype), torch.tensor(100.0, dtype=dtype), torch.ones(2)]
    assert radius.norm_of(params) == pytest.approx(math.sqrt(12 * 4e4 + 1e4 + 2))
    assert radius.norm_of([]) == 0.0


def test_the_rounding_is_that_of_the_coarsest_parameter_or_of_autocast():
    exact, coarse = torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.bfloat16)
    assert radius.epsilon("auto", [exact]) == 2.0**-52
    assert radius.epsilon("auto", [exact, coarse]) == 2.0**-7
    assert radius.epsilon("auto:bfloat16", [exact]) == 2.0**-7
    assert radius.epsilon("auto:float16", [exact]) == 2.0**-10
    hyper = [{"rho_prime": "auto:bfloat16"}]
    found = radius.Difference.of([{"params": [nn.Parameter(torch.ones(4))]}], hyper, "rho_prime")
    assert hyper[0]["rho_prime"] == found.radius == pytest.approx(0.125 * 0.2)


def test_what_is_no_radius_is_refused():
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    for word in ("automatic", "auto:int8", "auto:", ""):
        with pytest.raises(ValueError, match=f"a radius in words is 'auto', or 'auto:'.*got {word!r}"):
            gam_fast.GAM(weights, torch.optim.SGD, lr=0.1, rho_prime=word)
    for options in ({"rho": "auto"}, {"alpha": "auto"}):
        with pytest.raises(TypeError, match="must be a number"):
            gam_fast.GAM(weights, torch.optim.SGD, lr=0.1, **options)
    with pytest.raises(TypeError, match="rho must be a number"):
        gam_fast.CFlat(weights, torch.optim.SGD, lr=0.1, rho="auto")
    mixed = "rho_prime is 'auto' in some parameter groups and a number in others"
    groups = [{"params": weights[:1], "rho_prime": "auto"}, {"params": weights[1:]}]
    with pytest.raises(ValueError, match=mixed):
        gam_fast.GAM(groups, torch.optim.SGD, lr=0.1)
    optimizer = gam_fast.GAM(weights[:1], torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=mixed):
        optimizer.add_param_group(groups[0] | {"params": weights[1:]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": weights[1:]})
    optimizer.param_groups[1]["rho_prime"] = "auto"
    with pytest.raises(ValueError, match=mixed):
        optimizer.step(lambda: sum(w.square().sum() for w in weights).backward())
    with pytest.raises(ValueError, match=mixed):
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer = gam_fast.GAM(weights, torch.optim.SGD, lr=0.1, rho_prime="auto")
    with pytest.raises(ValueError, match="rho_prime is 'auto', but only a number can have a schedule"):
        gam_fast.schedules.LinearRadius(optimizer, "rho_prime", total_steps=4, end=0.0)
    gam_fast.schedules.LinearRadius(optimizer, "rho", total_steps=4, end=0.0)


def test_a_radius_is_not_chosen_while_a_graph_is_captured(monkeypatch):
    """It reads norms; a parameter that says that it is on a GPU stands for one."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_gpu = SimpleNamespace(requires_grad=True, device=torch.device("cuda"))
    with pytest.raises(RuntimeError, match="an automatic radius looks at the norms.*without such rules and radii"):
        radius.Difference.of([{"params": [on_gpu]}], [{"rho_prime": "auto"}], "rho_prime")
    weight = nn.Parameter(torch.ones(2))
    assert radius.Difference.of([{"params": [weight]}], [{"rho_prime": "auto"}], "rho_prime").size > 0
