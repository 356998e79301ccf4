"""Measures of flatness against closed forms, dense Hessians and curvlinops' own operator."""

from __future__ import annotations

import copy
import math
import sys
from functools import partial

import hypothesis
import numpy as np
import pytest
import torch
from cases import loss_of, make
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gam_fast
from gam_fast import flatness
from gam_fast.flatness import extra

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch.func and curvlinops


def quadratic(eigenvalues, at=0.0, seed=0):
    """½ wᵀ A w with the spectrum given, over two tensors; the weights ``at`` times a random unit vector."""
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    matrix = basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T
    start = torch.randn(n, dtype=torch.float64, generator=generator)
    start *= at / start.norm()
    weights = [nn.Parameter(start[: n // 3].clone()), nn.Parameter(start[n // 3 :].view(-1, 1).clone())]

    def closure():
        w = torch.cat([p.flatten() for p in weights])
        return w @ matrix @ w / 2

    return flatness.Loss.from_closure(closure, weights), matrix, start


SPECTRA = {
    "small": [5.0, 2.0, 1.0, 0.5, 0.0],
    "lanczos": [4.0, *[3.0 * k / 60 for k in range(60)]],
    "indefinite": [3.0, 1.0, *[-0.5 * k / 50 for k in range(50)]],
    "pair": [2.0, 2.0, *[1.0 * k / 40 for k in range(40)]],
}


@pytest.mark.parametrize("name", ["small", "lanczos", "pair"])
@pytest.mark.parametrize("rho", [0.5, 2.0])
def test_at_the_minimum_of_a_quadratic_the_closed_forms(name, rho):
    loss, _, _ = quadratic(SPECTRA[name])
    largest = max(SPECTRA[name])
    zeroth = flatness.zeroth_order_flatness(loss, rho, tolerance=1e-5)
    first = flatness.first_order_flatness(loss, rho, tolerance=1e-5)
    assert zeroth.value == pytest.approx(rho**2 * largest / 2, rel=1e-6)
    assert first.value == pytest.approx(rho**2 * largest, rel=1e-6)
    for found in (zeroth, first):
        assert found.converged
        assert found.residual <= 1e-5
        assert found.loss == 0.0
        assert found.rho == rho
        assert found.starts == pytest.approx([found.value] * 3, rel=1e-6)
        size = math.sqrt(sum(float(x.square().sum()) for x in found.point))
        assert size == pytest.approx(rho, rel=1e-9)
        assert max(found.iterations, 3) < found.evaluations


def largest_in_ball(matrix, linear, rho):
    """max of ½ xᵀMx + bᵀx over the ball, by the secular equation: x = (μ − M)⁻¹ b with ‖x‖ = ρ, μ > λmax, μ ≥ 0."""
    values, vectors = np.linalg.eigh(matrix.numpy())
    b = vectors.T @ linear.numpy()

    def excess(mu):
        return np.linalg.norm(b / (mu - values)) - rho

    low = max(values[-1], 0.0)
    mu = brentq(excess, low + 1e-10, low + np.linalg.norm(b) / rho + 1.0, xtol=1e-14)
    x = b / (mu - values)
    return float(x @ (values * x) / 2 + b @ x)


@pytest.mark.parametrize("name", ["small", "lanczos", "indefinite"])
@pytest.mark.parametrize("rho", [0.1, 1.0])
def test_away_from_the_minimum_the_trust_region_problem(name, rho):
    """L(θ+δ) − L = gᵀδ + ½ δᵀHδ, and ½‖g + Hδ‖² = ½‖g‖² + (Hg)ᵀδ + ½ δᵀH²δ, whose maxima in the ball are known."""
    loss, matrix, start = quadratic(SPECTRA[name], at=1.0)
    g = matrix @ start
    zeroth = flatness.zeroth_order_flatness(loss, rho, tolerance=1e-5)
    first = flatness.first_order_flatness(loss, rho, tolerance=1e-5)
    assert zeroth.value == pytest.approx(largest_in_ball(matrix, g, rho), rel=1e-6)
    square = 2 * largest_in_ball(matrix @ matrix, matrix @ g, rho) + float(g @ g)
    assert first.value == pytest.approx(rho * math.sqrt(square), rel=1e-6)
    assert zeroth.value <= first.value


def test_a_maximum_inside_the_ball_is_found():
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    peak = torch.tensor([0.3, -0.4], dtype=torch.float64)
    loss = flatness.Loss.from_closure(lambda: -(weight - peak).square().sum(), [weight])
    found = flatness.zeroth_order_flatness(loss, 2.0, tolerance=1e-6)
    assert found.value == pytest.approx(0.25, rel=1e-9)
    assert found.converged
    torch.testing.assert_close(found.point[0], peak, rtol=0, atol=1e-5)


def test_a_maximum_at_theta_itself_gives_zero():
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    loss = flatness.Loss.from_closure(lambda: -weight.square().sum(), [weight])
    found = flatness.zeroth_order_flatness(loss, 1.0, tolerance=1e-6)
    assert found.value == pytest.approx(0.0, abs=1e-9)
    assert flatness.first_order_flatness(loss, 1.0).value == pytest.approx(2.0, rel=1e-9)


def test_of_several_maxima_the_highest_start_is_reported():
    """Two bumps at ±1, one twice as high; ascents end at either, and the higher counts."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def closure():
        return (torch.exp(-8 * (weight - 1) ** 2) + 2 * torch.exp(-8 * (weight + 1) ** 2)).sum()

    loss = flatness.Loss.from_closure(closure, [weight])
    at_zero = closure().item()
    found = flatness.zeroth_order_flatness(
        loss, 1.5, restarts=1, starts=[[torch.tensor([0.9])], [torch.tensor([-0.9])]]
    )
    assert found.value == pytest.approx(2.0 - at_zero, abs=1e-6)
    assert min(found.starts) == pytest.approx(1.0 - at_zero, abs=1e-6)
    assert float(found.point[0]) == pytest.approx(-1.0, abs=1e-3)


def test_a_region_without_a_finite_loss_is_stepped_back_from():
    weight = nn.Parameter(torch.full((1,), 0.5, dtype=torch.float64))
    loss = flatness.Loss.from_closure(lambda: (-torch.log(1 - weight)).sum(), [weight])  # finite below 1
    found = flatness.zeroth_order_flatness(loss, 0.6, restarts=2)
    assert math.isfinite(found.value)
    assert found.value > 0


def banana(a=50.0, slope=0.1, at=(0.0, 0.0)):
    """A curved ridge: −a (y − x²)² + slope · x, whose maximum in a ball is off the straight line along the gradient."""
    weight = nn.Parameter(torch.tensor(at, dtype=torch.float64))
    return flatness.Loss.from_closure(lambda: -a * (weight[1] - weight[0] ** 2) ** 2 + slope * weight[0], [weight])


def on_a_grid(function, rho, n=1201):
    """The maximum over the disk by brute force."""
    axis = np.linspace(-rho, rho, n)
    x, y = np.meshgrid(axis, axis)
    inside = x**2 + y**2 <= rho**2
    edge = np.linspace(0, 2 * np.pi, 20_000)
    return max(function(x, y)[inside].max(), function(rho * np.cos(edge), rho * np.sin(edge)).max())


@pytest.mark.parametrize("rho", [0.2, 0.5, 1.0])
def test_a_curved_ridge_is_climbed(rho):
    loss = banana()
    exact = on_a_grid(lambda x, y: -50 * (y - x**2) ** 2 + 0.1 * x, rho)
    found = flatness.zeroth_order_flatness(loss, rho, max_iterations=3000, tolerance=1e-4)
    assert found.value <= exact * (1 + 1e-3)
    if found.converged:
        assert found.value >= 0.99 * exact
    assert found.value >= 0.9 * exact


def test_flatness_never_falls_as_the_ball_grows():
    found = flatness.measure(banana(), [0.1, 0.2, 0.5, 1.0], eigenvalues=0, trace_samples=0, max_iterations=300)
    values = [one.value for one in found.zeroth_order]
    assert values == sorted(values)
    assert values[0] > 0
    one_step = flatness.zeroth_order_flatness(banana(), 0.2, max_iterations=1, restarts=1)
    assert not one_step.converged
    assert one_step.iterations <= 1


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(seed=st.integers(0, 1000), rho=st.sampled_from([0.01, 0.1, 0.5]))
def test_zeroth_order_flatness_is_at_most_first_order_flatness(seed, rho):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    data = [(torch.randn(7, 3, dtype=torch.float64), torch.randint(2, (7,)))]
    found = flatness.measure(
        flatness.Loss(model, nn.CrossEntropyLoss(), data), rho, eigenvalues=0, trace_samples=0, tolerance=1e-4
    )
    assert 0 <= found.zeroth_order[0].value <= found.first_order[0].value
    assert found.first_order[0].value >= rho * found.gradient_norm * (1 - 1e-12)


def test_flatness_is_the_same_for_the_same_seed_and_leaves_the_random_state():
    loss, _, _ = quadratic(SPECTRA["lanczos"])
    state = torch.get_rng_state()
    first = [flatness.zeroth_order_flatness(loss, 0.5, seed=3, max_iterations=2) for _ in range(2)]
    assert first[0] == first[1]
    assert all(torch.equal(a, b) for a, b in zip(first[0].point, first[1].point, strict=True))
    assert flatness.zeroth_order_flatness(loss, 0.5, seed=4, max_iterations=2) != first[0]
    assert torch.equal(state, torch.get_rng_state())
    assert not flatness.zeroth_order_flatness(loss, 0.5, max_iterations=1, tolerance=1e-9).converged


def test_radius_zero():
    loss = quadratic(SPECTRA["small"], at=1.0)[0]
    assert flatness.zeroth_order_flatness(loss, 0.0).value == 0.0
    assert flatness.first_order_flatness(loss, 0.0).value == 0.0
    assert flatness.zeroth_order_flatness(loss, 0.0).converged


# Curvature


@pytest.mark.parametrize("name", SPECTRA)
def test_eigenvalues_and_trace_of_a_quadratic(name):
    spectrum = sorted(SPECTRA[name], reverse=True)
    loss, matrix, _ = quadratic(SPECTRA[name])
    for k in (1, 3):
        found = flatness.hessian_eigenvalues(loss, k, tolerance=1e-6)
        assert found.values == pytest.approx(spectrum[:k], rel=1e-6, abs=1e-9)
        assert max(found.residuals) < 1e-4
        for value, vector in zip(found.values, found.vectors, strict=True):
            v = torch.cat([x.flatten() for x in vector])
            assert float(v.norm()) == pytest.approx(1.0, rel=1e-9)
            torch.testing.assert_close(matrix @ v, value * v, rtol=0, atol=1e-4)
    lowest = flatness.hessian_eigenvalues(loss, 2, which="SA", tolerance=1e-6).values
    assert lowest == pytest.approx(spectrum[-2:], rel=1e-6, abs=1e-6)
    assert flatness.hessian_eigenvalues(loss, 1, which="LM").values == pytest.approx([spectrum[0]], rel=1e-6)
    exact = flatness.hessian_trace(loss, samples=len(spectrum))
    assert exact.value == pytest.approx(sum(spectrum), rel=1e-9)
    assert (exact.error, exact.products) == (0.0, len(spectrum))


@pytest.mark.parametrize("k", [1, 61])
def test_all_eigenvalues_of_a_larger_matrix(k):
    loss, _, _ = quadratic(SPECTRA["lanczos"])
    expected = sorted(SPECTRA["lanczos"], reverse=True)[:k]
    assert flatness.hessian_eigenvalues(loss, k).values == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_the_largest_absolute_eigenvalue_may_be_negative():
    loss, _, _ = quadratic([1.0, 0.5, -3.0, *[0.1] * 40])
    assert flatness.hessian_eigenvalues(loss, 1, which="LM").values == pytest.approx([-3.0], rel=1e-6)
    assert flatness.hessian_eigenvalues(loss, 1, which="LA").values == pytest.approx([1.0], rel=1e-6)


def test_the_trace_is_estimated_within_its_error_and_reproducibly():
    loss, _, _ = quadratic(SPECTRA["lanczos"])
    exact = sum(SPECTRA["lanczos"])
    found = flatness.hessian_trace(loss, samples=40, seed=1)
    assert found.error is not None
    assert 0 < found.error < 0.1 * exact
    assert abs(found.value - exact) < 4 * found.error
    assert found.products == 40
    assert found == flatness.hessian_trace(loss, samples=40, seed=1)
    assert found.value != flatness.hessian_trace(loss, samples=40, seed=2).value
    # a Hessian of rank 3 is known exactly to XTrace after a few products
    loss, _, _ = quadratic([5.0, 2.0, 1.0, *[0.0] * 60])
    assert flatness.hessian_trace(loss, samples=12, method="xtrace").value == pytest.approx(8.0, rel=1e-6)


@pytest.mark.parametrize("name", SPECTRA)
def test_the_spectral_density_is_a_density_with_the_moments_of_the_spectrum(name):
    spectrum = SPECTRA[name]
    loss, _, _ = quadratic(spectrum)
    found = flatness.spectral_density(loss, steps=30, repeats=8)
    grid, density = np.array(found.grid), np.array(found.density)
    assert found.extremes == pytest.approx((min(spectrum), max(spectrum)), rel=1e-3, abs=1e-3)
    step = grid[1] - grid[0]
    assert density.sum() * step == pytest.approx(1.0, abs=0.05)  # the Gaussians' tails leave the grid
    assert (density * grid).sum() * step == pytest.approx(np.mean(spectrum), abs=0.1 * np.ptp(spectrum))
    again = flatness.spectral_density(loss, steps=30, repeats=8)
    assert found == again
    assert density.min() >= 0


def test_a_spectrum_of_one_point():
    loss, _, _ = quadratic([2.0] * 40)
    found = flatness.spectral_density(loss, steps=16)
    assert found.extremes == pytest.approx((2.0, 2.0), rel=1e-6)
    assert found.grid[int(np.argmax(found.density))] == pytest.approx(2.0, rel=1e-2)


def flat_hessian(model, data, params):
    """The dense Hessian of the mean loss over all examples at once, by torch.func."""
    names = [name for name, p in model.named_parameters() if any(p is q for q in params)]
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    sizes = [p.shape for p in params]

    def value(vector):
        parts = vector.split([size.numel() for size in sizes])
        weights = {name: part.view(size) for name, part, size in zip(names, parts, sizes, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, weights, x), y)

    start = torch.cat([p.detach().flatten() for p in params])
    return torch.func.hessian(value)(start), torch.func.grad(value)(start), value(start)


def unequal_batches(dtype=torch.float64):
    torch.manual_seed(3)
    return [(torch.randn(n, 6, dtype=dtype), torch.randint(3, (n,))) for n in (5, 1, 8)]


def test_a_streamed_loss_is_that_of_the_whole_set():
    model, _ = make("mlp")
    data = unequal_batches()
    params = list(model.parameters())
    hessian, gradient, value = flat_hessian(model, data, params)
    for stream in (data, [tuple(torch.cat(parts) for parts in zip(*data, strict=True))]):
        loss = flatness.Loss(model, nn.CrossEntropyLoss(), stream)
        assert loss.value() == pytest.approx(float(value), rel=1e-12)
        found, grads = loss.gradient()
        assert found == pytest.approx(float(value), rel=1e-12)
        torch.testing.assert_close(torch.cat([g.flatten() for g in grads]), gradient, rtol=1e-10, atol=1e-12)
        v = [torch.randn_like(p) for p in params]
        flat = torch.cat([x.flatten() for x in v])
        product = torch.cat([x.flatten() for x in loss.product(v)])
        torch.testing.assert_close(product, hessian @ flat, rtol=1e-9, atol=1e-10)
        length, slope = loss.norm_gradient()
        assert length == pytest.approx(float(gradient.norm()), rel=1e-10)
        expected = hessian @ gradient / gradient.norm()
        torch.testing.assert_close(torch.cat([x.flatten() for x in slope]), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_reduction_of_the_loss_is_heeded(reduction):
    model, _ = make("mlp")
    data = unequal_batches()
    loss = flatness.Loss(model, nn.CrossEntropyLoss(reduction=reduction), data)
    plain = flatness.Loss(model, nn.functional.cross_entropy, data)
    assert loss.value() == pytest.approx(plain.value(), rel=1e-12)
    torch.testing.assert_close(loss.gradient()[1], plain.gradient()[1], rtol=1e-10, atol=1e-12)
    v = [torch.randn_like(p) for p in model.parameters()]
    torch.testing.assert_close(loss.product(v), plain.product(v), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss.norm_gradient(), plain.norm_gradient(), rtol=1e-10, atol=1e-12)


def test_what_counts_as_an_example_can_be_said():
    """Tokens, of which some are ignored."""
    model, _ = make("mlp")
    data = [
        (torch.randn(4, 6).double(), torch.tensor([0, -100, 1, 2])),
        (torch.randn(2, 6).double(), torch.tensor([1, 0])),
    ]
    whole = [tuple(torch.cat(parts) for parts in zip(*data, strict=True))]
    criterion = nn.CrossEntropyLoss(ignore_index=-100)
    loss = flatness.Loss(model, criterion, data, count=lambda batch: float((batch[1] != -100).sum()))
    assert loss.value() == pytest.approx(flatness.Loss(model, criterion, whole).value(), rel=1e-12)


def test_the_operator_is_that_of_curvlinops():
    curvlinops = extra.require("curvlinops", "the comparison")
    model, _ = make("batchnorm_cnn")
    model.eval()
    torch.manual_seed(3)
    data = [(torch.randn(n, 1, 8, 8, dtype=torch.float64), torch.randint(3, (n,))) for n in (5, 3)]
    ours = flatness.hessian(flatness.Loss(model, nn.CrossEntropyLoss(), data))
    params = list(model.parameters())
    theirs = curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), params, data)
    matrix = torch.randn(ours.shape[1], 3, dtype=torch.float64)
    torch.testing.assert_close(ours @ matrix, theirs @ matrix, rtol=1e-9, atol=1e-10)
    assert ours.shape == theirs.shape


def test_eigenvalues_and_trace_of_a_network_are_those_of_the_dense_hessian():
    model, _ = make("mlp")
    data = unequal_batches()
    hessian = flat_hessian(model, data, list(model.parameters()))[0]
    exact = torch.linalg.eigvalsh(hessian)
    loss = flatness.Loss(model, nn.CrossEntropyLoss(), data)
    found = flatness.hessian_eigenvalues(loss, 3, tolerance=1e-6)
    assert found.values == pytest.approx(exact.flip(0)[:3].tolist(), rel=1e-6)
    assert flatness.hessian_trace(loss, samples=loss.size).value == pytest.approx(float(exact.sum()), rel=1e-8)


def test_groups_are_measured_one_at_a_time():
    model, _ = make("mlp")
    data = unequal_batches()
    groups = {"first": list(model.net[0].parameters()), "rest": list(model.net[2:].parameters())}
    whole = flatness.Loss(model, nn.CrossEntropyLoss(), data, params=groups)
    assert list(whole.by_group()) == ["first", "rest"]
    hessian = flat_hessian(model, data, whole.params)[0]
    start = 0
    for part in whole.by_group().values():
        block = hessian[start : start + part.size, start : start + part.size]
        start += part.size
        found = flatness.hessian_eigenvalues(part, 1, tolerance=1e-6).values[0]
        assert found == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-6)
        assert flatness.zeroth_order_flatness(part, 0.1).value <= flatness.zeroth_order_flatness(whole, 0.1).value
    optimizer = torch.optim.SGD([{"params": group, "name": name} for name, group in groups.items()], lr=0.1)
    assert list(flatness.Loss(model, nn.CrossEntropyLoss(), data, params=optimizer.param_groups).groups) == list(groups)


# What must stay as it was, and what a loss is evaluated with


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, _ = make("batchnorm_cnn")
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        return self.inner(self.dropout(x))


def everything(model):
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    return tensors, [m.training for m in model.modules()], [p.grad for p in model.parameters()], torch.get_rng_state()


def assert_untouched(before, model):
    tensors, training, grads, state = everything(model)
    assert all(torch.equal(value, tensors[name]) for name, value in before[0].items())
    assert before[1] == training
    assert all(a is b for a, b in zip(before[2], grads, strict=True))
    assert torch.equal(before[3], state)


@pytest.mark.parametrize("mode", ["eval", "frozen"])
@pytest.mark.parametrize("training", [True, False])
def test_measures_leave_everything_as_it_was(mode, training):
    model = Noisy().train(training)
    model.inner.net[4].eval()
    data = [(torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.randint(3, (6,))) for _ in range(2)]
    loss_of(model, *data[0]).backward()
    loss = flatness.Loss(model, nn.CrossEntropyLoss(), data, mode=mode)
    before = everything(model)
    found = flatness.measure(loss, 0.1, density_steps=8, trace_samples=4, max_iterations=3)
    flatness.slice_1d(loss, flatness.filter_normalised_direction(loss), [-1.0, 1.0])
    assert_untouched(before, model)
    assert found == flatness.measure(loss, 0.1, density_steps=8, trace_samples=4, max_iterations=3)
    reference = copy.deepcopy(model)
    if mode == "eval":
        expected = sum(loss_of(reference.eval(), *batch).item() for batch in data) / 2
        assert found.loss == pytest.approx(expected, rel=1e-12)
    elif training:  # batches are normalised by themselves, and dropout is drawn from the seed
        torch.manual_seed(0)
        expected = sum(loss_of(reference, *batch).item() for batch in data) / 2
        assert found.loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_measure_leaves_everything_as_it_was(error):
    model = Noisy()
    data = [(torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.randint(3, (6,)))]
    calls = []

    def criterion(output, target):
        calls.append(1)
        if len(calls) == 7:
            raise error
        return nn.functional.cross_entropy(output, target)

    loss = flatness.Loss(model, criterion, data)
    before = everything(model)
    with pytest.raises(error):
        flatness.first_order_flatness(loss, 0.1)
    assert_untouched(before, model)
    assert torch.is_grad_enabled()
    assert flatness.zeroth_order_flatness(loss, 0.1, max_iterations=2).value > 0  # the loss can be used again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_parameters(dtype):
    """fp32 within fp32; half precision rounds θ + δ, so that the flatness of a quadratic is known to some percent."""
    spectrum = [4.0, 1.0, *[0.1] * 40]
    n = len(spectrum)
    weight = nn.Parameter(torch.zeros(n, dtype=dtype))
    scale = torch.tensor(spectrum)
    loss = flatness.Loss.from_closure(lambda: (scale * weight.float() ** 2).sum() / 2, [weight])
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    assert flatness.zeroth_order_flatness(loss, 0.5).value == pytest.approx(0.5, rel=tolerance)
    assert flatness.first_order_flatness(loss, 0.5).value == pytest.approx(1.0, rel=tolerance)
    assert flatness.hessian_eigenvalues(loss).values == pytest.approx([4.0], rel=tolerance)
    assert flatness.hessian_trace(loss, samples=n).value == pytest.approx(sum(spectrum), rel=tolerance)
    assert flatness.spectral_density(loss, steps=10).extremes[1] == pytest.approx(4.0, rel=tolerance)
    assert weight.dtype == dtype
    assert not weight.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rise_below_the_rounding_of_the_loss_is_not_said_to_have_converged(dtype):
    torch.manual_seed(1)
    model = nn.Linear(64, 10).to(dtype)
    data = [(torch.randn(32, 64, dtype=dtype), torch.randint(10, (32,)))]
    loss = flatness.Loss(model, nn.CrossEntropyLoss(), data)
    assert not flatness.zeroth_order_flatness(loss, 1e-3).converged
    wide = flatness.Loss(copy.deepcopy(model).float(), nn.CrossEntropyLoss(), [(data[0][0].float(), data[0][1])])
    exact = flatness.zeroth_order_flatness(wide, 1e-3)
    assert exact.converged
    coarse = flatness.zeroth_order_flatness(loss, 1.0)
    assert coarse.value == pytest.approx(flatness.zeroth_order_flatness(wide, 1.0).value, rel=0.1)


def test_a_loss_may_take_gradients_itself():
    """As those of physics-informed networks do."""
    weight = nn.Parameter(torch.tensor([0.5, -0.25], dtype=torch.float64))

    def closure():
        x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        inner = torch.autograd.grad((weight * x**2).sum(), x, create_graph=True)[0]  # 2 w
        return inner.square().sum()

    loss = flatness.Loss.from_closure(closure, [weight])
    assert loss.value() == pytest.approx(4 * 0.3125)
    assert flatness.hessian_eigenvalues(loss).values == pytest.approx([8.0])
    assert flatness.first_order_flatness(loss, 0.1).value > 0


def test_value_and_gradient_are_of_one_function():
    """Without gradients torch takes another path through its transformer layers."""
    torch.manual_seed(0)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

        def forward(self, x, mask):
            return self.encoder(x, src_key_padding_mask=mask).mean(1)

    mask = torch.tensor([[False, False, True], [False, True, True]])
    data = [((torch.randn(2, 3, 8), mask), torch.randn(2, 8))]
    loss = flatness.Loss(Masked(), nn.MSELoss(), data)
    assert loss.value() == loss.gradient()[0]


class Remembering(nn.Module):
    """A buffer that moves at each call, and one that is replaced, in front of a layer that reads them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3).double()
        self.register_buffer("average", torch.zeros(6, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.average.mul_(0.5).add_(0.5 * x.mean(0))
        self.calls = self.calls + 1
        return self.layer(x - self.average)


def test_buffers_of_every_kind_stay_and_each_reading_starts_from_them():
    model = Remembering()
    calls = model.calls
    data = unequal_batches()
    loss = flatness.Loss(model, nn.CrossEntropyLoss(), data, mode="frozen")
    assert loss.value() == loss.value() == loss.gradient()[0]
    flatness.measure(loss, 0.1, max_iterations=3)
    assert not model.average.any()
    assert model.calls is calls
    assert calls == 0


def test_a_loader_with_a_generator_of_its_own_gives_the_same_batches_and_keeps_its_state():
    model, _ = make("batchnorm_cnn")
    x, y = torch.randn(20, 1, 8, 8, dtype=torch.float64), torch.randint(3, (20,))
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True, generator=generator)
    state = generator.get_state()
    loss = flatness.Loss(model, nn.CrossEntropyLoss(), loader, mode="frozen")
    assert len({loss.value() for _ in range(3)}) == 1
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 10.0, 0.5], dtype=torch.float64)])
@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.NLLLoss])
def test_weights_of_classes_and_ignored_targets_are_counted_as_the_loss_does(kind, weight):
    model, _ = make("mlp")
    data = [(x, torch.where(torch.arange(len(y)) == 2, -100, y)) for x, y in unequal_batches()]
    data.append((data[0][0], torch.full((5,), -100)))  # a batch without a target
    whole = [tuple(torch.cat(parts) for parts in zip(*data, strict=True))]
    model = nn.Sequential(model, nn.LogSoftmax(1))
    criterion = kind(weight=weight)
    streamed, at_once = (flatness.Loss(model, criterion, d) for d in (data, whole))
    assert streamed.value() == pytest.approx(at_once.value(), rel=1e-12)
    torch.testing.assert_close(streamed.gradient()[1], at_once.gradient()[1], rtol=1e-10, atol=1e-12)


