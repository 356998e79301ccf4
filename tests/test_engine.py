"""The optimizer as torch's users meet it: groups, state, hooks, schedulers, copies, and misuse."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import math
import pickle
import warnings
import weakref

import pytest
import torch
from cases import BACKENDS, METHODS, closure_of, loss_of, make
from torch import nn

import gam_fast

MULTIPASS = [name for name in METHODS if METHODS[name].passes > 1]


def parabola(*values, dtype=torch.float64):
    weight = nn.Parameter(torch.tensor(values or (3.0, 4.0), dtype=dtype))

    def closure():
        loss = (weight**2).sum()
        loss.backward()
        return loss

    return weight, closure


@pytest.mark.parametrize("method_name", METHODS)
def test_the_closure_is_called_once_a_pass_and_the_loss_is_that_at_theta(method_name):
    method = METHODS[method_name]
    weight, closure = parabola()
    losses = []

    def recording():
        losses.append(closure())
        return losses[-1]

    optimizer = method.optimizer([weight], torch.optim.SGD, lr=0.01, **method.hyper)
    returned = optimizer.step(recording)
    assert len(losses) == method.passes
    assert returned is losses[0]
    assert returned.item() == 25.0


def test_turns_know_their_place():
    weight, closure = parabola()
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.01)
    turns = []
    for turn in optimizer.passes():
        turns.append((turn.index, turn.passes, turn.last))
        closure()
    assert turns == [(0, 4, False), (1, 4, False), (2, 4, False), (3, 4, True)]


@pytest.mark.parametrize("method_name", METHODS)
def test_several_backward_calls_in_a_pass_add_up(method_name):
    method = METHODS[method_name]
    whole, batches = make("mlp")
    parts = copy.deepcopy(whole)
    x, y = batches[0]
    options = {"lr": 0.1, "momentum": 0.9, **method.hyper}
    one = method.optimizer(whole.parameters(), torch.optim.SGD, **options)
    many = method.optimizer(parts.parameters(), torch.optim.SGD, **options)
    for _ in range(5):
        one.step(closure_of(whole, x, y))
        for _ in many.passes():
            for xs, ys in zip(x.chunk(3), y.chunk(3), strict=True):
                (loss_of(parts, xs, ys) / 3).backward()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_grad_is_that_of_the_last_pass_after_a_step():
    for base in (torch.optim.SGD, torch.optim.RMSprop):
        weight, closure = parabola()
        optimizer = gam_fast.SAM([weight], base, lr=0.01, rho=5.0)
        optimizer.step(closure)
        torch.testing.assert_close(weight.grad, torch.tensor([12.0, 16.0], dtype=torch.float64))


def test_gradients_from_before_a_step_do_not_count():
    weight, closure = parabola()
    closure()
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.5, rho=0.0)
    optimizer.step(closure)
    assert torch.equal(weight, torch.zeros(2, dtype=torch.float64))


def test_gradients_that_somebody_made_between_steps_are_warned_of():
    weight, closure = parabola()
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1)
    for clear in (lambda: None, optimizer.zero_grad):  # what a step leaves behind is nobody's loss
        optimizer.step(closure)
        clear()
        optimizer.step(closure)
    optimizer.zero_grad()
    closure()
    with pytest.warns(UserWarning, match=r"there before this step of SAM are not used.*micro_batches\(\).*zero_grad"):
        optimizer.step(closure)
    optimizer.zero_grad()
    closure()
    turns = optimizer.passes()
    with pytest.warns(UserWarning, match="not used"):
        next(turns)
    closure()
    for _ in turns:
        closure()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_closure_may_clear_the_gradients_itself(set_to_none):
    weight, closure = parabola()
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.01)

    def clearing():
        optimizer.zero_grad(set_to_none=set_to_none)
        return closure()

    twin, twin_closure = parabola()
    other = gam_fast.GAM([twin], torch.optim.SGD, lr=0.01)
    for _ in range(3):
        optimizer.step(clearing)
        other.step(twin_closure)
    assert torch.equal(weight, twin)
    optimizer.zero_grad()
    assert weight.grad is None


def test_step_runs_under_no_grad_and_leaves_grad_mode_alone():
    weight, closure = parabola()
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.01)
    with torch.no_grad():
        optimizer.step(closure)
        assert not torch.is_grad_enabled()
    for _ in optimizer.passes():
        assert torch.is_grad_enabled()
        closure()
    assert weight.requires_grad
    assert weight.is_leaf


# Parameter groups and what is shared with the base


def test_groups_and_state_are_the_base_optimizers_for_good():
    weight, closure = parabola()
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer.step(closure)
    assert optimizer.param_groups is optimizer.base.param_groups
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    optimizer.param_groups[0]["lr"] = 0.0
    before = weight.detach().clone()
    optimizer.step(closure)
    assert torch.equal(weight, before)


def test_a_group_dict_overrides_and_the_others_get_the_constructors_values():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = gam_fast.GAM([{"params": [a], "rho": 0.7, "beta": (1.0, 0.2)}, {"params": [b]}], lr=0.1, alpha=0.25)
    first, second = optimizer.param_groups
    assert (first["rho"], first["beta"], first["alpha"]) == (0.7, (1.0, 0.2), 0.25)
    assert (second["rho"], second["beta"], second["alpha"]) == (0.2, 0.5, 0.25)


def test_add_param_group():
    weight, closure = parabola()
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1, rho=0.3)
    optimizer.step(closure)
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert optimizer.param_groups[1]["rho"] == 0.3
    assert optimizer.param_groups[1]["lr"] == 0.5
    optimizer.step(lambda: ((weight**2).sum() + (extra**2).sum()).backward())
    assert not torch.equal(extra, torch.ones(2, dtype=torch.float64))
    with pytest.raises(TypeError, match="is complex"):
        optimizer.add_param_group({"params": (nn.Parameter(torch.ones(1, dtype=torch.complex64)) for _ in range(1))})
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([extra])
    with pytest.raises(ValueError, match="rho must not be negative, got -1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": -1})
    assert len(optimizer.param_groups) == 2


def test_named_parameters_are_kept_and_used_in_messages():
    model = nn.Linear(2, 1)
    optimizer = gam_fast.SAM(model.named_parameters(), torch.optim.SGD, lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]

    def meddle():
        for turn in optimizer.passes():
            model(torch.ones(1, 2)).sum().backward()
            if turn.index == 1:
                with torch.no_grad():
                    model.bias.add_(1.0)

    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0 \(bias\), of shape \(1,\), was modified"):
        meddle()


def test_a_name_the_base_uses_too_gets_the_recipes_name_in_front():
    weight, closure = parabola()
    base = torch.optim.RMSprop([weight], lr=0.01, alpha=0.9)
    optimizer = gam_fast.GAM(None, base, alpha=0.25)
    group = optimizer.param_groups[0]
    assert (group["alpha"], group["gam_alpha"]) == (0.9, 0.25)
    assert optimizer.key("alpha") == "gam_alpha"
    assert optimizer.key("rho") == "rho"
    optimizer.step(closure)
    twin, twin_closure = parabola()
    other = gam_fast.GAM([twin], torch.optim.RMSprop, lr=0.01, alpha=0.25)
    assert other.param_groups[0]["alpha"] == 0.99
    other.step(twin_closure)
    with pytest.raises(ValueError, match="GAM has no hyper-parameter 'sigma'; it has rho, rho_prime"):
        optimizer.key("sigma")


def test_an_instance_as_base_keeps_its_state():
    weight, closure = parabola()
    base = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    closure()
    base.step()
    buffer = base.state[weight]["momentum_buffer"].clone()
    optimizer = gam_fast.SAM([weight], base, rho=0.0)
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], buffer)
    twin = nn.Parameter(weight.detach().clone())
    plain = torch.optim.SGD([twin], lr=0.1, momentum=0.9)
    plain.state[twin]["momentum_buffer"] = buffer.clone()
    (twin**2).sum().backward()
    plain.step()
    optimizer.step(closure)
    assert torch.equal(weight, twin)


# State dicts, copies, hooks, schedulers


def test_a_state_dict_of_the_base_loaded_into_the_base_itself_leaves_the_recipe_working():
    weight, closure = parabola()
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1, rho=0.3)
    optimizer.base.load_state_dict(torch.optim.SGD([weight], lr=0.2).state_dict())
    optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_loading_what_does_not_fit_changes_nothing():
    weight, closure = parabola()
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3)
    optimizer.step(closure)
    good = optimizer.state_dict()
    bad = copy.deepcopy(good)
    bad["param_groups"][0]["rho"] = float("nan")
    with pytest.raises(ValueError, match="rho must be finite, got nan"):
        optimizer.load_state_dict(bad)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": good["param_groups"] * 2})
    assert optimizer.param_groups[0]["rho"] == 0.3
    assert "momentum_buffer" in optimizer.state[weight]


def of_any_kind():
    """Parameters of three dtypes, of three orders in memory, and one with gaps."""
    generator = torch.Generator().manual_seed(5)
    wide = torch.randn(6, 8, generator=generator)
    image = torch.randn(2, 3, 4, 4, generator=generator).contiguous(memory_format=torch.channels_last)
    values = [torch.randn(4, 5, generator=generator).T, image, torch.randn(7, generator=generator).double()]
    params = [nn.Parameter(value) for value in (*values, torch.randn(9, generator=generator).bfloat16())]
    params.append(nn.Parameter(torch.empty(0)))
    params[-1].data = wide[:, ::2]
    return params, wide


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_parameters_of_any_dtype_and_order_in_memory_share_one_step(base):
    found = []
    for backend in BACKENDS:
        params, wide = of_any_kind()
        beside = wide[:, 1::2].clone()
        optimizer = gam_fast.GAM(params, base, lr=0.01, backend=backend)
        for _ in range(3):
            for _ in optimizer.passes():
                sum((param.double() ** 3).sum() for param in params).backward()
        assert torch.equal(wide[:, 1::2], beside)
        found.append([param.detach().double() for param in params])
    for values in found[1:]:
        torch.testing.assert_close(values, found[0], rtol=0.0, atol=2.0**-8)
        torch.testing.assert_close(values[:3], found[0][:3], rtol=1e-5, atol=1e-6)


def test_state_of_another_order_in_memory_is_brought_to_that_of_its_parameter():
    """As a state is that was saved before the model became channels-last."""
    params, _ = of_any_kind()
    image = params[1]
    optimizer = gam_fast.GAM([image], torch.optim.AdamW, lr=0.01)
    twin = copy.deepcopy(optimizer)
    other = twin.param_groups[0]["params"][0]
    for each, param in ((optimizer, image), (twin, other)):
        each.step(lambda param=param: (param**3).sum().backward())
    state = optimizer.state[image]
    state["exp_avg"] = state["exp_avg"].contiguous()
    for each, param in ((optimizer, image), (twin, other)):
        each.step(lambda param=param: (param**3).sum().backward())
    assert torch.equal(image, other)
    assert state["exp_avg"].stride() == image.stride() or "native" not in BACKENDS
    assert torch.equal(state["exp_avg"], twin.state[other]["exp_avg"])


def test_an_optimizer_goes_with_the_last_reference_to_it():
    """Not when the garbage collector comes: its state may be all of a GPU's memory."""
    model, batches = make("mlp")
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=model)
    for batch in batches[:2]:
        optimizer.step(closure_of(model, *batch))
    buffers = [weakref.ref(state["momentum_buffer"]) for state in optimizer.state.values()]
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert all(ref() is None for ref in buffers)
    finally:
        gc.enable()


