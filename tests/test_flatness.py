"""Measures of flatness against closed forms, dense Hessians and the loss itself."""

import contextlib
import copy
import math
import pickle
import random
import sys
from functools import partial

import numpy as np
import pytest
import torch
from cases import WithDropout, images, loss_of, make, vectors
from scipy.optimize import brentq
from snapshots import assert_same, everything
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gam_fast
from gam_fast import flatness


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


def small():
    return quadratic(SPECTRA["small"])[0]


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


SPECTRA = {
    "small": [5.0, 2.0, 1.0, 0.5, 0.0],
    "lanczos": [4.0, *[3.0 * k / 60 for k in range(60)]],
    "indefinite": [3.0, 1.0, *[-0.5 * k / 50 for k in range(50)]],
    "pair": [2.0, 2.0, *[1.0 * k / 40 for k in range(40)]],
    "mostly negative": [1.0, 0.5, *[0.01 * k for k in range(40)], -3.0],
}


@pytest.mark.parametrize(("name", "rho"), [("small", 0.5), ("lanczos", 2.0), ("pair", 0.5)])
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
        assert (found.loss, found.rho) == (0.0, rho)
        assert found.starts == pytest.approx([found.value] * 3, rel=1e-6)
        assert float(flat(found.point).norm()) == pytest.approx(rho, rel=1e-9)
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


@pytest.mark.parametrize(("name", "rho"), [("small", 1.0), ("lanczos", 0.1), ("indefinite", 0.1), ("indefinite", 1.0)])
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


def test_in_a_ball_of_radius_zero_everything_is_zero():
    loss, _, _ = quadratic(SPECTRA["small"], at=1.0)
    for found in (flatness.zeroth_order_flatness(loss, 0.0), flatness.first_order_flatness(loss, 0.0)):
        assert (found.value, found.converged) == (0.0, True)


@pytest.mark.parametrize("peak", [(0.3, -0.4), (0.0, 0.0)])
def test_a_maximum_inside_the_ball_is_found(peak):
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    peak = torch.tensor(peak, dtype=torch.float64)
    loss = flatness.Loss.from_closure(lambda: -(weight - peak).square().sum(), [weight])
    found = flatness.zeroth_order_flatness(loss, 2.0, tolerance=1e-6)
    assert found.value == pytest.approx(float(peak.square().sum()), rel=1e-9, abs=1e-9)
    assert found.converged
    torch.testing.assert_close(found.point[0], peak, rtol=0, atol=1e-5)
    largest = 2.0 * 2 * (2.0 + float(peak.norm()))
    assert flatness.first_order_flatness(loss, 2.0).value == pytest.approx(largest, rel=1e-9)


def test_of_several_maxima_the_highest_start_is_reported():
    """Two bumps at ±1, one twice as high; ascents end at either, and the higher counts."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def closure():
        return (torch.exp(-8 * (weight - 1) ** 2) + 2 * torch.exp(-8 * (weight + 1) ** 2)).sum()

    loss = flatness.Loss.from_closure(closure, [weight])
    at_zero = closure().item()
    starts = [[torch.tensor([0.9])], [torch.tensor([-0.9])]]
    found = flatness.zeroth_order_flatness(loss, 1.5, restarts=1, starts=starts)
    assert found.value == pytest.approx(2.0 - at_zero, abs=1e-6)
    assert min(found.starts) == pytest.approx(1.0 - at_zero, abs=1e-6)
    assert float(found.point[0]) == pytest.approx(-1.0, abs=1e-3)


def test_a_region_without_a_finite_loss_is_stepped_back_from():
    weight = nn.Parameter(torch.full((1,), 0.5, dtype=torch.float64))
    loss = flatness.Loss.from_closure(lambda: (-torch.log(1 - weight)).sum(), [weight])  # finite below 1
    found = flatness.zeroth_order_flatness(loss, 0.6, restarts=2)
    assert math.isfinite(found.value)
    assert found.value > 0


def test_a_curved_ridge_is_climbed_and_flatness_never_falls_as_the_ball_grows():
    """−50 (y − x²)² + x/10, whose maximum in a ball is off the straight line along the gradient."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    ridge = lambda x, y: -50.0 * (y - x**2) ** 2 + 0.1 * x  # noqa: E731
    loss = flatness.Loss.from_closure(lambda: ridge(*weight), [weight])
    radii = [0.2, 0.5, 1.0]
    options = {"eigenvalues": 0, "trace_samples": 0, "max_iterations": 1000, "tolerance": 1e-4}
    found = [one.value for one in flatness.measure(loss, radii, **options).zeroth_order]
    assert found == sorted(found)
    for value, rho in zip(found, radii, strict=True):
        radius, angle = np.meshgrid(np.linspace(0, rho, 300), np.linspace(0, 2 * np.pi, 3000))
        exact = ridge(radius * np.cos(angle), radius * np.sin(angle)).max()
        assert 0.9 * exact <= value <= exact * (1 + 1e-3)