def test_reductions_by_partial_and_batchmean():
    model, _ = make("mlp")
    data = [(x, torch.rand(len(y), 3, dtype=torch.float64).softmax(1)) for x, y in unequal_batches()]
    whole = [tuple(torch.cat(parts) for parts in zip(*data, strict=True))]
    summed = flatness.Loss(model, partial(nn.functional.mse_loss, reduction="sum"), data)
    by_hand = (model(whole[0][0]) - whole[0][1]).square().sum().item() / 14
    assert summed.value() == pytest.approx(by_hand, rel=1e-12)
    model = nn.Sequential(model, nn.LogSoftmax(1))
    streamed, at_once = (flatness.Loss(model, nn.KLDivLoss(reduction="batchmean"), d) for d in (data, whole))
    assert streamed.value() == pytest.approx(at_once.value(), rel=1e-12)


def test_a_length_that_lies_does_no_harm():
    class Lying(list):
        def __len__(self):
            return 1

    model, _ = make("mlp")
    data = unequal_batches()
    one, other = (flatness.Loss(model, nn.CrossEntropyLoss(), d).norm_gradient() for d in (data, Lying(data)))
    torch.testing.assert_close(one, other)


def test_a_measure_that_could_not_begin_leaves_the_loss_usable(monkeypatch):
    model = Noisy()
    data = [(torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.randint(3, (6,)))]
    loss = flatness.Loss(model, nn.CrossEntropyLoss(), data)
    expected = loss.value()
    with monkeypatch.context() as patch:
        patch.setattr(gam_fast.rng, "get_state", lambda device: pytest.fail("out of memory"))
        with pytest.raises(pytest.fail.Exception):
            loss.value()
    before = everything(model)
    assert loss.value() == expected
    assert_untouched(before, model)
    with loss.measuring():
        part = loss.by_group()["all"]
    assert part.value() == expected