def test_no_buffer_is_in_the_state_dict_or_left_after_a_step():
    model, batches = make("mlp", torch.float32)
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer.step(closure_of(model, *batches[0]))
    assert {key for entry in optimizer.state_dict()["state"].values() for key in entry} == {"momentum_buffer"}

    alive = []
    original = gam_fast.step.Step.finish

    def spying(self, update):
        for shard in self.blocks.all:
            alive.extend(weakref.ref(t) for t in shard.leaves.backup)
            alive.extend(weakref.ref(t) for k, ts in shard.grads.items() if k != 3 for t in ts)
        return original(self, update)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gam_fast.step.Step, "finish", spying)
        optimizer.step(closure_of(model, *batches[1]))
    gc.collect()
    count = len(list(model.parameters()))
    assert len(alive) == 3 * count  # θ, u and m
    assert all(ref() is None for ref in alive)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("method_name", METHODS)
def test_copies_go_on_alike(method_name, how):
    method = METHODS[method_name]
    model, batches = make("batchnorm_cnn")
    optimizer = method.optimizer(
        model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=model, clip_grad_norm=5.0, **method.hyper
    )
    optimizer.step(closure_of(model, *batches[0]))
    if how == "deepcopy":
        twin_model, twin = copy.deepcopy((model, optimizer))
    else:
        twin_model, twin = pickle.loads(pickle.dumps((model, optimizer)))
    assert repr(twin) == repr(optimizer)
    for x, y in batches[1:]:
        optimizer.step(closure_of(model, x, y))
        twin.step(closure_of(twin_model, x, y))
    for p, q in zip(model.state_dict().values(), twin_model.state_dict().values(), strict=True):
        assert torch.equal(p, q)


