"""ExactGAM: Algorithm 1 by double backward, against torch.func; and the rules of the engine, which hold for it too."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from functools import partial

import pytest
import reference
import torch
from cases import BASES, DTYPES, EXACT, MODELS, loss_of, make, pairwise, weights_and_biases
from snapshots import assert_close, through_a_file, unchanged
from test_restore import check_the_next_step, setting
from torch import nn
from torch.utils.checkpoint import checkpoint

import gam_fast

KINDS = {name: method.hyper for name, method in EXACT.items()}
STEPS = 6


def closure_of(model, x, y):
    return lambda: loss_of(model, x, y)


def without_statistics(model):
    """A BatchNorm of a functional model must not write to buffers; in train mode it does not read them either."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model


class Functional:
    """Gradient and Hessian-vector product of a model's loss as functions of its weights, by torch.func."""

    def __init__(self, model, x, y, sign=1.0):
        self.model = without_statistics(copy.deepcopy(model))
        # tied weights have one name, that of their first place
        self.names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.data = (x, y)
        self.sign = sign

    def loss(self, values):
        weights = dict(zip(self.names, values, strict=True))
        x, y = self.data
        logits = torch.func.functional_call(self.model, weights, x)
        return self.sign * nn.functional.cross_entropy(logits, y)

    def gradient(self, values):
        return list(torch.func.grad(self.loss)(list(values)))

    def product(self, values, v):
        return list(torch.func.jvp(torch.func.grad(self.loss), (list(values),), (list(v),))[1])


def set_gradients(model, direction, sign, x, y):
    """The direction of the base optimizer, for those parameters that take part."""
    trained = [p for p in model.parameters() if p.requires_grad]
    used = torch.autograd.grad(loss_of(model, x, y), trained, allow_unused=True)
    for p, d, g in zip(trained, direction, used, strict=True):
        p.grad = None if g is None else sign * d


def reference_step(model, optimizer, hyper, x, y):
    sign = -1.0 if optimizer.param_groups[0].get("maximize") else 1.0
    f = Functional(model, x, y, sign)
    theta = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    direction = reference.exact_gam(f.gradient, theta, product=f.product, **hyper)
    set_gradients(model, direction, sign, x, y)
    optimizer.step()


@pytest.mark.parametrize(
    ("model_name", "kind", "base_name"), pairwise(MODELS, KINDS, ["sgd_dampening_maximize", "adamw", "rmsprop"])
)
def test_trajectories_are_those_of_torch_func(model_name, kind, base_name):
    build = BASES[base_name]
    ours, batches = make(model_name)
    theirs = copy.deepcopy(ours)
    optimizer = gam_fast.ExactGAM(ours.parameters(), build, model=ours, **KINDS[kind])
    plain = build([p for p in theirs.parameters() if p.requires_grad])
    for k in range(STEPS):
        x, y = batches[k % len(batches)]
        if k % 2:
            optimizer.step(closure_of(ours, x, y))
        else:
            for turn in optimizer.passes():
                turn.backward(loss_of(ours, x, y))
        reference_step(theirs, plain, KINDS[kind], x, y)
    assert_close(ours, theirs, 1e-9, 1e-9)


def test_groups_may_differ_in_every_hyper_parameter():
    hyper = KINDS["exact_sam"]
    ours, batches = make("mlp")
    theirs = copy.deepcopy(ours)
    half = {name: 0.5 * value for name, value in hyper.items()}
    groups = weights_and_biases(ours, lr=0.3, **half)
    optimizer = gam_fast.ExactGAM(groups, torch.optim.SGD, lr=0.1, momentum=0.9, **hyper)
    plain = torch.optim.SGD(weights_and_biases(theirs, lr=0.3), lr=0.1, momentum=0.9)
    each = {n: [hyper[n] if p.dim() > 1 else half[n] for p in theirs.parameters()] for n in hyper}
    for x, y in batches:
        optimizer.step(closure_of(ours, x, y))
        reference_step(theirs, plain, each, x, y)
    assert_close(ours, theirs, 1e-9, 1e-9)


START = (1.0, -1.25, 0.5)