def test_under_inference_mode():
    loss = small()
    with torch.inference_mode():
        assert flatness.zeroth_order_flatness(loss, 1.0).value == pytest.approx(2.5, rel=1e-6)


def test_a_shuffling_loader_gives_the_same_batches_each_time():
    """Seen in frozen mode, where batches are normalised by themselves."""
    model, _ = make("batchnorm_cnn")
    x, y = torch.randn(20, 1, 8, 8, dtype=torch.float64), torch.randint(3, (20,))
    loader = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True)
    loss = flatness.Loss(model, nn.CrossEntropyLoss(), loader, mode="frozen")
    values = {loss.value() for _ in range(3)} | {loss.gradient()[0]}
    assert max(values) - min(values) < 1e-12
    other = flatness.Loss(model, nn.CrossEntropyLoss(), loader, mode="frozen", seed=1)
    assert other.value() not in values


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False)

    def forward(self, a, b):
        return self.layer(a + b)


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_inputs_may_be_several(kind):
    model = TwoInputs()
    a, b, target = torch.randn(4, 2), torch.randn(4, 2), torch.randn(4, 1)
    inputs = {"a": a, "b": b} if kind is dict else kind([a, b])
    loss = flatness.Loss(model, nn.MSELoss(), [(inputs, target)])
    assert loss.value() == pytest.approx(nn.functional.mse_loss(model(a, b), target).item(), rel=1e-6)
    scalar_target = flatness.Loss(model, lambda out, t: out.mean() - t, [(inputs, torch.tensor(0.0))])
    assert scalar_target.value() == pytest.approx(model(a, b).mean().item(), rel=1e-6)


