"""Relatives of SAM: memories, a perturbation before the only pass, laws of the radius.

Their trajectories are in test_trajectories.py and test_every_backend.py, on several processes in test_distributed.py
and test_sharded.py.
"""

import copy
import itertools
import math
import re
from functools import partial
from pathlib import Path

import pytest
import test_accumulation
import test_amp
import test_chain
import test_hooks
import test_restore
import test_share
import test_subsets
import test_trajectories
import torch
from cases import ALL, DTYPES, MODELS, MOMENTUM, RANDOM, VARIANTS, closure_of, in_turn, loss_of, make, setting
from snapshots import assert_close, assert_equal, leave, through_a_file, unchanged
from test_every_backend import rows_of
from torch.nn.utils import parameters_to_vector

import gam_fast
from gam_fast import recipe as language
from gam_fast.active import WhenSteep
from gam_fast.backends.native import NativeBackend

EACH = list(VARIANTS)
WITH_MEMORY = ["friendly", "vasso", "previous_gradient", "look"]
SGD = torch.optim.SGD
PASSES = [(name, at) for name in EACH for at in range(VARIANTS[name].passes if name != "look" else 1)]

TABLE = {
    test_restore.test_two_hundred_steps_with_lr_zero_change_no_bit: in_turn(EACH, DTYPES),
    test_restore.test_a_step_that_is_left_leaves_no_trace_and_the_next_one_works: [
        (*of, how) for of, how in zip(PASSES, itertools.cycle(test_restore.HOW))
    ],
    test_restore.test_a_gradient_that_is_not_finite_undoes_the_step: [
        (*of, base, math.nan)
        for of, base in zip(PASSES, itertools.cycle(test_restore.BASES))
        if of[0] != "cr" and (of[0] != "momentum_sam" or base is not torch.optim.RMSprop)
    ],
    test_restore.test_results_do_not_depend_on_the_number_of_threads: in_turn(EACH, [torch.float32], [2, 7]),
    test_accumulation.test_micro_batches_take_the_step_of_the_large_batch: in_turn(EACH, test_accumulation.GIVEN),
    test_chain.test_the_trajectory_is_that_of_the_plain_loop: in_turn(EACH, test_chain.PAIRS),
    test_hooks.test_a_pre_hook_works_on_the_final_direction: [
        (name, base if name != "momentum_sam" else "sgd") for name, base in in_turn(EACH, test_hooks.BASES)
    ],
    test_subsets.test_agrees_with_the_plain_loops_in_fp64: [
        (model, method, base, choice)
        for method, model, base, choice in in_turn(
            EACH, ["mlp", "partly_used"], ["adamw", "sgd_nesterov", "rmsprop"], ["matrices", "biases"]
        )
    ],
    test_share.test_a_step_is_that_of_a_plain_loop_over_the_same_rows: [
        (model, method, base, 0.5)
        for method, model, base in in_turn(
            ["friendly", "vasso", "wsam", "cr", "sagm", "usam", "stable"], MODELS, ["sgd_nesterov", "adamw_maximize"]
        )
    ],
    test_amp.test_the_trajectory_is_that_without_a_scaler: in_turn(
        EACH, [SGD, torch.optim.AdamW, SGD], ["turn", "closure", "scale"]
    ),
    test_amp.test_overflow_in_any_pass_undoes_the_step_and_lowers_the_scale: [
        (*of, "raise", form) for of, form in zip(PASSES, itertools.cycle(["turn", "closure"]))
    ],
}


@pytest.mark.parametrize(("test", "row"), rows_of(TABLE))
def test_as_for_the_other_methods(test, row):
    test(*row)


# What outlives a step


@pytest.mark.parametrize("method_name", EACH)
def test_a_memory_is_one_tensor_a_parameter_in_the_state_and_nothing_else_is_left(method_name):
    model, optimizer, batches = setting(method_name, torch.optim.AdamW, lr=1e-2)
    names = [optimizer.recipe.memory.name] if method_name in WITH_MEMORY else []
    found = []
    for x, y in batches:
        optimizer.step(closure_of(model, x, y))
        memories = [(optimizer.state[p][name], p) for p in model.parameters() for name in names]
        assert all((memory.shape, memory.dtype) == (p.shape, p.dtype) for memory, p in memories)
        assert {key for own in optimizer.state.values() for key in own} == {"step", "exp_avg", "exp_avg_sq", *names}
        found.append([memory.data_ptr() for memory, _ in memories])
    assert all(addresses == found[0] for addresses in found)