def over_quartic(*values, dtype=torch.float64, **options):
    """L = Σ x⁴/4: g = x³, H = 3 diag(x²)."""
    weight = nn.Parameter(torch.tensor(values or START, dtype=dtype))
    return weight, lambda: (weight**4).sum() / 4, gam_fast.ExactGAM([weight], torch.optim.SGD, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_step_in_closed_form(kind, dtype):
    """In low precision three points, three gradients and two products are rounded, each to half an eps of itself.

    Points are below 2, gradients below 4 and their derivative by the point (3x²) below 8; the step is 0.01 of them and
    what is added to the parameter is rounded with it.
    """
    weight, loss, optimizer = over_quartic(dtype=dtype, lr=0.01, **KINDS[kind])
    optimizer.step(loss)
    x = torch.tensor(START, dtype=torch.float64)
    direction = reference.exact_gam(
        lambda values: [v**3 for v in values],
        [x],
        product=lambda values, v: [3 * a**2 * b for a, b in zip(values, v, strict=True)],
        **KINDS[kind],
    )[0]
    working = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if dtype != torch.float64 else 0.0)
    bound = 0.01 * working * (3 * 8 * 2 + 3 * 4 + 2 * 8) + torch.finfo(dtype).eps * 1.25
    assert (weight.detach().double() - (x - 0.01 * direction)).abs().max() <= bound
    assert bound < 0.05 * float(direction.abs().max()) or dtype == torch.bfloat16


def test_the_gradient_of_the_gradient_norm_is_what_the_step_descends():
    """With ρ small, d → g + α ∇(ρ‖g‖), checked against finite differences of the penalised loss."""
    rho, alpha = 1e-6, 1e5
    weight, loss, optimizer = over_quartic(lr=1.0, rho=rho, alpha=alpha)
    start = weight.detach().clone()
    optimizer.step(loss)

    def penalised(x):
        return float((x**4).sum() / 4 + alpha * rho * (x**3).norm())

    unit = 1e-6 * torch.eye(3, dtype=torch.float64)
    expected = torch.tensor([(penalised(start + e) - penalised(start - e)) / 2e-6 for e in unit], dtype=torch.float64)
    torch.testing.assert_close(start - weight.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at", range(3))
def test_a_loss_that_is_not_finite_undoes_the_step(at):
    model, optimizer, (x, y) = setting("exact_sam")
    where = "pass 1 or 2" if at == 1 else f"pass {at}"  # of SAM's gradient no norm is needed before the end
    message = f"^{where} of ExactGAM gave a gradient that is not finite"
    with unchanged(model, optimizer), pytest.raises(gam_fast.NonFiniteGradientError, match=message):
        optimizer.step(lambda turn: loss_of(model, x, y) * (math.nan if turn.index == at else 1.0))


def test_the_loss_comes_back_without_its_graph_and_no_gradient_stays():
    weight, loss, optimizer = over_quartic(lr=0.01, interval=2)
    for is_whole in (False, True):
        expected = loss().item()
        returned = optimizer.step(loss)
        assert returned.item() == expected
        assert not returned.requires_grad
        assert (weight.grad is None) == is_whole


def test_a_checkpoint_is_that_of_the_base_optimizer_and_goes_on_alike():
    model, optimizer, (x, y) = setting("exact_sam")
    twin_model = copy.deepcopy(model)
    other = dict.fromkeys(KINDS["exact_sam"], 7.0)
    twin = gam_fast.ExactGAM(twin_model.parameters(), torch.optim.SGD, lr=9.0, model=twin_model, **other)
    twin.load_state_dict(through_a_file(optimizer.state_dict()))
    assert repr(twin) == repr(optimizer)
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).load_state_dict(optimizer.state_dict())
    check_the_next_step(model, optimizer, twin_model, twin, x, y)


def test_the_final_direction_is_clipped():
    weight, loss, optimizer = over_quartic(lr=1.0, clip_grad_norm=0.125)
    start = weight.detach().clone()
    optimizer.step(loss)
    assert float((weight.detach() - start).norm()) == pytest.approx(0.125, rel=1e-5)


def test_gradients_that_are_shared_or_expanded_are_not_written_to():
    a, b = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0, 5.0]))
    optimizer = gam_fast.ExactGAM([a, b], torch.optim.RMSprop, lr=0.01, sam_rho=0.1)
    before = [a.detach().clone(), b.detach().clone()]
    optimizer.step(lambda: (a + b).sum() ** 2)  # one tensor is the gradient of both, one number for both elements
    steps = [x.detach() - y for x, y in zip((a, b), before, strict=True)]
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(steps[0], steps[0][:1].expand(2), rtol=1e-4, atol=1e-6)