def test_a_loss_that_no_parameter_moves_is_flat():
    weight = nn.Parameter(torch.zeros(40))
    loss = flatness.Loss.from_closure(lambda: 3.0 + 0.0 * weight.sum(), [weight])
    found = flatness.measure(loss, 0.1, trace_samples=2)
    assert (found.loss, found.gradient_norm) == (3.0, 0.0)
    assert (found.zeroth_order[0].value, found.first_order[0].value, found.trace.value) == (0.0, 0.0, 0.0)
    linear = flatness.Loss.from_closure(lambda: weight.sum(), [weight])
    assert flatness.first_order_flatness(linear, 0.5).value == pytest.approx(0.5 * 40**0.5, rel=1e-6)


# Slices and pictures


def test_slices_are_the_loss_along_directions():
    loss, matrix, start = quadratic(SPECTRA["small"], at=1.0)
    d = [torch.ones_like(p) for p in loss.params]
    flat = torch.ones(5, dtype=torch.float64)
    found = flatness.slice_1d(loss, d)
    assert len(found.offsets) == 31
    assert found.offsets[15] == 0.0
    for t, value, size in zip(found.offsets, found.loss, found.gradient_norm, strict=True):
        w = start + t * flat
        assert value == pytest.approx(float(w @ matrix @ w / 2), rel=1e-9)
        assert size == pytest.approx(float((matrix @ w).norm()), rel=1e-9)
    e = [torch.randn_like(p) for p in loss.params]
    surface = flatness.slice_2d(loss, d, e, ([-0.5, 0.5], [0.0, 1.0, 2.0]))
    assert (len(surface.loss), len(surface.loss[0])) == (2, 3)
    w = start + 0.5 * flat + 2.0 * torch.cat([x.flatten() for x in e])
    assert surface.loss[1][2] == pytest.approx(float(w @ matrix @ w / 2), rel=1e-9)
    assert surface.gradient_norm[1][2] == pytest.approx(float((matrix @ w).norm()), rel=1e-9)
    assert len(flatness.slice_2d(loss, d, e).offsets[0]) == 15