@pytest.mark.parametrize("method_name", WITH_MEMORY)
@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, SGD])
def test_a_state_goes_through_the_plain_base_optimizer_and_back(method_name, base):
    model, optimizer, batches = setting(method_name, base, lr=1e-2)
    for x, y in batches[:2]:
        optimizer.step(closure_of(model, x, y))
    twin, other, _ = setting(method_name, base, lr=1e-2)
    twin.load_state_dict(model.state_dict())
    plain = base(twin.parameters(), lr=1e-2)
    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    other.load_state_dict(plain.state_dict())
    if optimizer._schedule.fields:
        other.param_groups[0].update(optimizer._schedule.fields | {"flat_steps": 2})
    for x, y in batches[2:]:
        optimizer.step(closure_of(model, x, y))
        other.step(closure_of(twin, x, y))
    assert_equal(model, twin)
    loss_of(twin, *batches[0]).backward()
    plain.step()  # it does not mind what it does not know


@pytest.mark.parametrize("method_name", [*WITH_MEMORY, "momentum_sam"])
def test_a_parameter_that_joins_later_begins_its_memory_then(method_name):
    model, batches = make("mlp")
    model.net[0].requires_grad_(False)
    method = ALL[method_name]
    twin = copy.deepcopy(model)
    optimizer = method.optimizer(model.parameters(), MOMENTUM, model=model, **method.hyper)
    late = list(twin.net[0].parameters())
    plain = MOMENTUM([p for p in twin.parameters() if p.requires_grad])
    steps = [batches[k % 4] for k in range(3)]
    for x, y in steps:
        optimizer.step(closure_of(model, x, y))
        test_trajectories.reference_step(twin, plain, method, method.hyper, x, y)
    for network in (model, twin):
        network.net[0].requires_grad_(True)
    plain.add_param_group({"params": late})
    state = plain.__dict__["state_of_reference"]
    if "memory" in state:
        state["memory"] = [None, None, *state["memory"]]
    for x, y in steps:
        optimizer.step(closure_of(model, x, y))
        test_trajectories.reference_step(twin, plain, method, method.hyper, x, y)
    assert_close(model, twin, rtol=1e-10, atol=1e-10)


def test_a_parameter_that_moved_before_the_pass_and_got_no_gradient_is_left_alone():
    first, second = (torch.nn.Parameter(torch.full((3,), 2.0)) for _ in range(2))
    optimizer = gam_fast.PreviousGradientSAM([first, second], SGD, lr=0.25, momentum=0.5, rho=0.5)
    optimizer.step(lambda: (first + second).square().sum().backward())
    before = second.detach().clone(), {k: v.clone() for k, v in optimizer.state[second].items()}
    for _ in optimizer.passes():
        assert not torch.equal(second, before[0])
        first.square().sum().backward()
    assert torch.equal(second, before[0])
    assert all(torch.equal(value, optimizer.state[second][key]) for key, value in before[1].items())
    start = first.detach().clone()
    for _ in optimizer.passes():
        pass  # no gradient at all: nothing is done, as by torch's optimizers
    assert torch.equal(first, start)


def test_weights_are_not_those_of_the_model_in_the_only_pass():
    model, optimizer, batches = setting("momentum_sam")
    optimizer.step(closure_of(model, *batches[0]))
    for _ in optimizer.passes():
        with pytest.raises(RuntimeError, match=r"state_dict\(\) in a pass of MomentumSAM whose weights are perturbed"):
            optimizer.state_dict()
        loss_of(model, *batches[1]).backward()
    loss_of(model, *batches[2]).backward()
    with pytest.raises(RuntimeError, match="MomentumSAM takes its gradient at another point: call step"):
        optimizer.step()