def test_flatness_is_the_same_for_the_same_seed_and_leaves_the_random_state():
    loss, _, _ = quadratic(SPECTRA["lanczos"])
    state = torch.get_rng_state()
    first = [flatness.zeroth_order_flatness(loss, 0.5, seed=3, max_iterations=2) for _ in range(2)]
    assert first[0] == first[1]
    assert all(torch.equal(a, b) for a, b in zip(first[0].point, first[1].point, strict=True))
    assert flatness.zeroth_order_flatness(loss, 0.5, seed=4, max_iterations=2) != first[0]
    assert torch.equal(state, torch.get_rng_state())
    assert not flatness.zeroth_order_flatness(loss, 0.5, max_iterations=1, tolerance=1e-9).converged


# Curvature


@pytest.mark.parametrize("name", SPECTRA)
def test_eigenvalues_and_trace_of_a_quadratic(name):
    spectrum = sorted(SPECTRA[name], reverse=True)
    loss, matrix, _ = quadratic(SPECTRA[name])
    for k in (1, 3, len(spectrum)):
        found = flatness.hessian_eigenvalues(loss, k, tolerance=1e-6)
        assert found.values == pytest.approx(spectrum[:k], rel=1e-6, abs=1e-9)
        assert max(found.residuals) < 1e-4
        for value, vector in zip(found.values, map(flat, found.vectors), strict=True):
            assert float(vector.norm()) == pytest.approx(1.0, rel=1e-9)
            torch.testing.assert_close(matrix @ vector, value * vector, rtol=0, atol=1e-4)
    lowest = flatness.hessian_eigenvalues(loss, 2, which="SA", tolerance=1e-6).values
    assert lowest == pytest.approx(spectrum[-2:], rel=1e-6, abs=1e-6)
    farthest = max(spectrum, key=abs)
    assert flatness.hessian_eigenvalues(loss, 1, which="LM").values == pytest.approx([farthest], rel=1e-6)
    exact = flatness.hessian_trace(loss, samples=len(spectrum))
    assert exact.value == pytest.approx(sum(spectrum), rel=1e-9)
    assert (exact.error, exact.products) == (0.0, len(spectrum))


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("k", [2, 3, 5, 7])
@pytest.mark.parametrize(
    "spectrum",
    [[5.0] * 3 + [4.0] * 2 + [-6.0] * 2 + [0.01 * k for k in range(60)], [-1.0] * 2 + [0.0] * 50, [3.0] * 40],
    ids=["some", "most are 0", "one"],
)
def test_a_multiple_eigenvalue_is_found_as_often_as_it_occurs(spectrum, k, which):
    """From one start, Lanczos' method finds it once: rounding decides about the others."""
    wanted = sorted(spectrum, key=abs if which == "LM" else None, reverse=True)
    wanted = wanted[-k:] if which == "SA" else wanted[:k]
    found = flatness.hessian_eigenvalues(quadratic(spectrum)[0], k, which=which, tolerance=1e-6)
    assert found.values == pytest.approx(wanted, abs=1e-4)
    assert max(found.residuals) < 1e-4
    vectors = torch.stack(list(map(flat, found.vectors)))
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-6)