def test_directions_are_filter_normalised():
    model, _ = make("batchnorm_cnn")
    loss = flatness.Loss(model, nn.CrossEntropyLoss(), [])
    for p, d in zip(model.parameters(), flatness.filter_normalised_direction(loss, seed=4), strict=True):
        if p.dim() > 1:
            torch.testing.assert_close(d.flatten(1).norm(dim=1), p.detach().flatten(1).norm(dim=1))
        else:
            assert not d.any()


def test_pictures_show_what_was_measured():
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    loss, _, _ = quadratic(SPECTRA["small"])
    density, eigenvalues = flatness.spectral_density(loss), flatness.hessian_eigenvalues(loss, 2)
    axes = flatness.plot_spectrum(density, eigenvalues=eigenvalues, floor=1e-3)
    assert axes.get_yscale() == "log"
    assert axes.lines[0].get_xdata().tolist() == list(density.grid)
    assert min(axes.lines[0].get_ydata()) >= 1e-3
    assert list(axes.lines[1].get_xdata()) == list(eigenvalues.values)
    axes = flatness.plot_spectrum({"a": density, "b": density})
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    d = [torch.ones_like(p) for p in loss.params]
    line = flatness.slice_1d(loss, d, [-1.0, 0.0, 1.0])
    axes = flatness.plot_slice(line, "gradient_norm", log=True)
    assert axes.lines[0].get_ydata().tolist() == list(line.gradient_norm)
    assert (axes.get_ylabel(), axes.get_yscale()) == ("norm of the gradient", "log")
    assert flatness.plot_slice({"a": line}, axes=axes) is axes
    surface = flatness.slice_2d(loss, d, [torch.randn_like(p) for p in loss.params], ([-1, 0, 1], [-1, 0, 1]))
    axes = flatness.plot_surface(surface, "loss", levels=5)
    assert "offset" in axes.get_xlabel()
    for plot, thing in ((flatness.plot_slice, line), (flatness.plot_surface, surface)):
        with pytest.raises(ValueError, match="quantity must be one of 'loss', 'gradient_norm', got 'height'"):
            plot(thing, "height")
    plt.close("all")