def test_a_forward_that_writes_to_a_perturbed_parameter_is_refused():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = gam_fast.PreviousGradientSAM([weight], SGD, lr=0.1)
    optimizer.step(lambda: weight.square().sum().backward())

    def writing():
        with torch.no_grad():
            weight.clamp_(max=0.5)
        weight.square().sum().backward()

    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match="parameter 0 .*was modified during pass 0 of PreviousGradientSAM"):
        optimizer.step(writing)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("method_name", ["look", "stable", "wsam_coupled", "vasso"])
def test_clipping_is_of_what_the_base_optimizer_gets(method_name):
    model, optimizer, batches = setting(method_name, SGD, lr=1.0)
    twin, clipped, _ = setting(method_name, SGD, lr=1.0, clip_grad_norm=0.05)
    for x, y in batches:
        twin.load_state_dict(model.state_dict())
        before = parameters_to_vector(model.parameters()).detach()
        optimizer.step(closure_of(model, x, y))
        clipped.step(closure_of(twin, x, y))
        whole, cut = (before - parameters_to_vector(net.parameters()).detach() for net in (model, twin))
        scale = min(1.0, 0.05 / (float(whole.norm()) + 1e-6))
        torch.testing.assert_close(cut, scale * whole, rtol=1e-9, atol=1e-12)


# Noise


def noise_of(optimizer, params):
    """Return what a step adds to the parameters before its only pass."""
    start = [p.detach().clone() for p in params]
    found = []
    for _ in optimizer.passes():
        found = [p.detach() - s for p, s in zip(params, start, strict=True)]
        sum(p.square().sum() for p in params).backward()
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_has_the_length_of_its_tensor_times_rho_and_is_another_in_each_step(dtype):
    params = [
        torch.nn.Parameter((torch.ones(shape) * size).to(dtype)) for shape, size in (((300, 70), 3.0), ((9000,), 0.5))
    ]
    params.append(torch.nn.Parameter(torch.zeros(4, dtype=dtype)))
    spared = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    groups = [{"params": params}, {"params": [spared], "perturb": False}]
    optimizer = RANDOM.optimizer(groups, SGD, lr=0.0, rho=0.1, seed=1)
    first, second = (noise_of(optimizer, [*params, spared]) for _ in range(2))
    for p, a, b in zip(params[:2], first, second, strict=False):
        length = float(p.detach().double().norm())
        assert float(a.double().norm()) == pytest.approx(0.1 * length, rel=0.05)
        assert abs(float(a.double().mean())) < 5 * 0.1 * length / p.numel()
        assert abs(float((a.double() * b.double()).sum())) < 0.05 * (0.1 * length) ** 2
    assert not first[2].any()  # a tensor of zeros has no scale
    assert not first[3].any()
    assert optimizer.param_groups[0]["flat_draws"] == 2


def test_noise_follows_from_the_seed_and_the_step_alone():
    def run(seed, drawn=0):
        params = [torch.nn.Parameter(torch.ones(50)), torch.nn.Parameter(torch.ones(7, 3))]
        optimizer = gam_fast.RandomSAM(params, SGD, lr=0.0, rho=0.1, seed=seed)
        torch.rand(drawn)
        return [noise_of(optimizer, params) for _ in range(2)]

    before = torch.get_rng_state()
    one = run(1)
    assert torch.equal(torch.get_rng_state(), before)
    for ours, same, other in zip(one, run(1, drawn=5), run(2), strict=True):
        for a, b, c in zip(ours, same, other, strict=True):
            assert torch.equal(a, b)
            assert not torch.equal(a, c)


@pytest.mark.parametrize("how", ["exception", "nan"])
def test_a_step_with_noise_is_undone_bit_for_bit(how):
    model, batches = make("batchnorm_cnn", torch.bfloat16)
    optimizer = gam_fast.RandomSAM(model.parameters(), MOMENTUM, model=model, rho=0.1)
    optimizer.step(closure_of(model, *batches[0]))

    def closure():
        loss = loss_of(model, *batches[1])
        (loss * math.nan if how == "nan" else loss).backward()
        if how == "exception":
            raise KeyError

    with unchanged(model, optimizer), pytest.raises((KeyError, gam_fast.NonFiniteGradientError)):
        optimizer.step(closure)
    optimizer.step(closure_of(model, *batches[1]))
    assert optimizer.param_groups[0]["flat_draws"] == 2