def test_a_linear_loss_has_no_curvature():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    gam_fast.ExactGAM([weight], torch.optim.SGD, lr=0.5, sam_rho=0.1).step(lambda: (weight * torch.ones(2)).sum())
    assert weight.tolist() == [0.5, 1.5]


def test_a_parameter_that_takes_part_in_some_passes_only():
    a, b = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))
    optimizer = gam_fast.ExactGAM([a, b], torch.optim.SGD, lr=0.1, rho=0.5, alpha=0.5)
    for turn in optimizer.passes():
        turn.backward(a**2 if turn.index == 0 else a**2 + b**2)
    # pass 1 is at (1.5, 1): g = (3, 2), H g/‖g‖ = 2 g/‖g‖, of which αρ = 1/4; b's gradient in pass 0 counts as zero
    expected = [1 - 0.1 * (2 + 0.5 * 3 / 13**0.5), 1 - 0.1 * 0.5 * 2 / 13**0.5]
    torch.testing.assert_close(torch.stack([a, b]).detach(), torch.tensor(expected))


def test_no_more_than_three_buffers_are_held():
    """Besides the product being made, which is the newest: the backup, SAM's gradient and the unit gradient."""
    rows = 400_000
    weight = nn.Parameter(torch.randn(rows))
    optimizer = gam_fast.ExactGAM([weight], torch.optim.SGD, lr=0.1, momentum=0.9, sam_rho=0.1)

    class Cubic(torch.autograd.Function):
        """Σ w³/3, its gradient w², its product 2 w v: keeps nothing but the parameter."""

        @staticmethod
        def forward(ctx, w):
            ctx.save_for_backward(w)
            return torch.linalg.vector_norm(w, 3) ** 3 / 3

        @staticmethod
        def backward(ctx, grad):
            return Square.apply(ctx.saved_tensors[0], grad)

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w, grad):
            ctx.save_for_backward(w)
            return torch.square(w).mul_(grad)

        @staticmethod
        def backward(ctx, v):
            held.append(live())
            return torch.mul(ctx.saved_tensors[0], v).mul_(2), None

    def live():
        gc.collect()
        sizes = {}
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, nn.Parameter) and thing.numel() == rows:
                sizes[thing.untyped_storage().data_ptr()] = True
        return len(sizes)

    held = []
    for _ in range(2):
        optimizer.step(lambda: Cubic.apply(weight))
    # of the parameter's size: itself, momentum, backup, SAM's gradient, the unit gradient (v); then the product is made
    assert max(held[2:]) <= 2 + 3
    assert live() == 2


# What cannot be done, and what the message says


@pytest.mark.parametrize(
    ("make_loss", "error", "message"),
    [
        (lambda w: None, TypeError, "tensor of one element, got None: return it from the closure"),
        (lambda w: 3.0, TypeError, "tensor of one element, got 3.0"),
        (lambda w: w**2, TypeError, r"got a tensor of shape \(3,\)"),
        (lambda w: (w**2).sum().detach(), RuntimeError, "does not depend on a parameter"),
        (lambda w: torch.ones(1, requires_grad=True) * 2, RuntimeError, "does not depend on the parameters of this"),
    ],
)
def test_a_loss_that_is_none_is_named(make_loss, error, message):
    weight, _, optimizer = over_quartic(lr=0.01)
    with pytest.raises(error, match=message):
        optimizer.step(lambda: make_loss(weight))
    assert tuple(weight.tolist()) == START