# Errors


zeroth, first = flatness.zeroth_order_flatness, flatness.first_order_flatness
eigenvalues = flatness.hessian_eigenvalues


def small():
    return quadratic(SPECTRA["small"])[0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: zeroth(small(), -1.0), ValueError, "rho must be .* not negative, got -1.0"),
        (lambda: first(small(), math.inf), ValueError, "rho must be a number"),
        (
            lambda: first(small(), 1.0, restarts=0),
            ValueError,
            "restarts must be at least 1, got 0",
        ),
        (lambda: first(small(), 1.0, tolerance=0.0), ValueError, "tolerance must be positive"),
        (
            lambda: first(small(), 1.0, max_iterations=0),
            ValueError,
            "max_iterations must be at",
        ),
        (
            lambda: zeroth(small(), 1.0, starts=[[torch.ones(1)]]),
            ValueError,
            "a start must have",
        ),
        (lambda: eigenvalues(small(), 0), ValueError, "k must be between 1 and 5, .* got 0"),
        (lambda: eigenvalues(small(), 6), ValueError, "k must be between 1 and 5, .* got 6"),
        (
            lambda: eigenvalues(small(), which="BE"),
            ValueError,
            "which must be one of 'LA', 'SA', 'LM'",
        ),
        (lambda: flatness.hessian_trace(small(), samples=1), ValueError, "samples must be at least 2, got 1"),
        (lambda: flatness.hessian_trace(small(), samples=3, method="xtrace"), ValueError, "even for xtrace, got 3"),
        (lambda: flatness.hessian_trace(small(), method="dense"), ValueError, "method must be one of 'hutchinson'"),
        (lambda: flatness.spectral_density(small(), steps=1), ValueError, "steps must be at least 2, got 1"),
        (lambda: flatness.spectral_density(small(), kappa=1.0), ValueError, "kappa must be greater than 1"),
        (lambda: flatness.slice_1d(small(), [torch.ones(5)]), ValueError, "a direction must have a tensor a parameter"),
        (lambda: flatness.measure(small(), eigenvalues=-1), ValueError, "eigenvalues must not be negative, got -1"),
    ],
)
def test_arguments_out_of_range_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