# A direction that the user sets


def test_a_direction_set_from_outside():
    model, batches = make("mlp")
    twin = copy.deepcopy(model)
    optimizer = gam_fast.FedLESAM(model.parameters(), torch.optim.RMSprop, lr=1e-2, rho=0.3)
    plain = torch.optim.RMSprop(twin.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    way = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in model.parameters()]
    for k, (x, y) in enumerate(batches):
        if k in (1, 3):  # none in the first round, another in the last
            optimizer.set_direction([k * w for w in way])
        theta = [p.detach().clone() for p in twin.parameters()]
        length = torch.nn.utils.get_total_norm(way)
        with torch.no_grad():
            for p, w in zip(twin.parameters(), way, strict=True):
                p.add_(w, alpha=0.3 / float(length) if k else 0.0)
        plain.zero_grad()
        loss_of(twin, x, y).backward()
        with torch.no_grad():
            for p, value in zip(twin.parameters(), theta, strict=True):
                p.copy_(value)
        plain.step()
        optimizer.step(closure_of(model, x, y))
    assert_close(model, twin, rtol=1e-9, atol=1e-10)
    optimizer.set_direction([])
    assert not any("direction" in own for own in optimizer.state.values())


def test_a_wrong_direction_is_refused_and_changes_nothing():
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    optimizer = gam_fast.FedLESAM(params, SGD, lr=0.1)
    optimizer.set_direction([torch.ones(3), torch.ones(2, 2)])
    with pytest.raises(ValueError, match=r"a tensor for each of the 2 parameters.*got 1"):
        optimizer.set_direction([torch.zeros(3)])
    with pytest.raises(ValueError, match=r"tensor 0 must be a finite tensor, got 'net'"):
        optimizer.set_direction(["net", torch.zeros(2, 2)])
    with pytest.raises(ValueError, match=r"tensor 1 must be of the shape of its parameter, \(2, 2\), got \(4,\)"):
        optimizer.set_direction([torch.zeros(3), torch.zeros(4)])
    assert all(optimizer.state[p]["direction"].all() for p in params)
    for _ in optimizer.passes():
        with pytest.raises(RuntimeError, match=r"set_direction\(\) while a step"):
            optimizer.set_direction([])
        sum(p.sum() for p in params).backward()


@pytest.mark.parametrize("at", [0, 1])
def test_the_step_of_looksam_that_is_one_of_sam_leaves_no_trace_either(at):
    model, optimizer, batches = setting("look")
    for done in range(4):
        if done in (0, 3):  # the first, and the one after two between
            with unchanged(model, optimizer):
                leave(optimizer, lambda: loss_of(model, *batches[0]).backward(), at)
        optimizer.step(closure_of(model, *batches[done]))
        assert optimizer.param_groups[0]["flat_steps"] == done + 1


def test_a_gradient_that_is_folded_unseen_is_among_the_suspects():
    model, optimizer, batches = setting("cr")

    def spoiled(turn):
        loss = loss_of(model, *batches[0])
        (loss * math.nan if turn.index == 1 else loss).backward()

    with unchanged(model, optimizer), pytest.raises(gam_fast.NonFiniteGradientError, match="pass 1 or 2 of CRSAM"):
        optimizer.step(spoiled)


# Bad input