def test_optimizer_round_trips_through_torch_save():
    weight, closure = parabola()
    optimizer = gam_fast.GAM([weight], torch.optim.AdamW, lr=0.1, beta=(1.0, 0.5))
    optimizer.step(closure)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    optimizer.load_state_dict(loaded)
    assert optimizer.param_groups[0]["beta"] == (1.0, 0.5)


def test_hooks_of_the_base_instance_run_too():
    weight, closure = parabola()
    base = torch.optim.SGD([weight], lr=0.01)
    seen = []
    base.register_step_pre_hook(lambda o, args, kwargs: seen.append(weight.grad.clone()))
    optimizer = gam_fast.GradientNormPenalty(None, base, rho=5.0, alpha=0.5)
    optimizer.step(closure)
    torch.testing.assert_close(seen[0], torch.tensor([9.0, 12.0], dtype=torch.float64))  # ½ (6, 8) + ½ (12, 16)


@pytest.mark.parametrize("form", ["closure", "loop"])
@pytest.mark.parametrize("on", ["optimizer", "base"])
def test_learning_rate_schedulers_drive_it_without_a_warning(on, form):
    weight, closure = parabola()
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=1.0, rho=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer if on == "optimizer" else optimizer.base, 1, gamma=0.5)
    rates = []
    for _ in range(3):
        if form == "closure":
            optimizer.step(closure)
        else:
            for _ in optimizer.passes():
                closure()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.5, 0.25, 0.125]