LINEAR = nn.Linear(2, 1)
BATCH = [(torch.ones(3, 2), torch.ones(3, 1))]


@pytest.mark.parametrize(
    ("make_loss", "error", "message"),
    [
        (lambda: flatness.Loss(lambda x: x, nn.MSELoss(), BATCH), TypeError, "model must be a torch.nn.Module"),
        (lambda: flatness.Loss(LINEAR, nn.MSELoss(), iter(BATCH)), TypeError, "data can be read once only"),
        (lambda: flatness.Loss(LINEAR, nn.MSELoss(), BATCH, mode="train"), ValueError, "mode must be one of 'eval'"),
        (lambda: flatness.Loss(LINEAR, nn.MSELoss(reduction="none"), BATCH), ValueError, "'mean' or 'sum', got 'none'"),
        (lambda: flatness.Loss(LINEAR, nn.MSELoss(), BATCH, params=[]), ValueError, "nothing to measure"),
        (lambda: flatness.Loss(LINEAR, nn.MSELoss(), BATCH, params=LINEAR.weight), TypeError, "got one tensor"),
        (lambda: flatness.Loss(LINEAR, nn.MSELoss(), BATCH, params=[LINEAR.weight] * 2), ValueError, "listed twice"),
        (lambda: flatness.Loss(LINEAR, nn.MSELoss(), BATCH, params=[torch.ones(1)]), TypeError, "requires_grad=False"),
        (lambda: flatness.Loss(LINEAR, nn.MSELoss(), BATCH, params=["weight"]), TypeError, "must be tensors, got 'wei"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(make_loss, error, message):
    with pytest.raises(error, match=message):
        make_loss()


@pytest.mark.parametrize(
    ("data", "loss_fn", "error", "message"),
    [
        ([], nn.MSELoss(), ValueError, "data gave no batch with an example in it"),
        ([torch.ones(3, 2)], nn.MSELoss(), TypeError, r"must be a pair \(inputs, target\), got Tensor"),
        (BATCH, lambda output, target: output, TypeError, r"one element, got a tensor of shape \(3, 1\)"),
        (BATCH, lambda output, target: 1.0, TypeError, "one element, got 1.0"),
        ([(torch.ones(2), torch.ones(1))], nn.MSELoss(), None, None),
        ([(1.0, 2.0)], nn.MSELoss(), ValueError, "cannot be told from its tensors: give count="),
    ],
)
def test_data_that_does_not_fit_is_named(data, loss_fn, error, message):
    loss = flatness.Loss(LINEAR, loss_fn, data)
    for call in (
        loss.value,
        loss.gradient,
        loss.norm_gradient,
        lambda: loss.product([torch.ones(1, 2), torch.ones(1)]),
    ):
        if error is None:
            call()
        else:
            with pytest.raises(error, match=message):
                call()


def test_a_loss_without_a_gradient_and_vectors_of_other_shapes_are_named():
    weight = nn.Parameter(torch.zeros(2))
    loss = flatness.Loss.from_closure(lambda: torch.tensor(1.0), [weight])
    for call in (loss.gradient, lambda: loss.product([torch.ones(2)]), loss.norm_gradient):
        with pytest.raises(ValueError, match="the loss does not depend on a parameter"):
            call()
    with pytest.raises(ValueError, match=r"a vector must have a tensor a parameter, of its shape, got \[\(3,\)\]"):
        loss.product([torch.ones(3)])


def test_a_loss_that_is_not_finite_is_named():
    weight = nn.Parameter(torch.zeros(2))
    loss = flatness.Loss.from_closure(lambda: weight.sum() * float("nan"), [weight])
    with pytest.raises(ValueError, match="not finite at the parameters given"):
        flatness.zeroth_order_flatness(loss, 0.1)
    with pytest.raises(ValueError, match="not finite at the parameters given"):
        flatness.first_order_flatness(loss, 0.1)


def test_a_loss_that_is_not_a_function_of_its_parameters_is_named():
    weight = nn.Parameter(torch.ones(2))
    noise = iter(range(10**6))
    loss = flatness.Loss.from_closure(lambda: weight.sum() + next(noise), [weight])
    with pytest.raises(ValueError, match="does not come from torch's generators"):
        flatness.measure(loss)


def test_a_measure_within_a_measure_is_refused():
    loss = small()
    with loss.measuring(), pytest.raises(RuntimeError, match="a measurement of this loss is under way"):
        flatness.zeroth_order_flatness(loss, 0.1)


def test_what_has_no_second_derivative_says_which_switch_helps():
    layer = nn.Linear(4, 4)

    def closure():
        x = layer(torch.ones(1, 2, 3, 4))
        return nn.functional.scaled_dot_product_attention(x, x, x).square().mean()

    loss = flatness.Loss.from_closure(closure, list(layer.parameters()))
    assert flatness.zeroth_order_flatness(loss, 0.1).value > 0  # needs first derivatives only
    for call in (lambda: flatness.first_order_flatness(loss, 0.1), lambda: flatness.hessian_trace(loss)):
        with pytest.raises(gam_fast.SecondDerivativeError, match="SDPBackend.MATH"):
            call()


def test_eigenvalues_that_do_not_converge_are_an_error():
    loss, _, _ = quadratic([1.0 + 1e-6 * k for k in range(200)])
    with pytest.raises(RuntimeError, match=r"ARPACK found . of 3 eigenvalues after \d+ products: raise tolerance"):
        flatness.hessian_eigenvalues(loss, 3, tolerance=1e-12, max_iterations=1)


@pytest.mark.parametrize(
    ("missing", "call"),
    [
        ("curvlinops", lambda loss: flatness.hessian_trace(loss)),
        ("curvlinops", lambda loss: flatness.spectral_density(loss)),
        ("scipy.sparse.linalg", lambda loss: flatness.hessian_eigenvalues(loss)),
        ("matplotlib.pyplot", lambda loss: flatness.plot_slice(flatness.slice_1d(loss, loss.params, [0.0]))),
        ("tqdm", lambda loss: flatness.zeroth_order_flatness(loss, 0.1, progress=True)),
    ],
)
def test_a_missing_package_says_what_to_install(monkeypatch, missing, call):
    loss, _, _ = quadratic(SPECTRA["lanczos"])
    for name in [name for name in sys.modules if name == missing or name.startswith(missing + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"needs .*: pip install 'gam-fast\[flatness\]'"):
        call(loss)


def test_progress_is_shown_when_asked_for(capsys):
    loss = small()
    flatness.zeroth_order_flatness(loss, 0.1, progress=True)
    assert "ascent in the ball" in capsys.readouterr().err
    flatness.zeroth_order_flatness(loss, 0.1)
    assert capsys.readouterr().err == ""


def test_an_optimizer_is_judged_by_these_measures():
    """GAM, from the same start, ends where R1 and λmax are smaller than where SGD ends."""
    found = {}
    for method, hyper in ((gam_fast.Base, {}), (gam_fast.ExactGAM, {"rho": 0.1, "alpha": 2.0})):
        model, batches = make("mlp")
        optimizer = method(model.parameters(), torch.optim.SGD, lr=0.2, momentum=0.9, **hyper)
        for k in range(120):
            x, y = batches[k % len(batches)]
            for turn in optimizer.passes():
                turn.backward(loss_of(model, x, y))
        found[method.__name__] = flatness.measure(flatness.Loss(model, nn.CrossEntropyLoss(), batches), 0.1)
    sgd, gam = found["Base"], found["ExactGAM"]
    assert gam.first_order[0].value < 0.9 * sgd.first_order[0].value
    assert gam.eigenvalues.values[0] < 0.9 * sgd.eigenvalues.values[0]