@pytest.mark.parametrize(
    ("make_it", "error", "match"),
    [
        (
            lambda p: gam_fast.FriendlySAM(p, SGD, lr=0.1, lam=1.5),
            ValueError,
            "FriendlySAM: lam must be from 0 to 1, got 1.5",
        ),
        (lambda p: gam_fast.VaSSO(p, SGD, lr=0.1, theta=-0.1), ValueError, "theta must be from 0 to 1, got -0.1"),
        (lambda p: gam_fast.USAM(p, SGD, lr=0.1, lam=2), ValueError, "lam must be from 0 to 1, got 2"),
        (lambda p: gam_fast.WSAM(p, SGD, lr=0.1, gamma=1.0), ValueError, "gamma must be from 0 and below 1, got 1.0"),
        (lambda p: gam_fast.WSAM(p, SGD, lr=0.1, sync="local"), ValueError, "sync='local': pass decouple=False"),
        (lambda p: gam_fast.RandomSAM(p, SGD, lr=0.1, rho=-1.0), ValueError, "rho must not be negative, got -1.0"),
        (lambda p: gam_fast.LookSAM(p, SGD, lr=0.1, interval=3), TypeError, "interval is called k here"),
        (lambda p: gam_fast.LookSAM(p, SGD, lr=0.1, k=0), ValueError, "k must be a positive integer, got 0"),
        (lambda p: gam_fast.MomentumSAM(p, SGD, lr=0.1), ValueError, "SGD has momentum=0: pass momentum=0.9"),
        (lambda p: gam_fast.LookSAM(p, SGD, lr=0.1, k=math.inf), ValueError, "k must be a positive integer, got inf"),
        (lambda p: gam_fast.RandomSAM(p, SGD, lr=0.1, seed=1.5), ValueError, "seed must be an integer"),
        (lambda p: gam_fast.MomentumSAM(p, torch.optim.RMSprop), ValueError, "RMSprop has momentum=0"),
    ],
)
def test_what_cannot_be_is_refused_at_once(make_it, error, match):
    with pytest.raises(error, match=match):
        make_it([torch.nn.Parameter(torch.ones(2))])


def of_another_shape(params):
    optimizer = gam_fast.VaSSO(params, SGD, lr=0.1)
    optimizer.state[params[0]]["gradient_average"] = torch.ones(3)
    return optimizer


def in_a_group(**values):
    def make_it(params):
        optimizer = gam_fast.WSAM(params, SGD, lr=0.1, momentum=0.9)
        optimizer.param_groups[0].update(values)
        return optimizer

    return make_it


AT_ADAGRAD = partial(gam_fast.MomentumSAM, base_optimizer=torch.optim.Adagrad)
WITHOUT_G0 = partial(gam_fast.PreviousGradientSAM, base_optimizer=SGD, lr=0.1, active=WhenSteep())


@pytest.mark.parametrize(
    ("make_it", "error", "match"),
    [
        (AT_ADAGRAD, RuntimeError, "this Adagrad has none in its state .*pass momentum=0.9"),
        (WITHOUT_G0, ValueError, r"active=WhenSteep.* looks at the gradient at θ, which this method does not"),
        (of_another_shape, RuntimeError, r"gradient_average of shape \(3,\) for a parameter of shape \(3, 3\)"),
        (in_a_group(gamma=1.0), ValueError, "gamma must be from 0 and below 1, got 1.0"),
        (in_a_group(lr=None), TypeError, "lr of a parameter group is None: pass decouple=False"),
    ],
)
def test_what_cannot_be_is_refused_at_the_first_step(make_it, error, match):
    weight = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = make_it([weight])
    with pytest.raises(error, match=match):
        optimizer.step(lambda: weight.square().sum().backward())
    assert torch.equal(weight, torch.ones(3, 3))
    assert "momentum_buffer" not in optimizer.state.get(weight, {})


def test_who_keeps_no_momentum_yet_is_no_error():
    frozen, other, still = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = gam_fast.MomentumSAM([{"params": [frozen, other]}, {"params": [still], "perturb": False}], MOMENTUM)
    optimizer.step(lambda: None)  # no gradient at all
    frozen.requires_grad_(False)
    optimizer.step(lambda: (other + still).sum().backward())
    frozen.requires_grad_(True)
    other.requires_grad_(False)
    optimizer.step(lambda: frozen.sum().backward())
    optimizer.state.clear()
    optimizer.step(lambda: frozen.sum().backward())


