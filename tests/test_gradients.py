"""Gradients belong to whom they belong: buffers of the user's, wider dtypes, other optimizers of the same model."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import reference
import torch
from cases import BASES, METHODS, closure_of, loss_of, make
from torch import nn

import gam_fast
from gam_fast import local_step
from gam_fast.active import WhenSteep

pytestmark = pytest.mark.usefixtures("_on_eager_and_native")

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-2)


def flattened(params):
    """One buffer, of which all gradients become views."""
    flat = torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype)
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad = part.view_as(p)
    return flat


def in_storage(params):
    """The same, of which torch does not know that they are views."""
    flat = torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype)
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad = torch.empty_like(p)
        p.grad.data = part.view_as(p).data
    return flat


def one_each(params):
    """A buffer for each parameter, whose gradient is all of it."""
    buffers = [torch.zeros(p.numel(), dtype=p.dtype) for p in params]
    for p, buffer in zip(params, buffers, strict=True):
        p.grad = buffer.view_as(p)
    return buffers


def leave(optimizer, body, index):
    """A step whose body fails in pass ``index``."""

    def step():
        for turn in optimizer.passes():
            body()
            if turn.index == index:
                raise KeyError

    with pytest.raises(KeyError):
        step()


ARRANGEMENTS = {"flat": flattened, "storage": in_storage, "one each": one_each}


def halve(buffers):
    """Stands for an all-reduce of the buffers."""
    for buffer in buffers if isinstance(buffers, list) else [buffers]:
        buffer.mul_(0.5)


def run_flat(method, arrange, base, *, zero=False, steps=3):
    """Steps on a buffer that is halved after backward, and the same with half the loss and gradients by autograd."""
    ours, batches = make("mlp")
    theirs = copy.deepcopy(ours)
    optimizer = method.optimizer(ours.parameters(), base, **method.hyper)
    plain = method.optimizer(theirs.parameters(), base, **method.hyper)
    params = list(ours.parameters())
    buffers = arrange(params)
    views = [p.grad for p in params]
    for x, y in batches[:steps]:
        for _ in optimizer.passes():
            if zero:
                optimizer.zero_grad(set_to_none=False)
            loss_of(ours, x, y).backward()
            halve(buffers)
        for _ in plain.passes():
            (0.5 * loss_of(theirs, x, y)).backward()
    for p, q, view in zip(params, theirs.parameters(), views, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
        assert p.grad is view
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
    whole = torch.cat([x.reshape(-1) for x in (buffers if isinstance(buffers, list) else [buffers])])
    assert torch.equal(whole, torch.cat([p.grad.reshape(-1) for p in params]))


@pytest.mark.parametrize("method_name", METHODS)
def test_gradients_in_a_flat_buffer_stay_there(method_name):
    run_flat(METHODS[method_name], flattened, SGD)


@pytest.mark.parametrize("zero", [False, True], ids=["", "zeroed by the body"])
@pytest.mark.parametrize("base_name", ["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_whatever_the_buffers_are_and_whoever_zeroes_them(arrangement, base_name, zero):
    run_flat(METHODS["gam"], ARRANGEMENTS[arrangement], BASES[base_name], zero=zero, steps=2)


def test_gradients_in_a_buffer_stay_there_in_an_undone_step():
    model, [(x, y), *_] = make("mlp")
    params = list(model.parameters())
    flat = flattened(params)
    views = [p.grad for p in params]
    optimizer = gam_fast.GAM(params, SGD)
    leave(optimizer, lambda: loss_of(model, x, y).backward(), 2)
    assert all(p.grad is view for p, view in zip(params, views, strict=True))
    assert flat.count_nonzero()


def test_a_step_that_turns_out_to_be_plain_keeps_the_buffer():
    model, [(x, y), *_] = make("mlp")
    params = list(model.parameters())
    flat = flattened(params)
    optimizer = gam_fast.GAM(params, torch.optim.SGD, lr=1.0, active=WhenSteep(deviations=5.0))
    for passes in (4, 1):  # the first step takes the whole recipe
        before = [p.detach().clone() for p in params]
        made = 0
        for _ in optimizer.passes():
            loss_of(model, x, y).backward()
            flat.mul_(0.5)
            made += 1
        assert made == passes
    moved = torch.cat([(b - p).reshape(-1) for b, p in zip(before, params, strict=True)])
    torch.testing.assert_close(moved, flat)


def test_gradients_reduced_one_by_one_in_the_body():
    model, [(x, y), *_] = make("mlp")
    other = copy.deepcopy(model)
    optimizers = [gam_fast.GAM(m.parameters(), SGD) for m in (model, other)]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=False)
        for _ in optimizers[0].passes():
            loss_of(model, x, y).backward()
            for p in model.parameters():
                p.grad.mul_(0.5)
        for _ in optimizers[1].passes():
            (0.5 * loss_of(other, x, y)).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("method_name", ["base", "sam", "gam"])
def test_a_scaler_unscales_a_buffer_in_place(method_name):
    """As ``scaler.unscale_`` does: afterwards it holds the gradient of the last pass."""
    method = METHODS[method_name]
    ours, [(x, y), *_] = make("mlp")
    theirs = copy.deepcopy(ours)
    params = list(ours.parameters())
    flat = flattened(params)
    optimizer = method.optimizer(params, SGD, **method.hyper)
    plain = method.optimizer(theirs.parameters(), SGD, **method.hyper)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for turn in optimizer.passes(scaler=scaler):
        turn.backward(loss_of(ours, x, y))
    plain.step(closure_of(theirs, x, y))
    torch.testing.assert_close(flat, torch.cat([p.grad.reshape(-1) for p in theirs.parameters()]))
    for p, q in zip(params, theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_hook_finds_the_direction_and_the_buffer_stays():
    model, [(x, y), *_] = make("mlp")
    params = list(model.parameters())
    flat = flattened(params)
    views = [p.grad for p in params]
    optimizer = gam_fast.GAM(params, SGD)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad.mul_(0.0) for p in params]))
    before = [p.detach().clone() for p in params]
    for _ in optimizer.passes():
        loss_of(model, x, y).backward()
        last = flat.clone()
    assert len(seen) == 1
    assert all(p.grad is view for p, view in zip(params, views, strict=True))
    assert torch.equal(flat, last)
    lr, decay = 0.05, 1e-2
    for p, start in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), start * (1 - lr * decay))


def test_a_loop_left_in_its_last_pass_before_backward_is_undone():
    model, [(x, y), *_] = make("mlp")
    params = list(model.parameters())
    buffer = flattened(params)
    optimizer = gam_fast.GAM(params, SGD)
    before = [p.detach().clone() for p in params]
    for turn in optimizer.passes():
        if turn.last:
            break
        loss_of(model, x, y).backward()
    assert all(torch.equal(p, start) for p, start in zip(params, before, strict=True))
    assert not buffer.any()


HOLDS = {
    "itself": lambda grad: grad,
    "detached": lambda grad: grad.detach(),
    "as a row": lambda grad: grad.view(-1),
    "by numpy": lambda grad: torch.from_numpy(grad.numpy()),
}


@pytest.mark.parametrize("how", HOLDS)
@pytest.mark.parametrize("method_name", METHODS)
def test_a_gradient_that_the_user_holds_is_not_written_to(method_name, how):
    method = METHODS[method_name]
    model, batches = make("mlp")
    optimizer = method.optimizer(model.parameters(), SGD, **method.hyper)
    held = []
    for x, y in batches[:3]:
        for _ in optimizer.passes():
            assert all(p.grad is None for p in model.parameters())
            loss_of(model, x, y).backward()
            held += [(HOLDS[how](p.grad), p.grad.clone()) for p in model.parameters()]
    assert all(torch.equal(now, then.view_as(now)) for now, then in held)


def test_gradients_that_the_user_computes_and_holds_are_not_written_to():
    model, batches = make("mlp")
    params = list(model.parameters())
    optimizer = gam_fast.GAM(params, SGD)
    held = []
    for x, y in batches[:2]:
        for _ in optimizer.passes():
            found = torch.autograd.grad(loss_of(model, x, y), params)  # some of them views
            for p, grad in zip(params, found, strict=True):
                p.grad = grad
            held += [(grad, grad.clone()) for grad in found]
    assert all(torch.equal(now, then) for now, then in held)


def test_gradients_that_autograd_puts_into_one_storage_are_taken_away():
    """A parameter without gradient in a later step is left alone, by momentum and weight decay too."""
    a, b = (nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (3, 5))
    optimizer = gam_fast.SAM([a, b], SGD)
    for _ in optimizer.passes():
        torch.cat([a, b]).pow(2).sum().backward()
    assert a.grad.untyped_storage().data_ptr() == b.grad.untyped_storage().data_ptr()
    before = b.detach().clone()
    for _ in optimizer.passes():
        assert b.grad is None
        a.pow(2).sum().backward()
    assert b.grad is None
    assert torch.equal(b, before)


def test_a_recipe_that_differentiates_by_itself_refuses_buffers():
    model, [(x, y), *_] = make("mlp")
    params = list(model.parameters())
    flat = flattened(params)
    optimizer = gam_fast.ExactGAM(params, SGD)
    with pytest.raises(RuntimeError, match=r"part of a buffer, in which nothing arrives.*ExactGAM differentiates"):
        optimizer.step(lambda: loss_of(model, x, y))
    assert flat is not None


# Bits more than the parameters


class Caught(torch.optim.SGD):
    """Keeps the direction that it is given."""

    def step(self, closure=None):
        self.caught = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


def wide(dtype, grad_dtype, n=24):
    """Parameters of few bits with gradients of many, and the gradient at given values as fp64."""
    params = [nn.Parameter(torch.randn(n).to(dtype)) for _ in range(2)]
    for p in params:
        p.grad_dtype = grad_dtype
    a = torch.randn(2 * n, 2 * n, dtype=torch.float64)
    a, c = a @ a.T / n, 5 * torch.randn(2 * n, dtype=torch.float64)

    def gradient(values):
        v = torch.cat([value.to(dtype).double() for value in values])
        return [g.to(grad_dtype) for g in (a @ v + c + 0.4 * v**3).split(n)]

    def body():
        for p, grad in zip(params, gradient([p.detach() for p in params]), strict=True):
            p.grad = grad

    return params, gradient, body


needs_grad_dtype = pytest.mark.skipif(not hasattr(nn.Parameter, "grad_dtype"), reason="this torch has no grad_dtype")
WIDE = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float64)]


@needs_grad_dtype
@pytest.mark.parametrize(("dtype", "grad_dtype"), WIDE)
@pytest.mark.parametrize("method_name", METHODS)
def test_gradients_of_more_bits_keep_them(method_name, dtype, grad_dtype, monkeypatch):
    """The direction is that of plain loops in fp64 through the very points that the weights can stand for."""
    method = METHODS[method_name]
    params, gradient, body = wide(dtype, grad_dtype)
    climb = reference.climb
    monkeypatch.setattr(reference, "climb", lambda *a: [x.to(dtype).double() for x in climb(*a)])
    theta = [p.detach().double() for p in params]
    expected = method.reference(lambda values: [g.double() for g in gradient(values)], theta, **method.hyper)
    optimizer = method.optimizer(params, Caught, lr=0.1, **method.hyper)
    for _ in optimizer.passes():
        body()
    assert all(d.dtype == grad_dtype for d in optimizer.base.caught)
    scale = torch.cat(expected).norm()
    for d, right in zip(optimizer.base.caught, expected, strict=True):
        assert (d.double() - right).norm() < 1e-5 * scale
    for p, start, right in zip(params, theta, expected, strict=True):
        torch.testing.assert_close(p.double(), start - 0.1 * right, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert all(p.grad.dtype == grad_dtype for p in params)


@needs_grad_dtype
@pytest.mark.parametrize("base_name", ["sgd", "sgd_nesterov", "adamw", "adam_amsgrad", "rmsprop"])
@pytest.mark.parametrize("method_name", ["base", "sam", "gam"])
def test_every_base_takes_gradients_of_more_bits(method_name, base_name, monkeypatch):
    """The step of the same base in fp32 along the direction of plain loops, rounded to the weights."""
    method, build = METHODS[method_name], BASES[base_name]
    params, gradient, body = wide(torch.bfloat16, torch.float32)
    climb = reference.climb
    monkeypatch.setattr(reference, "climb", lambda *a: [x.bfloat16().double() for x in climb(*a)])
    theta = [p.detach().double() for p in params]
    direction = method.reference(lambda values: [g.double() for g in gradient(values)], theta, **method.hyper)
    plain = [nn.Parameter(p.detach().float()) for p in params]
    for p, d in zip(plain, direction, strict=True):
        p.grad = d.float()
    build(plain).step()
    optimizer = method.optimizer(params, build, **method.hyper)
    for _ in optimizer.passes():
        body()
    for p, q, start in zip(params, plain, theta, strict=True):
        step = (q.detach() - start.float()).abs().max().item()
        torch.testing.assert_close(p.float(), q, rtol=2**-8, atol=0.02 * step)


@needs_grad_dtype
def test_some_parameters_with_gradients_of_more_bits():
    few, _, body = wide(torch.bfloat16, torch.float32)
    model, [(x, y), *_] = make("mlp", torch.float32)
    late = nn.Parameter(torch.ones(3).bfloat16())
    late.grad_dtype = torch.float32
    optimizer = gam_fast.GAM([*few, *model.parameters(), late], torch.optim.AdamW, lr=1e-2, clip_grad_norm=1.0)
    before = [p.detach().clone() for p in (*few, *model.parameters(), late)]
    for _ in range(2):
        for turn in optimizer.passes():
            body()
            loss_of(model, x, y).backward()
            if turn.index > 1:
                late.grad = torch.full((3,), 1.0)
    assert all(not torch.equal(p, b) for p, b in zip((*few, *model.parameters(), late), before, strict=True))
    before = [p.detach().clone() for p in few]
    leave(optimizer, body, 1)
    assert all(torch.equal(p, b) for p, b in zip(few, before, strict=True))


# Parameters of other optimizers


def with_head(method, **options):
    model, batches = make("mlp")
    backbone, head = list(model.net[:3].parameters()), list(model.net[3:].parameters())
    return model, batches, method.optimizer(backbone, SGD, model=model, **{**method.hyper, **options}), head


def gradients_at(model, x, y, params):
    return torch.autograd.grad(loss_of(model, x, y), params)


ZEROING = {
    "before": lambda head, index: None,
    "inside": lambda head, index: torch.optim.SGD(head, lr=0.1).zero_grad(),
    "inside, in place": lambda head, index: torch.optim.SGD(head, lr=0.1).zero_grad(set_to_none=False),
    "inside the first pass": lambda head, index: index or torch.optim.SGD(head, lr=0.1).zero_grad(),
}


@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
@pytest.mark.parametrize("zeroing", ZEROING)
@pytest.mark.parametrize("method_name", METHODS)
def test_other_parameters_of_the_model_get_the_gradient_of_one_pass(method_name, zeroing, flat):
    model, batches, optimizer, head = with_head(METHODS[method_name])
    if flat:
        buffer = flattened(head)
    for x, y in batches[:2]:
        for p in head:
            if zeroing == "before":
                p.grad = p.grad.zero_() if flat else None
            elif not flat:
                p.grad = torch.ones_like(p)  # left over, and zeroed by the body
        expected = gradients_at(model, x, y, head)
        for turn in optimizer.passes():
            ZEROING[zeroing](head, turn.index)
            if flat and head[0].grad is None:
                buffer = flattened(head)
            loss_of(model, x, y).backward()
        for p, grad in zip(head, expected, strict=True):
            torch.testing.assert_close(p.grad, grad)
    if flat and zeroing in ("before", "inside, in place"):  # the others make a buffer for each pass
        assert torch.equal(buffer, torch.cat([p.grad.reshape(-1) for p in head]))


@pytest.mark.parametrize("method_name", METHODS)
def test_gradients_of_other_parameters_accumulate_over_steps(method_name):
    model, batches, optimizer, head = with_head(METHODS[method_name])
    total = [torch.zeros_like(p) for p in head]
    for k, (x, y) in enumerate(batches[:3]):
        total = [a + b for a, b in zip(total, gradients_at(model, x, y, head), strict=True)]
        before = [p.grad for p in head]
        for _ in optimizer.passes():
            loss_of(model, x, y).backward()
        for p, grad, old in zip(head, total, before, strict=True):
            torch.testing.assert_close(p.grad, grad)
            assert k == 0 or p.grad is old


@pytest.mark.parametrize("last", [0, 1], ids=["first pass", "second pass"])
@pytest.mark.parametrize("method_name", METHODS)
def test_an_undone_step_leaves_gradients_of_other_parameters_as_they_were(method_name, last):
    method = METHODS[method_name]
    model, [(x, y), *_], optimizer, head = with_head(method)
    head[0].grad = torch.randn_like(head[0])
    before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in head]
    leave(optimizer, lambda: loss_of(model, x, y).backward(), min(last, method.passes - 1))
    for p, (grad, values) in zip(head, before, strict=True):
        assert p.grad is grad
        assert grad is None or torch.equal(grad, values)


@pytest.mark.parametrize("cleared", [False, True])
@pytest.mark.parametrize("index", [0, 3])
def test_another_optimizer_may_take_its_step_in_one_pass(index, cleared):
    model, batches, optimizer, head = with_head(METHODS["gam"])
    other = torch.optim.Adam(head, lr=0.1)
    for x, y in batches[:3]:
        before = [p.detach().clone() for p in head]
        for turn in optimizer.passes():
            loss_of(model, x, y).backward()
            if turn.index == index:
                other.step()
                taken = [p.detach().clone() for p in head]
            if cleared:
                other.zero_grad()
        assert all(torch.equal(p, t) and not torch.equal(p, b) for p, t, b in zip(head, taken, before, strict=True))


def test_with_parts_of_the_batch_the_last_pass_counts():
    model, [(x, y), *_], optimizer, head = with_head(METHODS["gam"], ascent_share=0.5)
    head[0].grad = torch.ones_like(head[0])
    for turn in optimizer.passes():
        if turn.last:
            expected = gradients_at(model, x, y, head)
        loss_of(model, *turn.rows(x, y)).backward()
    torch.testing.assert_close(head[0].grad, expected[0] + 1.0)
    torch.testing.assert_close(head[1].grad, expected[1])


def test_a_head_that_is_replaced_or_added_is_found():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = gam_fast.SAM(model[0].parameters(), SGD, rho=0.0, model=model)
    x = torch.randn(8, 6, dtype=torch.float64)

    def check(params):
        for p in params:
            p.grad = None
        for _ in optimizer.passes():
            model(x).pow(2).sum().backward()
        found = [p.grad.clone() for p in params]
        for p in params:
            p.grad = None
        return found

    def right(params):
        return torch.autograd.grad(model(x).pow(2).sum(), params)

    for change in (
        lambda: None,
        lambda: model.__setitem__(2, nn.Linear(5, 4).double()),
        lambda: model.append(nn.Linear(4, 2).double()),
    ):
        change()
        params = [p for module in model[2:] for p in module.parameters()]
        expected = right(params)
        for grad, of_one in zip(check(params), expected, strict=True):
            torch.testing.assert_close(grad, of_one)
    model.append(nn.Linear(2, 2).double())
    optimizer.add_param_group({"params": list(model[3].parameters())})
    params = [*model[2].parameters(), *model[4].parameters()]
    expected = right(params)
    for grad, of_one in zip(check(params), expected, strict=True):
        torch.testing.assert_close(grad, of_one)


@pytest.mark.parametrize("both", [True, False], ids=["model= to both", "model= to one"])
def test_two_optimizers_in_step_over_one_model(both):
    """Each clears its own gradients, and leaves alone those of the other that is under way."""
    model, batches = make("mlp")
    parts = [list(model.net[:3].parameters()), list(model.net[3:].parameters())]
    given = [{"model": model}, {"model": model} if both else {}]
    method = METHODS["gam"]
    a, b = (gam_fast.GAM(p, SGD, **method.hyper, **g) for p, g in zip(parts, given, strict=True))
    theirs = copy.deepcopy(model)
    others = [list(theirs.net[:3].parameters()), list(theirs.net[3:].parameters())]
    plain = [gam_fast.GAM(p, SGD, **method.hyper) for p in others]
    for x, y in batches[:2]:
        for pair in ((a, b), plain):
            net = model if pair[0] is a else theirs
            first, second = (optimizer.passes() for optimizer in pair)
            while True:
                if next(first, None) is None:
                    assert next(second, None) is None
                    break
                next(second)
                loss_of(net, x, y).backward()
    for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


def test_frozen_parameters_of_the_model_are_left_alone():
    model, [(x, y), *_], optimizer, head = with_head(METHODS["gam"])
    for p in head:
        p.requires_grad_(False)
    head[0].grad = torch.ones_like(head[0])
    for _ in optimizer.passes():
        loss_of(model, x, y).backward()
    assert torch.equal(head[0].grad, torch.ones_like(head[0]))
    assert head[1].grad is None


# Several processes


def average_locally(rank, world, method_name, large, bits):
    """Steps whose directions are averaged; gradients are each rank's own, and stay so."""
    method = METHODS[method_name]
    local_step.BUCKET_BYTES = 0 if large else 25 << 20
    dtype = torch.bfloat16 if bits else torch.float64
    torch.manual_seed(rank)
    param, right = nn.Parameter(torch.ones(4, 3, dtype=dtype)), torch.ones(4, 3, dtype=torch.float64)
    if bits:
        param.grad_dtype = torch.float32
    hyper = {key: value * 0 if isinstance(value, float) else value for key, value in method.hyper.items()}
    optimizer = method.optimizer([param], torch.optim.SGD, lr=0.5, sync="local", **hyper)
    held = []
    for _ in range(2):
        own = torch.full((4, 3), 1.0 + rank, dtype=torch.float32 if bits else torch.float64)
        for _ in optimizer.passes():
            (param * own).sum().backward()
            held.append(param.grad)
        assert param.grad is held[-1]
        assert all(torch.equal(grad, own) for grad in held)
        right -= 0.5 * sum(1.0 + r for r in range(world)) / world
    assert torch.equal(param.detach().double(), right)


