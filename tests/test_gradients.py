"""Gradients belong to whom they belong: buffers of the user's, wider dtypes, other optimizers of the same model."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import reference
import torch
from cases import BASES, METHODS, closure_of, in_turn, loss_of, make, pairwise, setting
from ranks import on_two
from snapshots import assert_close, leave
from torch import nn

import gam_fast
from gam_fast import local_step
from gam_fast.active import WhenSteep

on_eager_and_native = pytest.mark.usefixtures("_on_eager_and_native")
"""For which gradients are taken over, and in which dtype: the compiled core does that by itself."""

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-2)
SOME = ["base", "sam", "gam"]


def flattened(params):
    """One buffer, of which all gradients become views."""
    flat = torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype)
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad = part.view_as(p)
    return [flat]


def in_storage(params):
    """The same, of which torch does not know that they are views."""
    (flat,) = flattened(params)
    for p in params:
        part, p.grad = p.grad, torch.empty_like(p)
        p.grad.data = part.data
    return [flat]


def one_each(params):
    """A buffer for each parameter, whose gradient is all of it."""
    return [buffer for p in params for buffer in flattened([p])]


def with_buffer(method_name="gam", base=SGD, **options):
    model, optimizer, batches = setting(method_name, base, **options)
    params = list(model.parameters())
    (flat,) = flattened(params)
    return model, optimizer, batches, params, flat


@on_eager_and_native
@pytest.mark.parametrize(
    ("arrange", "method_name", "base_name", "zero", "scaled"),
    [
        *((flattened, name, "sgd_nesterov", False, name in SOME) for name in METHODS),
        *pairwise(
            [flattened, in_storage, one_each], ["gam"], ["sgd", "adamw", "rmsprop"], [False, True], [False, True]
        ),
    ],
)
def test_gradients_in_a_flat_buffer_stay_there(arrange, method_name, base_name, zero, scaled):
    """Halving the buffer after backward, as an all-reduce would, is halving the loss. A scaler unscales in place."""
    ours, optimizer, batches = setting(method_name, BASES[base_name])
    theirs, plain, _ = setting(method_name, BASES[base_name])
    params = list(ours.parameters())
    buffers = arrange(params)
    views = [p.grad for p in params]
    for x, y in batches[:3]:
        for turn in optimizer.passes(scaler=torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None):
            if zero:
                optimizer.zero_grad(set_to_none=False)
            turn.backward(loss_of(ours, x, y))
            for buffer in buffers:
                buffer.mul_(0.5)
        for _ in plain.passes():
            (0.5 * loss_of(theirs, x, y)).backward()
    assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for p, q, view in zip(params, theirs.parameters(), views, strict=True):
        assert p.grad is view
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
    assert torch.equal(torch.cat(buffers), torch.cat([p.grad.reshape(-1) for p in params]))


@pytest.mark.parametrize("method_name", ["base", "previous_gradient", "sam"])
def test_gradients_in_a_buffer_stay_there_if_hooks_and_clipping_make_others(method_name):
    """With one pass what the hooks have left, as with any torch optimizer: here the clipped direction."""
    model, optimizer, batches, params, flat = with_buffer(method_name, clip_grad_norm=0.05)
    views = [p.grad for p in params]
    optimizer.register_step_pre_hook(lambda *_: None)
    for x, y in batches[:2]:
        for _ in optimizer.passes():
            loss_of(model, x, y).backward()
            last = flat.clone()
        assert all(p.grad is view for p, view in zip(params, views, strict=True))
        if method_name == "sam":
            assert torch.equal(flat, last)
        else:
            torch.testing.assert_close(flat, last * (0.05 / (last.norm() + 1e-6)))


def test_gradients_that_share_memory_and_belong_to_nobody_else_are_left_as_hooks_leave_them():
    a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in "ab")
    optimizer = gam_fast.Base([a, b], torch.optim.SGD, lr=0.1)

    def hook(*_):
        for i, p in enumerate((a, b)):
            p.grad = p.grad + i

    optimizer.register_step_pre_hook(hook)
    for _ in optimizer.passes():
        (torch.cat([a, a]) + torch.cat([b, b])).sum().backward()
    assert (a.grad.tolist(), b.grad.tolist()) == ([2.0, 2.0], [3.0, 3.0])


@pytest.mark.parametrize("how", ["error", "break"])
def test_gradients_in_a_buffer_stay_there_in_an_undone_step(how):
    model, optimizer, [(x, y), *_], params, flat = with_buffer()
    before, views = copy.deepcopy(model), [p.grad for p in params]
    if how == "error":
        leave(optimizer, lambda: loss_of(model, x, y).backward(), 2)
        assert flat.count_nonzero()
    else:  # before backward of the last pass
        for turn in optimizer.passes():
            if turn.last:
                break
            loss_of(model, x, y).backward()
        assert not flat.any()
    assert_close(model, before)
    assert all(p.grad is view for p, view in zip(params, views, strict=True))


def test_a_step_that_turns_out_to_be_plain_keeps_the_buffer():
    base = partial(torch.optim.SGD, lr=1.0)
    model, optimizer, [(x, y), *_], params, flat = with_buffer("gam", base, active=WhenSteep(deviations=5.0))
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


def test_a_hook_finds_the_direction_and_the_buffer_stays():
    model, optimizer, [(x, y), *_], params, flat = with_buffer()
    views = [p.grad for p in params]
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


def test_a_recipe_that_differentiates_by_itself_refuses_buffers():
    model, _, [(x, y), *_], params, flat = with_buffer()
    optimizer = gam_fast.ExactGAM(params, SGD)
    with pytest.raises(RuntimeError, match=r"part of a buffer, which the engine does not fill.*GAM differentiates"):
        optimizer.step(lambda: loss_of(model, x, y))
    assert flat is not None


# Gradients that somebody holds

HOLDS = {
    "itself": lambda grad: grad,
    "detached": lambda grad: grad.detach(),
    "as a row": lambda grad: grad.view(-1),
    "by numpy": lambda grad: torch.from_numpy(grad.numpy()),
    "made by the user": lambda grad: grad,
}


@on_eager_and_native
@pytest.mark.parametrize(("method_name", "how"), in_turn(METHODS, HOLDS))
def test_a_gradient_that_the_user_holds_is_not_written_to(method_name, how):
    model, optimizer, batches = setting(method_name, SGD)
    params, held = list(model.parameters()), []
    for x, y in batches[:3]:
        for _ in optimizer.passes():
            assert all(p.grad is None for p in params)
            if how == "made by the user":
                for p, grad in zip(params, torch.autograd.grad(loss_of(model, x, y), params), strict=True):
                    p.grad = grad  # some of them views
            else:
                loss_of(model, x, y).backward()
            held += [(HOLDS[how](p.grad), p.grad.clone()) for p in params]
    assert all(torch.equal(now, then.view_as(now)) for now, then in held)


@on_eager_and_native
def test_gradients_that_autograd_puts_into_one_storage_are_taken_away():
    """A parameter without gradient in a later step is left alone, by momentum and weight decay too."""
    a, b = (nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (3, 5))
    optimizer = gam_fast.SAM([a, b], SGD)
    optimizer.step(lambda: torch.cat([a, b]).pow(2).sum().backward())
    assert a.grad.untyped_storage().data_ptr() == b.grad.untyped_storage().data_ptr()
    before = b.detach().clone()
    for _ in optimizer.passes():
        assert b.grad is None
        a.pow(2).sum().backward()
    assert b.grad is None
    assert torch.equal(b, before)


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


def direction_of(method, gradient, theta, dtype, monkeypatch):
    """That of plain loops in fp64 through the very points that the weights can stand for."""
    climb = reference.climb
    monkeypatch.setattr(reference, "climb", lambda *a: [x.to(dtype).double() for x in climb(*a)])
    return method.reference(lambda values: [g.double() for g in gradient(values)], theta, **method.hyper)


needs_grad_dtype = pytest.mark.skipif(not hasattr(nn.Parameter, "grad_dtype"), reason="this torch has no grad_dtype")
WIDE = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float64)]


@needs_grad_dtype
@on_eager_and_native
@pytest.mark.parametrize(("method_name", "dtypes"), [*in_turn(METHODS, WIDE), *in_turn(["gam"], WIDE[:2])], ids=str)
def test_gradients_of_more_bits_keep_them(method_name, dtypes, monkeypatch):
    dtype, grad_dtype = dtypes
    method = METHODS[method_name]
    params, gradient, body = wide(dtype, grad_dtype)
    theta = [p.detach().double() for p in params]
    expected = direction_of(method, gradient, theta, dtype, monkeypatch)
    optimizer = method.optimizer(params, Caught, lr=0.1, **method.hyper)
    optimizer.step(body)
    assert all(d.dtype == grad_dtype for d in optimizer.base.caught)
    scale = torch.cat(expected).norm()
    for d, right in zip(optimizer.base.caught, expected, strict=True):
        assert (d.double() - right).norm() < 1e-5 * scale
    for p, start, right in zip(params, theta, expected, strict=True):
        torch.testing.assert_close(p.double(), start - 0.1 * right, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert all(p.grad.dtype == grad_dtype for p in params)


@needs_grad_dtype
@on_eager_and_native
@pytest.mark.parametrize(
    ("base_name", "method_name"), in_turn(["sgd", "sgd_nesterov", "adamw", "adam_amsgrad", "rmsprop"], SOME)
)
def test_every_base_takes_gradients_of_more_bits(method_name, base_name, monkeypatch):
    """The step of the same base in fp32 along the direction of plain loops, rounded to the weights."""
    method, build = METHODS[method_name], BASES[base_name]
    params, gradient, body = wide(torch.bfloat16, torch.float32)
    theta = [p.detach().double() for p in params]
    plain = [nn.Parameter(p.detach().float()) for p in params]
    for p, d in zip(plain, direction_of(method, gradient, theta, torch.bfloat16, monkeypatch), strict=True):
        p.grad = d.float()
    build(plain).step()
    optimizer = method.optimizer(params, build, **method.hyper)
    optimizer.step(body)
    for p, q, start in zip(params, plain, theta, strict=True):
        step = (q.detach() - start.float()).abs().max().item()
        torch.testing.assert_close(p.float(), q, rtol=2**-8, atol=0.02 * step)


@needs_grad_dtype
@on_eager_and_native
def test_some_parameters_with_gradients_of_more_bits():
    """Several blocks under one limit of the norm; one parameter comes late in the step."""
    few, _, body = wide(torch.bfloat16, torch.float32)
    model, [(x, y), *_] = make("mlp", torch.float32)
    late = nn.Parameter(torch.ones(3).bfloat16())
    late.grad_dtype = torch.float32
    params = [*few, *model.parameters(), late]
    optimizer = gam_fast.GAM(params, torch.optim.AdamW, lr=1e-2, clip_grad_norm=1.0)
    before = [p.detach().clone() for p in params]
    for _ in range(2):
        for turn in optimizer.passes():
            body()
            loss_of(model, x, y).backward()
            if turn.index > 1:
                late.grad = torch.full((3,), 1.0)
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True))
    before = [p.detach().clone() for p in few]
    leave(optimizer, body, 1)
    assert all(torch.equal(p, b) for p, b in zip(few, before, strict=True))


# Parameters of other optimizers


def with_head(method_name, **options):
    method = METHODS[method_name]
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


@on_eager_and_native
@pytest.mark.parametrize(("method_name", "zeroing", "flat"), pairwise(METHODS, ZEROING, [False, True]))
def test_other_parameters_of_the_model_get_the_gradient_of_one_pass(method_name, zeroing, flat):
    model, batches, optimizer, head = with_head(method_name)
    if flat:
        (buffer,) = flattened(head)
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
                (buffer,) = flattened(head)
            loss_of(model, x, y).backward()
        torch.testing.assert_close([p.grad for p in head], list(expected))
    if flat and zeroing in ("before", "inside, in place"):  # the others make a buffer for each pass
        assert torch.equal(buffer, torch.cat([p.grad.reshape(-1) for p in head]))


@pytest.mark.parametrize("method_name", SOME)
def test_gradients_of_other_parameters_accumulate_over_steps(method_name):
    model, batches, optimizer, head = with_head(method_name)
    total = [torch.zeros_like(p) for p in head]
    for k, (x, y) in enumerate(batches[:3]):
        total = [a + b for a, b in zip(total, gradients_at(model, x, y, head), strict=True)]
        before = [p.grad for p in head]
        optimizer.step(closure_of(model, x, y))
        torch.testing.assert_close([p.grad for p in head], total)
        assert k == 0 or all(p.grad is old for p, old in zip(head, before, strict=True))


@pytest.mark.parametrize(("method_name", "last"), [("base", 0), ("gam", 0), ("gam", 1)])
def test_an_undone_step_leaves_gradients_of_other_parameters_as_they_were(method_name, last):
    model, [(x, y), *_], optimizer, head = with_head(method_name)
    head[0].grad = torch.randn_like(head[0])
    before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in head]
    leave(optimizer, lambda: loss_of(model, x, y).backward(), last)
    for p, (grad, values) in zip(head, before, strict=True):
        assert p.grad is grad
        assert grad is None or torch.equal(grad, values)


@pytest.mark.parametrize(("index", "cleared"), pairwise([0, 3], [False, True]))
def test_another_optimizer_may_take_its_step_in_one_pass(index, cleared):
    model, batches, optimizer, head = with_head("gam")
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
    model, [(x, y), *_], optimizer, head = with_head("gam", ascent_share=0.5)
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

    def adopt():
        model.append(nn.Linear(2, 2).double())
        optimizer.add_param_group({"params": list(model[3].parameters())})

    for change in (
        lambda: None,
        lambda: model.__setitem__(2, nn.Linear(5, 4).double()),
        lambda: model.append(nn.Linear(4, 2).double()),
        adopt,
    ):
        change()
        ours = {p for group in optimizer.param_groups for p in group["params"]}
        params = [p for p in model.parameters() if p not in ours]
        expected = torch.autograd.grad(model(x).pow(2).sum(), params)
        for p in params:
            p.grad = None
        optimizer.step(lambda: model(x).pow(2).sum().backward())
        torch.testing.assert_close([p.grad for p in params], list(expected))


def test_frozen_parameters_of_the_model_are_left_alone():
    model, [(x, y), *_], optimizer, head = with_head("gam")
    for p in head:
        p.requires_grad_(False)
    head[0].grad = torch.ones_like(head[0])
    optimizer.step(closure_of(model, x, y))
    assert torch.equal(head[0].grad, torch.ones_like(head[0]))
    assert head[1].grad is None


# Several processes


@pytest.mark.parametrize("bits", [False, pytest.param(True, marks=needs_grad_dtype)], ids=["", "of more bits"])
@pytest.mark.parametrize(("method_name", "large"), [("sam", False), ("base", True)], ids=["in buckets", "by itself"])
@on_two
def test_a_local_step_does_not_write_into_gradients(rank, world, method_name, large, bits):
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


# Gradients that are not used


@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_gradients_zeroed_in_place_are_no_accumulation(flat):
    model, optimizer, [(x, y), *_] = setting("gam")
    if flat:
        (buffer,) = flattened(list(model.parameters()))
    for _ in range(3):  # a warning would be an error
        optimizer.zero_grad(set_to_none=False)
        optimizer.step(closure_of(model, x, y))
        model.zero_grad(set_to_none=False)
        optimizer.step(closure_of(model, x, y))
    assert not flat or buffer.count_nonzero()