def test_a_loop_that_hands_over_no_loss_is_an_error():
    weight, loss, optimizer = over_quartic(lr=0.01)

    def loop(body):
        for turn in optimizer.passes():
            turn.backward(loss()) if turn.index == 0 else body()

    with pytest.raises(RuntimeError, match=r"pass 1 of ExactGAM: it ended without a loss.*turn.backward\(loss\)"):
        loop(lambda: None)
    with pytest.raises(RuntimeError, match="pass 1 of ExactGAM: backward.. was called in it.*without calling"):
        loop(lambda: loss().backward())
    assert tuple(weight.tolist()) == START


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class OutsideAutograd(torch.autograd.Function):
    """A backward that computes on numbers autograd does not see, and does not say so."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad.detach() * ctx.x.cos()


def attention(x):
    return nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


def with_math(operation):
    def switched(x):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return operation(x)

    return switched


def checkpointed(use_reentrant):
    return partial(checkpoint, torch.tanh, use_reentrant=use_reentrant)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # looked at by torch.compile
@pytest.mark.parametrize(
    ("operation", "hint", "switched"),
    [
        (attention, r"sdpa_kernel\(torch.nn.attention.SDPBackend.MATH\)", with_math(attention)),
        (Once.apply, "marked @once_differentiable: its backward has to be written", torch.sin),
        (OutsideAutograd.apply, "OutsideAutograd does not keep its graph", torch.sin),
        (checkpointed(True), r"checkpoint\(..., use_reentrant=False\)", checkpointed(False)),
        (torch.compile(torch.tanh, backend="aot_eager"), "use the model given to torch.compile", torch.tanh),
    ],
    ids=["attention", "once_differentiable", "outside", "checkpoint", "compile"],
)
def test_what_has_no_second_derivative_says_which_switch_helps(operation, hint, switched):
    layer = nn.Linear(8, 8)
    start = layer.weight.detach().clone()
    x = torch.randn(2, 5, 8)
    optimizer = gam_fast.ExactGAM(layer.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(gam_fast.SecondDerivativeError, match=hint):
        optimizer.step(lambda: operation(layer(x)).square().mean())
    assert torch.equal(layer.weight, start)
    optimizer.step(lambda: switched(layer(x)).square().mean())
    assert not torch.equal(layer.weight, start)


def failing(error):
    """Return the identity, whose backward raises ``error``."""

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise error

    return Failing.apply


def test_a_compiled_model_with_donated_buffers_has_no_second_derivative_either():
    """torch's own message names a switch that does not help; its caches decide which message comes."""
    error = RuntimeError("This backward function was compiled with non-empty donated buffers which requires ...")
    weight, _, optimizer = over_quartic(lr=0.1)
    with pytest.raises(gam_fast.SecondDerivativeError, match=r"use the model given to torch\.compile.*donated buffers"):
        optimizer.step(lambda: failing(error)(weight).sum())


def test_replicas_that_would_drift_are_refused(monkeypatch):
    weight, loss, optimizer = over_quartic(1.0, lr=0.1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    optimizer.step(loss)
    before = weight.item()
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="gradients over the 2 processes .* replicas would drift apart: use GAM"):
        optimizer.step(loss)
    assert weight.item() == before


def test_sam_rho_in_a_group_alone_is_refused():
    weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="sam_rho=0.5, but this ExactGAM was constructed without sam_rho="):
        gam_fast.ExactGAM([{"params": [weight], "sam_rho": 0.5}], torch.optim.SGD, lr=0.1)
    state = gam_fast.ExactGAM([weight], torch.optim.SGD, lr=0.1, sam_rho=0.3).state_dict()
    optimizer = gam_fast.ExactGAM([weight], torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"sam_rho=0.3, but this ExactGAM"):
        optimizer.load_state_dict(state)
    assert "sam_rho" not in optimizer.param_groups[0]


def test_no_parameter_that_requires_a_gradient_is_an_error():
    weight = nn.Parameter(torch.ones(1), requires_grad=False)
    other = torch.ones(1, requires_grad=True)
    with pytest.raises(RuntimeError, match="no parameter of this ExactGAM requires a gradient"):
        gam_fast.ExactGAM([weight], torch.optim.SGD, lr=0.1).step(lambda: (weight * other).sum())


def test_a_turn_that_is_over_holds_nothing_and_takes_nothing():
    _, loss, optimizer = over_quartic(lr=0.01)

    class Mark:
        def __call__(self, grad):
            return grad

    for turn in optimizer.passes():
        value, mark = loss(), Mark()
        value.register_hook(mark)  # lives as long as the graph
        graph = weakref.ref(mark)
        turn.backward(value)
        break
    del value, mark
    gc.collect()
    assert graph() is None
    with pytest.raises(RuntimeError, match="outside the pass of ExactGAM that the turn belongs to"):
        turn.backward(loss())


def test_an_error_of_the_model_is_not_explained_away():
    class CheckpointError(RuntimeError):
        pass

    error = CheckpointError("torch.utils.checkpoint: recomputed values have different metadata, use torch.compile")
    weight, _, optimizer = over_quartic(lr=0.1)
    with pytest.raises(CheckpointError, match="different metadata"):
        optimizer.step(lambda: failing(error)(weight).sum())