@pytest.mark.parametrize("bits", [False, pytest.param(True, marks=needs_grad_dtype)], ids=["", "of more bits"])
@pytest.mark.parametrize("large", [False, True], ids=["in buckets", "by itself"])
@pytest.mark.parametrize("method_name", ["base", "sam"])
def test_a_local_step_does_not_write_into_gradients(two, method_name, large, bits):
    two.run(average_locally, method_name, large, bits)


# Gradients that are not used


@pytest.mark.parametrize("method_name", METHODS)
def test_accumulation_by_hand_is_noticed(method_name):
    method = METHODS[method_name]
    model, [(x, y), *_] = make("mlp")
    optimizer = method.optimizer(model.parameters(), SGD, **method.hyper)
    optimizer.step(closure_of(model, x, y))
    optimizer.step(closure_of(model, x, y))  # nothing came between
    loss_of(model, x, y).backward()
    with pytest.warns(UserWarning, match=r"gradients that were there before this step .* are not used"):
        optimizer.step(closure_of(model, x, y))


@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_gradients_zeroed_in_place_are_no_accumulation(flat):
    model, [(x, y), *_] = make("mlp")
    if flat:
        buffer = flattened(list(model.parameters()))
    optimizer = gam_fast.GAM(model.parameters(), SGD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.zero_grad(set_to_none=False)
            optimizer.step(closure_of(model, x, y))
            model.zero_grad(set_to_none=False)
            optimizer.step(closure_of(model, x, y))
    assert not flat or buffer.count_nonzero()