def test_a_skipped_first_step_does_not_upset_the_scheduler():
    weight, closure = parabola()
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=1.0, on_nonfinite="skip")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in optimizer.passes():
        closure()
        weight.grad.fill_(float("nan"))
    scheduler.step()
    assert optimizer.skipped_steps == 1


def test_repr_names_base_backend_and_hyper_parameters():
    weight, _ = parabola()
    text = repr(gam_fast.GAM([weight], torch.optim.AdamW, lr=0.1, rho=0.25, backend="eager"))
    assert text.startswith("GAM (base: AdamW, backend: eager\nParameter Group 0\n")
    assert "    rho: 0.25\n" in text
    assert text.endswith(")")


# Misuse


@pytest.mark.parametrize("method_name", [name for name in METHODS if METHODS[name].passes > 1])
def test_a_pass_without_backward_is_an_error_and_undone(method_name):
    method = METHODS[method_name]
    for at in range(method.passes):
        weight, closure = parabola()
        optimizer = method.optimizer([weight], torch.optim.SGD, lr=0.1, **method.hyper)

        def forgetful(optimizer=optimizer, closure=closure, at=at):
            for turn in optimizer.passes():
                if turn.index != at:
                    closure()

        with pytest.raises(RuntimeError, match=f"pass {at} of .* ended without a gradient.*call backward"):
            forgetful()
        assert weight.tolist() == [3.0, 4.0]


def test_a_closure_that_does_nothing_is_an_error():
    weight, _ = parabola()
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.1)
    with pytest.raises(RuntimeError, match="ended without a gradient"):
        optimizer.step(lambda: None)