def test_equal_samples_do_not_make_an_estimate_of_the_trace_exact():
    """The estimate of ½ (Σ w² + 2 w₀ w₁) is 40 ± 2, the same from two samples for one seed in two."""
    weight = nn.Parameter(torch.zeros(40, dtype=torch.float64))
    loss = flatness.Loss.from_closure(lambda: (weight**2).sum() / 2 + weight[0] * weight[1], [weight])
    options = {"eigenvalues": 0, "max_iterations": 1}
    for seed in range(8):
        found = flatness.measure(loss, 0.1, trace_samples=2, seed=seed, **options)
        if found.trace.error == 0:
            break
    assert found.trace.value != pytest.approx(40.0)
    assert ("trace", f"{found.trace.value:.6g}", "± 0") in found.rows()
    assert ("trace", "40", "exact") in flatness.measure(loss, 0.1, trace_samples=40, **options).rows()


def test_the_trace_is_estimated_within_its_error_and_reproducibly():
    loss, _, _ = quadratic(SPECTRA["lanczos"])
    exact = sum(SPECTRA["lanczos"])
    found = flatness.hessian_trace(loss, samples=40, seed=1)
    assert 0 < found.error < 0.1 * exact
    assert abs(found.value - exact) < 4 * found.error
    assert found.products == 40
    assert found == flatness.hessian_trace(loss, samples=40, seed=1)
    assert found.value != flatness.hessian_trace(loss, samples=40, seed=2).value
    # a Hessian of rank 3 is known exactly to XTrace after a few products
    loss, _, _ = quadratic([5.0, 2.0, 1.0, *[0.0] * 60])
    assert flatness.hessian_trace(loss, samples=12, method="xtrace").value == pytest.approx(8.0, rel=1e-6)


@pytest.mark.parametrize("name", ["small", "lanczos", "indefinite"])
def test_the_spectral_density_is_a_density_with_the_moments_of_the_spectrum(name):
    spectrum = SPECTRA[name]
    loss, _, _ = quadratic(spectrum)
    found = flatness.spectral_density(loss, steps=30, repeats=8)
    grid, density = np.array(found.grid), np.array(found.density)
    assert found.extremes == pytest.approx((min(spectrum), max(spectrum)), rel=1e-3, abs=1e-3)
    step = grid[1] - grid[0]
    assert density.min() >= 0
    assert density.sum() * step == pytest.approx(1.0, abs=0.05)  # the Gaussians' tails leave the grid
    assert (density * grid).sum() * step == pytest.approx(np.mean(spectrum), abs=0.1 * np.ptp(spectrum))
    assert found == flatness.spectral_density(loss, steps=30, repeats=8)
    point = flatness.spectral_density(quadratic([2.0] * 40)[0], steps=16)
    assert point.extremes == pytest.approx((2.0, 2.0), rel=1e-6)
    assert point.grid[int(np.argmax(point.density))] == pytest.approx(2.0, rel=1e-2)


# A loss over batches


def unequal_batches():
    torch.manual_seed(3)
    return [vectors(n) for n in (5, 1, 8)]


def at_once(batches):
    """All examples as one batch."""
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def by_torch(model, data, params):
    """The dense Hessian of the mean loss over all examples at once, its gradient and its value, by torch.func."""
    names = [name for name, p in model.named_parameters() if any(p is q for q in params)]
    x, y = at_once(data)

    def value(vector):
        parts = vector.split([p.numel() for p in params])
        weights = {name: part.view(p.shape) for name, part, p in zip(names, parts, params, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, weights, x), y)

    start = flat(p.detach() for p in params)
    return torch.func.hessian(value)(start), torch.func.grad(value)(start), float(value(start))