def test_a_base_whose_state_is_not_all_by_parameter():
    """MADGRAD counts its steps in the state; LookSAM's memory is there beside."""
    from pytorch_optimizer import MADGRAD

    model, optimizer, batches = setting("look", MADGRAD, dtype=torch.float32, lr=1e-3)
    for x, y in batches:
        optimizer.step(closure_of(model, x, y))
    assert optimizer.base.state["k"] is not None


@pytest.mark.parametrize("method", [gam_fast.FriendlySAM, gam_fast.VaSSO])
def test_the_first_memory_is_of_the_whole_gradient_where_a_pass_sees_a_share(method):
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = method([weight], SGD, lr=0.0, ascent_share=0.5)
    for _ in range(2):
        for _ in optimizer.passes():
            for b in optimizer.micro_batches([1.0] * 4):
                (weight * b).sum().backward()
        assert optimizer.state[weight]["gradient_average"].item() == pytest.approx(4.0)


@pytest.mark.parametrize("method", [gam_fast.StableSAM, gam_fast.LookSAM])
def test_nan_in_the_first_gradient_of_what_is_not_perturbed_is_seen(method):
    moved, still = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = method([{"params": [moved]}, {"params": [still], "perturb": False}], SGD, lr=0.1)

    def spoiled(turn):
        (moved + still).square().sum().backward()
        if turn.index == 0:
            still.grad.fill_(math.nan)

    with pytest.raises(gam_fast.NonFiniteGradientError):
        optimizer.step(spoiled)
    assert torch.equal(moved, torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_rounding_is_no_direction(backend, dtype):
    """Where g1 is g0, nothing is orthogonal: all steps are those of the base optimizer."""
    slope = torch.rand(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight, plain = (torch.nn.Parameter(torch.zeros(1000, dtype=dtype)) for _ in range(2))
    optimizer = gam_fast.LookSAM([weight], SGD, lr=1.0, k=2, backend=backend)
    for _ in range(4):
        for turn in optimizer.passes():
            turn.backward((weight * slope).sum())
        plain.data -= slope
        torch.testing.assert_close(weight, plain)


def test_the_part_of_a_gradient_that_is_not_rounding_is_a_direction():
    """In fp32, g1 leaves the direction of g0 by 1e-5 of its length."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = gam_fast.LookSAM([weight], SGD, lr=1.0, k=2, alpha=0.5)
    slopes = iter([(1.0, 0.0), (1.0, 1e-5), (1.0, 0.0)])
    for _ in range(2):
        for turn in optimizer.passes():
            turn.backward((weight * torch.tensor(next(slopes))).sum())
    assert weight.tolist() == pytest.approx([-2.0, -0.5], rel=1e-4)


def test_maximize_turns_gradients_around_and_not_a_direction_of_the_users():
    seen = []
    for maximize in (False, True):
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = gam_fast.FedLESAM([weight], SGD, lr=0.0, rho=0.5, maximize=maximize)
        optimizer.set_direction([torch.ones(1)])
        for _ in optimizer.passes():
            seen.append(weight.item())
            weight.sum().backward()
    assert seen == [1.5, 1.5]


def test_a_base_that_maximizes_by_an_attribute_of_its_own():
    from pytorch_optimizer import Lion

    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = gam_fast.SAM([weight], partial(Lion, maximize=True), lr=0.1, rho=0.5)
    seen = []
    for _ in optimizer.passes():
        seen.append(weight.item())
        (-weight.square()).sum().backward()  # whose maximum is at 0: the worst is outwards
    assert seen == [1.0, 1.5]


def test_asking_for_a_state_before_training_changes_no_step():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, optimizer, batches = setting("friendly", torch.optim.AdamW, lr=1e-2)
    twin, other, _ = setting("friendly", torch.optim.AdamW, lr=1e-2)
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert all("gradient_average" in own for own in state.values())
    for p in model.parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):  # which torch's own way of asking has moved
            optimizer.state[p][key].zero_()
    for x, y in batches[:2]:
        optimizer.step(closure_of(model, x, y))
        other.step(closure_of(twin, x, y))
    assert_equal(model, twin)


@pytest.mark.parametrize("base", [SGD, torch.optim.RMSprop])
def test_the_gradient_of_the_only_pass_is_there_after_a_step_along_a_memory(base):
    model, optimizer, batches = setting("look", base, lr=1e-2)
    last = []
    for x, y in batches[:2]:  # the second is a step between
        for _ in optimizer.passes():
            loss_of(model, x, y).backward()
            last.append([p.grad.clone() for p in model.parameters()])
    assert len(last) == 3
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), last[-1], strict=True))


def test_a_hook_that_takes_a_parameter_out_of_the_step_takes_it_out_of_all_of_it():
    kept, out = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = gam_fast.WSAM([kept, out], SGD, lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: setattr(out, "grad", None))
    optimizer.step(lambda: (kept + out).square().sum().backward())
    assert torch.equal(out, torch.ones(2))
    assert not torch.equal(kept, torch.ones(2))


def test_a_direction_is_not_in_a_checkpoint_that_the_base_could_not_go_on_with():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = gam_fast.FedLESAM([weight], torch.optim.AdamW, lr=0.1)
    optimizer.set_direction([torch.ones(1)])
    assert optimizer.state_dict()["state"] == {}
    assert "direction" in optimizer.state[weight]
    optimizer.step(lambda: weight.square().sum().backward())
    assert "direction" in optimizer.state_dict()["state"][0]


def test_a_direction_is_in_a_checkpoint_of_sgd_before_the_first_step():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer, other = (gam_fast.FedLESAM([weight], SGD, lr=0.1) for _ in range(2))
    optimizer.set_direction([torch.tensor([1.0, -2.0])])
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.state[weight]["direction"].tolist() == [1.0, -2.0]


@pytest.mark.parametrize(
    "method", ["MomentumSAM", "PreviousGradientSAM", "FriendlySAM", "VaSSO", "LookSAM", "FedLESAM"]
)
def test_state_that_is_spread_over_processes_is_refused(method):
    class ZeroRedundancyOptimizer(SGD):
        """Stands for torch's, which needs a process group."""

    with pytest.raises(ValueError, match=rf"{method}: .* state of only some parameters on each process.*fully_shard"):
        getattr(gam_fast, method)([torch.nn.Parameter(torch.ones(1))], ZeroRedundancyOptimizer, lr=0.1, momentum=0.9)


def test_a_scaler_that_steps_by_itself_comes_too_late_for_a_method_that_needs_lengths():
    model, optimizer, batches = setting("vasso")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def loop():
        for turn in optimizer.passes():
            scaler.scale(loss_of(model, *batches[0])).backward()
            if turn.last:
                scaler.step(optimizer)

    match = r"step of VaSSO: the method needs the length.*passes\(scaler=scaler\)"
    with unchanged(model, optimizer), pytest.raises(RuntimeError, match=match):
        loop()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"memory": language.Memory("mine", update=(0.0, 1.0))}, "a memory is called .*, got 'mine'"),
        ({"before": language.Perturbation(language.MEMORY, "rho")}, "before the first pass is the only one"),
        ({"path": (language.Perturbation(language.MEMORY, "rho"),)}, "goes along a gradient that is not taken yet"),
        ({"u": (0.5, 1.0), "memory": language.Memory("direction", mix=(0.5, 0.5))}, "mixed into a g0 that serves one"),
        ({"path": (language.HessianProduct(),) * 2, "u": (1.0,) * 3}, "step 1 would differentiate a Hessian-vector"),
        ({"path": (language.Perturbation(0, "rho", offset=0.1),)}, "an offset belongs to a cap"),
        ({"difference": "rho"}, "the first move does not have the radius 'rho'"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(change, match):
    given = {"path": (language.Perturbation(0, "rho"),), "u": (None, 1.0), **change}
    with pytest.raises(ValueError, match=match):
        language.Recipe("Mine", "", {"rho": 0.1}, **given)


def test_a_method_of_ones_own_is_a_recipe_and_a_class():
    """An average of gradients, taken off: as FriendlySAM, along its negative."""

    class Against(gam_fast.SharpnessAwareOptimizer):
        recipe = language.Recipe(
            name="Against",
            citation="this test",
            defaults={"rho": 0.1, "keep": 0.5},
            path=(language.Perturbation(0, "rho", size=language.Value("rho", -1.0)),),
            u=(None, 1.0),
            memory=language.Memory("gradient_average", update=(language.Value("keep"), 1.0)),
        )

    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = Against([weight], SGD, lr=0.5, rho=1.0)
    for x, average in ((2.0, 4.0), (1.0, 4.0)):  # the gradient is 2x; then at x − 1
        assert weight.item() == x
        optimizer.step(lambda: weight.square().sum().backward())
        assert optimizer.state[weight]["gradient_average"].item() == average
    assert weight.item() == 1.0


# What each costs


class Counted:
    """Reads and writes of the native backend in units of N, as backends/base.py gives them, and allocations."""

    def __init__(self, monkeypatch):
        self.traffic = self.allocated = 0
        for name in ("allocate", "square_norm", "perturb", "inner_products", "direction", "update"):
            monkeypatch.setattr(NativeBackend, name, self._counting(name, getattr(NativeBackend, name)))

    def _counting(self, name, original):
        def counting(backend, *args, **options):
            self.traffic += getattr(self, f"_{name}")(*args, **options)
            return original(backend, *args, **options)

        return counting

    def _allocate(self, like):
        self.allocated += 1
        return 0

    def _square_norm(self, leaves, a, b=None, eta=None):
        return 1 + (b is not None)

    def _perturb(self, leaves, a, b, radius, square, *, from_start, eta=None, fold=None, multiple=None):
        folded = 0 if fold is None else 1 + sum(all(x is not y for y in (a, b)) for x in (fold.into, fold.other))
        return 3 + (b is not None) + (not leaves.saved) + folded

    def _used(self, d):
        return sum(any(p) or bool(d.q and any(d.q[t])) for t, p in enumerate(d.p))

    def _inner_products(self, leaves, u, m, groups):
        return sum(any(p) or bool(m and any(m.p[t])) for t, p in enumerate(u.p))

    def _direction(self, leaves, d, out):
        return self._used(d) + 1 + 2 * leaves.saved

    def _update(self, leaves, d, *rest):
        return self._used(d) - 1  # the first takes the place of the gradient


def documented_costs():
    """The table of docs/methods.md: for each class between, in a step, and the traffic of its steps."""
    page = (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    for names, _, *numbers in re.findall(r"^\| (`.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", page, re.MULTILINE):
        for name, coupled in re.findall(r"`(\w+)`( coupled)?", names):
            yield name + coupled, [[int(n) for n in re.findall(r"(\d+)(?: N|$)", number)] for number in numbers]


COSTS = dict(documented_costs())
CASES = {
    type_.optimizer.recipe.name: name for name, type_ in ALL.items() if name not in ("base", "asam", "gam_release")
}
CASES |= {"WSAM": "wsam", "WSAM coupled": "wsam_coupled"}


def test_every_method_has_its_cost_on_the_page():
    assert COSTS.keys() == {*CASES, "RandomSAM", "FedLESAM"}


@pytest.mark.parametrize("name", CASES)
def test_memory_and_traffic_are_those_of_the_page(name, monkeypatch):
    method = ALL[CASES[name]]
    params = [torch.nn.Parameter(torch.randn(40)) for _ in range(3)]
    optimizer = method.optimizer(params, SGD, lr=0.01, momentum=0.9, **method.hyper)

    counted = Counted(monkeypatch)
    held, traffic = 0, []
    for _ in range(7):
        counted.traffic = 0
        for _ in optimizer.passes():
            for block in optimizer._progress.current.blocks.all:
                held = max(held, block.saved + len(block.grads))
            before = counted.allocated
            sum(p.square().sum() for p in params).backward()
        if optimizer.recipe.passes == 1:
            held = max(held, 1 + counted.allocated - before)  # copies at the end
        traffic.append(counted.traffic)
    found = sorted({*traffic[3:]}) if name == "LookSAM" else traffic[-1:]
    between = optimizer.recipe.memory is not None
    assert COSTS[name] == [[int(between)], [held], found]