def test_a_closure_may_return_nothing_if_it_calls_backward():
    weight, closure = parabola()
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1)

    def silent():
        closure()

    assert optimizer.step(silent) is None
    assert weight.tolist() != [3.0, 4.0]


@pytest.mark.parametrize("method_name", MULTIPASS)
def test_parameters_changed_by_the_user_during_a_pass(method_name):
    method = METHODS[method_name]
    for at in range(method.passes):
        weight, closure = parabola()
        optimizer = method.optimizer([weight], torch.optim.SGD, lr=0.1, **method.hyper)

        def meddle(optimizer=optimizer, closure=closure, at=at, weight=weight):
            for turn in optimizer.passes():
                closure()
                if turn.index == at:
                    with torch.no_grad():
                        weight.mul_(2)

        with pytest.raises(RuntimeError, match=f"parameter 0 of group 0, of shape .2,., was modified during pass {at}"):
            meddle()
        # documented: in the first pass there is no backup yet, and the change is the user's
        assert weight.tolist() == ([6.0, 8.0] if at == 0 else [3.0, 4.0])


def test_calls_that_do_not_belong_inside_a_step():
    weight, closure = parabola()
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.1)
    state = optimizer.state_dict()
    calls = {
        r"step\(\)": lambda: optimizer.step(),
        r"step\(\) ": lambda: optimizer.step(closure),
        r"passes\(\)": lambda: next(optimizer.passes()),
        r"add_param_group\(\)": lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
        r"load_state_dict\(\)": lambda: optimizer.load_state_dict(state),
        "pickling or copying": lambda: copy.deepcopy(optimizer),
    }
    for message, call in calls.items():

        def nested(call=call):
            for turn in optimizer.passes():
                closure()
                if turn.index == 1:
                    call()

        with pytest.raises(RuntimeError, match=message.strip() + ".* while a step of this GAM is under way"):
            nested()
        assert weight.tolist() == [3.0, 4.0]
    optimizer.step(closure)


def test_an_iterator_that_is_kept_open_blocks_until_it_is_closed():
    weight, closure = parabola()
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1, rho=1.0)
    turns = optimizer.passes()
    next(turns)
    closure()
    next(turns)
    assert weight.tolist() != [3.0, 4.0]
    with pytest.raises(RuntimeError, match=r"close\(\) the iterator"):
        optimizer.step(closure)
    turns.close()
    assert weight.tolist() == [3.0, 4.0]
    never_started = optimizer.passes()
    optimizer.step(closure)
    never_started.close()


@pytest.mark.parametrize("method_name", MULTIPASS)
def test_step_without_closure_says_what_to_do(method_name):
    method = METHODS[method_name]
    weight, closure = parabola()
    optimizer = method.optimizer([weight], torch.optim.SGD, lr=0.1)
    closure()
    with pytest.raises(RuntimeError, match=r"passes a step: call step\(closure\).*optimizer.passes\(\)"):
        optimizer.step()


def test_step_without_closure_is_the_base_step_for_one_pass():
    weight, closure = parabola()
    optimizer = gam_fast.Base([weight], torch.optim.SGD, lr=0.5)
    closure()
    assert optimizer.step() is None
    assert weight.tolist() == [0.0, 0.0]


NOTHING = {
    "no closure": lambda optimizer: optimizer.step(),
    "a closure": lambda optimizer: optimizer.step(lambda: None),
    "a loop": lambda optimizer: [None for _ in optimizer.passes()],
}