class Lying(list):
    def __len__(self):
        return 1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_streamed_loss_is_that_of_the_whole_set(reduction):
    model, _ = make("mlp")
    data = unequal_batches()
    hessian, gradient, value = by_torch(model, data, list(model.parameters()))
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)
    for stream in (data, [at_once(data)], Lying(data)):
        loss = flatness.Loss(model, nn.CrossEntropyLoss(reduction=reduction), stream)
        assert loss.value() == pytest.approx(value, rel=1e-12)
        found, grads = loss.gradient()
        assert found == pytest.approx(value, rel=1e-12)
        close(flat(grads), gradient)
        vectors = torch.randn(loss.size, 2, dtype=torch.float64)
        close(flatness.hessian(loss) @ vectors, hessian @ vectors)
        length, slope = loss.norm_gradient()
        assert length == pytest.approx(float(gradient.norm()), rel=1e-10)
        close(flat(slope), hessian @ gradient / gradient.norm())


CLASSES = torch.tensor([1.0, 10.0, 0.5], dtype=torch.float64)
CRITERIA = {
    "classes": nn.CrossEntropyLoss(),
    "weighted classes": nn.CrossEntropyLoss(CLASSES),
    "weighted log-probabilities": nn.NLLLoss(CLASSES),
    "a count of the user's": F.cross_entropy,
    "divergence by the batch": nn.KLDivLoss(reduction="batchmean"),
    "a partial function": partial(F.mse_loss, reduction="sum"),
}


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA)
def test_examples_are_counted_as_the_loss_does(criterion):
    """Against the loss of all examples at once; of classes, some are ignored, and one batch has no target at all."""
    model = nn.Sequential(make("mlp")[0], nn.LogSoftmax(1))
    data = unequal_batches()
    if isinstance(criterion, nn.KLDivLoss | partial):
        data = [(x, torch.rand(len(y), 3, dtype=torch.float64).softmax(1)) for x, y in data]
    else:
        data = [(x, torch.where(torch.arange(len(y)) == 2, -100, y)) for x, y in data]
        data.append((data[0][0], torch.full((5,), -100)))
    count = (lambda batch: float((batch[1] != -100).sum())) if criterion is F.cross_entropy else None
    x, y = at_once(data)
    expected = criterion(model(x), y) / (len(y) if isinstance(criterion, partial) else 1)
    gradient = list(torch.autograd.grad(expected, list(model.parameters())))
    value, grads = flatness.Loss(model, criterion, data, count=count).gradient()
    assert value == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(grads, gradient)


def test_groups_of_a_network_have_the_curvature_of_the_dense_hessian():
    model, _ = make("mlp")
    data = unequal_batches()
    groups = {"first": list(model.net[0].parameters()), "rest": list(model.net[2:].parameters())}
    whole = flatness.Loss(model, nn.CrossEntropyLoss(), data, params=groups)
    parts = whole.by_group()
    assert list(parts) == ["first", "rest"]
    hessian, _, _ = by_torch(model, data, whole.params)
    n = parts["first"].size
    blocks = (hessian[:n, :n], hessian[n:, n:], hessian)
    for part, block in zip((*parts.values(), whole), blocks, strict=True):
        exact = torch.linalg.eigvalsh(block)
        found = flatness.hessian_eigenvalues(part, 3, tolerance=1e-6).values
        assert found == pytest.approx(exact.flip(0)[:3].tolist(), rel=1e-6)
        assert flatness.hessian_trace(part, samples=part.size).value == pytest.approx(float(exact.sum()), rel=1e-8)
        assert flatness.zeroth_order_flatness(part, 0.1).value <= flatness.zeroth_order_flatness(whole, 0.1).value
    optimizer = torch.optim.SGD([{"params": group, "name": name} for name, group in groups.items()], lr=0.1)
    assert list(flatness.Loss(model, nn.CrossEntropyLoss(), data, params=optimizer.param_groups).groups) == list(groups)


# What must stay as it was, and what a loss is evaluated with


def noisy():
    return WithDropout(make("batchnorm_cnn")[0])


@contextlib.contextmanager
def untouched(model):
    """Parameters, buffers, flags and random state are bit for bit as before, gradients the same tensors."""
    optimizer = torch.optim.SGD(model.parameters())
    before, grads = everything(model, optimizer), [p.grad for p in model.parameters()]
    yield
    assert_same(before, everything(model, optimizer))
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))


@pytest.mark.parametrize("mode", ["eval", "frozen"])
@pytest.mark.parametrize("training", [True, False])
def test_measures_leave_everything_as_it_was(mode, training):
    model = noisy().train(training)
    model.inner.net[4].eval()
    data = [images(6), images(6)]
    loss_of(model, *data[0]).backward()
    loss = flatness.Loss(model, nn.CrossEntropyLoss(), data, mode=mode)
    with untouched(model):
        found = flatness.measure(loss, 0.1, density_steps=8, trace_samples=4, max_iterations=3)
        flatness.slice_1d(loss, flatness.filter_normalised_direction(loss), [-1.0, 1.0])
    assert found == flatness.measure(loss, 0.1, density_steps=8, trace_samples=4, max_iterations=3)
    reference = copy.deepcopy(model)
    if mode == "eval":
        reference.eval()
    torch.manual_seed(0)  # in frozen mode batches are normalised by themselves, and dropout is drawn from the seed
    expected = sum(loss_of(reference, *batch).item() for batch in data) / 2
    assert found.loss == pytest.approx(expected, rel=1e-12)


def test_an_interrupted_measure_leaves_everything_as_it_was(monkeypatch):
    model = noisy()
    calls = []

    def criterion(output, target):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return F.cross_entropy(output, target)

    loss = flatness.Loss(model, criterion, [images(6)])
    with untouched(model):
        with pytest.raises(KeyboardInterrupt):
            flatness.first_order_flatness(loss, 0.1)
        assert torch.is_grad_enabled()
        with monkeypatch.context() as patch:  # one that cannot even begin
            patch.setattr(gam_fast.rng, "kept", lambda devices: pytest.fail("out of memory"))
            with pytest.raises(pytest.fail.Exception):
                loss.value()
        expected = loss.value()  # the loss can be used again
        with loss.measuring():
            assert loss.by_group()["all"].value() == expected


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rise_below_the_rounding_of_the_loss_is_not_said_to_have_converged(dtype):
    torch.manual_seed(1)
    model = nn.Linear(64, 10).to(dtype)
    data = [(torch.randn(32, 64, dtype=dtype), torch.randint(10, (32,)))]
    loss = flatness.Loss(model, nn.CrossEntropyLoss(), data)
    assert flatness.zeroth_order_flatness(loss, 1e-3).converged == (dtype == torch.float32)


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