@pytest.mark.parametrize("how", NOTHING)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop])
@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 1.0}, {"on_nonfinite": "skip"}, {"on_nonfinite": "ignore"}])
def test_one_pass_without_any_gradient_does_nothing_as_in_torch(how, base, options):
    weight, closure = parabola()
    optimizer = gam_fast.Base([weight], base, lr=0.5, **options)
    plain = base([copy.deepcopy(weight)], lr=0.5)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    optimizer.register_step_post_hook(lambda *_: called.append("post"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    NOTHING[how](optimizer)
    plain.step()
    scheduler.step()  # does not warn that no step came before it
    assert weight.tolist() == [3.0, 4.0]
    made = plain.state.values()  # by the constructor of Adagrad, nowhere else
    torch.testing.assert_close(dict(optimizer.state), dict(zip([weight], made, strict=False)))
    assert (called, optimizer.skipped_steps) == (["pre", "post"], 0)
    assert optimizer.param_groups[0]["lr"] == 0.25
    closure()
    optimizer.step()
    assert weight.tolist() != [3.0, 4.0]


def test_an_inactive_step_without_any_gradient_does_nothing():
    weight, _ = parabola()
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.5, interval=math.inf)
    assert optimizer.step(lambda: 7.0) == 7.0
    for _ in optimizer.passes():
        pass
    assert weight.tolist() == [3.0, 4.0]
    optimizer.interval = 1
    with pytest.raises(RuntimeError, match="pass 0 of GAM ended without a gradient"):
        optimizer.step(lambda: None)
    assert weight.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("method_name", METHODS)
def test_sparse_gradients_are_refused_and_the_step_undone(method_name):
    method = METHODS[method_name]
    embedding = nn.Embedding(4, 2, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = method.optimizer(embedding.parameters(), torch.optim.SGD, lr=0.1, **method.hyper)
    with pytest.raises(TypeError, match="gradient of layout torch.sparse_coo.*sparse=False"):
        optimizer.step(lambda: embedding(torch.tensor([1, 2])).sum().backward())
    assert torch.equal(embedding.weight, before)


def test_arguments_are_checked():
    weight, _ = parabola()
    other = nn.Parameter(torch.ones(1))
    sgd = torch.optim.SGD
    cases = [
        (ValueError, "rho must not be negative, got -0.1", lambda: gam_fast.GAM([weight], sgd, lr=0.1, rho=-0.1)),
        (ValueError, "rho_prime must be finite, got inf", lambda: gam_fast.GAM([weight], rho_prime=float("inf"))),
        (TypeError, "gamma must be a number, got '0.1'", lambda: gam_fast.GAM([weight], gamma="0.1")),
        (TypeError, "rho must be a number, got True", lambda: gam_fast.GAM([weight], rho=True)),
        (ValueError, r"alpha must be a number a, meaning", lambda: gam_fast.GAM([weight], alpha=(1.0, 2.0, 3.0))),
        (TypeError, "alpha must be a number or a pair", lambda: gam_fast.GAM([weight], alpha=None)),
        (TypeError, "must be a number, got", lambda: gam_fast.GSAM([weight], alpha=(0.5, 0.5))),
        (TypeError, "unexpected keyword argument 'rhoo'", lambda: gam_fast.GAM([weight], sgd, rhoo=0.1)),
        (TypeError, "model must be a torch.nn.Module", lambda: gam_fast.GAM([weight], model="resnet")),
        (ValueError, "clip_grad_norm must be a positive number", lambda: gam_fast.GAM([weight], clip_grad_norm=0.0)),
        (ValueError, "on_nonfinite must be one of raise, skip", lambda: gam_fast.GAM([weight], on_nonfinite="warn")),
        (TypeError, "must be a torch optimizer class", lambda: gam_fast.GAM([weight], "sgd")),
        (TypeError, "must make a torch optimizer", lambda: gam_fast.GAM([weight], gam_fast.SAM)),
        (TypeError, "must make a torch optimizer", lambda: gam_fast.GAM([weight], lambda params: 3)),
        (TypeError, "LBFGS cannot be the base", lambda: gam_fast.GAM([weight], torch.optim.LBFGS)),
        (TypeError, "SparseAdam cannot be the base", lambda: gam_fast.GAM([weight], torch.optim.SparseAdam)),
        (TypeError, "params may be None only", lambda: gam_fast.GAM(None, sgd)),
        (TypeError, "unexpected arguments lr: base_optimizer", lambda: gam_fast.GAM(None, sgd([weight]), lr=0.1)),
        (ValueError, "over other parameters than params", lambda: gam_fast.GAM([other], sgd([weight]))),
        (
            TypeError,
            "is complex .torch.complex64.: optimize a real",
            lambda: gam_fast.GAM([nn.Parameter(torch.ones(2, dtype=torch.complex64))]),
        ),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_rows_of_a_table_that_contradict_themselves_are_refused():
    recipe = gam_fast.recipes.Recipe
    move = gam_fast.recipes.Perturbation
    with pytest.raises(ValueError, match="goes along a gradient that is not taken yet"):
        recipe("X", "", {"rho": 0.1}, (move(1, "rho"),), (None, 1.0))
    with pytest.raises(ValueError, match="u needs 2 coefficients, the last not None"):
        recipe("X", "", {"rho": 0.1}, (move(0, "rho"),), (1.0, None))
    with pytest.raises(ValueError, match="and a gamma, or neither"):
        recipe("X", "", {"rho": 0.1}, (move(0, "rho"),), (None, 1.0), m=(1.0, None))
    with pytest.raises(ValueError, match=r"no default for \['rho'\]"):
        recipe("X", "", {}, (move(0, "rho"),), (None, 1.0))
    three = (move(0, "rho"), move(1, "rho"), move(2, "rho"))
    greedy = recipe("X", "", {"rho": 0.1}, (*three, move(0, "rho", minus=1)), (1.0, 1.0, 1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="at most two can be kept"):
        gam_fast.recipes.fold_plan(greedy)


@pytest.mark.parametrize("name", gam_fast.recipes.RECIPES)
def test_a_pickled_recipe_is_its_table_and_nothing_that_follows_from_it(name):
    recipe = gam_fast.recipes.RECIPES[name]
    assert recipe.plan == gam_fast.recipes.fold_plan(recipe)
    assert recipe.keeps[-1] is False
    for copied in (pickle.loads(pickle.dumps(recipe)), copy.deepcopy(recipe)):
        assert copied == recipe
        assert vars(copied).keys() == {field.name for field in dataclasses.fields(recipe)}
        assert (copied.plan, copied.keeps, copied.plain) == (recipe.plan, recipe.keeps, recipe.plain)


def test_a_published_method_is_one_table_and_a_subclass():
    """Look-ahead SAM with a mean of both gradients, made up."""

    class Mean(gam_fast.SharpnessAwareOptimizer):
        recipe = gam_fast.recipes.Recipe(
            "Mean", "", {"rho": 0.1}, (gam_fast.recipes.Perturbation(0, "rho"),), (0.5, 0.5)
        )

    weight, closure = parabola()
    optimizer = Mean([weight], torch.optim.SGD, lr=0.1, rho=5.0)
    optimizer.step(closure)
    torch.testing.assert_close(weight.detach(), torch.tensor([3.0 - 0.9, 4.0 - 1.2], dtype=torch.float64))


def test_a_missing_or_old_torch_is_named():
    from gam_fast import _torch_version

    with pytest.raises(ImportError, match="needs PyTorch 2.6 or newer, found 2.1.2.cu118: pip install -U"):
        _torch_version.check("2.1.2+cu118")
    _torch_version.check("3.0.0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "torch", None)
        with pytest.raises(ImportError, match="needs PyTorch 2.6 or newer: pip install"):
            _torch_version.require_torch()


def test_parameters_on_a_gradient_of_another_dtype_are_served():
    if not hasattr(torch.Tensor, "grad_dtype"):
        return  # torch before 2.10 forces the dtypes to agree
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    weight.grad_dtype = torch.bfloat16
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.1)
    for _ in optimizer.passes():
        weight.grad = (2 * weight.detach()).bfloat16()
    assert weight.dtype == torch.float32


def test_late_and_vanishing_gradients_count_as_zero():
    """b is used in the second pass only, c in the first only: hand-computed SAM over (a, b, c)."""
    a, b, c = (nn.Parameter(torch.tensor([v], dtype=torch.float64)) for v in (1.0, 2.0, 3.0))
    optimizer = gam_fast.SAM([a, b, c], torch.optim.SGD, lr=0.1, momentum=0.9, rho=1.0)
    for turn in optimizer.passes():
        (a**2 + (c**2 if turn.index == 0 else b**2)).backward()
    step = 2.0 / (4.0 + 36.0) ** 0.5
    torch.testing.assert_close(a.detach(), torch.tensor([1 - 0.2 * (1 + step)], dtype=torch.float64))
    assert b.item() == pytest.approx(2 - 0.1 * 4.0)
    assert c.item() == 3.0
    assert torch.equal(optimizer.state[c]["momentum_buffer"], torch.zeros(1, dtype=torch.float64))


class Elsewhere(nn.Parameter):
    device = property(lambda self: torch.device("cpu", 0))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("method_name", METHODS)
def test_parameters_on_two_devices_share_one_norm(method_name, late):
    """A parameter that says it is on ``cpu:0`` stands for one elsewhere; ``late``: its gradients begin in pass 1."""
    method = METHODS[method_name]

    def run(kind):
        a = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        b = kind(torch.tensor([1.0, 2.0], dtype=torch.float64))
        optimizer = method.optimizer([a, b], torch.optim.SGD, lr=0.1, momentum=0.9, clip_grad_norm=3.0, **method.hyper)
        for _ in range(3):
            for turn in optimizer.passes():
                a.grad = torch.sin(a.detach())
                if turn.index or not late:
                    b.grad = torch.cos(b.detach())
        return a.detach(), b.detach()

    for p, q in zip(run(Elsewhere), run(nn.Parameter), strict=True):
        torch.testing.assert_close(p.as_subclass(torch.Tensor), q, rtol=1e-12, atol=1e-12)


def test_two_optimizers_over_parts_of_one_model():
    model, batches = make("mlp")
    x, y = batches[0]
    first = gam_fast.SAM(model.net[0].parameters(), torch.optim.SGD, lr=0.1)
    second = gam_fast.GAM(model.net[2].parameters(), torch.optim.SGD, lr=0.1)
    for _ in range(3):
        first.step(closure_of(model, x, y))
        second.step(closure_of(model, x, y))


def test_no_warning_is_given_in_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, batches = make("batchnorm_cnn", torch.float32)
        optimizer = gam_fast.GAM(model.parameters(), torch.optim.AdamW, model=model)
        for x, y in batches:
            optimizer.step(closure_of(model, x, y))


def test_optimizers_of_the_same_parameters_take_turns_without_a_warning():
    weight, closure = parabola()
    optimizers = [gam_fast.SAM([weight], torch.optim.SGD, lr=0.1), gam_fast.GAM([weight], torch.optim.SGD, lr=0.1)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step(closure)


def test_the_warning_of_unused_gradients_points_at_the_users_line():
    weight, closure = parabola()
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1)
    for by_loop in (True, False):
        optimizer.step(closure)
        optimizer.zero_grad()
        closure()
        with pytest.warns(UserWarning, match="not used") as caught:
            [closure() for _ in optimizer.passes()] if by_loop else optimizer.step(closure)
        assert caught[0].filename == __file__


def test_a_model_may_be_converted_after_a_step():
    """By torch's way to swap tensors, which refuses those that are referred to weakly."""
    model, batches = make("mlp", torch.float32)
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, lr=0.1)
    optimizer.step(closure_of(model, *batches[0]))
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    optimizer.zero_grad()  # which are new tensors now
    x, y = batches[0]
    optimizer.step(closure_of(model, x.double(), y))
    assert all(p.dtype == torch.float64 for p in model.parameters())


def test_the_limit_of_the_norm_may_be_set():
    weight, closure = parabola()
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.5, clip_grad_norm=2.0)
    assert optimizer.clip_grad_norm == 2.0
    with pytest.raises(ValueError, match="clip_grad_norm must be a positive number or None, got -1.0"):
        optimizer.clip_grad_norm = -1.0
    optimizer.clip_grad_norm = 1e-3
    before = weight.detach().clone()
    optimizer.step(closure)
    assert float((weight.detach() - before).norm()) == pytest.approx(0.5e-3, rel=1e-6)
    for _ in optimizer.passes():
        closure()
        with pytest.raises(RuntimeError, match="setting clip_grad_norm while a step"):
            optimizer.clip_grad_norm = None
    optimizer.clip_grad_norm = None
    assert optimizer.clip_grad_norm is None