def test_value_and_gradient_are_of_one_function():
    """Without gradients torch takes another path through its transformer layers."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    inputs = {"src": torch.randn(2, 3, 8), "src_key_padding_mask": torch.tensor([[False, False, True]] * 2)}
    loss = flatness.Loss(model, nn.MSELoss(), [(inputs, torch.randn(2, 3, 8))])
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
    loss = flatness.Loss(model, nn.CrossEntropyLoss(), unequal_batches(), mode="frozen")
    with untouched(model):
        assert loss.value() == loss.value() == loss.gradient()[0]
        flatness.measure(loss, 0.1, max_iterations=3)
    assert model.calls is calls


@pytest.mark.parametrize("own", [True, False], ids=["its own generator", "torch's generator"])
def test_a_shuffling_loader_gives_the_same_batches_each_time(own):
    """Seen in frozen mode, where batches are normalised by themselves."""
    model, _ = make("batchnorm_cnn")
    generator = torch.Generator().manual_seed(5)
    dataset = TensorDataset(*images(20))
    loader = DataLoader(dataset, batch_size=7, shuffle=True, generator=generator if own else None)
    state = generator.get_state()
    loss, other = (flatness.Loss(model, nn.CrossEntropyLoss(), loader, mode="frozen", seed=seed) for seed in (0, 1))
    with untouched(model):
        values = {loss.value() for _ in range(3)} | {loss.gradient()[0]}
        assert max(values) - min(values) < 1e-12
        assert other.value() not in values
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("source", [random, np.random], ids=["Python's", "NumPy's"])
def test_data_that_draws_from_global_generators_is_the_same_each_time(source):
    batches = [images(4), images(6), images(2)]

    class Shuffling:
        def __iter__(self):
            order = [0, 1, 2]
            source.shuffle(order)
            return iter([batches[i] for i in order[:1]])

    model, _ = make("batchnorm_cnn")
    loss = flatness.Loss(model, nn.CrossEntropyLoss(), Shuffling())
    before = random.getstate(), pickle.dumps(np.random.get_state())
    first = flatness.zeroth_order_flatness(loss, 0.1, max_iterations=2)
    assert (random.getstate(), pickle.dumps(np.random.get_state())) == before
    source.seed(7)
    assert flatness.zeroth_order_flatness(loss, 0.1, max_iterations=2) == first


def test_under_inference_mode():
    loss = small()
    with torch.inference_mode():
        assert flatness.zeroth_order_flatness(loss, 1.0).value == pytest.approx(2.5, rel=1e-6)


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_inputs_may_be_several(kind):
    model = nn.Bilinear(2, 3, 1)
    a, b, target = torch.randn(4, 2), torch.randn(4, 3), torch.randn(4, 1)
    inputs = {"input1": a, "input2": b} if kind is dict else kind([a, b])
    loss = flatness.Loss(model, nn.MSELoss(), [(inputs, target)])
    assert loss.value() == pytest.approx(F.mse_loss(model(a, b), target).item(), rel=1e-6)
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
    d, e = ([torch.randn_like(p) for p in loss.params] for _ in range(2))

    def assert_at(w, value, size):
        assert value == pytest.approx(float(w @ matrix @ w / 2), rel=1e-9)
        assert size == pytest.approx(float((matrix @ w).norm()), rel=1e-9)

    found = flatness.slice_1d(loss, d)
    assert (len(found.offsets), found.offsets[15]) == (31, 0.0)
    for t, value, size in zip(found.offsets, found.loss, found.gradient_norm, strict=True):
        assert_at(start + t * flat(d), value, size)
    surface = flatness.slice_2d(loss, d, e, ([-0.5, 0.5], [0.0, 1.0, 2.0]))
    assert (len(surface.loss), len(surface.loss[0])) == (2, 3)
    assert_at(start + 0.5 * flat(d) + 2.0 * flat(e), surface.loss[1][2], surface.gradient_norm[1][2])
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

    loss = small()
    density, eigenvalues = flatness.spectral_density(loss), flatness.hessian_eigenvalues(loss, 2)
    axes = flatness.plot_spectrum({"a": density}, eigenvalues=eigenvalues, floor=1e-3)
    assert axes.get_yscale() == "log"
    assert axes.lines[0].get_xdata().tolist() == list(density.grid)
    assert min(axes.lines[0].get_ydata()) >= 1e-3
    assert list(axes.lines[1].get_xdata()) == list(eigenvalues.values)
    assert axes.get_legend().get_texts()[0].get_text() == "a"
    flatness.plot_spectrum(density)
    d = [torch.ones_like(p) for p in loss.params]
    line = flatness.slice_1d(loss, d, [-1.0, 0.0, 1.0])
    axes = flatness.plot_slice(line, "gradient_norm", log=True)
    assert axes.lines[0].get_ydata().tolist() == list(line.gradient_norm)
    assert (axes.get_ylabel(), axes.get_yscale()) == ("norm of the gradient", "log")
    assert flatness.plot_slice({"a": line}, axes=axes) is axes
    surface = flatness.slice_2d(loss, d, [torch.randn_like(p) for p in d], ([-1, 1], [-1, 0, 1]))
    assert "offset" in flatness.plot_surface(surface, "loss", levels=5).get_xlabel()
    for plot, thing in ((flatness.plot_slice, line), (flatness.plot_surface, surface)):
        with pytest.raises(ValueError, match="quantity must be one of 'loss', 'gradient_norm', got 'height'"):
            plot(thing, "height")
    plt.close("all")


# Errors

zeroth, first = flatness.zeroth_order_flatness, flatness.first_order_flatness
eigenvalues, trace = flatness.hessian_eigenvalues, flatness.hessian_trace
LINEAR = nn.Linear(2, 1)
BATCH = [(torch.ones(3, 2), torch.ones(3, 1))]


def of_linear(data=BATCH, loss_fn=F.mse_loss, **options):
    return flatness.Loss(LINEAR, loss_fn, data, **options)


def of_weight(closure):
    """A loss by a function of its one weight."""
    weight = nn.Parameter(torch.ones(2))
    return flatness.Loss.from_closure(lambda: closure(weight), [weight])


NOISE = iter(range(10**6))
REFUSED = [
    (lambda: zeroth(small(), -1.0), ValueError, "rho must be .* not negative, got -1.0"),
    (lambda: first(small(), math.inf), ValueError, "rho must be a number"),
    (lambda: first(small(), 1.0, restarts=0), ValueError, "restarts must be at least 1, got 0"),
    (lambda: first(small(), 1.0, tolerance=0.0), ValueError, "tolerance must be positive"),
    (lambda: first(small(), 1.0, max_iterations=0), ValueError, "max_iterations must be at"),
    (lambda: zeroth(small(), 1.0, starts=[[torch.ones(1)]]), ValueError, "a start must have"),
    (lambda: eigenvalues(small(), 0), ValueError, "k must be between 1 and 5, .* got 0"),
    (lambda: eigenvalues(small(), 6), ValueError, "k must be between 1 and 5, .* got 6"),
    (lambda: eigenvalues(small(), which="BE"), ValueError, "which must be one of 'LA', 'SA', 'LM'"),
    (lambda: trace(small(), samples=1), ValueError, "samples must be at least 2, got 1"),
    (lambda: trace(small(), samples=3, method="xtrace"), ValueError, "even for xtrace, got 3"),
    (lambda: trace(small(), method="dense"), ValueError, "method must be one of 'hutchinson'"),
    (lambda: flatness.spectral_density(small(), steps=1), ValueError, "steps must be at least 2, got 1"),
    (lambda: flatness.spectral_density(small(), kappa=1.0), ValueError, "kappa must be greater than 1"),
    (lambda: flatness.slice_1d(small(), [torch.ones(5)]), ValueError, "a direction must have one tensor per parameter"),
    (lambda: flatness.measure(small(), eigenvalues=-1), ValueError, "eigenvalues must not be negative, got -1"),
    (lambda: flatness.Loss(F.relu, F.mse_loss, BATCH), TypeError, "model must be a torch.nn.Module"),
    (lambda: of_linear(iter(BATCH)), TypeError, "data can be read once only"),
    (lambda: of_linear(mode="train"), ValueError, "mode must be one of 'eval'"),
    (lambda: of_linear(loss_fn=nn.MSELoss(reduction="none")), ValueError, "'mean' or 'sum', got 'none'"),
    (lambda: of_linear(params=[]), ValueError, "nothing to measure"),
    (lambda: of_linear(params=LINEAR.weight), TypeError, "got one tensor"),
    (lambda: of_linear(params=[LINEAR.weight] * 2), ValueError, "listed twice"),
    (lambda: of_linear(params=[torch.ones(1)]), TypeError, "requires_grad=False"),
    (lambda: of_linear(params=["weight"]), TypeError, "must be tensors, got 'wei"),
    (lambda: of_linear().product([torch.ones(3)]), ValueError, r"of its shape, got \[\(3,\)\]"),
    (lambda: zeroth(of_weight(lambda w: w.sum() * math.nan), 0.1), ValueError, "not finite at the parameters given"),
    (lambda: first(of_weight(lambda w: w.sum() * math.nan), 0.1), ValueError, "not finite at the parameters given"),
    (lambda: flatness.measure(of_weight(lambda w: w.sum() + next(NOISE))), ValueError, "not come from torch's gen"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_cannot_be_measured_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (of_linear([]), ValueError, "data gave no batch with an example in it"),
        (of_linear([torch.ones(3, 2)]), TypeError, r"must be a pair \(inputs, target\), got Tensor"),
        (of_linear(loss_fn=lambda output, target: output), TypeError, r"one element, got a tensor of shape \(3, 1\)"),
        (of_linear(loss_fn=lambda output, target: 1.0), TypeError, "one element, got 1.0"),
        (of_linear([(1.0, 2.0)]), ValueError, "cannot be told from its tensors: give count="),
        (of_weight(lambda w: torch.tensor(1.0)), ValueError, "the loss does not depend on a parameter"),
    ],
)
def test_batches_and_losses_that_do_not_fit_are_named_by_every_reading(loss, error, message):
    calls = [loss.gradient, loss.norm_gradient, lambda: loss.product([torch.ones_like(p) for p in loss.params])]
    if "depend" not in message:
        calls.append(loss.value)
    for call in calls:
        with pytest.raises(error, match=message):
            call()


def test_a_measure_within_a_measure_is_refused():
    loss = small()
    with loss.measuring(), pytest.raises(RuntimeError, match="a measurement of this loss is already in progress"):
        zeroth(loss, 0.1)


def test_what_has_no_second_derivative_says_which_switch_helps():
    layer = nn.Linear(4, 4)

    def closure():
        x = layer(torch.ones(1, 2, 3, 4))
        return F.scaled_dot_product_attention(x, x, x).square().mean()

    loss = flatness.Loss.from_closure(closure, list(layer.parameters()))
    assert zeroth(loss, 0.1).value > 0  # needs first derivatives only
    for call in (lambda: first(loss, 0.1), lambda: trace(loss)):
        with pytest.raises(gam_fast.SecondDerivativeError, match="SDPBackend.MATH"):
            call()


def test_eigenvalues_that_do_not_converge_are_an_error():
    loss, _, _ = quadratic([1.0 + 1e-6 * k for k in range(200)])
    with pytest.raises(RuntimeError, match=r"ARPACK found . of 3 eigenvalues after \d+ products: raise tolerance"):
        eigenvalues(loss, 3, tolerance=1e-12, max_iterations=1)


@pytest.mark.parametrize(
    ("missing", "call"),
    [
        ("curvlinops", trace),
        ("curvlinops", flatness.spectral_density),
        ("scipy.sparse.linalg", eigenvalues),
        ("matplotlib.pyplot", lambda loss: flatness.plot_slice(flatness.slice_1d(loss, loss.params, [0.0]))),
        ("tqdm", lambda loss: zeroth(loss, 0.1, progress=True)),
    ],
)
def test_a_missing_package_says_what_to_install(monkeypatch, missing, call):
    loss, _, _ = quadratic(SPECTRA["lanczos"])
    for name in [name for name in sys.modules if name == missing or name.startswith(missing + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"needs .*: in a checkout .*, pip install .*'\.\[flatness\]' torch==\d"):
        call(loss)


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
